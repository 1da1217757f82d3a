"""Activations as integers: NumPy formulas, bits, products, modules."""

import json
import pickle

import numpy as np
import pytest
import quantloom as ql
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SPECS = (
    "int8:token",
    "int8:token:asym",
    "int6:tensor",
    "int4:g16:asym",
    "int8:tensor:static=0.05",
    "int4:tensor:asym:static=0.4,-3",
    "sdr4:g16:b8",
    "sdr4:g8:b16",
)
OUTLIERS = ("int8:token:outliers=5", "int4:g16:asym:outliers=9", "int8:tensor:outliers=5:columns=")


def numpy_round(x, spec):
    """The values that a format gives, one formula after the other, in float32."""
    f = ql.parse_activations(spec)
    x = x.astype(np.float32)
    size = f.group_size if f.scope == "group" else x.shape[1]
    out = np.empty_like(x)
    one = np.float32(1)
    half = 2 ** (f.bits - 1)
    levels = 2 ** ((f.base_bits or f.bits) - 1) - 1
    for begin in range(0, x.shape[1], max(size, 1)):
        part = x[:, begin : begin + size]
        whole = part if f.scope != "tensor" else part.reshape(1, -1)
        low = np.minimum(whole.min(1, keepdims=True), 0)
        high = np.maximum(whole.max(1, keepdims=True), 0)
        largest = np.maximum(-low, high)
        zero = 0
        if f.scale is not None:
            scale, zero = np.float32(f.scale), f.zero_point
        elif f.symmetric:
            scale = np.where(largest == 0, one, largest / np.float32(levels))
        else:
            scale = np.where(largest == 0, one, (high - low) / np.float32(2 * half - 1))
            zero = np.clip(np.rint(-low / scale), 0, 2 * half - 1) - half
        if f.base_bits is None:
            codes = np.clip(np.rint(part / scale) + zero, 1 - half if f.symmetric else -half, half - 1)
            out[:, begin : begin + size] = scale * (codes - zero).astype(np.float32)
            continue
        q = np.clip(np.rint(part / scale), -levels, levels).astype(np.int64)
        for g in range(0, q.shape[1], f.group_size):
            run = q[:, g : g + f.group_size]
            length = np.array([int(m).bit_length() for m in np.abs(run).max(1)])
            t = np.maximum(0, length - (f.bits - 1))[:, None]
            c = np.clip(np.rint(run / 2.0**t), -half, half - 1)
            out[:, begin + g : begin + g + run.shape[1]] = scale * (c * 2.0**t).astype(np.float32)
    return out


def sample(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    x[:, columns // 2] *= 40
    return x + np.float32(0.2)


@pytest.mark.parametrize("spec", SPECS)
def test_formulas(spec):
    x = sample(7, 50)
    q = ql.quantize_activations(x, spec)
    rounded = ql.round_activations(x, spec)
    assert np.array_equal(rounded, numpy_round(x, spec))
    assert np.array_equal(q.dequantize().view(np.uint32), rounded.view(np.uint32))
    assert q.codes.dtype == np.int8 and q.codes.shape == x.shape
    half = 2 ** (q.format.bits - 1)
    assert q.codes.min() >= -half and q.codes.max() <= half - 1


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS + OUTLIERS),
    st.integers(0, 5),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, np.float16]),
)
def test_rounding_is_the_integers_bit_for_bit(spec, rows, columns, seed, dtype):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, columns)) * np.exp2(rng.integers(-12, 9, (rows, 1)))).astype(dtype)
    q = ql.quantize_activations(x, spec)
    rounded = ql.round_activations(x, spec)
    assert rounded.dtype == x.dtype and rounded.shape == x.shape
    assert q.dequantize().tobytes() == rounded.tobytes()


def test_kinds_and_shapes():
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    q = ql.quantize_activations(x, "int8:g8")
    assert q.codes.shape == (2, 3, 24) and q.codes.dtype == torch.int8
    assert tuple(q.planes["scales"].shape) == (6, 3)
    y = ql.round_activations(x, "int8:g8")
    assert y.dtype == torch.bfloat16 and torch.equal(y, q.dequantize())
    assert torch.equal(q.dequantize("float32").to(torch.bfloat16), y)
    assert ql.round_activations(x[0, 0], "int8:token").shape == (24,)


