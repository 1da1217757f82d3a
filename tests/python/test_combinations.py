"""Roundings of weights, formats and rounded activations together, on the embedded model, end to end by the
command line."""

import json
from pathlib import Path

import pytest
import quantloom as ql
import torch
from quantloom import evaluate, models
from quantloom.cli import app
from typer.testing import CliRunner

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"

SPQR = "spqr:3:g16:s3:z3:b16"

# Format, rounding, activations; and the setting with plain rounding that it must be better than, if any.
CASES = [
    ("uniform:8:channel", "smoothquant", "int8:token", None),
    ("uniform:4:g64:asym", "nearest", "int8:token", None),
    ("uniform:4:g64:asym", "gptq", "int8:token", ("uniform:4:g64:asym", "int8:token")),
    ("uniform:4:g64:asym", "smoothquant+gptq", "int8:token", None),
    (SPQR, "smoothquant+gptq:outliers=1%", "int8:token", (SPQR, "int8:token")),
    ("sdr:4:g16", "gptq", "exact", ("sdr:4:g16", "exact")),
    ("sdr:4:g16", "smoothquant+gptq", "sdr4:g16:b16", ("sdr:4:g16", "sdr4:g16:b16")),
    ("uniform:4:g64", "gptq", "int8:token:outliers=6:static-outliers", ("uniform:4:g64", "int8:token")),
]  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    return models.load_reference(TINY), evaluate.tokens(TINY, TINY / "valid.txt")


def divergence(reference, out, dequantized):
    model = models.load(out, torch.float32, dequantized=dequantized)
    return evaluate.compare(model, *reference, 64, 16).kl


@pytest.mark.parametrize(("format", "rounding", "activations", "plain"), CASES)
def test_combination(format, rounding, activations, plain, reference, tmp_path):
    out = tmp_path / "out"
    options = ["--format", format, "--rounding", rounding, "--activations", activations]
    sizes = ["--windows", "16", "--window", "64", "--held-out-windows", "1", "--threads", "1"]
    command = ["quantize", str(TINY), "-o", str(out), "-c", str(TINY / "calib.txt"), *options, *sizes]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    recipe = ql.Recipe.parse(format, rounding, activations=None if activations == "exact" else activations)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert ql.Recipe.from_json(json.dumps(settings["recipe"])) == recipe
    found = divergence(reference, out, True)
    assert divergence(reference, out, False) == pytest.approx(found, rel=0.02)
    bits = models.read_report(out).bits_per_weight
    print(f"{format} {rounding} {activations}: {bits:.3f} bits, KL {found:.5f}")
    assert found < (0.002 if format.startswith("uniform:8") else 0.08)
    if plain is not None:
        activations = None if plain[1] == "exact" else plain[1]
        models.quantize(TINY, ql.Recipe.parse(plain[0], activations=activations), output=tmp_path / "plain")
        assert found < divergence(reference, tmp_path / "plain", True)
