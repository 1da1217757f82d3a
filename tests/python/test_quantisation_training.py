"""Weights that are quantized in every pass: values as the formats', gradients straight through."""

import copy
import itertools

import pytest

torch = pytest.importorskip("torch")
import safetensors.torch
from quantloom import fit as F
from quantloom import formats as Q
from quantloom import quantisation_training as T
from torch import nn, tensor
from training_cases import INT8_ROWS, SIGN_3D8, TRAINED, spec, three_layers

# Straight-through rounding


def test_ste_values_and_gradients():
    x = tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, -0.2, -0.4, 1.2, 1.4], requires_grad=True)
    centroids = tensor([0, 0.5, 1.0], requires_grad=True)
    y = T.Quantise_STE.apply(x, centroids, False)
    assert y.equal(tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]))
    y.backward(torch.full_like(y, 2.0))
    assert x.grad.equal(torch.full_like(x, 2.0))
    assert centroids.grad.equal(tensor([8.0, 4.0, 8.0]))

    x.grad = None
    T.Quantise_STE.apply(x, centroids, True).backward(torch.full_like(y, 2.0))
    assert x.grad.equal(tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 2.0, 0.0]))


@pytest.mark.parametrize("clip", [False, True])
def test_ste_against_a_loop(rng, clip):
    x = torch.from_numpy(3 * rng.standard_normal((7, 13))).float().requires_grad_()
    centroids = torch.from_numpy(rng.standard_normal(5)).float().sort().values.requires_grad_()
    gradient = torch.from_numpy(rng.standard_normal((7, 13))).float()
    y = T.Quantise_STE.apply(x, centroids, clip)
    y.backward(gradient)
    c = centroids.tolist()
    low, high = c[0] - (c[1] - c[0]) / 2, c[-1] + (c[-1] - c[-2]) / 2
    sums = [0.0] * 5
    for index in itertools.product(range(7), range(13)):
        value = x[index].item()
        nearest = min(range(5), key=lambda i: abs(value - c[i]))
        assert y[index].item() == c[nearest]
        sums[nearest] += gradient[index].item()
        passes = not clip or low <= value <= high
        assert x.grad[index].item() == (gradient[index].item() if passes else 0)
    torch.testing.assert_close(centroids.grad, tensor(sums))


def test_ste_needs_only_what_is_asked_for():
    x, centroids = torch.randn(4, requires_grad=True), tensor([0.0, 1.0])
    T.Quantise_STE.apply(x, centroids, False).sum().backward()
    assert centroids.grad is None
    centroids.requires_grad_()
    T.Quantise_STE.apply(x.detach(), centroids, False).sum().backward()
    assert centroids.grad.sum() == 4


def test_straight_through():
    x = torch.randn(5, requires_grad=True)
    y = T.StraightThrough.apply(x, x.detach().round())
    assert y.equal(x.detach().round())
    (y * 3).sum().backward()
    assert x.grad.equal(torch.full((5,), 3.0))


# Weights

GRID = [
    (bits, family, block, scaling, compressor, sparse)
    for bits in (3, 4)
    for family in ("int", "fp", "normal", "lloyd_max")
    for block, scaling in (((None, None), "rms"), ((1, None), "absmax"), ((1, 64), "signmax"))
    for compressor in (None, "optimal")
    for sparse in (0, 1e-2)
    if (family == "int" or compressor is None) and (family == "int" or scaling != "signmax")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "family", "block", "scaling", "compressor", "sparse"), GRID)
