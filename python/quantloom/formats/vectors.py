"""Tables of vectors as element formats, and the search for the nearest one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantloom import _checks, _core, _fitting
from quantloom.formats.base import ScalarFormat, Shape, TensorFormat
from quantloom.formats.tables import numbers, optional_range

if TYPE_CHECKING:
    from quantloom.formats.encoded import Planes

__all__ = ["Sign3D8Format", "VectorLUTFormat", "nearest_neighbour"]

_MOST_DIMS = 256
_SCORES = 1 << 26  # numbers of a block of distances where they are stored


def _nearest_by_scores(vectors: Tensor, centroids: Tensor) -> Tensor:
    """argmin of |c|^2 - 2 x.c, block by block, in float32."""
    norms = centroids.square().sum(1)
    rows = max(1, _SCORES // max(1, centroids.shape[0]))
    parts = [
        torch.addmm(norms, vectors[first : first + rows], centroids.T, alpha=-2).argmin(1)
        for first in range(0, vectors.shape[0], rows)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=vectors.device)


def nearest_neighbour(
    tensor: Tensor, centroids: Tensor, out: Tensor | None = None, method: str = "auto"
) -> Tensor:
    """int64 [n]: for each row of `tensor` [n, d] the row of `centroids` [K, d] at the least L2 distance.

    Among equal distances the lowest index.

    Args:
        tensor, centroids: floats on one device; compared in float32.
        out: an int64 tensor for the result.
        method: ``"auto"``, which ``"triton"`` stands for as well (for scripts written for another
            implementation of the vocabulary): an exact search that stores no distances, in C++ or, in builds
            with CUDA, on the GPU, with up to 16 dimensions and 65536 centroids. ``"torch"``, and whatever is
            beyond: blocks of distances by matrix products in float32, which can miss near ties.

    Raises ValueError for shapes that do not fit, and in the exact search for values that are not finite.
    """
    _checks.choice("method", method, ("auto", "triton", "torch"))
    if tensor.ndim != 2 or centroids.ndim != 2 or tensor.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"tensor, centroids: got shapes {list(tensor.shape)}, {list(centroids.shape)},"
            f" expected [n, d], [K, d]"
        )
    if centroids.shape[0] < 1:
        raise ValueError("centroids: got none, expected at least one")
    x = tensor.detach().float().contiguous()
    table = centroids.detach().float().to(x.device).contiguous()
    exact = method != "torch" and 1 <= x.shape[1] <= 16 and table.shape[0] <= 65536
    if exact and (x.device.type == "cpu" or _core.built_with_cuda()):
        found = _fitting.nearest_neighbour(x, table)
        result = (found if isinstance(found, Tensor) else torch.from_numpy(found)).to(torch.int64)
    else:
        result = _nearest_by_scores(x, table)
    if out is None:
        return result
    if out.dtype != torch.int64 or out.shape != result.shape:
        raise ValueError(f"out: got {out.dtype} {list(out.shape)}, expected int64 {list(result.shape)}")
    return out.copy_(result)


@dataclass
class VectorLUTFormat(ScalarFormat):
    """A table of K vectors for d consecutive elements each: ``VLUT3x2[LM]``.

    Elements are taken d at a time in row-major order, so their number must be a multiple of d. The table is
    kept in `element_type`, and **its bits count**: count_bits = numel / d * log2 K + those of K * d numbers.
    There is no ``bits``, which would leave them out.

    Args:
        values: K tuples of d numbers; rounded to `element_type`.
        element_type: the format that the table is stored in.
        name: for ``str()``.
        _range: the range that block scales refer to; by default the largest per-dimension minimum and the
            smallest per-dimension maximum.
    """

    values: tuple[tuple[float, ...], ...]
    element_type: ScalarFormat
    name: str
    _range: tuple[float, float] | None = None
    _type: str = "vlut"

    def __post_init__(self) -> None:
        rows = self.values.tolist() if isinstance(self.values, Tensor) else self.values
        rows = tuple(numbers("values", row) for row in rows)
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise ValueError("values: got no rectangular table, expected K vectors of d numbers each")
        if len(rows[0]) > _MOST_DIMS:
            raise ValueError(f"values: got vectors of {len(rows[0])} numbers, expected at most {_MOST_DIMS}")
        if not isinstance(self.element_type, TensorFormat):
            raise TypeError(f"element_type: got {_checks.type_name(self.element_type)}, expected a format")
        table = self.element_type.quantise(torch.tensor(rows, dtype=torch.float32, device="cpu"))
        self.values = tuple(map(tuple, table.tolist()))
        _checks.string("name", self.name)
        self._range = optional_range(self._range)
        if self._range is None:
            self._range = (float(table.amin(0).max()), float(table.amax(0).min()))

    @classmethod
    def create(
        cls,
        values: Iterable[Iterable[float]] | Tensor,
        element_type: ScalarFormat,
        name: str,
        range: tuple[float, float] | None = None,
    ) -> VectorLUTFormat:
        """A table of vectors: a tensor [K, d] or rows of numbers."""
        rows = values.tolist() if isinstance(values, Tensor) else [tuple(row) for row in values]
        return cls(tuple(map(tuple, rows)), element_type, name, range)

    def __str__(self) -> str:
        return f"VLUT{math.ceil(self.index_bits)}x{self.dim}[{self.name}]"

    @property
    def dim(self) -> int:
        """Elements of a vector, d."""
        return len(self.values[0])

    @property
    def index_bits(self) -> float:
        """Bits of the codes for each element: log2(K) / d."""
        return math.log2(len(self.values)) / self.dim

    @property
    def bits(self) -> float:
        raise NotImplementedError(
            f"{self}: bits depend on the shape (the table counts); use count_bits(shape)"
        )

    @property
    def range(self) -> tuple[float, float]:
        return self._range

    @property
    def centroids(self) -> tuple[tuple[float, ...], ...]:
        """The vectors."""
        return self.values

    def count_bits(self, shape: Shape) -> int:
        table = self.element_type.count_bits((len(self.values), self.dim))
        return math.ceil(math.prod(shape) / self.dim * math.log2(len(self.values))) + table

    def _table(self, device: torch.device) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def to_idx(self, tensor: Tensor) -> Tensor:
        """The place of the nearest vector for each d elements: int64 [numel / d]."""
        if tensor.numel() % self.dim:
            raise ValueError(f"tensor: got {tensor.numel()} elements, expected a multiple of {self.dim}")
        vectors = tensor.detach().float().reshape(-1, self.dim)
        return nearest_neighbour(vectors, self._table(vectors.device))

    def quantise(self, tensor: Tensor) -> Tensor:
        values = self._table(tensor.device)[self.to_idx(tensor)]
        return values.reshape(tensor.shape).to(tensor.dtype)

    def _codes_of(self) -> None:
        return None

    def _put_table(self, planes: Planes) -> None:
        self.element_type._encode(self._table(torch.device("cpu")), planes.child("codebook"))

    def _check_table(self, planes: Planes) -> None:
        table, cpu = self._table(torch.device("cpu")), torch.device("cpu")
        stored = self.element_type._decode(planes.child("codebook"), tuple(table.shape), table.dtype, cpu)
        if not stored.equal(table):
            raise ValueError(f"codebook: got another table than that of {self}")

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        self._put_table(planes)
        planes.put_codes("codes", self.to_idx(tensor), len(self.values))

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        count, rest = divmod(math.prod(shape), self.dim)
        if rest:
            raise ValueError(f"shape: got {list(shape)}, expected a multiple of {self.dim} elements")
        self._check_table(planes)
        codes = planes.get_codes("codes", count, len(self.values)).long().to(device)
        return self._table(device)[codes].reshape(shape).to(dtype)


@dataclass
class Sign3D8Format(TensorFormat):
    """3 values in 8 bits: 3 signs and a 5-bit code of a table of 32 vectors of magnitudes.

    For matrices. The 3 values stand below each other in a column; rows are padded with zeros to a multiple
    of 3, and the padding counts: count_bits = the bits of `lut` for the padded shape, and a sign for each
    element of it. 0 is positive.
    """

    lut: VectorLUTFormat
    _type: str = "s3d8"

    def __post_init__(self) -> None:
        if not isinstance(self.lut, VectorLUTFormat) or (len(self.lut.values), self.lut.dim) != (32, 3):
            raise ValueError(f"lut: got {self.lut}, expected a VectorLUTFormat of 32 vectors of 3 numbers")

    def __str__(self) -> str:
        return f"Sign3D8{{{self.lut}}}"

    @property
    def range(self) -> tuple[float, float]:
        """With the signs: plus and minus the largest magnitude of the table's range."""
        high = max(abs(end) for end in self.lut.range)
        return (-high, high)

    @staticmethod
    def _padded(shape: Shape) -> tuple[int, int]:
        if len(shape) != 2:
            raise ValueError(f"shape: got {list(shape)}, expected 2 dimensions")
        return (math.ceil(shape[0] / 3) * 3, shape[1])

    @staticmethod
    def vectorise(tensor: Tensor) -> Tensor:
        """[vectors, 3]: the values of a matrix [rows, cols], 3 rows at a time, down its columns."""
        rows, cols = Sign3D8Format._padded(tuple(tensor.shape))
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
        return padded.T.reshape(cols * (rows // 3), 3)

    @staticmethod
    def unvectorise(vectors: Tensor, shape: Shape) -> Tensor:
        """The matrix of `shape` that ``vectorise`` made these vectors of."""
        rows, cols = Sign3D8Format._padded(tuple(shape))
        return vectors.reshape(cols, rows).T[: shape[0]].contiguous()

    def count_bits(self, shape: Shape) -> int:
        padded = self._padded(shape)
        return self.lut.count_bits(padded) + math.prod(padded)

    def quantise(self, tensor: Tensor) -> Tensor:
        vectors = self.vectorise(tensor.detach().float())
        sizes = self.lut.quantise(vectors.abs())
        values = torch.where(vectors < 0, 0.0 - sizes, sizes)
        return self.unvectorise(values, tuple(tensor.shape)).to(tensor.dtype)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        vectors = self.vectorise(tensor.detach().float())
        self.lut._put_table(planes.child("lut"))
        signs = ((vectors < 0).long() * _sign_weights(vectors.device)).sum(1)
        planes.put_codes("codes", self.lut.to_idx(vectors.abs()) * 8 + signs, 256)

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.lut._check_table(planes.child("lut"))
        codes = planes.get_codes("codes", math.prod(self._padded(shape)) // 3, 256).long().to(device)
        sizes = self.lut._table(device)[codes >> 3]
        negative = (codes[:, None] & _sign_weights(device)) != 0
        return self.unvectorise(torch.where(negative, 0.0 - sizes, sizes), shape).to(dtype)


def _sign_weights(device: Any) -> Tensor:
    return torch.tensor([1, 2, 4], device=device)
