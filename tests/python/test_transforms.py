"""Rotated weights: quantized, multiplied, saved, and as part of recipes."""

from __future__ import annotations

import json
import pickle

import model_factory
import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import _core
from quantloom.cli import app
from typer.testing import CliRunner


def rotation(size, block, signs):
    """R as a dense float64 matrix."""
    block = size if block == "row" else block
    h = ql.hadamard_matrix(block) / np.sqrt(block)
    return np.kron(np.eye(size // block), h) * (1 if signs is None else signs)


TRANSFORMS = [
    ql.Hadamard(),
    ql.Hadamard(8, seed=3),
    ql.Hadamard(16, seed=None, sides="out"),
    ql.Hadamard("row", seed=5, sides="both"),
]


def dense_weight(w, t):
    n, k = w.shape
    signs = (
        (None, None) if t.seed is None else (ql.hadamard_signs(k, t.seed), ql.hadamard_signs(n, t.seed + 1))
    )
    if t.has_input:
        w = w @ rotation(k, t.block, signs[0]).T
    if t.has_output:
        w = rotation(n, t.block, signs[1]) @ w
    return w


@pytest.mark.parametrize("t", TRANSFORMS, ids=str)
def test_quantizes_in_the_rotated_basis(rng, t):
    w = rng.standard_normal((48, 96)).astype(np.float32)
    x = rng.standard_normal((2, 5, 96)).astype(np.float32)
    np.testing.assert_allclose(t.rotate_weight(w), dense_weight(w.astype(np.float64), t), atol=3e-6)
    np.testing.assert_allclose(t.rotate_weight(t.rotate_weight(w), inverse=True), w, atol=3e-6)
    q = ql.quantize(w, "uniform:4:g32", transform=t)
    plain = ql.quantize(t.rotate_weight(w), "uniform:4:g32")
    for name, plane in plain.planes.items():
        np.testing.assert_array_equal(q.planes[name], plane)
    assert q.transform == t
    decoded = q.dequantize()
    np.testing.assert_allclose(dense_weight(decoded.astype(np.float64), t), plain.dequantize(), atol=1e-5)
    assert abs(((decoded - w) ** 2).mean() / q.report.mean_squared_error - 1) < 1e-3
    expected = x @ decoded.T
    np.testing.assert_allclose(ql.matmul(x, q), expected, atol=2e-4)
    np.testing.assert_allclose(ql.matmul(x, ql.prepare(q)), expected, atol=2e-4)
    bias = rng.standard_normal(48).astype(np.float32)
    np.testing.assert_allclose(ql.matmul(x, q, bias=bias), expected + bias, atol=2e-4)
    np.testing.assert_allclose(q.to("torch").dequantize().numpy(), decoded, atol=1e-6)
    assert q.dequantize("float16").dtype == np.float16
    copy = pickle.loads(pickle.dumps(q))
    assert copy.transform == t
    assert t.spec in repr(q)
    assert ql.parse_transform(t.spec) == t
    assert ql.transform_from_json(t.to_json()) == t


@pytest.mark.parametrize("t", TRANSFORMS, ids=str)
def test_rotates_hessians_with_the_weights(rng, t):
    w = rng.standard_normal((32, 48)).astype(np.float32)
    x = (rng.standard_normal((400, 48)) * rng.uniform(0.1, 3, 48)).astype(np.float32)
    hessian = ql.Hessian(48)
    hessian.add(x)
    q = ql.quantize(w, "uniform:3:g16", ql.GPTQ(hessian, held_out=hessian), transform=t)
    rotated = ql.Hessian(48)
    rotated.add(t.rotate_input(x))
    plain = ql.quantize(t.rotate_weight(w), "uniform:3:g16", ql.GPTQ(rotated))
    same = np.mean([np.mean(q.planes[name] == plane) for name, plane in plain.planes.items()])
    assert same > 0.98  # Hessians differ by roundings
    loss = ql.proxy_loss(w, q, hessian)
    assert abs(loss / q.report.proxy_loss - 1) < 1e-3
    assert abs(loss / q.report.held_out_loss - 1) < 1e-3
    assert loss < q.report.proxy_loss_nearest


def test_rotation_spreads_outliers(rng):
    w = 0.02 * rng.standard_normal((64, 256)).astype(np.float32)
    w[rng.integers(64, size=300), rng.integers(256, size=300)] = 0.7
    errors = [
        float(((ql.quantize(w, "uniform:4:g32", transform=t).dequantize() - w) ** 2).mean())
        for t in (None, "hadamard:b128")
    ]
    assert errors[1] < errors[0] / 2


def test_files_keep_transforms(tmp_path, rng):
    w = rng.standard_normal((24, 48)).astype(np.float32)
    tensors = {
        f"w{i}": ql.quantize(w, "uniform:4:g16", transform=t) for i, t in enumerate([None, *TRANSFORMS[:2]])
    }
    path = tmp_path / "w.safetensors"
    ql.save_tensors(path, tensors | {"plain": w}, {"note": "n"})
    assert ql.load_metadata(path) == {"format": "pt", "note": "n"}
    for kind in ("numpy", "torch"):
        loaded = ql.load_tensors(path, kind)
        for name, q in tensors.items():
            assert loaded[name].transform == q.transform
            np.testing.assert_array_equal(np.asarray(loaded[name].dequantize()), q.dequantize())
    assert "hadamard" in str(ql.inspect(path))
    with pytest.raises(ValueError, match=r"quantloom\.transforms"):
        ql.save_tensors(path, {"w": w}, {"quantloom.transforms": "{}"})
    with pytest.raises(RuntimeError, match="transform"):
        ql.layouts.to_compressed_tensors(tensors["w1"])


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"other":{"block":"row","seed":0,"sides":"in","transform":"hadamard","version":1}}',
        '{"w":{"block":7,"seed":0,"sides":"in","transform":"hadamard","version":1}}',
        '{"w":{"block":"row","seed":-1,"sides":"in","transform":"hadamard","version":1}}',
        '{"w":{"block":"row","seed":0,"sides":"top","transform":"hadamard","version":1}}',
        '{"w":{"block":[1],"seed":0,"sides":"in","transform":"hadamard","version":1}}',
        '{"w":{"block":"row","seed":0,"sides":"in","transform":"hadamard","version":2}}',
        '{"w":{"block":"row","seed":1e30,"sides":"in","transform":"hadamard","version":1}}',
        '{"w":3}',
    ],
)
def test_hostile_descriptions_end_in_an_error(tmp_path, rng, text):
    path = tmp_path / "w.safetensors"
    q = ql.quantize(rng.standard_normal((8, 16)).astype(np.float32), "uniform:4:g16")
    _core.save_packed(str(path), {"w": q._core()}, {}, {"quantloom.transforms": text})
    with pytest.raises(ValueError, match=r"w\.safetensors: .*transform"):
        ql.load_tensors(path)


