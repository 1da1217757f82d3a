"""Packed tensors and modules on a CUDA device."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom.nn import QuantLinear

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ql.build_info()["cuda"]),
    reason="needs a CUDA device and a build with CUDA",
)

DECODED = {
    row["format"] for row in ql.kernel_table() if row["operation"] == "dequantize" and row["device"] == "cuda"
}
SPECS = [spec for entry in ql.format_table() if entry["name"] in DECODED for spec in entry["examples"]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer(spec: str = "uniform:4:g64:asym", n: int = 96, k: int = 200) -> QuantLinear:
    return QuantLinear.from_linear(torch.nn.Linear(k, n), spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (33, 257), (128, 512)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decodes_as_the_cpu_does(rng, spec, shape, dtype):
    q = ql.quantize(rng.standard_normal(shape).astype(np.float32), spec).to("torch")
    there = q.to("cuda")
    assert there.device == "cuda:0"
    assert there.to(torch.device("cuda")) is there
    decoded = there.dequantize(dtype)
    assert decoded.device.type == "cuda"
    assert decoded.dtype == dtype
    assert torch.equal(decoded.cpu(), q.dequantize(dtype))
    assert there.to("numpy").kind == "numpy"
    assert torch.equal(there.to("cpu").dequantize(dtype), q.dequantize(dtype))


def test_groups_of_permuted_columns(rng):
    x = rng.standard_normal((500, 128)).astype(np.float32) * np.exp(rng.standard_normal(128)).astype(
        np.float32
    )
    hessian = ql.Hessian(128)
    hessian.add(x)
    w = torch.tensor(rng.standard_normal((40, 128)).astype(np.float32))
    q = ql.quantize(w, "uniform:3:g32", ql.GPTQ(hessian, static_groups=False))
    assert "group_index" in q.planes
    assert torch.equal(q.to("cuda").dequantize().cpu(), q.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (2, 0)])
def test_products(rng, dtype, lead):
    q = ql.quantize(torch.tensor(rng.standard_normal((96, 200)).astype(np.float32)), "uniform:4:g64").to(
        "cuda"
    )
    x = torch.tensor(rng.standard_normal((*lead, 200)).astype(np.float32), device="cuda", dtype=dtype)
    y = ql.matmul(x, q)
    assert y.dtype == dtype
    assert y.shape == (*lead, 96)
    expected = x.double() @ q.dequantize().double().T
    tolerance = {torch.float32: 0.05, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


def test_work_is_queued_on_the_current_stream():
    q = ql.quantize(torch.randn(2048, 2048), "uniform:4:g128").to("cuda")
    expected = q.dequantize()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the decoding must wait for this
        before = torch.cuda.Event()
        before.record()
        decoded = q.dequantize()
        after = torch.cuda.Event()
        after.record()
    assert not before.query()
    assert not after.query()
    side.synchronize()
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_move_and_multiply(dtype):
    module = layer("uniform:4:g64:bf16")
    x = torch.randn(7, 200)
    there = copy.deepcopy(module).to("cuda", dtype)
    assert there.scales.dtype == torch.bfloat16
    assert there.scales.device.type == "cuda"
    assert torch.equal(there.scales.cpu(), module.scales)
    y = there(x.to("cuda", dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float().cpu(), module(x), rtol=0, atol=0.1)
    back = there.cpu().float()
    assert torch.equal(back.codes, module.codes)
    with pytest.raises(TypeError, match=r"x.*cpu.*cuda"):
        module.to("cuda")(x)
    with pytest.raises(RuntimeError, match=r"activations.*int8.*exact"):
        QuantLinear(module.packed, activations="int8")(x.cuda())


def test_modules_run_in_a_cuda_graph():
    module = layer().to("cuda", torch.float16)
    x = torch.randn(4, 200, device="cuda", dtype=torch.float16)
    module(x)  # cuBLAS makes its workspace
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = module(x)
    for _ in range(3):
        other = torch.randn_like(x)
        x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, module(other))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_modules_compile(backend):
    torch.compiler.reset()
    model = torch.nn.Sequential(layer(), torch.nn.GELU(), layer(n=8, k=96)).to("cuda")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 200, device="cuda", requires_grad=True)
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-3)


def test_files_hold_what_is_on_the_device(tmp_path):
    q = ql.quantize(torch.randn(20, 64), "uniform:4:g32:bf16")
    ql.save_tensors(tmp_path / "w.safetensors", {"w": q.to("cuda"), "x": torch.ones(3, device="cuda")})
    loaded = ql.load_tensors(tmp_path / "w.safetensors", kind="torch")
    assert torch.equal(loaded["w"].dequantize(), q.dequantize())
    assert torch.equal(loaded["x"], torch.ones(3))


def test_wrong_devices_are_named():
    linear = torch.nn.Linear(64, 8, device="cuda")
    with pytest.raises(TypeError, match=r"w.*cuda.*CPU.*w\.cpu\(\)"):
        ql.quantize(linear.weight, "uniform:4")
    assert QuantLinear.from_linear(linear, "uniform:4:g32").codes.device.type == "cuda"
    q = ql.quantize(linear.weight.cpu(), "uniform:4:g32")
    planes = dict(q.planes)
    planes["scales"] = planes["scales"].cuda()
    with pytest.raises(TypeError, match=r"planes.*cuda:0.*one device"):
        ql.PackedTensor(q.format, q.shape, planes)
