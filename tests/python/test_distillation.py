"""Distillation layer by layer, and the recipe of ZeroQuant."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import model_factory
import pytest
import quantloom as ql
import torch
from quantloom import evaluate, models
from typer.testing import CliRunner

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
SETTINGS = {"windows": 4, "window": 24, "held_out_windows": 2}
IDS = model_factory.token_ids(6 * 24)
LKD = "lkd:steps=6:batch=2:checks=3"

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "accelerate",
        "transformers.conversion_mapping",
        "transformers.models.llama.modeling_llama",
        "quantloom.models.quantization",
        "test_distillation",
    ]
)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama(layers=3))


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "timings.json"
    }


def recipe(distillation=LKD, bits=3, **settings):
    settings = {"activations": "int6:token"} | settings
    return ql.Recipe.parse(f"uniform:{bits}:g16", distillation=distillation, **settings)


# -- settings and recipes ----------------------------------------------------------------------------


def test_settings_read_back():
    for spec in ("lkd", "lkd:steps=7:batch=2:rate=0.5:weight-decay=0.0:inputs=student:checks=2:seed=3"):
        settings = ql.parse_distillation(spec)
        assert settings.spec == spec and ql.distillation_from_json(settings.to_json()) == settings
        assert ql.parse_distillation(settings) is settings
    assert ql.parse_distillation("none") is None and ql.parse_distillation(None) is None
    text = recipe().to_json()
    assert ql.Recipe.from_json(text) == recipe() != recipe(None)
    assert "distillation" not in json.loads(recipe(None).to_json())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kld", "distillation: got 'kld', expected none, or lkd"),
        ("lkd:steps=x", "distillation: got option 'steps=x'"),
        ("lkd:rates=1", "distillation: got option 'rates=1'.*rate="),
        ("lkd:steps=1:steps=2", "distillation: got option 'steps' twice"),
        ("lkd:steps=0", "steps: got 0, expected an integer >= 1"),
        ("lkd:seed=4294967296", "seed: got 4294967296, expected an integer below"),
        ("lkd:rate=0", "rate: got 0.0, expected a number > 0"),
        ("lkd:rate=nan", "rate: got nan"),
        ("lkd:weight-decay=-1", "weight_decay: got -1.0"),
        ("lkd:inputs=all", "inputs: got 'all', expected 'teacher' or 'student' or 'both'"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(ValueError, match=message):
        ql.parse_distillation(spec)


def test_recipe_of_zeroquant():
    named = ql.Recipe.named("zeroquant:w4/8a8:g64")
    assert named == ql.Recipe.zeroquant(8, 4, 8, 64)
    assert named.format_for("model.layers.0.self_attn.q_proj") == ql.Uniform(8, 64)
    for name in (
        "model.layers.0.mlp.up_proj",
        "model.decoder.layers.1.fc1",
        "a.block_sparse_moe.experts.0.w1",
    ):
        assert named.format_for(name) == ql.Uniform(4, 64), name
    assert named.activations == ql.ActivationFormat(8)
    assert ql.Recipe.named("zeroquant") == ql.Recipe.zeroquant() == ql.Recipe.named("zeroquant:w8a8:g128")
    assert ql.Recipe.named("zeroquant:w4a16:channel") == ql.Recipe.zeroquant(4, None, None, "channel")
    for bad in ("zeroquant:w9a8", "zeroquant:a8", "zeroquant:w8a1", "zeroquant:g0", "zeroquant:", "one"):
        with pytest.raises(ValueError, match=r"recipe: got .* expected zeroquant"):
            ql.Recipe.named(bad)


def test_what_cannot_be_distilled_is_refused_before_work(model, tmp_path):
    cases = [
        (recipe(), None, {}, "calibration: got None.*distillation needs"),
        (recipe(), IDS, {"held_out_windows": 0}, "held_out_windows: got 0, expected at least 1"),
        (
            dataclasses.replace(recipe(), overrides={"re:.*o_proj": ql.parse_format("bcq:3:g16")}),
            IDS,
            {},
            r"distillation: model.layers.0.self_attn.o_proj: got bcq.*expected uniform, codebook or sdr",
        ),
    ]
    for given, ids, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            models.quantize(model, given, ids, output=tmp_path / "out", **SETTINGS | settings)
        assert not (tmp_path / "out").exists()


# -- what it does ------------------------------------------------------------------------------------


def outputs(network, layer, ids):
    """What enters a decoder layer of a model, and what leaves it."""
    seen = []
    handle = network.model.layers[layer].register_forward_hook(
        lambda _, args, kwargs, out: seen.append(
            ((args[0] if args else kwargs["hidden_states"]), out[0] if isinstance(out, tuple) else out)
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        for row in ids:
            network(input_ids=torch.as_tensor(row[None]), use_cache=False)
    handle.remove()
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


def layer_output(network, layer, hidden):
    """What a decoder layer makes of hidden states [windows, window, hidden]."""
    places = torch.arange(hidden.shape[1])[None]
    positions = network.model.rotary_emb(hidden, places)
    return torch.cat(
        [
            network.model.layers[layer](row[None], position_embeddings=positions, attention_mask=None)
            for row in hidden
        ]
    )


def test_the_report_tells_what_is_stored(model, tmp_path):
    """The first layer, by a loaded checkpoint: its inputs are those of the original."""
    report = models.quantize(model, recipe(), IDS, output=tmp_path / "out", **SETTINGS)
    plain = models.quantize(model, recipe(None), IDS, output=tmp_path / "plain", **SETTINGS)
    assert [entry.block for entry in report.distillation] == [f"model.layers.{i}" for i in range(3)]
    assert plain.distillation == () and models.read_report(tmp_path / "out") == report
    rows = IDS.reshape(6, 24)
    reference = models.load_reference(model)
    for part, before, after in (
        (rows[:4], "loss_before", "loss_after"),
        (rows[4:], "held_out_before", "held_out_after"),
    ):
        hidden, expected = outputs(reference, 0, rows[:4])
        change = (expected - hidden).square().mean()
        hidden, expected = outputs(reference, 0, part)
        for folder, name in (("plain", before), ("out", after)):
            network = models.load(tmp_path / folder, torch.float32, dequantized=True)
            _, found = outputs(network, 0, part)
            loss = float((found - expected).square().mean() / change)
            assert getattr(report.distillation[0], name) == pytest.approx(loss, rel=1e-3)
    for entry in report.distillation:
        assert 0 < entry.best_step <= entry.steps == 6
        assert entry.held_out_after < entry.held_out_before and entry.loss_after < entry.loss_before


def test_a_start_that_nothing_improves_is_kept(model, tmp_path):
    wild = recipe("lkd:steps=3:checks=3:rate=1000")
    report = models.quantize(model, wild, IDS, output=tmp_path / "wild", **SETTINGS)
    models.quantize(model, recipe(None), IDS, output=tmp_path / "plain", **SETTINGS)
    for entry in report.distillation:
        assert entry.best_step == 0
        assert entry.loss_after == entry.loss_before and entry.held_out_after == entry.held_out_before
    assert hashes(tmp_path / "wild")["model.safetensors"] == hashes(tmp_path / "plain")["model.safetensors"]


def test_tables_are_trained_where_codes_stand_for_their_entries(model, tmp_path):
    """AQLM's block fine-tuning: tables, scales and norms."""
    given = ql.Recipe.parse("additive:2x4:g4", "beam_search:rounds=2", distillation=LKD)
    report = models.quantize(model, given, IDS, output=tmp_path / "out", **SETTINGS)
    models.quantize(
        model, dataclasses.replace(given, distillation=None), IDS, output=tmp_path / "plain", **SETTINGS
    )
    first = report.distillation[0]
    assert first.best_step > 0
    assert first.held_out_after < first.held_out_before and first.loss_after < first.loss_before
    assert all(entry.held_out_after <= entry.held_out_before for entry in report.distillation)
    trained, plain = (
        ql.load_tensors(tmp_path / name / "model.safetensors", "torch") for name in ("out", "plain")
    )
    # Blocks that come later were rounded for other inputs.
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(trained[name].planes["codes"], plain[name].planes["codes"])
    for plane in ("codebook", "scales"):
        assert not torch.equal(trained[name].planes[plane], plain[name].planes[plane])
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(trained[norm], plain[norm])


