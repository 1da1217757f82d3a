"""Trained weights as bytes, and vector tables in training."""

import itertools

import pytest

torch = pytest.importorskip("torch")
from quantloom import _training_weights
from quantloom import formats as Q
from quantloom import quantisation_training as T
from torch import nn
from training_cases import SIGN_3D8, spec, three_layers


def test_to_format_encodes_trained_weights():
    torch.manual_seed(1)
    for settings in ({}, {"compressor": "optimal", "scaling": "rms", "block": (None, None)}):
        weight = T.Weight(torch.randn(32, 64), spec(**settings).fit(torch.randn(32, 64)), "dynamic", False)
        with torch.no_grad():
            weight.master.add_(torch.randn(32, 64), alpha=0.1)
            weight.centroids.mul_(1.01)
        fmt = weight.to_format()
        assert fmt.quantise(weight.master.detach()).equal(weight().detach())
        assert fmt.encode(weight.master.detach()).decode().equal(weight().detach())
    fixed = T.Weight(torch.randn(32, 64), spec().fit(torch.randn(32, 64)), "parameter", False)
    with pytest.raises(ValueError, match="no format computes"):
        fixed.to_format()


def vectors(length=2, bits=2, **settings):
    return spec(bits, "lloyd_max", vq_length=length, vq_format=Q.BFLOAT16, **settings)


