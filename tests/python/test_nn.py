"""QuantLinear and the operators behind it."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import kernels
from quantloom._operators import prepared_cache
from quantloom.nn import QuantLinear
from torch._subclasses.fake_tensor import FakeTensorMode

SPECS = ["uniform:4:g32", "uniform:3:g20:asym:bf16", "uniform:8:channel:f32", "uniform:2:tensor:asym"]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def layer(spec: str = "uniform:4:g32", n: int = 24, k: int = 64, bias: bool = True) -> QuantLinear:
    return QuantLinear.from_linear(torch.nn.Linear(k, n, bias=bias), spec)


def planes_of(module: QuantLinear) -> dict[str, bytes]:
    return {
        name: bytes(buffer.contiguous().view(torch.uint8).numpy().tobytes())
        for name, buffer in module.named_buffers()
    }


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 0), (2, 3)])
def test_forward_is_a_product_with_the_decoded_matrix(spec, bias, dtype, lead):
    linear = torch.nn.Linear(64, 24, bias=bias)
    module = QuantLinear.from_linear(linear, spec)
    x = torch.randn(*lead, 64, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    assert y.shape == (*lead, 24)
    expected = x.double() @ module.dequantize().double().T
    if bias:
        expected = expected + linear.bias.double()
        assert module.bias is linear.bias
    torch.testing.assert_close(y.double(), expected, rtol=0.01, atol={torch.float32: 1e-5}.get(dtype, 0.02))
    assert torch.equal(module.dequantize(), module.packed.dequantize())
    assert module.packed.bits_per_weight == ql.quantize(linear.weight, spec).bits_per_weight


def test_takes_what_linear_takes():
    module = layer()
    x = torch.randn(4, 3, 64)
    expected = module(x)
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat(1, 1, 2)[..., :64]):
        assert torch.equal(module(view), expected)
    columns = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # not contiguous along the last axis
    assert columns.stride(-1) != 1
    assert torch.equal(module(columns), expected)
    model = torch.nn.Sequential(module, torch.nn.ReLU())
    assert torch.equal(model(x), expected.relu())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float64),
        lambda m: torch.nn.Sequential(m).half()[0],
    ],
)
@pytest.mark.parametrize("spec", SPECS)
def test_planes_keep_their_dtypes_and_bytes(change, spec):
    module = layer(spec)
    before = planes_of(module)
    changed = change(module)
    assert planes_of(changed) == before
    assert changed.bias.dtype != torch.float32


def test_moves_to_the_meta_device_and_back_empty():
    module = layer("uniform:3:g20:asym:bf16").to("meta")
    assert {b.device.type for b in module.buffers()} == {"meta"}
    assert module.scales.dtype == torch.bfloat16
    assert module(torch.empty(5, 64, device="meta")).shape == (5, 24)
    empty = module.to_empty(device="cpu")
    source = layer("uniform:3:g20:asym:bf16")
    empty.load_state_dict(source.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(empty(x), source(x))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(spec, assign):
    source, target = layer(spec), layer(spec)
    x = torch.randn(3, 64)
    before = target(x)  # prepares, so that stale kernels would show
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(source).state_dict(), file)
    file.seek(0)
    model = torch.nn.Sequential(target)
    model.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert planes_of(model[0]) == planes_of(source)
    assert not torch.equal(source(x), before)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("uniform:4:g32:bf16",), "scales.*bfloat16"),
        (("uniform:3:g32",), "uniform|codes"),
        (("uniform:4:g16",), "scales|group_size"),
        (("uniform:4:g32", 24, 60), "in_features|shape"),
        (("uniform:4:g33",), "group_size"),
    ],
)
def test_another_state_is_refused_and_changes_nothing(other, words):
    target = layer()
    before = planes_of(target)
    with pytest.raises(RuntimeError, match=words):
        target.load_state_dict(layer(*other).state_dict())
    assert planes_of(target) == before


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copy_of):
    module = layer("uniform:3:g20:asym:bf16")
    x = torch.randn(2, 64)
    expected = module(x)
    other = copy_of(module)
    assert other.format == module.format
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.codes.zero_()
        other.bias.zero_()
    assert not torch.equal(other(x), expected)
    assert torch.equal(module(x), expected)


def test_gradients_flow_to_inputs_and_bias():
    linear = torch.nn.Linear(64, 24)
    module = QuantLinear.from_linear(linear, "uniform:4:g32:asym")
    x = torch.randn(2, 5, 64, requires_grad=True)
    weights = torch.randn(2, 5, 24)
    (module(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ module.dequantize(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, weights.sum((0, 1)), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    half = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    module(half).float().sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(backend, training):
    torch.compiler.reset()
    module = layer("uniform:3:g20:asym:bf16")
    model = torch.nn.Sequential(module, torch.nn.GELU(), layer(n=10, k=24))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for m in (3, 8):
        x = torch.randn(m, 64, requires_grad=training)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        torch.testing.assert_close(y, model(x))
        if training:
            (expected,) = torch.autograd.grad(model(x).square().sum(), x)
            (actual,) = torch.autograd.grad(y.square().sum(), x)
            torch.testing.assert_close(actual, expected)


def test_exports(tmp_path):
    model = torch.nn.Sequential(layer("uniform:3:g20:asym:bf16"), torch.nn.ReLU())
    x = torch.randn(3, 64)
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},))
    assert "quantloom.matmul" in str(program.graph)
    other = torch.randn(7, 64)
    assert torch.equal(program.module()(other), model(other))
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(other), model(other))


def test_fake_tensors_give_shapes_without_work():
    module = layer(n=24, k=64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = module(torch.empty(5, 64, dtype=torch.bfloat16))
        assert y.shape == (5, 24)
        assert y.dtype == torch.bfloat16
        assert module.dequantize(torch.float16).shape == (24, 64)
        with pytest.raises(RuntimeError, match="64"):
            module(torch.empty(5, 63))


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_operators_pass_torchs_own_checks(activations):
    module = layer("uniform:4:g32:asym")
    planes, description = module._planes(), module._description
    x = torch.randn(3, 64, requires_grad=activations == "exact")
    torch.library.opcheck(torch.ops.quantloom.matmul.default, (x, planes, *description, activations))
    torch.library.opcheck(torch.ops.quantloom.dequantize.default, (planes, *description, torch.float16))


def test_planes_are_prepared_once_and_released(monkeypatch):
    calls = []
    prepare = kernels.prepare
    monkeypatch.setattr(kernels, "prepare", lambda *arguments: calls.append(1) or prepare(*arguments))
    gc.collect()
    entries = len(prepared_cache)
    module = layer()
    x = torch.randn(2, 64)
    expected = module(x)
    module(x)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        compiled(x)
    assert len(calls) == 1
    assert len(prepared_cache) == entries + 1
    with torch.no_grad():
        module.scales.mul_(2)
    torch.testing.assert_close(module(x) - module.bias, 2 * (expected - module.bias))
    assert len(calls) == 2
    assert len(prepared_cache) == entries + 1
    del module, compiled
    torch.compiler.reset()
    gc.collect()
    assert len(prepared_cache) == entries
    with torch.inference_mode():
        module = layer()
        module(x)
        assert torch.equal(module(x), module(x))


def test_int8_activations_are_an_option():
    linear = torch.nn.Linear(64, 24)
    exact = QuantLinear.from_linear(linear, "uniform:4:g32")
    fast = QuantLinear(exact.packed, linear.bias, activations="int8")
    x = torch.randn(4, 64)
    assert not torch.equal(fast(x), exact(x))
    torch.testing.assert_close(fast(x), exact(x), rtol=0, atol=0.05)
    assert "activations=int8" in repr(fast)


def test_repr_says_format_and_bits():
    words = "in_features=64, out_features=24, bias=False, format=uniform:4:g32:sym, 4.500 bits/weight"
    assert repr(layer(bias=False)) == f"QuantLinear({words})"


def test_numpy_planes_are_copied():
    w = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    q = ql.quantize(w, "uniform:4:g32")
    module = QuantLinear(q)
    module.codes.zero_()
    assert q.planes["codes"].any()


def test_gptq_from_linear():
    linear = torch.nn.Linear(64, 24)
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    hessian = ql.Hessian(64)
    hessian.add(x)
    gptq = QuantLinear.from_linear(linear, "uniform:3:g32", ql.GPTQ(hessian, static_groups=False))
    nearest = QuantLinear.from_linear(linear, "uniform:3:g32")
    assert "group_index" in dict(gptq.named_buffers())
    exact = linear(x)
    assert (gptq(x) - exact).square().mean() < (nearest(x) - exact).square().mean()
