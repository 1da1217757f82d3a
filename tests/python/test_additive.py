"""Additive quantization: description, bits, files, roundings, products, models."""

from __future__ import annotations

import dataclasses
import json
import re

import model_factory
import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql
import torch
from quantloom import models
from quantloom.beam_search import refit_tables, search_codes
from quantloom.cli import app
from quantloom.nn import QuantLinear
from typer.testing import CliRunner

FORMATS = [
    ql.Additive(2, 5),
    ql.Additive(1, 8, 4, scale_group=16, scale_dtype="bfloat16"),
    ql.Additive(3, 3, 3, 2, scale_dtype=np.float32),
    ql.Additive(2, 4, 2, 8, 6),
    ql.Additive(2, 5, 4, scale_group=4, scale_bits=2, table_bits=3),
    ql.Additive(1, 6, 3, 2, 6, "bfloat16", scale_bits=3, table_bits=2, table_groups=4),
]
W = np.ones((8, 16), np.float32)
# Beside those of test_bad_input.py: call, arguments, options, error, words of its message.
REFUSED = [
    (ql.Additive, (2, 17), {}, ValueError, "bits 17 1 to 16"),
    (ql.Additive, (2, 8, 8, 4), {}, ValueError, "out_group in_group 32 at most 16"),
    (ql.Additive, (2, 8, 8, 1, 12), {}, ValueError, "scale_group 12 multiple 8"),
    (ql.Additive, (2, 8, 8, 1, "tensor"), {}, ValueError, "scale_group tensor multiple 8"),
    (ql.Additive, (2.5,), {}, TypeError, "codebooks float integer"),
    (ql.Additive, (), {"scale_bits": 16}, ValueError, "scale_bits 16 0 to 15"),
    (ql.Additive, (), {"scale_bits": "4"}, TypeError, "scale_bits str integer"),
    (ql.Additive, (), {"table_bits": -1}, ValueError, "table_bits -1"),
    (ql.Additive, (), {"table_bits": 4, "table_groups": 3}, ValueError, "table_groups 3 power of two 256"),
    (ql.Additive, (), {"table_groups": 2}, ValueError, "table_groups 2 1 without table_bits"),
    (ql.BeamSearch, (), {"solver": "sgd"}, ValueError, "solver sgd cg adam"),
    (ql.BeamSearch, (), {"rate": 0}, ValueError, "rate 0.0 above 0"),
    (ql.BeamSearch, (), {"betas": (0.0, 1.0)}, ValueError, "betas 1.0 below 1"),
    (ql.BeamSearch, (), {"betas": 0.5}, ValueError, "betas 0.5 two numbers"),
    (ql.BeamSearch, (), {"order": "random"}, ValueError, "order random natural shuffled"),
    (ql.BeamSearch, (), {"tolerance": 1}, ValueError, "tolerance 1.0 below 1"),
    (ql.BeamSearch, (), {"damp": -1}, ValueError, "damp -1.0 >= 0"),
    (ql.BeamSearch, (), {"rounds": 1.5}, TypeError, "rounds float integer"),
    (ql.quantize, (W, "additive:1x2", ql.BeamSearch()), {}, ValueError, "rounding BeamSearch hessian"),
    (ql.quantize, (W, "uniform:4", ql.BeamSearch()), {}, ValueError, "format uniform:4 BeamSearch additive"),
    (ql.layouts.to_aqlm, (ql.quantize(W, "uniform:4"),), {}, RuntimeError, "aqlm additive uniform"),
    (ql.layouts.from_aqlm, ([],), {}, TypeError, "tensors list mapping"),
    (search_codes, (W, W, np.eye(16)), {}, TypeError, "q ndarray PackedTensor"),
    (search_codes, (W, ql.quantize(W, "additive:1x2:g4"), None), {}, ValueError, "hessian None"),
    (search_codes, (W, ql.quantize(W, "uniform:4"), np.eye(16)), {}, ValueError, "start uniform:4 additive"),
    (search_codes, (W, ql.quantize(W, "additive:1x2"), np.eye(16)), {"beam": 5}, ValueError, "beam 5 1 to 4"),
    (
        search_codes,
        (W, ql.quantize(W, "additive:1x2"), np.eye(16)),
        {"row_groups": [8]},
        ValueError,
        "row_groups 8",
    ),
    (refit_tables, (W, ql.quantize(W, "additive:1x2"), np.eye(16)), {"steps": -1}, ValueError, "steps -1"),
    (
        refit_tables,
        (W[:4], ql.quantize(W, "additive:1x2"), np.eye(16)),
        {},
        ValueError,
        "start [8, 16] [4, 16]",
    ),
]


