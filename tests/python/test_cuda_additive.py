"""Additive quantization on a CUDA device."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda, same_planes
from quantloom.beam_search import refit_tables, search_codes

pytestmark = needs_cuda

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"

FORMATS = ["additive:2x5:g8", "additive:1x6:g2x4:scale16:bf16", "additive:3x3:g3"]


def layer(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Weights and a Hessian on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    w = torch.randn(n, k, generator=generator, device="cuda").to(dtype)
    x = torch.randn(4 * k, k, generator=generator, device="cuda")
    x[:, 1:] += 0.7 * x[:, :-1].clone()
    hessian = ql.Hessian(k, device="cuda")
    hessian.add(x)
    return w, hessian


def on_cpu(q: ql.PackedTensor) -> ql.PackedTensor:
    return ql.PackedTensor(q.format, q.shape, {name: plane.cpu() for name, plane in q.planes.items()})


def loss_of(w, q, hessian) -> float:
    return ql.proxy_loss(w.cpu(), on_cpu(q).dequantize(), hessian.to("cpu"))


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize(spec, dtype):
    w, hessian = layer(96, 120, dtype=dtype)
    held_out = layer(96, 120, 1)[1]
    rounding = ql.BeamSearch(hessian, beam=2, held_out=held_out, damp=0.01)
    q = ql.quantize(w, spec, rounding)
    assert q.device == w.device.type + ":0"
    assert q.format == ql.parse_format(spec)
    losses = q.report.losses
    assert len(losses) > 1
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert q.report.method == "beam_search"
    assert q.report.proxy_loss == pytest.approx(loss_of(w, q, hessian), rel=1e-5)
    assert q.report.held_out_loss == pytest.approx(loss_of(w, q, held_out), rel=1e-5)
    assert q.report.proxy_loss < q.report.proxy_loss_nearest
    assert same_planes(q, ql.quantize(w, spec, rounding))
    cpu = ql.quantize(
        w.cpu(),
        spec,
        ql.BeamSearch(hessian.to("cpu"), beam=2, held_out=held_out.to("cpu"), damp=0.01),
    )
    assert q.report.proxy_loss == pytest.approx(cpu.report.proxy_loss, rel=0.1)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("beam", [1, 3])
def test_search_codes(spec, beam):
    w, hessian = layer(72, 96, 2)  # more blocks than entries
    q = ql.quantize(w, spec, ql.BeamSearch(hessian, rounds=0, refit=0))
    shape = q.planes["codebook"].shape[:2]
    penalties = np.random.default_rng(0).random(shape, np.float32)
    for options in (
        {},
        {"order": "shuffled", "seed": 3, "damp": 0.1},
        {"code_penalties": penalties, "row_groups": [3, 0]},
    ):
        found = search_codes(w, q, hessian, beam=beam, float64=True, **options)
        expected = search_codes(w.cpu(), on_cpu(q), hessian.to("cpu"), beam=beam, float64=True, **options)
        assert same_planes(on_cpu(found), expected)
    before = {name: plane.clone() for name, plane in q.planes.items()}
    found = search_codes(w, q, hessian, beam=beam)
    assert all(torch.equal(q.planes[name], plane) for name, plane in before.items())
    assert loss_of(w, found, hessian) < loss_of(w, q, hessian)


@pytest.mark.parametrize("spec", FORMATS)
def test_refit_tables(spec):
    w, hessian = layer(40, 48, 4)
    q = ql.quantize(w, spec, ql.BeamSearch(hessian, rounds=0, refit=0))
    found = refit_tables(w, q, hessian, steps=6)
    expected = refit_tables(w.cpu(), on_cpu(q), hessian.to("cpu"), steps=6)
    assert torch.equal(found.planes["codes"], q.planes["codes"])
    assert loss_of(w, found, hessian) == pytest.approx(
        ql.proxy_loss(w.cpu(), expected.dequantize(), hessian.to("cpu")), rel=1e-2
    )


@pytest.mark.parametrize("spec", FORMATS)
def test_other_roundings(spec):
    w, hessian = layer(72, 96, 3)
    nearest = ql.quantize(w, spec)
    assert nearest.report.method == "nearest"
    assert loss_of(w, nearest, hessian) == pytest.approx(
        ql.quantize(w.cpu(), spec, ql.Nearest(hessian=hessian.to("cpu"))).report.proxy_loss, rel=0.05
    )
    fed_back = ql.quantize(w, spec, ql.GPTQ(hessian))
    assert fed_back.report.proxy_loss == pytest.approx(loss_of(w, fed_back, hessian), rel=1e-5)
    cpu = ql.quantize(w.cpu(), spec, ql.GPTQ(hessian.to("cpu")))
    assert fed_back.report.proxy_loss == pytest.approx(cpu.report.proxy_loss, rel=0.1)
    started = ql.quantize(w, spec, ql.BeamSearch(hessian, start="gptq", rounds=0, refit=0))
    search = ql.BeamSearch(hessian.to("cpu"), start="gptq", rounds=0, refit=0)
    expected = ql.quantize(w.cpu(), spec, search).report.losses[0]
    assert started.report.losses[0] == pytest.approx(expected, rel=0.1)


def test_strided_weights_and_other_streams():
    w, hessian = layer(33, 64, 5)
    wide = torch.zeros(33, 80, device="cuda")
    wide[:, 8:72] = w
    rounding = ql.BeamSearch(hessian, rounds=2)
    q = ql.quantize(w, "additive:2x4:g8", rounding)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = ql.quantize(wide[:, 8:72], "additive:2x4:g8", rounding)
    torch.cuda.synchronize()
    assert same_planes(q, other)


def test_refused():
    w, hessian = layer(6, 16, 6)
    q = ql.quantize(w, "additive:1x3:g4", ql.BeamSearch(hessian, rounds=1))
    with pytest.raises(TypeError, match="hessian: got a Hessian on cpu"):
        search_codes(w, q, hessian.to("cpu"))
    with pytest.raises(TypeError, match="q: got planes on cpu"):
        search_codes(w, on_cpu(q), hessian)
    with pytest.raises(TypeError, match="hessian"):
        ql.quantize(w, "additive:1x3:g4", ql.BeamSearch(hessian.to("cpu")))
    with pytest.raises(ValueError, match="multiple of 5"):
        ql.quantize(w, "additive:1x3:g5", ql.BeamSearch(hessian, start="gptq"))
    with pytest.raises(RuntimeError, match="scale_search"):
        ql.quantize(w, "additive:1x3:g4", ql.Nearest(scale_search=ql.ScaleSearch()))
    with pytest.raises(ValueError, match="beam"):
        search_codes(w, q, hessian, beam=8 + 1)
    with pytest.raises(ValueError, match="row_groups"):
        search_codes(w, q, hessian, row_groups=[6])
    with pytest.raises(ValueError, match="code_penalties"):
        search_codes(w, q, hessian, code_penalties=[1.0])
    with pytest.raises(ValueError, match="multiple of 4"):
        ql.quantize(w, "additive:1x3:g4x4", ql.BeamSearch(hessian))
    w[2, 3] = torch.nan
    with pytest.raises(ValueError, match="row 2, column 3"):
        ql.quantize(w, "additive:1x3:g4", ql.BeamSearch(hessian))
    with pytest.raises(ValueError, match="row 2, column 3"):
        refit_tables(w, q, hessian)


def test_models_on_the_device(tmp_path):
    recipe = ql.Recipe.parse("additive:1x6:g4", "beam_search:rounds=2")
    report = ql.models.quantize(
        TINY, recipe, TINY / "calib.txt", output=tmp_path / "out", windows=4, window=128, device="cuda"
    )
    assert all(module.proxy_loss < module.proxy_loss_nearest for module in report.modules)
    model = ql.models.load(tmp_path / "out", torch.float32)
    reference = ql.models.load_reference(TINY)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        logits, expected = (m(input_ids=ids).logits.float() for m in (model, reference))
    assert float((logits - expected).norm() / expected.norm()) < 0.7
    for rounding in ("beam_search:gptq:rounds=1", "gptq"):
        recipe = ql.Recipe.parse("additive:1x6:g4", rounding)
        report = ql.models.quantize(
            TINY,
            recipe,
            TINY / "calib.txt",
            output=tmp_path / rounding[:4],
            windows=4,
            window=128,
            device="cuda",
        )
        assert all(module.proxy_loss < module.proxy_loss_nearest for module in report.modules)
