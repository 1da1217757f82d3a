"""Outliers beside other formats: descriptions, files, products, models."""

from __future__ import annotations

import model_factory
import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql
import torch
from quantloom import models
from quantloom.nn import QuantLinear

FORMATS = [
    "outliers:1%:uniform:4:g32",
    "outliers:0.5%:uniform:3:channel:asym:bf16",
    "outliers:2.5%:codebook:nf3:g16",
    "outliers:1%:vector_codebook:256x4:g64",
]


def heavy(rng, shape) -> np.ndarray:
    return (rng.standard_normal(shape) ** 3).astype(np.float32)


def test_describes_itself():
    form = ql.Outliers(ql.Uniform(4), percent=0.5)
    assert form == ql.parse_format("outliers:0.5%:uniform:4") == ql.format_from_json(form.to_json())
    assert form.spec == "outliers:0.5%:uniform:4:g128:sym"
    assert form.group_size == 128
    assert hash(form) == hash(ql.Outliers("uniform:4", 0.5))
    assert ql.Outliers("uniform:4", count=7).spec == "outliers:n7:uniform:4:g128:sym"
    recipe = ql.Recipe(form, ql.GPTQ())
    assert ql.Recipe.from_json(recipe.to_json()) == recipe
    assert form.planes(8, 1000)[-1] == {
        "name": "outlier_values",
        "dtype": "float16",
        "shape": (40,),
        "optional": False,
    }


@pytest.mark.parametrize("spec", FORMATS)
def test_packs_saves_and_multiplies(rng, tmp_path, spec):
    w = heavy(rng, (33, 130))
    q = ql.quantize(w, spec)
    form = ql.parse_format(spec)
    count = int(form.percent * w.size / 100)
    assert q.format == ql.Outliers(form.dense, count=count)
    np.testing.assert_array_equal(q.dequantize(), reference.decode(q))
    largest = np.sort(np.abs(w).ravel())[::-1][:count]
    chosen = np.abs(
        w[np.repeat(np.arange(33), np.diff(q.planes["outlier_offsets"])), q.planes["outlier_columns"]]
    )
    np.testing.assert_array_equal(np.sort(chosen)[::-1], largest)
    assert q.size_in_bits == sum(8 * plane.nbytes for plane in q.planes.values())
    dense = ql.quantize(w, form.dense)
    assert q.report.mean_squared_error < 0.9 * dense.report.mean_squared_error
    path = tmp_path / "w.safetensors"
    ql.save_tensors(path, {"w": q})
    back = ql.load_tensors(path)["w"]
    assert back.format == q.format
    assert all(np.array_equal(plane, back.planes[name]) for name, plane in q.planes.items())
    x = rng.standard_normal((5, 130)).astype(np.float32)
    expected = x @ reference.decode(q).T
    np.testing.assert_allclose(ql.matmul(x, q), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert ql.can_matmul(q)
    assert bool(ql.can_matmul(q, activations="int8")) == ("uniform" in spec)
    as_torch = q.to("torch")
    assert as_torch.planes["outlier_columns"].dtype == torch.uint16
    torch.testing.assert_close(as_torch.dequantize(), torch.from_numpy(q.dequantize()), rtol=0, atol=0)


def test_a_count_is_not_enough_to_quantize(rng):
    with pytest.raises(ValueError, match="percentage"):
        ql.quantize(heavy(rng, (8, 32)), ql.Outliers("uniform:4:g32", count=3))


def test_what_cannot_hold_outliers_refuses_them(rng):
    q = ql.quantize(heavy(rng, (32, 64)), FORMATS[0])
    with pytest.raises((ValueError, RuntimeError), match=r"outliers|uniform"):
        ql.layouts.to_gptq(q)
    with pytest.raises((ValueError, RuntimeError), match=r"outliers|uniform"):
        ql.layouts.to_compressed_tensors(q)


def test_modules_and_models(tmp_path):
    module = QuantLinear.from_linear(torch.nn.Linear(70, 9), FORMATS[0])
    again = QuantLinear.from_linear(torch.nn.Linear(70, 9), FORMATS[0])
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.dequantize(), module.dequantize(), rtol=0, atol=0)
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    recipe = ql.Recipe("outliers:1%:uniform:3:g32", ql.GPTQ())
    report = models.quantize(
        folder, recipe, calibration=model_factory.token_ids(6 * 32), output=tmp_path / "out", windows=4,
        window=32, held_out_windows=2,
    )  # fmt: skip
    assert all(module.format.startswith("outliers:") for module in report.modules)
    model = models.load(tmp_path / "out", dtype=torch.float32)
    expected = models.load_reference(folder)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            expected.get_submodule(name).weight.data = module.dequantize().to(torch.float32)
    tokens = torch.from_numpy(model_factory.token_ids(32)[None])
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits.float(), rtol=1e-3, atol=1e-3)
