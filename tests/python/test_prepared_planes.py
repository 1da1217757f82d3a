"""Planes in the order of the CUDA kernels, and modules that hold them: what needs no GPU.

Modules are made to keep prepared planes on the CPU, where the scalar reference makes them and the test's own
operators read them.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import pickle

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import _core, _cuda, kernels, nn
from quantloom.nn import QuantLinear
from torch._subclasses.fake_tensor import FakeTensorMode


def _taken(spec: str) -> bool:
    try:
        _core.prepared_planes(ql.parse_format(spec).to_json(), 1, 1, False)
    except RuntimeError:
        return False
    return True


EXAMPLES = [example for entry in ql.format_table() for example in entry["examples"]]
MORE = [f"uniform:{bits}:g{group}:asym" for bits in range(1, 9) for group in (16, 20)]
SPECS = [spec for spec in [*EXAMPLES, *MORE] if _taken(spec)]
SHAPES = [(1, 1), (0, 5), (3, 0), (17, 33), (64, 64), (65, 129), (70, 300)]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield


@pytest.fixture(scope="module")
def _reference_operators():
    def dequantize(planes, names, format, n, k, dtype):
        named = dict(zip(names.split(","), planes, strict=True))
        return kernels.PreparedTensor._from_planes(format, (n, k), named).dequantize(dtype)

    def linear(x, planes, bias, names, format, n, k):
        y = x @ dequantize(planes, names, format, n, k, x.dtype).T
        return y if bias is None else y + bias

    library = torch.library.Library("quantloom", "IMPL")
    library.impl("linear", linear, "CPU")
    library.impl("dequantize_prepared", dequantize, "CPU")
    yield
    library._destroy()


@pytest.fixture
def keeps_prepared(monkeypatch, _reference_operators):
    """Modules hold prepared planes wherever they are, but on the meta device."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(nn, "_keeps_prepared", lambda device: on and device.type != "meta")

    switch(True)
    return switch


def packed(spec: str, shape: tuple[int, int] = (24, 72)) -> ql.PackedTensor:
    return ql.quantize(torch.randn(shape), spec)


def permuted(spec: str = "uniform:3:g32", n: int = 24, k: int = 100) -> ql.PackedTensor:
    hessian = ql.Hessian(k)
    hessian.add(torch.randn(300, k) * torch.randn(k).exp())
    q = ql.quantize(torch.randn(n, k), spec, ql.GPTQ(hessian, static_groups=False))
    assert "group_index" in q.planes
    return q


def same_planes(a: ql.PackedTensor, b: ql.PackedTensor) -> bool:
    return a.planes.keys() == b.planes.keys() and all(
        a.planes[name].dtype == b.planes[name].dtype and torch.equal(a.planes[name], b.planes[name])
        for name in a.planes
    )


def layer(spec: str = "uniform:4:g32", n: int = 24, k: int = 72, bias: bool = True) -> QuantLinear:
    return QuantLinear.from_linear(torch.nn.Linear(k, n, bias=bias), spec)


# -- planes -----------------------------------------------------------------------------------------------


def test_the_table_has_formats_that_the_kernels_take():
    assert any(spec.startswith("uniform") for spec in SPECS)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_come_back_bit_for_bit(spec, shape):
    q = packed(spec, shape)
    planes = _cuda.prepare(q)
    expected = {
        name: (getattr(torch, dtype), torch.Size(size))
        for name, dtype, size in _core.prepared_planes(q.format.to_json(), *shape, False)
    }
    assert {name: (plane.dtype, plane.shape) for name, plane in planes.items()} == expected
    prepared = kernels.PreparedTensor._from_planes(q.format.to_json(), shape, planes)
    assert prepared.shape == shape
    assert prepared.format == q.format
    assert prepared.byte_count == sum(plane.nbytes for plane in planes.values())
    assert same_planes(prepared.unprepare(), q)


def test_permuted_columns_come_back_too():
    q = permuted()
    planes = _cuda.prepare(q)
    source = planes["source"]
    assert sorted(source[source >= 0].tolist()) == list(range(100))
    json, groups = q.format.to_json(), q.planes["group_index"].numpy()
    described = ql._arrays.describe("group_index", groups).core
    np.testing.assert_array_equal(_core.fragment_source(json, 100, described), source.numpy())
    prepared = kernels.PreparedTensor._from_planes(json, q.shape, planes)
    assert same_planes(prepared.unprepare(), q)


