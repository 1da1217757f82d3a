"""Products from packed codes against products with the decoded matrix."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import quantloom as ql
import torch


def specs_with(activations: str) -> list[str]:
    """The examples of the formats that the CPU multiplies with such activations."""
    specs = [spec for entry in ql.format_table() for spec in entry["examples"]]
    return [spec for spec in specs if ql.can_matmul(spec, activations=activations)]


def product(x: np.ndarray, q: ql.PackedTensor) -> tuple[np.ndarray, np.ndarray]:
    """x W^T in float64, and the sum of absolute terms that rounding errors scale with."""
    w = q.dequantize().astype(np.float64)
    x = x.astype(np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


@pytest.mark.parametrize("spec", specs_with("exact"))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 33), (64, 128), (40, 300), (129, 257)])
@pytest.mark.parametrize("m", [0, 1, 2, 5, 17])
def test_exact_products(rng, spec, shape, m):
    n, k = shape
    q = ql.quantize(rng.standard_normal((n, k)).astype(np.float32), spec)
    x = rng.standard_normal((m, k)).astype(np.float32)
    y = ql.matmul(x, q)
    expected, scale = product(x, q)
    assert y.shape == (m, n)
    assert y.dtype == np.float32
    assert (np.abs(y - expected) <= 1e-6 * np.sqrt(k) * scale + 1e-30).all()
    np.testing.assert_array_equal(ql.matmul(x, ql.prepare(q)), y)


# Trellises round inputs in another basis: test_trellis_products.py.
@pytest.mark.parametrize("spec", [spec for spec in specs_with("int8") if "trellis" not in spec])
@pytest.mark.parametrize("shape", [(3, 7), (64, 128), (40, 300), (129, 1000)])
def test_products_of_int8_activations(rng, spec, shape):
    n, k = shape
    q = ql.quantize(rng.standard_normal((n, k)).astype(np.float32), spec)
    x = rng.standard_normal((4, k)).astype(np.float32)
    y = ql.matmul(x, q, activations="int8")
    expected, _ = product(x, q)
    # Every input moves by at most half a step of its block's grid, largest / 127.
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    bound = 0.51 * step * np.abs(q.dequantize()).sum(axis=1) + 1e-4
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_empty_matrices(n, k, activations):
    q = ql.quantize(np.ones((n, k), np.float32), "uniform:4:g32:asym")
    y = ql.matmul(np.ones((2, k), np.float32), q, activations)
    np.testing.assert_allclose(y, np.full((2, n), float(k)), rtol=0.01)


@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3, 4)])
def test_leading_dimensions_and_dtypes_are_kept(rng, lead):
    q = ql.quantize(rng.standard_normal((10, 64)).astype(np.float32), "uniform:4:g32")
    x = rng.standard_normal((*lead, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        y = ql.matmul(x.astype(dtype), q)
        assert y.dtype == dtype
        assert y.shape == (*lead, 10)
        np.testing.assert_allclose(
            y.astype(np.float64), expected, atol=0.3 if dtype == ml_dtypes.bfloat16 else 0.05
        )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.tensor(x).to(dtype)
        y = ql.matmul(tensor, q)  # NumPy planes, torch activations
        assert y.dtype == dtype
        assert y.shape == (*lead, 10)
        exact = ql.matmul(tensor.float(), q)
        assert torch.equal(y, exact.to(dtype))  # rounded once
    if lead:
        strided = np.repeat(x, 2, axis=0)[::2]
        np.testing.assert_array_equal(ql.matmul(strided, q), ql.matmul(x, q))


def test_each_row_is_independent_of_the_others(rng):
    q = ql.quantize(rng.standard_normal((33, 200)).astype(np.float32), "uniform:4:g64:asym")
    x = rng.standard_normal((5, 200)).astype(np.float32)
    together = ql.matmul(x, q)
    again = ql.matmul(np.ascontiguousarray(x[::-1]), q)[::-1]
    np.testing.assert_array_equal(together, again)


def test_a_packed_tensor_is_prepared_once(rng):
    q = ql.quantize(rng.standard_normal((16, 64)).astype(np.float32), "uniform:4:g32")
    x = rng.standard_normal((2, 64)).astype(np.float32)
    assert q._prepared is None
    first = ql.matmul(x, q)
    prepared = q._prepared
    np.testing.assert_array_equal(ql.matmul(x, q), first)
    assert q._prepared is prepared
    assert prepared.shape == (16, 64)
    assert prepared.byte_count >= 16 * 64 // 2
    assert "16, 64" in repr(prepared)
    standing_alone = ql.prepare(q)
    del q
    np.testing.assert_array_equal(ql.matmul(x, standing_alone), first)


def test_not_a_number_stays_one_in_exact_products(rng):
    q = ql.quantize(rng.standard_normal((4, 40)).astype(np.float32), "uniform:4:g32")
    x = rng.standard_normal((3, 40)).astype(np.float32)
    x[1, 7] = np.nan
    y = ql.matmul(x, q)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_the_kernel_table_covers_the_formats():
    rows = ql.kernel_table()
    assert set(rows[0]) == {
        "operation", "format", "bits", "groups", "device", "activations", "tokens", "kernel", "target",
    }  # fmt: skip
    assert {row["format"] for row in rows if row["operation"] == "matmul"} >= {"uniform"}
    info = ql.build_info()
    assert set(info) == {"version", "cuda", "cuda_toolkit", "architectures", "compiler", "cpu_target"}
    assert info["version"] == ql.__version__
    assert bool(info["architectures"]) == info["cuda"] == bool(info["cuda_toolkit"])
