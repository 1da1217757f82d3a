"""What a Hadamard rotation does to block-quantized weights: a quick check that needs no model.

A matrix of small normal weights with a few large outliers is quantized in blocks as it is, and in the basis
of ``ql.hadamard``; errors are taken in the original basis. Rotation spreads outliers over their block, which
helps where a step is set by a block's maximum. It hurts where there are few levels: an outlier in a plain
block rounds nearly everything else to zero, which costs little here, while a rotated block wastes its outer
levels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantloom import _checks
from quantloom.formats import Format, format_from_json, parse_format
from quantloom.quantizing import quantize
from quantloom.rounding import Nearest, Rounding, parse_rounding
from quantloom.transforms import Transform, hadamard, parse_transform

__all__ = ["RotationRow", "outlier_matrix", "quantize_blocks", "rotation_table"]

_ROWS = 512  # at once


@dataclass(frozen=True)
class RotationRow:
    """One line of the table.

    Attributes:
        format: what was stored, in words or as a short form.
        transform: the short form of the transform, ``"none"`` for none.
        bits_per_weight: with scales.
        mean_squared_error, max_error: of the decoded weights, in the original basis.
    """

    format: str
    transform: str
    bits_per_weight: float
    mean_squared_error: float
    max_error: float


def outlier_matrix(n: int = 4096, k: int = 4096, seed: int = 0) -> np.ndarray:
    """``0.02 * N(0, 1)`` in float32 ``[n, k]``, with ``20 * n`` places (some drawn twice) overwritten by
    ``+-(0.3 + 0.4 * U(0, 1))``."""
    n, k = _checks.integer("n", n, 1), _checks.integer("k", k, 1)
    random = np.random.default_rng(_checks.integer("seed", seed, 0))
    w = (0.02 * random.standard_normal((n, k), dtype=np.float32)).astype(np.float32)
    places = random.integers(n, size=20 * n), random.integers(k, size=20 * n)
    w[places] = (0.3 + 0.4 * random.random(20 * n)) * random.choice((-1.0, 1.0), 20 * n)
    return w


def quantize_blocks(x: np.ndarray, bits: int, block: int = 32) -> np.ndarray:
    """Decoded values of a symmetric grid with a step for each `block` of the last axis.

    ``half = (2**bits - 1) // 2``, step ``max|x| / half`` (1 for a block of zeros), codes
    ``clip(round(x / step) + half, 0, 2**bits - 1)``: 15 levels in use at 4 bits, 7 at 3, 3 at 2.
    """
    half = (2 ** _checks.integer("bits", bits, 2) - 1) // 2
    groups = x.reshape((*x.shape[:-1], -1, block))
    step = np.abs(groups).max(axis=-1, keepdims=True) / np.asarray(half, x.dtype)
    step[step == 0] = 1
    codes = np.clip(np.round(groups / step) + half, 0, 2**bits - 1)
    return ((codes - half) * step).reshape(x.shape)


def _blocks_row(w: np.ndarray, bits: int, group: int, block: int | None) -> RotationRow:
    squares, worst = 0.0, 0.0
    for begin in range(0, len(w), _ROWS):
        rows = w[begin : begin + _ROWS]
        rotated = rows if block is None else hadamard(rows, block)
        decoded = quantize_blocks(rotated, bits, group)
        error = (decoded if block is None else hadamard(decoded, block, inverse=True)) - rows
        squares += float(np.square(error, dtype=np.float64).sum())
        worst = max(worst, float(np.abs(error).max()))
    name = f"{bits} bits, blocks of {group}, float32 steps"
    transform = "none" if block is None else f"hadamard:b{block}:no-signs"
    return RotationRow(name, transform, bits + 32 / group, squares / w.size, worst)


def _format_row(
    w: np.ndarray, format: Format, transform: Transform | None, rounding: Rounding, threads: int
) -> RotationRow:
    q = quantize(w, format, rounding, transform=transform, threads=threads)
    error = q.dequantize(threads=threads) - w
    searched = getattr(rounding, "scale_search", None)
    return RotationRow(
        q.format.spec + ("" if searched is None else f", scales by search over {searched.steps}"),
        "none" if transform is None else transform.spec,
        q.bits_per_weight,
        float(np.square(error, dtype=np.float64).mean()),
        float(np.abs(error).max()),
    )


def _tensor_format_row(
    w: np.ndarray, format: Any, transform: Transform | None, _: Rounding, threads: int
) -> RotationRow:
    import torch

    x = torch.from_numpy(w if transform is None else transform.rotate_weight(w, threads=threads))
    fitted = format.fit(x) if hasattr(format, "fit") else format
    decoded = fitted.quantise(x).numpy()
    if transform is not None:
        decoded = transform.rotate_weight(decoded, inverse=True, threads=threads)
    error = decoded - w
    return RotationRow(
        str(format),
        "none" if transform is None else transform.spec,
        fitted.count_bits_tensor(x) / w.size,
        float(np.square(error, dtype=np.float64).mean()),
        float(np.abs(error).max()),
    )


def _parse(format: Any) -> Any:
    """A format of either kind: objects, short forms, and JSON of ``TensorFormat.save``."""
    if isinstance(format, str) and format.lstrip().startswith("{"):
        fields = _checks.json_object("format", format)
        if "_type" not in fields:
            return format_from_json(format)
        from quantloom.formats.base import TensorFormat

        return TensorFormat.load(fields)
    if hasattr(format, "quantise") or hasattr(format, "fit"):
        return format
    return parse_format(format)


def rotation_table(
    bits: Iterable[int] = (4, 3, 2),
    formats: Iterable[Any] = (),
    transform: Transform | str = "hadamard:b128",
    size: int = 4096,
    group: int = 32,
    block: int = 128,
    seed: int = 0,
    threads: int = 0,
    rounding: Rounding | str = "nearest",
) -> list[RotationRow]:
    """Errors with and without rotation.

    Args:
        bits: of ``quantize_blocks``, in blocks of `group`, rotated in blocks of `block` without signs.
        formats: without and with `transform`: a ``Format`` or its short form; a ``TensorFormat`` of
            ``quantloom.formats`` or a rule of ``quantloom.fit`` that is fitted to the matrix; or either
            format's JSON.
        size: rows and columns of ``outlier_matrix``, a multiple of `group` and `block`.
        seed: of the matrix.
        rounding: of each ``Format``: ``Nearest``, or a short form such as ``"nearest:search"``, which chooses
            each step by its squared error instead of by the largest value.
    """
    size = _checks.integer("size", size, 1)
    group, block = _checks.integer("group", group, 1), _checks.integer("block", block, 1)
    for name, value in (("group", group), ("block", block)):
        if size % value:
            raise ValueError(f"{name}: got {value}, expected a divisor of the size {size}")
    widths = [_checks.integer("bits", width, 2) for width in bits]
    if any(width > 16 for width in widths):
        raise ValueError(f"bits: got {max(widths)}, expected at most 16")
    rounding = parse_rounding(rounding)
    if not isinstance(rounding, Nearest):
        raise ValueError(f"rounding: got {rounding}, expected nearest, which needs no calibration")
    chosen = [_parse(format) for format in formats]
    basis: Any = parse_transform(transform)
    w = outlier_matrix(size, size, seed)
    rows = [_blocks_row(w, width, group, how) for width in widths for how in (None, block)]
    bases = [None] if basis is None else [None, basis]
    for format in chosen:
        measure = _format_row if isinstance(format, Format) else _tensor_format_row
        rows += [measure(w, format, how, rounding, threads) for how in bases]
    return rows
