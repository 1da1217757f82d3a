"""The demo on a few windows, its plot, and the measurements behind it."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
matplotlib = pytest.importorskip("matplotlib")


import quantloom as ql
from quantloom import demo, evaluate, experiments, plots
from quantloom.cli import app

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


def figures(measurement):
    return (
        measurement["bits_per_weight"],
        measurement["perplexity"],
        measurement["kl"],
        measurement["file_bytes"],
    )


def test_demo(tmp_path):
    output = tmp_path / "out"
    settings = (demo.Setting(), demo.Setting("uniform:2:channel:asym", "nearest"), demo.CHECKPOINT)
    small = {"settings": settings, "window": 64, "calibration_windows": 8, "evaluation_windows": 4}
    calls, rows = [], []
    report = demo.run(
        TINY, output, **small, progress=lambda *event: calls.append(event), done=lambda row: rows.append(row)
    )
    assert report.measurements == tuple(rows)
    assert calls[-1][1] == calls[-1][2]
    assert all(before[1] <= after[1] for before, after in itertools.pairwise(calls))

    original, nearest, gptq = report.measurements
    assert (original.format, original.bits_per_weight, original.kl, original.top1_agreement) == (
        "bf16",
        16,
        0,
        1,
    )
    # 2 bits, a float16 scale and a 2-bit zero per row.
    assert 2 < nearest.bits_per_weight < 2.1
    assert gptq.bits_per_weight == pytest.approx(4 + (16 + 4) / 128, rel=0.01)
    assert 0 < gptq.kl < nearest.kl
    assert gptq.perplexity < nearest.perplexity
    assert gptq.file_bytes < original.file_bytes

    assert sorted(entry.name for entry in output.iterdir()) == ["divergence.png", "model-4bit", "report.json"]
    document = json.loads((output / "report.json").read_text())
    assert [figures(entry) for entry in document["measurements"]] == [
        (row.bits_per_weight, row.perplexity, row.kl, row.file_bytes) for row in report.measurements
    ]
    png = (output / "divergence.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert ql.inspect(output / "model-4bit").bits_per_weight == pytest.approx(gptq.bits_per_weight)

    # The checkpoint on its own gives the row's figures.
    ids = evaluate.tokens(TINY, TINY / "valid.txt")
    loaded = ql.models.load(output / "model-4bit", torch.float32)
    compared = evaluate.compare(loaded, ql.models.load_reference(TINY), ids, window=64, windows=4)
    assert compared.kl == pytest.approx(gptq.kl, rel=1e-4)
    assert compared.reference_perplexity == pytest.approx(original.perplexity, rel=1e-5)

    # A second run replaces the first, leaves other files, and gives the same figures.
    (output / "notes.txt").write_text("mine")
    again = demo.run(TINY, output, **small)
    assert (output / "notes.txt").read_text() == "mine"
    for first, second in zip(report.measurements, again.measurements, strict=True):
        assert (first.kl, first.perplexity, first.top1_agreement) == (
            second.kl,
            second.perplexity,
            second.top1_agreement,
        )


def test_settings_cover_what_the_table_promises():
    described = {(setting.format, setting.rounding) for setting in demo.SETTINGS}
    for rounding in ("nearest", "gptq"):
        for bits in (8, 4, 3, 2):
            assert (f"uniform:{bits}:g128:asym", rounding) in described
        assert ("uniform:4:channel:asym", rounding) in described
    assert (None, None) in described
    assert len(described) == 11


def test_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*config\.json"):
        demo.run(tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        demo.run(TINY, tmp_path / "file")
    with pytest.raises(ValueError, match="whose checkpoint is kept"):
        demo.run(TINY, tmp_path / "out", settings=(demo.Setting(),))
    assert not (tmp_path / "out").exists()


def test_a_failing_run_leaves_an_earlier_one(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "report.json").write_text("earlier")
    with pytest.raises(ValueError, match="windows"):
        demo.run(TINY, output, settings=(demo.CHECKPOINT,), window=64, calibration_windows=10**6)
    assert [entry.name for entry in output.iterdir()] == ["report.json"]
    assert (output / "report.json").read_text() == "earlier"


def test_decoded_weights_of_one_setting_do_not_stay_for_the_next(tmp_path):
    """A layer that a setting leaves alone is the original's again."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4096, 1024)
    common = {"window": 32, "calibration_windows": 2, "held_out_windows": 1, "evaluation_windows": 2}
    rough, fine = (
        experiments.Setting("uniform:2:channel", "nearest"),
        experiments.Setting("uniform:8:g128", "nearest"),
    )
    together = experiments.measure(TINY, [rough, fine], ids, ids, tmp_path, **common)
    alone = experiments.measure(TINY, [fine], ids, ids, tmp_path, **common)
    assert together[1].kl == alone[0].kl
    assert together[0].kl > 10 * together[1].kl
    assert together[1].loss_ratio is None
    searched = experiments.Setting("uniform:2:g128", "nearest:search")
    assert 0 < experiments.measure(TINY, [searched], ids, ids, tmp_path, **common)[0].loss_ratio < 1
    assert list(tmp_path.iterdir()) == []


def row(format, rounding, bits, kl):
    return SimpleNamespace(format=format, rounding=rounding, bits_per_weight=bits, kl=kl)


def test_plot(tmp_path):
    rows = [
        row("bf16", "none", 16.0, 0.0),
        row("uniform:4:g128:asym", "nearest", 4.16, 0.04),
        row("uniform:2:g128:asym", "nearest", 2.14, 1.5),
        row("uniform:4:channel:asym", "gptq", 4.04, 0.03),
    ]
    plots.plot_divergence(rows, tmp_path / "plot.png", "title")
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "plot.png")
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1000
    with pytest.raises(ValueError, match="no measurement"):
        plots.plot_divergence(rows[:1], tmp_path / "other.png", "title")
    assert not (tmp_path / "other.png").exists()


def test_command(tmp_path):
    arguments = ["demo", "--model", str(TINY), "-o", str(tmp_path / "out"), "--window", "32"]
    arguments += ["--windows", "2", "--evaluation-windows", "2"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for word in (
        "bf16",
        "nearest (RTN)",
        "GPTQ",
        "uniform:2:g128:asym",
        "uniform:4:channel:asym",
        "KL divergence",
    ):
        assert word in result.stdout
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(document["measurements"]) == 11
    assert all(math.isfinite(entry["kl"]) for entry in document["measurements"])
