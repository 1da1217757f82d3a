"""Weights rounded again to stored scales: the codes of the library, bit for bit."""

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom._bit_rows import pack_rows, unpack_rows
from quantloom._weight_grids import WeightGrid

FORMATS = [
    "uniform:1:g16",
    "uniform:2:g16:asym:bf16",
    "uniform:3:g128",
    "uniform:4:g5:asym",
    "uniform:4:channel",
    "uniform:6:tensor:asym:f32",
    "uniform:8:g32",
    "uniform:8:tensor",
    "codebook:nf4:g16",
    "codebook:fp4:channel:bf16",
    "codebook:nf3:tensor:f32",
    "sdr:2:g3",
    "sdr:4:g8",
    "sdr:5:g16:f32",
    "sdr:7:g64:bf16",
    "outliers:3%:uniform:4:g16",
    "outliers:3%:sdr:4:g16",
]


def weights(rng, n, k):
    w = rng.standard_normal((n, k), dtype=np.float32) * np.exp(rng.standard_normal((n, 1))).astype(np.float32)
    w[rng.random((n, k)) < 0.05] = 0
    return torch.from_numpy(w)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 61), (33, 128)])
def test_the_weights_themselves_keep_their_codes(spec, shape, rng):
    w = weights(rng, *shape)
    packed = ql.quantize(w, spec)
    grid = WeightGrid(packed)
    assert torch.equal(grid.round(w), packed.dequantize())
    again = grid.packed(w)
    assert again.format == packed.format
    for name, plane in packed.planes.items():
        assert torch.equal(again.planes[name], plane), name


@pytest.mark.parametrize("spec", FORMATS)
def test_what_moves_lands_where_decoding_says(spec, rng):
    w = weights(rng, 19, 53)
    packed = ql.quantize(w, spec)
    grid = WeightGrid(packed)
    moved = w + 0.2 * torch.from_numpy(rng.standard_normal((19, 53), dtype=np.float32))
    again = grid.packed(moved)
    assert torch.equal(again.dequantize(), grid.round(moved))
    assert not torch.equal(again.planes["codes"], packed.planes["codes"])
    for name, plane in packed.planes.items():
        assert name == "codes" or torch.equal(again.planes[name], plane)
    # Decoded weights stay where they are.
    assert torch.equal(grid.round(grid.values), grid.values)


@pytest.mark.parametrize("dynamic", [False, True])
def test_codes_of_feedback_stay(dynamic, rng):
    w = weights(rng, 24, 64)
    hessian = ql.Hessian(64)
    hessian.add(rng.standard_normal((200, 64), dtype=np.float32))
    rounding = ql.GPTQ(hessian, static_groups=not dynamic)
    for spec in ("uniform:4:g16:asym", "codebook:nf4:g16", "sdr:4:g8"):
        packed = ql.quantize(w, spec, rounding)
        grid = WeightGrid(packed)
        assert torch.equal(grid.round(packed.dequantize()), packed.dequantize())
        assert torch.equal(grid.packed(packed.dequantize()).planes["codes"], packed.planes["codes"])


@pytest.mark.parametrize("transform", ["hadamard:b16", "scales"])
def test_in_the_basis_of_the_weights(transform, rng):
    w = weights(rng, 16, 48)
    if transform == "scales":
        transform = ql.ChannelScales(rng.integers(-40, 40, 48).astype(np.int8))
    packed = ql.quantize(w, "uniform:4:g16", transform=transform)
    grid = WeightGrid(packed)
    assert torch.equal(grid.packed(w).planes["codes"], packed.planes["codes"])
    assert torch.equal(grid.round(w), packed.dequantize())


def test_kept_columns(rng):
    w = weights(rng, 16, 48)
    packed = ql.keep_columns(ql.quantize(w, "uniform:8:channel"), w, [3, 40])
    grid = WeightGrid(packed)
    moved = w + 0.3
    assert torch.equal(grid.round(moved)[:, [3, 40]], packed.dequantize()[:, [3, 40]])
    assert torch.equal(grid.packed(moved).dequantize(), grid.round(moved))


def test_other_formats_are_refused(rng):
    with pytest.raises(ValueError, match=r"packed: got spqr.*expected uniform, codebook or sdr"):
        WeightGrid(ql.quantize(weights(rng, 8, 64), "spqr:3:g16"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 37), (2, 64)])
def test_rows_of_bits(bits, shape, rng):
    codes = rng.integers(0, 2**bits, shape)
    words = pack_rows(codes, bits)
    assert words.dtype == np.int32 and words.shape == (shape[0], -(-shape[1] * bits // 32))
    expected = [[(int(row[i // bits]) >> (i % bits)) & 1 for i in range(shape[1] * bits)] for row in codes]
    found = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=shape[1] * bits)
    assert np.array_equal(found, np.array(expected, np.uint8).reshape(found.shape))
    assert np.array_equal(unpack_rows(words, bits, shape[1]), codes)
