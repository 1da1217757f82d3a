"""Weights that are quantized in every forward pass, and their straight-through gradients."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import formats as Q

ScalingMode: TypeAlias = Literal["parameter", "dynamic"]


class Quantise_STE(torch.autograd.Function):
    """``apply(x, centroids, clip_gradient)``: the nearest of the sorted centroids; halfway the lower one.

    The gradient of x passes straight through, with `clip_gradient` only up to half a step beyond the
    outermost centroids. The gradient of a centroid is the sum over the elements that took it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, centroids: Tensor, clip_gradient: bool) -> Tensor:
        ctx.save_for_backward(x, centroids)
        ctx.clip_gradient = clip_gradient
        return centroids[_codes(x, centroids)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, centroids = ctx.saved_tensors
        to_x = to_centroids = None
        if ctx.needs_input_grad[0]:
            to_x = gradient
            if ctx.clip_gradient:
                low = centroids[0] - (centroids[1] - centroids[0]) / 2
                high = centroids[-1] + (centroids[-1] - centroids[-2]) / 2
                to_x = gradient * ((x >= low) & (x <= high))
        if ctx.needs_input_grad[1]:
            to_centroids = _sum_by_code(_codes(x, centroids), gradient, centroids)
        return to_x, to_centroids, None


class StraightThrough(torch.autograd.Function):
    """``apply(x, value)``: the value, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _QuantiseVectors(torch.autograd.Function):
    """``apply(v, centroids, limit)``: rows of v by the nearest row of the centroids in magnitude, with v's
    signs. Gradients as in `Quantise_STE`; with a `limit` only for magnitudes up to it."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, centroids: Tensor, limit: float | None) -> Tensor:
        codes = Q.nearest_neighbour(v.abs(), centroids)
        ctx.save_for_backward(v, centroids, codes)
        ctx.limit = limit
        return torch.where(v < 0, -centroids[codes], centroids[codes])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        v, centroids, codes = ctx.saved_tensors
        to_v = to_centroids = None
        if ctx.needs_input_grad[0]:
            to_v = gradient if ctx.limit is None else gradient * (v.abs() <= ctx.limit)
        if ctx.needs_input_grad[1]:
            signed = torch.where(v < 0, -gradient, gradient)
            columns = [_sum_by_code(codes, signed[:, d], centroids[:, d]) for d in range(v.shape[1])]
            to_centroids = torch.stack(columns, 1)
        return to_v, to_centroids, None


def _codes(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.bucketize(x, (centroids[1:] + centroids[:-1]) / 2)


def _sum_by_code(codes: Tensor, values: Tensor, like: Tensor) -> Tensor:
    # In float64: millions of terms go into few sums.
    sums = torch.bincount(codes.flatten(), values.flatten().double(), minlength=like.numel())
    return sums.to(like.dtype)


class _ScaledWeight(nn.Module):
    """What all weights with a scale have in common: `master`, `centroids`, the scale and the block's
    shape."""

    def __init__(
        self,
        master: Tensor,
        fmt: Q.TensorFormat,
        scaling_fmt: Q.LinearScalingFormat,
        centroids: Tensor,
        scaling_mode: ScalingMode,
        clip_gradient: bool,
    ) -> None:
        super().__init__()
        _checks.choice("scaling_mode", scaling_mode, ("parameter", "dynamic"))
        if not master.is_floating_point():
            raise TypeError(f"weight: got {master.dtype}, expected a floating-point dtype")
        self.fmt = fmt
        self.scaling_mode = scaling_mode
        self.clip_gradient = _checks.boolean("clip_gradient", clip_gradient)
        self._scaling_fmt = scaling_fmt
        self._blocked_shape = tuple(Q.blocked_shape(master, scaling_fmt.block_shape))
        self.master = nn.Parameter(master)
        self.centroids = nn.Parameter(centroids.to(master.device, torch.float32))
        if scaling_mode == "parameter":
            self.scale = nn.Parameter(scaling_fmt.scales(master).to(master.dtype))

    @property
    def shape(self) -> torch.Size:
        return self.master.shape

    def to_format(self) -> Q.TensorFormat:
        """The format whose `quantise(master)` is this weight's value, for "dynamic" scales: with it the
        trained weight can be encoded. Raises ValueError for scales that are parameters, which no format
        computes."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, fmt={self.fmt}, scaling_mode={self.scaling_mode!r}"

    def _scale(self, blocks: Tensor) -> Tensor:
        """One scale for each block, float32, in the blocked shape."""
        of_blocks = [size for n in self._blocked_shape[::2] for size in (n, 1)]
        if self.scaling_mode == "parameter":
            return self.scale.float().reshape(of_blocks)
        scale = self._scaling_fmt.scales(self.master).reshape(of_blocks)
        if not (blocks.requires_grad and torch.is_grad_enabled()):
            return scale
        return StraightThrough.apply(_scale_formula(blocks, self._scaling_fmt), scale)

    def _normalised(self) -> tuple[Tensor, Tensor]:
        """`master` over its scale, and the scale, both float32 in blocks."""
        blocks = self.master.float().reshape(self._blocked_shape)
        scale = self._scale(blocks)
        # By 1 where the scale is 0; a division by 0 that is masked afterwards would leave NaN in the
        # gradient.
        return blocks / torch.where(scale == 0, 1.0, scale), scale

    def _scale_bits(self, compute_dtype: torch.dtype) -> float:
        if self.scaling_mode == "parameter":
            return self.scale.numel() * compute_dtype.itemsize * 8
        return self._scaling_fmt.scale_format.count_bits(self._blocked_shape[::2])


def _scale_formula(blocks: Tensor, fmt: Q.LinearScalingFormat) -> Tensor:
    """The scale before its rounding, for its gradient."""
    dims = tuple(range(1, blocks.ndim, 2))
    low, high = fmt.element_format.range
    if fmt.scaling == "rms":
        return blocks.square().mean(dims, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    if fmt.scaling == "absmax":
        return blocks.abs().amax(dims, keepdim=True) / min(-low, high)
    largest, smallest = blocks.amax(dims, keepdim=True), blocks.amin(dims, keepdim=True)
    return torch.where(largest >= -smallest, largest, smallest) / (low if -low > high else high)


class Weight(_ScaledWeight):
    """A trainable quantized weight; calling it returns its value, in the dtype of `master`.

    Parameters: `master`, the dense values; `centroids`, float32; `scale`, one for each block, if
        `scaling_mode` is
    "parameter"; `sparse_weight`, if the format is sparse, with the buffer `sparse_idx` (indices into the
    flattened tensor, which `master` has zeros at).

    Args:
        weight: any shape that the format's blocks divide; copied.
        fmt: a `Q.LinearScalingFormat` of scalar elements, or a `Q.SparseFormat` around one.
        scaling_mode, clip_gradient: see `convert`.

    Raises ValueError for other formats.
    """

    def __init__(
        self, weight: Tensor, fmt: Q.TensorFormat, scaling_mode: ScalingMode, clip_gradient: bool
    ) -> None:
        weight = weight.detach().clone(memory_format=torch.contiguous_format)
        scaling_fmt, sparse = fmt, None
        if isinstance(fmt, Q.SparseFormat):
            scaling_fmt = fmt.format
            weight, *sparse = Q.SparseFormat.split(weight, fmt.sparse_ratio)
        if type(scaling_fmt) is not Q.LinearScalingFormat or is_sign_3d8(scaling_fmt):
            raise ValueError(
                f"fmt: got {fmt}, expected a Q.LinearScalingFormat of scalars, perhaps in a Q.SparseFormat"
            )
        super().__init__(
            weight, fmt, scaling_fmt, _scalar_centroids(scaling_fmt), scaling_mode, clip_gradient
        )
        self.compressor = getattr(scaling_fmt.element_format, "compressor", None)
        self.sparse_weight = None
        if sparse is not None:
            self.register_buffer("sparse_idx", sparse[0])
            self.sparse_weight = nn.Parameter(fmt.sparse_format.quantise(sparse[1]).to(weight.dtype))

    def forward(self) -> Tensor:
        normalised, scale = self._normalised()
        value = Quantise_STE.apply(normalised, self.centroids.float().sort().values, self.clip_gradient)
        value = (value * scale).reshape(self.shape).to(self.master.dtype)
        if self.sparse_weight is not None:
            value = value.flatten().scatter(0, self.sparse_idx, self.sparse_weight).reshape(self.shape)
        return value

    def count_bits(self, compute_dtype: torch.dtype) -> float:
        """Nominal bits: codes (after compression, if the format has one), scales, sparse values with 32 bits
        for each index, and the centroids if they are trainable. Parameters count at the width of
        `compute_dtype`."""
        width = compute_dtype.itemsize * 8
        if self.compressor is None:
            bits = self.master.numel() * math.log2(self.centroids.numel())
        else:
            with torch.no_grad():
                normalised, _ = self._normalised()
                bits = Q.CompressedLUTFormat.count_bits_compressed(
                    normalised, self._table(), self.compressor, model_logp=None
                )
        bits += self._scale_bits(compute_dtype)
        if self.sparse_weight is not None:
            bits += self.sparse_weight.numel() * (width + 32)
        if self.centroids.requires_grad:
            bits += self.centroids.numel() * width
        return bits

    def to_format(self) -> Q.TensorFormat:
        if self.scaling_mode != "dynamic":
            raise ValueError(
                'scaling_mode: got "parameter", expected "dynamic": no format computes trained scales'
            )
        if self.sparse_weight is not None:
            raise ValueError("fmt: got a sparse format, whose trained outliers no format chooses")
        fmt, element = self._scaling_fmt, self._table()
        if self.compressor is not None:
            with torch.no_grad():
                normalised, _ = self._normalised()
            element = Q.CompressedLUTFormat.train(element, normalised, compressor=self.compressor)
        return Q.LinearScalingFormat(element, fmt.scale_format, fmt.block_shape, fmt.scaling)

    def _table(self) -> Q.LUTFormat:
        values = self.centroids.detach().float().sort().values
        return Q.LUTFormat.create(values, "trained", range=self._scaling_fmt.element_format.range)


class Sign3D8Weight(_ScaledWeight):
    """A trainable weight of `Q.Sign3D8Format`: 3 values down a column share an 8-bit code.

    `centroids` are the 32 magnitudes ``[32, 3]``, rounded to the table's element type in every pass. Scales
    get no
    gradient: they belong to the integers of the table. With `clip_gradient` magnitudes beyond the table's
        range
    get none either.

    Raises ValueError for other formats.
    """

    def __init__(
        self,
        weight: Tensor,
        fmt: Q.TensorFormat,
        scaling_mode: ScalingMode,
        clip_gradient: bool = False,
    ) -> None:
        if not is_sign_3d8(fmt):
            raise ValueError(f"fmt: got {fmt}, expected a Q.LinearScalingFormat of Q.Sign3D8Format")
        if weight.ndim != 2:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected two dimensions")
        weight = weight.detach().clone(memory_format=torch.contiguous_format)
        table = torch.as_tensor(fmt.element_format.lut.values, dtype=torch.float32)
        super().__init__(weight, fmt, fmt, table, scaling_mode, clip_gradient)

    def forward(self) -> Tensor:
        normalised, scale = self._normalised()
        normalised = normalised.reshape(self.shape)
        vectors = Q.Sign3D8Format.vectorise(normalised)
        limit = self._scaling_fmt.element_format.range[1] if self.clip_gradient else None
        vectors = _QuantiseVectors.apply(vectors, self._table(), limit)
        value = Q.Sign3D8Format.unvectorise(vectors, self.shape)
        return (value.reshape(self._blocked_shape) * scale).reshape(self.shape).to(self.master.dtype)

    def count_bits(self, compute_dtype: torch.dtype) -> float:
        """Nominal bits: codes, signs and table as the format counts them, and the scales."""
        return self._scaling_fmt.element_format.count_bits(self.shape) + self._scale_bits(compute_dtype)

    def to_format(self) -> Q.TensorFormat:
        if self.scaling_mode != "dynamic":
            raise ValueError(
                'scaling_mode: got "parameter", expected "dynamic": no format computes trained scales'
            )
        fmt = self._scaling_fmt
        old = fmt.element_format.lut
        lut = Q.VectorLUTFormat.create(self._table().detach(), old.element_type, "trained", range=old.range)
        return Q.LinearScalingFormat(Q.Sign3D8Format(lut), fmt.scale_format, fmt.block_shape, fmt.scaling)

    def _scale(self, blocks: Tensor) -> Tensor:
        return super()._scale(blocks.detach()).detach()

    def _table(self) -> Tensor:
        element_type = self._scaling_fmt.element_format.lut.element_type
        values = self.centroids.detach().float()
        if isinstance(element_type, Q.TorchFormat) and not element_type.torch_dtype.is_floating_point:
            values = values.round()  # the cast alone would cut off
        return StraightThrough.apply(self.centroids.float(), element_type.quantise(values))


class UnquantisedWeight(nn.Module):
    """A dense weight in the place of a `Weight`: one that is left as it is, or was quantized once."""

    def __init__(self, weight: Tensor, fmt: Q.TensorFormat, one_shot: bool = False) -> None:
        super().__init__()
        self.fmt = fmt
        self.one_shot = one_shot
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def forward(self) -> Tensor:
        return self.weight

    def count_bits(self, compute_dtype: torch.dtype) -> float:
        """All values at the width of `compute_dtype`."""
        return self.weight.numel() * compute_dtype.itemsize * 8

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, fmt={self.fmt}"


def is_weight_module(module: nn.Module) -> bool:
    return isinstance(module, (_ScaledWeight, UnquantisedWeight))


def is_sign_3d8(fmt: Any) -> bool:
    return type(fmt) is Q.LinearScalingFormat and isinstance(fmt.element_format, Q.Sign3D8Format)


def _scalar_centroids(fmt: Q.LinearScalingFormat) -> Tensor:
    element = fmt.element_format
    try:
        element = element.lut if isinstance(element, Q.CompressedLUTFormat) else element
        centroids = torch.tensor(element.centroids, dtype=torch.float32)
    except (AttributeError, NotImplementedError):
        raise ValueError(f"fmt: got {fmt}, whose elements have no list of centroids") from None
    if centroids.ndim != 1 or centroids.numel() < 2:
        raise ValueError(f"fmt: got {fmt} with {centroids.numel()} centroids, expected at least 2")
    return centroids
