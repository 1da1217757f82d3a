"""Rounding of activations on a CUDA device: the bytes of the CPU."""

from __future__ import annotations

import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda

pytestmark = needs_cuda

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SPECS = [
    "int8:token",
    "int8:token:asym",
    "int4:token",
    "int6:tensor",
    "int8:tensor:asym",
    "int8:tensor:static=0.05",
    "int4:tensor:asym:static=0.4,-3",
    "int4:g16:asym",
    "int8:g7",
    "int8:token:outliers=3",
    "int4:g16:asym:outliers=3",
    "int8:tensor:outliers=2:columns=0,5,90",
    "int8:token:outliers=2:columns=",
    "sdr4:g16:b8",
    "sdr4:g8:b16",
    "sdr4:g16:tensor:static=0.01",
]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(6)
        yield


def values(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 3] *= 20
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_equals_the_cpu(spec, dtype):
    for shape in ((2, 3, 128), (5, 133), (1, 4096)):
        x = values(*shape, dtype=dtype)
        expected = ql.quantize_activations(x, spec)
        found = ql.quantize_activations(x.cuda(), spec)
        assert (found.format, found.shape, found.dtype) == (expected.format, expected.shape, expected.dtype)
        assert sorted(found.planes) == sorted(expected.planes)
        for name, plane in expected.planes.items():
            assert found.planes[name].is_cuda
            assert found.planes[name].dtype == plane.dtype
            assert torch.equal(found.planes[name].cpu(), plane), name
        assert torch.equal(found.codes.cpu(), expected.codes)
        for name in (None, "float32", "bfloat16"):
            assert torch.equal(found.dequantize(name).cpu(), expected.dequantize(name)), name
        rounded = ql.round_activations(x.cuda(), spec)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.cpu(), ql.round_activations(x, spec))


def test_takes_shapes_strides_and_streams():
    x = values(6, 200).cuda()
    for part in (x[:, 3:195], x[::2], x[:, :8], x.reshape(2, 3, 200)[:, 1], x[:0], x[0]):
        assert torch.equal(
            ql.round_activations(part, "int8:token"), ql.round_activations(part.contiguous(), "int8:token")
        )
    turned = x.t().contiguous().t()
    with pytest.raises(ValueError, match="next to each other"):
        ql.round_activations(turned, "int8:token")
    assert torch.equal(
        torch.ops.quantloom.round_activations(turned, "int8:token"), ql.round_activations(x, "int8:token")
    )
    expected = ql.round_activations(x, "int4:g16")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = ql.round_activations(x, "int4:g16")
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(there, expected)


@pytest.mark.parametrize(
    "spec",
    [
        "int8:token",
        "int8:tensor:asym",
        "int8:token:outliers=3",
        "sdr4:g16",
        "int8:token:outliers=2:columns=3",
    ],
)
def test_can_be_captured_compiled_and_differentiated(spec):
    x = values(7, 256).cuda()

    def rounded(v):
        return torch.ops.quantloom.round_activations(v, spec)

    expected = ql.round_activations(x, spec)
    assert torch.equal(rounded(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rounded(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(torch.compile(rounded, fullgraph=True)(x), expected)
    v = x.float().requires_grad_()
    rounded(v).sum().backward()
    assert torch.equal(v.grad, torch.ones_like(v))


def test_module():
    linear = torch.nn.Linear(128, 24).half().cuda()
    module = ql.nn.RoundedLinear(linear, "int8:token")
    x = values(5, 128).cuda()
    assert torch.equal(module(x), linear(ql.round_activations(x, "int8:token")))


def test_what_shares_a_scale_with_nan_becomes_nan():
    x = values(4, 64).cuda()
    x[2, 5] = float("inf")
    assert ql.round_activations(x, "int8:token").isnan().any(1).tolist() == [False, False, True, False]
    assert ql.round_activations(x, "int8:tensor").isnan().all()
    planes = ql.quantize_activations(x, "int4:g16").planes
    assert planes["scales"].isnan().nonzero().tolist() == [[2, 0]]
    assert not planes["codes"][2, :16].any()


def test_refuses_what_it_cannot_take():
    x = values(4, 64).cuda()
    with pytest.raises(TypeError, match="float64"):
        ql.round_activations(x.double(), "int8:token")
    with pytest.raises(ValueError, match="calibration"):
        ql.round_activations(x, "int8:tensor:static")
    with pytest.raises(ValueError, match="outlier column"):
        ql.quantize_activations(x, "int8:token:outliers=3:columns=64")
    found = ql.quantize_activations(x, "int8:token")
    mixed = ql.QuantizedActivations(
        found.format, found.shape, found.dtype, {**found.planes, "scales": found.planes["scales"].cpu()}
    )
    with pytest.raises(TypeError, match="plane scales"):
        mixed.dequantize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_producers_equal_the_cpu(spec, dtype):
    x, up = values(6, 160, dtype=dtype), torch.randn(6, 160).to(dtype)
    both = torch.cat([x, up], 1).cuda()  # rows of neither are next to each other
    there, up_there = both[:, :160], both[:, 160:]
    for weight in (None, torch.rand(160), torch.rand(160).to(dtype)):
        w = None if weight is None else weight.cuda()
        pairs = [
            (ql.quantize_rms_norm(x, weight, spec), ql.quantize_rms_norm(there, w, spec)),
            (
                ql.quantize_rms_norm(x, weight, spec, add_one=True),
                ql.quantize_rms_norm(there, w, spec, add_one=True),
            ),
            (ql.quantize_layer_norm(x, weight, weight, spec), ql.quantize_layer_norm(there, w, w, spec)),
            (ql.quantize_silu_mul(x, up, spec), ql.quantize_silu_mul(there, up_there, spec)),
        ]
        for expected, found in pairs:
            for name, plane in expected.planes.items():
                assert torch.equal(found.planes[name].cpu(), plane), name
        rounded = [
            (pairs[0][1], ql.round_rms_norm(there, w, spec)),
            (pairs[2][1], ql.round_layer_norm(there, w, w, spec)),
            (pairs[3][1], ql.round_silu_mul(there, up_there, spec)),
        ]
        for found, out in rounded:
            assert torch.equal(found.dequantize(), out)


def test_producers_can_be_captured():
    x, w = values(6, 256).cuda(), torch.rand(256).cuda()
    expected = torch.ops.quantloom.round_rms_norm(x, w, 1e-6, False, "int8:token")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.quantloom.round_rms_norm(x, w, 1e-6, False, "int8:token")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
