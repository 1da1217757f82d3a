"""Element formats: values, names, bits, and rounding against slow exact references."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import quantloom.formats as Q

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits_of(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def awkward(rng, count=3000):
    """Values of all sizes, with zeros, infinities, float32 subnormals and exact ties of small floats."""
    x = rng.standard_normal(count) * 2.0 ** rng.integers(-40, 12, count)
    steps = rng.integers(-64, 65, 500) / 32.0
    extremes = [0.0, -0.0, np.inf, -np.inf, 1e38, -1e38, 1e-45, -1e-45, 2.0**-126, 3.4e38]
    return torch.tensor(np.concatenate([x, steps, extremes]), dtype=torch.float32)


def nearest_in(values, x, rounding="nearest"):
    """The rounded value, by exact comparison with all values; `nearest` takes ties toward zero."""
    values = sorted(Fraction(v) for v in values)
    if math.isinf(x) or not values[0] <= Fraction(x) <= values[-1]:
        return float(values[0] if x < 0 else values[-1])
    x = Fraction(x)
    below = max(v for v in values if v <= x)
    above = min(v for v in values if v >= x)
    inner, outer = (below, above) if x >= 0 else (above, below)
    if rounding == "to_zero":
        return float(inner)
    if rounding == "to_inf":
        return float(outer)
    return float(inner if abs(x - inner) <= abs(outer - x) else outer)


FLOATS = ["E2M1", "E3M0", "E2M0", "UE2M1", "E4M3", "E5M2", "UE3M2", "E2M1-RZ", "E2M1-RI", "E4M3-RI", "E8M0"]


@pytest.mark.parametrize("name", FLOATS)
def test_small_floats_against_all_their_values(name, rng):
    fmt = Q.parse(name)
    x = awkward(rng, 600)
    expected = [nearest_in(fmt.centroids, float(v), fmt.rounding) for v in x]
    assert fmt.quantise(x).tolist() == expected


def test_e2m1_is_half_of_ocp():
    fmt = Q.parse("E2M1")
    assert fmt.bits == 4 and fmt.range == (-3, 3) and str(fmt) == "E2M1"
    assert fmt.min_absolute_normal == 0.5 and fmt.min_absolute_subnormal == 0.25
    positive = [0.25, 0.5, 0.75, 1, 1.5, 2, 3]
    assert list(fmt.centroids) == [-v for v in reversed(positive)] + [0.0, *positive]
    assert Q.parse("E3M0").centroids[7:] == (0, 0.125, 0.25, 0.5, 1, 2, 4, 8)
    assert Q.parse("E2M0").centroids == (-2, -1, -0.5, 0, 0.5, 1, 2)
    unsigned = Q.parse("UE2M1")
    assert str(unsigned) == "UE2M1" and unsigned.range == (0, 3) and unsigned.bits == 3
    assert unsigned.quantise(torch.tensor([-1.0, 0.6])).tolist() == [0, 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["E2M1", "E3M0", "E2M0", "E4M3"])
def test_small_floats_reach_just_their_values(name, dtype):
    fmt = Q.parse(name)
    x = torch.linspace(-20, 20, 20001).to(dtype)
    reached = fmt.quantise(x).unique().tolist()
    assert set(reached) <= set(fmt.centroids)
    if name != "E4M3":
        assert len(reached) == len(fmt.centroids)


def test_float_roundings():
    x = torch.tensor([1.5 - 1e-5, 1.5, 1.5 + 1e-5])
    assert Q.parse("E2M1-RN").quantise(x).tolist() == [1.5, 1.5, 1.5]
    assert Q.parse("E2M1-RI").quantise(x).tolist() == [1.5, 1.5, 2]
    assert Q.parse("E2M1-RZ").quantise(x).tolist() == [1, 1.5, 1.5]
    assert Q.parse("E2M1").quantise(torch.tensor([0.125, -0.125, 1.25, 2.5])).tolist() == [0, 0, 1, 2]


def test_zero_is_positive():
    for fmt in (Q.parse("E2M1"), Q.IntFormat(3), Q.NF4):
        assert bits_of(fmt.quantise(torch.tensor([-0.0, -1e-9]))).tolist() == [0, 0]


def test_integers():
    eight, nine = Q.IntFormat(3), Q.IntFormat(math.log2(9))
    assert (str(eight), eight.range, eight.bits) == ("E0M2", (-4, 3), 3)
    assert (str(nine), nine.range) == ("E0M{2.17}", (-4, 4))
    assert Q.IntFormat(3.17) == nine
    symmetric = Q.IntFormat(3, "symmetric")
    assert str(symmetric) == "E0M2-S" and symmetric.range == (-3.5, 3.5)
    assert symmetric.centroids == (-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)
    assert Q.IntFormat(3.17, "symmetric").range == (-4, 4)
    assert eight.count_bits((100,)) == 300
    x = torch.tensor([-9.0, -0.5, 0.5, 1.5, 2.5, 3.4, 9])
    assert eight.quantise(x).tolist() == [-4, 0, 0, 2, 2, 3, 3]
    # round(x + 1/2) - 1/2, ties to even before the half is taken off
    assert symmetric.quantise(torch.tensor([0.0, 1.0, -1.0, 9.0])).tolist() == [-0.5, 1.5, -0.5, 3.5]


def test_torch_dtypes():
    assert str(Q.FP16) == "FLOAT16" and Q.FP16.bits == 16 and Q.FP16.range == (-65504, 65504)
    assert (str(Q.FP32), str(Q.BFLOAT16), str(Q.TorchFormat(torch.int8))) == ("FLOAT32", "BFLOAT16", "INT8")
    assert Q.FP16.quantise(torch.tensor([1e5, -1e5])).tolist() == [65504, -65504]
    assert Q.FP16.quantise(torch.tensor([2.0**-25, 1.01 * 2.0**-25])).tolist() == [0, 2.0**-24]
    assert Q.TorchFormat("int8").quantise(torch.tensor([1.9, -1.9, 300, -300])).tolist() == [1, -1, 127, -128]
    with pytest.raises(NotImplementedError):
        _ = Q.FP32.centroids
    big = torch.tensor([torch.finfo(torch.float32).max, torch.inf])
    assert Q.BFLOAT16.quantise(big).isfinite().all() and Q.FP32.quantise(big).isfinite().all()


def test_powers_of_two_round_up(rng):
    fmt = Q.ExpCeilFormat(6)
    assert (str(fmt), fmt.bits, fmt.range) == ("EXP6", 6, (2.0**-31, 2.0**32))
    x = torch.tensor(2.0 ** rng.uniform(-31, 32, 1000), dtype=torch.float32)
    q = fmt.quantise(x)
    assert (q >= x).all() and (q < 2 * x).all() and (torch.frexp(q).mantissa == 0.5).all()
    assert fmt.quantise(q).equal(q)
    ends = fmt.quantise(torch.tensor([0.0, -5, 1e-30, 1e30]))
    assert ends.tolist() == [2.0**-31, 2.0**-31, 2.0**-31, 2.0**32]
    assert Q.ExpCeilFormat(8).quantise(torch.tensor([3e38])).isfinite().all()


def test_tables_take_the_lower_value_on_a_tie(rng):
    fmt = Q.LUTFormat.create(torch.tensor([-4.0, 0, 1, 4]), "fours")
    assert str(fmt) == "LUT2[fours]" and fmt.bits == 2 and fmt.range == (-4, 4)
    x = torch.tensor([-9, -2.0, -1.99, 0.5, 0.51, 2.5, 2.51, 9])
    assert fmt.quantise(x).tolist() == [-4, -4, 0, 0, 1, 1, 4, 4]
    assert fmt.to_idx(x).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    values = np.sort(rng.standard_normal(150)).astype(np.float32)  # more than is searched by counting
    table = Q.LUTFormat.create(values.tolist(), "random")
    x = torch.tensor(rng.standard_normal(5000), dtype=torch.float32)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    assert table.to_idx(x).tolist() == np.searchsorted(middles, x.numpy()).tolist()
    assert Q.LUTFormat((1.0, 2.0), "positional", (0, 5)).range == (0, 5)


def test_named_tables():
    assert (str(Q.NF4), str(Q.SF4_DF5), str(Q.nf_approx(5))) == (
        "LUT4[NF]",
        "LUT4[SF_DF5]",
        "LUT5[NF-approx]",
    )
    assert Q.NF4.values[0] == -1 and Q.NF4.values[7] == 0 and Q.NF4.values[15] == 1
    grid = Q.lut_grid(0.58, 12.0)
    assert str(grid) == "LUT6[GRID{0.58}]" and len(grid.values) == 2 * 21 + 1
    assert grid.values[21] == 0 and grid.values[22] == pytest.approx(0.58)
    n = np.linspace(-1, 1, 32)
    assert Q.nf_approx(5).values == pytest.approx(((n + n**3) / 2).tolist(), abs=1e-6)


ALL = [
    *FLOATS,
    Q.IntFormat(3),
    Q.IntFormat(3.17),
    Q.IntFormat(4, "symmetric"),
    Q.IntFormat(12.3),
    Q.ExpCeilFormat(8),
    Q.ExpCeilFormat(3),
    Q.NF4,
    Q.crd_t(7.3, 5),
    Q.LUTFormat((0.5,), "one"),
    Q.ScaledFormat.create(Q.NF4, 0.3),
    Q.ScaledFormat.create(Q.IntFormat(3), 0.7),
]


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_rounding_equals_the_torch_formulas(fmt, dtype, rng):
    fmt = Q.parse(fmt) if isinstance(fmt, str) else fmt
    x = awkward(rng).to(dtype)
    places = fmt._reference_codes(x.float() / fmt._factor)
    assert fmt.to_idx(x).equal(places)
    assert fmt.quantise(x).equal((fmt._reference_values(places) * fmt._factor).to(dtype))


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_what_every_scalar_format_promises(fmt, rng):
    fmt = Q.parse(fmt) if isinstance(fmt, str) else fmt
    assert 0 <= fmt.bits <= 32 and len(fmt.centroids) <= 2**fmt.bits + 0.5
    x = torch.tensor(rng.standard_normal(1000) * 3, dtype=torch.float32)
    q = fmt.quantise(x)
    assert (q >= fmt.range[0]).all() and (q <= fmt.range[1]).all()
    assert set(q.tolist()) <= set(torch.tensor(fmt.centroids, dtype=torch.float64).float().tolist())
    assert fmt.quantise(q).equal(q)
    assert fmt.count_bits((10, 100)) == math.ceil(fmt.bits * 1000) == fmt.count_bits_tensor(x)
    assert list(fmt.centroids) == sorted(fmt.centroids)
    loaded = Q.TensorFormat.load(json.loads(json.dumps(Q.TensorFormat.save(fmt))))
    assert loaded == fmt and type(loaded) is type(fmt) and str(loaded) == str(fmt)
    assert dataclasses.replace(fmt) == fmt
    assert fmt._type == dataclasses.asdict(fmt)["_type"]


@pytest.mark.parametrize("fmt", [Q.NF4, Q.parse("E2M1"), Q.IntFormat(4), Q.BFLOAT16], ids=str)
def test_any_strides_any_shape_any_float(fmt, rng):
    x = torch.tensor(rng.standard_normal((6, 10, 4)), dtype=torch.float32)
    expected = fmt.quantise(x)
    turned = x.permute(2, 0, 1)[:, ::2]
    assert fmt.quantise(turned).equal(expected.permute(2, 0, 1)[:, ::2])
    assert fmt.quantise(x.double()).equal(expected.double())
    assert fmt.quantise(x[0, 0, 0]).shape == () and fmt.quantise(x[:0]).shape == (0, 10, 4)
    assert fmt.quantise(torch.nn.Parameter(x)).equal(expected)


def test_nan_stays():
    x = torch.tensor([1.0, torch.nan])
    for fmt in (Q.NF4, Q.parse("E2M1"), Q.IntFormat(4), Q.ExpCeilFormat(4)):
        assert fmt.quantise(x).isnan().tolist() == [False, True]


def test_parse():
    assert Q.parse("FP32") == Q.FP32 and Q.parse("BFLOAT16") == Q.BFLOAT16 and Q.parse("FP16") == Q.FP16
    assert Q.parse("E0M3") == Q.IntFormat(4) and Q.parse("EXP8") == Q.ExpCeilFormat(8)
    assert Q.parse("UE4M3-RI") == Q.FPFormat(4, 3, "to_inf", False)
    assert Q.parse("E4M3-RZ") == Q.FPFormat.create(4, 3, "to_zero")
    for bad in ("E1M2", "FP8", "E2M1-RX", "", "e2m1", "EXP", "UE0M3", "E2M", "FLOAT32", "E9M1", "EXP9"):
        with pytest.raises(ValueError):
            Q.parse(bad)


def test_bad_arguments_name_what_is_wrong():
    with pytest.raises(ValueError, match="exponent_bits"):
        Q.FPFormat.create(1, 2)
    with pytest.raises(ValueError, match="rounding"):
        Q.FPFormat.create(2, 2, "up")
    with pytest.raises(ValueError, match="ascending"):
        Q.LUTFormat((1.0, 0.0), "down")
    with pytest.raises(ValueError, match="dtype"):
        Q.TorchFormat("float33")
    with pytest.raises(ValueError, match="_type"):
        Q.TensorFormat.load({"_type": "unheard of"})
    with pytest.raises(ValueError, match="format fp"):
        Q.TensorFormat.load({"_type": "fp", "bits": 3})
    with pytest.raises(ValueError, match="bits"):
        Q.IntFormat(33)


@pytest.mark.parametrize("scaling", ["absmax", "signmax"])
def test_blocks_of_elements_whose_largest_is_past_float32(scaling):
    """EXP8 reaches 2^128: every scale is the smallest there is."""
    powers = Q.parse("EXP8")
    x = torch.linspace(-3, 3, 128).reshape(2, 64)
    smallest = torch.finfo(torch.float32).tiny
    blocks = Q.LinearScalingFormat(powers, Q.BFLOAT16, (1, 64), scaling)
    assert blocks.scales(x).equal(torch.full((2, 1), smallest))
    assert blocks.quantise(x).equal(powers.quantise(x / smallest) * smallest)
