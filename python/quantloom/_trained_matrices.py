"""What training changes of a packed matrix, and how it is stored again.

Either weights, which are rounded to the scales that are stored, or, where codes stand for entries of tables
that add up, tables and scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from quantloom import _core
from quantloom._bit_rows import unpack_rows
from quantloom._weight_grids import WeightGrid, grid_refusal
from quantloom.formats import Additive, Format
from quantloom.tensors import PackedTensor

__all__ = ["TrainedMatrix", "TrainedTables", "TrainedWeights", "trained_matrix", "training_refusal"]

Values = dict[str, torch.Tensor]


class TrainedMatrix(Protocol):
    """A matrix whose parameters, float32 tensors by name, training moves freely."""

    values: torch.Tensor  # float32 [n, k], as stored
    decayed: bool  # whether weight decay is meant for the parameters

    def stored(self) -> Values:
        """Parameters of what is stored."""

    def start(self, original: torch.Tensor) -> Values:
        """The same, or parameters that are stored alike and nearer to the matrix before it was rounded."""

    def round(self, parameters: Values) -> torch.Tensor:
        """The matrix ``[n, k]`` of parameters as they would be stored."""

    def gradients(self, parameters: Values, gradient: torch.Tensor) -> Values:
        """Of the parameters, from that of ``round(parameters)``; rounding counts as none."""

    def packed(self, parameters: Values) -> PackedTensor:
        """On the CPU."""


def training_refusal(format: Format) -> str | None:
    """Why nothing of a matrix of the format can be trained; None if something can."""
    if isinstance(format, Additive) or grid_refusal(format) is None:
        return None
    return f"got {format.spec}, expected uniform, codebook or sdr, perhaps with outliers, or additive"


def trained_matrix(packed: PackedTensor) -> TrainedMatrix:
    """Raises ValueError for formats that ``training_refusal`` refuses."""
    return TrainedTables(packed) if isinstance(packed.format, Additive) else TrainedWeights(packed)


class TrainedWeights:
    """Weights, rounded to their grid: codes change, scales stay."""

    decayed = True

    def __init__(self, packed: PackedTensor) -> None:
        self._grid = WeightGrid(packed)
        self.values = self._grid.values

    def stored(self) -> Values:
        return {"": self.values}

    def start(self, original: torch.Tensor) -> Values:
        return {"": torch.where(self._grid.round(original) == self.values, original, self.values)}

    def round(self, parameters: Values) -> torch.Tensor:
        return self._grid.round(parameters[""])

    def gradients(self, parameters: Values, gradient: torch.Tensor) -> Values:
        return {"": gradient}

    def packed(self, parameters: Values) -> PackedTensor:
        return self._grid.packed(parameters[""])


class TrainedTables:
    """Tables and scales of an ``Additive`` format: codes stay. Where those are codes into levels, free
    numbers are trained: rounded to levels, by k-means anew each time, with gradients straight through."""

    decayed = False

    def __init__(self, packed: PackedTensor) -> None:
        self._format, (self._n, self._k) = packed.format, packed.shape
        self._plain = replace(packed.format, scale_bits=0, table_bits=0, table_groups=1)
        self._leveled = packed.format != self._plain
        self._stored = stored = self._with_levels(packed.to("torch"), self._plain)
        planes = stored.planes
        self.device = planes["codebook"].device
        form = self._format
        self._tables, self._blocks = form.codebooks, -(-self._k // form.in_group)
        words = np.asarray(planes["codes"].cpu())
        codes = unpack_rows(words, form.bits, self._blocks * self._tables).astype(np.int64)
        codes = codes.reshape(-1, self._tables).T
        self._codes = torch.from_numpy(np.ascontiguousarray(codes)).to(self.device)  # [tables, blocks of all]
        # Which blocks use an entry, so that their gradients are added in the same order in every run.
        self._users = [torch.argsort(of_table, stable=True) for of_table in self._codes]
        self._counts = [torch.bincount(of_table, minlength=2**form.bits) for of_table in self._codes]
        width = self._k if form.scale_group == "channel" else form.scale_group
        block = torch.arange(self._blocks, device=self.device)
        self._scale_of_block = block * form.in_group // max(1, width)
        self.values = self.round(self.stored())

    def stored(self) -> Values:
        return {name: self._stored.planes[name].float() for name in ("codebook", "scales")}

    def start(self, original: torch.Tensor) -> Values:
        return {name: value.clone() for name, value in self.stored().items()}

    def round(self, parameters: Values) -> torch.Tensor:
        planes = self._planes(parameters)
        value = self._sums(planes["codebook"].float()) * self._of_blocks(planes["scales"].float())
        weight = self._matrix(value)
        transform = self._stored.transform
        return weight if transform is None else transform.rotate_weight(weight, inverse=True)

    def gradients(self, parameters: Values, gradient: torch.Tensor) -> Values:
        transform = self._stored.transform
        if transform is not None:  # the inverse of a rotation is its transpose
            gradient = transform.rotate_weight(gradient.contiguous())
        of_blocks = self._split(gradient)
        planes = {name: plane.float() for name, plane in self._planes(parameters).items()}
        scaled = (of_blocks * self._of_blocks(planes["scales"])).flatten(0, 1).flatten(1)
        tables = [
            torch.segment_reduce(scaled[users], "sum", lengths=counts, axis=0, unsafe=True)
            for users, counts in zip(self._users, self._counts, strict=True)
        ]
        shape = planes["codebook"].shape
        products = (of_blocks * self._sums(planes["codebook"])).sum((2, 3))
        scales = products.new_zeros(planes["scales"].shape)
        for group in range(scales.shape[1]):
            scales[:, group] = products[:, self._scale_of_block == group].sum(1)
        return {"codebook": torch.stack(tables).view(shape), "scales": scales}

    def packed(self, parameters: Values) -> PackedTensor:
        return self._with_levels(self._packed_plainly(self._cast(parameters)), self._format)

    def _packed_plainly(self, planes: Values) -> PackedTensor:
        stored = self._stored.to("cpu")
        planes = dict(stored.planes) | {name: plane.cpu() for name, plane in planes.items()}
        return PackedTensor(stored.format, stored.shape, planes, stored.report, stored.transform)

    def _with_levels(self, packed: PackedTensor, format: Additive) -> PackedTensor:
        """The matrix as it is stored in a format with other levels, on its device."""
        if not self._leveled:
            return packed
        core = _core.additive_with_levels(packed.to("cpu")._core(), format.to_json())
        planes = PackedTensor._from_core(core, "torch").planes
        stored = PackedTensor(format, packed.shape, planes, packed.report, packed.transform)
        return stored.to(packed.device)

    def _planes(self, parameters: Values) -> Values:
        """Parameters as they are stored: in their dtypes, and as levels."""
        planes = self._cast(parameters)
        if not self._leveled:
            return planes
        leveled = self._with_levels(self._packed_plainly(planes), self._format)
        stored = self._with_levels(leveled, self._plain).planes
        return {name: stored[name].to(self.device) for name in planes}

    def _cast(self, parameters: Values) -> Values:
        planes = {}
        for name, value in parameters.items():
            dtype = self._stored.planes[name].dtype
            most = torch.finfo(dtype).max
            planes[name] = value.detach().clamp(-most, most).to(dtype)
        return planes

    def _sums(self, tables: torch.Tensor) -> torch.Tensor:
        """Entries of the tables, added in order: [row groups, blocks, out_group, in_group]."""
        total = tables[0][self._codes[0]]
        for table, codes in zip(tables[1:], self._codes[1:], strict=True):
            total += table[codes]
        return total.view(-1, self._blocks, self._format.out_group, self._format.in_group)

    def _of_blocks(self, scales: torch.Tensor) -> torch.Tensor:
        return scales[:, self._scale_of_block, None, None]

    def _matrix(self, blocks: torch.Tensor) -> torch.Tensor:
        """From [row groups, blocks, out_group, in_group], without what reaches beyond the matrix."""
        groups = blocks.shape[0]
        rows = blocks.permute(0, 2, 1, 3).reshape(groups * self._format.out_group, -1)
        return rows[: self._n, : self._k].contiguous()

    def _split(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse; zeros beyond the matrix."""
        form = self._format
        groups = -(-self._n // form.out_group)
        full = matrix.new_zeros((groups * form.out_group, self._blocks * form.in_group))
        full[: self._n, : self._k] = matrix
        return full.view(groups, form.out_group, self._blocks, form.in_group).permute(0, 2, 1, 3)