@pytest.mark.parametrize(("call", "arguments", "options", "error", "words"), REFUSED)
def test_refuses(call, arguments, options, error, words):
    with pytest.raises(error) as refused:
        call(*arguments, **options)
    assert re.search(".*".join(map(re.escape, words.split())), str(refused.value), re.DOTALL), refused.value


def hessian(rng, k, correlation=0.7):
    x = rng.standard_normal((4 * k, k)).astype(np.float32)
    for column in range(1, k):
        x[:, column] += correlation * x[:, column - 1]
    result = ql.Hessian(k)
    result.add(x)
    return result


def test_describes_itself():
    assert ql.Additive() == ql.parse_format("additive:2x8") == ql.parse_format("additive:2x8:g8:channel:f16")
    assert ql.Additive(1, 16, 4, 2, 64, "bfloat16").spec == "additive:1x16:g2x4:scale64:bf16"
    for form in FORMATS:
        assert form == ql.parse_format(form.spec) == ql.format_from_json(form.to_json())
        assert hash(form) == hash(dataclasses.replace(form))
    with pytest.raises(ValueError, match="TABLESxBITS"):
        ql.parse_format("additive:2x8:tensor")


def test_bits():
    assert ql.Additive(1, 16).average_bits(4096, 4096) == pytest.approx(2.504, abs=5e-4)
    assert ql.Additive(2, 8).average_bits(4096, 4096) == pytest.approx(2.008, abs=5e-4)
    assert ql.Additive(1, 8).average_bits(4096, 4096) == pytest.approx(1.006, abs=5e-4)
    # The Linears of Llama-2-7B.
    for form, published in (
        (ql.Additive(1, 16), 2.294),
        (ql.Additive(2, 8), 2.006),
        (ql.Additive(1, 8), 1.0045),
        (ql.Additive(1, 16, 16), 1.58),
    ):
        shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
        bits = sum(form.average_bits(n, k) * n * k for n, k in shapes) / sum(n * k for n, k in shapes)
        assert bits == pytest.approx(published, abs=0.006)
    w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for spec in (
        "additive:2x8:g8",
        "additive:2x8:g8:t4",
        "additive:1x4:g4:scale8:s4",
        "additive:1x8:g4:t2x3",
    ):
        form = ql.parse_format(spec)
        q = ql.quantize(w, form)
        assert q.bits_per_weight == pytest.approx(form.average_bits(64, 256))
        assert form.size_in_bits(64, 256) == q.bits_per_weight * w.size
    # Scales that are few are stored as they are, which the publications' figure leaves out.
    few = ql.Additive(1, 4, 4, scale_group=16, scale_bits=4)
    assert few.size_in_bits(64, 256) / w.size == pytest.approx(few.average_bits(64, 256) + 12 / 16)


def test_levels():
    rng = np.random.default_rng(8)
    w = rng.standard_normal((24, 96)) * np.exp(rng.standard_normal((24, 12))).repeat(8, axis=1)
    w = w.astype(np.float32)
    plain = ql.quantize(w, "additive:2x5:g4:scale8")
    assert plain == plain and "scales" in plain.planes
    # As many levels as scales: exact.
    enough = ql.quantize(w, "additive:2x5:g4:scale8:s4")
    assert set(enough.planes) == set(plain.planes)
    assert np.array_equal(enough.dequantize(), plain.dequantize())
    # More levels lose less of what they stand for.
    h, losses = hessian(rng, 96), []
    for spec in ("additive:2x5:g4", *(f"additive:2x5:g4:scale8:s{bits}" for bits in (1, 2, 3, 4))):
        q = ql.quantize(w, spec, ql.BeamSearch(h, rounds=3))
        assert np.array_equal(q.dequantize(), reference.decode(q))
        assert all(b < a for a, b in zip(q.report.losses, q.report.losses[1:], strict=False))
        losses.append(ql.proxy_loss(w, q, h))
        if "scale_levels" in q.planes:
            assert len(np.unique(np.asarray(q.planes["scale_levels"])[0])) <= 2**q.format.scale_bits
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert losses[-1] < 1.05 * losses[-2]
    fed = ql.quantize(w, "additive:2x5:g4:scale8:s2:t3", ql.GPTQ(h))
    nearest = ql.quantize(w, "additive:2x5:g4:scale8:s2:t3", ql.Nearest(hessian=h))
    assert fed.report.proxy_loss < 0.9 * nearest.report.proxy_loss
    # A row of zeros, and groups of zeros.
    w[3], w[5, :40] = 0, 0
    q = ql.quantize(w, "additive:2x5:g4:scale8:s2")
    assert np.isfinite(q.dequantize()).all() and np.abs(q.dequantize()[5, :40]).max() < 0.5


