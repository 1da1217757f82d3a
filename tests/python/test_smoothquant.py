"""Smoothing: its formula, planted outlier channels, models of several families, files, the command line."""

import json

import model_factory
import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import models
from quantloom.cli import app
from quantloom.nn import QuantLinear, RoundedLinear
from test_models_awq import CASES, scaled_block
from typer.testing import CliRunner

SETTINGS = {"windows": 4, "window": 24, "held_out_windows": 1}
IDS = model_factory.token_ids(5 * 24)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(factor, rows=400, k=160, seed=0):
    """Weights, and inputs with three channels `factor` times as large as others."""
    rng = np.random.default_rng(seed)
    w = (0.05 * rng.standard_normal((96, k))).astype(np.float32)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    x[:, [5, 40, 77]] *= factor
    return w, x


def output_error(w, x, q, activations):
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    return np.square(ql.matmul(x, q, activations=activations) - exact).sum() / np.square(exact).sum()


def test_scales_are_those_of_the_formula():
    w, x = planted(30)
    w2 = 2 * w[:10]
    x[:, 9] = 0
    form = ql.parse_format("uniform:8:channel")
    choice = ql.search_smoothing([(w, form), (w2, form)], inputs=x, alpha=0.6)
    a = np.abs(x).max(0).astype(np.float64)
    c = np.maximum(np.abs(w).max(0), np.abs(w2).max(0)).astype(np.float64)
    live = a > 0
    octaves = 0.6 * np.log2(a[live]) - 0.4 * np.log2(c[live])
    octaves -= (octaves.min() + octaves.max()) / 2
    assert np.array_equal(choice.codes[live], np.rint(16 * octaves).astype(np.int8))
    assert choice.codes[9] == 0 and choice.exponent == 0.6
    assert choice.loss < choice.loss_unscaled and choice.losses == (choice.loss_unscaled, choice.loss)
    powers = ql.search_smoothing([(w, form)], inputs=x, alpha=0.6, powers_of_two=True)
    assert (powers.codes % 16 == 0).all() and powers.codes.any()
    known = ql.search_smoothing([(w, form), (w2, form)], a, alpha=0.6)
    assert np.array_equal(known.codes, choice.codes) and np.isnan(known.loss)


@pytest.mark.parametrize("factor", [20, 50, 100])
def test_planted_outlier_channels(factor):
    w, x = planted(factor)
    train, test = x[:200], x[200:]
    for bits in (8, 6):
        form, activations = f"uniform:{bits}:channel", f"int{bits}:token"
        plain = output_error(w, test, ql.quantize(w, form), activations)
        smooth = ql.SmoothQuant(inputs=train, activations=activations)
        half = output_error(w, test, ql.quantize(w, form, smooth), activations)
        assert half < 0.25 * plain
        search = ql.SmoothQuant(alpha=None, inputs=train, activations=activations)
        q = ql.quantize(w, form, search)
        assert output_error(w, test, q, activations) < 1.1 * half
        assert q.report.method == "smoothquant+nearest" and isinstance(q.transform, ql.ChannelScales)


def test_search_keeps_what_needs_no_scales():
    w, x = planted(1)
    form = ql.parse_format("uniform:8:channel")
    choice = ql.search_smoothing([(w, form)], inputs=x, activations=None)
    assert choice.loss <= choice.loss_unscaled == choice.losses[0] and len(choice.losses) == 20
    if choice.exponent == 0:
        assert not choice.codes.any()
    # The same whatever the threads.
    again = ql.search_smoothing([(w, form)], inputs=x, activations=None, threads=3)
    assert again.exponent == choice.exponent and again.losses == choice.losses


def test_composes_with_feedback():
    w, x = planted(50)
    x[:, 1:] += 0.5 * x[:, :-1]
    hessian = ql.Hessian(x.shape[1])
    hessian.add(x)
    smooth = ql.SmoothQuant(inputs=x)
    fed = ql.SmoothQuant("gptq", inputs=x, hessian=hessian)
    exact = "exact"
    plain = output_error(w, x, ql.quantize(w, "uniform:4:channel", smooth), exact)
    assert output_error(w, x, ql.quantize(w, "uniform:4:channel", fed), exact) < 0.8 * plain


