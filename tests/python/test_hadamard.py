"""The Hadamard transform on NumPy arrays and torch tensors."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom.transforms import hadamard_in_numpy


def dense(x, block, signs=None, inverse=False):
    """The transform as a product with a dense matrix, in float64."""
    h = ql.hadamard_matrix(block).astype(np.float64) / np.sqrt(block)
    x = np.asarray(x, np.float64)
    signs = np.ones(x.shape[-1]) if signs is None else np.asarray(signs, np.float64)
    rows = (x if inverse else x * signs).reshape(-1, block)
    y = (rows @ (h if inverse else h.T)).reshape(x.shape)
    return y * signs if inverse else y


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 64, 172, 208, 256])
def test_equals_the_dense_product(rng, n):
    for shape, block in (((3, n), None), ((2, 3, 2 * n), n), ((0, n), "row"), ((2 * n,), n)):
        x = rng.standard_normal(shape).astype(np.float32)
        size = n if isinstance(block, int) else shape[-1]
        signs = ql.hadamard_signs(shape[-1], 5)
        for inverse in (False, True):
            y = ql.hadamard(x, block, seed=5, inverse=inverse)
            assert y.dtype == x.dtype
            assert y.shape == x.shape
            np.testing.assert_allclose(y, dense(x, size, signs, inverse), atol=5e-6)
            for given in (signs, signs.astype(np.float32), np.packbits(signs < 0, bitorder="little")):
                np.testing.assert_array_equal(ql.hadamard(x, block, signs=given, inverse=inverse), y)
            np.testing.assert_array_equal(
                ql.hadamard(torch.from_numpy(x), block, seed=5, inverse=inverse).numpy(), y
            )


def test_the_numpy_form_agrees_in_float64(rng):
    for n in (12, 40, 128, 344):
        x = rng.standard_normal((3, 2 * n))
        bits = np.packbits(ql.hadamard_signs(2 * n, 9) < 0, bitorder="little")
        expected = dense(x, n, ql.hadamard_signs(2 * n, 9))
        np.testing.assert_allclose(hadamard_in_numpy(x, n, bits), expected, atol=1e-12)
        np.testing.assert_allclose(hadamard_in_numpy(torch.from_numpy(x), n, bits), expected, atol=1e-12)


def test_half_precision_is_rounded_once(rng):
    x = rng.standard_normal((4, 512)).astype(np.float16)
    y = ql.hadamard(x)
    assert y.dtype == np.float16
    expected = ql.hadamard(x.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(y, expected)
    t = torch.from_numpy(x).bfloat16()
    assert torch.equal(ql.hadamard(t), ql.hadamard(t.float()).bfloat16())


def test_scales_multiply_the_result(rng):
    x = rng.standard_normal((4, 24)).astype(np.float32)
    channels = rng.standard_normal(24).astype(np.float32)
    y = ql.hadamard(x, seed=1)
    np.testing.assert_allclose(ql.hadamard(x, seed=1, scale=0.5), 0.5 * y, rtol=1e-6)
    np.testing.assert_allclose(ql.hadamard(x, seed=1, scale=channels), y * channels, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        ql.hadamard(x, seed=1, scale=channels, inverse=True),
        ql.hadamard(x, seed=1, inverse=True) * channels,
        rtol=1e-5,
        atol=1e-6,
    )


def test_writes_in_place_and_to_strided_rows(rng):
    x = rng.standard_normal((6, 32)).astype(np.float32)
    expected = ql.hadamard(x)
    y = x.copy()
    assert ql.hadamard(y, out=y) is y
    np.testing.assert_array_equal(y, expected)
    wide = np.zeros((6, 40), np.float32)
    ql.hadamard(x, out=wide[:, 4:36])
    np.testing.assert_array_equal(wide[:, 4:36], expected)
    assert not wide[:, :4].any()
    assert not wide[:, 36:].any()
    t = torch.from_numpy(x.copy())
    ql.hadamard(t, out=t)
    np.testing.assert_array_equal(t.numpy(), expected)
    np.testing.assert_array_equal(ql.hadamard(np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(ql.hadamard(x[::-1]), expected[::-1])
    np.testing.assert_array_equal(ql.hadamard(torch.from_numpy(x).t().contiguous().t()).numpy(), expected)


def test_refuses_by_name(rng):
    x = np.zeros((2, 24), np.float32)
    for arguments, error, text in [
        ({"block": 5}, ValueError, "block: got 5, expected a divisor of the 24 columns"),
        ({"block": 6}, ValueError, "largest that works is 24"),
        ({"block": 0}, ValueError, "block"),
        ({"block": "column"}, TypeError, "block"),
        ({"signs": np.ones(23)}, ValueError, r"signs: got shape \[23\]"),
        ({"signs": np.zeros(24, np.float32)}, ValueError, "other values"),
        ({"signs": np.ones(24, np.float32), "seed": 1}, ValueError, "seed"),
        ({"seed": -1}, ValueError, "seed"),
        ({"scale": np.ones(3, np.float32)}, ValueError, r"scale: got shape \[3\]"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"inverse": 1}, TypeError, "inverse"),
        ({"out": np.zeros((2, 23), np.float32)}, ValueError, "out: got shape"),
        ({"out": np.zeros((2, 24), np.float16)}, TypeError, "out: got dtype"),
        ({"out": torch.zeros(2, 24)}, TypeError, "out: got kind"),
        ({"out": np.zeros((4, 24), np.float32)[::2][:, ::-1]}, ValueError, "out"),
        ({"threads": -1}, ValueError, "threads"),
    ]:
        with pytest.raises(error, match=text):
            ql.hadamard(x, **arguments)
    buffer = np.zeros(100, np.float32)
    with pytest.raises(ValueError, match="overlaps"):
        ql.hadamard(buffer[:48].reshape(2, 24), out=buffer[4:52].reshape(2, 24))
    with pytest.raises(ValueError, match="whole rows of 116"):
        ql.hadamard(np.zeros((2, 116), np.float32))
    with pytest.raises(TypeError, match="float64"):
        ql.hadamard(np.zeros((2, 8)))
    assert ql.largest_hadamard_block(116) == 4
    assert ql.largest_hadamard_block(29568) == 29568


def test_the_operator_traces_and_has_a_gradient(rng):
    signs = torch.from_numpy(np.packbits(ql.hadamard_signs(24, 3) < 0, bitorder="little"))
    channels = torch.from_numpy(rng.standard_normal(24).astype(np.float32))
    ql.hadamard(torch.zeros(8))  # registers the operator
    for inverse in (False, True):
        x = torch.from_numpy(rng.standard_normal((3, 24)).astype(np.float32)).requires_grad_()
        torch.library.opcheck(torch.ops.quantloom.hadamard, (x, 12, signs, 0.5, channels, inverse))
        y = torch.ops.quantloom.hadamard(x, 12, signs, 0.5, channels, inverse)
        matrix = torch.autograd.functional.jacobian(
            lambda v, i=inverse: torch.ops.quantloom.hadamard(v, 12, signs, 0.5, channels, i), x[0]
        )
        torch.testing.assert_close(y[0], matrix @ x[0], atol=1e-5, rtol=1e-5)
        rows = torch.ops.quantloom.hadamard(torch.eye(24), 12, signs, 0.5, channels, inverse)
        torch.testing.assert_close(matrix, rows.T, atol=1e-6, rtol=1e-5)
    x = torch.randn(2, 24)
    compiled = torch.compile(
        lambda v: torch.ops.quantloom.hadamard(v * 2, 0, signs, 1.0, None, False),
        fullgraph=True,
        backend="eager",
    )
    torch.testing.assert_close(compiled(x), ql.hadamard(x * 2, seed=3))
    with pytest.raises(ValueError, match="signs"):
        torch.ops.quantloom.hadamard(x, 0, torch.zeros(2, dtype=torch.uint8), 1.0, None, False)


def test_threads_do_not_change_the_result(rng):
    x = rng.standard_normal((37, 4 * 24)).astype(np.float32)
    expected = ql.hadamard(x, 24, seed=2, threads=1)
    for threads in (2, 4):
        np.testing.assert_array_equal(ql.hadamard(x, 24, seed=2, threads=threads), expected)
