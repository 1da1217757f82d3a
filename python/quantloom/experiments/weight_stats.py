"""What do the weights look like? Moments, block maxima, histograms, and distributions fitted to them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quantloom.experiments import store

__all__ = ["dist_fit_stats", "mean_block_amax", "model_stats", "scaled_hist", "studentt_fit", "tensor_stats"]

HISTOGRAM_EDGES = tuple(float(edge) for edge in range(1, 21))
_LOG_DF = (math.log(0.5), math.log(1000.0))


def tensor_stats(weight: Tensor) -> dict[str, Any]:
    """The statistics of one tensor of at least one element; computed in float32.

    - ``shape``, ``mean``, ``std``
    - ``rm2``, ``rm4``: the second and fourth root of the mean of that power
    - ``max``: the largest magnitude; ``block_max``: its mean over blocks of 1, 2, 4, ... consecutive elements
    - ``hist``: the fractions of elements whose magnitude over the RMS is in [0, 1], (1, 2], ... (20, inf);
      ``channel_hist``: the same over the RMS of each slice, for each dimension
    - ``fit``: see `dist_fit_stats`
    """
    if weight.numel() == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected at least one element")
    with torch.no_grad():
        w = weight.detach().float()
        rm2 = w.square().mean(dtype=torch.float64).sqrt()
        rm4 = (w.double() / rm2).pow(4).mean().pow(0.25).mul(rm2) if rm2 > 0 else rm2
        return {
            "shape": list(w.shape),
            "mean": float(w.mean(dtype=torch.float64)),
            "std": float(w.double().std(correction=0)),
            "rm2": float(rm2),
            "rm4": float(rm4),
            "max": float(w.abs().amax()),
            "block_max": [mean_block_amax(w, 1 << level) for level in range(w.numel().bit_length())],
            "hist": scaled_hist(w),
            "channel_hist": [scaled_hist(w, dim) for dim in range(w.ndim)],
            "fit": dist_fit_stats(w),
        }


def model_stats(
    model: nn.Module,
    ignore: tuple[str, ...] = ("vision_model", "multi_modal_projector"),
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """`tensor_stats` of all matrices of a model, by name; `ignore` as in `quantise_2d_fixed`."""
    found = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not set(ignore) & set(name.split("."))
    ]
    return {name: tensor_stats(parameter) for name, parameter in store._tracked(found, "weights", progress)}


def mean_block_amax(tensor: Tensor, block: int) -> float:
    """The mean over blocks of `block` consecutive elements of the largest magnitude; an unfinished block at
    the end does not count."""
    flat = tensor.flatten()
    blocks = flat[: flat.numel() // block * block].view(-1, block)
    if not blocks.numel():
        raise ValueError(f"block: got {block}, expected at most {flat.numel()} elements")
    return float(blocks.abs().amax(1).mean(dtype=torch.float64))


def scaled_hist(
    tensor: Tensor, dim: int | None = None, edges: tuple[float, ...] = HISTOGRAM_EDGES
) -> list[float]:
    """The fractions of elements between the `edges` after division by the RMS: of the whole tensor, or of
    each slice along `dim`. A fraction counts magnitudes above an edge, up to and including the next."""
    others = tuple(other for other in range(tensor.ndim) if other != dim)
    over = tuple(range(tensor.ndim)) if dim is None else others
    square = tensor.float().square()
    rms = square.mean(dim=over, keepdim=True).sqrt() if over else square.sqrt()
    scaled = torch.where(rms > 0, tensor.float().abs() / rms, 0.0)
    bins = torch.bucketize(scaled.flatten(), torch.tensor(edges, device=tensor.device))
    return (torch.bincount(bins, minlength=len(edges) + 1).double() / tensor.numel()).tolist()


def dist_fit_stats(tensor: Tensor) -> dict[str, dict[str, float]]:
    """Zero-mean Normal, Laplace and StudentT of the greatest likelihood: their parameters (``scale``, ``df``)
    and ``log_likelihood``, the mean over elements. Empty for a tensor of zeros, to which none fits."""
    t = tensor.detach().flatten().double()
    mean_square, mean_abs = float(t.square().mean()), float(t.abs().mean())
    if mean_square == 0:
        return {}
    df, scale = studentt_fit(t)
    return {
        "Normal": {
            "scale": math.sqrt(mean_square),
            "log_likelihood": -0.5 * (math.log(2 * math.pi * mean_square) + 1),
        },
        "Laplace": {"scale": mean_abs, "log_likelihood": -math.log(2 * mean_abs) - 1},
        "StudentT": {"df": df, "scale": scale, "log_likelihood": _studentt_likelihood(t.square(), df, scale)},
    }


def studentt_fit(tensor: Tensor, tolerance: float = 1e-3) -> tuple[float, float]:
    """Degrees of freedom and scale of the zero-mean Student-t of the greatest likelihood.

    The scale for given degrees of freedom is the fixed point of s^2 = mean((df + 1) t^2 / (df + t^2 / s^2));
    the degrees of freedom are found between 0.5 and 1000 by golden section over their logarithm, to the
    relative `tolerance`. A result of 1000 means: as good as normal. Raises ValueError for a tensor of zeros.
    """
    square = tensor.detach().flatten().double().square()
    if not square.numel() or float(square.max()) == 0:
        raise ValueError("tensor: got no element other than 0, expected one")
    scales: dict[float, float] = {}

    def likelihood(log_df: float) -> float:
        start = min(scales.items(), key=lambda item: abs(item[0] - log_df))[1] if scales else None
        scale = _studentt_scale(square, math.exp(log_df), start, tolerance)
        scales[log_df] = scale
        return _studentt_likelihood(square, math.exp(log_df), scale)

    ratio = (math.sqrt(5) - 1) / 2
    low, high = _LOG_DF
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = likelihood(left), likelihood(right)
    while high - low > tolerance:
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = likelihood(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = likelihood(right)
    # Where the likelihood rises up to an end, the end is the answer, not a point near it.
    candidates = {log_df: likelihood(log_df) for log_df in ((low + high) / 2, *_LOG_DF)}
    best = max(candidates, key=candidates.__getitem__)
    return math.exp(best), scales[best]


def _studentt_scale(square: Tensor, df: float, start: float | None, tolerance: float) -> float:
    variance = start * start if start else float(square.mean()) * (max(df - 2, 0.1) / df)
    for _ in range(1000):
        # t^2 over the weight's denominator, written so that no intermediate overflows.
        updated = float((square * ((df + 1) / (df + square / variance))).mean())
        done = abs(updated - variance) < 0.01 * tolerance * variance
        variance = updated
        if done:
            break
    return math.sqrt(variance)


def _studentt_likelihood(square: Tensor, df: float, scale: float) -> float:
    constant = (
        math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi) - math.log(scale)
    )
    return constant - (df + 1) / 2 * float(torch.log1p(square / (df * scale * scale)).mean())
