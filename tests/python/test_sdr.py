"""Significant digits: the closed form in NumPy, bits, files, roundings, products, models."""

from __future__ import annotations

import dataclasses
import json

import model_factory
import numpy as np
import pytest
import quantloom as ql
from quantloom import models
from quantloom.nn import QuantLinear


def closed_form(w, bits, size):
    """Values that the format keeps, from the formulas of the paper."""
    w = w.astype(np.float32)
    scale = (np.abs(w).max(1, keepdims=True).astype(np.float64) / 127).astype(np.float16).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)
    q = np.clip(np.rint(w / scale), -127, 127).astype(int)
    out = np.zeros_like(q)
    for g in range(0, w.shape[1], size):
        run = q[:, g : g + size]
        shift = np.array([max(0, int(m).bit_length() - (bits - 1)) for m in np.abs(run).max(1)])[:, None]
        out[:, g : g + size] = np.clip(np.rint(run / 2.0**shift), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        out[:, g : g + size] *= 2**shift
    return scale * out.astype(np.float32)


def hessian(rng, k):
    x = rng.standard_normal((4 * k, k)).astype(np.float32)
    x[:, 1:] += 0.7 * x[:, :-1]
    result = ql.Hessian(k)
    result.add(x)
    return result


@pytest.mark.parametrize(("bits", "size"), [(4, 8), (4, 16), (4, 128), (3, 24), (6, 7), (2, 16), (7, 500)])
def test_closed_form(bits, size):
    w = np.random.default_rng(bits * size).standard_normal((19, 301)).astype(np.float32)
    w[3] = 0
    q = ql.quantize(w, ql.SDR(bits, size))
    assert np.array_equal(q.dequantize(), closed_form(w, bits, size))


def test_describes_itself():
    form = ql.SDR(3, 8, "bfloat16")
    assert form.spec == "sdr:3:g8:bf16"
    assert form == ql.parse_format(form.spec) == ql.format_from_json(form.to_json())
    assert ql.SDR() == ql.parse_format("sdr:4") == ql.SDR(4, 16, "float16")
    assert hash(form) == hash(dataclasses.replace(form))
    with pytest.raises(ValueError, match="sdr:BITS"):
        ql.parse_format("sdr:4:channel")


def test_bits():
    for size, published in {8: 4.375, 16: 4.19, 32: 4.10, 64: 4.05, 128: 4.03}.items():
        form = ql.SDR(4, size)
        assert form.average_bits(4096) == pytest.approx(4 + 3 / size + 16 / 4096)
        assert form.average_bits(4096) == pytest.approx(published, abs=0.0055)
        w = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
        assert ql.quantize(w, form).bits_per_weight == pytest.approx(form.average_bits(4096))


def test_the_documented_bytes_decode():
    planes = {
        "codes": np.array([[0x47C3], [0xA507]], np.int32),
        "shifts": np.array([[0x20], [0x14]], np.int32),
        "scales": np.array([[0.5], [1]], np.float16),
    }
    q = ql.PackedTensor(ql.SDR(4, 2), (2, 4), planes)
    values = [[1.5, -2, 56, 32], [112, 0, 20, -24]]
    assert q.dequantize().tolist() == values
    again = ql.quantize(np.array([[1.5, -2, 63.5, 30], [127, 5, 20, -24]], np.float32), ql.SDR(4, 2))
    for name, plane in planes.items():
        assert np.array_equal(again.planes[name], plane), name


def test_files_and_conversions(tmp_path):
    rng = np.random.default_rng(4)
    w = rng.standard_normal((40, 96)).astype(np.float32)
    h = hessian(rng, 96)
    for rounding in (ql.Nearest(ql.ScaleSearch()), ql.GPTQ(h), ql.GPTQ(h, static_groups=False)):
        q = ql.quantize(w, "sdr:4:g16", rounding)
        ql.save_tensors(tmp_path / "w.safetensors", {"w": q})
        back = ql.load_tensors(tmp_path / "w.safetensors")["w"]
        assert back.format == q.format and np.array_equal(back.dequantize(), q.dequantize())
        for by_groups in (False, True):
            uniform = ql.layouts.sdr_to_uniform(q, by_groups)
            assert isinstance(uniform.format, ql.Uniform)
            assert np.array_equal(uniform.dequantize(), q.dequantize())


def test_feedback_errs_less_and_takes_outliers():
    rng = np.random.default_rng(5)
    w = (rng.standard_normal((64, 128)) ** 3).astype(np.float32)
    h = hessian(rng, 128)
    plain = ql.quantize(w, "sdr:4:g32", ql.Nearest(), threads=1)
    fed = ql.quantize(w, "sdr:4:g32", ql.GPTQ(h))
    assert fed.report.proxy_loss < 0.9 * ql.proxy_loss(w, plain, h)
    sparse = ql.quantize(w, "sdr:4:g32", ql.GPTQ(h, outliers=ql.OutlierSearch(percent=1)))
    assert isinstance(sparse.format, ql.Outliers) and sparse.report.proxy_loss < 0.8 * fed.report.proxy_loss


def test_products():
    rng = np.random.default_rng(6)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((33, 200), (5, 200)))
    for spec in ("sdr:4:g16", "sdr:4:g64", "outliers:1%:sdr:3:g8", "sdr:6:g16"):
        q = ql.quantize(w, spec)
        for activations in ("exact", "int8:token", "sdr4:g16:b16"):
            seen = x if activations == "exact" else ql.round_activations(x, activations)
            y = ql.matmul(x, q, activations=activations)
            assert np.abs(y - seen @ q.dequantize().T).max() < 1e-3
        assert ql.can_matmul(q) and ql.can_matmul(q, activations="int8:token")


def test_models(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    ids = model_factory.token_ids(64)
    recipe = ql.Recipe.parse("sdr:4:g16", "gptq")
    report = models.quantize(
        folder, recipe, ids, output=tmp_path / "out", windows=4, window=16, held_out_windows=0
    )
    assert all(module.method == "gptq" and module.format == "sdr:4:g16" for module in report.modules)
    model = models.load(tmp_path / "out")
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == len(report.modules)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["recipe"]["format"]["format"] == "sdr"
