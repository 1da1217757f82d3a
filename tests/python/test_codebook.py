"""Tables of values: nf4 and its like, and tables of one's own, through the whole package."""

from __future__ import annotations

import copy
import json
import pickle

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

TABLE = [-1.0, -0.4, -0.125, 0.0, 0.2, 0.55, 1.0]  # -0.4, 0.2 and 0.55 round in float16
FORMATS = [
    ql.Codebook(),
    ql.Codebook("nf3", group_size=20, scale_dtype="bfloat16"),
    ql.Codebook("sf4", group_size="channel"),
    ql.Codebook("fp4", group_size="tensor", scale_dtype="float32"),
    ql.Codebook(TABLE, group_size=16),
    ql.Codebook(TABLE, bits=5, group_size=7),
    ql.Codebook(np.linspace(-1, 1, 256), group_size=128),
    ql.Codebook([-1, 1]),
]


def shown(form: ql.Codebook) -> str:
    return form.spec


def test_a_format_of_a_named_table():
    form = ql.Codebook("nf4", group_size=64)
    assert form == ql.Codebook() == ql.parse_format("codebook:nf4") == ql.format_from_json(form.to_json())
    assert hash(form) == hash(ql.Codebook())
    assert (form.table, form.bits, form.group_size, form.scale_dtype) == ("nf4", 4, 64, "float16")
    assert form.spec == str(form) == "codebook:nf4:g64"
    assert len(form.values) == 16
    assert form.values[0] == -1
    assert form.values[7] == 0
    assert form.values[15] == 1
    np.testing.assert_array_equal(form.values, np.float16(form.values))
    assert ql.Codebook("fp4").values == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert ql.Codebook("nf3").bits == 3


def test_a_format_of_values():
    form = ql.Codebook(TABLE, group_size="channel", scale_dtype=np.float32)
    assert form.table == form.values == tuple(float(value) for value in np.float16(TABLE))
    assert (form.bits, form.group_size, form.scale_dtype) == (3, "channel", "float32")
    assert form == ql.Codebook(np.float16(TABLE), 3, "channel", "float32")
    assert form != ql.Codebook(TABLE, 4, "channel", "float32")
    assert json.loads(form.to_json())["table"] == list(form.table)
    assert ql.format_from_json(form.to_json()) == form
    assert form.spec.startswith("codebook:custom3-")
    with pytest.raises(ValueError, match="by its values"):
        ql.parse_format(form.spec)
    # The values of a known table are that table.
    assert ql.Codebook(ql.Codebook("nf4").values) == ql.Codebook("nf4")
    assert ql.Codebook(torch.tensor(TABLE)) == ql.Codebook(TABLE)


@pytest.mark.parametrize("form", FORMATS, ids=shown)
def test_formats_are_values(form):
    assert copy.deepcopy(form) == pickle.loads(pickle.dumps(form)) == form
    assert ql.format_from_json(form.to_json()) == form
    assert len({form, copy.copy(form)}) == 1


@pytest.mark.parametrize("form", FORMATS, ids=shown)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 7), (17, 31), (33, 257)])
def test_codes_are_the_nearest_under_the_stored_scale(rng, form, shape):
    w = rng.standard_normal(shape).astype(np.float32)
    q = ql.quantize(w, form)
    assert q.format == form
    np.testing.assert_array_equal(q.planes["codebook"], np.float16(form.values))
    decoded = q.dequantize()
    np.testing.assert_array_equal(decoded, reference.decode(q))
    scales = reference.scales_of(q)[:, reference.group_of_column(q)]
    distances = np.abs((w / scales)[..., None].astype(np.float64) - np.array(form.values))
    chosen = np.take_along_axis(distances, reference.codes(q)[..., None], axis=-1)[..., 0]
    assert (chosen <= distances.min(axis=-1) + 1e-7).all()
    if form.group_size == "channel" and w.size:
        largest = max(abs(value) for value in form.values)
        expected = np.float16(np.abs(w).max(axis=1, keepdims=True) / largest)
        np.testing.assert_array_equal(q.planes["scales"], expected)


def test_a_table_fits_normal_weights_better_than_a_grid(rng):
    w = rng.standard_normal((64, 1024)).astype(np.float32)

    def error(form):
        return ql.quantize(w, form).report.mean_squared_error

    assert error("codebook:nf4:g64") < 0.9 * error("uniform:4:g64")
    assert error("codebook:nf3:g64") < 0.9 * error("uniform:3:g64")


