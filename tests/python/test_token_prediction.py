"""Runs on language models: losses against plain formulas, Fisher information against gradients, training."""

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import model_factory
from quantloom import experiments as E
from quantloom import fit as F
from quantloom import formats as Q
from quantloom import quantisation_training as T
from quantloom.experiments import fisher, plots, qat
from quantloom.experiments import token_prediction as ET

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
SPEC = F.Scaled(3, "int", Q.BFLOAT16, (1, None), "absmax", scaling_match="moments")


@pytest.fixture
def model():
    return model_factory.build(model_factory.llama())


@pytest.fixture
def ids():
    return model_factory.token_ids(400)


def test_dataset_cuts_shuffles_and_fills_up(model, ids):
    data = ET.Dataset.load(model, ids, sequence_length=16, batch_size=4, kl_topk=5)
    assert (data.n_batch, data.batch_size, data.sequence_length, data.kl_topk) == (7, 4, 16, 5)
    assert int(data.masks.sum()) == 400 // 15 == 26
    assert data.masks.flatten()[:26].all()
    sequences = {tuple(row) for row in data.tokens.flatten(0, 1)[:26].tolist()}
    assert sequences == {tuple(ids[first : first + 15]) for first in range(0, 390, 15)}
    assert (
        data.tokens[0, 0].tolist() != ids[:15].tolist() or data.tokens[0, 1].tolist() != ids[15:30].tolist()
    )
    again = ET.Dataset.load(model, torch.from_numpy(ids), 16, 4, 5)
    assert again.tokens.equal(data.tokens)
    assert not ET.Dataset.load(model, ids, 16, 4, 0, seed=1).tokens.equal(data.tokens)
    limited = ET.Dataset.load(model, ids, 16, 4, 0, sequence_limit=3)
    assert limited.tokens[0, :3].equal(data.tokens[0, :3])
    assert "(7, 4, 16)" in repr(data)


def test_losses_against_formulas(model, ids):
    torch.manual_seed(0)
    data = ET.Dataset.load(model, ids, sequence_length=16, batch_size=4, kl_topk=8)
    other = model_factory.build(model_factory.llama(), seed=1)
    losses = data.evaluate(other)
    assert losses["kl_div"].shape == losses["cross_entropy"].shape == (26,)
    place = 0
    for index in range(data.n_batch):
        for row in range(4):
            if not data.masks[index, row]:
                continue
            tokens = torch.cat([torch.tensor([0]), data.tokens[index, row]])[None]
            with torch.no_grad():
                p = model(tokens).logits[0].double().softmax(-1)
                q = other(tokens).logits[0].double().softmax(-1)
            entropy = -np.mean([math.log(q[t, tokens[0, t + 1]]) for t in range(15)])
            assert losses["cross_entropy"][place].item() == pytest.approx(entropy, rel=1e-4)
            kl = []
            for t in range(16):
                top = p[t].topk(8).indices
                tail_p, tail_q = max(1 - p[t, top].sum().item(), 1e-6), max(1 - q[t, top].sum().item(), 1e-6)
                terms = [p[t, k].item() * math.log(p[t, k] / q[t, k]) for k in top]
                kl.append(sum(terms) + tail_p * math.log(tail_p / tail_q))
            assert losses["kl_div"][place].item() == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-5)
            place += 1


def test_top_k_of_the_whole_vocabulary_is_the_whole_divergence(model, ids):
    other = model_factory.build(model_factory.llama(), seed=1)
    whole = ET.Dataset.load(model, ids, 16, 4, kl_topk=model_factory.VOCABULARY)
    with torch.no_grad():
        p, q = (
            m(torch.nn.functional.pad(whole.tokens[0], (1, 0))).logits.log_softmax(-1) for m in (model, other)
        )
    expected = (p.exp() * (p - q)).sum(-1).mean(-1)
    torch.testing.assert_close(whole.batch_losses(other, 0)["kl_div"], expected, rtol=1e-3, atol=1e-5)
    for k in (1, 8, 97):
        data = ET.Dataset.load(model, ids, 16, 4, kl_topk=k)
        assert data.evaluate(model)["kl_div"].abs().max() < 1e-5
        # Tokens taken together tell less than each of them.
        assert (data.evaluate(other)["kl_div"] <= whole.evaluate(other)["kl_div"] + 1e-5).all()


