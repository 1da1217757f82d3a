"""The functions that take models and folders refuse wrong arguments by name, before any work."""

from __future__ import annotations

import re

import numpy as np
import pytest
import quantloom as ql

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from quantloom import evaluate, models

IDS = np.zeros(2000, np.int64)
MODULE = torch.nn.Linear(3, 3)
RECIPE = ql.Recipe("uniform:4")

# (function, arguments, keywords, error, words of the message in this order)
TABLE = [
    (ql.inspect, (3,), {}, TypeError, "path int path"),
    (ql.inspect, ("",), {}, ValueError, "path name of a file or folder"),
    (ql.inspect, ("nothing-here",), {}, FileNotFoundError, "path nothing-here"),
    (evaluate.tokenizer, (3,), {}, TypeError, "model_path int"),
    (evaluate.tokens, (3, "x"), {}, TypeError, "model_path int"),
    (evaluate.tokens, ("x", None), {}, TypeError, "text_path NoneType"),
    (evaluate.perplexity, (3, IDS), {}, TypeError, "model int module"),
    (evaluate.perplexity, (MODULE, "abc"), {}, ValueError, "ids integers"),
    (evaluate.perplexity, (MODULE, IDS / 2), {}, ValueError, "ids float64 integers"),
    (evaluate.perplexity, (MODULE, IDS), {"window": 1}, ValueError, "window 1 2"),
    (evaluate.perplexity, (MODULE, IDS), {"windows": 0}, ValueError, "windows 0 1"),
    (evaluate.perplexity, (MODULE, IDS), {"batch": 0.5}, ValueError, "batch 0.5 integer"),
    (evaluate.kl_divergence, (MODULE, 3, IDS), {}, TypeError, "reference int module"),
    (evaluate.compare, ("m", MODULE, IDS), {}, TypeError, "model str module"),
    (models.load, (3,), {}, TypeError, "path int"),
    (models.load, ("nothing-here",), {}, OSError, "path nothing-here"),
    (models.load, ("nothing-here", "float12"), {}, TypeError, "dtype float12"),
    (models.load_reference, (None,), {}, TypeError, "model_path NoneType"),
    (models.load_reference, ("nothing-here",), {}, OSError, "model_path nothing-here"),
    (models.read_report, (3,), {}, TypeError, "path int"),
    (models.read_report, ("nothing-here",), {}, FileNotFoundError, "nothing-here"),
    (models.export, (3, "out"), {}, TypeError, "quantized_dir int"),
    (models.export, ("nothing-here", "out"), {}, OSError, "quantized_dir nothing-here"),
    (models.export, ("nothing-here", "out", "gguf"), {}, ValueError, "layout gguf gptq gptq_v2"),
    (models.import_, (3, "out"), {}, TypeError, "path int"),
    (models.import_, ("nothing-here", "out"), {}, OSError, "path nothing-here"),
    (models.output_hessians, ("model", []), {"windows": 1, "window": 8}, TypeError, "model str Module"),
    (models.rotate, (3, "out"), {}, TypeError, "model_path int"),
    (models.rotate, ("nothing-here", "out"), {}, OSError, "model_path nothing-here"),
    (models.rotate, (".", "out", "permutation"), {}, ValueError, "transform permutation"),
    (models.plan, (3, RECIPE), {}, TypeError, "model_path int"),
    (models.plan, ("nothing-here", RECIPE), {}, OSError, "model_path nothing-here"),
    (models.plan, (".", "uniform:4"), {}, TypeError, "recipe str Recipe"),
    (models.quantize, (3, RECIPE), {"output": "out"}, TypeError, "model_path int"),
    (models.quantize, ("nothing-here", RECIPE), {"output": 3}, TypeError, "output int"),
    (models.quantize, ("nothing-here", RECIPE), {"output": "out"}, OSError, "model_path nothing-here"),
    (models.quantize, (".", "uniform:4"), {"output": "out"}, TypeError, "recipe str Recipe"),
    (models.quantize, (".", RECIPE), {"output": "out", "window": True}, TypeError, "window bool"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "error", "words"),
    TABLE,
    ids=[f"{row[0].__name__}-{index}" for index, row in enumerate(TABLE)],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, function, arguments, keywords, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert re.search(".*".join(re.escape(word) for word in words.split()), message, re.DOTALL), message
    assert list(tmp_path.iterdir()) == []


def test_the_table_covers_every_public_function():
    covered = {row[0].__name__ for row in TABLE}
    public = [getattr(models, name) for name in models.__all__] + [
        getattr(evaluate, n) for n in evaluate.__all__
    ]
    expected = {f.__name__ for f in public if callable(f) and not isinstance(f, type)} | {"inspect"}
    assert expected <= covered, expected - covered
