"""Products on a CUDA device: planes in the order that the kernels read, and calls on torch's current stream.

Imports torch; imported only where a tensor on a CUDA device is at hand.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from quantloom import _arrays, _core
from quantloom.formats import Format
from quantloom.tensors import PackedTensor

__all__ = ["decode", "descriptor", "find_libraries", "prepare", "product", "unprepare", "why_not"]

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_OPTIONS = _core.CudaMatmulOptions()


@functools.cache
def options(kernel: str | None) -> _core.CudaMatmulOptions:
    """Of a product; `kernel`: a name of the kernel table, or None for the one that suits."""
    return _OPTIONS if kernel is None else _core.CudaMatmulOptions(kernel=kernel)


@functools.cache
def find_libraries() -> None:
    """Tells the C++ side where pip packages keep cuBLAS and its like, for processes that have not loaded
    them yet. Called before the first work that may need them."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec is not None else None
    folders = {str(folder) for root in roots or () for folder in Path(root).glob("*/lib") if folder.is_dir()}
    _core.set_cuda_library_folders(sorted(folders))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, at no cost if it is."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def require_kernels(what: str) -> None:
    if not _core.built_with_cuda():
        raise RuntimeError(
            f"{what}: got planes on a CUDA device, but this build of quantloom has no CUDA kernels"
        )


def plane_refs(planes: Mapping[str, torch.Tensor]) -> dict[str, _core.ArrayRef]:
    """Views of planes that kernels read. Raises TypeError or ValueError naming the plane."""
    refs = {}
    for name, plane in planes.items():
        dtype = str(plane.dtype).removeprefix("torch.")
        if not plane.is_contiguous():
            raise ValueError(f"plane {name}: got strides {plane.stride()}, expected a contiguous tensor")
        shape, strides = tuple(plane.shape), tuple(plane.stride())
        refs[name] = _core.ArrayRef(plane.data_ptr(), dtype, shape, strides, str(plane.device), None)
    if len({plane.device for plane in planes.values()}) > 1:
        got = ", ".join(f"{name} on {plane.device}" for name, plane in planes.items())
        raise TypeError(f"planes: got {got}, expected one device")
    return refs


def descriptor(planes: Mapping[str, torch.Tensor], format: str, n: int, k: int) -> _core.PreparedPlanes:
    """The C++ view of planes in fragment order. It does not keep them alive: whoever uses it must.

    Raises TypeError or ValueError, naming the plane, unless the planes are those of the format.
    """
    return _core.PreparedPlanes(format, n, k, plane_refs(planes))


_descriptors: dict[tuple[Any, ...], _core.PreparedPlanes] = {}
_MOST_DESCRIPTORS = 1 << 16


def cached_descriptor(
    planes: Sequence[torch.Tensor], names: str, format: str, n: int, k: int
) -> _core.PreparedPlanes:
    """The same for planes that come again and again, found by their addresses: checking them takes longer
    than a small product. A descriptor holds nothing but addresses and sizes, so it never gets stale."""
    key = (names, format, n, k, *[(plane.data_ptr(), plane.nbytes) for plane in planes])
    found = _descriptors.get(key)
    if found is None:
        found = descriptor(dict(zip(names.split(","), planes, strict=True)), format, n, k)
        if len(_descriptors) >= _MOST_DESCRIPTORS:
            _descriptors.clear()
        _descriptors[key] = found
    return found


def empty_planes(
    format: str, n: int, k: int, with_group_index: bool, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Uninitialized planes in fragment order. Raises RuntimeError if no kernel takes the format."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for name, dtype, shape in _core.prepared_planes(format, n, k, with_group_index)
    }


def prepare(q: PackedTensor) -> dict[str, torch.Tensor]:
    """Planes in fragment order of torch planes, on their device.

    On a CUDA device they are filled on torch's current stream. On the CPU the scalar reference makes them,
    which is slow and here to compare with: no kernel of the CPU reads them.
    """
    if q.device == "cpu":
        found = _core.prepare_fragments(q._core()).planes()
        return {name: _arrays.to_kind(array, dtype, "torch") for name, (dtype, array) in found.items()}
    require_kernels("prepare")
    format, (n, k), device = q.format.to_json(), q.shape, torch.device(q.device)
    group_index = q.planes.get("group_index")
    with on(device):
        planes = empty_planes(format, n, k, group_index is not None, device)
        if "source" in planes:
            groups = None if group_index is None else _arrays.describe("group_index", group_index.cpu()).core
            planes["source"].copy_(torch.from_numpy(_core.fragment_source(format, k, groups)))
        _core.prepare_cuda(q._core(), descriptor(planes, format, n, k), _stream(device))
    return planes


def empty_packed(
    prepared: Mapping[str, torch.Tensor], format: Format, n: int, k: int, device: torch.device
) -> PackedTensor:
    """With uninitialized planes: those of the format that `prepared` was made of."""
    planes = {
        plane["name"]: torch.empty(plane["shape"], dtype=getattr(torch, plane["dtype"]), device=device)
        for plane in format.planes(n, k)
        if not plane["optional"] or plane["name"] in prepared
    }
    return PackedTensor(format, (n, k), planes)