def test_weight_matches_format(bits, family, block, scaling, compressor, sparse, dtype):
    torch.manual_seed(100)
    reference = torch.randn(64, 256).pow(3).to(dtype)
    fmt = F.Scaled(
        bits,
        family,
        Q.BFLOAT16,
        block,
        scaling,
        sparse_ratio=sparse,
        sparse_format=Q.BFLOAT16,
        compressor=compressor,
        args={"smoothing": 0} if compressor else {},
    ).fit(reference)
    expected = fmt.quantise(reference)
    for mode in ("parameter", "dynamic"):
        weight = T.Weight(reference, fmt, mode, clip_gradient=False)
        assert weight.centroids.requires_grad
        trained_bits = weight.count_bits(torch.bfloat16)
        weight.centroids.requires_grad_(False)
        value = weight()
        assert value.dtype == dtype
        # Elements halfway between two centroids may go to the other one.
        assert (value != expected).float().mean() < 2e-3
        error, expected_error = Q.rmse_norm(reference, value), Q.qrmse_norm(fmt, reference)
        torch.testing.assert_close(error, expected_error, rtol=0.02, atol=0)
        # Signed floats have two zeros, which count as one centroid here.
        rel = 0.1 if family == "fp" else 1e-3
        counted = weight.count_bits(torch.bfloat16)
        assert counted == pytest.approx(fmt.count_bits_tensor(reference), rel=rel)
        assert trained_bits == counted + 16 * weight.centroids.numel()


def test_weight_gradients():
    reference = torch.linspace(-10, 10, 128).bfloat16()
    fmt = F.Scaled(3, "int", Q.BFLOAT16, (32,), "absmax", sparse_format=Q.BFLOAT16, sparse_ratio=3 / 128).fit(
        reference
    )
    weight = T.Weight(reference, fmt, "parameter", clip_gradient=False)
    value = weight()
    value.backward(torch.ones_like(value))
    assert weight.master.grad.sum() == 125
    assert weight.scale.grad.ne(0).any()
    assert weight.centroids.grad.ne(0).all()
    assert weight.sparse_weight.grad.equal(torch.ones(3, dtype=torch.bfloat16))
    assert weight.master.grad.flatten()[weight.sparse_idx].eq(0).all()


@pytest.mark.parametrize("scaling", ["absmax", "rms", "signmax"])
@pytest.mark.parametrize("mode", ["parameter", "dynamic"])
def test_gradients_are_those_of_the_formula(mode, scaling):
    """q held fixed: value = s * (m / s + const), so that a slow formula in float64 has the same gradient."""
    torch.manual_seed(3)
    master = torch.randn(4, 6)
    fmt = Q.LinearScalingFormat(Q.IntFormat(3), Q.FP32, (2, 3), scaling)
    weight = T.Weight(master, fmt, mode, clip_gradient=False)
    gradient = torch.randn(4, 6)
    weight().backward(gradient)

    m = master.double().requires_grad_()
    blocks = m.view(2, 2, 2, 3)
    if mode == "parameter":
        s = leaf = weight.scale.detach().double().view(2, 1, 2, 1).requires_grad_()
    elif scaling == "absmax":
        s = blocks.abs().amax((1, 3), keepdim=True) / 3
    elif scaling == "rms":
        s = blocks.square().mean((1, 3), keepdim=True).sqrt()
    else:
        high, low = blocks.amax((1, 3), keepdim=True), blocks.amin((1, 3), keepdim=True)
        s = torch.where(high >= -low, high, low) / -4
    x = blocks / s
    q = x + (x.detach().round().clamp(-4, 3) - x).detach()
    (q * s).reshape(4, 6).backward(gradient.double())
    torch.testing.assert_close(weight.master.grad, m.grad.float(), rtol=1e-4, atol=1e-5)
    if mode == "parameter":
        torch.testing.assert_close(weight.scale.grad, leaf.grad.float().view(2, 2), rtol=1e-4, atol=1e-5)


def test_zero_blocks_and_unsorted_centroids():
    fmt = Q.LinearScalingFormat(Q.IntFormat(3), Q.BFLOAT16, (1, 4), "absmax")
    for mode in ("parameter", "dynamic"):
        weight = T.Weight(torch.zeros(2, 8), fmt, mode, clip_gradient=True)
        weight().sum().backward()
        assert weight().eq(0).all()
        assert all(parameter.grad.isfinite().all() for parameter in weight.parameters())
    weight = T.Weight(torch.randn(2, 8), fmt, "parameter", clip_gradient=False)
    before = weight()
    with torch.no_grad():
        weight.centroids.copy_(weight.centroids.flip(0))  # training may swap two
    assert weight().equal(before)


