"""The programs that compare formats on a model, on the embedded one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import quantloom as ql

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"


def start(program, *arguments):
    path = os.pathsep.join([str(Path(ql.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    file = ROOT / "bench" / "quality" / program
    command = [sys.executable, file, TINY, "--validation", TINY / "valid.txt", *arguments]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )


def run(output, *arguments):
    return start(
        "bench_formats.py",
        *("--training", TINY / "calib.txt", "-o", output),
        *("--sequence-length", 64, "--sequences", 8, "--batch", 4),
        *arguments,
    )


def test_cast_to_linear_layers():
    arguments = ["--window", 64, "--evaluation-windows", 8, "--formats", "compressed", "block-absmax"]
    done = start("cast_table.py", *arguments, "--bits", 3, 4)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[n, b] for b in "34" for n in ("compressed", "block-absmax")]
    for name, bits, stored, _, kl, *_ in rows:
        # Tables of the coder, or a scale in bfloat16 for each 64 weights.
        assert 0 <= float(stored) - float(bits) < (0.05 if name == "compressed" else 0.27)
        assert float(kl) > 0
    assert float(rows[2][4]) < float(rows[0][4]) / 2 and float(rows[3][4]) < float(rows[1][4]) / 2


def test_cast_and_training(tmp_path):
    arguments = ["--steps", 6, "--formats", "compressed", "sparse"]
    done = run(tmp_path / "a.json", *arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["baseline"]["kl"] == pytest.approx(0, abs=1e-6)
    compressed, sparse = document["rows"]
    assert compressed["cast"]["kl"] < sparse["cast"]["kl"]
    for row in (compressed, sparse):
        assert 3 < row["nominal_bits"] < 3.1
        assert row["nominal_bits"] - 0.03 < row["cast"]["tensor_bits"] < row["cast"]["measured_bits"] < 3.2
        assert 2.9 < row["trained"]["tensor_bits"] < row["trained"]["measured_bits"] < 3.2
        assert 0 < row["trained"]["kl"] < 0.15
        assert row["trained"] != row["cast"]
    lines = (tmp_path / "a.md").read_text().splitlines()
    assert len(lines) == 6
    assert f"{sparse['trained']['kl']:.4f}" in lines[-1]

    assert run(tmp_path / "b.json", *arguments[:3], "sparse").returncode == 0
    again = json.loads((tmp_path / "b.json").read_text())
    assert again == {**document, "rows": [sparse]}


def test_rows_join_the_file(tmp_path):
    """Formats that are measured already are left out, and fits are taken from their file."""
    arguments = ["--steps", 0, "--sequences", 2, "--bits", 2, "--fits", tmp_path / "fits.json"]
    done = run(tmp_path / "a.json", *arguments, "--formats", "tensor-rms", "--fit-only")
    assert done.returncode == 0, done.stderr
    fits = (tmp_path / "fits.json").read_text()
    assert list(json.loads(fits)) == ["2b-t(mode=asymmetric){*,*:BFLOAT16:rms:search}"]
    assert not (tmp_path / "a.json").exists()
    assert run(tmp_path / "a.json", *arguments, "--formats", "tensor-rms").returncode == 0
    assert (tmp_path / "fits.json").read_text() == fits
    done = run(tmp_path / "a.json", *arguments, "--formats", "tensor-rms", "vectors", "block-signmax")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["vectors", "block-signmax"]
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["tensor-rms", "vectors", "block-signmax"]
    assert all("trained" not in row for row in rows)
    done = run(tmp_path / "a.json", "--steps", 1)
    assert done.returncode == 1
    assert "other conditions" in done.stderr
    done = run(tmp_path / "a.json", "--formats", "none")
    assert done.returncode == 2
    assert "expected some of compressed, sparse" in done.stderr
