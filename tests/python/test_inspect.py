"""Listing of checkpoints: ours, originals, and other libraries' layouts."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import quantloom as ql

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


def matrix(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k), dtype=np.float32)


def entries(inspection):
    return {entry.name: entry for entry in inspection.tensors}


def test_an_original_model():
    result = ql.inspect(TINY)
    assert (result.layout, result.architecture) == ("plain", "LlamaForCausalLM")
    assert result.weights == 4196608
    assert result.bits_per_weight is None
    assert result.quantized_weights == 0
    assert result.model_bits_per_weight == 16.0
    assert result.files == {"model.safetensors": (TINY / "model.safetensors").stat().st_size}
    entry = entries(result)["model.layers.0.mlp.down_proj.weight"]
    assert (entry.format, entry.shape, entry.bits) == ("bfloat16", (256, 768), 16 * 256 * 768)
    assert ql.inspect(TINY / "model.safetensors").tensors == result.tensors


@pytest.mark.parametrize(
    "spec",
    [
        "uniform:4:g128",
        "uniform:3:g32:asym",
        "uniform:2:channel:asym:f32",
        "uniform:8:tensor",
        "uniform:1:g7:sym:bf16",
    ],
)
def test_bits_are_counted_from_bytes(tmp_path, spec):
    q = ql.quantize(matrix(37, 101), spec)
    file = tmp_path / "w.safetensors"
    ql.save_tensors(file, {"layer": q, "norm": np.ones(5, dtype=np.float32)}, metadata={"note": "of a test"})
    result = ql.inspect(file)
    assert result.layout == "quantloom"
    found = entries(result)
    assert set(found) == {"layer", "norm"}
    layer = found["layer"]
    assert layer.format == q.format.spec
    assert layer.shape == (37, 101)
    assert layer.quantized
    planes = ql.load_tensors(file)["layer"].planes
    assert layer.bits == sum(8 * plane.nbytes for plane in planes.values()) == q.size_in_bits
    assert set(layer.planes) == set(planes)
    assert result.bits_per_weight == pytest.approx(q.bits_per_weight)
    assert result.model_bits_per_weight == pytest.approx((q.size_in_bits + 5 * 32) / (37 * 101 + 5))
    assert result.metadata == {file.name: {"note": "of a test"}} or "note" in result.metadata[file.name]
    assert found["norm"].format == "float32"


def test_a_folder_of_shards(tmp_path):
    ql.save_tensors(tmp_path / "b.safetensors", {"blocks.10.w": ql.quantize(matrix(4, 32), "uniform:4:g32")})
    ql.save_tensors(tmp_path / "a.safetensors", {"blocks.9.w": np.zeros((2, 3), dtype=np.float16)})
    result = ql.inspect(tmp_path)
    assert [entry.name for entry in result.tensors] == ["blocks.9.w", "blocks.10.w"]
    assert [entry.file for entry in result.tensors] == ["a.safetensors", "b.safetensors"]
    assert result.quantized_weights == 128
    assert result.weights == 134
    index = {"weight_map": {"blocks.9.w": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(ql.inspect(tmp_path).files) == {"a.safetensors"}


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (4, False), (3, False), (2, True)])
@pytest.mark.parametrize("with_config", [True, False])
def test_gptq_layout(tmp_path, bits, symmetric, with_config):
    q = ql.quantize(matrix(64, 128), ql.Uniform(bits, 32, symmetric))
    tensors = ql.layouts.to_gptq(q, "gptq_v2")
    ql.save_tensors(tmp_path / "model.safetensors", {f"m.{name}": value for name, value in tensors.items()})
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "checkpoint_format": "gptq_v2",
    }
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    result = ql.inspect(tmp_path)
    entry = entries(result)["m"]
    assert entry.format == q.format.spec
    assert entry.shape == (64, 128)
    assert entry.bits == sum(8 * value.nbytes for value in tensors.values())
    assert result.layout == ("gptq_v2" if with_config else "gptq")


@pytest.mark.parametrize(
    "spec",
    [
        "uniform:4:g32:sym:f16",
        "uniform:8:channel:sym:f16",
        "uniform:3:g32:asym:f16",
        "uniform:4:tensor:sym:f16",
    ],
)
def test_compressed_tensors_layout(tmp_path, spec):
    q = ql.quantize(matrix(48, 96), spec)
    tensors = ql.layouts.to_compressed_tensors(q)
    ql.save_tensors(tmp_path / "model.safetensors", {f"m.{name}": value for name, value in tensors.items()})
    result = ql.inspect(tmp_path)
    entry = entries(result)["m"]
    assert result.layout == "compressed-tensors"
    assert entry.format == q.format.spec
    assert entry.shape == (48, 96)
    assert entry.bits == sum(8 * value.nbytes for value in tensors.values())


def test_foreign_names_that_are_no_layer(tmp_path):
    """Another library's qweight is listed tensor by tensor, not guessed at."""
    odd = {"m.qweight": np.zeros((7, 5), dtype=np.int32), "m.scales": np.ones((1, 5), dtype=np.float16)}
    ql.save_tensors(tmp_path / "w.safetensors", odd)
    result = ql.inspect(tmp_path)
    assert {entry.name for entry in result.tensors} == set(odd)
    assert result.layout == "plain"
    assert result.bits_per_weight is None


def test_to_dict_is_json(tmp_path):
    ql.save_tensors(tmp_path / "w.safetensors", {"w": ql.quantize(matrix(8, 64), "uniform:4:g32")})
    document = json.loads(json.dumps(ql.inspect(tmp_path).to_dict(), allow_nan=False))
    assert set(document) == {
        "path",
        "layout",
        "architecture",
        "weights",
        "quantized_weights",
        "bits_per_weight",
        "model_bits_per_weight",
        "file_bytes",
        "files",
        "metadata",
        "tensors",
    }
    assert set(document["tensors"][0]) == {
        "name",
        "file",
        "format",
        "shape",
        "quantized",
        "weights",
        "bits",
        "bits_per_weight",
        "planes",
    }


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ql.inspect(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        ql.inspect(tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        ql.inspect(bad)
    bad.unlink()
    ql.save_tensors(tmp_path / "a.safetensors", {"w": np.zeros(3, dtype=np.float32)})
    ql.save_tensors(tmp_path / "b.safetensors", {"w": np.zeros(3, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"'w' is stored in a\.safetensors too"):
        ql.inspect(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, error, message in (
        ("[]", ValueError, "expected an object"),
        ("{", ValueError, "not JSON"),
        ("{}", ValueError, "weight_map"),
        ('{"weight_map": {"w": "../a.safetensors"}}', ValueError, "a name without a folder"),
        ('{"weight_map": {"w": "c.safetensors"}}', FileNotFoundError, "the index names it"),
    ):
        index.write_text(text)
        with pytest.raises(error, match=message):
            ql.inspect(tmp_path)


def test_a_flipped_bit_is_found(tmp_path):
    file = tmp_path / "w.safetensors"
    ql.save_tensors(file, {"w": ql.quantize(matrix(8, 64), "uniform:4:g32")})
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        ql.inspect(file)