def test_prepared_tensors_are_pickled_with_their_planes():
    q = packed("uniform:3:g20:asym")
    prepared = kernels.PreparedTensor._from_planes(q.format.to_json(), q.shape, _cuda.prepare(q))
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert same_planes(other.unprepare(), q)
        assert other.planes["codes"].data_ptr() != prepared.planes["codes"].data_ptr()
    with pytest.raises(TypeError, match="packed tensor"):
        pickle.dumps(ql.prepare(q))
    for call in (lambda p: p.unprepare(), lambda p: p.dequantize()):
        with pytest.raises(RuntimeError, match=r"CPU.*CUDA"):
            call(ql.prepare(q))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda p: p.pop("scales"), ValueError, "scales"),
        (lambda p: p.update(extra=torch.zeros(1)), ValueError, "planes"),
        (lambda p: p.update(codes=p["codes"].to(torch.int64)), TypeError, "codes.*int64.*int32"),
        (lambda p: p.update(codes=p["codes"][:, :1]), ValueError, "codes"),
        (lambda p: p.update(scales=p["scales"].transpose(2, 3)), ValueError, "scales.*strides.*contiguous"),
        (lambda p: p.update(scales=p["scales"].to("meta")), ValueError, "no memory"),
    ],
)
def test_wrong_planes_are_named(change, error, words):
    q = packed("uniform:4:g32", (70, 130))
    planes = _cuda.prepare(q)
    change(planes)
    with pytest.raises(error, match=words):
        kernels.PreparedTensor._from_planes(q.format.to_json(), q.shape, planes)


def test_descriptors_are_found_by_address():
    q = packed("uniform:4:g32")
    planes = _cuda.prepare(q)
    names, values = ",".join(planes), list(planes.values())
    arguments = (names, q.format.to_json(), *q.shape)
    found = _cuda.cached_descriptor(values, *arguments)
    assert _cuda.cached_descriptor([plane.view(plane.shape) for plane in values], *arguments) is found
    copies = [plane.clone() for plane in values]
    assert _cuda.cached_descriptor(copies, *arguments) is not found
    with pytest.raises(ValueError, match=r"codes|scales"):
        _cuda.cached_descriptor(values, names, q.format.to_json(), 24, 720)


def test_library_folders_are_found_without_error():
    _cuda.find_libraries()


class _Memory:
    """Stands in for prepared planes: multiplies what the addresses that it gets point to."""

    def __init__(self, w: np.ndarray) -> None:
        self.w = w
        self.calls: list[int] = []

    def workspace(self, m: int, dtype: str, options: object) -> int:
        return 512

    def matmul(self, x, x_stride, bias, y, y_stride, m, dtype, workspace, size, stream, options) -> None:
        n, k = self.w.shape
        assert (dtype, size, stream) == ("float16", 512, 77)
        assert workspace != 0
        assert y_stride == n
        rows = self._view(x, (m - 1) * x_stride + k)
        rows = np.stack([rows[i * x_stride : i * x_stride + k] for i in range(m)])
        product = rows.astype(np.float32) @ self.w.T
        self._view(y, m * n)[:] = (product + (self._view(bias, n) if bias else 0)).reshape(-1)
        self.calls.append(x)

    @staticmethod
    def _view(address: int, count: int) -> np.ndarray:
        return np.frombuffer((ctypes.c_char * (2 * count)).from_address(address), np.float16)


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (lambda: torch.randn(3, 8), False),
        (lambda: torch.randn(8), False),
        (lambda: torch.randn(1, 8), False),
        (lambda: torch.randn(2, 3, 8), False),
        (lambda: torch.randn(3, 11)[:, 2:10], False),
        (lambda: torch.randn(6, 8)[::2], False),
        (lambda: torch.randn(1, 8).expand(4, 8), True),
        (lambda: torch.randn(8, 3).T, True),
        (lambda: torch.randn(3, 2, 8).transpose(0, 1), True),
        (lambda: torch.randn(5, 8, 2)[..., 0], True),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_calls_get_addresses_and_strides(monkeypatch, make, copied, bias):
    monkeypatch.setattr(_cuda, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_cuda, "_stream", lambda device: 77)
    w = torch.randn(5, 8)
    memory = _Memory(w.numpy())
    given = make()
    x = torch.empty_strided(given.shape, given.stride(), dtype=torch.float16)
    if 0 in given.stride():
        x = given[:1].half().expand(given.shape)
    else:
        x.copy_(given)
    added = torch.randn(5).half() if bias else None
    y = _cuda.product(x, memory, 5, 8, x.device, added)
    expected = x.float() @ w.T + (added.float() if bias else 0)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    assert y.shape == (*x.shape[:-1], 5)
    assert (memory.calls != [x.data_ptr()]) is copied


