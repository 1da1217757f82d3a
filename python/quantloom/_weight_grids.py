"""The grid that a packed matrix lies on: its weights rounded again, to the scales that are stored.

Training that goes straight through the rounding moves weights and rounds them in every step. Scales, zero
points, shifts and outliers stay as the rounding before left them, so that only codes change, and weights that
have not moved keep theirs.
"""

from __future__ import annotations

import numpy as np
import torch

from quantloom import _checks
from quantloom._bit_rows import pack_rows, unpack_rows
from quantloom.formats import SDR, Codebook, Format, Outliers, Uniform
from quantloom.tensors import PackedTensor

__all__ = ["WeightGrid", "grid_refusal"]


def grid_refusal(format: Format) -> str | None:
    """Why weights of a format cannot be rounded again to stored scales; None if they can."""
    dense = format.dense if isinstance(format, Outliers) else format
    if isinstance(dense, (Uniform, Codebook, SDR)):
        return None
    return f"got {format.spec}, expected uniform, codebook or sdr, perhaps with outliers"


class WeightGrid:
    """All that is stored of a matrix but its codes.

    Args:
        packed: of a format that ``grid_refusal`` has nothing against, on any device, with a transform or
            none.

    Raises ValueError for other formats.
    """

    def __init__(self, packed: PackedTensor) -> None:
        if not isinstance(packed, PackedTensor):
            raise TypeError(f"packed: got {_checks.type_name(packed)}, expected a PackedTensor")
        reason = grid_refusal(packed.format)
        if reason is not None:
            raise ValueError(f"packed: {reason}")
        self._stored = packed
        self.device = torch.device(packed.device)
        dense = packed.format.dense if isinstance(packed.format, Outliers) else packed.format
        self._dense, self.shape = dense, packed.shape
        n, k = packed.shape
        planes = {name: np.asarray(plane) for name, plane in packed.to("cpu").to("numpy").planes.items()}
        self._group_of = torch.from_numpy(_group_of_column(planes, dense, k)).to(self.device)
        # NumPy has no bfloat16 of its own: torch reads the scales.
        scales = packed.to("torch").planes["scales"].to(self.device).float()
        self._scales = scales.expand(n, -1) if scales.shape[0] != n else scales
        if isinstance(dense, SDR):
            groups = int(self._group_of.max()) + 1 if k else 0
            shifts = unpack_rows(planes["shifts"], _shift_bits(dense), groups)
            self._steps = torch.from_numpy(np.left_shift(1, shifts.astype(np.int32))).float().to(self.device)
            self._lowest, self._highest = -(2 ** (dense.bits - 1)), 2 ** (dense.bits - 1) - 1
        elif isinstance(dense, Codebook):
            self._table = torch.from_numpy(planes["codebook"].astype(np.float32)).to(self.device)
            self._midpoints = (self._table[:-1] + self._table[1:]) / 2
        else:
            self._zeros = _zero_points(planes, dense, n, scales.shape[1]).to(self.device)
            self._lowest, self._highest = 0, 2**dense.bits - 1
        self._fixed, self._codes = None, None
        if "outlier_offsets" in planes:
            fixed = np.zeros((n, k), bool)
            rows = np.repeat(np.arange(n), np.diff(planes["outlier_offsets"]))
            fixed[rows, planes["outlier_columns"].astype(np.int64)] = True
            self._fixed = torch.from_numpy(fixed).to(self.device)
            codes = unpack_rows(planes["codes"], dense.bits, k)
            self._codes = torch.from_numpy(codes.astype(np.int16)).to(self.device)
        self.values = packed.to("torch").to("cpu").dequantize().to(self.device)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The values ``[n, k]`` that the stored grid has for a float32 matrix on the device of the planes.
        Outliers keep their values."""
        transform = self._stored.transform
        value = self._decoded(self._chosen(self._in_basis(weight)))
        if transform is not None:
            value = transform.rotate_weight(value, inverse=True)
        return value if self._fixed is None else torch.where(self._fixed, self.values, value)

    def packed(self, weight: torch.Tensor) -> PackedTensor:
        """The matrix with the codes that the weights get, all else as it is stored; on the CPU."""
        codes = self._chosen(self._in_basis(weight)).to(torch.int16)
        if self._fixed is not None:
            codes = torch.where(self._fixed, self._codes, codes)
        stored = self._stored.to("torch").to("cpu")
        planes = dict(stored.planes)
        planes["codes"] = torch.from_numpy(pack_rows(codes.cpu().numpy(), self._dense.bits))
        return PackedTensor(stored.format, stored.shape, planes, stored.report, stored.transform)

    def _in_basis(self, weight: torch.Tensor) -> torch.Tensor:
        transform = self._stored.transform
        return weight if transform is None else transform.rotate_weight(weight.contiguous())

    def _chosen(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes as float32, chosen as the formats choose them."""
        if isinstance(self._dense, SDR):
            integers = (weight / self._scales).round_().clamp_(-127, 127)
            return integers.div_(self._steps[:, self._group_of]).round_().clamp_(self._lowest, self._highest)
        if isinstance(self._dense, Codebook):
            return torch.bucketize(weight / self._scales[:, self._group_of], self._midpoints).float()
        if self._dense.bits == 1 and self._dense.symmetric:
            return (weight >= 0).float()
        codes = (weight / self._scales[:, self._group_of]).round_().add_(self._zeros[:, self._group_of])
        return codes.clamp_(self._lowest, self._highest)

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        if isinstance(self._dense, SDR):
            return codes.mul_(self._steps[:, self._group_of]).mul_(self._scales)
        if isinstance(self._dense, Codebook):
            return self._table[codes.int()].mul_(self._scales[:, self._group_of])
        return codes.sub_(self._zeros[:, self._group_of]).mul_(self._scales[:, self._group_of])


def _group_of_column(planes: dict[str, np.ndarray], dense: Format, k: int) -> np.ndarray:
    if "group_index" in planes:
        return planes["group_index"].astype(np.int64)
    size = dense.group_size if isinstance(dense.group_size, int) else max(1, k)
    return np.arange(k) // size


def _shift_bits(dense: SDR) -> int:
    return (8 - dense.bits).bit_length()


def _zero_points(planes: dict[str, np.ndarray], dense: Uniform, n: int, groups: int) -> torch.Tensor:
    """Float32 [n, groups]."""
    if dense.symmetric:
        return torch.full((1, 1), 0.5 if dense.bits == 1 else 2.0 ** (dense.bits - 1)).expand(n, groups)
    stored = planes["zeros"]
    if dense.group_size == "tensor":
        return torch.from_numpy(unpack_rows(stored, dense.bits, 1)).float().expand(n, groups)
    return torch.from_numpy(unpack_rows(stored, dense.bits, n).T.copy()).float()
