"""How good is a quantized model? Perplexity, KL divergence and top-1 agreement on a text.

The procedure, the same everywhere in the project: the text is tokenized once without special tokens, the
ids are cut into consecutive windows of `window` tokens that do not overlap (the rest at the end is
dropped), each window is fed on its own without a token in front, and its tokens 1 to window - 1 are scored:
window - 1 predictions a window. Logits are brought to float32 log-probabilities, sums run in float64.

Needs torch; `tokens` of a text needs transformers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantloom import _checks

__all__ = ["Comparison", "compare", "kl_divergence", "perplexity", "tokenizer", "tokens"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """A model against its reference, over the same tokens."""

    perplexity: float
    reference_perplexity: float
    kl: float
    """Mean of KL(reference || model) over all predictions, in nats."""
    top1_agreement: float
    """Fraction of predictions where both models rank the same token first."""
    tokens: int
    """Scored predictions: windows * (window - 1)."""
    windows: int
    seconds: float


def tokens(model_path: str | Path, text_path: str | Path) -> np.ndarray:
    """Token ids of a whole file, int64 [tokens].

    `text_path` is UTF-8 text, tokenized by the tokenizer in the folder `model_path` without special
    tokens, or a `.u16` file of raw little-endian uint16 ids. Raises OSError if a file is missing and
    ValueError if the text is empty or no tokenizer can be read.
    """
    text_path = _checks.path("text_path", text_path)
    model_path = _checks.path("model_path", model_path)
    if not text_path.is_file():
        raise FileNotFoundError(f"text: no such file: {text_path}")
    if text_path.suffix == ".u16":
        size = text_path.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(
                f"text: {text_path} has {size} bytes, expected a positive multiple of 2 (uint16 ids)"
            )
        return np.fromfile(text_path, dtype="<u2").astype(np.int64)
    if not model_path.is_dir():
        raise FileNotFoundError(f"model: no such folder: {model_path}")
    try:
        text = text_path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {text_path} is not UTF-8: {error}") from error
    ids = tokenizer(model_path)(text)
    if not ids:
        raise ValueError(f"text: {text_path} gives no tokens")
    return np.asarray(ids, dtype=np.int64)


def tokenizer(model_path: str | Path) -> Callable[[str], list[int]]:
    """The tokenizer in the folder of a model, as a function from text to ids, without special tokens.

    Raises ValueError if none can be read.
    """
    import transformers

    model_path = _checks.path("model_path", model_path)
    try:
        inner = transformers.AutoTokenizer.from_pretrained(str(model_path), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model: no usable tokenizer in {model_path}: {error}") from error

    def ids(text: str) -> list[int]:
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # a file is longer than a context: no warning is due
        try:
            return inner(text, add_special_tokens=False)["input_ids"]
        finally:
            transformers.logging.set_verbosity(verbosity)

    return ids


def perplexity(
    model,
    ids,
    window: int = 512,
    windows: int | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> float:
    """exp of the mean negative log-likelihood over all predictions.

    `model` is a causal language model of transformers (any module whose output has `.logits`), `ids` are
    token ids [tokens], `windows` the number of windows from the start (None: all), `batch` the windows fed
    at once; `progress(done, total)` is called with windows. Raises ValueError if the text is too short, an
    id is outside the vocabulary, or `window` exceeds the model's positions, and RuntimeError if the model
    returns NaN.
    """
    ids = _windows(ids, window, windows, batch, model)
    total = 0.0
    with _evaluating(model):
        for first, part in _batches(ids, batch, progress):
            total += _negative_log_likelihood(_log_probabilities(model, part, first, "model"), part)
    return _exp(total / (ids.shape[0] * (window - 1)))


def kl_divergence(
    model,
    reference,
    ids,
    window: int = 512,
    windows: int | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> float:
    """Mean over all predictions of KL(reference || model), in nats. Arguments and errors as `compare`."""
    return compare(model, reference, ids, window, windows, batch, progress).kl


def compare(
    model,
    reference,
    ids,
    window: int = 512,
    windows: int | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> Comparison:
    """Perplexity of both models, KL divergence and top-1 agreement in one pass over the text.

    Arguments and errors as `perplexity`; both models need the same vocabulary.
    """
    import torch

    start = time.perf_counter()
    ids = _windows(ids, window, windows, batch, model, reference)
    nll = reference_nll = kl = 0.0
    agreements = 0
    with _evaluating(model), _evaluating(reference):
        for first, part in _batches(ids, batch, progress):
            expected = _log_probabilities(reference, part, first, "reference")
            actual = _log_probabilities(model, part, first, "model").to(expected.device)
            if actual.shape[-1] != expected.shape[-1]:
                raise ValueError(
                    f"model: has {actual.shape[-1]} logits, expected {expected.shape[-1]}, as the reference"
                )
            nll += _negative_log_likelihood(actual, part)
            reference_nll += _negative_log_likelihood(expected, part)
            agreements += int((actual.argmax(-1) == expected.argmax(-1)).sum())
            # A token that the reference rules out (probability 0) contributes nothing.
            terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - actual))
            kl += float(terms.sum(dtype=torch.float64))
    scored = ids.shape[0] * (window - 1)
    return Comparison(
        perplexity=_exp(nll / scored),
        reference_perplexity=_exp(reference_nll / scored),
        kl=kl / scored,
        top1_agreement=agreements / scored,
        tokens=scored,
        windows=ids.shape[0],
        seconds=time.perf_counter() - start,
    )


def _windows(ids, window: int, windows: int | None, batch: int, *models) -> np.ndarray:
    """Checks all arguments; returns the ids as [windows, window]."""
    for name, model in zip(("model", "reference"), models):
        if not callable(model) or not hasattr(model, "parameters"):
            raise TypeError(
                f"{name}: got {_checks.type_name(model)}, expected a language model as torch module"
            )
    for name, value, least in (("window", window, 2), ("windows", windows, 1), ("batch", batch, 1)):
        if name == "windows" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, expected an integer >= {least}")
    array = ids.detach().cpu().numpy() if hasattr(ids, "detach") else np.asarray(ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ids: got {array.dtype} {list(array.shape)}, expected integers [tokens]")
    available = array.size // window
    if available < (1 if windows is None else windows):
        raise ValueError(
            f"ids: {array.size} tokens hold {available} windows of {window}, expected at least {windows or 1}"
        )
    array = array[: (windows or available) * window].astype(np.int64)
    _require_fit(array, "window", window, *models)
    return array.reshape(-1, window)


def _require_fit(array: np.ndarray, name: str, window: int, *models) -> None:
    """Whether models have the positions of a window, named `name`, and the vocabulary of ids."""
    for model in models:
        config = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and window > positions:
            raise ValueError(f"{name}: got {window}, but the model has {positions} positions")
        vocabulary = getattr(text, "vocab_size", None)
        low, high = int(array.min()), int(array.max())
        if vocabulary is not None and (low < 0 or high >= vocabulary):
            raise ValueError(
                f"ids: span [{low}, {high}], expected ids in [0, {vocabulary}) of the vocabulary"
            )


def _batches(ids: np.ndarray, batch: int, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
    total = ids.shape[0]
    for first in range(0, total, batch):
        yield first, ids[first : first + batch]
        if progress is not None:
            progress(min(first + batch, total), total)


@contextmanager
def _evaluating(model):
    """No gradients, no dropout, and the model's mode restored at the end."""
    import torch

    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def _log_probabilities(model, ids: np.ndarray, first: int, name: str):
    """float32 [windows, window - 1, vocabulary]: position t predicts token t + 1."""
    import torch

    parameter = next(model.parameters(), None)
    if parameter is None:
        parameter = next(model.buffers(), None)
    inputs = torch.from_numpy(ids).to(parameter.device if parameter is not None else "cpu")
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    result = torch.log_softmax(logits.float(), dim=-1)
    if bool(result.isnan().any()):
        raise RuntimeError(f"{name}: returned NaN logits in windows {first} to {first + ids.shape[0] - 1}")
    return result


def _negative_log_likelihood(log_probabilities, ids: np.ndarray) -> float:
    import torch

    targets = torch.from_numpy(ids[:, 1:]).to(log_probabilities.device).unsqueeze(-1)
    return -float(log_probabilities.gather(-1, targets).sum(dtype=torch.float64))


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