def unprepare(
    planes: Mapping[str, torch.Tensor], core: _core.PreparedPlanes, format: Format, n: int, k: int
) -> PackedTensor:
    """The inverse of ``prepare``; `core` describes the planes."""
    device = next(iter(planes.values())).device
    if device.type == "cpu":
        return PackedTensor._from_core(_core.unprepare_fragments(core), "torch")
    require_kernels("unprepare")
    q = empty_packed(planes, format, n, k, device)
    with on(device):
        _core.unprepare_cuda(core, q._core(), _stream(device))
    return q


def decode(
    planes: Mapping[str, torch.Tensor], core: _core.PreparedPlanes, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    """W ``[n, k]`` of planes in fragment order on a CUDA device; `core` describes them."""
    require_kernels("dequantize")
    if "outlier_values" in planes and dtype != torch.float32:
        # The kernel would round the dense value, and then the sum.
        return decode(planes, core, n, k, torch.float32).to(dtype)
    # Planes of signs come in blocks of 128 columns, codes in blocks of 64; those of additive formats also in
    # rows and lists.
    blocks = planes["signs"] if "signs" in planes else planes["codes"]
    device = blocks.device
    if blocks.dim() < 4:
        stride = 64 * ((k + 63) // 64)
    else:
        stride = (128 if "signs" in planes else 64) * blocks.shape[1]
    out = torch.empty((n, stride), dtype=dtype, device=device)
    with on(device):
        _core.decode_fragments_cuda(core, out.data_ptr(), _DTYPE_NAMES[dtype], stride, _stream(device))
    source = planes.get("source")
    if source is None:
        return out if stride == k else out[:, :k].contiguous()
    # Columns of padding all go to one column more, so that nothing depends on values of the device.
    places = torch.where(source < 0, k, source).long()
    return out.new_empty((n, k + 1)).index_copy_(1, places, out)[:, :k].contiguous()


def operands(
    x: torch.Tensor, n: int, k: int, device: torch.device, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int, str]:
    """x ``[..., k]`` as rows that kernels read, memory for the result, the number of rows, and the dtype.

    Raises TypeError or ValueError for a wrong shape, dtype or device.
    """
    if x.device != device:
        raise TypeError(f"x: got a tensor on {x.device}, expected one on {device}, as the planes")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: got shape {_arrays.shape_text(x.shape)}, expected [..., {k}]")
    dtype = _DTYPE_NAMES.get(x.dtype)
    if dtype is None:
        raise TypeError(f"x: got {x.dtype}, expected float16, bfloat16 or float32")
    if bias is not None:
        _check_bias(bias, x, n)
    m = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    rows = x if x.dim() == 2 else x.reshape(m, k)
    if (k > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < k):
        rows = rows.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=device)
    return rows, y, m, dtype


def product(
    x: torch.Tensor,
    prepared: _core.PreparedPlanes,
    n: int,
    k: int,
    device: torch.device,
    bias: torch.Tensor | None = None,
    options: _core.CudaMatmulOptions = _OPTIONS,
) -> torch.Tensor:
    """``x @ W.T + bias`` for x ``[..., k]``, queued on torch's current stream of x's device.

    Raises TypeError or ValueError for a wrong shape, dtype or device, RuntimeError if no kernel takes the
    product.
    """
    rows, y, m, dtype = operands(x, n, k, device, bias)
    if m == 0 or n == 0:
        return y
    if k == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    find_libraries()
    with on(device):
        size = prepared.workspace(m, dtype, options)
        # From torch's allocator: it keeps the memory for this stream, or for the graph being captured.
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        prepared.matmul(
            rows.data_ptr(),
            rows.stride(0) if m > 1 else k,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            n,
            m,
            dtype,
            0 if workspace is None else workspace.data_ptr(),
            size,
            _stream(device),
            options,
        )
    return y


def _check_bias(bias: torch.Tensor, x: torch.Tensor, n: int) -> None:
    if tuple(bias.shape) != (n,):
        raise ValueError(f"bias: got shape {_arrays.shape_text(bias.shape)}, expected [{n}]")
    if bias.dtype != x.dtype:
        raise TypeError(f"bias: got {bias.dtype}, expected {x.dtype}, as x")
    if bias.device != x.device:
        raise TypeError(f"bias: got a tensor on {bias.device}, expected one on {x.device}, as x")
    if n > 1 and bias.stride(0) != 1:
        raise ValueError(f"bias: got elements {bias.stride(0)} apart, expected them next to each other")


def why_not(format: str, tokens: int, dtype: str, device: str, kernel: str | None = None) -> str | None:
    """None if a kernel of `device` takes the product, else the reason why not."""
    if not _core.built_with_cuda():
        return "this build of quantloom has no CUDA kernels"
    find_libraries()
    with torch.cuda.device(device):
        return _core.why_not_matmul_cuda(format, tokens, dtype, options(kernel))
