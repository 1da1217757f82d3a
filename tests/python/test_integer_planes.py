"""Planes in integer order, and modules that hold them: what needs no GPU.

Modules are made to keep prepared planes on the CPU, where the scalar reference makes them and the test's own
operator reads them.
"""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import _core, _cuda_integers, kernels, nn
from quantloom.nn import QuantLinear

SPECS = [
    "uniform:8:channel",
    "uniform:8:channel:asym",
    "uniform:5:tensor:asym:bf16",
    "uniform:3:channel:f32",
    "uniform:2:tensor",
    "sdr:4:g16",
    "sdr:3:g24",
]
GROUPS = [
    "uniform:4:g128",
    "uniform:4:g64:asym",
    "uniform:2:g96:asym:bf16",
    "uniform:3:g32:f32",
    "uniform:8:g256",
    "uniform:8:g128:asym",
    "uniform:7:g64:asym",
    "uniform:5:g32:asym",
]
SHAPES = [(0, 5), (3, 0), (1, 1), (17, 33), (65, 129), (130, 300)]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(13)
        yield


def packed(spec: str, n: int = 24, k: int = 72) -> ql.PackedTensor:
    return ql.quantize(torch.randn(n, k), spec)


def kept(spec: str, columns: tuple[int, ...], n: int = 24, k: int = 72) -> ql.PackedTensor:
    """With columns in float16 beside the codes."""
    w = torch.randn(n, k)
    return ql.keep_columns(ql.quantize(w, spec), w, columns)


def prepared(q: ql.PackedTensor, columns: tuple[int, ...] = ()) -> ql.PreparedTensor:
    planes = _cuda_integers.prepare(q, columns)
    return ql.PreparedTensor._from_planes(q.format.to_json(), q.shape, planes, q.transform, columns)


def same(a: ql.PackedTensor, b: ql.PackedTensor) -> bool:
    return a.planes.keys() == b.planes.keys() and all(torch.equal(a.planes[p], b.planes[p]) for p in a.planes)