@pytest.mark.parametrize("betas", [(0.0, 0.95), (0.9, 0.99)])
@pytest.mark.parametrize("spec", ["additive:2x3:g4:f32", "additive:1x4:g2x2:scale8:f32"])
def test_steps_of_adam_are_those_of_torch(spec, betas):
    rng = np.random.default_rng(11)
    n, k, steps, rate = 12, 32, 3, 3e-3
    w, h = rng.standard_normal((n, k)).astype(np.float32), hessian(rng, k)
    q = ql.quantize(w, spec)
    form, found = q.format, refit_tables(w, q, h, steps=steps, solver="adam", rate=rate, betas=betas)
    width = k if form.scale_group == "channel" else form.scale_group
    norm = (form.out_group * width) ** 0.5
    tables = torch.tensor(reference.additive_tables(q) / norm, dtype=torch.float64, requires_grad=True)
    scales = torch.tensor(reference.additive_scales(q) * norm, dtype=torch.float64, requires_grad=True)
    count = k // form.in_group
    words = np.asarray(q.planes["codes"])
    codes = np.array([reference.unpack_bits(row, form.bits, count * form.codebooks) for row in words])
    codes = torch.from_numpy(codes.astype(np.int64).reshape(len(words), count, form.codebooks))
    of_block = torch.arange(count) * form.in_group // width
    moments = torch.from_numpy(h.sum() / h.tokens)

    def loss():
        value = sum(tables[book][codes[:, :, book]] for book in range(form.codebooks))
        value = (value * scales[:, of_block, None, None]).permute(0, 2, 1, 3).reshape(n, k)
        error = torch.from_numpy(w).double() - value
        return ((error @ moments) * error).sum() / n

    adam = torch.optim.Adam([tables, scales], lr=rate, betas=betas, amsgrad=True)
    before = loss().item()
    for _ in range(steps):
        adam.zero_grad()
        loss().backward()
        adam.step()
    assert loss().item() < 0.98 * before
    assert ql.proxy_loss(w, found, h) == pytest.approx(loss().item() * n, rel=2e-3)
    np.testing.assert_allclose(reference.additive_scales(found), scales.detach() / norm, rtol=1e-5)
    got, expected = reference.additive_tables(found), (tables.detach() * norm).numpy()
    np.testing.assert_allclose(got, expected, rtol=6e-4, atol=1e-4)  # float16
    moved = np.abs(expected - reference.additive_tables(q))
    assert np.median(moved) > 20 * np.median(np.abs(got - expected))
    frozen = refit_tables(w, q, h, steps=steps, solver="adam", rate=rate, scales=False)
    assert np.array_equal(frozen.planes["scales"], q.planes["scales"])


def test_adam_comes_to_where_conjugate_gradients_are():
    rng = np.random.default_rng(12)
    w = rng.standard_normal((48, 64)).astype(np.float32)
    h = hessian(rng, 64, 0.3)
    q = ql.quantize(w, "additive:2x4:g4:f32")
    before = ql.proxy_loss(w, q, h)
    by_cg = ql.proxy_loss(w, refit_tables(w, q, h, steps=10), h)
    by_adam = [
        ql.proxy_loss(w, refit_tables(w, q, h, steps=s, solver="adam", rate=1e-3), h) for s in (100, 1000)
    ]
    assert by_adam[1] < by_adam[0] < before
    assert abs(by_adam[1] - by_cg) < 0.05 * (before - by_cg)
    for spec in ("additive:2x4:g4:scale8:s2", "additive:1x6:g4:t4"):  # straight through levels
        start = ql.quantize(w, spec)
        moved = refit_tables(w, start, h, solver="adam", rate=1e-3)
        assert ql.proxy_loss(w, moved, h) < 0.995 * ql.proxy_loss(w, start, h)
        assert np.array_equal(moved.planes["codes"], start.planes["codes"])
    searched = ql.quantize(w, "additive:2x4:g4", ql.BeamSearch(h, solver="adam", rate=1e-3, rounds=2))
    assert len(searched.report.losses) > 1 and searched.report.losses[-1] < 0.85 * before
    one = refit_tables(w, q, h, steps=20, solver="adam", threads=1)
    two = refit_tables(w, q, h, steps=20, solver="adam", threads=2)
    assert all(np.array_equal(plane, two.planes[name]) for name, plane in one.planes.items())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(16, 48), (5, 37), (1, 1), (0, 8), (8, 0)])
