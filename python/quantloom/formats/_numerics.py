"""Element-wise rounding: CPU tensors in C++, others by the formulas of each format in torch operations.

Both compute in float32 and round once to the dtype of the tensor, so that block scales, codes and values do
not depend on how a tensor is stored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantloom import _arrays, _core

NATIVE = (torch.float32, torch.float16, torch.bfloat16)


class Grid(NamedTuple):
    """Scales of blocks of a matrix: float32 [blocks of rows, blocks of columns], and the size of a block."""

    scales: Tensor
    rows: int
    cols: int


def array(name: str, tensor: Tensor) -> Any:
    return _arrays.describe(name, tensor).core


def native(tensor: Tensor) -> Tensor:
    """Contiguous memory of a dtype that C++ reads; float32 stands for all others."""
    tensor = tensor.detach()
    if not tensor.dtype.is_floating_point and tensor.dtype.is_complex:
        raise TypeError(f"tensor: got {tensor.dtype}, expected real numbers")
    if tensor.dtype not in NATIVE:
        tensor = tensor.float()
    return tensor.contiguous()


def matrix(tensor: Tensor) -> Tensor:
    """A contiguous tensor as a matrix: the last dimension is along the rows."""
    if tensor.ndim == 2:
        return tensor
    return (
        tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 and tensor.numel() else tensor.reshape(1, -1)
    )


def _round(elements: Any, fmt: Any, tensor: Tensor, grid: Grid | None, values: bool, codes: bool) -> Any:
    x = matrix(native(tensor))
    if x.device.type != "cpu":
        return _round_reference(fmt, x, grid, values, codes)
    out_values = torch.empty_like(x) if values else None
    out_codes = torch.empty(x.shape, dtype=torch.int32, device="cpu") if codes else None
    if not x.numel():
        return out_values, out_codes
    _core.round_elements(
        elements,
        array("tensor", x),
        *_scaling(grid, fmt._factor),
        None if out_values is None else array("values", out_values),
        None if out_codes is None else array("codes", out_codes),
        0,
    )
    return out_values, out_codes


class Rounded:
    """The codes of a tensor, chosen when they are needed: as int32, or at once as bytes."""

    def __init__(self, elements: Any, fmt: Any, tensor: Tensor, grid: Grid | None = None) -> None:
        self._elements, self._fmt, self._tensor, self._grid = elements, fmt, tensor, grid

    def codes(self) -> Tensor:
        """As ``round_codes``."""
        return round_codes(self._elements, self._fmt, self._tensor, self._grid)

    def pack(self, count: int) -> Tensor:
        """As ``pack_codes`` of the codes."""
        x = matrix(native(self._tensor))
        if x.device.type != "cpu" or count != self._elements.count or not x.numel():
            return pack_codes(self.codes(), count)
        out = torch.empty(_core.packed_code_bytes(x.numel(), count), dtype=torch.uint8, device="cpu")
        _core.encode_elements(
            self._elements,
            array("tensor", x),
            *_scaling(self._grid, self._fmt._factor),
            array("bytes", out),
            0,
        )
        return out


class Packed:
    """Bytes of ``pack_codes``: unpacked when they are needed, or decoded at once.

    Args:
        error: what names the plane in an error, before its text.

    Raises ValueError unless there are as many bytes as such codes take.
    """

    def __init__(self, data: Tensor, codes: int, count: int, error: str) -> None:
        expected = _core.packed_code_bytes(codes, count)
        if data.numel() != expected:
            raise ValueError(f"{error}: got {data.numel()} bytes, expected {expected}")
        self._data, self._codes, self._count, self._error = data, codes, count, error

    def unpack(self) -> Tensor:
        try:
            return unpack_codes(self._data, self._codes, self._count)
        except ValueError as error:
            raise ValueError(f"{self._error}: {error}") from None

    def decode_into(self, elements: Any, out: Tensor, grid: Grid | None, factor: float) -> None:
        """Values of a matrix."""
        if not out.numel():
            return
        try:
            _core.decode_packed_elements(
                elements,
                array("codes", self._data.contiguous()),
                *_scaling(grid, factor),
                array("out", out),
                0,
            )
        except ValueError as error:
            raise ValueError(f"{self._error}: {error}") from None


def as_codes(codes: Tensor | Rounded | Packed) -> Tensor:
    """int32 codes."""
    if isinstance(codes, Rounded):
        return codes.codes()
    return codes.unpack() if isinstance(codes, Packed) else codes


def _scaling(grid: Grid | None, factor: float) -> tuple[Any, int, int, float]:
    if grid is None:
        return None, 1, 1, factor
    return array("scales", grid.scales), grid.rows, grid.cols, factor


def has_nan(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.dtype not in NATIVE or not tensor.numel():
        return bool(tensor.isnan().any())
    return _core.has_nan(array("tensor", matrix(native(tensor))), 0)


def divided(values: Tensor, divisor: float) -> Tensor:
    """values / divisor, rounded once: on CUDA devices torch multiplies by the inverse of a plain number. A
    divisor past the largest of the values' type is infinite."""
    return values / torch.full((), divisor, dtype=torch.float64, device=values.device).to(values.dtype)


