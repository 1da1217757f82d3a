"""Distillation layer by layer on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda
from quantloom import evaluate, models
from quantloom._weight_grids import WeightGrid

pytest.importorskip("transformers")
pytestmark = needs_cuda

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
SETTINGS = {"windows": 24, "window": 64, "held_out_windows": 4}


@pytest.mark.parametrize(
    "spec",
    [
        "uniform:1:g16",
        "uniform:4:g16:asym",
        "uniform:4:tensor",
        "codebook:nf4:g16",
        "sdr:4:g8",
        "outliers:3%:uniform:3:g16",
    ],
)
def test_grids_are_those_of_the_cpu(spec, rng):
    w = torch.from_numpy(rng.standard_normal((33, 96), dtype="float32"))
    moved = w + 0.2 * torch.from_numpy(rng.standard_normal((33, 96), dtype="float32"))
    packed = ql.quantize(w, spec)
    here, there = WeightGrid(packed), WeightGrid(packed.to("cuda"))
    assert torch.equal(there.round(moved.cuda()).cpu(), here.round(moved))
    for name, plane in here.packed(moved).planes.items():
        assert torch.equal(there.packed(moved.cuda()).planes[name], plane), name


def distilled(out, device):
    recipe = ql.Recipe.zeroquant(8, 4, group_size=64, distillation="lkd:steps=25:batch=1:checks=2")
    return models.quantize(TINY, recipe, TINY / "calib.txt", output=out, device=device, **SETTINGS)


def test_does_what_the_cpu_does(tmp_path):
    report = distilled(tmp_path / "cuda", "cuda")
    expected = distilled(tmp_path / "cpu", "cpu")
    for entry, other in zip(report.distillation, expected.distillation, strict=True):
        assert entry.held_out_before == pytest.approx(other.held_out_before, rel=0.02)
        assert entry.held_out_after == pytest.approx(other.held_out_after, rel=0.05)
        assert entry.held_out_after < 0.9 * entry.held_out_before
    reference, ids = models.load_reference(TINY), evaluate.tokens(TINY, TINY / "valid.txt")
    found = [
        evaluate.compare(
            models.load(tmp_path / name, torch.float32, dequantized=True), reference, ids, 64, 16
        ).kl
        for name in ("cuda", "cpu")
    ]
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_repeats(tmp_path):
    for name in ("a", "b"):
        distilled(tmp_path / name, "cuda")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b
