"""The notebooks of examples/notebooks, run from the first cell to the last on small settings."""

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run(name, monkeypatch):
    """Executes a notebook; returns what its cells left in `results`."""
    monkeypatch.setenv("QUANTLOOM_NOTEBOOK", "small")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell("import json\nprint(json.dumps(results))"))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    return json.loads(notebook.cells[-1].outputs[-1].text)


def test_formats_on_synthetic_data(monkeypatch):
    results = run("formats_on_synthetic_data", monkeypatch)
    scalar, pairs, _, grid = results["student_t"]
    assert scalar[0] == "LUT3[LM]"
    assert scalar[1] == 3
    assert 0.19 < scalar[2] < 0.23
    assert pairs[2] < scalar[2]
    assert grid[2] < 0.16
    for row in results["student_t"]:
        assert row[1] <= row[4] + 1e-9 < row[1] + 0.15, "what is stored is what is counted, and tables"
    curves = {(law, kind): values for law, kind, *values in results["curves"]}
    for law, kind, expected in (
        ("Normal", "tensor RMS", (1.488, 1.560, 1.602, 1.624)),
        ("Normal", "grid + entropy", (1.207, 1.196, 1.194, 1.193)),
        ("Laplace", "tensor RMS", (1.870, 1.985, 2.050, 2.085)),
        ("Laplace", "grid + entropy", (1.119, 1.113, 1.111, 1.110)),
        ("t(5)", "tensor RMS", (2.116, 2.312, 2.430, 2.495)),
        ("t(5)", "tensor Lloyd-Max", (2.030, 2.256, 2.397, 2.477)),
        ("t(5)", "grid + entropy", (1.153, 1.143, 1.141, 1.140)),
    ):
        assert curves[law, kind] == pytest.approx(expected, rel=0.01), (law, kind)
    assert curves["Normal", "block 128 absmax"][0] == pytest.approx(1.766, rel=0.05)
    assert len(results["blocks"]) == 3
    elements = {name: values for name, *values in results["elements"]}
    assert elements["CRD"][0] < elements["NF4"][0] < elements["INT4"][0] < elements["E3M0"][0]


def test_additive_quantization(monkeypatch):
    results = run("additive_quantization", monkeypatch)
    steps = results["steps"]
    assert all(after <= before * 1.0001 for before, after in itertools.pairwise(steps))
    assert steps[-1] < 0.9 * steps[0]
    for losses in results["rounds"].values():
        assert losses[-1] < losses[0]
    rounded, *trained = results["model"].values()
    assert len(trained) == 2 and max(trained) < rounded


def test_entropy_coding(monkeypatch):
    results = run("entropy_coding", monkeypatch)
    for _, _, entropy, huffman, rans, *_ in results["laws"]:
        assert entropy < rans < huffman + 0.05
    for _, entropy, huffman, rans, *_ in results["model"]:
        assert entropy < rans < huffman


def test_rotation(monkeypatch):
    results = run("rotation", monkeypatch)
    error = {(name, rotated): mse for name, rotated, _, mse, _ in results["fixed"]}
    assert error["4 bits", "yes"] < error["4 bits", "no"] / 2
    assert error["2 bits", "yes"] > error["2 bits", "no"] * 2
    assert len(results["fitted"]) == 18


def test_direct_cast_and_training(monkeypatch):
    results = run("direct_cast_and_training", monkeypatch)
    best, worst = results["direct"]
    assert best[4] < worst[4]
    for row in results["direct"]:
        assert row[2] - 0.1 < row[3] < row[2] + 0.1, "bits stored are near those counted"
    assert len(results["qat"]) == 2


def test_trellis_codebooks(monkeypatch):
    results = run("trellis_codebooks", monkeypatch)
    errors = {(code, bits): error for code, bits, error in results["distortion"]}
    assert errors["lloyd-max", 2] == pytest.approx(0.1175, abs=2e-4)
    assert errors["mul1", 2] == pytest.approx(0.0683, rel=0.05)
    assert errors["octagon", 2] == pytest.approx(0.0701, rel=0.05)
    for (_, bits), error in errors.items():
        assert error > 4.0**-bits
    for _, _, narrow, wide in results["windows"]:
        assert wide < narrow
    assert {name for name, published, *_ in results["search"] if published} > {"octagon", "octagon-FF7A83E5"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole(path):
    """What is committed ran in one go, without an error, on the full settings."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert all(output.output_type != "error" for output in outputs)
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Error" not in text
    assert "Warning" not in text


def test_there_are_six():
    assert [path.stem for path in NOTEBOOKS] == [
        "additive_quantization",
        "direct_cast_and_training",
        "entropy_coding",
        "formats_on_synthetic_data",
        "rotation",
        "trellis_codebooks",
    ]
