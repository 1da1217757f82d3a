"""A passage hidden far back in a context: does a model still find it through its cache?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantloom import _checks

__all__ = ["NeedleResult", "needle"]


@dataclass(frozen=True)
class NeedleResult:
    """How well passages were continued."""

    recall: float
    """Fraction of the tokens after the cue that the model ranks first."""
    baseline: float
    """The same where the context does not hold the passage: what the cue alone gives."""
    log_probability: float
    """Mean log-probability of those tokens, in nats."""
    baseline_log_probability: float
    by_depth: dict[float, float]
    """The recall for each depth."""
    tokens: int
    """Predictions for each of recall and baseline."""


def needle(
    model: Any,
    ids: Any,
    *,
    context: int = 512,
    count: int = 16,
    cue: int = 16,
    length: int = 16,
    depths: Sequence[float] = (0.1, 0.5),
    seed: int = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> NeedleResult:
    """Hides passages of a text in other parts of it, and asks for their continuation at the end.

    Each context is a run of the text, with a passage of ``cue + length`` tokens from elsewhere in it at
    `depth`. It ends with the passage's first `cue` tokens; the other `length` are predicted, each after the
    right ones before it. For the baseline, the hidden passage is another one.

    Args:
        model: a causal language model of transformers, or ``CachedModel``.
        ids: token ids, one-dimensional integers.
        context: tokens that the model reads at once.
        count: contexts for each depth.
        cue, length: tokens of a passage.
        depths: in [0, 1): where passages begin, as a share of the room before the question.
        seed: of the places.
        batch: contexts fed at once.
        progress: called with the contexts done and all of them.

    Raises TypeError or ValueError naming the argument.
    """
    import torch

    from quantloom.evaluate import _evaluating, _require_fit

    if not callable(model) or not hasattr(model, "parameters"):
        raise TypeError(f"model: got {_checks.type_name(model)}, expected a language model as torch module")
    for name, value in (("count", count), ("cue", cue), ("length", length), ("batch", batch)):
        _checks.integer(name, value, 1)
    passage = cue + length
    context = _checks.integer("context", context, 2 * passage + 1)
    ids = np.asarray(ids.detach().cpu().numpy() if hasattr(ids, "detach") else ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size < 2 * context + 8 * passage:
        raise ValueError(
            f"ids: got {ids.dtype} {list(ids.shape)}, expected at least {2 * context + 8 * passage} integers"
        )
    _require_fit(ids, "context", context, model)
    if not isinstance(depths, Iterable):
        raise TypeError(f"depths: got {_checks.type_name(depths)}, expected some numbers in [0, 1)")
    depths = [_checks.real("depths", depth) for depth in depths]
    if not depths or any(not 0 <= depth < 1 for depth in depths) or len(set(depths)) < len(depths):
        raise ValueError(f"depths: got {depths}, expected some numbers in [0, 1), each once")
    generator = np.random.default_rng(_checks.integer("seed", seed, 0))
    room = context - passage  # before the question
    rows, others = [], []
    for depth in depths:
        place = int(depth * (room - passage))
        for _ in range(count):
            start = int(generator.integers(ids.size - room + 1))
            # Passages from before or after the run, so that they are in it once at most.
            outside = np.concatenate(
                [np.arange(max(start - passage + 1, 0)), np.arange(start + room, ids.size - passage + 1)]
            )
            found = [int(generator.choice(outside))]
            apart = outside[np.abs(outside - found[0]) >= passage]
            found.append(int(generator.choice(apart)))
            hidden, other = (ids[at : at + passage] for at in found)
            for passages, to in ((hidden, rows), (other, others)):
                text = ids[start : start + room].copy()
                text[place : place + passage] = passages
                to.append(np.concatenate([text, hidden]))
    both = np.stack(rows + others).astype(np.int64)
    parameter = next(model.parameters())
    right, chances = [], []
    with _evaluating(model):
        for first in range(0, len(both), batch):
            if progress is not None:
                progress(first, len(both))
            part = torch.from_numpy(both[first : first + batch]).to(parameter.device)
            logits = model(input_ids=part, use_cache=False).logits[:, -length - 1 : -1].float()
            answers = part[:, -length:]
            right.append((logits.argmax(-1) == answers).cpu().numpy())
            chances.append(
                logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].double().cpu().numpy()
            )
    if progress is not None:
        progress(len(both), len(both))
    right, chances = np.concatenate(right), np.concatenate(chances)
    half = len(rows)
    return NeedleResult(
        recall=float(right[:half].mean()),
        baseline=float(right[half:].mean()),
        log_probability=float(chances[:half].mean()),
        baseline_log_probability=float(chances[half:].mean()),
        by_depth={depth: float(right[i * count : (i + 1) * count].mean()) for i, depth in enumerate(depths)},
        tokens=half * length,
    )
