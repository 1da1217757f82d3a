"""Prepared tensors and products on a CUDA device."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import quantloom as ql
import torch
from cuda_cases import HALVES, SPECS, assert_product, needs_cuda, packed, permuted, runs, same_planes
from quantloom import _core, _cuda

pytestmark = needs_cuda

SHAPES = [(1, 1), (0, 5), (3, 0), (17, 33), (64, 64), (65, 129), (200, 1000), (256, 4096)]
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 1024]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


# -- order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prepares_as_the_reference_does(spec, shape):
    q = packed(spec, *shape)
    prepared = ql.prepare(q.to("cuda"))
    assert prepared.device == "cuda:0"
    assert prepared.shape == shape
    expected = _cuda.prepare(q)
    assert prepared.planes.keys() == expected.keys()
    for name, plane in expected.items():
        if name == "codes" or shape[0] * shape[1]:
            assert torch.equal(prepared.planes[name].cpu(), plane), name
    assert prepared.byte_count == sum(plane.nbytes for plane in prepared.planes.values())
    back = prepared.unprepare()
    assert back.device == "cuda:0"
    assert same_planes(back, q)
    for dtype in (torch.float32, *HALVES):
        decoded = prepared.dequantize(dtype)
        assert decoded.is_contiguous()
        assert torch.equal(decoded.cpu(), q.dequantize(dtype))


@pytest.mark.parametrize(
    "spec",
    ["uniform:4:g32", "uniform:3:g20:asym", "uniform:8:g64:bf16", "bcq:3:g32", "bcq:2:g40:offset"],
)
def test_prepares_permuted_columns(spec):
    q = permuted(spec, 70, 200)
    prepared = ql.prepare(q.to("cuda"))
    for name, plane in _cuda.prepare(q).items():
        assert torch.equal(prepared.planes[name].cpu(), plane), name
    assert same_planes(prepared.unprepare(), q)
    assert torch.equal(prepared.dequantize().cpu(), q.dequantize())
    x = torch.randn(3, 200, device="cuda", dtype=torch.float16)
    assert_product(ql.matmul(x, prepared), x, q)


@pytest.mark.parametrize("spec", ["spqr:3", "spqr:2:g24:s4:z6:b10", "uniform:4:g32:asym", "codebook:nf4:g20"])
def test_outliers_beside_permuted_columns(spec):
    q = permuted(spec, 70, 200, outliers=ql.OutlierSearch(percent=3))
    assert "outlier_values" in q.planes
    prepared = ql.prepare(q.to("cuda"))
    for name, plane in _cuda.prepare(q).items():
        assert torch.equal(prepared.planes[name].cpu(), plane), name
    assert same_planes(prepared.unprepare(), q)
    for dtype in (torch.float32, *HALVES):
        assert torch.equal(prepared.dequantize(dtype).cpu(), q.dequantize(dtype))
    for m in (1, 5, 20, 200):
        for dtype in HALVES:
            x = torch.randn(m, 200, device="cuda", dtype=dtype)
            y = ql.matmul(x, prepared)
            assert_product(y, x, q)
            assert torch.equal(ql.matmul(x, prepared), y)


def test_prepared_tensors_can_be_copied():
    q = packed("uniform:3:g20:asym", 30, 100)
    prepared = ql.prepare(q.to("cuda"))
    x = torch.randn(2, 100, device="cuda", dtype=torch.float16)
    expected = ql.matmul(x, prepared)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert other.device == "cuda:0"
        assert torch.equal(ql.matmul(x, other), expected)


# -- products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spec", SPECS)
def test_there_is_a_kernel_for_every_number_of_tokens(spec, dtype):
    missing = [
        answer.reason
        for m in [0, *TOKENS, 4096, 100_000]
        if not (answer := ql.can_matmul(spec, m, dtype, "cuda"))
    ]
    assert missing == []


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(spec, dtype, shape):
    n, k = shape
    q = packed(spec, n, k)
    prepared = ql.prepare(q.to("cuda"))
    for m in (1, 3, 8, 17):
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype)
        if not runs(prepared, x):
            continue
        assert_product(ql.matmul(x, prepared), x, q)
        assert_product(ql.matmul(x, prepared, bias=bias), x, q, bias)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("spec", ["uniform:4:g128", "uniform:3:g64:asym:bf16", "uniform:8:channel"])
def test_products_of_many_tokens(spec, m):
    q = packed(spec, 330, 1100)
    prepared = ql.prepare(q.to("cuda"))
    for dtype in HALVES:
        x = torch.randn(m, 1100, device="cuda", dtype=dtype)
        if runs(prepared, x):
            y = ql.matmul(x, prepared)
            assert_product(y, x, q)
            for _ in range(5):
                assert torch.equal(ql.matmul(x, prepared), y)


def test_float32_has_a_kernel_or_a_reason():
    q = packed("uniform:4:g64", 96, 200)
    there = q.to("cuda")
    x = torch.randn(5, 200, device="cuda")
    if runs(there, x):
        torch.testing.assert_close(ql.matmul(x, there).cpu(), ql.matmul(x.cpu(), q), rtol=0, atol=0.05)


def test_codes_at_their_extremes_are_exact():
    # Integers up to 15, scale 1: every term and every sum is a number that float16 holds.
    n, k = 128, 256
    weights = torch.randint(-8, 8, (n, k)).float()
    weights[:, 0] = -8
    weights[:, 1] = 7
    format = ql.Uniform(4, "channel", symmetric=False)
    q = ql.quantize(weights, format)
    x = torch.zeros(4, k)
    x[0, 0], x[1, 1], x[2, -1] = 1, 1, 2
    x[3, ::37] = 1
    expected = x @ q.dequantize().T
    y = ql.matmul(x.half().cuda(), q.to("cuda"))
    assert torch.equal(y.float().cpu(), expected.half().float())


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (2, 0), (0,)])
def test_leading_dimensions_are_kept(lead):
    q = packed("uniform:4:g64", 96, 200).to("cuda")
    x = torch.randn(*lead, 200, device="cuda", dtype=torch.float16)
    y = ql.matmul(x, q)
    assert y.shape == (*lead, 96)
    if y.numel():
        flat = ql.matmul(x.reshape(-1, 200), q)
        assert torch.equal(y.reshape(-1, 96), flat)


def test_strided_activations():
    q = packed("uniform:4:g64", 96, 200).to("cuda")
    x = torch.randn(6, 200, device="cuda", dtype=torch.float16)
    expected = ql.matmul(x, q)
    wide = torch.full((6, 417), float("nan"), device="cuda", dtype=torch.float16)
    for shift in (0, 1, 3, 8):  # rows that start off 16 bytes
        wide[:, shift : shift + 200] = x
        assert_product(ql.matmul(wide[:, shift : shift + 200], q), x, q)
    doubled = x.repeat_interleave(2, 0)[::2]
    assert doubled.stride(0) == 400
    assert torch.equal(ql.matmul(doubled, q), expected)
    with pytest.raises(ValueError, match=r"x.*last axis.*contiguous"):
        ql.matmul(x.T.contiguous().T, q)
    same = x[:1].expand(5, 200)
    assert torch.equal(ql.matmul(same, q), ql.matmul(same.contiguous(), q))
    blocks = torch.randn(2, 3, 4, 200, device="cuda", dtype=torch.float16).transpose(0, 2)
    assert torch.equal(ql.matmul(blocks, q), ql.matmul(blocks.contiguous(), q))


def test_packed_tensors_are_prepared_once():
    q = packed("uniform:4:g64", 96, 200).to("cuda")
    x = torch.randn(2, 200, device="cuda", dtype=torch.float16)
    first = ql.matmul(x, q)
    prepared = q._prepared
    assert torch.equal(ql.matmul(x, q), first)
    assert q._prepared is prepared
    alone = ql.prepare(q)
    del q, prepared
    gc.collect()
    assert torch.equal(ql.matmul(x, alone), first)


def test_wrong_arguments_are_named():
    q = packed("uniform:4:g64", 96, 200)
    there, x = q.to("cuda"), torch.randn(2, 200, dtype=torch.float16, device="cuda")
    with pytest.raises(TypeError, match=r"x.*cpu.*cuda:0"):
        ql.matmul(x.cpu(), there)
    with pytest.raises(TypeError, match=r"x.*cuda.*CPU"):
        ql.matmul(x, q)
    with pytest.raises(TypeError, match=r"x.*cpu.*cuda:0"):
        ql.matmul(np.ones((2, 200), np.float16), there)
    with pytest.raises(TypeError, match=r"x.*float64"):
        ql.matmul(x.double(), there)
    with pytest.raises(TypeError, match=r"x.*int32"):
        ql.matmul(x.int(), there)
    with pytest.raises(ValueError, match=r"x.*\[2, 199\].*200"):
        ql.matmul(x[:, :-1], there)
    with pytest.raises(RuntimeError, match=r"activations.*int8.*exact"):
        ql.matmul(x, there, activations="int8")
    bias = torch.randn(96, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match=r"bias.*\[95\].*\[96\]"):
        ql.matmul(x, there, bias=bias[:-1])
    with pytest.raises(TypeError, match=r"bias.*bfloat16.*float16"):
        ql.matmul(x, there, bias=bias.bfloat16())
    with pytest.raises(TypeError, match=r"bias.*cpu.*cuda"):
        ql.matmul(x, there, bias=bias.cpu())


def test_options_reach_the_kernels():
    q = packed("uniform:4:g64", 128, 2048)
    prepared = ql.prepare(q.to("cuda"))
    x = torch.randn(2, 2048, dtype=torch.float16, device="cuda")
    arguments = (x, prepared._core, 128, 2048, x.device, None)
    for overlap in (False, True):
        for splits in (1, 2, 4):
            options = _core.CudaMatmulOptions(overlap=overlap, splits=splits)
            assert_product(_cuda.product(*arguments, options), x, q)
    with pytest.raises(ValueError, match=r"kernel.*'?nonesuch"):
        _cuda.product(*arguments, _core.CudaMatmulOptions(kernel="nonesuch"))


# -- streams, graphs, threads, devices ----------------------------------------------------------------------


def test_work_is_queued_on_the_current_stream():
    q = packed("uniform:4:g128", 512, 2048)
    prepared = ql.prepare(q.to("cuda"))
    x = torch.randn(2, 2048, device="cuda", dtype=torch.float16)
    expected = ql.matmul(x, prepared)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # x is written after this, and must be read after that
        late.copy_(x)
        y = ql.matmul(late, prepared)
        after = torch.cuda.Event()
        after.record()
    assert not after.query()
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("m", [1, 2, 8, 16, 64, 300])
def test_products_run_in_a_cuda_graph(m):
    q = packed("uniform:4:g128", 300, 2048)
    prepared = ql.prepare(q.to("cuda"))
    x = torch.randn(m, 2048, device="cuda", dtype=torch.float16)
    if not runs(prepared, x):
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the very first call
        y = ql.matmul(x, prepared)
    for _ in range(5):
        other = torch.randn_like(x)
        x.copy_(other)
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, ql.matmul(other, prepared))


def test_preparing_is_refused_while_a_graph_is_captured():
    q = packed("uniform:4:g128", 64, 256).to("cuda")
    x = torch.randn(1, 256, device="cuda", dtype=torch.float16)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"q.*prepare"), torch.cuda.graph(graph):
        ql.matmul(x, q)
    torch.cuda.synchronize()
    assert_product(ql.matmul(x, q), x, q)


def test_threads_with_streams_of_their_own():
    q = packed("uniform:4:g64", 200, 1024)
    prepared = ql.prepare(q.to("cuda"))
    xs = [torch.randn(3, 1024, device="cuda", dtype=torch.float16) for _ in range(4)]
    expected = [ql.matmul(x, prepared) for x in xs]
    torch.cuda.synchronize()
    wrong = []

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong.append(sum(not torch.equal(ql.matmul(x, prepared), y) for _ in range(50)))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0, 0, 0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    q = packed("uniform:4:g64", 96, 200)
    there = q.to("cuda:1")
    prepared = ql.prepare(there)
    assert prepared.device == "cuda:1"
    x = torch.randn(3, 200, device="cuda:1", dtype=torch.float16)
    assert torch.cuda.current_device() == 0
    assert_product(ql.matmul(x, prepared), x, q)
    assert torch.cuda.current_device() == 0
    with pytest.raises(TypeError, match=r"x.*cuda:0.*cuda:1"):
        ql.matmul(x.to("cuda:0"), prepared)


def test_can_matmul_names_what_is_missing():
    assert ql.can_matmul("uniform:4:g128", 1, "float16", "cuda") == (True, "")
    assert "cuda:99" in ql.can_matmul("uniform:4:g128", 1, "float16", "cuda:99").reason
    assert "int8" in ql.can_matmul("uniform:4:g128", 1, "float16", "cuda", activations="int8").reason
