"""quantize, PackedTensor and Hessian against NumPy, on odd shapes and hard numbers."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql

SPECS = [example for entry in ql.format_table() for example in entry["examples"]]
GROUPED = [spec for spec in SPECS if not spec.startswith("trellis:")]  # test_trellis.py has the others
UNIFORM = [spec for spec in SPECS if spec.startswith("uniform:")]
SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (3, 7), (17, 31), (8, 128), (5, 129), (33, 257)]


def same(a: ql.PackedTensor, b: ql.PackedTensor) -> bool:
    return all(np.array_equal(plane, b.planes[name]) for name, plane in a.planes.items())


@pytest.mark.parametrize("spec", GROUPED)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_follows_the_formula(rng, spec, shape):
    w = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    q = ql.quantize(w, spec)
    assert q.shape == shape
    assert q.format == ql.parse_format(spec) or spec.startswith("outliers:")  # which are counted then
    decoded = q.dequantize()
    np.testing.assert_array_equal(decoded, reference.decode(q))
    specs = q.format.planes(*shape)
    assert {plane["name"] for plane in specs if not plane["optional"]} == set(q.planes)
    for plane in specs:
        if plane["name"] in q.planes:
            assert q.planes[plane["name"]].dtype.name == plane["dtype"]
            assert q.planes[plane["name"]].shape == plane["shape"]
    assert q.size_in_bits == sum(8 * plane.nbytes for plane in q.planes.values())
    count = shape[0] * shape[1]
    assert q.bits_per_weight == (q.size_in_bits / count if count else 0)
    report = q.report
    assert report.method == "nearest"
    assert math.isnan(report.proxy_loss)
    assert report.mean_squared_error == pytest.approx(np.mean((w - decoded) ** 2.0) if count else 0, rel=1e-5)


@pytest.mark.parametrize("spec", UNIFORM)
def test_codes_are_the_nearest_ones_under_the_stored_scale(rng, spec):
    w = rng.standard_normal((13, 200)).astype(np.float32)
    q = ql.quantize(w, spec)
    scales, zeros = reference.scales_and_zeros(q)
    group = reference.group_of_column(q)
    for column in range(200):
        g = group[column]
        chosen, _ = reference.nearest_column(w[:, column], scales[:, g], zeros[:, g], q.format.bits)
        np.testing.assert_array_equal(chosen, reference.codes(q)[:, column])


@pytest.mark.parametrize("spec", UNIFORM)
def test_the_error_is_at_most_half_a_step(rng, spec):
    w = rng.standard_normal((13, 200)).astype(np.float32)
    q = ql.quantize(w, spec)
    scales, _ = reference.scales_and_zeros(q)
    error = np.abs(w - q.dequantize())
    # Half a step, and at the ends of the range what rounding the scale moved them by.
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[q.format.scale_dtype]
    bound = 0.5 + 2**q.format.bits * rounding
    assert (error <= scales[:, reference.group_of_column(q)] * bound + 1e-6).all() or q.format.bits == 1


def test_lower_error_with_more_bits_and_smaller_groups(rng):
    w = rng.standard_normal((64, 512)).astype(np.float32)
    errors = [ql.quantize(w, f"uniform:{bits}:g64:asym").report.mean_squared_error for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    groups = ["g16", "g64", "channel", "tensor"]
    errors = [ql.quantize(w, f"uniform:3:{group}").report.mean_squared_error for group in groups]
    assert errors == sorted(errors)


def test_bits_per_weight_counts_everything():
    w = np.ones((32, 256), np.float32)
    assert ql.quantize(w, "uniform:4:g128").bits_per_weight == 4 + 16 / 128
    assert ql.quantize(w, "uniform:3:g128:asym").bits_per_weight == 3 + 16 / 128 + 3 / 128
    assert ql.quantize(w, "uniform:8:channel:f32").bits_per_weight == 8 + 32 / 256


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_that_are_not_finite_are_refused_by_place(value, dtype):
    w = np.zeros((40, 70), dtype)
    w[31, 68] = value
    with pytest.raises(ValueError, match=r"w.*31.*68"):
        ql.quantize(w, "uniform:4:g32")


HAZARDS = {
    "zeros": lambda w: w * 0,
    "negative zeros": lambda w: w * -0.0,
    "subnormal": lambda w: w * 1e-41,
    "one subnormal group": lambda w: np.where(np.arange(w.shape[1]) < 32, w * np.float32(1e-42), w),
    "tiny": lambda w: w * 1e-30,
    "all equal": lambda w: w * 0 + 3.25,
    "all equal and negative": lambda w: w * 0 - 3.25,
    "positive": lambda w: np.abs(w) + 100,
    "negative": lambda w: -np.abs(w) - 100,
    "one outlier": lambda w: np.where(np.arange(w.size).reshape(w.shape) == 77, 1e30, w),
    "largest floats": lambda w: np.sign(w) * np.finfo(np.float32).max,
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("hazard", HAZARDS)
def test_hard_numbers_decode_to_finite_ones_or_are_refused(rng, spec, hazard):
    with np.errstate(all="ignore"):
        w = HAZARDS[hazard](rng.standard_normal((9, 96)).astype(np.float32)).astype(np.float32)
    try:
        q = ql.quantize(w, spec)
    except ValueError as error:
        # A scale beyond float16 or float32, by row and group, with the way out.
        assert np.abs(w).max() > 60_000
        outlier = "outlier" in str(error)
        assert outlier or "scale" in str(error)
        if spec in GROUPED:
            assert "row" in str(error)
            assert outlier or "group" in str(error)
        return
    decoded = q.dequantize()
    assert np.isfinite(decoded).all()
    if "zeros" in hazard and getattr(q.format, "dense", q.format).bits > 1:
        assert (decoded == 0).all()
    if hazard == "largest floats" and spec in GROUPED:
        assert q.format.scale_dtype != "float16"


def test_a_scale_beyond_float16_is_refused_and_bfloat16_takes_it(rng):
    w = rng.standard_normal((4, 64)).astype(np.float32)
    w[2, 40] = 1e9
    with pytest.raises(ValueError, match=r"(?s)row 2.*group 1.*(bfloat16|float32)"):
        ql.quantize(w, "uniform:4:g32")
    decoded = ql.quantize(w, "uniform:4:g32:bf16").dequantize()
    assert decoded[2, 40] == pytest.approx(1e9, rel=0.1)


def test_scale_search_lowers_the_weighted_error(rng):
    w = rng.standard_normal((32, 256)).astype(np.float32) ** 3
    plain = ql.quantize(w, "uniform:3:g64:asym")
    searched = ql.quantize(w, "uniform:3:g64:asym", ql.Nearest(ql.ScaleSearch()))
    assert searched.report.scale_search
    assert not plain.report.scale_search
    assert searched.report.mean_squared_error < plain.report.mean_squared_error


def test_copies_and_pickles_are_equal(rng):
    w = rng.standard_normal((9, 50)).astype(np.float32)
    q = ql.quantize(w, "uniform:3:g16:asym:bf16", ql.Nearest(ql.ScaleSearch(5, 0.5)))
    for other in (
        copy.copy(q),
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
        pickle.loads(pickle.dumps(q.to("torch"))),
    ):
        assert other.format == q.format
        assert repr(other.report) == repr(q.report)
        np.testing.assert_array_equal(np.asarray(other.dequantize()), q.dequantize())
    assert repr(q) == "PackedTensor(uniform:3:g16:asym:bf16, shape=(9, 50), 4.764 bits/weight, numpy)"


def test_formats_round_trip_through_text():
    for spec in SPECS:
        format = ql.parse_format(spec)
        assert ql.parse_format(format.spec) == format
        assert ql.format_from_json(format.to_json()) == format
        assert pickle.loads(pickle.dumps(format)) == format
        assert len({format, ql.parse_format(spec)}) == 1
        assert str(format) == format.spec
    assert ql.Uniform(4) == ql.parse_format("uniform:4") == ql.parse_format("uniform:4:g128:sym:f16")
    assert ql.Uniform(4, scale_dtype=np.float32) == ql.parse_format("uniform:4:f32")


def test_hessian_is_the_sum_of_outer_products(rng):
    hessian = ql.Hessian(37)
    parts = [rng.standard_normal(shape).astype(np.float32) for shape in [(5, 37), (2, 3, 37), (0, 37), (37,)]]
    for part in parts:
        hessian.add(part)
    x = np.concatenate([part.reshape(-1, 37) for part in parts]).astype(np.float64)
    assert hessian.tokens == 12
    assert hessian.k == 37
    np.testing.assert_allclose(hessian.sum(), x.T @ x, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hessian.sum(), hessian.sum().T)
    np.testing.assert_allclose(hessian.diagonal(), np.diag(x.T @ x) / 12, rtol=1e-5)
    again = pickle.loads(pickle.dumps(hessian))
    assert (again.k, again.tokens) == (37, 12)
    np.testing.assert_array_equal(again.sum(), hessian.sum())
    assert copy.deepcopy(ql.Hessian(3)).tokens == 0


def test_a_refused_batch_adds_nothing(rng):
    hessian = ql.Hessian(8)
    hessian.add(rng.standard_normal((4, 8)).astype(np.float32))
    before = hessian.sum()
    x = rng.standard_normal((600, 8)).astype(np.float32)
    x[599, 3] = np.nan
    with pytest.raises(ValueError, match=r"x.*599.*3"):
        hessian.add(x)
    assert hessian.tokens == 4
    np.testing.assert_array_equal(hessian.sum(), before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_proxy_loss_is_the_mean_output_error(rng, dtype):
    w = rng.standard_normal((12, 40)).astype(np.float32)
    x = rng.standard_normal((100, 40)).astype(np.float32)
    hessian = ql.Hessian(40)
    hessian.add(x)
    q = ql.quantize(w, "uniform:3:g16", ql.Nearest(hessian=hessian))
    error = (x.astype(np.float64) @ (w - q.dequantize()).T.astype(np.float64)) ** 2
    expected = error.sum() / 100
    assert ql.proxy_loss(w, q, hessian) == pytest.approx(expected, rel=1e-4)
    assert ql.proxy_loss(w, q.dequantize(), hessian) == pytest.approx(expected, rel=1e-4)
    assert ql.proxy_loss(w, q.to("torch"), (hessian.sum() / 100).astype(dtype)) == pytest.approx(
        expected, rel=1e-4
    )
    assert q.report.proxy_loss == pytest.approx(expected, rel=1e-4)
    assert q.report.proxy_loss_nearest == q.report.proxy_loss
    assert q.report.tokens == 100
    assert ql.proxy_loss(w, w, hessian) == 0
