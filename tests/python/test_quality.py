"""The quality table's program, and the example scripts."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import quantloom as ql

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("quality_table", ROOT / "bench" / "quality" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    """A program of the repository, with this process's package."""
    path = os.pathsep.join([str(Path(ql.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_settings(table):
    base = table.settings_of(["base"])
    assert base[0].format is None
    described = {(setting.format, setting.rounding) for setting in base[1:]}
    assert described == {
        (f"uniform:{bits}:{group}:asym", rounding)
        for bits in (8, 4, 3, 2)
        for group in ("g128", "channel")
        for rounding in ("nearest", "gptq")
    }
    everything = table.settings_of(["base", "search", "sym", "base"])
    assert len(everything) == len(set(everything)) == 1 + 3 * 16
    for setting in everything[1:]:
        ql.Recipe.parse(setting.format, setting.rounding)
    assert table.settings_of(["uniform:4:g32=gptq:damp=0.1"])[1].rounding == "gptq:damp=0.1"
    with pytest.raises(SystemExit, match="expected base, search, sym"):
        table.settings_of(["all"])
    named, trained = table.settings_of(
        ["zeroquant:w4/8a8=lkd:steps=5", "uniform:4=gptq:damp=0.1=int8:token=lkd:rate=0.1"]
    )[1:]
    assert named.recipe() == ql.Recipe.zeroquant(8, 4, distillation="lkd:steps=5")
    assert trained.recipe() == ql.Recipe.parse(
        "uniform:4", "gptq:damp=0.1", activations="int8:token", distillation="lkd:rate=0.1"
    )
    assert trained.label == "uniform:4 gptq:damp=0.1 int8:token lkd:rate=0.1"
    with pytest.raises(ValueError, match="as the recipe has its own"):
        table.settings_of(["zeroquant=gptq"])[1].recipe()


def test_program(tmp_path):
    pytest.importorskip("transformers")
    np.random.default_rng(3).integers(0, 4096, 1024).astype("<u2").tofile(tmp_path / "ids.u16")
    arguments = [
        ROOT / "bench" / "quality" / "table.py", TINY, "--calibration", tmp_path / "ids.u16", "--validation",
        tmp_path / "ids.u16", "-o", tmp_path / "q.json", "--window", 32, "--calibration-windows", 2,
        "--held-out-windows", 1, "--evaluation-windows", 2, "--settings",
    ]  # fmt: skip
    done = run(*arguments, "uniform:4:g128=gptq")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "q.json").read_text())
    original, gptq = document["measurements"]
    assert (original["format"], original["bits_per_weight"]) == ("bf16", 16)
    assert gptq["loss_ratio"] < 1
    assert gptq["held_out_loss_ratio"] > 0
    assert document["conditions"]["calibration_windows"] == 2
    lines = (tmp_path / "q.md").read_text().splitlines()
    assert len(lines) == 6
    assert f"{gptq['kl']:.5f}" in lines[-1]

    # More settings join the file; those that are there are not measured again.
    done = run(*arguments, "uniform:4:g128=gptq", "uniform:2:channel=nearest")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("uniform:2:channel nearest: KL ")
    grown = json.loads((tmp_path / "q.json").read_text())
    assert grown["measurements"][:2] == document["measurements"]
    assert len(grown["measurements"]) == 3

    done = run(*arguments, "zeroquant:w4/8a8=lkd:steps=1:batch=1:checks=1")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "q.json").read_text())["measurements"][-1]
    assert row["activations"] == "int8:token" and row["distillation"] == "lkd:steps=1:batch=1:checks=1"
    assert "| int8:token | lkd:steps=1" in (tmp_path / "q.md").read_text()

    done = run(*arguments, "base", "--evaluation-windows", 3)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "other conditions" in done.stderr