def test_planes_files_and_products(tmp_path, form, shape):
    rng = np.random.default_rng(3)
    w = rng.standard_normal(shape).astype(np.float32)
    q = ql.quantize(w, form)
    assert np.array_equal(q.dequantize(), reference.decode(q))
    ql.save_tensors(tmp_path / "w.safetensors", {"w": q})
    back = ql.load_tensors(tmp_path / "w.safetensors", kind="torch")["w"]
    assert back.format == form
    assert np.array_equal(back.dequantize().numpy(), q.dequantize())
    x = rng.standard_normal((3, shape[1])).astype(np.float32)
    assert np.abs(ql.matmul(x, q) - x @ q.dequantize().T).max(initial=0) < 1e-3
    assert ql.can_matmul(q) and not ql.can_matmul(q, activations="int8")


def test_the_documented_bytes_of_levels_decode():
    planes = {
        "codes": np.array([[0x1B]], np.int32),
        "codebook_codes": np.array([[0xC6]], np.int32),
        "codebook_levels": np.array([0, 1, -1, 2], np.float16).reshape(1, 1, 1, 2, 2),
        "scale_codes": np.array([[2]], np.int32),
        "scale_levels": np.array([[1, 2]], np.float16),
    }
    form = ql.Additive(1, 2, 2, 1, 2, scale_bits=1, table_bits=1)
    q = ql.PackedTensor(form, (1, 6), planes)
    assert q.dequantize().tolist() == reference.decode(q).tolist() == [[1, 2, 0, -2, 1, -1]]


def test_the_documented_bytes_decode():
    planes = {
        "codes": np.array([[0x1E]], np.int32),
        "codebook": np.array([[0, 1, 2, -1], [0, 0, 0.5, 0.25]], np.float16).reshape(2, 2, 1, 2),
        "scales": np.array([[2, -1]], np.float16),
    }
    q = ql.PackedTensor(ql.Additive(2, 1, 2, 1, 4), (1, 6), planes)
    assert q.dequantize().tolist() == [[1, 2.5, 5, -1.5, -2, 1]]


def test_feedback_errs_less():
    rng = np.random.default_rng(5)
    w = rng.standard_normal((64, 128)).astype(np.float32)
    h = hessian(rng, 128)
    nearest = ql.quantize(w, "additive:2x6:g4", ql.Nearest(hessian=h))
    fed = ql.quantize(w, "additive:2x6:g4", ql.GPTQ(h))
    assert fed.report.proxy_loss < 0.85 * nearest.report.proxy_loss


