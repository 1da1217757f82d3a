"""Products of additive formats (AQLM) on CUDA devices: looked up, with a table in parts, or decoded."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import quantloom as ql
from cuda_cases import HALVES, assert_product, needs_cuda, same_planes
from quantloom.nn import QuantLinear

pytestmark = needs_cuda

# With the kernel of one token.
SPECS = {
    "additive:2x8:g8": "lookups",
    "additive:1x8:g4": "lookups",
    "additive:1x8:g8:bf16": "lookups",
    "additive:1x16:g8": "additive_parts",
    "additive:1x14:g8:f32": "additive_parts",
    "additive:1x16:g16": "additive_parts",
    "additive:2x8:g8:scale64": "stream",
    "additive:2x8:g16": "decode",
    "additive:8x8:g8": "decode",
    "additive:1x8:g2x4:scale32": "decode",
}


def drawn(spec: str, n: int, k: int) -> ql.PackedTensor:
    """With random codes, tables and scales: nothing is fitted. On the CPU."""
    format = ql.parse_format(spec)
    planes = {}
    for plane in format.planes(n, k):
        shape, dtype = plane["shape"], getattr(torch, plane["dtype"])
        if plane["name"] == "codes":
            planes["codes"] = torch.zeros(shape, dtype=dtype)
        elif plane["name"] == "codebook":
            planes["codebook"] = torch.randn(shape).to(dtype)
        else:
            planes["scales"] = (0.01 + 0.01 * torch.rand(shape)).to(dtype)
    blocks = -(-k // format.in_group) * format.codebooks
    codes = torch.randint(0, 2**format.bits, (planes["codes"].shape[0], blocks))
    bits = (codes[..., None] >> torch.arange(format.bits)) & 1
    words = torch.zeros(codes.shape[0], planes["codes"].shape[1] * 32, dtype=torch.int64)
    words[:, : blocks * format.bits] = bits.reshape(codes.shape[0], -1)
    packed = (words.view(codes.shape[0], -1, 32) << torch.arange(32)).sum(-1)
    planes["codes"].copy_(packed.where(packed < 2**31, packed - 2**32))
    return ql.PackedTensor(format, (n, k), planes)


@pytest.mark.parametrize("spec", SPECS)
def test_products(spec):
    torch.manual_seed(1)
    for n, k in ((97, 264), (640, 1024), (33, 2051)):
        q = drawn(spec, n, k)
        prepared = ql.prepare(q.to("cuda"))
        assert same_planes(prepared.unprepare(), q)
        for dtype in (torch.float32, *HALVES):
            assert torch.equal(prepared.dequantize(dtype).cpu(), q.dequantize(dtype))
        for dtype in HALVES:
            for m in (1, 2, 3, 5, 8, 9, 17, 70):
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                bias = torch.randn(n, device="cuda", dtype=dtype)
                y = ql.matmul(x, prepared, bias=bias)
                assert_product(y, x, q, bias)
                assert torch.equal(ql.matmul(x, prepared, bias=bias), y)


@pytest.mark.parametrize("spec", SPECS)
def test_one_token_has_its_kernel(spec):
    for dtype in HALVES:
        assert ql.can_matmul(spec, 1, dtype, "cuda", "exact", SPECS[spec])


@pytest.mark.parametrize("spec", ["additive:2x8:g8", "additive:1x14:g8", "additive:1x8:g2x4"])
def test_layers_compile_and_run_in_graphs(spec):
    torch.manual_seed(2)
    q = drawn(spec, 96, 256)
    layer = QuantLinear(q, torch.randn(96)).to("cuda", torch.float16)
    x = torch.randn(1, 256, device="cuda", dtype=torch.float16)
    expected = layer(x)
    assert_product(expected, x, q, layer.bias)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn(1, 256, device="cuda", dtype=torch.float16))
    graph.replay()
    assert torch.equal(y, layer(x))