def test_what_is_trained(tmp_path):
    """Codes, norms and biases; not scales, nor Linears that are left out."""
    source = model_factory.write_model(tmp_path / "model", model_factory.phi())
    left = dataclasses.replace(recipe(), ignore=("lm_head", "re:.*fc2"))
    for name, given in (("out", left), ("plain", dataclasses.replace(left, distillation=None))):
        models.quantize(source, given, IDS, output=tmp_path / name, **SETTINGS)
    trained, plain = (
        ql.load_tensors(tmp_path / name / "model.safetensors", "torch") for name in ("out", "plain")
    )
    original = ql.load_tensors(source / "model.safetensors", "torch")
    layer = "model.layers.0."
    for name in ("input_layernorm.weight", "input_layernorm.bias", "self_attn.q_proj.bias", "mlp.fc1.bias"):
        assert trained[layer + name].dtype == torch.bfloat16
        assert not torch.equal(trained[layer + name], original[layer + name]), name
        assert torch.equal(plain[layer + name], original[layer + name])
    for name in ("mlp.fc2.weight", "mlp.fc2.bias"):
        assert torch.equal(trained[layer + name], original[layer + name])
    for name in ("self_attn.q_proj", "mlp.fc1"):
        assert torch.equal(trained[layer + name].planes["scales"], plain[layer + name].planes["scales"])
        assert not torch.equal(trained[layer + name].planes["codes"], plain[layer + name].planes["codes"])
    assert torch.equal(trained["lm_head.weight"], original["lm_head.weight"])