def test_descriptions():
    for spec in (
        "smoothquant",
        "smoothquant:alpha=0.85",
        "smoothquant:search",
        "smoothquant:search=10:folded",
        "smoothquant+gptq",
        "smoothquant:alpha=0.7:folded+nearest:search",
    ):
        rounding = ql.parse_rounding(spec)
        assert isinstance(rounding, ql.SmoothQuant) and rounding.spec == spec
        assert ql.rounding_from_json(rounding.to_json()).to_json() == rounding.to_json()
    assert ql.SmoothQuant(activations="int6:token").to_json() != ql.SmoothQuant().to_json()
    for spec in ("smoothquant:alpha=2", "smoothquant:alpha=0", "smoothquant:alpha=x", "smoothquant:search=x",
                 "smoothquant:beta", "smoothquant:alpha=0.5:search", "smoothquant+awq"):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=r"rounding|alpha|then"):
            ql.parse_rounding(spec)
    with pytest.raises(ValueError, match="transform"):
        ql.Recipe("uniform:8:channel", ql.SmoothQuant(), transform="hadamard")
    with pytest.raises(ValueError, match="rounding: got inputs"):
        ql.Recipe("uniform:8:channel", ql.SmoothQuant(inputs=planted(2)[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_blocks_compute_what_they_did(case, dtype, tmp_path):
    make, places = CASES[case]
    block, stages, before, after, _, _ = scaled_block(
        make(), tmp_path, dtype, rounding="smoothquant", spec="uniform:8:channel"
    )
    for a, b in zip(after, before, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())
    assert {name for stage in stages for name in stage.modules} == set(block.linears)
    for stage in stages:
        place = next((p for ending, p in places.items() if stage.modules[0].endswith(ending)), None)
        assert stage.into == "input" if place is None else stage.into.endswith(place), stage.modules
        assert stage.exponent == 0.5


def quantize_model(tmp_path, rounding, activations, config=None, format="uniform:8:channel", **recipe):
    folder = tmp_path / "model"
    if not folder.exists():
        model_factory.write_model(folder, config or model_factory.llama(), dtype=torch.float32)
    name = f"{rounding}-{activations}-{len(recipe)}".replace(":", "_")
    recipe = ql.Recipe.parse(format, rounding, activations=activations, **recipe)
    report = models.quantize(folder, recipe, IDS, output=tmp_path / name, **SETTINGS)
    return folder, tmp_path / name, report


class TestModels:
    @pytest.mark.parametrize(
        "activations",
        [
            "int8:token",
            "int8:tensor:asym:static",
            "sdr4:g16:b16",
            "int8:tensor:static:outliers=2:static-outliers",
            "int8:token:outliers=2%",
        ],
    )
    def test_checkpoints_tell_the_activations(self, activations, tmp_path):
        _, out, report = quantize_model(tmp_path, "nearest", activations)
        packed, plain = models.load(out), models.load(out, dequantized=True)
        quants = [m for m in packed.modules() if isinstance(m, QuantLinear)]
        assert len(quants) == len(report.modules)
        assert {str(m.activations) for m in quants} == {m.activations for m in report.modules}
        assert all(m.activations.startswith(activations.split(":static")[0]) for m in report.modules)
        if "outliers" in activations:
            assert any("columns=0" in m.activations or "columns=1" in m.activations for m in report.modules)
        assert sum(isinstance(m, RoundedLinear) for m in plain.modules()) == len(quants)
        ids = torch.from_numpy(IDS[None, :40].astype(np.int64))
        with torch.no_grad():
            a, b = packed(ids).logits, plain(ids).logits
        assert float((a - b).norm()) <= 2e-2 * float(b.norm())
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        assert len(settings["activations"]) == len(quants)
        with pytest.raises(ValueError, match="inputs are rounded"):
            models.export(out, tmp_path / "exported", "compressed-tensors")

    def test_exact_layers_stay_exact(self, tmp_path):
        _, out, report = quantize_model(
            tmp_path, "nearest", "int8:token", activation_overrides={"re:.*down_proj": None}
        )
        by_name = {m.name: m.activations for m in report.modules}
        assert all((spec == "") == name.endswith("down_proj") for name, spec in by_name.items())
        kinds = {
            name: str(m.activations)
            for name, m in models.load(out).named_modules()
            if isinstance(m, QuantLinear)
        }
        assert all((spec == "exact") == name.endswith("down_proj") for name, spec in kinds.items())

    def test_smoothing_in_a_model(self, tmp_path):
        folder, out, report = quantize_model(tmp_path, "smoothquant:search=6", "int4:token")
        for module in report.modules:
            assert module.method == "smoothquant+nearest"
            assert module.output_error <= module.output_error_unscaled
        assert any(module.scaled_by for module in report.modules) and not report.fallbacks
        assert models.quantize(
            folder, ql.Recipe.from_json(report.recipe), IDS, output=tmp_path / "again", **SETTINGS
        ).modules == report.modules  # fmt: skip
        again, first = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", out.name))
        assert again == first

    def test_recipes_read_back(self):
        recipe = ql.Recipe.parse(
            "sdr:4:g16",
            "smoothquant:search+gptq",
            activations="int8:tensor:static",
            activation_overrides={"a": "int4:g32", "b": None},
        )
        again = ql.Recipe.from_json(recipe.to_json())
        assert again == recipe and again.activations_for("a").spec == "int4:g32"
        assert again.activations_for("b") is None and again.activations_for("c").static
        assert "activations" not in json.loads(ql.Recipe.parse("uniform:4").to_json())

    def test_static_formats_need_calibration(self, tmp_path):
        folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
        recipe = ql.Recipe.parse("uniform:8:channel", activations="int8:tensor:static")
        with pytest.raises(ValueError, match="calibration: got None"):
            models.quantize(folder, recipe, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_static_ranges_are_those_of_the_inputs_as_rounded(self, tmp_path):
        for transform in (None, "hadamard:b32"):
            folder = tmp_path / f"model-{transform}"
            model_factory.write_model(folder, model_factory.llama(layers=1), dtype=torch.float32)
            recipe = ql.Recipe.parse(
                "uniform:8:channel", activations="int8:tensor:static", transform=transform
            )
            report = models.quantize(folder, recipe, IDS, output=tmp_path / f"out-{transform}", **SETTINGS)
            model = models.load_reference(folder)
            seen = []
            q_proj = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
            q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))  # noqa: B023
            with torch.no_grad():
                for window in range(4):
                    model(torch.from_numpy(IDS[None, 24 * window : 24 * (window + 1)].astype(np.int64)))
            x = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen])
            if transform:
                x = ql.parse_transform(transform).rotate_input(x)
            scale = ql.parse_activations(report.modules[0].activations).scale
            assert scale == pytest.approx(float(x.abs().max()) / 127, rel=1e-5)


def test_command_line(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    ids = tmp_path / "ids.u16"
    np.asarray(IDS, "<u2").tofile(ids)
    recipe = ["-f", "uniform:8:channel", "-r", "smoothquant:alpha=0.6", "--activations", "int8:token"]
    exact = ["--activation-override", "re:.*o_proj=exact"]
    sizes = ["--windows", "4", "--window", "24", "--held-out-windows", "1", "--json"]
    command = ["quantize", str(folder), "-o", str(tmp_path / "out"), "-c", str(ids), *recipe, *exact, *sizes]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert not any("o_proj" in name for name in settings["activations"]) and settings["activations"]
    command[command.index("int8:token")] = "int9:token"
    assert CliRunner().invoke(app, command).exit_code == 2