def test_scale_search_and_error_feedback_lower_the_loss(rng):
    w = rng.standard_normal((24, 96)).astype(np.float32)
    mix = rng.standard_normal((96, 96)).astype(np.float32)
    hessian = ql.Hessian(96)
    hessian.add(rng.standard_normal((400, 96)).astype(np.float32) @ mix)
    for form in ["codebook:nf4:g32", "codebook:nf3:channel", ql.Codebook(TABLE, group_size=32)]:
        plain = ql.quantize(w, form, ql.Nearest(hessian=hessian)).report.proxy_loss
        searched = ql.quantize(w, form, ql.Nearest(scale_search=ql.ScaleSearch(), hessian=hessian))
        assert searched.report.mean_squared_error < ql.quantize(w, form).report.mean_squared_error
        for act_order in (False, True):
            q = ql.quantize(w, form, ql.GPTQ(hessian, act_order=act_order))
            assert q.report.proxy_loss < 0.7 * plain
            np.testing.assert_array_equal(q.dequantize(), reference.decode(q))
            assert q.report.proxy_loss == pytest.approx(ql.proxy_loss(w, q, hessian), rel=1e-4)


@pytest.mark.parametrize("form", FORMATS, ids=shown)
def test_files_hold_the_table(tmp_path, rng, form):
    q = ql.quantize(rng.standard_normal((9, 70)).astype(np.float32), form)
    ql.save_tensors(tmp_path / "w.safetensors", {"w": q})
    for kind in ("numpy", "torch"):
        back = ql.load_tensors(tmp_path / "w.safetensors", kind=kind)["w"]
        assert back.format == form
        np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    (entry,) = ql.inspect(tmp_path / "w.safetensors").tensors
    assert entry.bits == q.size_in_bits


def test_other_layouts_refuse_tables():
    q = ql.quantize(np.ones((32, 64), np.float32), "codebook:nf4:g32")
    for export in (lambda: ql.layouts.to_gptq(q, "gptq"), lambda: ql.layouts.to_compressed_tensors(q)):
        with pytest.raises(RuntimeError, match="codebook:nf4:g32"):
            export()


@pytest.mark.parametrize("form", FORMATS, ids=shown)
def test_modules_and_recipes_take_tables(rng, form):
    linear = torch.nn.Linear(70, 9)
    module = QuantLinear.from_linear(linear, form)
    assert module.packed.format == form
    again = QuantLinear.from_linear(torch.nn.Linear(70, 9), form)
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.dequantize(), module.dequantize(), rtol=0, atol=0)
    recipe = ql.Recipe(form, overrides={".*down": ql.Codebook(TABLE, group_size=8)})
    assert ql.Recipe.from_json(recipe.to_json()) == recipe


def test_products(rng):
    for form in FORMATS:
        q = ql.quantize(rng.standard_normal((33, 150)).astype(np.float32), form)
        x = rng.standard_normal((5, 150)).astype(np.float32)
        expected = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
        np.testing.assert_allclose(ql.matmul(x, q), expected, rtol=0, atol=1e-4)
        module = QuantLinear(q.to("torch"))
        np.testing.assert_array_equal(module(torch.from_numpy(x)).numpy(), ql.matmul(x, q))
        with pytest.raises(RuntimeError, match=r"int8.*codebook:"):
            ql.matmul(x, q, activations="int8")


def test_a_model_end_to_end(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    own = ql.Codebook(TABLE, group_size=16)
    recipe = ql.Recipe("codebook:nf4:g32", ql.GPTQ(), overrides={"re:.*down_proj": own})
    ids = model_factory.token_ids(6 * 32)
    output = tmp_path / "quantized"
    report = models.quantize(
        folder, recipe, calibration=ids, output=output, windows=4, window=32, held_out_windows=2
    )
    assert {module.format for module in report.modules} == {"codebook:nf4:g32", own.spec}
    model = models.load(output, dtype=torch.float32)
    reference = models.load_reference(folder)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert module.packed.format == (own if name.endswith("down_proj") else ql.Codebook(group_size=32))
            reference.get_submodule(name).weight.data = module.dequantize().to(torch.float32)
            count += 1
    assert count == len(report.modules)
    tokens = torch.from_numpy(ids[:32][None])
    torch.testing.assert_close(model(tokens).logits, reference(tokens).logits.float(), rtol=1e-3, atol=1e-3)
    stored = [entry for entry in ql.inspect(output).tensors if entry.quantized]
    assert {entry.format for entry in stored} == {"codebook:nf4:g32", own.spec}
    with pytest.raises((ValueError, RuntimeError), match="uniform"):
        models.export(output, tmp_path / "exported", layout="gptq")
    assert not (tmp_path / "exported").exists()


def test_the_command_line(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    result = CliRunner().invoke(
        app, ["quantize", str(folder), "-o", str(tmp_path / "out"), "-f", "codebook:nf4", "-r", "nearest"]
    )
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "codebook:nf4:g64" in result.stdout
    result = CliRunner().invoke(
        app, ["quantize", str(folder), "-o", str(tmp_path / "other"), "-f", "codebook:nf9", "-r", "nearest"]
    )
    assert result.exit_code != 0
    assert "nf4" in result.output
    assert "nf9" in result.output
