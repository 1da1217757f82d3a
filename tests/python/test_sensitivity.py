"""Squared gradients gathered by hooks, against gradients of one position at a time."""

import copy

import pytest

torch = pytest.importorskip("torch")
from quantloom import sensitivity as S
from torch import nn


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 600])
def test_accumulator_adds_exactly(count):
    total = S.TwoStageAccumulator()
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(count):
        total.accumulate(one)
    assert total.sum().equal(torch.tensor(float(count)))
    assert total.count == count
    assert one == 1, "what is added stays as it is"

    flat = torch.tensor(0.0, dtype=torch.bfloat16)
    for _ in range(count):
        flat += 1
    assert float(flat) == min(count, 256), "a plain bfloat16 sum stands still at 256"


def test_accumulator_spills_by_its_headroom():
    total = S.TwoStageAccumulator(headroom_bits=6)
    for index in range(9):
        total.accumulate(torch.full((3,), float(index)))
        assert total.count1 == (index + 1) // 4 * 4
    assert total.sum().equal(torch.full((3,), 36.0))
    total.sum().zero_()
    assert total.sum().equal(torch.full((3,), 36.0)), "the result is a copy"
    total.reset()
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        total.sum()


def by_position(module, inputs, gradients):
    """Slow reference: one backward pass for each position."""
    total = torch.zeros_like(module.weight)
    for x, gradient in zip(inputs.flatten(0, 1), gradients.flatten(0, 1)):
        module.zero_grad()
        module(x.unsqueeze(0)).backward(gradient.unsqueeze(0))
        total += module.weight.grad.square()
    module.zero_grad()
    return total


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 3, bias=bias))
    reference = copy.deepcopy(model[0])
    S.wrap(model)
    expected = {"weight": 0, "input": 0, "output": 0}
    for _ in range(70):  # past the spill of the accumulators
        x, gradient = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
        model(x).backward(gradient)
        expected["weight"] += by_position(reference, x, gradient)
        expected["input"] += x.square().sum((0, 1))
        expected["output"] += gradient.square().sum((0, 1))
    assert not model[0].grad_weight_sq.sum0.requires_grad
    torch.testing.assert_close(model[0].grad_weight_sq.sum(), expected["weight"])
    torch.testing.assert_close(model[0].input_sq.sum(), expected["input"])
    torch.testing.assert_close(model[0].grad_output_sq.sum(), expected["output"])
    S.unwrap(model)
    assert type(model[0]) is nn.Linear
    assert not hasattr(model[0], "input_sq")
    assert not model[0]._forward_hooks


def test_embedding():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(6, 4))
    reference = copy.deepcopy(model[0])
    S.wrap(model)
    expected = counts = 0
    for _ in range(10):
        x, gradient = torch.randint(0, 5, (2, 7)), torch.randn(2, 7, 4)
        model(x).backward(gradient)
        expected += by_position(reference, x, gradient)
        counts += torch.bincount(x.flatten(), minlength=6)
    torch.testing.assert_close(model[0].grad_weight_sq.sum(), expected)
    torch.testing.assert_close(model[0].input_sq.sum(), counts.float())
    assert model[0].grad_weight_sq.sum()[5].equal(torch.zeros(4)), "index 5 never occurred"


def test_embedding_that_scales():
    class Scaled(nn.Embedding):
        def __init__(self):
            super().__init__(4, 2)
            self.embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    torch.manual_seed(3)
    module = Scaled()
    reference = copy.deepcopy(module)
    S.wrap(module)
    x, gradient = torch.tensor([[0, 2, 2]]), torch.randn(1, 3, 2)
    module(x).backward(gradient)
    torch.testing.assert_close(module.grad_weight_sq.sum(), by_position(reference, x, gradient))


def test_frozen_parameters_and_no_gradients():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    S.wrap(model)
    with torch.no_grad():
        model(torch.randn(4, 3))
    model(torch.randn(4, 3)).sum().backward()
    assert model[0].grad_weight_sq.count == model[2].grad_weight_sq.count == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_keeps_small_sums():
    """Squares are added over a pass in float32, not one by one in bfloat16."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    S.wrap(model)
    model(torch.ones(1024, 1, dtype=torch.bfloat16)).sum().backward()
    assert model[0].grad_weight_sq.sum() == 1024


def test_refusals():
    model = nn.Sequential(nn.Linear(2, 2))
    S.wrap(model)
    with pytest.raises(ValueError, match="wrapped already"):
        S.wrap(model)
    S.unwrap(model)
    S.unwrap(model)

    class Odd(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    model = nn.Sequential(nn.Linear(2, 2), Odd(2, 2))
    with pytest.raises(TypeError, match="Odd with its own"):
        S.wrap(model)
    assert not list(S.wrapped_modules(model)), "no hook was put"
