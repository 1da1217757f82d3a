"""Products with trellis codes on a CUDA device, by each of their kernels."""

from __future__ import annotations

import pytest
import quantloom as ql
import torch
from cuda_cases import HALVES, assert_product, needs_cuda
from quantloom.nn import QuantLinear


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(6)
        yield


@needs_cuda
@pytest.mark.parametrize(
    "kernel",
    ["trellis_stream", "trellis_exact", "trellis_panels", "trellis_tiles", "trellis_dense", "decode", None],
)
@pytest.mark.parametrize("spec", ["trellis:2", "trellis:3:3inst", "trellis:4:mcg:plain", "trellis:2:octagon"])
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_agree(kernel, spec, dtype):
    q = ql.quantize(torch.randn(300, 500), spec).to("cuda")
    bias = torch.randn(300, device="cuda", dtype=dtype)
    for tokens in (1, 3, 4, 20):
        x = torch.randn(tokens, 500, device="cuda", dtype=dtype)
        possible, reason = ql.can_matmul(q, tokens, dtype, kernel=kernel)
        if not possible:
            with pytest.raises(RuntimeError, match="kernel"):
                ql.matmul(x, q, kernel=kernel)
            assert kernel in reason
            continue
        assert_product(ql.matmul(x, q, bias=bias, kernel=kernel), x, q, bias)


@needs_cuda
def test_layers_multiply_and_differentiate():
    layer = QuantLinear(ql.quantize(torch.randn(130, 260), "trellis:2"), torch.randn(130)).to("cuda").half()
    x = torch.randn(2, 260, device="cuda", dtype=torch.float16, requires_grad=True)
    y = layer(x)
    assert_product(y, x, layer.packed, layer.bias)
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@needs_cuda
def test_names_of_kernels_are_checked():
    q = ql.quantize(torch.randn(16, 128), "trellis:2").to("cuda")
    with pytest.raises((ValueError, RuntimeError), match="kernel"):
        ql.matmul(torch.randn(1, 128, device="cuda", dtype=torch.float16), q, kernel="no such kernel")


def test_there_is_no_choice_of_kernels_on_the_cpu():
    q = ql.quantize(torch.randn(4, 64), "uniform:4:g32")
    with pytest.raises(RuntimeError, match="kernel: got 'decode'"):
        ql.matmul(torch.randn(1, 64), q, kernel="decode")
    with pytest.raises(TypeError, match="kernel"):
        ql.matmul(torch.randn(1, 64), q, kernel=3)
    assert not ql.can_matmul(q, kernel="decode")
