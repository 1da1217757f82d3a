"""Products of integers on a CUDA device: planes in integer order, and calls on torch's current stream.

Imports torch; imported only where a tensor on a CUDA device is at hand. What integer order is, and what
products of integers take, says ``include/quantloom/kernels/integer_cuda.hpp``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantloom import _arrays, _core, _cuda, _cuda_activations
from quantloom.activations import ActivationFormat
from quantloom.formats import Format, Outliers, Uniform, format_from_json
from quantloom.tensors import PackedTensor

__all__ = [
    "cached_descriptor",
    "decode",
    "descriptor",
    "empty_planes",
    "multiply",
    "order",
    "prepare",
    "unprepare",
    "why_not",
    "why_not_tensor",
]

_ELSEWHERE = (
    "integer products take weights whose outliers lie in the columns of the activations' static outliers, in"
    " each row, not others"
)
_PERMUTED = "integer products take groups of consecutive columns, not those of a group_index"
_HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def columns_of(activations: str | ActivationFormat) -> tuple[int, ...]:
    """The inputs that stay as they are, whatever the batch."""
    return (activations.outlier_columns or ()) if isinstance(activations, ActivationFormat) else ()


@functools.lru_cache(maxsize=4096)
def _why_not(format: str, activations: str, k: int, dtype: str, device: int) -> str | None:
    with torch.cuda.device(device):
        description = _cuda_activations._description(activations)
        return _core.why_not_matmul_integers_cuda(format, description, k, dtype)


def why_not(
    format: str, activations: ActivationFormat, k: int, dtype: str, device: torch.device | str
) -> str | None:
    """None if integers of the two formats are multiplied on the device, else the reason why not. Where
    outliers of W lie is not looked at."""
    if not _core.built_with_cuda():
        return "this build of quantloom has no CUDA kernels"
    device = torch.device(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _why_not(format, activations.to_json(), k, dtype, index)


def _why_not_places(q: PackedTensor, columns: tuple[int, ...]) -> str | None:
    """Outliers of W must lie in these columns, all rows alike. Waits for the device."""
    if "outlier_offsets" not in q.planes or q.shape[0] == 0:
        return None
    n, count = q.shape[0], len(columns)
    offsets, places = q.planes["outlier_offsets"], q.planes["outlier_columns"]
    if places.dtype == torch.uint16:
        places = places.view(torch.int16).to(torch.int32) & 0xFFFF
    if places.numel() == n * count:
        wanted = torch.tensor(columns, dtype=torch.int32, device=places.device)
        rows = torch.arange(n + 1, dtype=torch.int32, device=places.device) * count
        if torch.equal(offsets, rows) and torch.equal(places.view(n, count), wanted.expand(n, count)):
            return None
    return _ELSEWHERE


def why_not_tensor(q: PackedTensor, activations: ActivationFormat, dtype: str) -> str | None:
    """None if the integers of `q`, on its CUDA device, are multiplied, else the reason why not. Waits for
    the device if `q` has outliers."""
    reason = why_not(q.format.to_json(), activations, q.shape[1], dtype, q.device)
    if reason is None and "group_index" in q.planes and isinstance(q.format, Uniform):
        return _PERMUTED
    return _why_not_places(q, columns_of(activations)) if reason is None else reason


@functools.lru_cache(maxsize=1024)
def has_fragments(format: str) -> bool:
    """Whether the kernels of exact products have an order for the format."""
    try:
        # Of a size for any number of outliers, and of whole blocks.
        _core.prepared_planes(format, 1 << 16, 1 << 15, False)
    except RuntimeError:
        return False
    return True


def order(q: PackedTensor, activations: str | ActivationFormat) -> tuple[int, ...] | None:
    """In which order W on a CUDA device is kept for products with `activations`: with outlier columns, if
    any, integer order; None: fragment order.

    Integer order where integers are multiplied, and for formats that have no other: those are decoded for
    other products. Waits for the device if `q` has outliers.
    """
    columns = columns_of(activations)
    if isinstance(activations, ActivationFormat) and why_not_tensor(q, activations, "float16") is None:
        return columns
    if has_fragments(q.format.to_json()) or _core.why_not_integers(q.format.to_json()) is not None:
        return None
    return columns if _why_not_places(q, columns) is None else None


def why_not_order(q: PackedTensor | Format, activations: str | ActivationFormat) -> str | None:
    """None if W of a format that has no other order can be kept in integer order. Of a format alone, outliers
    are taken to lie where they can be multiplied."""
    columns = columns_of(activations)
    if isinstance(q, PackedTensor):
        return _why_not_places(q, columns)
    return _ELSEWHERE if isinstance(q, Outliers) and not columns else None


def described_order(
    format: Format, n: int, k: int, activations: str | ActivationFormat, device: torch.device
) -> tuple[int, ...] | None:
    """The same for planes that are not there yet: outliers of W lie where they can be multiplied."""
    columns, text = columns_of(activations), format.to_json()
    specs = {plane["name"]: plane["shape"] for plane in format.planes(n, k)}
    entries = specs.get("outlier_values")
    if entries is not None and list(entries) != [n * len(columns)]:
        return None
    if isinstance(activations, ActivationFormat) and why_not(text, activations, k, "float16", device) is None:
        return columns
    if has_fragments(text) or _core.why_not_integers(text) is not None:
        return None
    return columns if entries is not None else ()


def empty_planes(
    format: str, n: int, k: int, outlier_columns: int, with_group_index: bool, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Uninitialized planes in integer order. Raises RuntimeError if the format has none."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for name, dtype, shape in _core.integer_planes(format, n, k, outlier_columns, with_group_index)
    }


def descriptor(
    planes: Mapping[str, torch.Tensor], format: str, n: int, k: int, columns: Sequence[int]
) -> _core.IntegerPlanes:
    """The C++ view of planes in integer order. It does not keep them alive: whoever uses it must.

    Raises TypeError or ValueError, naming the plane, unless the planes are those of the format.
    """
    return _core.IntegerPlanes(format, n, k, list(columns), _cuda.plane_refs(planes))


_descriptors: dict[tuple[Any, ...], _core.IntegerPlanes] = {}
_MOST_DESCRIPTORS = 1 << 16


def cached_descriptor(
    planes: Sequence[torch.Tensor], names: str, format: str, n: int, k: int, columns: tuple[int, ...]
) -> _core.IntegerPlanes:
    """The same for planes that come again and again, see ``_cuda.cached_descriptor``."""
    key = (names, format, n, k, columns, *[(plane.data_ptr(), plane.nbytes) for plane in planes])
    found = _descriptors.get(key)
    if found is None:
        found = descriptor(dict(zip(names.split(","), planes, strict=True)), format, n, k, columns)
        if len(_descriptors) >= _MOST_DESCRIPTORS:
            _descriptors.clear()
        _descriptors[key] = found
    return found


def prepare(q: PackedTensor, columns: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Planes in integer order of torch planes, on their device, for activations with these outliers.

    On a CUDA device they are filled on torch's current stream, which is waited for if there are columns. On
    the CPU the scalar reference makes them, to compare with. Raises RuntimeError if W cannot be kept so.
    """
    if q.device == "cpu":
        found = _core.prepare_integers(q._core(), list(columns)).planes()
        return {name: _arrays.to_kind(array, dtype, "torch") for name, (dtype, array) in found.items()}
    _cuda.require_kernels("prepare")
    format, (n, k), device = q.format.to_json(), q.shape, torch.device(q.device)
    with _cuda.on(device):
        planes = empty_planes(format, n, k, len(columns), "group_index" in q.planes, device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _core.prepare_integers_cuda(q._core(), descriptor(planes, format, n, k, columns), stream)
    return planes


def unprepare(
    planes: Mapping[str, torch.Tensor], core: _core.IntegerPlanes, format: Format, n: int, k: int
) -> PackedTensor:
    """The inverse of ``prepare``; `core` describes the planes."""
    device = planes["integers"].device
    if device.type == "cpu":
        return PackedTensor._from_core(_core.unprepare_integers(core), "torch")
    _cuda.require_kernels("unprepare")
    q = _cuda.empty_packed(planes, format, n, k, device)
    with _cuda.on(device):
        _core.unprepare_integers_cuda(core, q._core(), torch.cuda.current_stream(device).cuda_stream)
    return q


def _integers(planes: Mapping[str, torch.Tensor], n: int, k: int) -> torch.Tensor:
    """int8 ``[n, k]``. In row r of a block, piece p of 16 bytes lies at place p ^ (r % 8)."""
    stored = planes["integers"]
    slabs, blocks = stored.shape[:2]
    place = torch.arange(8, device=stored.device)
    row = place[:, None]
    rows = stored.view(slabs, blocks, 8, 8, 8, 16)[:, :, :, row, place[None, :] ^ row]
    return rows.permute(0, 2, 3, 1, 4, 5).reshape(64 * slabs, 128 * blocks)[:n, :k]


def _register_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[slabs, blocks, bytes]`` of a byte in register order, as ``[64 * slabs, 128 * blocks]``."""
    slabs, blocks = codes.shape[:2]
    # Steps of 32 columns, warps, rows g, columns 4 q; halves of 16 columns, rows g and g + 8, bytes.
    rows = codes.view(slabs, blocks, 4, 4, 8, 4, 2, 2, 4).permute(0, 3, 7, 4, 1, 2, 6, 5, 8)
    return rows.reshape(64 * slabs, 128 * blocks)


def _register_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The same of 4 bits, as int32 from 0 to 15."""
    slabs, blocks = codes.shape[:2]
    # Pairs of steps, warps, rows g, columns 4 q; steps, halves, bytes, whose halves have rows g and g + 8.
    pairs = codes.view(torch.uint8).view(slabs, blocks, 2, 4, 8, 4, 2, 2, 4).to(torch.int32)
    both = torch.stack((pairs & 15, pairs >> 4), dim=-1).permute(0, 3, 9, 4, 1, 2, 6, 7, 5, 8)
    return both.reshape(64 * slabs, 128 * blocks)


def _decode_records(
    planes: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype, format: Uniform
) -> torch.Tensor:
    """W of planes in register order (``src/kernels/register_order.hpp``)."""
    stored = planes["integers"]
    slabs, blocks = stored.shape[:2]
    nibbles = format.bits <= 4
    size = 4096 if nibbles else 8192
    codes = _register_nibbles(stored[..., :size]) if nibbles else _register_bytes(stored[..., :size])
    codes = codes[:n, :k].to(torch.int32)
    if not isinstance(format.group_size, int):
        rows = planes["rows"][:n]
        scales = rows[:, :1].contiguous().view(torch.float32)
        return (((codes ^ 8) - 8 - rows[:, 2:3]).to(torch.float32) * scales).to(dtype)
    run = math.gcd(format.group_size, 128)
    pairs = not format.symmetric and (nibbles or format.bits == 8)
    terms = stored[..., size:].contiguous().view(torch.int32).view(slabs, blocks, 128 // run, 64, 1 + pairs)
    terms = terms.permute(4, 0, 3, 1, 2).reshape(1 + pairs, 64 * slabs, 128 // run * blocks)
    terms = terms.repeat_interleave(run, dim=2)[:, :n, :k]
    scales = terms[0].contiguous().view(torch.float32)
    if not nibbles:
        # code - center, or code - zero point: of 8 bits the difference of the two lies beside the scale.
        values = codes.to(torch.float32)
        return ((values + terms[1].contiguous().view(torch.float32) if pairs else values) * scales).to(dtype)
    if pairs:
        return ((codes - (terms[1] & 15)).to(torch.float32) * scales).to(dtype)
    # Scales stand for 16 times the code.
    return (((codes ^ 8) - 8).to(torch.float32) * (scales * 16)).to(dtype)


def decode(
    planes: Mapping[str, torch.Tensor], n: int, k: int, dtype: torch.dtype, format: str
) -> torch.Tensor:
    """W ``[n, k]`` of planes in integer order: what ``PackedTensor.dequantize`` gives."""
    if planes["integers"].dim() == 3:
        described = format_from_json(format)
        assert isinstance(described, Uniform)
        return _decode_records(planes, n, k, dtype, described)
    rows = planes["rows"][:n]
    scales, zeros = rows[:, :1].contiguous().view(torch.float32), rows[:, 2:3]
    w = (_integers(planes, n, k).to(torch.int32) - zeros).to(torch.float32) * scales
    values, index = planes.get("outlier_values"), planes.get("outlier_index")
    if values is not None and index is not None and n:
        columns = index[(k + 31) // 32 :].long()
        w.index_add_(1, columns, values.view(n, columns.numel()).to(torch.float32))
    return w.to(dtype)


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(
    prepared: _core.IntegerPlanes, m: int, dtype: str, activations: _core.ActivationDescription
) -> int:
    return prepared.workspace(m, dtype, activations)


def product(
    x: torch.Tensor,
    prepared: _core.IntegerPlanes,
    n: int,
    k: int,
    device: torch.device,
    activations: ActivationFormat,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``round(x) @ W.T + bias`` of integers, for x ``[..., k]``, float16 or bfloat16, queued on torch's
    current stream of x's device.

    Raises TypeError or ValueError for a wrong shape, dtype or device, RuntimeError if no kernel takes the
    product.
    """
    description = _cuda_activations._description(activations.to_json())
    rows, y, m, dtype = _cuda.operands(x, n, k, device, bias)
    if m == 0 or n == 0:
        return y
    if k == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    with _cuda.on(device):
        size = _workspace_bytes(prepared, m, dtype, description)
        # From torch's allocator: it keeps the memory for this stream, or for the graph being captured.
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        prepared.matmul(
            rows.data_ptr(),
            rows.stride(0) if m > 1 else k,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            n,
            m,
            dtype,
            workspace.data_ptr(),
            size,
            torch.cuda.current_stream(device).cuda_stream,
            description,
        )
    return y


def why_not_product(
    format: str,
    k: int,
    columns: tuple[int, ...],
    activations: str | ActivationFormat,
    dtype: torch.dtype,
    device: torch.device | str,
) -> str | None:
    """None if planes in integer order, with these outlier columns, are multiplied as integers."""
    if not isinstance(activations, ActivationFormat):
        return f"{activations} activations are no integers"
    if dtype not in _HALVES:
        return f"integer products take no {str(dtype).removeprefix('torch.')} activations"
    reason = why_not(format, activations, k, _HALVES[dtype], device)
    if reason is None and columns != columns_of(activations):
        return f"W was prepared for other outlier columns than those of {activations.spec}"
    return reason


def multiply(
    x: torch.Tensor,
    planes: Mapping[str, torch.Tensor],
    prepared: _core.IntegerPlanes,
    format: str,
    n: int,
    k: int,
    columns: tuple[int, ...],
    activations: str | ActivationFormat,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product with planes in integer order: of integers where ``why_not_product`` has no reason, else of
    rounded activations and decoded weights."""
    device = planes["integers"].device
    if isinstance(activations, ActivationFormat) and (
        why_not_product(format, k, columns, activations, x.dtype, device) is None
    ):
        return product(x, prepared, n, k, device, activations, bias)
    rows, y, m, _ = _cuda.operands(x, n, k, device, bias)
    if m and isinstance(activations, ActivationFormat):
        rows = _cuda_activations.round_values(rows, activations)
    w = decode(planes, n, k, x.dtype, format)
    return torch.nn.functional.linear(rows, w, bias).reshape(y.shape)
