"""Binary coding, bilevel grids and outliers rounded on a CUDA device, against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda, same_planes
from model_factory import llama, token_ids, write_model

pytestmark = needs_cuda

N, K = 80, 208
SPECS = ["bcq:3:g64", "bcq:2:g40:offset:bf16", "bcq:4:channel:r3", "spqr:3:g16", "spqr:2:g40:s4:z4:b64"]


def hessians(rng):
    x = rng.standard_normal((900, K)) @ (np.eye(K) + 0.1 * rng.standard_normal((K, K)))
    x *= np.exp(0.7 * rng.standard_normal(K))
    here = ql.Hessian(K)
    here.add(torch.from_numpy(x.astype(np.float32)))
    return here, here.to("cuda")


def matrix(rng):
    return torch.from_numpy(rng.standard_normal((N, K)).astype(np.float32))


@pytest.mark.parametrize(
    "spec", [*SPECS, *(f"outliers:2%:{spec}" for spec in SPECS), "outliers:1%:uniform:3:g32"]
)
@pytest.mark.parametrize("search", [None, ql.ScaleSearch(steps=9)])
def test_nearest_makes_the_cpus_planes(rng, spec, search):
    here, there = hessians(rng)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w = matrix(rng).to(dtype)
        for a, b in ((None, None), (here, there)):
            expected = ql.quantize(w, spec, ql.Nearest(scale_search=search, hessian=a))
            q = ql.quantize(w.cuda(), spec, ql.Nearest(scale_search=search, hessian=b))
            assert q.device == "cuda:0" and q.format == expected.format
            assert same_planes(q, expected)
            assert q.report.mean_squared_error == pytest.approx(expected.report.mean_squared_error, rel=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", [{}, {"static_groups": False}, {"act_order": False}])
def test_gptq_agrees_with_the_cpu(rng, spec, options):
    here, there = hessians(rng)
    w = matrix(rng)
    expected = ql.quantize(w, spec, ql.GPTQ(here, **options))
    q = ql.quantize(w.cuda(), spec, ql.GPTQ(there, **options))
    assert q.planes.keys() == expected.planes.keys()
    assert q.report.proxy_loss == pytest.approx(expected.report.proxy_loss, rel=0.02)
    assert q.report.proxy_loss_nearest == pytest.approx(expected.report.proxy_loss_nearest, rel=1e-4)
    decoded = q.to("cpu").dequantize()
    assert ql.proxy_loss(w, decoded, here) == pytest.approx(q.report.proxy_loss, rel=1e-5)


@pytest.mark.parametrize("spec", ["spqr:3:g16", "uniform:3:g40:asym", "codebook:nf3:g64"])
@pytest.mark.parametrize("budget", [{"percent": 1.0}, {"bits": 5.0}, {"threshold": 0.3}])
@pytest.mark.parametrize("static_groups", [True, False])
def test_outliers_are_found_as_on_the_cpu(rng, spec, budget, static_groups):
    here, there = hessians(rng)
    w = matrix(rng)
    settings = {"outliers": ql.OutlierSearch(**budget), "static_groups": static_groups}
    expected = ql.quantize(w, spec, ql.GPTQ(here, **settings))
    q = ql.quantize(w.cuda(), spec, ql.GPTQ(there, **settings))
    assert q.device == "cuda:0" and isinstance(q.format, ql.Outliers)
    assert q.planes.keys() == expected.planes.keys()
    assert {name: plane.dtype for name, plane in q.planes.items()} == {
        name: plane.dtype for name, plane in expected.planes.items()
    }
    assert q.report.outliers == pytest.approx(expected.report.outliers, rel=0.02, abs=4)
    assert q.report.proxy_loss == pytest.approx(expected.report.proxy_loss, rel=0.05)
    assert ql.proxy_loss(w, q.to("cpu").dequantize(), here) == pytest.approx(q.report.proxy_loss, rel=1e-5)
    if "bits" in budget:
        assert q.bits_per_weight <= budget["bits"]


def test_refusals(rng):
    _, there = hessians(rng)
    w = matrix(rng).cuda()
    with pytest.raises(RuntimeError, match="outliers"):
        ql.quantize(w, "outliers:1%:uniform:4:g32", ql.GPTQ(there))
    with pytest.raises(ValueError, match="bcq"):
        ql.quantize(w, "bcq:3:g32", ql.GPTQ(there, outliers=ql.OutlierSearch(percent=1.0)))
    with pytest.raises(RuntimeError, match="vector_codebook"):
        ql.quantize(w, "vector_codebook:16x2")
    with pytest.raises(ValueError, match="Hessian"):
        ql.quantize(w, "bcq:3:g32", ql.Nearest(ql.ScaleSearch(output_error=True)))


@pytest.mark.parametrize(
    "spec, rounding", [("bcq:3:g32", "gptq"), ("spqr:3:g16", "gptq:search=4:outliers=1%")]
)
def test_models_agree_with_the_cpu(spec, rounding, tmp_path):
    model = write_model(tmp_path / "model", llama(layers=1))
    recipe = ql.Recipe.parse(spec, rounding)
    settings = {"calibration": token_ids(6 * 32), "windows": 5, "window": 32, "held_out_windows": 1}
    cpu = ql.models.quantize(model, recipe, output=tmp_path / "cpu", **settings)
    cuda = ql.models.quantize(model, recipe, output=tmp_path / "cuda", device="cuda", **settings)
    for a, b in zip(cpu.modules, cuda.modules, strict=True):
        assert a.name == b.name
        assert b.proxy_loss == pytest.approx(a.proxy_loss, rel=0.1)
        assert b.outliers == pytest.approx(a.outliers, rel=0.05, abs=4)
