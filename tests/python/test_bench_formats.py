"""The program that compares formats on a model, on the embedded one."""

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


def run(output, *arguments):
    path = os.pathsep.join([str(Path(ql.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable, ROOT / "bench" / "quality" / "bench_formats.py", TINY,
        "--training", TINY / "calib.txt", "--validation", TINY / "valid.txt", "-o", output,
        "--sequence-length", 64, "--sequences", 8,
        "--batch", 4, *arguments,
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )


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
