"""QuantLinear on a CUDA device: one copy of W, states, movement, compilation, graphs, gradients."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import quantloom as ql
import torch
from cuda_cases import HALVES, SPECS, assert_product, needs_cuda, packed, permuted, same_planes
from quantloom.nn import QuantLinear

pytestmark = needs_cuda


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def layer(spec: str = "uniform:4:g64:asym", n: int = 96, k: int = 200, bias: bool = True) -> QuantLinear:
    """On the CPU."""
    return QuantLinear.from_linear(torch.nn.Linear(k, n, bias=bias), spec)


def inputs(m: int = 3, k: int = 200, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(m, k, device="cuda", dtype=dtype)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward(spec, dtype, bias):
    module = layer(spec, bias=bias)
    q = module.packed
    there = copy.deepcopy(module).to("cuda", dtype)
    assert all(name.startswith("prepared_") for name, _ in there.named_buffers())
    assert {plane.device.type for plane in there.buffers()} == {"cuda"}
    for m in (1, 5):
        x = inputs(m, dtype=dtype)
        assert_product(there(x), x, q, there.bias)
    assert same_planes(there.packed, q)
    assert repr(there) == repr(module)
    back = there.cpu()
    assert same_planes(back.packed, q)
    assert {name for name, _ in back.named_buffers()} == set(q.planes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        lambda: packed("uniform:3:g20:asym", 70, 150),
        lambda: permuted("uniform:4:g32", 70, 150),
        lambda: packed("codebook:nf4:g32", 70, 150),
        lambda: packed("outliers:2%:spqr:3", 70, 150),
    ],
)
def test_decodes_as_on_the_cpu(make, dtype):
    q = make()
    module = QuantLinear(q).to("cuda")
    assert torch.equal(module.dequantize(dtype).cpu(), q.dequantize(dtype))


def test_takes_what_linear_takes():
    module = layer().to("cuda", torch.float16)
    x = torch.randn(2, 3, 200, device="cuda", dtype=torch.float16)
    expected = module(x)
    assert expected.shape == (2, 3, 96)
    assert torch.equal(module(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    columns = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert columns.stride(-1) != 1
    assert torch.equal(module(columns), expected)
    assert torch.equal(module(x[0, 0]), module(x[0, :1])[0])
    assert module(x[:0]).shape == (0, 3, 96)


def test_wrong_arguments_are_named():
    module = layer()
    with pytest.raises(TypeError, match=r"x.*cuda.*CPU|x.*cuda.*cpu"):
        module(inputs())
    there = copy.deepcopy(module).to("cuda", torch.float16)
    with pytest.raises(TypeError, match=r"x.*cpu.*cuda:0"):
        there(torch.randn(2, 200, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"x.*\[2, 199\].*200"):
        there(inputs(2, 199))
    with pytest.raises(TypeError, match=r"x.*int32.*float16"):
        there(torch.ones(2, 200, dtype=torch.int32, device="cuda"))
    with pytest.raises(RuntimeError, match=r"activations.*int8.*exact"):
        QuantLinear(module.packed, activations="int8").to("cuda")(inputs())
    with pytest.raises(TypeError, match=r"bias.*cpu.*cuda:0"):
        QuantLinear(module.packed.to("cuda"), torch.zeros(96))


def test_quantizes_where_the_weights_or_the_hessians_are():
    linear = torch.nn.Linear(96, 64, bias=False)
    x = torch.randn(400, 96) @ torch.randn(96, 96)
    hessian = ql.Hessian(96)
    hessian.add(x)
    expected = QuantLinear.from_linear(linear, "uniform:4:g32")
    tables = QuantLinear.from_linear(linear, "codebook:nf4:g32")
    calibrated = QuantLinear.from_linear(linear, "uniform:4:g32", ql.GPTQ(hessian))
    linear.to("cuda")
    there = QuantLinear.from_linear(linear, "uniform:4:g32")
    assert there.prepared.device == "cuda:0"
    assert same_planes(there.packed, expected.packed)
    assert same_planes(QuantLinear.from_linear(linear, "codebook:nf4:g32").packed, tables.packed)
    assert same_planes(
        QuantLinear.from_linear(linear, "uniform:4:g32", ql.GPTQ(hessian)).packed, calibrated.packed
    )
    moved = ql.GPTQ(hessian.to("cuda"))
    other = QuantLinear.from_linear(linear, "uniform:4:g32", moved)
    changed = (other.packed.dequantize().cpu() != calibrated.packed.dequantize()).double().mean()
    assert changed < 0.05


# -- memory -------------------------------------------------------------------------------------------------


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_weights_are_held_once():
    module = layer("uniform:4:g128", 2048, 4096, bias=False)
    canonical = module.packed.size_in_bits // 8
    QuantLinear(layer().packed).to("cuda")  # whatever a first call allocates for good
    before = _allocated()
    torch.cuda.reset_peak_memory_stats()
    module.to("cuda")
    held = _allocated() - before
    prepared = module.prepared.byte_count
    assert prepared <= held <= prepared + 8192
    assert prepared <= 1.1 * canonical
    assert torch.cuda.max_memory_allocated() - before <= canonical + prepared + 65536
    x = inputs(1, 4096)
    y = module(x)
    module(x)
    del x, y
    assert _allocated() - before <= held + 8192
    state = module.state_dict()
    assert state["codes"].device.type == "cuda"
    del state
    assert _allocated() - before <= held + 8192
    module.cpu()
    assert _allocated() <= before + 8192


# -- states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_states_are_the_same_on_both_devices(spec):
    module = layer(spec)
    there = copy.deepcopy(module).to("cuda")
    state, expected = there.state_dict(), module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name].cpu(), value), name
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    other = layer(spec)
    other.load_state_dict(loaded)
    assert same_planes(other.packed, module.packed)


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("assign", [False, True])
def test_states_are_loaded_on_the_device(source, assign):
    module, target = layer(), layer().to("cuda")
    addresses = [plane.data_ptr() for plane in target.buffers()]
    target.load_state_dict(copy.deepcopy(module).to(source).state_dict(), assign=assign)
    assert same_planes(target.packed, module.packed)
    kind = "cpu" if assign and source == "cpu" else "cuda"
    assert {plane.device.type for plane in target.buffers()} == {kind}
    assert (target.prepared is None) == (kind == "cpu")
    if not assign:
        assert [plane.data_ptr() for plane in target.buffers()] == addresses
    plain = layer()
    plain.load_state_dict(copy.deepcopy(module).to("cuda").state_dict(), assign=assign)
    assert same_planes(plain.packed, module.packed)
    assert (plain.prepared is not None) == assign


def test_a_captured_graph_sees_a_state_that_is_loaded_later():
    module, source = layer(bias=False).to("cuda"), layer(bias=False).to("cuda")
    x = inputs(1)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = module(x)
    module.load_state_dict(source.state_dict())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, source(x))


def test_empty_modules_are_filled_by_a_state():
    module = QuantLinear(permuted("uniform:4:g32", 70, 150))
    empty = copy.deepcopy(module).to("meta").to_empty(device="cuda")
    assert {plane.device.type for plane in empty.buffers()} == {"cuda"}
    empty.load_state_dict(module.state_dict())
    assert same_planes(empty.packed, module.packed)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copy_of):
    module = layer("uniform:3:g20:asym:bf16").to("cuda", torch.float16)
    x = inputs()
    expected = module(x)
    other = copy_of(module)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.prepared_scales.zero_()
        other.bias.zero_()
    assert not other(x).any()
    assert torch.equal(module(x), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_moves_between_devices():
    module = layer()
    q = module.packed
    there = copy.deepcopy(module).to("cuda:0", torch.float16).to("cuda:1")
    assert {str(plane.device) for plane in there.buffers()} == {"cuda:1"}
    x = torch.randn(3, 200, device="cuda:1", dtype=torch.float16)
    assert_product(there(x), x, q, there.bias)
    with pytest.raises(TypeError, match=r"x.*cuda:0.*cuda:1"):
        there(x.to("cuda:0"))


# -- gradients, autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lead", [(3,), (2, 4), ()])
def test_gradients_flow_to_inputs_and_bias(dtype, lead):
    linear = torch.nn.Linear(200, 96)
    module = QuantLinear.from_linear(linear, "uniform:4:g64:asym").to("cuda", dtype)
    x = torch.randn(*lead, 200, device="cuda", dtype=dtype, requires_grad=True)
    weights = torch.randn(*lead, 96, device="cuda", dtype=dtype)
    (module(x) * weights).sum().backward()
    expected = weights.double() @ module.dequantize().double()
    torch.testing.assert_close(
        x.grad.double(), expected, rtol=0, atol=0.02 if dtype == torch.float16 else 0.2
    )
    assert x.grad.dtype == module.bias.grad.dtype == dtype
    torch.testing.assert_close(
        module.bias.grad.double(), weights.double().reshape(-1, 96).sum(0), rtol=0.01, atol=0.02
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_decides_the_dtype(dtype):
    module = layer().to("cuda")
    x = torch.randn(3, 200, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = module(x)
    assert y.dtype == dtype
    assert torch.equal(y, module(x.to(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert module.bias.grad.dtype == torch.float32


# -- torch.compile, torch.export, graphs --------------------------------------------------------------------


def model() -> torch.nn.Module:
    stack = torch.nn.Sequential(
        layer(), torch.nn.GELU(), layer("uniform:3:g20:asym:bf16", 64, 96, bias=False)
    )
    return stack.to("cuda", torch.float16)


@pytest.mark.parametrize("mode", ["aot_eager", "default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_modules_compile_without_graph_breaks(mode, dynamic):
    torch.compiler.reset()
    plain = model()
    if mode == "aot_eager":
        compiled = torch.compile(plain, backend=mode, fullgraph=True, dynamic=dynamic)
    else:
        pytest.importorskip("triton")
        compiled = torch.compile(plain, mode=mode, fullgraph=True, dynamic=dynamic)
    for m in (2, 5):
        for _ in range(4):
            x = inputs(m)
            with torch.no_grad():
                y, expected = compiled(x).clone(), plain(x)
            torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


def test_compiled_modules_have_gradients():
    torch.compiler.reset()
    plain = model()
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    x = inputs(4).requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).float().square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).float().square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=5e-3, atol=5e-3)


def test_exports():
    stack = model()
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(stack, (inputs(3),), dynamic_shapes=({0: tokens},))
    assert "quantloom.linear" in str(program.graph)
    x = inputs(5)
    assert torch.equal(program.module()(x), stack(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), stack(x))


@pytest.mark.parametrize("m", [1, 4, 8])
def test_modules_run_in_a_cuda_graph(m):
    stack = model()
    x = inputs(m)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = stack(x)
    for _ in range(3):
        other = torch.randn_like(x)
        x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, stack(other))


def test_operators_pass_torchs_own_checks():
    module = layer("uniform:4:g32:asym").to("cuda", torch.float16)
    planes, description = module._planes(), module._description
    x, operators = inputs().requires_grad_(), torch.ops.quantloom
    torch.library.opcheck(operators.linear.default, (x, planes, module.bias.detach(), *description))
    torch.library.opcheck(operators.linear.default, (x, planes, None, *description))
    torch.library.opcheck(operators.dequantize_prepared.default, (planes, *description, torch.float16))


def test_the_operator_of_canonical_planes_multiplies_too():
    q = packed("uniform:4:g64", 96, 200).to("cuda")
    x = inputs(2)
    names, values = ",".join(q.planes), list(q.planes.values())
    y = torch.ops.quantloom.matmul(x, values, names, q.format.to_json(), 96, 200, "exact")
    assert torch.equal(y, ql.matmul(x, ql.prepare(q)))