def test_evaluate_leaves_the_mode(model, ids):
    data = ET.Dataset.load(model, ids, 16, 4, 4)
    model.train()
    data.evaluate(model)
    assert model.training
    assert "kl_div" not in ET.Dataset.load(model, ids, 16, 4, 0).evaluate(model)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sequence_length": 1}, "sequence_length"),
        ({"batch_size": 0}, "batch_size"),
        ({"kl_topk": 98}, "kl_topk: got 98, expected at most the vocabulary of 97"),
        ({"sequence_length": 500}, "text: got 400 tokens"),
        ({"text": np.ones(3)}, "expected integers"),
        ({"text": "missing.txt"}, "does not know its folder"),
        ({"sequence_limit": 0}, "sequence_limit"),
    ],
)
def test_dataset_refuses(model, ids, arguments, match):
    with pytest.raises(ValueError, match=match):
        ET.Dataset.load(model, **{"text": ids, "sequence_length": 16, "kl_topk": 4, **arguments})


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model_factory.write_model(path / "model", model_factory.llama())
    model_factory.token_ids(400).astype("<u2").tofile(path / "text.u16")
    return path


def run_of(folder, test, experiment="exp", **settings):
    model, text = folder / "model", folder / "text.u16"
    settings = {"sequence_length": 16, "kl_topk": 8, "sequence_limit": 8, **settings}
    return ET.Run(experiment, test, str(model), str(text), **settings)