def moved(weight):
    """The weight with each parameter changed a little, as training does."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in weight.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.05)
        if weight.sparse_weight is not None:
            weight.master.view(-1)[weight.sparse_idx] = 0
    return weight


SPECS = {
    "blocks": spec(),
    "signmax": spec(scaling="signmax"),
    "channel t": spec(family="t", block=(1, None)),
    "sparse": spec(
        family="normal", scaling="rms", block=(None, None), sparse_format=Q.FP16, sparse_ratio=0.01
    ),
    "compressed": spec(scaling="rms", block=(None, None), compressor="optimal"),
    "compressed, sparse": spec(compressor="huffman", sparse_format=Q.BFLOAT16, sparse_ratio=0.01),
    "vectors": vectors(),
    "vectors, sparse": vectors(4, sparse_format=Q.BFLOAT16, sparse_ratio=0.01),
    "signs": SIGN_3D8,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["parameter", "dynamic"])
@pytest.mark.parametrize("name", SPECS)
def test_encoded_is_what_the_weight_gives(name, mode, dtype, tmp_path):
    torch.manual_seed(1)
    value = torch.randn(32, 128).pow(3).to(dtype)
    fmt = SPECS[name].fit(value) if hasattr(SPECS[name], "fit") else SPECS[name]
    weight = moved(T._weight(value, fmt, mode, False, "qat"))
    exact = weight.encode(Q.FP32) if mode == "parameter" else weight.encode()
    if weight.sparse_weight is not None:  # outliers are stored in their format, wider when they are trained
        with torch.no_grad():
            weight.sparse_weight.copy_(fmt.sparse_format.quantise(weight.sparse_weight))
    expected = weight().detach()
    assert exact.decode().equal(expected)
    exact.save(tmp_path / "weight.safetensors")
    assert Q.Encoded.load(tmp_path / "weight.safetensors").decode().equal(expected)
    if mode == "parameter":
        with torch.no_grad():
            weight.scale.copy_(Q.BFLOAT16.quantise(weight.scale.float()))
        assert weight.encode().decode().equal(weight().detach())
        assert weight.encode().nbytes < exact.nbytes
    else:
        with pytest.raises(ValueError, match="scale_format"):
            weight.encode(Q.FP32)
    if weight.sparse_weight is None and mode == "dynamic":
        assert weight.to_format().quantise(weight.master.detach()).equal(expected)


def test_encode_refuses():
    weight = T.Weight(torch.randn(4, 64), spec().fit(torch.randn(4, 64)), "parameter")
    with torch.no_grad():
        weight.master[0, 0] = torch.nan
    with pytest.raises(ValueError, match="master"):
        weight.encode()
    double = T.Weight(torch.randn(4, 64).double(), spec().fit(torch.randn(4, 64)), "parameter")
    with pytest.raises(TypeError, match="float64"):
        double.encode()


def test_module_is_encoded_by_name(tmp_path):
    model, plain = three_layers(), three_layers()
    T.convert(model, spec(), "parameter", True)
    encoded = T.encode(model, Q.FP32)
    assert list(encoded) == ["0.weight", "2.weight"]
    Q.save_encoded(tmp_path / "weights.safetensors", encoded)
    T.load_encoded(plain, Q.load_encoded(tmp_path / "weights.safetensors"))
    x = torch.randn(3, 64)
    assert plain(x).equal(model(x))
    mixed, fresh = three_layers(), three_layers()
    T.convert(mixed, {"0.weight": spec(), "2.weight": Q.BFLOAT16}, "dynamic", False)
    with torch.no_grad():
        mixed[2].weight.weight.add_(1)
    encoded = T.encode(mixed)
    assert encoded["2.weight"].equal(mixed[2].weight.weight)
    T.load_encoded(fresh, encoded)
    assert fresh(x).equal(mixed(x))


def test_load_encoded_refuses():
    model = three_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    damaged = Q.IntFormat(3).encode(torch.ones(512, 64))
    damaged.planes.clear()
    for tensors, match in (
        ({"0.weight": torch.zeros(512, 64), "9.weight": torch.zeros(1)}, "9.weight"),
        ({"0.weight": torch.zeros(64, 512)}, "shape"),
        ({"2.bias": torch.zeros(64), "0.weight": damaged}, "codes"),
    ):
        with pytest.raises(ValueError, match=match):
            T.load_encoded(model, tensors)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_shared_weights_are_encoded_once():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    T.convert(model, spec(), "dynamic", False)
    assert list(T.encode(model)) == ["0.weight"]


# Vector tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["parameter", "dynamic"])
@pytest.mark.parametrize("sparse", [0, 0.01])
def test_vector_weight_matches_format(mode, dtype, sparse):
    torch.manual_seed(2)
    value = torch.randn(32, 64).to(dtype)
    fmt = vectors(sparse_format=Q.BFLOAT16, sparse_ratio=sparse).fit(value)
    weight = T.VectorWeight(value, fmt, mode)
    assert weight().equal(fmt.quantise(value))
    assert weight.count_bits(torch.bfloat16) == fmt.count_bits_tensor(value)
    assert isinstance(T._weight(value, fmt, mode, False, "qat"), T.VectorWeight)


@pytest.mark.parametrize("clip", [False, True])
def test_vector_gradients_against_a_loop(clip):
    torch.manual_seed(4)
    table = torch.randn(5, 2)
    fmt = Q.LinearScalingFormat(Q.VectorLUTFormat.create(table, Q.FP32, "v", (-1, 1)), Q.FP32, (1, 6), "rms")
    weight = T.VectorWeight(torch.randn(3, 6), fmt, "parameter", clip_gradient=clip)
    gradient = torch.randn(3, 6)
    weight().backward(gradient)
    scale = weight.scale.detach()
    low, high = table.amin(0), table.amax(0)
    sums, of_scale = torch.zeros(5, 2), torch.zeros(3, 1)
    for row, pair in itertools.product(range(3), range(3)):
        place = slice(2 * pair, 2 * pair + 2)
        x = weight.master.detach()[row, place] / scale[row]
        nearest = int((table - x).square().sum(1).argmin())
        g = gradient[row, place]
        sums[nearest] += g * scale[row]
        passes = ((x >= low) & (x <= high)) | torch.tensor(not clip)
        torch.testing.assert_close(weight.master.grad[row, place], g * passes)
        of_scale[row] += (g * (table[nearest] - x * passes)).sum()
    torch.testing.assert_close(weight.centroids.grad, sums)
    torch.testing.assert_close(weight.scale.grad, of_scale)


def test_vector_weights_train_and_come_back():
    torch.manual_seed(6)
    model, teacher = three_layers(), three_layers()
    T.convert(model, vectors(), "parameter", False)
    assert [name for name, _ in T.get_named_parameters(model, "centroids")] == [
        "0.weight.centroids",
        "2.weight.centroids",
    ]
    optimiser = torch.optim.Adam(
        [
            parameter
            for kind in ("weight", "centroids")
            for _, parameter in T.get_named_parameters(model, kind)
        ],
        lr=3e-3,
    )
    x = torch.randn(256, 64)
    losses = []
    for _ in range(10):
        loss = (model(x) - teacher(x).detach()).square().mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.75 * losses[0]
    fresh = three_layers()
    T.load_convert(fresh, T.save(model))
    assert fresh(x).equal(model(x))
    assert all(isinstance(fresh[index].weight, T.VectorWeight) for index in (0, 2))


def test_vector_weight_refuses():
    with pytest.raises(ValueError, match=r"expected a Q\.LinearScalingFormat of Q\.VectorLUTFormat"):
        T.VectorWeight(torch.randn(4, 64), spec().fit(torch.randn(4, 64)), "dynamic")
    fmt = Q.LinearScalingFormat(
        Q.VectorLUTFormat.create(torch.randn(4, 3), Q.FP32, "v"), Q.FP32, (1, 4), "rms"
    )
    with pytest.raises(ValueError, match="multiple of 3"):
        T.VectorWeight(torch.randn(4, 4), fmt, "dynamic")


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(2, 1, 100_003), (8, 2, 1000), (300, 3, 7), (4, 1, 0)]
)
def test_partial_sums(count, columns, rows):
    """What CUDA devices use, beside the sums of the CPU."""
    torch.manual_seed(7)
    codes, values = torch.randint(0, count, (rows,)), torch.randn(rows, columns)
    expected = torch.zeros(count, columns, dtype=torch.float64).index_add_(0, codes, values.double())
    torch.testing.assert_close(_training_weights._partial_sums(codes, values.double(), count), expected)
    torch.testing.assert_close(_training_weights._sum_by_code(codes, values, count), expected.float())
