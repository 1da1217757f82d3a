"""The command line: results, JSON on stdout, one-line errors, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quantloom as ql
import typer
from quantloom.cli import app, common
from typer.testing import CliRunner

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
COMMANDS = [
    "quantize",
    "plan",
    "eval",
    "inspect",
    "export",
    "import",
    "trellis-search",
    "kv-calibrate",
    "demo",
    "doctor",
]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def one_line(result):
    """The error line; there is no traceback and nothing on stdout."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Token ids as files: no tokenizer needed."""
    folder = tmp_path_factory.mktemp("ids")
    rng = np.random.default_rng(7)
    for name, count in (("calib.u16", 4096), ("valid.u16", 1024)):
        rng.integers(0, 4096, count).astype("<u2").tofile(folder / name)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, ids):
    pytest.importorskip("transformers")
    output = tmp_path_factory.mktemp("cli") / "quantized"
    result = run(
        "quantize", TINY, "-o", output, "--format", "uniform:4:g128", "--rounding", "gptq", "--calibration",
        ids / "calib.u16", "--windows", 4, "--window", 64, "--held-out-windows", 2, "--json",
    )  # fmt: skip
    return output, json.loads(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    text = run(command, "--help").stdout
    assert "Usage" in text
    assert "--traceback" in text
    if command != "doctor":
        assert f"quantloom {command}" in text
        assert "Example" in text


def test_help_of_all():
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "Exit codes" in text
    assert run("--version").stdout == f"quantloom {ql.__version__}\n"


def test_imports_stay_light():
    """Help, doctor and inspect load neither torch nor transformers."""
    program = (
        "import sys\n"
        "from quantloom.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as done:\n"
        "    heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
        "    sys.exit(done.code)\n"
    )
    for arguments in (["--help"], ["quantize", "--help"], ["doctor"], ["inspect", str(TINY)]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr


def test_module_and_exit_codes(tmp_path):
    """`python -m quantloom` as a process: exit codes, streams, no traceback."""

    def process(*arguments):
        command = [sys.executable, "-m", "quantloom", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    done = process("inspect", TINY, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["weights"] == 4196608
    done = process("inspect", tmp_path / "missing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: path: no such file or folder: {tmp_path / 'missing'}\n"
    done = process("inspect", tmp_path / "missing", "--traceback")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert process("inspect").returncode == 2
    assert process("nonsense").returncode == 2


def test_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "quantloom", "inspect", str(TINY)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_quantize(quantized):
    output, document = quantized
    assert document["output"] == str(output)
    assert len(document["modules"]) == 28
    assert {module["method"] for module in document["modules"]} == {"gptq"}
    assert {module["format"] for module in document["modules"]} == {"uniform:4:g128:sym"}
    assert document["bits_per_weight"] == pytest.approx(4.125)
    assert document["timings"]["seconds"] > 0


def test_inspect_of_what_was_quantized(quantized):
    output, document = quantized
    inspected = json.loads(run("inspect", output, "--json").stdout)
    assert inspected["layout"] == "quantloom"
    assert inspected["bits_per_weight"] == pytest.approx(document["bits_per_weight"])
    assert inspected["model_bits_per_weight"] == pytest.approx(document["model_bits_per_weight"])
    text = run("inspect", output, "--planes").stdout
    assert "model.layers.0.mlp.down_proj" in text
    assert ".scales" in text
    summary = run("inspect", output, "--summary").stdout
    assert "model.layers.0" not in summary
    assert "3,145,728 weights, 4.1250 bits per weight" in summary
    assert "tensors" not in json.loads(run("inspect", output, "--summary", "--json").stdout)


def test_eval(quantized, ids):
    output, _ = quantized
    arguments = (
        "eval",
        output,
        "--reference",
        TINY,
        "--text",
        ids / "valid.u16",
        "--window",
        64,
        "--windows",
        3,
    )
    document = json.loads(run(*arguments, "--json").stdout)
    assert set(document) == {
        "model",
        "reference",
        "text",
        "perplexity",
        "reference_perplexity",
        "kl",
        "top1_agreement",
        "tokens",
        "windows",
        "seconds",
        "window",
    }
    assert document["tokens"] == 3 * 63
    assert document["kl"] > 0
    assert 0 < document["top1_agreement"] < 1
    text = run(*arguments).stdout
    assert f"{document['kl']:.5f}" in text
    # From packed codes: the same within the rounding of float32.
    packed = json.loads(run(*arguments, "--packed", "--json").stdout)
    assert packed["kl"] == pytest.approx(document["kl"], rel=1e-3)
    halves = json.loads(run(*arguments, "--packed", "--dtype", "bfloat16", "--json").stdout)
    assert halves["kl"] != packed["kl"]
    assert halves["kl"] == pytest.approx(document["kl"], rel=0.2)
    alone = json.loads(
        run("eval", TINY, "--text", ids / "valid.u16", "--window", 64, "--windows", 3, "--json").stdout
    )
    assert alone["perplexity"] == pytest.approx(document["reference_perplexity"], rel=1e-6)
    assert (alone["reference"], alone["windows"]) == (None, 3)


def test_plan():
    pytest.importorskip("transformers")
    document = json.loads(run("plan", TINY, "--format", "uniform:4:g128", "--json").stdout)
    assert document["peak_bytes"] > 0
    assert document["output_bytes"] > 0
    assert document["seconds"] > 0
    assert document["refusals"] == {}
    assert "peak memory" in run("plan", TINY, "--rounding", "nearest").stdout
    refused = run("plan", TINY, "--format", "uniform:5:g128", "--layout", "gptq", "--json").stdout
    assert len(json.loads(refused)["refusals"]) == 28


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_export_and_import(tmp_path, quantized, layout):
    output, _ = quantized
    run("export", output, "-o", tmp_path / "out", "--layout", layout)
    exported = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert exported["layout"] == layout
    document = json.loads(run("import", tmp_path / "out", "-o", tmp_path / "back", "--json").stdout)
    assert document["output"] == str(tmp_path / "back")
    back = json.loads(run("inspect", tmp_path / "back", "--json").stdout)
    assert back["layout"] == "quantloom"
    # The layout of AWQ has zero points, constant ones here.
    assert back["bits_per_weight"] == pytest.approx(4.15625 if layout == "awq" else 4.125)


def test_doctor():
    document = json.loads(run("doctor", "--json").stdout)
    assert set(document) == {
        "build",
        "python",
        "platform",
        "packages",
        "processor",
        "cuda",
        "formats",
        "kernels",
        "checks",
        "healthy",
    }
    assert document["healthy"] is True
    text = run("doctor").stdout
    assert all(entry["kernel"] in text for entry in document["kernels"])
    assert "FAILED" not in text


def test_doctor_of_a_broken_installation(monkeypatch):
    def broken(w, spec):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ql, "quantize", broken)
    assert "FAILED" in run("doctor", code=1).stdout
    assert json.loads(run("doctor", "--json", code=1).stdout)["healthy"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "uniform:9:g128"], "--format"),
        (["--format", "4bit"], "--format"),
        (["--rounding", "best"], "--rounding"),
        (["--rounding", "gptq:nonsense"], "--rounding"),
        (["--rounding", "nearest", "--damp", "0.1"], "--damp"),
        (["--rounding", "nearest", "--no-act-order", "--dynamic-groups"], "--act-order, --static-groups"),
        (["--damp", "-1"], "--damp"),
        (["--override", "down_proj"], "--override"),
        (["--override", "down_proj=uniform:0"], "--override"),
        (["--ignore", "re:("], "--ignore"),
        (["--windows", "0"], "--windows"),
        ([], "--calibration"),
    ],
)
def test_wrong_usage_of_quantize(tmp_path, arguments, message):
    result = run("quantize", TINY, "-o", tmp_path / "out", *arguments, code=2)
    assert result.stdout == ""
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_errors(tmp_path, ids, quantized):
    output, _ = quantized
    nearest = ("--rounding", "nearest")
    missing = tmp_path / "missing"
    line = one_line(run("quantize", missing, "-o", tmp_path / "out", *nearest, code=1))
    assert line == f"error: model: no such folder: {missing}"
    line = one_line(run("quantize", TINY, "-o", tmp_path / "out", "--calibration", missing, code=1))
    assert line == f"error: calibration: no such file: {missing}"
    line = one_line(run("quantize", TINY, "-o", tmp_path / "out", "--recipe", missing, code=1))
    assert line == f"error: recipe: no such file: {missing}"
    assert "config.json" in one_line(run("quantize", ids, "-o", tmp_path / "out", *nearest, code=1))
    assert str(output) in one_line(run("quantize", TINY, "-o", output, *nearest, code=1))
    assert not (tmp_path / "out").exists()
    assert str(missing) in one_line(run("eval", TINY, "--text", missing, code=1))
    line = one_line(run("eval", TINY, "--text", ids / "valid.u16", "--window", 600, code=1))
    assert "positions" in line
    line = one_line(run("eval", TINY, "--text", ids / "valid.u16", "--windows", 99, "--window", 64, code=1))
    assert "1024 tokens hold 16 windows of 64, expected at least 99" in line
    assert "header length" in one_line(run("inspect", ids / "valid.u16", code=1))
    assert "no such folder" in one_line(run("export", missing, "-o", tmp_path / "out", code=1))
    one_line(run("export", TINY, "-o", tmp_path / "out", code=1))
    one_line(run("import", TINY, "-o", tmp_path / "out", code=1))
    line = one_line(run("eval", TINY, "--device", "moon", "--text", ids / "valid.u16", code=1))
    assert "device: got 'moon'" in line
    line = one_line(run("eval", TINY, "--packed", "--text", ids / "valid.u16", code=1))
    assert line == f"error: --packed: {TINY} is not quantized"
    assert "no such folder" in one_line(run("demo", "--model", missing, code=1))
    assert run("export", output, "-o", tmp_path / "out", "--layout", "gguf", code=2).stdout == ""


def test_recipe_options(tmp_path):
    from quantloom.cli.quantize import _recipe

    options = {
        "format": "uniform:4:g128",
        "rounding": "gptq",
        "damp": 0.05,
        "act_order": False,
        "static_groups": False,
        "scale_search": True,
        "ignore": ["lm_head", "re:.*o_proj"],
        "override": ["re:.*\\.down_proj=uniform:8:channel", "x=none"],
        "recipe": None,
        "calibration": TINY / "calib.txt",
    }
    recipe = _recipe(**options)
    assert recipe.format == ql.Uniform(4, 128)
    rounding = recipe.rounding
    assert isinstance(rounding, ql.GPTQ)
    assert (rounding.damp, rounding.act_order, rounding.static_groups) == (0.05, False, False)
    assert rounding.scale_search == ql.ScaleSearch()
    assert recipe.ignore == ("lm_head", "re:.*o_proj")
    assert recipe.format_for("model.layers.3.down_proj") == ql.Uniform(8, "channel")
    assert recipe.format_for("x") is None
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert _recipe(**(options | {"recipe": tmp_path / "recipe.json"})) == recipe
    plain = _recipe(**(dict.fromkeys(options) | {"format": "uniform:4", "rounding": "nearest:search"}))
    assert plain.rounding.scale_search == ql.ScaleSearch()
    assert plain.ignore == ("lm_head",)


def test_progress_is_drawn_only_when_asked(capsys):
    with common.progress_bar(None) as update:
        update("loading", 1, 2)
    assert capsys.readouterr().err == ""
    with common.progress_bar(True) as update:
        update("loading [1]", 1, 2)
    captured = capsys.readouterr()
    assert "loading [1]" in captured.err
    assert captured.out == ""


def test_errors_of_other_kinds_name_themselves(capsys):
    @common.reports_errors
    def broken(traceback=False):
        raise {"a": 1}["b"]

    with pytest.raises(typer.Exit) as caught:
        broken()
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "error: KeyError: 'b' (--traceback shows where)\n"
    with pytest.raises(KeyError):
        broken(traceback=True)


def test_plain_values():
    document = {"a": float("nan"), "b": [np.float32(1.5), np.int64(2), Path("x")], 3: {"c": float("inf")}}
    assert common.plain(document) == {"a": None, "b": [1.5, 2, "x"], "3": {"c": None}}
    assert [common.size(v) for v in (0, 999, 1000, 8_400_000, 2e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "8.4 MB",
        "2.0 TB",
    ]
    assert [common.duration(v) for v in (1.25, 61, 7300)] == ["1.2 s", "1 min 1 s", "2 h 1 min"]


def test_two_sided_feedback(tmp_path, ids):
    pytest.importorskip("transformers")
    arguments = (
        "quantize", TINY, "--format", "trellis:2:mul1:l10", "--rounding", "gptq:ratio=0.9",
        "--calibration", ids / "calib.u16", "--windows", 4, "--window", 64, "--held-out-windows", 0,
        "--ignore", "re:model.layers.([1-9]|0.mlp).*", "--two-sided", 2, "--json",
    )  # fmt: skip
    modules = json.loads(run(*arguments, "-o", tmp_path / "two").stdout)["modules"]
    assert modules
    for module in modules:
        assert module["two_sided_loss"] < module["two_sided_loss_nearest"]
        assert module["trellis_ratio"] == pytest.approx(0.9 * ql.trellis.best_ratio(2))
    line = one_line(run(*arguments, "-o", tmp_path / "bad", "--format", "uniform:4", code=1))
    assert "output_hessians" in line or "ratio_factors" in line
    run("quantize", TINY, "-o", tmp_path / "bad", "--rounding", "nearest", "--two-sided", 2, code=2)
    assert not (tmp_path / "bad").exists()
