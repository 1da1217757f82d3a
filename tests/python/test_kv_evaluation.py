"""Texts read through a quantized cache, and `quantloom eval --kv`."""

import copy
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


def ids(count):
    return model_factory.token_ids(count)


def test_a_cache_without_error_measures_nothing(model):
    reference = copy.deepcopy(model)
    for cached in (
        ql.kv.CachedModel(model, "kivi:2:g32:r64"),
        ql.kv.CachedModel(model, "token:1:r64", chunk=7),
        ql.kv.CachedModel(model, "token:1:r64", chunk=48),
    ):
        result = ql.evaluate.compare(cached, reference, ids(96), window=48)
        assert result.kl < 1e-6
        assert result.perplexity == pytest.approx(result.reference_perplexity, rel=1e-4)
    assert (
        0 < ql.evaluate.compare(ql.kv.CachedModel(model, "bfloat16"), reference, ids(96), window=48).kl < 1e-3
    )


def test_errors_order_as_bits_do_and_chunks_are_named(model):
    reference = copy.deepcopy(model)

    def kl(format, **settings):
        cached = ql.kv.CachedModel(model, format, **settings)
        return ql.evaluate.compare(cached, reference, ids(192), window=48).kl

    errors = [kl(f"kivi:{bits}:g4:r4") for bits in (8, 4, 2, 1)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 < errors[-1]
    assert 0 < kl("kivi:2:g4:r4", chunk=12, prefill="exact") < kl("kivi:2:g4:r4", chunk=12)
    with pytest.raises(ValueError, match="chunk: got 48 for 48 tokens with exact prefill"):
        kl("kivi:2", chunk=48, prefill="exact")
    with pytest.raises(ValueError, match="chunk"):
        ql.kv.CachedModel(model, "kivi:2", chunk=0)
    for format, chunk in (("kivi:2", 1), ("bfloat16", 8)):
        with pytest.raises(ValueError, match="prefill: got 'exact'"):
            ql.kv.CachedModel(model, format, chunk, "exact")
    with pytest.raises(TypeError, match="model: got Linear"):
        ql.kv.CachedModel(torch.nn.Linear(1, 1), "kivi:2")
    with pytest.raises(ValueError, match="calibration: got none"):
        ql.kv.CachedModel(model, "kvquant:3")
    with pytest.raises(ValueError, match="calibration: got str, expected none for float16"):
        ql.kv.CachedModel(model, "float16", calibration="file")
    for wrong in (torch.zeros(4, dtype=torch.long), torch.zeros((1, 0), dtype=torch.long), [[1]]):
        with pytest.raises(ValueError, match="input_ids"):
            ql.kv.CachedModel(model, "kivi:2")(wrong)


def test_eval_tells_what_was_measured(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    text = tmp_path / "text.u16"
    ids(96).astype("<u2").tofile(text)
    run = CliRunner().invoke(
        app,
        f"eval {folder} --reference {folder} --text {text} --window 48 --json --kv kivi:2:g4:r8".split(),
    )
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert result["kv"] == "kivi:2:g4:r8"
    assert (result["kv_chunk"], result["kv_prefill"]) == (1, "quantized")
    assert result["kv_bits"] == 2 + 32 / 4
    # 2 layers of 2 heads of 16 channels: 48 keys are codes and 40 values, 8 values are exact float32.
    expected = 2 * 2 * 16 * (10 * (48 + 40) / 8 + 8 * 4) / 48
    assert np.isclose(result["kv_bytes_per_token"], expected)
    assert result["kl"] > 1e-4
    for wrong in ("kivi:5", "kvi:2"):
        run = CliRunner().invoke(
            app, ["eval", str(folder), "--text", str(text), "--window", "48", "--kv", wrong]
        )
        assert run.exit_code != 0
    run = CliRunner().invoke(
        app, ["eval", str(folder), "--text", str(text), "--window", "48", "--kv", "token:4"]
    )
    assert run.exit_code == 0
    assert "token by token" in run.output


def test_eval_refuses_settings_of_caches_before_it_works(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    text = tmp_path / "text.u16"
    ids(96).astype("<u2").tofile(text)
    for options, reason in {
        "--kv-chunk 8": "--kv-chunk, --kv-prefill: got without --kv",
        "--kv-prefill exact": "--kv-chunk, --kv-prefill: got without --kv",
        "--kv kivi:2 --kv-prefill exact": "prefill: got 'exact' for single tokens",
        "--kv float16 --kv-chunk 8 --kv-prefill exact": "prefill: got 'exact' for float16",
        "--kv kvquant:3": "kv: got kvquant:3, expected for kvquant the file that",
        "--kv none.safetensors": "kv: no such file: none.safetensors",
        f"--kv {text}": "header",
        "--needle 2 --window 48": "window: got 48, expected at least 65 with --needle",
    }.items():
        run = CliRunner().invoke(app, f"eval {folder} --text {text} --window 96 {options}".split())
        assert run.exit_code == 1, options
        assert reason in run.stderr


def test_quantized_weights_and_caches_compose(model):
    """Packed weights with a quantized cache: the same as their decoded weights with it."""
    packed, decoded = copy.deepcopy(model), copy.deepcopy(model)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        module = ql.nn.QuantLinear.from_linear(linear, "uniform:4:g32")
        parent, _, child = name.rpartition(".")
        setattr(packed.get_submodule(parent), child, module)
        decoded.get_submodule(name).weight.data = module.packed.dequantize()
    row = torch.from_numpy(ids(48)[None])
    with torch.no_grad():
        a = ql.kv.CachedModel(packed, "kivi:2:g8:r8")(row).logits
        b = ql.kv.CachedModel(decoded, "kivi:2:g8:r8")(row).logits
        exact = ql.kv.CachedModel(decoded, "bfloat16")(row).logits
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    assert (a - exact).abs().amax() > 0.05


def test_eval_hides_passages(tmp_path):
    made = model_factory.llama()
    made.max_position_embeddings = 96
    folder = model_factory.write_model(tmp_path / "model", made)
    text = tmp_path / "text.u16"
    ids(1000).astype("<u2").tofile(text)
    arguments = (
        f"eval {folder} --text {text} --window 96 --windows 1 --kv kivi:2 --kv-chunk 16 --needle 2 --json"
    )
    run = CliRunner().invoke(app, arguments.split())
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)["needle"]
    assert found["tokens"] == 2 * 2 * 16
    assert 0 <= found["recall"] <= 1
    run = CliRunner().invoke(app, arguments.replace("--json", "").split())
    assert "hidden passages continued" in run.output