CASES = {
    "gptq": {"rounding": "gptq", "format": "uniform:3:g16:asym"},
    "gptq, student": {"rounding": "gptq", "distillation": f"{LKD}:inputs=student"},
    "smoothquant": {"rounding": "smoothquant", "activations": "int6:token"},
    "smoothquant, gptq": {"rounding": "smoothquant+gptq", "activations": "int6:tensor:static"},
    "sdr": {"format": "sdr:3:g8", "activations": "sdr4:g8:b16"},
    "sdr, gptq": {"format": "sdr:3:g8", "rounding": "gptq"},
    "codebook": {"format": "codebook:nf3:g16"},
    "outliers": {"rounding": "gptq:outliers=2%"},
    "static columns": {"activations": "int6:token:outliers=2:static-outliers"},
    "rotated": {"transform": "hadamard:b16", "activations": "int6:token"},
}


@pytest.mark.parametrize("case", CASES)
def test_other_roundings_and_formats(case, model, tmp_path):
    settings = {"format": "uniform:3:g16", "distillation": LKD} | CASES[case]
    format, rounding = settings.pop("format"), settings.pop("rounding", "nearest")
    given = ql.Recipe.parse(format, rounding, **settings)
    ids, more = model_factory.token_ids(18 * 24), SETTINGS | {"windows": 16}
    report = models.quantize(model, given, ids, output=tmp_path / "out", **more)
    plain = dataclasses.replace(given, distillation=None)
    before = models.quantize(model, plain, ids, output=tmp_path / "plain", **more)
    first = report.distillation[0]
    # Feedback fits so few tokens that training on them need not help others.
    assert first.held_out_after < first.held_out_before or ("gptq" in rounding and not first.best_step)
    assert [m.bits for m in report.modules[:7]] == [m.bits for m in before.modules[:7]]
    network = models.load(tmp_path / "out", torch.float32)
    decoded = models.load(tmp_path / "out", torch.float32, dequantized=True)
    window = torch.as_tensor(ids[None, :24])
    with torch.no_grad():
        a, b = network(window).logits, decoded(window).logits
    assert float((a - b).norm()) < 1e-3 * float(b.norm())


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "opt"])
def test_other_families(family, tmp_path):
    source = model_factory.write_model(tmp_path / "model", model_factory.FAMILIES[family]())
    report = models.quantize(source, recipe(), IDS, output=tmp_path / "out", **SETTINGS)
    assert all(entry.held_out_after < entry.held_out_before for entry in report.distillation)
    network = models.load(tmp_path / "out", torch.float32)
    with torch.no_grad():
        assert torch.isfinite(network(torch.as_tensor(IDS[None, :24])).logits).all()


def test_the_embedded_model_comes_closer(tmp_path):
    reference, ids = models.load_reference(TINY), evaluate.tokens(TINY, TINY / "valid.txt")
    found = {}
    for distillation in (None, "lkd:steps=25:batch=1:checks=2"):
        given = ql.Recipe.zeroquant(8, 4, group_size=64, distillation=distillation)
        out = tmp_path / str(distillation).replace(":", "_")
        settings = {"windows": 24, "window": 64, "held_out_windows": 4}
        models.quantize(TINY, given, TINY / "calib.txt", output=out, **settings)
        network = models.load(out, torch.float32, dequantized=True)
        found[distillation] = evaluate.compare(network, reference, ids, 64, 24).kl
    print(found)
    assert found["lkd:steps=25:batch=1:checks=2"] < 0.9 * found[None]