def test_refuses_by_name(rng):
    w = np.zeros((12, 116), np.float32)
    with pytest.raises(ValueError, match=r"side 'in'.*116.*largest that works is 4"):
        ql.quantize(w, "uniform:4:g4", transform=ql.Hadamard())
    with pytest.raises(ValueError, match=r"side 'out'"):
        ql.quantize(np.zeros((7, 16), np.float32), "uniform:4:g4", transform=ql.Hadamard(sides="out"))
    w = np.zeros((8, 16), np.float32)
    w[2, 3] = np.nan
    with pytest.raises(ValueError, match="row 2, column 3"):
        ql.quantize(w, "uniform:4:g4", transform="hadamard")
    with pytest.raises(TypeError, match="transform"):
        ql.quantize(w, "uniform:4:g4", transform=3)
    for bad in ("fourier", "hadamard:x", "hadamard:b8:b4", "hadamard:seed=x", "hadamard:b"):
        with pytest.raises(ValueError, match="transform"):
            ql.parse_transform(bad)
    assert ql.parse_transform("none") is None
    for arguments in (
        {"block": 0},
        {"block": "column"},
        {"seed": -1},
        {"sides": "left"},
        {"seed": 2**63 - 1},
    ):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            ql.Hadamard(**arguments)


@pytest.mark.parametrize("t", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_modules_rotate_at_run_time(rng, t, with_bias):
    linear = torch.nn.Linear(96, 48, bias=with_bias)
    module = ql.nn.QuantLinear.from_linear(linear, "uniform:4:g32", transform=t)
    x = torch.from_numpy(rng.standard_normal((3, 96)).astype(np.float32)).requires_grad_()
    weight = module.dequantize()
    y = module(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, linear.bias), atol=1e-4, rtol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)
    assert module.packed.transform == t
    assert t.spec in repr(module)
    other = ql.nn.QuantLinear.from_linear(
        torch.nn.Linear(96, 48, bias=with_bias), "uniform:4:g32", transform=t
    )
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), y)
    empty = other.to("meta").to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    torch.testing.assert_close(empty(x), y)
    half = module.half()
    assert half(x.detach().half()).dtype == torch.float16
    plain = ql.nn.QuantLinear.from_linear(linear, "uniform:4:g32")
    with pytest.raises(RuntimeError, match="description"):
        plain.load_state_dict(module.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.detach()), y)