def test_formats():
    f = ql.parse_activations("int8:tensor:static=0.02")
    assert f == ql.ActivationFormat(scope="tensor", static=True, scale=0.02)
    assert ql.activations_from_json(f.to_json()) == f and pickle.loads(pickle.dumps(f)) == f
    assert str(f) == f.spec == "int8:tensor:static=0.02" and f.calibrated
    open_one = ql.parse_activations("int4:tensor:asym:static")
    assert not open_one.calibrated
    fixed = open_one.with_range(-1.0, 2.0)
    assert fixed.calibrated and fixed.scale == pytest.approx(0.2) and fixed.zero_point == -3
    x = np.array([[-1.0, 2.0, 0.5]], np.float32)
    assert np.array_equal(ql.round_activations(x, fixed), ql.round_activations(x, "int4:tensor:asym"))
    assert json.loads(f.to_json())["scale"] == np.float32(0.02)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": True}, "bits"),
        ({"scope": "row"}, "scope"),
        ({"outlier_threshold": -6.0}, "outlier_threshold"),
        ({"static_outliers": True}, "outlier_threshold"),
        ({"outlier_percent": 1}, "static_outliers"),
        ({"outlier_percent": 100, "static_outliers": True}, "outlier_percent"),
        ({"outlier_percent": "1%", "static_outliers": True}, "outlier_percent"),
        ({"outlier_percent": 1, "outlier_threshold": 6, "static_outliers": True}, "outlier_percent"),
        ({"outlier_threshold": 6, "outlier_columns": (1, 2)}, "outlier_columns"),
        ({"outlier_threshold": 6, "static_outliers": True, "outlier_columns": (2, 1)}, "outlier_columns"),
        ({"bits": 4, "base_bits": 8, "group_size": 4, "outlier_threshold": 6}, "outlier_threshold"),
        ({"scope": "group"}, "group_size"),
        ({"group_size": 4}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"static": True}, "static"),
        ({"symmetric": 1}, "symmetric"),
        ({"scope": "tensor", "static": True, "scale": -1.0}, "scale"),
        ({"scope": "tensor", "static": True, "scale": float("nan")}, "scale"),
        ({"scale": 1.0}, "scale"),
        ({"scope": "tensor", "static": True, "zero_point": 3}, "zero_point"),
        ({"scope": "tensor", "static": True, "scale": 1.0, "zero_point": 3}, "zero_point"),
        ({"bits": 8, "base_bits": 8, "group_size": 4}, "base_bits"),
    ],
)
def test_bad_fields_are_named(settings, name):
    with pytest.raises((TypeError, ValueError), match=name):
        ql.ActivationFormat(**settings)


@pytest.mark.parametrize("factor", [20, 100])
def test_outlier_columns(factor):
    """LLM.int8(): planted channels keep their precision and leave the scales of others alone."""
    rng = np.random.default_rng(factor)
    w = rng.standard_normal((48, 192)).astype(np.float32)
    x = np.clip(rng.standard_normal((30, 192)), -4, 4).astype(np.float32)
    x[:, [3, 17, 90]] *= factor
    q = ql.quantize(w, "uniform:8:channel")
    dynamic, static = "int8:token:outliers=6", "int8:token:outliers=6:columns=3,17,90"
    seen = ql.quantize_activations(x, dynamic)
    assert seen.planes["outlier_columns"].tolist() == [3, 17, 90]
    assert np.array_equal(seen.planes["outlier_values"], x[:, [3, 17, 90]])
    assert not seen.codes[:, [3, 17, 90]].any()
    rounded = ql.round_activations(x, dynamic)
    others = np.ascontiguousarray(np.delete(x, [3, 17, 90], 1))
    assert np.array_equal(np.delete(rounded, [3, 17, 90], 1), ql.round_activations(others, "int8:token"))
    assert np.array_equal(rounded[:, [3, 17, 90]], x[:, [3, 17, 90]])
    exact = x.astype(np.float64) @ w.T.astype(np.float64)

    def error(activations):
        return np.square(ql.matmul(x, q, activations=activations) - exact).sum()

    assert error(dynamic) < 0.2 * error("int8:token")
    assert np.array_equal(ql.matmul(x, q, activations=static), ql.matmul(x, q, activations=dynamic))
    # With static outliers a token's result does not change with its batch mates; dynamic ones do.
    for t in range(len(x)):
        alone = ql.matmul(x[t : t + 1], q, activations=static)
        assert np.array_equal(alone[0], ql.matmul(x, q, activations=static)[t])
    form = ql.parse_activations("int8:token:outliers=6:static-outliers")
    assert form.outliers_of([7, 5.9, 6, 0]).outlier_columns == (0, 2)
    share = ql.parse_activations("int8:token:outliers=34%")  # of four: two, of equal ones the first
    assert share.static_outliers and not share.calibrated and share.outlier_percent == 34
    assert share.outliers_of([1, 5, 2, 2]).spec == "int8:token:outliers=34%:columns=1,2"
    assert share.outliers_of([]).outlier_columns == ()
    with pytest.raises(ValueError, match="magnitudes"):
        share.outliers_of([1, float("nan")])
    assert ql.ActivationFormat(outlier_percent=34, static_outliers=True) == share
    assert not form.calibrated and form.with_columns([90, 3, 17]) == ql.parse_activations(static)
    assert ql.activations_from_json(form.to_json()) == form
    with pytest.raises(ValueError, match="their columns"):
        ql.round_activations(x, form)
    with pytest.raises(ValueError, match="last outlier column"):
        ql.round_activations(x[:, :50], static)


