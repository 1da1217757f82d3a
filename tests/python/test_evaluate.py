"""Perplexity, KL divergence and top-1 agreement against a slow explicit loop in float64."""

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from quantloom import evaluate

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


def make_model(seed, vocabulary=37, positions=16):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).float().eval()


def explicit(model, reference, ids, window, windows):
    """One window, one position, one token at a time, in float64."""
    nll = reference_nll = kl = 0.0
    agreements = scored = 0
    for w in range(windows):
        part = ids[w * window : (w + 1) * window]
        with torch.no_grad():
            a = model.double()(torch.tensor([list(part)])).logits[0].numpy()
            r = reference.double()(torch.tensor([list(part)])).logits[0].numpy()
        for t in range(window - 1):
            log_a = a[t] - a[t].max() - math.log(sum(math.exp(v) for v in a[t] - a[t].max()))
            log_r = r[t] - r[t].max() - math.log(sum(math.exp(v) for v in r[t] - r[t].max()))
            nll -= log_a[part[t + 1]]
            reference_nll -= log_r[part[t + 1]]
            kl += sum(math.exp(x) * (x - y) for x, y in zip(log_r, log_a, strict=True))
            agreements += int(np.argmax(log_a) == np.argmax(log_r))
            scored += 1
    model.float()
    reference.float()
    return math.exp(nll / scored), math.exp(reference_nll / scored), kl / scored, agreements / scored, scored


@pytest.mark.parametrize(("window", "windows", "batch"), [(2, 5, 1), (7, 3, 2), (16, 4, 3), (16, 1, 8)])
def test_matches_explicit_loop(window, windows, batch):
    model, reference = make_model(1), make_model(2)
    ids = np.random.default_rng(window).integers(0, 37, size=window * windows + window - 1)
    expected = explicit(model, reference, ids, window, windows)
    calls = []
    got = evaluate.compare(
        model, reference, ids, window, batch=batch, progress=lambda done, total: calls.append((done, total))
    )
    assert got.perplexity == pytest.approx(expected[0], rel=1e-5)
    assert got.reference_perplexity == pytest.approx(expected[1], rel=1e-5)
    assert got.kl == pytest.approx(expected[2], rel=1e-4)
    assert got.top1_agreement == expected[3]
    assert (got.tokens, got.windows) == (expected[4], windows)
    assert got.seconds > 0
    assert calls[-1] == (windows, windows)
    assert evaluate.perplexity(model, ids, window, batch=batch) == got.perplexity
    assert evaluate.kl_divergence(model, reference, torch.tensor(ids), window, batch=batch) == got.kl


def test_a_model_equals_itself():
    model = make_model(3)
    ids = np.random.default_rng(0).integers(0, 37, size=64)
    got = evaluate.compare(model, model, ids, window=16)
    assert (got.kl, got.top1_agreement) == (0.0, 1.0)
    assert got.perplexity == got.reference_perplexity


def test_impossible_tokens_of_the_reference_add_nothing():
    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(logits))

        def forward(self, input_ids, use_cache=False):
            shape = (*input_ids.shape, self.logits.numel())
            return type("Output", (), {"logits": self.logits.expand(shape)})()

    reference = Fixed([0.0, 0.0, -math.inf])
    same = evaluate.compare(reference, reference, [0, 1, 0, 1], window=4)
    assert (same.kl, same.perplexity) == (0.0, pytest.approx(2.0))
    spread = evaluate.compare(Fixed([0.0, 0.0, 0.0]), reference, [0, 1, 0, 1], window=4)
    assert spread.kl == pytest.approx(math.log(3 / 2), rel=1e-6)
    with pytest.raises(RuntimeError, match="model: returned NaN logits in windows 0 to 0"):
        evaluate.perplexity(Fixed([math.nan, 0.0, 0.0]), [0, 1, 0, 1], window=4)
    hopeless = evaluate.compare(Fixed([-2000.0, 0.0, 0.0]), Fixed([0.0, -2000.0, 0.0]), [0] * 4, window=4)
    assert hopeless.perplexity == math.inf


def test_training_mode_is_restored():
    model = make_model(4)
    model.train()
    evaluate.perplexity(model, np.zeros(16, dtype=np.int64), window=16)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros(15, dtype=np.int64)}, "15 tokens hold 0 windows of 16, expected at least 1"),
        ({"windows": 5}, "64 tokens hold 4 windows of 16, expected at least 5"),
        ({"ids": np.full(64, 37)}, r"span \[37, 37\], expected ids in \[0, 37\)"),
        ({"ids": np.full(64, -1)}, r"span \[-1, -1\]"),
        ({"ids": np.zeros(64)}, r"got float64 \[64\], expected integers"),
        ({"ids": np.zeros((4, 16), dtype=np.int64)}, r"got int64 \[4, 16\], expected integers"),
        ({"window": 32}, "window: got 32, but the model has 16 positions"),
        ({"window": 1}, "window: got 1, expected an integer >= 2"),
        ({"window": 8.0}, "window: got 8.0"),
        ({"windows": 0}, "windows: got 0"),
        ({"windows": True}, "windows: got True"),
        ({"batch": 0}, "batch: got 0"),
    ],
)
def test_bad_arguments(change, message):
    model = make_model(5)
    arguments = {"ids": np.zeros(64, dtype=np.int64), "window": 16} | change
    with pytest.raises(ValueError, match=message):
        evaluate.perplexity(model, **arguments)
    with pytest.raises(ValueError, match=message):
        evaluate.compare(model, model, **arguments)


def test_different_vocabularies():
    with pytest.raises(ValueError, match="model: has 31 logits, expected 37"):
        evaluate.compare(make_model(6, vocabulary=31), make_model(6), np.zeros(16, dtype=np.int64), window=16)


def test_tokens(tmp_path):
    ids = evaluate.tokens(TINY, TINY / "valid.txt")
    assert ids.dtype == np.int64
    assert ids.shape == (51335,)
    raw = tmp_path / "ids.u16"
    ids.astype("<u2").tofile(raw)
    assert np.array_equal(evaluate.tokens(tmp_path, raw), ids)


def test_bad_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match="text: no such file"):
        evaluate.tokens(TINY, tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match="model: no such folder"):
        evaluate.tokens(tmp_path / "missing", TINY / "valid.txt")
    with pytest.raises(ValueError, match="model: no usable tokenizer"):
        evaluate.tokens(tmp_path, TINY / "valid.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="gives no tokens"):
        evaluate.tokens(TINY, tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8"):
        evaluate.tokens(TINY, tmp_path / "latin.txt")
    (tmp_path / "odd.u16").write_bytes(b"abc")
    with pytest.raises(ValueError, match="has 3 bytes, expected a positive multiple of 2"):
        evaluate.tokens(TINY, tmp_path / "odd.u16")


def test_perplexity_of_the_embedded_model():
    """The figure on the model's card."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = evaluate.tokens(TINY, TINY / "valid.txt")
    assert evaluate.perplexity(model, ids) == pytest.approx(22.9040, abs=1e-4)
