"""Rounded activations in products on a CUDA device: of integers, or of the values."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import quantloom as ql
import torch
from cuda_cases import HALVES, UNIT, needs_cuda, same_planes
from quantloom.nn import QuantLinear

pytestmark = needs_cuda

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
COLUMNS = (3, 64, 130)
OUTLIERS = "int8:token:outliers=6:columns=3,64,130"
WEIGHTS = [
    "uniform:8:channel",
    "uniform:8:tensor",
    "uniform:4:channel:asym",
    "uniform:2:channel:bf16",
    "sdr:4:g16",
]
GROUPS = [
    "uniform:4:g128",
    "uniform:4:g64:asym",
    "uniform:8:g128",
    "uniform:8:g64:asym",
    "uniform:6:g32:asym",
]
ACTIVATIONS = [
    "int8:token",
    "int8:token:asym",
    "int4:token",
    "int8:tensor",
    "int8:tensor:static=0.04",
    "int8:tensor:asym:static=0.04,-3",
    "sdr4:g16:b8",
    OUTLIERS,
]
# Products of rounded values: of groups of other sizes or with outliers, activations with a scale for each
# group, or outliers that the batch decides.
ROUNDED = [
    ("uniform:4:g16", "int8:token"),
    ("uniform:4:g64", "int8:g64"),
    ("uniform:8:channel", "int8:g50"),
    ("uniform:8:channel", "int8:token:outliers=3"),
    ("codebook:nf4:g64", "int8:token"),
    ("uniform:1:channel", "int4:token"),
    ("sdr:4:g16", "sdr4:g16:b16"),
]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(17)
        yield


def integers_run() -> bool:
    """With outliers, too."""
    return torch.cuda.get_device_capability() == (9, 0)


needs_integers = pytest.mark.skipif(
    torch.cuda.is_available() and not integers_run(), reason="needs a device of compute capability 9.0"
)


def weights(spec: str, activations: str = "int8:token", n: int = 96, k: int = 200) -> ql.PackedTensor:
    """On the CPU; with columns in float16 where activations have static outliers."""
    w = torch.randn(n, k)
    q = ql.quantize(w, spec)
    return ql.keep_columns(q, w, COLUMNS) if activations == OUTLIERS else q


def inputs(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """On the CPU, with inputs that are much larger than the others."""
    x = torch.randn(*shape)
    x[..., 3] *= 20
    return x.to(dtype)


def assert_near(
    y: torch.Tensor,
    x: torch.Tensor,
    q: ql.PackedTensor,
    activations: str,
    bias: torch.Tensor | None = None,
    decoded: bool = False,
) -> None:
    """`y` is what the CPU computes with these activations, within the rounding of y's dtype, and of outlier
    weights to float16. `decoded`: rounded activations and weights are rounded to the dtype, too."""
    q = q.to("cpu")
    x = x.detach().cpu().float()
    expected = ql.matmul(x, q, activations, bias=None if bias is None else bias.detach().cpu().float())
    rounded = ql.round_activations(x, activations)
    w = q.dequantize()
    terms = rounded.abs() @ w.abs().T
    kept = list(COLUMNS) if "columns" in activations else []
    outliers = rounded[..., kept].abs() @ w[:, kept].abs().T
    unit = UNIT[y.dtype]
    bound = unit * expected.abs() + 2.0**-10 * outliers + (2 * unit if decoded else 2.0**-18) * terms + 1e-6
    assert y.shape == expected.shape
    error = (y.detach().float().cpu() - expected).abs()
    assert bool((error <= bound).all()), f"{float((error - bound).max())} beyond the bound"


# -- ql.matmul ----------------------------------------------------------------------------------------------


@needs_integers
@pytest.mark.parametrize(
    ("spec", "activations"),
    [
        *((spec, activations) for spec in WEIGHTS for activations in ACTIVATIONS),
        *((spec, activations) for spec in GROUPS for activations in ACTIVATIONS if activations != OUTLIERS),
    ],
)
def test_products_of_integers(spec, activations):
    q = weights(spec, activations)
    there = q.to("cuda")
    answer = ql.matmul_is_integer(there, activations)
    assert answer, answer.reason
    assert ql.can_matmul(there, activations=activations)
    for dtype in HALVES:
        bias = torch.randn(96, device="cuda", dtype=dtype)
        for m in (1, 5, 70):
            x = inputs(m, 200, dtype=dtype)
            y = ql.matmul(x.cuda(), there, activations, bias=bias)
            assert y.dtype == dtype
            assert_near(y, x, q, activations, bias)
            own = ql.prepare(there, activations=activations)
            assert torch.equal(ql.matmul(x.cuda(), own, activations, bias=bias), y)
            assert torch.equal(ql.matmul(x.cuda(), there, activations, bias=bias, kernel="integer_tiles"), y)
    prepared = ql.prepare(there, activations=activations)
    assert "integers" in prepared.planes
    assert same_planes(prepared.unprepare(), q)
    assert torch.equal(prepared.dequantize().cpu(), q.dequantize())


@pytest.mark.parametrize(("spec", "activations"), ROUNDED)
def test_products_of_rounded_values(spec, activations):
    q = weights(spec)
    there = q.to("cuda")
    answer = ql.matmul_is_integer(there, activations)
    assert not answer
    assert answer.reason
    assert ql.can_matmul(there, activations=activations)
    for dtype in HALVES:
        x = inputs(5, 200, dtype=dtype)
        assert_near(ql.matmul(x.cuda(), there, activations), x, q, activations, decoded=True)
    with pytest.raises(RuntimeError, match="integer_tiles"):
        ql.matmul(inputs(5, 200).cuda(), there, activations, kernel="integer_tiles")


@pytest.mark.parametrize("spec", ["uniform:8:channel", "sdr:4:g16"])
def test_float32_is_rounded_and_decoded(spec):
    q = weights(spec)
    there = q.to("cuda")
    assert "float32" in ql.matmul_is_integer(there, "int8:token", torch.float32).reason
    x = inputs(5, 200, dtype=torch.float32)
    assert_near(ql.matmul(x.cuda(), there, "int8:token"), x, q, "int8:token", decoded=True)
    prepared = ql.prepare(there, activations="int8:token")
    assert_near(ql.matmul(x.cuda(), prepared, "int8:token"), x, q, "int8:token", decoded=True)


def test_digits_are_multiplied_exactly_too():
    q = weights("sdr:4:g16")
    x = inputs(5, 200)
    y = ql.matmul(x.cuda(), q.to("cuda"))
    torch.testing.assert_close(y.float().cpu(), x.float() @ q.dequantize().T, rtol=2e-3, atol=0.05)
    assert torch.equal(q.to("cuda").dequantize().cpu(), q.dequantize())


@needs_integers
def test_one_tensor_serves_several_formats():
    q = weights("uniform:8:channel")
    there, x = q.to("cuda"), inputs(3, 200)
    for activations in ("exact", "int8:token", "int8:g50", "int4:token", "int8:token:outliers=6:columns=3"):
        y = ql.matmul(x.cuda(), there, activations)
        if activations == "exact":
            torch.testing.assert_close(y.float().cpu(), x.float() @ q.dequantize().T, rtol=2e-3, atol=0.05)
        else:
            assert_near(y, x, q, activations, decoded=True)


@needs_integers
def test_outliers_elsewhere_are_rounded_values():
    w = torch.randn(96, 200)
    q = ql.keep_columns(ql.quantize(w, "uniform:8:channel"), w, (4, 64, 130))
    there, x = q.to("cuda"), inputs(3, 200)
    answer = ql.matmul_is_integer(there, OUTLIERS)
    assert not answer
    assert "outliers lie in the columns" in answer.reason
    assert_near(ql.matmul(x.cuda(), there, OUTLIERS), x, q, OUTLIERS, decoded=True)


@needs_integers
@pytest.mark.parametrize("activations", ["int8:token", "int4:token:asym", "sdr4:g16:b8", OUTLIERS])
def test_a_token_does_not_depend_on_the_others(activations):
    q = weights("uniform:8:channel", activations, 300, 500).to("cuda")
    module = QuantLinear(q, None, activations)
    for m in (2, 9, 64, 200):
        x = inputs(m, 500).cuda()
        y, through = ql.matmul(x, q, activations), module(x)
        assert torch.equal(y, through)
        for token in (0, m // 2, m - 1):
            assert torch.equal(ql.matmul(x[token : token + 1], q, activations)[0], y[token])
            assert torch.equal(module(x[token]), y[token])


@needs_integers
def test_shapes_and_strides():
    q = weights("uniform:8:channel").to("cuda")
    x = inputs(2, 3, 200).cuda()
    y = ql.matmul(x, q, "int8:token")
    assert y.shape == (2, 3, 96)
    wide = torch.randn(6, 211, device="cuda", dtype=torch.float16)
    wide[:, 5:205] = x.reshape(6, 200)
    assert torch.equal(ql.matmul(wide[:, 5:205], q, "int8:token"), y.reshape(6, 96))
    assert torch.equal(ql.matmul(x[0, 0], q, "int8:token"), y[0, 0])
    assert ql.matmul(x[:0], q, "int8:token").shape == (0, 3, 96)
    for n, k in ((0, 200), (96, 0)):
        empty = ql.quantize(torch.randn(n, k), "uniform:8:channel").to("cuda")
        found = ql.matmul(torch.randn(4, k, device="cuda", dtype=torch.float16), empty, "int8:token")
        assert torch.equal(found, found.new_zeros(4, n))


def test_wrong_arguments_are_named():
    q = weights("uniform:8:channel").to("cuda")
    x = inputs(2, 200).cuda()
    with pytest.raises(RuntimeError, match=r"activations.*int8.*exact"):
        ql.matmul(x, q, "int8")
    with pytest.raises(ValueError, match=r"activations.*int8:tensor:static.*scale"):
        ql.matmul(x, q, "int8:tensor:static")
    with pytest.raises(ValueError, match=r"x.*\[2, 199\].*200"):
        ql.matmul(x[:, :199], q, "int8:token")
    with pytest.raises(TypeError, match=r"x.*cpu.*cuda"):
        ql.matmul(x.cpu(), q, "int8:token")
    with pytest.raises(RuntimeError, match=r"integer_tiles.*exact"):
        ql.matmul(x, q, kernel="integer_tiles")
    with pytest.raises(RuntimeError, match=r"no CUDA kernel"):
        ql.prepare(
            ql.quantize(torch.randn(8, 64), "vector_codebook:16x3:g6").to("cuda"), activations="int8:token"
        )


@needs_integers
def test_values_that_are_not_finite_make_their_token_nan():
    q = weights("uniform:8:channel").to("cuda")
    x = inputs(4, 200).cuda()
    clean = ql.matmul(x, q, "int8:token")
    x[2, 7] = float("inf")
    y = ql.matmul(x, q, "int8:token")
    assert bool(y[2].isnan().all())
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_says_what_it_can_multiply():
    for dtype in (*HALVES, torch.float32):
        for spec in ("uniform:4:g64", "uniform:8:channel", "sdr:4:g16"):
            for activations in ("exact", "int8:token", "int8:g16", "sdr4:g16:b16"):
                assert ql.can_matmul(spec, 3, dtype, "cuda", activations)
    assert not ql.can_matmul("vector_codebook:16x3:g6", 1, "float16", "cuda", "int8:token")
    assert "scale" in ql.can_matmul("uniform:4", 1, "float16", "cuda", "int8:tensor:static").reason
    assert ql.can_matmul("uniform:8:channel", 1, "float16", "cuda", "int8:token", "integer_tiles").yes == (
        integers_run()
    )
    for kernel, activations in (("integer_tiles", "int8:token"), ("integer_tiles", "exact")):
        possible, reason = ql.can_matmul("uniform:4:g16", 1, "float16", "cuda", activations, kernel)
        assert not possible
        assert reason
    # Significant digits have no other order than that of integers, which takes shared outlier columns.
    w = torch.randn(96, 200)
    digits = ql.quantize(w, "sdr:4:g16")
    kept = ql.keep_columns(digits, w, (1, 7)).to("cuda")
    x = inputs(2, 200).cuda()
    assert ql.can_matmul(kept, activations="int8:token:outliers=6:columns=1,7")
    for activations in ("exact", "int8:token"):
        assert "outliers lie" in ql.can_matmul(kept, activations=activations).reason
        with pytest.raises(RuntimeError):
            ql.matmul(x, kept, activations)


# -- graphs, compilation ------------------------------------------------------------------------------------


@needs_integers
@pytest.mark.parametrize("activations", ["int8:token", "int8:tensor", OUTLIERS])
@pytest.mark.parametrize("what", ["matmul", "module"])
def test_is_captured_in_graphs(what, activations):
    q = weights("uniform:8:channel", activations)
    there = q.to("cuda")
    module = QuantLinear(there, None, activations)

    def call(x):
        return module(x) if what == "module" else ql.matmul(x, there, activations)

    static = inputs(4, 200).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(static)
    for _ in range(3):
        x = inputs(4, 200)
        static.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, call(x.cuda()))
        assert_near(y, x, q, activations)


def test_rounded_values_are_captured_in_graphs():
    q = weights("uniform:4:g64")
    module = QuantLinear(q.to("cuda"), None, "int8:token")
    static = inputs(4, 200).cuda()
    module(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(static)
    x = inputs(4, 200)
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert_near(y, x, q, "int8:token", decoded=True)


@pytest.mark.parametrize("mode", ["aot_eager", "default", "reduce-overhead"])
@pytest.mark.parametrize("spec", ["uniform:8:channel", "uniform:4:g64"])
def test_is_compiled(spec, mode):
    torch.compiler.reset()
    module = QuantLinear(weights(spec).to("cuda"), torch.randn(96, device="cuda").half(), "int8:token")
    if mode == "aot_eager":
        compiled = torch.compile(module, fullgraph=True, backend=mode)
    else:
        pytest.importorskip("triton")
        compiled = torch.compile(module, fullgraph=True, mode=mode)
    for m in (2, 5):
        for _ in range(4):
            x = inputs(m, 200).cuda()
            with torch.no_grad():
                assert torch.equal(compiled(x).clone(), module(x))


@pytest.mark.parametrize("spec", ["uniform:8:channel", "uniform:4:g64"])
def test_is_exported(spec):
    module = QuantLinear(weights(spec).to("cuda"), torch.randn(96, device="cuda").half(), "int8:token")
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(module, (inputs(3, 200).cuda(),), dynamic_shapes=({0: tokens},))
    x = inputs(5, 200).cuda()
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("spec", ["uniform:8:channel", "uniform:4:g64"])
def test_the_operator_of_canonical_planes(spec):
    q, x = weights(spec).to("cuda"), inputs(3, 200).cuda()
    arguments = (list(q.planes.values()), ",".join(q.planes), q.format.to_json(), 96, 200)
    for activations in ("int8:token", "exact", "int8:g50", "int8:token"):
        y = torch.ops.quantloom.matmul(x, *arguments, activations)
        assert torch.equal(y, ql.matmul(x, q, activations))


@needs_integers
def test_operators_pass_the_checks_of_torch():
    prepared = ql.prepare(weights("uniform:4:channel:asym").to("cuda"), activations="int8:token")
    planes = list(prepared.planes.values())
    arguments = (",".join(prepared.planes), prepared.format.to_json(), 96, 200, "int8:token")
    x = inputs(3, 200).cuda().requires_grad_()
    bias = torch.randn(96, device="cuda", dtype=torch.float16)
    torch.library.opcheck(torch.ops.quantloom.linear_integers.default, (x, planes, bias, *arguments))


# -- QuantLinear --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "activations", "integer"),
    [
        *((spec, "int8:token", True) for spec in WEIGHTS + GROUPS),
        *(("uniform:8:channel", activations, True) for activations in ACTIVATIONS),
        *((spec, activations, spec.startswith("sdr")) for spec, activations in ROUNDED),
    ],
)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_modules(spec, activations, integer, dtype):
    q = weights(spec, activations)
    module = QuantLinear(q, torch.randn(96), activations)
    there = copy.deepcopy(module).to("cuda", dtype)
    if integers_run():
        assert ("prepared_integers" in dict(there.named_buffers())) == integer
    x = inputs(5, 200, dtype=dtype)
    y = there(x.cuda())
    assert_near(y, x, q, activations, there.bias, decoded=True)
    assert same_planes(there.packed, q)
    assert repr(there) == repr(module)
    assert torch.equal(there.dequantize().cpu(), q.dequantize())
    back = there.cpu()
    assert same_planes(back.packed, q)
    assert back.prepared is None


@needs_integers
def test_groups_of_scattered_columns_are_rounded():
    hessian = ql.Hessian(256)
    hessian.add(torch.randn(300, 256) * torch.randn(256).exp())
    q = ql.quantize(torch.randn(24, 256), "uniform:4:g64", ql.GPTQ(hessian, static_groups=False))
    assert "group_index" in q.planes
    there = q.to("cuda")
    assert "group_index" in ql.matmul_is_integer(there, "int8:token").reason
    x = inputs(5, 256)
    x[..., 3] /= 20
    y = ql.matmul(x.cuda(), there, "int8:token").float().cpu()
    expected = ql.matmul(x.float(), q, "int8:token")
    assert (y - expected).abs().max() < 2e-2 * expected.abs().max()


@needs_integers
def test_other_activations_bring_another_order():
    q = weights("uniform:8:channel")
    module, x = QuantLinear(q.to("cuda")), inputs(3, 200)
    for activations, integer in [
        ("int8:token", True),
        ("int8:g50", False),
        ("int8:tensor:static=0.05", True),
        ("int8:token:outliers=6:columns=3,9", True),
        ("exact", False),
    ]:
        module.activations = activations
        assert ("prepared_integers" in dict(module.named_buffers())) == integer
        assert str(module.activations) == activations
        if activations != "exact":
            assert bool(ql.matmul_is_integer(module.prepared, module.activations)) == integer
            y = module(x.cuda()).float().cpu()
            near = ql.matmul(x.float(), q, activations)
            torch.testing.assert_close(y, near, rtol=4e-3, atol=4e-3 * float(near.abs().max()))
        assert same_planes(module.packed, q)
    module.activations = "int8"
    with pytest.raises(RuntimeError, match=r"activations.*int8.*exact"):
        module(x.cuda())


@pytest.mark.parametrize("activations", ["int8:token", OUTLIERS])
def test_states(activations):
    source = QuantLinear(weights("uniform:8:channel", activations), torch.randn(96), activations).to("cuda")
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    x = inputs(3, 200).cuda()
    expected = source.half()(x)
    host = QuantLinear(weights("uniform:8:channel", activations), torch.randn(96), activations)
    host.load_state_dict(state)
    assert same_planes(host.packed, source.packed)
    for assign in (False, True):
        module = copy.deepcopy(host).to("cuda")
        other = QuantLinear(weights("uniform:8:channel", activations), torch.randn(96), activations)
        module.load_state_dict(other.state_dict(), assign=False)
        module.load_state_dict(state, assign=assign)
        assert torch.equal(module.half()(x), expected)
    empty = copy.deepcopy(host).to("meta").to_empty(device="cuda")
    empty.load_state_dict(state)
    assert torch.equal(empty.half()(x), expected)


@needs_integers
def test_a_captured_graph_sees_new_weights():
    module = QuantLinear(weights("uniform:8:channel").to("cuda"), None, "int8:token")
    x = inputs(3, 200).cuda()
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    other = QuantLinear(weights("uniform:8:channel").to("cuda"), None, "int8:token")
    module.load_state_dict(other.state_dict())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, other(x))


@pytest.mark.parametrize(("spec", "dtype"), [("uniform:8:channel", d) for d in [*HALVES, torch.float32]])
def test_gradients_pass_the_rounding(spec, dtype):
    q = weights(spec)
    bias = torch.nn.Parameter(torch.randn(96, device="cuda", dtype=dtype))
    module = QuantLinear(q.to("cuda"), bias, "int8:token")
    x = inputs(2, 3, 200, dtype=dtype).cuda().requires_grad_()
    y = module(x)
    factors = torch.randn_like(y)
    y.backward(factors)
    expected = factors @ q.dequantize().to("cuda", dtype)
    torch.testing.assert_close(x.grad, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(bias.grad.float(), factors.float().sum((0, 1)), rtol=2e-2, atol=2e-2)


def test_autocast():
    q = weights("uniform:8:channel")
    module = QuantLinear(q.to("cuda"), torch.randn(96, device="cuda"), "int8:token")
    x = inputs(5, 200, dtype=torch.float32)
    with torch.autocast("cuda", torch.float16):
        y = module(x.cuda())
    assert y.dtype == torch.float16
    assert_near(y, x.half(), q, "int8:token", module.bias.half(), decoded=True)


def test_transforms_come_before_the_rounding():
    for transform in ("hadamard:in", "hadamard"):
        q = ql.quantize(torch.randn(96, 256), "uniform:8:channel", transform=transform)
        module = QuantLinear(q, None, "int8:token").to("cuda")
        x = inputs(5, 256)
        expected = ql.matmul(x.float(), q, "int8:token")
        scale = float(expected.abs().max())
        # A value between two codes may go to either, as the rotation is computed in another order.
        for y in (module(x.cuda()), ql.matmul(x.cuda(), q.to("cuda"), "int8:token")):
            torch.testing.assert_close(y.float().cpu(), expected, rtol=0, atol=0.02 * scale)


# -- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "activations", "rounding", "integer"),
    [
        ("uniform:8:channel", "int8:token", "nearest", True),
        ("uniform:8:channel", "int8:token", "smoothquant", True),
        ("uniform:8:channel", "int8:token:outliers=2:static-outliers", "nearest", True),
        ("uniform:8:channel", "int8:tensor:static", "nearest", True),
        ("sdr:4:g16", "sdr4:g16:b8", "nearest", True),
        ("uniform:4:g64", "int8:token", "nearest", True),
        ("uniform:4:g16", "int8:token", "nearest", False),
    ],
)
def test_models(tmp_path, spec, activations, rounding, integer):
    pytest.importorskip("transformers")
    recipe = ql.Recipe.parse(spec, rounding=rounding, activations=activations)
    text = torch.arange(512) % 97
    ql.models.quantize(
        TINY, recipe, calibration=text, output=tmp_path / "out", windows=2, window=64, held_out_windows=1
    )
    reference = ql.models.load(tmp_path / "out", torch.float32)
    halves = ql.models.load(tmp_path / "out", torch.float16)
    model = ql.models.load(tmp_path / "out", torch.float16, device="cuda")
    modules = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert modules
    assert all(isinstance(m.activations, ql.ActivationFormat) for m in modules)
    if integers_run():
        assert all(bool(ql.matmul_is_integer(m.prepared, m.activations)) == integer for m in modules)
    ids = text[None, :32]
    with torch.inference_mode():
        exact = reference(input_ids=ids).logits
        near = halves(input_ids=ids).logits.float()
        logits = model(input_ids=ids.cuda()).logits.float().cpu()
    # Layers in float16 move activations to other codes: the fewer bits, the more it matters. On the CPU, too.
    error, own = [(y - exact).square().mean().sqrt() / exact.std() for y in (logits, near)]
    assert error < 1.5 * own + 1e-3
    assert own < 0.2
    state, other = model.state_dict(), reference.state_dict()
    assert state.keys() == other.keys()
    for name in other:
        if name.endswith((".codes", ".scales", ".shifts")):
            assert torch.equal(state[name].cpu(), other[name]), name