def test_columns_in_float16():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((40, 96)).astype(np.float32)
    w[:, [5, 60]] /= 64  # what codes of whole rows cannot resolve
    x = rng.standard_normal((9, 96)).astype(np.float32)
    x[:, [5, 60]] *= 64
    for spec, transform in (
        ("uniform:8:channel", None),
        ("codebook:nf4:g32", None),
        ("sdr:4:g16", "hadamard:b32"),
    ):
        q = ql.quantize(w, spec, transform=transform)
        kept = ql.keep_columns(q, w, [60, 5])
        assert isinstance(kept.format, ql.Outliers) and kept.report.outliers == 80
        assert kept.size_in_bits == q.size_in_bits + 80 * 32 + 41 * 32
        own = w if transform is None else q.transform.rotate_weight(w)
        basis = ql.PackedTensor(kept.format, kept.shape, kept.planes).dequantize()
        assert np.allclose(basis[:, [5, 60]], own[:, [5, 60]], rtol=2e-3, atol=1e-5)
        assert np.array_equal(
            np.delete(basis, [5, 60], 1),
            np.delete(ql.PackedTensor(q.format, q.shape, q.planes).dequantize(), [5, 60], 1),
        )
        assert ql.keep_columns(q, w, []) is q
    q = ql.quantize(w, "uniform:8:channel")
    static = "int8:token:outliers=6:columns=5,60"
    exact = x.astype(np.float64) @ w.T.astype(np.float64)

    def error(q):
        return np.square(ql.matmul(x, q, activations=static) - exact).sum()

    assert error(ql.keep_columns(q, w, [5, 60])) < 0.1 * error(q)
    with pytest.raises(ValueError, match="without outliers"):
        ql.keep_columns(ql.keep_columns(q, w, [5]), w, [6])


def test_bad_input_is_named():
    x = sample(3, 8)
    with pytest.raises(ValueError, match="activations: got int9:token"):
        ql.round_activations(x, "int9:token")
    with pytest.raises(ValueError, match="its scale"):
        ql.round_activations(x, "int8:tensor:static")
    x[1, 5] = np.inf
    with pytest.raises(ValueError, match="token 1, input 5"):
        ql.quantize_activations(x, "int8:token")
    with pytest.raises(TypeError, match="x: got float64"):
        ql.round_activations(np.zeros((2, 2)), "int8:token")
    with pytest.raises(ValueError, match=r"x: got shape \[\]"):
        ql.round_activations(np.ones((), np.float32), "int8:token")
    q = ql.quantize_activations(sample(3, 8), "int8:token")
    broken = ql.QuantizedActivations(
        q.format, q.shape, q.dtype, dict(q.planes) | {"scales": np.ones((2, 1), np.float32)}
    )
    with pytest.raises(ValueError, match="plane scales"):
        broken.dequantize()