def test_alpha_plot(tmp_path):
    pytest.importorskip("matplotlib")

    def row(format, rounding, kl, activations="int8:token"):
        return {"format": format, "rounding": rounding, "activations": activations, "kl": kl}

    rows = [row("uniform:8:channel", f"smoothquant:alpha={a}", 1e-3 + a / 1e3) for a in (0.25, 0.75)]
    rows += [row("uniform:8:channel", "smoothquant", 2e-3), row("uniform:8:channel", "nearest", 5e-3)]
    rows += [row("uniform:8:channel", "smoothquant:search", 1e-3), row("uniform:6:channel", "nearest", 0.1)]
    rows += [row("uniform:4", "gptq", 0.2, ""), row("uniform:4", "smoothquant+gptq", 0.1)]
    file = tmp_path / "alpha.json"
    file.write_text(json.dumps({"conditions": {}, "measurements": rows}))
    program = ROOT / "bench" / "quality" / "alpha_plot.py"
    for name in ("a.svg", "b.svg", "c.png"):
        done = run(program, file, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture == (tmp_path / "b.svg").read_bytes()
    assert b"uniform:8:channel, int8:token" in picture and b"uniform:6" not in picture
    file.write_text(json.dumps({"conditions": {}, "measurements": rows[-1:]}))
    done = run(program, file, "-o", tmp_path / "none.svg")
    assert done.returncode == 1 and "fewer than two with smoothquant:alpha" in done.stderr
    assert not (tmp_path / "none.svg").exists()


def test_spqr_matrix():
    done = run(ROOT / "examples" / "scripts" / "spqr_matrix.py", "model.layers.0.self_attn.q_proj")
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith(("uniform:", "spqr:"))]
    assert len(rows) == 6
    assert [int(row[-1]) > 0 for row in rows] == [False, False, True, False, True, True]
    assert float(rows[4][-3]) <= 4.2
    assert float(rows[4][-2]) < float(rows[2][-2])
    assert "stored" in lines[-1]


def test_aqlm_matrix(tmp_path):
    script = ROOT / "examples" / "scripts" / "aqlm_matrix.py"
    done = run(script, "model.layers.0.self_attn.q_proj", tmp_path / "losses.png")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    steps = [float(line[-1]) for line in lines[1:8]]
    assert all(after < before for before, after in pairwise(steps))
    curves = [[float(number) for number in line[4:]] for line in lines if line[0].startswith("beam_search")]
    assert len(curves) == 5
    for curve in curves:
        assert all(after <= before for before, after in pairwise(curve))
    (nearest,), (gptq,) = (
        [float(line[1]) for line in lines if line[0] == name] for name in ("nearest", "gptq")
    )
    assert max(float(line[2]) for line in lines if line[0].startswith("beam_search")) < gptq < nearest
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_outlier_channels():
    done = run(ROOT / "examples" / "scripts" / "outlier_channels.py", "64")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    plain, smooth, _, columns, exact_columns = (float(row[-2].rstrip("%")) for row in rows)
    assert smooth < 0.2 * plain and columns < 0.5 * plain and exact_columns < 0.2 * plain


def test_quantize_a_matrix():
    done = run(ROOT / "examples" / "scripts" / "quantize_a_matrix.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("uniform")]
    assert len(rows) == 12
    for nearest, awq, gptq in zip(rows[::3], rows[1::3], rows[2::3]):
        assert float(gptq[3]) < float(awq[3]) <= float(nearest[3])
    assert "saved and loaded PackedTensor" in done.stdout


def test_quantize_a_model(tmp_path):
    pytest.importorskip("transformers")
    done = run(ROOT / "examples" / "scripts" / "quantize_a_model.py", TINY, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "28 layers at 3." in done.stdout
    assert "And it came to pass" in done.stdout
    assert ql.inspect(tmp_path / "out").layout == "quantloom"


def test_distil_a_model():
    pytest.importorskip("transformers")
    done = run(ROOT / "examples" / "scripts" / "distil_a_model.py", "12")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plain, distilled = (float(line.split("KL divergence ")[1].split()[0]) for line in (lines[0], lines[-1]))
    assert len(lines) == 6 and distilled < plain


def test_exl3_folder():
    pytest.importorskip("transformers")
    done = run(ROOT / "examples" / "scripts" / "exl3_folder.py")
    assert done.returncode == 0, done.stderr
    assert "trellis:4:mcg" in done.stdout and "exl3: 3.3" in done.stdout
    assert "came back unchanged" in done.stdout
