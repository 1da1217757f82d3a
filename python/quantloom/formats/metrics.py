"""Errors of formats, and the blocks that share a scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantloom.formats import _numerics
from quantloom.formats.base import BlockShape, Scaling, TensorFormat

if TYPE_CHECKING:
    from quantloom.formats.base import ScalarFormat

__all__ = [
    "block_normalise",
    "blocked_scale",
    "blocked_shape",
    "qrmse_norm",
    "rmse_norm",
    "safe_div",
    "shuffle",
    "snr",
]

_TINY = torch.finfo(torch.float32).tiny


def shuffle(t: Tensor) -> Tensor:
    """The elements in random order (torch's global generator), in the same shape."""
    order = torch.randperm(t.numel(), device=t.device)
    return t.reshape(-1)[order].reshape(t.shape)


def rmse_norm(x: Tensor, qx: Tensor, weight: Tensor | None = None) -> Tensor:
    """R = sqrt(sum(w (qx - x)^2) / sum(w x^2)), a float32 number; w is 1 without `weight`."""
    x, qx = x.float(), qx.float()
    error, power = (qx - x).square_(), x.square()
    if weight is not None:
        weight = weight.float()
        error, power = error * weight, power * weight
    return (error.sum() / power.sum()).sqrt()


def qrmse_norm(fmt: TensorFormat, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """``rmse_norm`` of what the format keeps of `x`."""
    return rmse_norm(x, fmt.quantise(x), weight)


def snr(x: Tensor, qx: Tensor) -> Tensor:
    """Signal over noise, sum(x^2) / sum((qx - x)^2): a ratio, not decibels; R to the power of -2."""
    x, qx = x.float(), qx.float()
    return x.square().sum() / (qx - x).square().sum()


def safe_div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and a where b is 0."""
    return torch.where(b == 0, a, a / b)


def blocked_shape(t: Tensor, block_shape: BlockShape) -> tuple[int, ...]:
    """(n0, b0, n1, b1, ...): the number of blocks along each dimension, and their size.

    None in `block_shape` takes the whole dimension. Raises ValueError unless there is a size for each
    dimension, and each divides its dimension: there are no ragged blocks.
    """
    if len(block_shape) != t.ndim:
        raise ValueError(
            f"block_shape: got {len(block_shape)} sizes, expected one for each of {t.ndim} dimensions"
        )
    shape: list[int] = []
    for axis, (size, block) in enumerate(zip(t.shape, block_shape)):
        if block is None:
            shape += [1, size]
            continue
        if block < 1 or size % block:
            raise ValueError(f"block_shape: got {block}, expected a divisor of dimension {axis}, {size}")
        shape += [size // block, block]
    return tuple(shape)


def _divisor(scaling: Scaling, element_range: tuple[float, float]) -> float:
    low, high = element_range
    if scaling == "signmax":
        return low if -low > high else high
    return high if low >= 0 else min(-low, high)


def _from_statistic(value: Tensor, scaling: Scaling, element_range: tuple[float, float]) -> Tensor:
    """Scales from what `_STATISTICS` names, float32."""
    if scaling == "rms":
        return value.clamp(min=_TINY).sqrt()
    scale = _numerics.divided(value, _divisor(scaling, element_range))
    if scaling == "absmax":
        return scale.clamp(min=_TINY)
    return torch.where(scale.abs() < _TINY, _TINY, scale)


_STATISTICS = {"absmax": "absmax", "rms": "mean_square", "signmax": "signed_extreme"}


def require_scaling(scaling: str) -> None:
    if scaling not in _STATISTICS:
        raise ValueError(f"scaling: got {scaling!r}, expected one of {', '.join(_STATISTICS)}")


def blocked_scale(block_t: Tensor, scaling: Scaling, element_range: tuple[float, float]) -> Tensor:
    """The scales of a tensor in blocked shape (n0, b0, n1, b1, ...): its odd dimensions become 1; float32.

    - ``absmax``: max |x| / min(-low, high), at least the smallest normal number
    - ``rms``: sqrt(mean(x^2)), likewise
    - ``signmax``: the element of largest magnitude, with its sign, over whichever end of the range is farther
      from 0. It lands on that end exactly, and the scale may be negative.
    """
    require_scaling(scaling)
    axes = tuple(range(1, block_t.ndim, 2))
    x = block_t.float()
    if scaling == "absmax":
        value = x.abs().amax(axes, keepdim=True)
    elif scaling == "rms":
        value = x.square().mean(axes, keepdim=True)
    else:
        highest, lowest = x.amax(axes, keepdim=True), x.amin(axes, keepdim=True)
        value = torch.where(highest >= -lowest, highest, lowest)
    return _from_statistic(value, scaling, element_range)


def block_scales(
    tensor: Tensor, block_shape: BlockShape, scaling: Scaling, element_range: tuple[float, float]
) -> Tensor:
    """Like ``blocked_scale``, of a tensor in its own shape; its odd dimensions are dropped: (n0, n1, ...)."""
    require_scaling(scaling)
    blocked = blocked_shape(tensor, block_shape)
    if 0 in blocked:
        return torch.ones(blocked[::2], device=tensor.device)
    if tensor.device.type == "cpu" and tensor.ndim in (1, 2):
        rows, cols = (1, blocked[1]) if tensor.ndim == 1 else (blocked[1], blocked[3])
        flat = tensor.reshape(1, -1) if tensor.ndim == 1 else tensor
        value = _numerics.block_statistics(flat, rows, cols, _STATISTICS[scaling]).reshape(blocked[::2])
        return _from_statistic(value, scaling, element_range)
    return blocked_scale(tensor.reshape(blocked), scaling, element_range).reshape(blocked[::2])


def spread(scales: Tensor, blocked: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Scales of blocks, one for each element of a tensor of `shape`."""
    ones = [size if axis % 2 == 0 else 1 for axis, size in enumerate(blocked)]
    return scales.reshape(ones).expand(blocked).reshape(shape)


def grid_of(scales: Tensor, blocked: tuple[int, ...], shape: tuple[int, ...]) -> _numerics.Grid:
    """Scales of blocks as the numerics take them; more than two dimensions need one for each element."""
    if len(shape) == 1:
        return _numerics.Grid(scales.reshape(1, -1).contiguous(), 1, max(1, blocked[1]))
    if len(shape) == 2:
        return _numerics.Grid(scales.contiguous(), max(1, blocked[1]), max(1, blocked[3]))
    full = spread(scales, blocked, shape) if math.prod(shape) else torch.ones(shape, device="cpu")
    return _numerics.Grid(_numerics.matrix(full.contiguous()), 1, 1)


def block_normalise(
    t: Tensor,
    block_shape: BlockShape,
    scaling: Scaling,
    element_range: tuple[float, float],
    scale_format: ScalarFormat,
) -> tuple[Tensor, Tensor]:
    """(t / scale, scale), both in the shape of the tensor; the scale is as `scale_format` keeps it.

    Always float32 (float64 for float64): normalised values of a bfloat16 tensor are not rounded to bfloat16
    before codes are chosen. Blocks of zeros stay zero.
    """
    scales = scale_format.quantise(block_scales(t, block_shape, scaling, element_range))
    full = spread(scales, blocked_shape(t, block_shape), tuple(t.shape))
    wide = t if t.dtype == torch.float64 else t.float()
    return safe_div(wide, full), full