def test_nothing_is_called_for_empty_products(monkeypatch):
    monkeypatch.setattr(_cuda, "on", lambda device: contextlib.nullcontext())
    memory, half = _Memory(np.zeros((5, 8), np.float32)), torch.float16
    assert _cuda.product(torch.empty(0, 8, dtype=half), memory, 5, 8, torch.device("cpu")).shape == (0, 5)
    assert _cuda.product(torch.empty(2, 8, dtype=half), memory, 0, 8, torch.device("cpu")).shape == (2, 0)
    bias, x = torch.randn(5).half(), torch.empty(2, 0, dtype=half)
    assert torch.equal(_cuda.product(x, memory, 5, 0, x.device, bias), bias.expand(2, 5))
    assert not _cuda.product(x, memory, 5, 0, x.device).any()
    assert memory.calls == []


@pytest.mark.parametrize(
    ("x", "bias", "error", "words"),
    [
        (torch.zeros(2, 7).half(), None, ValueError, r"x.*\[2, 7\].*8"),
        (torch.zeros(()).half(), None, ValueError, r"x.*\[\].*8"),
        (torch.zeros(2, 8, dtype=torch.float64), None, TypeError, r"x.*float64.*float16"),
        (torch.zeros(2, 8, device="meta").half(), None, TypeError, r"x.*meta.*cpu"),
        (torch.zeros(2, 8).half(), torch.zeros(4).half(), ValueError, r"bias.*\[4\].*\[5\]"),
        (torch.zeros(2, 8).half(), torch.zeros(5), TypeError, r"bias.*float32.*float16"),
        (torch.zeros(2, 8).half(), torch.zeros(5, device="meta").half(), TypeError, r"bias.*meta.*cpu"),
        (torch.zeros(2, 8).half(), torch.zeros(10).half()[::2], ValueError, r"bias.*2 apart"),
    ],
)
def test_wrong_arguments_are_named(x, bias, error, words):
    memory = _Memory(np.zeros((5, 8), np.float32))
    with pytest.raises(error, match=words):
        _cuda.product(x, memory, 5, 8, torch.device("cpu"), bias)
    assert memory.calls == []


# -- can_matmul -------------------------------------------------------------------------------------------


def test_can_matmul_answers_before_any_work():
    q = packed("uniform:4:g32")
    for given in (q, ql.prepare(q), q.format, "uniform:4:g32"):
        answer = ql.can_matmul(given, 3, torch.bfloat16)
        assert answer
        assert answer == (True, "")
    assert ql.can_matmul(q, activations="int8")
    if not (ql.build_info()["cuda"] and torch.cuda.is_available()):
        possible, reason = ql.can_matmul(q, 1, "float16", "cuda")
        assert not possible
        assert "CUDA" in reason
        assert not ql.can_matmul(q, device="cuda")
    with pytest.raises(TypeError, match=r"dtype.*float64"):
        ql.can_matmul(q, 1, torch.float64)
    with pytest.raises(ValueError, match=r"tokens.*-1"):
        ql.can_matmul(q, -1)
    with pytest.raises(ValueError, match=r"device.*'moon'"):
        ql.can_matmul(q, device="moon")
    with pytest.raises(ValueError, match=r"device.*'meta'"):
        ql.can_matmul(q, device=torch.device("meta"))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_products_add_a_bias(rng, kind):
    q = ql.quantize(rng.standard_normal((24, 64)).astype(np.float32), "uniform:4:g32").to(kind)
    x, bias = rng.standard_normal((2, 3, 64)).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    if kind == "torch":
        x, bias = torch.tensor(x), torch.tensor(bias)
    expected = ql.matmul(x, q) + bias
    np.testing.assert_array_equal(ql.matmul(x, q, bias=bias), expected)
    with pytest.raises(ValueError, match=r"bias.*\[23\].*\[24\]"):
        ql.matmul(x, q, bias=bias[:-1])
    with pytest.raises(TypeError, match=r"bias.*float16.*float32"):
        ql.matmul(x, q, bias=np.asarray(bias).astype(np.float16))


