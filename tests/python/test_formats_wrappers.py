"""Metrics, block scales, wrappers, vectors."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import quantloom.formats as Q


def tensor(rng, *shape):
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


def test_shuffle_keeps_the_set():
    x = torch.arange(1000.0).reshape(10, 100)
    y = Q.shuffle(x)
    assert y.shape == x.shape and not y.equal(x) and y.flatten().sort().values.equal(x.flatten())


def test_errors(rng):
    x = tensor(rng, 4096)
    assert Q.qrmse_norm(Q.parse("E2M2"), x) < Q.qrmse_norm(Q.parse("E2M1"), x)
    even = 0.3 * torch.arange(-8, 8.0).repeat(10) + 1e-3 * tensor(rng, 160)
    assert Q.snr(even, Q.ScaledFormat.create(Q.parse("E0M3"), 0.3).quantise(even)) > 60
    q = Q.NF4.quantise(x)
    assert float(Q.rmse_norm(x, q) ** -2) == pytest.approx(float(Q.snr(x, q)), rel=1e-5)
    w = tensor(rng, 4096).abs()
    expected = ((w * (q - x) ** 2).double().sum() / (w * x**2).double().sum()).sqrt()
    assert float(Q.rmse_norm(x, q, w)) == pytest.approx(float(expected), rel=1e-5)
    assert Q.rmse_norm(x.bfloat16(), q.bfloat16()).dtype == torch.float32
    assert Q.safe_div(torch.tensor([1.0, 2]), torch.tensor([0.0, 4])).tolist() == [1, 0.5]


def test_scaled():
    fmt = Q.ScaledFormat.create(Q.parse("E2M0"), 0.5)
    assert str(fmt) == "E2M0{*0.5}" and fmt.range == (-1, 1) and fmt.bits == 3
    assert fmt.centroids == (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)
    assert fmt.quantise(torch.tensor([0.3, 0.8, -9])).tolist() == [0.25, 1, -1]
    assert Q.ScaledFormat.create(Q.parse("E2M0"), 0.5, (-2, 2)).range == (-2, 2)
    assert fmt.count_bits((100,)) == 300


def test_block_shapes():
    x = torch.zeros(4, 6)
    assert Q.blocked_shape(x, (1, 3)) == (4, 1, 2, 3)
    assert Q.blocked_shape(x, (None, 2)) == (1, 4, 3, 2)
    assert Q.blocked_shape(x, (None, None)) == (1, 4, 1, 6)
    for bad in ((1,), (1, 4), (0, 1), (1, 1, 1)):
        with pytest.raises(ValueError, match="block_shape"):
            Q.blocked_shape(x, bad)


@pytest.mark.parametrize("scaling", ["absmax", "rms"])
def test_zero_blocks_stay_zero(scaling):
    x = torch.tensor([[0.0, 0, 0], [1, 2, 3]])
    y, scale = Q.block_normalise(x, (1, None), scaling, (-1, 1), Q.FP32)
    assert y[0].tolist() == [0, 0, 0] and scale.shape == x.shape
    expected = 3.0 if scaling == "absmax" else math.sqrt(14 / 3)
    assert y[1].tolist() == pytest.approx([v / expected for v in (1, 2, 3)])


def test_linear_examples():
    fmt = Q.LinearScalingFormat(Q.IntFormat(2), Q.FP32, (3,), "absmax")
    assert str(fmt) == "E0M1{3:FLOAT32:absmax}"
    x = torch.tensor([100.0, -90, 0, -40, 10, 40])
    assert fmt.quantise(x).tolist() == [100, -100, 0, -40, 0, 40]
    assert fmt.count_bits((12,)) == 12 * 2 + 4 * 32
    assert json.loads(json.dumps(dataclasses.asdict(fmt)))["block_shape"] == [3]
    signed = Q.LinearScalingFormat(Q.IntFormat(2), Q.FP32, (2,), "signmax")
    assert signed.quantise(torch.tensor([-20.0, 9, 40, -15])).tolist() == [-20, 10, 40, -20]
    assert str(Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, None), "rms")) == "LUT4[NF]{1,*:BFLOAT16:rms}"


def plain_linear(fmt, x):
    """By the definition, block by block."""
    x = x.double().float()
    blocked = Q.blocked_shape(x, fmt.block_shape)
    blocks = x.reshape(blocked)
    scale = Q.blocked_scale(blocks, fmt.scaling, fmt.element_format.range)
    scale = fmt.scale_format.quantise(scale)
    return (fmt.element_format.quantise(Q.safe_div(blocks, scale)) * scale).reshape(x.shape)


@pytest.mark.parametrize("scaling", ["absmax", "rms", "signmax"])
@pytest.mark.parametrize("block", [(1, 8), (None, None), (1, None), (4, 2), (None, 8), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_against_its_definition(scaling, block, dtype, rng):
    x = tensor(rng, 12, 40).to(dtype)
    for elements in (Q.NF4, Q.parse("E2M1"), Q.IntFormat(3.3), Q.ScaledFormat.create(Q.NF4, 0.7)):
        for scales in (Q.FP32, Q.BFLOAT16, Q.parse("E5M2")):
            fmt = Q.LinearScalingFormat(elements, scales, block, scaling)
            q = fmt.quantise(x)
            reference = plain_linear(fmt, x.float()).to(dtype)
            if scaling == "rms":  # sums in another order give scales that differ by one rounding
                assert Q.rmse_norm(reference, q) < 0.02
            else:
                assert q.dtype == dtype and q.equal(reference)


def test_linear_of_other_ranks_and_strides(rng):
    x = tensor(rng, 4, 6, 8)
    fmt = Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (2, None, 4), "absmax")
    assert fmt.quantise(x).equal(plain_linear(fmt, x))
    flat = Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (16,), "absmax")
    assert flat.quantise(x.flatten()).equal(plain_linear(flat, x.flatten()))
    rows = Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, 4), "absmax")
    w = tensor(rng, 8, 12)
    assert rows.quantise(w.T).equal(rows.quantise(w.T.contiguous()))
    assert rows.quantise(torch.zeros(0, 4)).shape == (0, 4)


def test_bfloat16_is_rounded_once(rng):
    """Scales and codes are those of the same values in float32."""
    x = tensor(rng, 64, 64).bfloat16()
    fmt = Q.LinearScalingFormat(Q.crd_block_normal(4, 32), Q.BFLOAT16, (1, 32), "absmax")
    assert fmt.quantise(x).equal(fmt.quantise(x.float()).bfloat16())


def test_sparse():
    fmt = Q.SparseFormat(Q.parse("E0M3"), Q.FP32, 0.25)
    x = torch.tensor([1.0, -100.5, 3, 0.25, -2, 77.125, 0, 6])
    assert fmt.quantise(x).tolist() == [1, -100.5, 3, 0, -2, 77.125, 0, 6]
    assert fmt.count_bits((8,)) == 8 * 4 + 2 * 64
    assert str(fmt) == "E0M3+S[25.0%:FLOAT32]"
    assert str(Q.SparseFormat(Q.NF4, Q.BFLOAT16, 2**-10)) == "LUT4[NF]+S[1e-03:BFLOAT16]"
    dense, places, values = Q.SparseFormat.split(x, 0.25)
    assert dense.tolist() == [1, 0, 3, 0.25, -2, 0, 0, 6]
    assert places.tolist() == [1, 5] and values.tolist() == [-100.5, 77.125]


def test_outliers_leave_before_scales_are_taken(rng):
    x = tensor(rng, 32, 32)
    x[3, 5] = 1000.0
    inner = Q.LinearScalingFormat(Q.IntFormat(4), Q.FP32, (None, None), "absmax")
    fmt = Q.SparseFormat(inner, Q.FP32, 1 / 1024)
    assert Q.qrmse_norm(fmt, x) < 0.005 and fmt.quantise(x)[3, 5] == 1000
    assert fmt.quantise(x.T).equal(fmt.quantise(x).T)  # not contiguous


def test_rotation_helps_heavy_tails():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x = torch.distributions.Laplace(0, 1).sample((256, 1024))
        fmt = Q.RandomRotationFormat(Q.parse("E2M1"), (0,), 77)
        state = torch.get_rng_state()
        error = Q.qrmse_norm(fmt, x)
        assert torch.get_rng_state().equal(state)
    assert error < 0.9 * Q.qrmse_norm(Q.parse("E2M1"), x)
    assert fmt.count_bits((100,)) == 400 and str(fmt) == "E2M1{rot[0]}"
    rotated, (matrix,) = Q.RandomRotationFormat.rotate(x, (0,), 77)
    assert (matrix @ matrix.T - torch.eye(256)).abs().max() < 1e-5
    back, _ = Q.RandomRotationFormat.rotate(rotated, (0,), 77, inverse=True)
    assert (back - x).abs().max() < 1e-4
    assert rotated.allclose((x.T @ matrix).T, atol=1e-4)
    expected = torch.nn.init.orthogonal_(torch.empty(256, 256), generator=torch.Generator().manual_seed(77))
    assert matrix.allclose(expected, atol=1e-5)
    undone = Q.RandomRotationFormat.unrotate(rotated, (0,), (matrix,))
    assert (undone - x).abs().max() < 1e-4
    assert Q.RandomRotationFormat(Q.FP32, (0, 1), 3).quantise(x[:, :64]).allclose(x[:, :64], atol=1e-5)


def test_vector_tables_of_products(rng):
    scalar = Q.crd_normal(3)
    table = torch.tensor(scalar.values)
    fmt = Q.VectorLUTFormat.create(torch.cartesian_prod(table, table), Q.BFLOAT16, "product")
    assert (fmt.index_bits, fmt.dim, str(fmt)) == (3, 2, "VLUT3x2[product]")
    n = 1000
    assert fmt.count_bits((n,)) == 3 * n + 64 * 2 * 16
    x = tensor(rng, 4096)
    assert abs(Q.qrmse_norm(fmt, x) - Q.qrmse_norm(scalar, x)) < 1e-3
    assert fmt.quantise(x.reshape(64, 64)).equal(fmt.quantise(x).reshape(64, 64))
    with pytest.raises(NotImplementedError):
        _ = fmt.bits
    with pytest.raises(ValueError, match="multiple of 2"):
        fmt.quantise(x[:5])
    assert Q.TensorFormat.load(json.loads(json.dumps(Q.TensorFormat.save(fmt)))) == fmt
    uneven = Q.VectorLUTFormat.create([(-1, -3), (2, 1), (0, 5)], Q.FP32, "uneven")
    assert uneven.range == (-1, 2)


@pytest.mark.parametrize("method", ["auto", "torch", "triton"])
def test_nearest_neighbour(method, rng):
    x, centroids = tensor(rng, 500, 3), tensor(rng, 40, 3)
    expected = torch.cdist(x.double(), centroids.double()).argmin(1)
    assert Q.nearest_neighbour(x, centroids, method=method).equal(expected)
    out = torch.empty(500, dtype=torch.int64)
    assert Q.nearest_neighbour(x, centroids, out=out, method=method) is out and out.equal(expected)
    twice = torch.cat([centroids, centroids])
    assert Q.nearest_neighbour(x, twice, method=method).equal(expected)
    wide, many = tensor(rng, 50, 20), tensor(rng, 9, 20)  # beyond what the exact search takes
    assert Q.nearest_neighbour(wide, many).equal(torch.cdist(wide, many).argmin(1))
    with pytest.raises(ValueError, match="centroids"):
        Q.nearest_neighbour(x, many)


def test_three_values_in_eight_bits(rng):
    x = tensor(rng, 256, 128)
    fmt = Q.scaled_int8_3d8_lloyd_max(x, Q.BFLOAT16, (1, None), 1e-2)
    assert type(fmt) is Q.LinearScalingFormat and type(fmt.element_format) is Q.Sign3D8Format
    assert fmt.count_bits((256, 128)) == 256 * 16 + 86 * 128 * 8 + 8 * 96
    assert 0.15 < Q.qrmse_norm(fmt, x) < 0.25
    loaded = Q.TensorFormat.load(json.loads(json.dumps(Q.TensorFormat.save(fmt))))
    assert loaded == fmt and loaded.quantise(x).equal(fmt.quantise(x))
    small = tensor(rng, 7, 3)
    vectors = Q.Sign3D8Format.vectorise(small)
    assert vectors.shape == (9, 3) and vectors[0].tolist() == small[:3, 0].tolist()
    assert Q.Sign3D8Format.unvectorise(vectors, (7, 3)).equal(small)


def test_compressed_tables():
    lut = Q.LUTFormat.create([-2.0, -1, 0, 1, 2], "five")
    logp = torch.tensor([1 / 8, 1 / 8, 1 / 2, 1 / 8, 1 / 8]).log()
    fmt = Q.CompressedLUTFormat(lut, logp, "optimal")
    x = torch.tensor([0.1, -0.2, 0.3, 0, 1.9])
    assert fmt.quantise(x).tolist() == [0, 0, 0, 0, 2]
    assert fmt.count_bits_tensor(x) == 4 * 1 + 3
    assert fmt.count_bits_tensor(x.bfloat16()) == 4 * 1 + 3
    with pytest.raises(NotImplementedError):
        fmt.count_bits((5,))
    with pytest.raises(ValueError, match="sum to"):
        Q.CompressedLUTFormat(lut, logp - 0.1, "optimal")
    with pytest.raises(ValueError, match="expected 5"):
        Q.CompressedLUTFormat(lut, logp[:3], "optimal")
    assert Q.TensorFormat.load(json.loads(json.dumps(Q.TensorFormat.save(fmt)))) == fmt
    assert Q.CompressedLUTFormat.count_bits_compressed(x, lut, "optimal") == pytest.approx(
        -4 * math.log2(0.8) - math.log2(0.2), abs=1e-6
    )


@pytest.mark.parametrize("resolution", [0.3, 1.2])
def test_compressors(resolution, rng):
    x = tensor(rng, 20000)
    fmt = Q.CompressedLUTFormat.train_grid(x, resolution)
    counts = np.bincount(fmt.lut.to_idx(x))
    p = counts[counts > 0] / counts.sum()
    entropy = -(p * np.log2(p)).sum()
    bits = {
        name: fmt.count_bits_compressed(x, fmt.lut, name, None if name == "bz2" else fmt.model_logp) / 20000
        for name in ("optimal", "huffman", "arithmetic", "bz2")
    }
    assert entropy <= bits["optimal"] < entropy + 0.005
    assert entropy <= bits["huffman"] < entropy + 0.12
    assert bits["optimal"] <= bits["arithmetic"] < bits["optimal"] + 0.01
    assert bits["huffman"] < bits["bz2"]
    assert fmt.quantise(x).equal(fmt.lut.quantise(x)) and str(fmt).endswith(
        f"[GRID{{{resolution}}}]+Zoptimal"
    )
    block = Q.LinearScalingFormat(fmt, Q.BFLOAT16, (100,), "rms")
    assert block.count_bits_tensor(x) == pytest.approx(20000 * bits["optimal"] + 200 * 16, rel=0.02)


@pytest.mark.parametrize("block", [(1, 8), (None, None), (4, 2), (None, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_torch_formulas_of_blocks_equal_the_native_ones(block, dtype, rng):
    """What CUDA tensors take."""
    from quantloom.formats import _numerics

    x = tensor(rng, 12, 40).to(dtype)
    x[3] = 0
    for elements in (
        Q.NF4,
        Q.parse("E2M1"),
        Q.parse("E4M3-RI"),
        Q.ScaledFormat.create(Q.IntFormat(3.3), 0.7),
    ):
        fmt = Q.LinearScalingFormat(elements, Q.FP16, block, "signmax")
        grid = fmt._grid(fmt.scales(x), (12, 40))
        values, codes = _numerics._round_reference(elements, x, grid, True, True)
        assert values.equal(fmt.quantise(x))
        assert codes.equal(_numerics.round_codes(elements._elements(), elements, x, grid))
