"""Hadamard transforms and rotated weights on a CUDA device, against the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda

pytestmark = needs_cuda

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.cpu(), expected.cpu(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 128, 512, 1024, 4096, 5120, 14336, 32768, 13824, 29568])
def test_equals_the_cpu(block, dtype):
    for per_row, rows in ((1, 5), (2, 3)):
        x = torch.randn(rows, per_row * block, dtype=dtype)
        there = x.cuda()
        for inverse in (False, True):
            expected = ql.hadamard(x, block, seed=3, scale=0.5, inverse=inverse)
            assert_close(ql.hadamard(there, block, seed=3, scale=0.5, inverse=inverse), expected)
            channels = torch.rand(per_row * block)
            expected = ql.hadamard(x, block, scale=channels, inverse=inverse)
            assert_close(ql.hadamard(there, block, scale=channels, inverse=inverse), expected)
        out = there.clone()
        assert ql.hadamard(out, block, out=out) is out
        assert torch.equal(out, ql.hadamard(there, block))


def test_takes_shapes_strides_and_streams():
    x = torch.randn(2, 3, 4, 192, device="cuda", dtype=torch.float16)
    expected = ql.hadamard(x.reshape(-1, 192)).view(x.shape)
    assert torch.equal(ql.hadamard(x), expected)
    wide = torch.randn(6, 200, device="cuda", dtype=torch.float16)
    assert torch.equal(ql.hadamard(wide[:, 3:195]), ql.hadamard(wide[:, 3:195].contiguous()))
    turned = x[0, 0].t().contiguous().t()
    assert torch.equal(ql.hadamard(turned), expected[0, 0])
    assert ql.hadamard(x[:0]).shape == x[:0].shape
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = ql.hadamard(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(there, expected)


def test_can_be_captured_compiled_and_differentiated():
    signs = torch.from_numpy(np.packbits(ql.hadamard_signs(5120, 1) < 0, bitorder="little")).cuda()

    def transform(v):
        return torch.ops.quantloom.hadamard(v, 0, signs, 1.0, None, False)

    x = torch.randn(7, 5120, device="cuda", dtype=torch.float16)
    ql.hadamard(x)  # registers the operator
    expected = transform(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = transform(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(torch.compile(transform, fullgraph=True)(x), expected)
    x = torch.randn(3, 5120, device="cuda", requires_grad=True)
    weight = torch.randn(3, 5120, device="cuda")
    (transform(x) * weight).sum().backward()
    assert_close(x.grad, ql.hadamard(weight.cpu(), seed=1, inverse=True))


def test_refuses_by_name():
    for n, text in (
        (8, "at least 16"),
        (65536, "at most 32768"),
        (116, "is 4"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=text):
            ql.hadamard(torch.zeros(2, n, device="cuda"))
    x = torch.zeros(2, 64, device="cuda")
    with pytest.raises(TypeError, match="out"):
        ql.hadamard(x, out=torch.zeros(2, 64))
    with pytest.raises(ValueError, match="overlaps"):
        buffer = torch.zeros(200, device="cuda")
        ql.hadamard(buffer[:128].view(2, 64), out=buffer[4:132].view(2, 64))


@pytest.mark.parametrize(
    "t", ["hadamard", "hadamard:b32:seed=2", "hadamard:both", "hadamard:b16:out:no-signs"]
)
def test_modules_rotate_as_on_the_cpu(t):
    linear = torch.nn.Linear(192, 320)
    module = ql.nn.QuantLinear.from_linear(linear, "uniform:4:g64", transform=t)
    there = copy.deepcopy(module).to("cuda", torch.float16)
    x = torch.randn(5, 192)
    torch.testing.assert_close(there(x.cuda().half()).cpu().float(), module(x), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(there.dequantize().cpu(), module.dequantize(), atol=1e-5, rtol=1e-5)
    assert there.packed.transform == module.transform
    torch.testing.assert_close(
        ql.matmul(x.cuda().half(), module.packed.to("cuda")).cpu().float(),
        ql.matmul(x, module.packed),
        atol=2e-2,
        rtol=2e-2,
    )
    back = there.cpu().float()
    assert torch.equal(back.packed.dequantize(), module.packed.dequantize())
    torch.testing.assert_close(back(x), module(x), atol=1e-2, rtol=1e-2)
    graph = torch.cuda.CUDAGraph()
    there = there.to("cuda", torch.float16)
    y = x.cuda().half()
    expected = there(y)
    with torch.cuda.graph(graph):
        out = there(y)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_quantizes_rotated_on_the_device(rounding):
    w, x = torch.randn(64, 192), torch.randn(500, 192)
    hessian = ql.Hessian(192)
    hessian.add(x)
    chosen = ql.Nearest() if rounding == "nearest" else ql.GPTQ(hessian)
    there = ql.Nearest() if rounding == "nearest" else ql.GPTQ(hessian.to("cuda"))
    expected = ql.quantize(w, "uniform:4:g32", chosen, transform="hadamard:both")
    got = ql.quantize(w.cuda(), "uniform:4:g32", there, transform="hadamard:both")
    assert got.device == "cuda:0"
    assert got.transform == expected.transform
    ratio = ql.proxy_loss(w, got.to("cpu"), hessian) / ql.proxy_loss(w, expected, hessian)
    assert 0.97 < ratio < 1.03