def test_weight_copies_what_it_is_given():
    given = torch.randn(4, 8)
    weight = T.Weight(
        given, Q.LinearScalingFormat(Q.IntFormat(3), Q.FP32, (1, 8), "absmax"), "dynamic", False
    )
    with torch.no_grad():
        weight.master.zero_()
    assert given.ne(0).all()
    transposed = torch.randn(8, 4).T
    fmt = spec(block=(1, 8), sparse_format=Q.BFLOAT16, sparse_ratio=0.1).fit(transposed)
    torch.testing.assert_close(T.Weight(transposed, fmt, "dynamic", False)(), fmt.quantise(transposed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["parameter", "dynamic"])
@pytest.mark.parametrize("shape", [(32, 64), (33, 5), (1, 3)])
def test_sign_3d8_weight_matches_format(mode, dtype, shape):
    torch.manual_seed(100)
    reference = torch.randn(shape).mul(0.01).to(dtype)
    weight = T.Sign3D8Weight(reference, SIGN_3D8, scaling_mode=mode)
    weight.centroids.requires_grad_(False)
    weight().pow(2).sum().backward()
    torch.testing.assert_close(weight(), SIGN_3D8.quantise(reference))
    assert weight.count_bits(torch.bfloat16) == SIGN_3D8.count_bits(shape)
    assert weight.master.grad.abs().sum() > 0
    assert getattr(weight, "scale", None) is None or weight.scale.grad is None
    assert weight.centroids.grad is None


def test_sign_3d8_gradients():
    torch.manual_seed(2)
    weight = T.Sign3D8Weight(torch.randn(6, 5), SIGN_3D8, "parameter")
    gradient = torch.randn(6, 5)
    weight().backward(gradient)
    torch.testing.assert_close(weight.master.grad, gradient)
    scaled = gradient * weight.scale.detach()
    signed = torch.where(weight.master.detach() < 0, -scaled, scaled)
    torch.testing.assert_close(weight.centroids.grad.sum(), signed.sum())
    # A trained table is rounded to whole numbers, not cut off.
    with torch.no_grad():
        before = weight()
        weight.centroids.sub_(0.4)
        torch.testing.assert_close(weight(), before)


@pytest.mark.parametrize(
    ("fmt", "match"),
    [
        (Q.BFLOAT16, "expected a Q.LinearScalingFormat"),
        (SIGN_3D8, "expected a Q.LinearScalingFormat of scalars"),
        (Q.RandomRotationFormat(INT8_ROWS, (0,), 1), "expected a Q.LinearScalingFormat"),
        (Q.LinearScalingFormat(Q.BFLOAT16, Q.FP32, (1, None), "absmax"), "no list of centroids"),
    ],
)
def test_weight_refuses_formats(fmt, match):
    with pytest.raises(ValueError, match=match):
        T.Weight(torch.randn(4, 8), fmt, "dynamic", False)


# Modules


def test_convert_embedding():
    torch.manual_seed(100)
    model = nn.Embedding(100, 16, padding_idx=0)
    weight = model.weight.detach().clone()
    ids = torch.tensor([3, 0, 99])
    holder = model
    T.convert(model, spec(block=(1, 8)), "dynamic", clip_gradient=False)
    assert holder is model
    assert isinstance(model, T.Embedding)
    assert model(ids).shape == (3, 16)
    expected = spec(block=(1, 8)).fit(weight).quantise(weight)[ids]
    torch.testing.assert_close(model(ids), expected)
    model(ids).sum().backward()
    assert model.weight.master.grad[0].eq(0).all(), "the padding gets no gradient of its own"


def test_convert_quantises_activations():
    torch.manual_seed(100)
    reference = nn.Sequential(nn.Linear(64, 32, bias=True))
    model = copy.deepcopy(reference)
    x = torch.randn(8, 16, 64).requires_grad_()
    T.convert(model, Q.BFLOAT16, "dynamic", clip_gradient=False, error_weight=None, activation_fmt=INT8_ROWS)
    quantised = INT8_ROWS.quantise(x.detach().view(-1, 64)).view_as(x).clone().requires_grad_()
    output, expected = model(x), reference(quantised)
    output.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, quantised.grad)


