"""Packed tensors on a CUDA device: decoding, products, files."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda, runs
from quantloom.nn import QuantLinear

pytestmark = needs_cuda

DECODED = {
    row["format"] for row in ql.kernel_table() if row["operation"] == "dequantize" and row["device"] == "cuda"
}
SPECS = [spec for entry in ql.format_table() if entry["name"] in DECODED for spec in entry["examples"]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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
    if not runs(q, x):
        return
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


def test_files_hold_what_is_on_the_device(tmp_path):
    q = ql.quantize(torch.randn(20, 64), "uniform:4:g32:bf16")
    ql.save_tensors(tmp_path / "w.safetensors", {"w": q.to("cuda"), "x": torch.ones(3, device="cuda")})
    loaded = ql.load_tensors(tmp_path / "w.safetensors", kind="torch")
    assert torch.equal(loaded["w"].dequantize(), q.dequantize())
    assert torch.equal(loaded["x"], torch.ones(3))


def test_wrong_devices_are_named():
    linear = torch.nn.Linear(64, 8, device="cuda")
    with pytest.raises(TypeError, match=r"w.*cuda.*CPU.*w\.cpu\(\)"):
        ql.proxy_loss(linear.weight, linear.weight, np.eye(64))
    assert QuantLinear.from_linear(linear, "uniform:4:g32").packed.device == "cuda:0"
    q = ql.quantize(linear.weight.cpu(), "uniform:4:g32")
    planes = dict(q.planes)
    planes["scales"] = planes["scales"].cuda()
    with pytest.raises(TypeError, match=r"planes.*cuda:0.*one device"):
        ql.PackedTensor(q.format, q.shape, planes)
