"""Weights that are quantized in every forward pass, and their straight-through gradients."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import formats as Q
from quantloom.formats.encoded import encode_parts

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
            codes = _codes(x, centroids).flatten()
            sums = _sum_by_code(codes, gradient.reshape(-1, 1), centroids.numel())
            to_centroids = sums.reshape(-1).to(centroids.dtype)
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
    """``apply(v, centroids, inside)``: for each row of v the nearest row of the centroids.

    Gradients as in `Quantise_STE`: that of v passes straight through, with a mask `inside` only where that is
    true; that of a centroid is the sum over the rows that took it.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, centroids: Tensor, inside: Tensor | None) -> Tensor:
        codes = Q.nearest_neighbour(v, centroids)
        ctx.save_for_backward(codes, inside)
        ctx.count = centroids.shape[0]
        return centroids[codes]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, inside = ctx.saved_tensors
        to_v = to_centroids = None
        if ctx.needs_input_grad[0]:
            to_v = gradient if inside is None else gradient * inside
        if ctx.needs_input_grad[1]:
            to_centroids = _sum_by_code(codes, gradient, ctx.count)
        return to_v, to_centroids, None


def _codes(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.bucketize(x, (centroids[1:] + centroids[:-1]) / 2)


def _sum_by_code(codes: Tensor, values: Tensor, count: int) -> Tensor:
    """The sum of the rows of `values` [n, d] that have each code: [count, d], the same on every run.

    In float64, as millions of terms go into few sums.
    """
    wide = values.double()
    if codes.is_cuda:
        return _partial_sums(codes, wide, count).to(values.dtype)
    columns = [torch.bincount(codes, column, minlength=count) for column in wide.unbind(1)]
    return torch.stack(columns, 1).to(values.dtype)


def _partial_sums(codes: Tensor, values: Tensor, count: int) -> Tensor:
    """On CUDA devices `bincount` adds in no fixed order; this adds rows of equal index in order, one by one,
    so that each code has many partial sums."""
    parts = max(1, min(4096, codes.numel() // (32 * count)))
    rows = torch.arange(codes.numel(), device=codes.device) % parts * count + codes
    sums = torch.ops.aten.embedding_dense_backward(values, rows, parts * count, -1, False)
    return sums.reshape(parts, count, values.shape[1]).sum(0)


class _ScaledWeight(nn.Module):
    """What all weights with a scale have in common: `master`, the scale, outliers, and the way to bytes.

    Kinds of elements differ in `_rounded`, `_element` and `_code_bits`.
    """

    def __init__(
        self,
        weight: Tensor,
        fmt: Q.TensorFormat,
        centroids: Tensor,
        scaling_mode: ScalingMode,
        clip_gradient: bool,
    ) -> None:
        super().__init__()
        _checks.choice("scaling_mode", scaling_mode, ("parameter", "dynamic"))
        if not weight.is_floating_point():
            raise TypeError(f"weight: got {weight.dtype}, expected a floating-point dtype")
        scaling_fmt = fmt.format if isinstance(fmt, Q.SparseFormat) else fmt
        master, outliers = weight.detach().clone(memory_format=torch.contiguous_format), None
        if isinstance(fmt, Q.SparseFormat):
            master, *outliers = Q.SparseFormat.split(master, fmt.sparse_ratio)
        self.fmt = fmt
        self.scaling_mode = scaling_mode
        self.clip_gradient = _checks.boolean("clip_gradient", clip_gradient)
        self._scaling_fmt = scaling_fmt
        self._blocked_shape = tuple(Q.blocked_shape(master, scaling_fmt.block_shape))
        self.master = nn.Parameter(master)
        self.centroids = nn.Parameter(centroids.to(master.device, torch.float32))
        if scaling_mode == "parameter":
            self.scale = nn.Parameter(scaling_fmt.scales(master).to(master.dtype))
        self.sparse_weight = None
        if outliers is not None:
            self.register_buffer("sparse_idx", outliers[0])
            self.sparse_weight = nn.Parameter(fmt.sparse_format.quantise(outliers[1]).to(master.dtype))

    @property
    def shape(self) -> torch.Size:
        return self.master.shape

    def forward(self) -> Tensor:
        normalised, scale = self._normalised()
        value = self._rounded(normalised.reshape(self.shape)).reshape(self._blocked_shape)
        value = (value * scale).reshape(self.shape).to(self.master.dtype)
        if self.sparse_weight is not None:
            value = value.flatten().scatter(0, self.sparse_idx, self.sparse_weight).reshape(self.shape)
        return value

    def count_bits(self, compute_dtype: torch.dtype) -> float:
        """Nominal bits: codes, scales, sparse values with 32 bits for each index, and the table where it is
        trained or the format counts it. Parameters count at the width of `compute_dtype`."""
        width = compute_dtype.itemsize * 8
        bits = self._code_bits(width)
        if self.scaling_mode == "parameter":
            bits += self.scale.numel() * width
        else:
            bits += self._scaling_fmt.scale_format.count_bits(self._blocked_shape[::2])
        if self.sparse_weight is not None:
            bits += self.sparse_weight.numel() * (width + 32)
        return bits

    def to_format(self) -> Q.TensorFormat:
        """The format whose `quantise(master)` is this weight's value, for "dynamic" scales without outliers.

        Raises ValueError for scales that are parameters, which no format computes, and for outliers, which no
        format chooses; `encode` stores those as well.
        """
        if self.scaling_mode != "dynamic":
            raise ValueError(
                'scaling_mode: got "parameter", expected "dynamic": no format computes trained scales'
            )
        if self.sparse_weight is not None:
            raise ValueError("fmt: got a sparse format, whose trained outliers no format chooses")
        return self._linear(self._scaling_fmt.scale_format)

    def encode(self, scale_format: Q.ScalarFormat | None = None) -> Q.Encoded:
        """The trained weight as bytes: codes, scales, outliers and the trained table.

        Decoding gives this weight's value, bit for bit, with its scales and outliers rounded to their
        formats. Scales that are computed ("dynamic") and outliers that were not trained have been rounded
        already; trained ones are wider than the format has them.

        Args:
            scale_format: of scales that are parameters; None: the format's. `Q.FP32` keeps them as they are.

        Raises ValueError if scales are computed and another format is given, and for weights that are not
        finite; TypeError for dtypes that no format encodes.
        """
        if scale_format is not None and self.scaling_mode == "dynamic":
            raise ValueError(f"scale_format: got {scale_format} with dynamic scales, expected None")
        with torch.no_grad():
            master = self.master.detach()
            if not bool(master.isfinite().all()):
                raise ValueError("master: got NaN or infinities, expected finite values")
            linear = self._linear(scale_format or self._scaling_fmt.scale_format)
            scales = self.scale.detach().float() if self.scaling_mode == "parameter" else None
            fmt: Q.TensorFormat = linear
            outliers = None
            if self.sparse_weight is not None:
                fmt = Q.SparseFormat(linear, self.fmt.sparse_format, self.fmt.sparse_ratio)
                outliers = (self.sparse_idx, self.sparse_weight.detach())
            return encode_parts(fmt, master, scales, outliers)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, fmt={self.fmt}, scaling_mode={self.scaling_mode!r}"

    def _rounded(self, normalised: Tensor) -> Tensor:
        """Normalised values as the elements have them, in their shape, with gradients."""
        raise NotImplementedError

    def _element(self) -> Q.TensorFormat:
        """The element format with the centroids as they are now."""
        raise NotImplementedError

    def _code_bits(self, width: int) -> float:
        """Bits of the codes and of the table."""
        raise NotImplementedError

    def _linear(self, scale_format: Q.ScalarFormat) -> Q.LinearScalingFormat:
        fmt = self._scaling_fmt
        return Q.LinearScalingFormat(self._element(), scale_format, fmt.block_shape, fmt.scaling)

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
    `scaling_mode` is "parameter"; `sparse_weight`, if the format is sparse, with the buffer `sparse_idx`
    (indices into the flattened tensor, which `master` has zeros at).

    Args:
        weight: any shape that the format's blocks divide; copied.
        fmt: a `Q.LinearScalingFormat` of scalar elements, or a `Q.SparseFormat` around one.
        scaling_mode, clip_gradient: see `convert`.

    Raises ValueError for other formats.
    """

    def __init__(
        self, weight: Tensor, fmt: Q.TensorFormat, scaling_mode: ScalingMode, clip_gradient: bool = False
    ) -> None:
        scaling_fmt = fmt.format if isinstance(fmt, Q.SparseFormat) else fmt
        element = getattr(scaling_fmt, "element_format", None)
        vectors = isinstance(element, (Q.Sign3D8Format, Q.VectorLUTFormat))
        if type(scaling_fmt) is not Q.LinearScalingFormat or vectors:
            raise ValueError(
                f"fmt: got {fmt}, expected a Q.LinearScalingFormat of scalars, perhaps in a Q.SparseFormat"
            )
        super().__init__(weight, fmt, _scalar_centroids(scaling_fmt), scaling_mode, clip_gradient)
        self.compressor = getattr(element, "compressor", None)

    def _rounded(self, normalised: Tensor) -> Tensor:
        return Quantise_STE.apply(normalised, self.centroids.float().sort().values, self.clip_gradient)

    def _element(self) -> Q.TensorFormat:
        table = self._table()
        if self.compressor is None:
            return table
        with torch.no_grad():
            normalised, _ = self._normalised()
        return Q.CompressedLUTFormat.train(table, normalised, compressor=self.compressor)

    def _code_bits(self, width: int) -> float:
        if self.compressor is None:
            bits = self.master.numel() * math.log2(self.centroids.numel())
        else:
            with torch.no_grad():
                normalised, _ = self._normalised()
                bits = Q.CompressedLUTFormat.count_bits_compressed(
                    normalised, self._table(), self.compressor, model_logp=None
                )
        return bits + (self.centroids.numel() * width if self.centroids.requires_grad else 0)

    def _table(self) -> Q.LUTFormat:
        values = self.centroids.detach().float().sort().values
        return Q.LUTFormat.create(values, "trained", range=self._scaling_fmt.element_format.range)


class VectorWeight(_ScaledWeight):
    """A trainable weight of `Q.VectorLUTFormat`: d consecutive elements share a code.

    `centroids` are the vectors ``[K, d]``, rounded to the table's element type in every pass. With
    `clip_gradient` an element beyond all vectors in its dimension gets no gradient. Otherwise as `Weight`.

    Raises ValueError for other formats, and for a number of elements that d does not divide.
    """

    def __init__(
        self, weight: Tensor, fmt: Q.TensorFormat, scaling_mode: ScalingMode, clip_gradient: bool = False
    ) -> None:
        if not is_vector(fmt):
            raise ValueError(
                f"fmt: got {fmt}, expected a Q.LinearScalingFormat of Q.VectorLUTFormat, perhaps in a"
                " Q.SparseFormat"
            )
        element = (fmt.format if isinstance(fmt, Q.SparseFormat) else fmt).element_format
        if weight.numel() % element.dim:
            raise ValueError(f"weight: got {weight.numel()} elements, expected a multiple of {element.dim}")
        table = torch.tensor(element.values, dtype=torch.float32, device="cpu")
        super().__init__(weight, fmt, table, scaling_mode, clip_gradient)

    def _rounded(self, normalised: Tensor) -> Tensor:
        lut, table = self._scaling_fmt.element_format, _stored_vectors(self.centroids, self._element_type)
        vectors, inside = normalised.reshape(-1, lut.dim), None
        if self.clip_gradient:
            detached = table.detach()
            inside = (vectors >= detached.amin(0)) & (vectors <= detached.amax(0))
        return _QuantiseVectors.apply(vectors, table, inside).reshape(normalised.shape)

    def _element(self) -> Q.TensorFormat:
        values = _stored_vectors(self.centroids, self._element_type).detach()
        return Q.VectorLUTFormat.create(
            values, self._element_type, "trained", range=self._scaling_fmt.element_format.range
        )

    def _code_bits(self, width: int) -> float:
        return self._scaling_fmt.element_format.count_bits(self.shape)

    @property
    def _element_type(self) -> Q.ScalarFormat:
        return self._scaling_fmt.element_format.element_type


class Sign3D8Weight(_ScaledWeight):
    """A trainable weight of `Q.Sign3D8Format`: 3 values down a column share an 8-bit code.

    `centroids` are the 32 magnitudes ``[32, 3]``, rounded to the table's element type in every pass. Scales
    get no gradient: they belong to the integers of the table. With `clip_gradient` magnitudes beyond the
    table's range get none either.

    Raises ValueError for other formats.
    """

    def __init__(
        self, weight: Tensor, fmt: Q.TensorFormat, scaling_mode: ScalingMode, clip_gradient: bool = False
    ) -> None:
        if not is_sign_3d8(fmt):
            raise ValueError(f"fmt: got {fmt}, expected a Q.LinearScalingFormat of Q.Sign3D8Format")
        if weight.ndim != 2:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected two dimensions")
        table = torch.as_tensor(fmt.element_format.lut.values, dtype=torch.float32, device="cpu")
        super().__init__(weight, fmt, table, scaling_mode, clip_gradient)

    def _rounded(self, normalised: Tensor) -> Tensor:
        vectors = Q.Sign3D8Format.vectorise(normalised)
        negative = vectors < 0
        sizes, inside = torch.where(negative, -vectors, vectors), None
        if self.clip_gradient:
            inside = sizes <= self._scaling_fmt.element_format.range[1]
        sizes = _QuantiseVectors.apply(sizes, _stored_vectors(self.centroids, self._element_type), inside)
        return Q.Sign3D8Format.unvectorise(torch.where(negative, -sizes, sizes), self.shape)

    def _element(self) -> Q.TensorFormat:
        values = _stored_vectors(self.centroids, self._element_type).detach()
        old = self._scaling_fmt.element_format.lut
        return Q.Sign3D8Format(
            Q.VectorLUTFormat.create(values, self._element_type, "trained", range=old.range)
        )

    def _code_bits(self, width: int) -> float:
        return self._scaling_fmt.element_format.count_bits(self.shape)

    def _scale(self, blocks: Tensor) -> Tensor:
        return super()._scale(blocks.detach()).detach()

    @property
    def _element_type(self) -> Q.ScalarFormat:
        return self._scaling_fmt.element_format.lut.element_type


def _stored_vectors(centroids: Tensor, element_type: Q.ScalarFormat) -> Tensor:
    """A table as its element type has it, with the gradient of the table."""
    values = centroids.detach().float()
    if isinstance(element_type, Q.TorchFormat) and not element_type.torch_dtype.is_floating_point:
        values = values.round()  # the cast alone would cut off
    return StraightThrough.apply(centroids.float(), element_type.quantise(values))


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


def is_vector(fmt: Any) -> bool:
    fmt = fmt.format if isinstance(fmt, Q.SparseFormat) else fmt
    return type(fmt) is Q.LinearScalingFormat and isinstance(fmt.element_format, Q.VectorLUTFormat)


def _scalar_centroids(fmt: Q.LinearScalingFormat) -> Tensor:
    element = fmt.element_format
    try:
        element = element.lut if isinstance(element, Q.CompressedLUTFormat) else element
        centroids = torch.tensor(element.centroids, dtype=torch.float32, device="cpu")
    except (AttributeError, NotImplementedError):
        raise ValueError(f"fmt: got {fmt}, whose elements have no list of centroids") from None
    if centroids.ndim != 1 or centroids.numel() < 2:
        raise ValueError(f"fmt: got {fmt} with {centroids.numel()} centroids, expected at least 2")
    return centroids
