"""Downstream tasks: questions with several answers, of which the right one is to be the likeliest.

A task is a file of JSON lines, one question each::

    {"context": "Question: Which is hotter?\nAnswer:", "choices": [" the Sun", " the Moon"], "answer": 0}

>>> task = downstream.Task("heat", "heat.jsonl")
>>> downstream.evaluate(model, task, quantloom.evaluate.tokenizer("path/to/model"))["accuracy"]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantloom import _checks

__all__ = ["Question", "Task", "evaluate", "load"]


@dataclass
class Task:
    """A file of questions, or the first `limit` of them."""

    name: str
    path: str
    limit: int | None = None


@dataclass(frozen=True)
class Question:
    """A text, how it could go on, and the place of the right one among these."""

    context: str
    choices: tuple[str, ...]
    answer: int


def load(task: Task) -> list[Question]:
    """The questions of a task. Raises ValueError, naming the line, for anything else, OSError for a file that
    cannot be read."""
    path = _checks.path("path", task.path)
    limit = task.limit if task.limit is None else _checks.integer("limit", task.limit, 1)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {path} is not UTF-8: {error}") from error
    questions = [_question(f"{path}: line {number}", line) for number, line in enumerate(lines, 1)]
    if not questions:
        raise ValueError(f"path: {path} has no question")
    return questions


def _question(place: str, line: str) -> Question:
    expected = "an object with context (text), choices (at least 2 texts) and answer (the place of one)"
    try:
        entry = json.loads(line)
        context, choices, answer = entry["context"], entry["choices"], entry["answer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place}: got {type(error).__name__} ({error}), expected {expected}") from None
    texts = isinstance(context, str) and isinstance(choices, list)
    if not texts or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{place}: got other types, expected {expected}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{place}: got answer {answer!r}, expected 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer)


def evaluate(
    model: nn.Module,
    task: Task | list[Question],
    tokenizer: Callable[[str], list[int]],
    batch_size: int = 8,
    bos_token_id: int | None = None,
) -> dict[str, float]:
    """How often the model gives the right answer the greatest probability.

    The probability of an answer is that of its tokens after those of the context: of what follows in the
    tokens of both together, as a tokenizer can join the ends of texts.

    Args:
        model: a causal language model of transformers.
        tokenizer: text to ids, without special tokens (`quantloom.evaluate.tokenizer`).
        bos_token_id: begins each text; None: that of the model's config, none if it has none.

    Returns ``accuracy``, under the name ``primary_score`` as well; ``accuracy_per_character``, with
    logarithms of probabilities over the length of the answer, which does not favour short ones;
    ``log_likelihood``, the mean of the right answers'; and ``questions``, their number.
    """
    questions = load(task) if isinstance(task, Task) else task
    _checks.integer("batch_size", batch_size, 1)
    if bos_token_id is None:
        bos_token_id = getattr(getattr(model, "config", None), "bos_token_id", None)
    begin = [] if bos_token_id is None else [bos_token_id]
    rows = [
        _tokens(begin, question.context, choice, tokenizer)
        for question in questions
        for choice in question.choices
    ]
    scores = iter(_log_likelihoods(model, rows, batch_size))
    right = right_per_character = 0
    total = 0.0
    for question in questions:
        own = [next(scores) for _ in question.choices]
        relative = [score / len(choice) for score, choice in zip(own, question.choices)]
        right += own.index(max(own)) == question.answer
        right_per_character += relative.index(max(relative)) == question.answer
        total += own[question.answer]
    return {
        "primary_score": right / len(questions),
        "accuracy": right / len(questions),
        "accuracy_per_character": right_per_character / len(questions),
        "log_likelihood": total / len(questions),
        "questions": len(questions),
    }


def _tokens(begin: list[int], context: str, choice: str, tokenizer: Any) -> tuple[list[int], int]:
    """The ids of both together, and where those of the choice begin."""
    whole = tokenizer(context + choice)
    # At least one token must be predicted, and one must come before it.
    first = min(len(tokenizer(context)), len(whole) - 1)
    if first + len(begin) < 1:
        raise ValueError(
            f"context: got {context!r}, which gives no token, and the model has none to begin with"
        )
    return begin + whole, len(begin) + first


def _log_likelihoods(model: nn.Module, rows: list[tuple[list[int], int]], batch_size: int) -> Iterator[float]:
    """The sum of the logarithms of the probabilities of each row's tokens from its place on."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(len(ids) for ids, _ in batch)
            padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=device)
            with torch.no_grad():
                # Padding comes last, and no position sees what comes after it.
                logits = model(input_ids=padded, use_cache=False).logits[:, :-1].float()
            logp = logits.log_softmax(-1).gather(-1, padded[:, 1:, None]).squeeze(-1)
            yield from (_sum(logp[row], first, len(ids)) for row, (ids, first) in enumerate(batch))
    finally:
        model.train(training)


def _sum(logp: Tensor, first: int, end: int) -> float:
    return float(logp[first - 1 : end - 1].sum(dtype=torch.float64))
