"""Formats around a format: a constant factor, block scales, outliers, a rotation.

All compute in float32 and round once, at the end, to the dtype of the tensor: values of a bfloat16 tensor are
not rounded to bfloat16 between scaling and the choice of codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantloom import _checks, _core
from quantloom.formats import _numerics, metrics
from quantloom.formats.base import BlockShape, ScalarFormat, Scaling, Shape, TensorFormat
from quantloom.formats.tables import optional_range

if TYPE_CHECKING:
    from quantloom.formats.encoded import Planes

__all__ = ["LinearScalingFormat", "RandomRotationFormat", "ScaledFormat", "SparseFormat"]


MAX_ROTATION_SIZE = 32768
"""Larger dimensions are not rotated: their matrix alone would take more than 4 GiB."""


def _require_format(name: str, value: object) -> None:
    if not isinstance(value, TensorFormat):
        raise TypeError(f"{name}: got {_checks.type_name(value)}, expected a format")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


@dataclass
class ScaledFormat(ScalarFormat):
    """q(x / scale) * scale, with a constant scale that takes no bits: ``E2M1{*0.5}``.

    Args:
        format: an element format.
        scale: a finite number > 0.
        _range: the range that block scales refer to, by default the format's times `scale`. A smaller one
            lets blocks clip, a larger one leaves room.
    """

    format: ScalarFormat
    scale: float
    _range: tuple[float, float] | None = None
    _type: str = "scaled"

    def __post_init__(self) -> None:
        _require_format("format", self.format)
        self.scale = _checks.real("scale", self.scale)
        if self.scale <= 0:
            raise ValueError(f"scale: got {self.scale}, expected a number > 0")
        self._range = optional_range(self._range)
        if self._range is None:
            low, high = self.format.range
            self._range = (self.scale * low, self.scale * high)

    @classmethod
    def create(
        cls, format: ScalarFormat, scale: float, range: tuple[float, float] | None = None
    ) -> ScaledFormat:
        """A scaled format, with the scaled range unless another is given."""
        return cls(format, scale, range)

    def __str__(self) -> str:
        return f"{self.format}{{*{self.scale:.3g}}}"

    @property
    def bits(self) -> float:
        return self.format.bits

    @property
    def range(self) -> tuple[float, float]:
        return self._range

    @property
    def centroids(self) -> tuple[float, ...]:
        values = torch.tensor(self.format.centroids, dtype=torch.float32, device="cpu")
        return tuple((values * torch.tensor(self.scale, dtype=torch.float32, device="cpu")).tolist())

    def count_bits(self, shape: Shape) -> int:
        return self.format.count_bits(shape)

    def count_bits_tensor(self, tensor: Tensor) -> float:
        return self.format.count_bits_tensor(_numerics.divided(_wide(tensor), self.scale))

    @property
    def _factor(self) -> float:
        return self.scale

    def _elements(self) -> _core.Elements:
        return self.format._elements()

    def _reference_codes(self, values: Tensor) -> Tensor:
        return self.format._reference_codes(values)

    def _reference_values(self, codes: Tensor) -> Tensor:
        return self.format._reference_values(codes)

    def _codes_of(self) -> ScalarFormat | None:
        """Itself, around a format that chooses its own codes; C++ then applies the factor."""
        return self if self.format._codes_of() is self.format and self.format._factor == 1 else None

    def to_idx(self, tensor: Tensor) -> Tensor:
        if self._codes_of() is not None:
            return super().to_idx(tensor)
        return self.format.to_idx(_numerics.divided(_wide(tensor), self.scale))

    def quantise(self, tensor: Tensor) -> Tensor:
        if self._codes_of() is not None:
            return super().quantise(tensor)
        return (self.format.quantise(_numerics.divided(_wide(tensor), self.scale)) * self.scale).to(
            tensor.dtype
        )

    def _put_codes(self, codes: Tensor | _numerics.Rounded, planes: Planes) -> None:
        self.format._put_codes(codes, planes.child("format"))

    def _get_codes(self, planes: Planes, count: int) -> Tensor | _numerics.Packed:
        return self.format._get_codes(planes.child("format"), count)

    def _get_codes_on(self, planes: Planes, count: int, device: torch.device) -> Tensor | _numerics.Packed:
        return self.format._get_codes_on(planes.child("format"), count, device)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        if self._codes_of() is not None:
            super()._encode(tensor, planes)
        else:
            self.format._encode(_numerics.divided(_wide(tensor), self.scale), planes.child("format"))

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._codes_of() is not None:
            return super()._decode(planes, shape, dtype, device)
        values = self.format._decode(planes.child("format"), shape, torch.float32, device)
        return (values * self.scale).to(dtype)


@dataclass
class LinearScalingFormat(TensorFormat):
    """An element format in blocks that share a scale: ``LUT4[NF]{1,64:BFLOAT16:absmax}``, ``*`` for None.

    Args:
        element_format: what values divided by their scale are rounded to.
        scale_format: what scales are rounded to, before values are divided by them.
        block_shape: the size of a block along each dimension, None for the whole: ``(1, 64)``; ``(1, None)``:
            one scale for each row; ``(None, None)``: one for a matrix. Sizes must divide the tensor's.
        scaling: ``"absmax"``, ``"rms"`` or ``"signmax"`` (the extreme value of a block maps to one end of the
            range exactly, and the scale may be negative); see ``blocked_scale``.

    A scale rounded to nearest can be a little too small for the largest value of its block, which then is
    clipped; ``FPFormat.create(7, M, "to_inf")`` rounds scales up. Bits: those of the elements and of one
    scale for each block.
    """

    element_format: TensorFormat
    scale_format: ScalarFormat
    block_shape: BlockShape
    scaling: Scaling
    _type: str = "linear"

    def __post_init__(self) -> None:
        _require_format("element_format", self.element_format)
        _require_format("scale_format", self.scale_format)
        self.block_shape = tuple(
            None if size is None else _checks.integer("block_shape", size, 1) for size in self.block_shape
        )
        metrics.require_scaling(self.scaling)

    def __str__(self) -> str:
        blocks = ",".join("*" if size is None else str(size) for size in self.block_shape)
        return f"{self.element_format}{{{blocks}:{self.scale_format}:{self.scaling}}}"

    def _blocked(self, shape: Shape) -> tuple[int, ...]:
        return metrics.blocked_shape(torch.empty(shape, device="meta"), self.block_shape)

    def count_bits(self, shape: Shape) -> int:
        blocks = self._blocked(shape)[::2]
        return self.element_format.count_bits(shape) + self.scale_format.count_bits(blocks)

    def count_bits_tensor(self, tensor: Tensor) -> float:
        scales = self.scales(tensor)
        elements = self.element_format.count_bits_tensor(self._normalised(tensor, scales))
        return elements + self.scale_format.count_bits_tensor(scales)

    def scales(self, tensor: Tensor) -> Tensor:
        """The scales as stored, float32, in the shape of the blocks."""
        element_range = (-1.0, 1.0) if self.scaling == "rms" else self.element_format.range
        scales = metrics.block_scales(tensor.detach(), self.block_shape, self.scaling, element_range)
        return self.scale_format.quantise(scales)

    def _spread(self, scales: Tensor, shape: Shape) -> Tensor:
        return metrics.spread(scales, self._blocked(shape), shape)

    def _normalised(self, tensor: Tensor, scales: Tensor) -> Tensor:
        return metrics.safe_div(_wide(tensor), self._spread(scales, tuple(tensor.shape)))

    def _grid(self, scales: Tensor, shape: Shape) -> _numerics.Grid:
        return metrics.grid_of(scales, self._blocked(shape), shape)

    def quantise(self, tensor: Tensor) -> Tensor:
        scales = self.scales(tensor)
        coder = self.element_format._codes_of()
        if coder is None:
            values = self.element_format.quantise(self._normalised(tensor, scales))
            return (values * self._spread(scales, tuple(tensor.shape))).to(tensor.dtype)
        grid = self._grid(scales, tuple(tensor.shape))
        return _numerics.round_values(coder._elements(), coder, tensor, grid)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        self._encode_scaled(tensor, self.scales(tensor), planes)

    def _encode_scaled(self, tensor: Tensor, scales: Tensor, planes: Planes) -> None:
        """With scales in the shape of the blocks, which `scale_format` can hold."""
        self.scale_format._encode(scales, planes.child("scale_format"))
        coder = self.element_format._codes_of()
        elements = planes.child("element_format")
        if coder is None:
            self.element_format._encode(self._normalised(tensor, scales), elements)
            return
        grid = self._grid(scales, tuple(tensor.shape))
        self.element_format._put_codes(_numerics.Rounded(coder._elements(), coder, tensor, grid), elements)

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        blocks = self._blocked(shape)[::2]
        scales = self.scale_format._decode(planes.child("scale_format"), blocks, torch.float32, device)
        coder = self.element_format._codes_of()
        elements = planes.child("element_format")
        if coder is None:
            values = self.element_format._decode(elements, shape, torch.float32, device)
            return (values * self._spread(scales, shape)).to(dtype)
        codes = self.element_format._get_codes_on(elements, math.prod(shape), device)
        grid = self._grid(scales.cpu(), shape)
        return _numerics.decode(coder._elements(), codes, shape, dtype, grid, coder._factor).to(device)


@dataclass
class SparseFormat(TensorFormat):
    """The largest values on their own, the rest in a format: ``...+S[1.0%:BFLOAT16]`` (``S[1e-03:...]``).

    floor(sparse_ratio * numel) values of largest magnitude are set to 0 before `format` sees the tensor, so
    that they do not count for its scales, and are put back after. Nominal bits: for each, those of
    `sparse_format` and **32 for its place**; ``encode`` stores distances between places in as few bits as the
    largest takes. Tensors need not be contiguous.
    """

    format: TensorFormat
    sparse_format: ScalarFormat
    sparse_ratio: float
    _type: str = "outlier"

    def __post_init__(self) -> None:
        _require_format("format", self.format)
        _require_format("sparse_format", self.sparse_format)
        self.sparse_ratio = _checks.real("sparse_ratio", self.sparse_ratio)
        if not 0 <= self.sparse_ratio <= 1:
            raise ValueError(f"sparse_ratio: got {self.sparse_ratio}, expected 0 to 1")

    def __str__(self) -> str:
        ratio = f"{self.sparse_ratio:.0e}" if self.sparse_ratio < 1e-3 else f"{self.sparse_ratio:.1%}"
        return f"{self.format}+S[{ratio}:{self.sparse_format}]"

    @staticmethod
    def n_sparse(shape: Shape, sparse_ratio: float) -> int:
        """How many values of a tensor are stored on their own."""
        return int(sparse_ratio * math.prod(shape))

    @classmethod
    def split(cls, tensor: Tensor, sparse_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """(the tensor with its largest values set to 0, their places in row-major order, the values)."""
        flat = tensor.reshape(-1)
        count = cls.n_sparse(tuple(tensor.shape), sparse_ratio)
        places = flat.detach().abs().topk(count, sorted=False).indices.sort().values
        dense = flat.index_fill(0, places, 0) if count else flat
        return dense.reshape(tensor.shape), places, flat[places]

    def count_bits(self, shape: Shape) -> int:
        count = self.n_sparse(shape, self.sparse_ratio)
        return self.format.count_bits(shape) + self.sparse_format.count_bits((count,)) + 32 * count

    def count_bits_tensor(self, tensor: Tensor) -> float:
        dense, places, values = self.split(tensor, self.sparse_ratio)
        sparse = self.sparse_format.count_bits_tensor(values) + 32 * places.numel()
        return self.format.count_bits_tensor(dense) + sparse

    def quantise(self, tensor: Tensor) -> Tensor:
        dense, places, values = self.split(tensor.detach(), self.sparse_ratio)
        result = self.format.quantise(dense).reshape(-1)
        return result.scatter(0, places, self.sparse_format.quantise(values)).reshape(tensor.shape)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        dense, places, values = self.split(tensor.detach(), self.sparse_ratio)
        self.format._encode(dense, planes.child("format"))
        self.sparse_format._encode(values, planes.child("sparse_format"))
        planes.put_places("outlier_indices", places)

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = self.n_sparse(shape, self.sparse_ratio)
        places = planes.get_places("outlier_indices", count, math.prod(shape)).to(device)
        values = self.sparse_format._decode(planes.child("sparse_format"), (count,), dtype, device)
        result = self.format._decode(planes.child("format"), shape, dtype, device).reshape(-1)
        return result.scatter(0, places, values).reshape(shape)


@dataclass
class RandomRotationFormat(TensorFormat):
    """A format behind random rotations: ``...{rot[0]}``.

    Each dimension of `dims` is multiplied by a random orthogonal matrix R (Haar: QR of Gaussian numbers from
    `seed`; x becomes x R along it), the format applied, and the rotation undone. Matrices are dense, so
    memory and time grow with the square and the cube of the dimension; they are made anew from the seed,
    which takes 64 bits of the encoded tensor and none of the nominal count. Decoded values are the same bits
    on the same machine; matrix products of other processors round differently.
    """

    format: TensorFormat
    dims: tuple[int, ...]
    seed: int
    _type: str = "random_rotation"

    def __post_init__(self) -> None:
        _require_format("format", self.format)
        self.dims = tuple(_checks.integer("dims", dim) for dim in self.dims)
        self.seed = _checks.integer("seed", self.seed, 0)

    def __str__(self) -> str:
        return f"{self.format}{{rot{list(self.dims)}}}"

    @staticmethod
    def rotate(
        tensor: Tensor, dims: tuple[int, ...], seed: int, inverse: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(the tensor with its dimensions rotated, or rotated back; the matrices), float32.

        Matrices are those of ``torch.nn.init.orthogonal_`` with one generator of that seed.
        """
        generator = torch.Generator().manual_seed(seed)
        result, matrices = _wide(tensor), []
        for dim in dims:
            if not -tensor.ndim <= dim < tensor.ndim:
                raise ValueError(f"dims: got {dim}, expected a dimension of {list(tensor.shape)}")
            if tensor.shape[dim] > MAX_ROTATION_SIZE:
                raise ValueError(
                    f"dims: got dimension {dim} of size {tensor.shape[dim]},"
                    f" expected at most {MAX_ROTATION_SIZE}"
                )
            matrix = _haar(tensor.shape[dim], generator).to(tensor.device)
            matrices.append(matrix)
            rotation = matrix.T if inverse else matrix
            result = (result.movedim(dim, -1) @ rotation).movedim(-1, dim)
        return result.contiguous(), tuple(matrices)

    @staticmethod
    def unrotate(tensor: Tensor, dims: tuple[int, ...], rotations: Sequence[Tensor]) -> Tensor:
        """Undoes ``rotate`` with the matrices that it returned, float32."""
        result = _wide(tensor)
        for dim, rotation in zip(dims, rotations, strict=True):
            result = (result.movedim(dim, -1) @ rotation.T).movedim(-1, dim)
        return result.contiguous()

    def count_bits(self, shape: Shape) -> int:
        return self.format.count_bits(shape)

    def count_bits_tensor(self, tensor: Tensor) -> float:
        return self.format.count_bits_tensor(self.rotate(tensor, self.dims, self.seed)[0])

    def quantise(self, tensor: Tensor) -> Tensor:
        rotated, rotations = self.rotate(tensor, self.dims, self.seed)
        return self.unrotate(self.format.quantise(rotated), self.dims, rotations).to(tensor.dtype)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        planes.put("seed", torch.tensor([self.seed], dtype=torch.int64, device="cpu"))
        self.format._encode(self.rotate(tensor, self.dims, self.seed)[0], planes.child("format"))

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        if int(planes.get("seed", torch.int64, (1,))) != self.seed:
            raise ValueError("seed: got another one than the format's")
        values = self.format._decode(planes.child("format"), shape, torch.float32, device)
        return self.rotate(values, self.dims, self.seed, inverse=True)[0].to(dtype)


def _haar(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix; signs make the factorization unique, and so the law uniform."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, device="cpu"))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
