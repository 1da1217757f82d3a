"""Vector codebooks: descriptions, fits, files, products, models."""

from __future__ import annotations

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

TABLE = np.random.default_rng(3).standard_normal((37, 2)).astype(np.float32)
FORMATS = [
    ql.VectorCodebook(256, 4),
    ql.VectorCodebook(64, 2, group_size="channel", scale_dtype="bfloat16"),
    ql.VectorCodebook(200, 8, group_size="tensor", scale_dtype=np.float32),
    ql.VectorCodebook(16, 4, group_size=8, codebooks=2),
    ql.VectorCodebook(37, 2, group_size=6, table=TABLE),
]


def test_describes_itself():
    form = ql.VectorCodebook(256, 4)
    assert form == ql.parse_format("vector_codebook:256x4") == ql.format_from_json(form.to_json())
    assert hash(form) == hash(ql.VectorCodebook(256, 4, 64))
    assert form.spec == str(form) == "vector_codebook:256x4:g64"
    assert ql.parse_format("vector_codebook:2x256x8:channel:bf16") == ql.VectorCodebook(
        256, 8, "channel", 2, "bfloat16"
    )
    own = FORMATS[-1]
    assert own != ql.VectorCodebook(37, 2, group_size=6)
    assert own == ql.format_from_json(own.to_json()) == pickle.loads(pickle.dumps(own))
    assert own == ql.VectorCodebook(37, 2, 6, table=torch.tensor(TABLE))
    np.testing.assert_array_equal(own.table, TABLE.astype(np.float16)[None])
    assert not own.table.flags.writeable
    assert own.spec.startswith("vector_codebook:custom37x2-")
    with pytest.raises(ValueError, match="values"):
        ql.parse_format(own.spec)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((1, 4), ValueError, "entries 1 2 to 65536"),
        ((65537, 4), ValueError, "entries 65537"),
        ((4.0, 4), TypeError, "entries float integer"),
        ((4, 0), ValueError, "dim 0 1 to 16"),
        ((4, "2"), TypeError, "dim str integer"),
        ((4, 4, 6), ValueError, "group_size 6 multiple 4"),
        ((4, 4, "row"), ValueError, "group_size row channel"),
        ((4, 4, 8, 9), ValueError, "codebooks 9 1 to 8"),
        ((4, 4, 8, 1, "int8"), ValueError, "scale_dtype int8 float16"),
        ((4, 4, 8, 1, "float16", np.zeros((4, 3))), ValueError, "table shape (4, 4)"),
        ((4, 4, 8, 2, "float16", np.zeros((4, 4))), ValueError, "table shape (2, 4, 4)"),
        ((2, 1, 8, 1, "float16", [[0], [np.nan]]), ValueError, "table float16 finite"),
        ((2, 1, 8, 1, "float16", [[0], [1e5]]), ValueError, "table float16 65504"),
        ((2, 1, 8, 1, "float16", [[0], [1, 2]]), ValueError, "table lengths"),
        ((2, 1, 8, 1, "float16", [["a"], ["b"]]), TypeError, "table numbers"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        ql.VectorCodebook(*arguments)
    for word in words.split():
        assert word in str(caught.value)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_packs_saves_and_multiplies(rng, tmp_path, form, kind):
    w = rng.standard_normal((33, 130)).astype(kind)
    q = ql.quantize(w, form)
    assert q.format.table is None
    decoded = q.dequantize()
    np.testing.assert_array_equal(decoded, reference.decode(q).astype(decoded.dtype))
    path = tmp_path / "w.safetensors"
    ql.save_tensors(path, {"w": q})
    back = ql.load_tensors(path)["w"]
    assert back.format == q.format
    assert all(np.array_equal(plane, back.planes[name]) for name, plane in q.planes.items())
    assert ql.inspect(path).tensors
    for tokens in (1, 5):
        x = rng.standard_normal((tokens, 130)).astype(np.float32)
        expected = x @ reference.decode(q).T
        np.testing.assert_allclose(ql.matmul(x, q), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert ql.can_matmul(q)
    assert not ql.can_matmul(q, activations="int8")
    with pytest.raises(RuntimeError, match="int8"):
        ql.matmul(x, q, activations="int8")


def test_a_prepared_tensor_keeps_its_planes(rng):
    q = ql.quantize(rng.standard_normal((8, 16)).astype(np.float32), "vector_codebook:16x4:g8")
    x = rng.standard_normal((2, 16)).astype(np.float32)
    planes = {name: plane.copy() for name, plane in q.planes.items()}
    packed = ql.PackedTensor(q.format, q.shape, planes)
    prepared = ql.prepare(packed)
    before = ql.matmul(x, prepared)
    for plane in planes.values():
        plane[...] = 0
    np.testing.assert_array_equal(ql.matmul(x, prepared), before)


def test_the_bytes_are_those_of_the_description_of_the_format():
    q = ql.PackedTensor(
        ql.VectorCodebook(3, 2, group_size=4),
        (1, 6),
        {
            "codes": np.array([[0x18]], np.int32),
            "codebook": np.array([[[-1, 0], [0, 1], [0.5, 0.5]]], np.float16),
            "scales": np.array([[1, 2]], np.float16),
        },
    )
    np.testing.assert_array_equal(q.dequantize(), [[-1, 0, 0.5, 0.5, 0, 2]])
    hexadecimal = {name: plane.tobytes().hex(" ") for name, plane in q.planes.items()}
    assert hexadecimal["codebook"] == "00 bc 00 00 00 00 00 3c 00 38 00 38"
    assert hexadecimal["scales"] == "00 3c 00 40"


def test_tables_of_ones_own_are_stored_as_they_are(rng):
    q = ql.quantize(rng.standard_normal((9, 24)).astype(np.float32), FORMATS[-1])
    np.testing.assert_array_equal(q.planes["codebook"], TABLE.astype(np.float16)[None])
    recipe = ql.Recipe(FORMATS[-1])
    assert ql.Recipe.from_json(recipe.to_json()).format == FORMATS[-1]


def test_error_falls_with_the_length_of_vectors_at_the_same_bits(rng):
    w = rng.standard_normal((256, 512)).astype(np.float32)
    specs = ["uniform:2:g64:f32", "vector_codebook:16x2:g64:f32", "vector_codebook:256x4:g64:f32"]
    errors = [ql.quantize(w, spec).report.mean_squared_error for spec in specs]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_gptq(rng):
    w = rng.standard_normal((256, 64)).astype(np.float32)
    x = rng.standard_normal((500, 64)).astype(np.float32)
    x[:, 1:] += 0.7 * x[:, :-1]
    hessian = ql.Hessian(64)
    hessian.add(x)
    q = ql.quantize(w, "vector_codebook:256x4:g32", ql.GPTQ(hessian))
    assert q.report.proxy_loss < q.report.proxy_loss_nearest


def test_models_and_the_command_line(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    spec = "vector_codebook:256x2:g32"
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
    result = CliRunner().invoke(app, [*arguments, "vector_codebook:16x2"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "vector_codebook:16x2:g64" in result.stdout.replace("\n", "")