@pytest.mark.parametrize("weights", ["uniform:8:channel", "uniform:4:g32:asym", "codebook:nf4:g32"])
@pytest.mark.parametrize("spec", SPECS + OUTLIERS)
def test_products(weights, spec):
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(40, 64)).astype(np.float32), sample(5, 64)
    q = ql.quantize(w, weights)
    y = ql.matmul(x, q, activations=spec)
    expected = ql.round_activations(x, spec).astype(np.float64) @ q.dequantize().astype(np.float64).T
    assert np.abs(y - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.array_equal(y, ql.matmul(x, q, activations=ql.parse_activations(spec), threads=3))
    assert ql.can_matmul(q, activations=spec)


def test_products_of_transformed_weights_round_in_their_basis():
    w, x = sample(16, 64, 3), sample(4, 64)
    q = ql.quantize(w, "uniform:8:channel", transform="hadamard:b64")
    rotated = q.transform.rotate_input(x)
    decoded = q.transform.rotate_weight(q.dequantize())  # in the basis of rotated inputs
    expected = ql.round_activations(rotated, "int8:token") @ decoded.T
    assert np.allclose(ql.matmul(x, q, activations="int8:token"), expected, rtol=1e-3, atol=2e-2)


def test_products_say_what_they_cannot_take():
    q = ql.quantize(sample(4, 16), "uniform:4:g16")
    x = sample(2, 16)
    with pytest.raises(TypeError, match="activations: got int"):
        ql.matmul(x, q, activations=8)
    with pytest.raises(ValueError, match="activations: got 'int4', expected 'exact'"):
        ql.matmul(x, q, activations="int4")
    with pytest.raises(ValueError, match="its scale"):
        ql.matmul(x, q, activations="int8:tensor:static")
    assert "not known" in ql.can_matmul(q, activations="int8:tensor:static").reason


class TestModules:
    def test_equals_rounding_and_products(self):
        linear = torch.nn.Linear(64, 24)
        x = torch.randn(3, 5, 64)
        module = ql.nn.QuantLinear.from_linear(linear, "uniform:8:channel", activations="int8:token")
        assert module.activations == ql.ActivationFormat() and "activations=int8:token" in repr(module)
        expected = torch.nn.functional.linear(
            ql.round_activations(x, "int8:token"), module.dequantize(), linear.bias
        )
        assert torch.allclose(module(x), expected, rtol=1e-4, atol=1e-5)
        decoded = torch.nn.Linear(64, 24)
        decoded.weight, decoded.bias = torch.nn.Parameter(module.dequantize()), linear.bias
        rounded = ql.nn.RoundedLinear(decoded, "int8:token")
        assert torch.allclose(rounded(x), module(x), rtol=1e-4, atol=1e-5)
        assert "activations=int8:token" in repr(rounded)

    def test_state_tells_the_activations(self):
        linear = torch.nn.Linear(32, 8)
        make = ql.nn.QuantLinear.from_linear
        module = make(linear, "uniform:8:channel", activations="int8:tensor:static=0.05")
        state = module.state_dict()
        make(linear, "uniform:8:channel", activations="int8:tensor:static=0.05").load_state_dict(state)
        for other in ("int8:token", "int8:tensor:static=0.06", "exact"):
            with pytest.raises(RuntimeError, match="description"):
                make(linear, "uniform:8:channel", activations=other).load_state_dict(state)
        # Without a format the description is what it was before there were any.
        plain = make(linear, "uniform:8:channel").state_dict()["_extra_state"]
        assert b"activations" not in bytes(plain.tolist())

    def test_gradients_pass_the_rounding(self):
        module = ql.nn.QuantLinear.from_linear(
            torch.nn.Linear(32, 8), "uniform:8:channel", activations="int4:g16"
        )
        x = torch.randn(4, 32, requires_grad=True)
        module(x).sum().backward()
        assert torch.allclose(x.grad, module.dequantize().sum(0).expand(4, -1), rtol=1e-4, atol=1e-5)
        y = x.detach().clone().requires_grad_()
        torch.ops.quantloom.round_activations(y, "int4:g16").sum().backward()
        assert torch.equal(y.grad, torch.ones_like(y))

    def test_compiles(self):
        module = ql.nn.QuantLinear.from_linear(
            torch.nn.Linear(32, 8), "uniform:4:g16", activations="int8:token"
        )
        x = torch.randn(4, 32)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), module(x))

    def test_needs_its_scale(self):
        with pytest.raises(ValueError, match="its scale"):
            ql.nn.QuantLinear.from_linear(
                torch.nn.Linear(8, 8), "uniform:8:channel", activations="int8:tensor:static"
            )
        with pytest.raises(TypeError, match="linear"):
            ql.nn.RoundedLinear(torch.nn.ReLU(), "int8:token")
