"""Arithmetic of the pipeline, in floating-point operations: for progress and for plans."""

from __future__ import annotations

from typing import Any

__all__ = [
    "distillation_flops",
    "forward_flops",
    "hessian_flops",
    "loss_flops",
    "rounding_flops",
    "search_flops",
]

# A block with s stages is run up to each stage and once to its end: the first stage's Linears run s times,
# the last one's once. 2.5 is the mean for four stages.
_PASSES = 2.5


def hessian_flops(k: int, tokens: int) -> float:
    """X^T X of `tokens` rows of k features."""
    return 2.0 * k * k * tokens


def forward_flops(n: int, k: int, tokens: int) -> float:
    """The forward passes through a Linear [n, k] that calibration takes, Hessian excluded."""
    return _PASSES * 2.0 * n * k * tokens


def rounding_flops(n: int, k: int, gptq: bool) -> float:
    """Choosing the codes of a matrix [n, k]: with error feedback, a Cholesky factor of the inverse
    Hessian, the updates of the remaining columns, and two losses beside those of rounding to nearest."""
    if not gptq:
        return 20.0 * n * k
    return 2.0 * k**3 + 2.0 * n * k * k + 4.0 * n * k * k


def loss_flops(n: int, k: int, steps: int) -> float:
    """The output errors of a search for channel scales over `steps` exponents."""
    return 1.0 * n * k * k * steps


def distillation_flops(n: int, k: int, window: int, passes: int) -> float:
    """The share of a Linear [n, k] in the distillation of its block, by forward passes of a window."""
    return 2.0 * n * k * window * passes


def search_flops(n: int, k: int, form: Any, rounding: Any) -> float:
    """Beam search for a matrix [n, k]: k-means for the first tables, then products with H in every round, of
    the least squares and the sweep, and the scores of all candidates. A round lowers the loss by less than a
    hundredth after 8 or so."""
    entries, weights = 2**form.bits, form.in_group * form.out_group
    vectors = min(n * k / weights, max(2**14, min(256 * entries, max(2**18, 4 * entries))))
    fit = 2.0 * form.codebooks * rounding.sweeps * vectors * entries * weights
    products = 2.0 * n * k * k * (rounding.beam + (rounding.refit + 6 if rounding.refit else 1))
    scores = 2.0 * n * k * form.codebooks * entries * rounding.beam
    return fit + min(rounding.rounds, 8) * (products + scores)