def test_recipes_carry_transforms():
    recipe = ql.Recipe.parse("uniform:4:g32", transform="hadamard:b64")
    assert recipe.transform == ql.Hadamard(64)
    assert ql.Recipe.from_json(recipe.to_json()) == recipe
    assert "transform" not in json.loads(ql.Recipe.parse("uniform:4:g32").to_json())
    assert recipe != ql.Recipe.parse("uniform:4:g32")


@pytest.mark.parametrize(("rounding", "t"), [("nearest", "hadamard:both"), ("gptq", "hadamard:b16:seed=2")])
def test_models_are_quantized_and_loaded_rotated(tmp_path, rounding, t):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama(), dtype=torch.float32)
    recipe = ql.Recipe.parse("uniform:8:g32", rounding, transform=t)
    ids = model_factory.token_ids(4 * 32)
    output = tmp_path / "out"
    settings = {"windows": 3, "window": 32, "held_out_windows": 1, "output": output}
    report = ql.models.quantize(folder, recipe, calibration=ids if rounding == "gptq" else None, **settings)
    assert json.loads(report.recipe)["transform"]["transform"] == "hadamard"
    tokens = torch.from_numpy(ids[:32].copy())[None]
    with torch.no_grad():
        reference = ql.models.load_reference(folder)(tokens).logits
        packed = ql.models.load(output)
        modules = [m for m in packed.modules() if isinstance(m, ql.nn.QuantLinear)]
        assert modules
        assert all(m.transform == ql.parse_transform(t) for m in modules)
        logits = packed(tokens).logits
        decoded = ql.models.load(output, dequantized=True)(tokens).logits
    torch.testing.assert_close(logits, decoded, atol=1e-3, rtol=1e-3)
    assert (logits - reference).norm() < 0.05 * reference.norm()
    with pytest.raises(ValueError, match="transform"):
        ql.models.export(output, tmp_path / "other", layout="compressed-tensors")


def test_plans_count_what_rotation_takes(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    plain, rotated = (
        ql.models.plan(folder, ql.Recipe.parse("uniform:4:g32", "gptq", transform=t), windows=2, window=32)
        for t in (None, "hadamard:b32")
    )
    assert rotated.output_bytes == plain.output_bytes
    assert rotated.parts["working memory"] > plain.parts["working memory"]


def test_the_command_line_rotates(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    arguments = ["quantize", str(folder), "-o", str(tmp_path / "out"), "-r", "nearest", "-f", "uniform:4:g32"]
    result = CliRunner().invoke(app, [*arguments, "--transform", "hadamard:b16:seed=4", "--json"])
    assert result.exit_code == 0, result.output
    loaded = ql.models.load(tmp_path / "out")
    modules = [m for m in loaded.modules() if isinstance(m, ql.nn.QuantLinear)]
    assert {m.transform for m in modules} == {ql.Hadamard(16, seed=4)}
    result = CliRunner().invoke(app, [*arguments, "--transform", "fourier"])
    assert result.exit_code == 2
    result = CliRunner().invoke(app, ["rotate", str(folder), "-o", str(tmp_path / "rotated")])
    assert result.exit_code == 0, result.output
    assert "logits differ by" in result.output


def test_models_refuse_sizes_without_a_matrix_before_work(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama(intermediate=116))
    recipe = ql.Recipe.parse("uniform:4:channel", transform="hadamard")
    with pytest.raises(ValueError, match=r"down_proj: transform: side 'in'.*116"):
        ql.models.quantize(folder, recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
