"""KVQuant: calibration, its files, and caches in its format."""

import copy
import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import model_factory
import numpy as np
import quantloom as ql
from quantloom.cli import app
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def calibration(model):
    return ql.kv.calibrate(model, ids(300), "kvquant:3:1%", windows=6, window=48)


def ids(count, seed=1):
    return model_factory.token_ids(count, seed)


def recorded(model, row):
    """Keys and values of all layers after rotation, and the squares' roots: gradients of the text's loss."""
    kept = []

    class Cache(transformers.DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            keys.retain_grad()
            values.retain_grad()
            kept.append((keys, values))
            return keys, values

    inputs = model.get_input_embeddings()(torch.from_numpy(row[None])).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, past_key_values=Cache(), use_cache=True).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(row[1:]), reduction="sum").backward()
    return kept


def test_tables_are_the_k_means_of_what_was_seen(model, calibration):
    """The ranges and tables of a layer, computed again by plain loops."""
    rows = ids(300)[: 6 * 48].reshape(6, 48)
    kept = [recorded(model, row) for row in rows]
    layer = 1
    rotary = model.model.rotary_emb
    keys, weights, values, value_weights = [], [], [], []
    for each in kept:
        k, v = each[layer]
        cosines, sines = rotary(k, torch.arange(48)[None])
        for x, to in ((k.detach(), keys), (k.grad, weights)):
            half = x.shape[-1] // 2
            turned = torch.cat([x[..., half:], -x[..., :half]], dim=-1)
            to.append((x * cosines[:, None] + turned * sines[:, None])[0, :, 1:].transpose(0, 1))
        values.append(v.detach()[0, :, 1:].transpose(0, 1))
        value_weights.append(v.grad[0, :, 1:].transpose(0, 1))
    keys, weights = torch.cat(keys).numpy(), torch.cat(weights).numpy()
    tables = calibration.layers[layer]
    low, high = np.quantile(keys, [0.005, 0.995], axis=0)
    np.testing.assert_allclose(tables.key_scale, (high - low) / 2, rtol=2e-3)
    np.testing.assert_allclose(tables.key_middle, (high + low) / 2, rtol=2e-3, atol=2e-3)
    values, value_weights = torch.cat(values).numpy(), torch.cat(value_weights).numpy()
    # 16 channels of 1%: one token in six or seven has one outlier.
    counts = [(t + 1) * 16 // 100 - t * 16 // 100 for t in range(len(values))]
    scale, middle = np.empty(values.shape[:2]), np.empty(values.shape[:2])
    for t, count in enumerate(counts):
        for h in range(values.shape[1]):
            x = np.sort(values[t, h])
            ranges = [(x[len(x) - 1 - count + i] - x[i], i) for i in range(count + 1)]
            i = min(ranges)[1]
            scale[t, h], middle[t, h] = (
                (x[len(x) - 1 - count + i] - x[i]) / 2,
                (x[len(x) - 1 - count + i] + x[i]) / 2,
            )
    for x, s, m, w, bounds, table in (
        (keys, tables.key_scale, tables.key_middle, weights, tables.key_bounds, tables.key_values),
        (
            values,
            scale[..., None],
            middle[..., None],
            value_weights,
            tables.value_bounds,
            tables.value_values,
        ),
    ):
        normalized = (x - m) / s
        inside = np.abs(normalized) <= 1.01
        sample, weight = normalized[inside], (np.broadcast_to(s, x.shape) * w)[inside] ** 2
        codes = np.searchsorted(bounds, sample)
        centres = [np.average(sample[codes == c], weights=weight[codes == c]) for c in range(8)]
        np.testing.assert_allclose(table, centres, atol=0.02)  # a fixed point of k-means, in float16
        assert np.all(np.diff(table) > 0)
        np.testing.assert_allclose(bounds, (table[1:] + table[:-1]) / 2, atol=1e-3)


def test_weights_and_q_norm_change_tables_as_they_say(model):
    model.zero_grad(set_to_none=True)
    plain = ql.kv.calibrate(model, ids(300), "kvquant:2:1%", windows=6, window=48, fisher=False)
    fisher = ql.kv.calibrate(model, ids(300), "kvquant:2:1%", windows=6, window=48)
    normed = ql.kv.calibrate(model, ids(300), "kvquant:2:1%", windows=6, window=48, fisher=False, q_norm=True)
    again = ql.kv.calibrate(model, ids(300), "kvquant:2:1%", windows=6, window=48)
    for layer, (a, b, c, d) in enumerate(zip(plain.layers, fisher.layers, normed.layers, again.layers)):
        np.testing.assert_array_equal(b.key_values, d.key_values)
        np.testing.assert_array_equal(a.key_scale, b.key_scale)
        assert not np.array_equal(a.key_values, b.key_values), layer
        np.testing.assert_array_equal(a.key_bounds, c.key_bounds)
        # Centroids lose deviation; Q-Norm gives it back.
        assert np.ptp(c.key_values) > np.ptp(a.key_values)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_files_come_back(calibration, tmp_path):
    path = tmp_path / "kv.safetensors"
    calibration.save(path)
    other = ql.kv.KVCalibration.load(path)
    assert other.format == calibration.format
    np.testing.assert_array_equal(other.rotary.inverse_frequencies, calibration.rotary.inverse_frequencies)
    for a, b in zip(calibration.layers, other.layers):
        for name in ("key_bounds", "key_values", "value_bounds", "value_values", "key_scale", "key_middle"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    ql.save_tensors(path, {"x": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="no calibration"):
        ql.kv.KVCalibration.load(path)
    ql.save_tensors(path, {"x": np.zeros(3, np.float32)}, {"kv_cache": json.dumps({"layers": 1})})
    with pytest.raises(ValueError, match="not a calibration"):
        ql.kv.KVCalibration.load(path)


def test_angles_are_those_of_the_model(model, calibration):
    cosines, sines = calibration.rotary.angles(48)
    expected = model.model.rotary_emb(torch.zeros(1), torch.arange(48)[None])
    half = cosines.shape[1]
    np.testing.assert_allclose(cosines, expected[0][0, :, :half].numpy(), atol=1e-6)
    np.testing.assert_allclose(sines, expected[1][0, :, :half].numpy(), atol=1e-6)


def test_both_attentions_agree_and_generate(model, calibration):
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    ql.kv.use_attention(ours)
    theirs.set_attn_implementation("sdpa")
    tokens = torch.from_numpy(ids(48, 7)[None])

    def logits(model):
        cache = ql.kv.KVQuantCache(model.config, calibration, capacity=64)
        with torch.no_grad():
            steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(48)]
        return torch.cat(steps, dim=1), cache

    (a, cache), (b, _) = logits(ours), logits(theirs)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        exact = theirs(tokens, use_cache=False).logits
    assert (a - exact)[:, 2:].abs().amax(dim=(0, 2)).amin() > 1e-4  # every token after the first sees codes
    torch.testing.assert_close(a[:, :1], exact[:, :1], rtol=1e-4, atol=1e-4)
    assert [layer.cache.coded_keys(0) for layer in cache.layers] == [47, 47]
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        more = [ours(tokens[:, :1], past_key_values=each).logits for each in (cache, twin)]
    assert torch.equal(*more)
    full = ql.kv.KVQuantCache(ours.config, calibration)
    with pytest.raises(ValueError, match="expected tokens below 48"), torch.no_grad():
        ours(torch.cat([tokens, tokens[:, :1]], dim=1), past_key_values=full)
    prompt = tokens[:, :20].repeat(2, 1)
    mask = torch.ones_like(prompt)
    mask[1, :6] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 2):
        out = ours.generate(
            prompt,
            attention_mask=mask,
            past_key_values=ql.kv.KVQuantCache(ours.config, calibration),
            num_beams=beams,
            **settings,
        )
        for s, start in ((0, 0), (1, 6)):
            row = prompt[s : s + 1, start:]
            cache = ql.kv.KVQuantCache(ours.config, calibration)
            alone = ours.generate(
                row, attention_mask=torch.ones_like(row), past_key_values=cache, num_beams=beams, **settings
            )
            assert torch.equal(alone[0, row.shape[1] :], out[s, 20:])


def test_more_bits_and_fitted_tables_err_less(model, calibration):
    reference = copy.deepcopy(model)

    def kl(format, calibration=None):
        cached = ql.kv.CachedModel(model, format, calibration=calibration)
        return ql.evaluate.compare(cached, reference, ids(192, 3), window=48).kl

    four = ql.kv.calibrate(model, ids(300), "kvquant:4:1%", windows=6, window=48)
    two = ql.kv.calibrate(model, ids(300), "kvquant:2:1%", windows=6, window=48)
    errors = [kl(each.format, each) for each in (four, calibration, two)]
    assert errors == sorted(errors)
    even, bounds = np.linspace(-1, 1, 4, dtype=np.float32), np.array([-2 / 3, 0, 2 / 3], np.float32)
    even = even.astype(np.float16).astype(np.float32)
    layers = [
        dataclasses.replace(layer, key_values=even, value_values=even, key_bounds=bounds, value_bounds=bounds)
        for layer in two.layers
    ]
    assert errors[2] < 0.9 * kl(two.format, ql.kv.KVCalibration(two.format, layers, two.rotary))


def test_quantize_then_eval_from_the_shell(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    text, output = tmp_path / "text.u16", tmp_path / "kv.safetensors"
    ids(300).astype("<u2").tofile(text)
    arguments = f"kv-calibrate {folder} --format kvquant:3:2% --calibration {text} --window 48 -o {output}"
    run = CliRunner().invoke(app, [*arguments.split(), "--windows", "4", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["format"] == "kvquant:3:2%:first1"
    arguments = (
        f"eval {folder} --reference {folder} --text {text} --window 48 --windows 2 --kv {output} --json"
    )
    run = CliRunner().invoke(app, arguments.split())
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert result["kv"] == "kvquant:3:2%:first1"
    assert 0 < result["kl"] < 1
    assert (
        CliRunner().invoke(app, [*arguments.replace("3:2%", "2:2%").split(), "--kv", "kvquant:3"]).exit_code
        != 0
    )
    wrong = f"kv-calibrate {folder} --calibration {text} --window 48 --windows 1 --device gpu -o {output}"
    assert CliRunner().invoke(app, wrong.split()).exit_code != 0
    wrong = f"kv-calibrate {folder} --format kivi:2 --calibration {text} -o {output}"
    assert CliRunner().invoke(app, wrong.split()).exit_code != 0
    wrong = f"kv-calibrate {folder} --calibration {text} -o {tmp_path}/none/kv.safetensors"
    assert "output: no such folder" in CliRunner().invoke(app, wrong.split()).stderr


def test_bad_input_is_refused_by_name(model, calibration):
    with pytest.raises(ValueError, match="kvquant"):
        ql.kv.calibrate(model, ids(300), "kivi:2")
    with pytest.raises(ValueError, match="ids: got 300 tokens"):
        ql.kv.calibrate(model, ids(300), "kvquant:2", windows=10, window=48)
    with pytest.raises(ValueError, match="ids: span"):
        ql.kv.calibrate(model, ids(300) + 90, "kvquant:2", windows=2, window=48)
    with pytest.raises(ValueError, match="calibration: got none"):
        ql.kv.QuantizedKVCache(model.config, "kvquant:3:1%")
    with pytest.raises(ValueError, match="calibration: is for"):
        ql.kv.QuantizedKVCache(model.config, "kvquant:2:1%", calibration=calibration)
    with pytest.raises(ValueError, match="calibration: got KVCalibration"):
        ql.kv.QuantizedKVCache(model.config, "kivi:2", calibration=calibration)
    with pytest.raises(ValueError, match="tables"):
        ql.kv.KVCache("kvquant:2", 1, 1, 16)
    with pytest.raises(ValueError, match="outliers"):
        ql.kv.KVFormat("kvquant", 2, outliers=0.00015)
    with pytest.raises(ValueError, match="outliers"):
        ql.kv.KVFormat("kivi", 2, outliers=0.01)
    other = model_factory.llama(layers=3)
    with pytest.raises(ValueError, match="2 layers, expected 3"):
        ql.kv.KVQuantCache(other, calibration)