def test_convert_shares_what_was_shared():
    model = nn.ModuleDict({"a": nn.Embedding(24, 16), "b": nn.Linear(16, 24, bias=False)})
    model["b"].weight = model["a"].weight
    model["again"] = model["b"]
    T.convert(model, spec(block=(1, 16)), "parameter", False)
    assert model["a"].weight is model["b"].weight is model["again"].weight
    assert T.count_parameters(model) == 24 * 16
    fresh = nn.ModuleDict({"a": nn.Embedding(24, 16), "b": nn.Linear(16, 24, bias=False)})
    fresh["b"].weight = fresh["a"].weight
    fresh["again"] = fresh["b"]
    T.load_convert(fresh, T.save(model))
    assert fresh["a"].weight is fresh["b"].weight
    assert fresh["a"].weight().equal(model["a"].weight())


def test_convert_by_name():
    model = three_layers()
    T.convert(model, {"0.weight": spec(2), "2.weight": Q.BFLOAT16}, "dynamic", False)
    assert model[0].weight.centroids.numel() == 4
    assert isinstance(model[2].weight, T.UnquantisedWeight)
    for specs in ({"0.weight": spec()}, {"0.weight": spec(), "2.weight": spec(), "3.weight": spec()}):
        with pytest.raises(ValueError, match=r"fmt_spec: no entry for .* unknown weights"):
            T.convert(three_layers(), specs, "dynamic", False)


def test_convert_weighs_errors_by_full_names():
    model = nn.ModuleDict(
        {"x": nn.ModuleDict({"fc": nn.Linear(16, 16)}), "y": nn.ModuleDict({"fc": nn.Linear(16, 16)})}
    )
    weights = {f"{key}.fc.weight": torch.rand(16, 16) ** 4 for key in "xy"}
    search = F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms")
    expected = {
        key: search.fit(model[key]["fc"].weight.detach(), weights[f"{key}.fc.weight"]) for key in "xy"
    }
    T.convert(model, search, "dynamic", False, error_weight=weights)
    assert {key: model[key]["fc"].weight.fmt for key in "xy"} == expected
    with pytest.raises(ValueError, match="error_weight: got no entry"):
        T.convert(three_layers(), search, "dynamic", False, error_weight=weights)


def test_convert_refuses_before_it_replaces():
    class Odd(nn.Linear):
        pass

    cases = [
        (Odd(64, 64), spec(), TypeError, "got Odd"),
        (nn.Embedding(8, 64, max_norm=1.0), spec(), ValueError, "max_norm"),
        (nn.Linear(63, 64), spec(), ValueError, ""),  # 63 is no multiple of 64
        (nn.Linear(64, 64), INT8_ROWS.element_format, ValueError, "2.weight: fmt"),
        (nn.Linear(64, 64), "int3", TypeError, "fmt_spec: got str"),
    ]
    for layer, fmt, error, match in cases:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), layer)
        with pytest.raises(error, match=match):
            T.convert(model, {"0.weight": spec(), "2.weight": fmt}, "dynamic", False)
        assert type(model[0]) is nn.Linear
    for bad in ({"scaling_mode": "auto"}, {"mode": "twice"}, {"clip_gradient": 1}):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            T.convert(three_layers(), spec(), **{"scaling_mode": "dynamic", "clip_gradient": False, **bad})


