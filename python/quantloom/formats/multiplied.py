"""From encoded tensors to the packed ones that kernels multiply with: ``Encoded.to_packed``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantloom import _checks
from quantloom.formats.base import TensorFormat
from quantloom.formats.encoded import Encoded, Planes
from quantloom.formats.packed import Codebook, Format, Outliers, Uniform, VectorCodebook
from quantloom.formats.vectors import VectorLUTFormat
from quantloom.formats.wrappers import LinearScalingFormat, SparseFormat

if TYPE_CHECKING:
    from quantloom.tensors import PackedTensor

__all__ = ["to_packed"]

_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def to_packed(encoded: Encoded, scale_dtype: str | None = None) -> PackedTensor:
    """See ``Encoded.to_packed``."""
    from quantloom.tensors import PackedTensor

    if len(encoded.shape) != 2:
        raise ValueError(f"shape: got {list(encoded.shape)}, expected a matrix")
    if scale_dtype is not None:
        _checks.choice("scale_dtype", scale_dtype, tuple(_SCALE_DTYPES))
    shape = (encoded.shape[0], encoded.shape[1])
    if isinstance(encoded.format, SparseFormat):
        return _with_outliers(encoded, encoded.format, scale_dtype)
    if isinstance(_element_format(encoded.format), VectorLUTFormat):
        form, planes = _vectors(encoded, scale_dtype)
    else:
        form, planes = _scalars(encoded, scale_dtype)
    return PackedTensor(form, shape, planes)


def _element_format(fmt: TensorFormat) -> TensorFormat:
    return fmt.element_format if isinstance(fmt, LinearScalingFormat) else fmt


def _groups(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> tuple[np.ndarray, Any]:
    """Scales ``[n, groups]`` (``[1, 1]`` for the whole) of blocks of rows and columns, and the group size."""
    (n, k), (rows, columns) = shape, block
    if rows >= n and columns >= k and n > 1:
        return scales.reshape(1, 1), "tensor"
    if rows > 1:
        raise RuntimeError(
            f"block_shape: got blocks of {rows} rows and {columns} columns, expected blocks along in_features"
            " ((1, size)), one for each row ((1, None)) or one for the matrix ((None, None))"
        )
    return scales.reshape(n, -1), "channel" if columns >= k else columns


def _scale_plane(scales: np.ndarray, wanted: str | None) -> tuple[np.ndarray | torch.Tensor, str]:
    """In `wanted`, or the narrowest dtype that holds them exactly."""
    values = torch.from_numpy(np.ascontiguousarray(scales, dtype=np.float32))
    if not values.isfinite().all():
        raise ValueError("scales: got values that are not finite")
    exact = (name for name, dtype in _SCALE_DTYPES.items() if torch.equal(values.to(dtype).float(), values))
    name = wanted or next(exact)
    stored = values.to(_SCALE_DTYPES[name])
    if not stored.isfinite().all():
        raise ValueError(f"scale_dtype: got {name}, expected a dtype that holds {float(values.abs().max())}")
    return stored, name


def _packed_rows(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes ``[n, count]`` as dense streams of `bits` bits for each row, int32 ``[n, words]``."""
    n, count = codes.shape
    words = -(-count * bits // 32)
    out = np.zeros((n, 4 * words), np.uint8)
    at_once = max(1, (1 << 24) // max(1, count * bits))
    for first in range(0, n if words else 0, at_once):
        part = codes[first : first + at_once].astype(np.uint16)
        flags = (part[:, :, None] >> np.arange(bits, dtype=np.uint16) & 1).astype(np.uint8)
        stream = np.packbits(flags.reshape(len(part), -1), axis=1, bitorder="little")
        out[first : first + at_once, : stream.shape[1]] = stream
    return torch.from_numpy(out.view(np.int32))


def _scalars(encoded: Encoded, scale_dtype: str | None) -> tuple[Format, dict[str, Any]]:
    codes, table, scales, block = encoded.scaled_codes()
    grouped, group_size = _groups(scales, block, codes.shape)
    stored, name = _scale_plane(grouped, scale_dtype)
    bits = max(1, (len(table) - 1).bit_length())
    if len(table) > 256:
        raise RuntimeError(f"format: got {encoded.format} with {len(table)} values, expected at most 256")
    planes: dict[str, Any] = {"scales": stored}
    form: Format
    # One of 2**bits whole steps, with 0 where symmetric grids have it; 1 bit has halves.
    if bits > 1 and table == tuple(float(code - 2 ** (bits - 1)) for code in range(2**bits)):
        form = Uniform(bits, group_size, True, name)
    else:
        order = np.argsort(table, kind="stable")
        if len(table) < 2:
            raise RuntimeError(f"format: got {encoded.format} with one value, expected at least two")
        if (order != np.arange(len(table))).any():
            codes = np.argsort(order, kind="stable").astype(codes.dtype)[codes]
        form = Codebook(tuple(table[i] for i in order), bits, group_size, name)
        planes["codebook"] = torch.tensor(form.values, dtype=torch.float32, device="cpu").half()
    return form, {"codes": _packed_rows(codes, bits), **planes}


def _vectors(encoded: Encoded, scale_dtype: str | None) -> tuple[Format, dict[str, Any]]:
    fmt, planes, shape = encoded.format, Planes(encoded.planes), encoded.shape
    scales, block = np.ones((1, 1), np.float32), (max(1, shape[0]), max(1, shape[1]))
    if isinstance(fmt, LinearScalingFormat):
        blocks = fmt._blocked(shape)
        cpu = torch.device("cpu")
        stored = fmt.scale_format._decode(planes.child("scale_format"), blocks[::2], torch.float32, cpu)
        scales, block = stored.reshape(blocks[0], blocks[2]).numpy(), (max(1, blocks[1]), max(1, blocks[3]))
        fmt, planes = fmt.element_format, planes.child("element_format")
    assert isinstance(fmt, VectorLUTFormat)
    n, k = shape
    entries = len(fmt.values)
    if k % fmt.dim or entries < 2 or entries > 65536:
        raise RuntimeError(
            f"format: got {entries} vectors of {fmt.dim} for rows of {k}, expected 2 to 65536 of a length"
            " that divides rows"
        )
    grouped, group_size = _groups(scales, block, (n, k))
    plane, name = _scale_plane(grouped, scale_dtype)
    form = VectorCodebook(entries, fmt.dim, group_size, 1, name)
    fmt._check_table(planes)
    codes = planes.get_codes("codes", math.prod(shape) // fmt.dim, entries).numpy().reshape(n, -1)
    table = torch.tensor(fmt.values, dtype=torch.float32, device="cpu").half()
    if not table.isfinite().all():
        raise ValueError("values: got numbers that float16 cannot hold, expected at most 65504")
    return form, {
        "codes": _packed_rows(codes, form.bits),
        "codebook": table.reshape(1, entries, fmt.dim),
        "scales": plane,
    }


def _with_outliers(encoded: Encoded, fmt: SparseFormat, scale_dtype: str | None) -> PackedTensor:
    from quantloom.tensors import PackedTensor

    inner = {name[7:]: plane for name, plane in encoded.planes.items() if name.startswith("format.")}
    dense = to_packed(Encoded(fmt.format, encoded.shape, encoded.dtype, inner), scale_dtype)
    if isinstance(dense.format, Outliers):
        raise RuntimeError(f"format: got {fmt}, expected outliers once")
    n, k = encoded.shape
    count = fmt.n_sparse(encoded.shape, fmt.sparse_ratio)
    planes, cpu = Planes(encoded.planes), torch.device("cpu")
    places = planes.get_places("outlier_indices", count, n * k)
    values = fmt.sparse_format._decode(planes.child("sparse_format"), (count,), torch.float32, cpu)
    missing = (values - dense.dequantize("float32").reshape(-1)[places]).half()
    if not missing.isfinite().all():
        raise ValueError("outliers: got values beyond 65504, which float16 cannot hold")
    offsets = torch.searchsorted(places, torch.arange(n + 1 if k else 1, device="cpu") * k).to(torch.int32)
    columns = places % max(1, k)
    return PackedTensor(
        Outliers(dense.format, count=count),
        (n, k),
        {
            **dense.planes,
            "outlier_offsets": offsets,
            "outlier_columns": columns.to(torch.uint16 if k <= 65536 else torch.int32),
            "outlier_values": missing,
        },
    )
