"""Rounding and calibration on a CUDA device, against the CPU."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import quantloom as ql
import torch
from model_factory import llama, token_ids, write_model

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ql.build_info()["cuda"]),
    reason="needs a CUDA device and a build with CUDA",
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(rng, tokens: int, k: int) -> torch.Tensor:
    """Inputs of uneven energy that depend on one another."""
    mixed = rng.standard_normal((tokens, k)) @ (np.eye(k) + 0.1 * rng.standard_normal((k, k)))
    return torch.tensor((mixed * np.exp(0.5 * rng.standard_normal(k))).astype(np.float32))


def hessians(rng, k: int, tokens: int = 0) -> tuple[ql.Hessian, ql.Hessian]:
    x = inputs(rng, tokens or 4 * k, k)
    here, there = ql.Hessian(k), ql.Hessian(k, device="cuda")
    here.add(x)
    there.add(x.cuda())
    return here, there


def same_planes(a: ql.PackedTensor, b: ql.PackedTensor) -> bool:
    return a.planes.keys() == b.planes.keys() and all(
        torch.equal(a.planes[name].cpu(), b.planes[name].cpu()) for name in a.planes
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("grid", ["g32:sym", "g100:asym", "channel:asym:bf16", "tensor:sym:f32"])
@pytest.mark.parametrize("search", [None, ql.ScaleSearch(steps=12)])
def test_nearest_makes_the_cpus_planes(rng, bits, grid, search):
    spec = f"uniform:{bits}:{grid}"
    for dtype in DTYPES:
        w = torch.tensor(rng.standard_normal((37, 203)).astype(np.float32)).to(dtype)
        q = ql.quantize(w.cuda(), spec, ql.Nearest(scale_search=search))
        assert q.device == "cuda:0"
        expected = ql.quantize(w, spec, ql.Nearest(scale_search=search))
        assert same_planes(q, expected)
        assert q.report.mean_squared_error == pytest.approx(expected.report.mean_squared_error, rel=1e-12)


def test_strided_weights_and_other_streams(rng):
    w = torch.tensor(rng.standard_normal((64, 300)).astype(np.float32)).cuda()
    expected = ql.quantize(w[:, 3:259].cpu(), "uniform:4:g64")
    assert same_planes(ql.quantize(w[:, 3:259], "uniform:4:g64"), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(w)
        torch.cuda._sleep(20_000_000)  # quantize must wait for what comes before it
        late.copy_(w)
        q = ql.quantize(late[:, 3:259], "uniform:4:g64")
    assert same_planes(q, expected)
    with pytest.raises(ValueError, match=r"w.*apart"):
        ql.quantize(w.T, "uniform:4:g64")


@pytest.mark.parametrize("spec", ["uniform:4:g128", "uniform:3:g64:asym", "uniform:2:channel"])
@pytest.mark.parametrize("options", [{}, {"static_groups": False}, {"act_order": False}])
@pytest.mark.parametrize("search", [None, ql.ScaleSearch(steps=12)])
def test_gptq_agrees_with_the_cpu(rng, spec, options, search):
    here, there = hessians(rng, 256)
    w = torch.tensor(rng.standard_normal((96, 256)).astype(np.float32)).half()
    expected = ql.quantize(w, spec, ql.GPTQ(here, scale_search=search, **options))
    q = ql.quantize(w.cuda(), spec, ql.GPTQ(there, scale_search=search, **options))
    assert q.planes.keys() == expected.planes.keys()
    report, wanted = q.report, expected.report
    assert report.proxy_loss == pytest.approx(wanted.proxy_loss, rel=0.02)
    assert report.proxy_loss_nearest == pytest.approx(wanted.proxy_loss_nearest, rel=1e-4)
    assert report.proxy_loss < report.proxy_loss_nearest
    for name in (
        "method",
        "act_order",
        "static_groups",
        "damping",
        "damping_tried",
        "dead_columns",
        "tokens",
    ):
        assert getattr(report, name) == getattr(wanted, name)
    moved = q.to("cpu").dequantize() != expected.dequantize()
    assert moved.float().mean() < 0.05


def test_gptq_repeats_itself(rng):
    _, there = hessians(rng, 320)
    w = torch.tensor(rng.standard_normal((128, 320)).astype(np.float32)).cuda()
    first = ql.quantize(w, "uniform:3:g64", ql.GPTQ(there))
    for _ in range(5):
        again = ql.quantize(w, "uniform:3:g64", ql.GPTQ(there))
        assert same_planes(first, again)
        assert repr(again.report) == repr(first.report)  # NaN where no held-out Hessian was given


@pytest.mark.parametrize("dtype", DTYPES)
def test_hessians_agree(rng, dtype):
    x = inputs(rng, 3000, 150).to(dtype)
    here, there = ql.Hessian(150), ql.Hessian(150, device="cuda")
    for part in (x[:1], x[1:1500], x[1500:]):
        here.add(part)
        there.add(part.cuda().reshape(1, -1, 150))
    assert there.tokens == here.tokens == 3000
    assert there.device == "cuda:0"
    scale = np.sqrt(np.outer(np.diag(here.sum()), np.diag(here.sum())))
    assert np.max(np.abs(there.sum() - here.sum()) / scale) < 1e-5
    np.testing.assert_array_equal(there.sum(), there.sum().T)
    np.testing.assert_array_equal(there.diagonal(), np.diag(there.sum()) / 3000)


def test_hessians_move(rng):
    here, _ = hessians(rng, 64)
    there = here.to("cuda")
    assert there.device == "cuda:0"
    assert there.to(torch.device("cuda")) is there
    assert here.to("cpu") is here
    back = there.to("cpu")
    np.testing.assert_array_equal(back.sum(), here.sum())
    assert back.tokens == here.tokens
    copy = pickle.loads(pickle.dumps(there))
    assert copy.device == "cuda:0"
    np.testing.assert_array_equal(copy.sum(), here.sum())
    given = ql.Hessian.from_sum(torch.eye(8, device="cuda", dtype=torch.float64))
    assert given.device == "cuda:0"
    w = torch.randn(4, 8)
    q = ql.quantize(w.cuda(), "uniform:4", ql.GPTQ(torch.eye(8, device="cuda")))
    assert same_planes(q, ql.quantize(w, "uniform:4", ql.GPTQ(np.eye(8))))


def test_bad_input_is_named(rng):
    here, there = hessians(rng, 32)
    w = torch.randn(8, 32)
    with pytest.raises(TypeError, match=r"hessian.*on cpu.*cuda:0.*hessian\.to\(\'cuda:0\'\)"):
        ql.quantize(w.cuda(), "uniform:4", ql.GPTQ(here))
    with pytest.raises(TypeError, match=r"hessian.*on cuda:0.*cpu"):
        ql.quantize(w, "uniform:4", ql.GPTQ(there))
    with pytest.raises(TypeError, match=r"held_out.*on cpu.*cuda:0"):
        ql.quantize(w.cuda(), "uniform:4", ql.Nearest(hessian=there, held_out=here))
    with pytest.raises(TypeError, match=r"x.*cpu.*cuda:0"):
        there.add(w)
    with pytest.raises(TypeError, match=r"x.*cuda:0.*CPU"):
        here.add(w.cuda())
    with pytest.raises(TypeError, match=r"w.*float64"):
        ql.quantize(w.double().cuda(), "uniform:4")
    with pytest.raises(ValueError, match=r"hessian.*32 inputs.*33"):
        ql.quantize(torch.randn(8, 33).cuda(), "uniform:4", ql.GPTQ(there))
    with pytest.raises(RuntimeError, match="CUDA devices"):
        ql.Hessian(4, device="cuda:99")
    bad = w.clone()
    bad[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"w: got -?nan at row 3, column 5, expected finite values"):
        ql.quantize(bad.cuda(), "uniform:4")
    spoiled = ql.Hessian(32, device="cuda")
    spoiled.add(w.cuda())
    spoiled.add(bad.cuda())
    with pytest.raises(ValueError, match=r"x: got -?nan at row 11 of all tokens added, column 5"):
        spoiled.sum()
    with pytest.raises(ValueError, match=r"row 11 of all tokens added"):
        ql.quantize(w.cuda(), "uniform:4", ql.GPTQ(spoiled))
    indefinite = np.array([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(ValueError, match="not positive definite"):
        ql.quantize(w[:, :2].contiguous().cuda(), "uniform:4", ql.GPTQ(torch.tensor(indefinite).cuda()))


@pytest.mark.parametrize("rounding", [ql.Nearest(), ql.GPTQ()])
def test_models_are_quantized_on_the_device(tmp_path, rounding):
    write_model(tmp_path / "model", llama())
    ids = token_ids(10 * 32)
    recipe = ql.Recipe("uniform:4:g16", rounding)
    options = {"calibration": ids, "windows": 8, "window": 32, "held_out_windows": 2}
    here = ql.models.quantize(tmp_path / "model", recipe, output=tmp_path / "here", **options)
    there = ql.models.quantize(
        tmp_path / "model", recipe, output=tmp_path / "there", device="cuda", **options
    )
    assert [module.name for module in here.modules] == [module.name for module in there.modules]
    for mine, other in zip(here.modules, there.modules, strict=True):
        assert other.tokens == mine.tokens
        assert other.proxy_loss == pytest.approx(mine.proxy_loss, rel=0.1)
        assert other.held_out_loss == pytest.approx(mine.held_out_loss, rel=0.1)
    again = ql.models.quantize(
        tmp_path / "model", recipe, output=tmp_path / "again", device="cuda", **options
    )
    assert [m.proxy_loss for m in again.modules] == [m.proxy_loss for m in there.modules]


@pytest.mark.parametrize("spec", ["codebook:nf4:g64", "codebook:nf4:channel:bf16"])
def test_codebooks(rng, spec):
    w = torch.tensor(rng.standard_normal((40, 192)).astype(np.float32)).bfloat16()
    search = ql.ScaleSearch(steps=9)
    assert same_planes(ql.quantize(w.cuda(), spec), ql.quantize(w, spec))
    assert same_planes(
        ql.quantize(w.cuda(), spec, ql.Nearest(search)), ql.quantize(w, spec, ql.Nearest(search))
    )
    here, there = hessians(rng, 192)
    q, expected = ql.quantize(w.cuda(), spec, ql.GPTQ(there)), ql.quantize(w, spec, ql.GPTQ(here))
    assert q.report.proxy_loss == pytest.approx(expected.report.proxy_loss, rel=0.02)
    assert q.report.proxy_loss < q.report.proxy_loss_nearest
