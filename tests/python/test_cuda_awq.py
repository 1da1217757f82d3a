"""Activation-aware scaling on a CUDA device, against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda
from model_factory import llama, token_ids, write_model

pytestmark = needs_cuda

N, K, TOKENS = 48, 160, 700


@pytest.fixture
def inputs(rng):
    """Correlated inputs of very different channels, one of them dead."""
    x = rng.standard_normal((TOKENS, K)) @ (np.eye(K) + 0.1 * rng.standard_normal((K, K)))
    x *= np.exp(1.5 * rng.standard_normal(K))
    x[:, 7] = 0
    return torch.from_numpy(x.astype(np.float32))


def hessians(x):
    here = ql.Hessian(K)
    here.add(x)
    return here, here.to("cuda")


@pytest.mark.parametrize(
    "specs",
    [
        ["uniform:4:g32:asym"],
        ["uniform:3:channel", "codebook:nf3:g32"],
        ["bcq:3:g40"],
        ["spqr:3:g16", "uniform:2:g64"],
        ["outliers:1%:uniform:3:g32"],
    ],
)
@pytest.mark.parametrize("powers", [False, True])
def test_searches_the_cpus_scales(rng, inputs, specs, powers):
    here, there = hessians(inputs)
    weights = [torch.from_numpy(rng.standard_normal((N, K)).astype(np.float32)) for _ in specs]
    for dtype in (torch.float32, torch.bfloat16):
        layers = [(w.to(dtype), ql.parse_format(s)) for w, s in zip(weights, specs, strict=True)]
        expected = ql.search_channel_scales(layers, here, steps=8, powers_of_two=powers)
        found = ql.search_channel_scales(
            [(w.cuda(), form) for w, form in layers], there, steps=8, powers_of_two=powers
        )
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
        assert found.losses[0] == pytest.approx(found.loss_unscaled)
        if found.exponent == expected.exponent:
            np.testing.assert_array_equal(found.codes, expected.codes)
        else:  # two exponents whose losses agree
            assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.codes[7] == 0


@pytest.mark.parametrize("then", ["nearest", "nearest:search", "nearest:output-search", "gptq:output-search"])
@pytest.mark.parametrize(
    "spec", ["uniform:3:g32:asym", "uniform:4:channel", "bcq:2:g40", "spqr:3:g32:s4:z4:b16"]
)
def test_scaling_agrees_with_the_cpu(rng, inputs, spec, then):
    here, there = hessians(inputs)
    w = torch.from_numpy(rng.standard_normal((N, K)).astype(np.float32))
    expected = ql.quantize(w, spec, ql.AWQ(then, hessian=here))
    q = ql.quantize(w.cuda(), spec, ql.AWQ(then, hessian=there))
    assert q.device == "cuda:0" and q.report.method == expected.report.method
    assert q.transform == expected.transform
    tolerance = 0.02 if then.startswith("gptq") else 1e-3
    assert q.report.proxy_loss == pytest.approx(expected.report.proxy_loss, rel=tolerance)
    a, b = (torch.as_tensor(p.to("cpu").dequantize()) for p in (q, expected))
    share = float((a == b).double().mean())
    assert share > (0.5 if then.startswith("gptq") else 0.97)


def test_searches_on_the_cpu_where_no_kernel_rounds(rng, inputs):
    here, there = hessians(inputs)
    w = torch.from_numpy(rng.standard_normal((N, K)).astype(np.float32))
    layers = [(w, ql.parse_format("vector_codebook:16x2"))]
    expected = ql.search_channel_scales(layers, here, steps=3)
    found = ql.search_channel_scales([(w.cuda(), layers[0][1])], there, steps=3)
    assert found.losses == expected.losses


def test_extremes_and_refusals(inputs):
    _, there = hessians(inputs)
    w = torch.full((8, K), 6e4).cuda()
    found = ql.search_channel_scales([(w.half(), ql.parse_format("uniform:4:g32"))], there)
    assert np.isfinite(found.loss) and found.losses[0] >= found.loss
    with pytest.raises(ValueError, match="w"):
        w[3, 5] = float("nan")
        ql.search_channel_scales([(w, ql.parse_format("uniform:4:g32"))], there)
    with pytest.raises(ValueError, match="hessian"):
        ql.search_channel_scales([(w[:, :32].contiguous(), ql.parse_format("uniform:4:g32"))], there)


@pytest.mark.parametrize("rounding", ["awq", "awq+gptq:output-search"])
def test_models_agree_with_the_cpu(rounding, tmp_path):
    config = llama(layers=2)
    model = tmp_path / "model"
    write_model(model, config)
    recipe = ql.Recipe.parse("uniform:3:g32:asym", rounding)
    settings = {"calibration": token_ids(6 * 32), "windows": 5, "window": 32, "held_out_windows": 1}
    cpu = ql.models.quantize(model, recipe, output=tmp_path / "cpu", **settings)
    cuda = ql.models.quantize(model, recipe, output=tmp_path / "cuda", device="cuda", **settings)
    for a, b in zip(cpu.modules, cuda.modules, strict=True):
        assert a.name == b.name and a.scaled_by == b.scaled_by
        assert b.proxy_loss == pytest.approx(a.proxy_loss, rel=0.1)