# -- modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_modules_hold_prepared_planes_only(keeps_prepared, spec, lead):
    q = packed(spec)
    bias = torch.randn(24)
    module = QuantLinear(q, bias)
    assert all(name.startswith("prepared_") for name, _ in module.named_buffers())
    assert same_planes(module.packed, q)
    assert same_planes(module.prepared.unprepare(), q)
    x = torch.randn(*lead, 72)
    torch.testing.assert_close(module(x), x @ q.dequantize().T + bias)
    assert torch.equal(module.dequantize(torch.float16), q.dequantize(torch.float16))
    keeps_prepared(False)
    plain = QuantLinear(q, bias)
    assert repr(plain) == repr(module)
    assert plain.prepared is None


@pytest.mark.parametrize("make", [lambda: packed("uniform:3:g20:asym:bf16"), permuted])
def test_states_are_the_same_in_both_orders(keeps_prepared, make):
    q, bias = make(), torch.randn(24)
    module = QuantLinear(q, bias)
    keeps_prepared(False)
    plain = QuantLinear(q, bias)
    keeps_prepared(True)
    state, expected = module.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(module).state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for assign in (False, True):
        other = QuantLinear(
            ql.PackedTensor(
                q.format,
                q.shape,
                {n: torch.zeros_like(p) for n, p in q.planes.items()}
                | ({"group_index": q.planes["group_index"]} if "group_index" in q.planes else {}),
            ),
            torch.zeros(24),
        )
        addresses = [plane.data_ptr() for plane in other.buffers()]
        assert torch.nn.Sequential(other).load_state_dict(loaded, assign=assign).missing_keys == []
        assert same_planes(other.packed, q)
        assert torch.equal(other.bias, bias)
        assert ([plane.data_ptr() for plane in other.buffers()] == addresses) is not assign


def test_moving_away_and_back_keeps_the_bytes(keeps_prepared):
    q = packed("uniform:3:g20:asym:bf16")
    module = torch.nn.Sequential(QuantLinear(q, torch.randn(24)))
    x = torch.randn(2, 72)
    expected = module(x)
    keeps_prepared(False)
    assert set(dict(module.to("cpu").named_buffers())) == {"0.codes", "0.scales", "0.zeros"}
    assert same_planes(module[0].packed, q)
    torch.testing.assert_close(module(x), expected)
    keeps_prepared(True)
    assert all(name.startswith("0.prepared_") for name, _ in module.to("cpu").named_buffers())
    assert same_planes(module[0].packed, q)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.type(torch.float64),
        lambda m: m.share_memory(),
    ],
)
def test_planes_keep_dtype_bytes_and_strides(keeps_prepared, change):
    q = packed("uniform:3:g20:asym:bf16", (70, 150))
    module = change(QuantLinear(q))
    assert all(plane.is_contiguous() for plane in module.buffers())
    assert same_planes(module.packed, q)
    assert change is not None
    assert torch.equal(module.dequantize(), q.dequantize())


def test_empty_modules_are_filled_by_a_state(keeps_prepared):
    q = packed("uniform:3:g20:asym:bf16")
    source = QuantLinear(q, torch.randn(24))
    empty = copy.deepcopy(source).to("meta")
    assert {plane.device.type for plane in empty.buffers()} == {"meta"}
    assert {name for name, _ in empty.named_buffers()} == {"codes", "scales", "zeros"}
    empty = empty.to_empty(device="cpu")
    assert set(dict(empty.named_buffers())) == set(dict(source.named_buffers()))
    empty.load_state_dict(source.state_dict())
    assert same_planes(empty.packed, q)
    x = torch.randn(3, 72)
    assert torch.equal(empty(x), source(x))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("uniform:4:g32:bf16",), "scales.*bfloat16"),
        (("uniform:3:g32",), "codes.*shape"),
        (("uniform:4:g16",), "scales|group_size"),
        (("uniform:4:g32", 24, 60), "shape"),
        (("uniform:4:g33",), "group_size"),
    ],
)
def test_another_state_is_refused_and_changes_nothing(keeps_prepared, other, words):
    target = layer()
    before = target.packed
    with pytest.raises(RuntimeError, match=words):
        target.load_state_dict(layer(*other).state_dict())
    assert same_planes(target.packed, before)