def test_which_inputs(model, tmp_path):
    """The second layer of a checkpoint: what enters the rounded one and the original one."""
    rows, reference = IDS.reshape(6, 24), models.load_reference(model)
    for inputs in ("teacher", "student", "both"):
        given = recipe(f"{LKD}:inputs={inputs}", activations=None)
        report = models.quantize(model, given, IDS, output=tmp_path / inputs, **SETTINGS)
        network = models.load(tmp_path / inputs, torch.float32, dequantized=True)
        losses = []
        for part in (rows[:4], rows[4:]):
            teacher, expected = outputs(reference, 1, part)
            student, found = outputs(network, 1, part)
            with torch.no_grad():
                if inputs == "teacher":
                    found = layer_output(network, 1, teacher)
                if inputs == "student":
                    expected = layer_output(reference, 1, student)
            hidden = teacher if inputs == "teacher" else student
            losses.append((float((found - expected).square().mean()), (expected - hidden).square().mean()))
        entry = report.distillation[1]
        assert entry.loss_after == pytest.approx(losses[0][0] / float(losses[0][1]), rel=1e-3)
        assert entry.held_out_after == pytest.approx(losses[1][0] / float(losses[0][1]), rel=1e-3)


# -- repeated and resumed ----------------------------------------------------------------------------


def test_repeats_and_depends_on_the_seed(model, tmp_path):
    for name, spec in (("a", LKD), ("b", LKD), ("c", f"{LKD}:seed=1")):
        models.quantize(model, recipe(spec), IDS, output=tmp_path / name, **SETTINGS)
    a, b, c = (hashes(tmp_path / name)["model.safetensors"] for name in "abc")
    assert a == b != c


def run_and_die(model, out, event):
    torch.set_num_threads(1)
    seen = 0

    def progress(_):
        nonlocal seen
        seen += 1
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)

    models.quantize(model, recipe(), IDS, output=out, progress=progress, **SETTINGS)


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("inputs", ["teacher", "both"])
def test_interrupted_runs_end_the_same(inputs, model, tmp_path):
    given, events = recipe(f"{LKD}:inputs={inputs}"), []
    models.quantize(model, given, IDS, output=tmp_path / "whole", progress=events.append, **SETTINGS)
    expected = hashes(tmp_path / "whole")
    phases = [(event.phase, event.block) for event in events]
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1, abs=0.02)
    # Within, just after and between the blocks' training, and at the very end.
    points = {phases.index(("distil", block)) + 1 for block in range(3)}
    points |= {phases.index(("propagate", 0)) + 1, phases.index(("propagate", 1)) + 1}
    points |= set(range(20, len(events), 41)) | {len(events) - 1}
    for point in sorted(points):
        out, seen = tmp_path / f"{point}", 0

        def progress(_, stop=point):
            nonlocal seen
            seen += 1
            if seen == stop:
                raise _Interrupt

        with pytest.raises(_Interrupt):
            models.quantize(model, given, IDS, output=out, progress=progress, **SETTINGS)
        again = []
        models.quantize(model, given, IDS, output=out, progress=again.append, **SETTINGS)
        assert hashes(out) == expected, f"interrupted at event {point} of {len(events)}"
        if point == len(events) - 1:
            assert all(event.phase != "distil" for event in again)


def test_killed_runs_end_the_same(model, tmp_path):
    events = []
    models.quantize(model, recipe(), IDS, output=tmp_path / "whole", progress=events.append, **SETTINGS)
    for point in (len(events) // 2, len(events) - 10):
        out = tmp_path / str(point)
        child = PROCESSES.Process(target=run_and_die, args=(model, out, point))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        models.quantize(model, recipe(), IDS, output=out, **SETTINGS)
        assert hashes(out) == hashes(tmp_path / "whole")


# -- command line ------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    from quantloom.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    common = ["-c", TINY / "calib.txt", "--windows", 2, "--window", 32, "--held-out-windows", 1]
    options = ["--recipe", "zeroquant:w4/8a8:g64", "--distillation", "lkd:steps=2:batch=1:checks=1"]
    result = run("quantize", TINY, "-o", tmp_path / "out", *options, *common)
    assert result.exit_code == 0, result.output
    assert "distilled" in result.output and "model.layers.3" in result.output
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert ql.Recipe.from_json(json.dumps(stored)).distillation == ql.LayerDistillation(2, 1, checks=1)
    assert run("plan", TINY, *options, "--windows", 2, "--window", 32).exit_code == 0
    for wrong in (["--recipe", "zeroquant:w12a8"], ["--distillation", "lkd:step=2"], options):
        assert run("quantize", TINY, "-o", tmp_path / "bad", *wrong).exit_code == 2, wrong
    assert not (tmp_path / "bad").exists()