# -- planes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS + GROUPS)
def test_there_and_back(spec, shape):
    q = packed(spec, *shape)
    there = prepared(q)
    integers = there.planes["integers"]
    assert integers.shape[:2] == (2 * -(-shape[0] // 128), -(-shape[1] // 128))
    in_registers = spec in GROUPS or (spec.startswith("uniform") and q.format.bits <= 4)
    assert integers.dim() == (3 if in_registers else 4)
    if in_registers and spec not in GROUPS:
        assert integers.shape[2] == 4096
    back = there.unprepare()
    assert back.format == q.format
    assert same(back, q)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(
            _cuda_integers.decode(there.planes, *shape, dtype, q.format.to_json()), q.dequantize(dtype)
        )


@pytest.mark.parametrize("spec", SPECS[:6])
def test_outliers_there_and_back(spec):
    columns = (0, 5, 63, 64, 71)
    for q in (packed(spec), kept(spec, columns)):
        there = prepared(q, columns)
        assert same(there.unprepare(), q)
        assert torch.equal(
            _cuda_integers.decode(there.planes, *q.shape, torch.float32, q.format.to_json()), q.dequantize()
        )
        weights = there.planes["outlier_weights"]
        assert weights.dtype == torch.float16


def test_pickles():
    q = packed("uniform:8:channel")
    there = prepared(q, (3, 9))
    again = pickle.loads(pickle.dumps(there))
    assert again._columns == (3, 9)
    assert again.byte_count == there.byte_count
    assert same(again.unprepare(), q)


def test_permuted_digits():
    hessian = ql.Hessian(100)
    hessian.add(torch.randn(300, 100) * torch.randn(100).exp())
    q = ql.quantize(torch.randn(24, 100), "sdr:4:g16", ql.GPTQ(hessian, static_groups=False))
    assert "group_index" in q.planes
    there = prepared(q)
    assert same(there.unprepare(), q)
    assert torch.equal(
        _cuda_integers.decode(there.planes, *q.shape, torch.float32, q.format.to_json()), q.dequantize()
    )


def test_planes_are_checked():
    q = packed("uniform:8:channel")
    planes = _cuda_integers.prepare(q, ())
    text, shape = q.format.to_json(), q.shape
    with pytest.raises(ValueError, match="rows"):
        _cuda_integers.descriptor({n: p for n, p in planes.items() if n != "rows"}, text, *shape, ())
    with pytest.raises(TypeError, match="integers"):
        wrong = planes | {"integers": planes["integers"].to(torch.uint8)}
        _cuda_integers.descriptor(wrong, text, *shape, ())
    with pytest.raises(ValueError, match="integers"):
        _cuda_integers.descriptor(planes | {"integers": planes["integers"][:1]}, text, *shape, ())
    with pytest.raises(ValueError, match=r"outlier_columns.*72"):
        _cuda_integers.descriptor(planes, text, *shape, (72,))
    with pytest.raises(ValueError, match="outlier_columns"):
        _cuda_integers.prepare(q, (5, 5))


def test_refusals_name_the_reason():
    for spec, reason in [
        ("uniform:4:g16", "multiple of 32"),
        ("uniform:1:channel", "2 to 8 bits"),
        ("codebook:nf4:channel", "uniform and sdr"),
    ]:
        with pytest.raises(RuntimeError, match=reason):
            _cuda_integers.prepare(packed(spec), ())
    with pytest.raises(RuntimeError, match="outliers lie in the columns"):
        _cuda_integers.prepare(kept("uniform:8:channel", (3, 4)), (3, 5))
    with pytest.raises(RuntimeError, match="outliers lie in the columns"):
        _cuda_integers.prepare(kept("uniform:8:channel", (3, 4)), ())


def test_where_outliers_lie():
    q = kept("uniform:8:channel", (3, 4, 70))
    assert _cuda_integers._why_not_places(q, (3, 4, 70)) is None
    for columns in [(), (3, 4), (3, 4, 69)]:
        assert "outliers lie" in _cuda_integers._why_not_places(q, columns)
    assert _cuda_integers._why_not_places(packed("uniform:8:channel"), (1, 2)) is None
    there = ql.parse_activations("int8:token:outliers=6:columns=3,4,70")
    digits = kept("sdr:4:g16", (3, 4, 70))
    assert _cuda_integers.why_not_order(digits, there) is None
    assert _cuda_integers.why_not_order(digits.format, there) is None
    assert "outliers lie" in _cuda_integers.why_not_order(digits, "exact")
    assert "outliers lie" in _cuda_integers.why_not_order(digits.format, "exact")
    assert _cuda_integers.why_not_order(packed("sdr:4:g16").format, "exact") is None


# -- modules ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _reference_operators():
    def linear_integers(x, planes, bias, names, format, n, k, activations):
        operand = kernels.operand_format(activations)
        named = dict(zip(names.split(","), planes, strict=True))
        columns = _cuda_integers.columns_of(operand)
        _cuda_integers.descriptor(named, format, n, k, columns)
        if isinstance(operand, ql.ActivationFormat):
            x = ql.round_activations(x, operand)
        return torch.nn.functional.linear(x, _cuda_integers.decode(named, n, k, x.dtype, format), bias)

    def linear(x, planes, bias, names, format, n, k):
        named = dict(zip(names.split(","), planes, strict=True))
        w = ql.PreparedTensor._from_planes(format, (n, k), named).dequantize(x.dtype)
        return torch.nn.functional.linear(x, w, bias)

    def dequantize(planes, names, format, n, k, dtype):
        named = dict(zip(names.split(","), planes, strict=True))
        if "integers" in named:
            return _cuda_integers.decode(named, n, k, dtype, format)
        return ql.PreparedTensor._from_planes(format, (n, k), named).dequantize(dtype)

    library = torch.library.Library("quantloom", "IMPL")
    library.impl("linear_integers", linear_integers, "CPU")
    library.impl("linear", linear, "CPU")
    library.impl("dequantize_prepared", dequantize, "CPU")
    yield
    library._destroy()


@pytest.fixture
def keeps_prepared(monkeypatch, _reference_operators):
    """Modules hold prepared planes wherever they are, but on the meta device; devices multiply integers."""

    def why_not(format, activations, k, dtype, device):
        if activations.scope == "group" or (activations.base_bits or 0) > 8:
            return "one scale for each token"
        return _core.why_not_integers(format)

    def switch(on: bool) -> None:
        monkeypatch.setattr(nn, "_keeps_prepared", lambda device: on and device.type != "meta")

    monkeypatch.setattr(_cuda_integers, "why_not", why_not)
    switch(True)
    return switch


def expected(x, q, activations, bias=None):
    y = ql.round_activations(x, activations) if activations != "exact" else x
    y = y @ q.dequantize(x.dtype).T
    return y if bias is None else y + bias


@pytest.mark.parametrize(
    ("spec", "activations", "integer"),
    [
        ("uniform:8:channel", "int8:token", True),
        ("uniform:4:channel:asym", "int6:token:asym", True),
        ("uniform:8:tensor", "int8:tensor:static=0.05", True),
        ("sdr:4:g16", "sdr4:g16:b8", True),
        ("sdr:4:g16", "sdr4:g16:b16", True),  # kept in the only order there is, and decoded
        ("sdr:4:g16", "exact", True),
        ("uniform:8:channel", "int8:g24", False),
        ("uniform:4:g24", "int8:token", False),
        ("uniform:8:channel", "exact", False),
    ],
)
def test_modules_hold_the_order_that_serves(keeps_prepared, spec, activations, integer):
    q, bias = packed(spec), torch.randn(24)
    module = QuantLinear(q, bias, activations)
    assert ("prepared_integers" in dict(module.named_buffers())) == integer
    assert all(name.startswith("prepared_") for name, _ in module.named_buffers())
    x = torch.randn(3, 72)
    torch.testing.assert_close(module(x), expected(x, q, activations, bias))
    assert same(module.packed, q)
    assert torch.equal(module.dequantize(), q.dequantize())
    assert (module.prepared._columns is not None) == integer
    state = module.state_dict()
    assert {*q.planes, "bias", "_extra_state"} == set(state)
    assert all(torch.equal(state[name], plane) for name, plane in q.planes.items())


def test_outlier_columns(keeps_prepared):
    columns = (3, 40)
    activations = ql.ActivationFormat(outlier_threshold=6, static_outliers=True, outlier_columns=columns)
    for q in (kept("uniform:8:channel", columns), packed("uniform:8:channel")):
        module = QuantLinear(q, None, activations)
        assert module.prepared._columns == columns
        x = torch.randn(5, 72)
        x[:, 3] *= 30
        torch.testing.assert_close(module(x), expected(x, q, activations))
    elsewhere = QuantLinear(kept("uniform:8:channel", (3, 41)), None, activations)
    assert elsewhere.prepared._columns is None
    torch.testing.assert_close(elsewhere(x), expected(x, elsewhere.packed, activations))


def test_other_activations_bring_another_order(keeps_prepared):
    q = packed("uniform:8:channel")
    module = QuantLinear(q)
    x = torch.randn(3, 72)
    for activations, integer in [
        ("int8:token", True),
        ("int8:g8", False),
        ("int4:token:asym", True),
        ("int8:token:outliers=3:columns=1,9", True),
        ("exact", False),
    ]:
        module.activations = activations
        assert ("prepared_integers" in dict(module.named_buffers())) == integer, activations
        torch.testing.assert_close(module(x), expected(x, q, activations))
        assert same(module.packed, q)
    module.activations = "int8"
    with pytest.raises(RuntimeError, match=r"int8.*exact.*int8:token"):
        module(x)
    with pytest.raises(ValueError, match="activations"):
        module.activations = "int8:tensor:static"
    assert module.activations == "int8"


def test_modules_move(keeps_prepared):
    q = packed("uniform:6:channel:asym")
    keeps_prepared(False)
    module = QuantLinear(q, torch.randn(24), "int8:token")
    assert set(q.planes) <= {name for name, _ in module.named_buffers()}
    keeps_prepared(True)
    module.to("cpu")
    assert module.prepared._columns == ()
    module.half()
    assert module.prepared.planes["scales"].dtype == q.planes["scales"].dtype
    x = torch.randn(2, 72, dtype=torch.float16)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(copied(x), module(x))
    keeps_prepared(False)
    module.to("cpu")
    assert module.prepared is None
    assert same(module.packed, q)


def test_states(keeps_prepared):
    columns = (2, 50)
    activations = "int8:token:outliers=4:columns=2,50"
    source = QuantLinear(kept("uniform:8:channel", columns), None, activations)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    for assign in (False, True):
        module = QuantLinear(kept("uniform:8:channel", columns), None, activations)
        memory = module.prepared.planes["integers"].data_ptr()
        module.load_state_dict(state, assign=assign)
        assert same(module.packed, source.packed)
        assert torch.equal(module.prepared.planes["integers"], source.prepared.planes["integers"])
        assert torch.equal(
            module.prepared.planes["outlier_weights"], source.prepared.planes["outlier_weights"]
        )
        assert assign or module.prepared.planes["integers"].data_ptr() == memory
    empty = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    assert empty.prepared._columns == columns
    empty.load_state_dict(state)
    assert same(empty.packed, source.packed)
    with pytest.raises(RuntimeError, match="outliers lie in the columns"):
        other = kept("uniform:8:channel", (2, 51)).planes
        source.load_state_dict(dict(state) | dict(other))
    with pytest.raises(RuntimeError, match="description"):
        QuantLinear(kept("uniform:8:channel", columns), None, "int8:token").load_state_dict(state)


def test_gradients_pass_the_rounding(keeps_prepared):
    q = packed("uniform:8:channel")
    module = QuantLinear(q, torch.nn.Parameter(torch.randn(24)), "int8:token")
    x = torch.randn(2, 3, 72, requires_grad=True)
    y = module(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ q.dequantize())
    torch.testing.assert_close(module.bias.grad, weights.sum((0, 1)))


def test_transforms_come_before_the_rounding(keeps_prepared):
    q = ql.quantize(torch.randn(32, 64), "uniform:8:channel", transform="hadamard:in")
    module = QuantLinear(q, None, "int8:token")
    assert module.prepared._columns == ()
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x), ql.matmul(x, q, "int8:token"), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(module.dequantize(), q.dequantize())
    assert module.packed.transform == q.transform


@pytest.mark.parametrize("activations", ["int8:token", "sdr4:g16:b8"])
def test_the_operator_is_traced(keeps_prepared, activations):
    module = QuantLinear(packed("uniform:8:channel"), None, activations)
    x = torch.randn(2, 72)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), module(x))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))


def test_what_is_integer_on_the_cpu():
    q = packed("uniform:4:g64", k=128)
    assert ql.matmul_is_integer(q, "int8:token")
    assert ql.matmul_is_integer(ql.prepare(q), "int8:token")
    answer = ql.matmul_is_integer(q, "int8:g7")
    assert not answer
    assert "int8:g7" in answer.reason
    assert "exact" in ql.matmul_is_integer(q, "exact").reason
    assert "codebook" in ql.matmul_is_integer(packed("codebook:nf4:g24"), "int8:token").reason
    with pytest.raises(TypeError, match="q"):
        ql.matmul_is_integer(np.zeros(3), "int8:token")
    with pytest.raises(ValueError, match="activations"):
        ql.matmul_is_integer(q, "int8:tensor:static")