def test_partial_and_foreign_keys_are_reported(keeps_prepared):
    source, target = layer(), layer()
    state = source.state_dict()
    state["foreign"] = torch.zeros(1)
    del state["scales"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*scales.*Unexpected.*foreign"):
        target.load_state_dict(state)
    target = layer()
    scales = target.packed.planes["scales"]
    found = target.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["scales"], ["foreign"])
    assert torch.equal(target.packed.planes["codes"], source.packed.planes["codes"])
    assert torch.equal(target.packed.planes["scales"], scales)
    with pytest.raises(RuntimeError, match="bias"):
        layer(bias=False).load_state_dict(source.state_dict())
    before = target.packed
    assert target.load_state_dict({}, strict=False).unexpected_keys == []
    assert same_planes(target.packed, before)


def test_values_of_a_state_are_checked(keeps_prepared):
    q = permuted()
    target = QuantLinear(q)
    state = target.state_dict()
    state["group_index"] = torch.full_like(state["group_index"], 7)
    with pytest.raises(RuntimeError, match="group_index"):
        target.load_state_dict(state)
    assert same_planes(target.packed, q)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(keeps_prepared, copy_of):
    module = layer("uniform:3:g20:asym:bf16")
    x = torch.randn(2, 72)
    expected = module(x)
    other = copy_of(module)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.prepared_codes.zero_()
        other.bias.zero_()
    assert not torch.equal(other(x), expected)
    assert torch.equal(module(x), expected)


def test_gradients_flow_to_inputs_and_bias(keeps_prepared):
    linear = torch.nn.Linear(72, 24)
    module = QuantLinear.from_linear(linear, "uniform:4:g32:asym")
    for lead in ((), (7,), (2, 5), (2, 0)):
        linear.bias.grad = None
        x = torch.randn(*lead, 72, requires_grad=True)
        weights = torch.randn(*lead, 24)
        (module(x) * weights).sum().backward()
        torch.testing.assert_close(x.grad, weights @ module.dequantize(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(linear.bias.grad, weights.reshape(-1, 24).sum(0), rtol=1e-4, atol=1e-5)
    frozen = QuantLinear(module.packed, torch.zeros(24))
    half = torch.randn(3, 72, dtype=torch.bfloat16, requires_grad=True)
    frozen(half).float().sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert frozen.bias.grad is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(keeps_prepared, backend, training):
    torch.compiler.reset()
    model = torch.nn.Sequential(
        layer("uniform:3:g20:asym:bf16"), torch.nn.GELU(), layer(n=10, k=24, bias=False)
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for m in (3, 8):
        x = torch.randn(m, 72, requires_grad=training)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        torch.testing.assert_close(y, model(x))
        if training:
            (expected,) = torch.autograd.grad(model(x).square().sum(), x)
            (actual,) = torch.autograd.grad(y.square().sum(), x)
            torch.testing.assert_close(actual, expected)


def test_exports(keeps_prepared, tmp_path):
    model = torch.nn.Sequential(layer("uniform:3:g20:asym:bf16"), torch.nn.ReLU())
    x = torch.randn(3, 72)
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},))
    assert "quantloom.linear" in str(program.graph)
    other = torch.randn(7, 72)
    assert torch.equal(program.module()(other), model(other))
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(other), model(other))


def test_operators_pass_torchs_own_checks(keeps_prepared):
    module = layer("uniform:4:g32:asym")
    planes, description = module._planes(), module._description
    x = torch.randn(3, 72, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    operators = torch.ops.quantloom
    torch.library.opcheck(operators.linear.default, (x, planes, bias, *description))
    torch.library.opcheck(operators.linear.default, (x, planes, None, *description))
    torch.library.opcheck(operators.dequantize_prepared.default, (planes, *description, torch.float16))


def test_fake_tensors_give_shapes_without_work(keeps_prepared):
    module = layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = module(torch.empty(2, 5, 72, dtype=torch.bfloat16))
        assert (y.shape, y.dtype) == ((2, 5, 24), torch.bfloat16)
        assert module.dequantize(torch.float16).shape == (24, 72)
        with pytest.raises(RuntimeError, match="72"):
            module(torch.empty(5, 71))


def test_autocast_decides_the_dtype(keeps_prepared):
    for prepared in (True, False):
        keeps_prepared(prepared)
        module = layer()
        x = torch.randn(3, 72)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, module(x.bfloat16()))


def test_planes_go_with_their_module(keeps_prepared):
    module = layer()
    module(torch.randn(1, 72))
    reference = torch.utils.weak.WeakTensorKeyDictionary({module.prepared_codes: 1})
    del module
    gc.collect()
    assert len(reference) == 0
