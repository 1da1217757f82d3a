"""Tables and scales of additive formats in training: what is stored, and gradients."""

import pytest
import quantloom as ql
import torch
from quantloom._trained_matrices import TrainedTables, TrainedWeights, trained_matrix, training_refusal

FORMATS = [
    "additive:2x4:g8",
    "additive:1x5:g4:scale8:bf16",
    "additive:3x2:g5:f32",
    "additive:2x3:g2x4:scale12",
    "additive:1x4:g3x2:bf16",
    "additive:1x9:g2",
]
LEVELS = ["additive:2x4:g4:scale4:s2", "additive:1x5:g2x4:t2x2", "additive:2x3:g4:scale4:s2:t1:f32"]


def packed(spec, rng, n=13, k=29):
    w = rng.standard_normal((n, k), dtype="float32")
    return ql.quantize(torch.from_numpy(w), spec)


@pytest.mark.parametrize("spec", FORMATS + LEVELS)
def test_what_is_stored_comes_back(spec, rng):
    q = packed(spec, rng)
    matrix = TrainedTables(q)
    assert torch.equal(matrix.values, q.dequantize())
    again = matrix.packed(matrix.start(q.dequantize()))
    assert again.format == q.format
    for name, plane in q.planes.items():
        assert torch.equal(again.planes[name], plane), name


@pytest.mark.parametrize("spec", FORMATS + LEVELS)
def test_what_moves_lands_where_decoding_says(spec, rng):
    q = packed(spec, rng)
    matrix = TrainedTables(q)
    parameters = {name: value + 0.1 * torch.randn_like(value) for name, value in matrix.stored().items()}
    parameters["codebook"].view(-1)[0] = 1e9  # beyond float16
    again = matrix.packed(parameters)
    assert torch.equal(again.planes["codes"], q.planes["codes"])
    assert torch.equal(again.dequantize(), matrix.round(parameters))
    assert not torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("transform", [None, "hadamard:b16:both"])
@pytest.mark.parametrize("spec", FORMATS)
def test_gradients_are_those_of_autograd(spec, transform, rng):
    w = torch.from_numpy(rng.standard_normal((16, 32), dtype="float32"))
    q = ql.quantize(w, spec, transform=transform)
    matrix, form = TrainedTables(q), q.format
    gradient = torch.from_numpy(rng.standard_normal((16, 32), dtype="float32"))
    parameters = matrix.stored()
    found = matrix.gradients(parameters, gradient)
    if transform is not None:
        gradient = q.transform.rotate_weight(gradient)
    # The definition, block by block, in float64.
    free = {name: value.double().requires_grad_() for name, value in parameters.items()}
    width = 32 if form.scale_group == "channel" else form.scale_group
    total = torch.zeros((), dtype=torch.float64)
    blocks = -(-32 // form.in_group)
    codes = matrix._codes.view(form.codebooks, -1, blocks)
    for group in range(codes.shape[1]):
        for block in range(blocks):
            first, row = block * form.in_group, group * form.out_group
            value = sum(free["codebook"][t, codes[t, group, block]] for t in range(form.codebooks))
            value = value * free["scales"][group, first // width]
            part = gradient[row : row + form.out_group, first : first + form.in_group].double()
            total = total + (value[: part.shape[0], : part.shape[1]] * part).sum()
    total.backward()
    for name, value in found.items():
        assert value.shape == parameters[name].shape
        torch.testing.assert_close(value.double(), free[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", LEVELS)
def test_gradients_go_straight_through_levels(spec, rng):
    q = packed(spec, rng)
    matrix = TrainedTables(q)
    moved = {name: value + 0.01 * torch.randn_like(value) for name, value in matrix.stored().items()}
    gradient = torch.from_numpy(rng.standard_normal(q.shape, dtype="float32"))
    found = matrix.gradients(moved, gradient)
    at_levels = TrainedTables(matrix.packed(moved))
    expected = at_levels.gradients(at_levels.stored(), gradient)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_formats_that_can_be_trained(rng):
    assert isinstance(trained_matrix(packed("uniform:3:g8", rng)), TrainedWeights)
    assert isinstance(trained_matrix(packed("additive:1x4:g4", rng)), TrainedTables)
    assert training_refusal(ql.parse_format("additive:2x8")) is None
    refusal = training_refusal(ql.parse_format("bcq:3"))
    assert "expected uniform, codebook or sdr" in refusal and "additive" in refusal
