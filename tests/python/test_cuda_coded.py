"""Entropy-coded weights and their products on a CUDA device."""

import pickle

import pytest
import quantloom as ql
import torch
from quantloom import _core
from quantloom import formats as Q

pytestmark = pytest.mark.skipif(
    not (_core.built_with_cuda() and torch.cuda.is_available()), reason="no CUDA device or no kernels"
)


def encoded(n: int, k: int, block: tuple, step: float, dtype: torch.dtype) -> Q.Encoded:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)
    element = Q.CompressedLUTFormat.train_grid(w.float() * 1.1, step)
    return Q.LinearScalingFormat(element, Q.FP32, block, "rms").encode(w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 16, 32, 65])
@pytest.mark.parametrize(
    ("n", "k", "block"),
    [(64, 512, (None, None)), (17, 131, (1, None)), (48, 256, (1, 64)), (30, 60, (2, 12))],
)
def test_products(n, k, block, tokens, dtype):
    source = encoded(n, k, block, 0.5, dtype)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype).cuda()
    w = ql.code(source, "cuda")
    expected = x.double() @ w.dequantize().double().T
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for q in (w, source):
        y = ql.matmul(x, q)
        assert y.dtype == dtype and y.device == x.device
        assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()
        y = ql.matmul(x, q, bias=bias)
        assert (y.double() - expected - bias.double()).abs().max() <= 2 * tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_those_of_the_cpu(dtype):
    for shape in ((1, 1), (33, 100), (16, 512)):
        w = ql.code(encoded(*shape, (None, None), 0.4, torch.float32))
        on_cpu = torch.from_numpy(w.dequantize())
        assert torch.equal(w.to("cuda").dequantize(dtype).cpu(), on_cpu.to(dtype))


def test_packed_tensors():
    w = torch.randn(40, 256).half().cuda()
    for spec in ("uniform:4:g64", "uniform:2:channel", "codebook:nf4:g32"):
        q = ql.quantize(w, spec)
        coded = ql.code(q)
        assert coded.device == "cuda:0"
        assert torch.equal(coded.dequantize(torch.float32), q.dequantize(torch.float32))
        x = torch.randn(3, 256).half().cuda()
        difference = ql.matmul(x, coded).float() - ql.matmul(x, q).float()
        assert difference.abs().max() < 0.05
        assert pickle.loads(pickle.dumps(coded)).device == "cuda:0"
        assert coded.to("cpu").device == "cpu"


def test_repeats_itself_and_can_be_captured():
    w = ql.code(encoded(256, 1024, (1, 128), 0.5, torch.float32), "cuda", splits=8)
    x = torch.randn(4, 1024).half().cuda()
    first = ql.matmul(x, w)
    for _ in range(3):
        assert torch.equal(ql.matmul(x, w), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ql.matmul(x, w)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, first)


def test_refuses():
    w = ql.code(encoded(16, 64, (None, None), 0.5, torch.float32), "cuda")
    with pytest.raises(TypeError, match="x: got an array on cpu"):
        ql.matmul(torch.ones(1, 64), w)
    with pytest.raises(ValueError, match="x: got shape"):
        ql.matmul(torch.ones(1, 63).cuda(), w)