def test_named_parameters_are_a_partition():
    model = three_layers()
    T.convert(model, TRAINED, "parameter", True, activation_fmt=INT8_ROWS)
    kinds = {kind: T.get_named_parameters(model, kind) for kind in ("weight", "scale", "centroids", "other")}
    assert {name for name, _ in kinds["other"]} == {"1.weight", "2.bias"}
    assert {name for name, _ in kinds["scale"]} == {"0.weight.scale", "2.weight.scale"}
    assert {name.rsplit(".", 1)[1] for name, _ in kinds["weight"]} == {"master", "sparse_weight"}
    every = [parameter for items in kinds.values() for _, parameter in items]
    assert len(every) == len(set(every)) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="kind"):
        T.get_named_parameters(model, "bias")


@pytest.mark.parametrize("mode", ["parameter", "dynamic"])
def test_convert_and_train(mode, tmp_path):
    reference = three_layers()
    x = torch.randn(512, 64)
    with torch.no_grad():
        expected = reference(x)
    model = copy.deepcopy(reference)
    T.convert(model, TRAINED, mode, clip_gradient=True, activation_fmt=INT8_ROWS)
    bits = T.count_bits(model, torch.bfloat16) / T.count_parameters(model)
    assert 3.25 < bits < 4
    quantised = T.count_parameters(model, include_other=False)
    assert quantised == 2 * 64 * 512
    assert T.count_parameters(model) == quantised + 512 + 64
    others = T.count_bits(model, torch.bfloat16) - T.count_bits(model, torch.bfloat16, include_other=False)
    assert others == 16 * (512 + 64)

    optimiser = torch.optim.Adam(
        [
            {"params": T.get_named_parameters(model, "weight"), "lr": 1e-4},
            {"params": T.get_named_parameters(model, "centroids"), "lr": 1e-4},
        ]
        + ([{"params": T.get_named_parameters(model, "scale"), "lr": 1e-4}] if mode == "parameter" else []),
        betas=(0.9, 0.9),
    )
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = (model(x) - expected).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.75

    state = T.save(model)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for given in (state, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        reloaded = copy.deepcopy(reference)
        T.load_convert(reloaded, given)
        assert reloaded(x).equal(model(x))
        assert T.count_bits(reloaded, torch.bfloat16) == T.count_bits(model, torch.bfloat16)
        again = T.save(reloaded)
        assert again.keys() == state.keys()
        assert all(again[name].equal(state[name]) for name in state)


def test_convert_and_train_sign_3d8():
    torch.manual_seed(100)
    reference = nn.Sequential(nn.Linear(128, 16, bias=False))
    model = copy.deepcopy(reference)
    T.convert(model, SIGN_3D8, "parameter", clip_gradient=False)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(64, 128)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(model(x), reference(x))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    reloaded = copy.deepcopy(reference)
    T.load_convert(reloaded, T.save(model))
    assert reloaded(x).equal(model(x))


def test_one_shot_equals_the_first_pass_then_trains_freely():
    torch.manual_seed(100)
    reference = nn.Sequential(nn.Linear(64, 512, bias=False))
    qat, one_shot = copy.deepcopy(reference), copy.deepcopy(reference)
    T.convert(qat, spec(block=(1, 8)), "dynamic", clip_gradient=False)
    T.convert(one_shot, spec(block=(1, 8)), "dynamic", clip_gradient=False, mode="one-shot")
    x = torch.randn(2048, 64)
    torch.testing.assert_close(one_shot(x), qat(x))
    with torch.no_grad():
        reference[0].weight.copy_(one_shot[0].weight.weight)
    for model in (reference, one_shot):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
        for _ in range(5):
            optimiser.zero_grad()
            model(x).pow(2).sum().backward()
            optimiser.step()
    assert reference[0].weight.equal(one_shot[0].weight.weight)
    fresh = nn.Sequential(nn.Linear(64, 512, bias=False))
    T.load_convert(fresh, T.save(one_shot))
    assert fresh(x).equal(one_shot(x))
    assert isinstance(fresh[0].weight, T.UnquantisedWeight)


def test_compile_and_no_grad_agree():
    model = three_layers()
    T.convert(model, TRAINED, "dynamic", False)
    x = torch.randn(4, 64)
    with torch.no_grad():
        plain = model(x)
    assert plain.equal(model(x).detach())
