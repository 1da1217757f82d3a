"""Products with trellises on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom as ql
import torch

FORMATS = [
    ql.Trellis(2, window=10),
    ql.Trellis(3.5, "mcg", None, 9),
    ql.Trellis(2, "octagon", window=10),
    ql.Trellis(2, "rptc2", window=8),
    ql.Trellis(4, "1mad", window=12),
]


def packed(rng, form, n=150, k=200):
    return ql.quantize((0.1 * rng.standard_normal((n, k))).astype(np.float32), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 3, 200), (0, 200), (70, 200)])
def test_products(rng, form, shape):
    q = packed(rng, form)
    assert ql.can_matmul(q)
    w = q.dequantize().astype(np.float64)
    x = rng.standard_normal(shape).astype(np.float32)
    y = ql.matmul(x, q)
    assert y.shape == (*shape[:-1], 150) and y.dtype == np.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.T, atol=2e-5)
    for threads in (1, 3):
        np.testing.assert_array_equal(ql.matmul(x, ql.prepare(q), threads=threads), y)
    for dtype in (torch.float16, torch.bfloat16):
        half = torch.from_numpy(x).to(dtype)
        product = ql.matmul(half, q)
        assert product.dtype == dtype
        expected = torch.from_numpy(ql.matmul(half.float().numpy(), q)).to(dtype)
        assert torch.equal(product, expected)


def test_outliers_besides(rng):
    q = packed(rng, ql.parse_format("outliers:1%:trellis:2:mul1:l10"))
    x = rng.standard_normal((4, 200)).astype(np.float32)
    np.testing.assert_allclose(ql.matmul(x, q), x.astype(np.float64) @ q.dequantize().T, atol=2e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_int8_activations(rng, form):
    q = packed(rng, form)
    x = rng.standard_normal((7, 200)).astype(np.float32)
    possible = ql.can_matmul(q, activations="int8")
    if form.codebook not in ("mul1", "1mad"):
        assert not possible and form.spec in possible.reason
        with pytest.raises(RuntimeError, match=rf"int8.*{form.spec}"):
            ql.matmul(x, q, activations="int8")
        return
    assert possible
    exact, rounded = ql.matmul(x, q), ql.matmul(x, q, activations="int8")
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 1e-2
    linear = ql.nn.QuantLinear(q.to("torch"), activations="int8")
    np.testing.assert_array_equal(linear(torch.from_numpy(x)).numpy(), rounded)
    x[3, 5] = np.nan
    with pytest.raises(ValueError, match="x: got nan"):
        ql.matmul(x, q, activations="int8")


@pytest.mark.parametrize("form", FORMATS[:3])
def test_modules(rng, form):
    q = packed(rng, form)
    linear = ql.nn.QuantLinear(q.to("torch"), torch.from_numpy(rng.standard_normal(150).astype(np.float32)))
    x = torch.from_numpy(rng.standard_normal((5, 200)).astype(np.float32))
    expected = x @ linear.dequantize().T + linear.bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=2e-5)
    again = ql.nn.QuantLinear(packed(np.random.default_rng(1), form).to("torch"), torch.zeros(150))
    again.load_state_dict(linear.state_dict())
    assert torch.equal(again(x), linear(x))
    compiled = torch.export.export(linear, (x,)).module()
    torch.testing.assert_close(compiled(x), linear(x))