def test_models_and_the_command_line(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    spec = "additive:2x6:g4"
    report = models.quantize(folder, ql.Recipe(spec), output=tmp_path / "quantized")
    assert {module.format for module in report.modules} == {spec}
    model = models.load(tmp_path / "quantized", dtype=torch.float32)
    expected = models.load_reference(folder)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            expected.get_submodule(name).weight.data = module.dequantize().to(torch.float32)
    tokens = torch.from_numpy(model_factory.token_ids(32)[None])
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits.float(), rtol=1e-3, atol=1e-3)
    arguments = ["quantize", str(folder), "-o", str(tmp_path / "out"), "-r", "nearest", "-f"]
    result = CliRunner().invoke(app, [*arguments, "additive:1x4:g4:scale8"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "additive:1x4:g4:scale8" in result.stdout.replace("\n", "")


def literal_sweep(w, q, h, beam):
    """The search by its definition, in float64 and in the natural order, for blocks of one row: every
    candidate's loss from the whole row anew. Codes [n, blocks, tables]."""
    form = q.format
    n, k = q.shape
    blocks = k // form.in_group
    tables = np.asarray(q.planes["codebook"])[:, :, 0].astype(np.float64)
    scales = np.asarray(q.planes["scales"]).astype(np.float64)
    found = []
    for row in range(n):
        stream = reference.unpack_bits(q.planes["codes"][row], form.bits, blocks * form.codebooks)
        states = [stream.reshape(blocks, form.codebooks)]
        for block in range(blocks):
            for book in range(form.codebooks):
                candidates = []
                for rank, state in enumerate(states):
                    for code in range(2**form.bits):
                        codes = state.copy()
                        codes[block, book] = code
                        value = sum(tables[m][codes[:, m]] for m in range(form.codebooks)).ravel()
                        error = w[row] - scales[row, 0] * value
                        candidates.append((error @ h @ error, rank, code, codes))
                states = [codes for *_, codes in sorted(candidates, key=lambda c: c[:3])[:beam]]
        found.append(states[0])
    return np.array(found)


@pytest.mark.parametrize("beam", [1, 3])
def test_the_search_is_the_literal_one(beam):
    rng = np.random.default_rng(beam)
    w = rng.standard_normal((3, 24)).astype(np.float32)
    h = hessian(rng, 24)
    q = ql.quantize(w, "additive:2x3:g4")
    found = search_codes(w, q, h, beam=beam, float64=True)
    codes = [reference.unpack_bits(found.planes["codes"][r], 3, 12).reshape(6, 2) for r in range(3)]
    assert np.array_equal(codes, literal_sweep(w, q, h.sum() / h.tokens, beam))
    some = search_codes(w, q, h, beam=beam, float64=True, row_groups=[1])
    assert np.array_equal(some.planes["codes"][1], found.planes["codes"][1])
    assert np.array_equal(some.planes["codes"][0], q.planes["codes"][0])
    assert search_codes(w, q, h, row_groups=[]) is q
    dear = np.zeros((2, 8))
    dear[:, 1:] = 1e6
    cheap = search_codes(w, q, h, code_penalties=dear)
    assert not cheap.planes["codes"].any()


def test_losses_fall():
    rng = np.random.default_rng(6)
    w = rng.standard_normal((64, 128)).astype(np.float32)
    h, held_out = hessian(rng, 128), hessian(rng, 128)
    fed = ql.quantize(w, "additive:2x6:g8", ql.GPTQ(h)).report.proxy_loss
    for options in (
        {},
        {"beam": 4, "order": "natural", "start": "gptq"},
        {"damp": 0.1, "refit_scales": False},
    ):
        q = ql.quantize(w, "additive:2x6:g8", ql.BeamSearch(h, held_out=held_out, **options))
        report = q.report
        assert report.method == "beam_search" and len(report.losses) > 3
        assert all(after < before for before, after in zip(report.losses, report.losses[1:], strict=False))
        assert report.proxy_loss < 0.8 * min(fed, report.proxy_loss_nearest)
        assert report.held_out_loss < 0.9 * report.held_out_loss_nearest
        assert report.proxy_loss == pytest.approx(ql.proxy_loss(w, q, h), rel=1e-5)
        if "damp" not in options:
            assert report.losses[-1] == pytest.approx(report.proxy_loss)
    start = ql.quantize(w, "additive:2x6:g8")
    assert ql.proxy_loss(w, refit_tables(w, start, h), h) < 0.95 * ql.proxy_loss(w, start, h)
    torch_q = ql.quantize(torch.from_numpy(w), "additive:2x6:g8", ql.BeamSearch(h, rounds=1), threads=1)
    numpy_q = ql.quantize(w, "additive:2x6:g8", ql.BeamSearch(h, rounds=1), threads=2)
    assert np.array_equal(torch_q.dequantize().numpy(), numpy_q.dequantize())


def test_the_rounding_describes_itself():
    rounding = ql.BeamSearch(
        beam=4, order="natural", start="gptq", damp=0.01, rounds=7, refit=5, float64=True
    )
    assert rounding.spec == "beam_search:natural:float64:gptq:beam=4:damp=0.01:rounds=7:refit=5"
    adam = ql.BeamSearch(solver="adam", rate=0.001)
    assert adam.spec == "beam_search:adam:rate=0.001" and adam.refit == 100
    assert ql.parse_rounding("beam_search:adam:refit=50").spec == "beam_search:adam:refit=50"
    others = (ql.BeamSearch(refit_scales=False, sweeps=3), ql.BeamSearch(solver="adam", betas=(0.9, 0.99)))
    for other in (rounding, adam, ql.BeamSearch(), *others):
        again = ql.rounding_from_json(other.to_json())
        assert isinstance(again, ql.BeamSearch) and again.to_json() == other.to_json()
    assert ql.parse_rounding(rounding.spec).to_json() == rounding.to_json()
    assert ql.parse_rounding("beam_search").to_json() == ql.BeamSearch().to_json()
    for bad in ("beam_search:beam", "beam_search:beam=9", "beam_search:beam=2:beam=3", "beam_search:x=1"):
        with pytest.raises(ValueError, match="beam"):
            ql.parse_rounding(bad)
    with pytest.raises(ValueError, match="expected additive"):
        ql.Recipe("additive:1x4", ql.BeamSearch(), overrides={"a": "uniform:4"})
    recipe = ql.Recipe.parse("additive:2x4:g4", "beam_search:beam=2")
    assert (
        ql.Recipe.from_json(recipe.to_json()) == recipe
        or recipe.to_json() == ql.Recipe.from_json(recipe.to_json()).to_json()
    )


def test_models_by_beam_search(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    ids = model_factory.token_ids(256)
    recipe = ql.Recipe.parse("additive:2x4:g4", "beam_search:beam=2")
    options = {"windows": 8, "window": 16, "held_out_windows": 2}
    report = models.quantize(folder, recipe, ids, output=tmp_path / "out", **options)
    assert {module.method for module in report.modules} == {"beam_search"}
    assert all(module.proxy_loss < module.proxy_loss_nearest for module in report.modules)
    assert models.load(tmp_path / "out") is not None
    assert models.plan(folder, recipe, **options).seconds > 0
    text = tmp_path / "text.txt"
    text.write_text("in the beginning " * 400)
    arguments = ["quantize", str(folder), "-o", str(tmp_path / "cli"), "-f", "uniform:4", "-r", "beam_search"]
    result = CliRunner().invoke(app, [*arguments, "-c", str(text)])
    assert result.exit_code != 0


def test_checkpoints_of_aqlm(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    for spec in ("additive:2x8:g8", "additive:1x9:g4", "additive:1x9:g4:t4"):
        form = ql.parse_format(spec)
        plain = dataclasses.replace(form, table_bits=0)  # numbers are written, not levels
        name = spec.replace(":", "-")
        models.quantize(folder, ql.Recipe(form), output=tmp_path / name)
        report = models.export(tmp_path / name, tmp_path / f"{name}-aqlm", "aqlm")
        assert len(report.modules) == 14
        config = json.loads((tmp_path / f"{name}-aqlm" / "config.json").read_text())["quantization_config"]
        assert (
            config["quant_method"] == "aqlm" and "lm_head.weight" in config["linear_weights_not_to_quantize"]
        )
        sizes = [
            config[key] for key in ("num_codebooks", "nbits_per_codebook", "out_group_size", "in_group_size")
        ]
        assert sizes == [form.codebooks, form.bits, form.out_group, form.in_group]
        seen = ql.inspect(tmp_path / f"{name}-aqlm")
        assert seen.layout == "aqlm" and sum(entry.format == plain.spec for entry in seen.tensors) == 14
        models.import_(tmp_path / f"{name}-aqlm", tmp_path / f"{name}-back")
        before, after = (
            {
                key: value
                for file in sorted(path.glob("*.safetensors"))
                for key, value in ql.load_tensors(file).items()
            }
            for path in (tmp_path / name, tmp_path / f"{name}-back")
        )
        for key, value in before.items():
            if isinstance(value, ql.PackedTensor):
                assert after[key].format == plain
                assert np.array_equal(after[key].dequantize(), value.dequantize())
                assert form != plain or all(
                    np.array_equal(plane, after[key].planes[n]) for n, plane in value.planes.items()
                )
    models.quantize(folder, ql.Recipe("additive:1x4:g4:scale8"), output=tmp_path / "scales")
    with pytest.raises(ValueError, match="one scale"):
        models.export(tmp_path / "scales", tmp_path / "no", "aqlm")
    mixed = ql.Recipe("additive:1x4", overrides={"re:.*down_proj": "additive:1x5"})
    models.quantize(folder, mixed, output=tmp_path / "mixed")
    with pytest.raises(ValueError, match="one format"):
        models.export(tmp_path / "mixed", tmp_path / "no", "aqlm")
    assert not (tmp_path / "no").exists()
