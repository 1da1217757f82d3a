"""Additive quantization: description, bits, files, roundings, products, models."""

from __future__ import annotations

import dataclasses

import model_factory
import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql
import torch
from quantloom import models
from quantloom.cli import app
from quantloom.nn import QuantLinear
from typer.testing import CliRunner

FORMATS = [
    ql.Additive(2, 5),
    ql.Additive(1, 8, 4, scale_group=16, scale_dtype="bfloat16"),
    ql.Additive(3, 3, 3, 2, scale_dtype=np.float32),
    ql.Additive(2, 4, 2, 8, 6),
]


def hessian(rng, k, correlation=0.7):
    x = rng.standard_normal((4 * k, k)).astype(np.float32)
    for column in range(1, k):
        x[:, column] += correlation * x[:, column - 1]
    result = ql.Hessian(k)
    result.add(x)
    return result


def test_describes_itself():
    assert ql.Additive() == ql.parse_format("additive:2x8") == ql.parse_format("additive:2x8:g8:channel:f16")
    assert ql.Additive(1, 16, 4, 2, 64, "bfloat16").spec == "additive:1x16:g2x4:scale64:bf16"
    for form in FORMATS:
        assert form == ql.parse_format(form.spec) == ql.format_from_json(form.to_json())
        assert hash(form) == hash(dataclasses.replace(form))
    with pytest.raises(ValueError, match="TABLESxBITS"):
        ql.parse_format("additive:2x8:tensor")


def test_bits():
    assert ql.Additive(1, 16).average_bits(4096, 4096) == pytest.approx(2.504, abs=5e-4)
    assert ql.Additive(2, 8).average_bits(4096, 4096) == pytest.approx(2.008, abs=5e-4)
    w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    form = ql.Additive(2, 8)
    assert ql.quantize(w, form).bits_per_weight == pytest.approx(form.average_bits(64, 256))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(16, 48), (5, 37), (1, 1), (0, 8), (8, 0)])
def test_planes_files_and_products(tmp_path, form, shape):
    rng = np.random.default_rng(3)
    w = rng.standard_normal(shape).astype(np.float32)
    q = ql.quantize(w, form)
    assert np.array_equal(q.dequantize(), reference.decode(q))
    ql.save_tensors(tmp_path / "w.safetensors", {"w": q})
    back = ql.load_tensors(tmp_path / "w.safetensors", kind="torch")["w"]
    assert back.format == form
    assert np.array_equal(back.dequantize().numpy(), q.dequantize())
    x = rng.standard_normal((3, shape[1])).astype(np.float32)
    assert np.abs(ql.matmul(x, q) - x @ q.dequantize().T).max(initial=0) < 1e-3
    assert ql.can_matmul(q) and not ql.can_matmul(q, activations="int8")


def test_the_documented_bytes_decode():
    planes = {
        "codes": np.array([[0x1E]], np.int32),
        "codebook": np.array([[0, 1, 2, -1], [0, 0, 0.5, 0.25]], np.float16).reshape(2, 2, 1, 2),
        "scales": np.array([[2, -1]], np.float16),
    }
    q = ql.PackedTensor(ql.Additive(2, 1, 2, 1, 4), (1, 6), planes)
    assert q.dequantize().tolist() == [[1, 2.5, 5, -1.5, -2, 1]]


def test_feedback_errs_less():
    rng = np.random.default_rng(5)
    w = rng.standard_normal((64, 128)).astype(np.float32)
    h = hessian(rng, 128)
    nearest = ql.quantize(w, "additive:2x6:g4", ql.Nearest(hessian=h))
    fed = ql.quantize(w, "additive:2x6:g4", ql.GPTQ(h))
    assert fed.report.proxy_loss < 0.85 * nearest.report.proxy_loss


def test_models_and_the_command_line(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    spec = "additive:2x6:g4"
    report = models.quantize(folder, ql.Recipe(spec), output=tmp_path / "quantized")
    assert {module.format for module in report.modules} == {spec}
    model = models.load(tmp_path / "quantized", dtype=torch.float32)
    expected = models.load_reference(folder)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            expected.get_submodule(name).weight.data = module.dequantize().to(torch.float32)
    tokens = torch.from_numpy(model_factory.token_ids(32)[None])
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits.float(), rtol=1e-3, atol=1e-3)
    arguments = ["quantize", str(folder), "-o", str(tmp_path / "out"), "-r", "nearest", "-f"]
    result = CliRunner().invoke(app, [*arguments, "additive:1x4:g4:scale8"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "additive:1x4:g4:scale8" in result.stdout.replace("\n", "")
