"""Norms and gated activations with their rounding: PyTorch's functions, then rounding."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom as ql
import torch

SPECS = ["int8:token", "int8:token:asym", "int4:g16", "sdr4:g16", "int8:tensor", "int8:token:outliers=3"]


def close(got: torch.Tensor, expected: torch.Tensor, spec: str) -> None:
    """Where the values before rounding differ in their last bit, a code may differ by one."""
    q = ql.quantize_activations(expected, spec)
    razor = spec.startswith("sdr")  # whose largest code is one below that of the least value
    step = q.planes["scales"].max().item() * (2**4 if razor else 1)
    assert (got.float() - expected.float()).abs().max().item() <= (1.02 if razor else 0.53) * step
    exact = ql.round_activations(expected, spec)
    assert ((got - exact).abs() > 1e-4 * step).float().mean().item() < 0.02


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(8)
        yield


@pytest.mark.parametrize("spec", SPECS)
def test_norms(spec):
    x = 2 * torch.randn(3, 5, 96) + 0.3
    weight, bias = torch.rand(96) + 0.5, torch.randn(96)
    rms = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6)
    close(ql.round_rms_norm(x, weight, spec), rms, spec)
    gemma = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6)
    close(ql.round_rms_norm(x, weight - 1, spec, add_one=True), gemma, spec)
    plain = torch.nn.functional.rms_norm(x, (96,), None, 1e-3)
    close(ql.round_rms_norm(x, None, spec, eps=1e-3), plain, spec)
    layer = torch.nn.functional.layer_norm(x, (96,), weight, bias)
    close(ql.round_layer_norm(x, weight, bias, spec), layer, spec)
    close(ql.round_layer_norm(x, None, None, spec), torch.nn.functional.layer_norm(x, (96,)), spec)


@pytest.mark.parametrize("spec", SPECS)
def test_gate(spec):
    gate, up = 2 * torch.randn(4, 80), torch.randn(4, 80)
    close(ql.round_silu_mul(gate, up, spec), torch.nn.functional.silu(gate) * up, spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_those_of_the_integers(dtype):
    x, up = torch.randn(7, 64).to(dtype), torch.randn(7, 64).to(dtype)
    weight = torch.rand(64).to(dtype)
    for spec in SPECS:
        for quantized, rounded in (
            (ql.quantize_rms_norm(x, weight, spec), ql.round_rms_norm(x, weight, spec)),
            (ql.quantize_layer_norm(x, weight, weight, spec), ql.round_layer_norm(x, weight, weight, spec)),
            (ql.quantize_silu_mul(x, up, spec), ql.round_silu_mul(x, up, spec)),
        ):
            assert quantized.shape == (7, 64)
            assert rounded.dtype == dtype
            assert torch.equal(quantized.dequantize(), rounded), spec


def test_is_two_steps_in_one():
    # The gate is rounded to float16 before the product, and so is the product, as by operations of float16.
    gate, up = torch.randn(9, 64).half(), torch.randn(9, 64).half()
    fine = ql.round_silu_mul(gate, up, "int8:tensor:static=0.03:outliers=0.01:columns=0,1,2")[:, :3]
    silu = (gate.double() / (1 + (-gate.double()).exp())).half()
    assert torch.equal(fine, (silu * up)[:, :3])


def test_kinds_and_operators():
    x, weight = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32), np.ones(32, np.float32)
    found = ql.round_rms_norm(x, weight, "int8:token")
    assert isinstance(found, np.ndarray)
    there, w = torch.from_numpy(x), torch.from_numpy(weight)
    assert np.array_equal(ql.round_rms_norm(there, w, "int8:token").numpy(), found)
    ops = torch.ops.quantloom
    ql.round_activations(there, "int8:token")
    import quantloom.nn  # noqa: F401  (registers the operators)

    assert torch.equal(ops.round_rms_norm(there, w, 1e-6, False, "int8:token"), torch.from_numpy(found))
    layer = ops.round_layer_norm(there, w, None, 1e-5, "int8:token")
    assert torch.equal(layer, ql.round_layer_norm(there, w, None, "int8:token"))
    gated = ops.round_silu_mul(there, there, "int8:token")
    assert torch.equal(gated, ql.round_silu_mul(there, there, "int8:token"))


def test_bad_input_is_named():
    x = torch.randn(3, 32)
    with pytest.raises(ValueError, match="weight"):
        ql.round_rms_norm(x, torch.ones(31), "int8:token")
    with pytest.raises(TypeError, match="weight"):
        ql.round_rms_norm(x, torch.ones(32, dtype=torch.float16), "int8:token")
    with pytest.raises(ValueError, match="eps"):
        ql.round_rms_norm(x, None, "int8:token", eps=-1.0)
    with pytest.raises(ValueError, match="up"):
        ql.round_silu_mul(x, x[:2], "int8:token")
    with pytest.raises(TypeError, match="up"):
        ql.round_silu_mul(x, x.half(), "int8:token")
    with pytest.raises(ValueError, match="token 1"):
        ql.round_rms_norm(torch.tensor([[1.0], [float("nan")]]), None, "int8:token")
