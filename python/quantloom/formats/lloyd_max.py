"""Tables fitted to data (Lloyd, 1982; Max, 1960): the least squared error for a number of values."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from quantloom import _checks, _core, _fitting
from quantloom.formats import metrics
from quantloom.formats.base import BlockShape, ScalarFormat
from quantloom.formats.elements import TorchFormat
from quantloom.formats.tables import LUTFormat
from quantloom.formats.vectors import Sign3D8Format, VectorLUTFormat
from quantloom.formats.wrappers import LinearScalingFormat

__all__ = ["lut_lloyd_max", "scaled_int8_3d8_lloyd_max", "vlut_lloyd_max"]

Init = Tensor | tuple[str, float] | Literal["uniform_minmax", "random", "kmeans++", "cuberoot", "quantile"]


def _subset(tensor: Tensor, max_samples: int | None, seed: int) -> Tensor | None:
    """Places of a random subset, or None for all."""
    if max_samples is None or tensor.numel() <= _checks.integer("max_samples", max_samples, 1):
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tensor.numel(), generator=generator, device="cpu")[:max_samples]


def lut_lloyd_max(
    t: Tensor,
    bits: float,
    threshold: float,
    *,
    weight: Tensor | None = None,
    range: tuple[float, float] | None = None,
    init: Init = "kmeans++",
    incremental: bool = True,
    max_samples: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    seed: int = 0,
) -> LUTFormat:
    """The table ``LM`` of round(2^bits) values with the least (weighted) squared error on `t`.

    Exact and deterministic: values are sorted once, each sweep then costs O(K log n) on prefix sums in
    float64. So `incremental` (start with few samples), `dtype` and `progress` are accepted and change
    nothing; torch's global generator is neither used nor changed.

    Args:
        t: values of any shape and device.
        threshold: ends once at most this fraction of values changes its cell.
        weight: one number >= 0 for each value. A value whose cell has no weight stays where it is.
        range: the range that block scales refer to; (min, max) of the table by default.
        init: ``"kmeans++"``, ``"cuberoot"``, ``"quantile"``, ``"random"``, ``"uniform_minmax"``,
            ``("uniform_rms", k)`` (mean -+ k standard deviations) or a tensor of values.
        max_samples: fits a random subset, of `weight` as well.
        seed: of random starts and subsets.
    """
    _checks.boolean("incremental", incremental)
    count = round(2 ** _checks.real("bits", bits))
    values = t.detach().reshape(-1).float()
    weights = None if weight is None else weight.detach().reshape(-1).float()
    if weights is not None and weights.numel() != values.numel():
        raise ValueError(f"weight: got {weights.numel()} numbers, expected {values.numel()}")
    places = _subset(values, max_samples, seed)
    if places is not None:
        values = values[places.to(values.device)]
        weights = None if weights is None else weights[places.to(weights.device)]
    start: Any = init
    if isinstance(init, (Tensor, list)):
        start = torch.as_tensor(init, dtype=torch.float32, device="cpu").sort().values
    fit = _fitting.lloyd_max(
        values.cpu(),
        count,
        weights=None if weights is None else weights.cpu(),
        start=start,
        threshold=threshold,
        seed=seed,
    )
    return LUTFormat.create(fit.centroids.tolist(), "LM", range)


def vlut_lloyd_max(
    t: Tensor,
    bits: float,
    threshold: float,
    element_type: ScalarFormat,
    *,
    range: tuple[float, float] | None = None,
    init: Literal["kmeans++", "random"] | Tensor = "kmeans++",
    incremental: bool = True,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    weight: Tensor | None = None,
    seed: int = 0,
) -> VectorLUTFormat:
    """The table ``LM`` of round(2^(bits * d)) vectors for the rows of `t` [n, d]: k-means.

    Deterministic, whatever the number of threads. The error on `t` itself flatters large tables: measure it
    on other data too.

    Args:
        t: vectors; on a CUDA device k-means runs there, in builds with CUDA, with the same result.
        threshold: ends once at most this fraction of rows changes its vector.
        element_type: the format that the table is stored in, BFLOAT16 say.
        weight: one number >= 0 for each row.
        incremental, dtype, progress: accepted, and change nothing.
        seed: of the start.
    """
    _checks.boolean("incremental", incremental)
    if t.ndim != 2:
        raise ValueError(f"t: got shape {list(t.shape)}, expected vectors [n, d]")
    device = t.device if t.is_cuda and _core.built_with_cuda() else torch.device("cpu")
    fit = _fitting.kmeans(
        t.detach().float().to(device),
        round(2 ** (_checks.real("bits", bits) * t.shape[1])),
        weights=None if weight is None else weight.detach().reshape(-1).float().to(device),
        start=init.detach().float().to(device) if isinstance(init, Tensor) else init,
        threshold=threshold,
        seed=seed,
    )
    return VectorLUTFormat.create(torch.as_tensor(fit.centroids, device="cpu"), element_type, "LM", range)


def scaled_int8_3d8_lloyd_max(
    t2d: Tensor, scale_format: ScalarFormat, block_shape: BlockShape, threshold: float, **args: Any
) -> LinearScalingFormat:
    """A matrix at 3 values in 8 bits: absmax scales to int8, then signs and a table of 32 magnitudes.

    The magnitudes are fitted to what the scaled matrix is in int8 (which truncates), down its columns. `args`
    go to ``vlut_lloyd_max``.
    """
    int8 = TorchFormat("int8")
    scaled, _ = metrics.block_normalise(t2d, block_shape, "absmax", (-127.0, 127.0), scale_format)
    magnitudes = Sign3D8Format.vectorise(int8.quantise(scaled.float()).abs())
    lut = vlut_lloyd_max(magnitudes, 5 / 3, threshold, int8, range=(0, 127), **args)
    return LinearScalingFormat(Sign3D8Format(lut), scale_format, block_shape, "absmax")