def test_requantisable_model(folder):
    model = E.RequantisableModel.load(folder / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.model.get_parameter(name).detach().clone()
    from quantloom import model_quantisation as M

    M.quantise_2d_fixed(model.model, SPEC)
    assert not model.model.get_parameter(name).equal(before)
    model.reset_parameter(name)
    assert model.model.get_parameter(name).equal(before)
    model.reset()
    M.quantise_2d_fixed(model.model, SPEC)  # nothing counts as quantized any more
    model.reset()
    assert all(value.equal(model.original_params[key]) for key, value in model.model.named_parameters())
    assert model.device == torch.device("cpu")
    with pytest.raises(KeyError, match="no parameter 'x'"):
        model.reset_parameter("x")


def test_sweep_of_tests(folder, tmp_path):
    tests = [
        ET.Baseline(),
        ET.QuantiseFixed(SPEC),
        ET.QuantiseFixed(SPEC, encoded=True),
        ET.QuantiseHeuristic(SPEC, highp_first_layers=1, highp_last_layers=0),
        ET.QuantiseFixed(Q.LinearScalingFormat(Q.IntFormat(6), Q.BFLOAT16, (1, None), "absmax")),
        ET.QuantiseFixed(F.Scaled(3, "int", Q.BFLOAT16, (1, 48), "absmax")),  # 64 is no multiple of 48
    ]
    runs = ET.run_sweep([run_of(folder, test) for test in tests], folder=tmp_path)
    assert [run.meta.status for run in runs] == ["finished"] * 5 + ["failed"]
    assert "Failed to quantise" in runs[-1].error.message
    kl = [np.mean(run.summary.kl_div) for run in runs[:-1]]
    assert abs(kl[0]) < 1e-5
    assert kl[1] == kl[2] > kl[3] > kl[4] > kl[0]
    assert 3 < runs[1].summary.bits_per_param < 4 < runs[3].summary.bits_per_param < 6
    stored = runs[2].summary
    assert stored.bits_per_param <= stored.measured_bits_per_param < stored.bits_per_param + 0.5
    assert runs[1].config.test.fmt_str == str(SPEC)
    assert Q.TensorFormat.load(runs[1].config.test.fmt) == SPEC
    assert runs[1].config.sequence_length == 16
    assert len(runs[1].summary.kl_div) == 8
    # The same again: nothing is run.
    again = ET.run_sweep([run_of(folder, test) for test in tests[:5]], folder=tmp_path)
    assert [run.id for run in again] == [run.id for run in runs[:5]]

    plots.plot_tradeoff(runs, tmp_path / "tradeoff.png", "title")
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no point"):
        plots.plot_tradeoff(runs[-1:], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_each_parameter(folder, tmp_path):
    runs = ET.run_sweep(
        [
            run_of(folder, ET.QuantiseEachParam(SPEC), "each"),
            run_of(folder, ET.PerturbEachParam(0.1), "noise"),
        ],
        folder=tmp_path,
    )
    matrices = 1 + 2 * 7  # tied embeddings, seven projections in each of two layers
    assert len(runs) == 2 * matrices
    assert all(run.meta.status == "finished" for run in runs)
    assert len({run.config.parameter for run in runs}) == matrices
    assert all(np.mean(run.summary.kl_div) > 0 for run in runs)
    assert all(run.summary.rmse > 0 for run in runs[:matrices])


def test_sweep_in_processes(folder, tmp_path):
    tests = [ET.Baseline(), ET.QuantiseFixed(SPEC)]
    alone = ET.run_sweep([run_of(folder, test) for test in tests], folder=tmp_path / "a")
    together = ET.run_sweep([run_of(folder, test) for test in tests], processes=2, folder=tmp_path / "b")
    for one, other in zip(alone, together):
        assert other.meta.status == "finished"
        np.testing.assert_allclose(one.summary.kl_div, other.summary.kl_div, rtol=1e-4, atol=1e-6)


# Fisher information


def reference_fisher(model, data, targets_of):
    """The squared gradient of one position's log-likelihood at a time, through its own outputs only."""
    total = {}
    for index in range(data.n_batch):
        for row in torch.nonzero(data.masks[index]).flatten().tolist():
            tokens = torch.nn.functional.pad(data.tokens[index, row], (1, 0))[None]
            targets = targets_of(index, row)
            hidden = {}

            def keep(module, args, output, hidden=hidden):
                hidden["x"] = args[0]

            handle = model.lm_head.register_forward_hook(keep)
            logits = model(tokens).logits[0, :-1]
            handle.remove()
            for t in range(targets.shape[0]):
                (gradient,) = torch.autograd.grad(
                    -logits[t].log_softmax(-1)[targets[t]], logits, retain_graph=True
                )
                outer = gradient[t][:, None] * hidden["x"][0, t][None]
                total["lm_head.weight"] = total.get("lm_head.weight", 0) + outer.detach().square()
    count = int(data.masks.sum()) * (data.sequence_length - 1)
    return {name: value / count for name, value in total.items()}


def test_fisher_of_the_head():
    """Of the last layer, whose outputs at one position depend on no other, the sum is exact."""
    model = model_factory.build(model_factory.llama(tied=False))
    data = ET.Dataset.load(model, model_factory.token_ids(100), 12, 4, 0)
    expected = reference_fisher(model, data, lambda index, row: data.tokens[index, row])
    model.train()
    found = fisher.diag_fisher(data, model, "empirical")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(found) == {name for name, value in model.named_parameters() if value.ndim == 2}
    torch.testing.assert_close(found["lm_head.weight"], expected["lm_head.weight"], rtol=1e-3, atol=1e-9)


def test_fisher_predicts_the_divergence():
    """KL of a small change of the head is half the Fisher-weighted sum of squares, in the mean over signs."""
    model = model_factory.build(model_factory.llama(tied=False))
    data = ET.Dataset.load(model, model_factory.token_ids(2000), 24, 4, kl_topk=97)
    found = fisher.diag_fisher(data, model, "single_sample", seed=1)
    weight = model.lm_head.weight
    original = weight.detach().clone()
    generator = torch.Generator().manual_seed(2)
    scale = 0.02 * original.square().mean().sqrt()
    predicted = 0.5 * float(found["lm_head.weight"].sum()) * float(scale) ** 2
    measured = []
    for _ in range(8):
        with torch.no_grad():
            weight.copy_(original + scale * (torch.randint(2, weight.shape, generator=generator) * 2 - 1))
        measured.append(float(data.evaluate(model)["kl_div"].double().mean()))
    assert np.mean(measured) == pytest.approx(predicted, rel=0.1)


def test_fisher_of_tied_weights_and_seeds(model, ids):
    data = ET.Dataset.load(model, ids, 16, 4, 0)
    found = fisher.diag_fisher(data, model)
    assert "model.embed_tokens.weight" in found
    assert "lm_head.weight" not in found, "one tensor has one entry, the sum of both uses"
    again = fisher.diag_fisher(data, model)
    other = fisher.diag_fisher(data, model, seed=5)
    name = "model.layers.1.mlp.down_proj.weight"
    assert again[name].equal(found[name])
    assert not other[name].equal(found[name])
    sums = fisher.fisher_sum(found)
    assert sums[name] == pytest.approx(float(found[name].double().sum()))
    with pytest.raises(ValueError, match="mode"):
        fisher.diag_fisher(data, model, "exact")


def test_fisher_is_stored_and_used(folder, tmp_path):
    model = E.RequantisableModel.load(folder / "model")
    name = str(folder / "model")
    data = ET.Dataset.load(model.model, model_factory.token_ids(200), 16, 4, 0)
    run = fisher.record_fisher("fisher", name, data, model.model, folder=tmp_path)
    tensors = fisher.fetch_fisher("fisher", name, folder=tmp_path)
    sums = fisher.fetch_fisher_sum("fisher", name, folder=tmp_path)
    assert sums == run.summary.fisher
    assert set(tensors) == set(sums)
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())
    with pytest.raises(KeyError, match="no Fisher information"):
        fisher.fetch_fisher("fisher", "another", folder=tmp_path)


def test_variable_and_weighted_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLOOM_RUNS", str(tmp_path))
    model = E.RequantisableModel.load(folder / "model")
    data = ET.Dataset.load(model.model, model_factory.token_ids(200), 16, 4, 0)
    fisher.record_fisher("fisher", str(folder / "model"), data, model.model)
    spec = F.Scaled(4, "int", Q.BFLOAT16, (None, None), "rms")
    runs = ET.run_sweep(
        [
            run_of(folder, test)
            for test in (
                ET.QuantiseVariable(spec),
                ET.QuantiseFixed(spec, error_weight="fisher"),
                ET.QuantiseFixed(spec, error_weight="parameter"),
                ET.QuantiseFixed(spec, error_weight="other"),
            )
        ]
    )
    assert [run.meta.status for run in runs] == ["finished"] * 3 + ["failed"]
    assert abs(runs[0].summary.bits_per_param - runs[1].summary.bits_per_param) < 1
    assert runs[1].summary.kl_div != runs[2].summary.kl_div


# Training


def test_kl_loss_equals_torch():
    torch.manual_seed(100)
    reference = torch.randn(3, 5, 16)
    ours = (reference + 0.1 * torch.randn_like(reference)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    mask = torch.rand(3, 5) < 0.75
    for chosen in (None, mask):
        ours.grad = theirs.grad = None
        loss = qat.kl_loss(ours, reference, chosen)
        loss.backward()
        expected = torch.nn.functional.kl_div(
            theirs.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
        )
        expected = (expected if chosen is None else expected * chosen[..., None]).sum()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
    impossible = reference.clone()
    impossible[..., 0] = -math.inf
    assert qat.kl_loss(ours, impossible).isfinite()


@pytest.mark.parametrize("mode", ["parameter", "dynamic"])
def test_training_brings_the_model_closer(folder, tmp_path, mode):
    test = qat.QAT(
        SPEC, mode, train_text=str(folder / "text.u16"), steps=12, learning_rate=2e-3, train_batch_size=8
    )
    before, after = ET.run_sweep(
        [run_of(folder, ET.QuantiseFixed(SPEC)), run_of(folder, test)], folder=tmp_path
    )
    assert after.meta.status == "finished", after.error
    assert len(after.summary.train_loss) == 12
    assert after.summary.train_loss[-1] < after.summary.train_loss[0]
    assert np.mean(after.summary.kl_div) < np.mean(before.summary.kl_div)
    assert after.summary.measured_bits_per_param == pytest.approx(after.summary.bits_per_param, abs=0.5)


def test_training_touches_the_converted_weights_only(model, ids):
    data = ET.Dataset.load(model, ids, 16, 4, 0)
    student = model_factory.build(model_factory.llama())
    T.convert(student, SPEC, "parameter", False)
    others = {name: value.detach().clone() for name, value in T.get_named_parameters(student, "other")}
    qat.train(student, model, data, steps=2, learning_rate=1e-3)
    for name, value in T.get_named_parameters(student, "other"):
        assert value.equal(others[name])
        assert value.requires_grad
    with pytest.raises(RuntimeError, match="the loss is nan at step"):
        qat.train(student, model, data, steps=50, learning_rate=1e30)


def test_the_embedded_model_in_a_run(tmp_path):
    """Three formats of about 3 bits on a trained model, in the order that the published comparison has."""
    whole = {"block_shape": (None, None), "scaling": "rms"}
    specs = [
        F.Scaled(3, "int", Q.BFLOAT16, **whole, compressor="optimal"),
        F.Scaled(
            3, "t", Q.BFLOAT16, **whole, sparse_format=Q.BFLOAT16, sparse_ratio=2**-10, args={"df": 7.0}
        ),
        F.Scaled(3, "t", Q.BFLOAT16, (None, None), "absmax", args={"df": 7.0}),
    ]
    settings = {"sequence_length": 64, "sequence_limit": 8, "batch_size": 8}
    runs = ET.run_sweep(
        [
            ET.Run("exp", test, str(TINY), str(TINY / "valid.txt"), **settings)
            for test in (ET.Baseline(), *(ET.QuantiseFixed(spec) for spec in specs))
        ],
        folder=tmp_path,
    )
    assert [run.meta.status for run in runs] == ["finished"] * 4
    kl = [np.mean(run.summary.kl_div) for run in runs]
    assert abs(kl[0]) < 1e-4
    assert 0.01 < kl[1] < kl[2] < kl[3]
    assert runs[1].summary.bits_per_param < 3.1
