"""The layouts of GPTQ and compressed-tensors checkpoints, with the compressed-tensors package as an
independent reader."""

from __future__ import annotations

import json

import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32


def rounded(rng, n, k, *arguments) -> ql.PackedTensor:
    return ql.quantize(rng.standard_normal((n, k)).astype(np.float32), ql.Uniform(*arguments))


def assert_same(a: ql.PackedTensor, b: ql.PackedTensor) -> None:
    assert a.format == b.format
    assert a.shape == b.shape
    for name in a.planes:
        np.testing.assert_array_equal(np.asarray(a.planes[name]), np.asarray(b.planes[name]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [32, 128, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_compressed_tensors_reads_what_we_write(rng, bits, group, symmetric, kind):
    n, k = 24, 256
    q = rounded(rng, n, k, bits, group, symmetric).to(kind)
    arrays = ql.layouts.to_compressed_tensors(q)
    tensors = {name: torch.tensor(np.asarray(value)) for name, value in arrays.items()}
    assert all(type(value) is type(q.planes["codes"]) for value in arrays.values())
    assert tensors["weight_shape"].tolist() == [n, k]
    assert ("weight_zero_point" in tensors) == (not symmetric)
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size((n, k))).to(torch.float32)
    groups = tensors["weight_scale"].shape[1]
    zeros = torch.zeros(n, groups)
    if not symmetric:
        packed = tensors["weight_zero_point"]
        zeros = unpack_from_int32(packed, bits, torch.Size((n, groups)), packed_dim=0).to(torch.float32)
    scales = tensors["weight_scale"].to(torch.float32)
    size = k // groups
    decoded = (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
    np.testing.assert_array_equal(decoded.numpy(), np.asarray(q.dequantize()))
    back = ql.layouts.from_compressed_tensors(arrays, bits, group, symmetric)
    assert back.kind == kind
    assert_same(back, q)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [20, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compressed_tensors_round_trip(rng, bits, group, symmetric, dtype):
    q = rounded(rng, 13, 60, bits, group, symmetric, dtype)
    if bits == 1 and symmetric:
        with pytest.raises(RuntimeError, match="zero"):
            ql.layouts.to_compressed_tensors(q)
        return
    arrays = ql.layouts.to_compressed_tensors(q)
    assert arrays["weight_scale"].dtype.name == dtype
    assert_same(ql.layouts.from_compressed_tensors(arrays, bits, group, symmetric), q)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 48, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_gptq_layout_round_trip(rng, bits, group, symmetric, version, kind):
    n, k = 64, 96
    w = rng.standard_normal((n, k)).astype(np.float32)
    q = ql.quantize(w, ql.Uniform(bits, group, symmetric)).to(kind)
    _, zeros = reference.scales_and_zeros(q.to("numpy"))
    if version == "gptq" and (zeros == 0).any():
        with pytest.raises(RuntimeError, match="zero"):
            ql.layouts.to_gptq(q, version)
        return
    arrays = ql.layouts.to_gptq(q, version)
    assert set(arrays) == {"qweight", "qzeros", "scales", "g_idx"}
    assert arrays["qweight"].shape == (k * bits // 32, n)
    back = ql.layouts.from_gptq(arrays, bits, group, symmetric, version)
    assert back.kind == kind
    assert_same(back, q)
    # Decoded by the rules of the layout: dense streams down the rows of qweight and along those of qzeros.
    qweight, qzeros = np.asarray(arrays["qweight"]), np.asarray(arrays["qzeros"])
    codes = np.stack([reference.unpack_bits(qweight[:, column], bits, k) for column in range(n)])
    stored = np.stack([reference.unpack_bits(row, bits, n) for row in qzeros])
    zero = (stored + (version == "gptq")).T[:, np.asarray(arrays["g_idx"])]
    scale = np.asarray(arrays["scales"]).astype(np.float32).T[:, np.asarray(arrays["g_idx"])]
    np.testing.assert_array_equal(scale * (codes - zero).astype(np.float32), np.asarray(q.dequantize()))


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)],
)
def test_symmetric_zero_points_of_the_gptq_layout(rng, bits, v1, v2):
    q = rounded(rng, 32, 32, bits, 32)
    for version, word in (("gptq", v1), ("gptq_v2", v2)):
        arrays = ql.layouts.to_gptq(q, version)
        assert (arrays["qzeros"].view(np.uint32) == word).all()
        other = "gptq" if version == "gptq_v2" else "gptq_v2"
        with pytest.raises(ValueError, match="qzeros"):  # a mislabelled file
            ql.layouts.from_gptq(arrays, bits, 32, True, other)


def test_groups_that_are_not_consecutive_go_through_g_idx(rng):
    x = rng.standard_normal((200, 64)).astype(np.float32) * np.exp(rng.standard_normal(64)).astype(np.float32)
    hessian = ql.Hessian(64)
    hessian.add(x)
    w = rng.standard_normal((32, 64)).astype(np.float32)
    q = ql.quantize(w, "uniform:4:g32", ql.GPTQ(hessian, static_groups=False))
    assert "group_index" in q.planes
    arrays = ql.layouts.to_gptq(q, "gptq_v2")
    np.testing.assert_array_equal(arrays["g_idx"], q.planes["group_index"])
    assert_same(ql.layouts.from_gptq(arrays, 4, 32, True, "gptq_v2"), q)
    arrays = ql.layouts.to_compressed_tensors(q)
    np.testing.assert_array_equal(arrays["weight_g_idx"], q.planes["group_index"])
    assert_same(ql.layouts.from_compressed_tensors(arrays, 4, 32, True), q)


def test_formats_say_what_layouts_need():
    assert json.loads(ql.Uniform(4).to_json())["zero_point"] == 8
    with pytest.raises(RuntimeError, match="5"):
        ql.layouts.to_gptq(ql.quantize(np.ones((32, 32), np.float32), "uniform:5:g32"))
    with pytest.raises(RuntimeError, match="multiple"):
        ql.layouts.to_gptq(ql.quantize(np.ones((31, 32), np.float32), "uniform:4:g32"))
    with pytest.raises(RuntimeError, match="group"):  # a last group that is shorter
        ql.layouts.to_compressed_tensors(ql.quantize(np.ones((4, 50), np.float32), "uniform:4:g20"))
