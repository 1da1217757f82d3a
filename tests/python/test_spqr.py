"""SpQR: codes for scales and zero points, outliers by leave-one-out, files, products, models."""

from __future__ import annotations

import dataclasses
import json

import model_factory
import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql
import torch
from quantloom import models
from quantloom.nn import QuantLinear

FORMATS = ["spqr:3", "spqr:2:g32:s3:z3:b7", "spqr:5:g24:s8:z6:b1"]


def heavy(rng, shape) -> np.ndarray:
    return (rng.standard_normal(shape) ** 3).astype(np.float32)


def hessian(rng, k) -> ql.Hessian:
    x = rng.standard_normal((4 * k, k)).astype(np.float32)
    x[:, 1:] += 0.7 * x[:, :-1]
    result = ql.Hessian(k)
    result.add(x)
    return result


def test_describes_itself():
    form = ql.SpQR(3, group_size=16, scale_bits=3, zero_bits=4, block=8)
    assert form.spec == "spqr:3:g16:s3:z4:b8"
    assert form == ql.parse_format(form.spec) == ql.format_from_json(form.to_json())
    assert ql.SpQR(3) == ql.parse_format("spqr:3") == ql.SpQR(3, 16, 3, 3, 16)
    assert ql.Outliers("spqr:3", 1).spec == "outliers:1%:spqr:3:g16:s3:z3:b16"
    assert hash(form) == hash(dataclasses.replace(form))
    for bad in ({"bits": 0}, {"group_size": 0}, {"scale_bits": 9}, {"zero_bits": 0}, {"block": -3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ql.SpQR(**({"bits": 3} | bad))
    with pytest.raises(TypeError, match="block"):
        ql.SpQR(3, block=1.5)
    with pytest.raises(ValueError, match="spqr:BITS"):
        ql.parse_format("spqr:3:channel")


def test_counts_bits_as_the_paper_does():
    assert ql.SpQR(3, 16, 3, 3, 16).average_bits(0.01138) == pytest.approx(3.99, abs=0.005)
    assert ql.SpQR(2, 32, 3, 3, 16).average_bits(0.02358) == pytest.approx(3.07, abs=0.005)
    with pytest.raises(ValueError, match="outlier_rate"):
        ql.SpQR(3).average_bits(1.5)
    assert ql.SpQR(3).size_in_bits(64, 128) == round(64 * 128 * ql.SpQR(3).average_bits())


def test_the_documented_bytes_decode():
    planes = {
        "codes": np.array([[0xE4], [0x0F]], np.int32),
        "scales": np.array([[0x0C]], np.int32),
        "zeros": np.array([[0x09]], np.int32),
        "scale_grids": np.array([[[0.5, -1]]], np.float16),
        "zero_grids": np.array([[[0.25, -4]]], np.float16),
    }
    q = ql.PackedTensor(ql.SpQR(2, 4, 2, 2, 2), (2, 4), planes)
    np.testing.assert_array_equal(q.dequantize(), [[-0.625, -0.125, 0.375, 0.875], [3, 3, -3, -3]])
    planes["zero_grids"] = np.array([[[0.25, np.inf]]], np.float16)
    with pytest.raises(ValueError, match="zero_grids"):
        ql.PackedTensor(q.format, (2, 4), planes)


@pytest.mark.parametrize("spec", FORMATS)
def test_packs_saves_and_multiplies(rng, tmp_path, spec):
    w = heavy(rng, (37, 130))
    q = ql.quantize(w, spec, ql.Nearest(ql.ScaleSearch(steps=3)))
    np.testing.assert_array_equal(q.dequantize(), reference.decode(q))
    plain = ql.quantize(w, spec)
    assert q.report.mean_squared_error < plain.report.mean_squared_error
    assert q.size_in_bits == q.format.size_in_bits(37, 130)
    path = tmp_path / "w.safetensors"
    ql.save_tensors(path, {"w": q})
    back = ql.load_tensors(path)["w"]
    assert back.format == q.format
    assert all(np.array_equal(plane, back.planes[name]) for name, plane in q.planes.items())
    x = rng.standard_normal((5, 130)).astype(np.float32)
    expected = x @ reference.decode(q).T
    np.testing.assert_allclose(ql.matmul(x, q), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    as_torch = q.to("torch")
    torch.testing.assert_close(as_torch.dequantize(), torch.from_numpy(q.dequantize()), rtol=0, atol=0)


@pytest.mark.parametrize("spec", [*FORMATS, "uniform:3:g32:asym", "codebook:nf4:g32"])
def test_outliers_are_searched(rng, tmp_path, spec):
    w = heavy(rng, (64, 96))
    h = hessian(rng, 96)
    search = ql.OutlierSearch(percent=2.5)
    q = ql.quantize(w, spec, ql.GPTQ(h, outliers=search))
    count = q.report.outliers
    assert 140 <= count <= 153
    assert q.format == ql.Outliers(spec, count=count)
    assert q.report.outlier_threshold > 0
    np.testing.assert_array_equal(q.dequantize(), reference.decode(q))
    dense = ql.quantize(w, spec, ql.GPTQ(h))
    assert dense.report.outliers == 0
    assert np.isnan(dense.report.outlier_threshold)
    assert q.report.proxy_loss < 0.7 * dense.report.proxy_loss
    bits = dense.bits_per_weight + 0.9
    stored = ql.quantize(w, spec, ql.GPTQ(h, outliers=ql.OutlierSearch(bits=bits)))
    assert bits - 0.02 < stored.bits_per_weight <= bits
    assert stored.format.dense == ql.parse_format(spec)
    ql.save_tensors(tmp_path / "w.safetensors", {"w": q})
    assert ql.load_tensors(tmp_path / "w.safetensors")["w"].format == q.format
    x = rng.standard_normal((3, 96)).astype(np.float32)
    expected = x @ q.dequantize().T
    np.testing.assert_allclose(ql.matmul(x, q), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    for threads in (1, 2, 4):
        again = ql.quantize(w, spec, ql.GPTQ(h, outliers=search), threads=threads)
        assert all(np.array_equal(plane, again.planes[name]) for name, plane in q.planes.items())


def test_searches_have_short_forms():
    for spec in ("gptq:outliers=1.5%", "gptq:search:bits=3.99", "gptq:outlier-threshold=0.2:no-act-order"):
        rounding = ql.parse_rounding(spec)
        assert rounding.spec == spec
        assert ql.rounding_from_json(rounding.to_json()).to_json() == rounding.to_json()
    assert ql.parse_rounding("gptq:bits=4").outliers == ql.OutlierSearch(bits=4)
    assert "outliers" not in json.loads(ql.GPTQ().to_json())
    for bad in (
        "gptq:outliers=1",
        "gptq:bits=x",
        "nearest:bits=3",
        "gptq:bits=3:outliers=1%",
        "gptq:bits=-1",
    ):
        with pytest.raises(ValueError, match="rounding"):
            ql.parse_rounding(bad)
    text = '{"rounding":"gptq","outliers":{"percent":1,"more":2}}'
    with pytest.raises(ValueError, match="outliers"):
        ql.rounding_from_json(text)
    recipe = ql.Recipe("spqr:3", ql.GPTQ(outliers=ql.OutlierSearch(percent=1)))
    assert ql.Recipe.from_json(recipe.to_json()) == recipe
    form = recipe.rounding.stored_format("spqr:3", 64, 1000)
    assert form == ql.Outliers("spqr:3", count=640)
    form = ql.GPTQ(outliers=ql.OutlierSearch(bits=4.5)).stored_format("spqr:3", 64, 1024)
    assert form.size_in_bits(64, 1024) == pytest.approx(4.5 * 64 * 1024, abs=32)
    assert ql.GPTQ().stored_format("spqr:3", 64, 1000) == ql.SpQR(3)


def test_bad_searches_are_refused(rng):
    for arguments in ({}, {"percent": 1, "bits": 3}):
        with pytest.raises(ValueError, match="percent, bits, threshold"):
            ql.OutlierSearch(**arguments)
    for arguments in ({"percent": -1}, {"percent": 100}, {"bits": 0}, {"threshold": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            ql.OutlierSearch(**arguments)
    with pytest.raises(TypeError, match="outliers"):
        ql.GPTQ(outliers=1)
    w, h = heavy(rng, (8, 32)), hessian(rng, 32)
    one = ql.OutlierSearch(percent=5)
    for spec, rounding, word in (
        ("outliers:1%:spqr:3", ql.GPTQ(h, outliers=one), "format"),
        ("vector_codebook:4x4:g16", ql.GPTQ(h, outliers=one), "format"),
        ("spqr:3", ql.GPTQ(h, outliers=ql.OutlierSearch(bits=3)), "bits"),
    ):
        with pytest.raises(ValueError, match=word):
            ql.quantize(w, spec, rounding)


def test_whole_models(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    recipe = ql.Recipe("spqr:3", ql.GPTQ(outliers=ql.OutlierSearch(percent=2)))
    report = models.quantize(
        folder, recipe, calibration=model_factory.token_ids(6 * 32), output=tmp_path / "out", windows=4,
        window=32, held_out_windows=2,
    )  # fmt: skip
    for module in report.modules:
        n, k = module.shape
        assert module.format == f"outliers:n{module.outliers}:spqr:3:g16:s3:z3:b16"
        assert 0.01 * n * k < module.outliers <= 0.02 * n * k
        assert module.outlier_threshold > 0
    plan = models.plan(folder, recipe, windows=4, window=32)
    assert plan.bits_per_weight == pytest.approx(report.bits_per_weight, abs=0.1)
    assert ql.inspect(tmp_path / "out").bits_per_weight == pytest.approx(report.bits_per_weight)
    model = models.load(tmp_path / "out", dtype=torch.float32)
    expected = models.load_reference(folder)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert isinstance(module.format, ql.Outliers)
            expected.get_submodule(name).weight.data = module.dequantize().to(torch.float32)
    tokens = torch.from_numpy(model_factory.token_ids(32)[None])
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits.float(), rtol=1e-3, atol=1e-3)