def power_of_two(exponents: Tensor) -> Tensor:
    """2**exponents, exactly, as float64; for exponents of normal numbers."""
    return ((exponents.long() + 1023) << 52).view(torch.float64)


def element_scales(grid: Grid, shape: tuple[int, ...]) -> Tensor:
    """One scale for each element of a matrix."""
    scales = grid.scales.repeat_interleave(grid.rows, 0) if grid.rows > 1 else grid.scales
    scales = scales.repeat_interleave(grid.cols, 1) if grid.cols > 1 else scales
    return scales[: shape[0], : shape[1]]


def _round_reference(fmt: Any, x: Tensor, grid: Grid | None, values: bool, codes: bool) -> Any:
    x32 = x.float()
    scales = None
    if grid is not None:
        scales = element_scales(grid, tuple(x.shape))
        x32 = torch.where(scales == 0, x32, x32 / scales)
    if fmt._factor != 1:
        x32 = divided(x32, fmt._factor)
    places = torch.where(x32.isnan(), 0, fmt._reference_codes(x32))
    rounded = None
    if values:
        rounded = torch.where(x32.isnan(), x32, fmt._reference_values(places)) * fmt._factor
        if scales is not None:
            rounded = rounded * scales
        rounded = rounded.to(x.dtype)
    return rounded, (places.to(torch.int32) if codes else None)


def round_values(elements: Any, fmt: Any, tensor: Tensor, grid: Grid | None = None) -> Tensor:
    """The rounded values in the shape and dtype of the tensor."""
    values, _ = _round(elements, fmt, tensor, grid, True, False)
    return values.reshape(tensor.shape).to(tensor.dtype)


def round_codes(elements: Any, fmt: Any, tensor: Tensor, grid: Grid | None = None) -> Tensor:
    """The codes in the shape of the tensor: 32 bits without a sign, as int32."""
    _, codes = _round(elements, fmt, tensor, grid, False, True)
    return codes.reshape(tensor.shape)


def decode(
    elements: Any,
    codes: Tensor | Packed,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    grid: Grid | None = None,
    factor: float = 1.0,
) -> Tensor:
    """The values of codes: on the CPU int32 or packed, on other devices any integers."""
    if isinstance(codes, Tensor) and codes.device.type != "cpu":
        return _decode_reference(elements, codes.reshape(shape), dtype, grid, factor)
    kept = dtype if dtype in NATIVE else torch.float32
    out = torch.empty(shape, dtype=kept, device="cpu")
    flat = matrix(out)
    if isinstance(codes, Packed):
        codes.decode_into(elements, flat, grid, factor)
    elif out.numel():
        codes = codes.contiguous().reshape(flat.shape)
        _core.decode_elements(elements, array("codes", codes), *_scaling(grid, factor), array("out", flat), 0)
    return out.to(dtype)


_LONGEST_TABLE = 2**16


def _decode_reference(
    elements: Any, codes: Tensor, dtype: torch.dtype, grid: Grid | None, factor: float
) -> Tensor:
    """The same in torch operations, each of them rounding as C++ does."""
    if elements.count > _LONGEST_TABLE:
        scales = None if grid is None else grid._replace(scales=grid.scales.cpu())
        on_cpu = codes.to("cpu", torch.int32)
        return decode(elements, on_cpu, tuple(codes.shape), dtype, scales, factor).to(codes.device)
    every = torch.arange(elements.count, dtype=torch.int32, device="cpu")
    table = decode(elements, every, tuple(every.shape), torch.float32, factor=factor)
    flat = matrix(codes)
    values = table.to(codes.device)[flat.to(torch.int32)]
    if grid is not None:
        values = values * element_scales(grid, tuple(flat.shape)).to(codes.device)
    return values.reshape(codes.shape).to(dtype)


def block_statistics(tensor: Tensor, rows: int, cols: int, statistic: str) -> Tensor:
    """float32 [blocks of rows, blocks of columns] of a CPU matrix; the order of sums is fixed."""
    x = native(tensor)
    shape = (math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / cols))
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    _core.block_statistics(array("tensor", x), rows, cols, statistic, array("out", out), 0)
    return out


def pack_codes(codes: Tensor, count: int) -> Tensor:
    """Codes below `count` (int64 or int32) as bytes."""
    codes = codes.to(device="cpu", dtype=torch.int32).contiguous().reshape(-1)
    out = torch.empty(_core.packed_code_bytes(codes.numel(), count), dtype=torch.uint8, device="cpu")
    _core.pack_codes(array("codes", codes), count, array("out", out), 0)
    return out


def unpack_codes(data: Tensor, codes: int, count: int) -> Tensor:
    """int32 codes; raises ValueError unless the bytes hold just that many codes below `count`."""
    expected = _core.packed_code_bytes(codes, count)
    if data.numel() != expected:
        raise ValueError(f"codes: got {data.numel()} bytes, expected {expected}")
    out = torch.empty(codes, dtype=torch.int32, device="cpu")
    _core.unpack_codes(array("codes", data.contiguous()), count, array("out", out), 0)
    return out
