"""Trellis-coded rings on a CUDA device, for torch tensors.

Imports torch; imported only where a tensor on a CUDA device is at hand.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from quantloom import _arrays, _checks, _core, _devices

RING = 256
SEARCHES = ("fast", "normal", "best")


@functools.lru_cache(maxsize=32)
def _named(name: str, device: str) -> _core.CudaTrellisCodebook:
    with _devices.current(device) as stream:
        return _core.CudaTrellisCodebook(name, stream)


def codebook_on(codebook: Any, device: str) -> _core.CudaTrellisCodebook:
    """A codebook of a name, or of the 65536 weights of the states (rounded to float16), on a device."""
    if isinstance(codebook, str):
        return _named(codebook, device)
    array = _arrays.describe("codebook", codebook)
    if array.shape != (1 << 16,):
        raise ValueError(
            f"codebook: got shape {_arrays.shape_text(array.shape)}, expected a name or 65536 weights"
        )
    weights = torch.as_tensor(codebook, dtype=torch.float32, device="cpu").reshape(1, -1).contiguous()
    if not bool((weights.abs() <= 65504).all()):
        raise ValueError("codebook: got weights past the range of float16")
    with _devices.current(device) as stream:
        return _core.CudaTrellisCodebook.from_table(_arrays.describe("codebook", weights).core, stream)


def _half_bits(bits: Any, codebook: _core.CudaTrellisCodebook) -> int:
    number = _checks.real("bits", bits)
    most = 8 // codebook.weights_per_step
    if not 1 <= number <= most or 2 * number != round(2 * number):
        raise ValueError(f"bits: got {bits}, expected 1 to {most} in steps of 1/2")
    return round(2 * number)


def _words(words: Any, half_bits: int) -> torch.Tensor:
    words = _rows("words", words, RING * half_bits // 64)
    if words.dtype != torch.int32:
        raise TypeError(f"words: got {words.dtype}, expected torch.int32")
    return words.contiguous()


def _on_cuda(argument: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
        raise TypeError(
            f"{argument}: got {_checks.type_name(value)}, expected a torch tensor on a CUDA device"
        )
    return value


def _rows(argument: str, value: Any, columns: int) -> torch.Tensor:
    value = _on_cuda(argument, value)
    if value.ndim != 2 or value.shape[1] != columns:
        raise ValueError(
            f"{argument}: got shape {_arrays.shape_text(value.shape)}, expected [rings, {columns}]"
        )
    return value


def encode_rings(
    targets: torch.Tensor,
    bits: float,
    codebook: Any = "mul1",
    search: str = "normal",
    workspace_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rings near targets ``[rings, 256]``, which are in units of the codebook and in the order of the ring.

    Args:
        targets: finite floats on a CUDA device. Beyond 12 from zero they are searched as 12.
        bits: a weight, 1 to 8 in steps of 1/2; at most 4 for codebooks with two weights a step.
        codebook: a name as ``quantloom.trellis.codebook`` takes it, or 65536 weights.
        search: ``"fast"`` (0.5 to 0.8% more error than ``"normal"`` on a normal source, in 3/4 of the
            time), ``"normal"`` (within 0.03% of a float32 search), or ``"best"`` (0.1 to 0.3% less).
        workspace_bytes: memory to work in; None for what is fast, at most half of what is free.

    Returns:
        Words ``[rings, 8 * bits]`` of int32, stream bit ``32 w + i`` in bit ``31 - i`` of word w; and the
        squared errors ``[rings]`` of the rings, float32. The same for any workspace and number of rings.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    search = _checks.choice("search", search, SEARCHES)
    targets = _rows("targets", targets, RING).float().contiguous()
    if not bool(torch.isfinite(targets).all()):
        raise ValueError("targets: got NaN or infinity, expected finite numbers")
    device, count = targets.device, targets.shape[0]
    table = codebook_on(codebook, str(device))
    half_bits = _half_bits(bits, table)
    words = torch.empty((count, RING * half_bits // 64), dtype=torch.int32, device=device)
    errors = torch.empty(count, dtype=torch.float32, device=device)
    with _devices.current(str(device)) as stream:
        fast, least = _core.trellis_workspace_cuda(table, half_bits, search, count)
        if workspace_bytes is None:
            free = torch.cuda.mem_get_info(device)[0]
            size = min(fast, max(least, free // 2))
        else:
            size = _checks.integer("workspace_bytes", workspace_bytes)
            if size < least:
                raise ValueError(f"workspace_bytes: got {size}, expected at least {least}")
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        _core.encode_rings_cuda(
            table,
            _arrays.describe("targets", targets).core,
            half_bits,
            search,
            _arrays.describe("words", words).core,
            _arrays.describe("squared_errors", errors).core,
            _arrays.describe("workspace", workspace).core,
            stream,
        )
    return words, errors


def decode_rings(
    words: torch.Tensor, bits: float, codebook: Any = "mul1", dtype: Any = torch.float32
) -> torch.Tensor:
    """The weights ``[rings, 256]`` of rings ``[rings, 8 * bits]`` of int32 on a CUDA device.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    table = codebook_on(codebook, str(_on_cuda("words", words).device))
    half_bits = _half_bits(bits, table)
    words = _words(words, half_bits)
    name = _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
    weights = torch.empty((words.shape[0], RING), dtype=_arrays.torch_dtype(name), device=words.device)
    with _devices.current(str(words.device)) as stream:
        _core.decode_rings_cuda(
            table,
            _arrays.describe("words", words).core,
            half_bits,
            _arrays.describe("weights", weights).core,
            stream,
        )
    return weights


def _tiled(argument: str, shape: Any) -> tuple[int, int]:
    n, k = (_checks.integer(argument, size, 0) for size in shape)
    if n % 16 or k % 16:
        raise ValueError(f"{argument}: got [{n}, {k}], expected multiples of 16")
    return n, k


def gather_tiles(matrix: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """The tiles of a matrix ``[n, k]`` times `factor`, as targets ``[k / 16 * n / 16, 256]`` in ring order.

    Tiles are 16 x 16, those of the same 16 columns next to each other.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    matrix = _on_cuda("matrix", matrix)
    if matrix.ndim != 2:
        raise ValueError(f"matrix: got shape {_arrays.shape_text(matrix.shape)}, expected [n, k]")
    n, k = _tiled("matrix", matrix.shape)
    factor = _checks.real("factor", factor)
    matrix = matrix.contiguous()
    targets = torch.empty((n * k // RING, RING), dtype=torch.float32, device=matrix.device)
    with _devices.current(str(matrix.device)) as stream:
        _core.gather_tiles_cuda(
            _arrays.describe("matrix", matrix).core,
            factor,
            _arrays.describe("targets", targets).core,
            stream,
        )
    return targets


def decode_tiles(
    words: torch.Tensor,
    shape: tuple[int, int],
    bits: float,
    codebook: Any = "mul1",
    dtype: Any = torch.float32,
) -> torch.Tensor:
    """The matrix ``[n, k]`` of packed tiles ``[k / 16 * n / 16, 8 * bits]``, as ``gather_tiles`` orders them.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    table = codebook_on(codebook, str(_on_cuda("words", words).device))
    half_bits = _half_bits(bits, table)
    words = _words(words, half_bits)
    n, k = _tiled("shape", shape)
    if words.shape[0] * RING != n * k:
        raise ValueError(f"words: got {words.shape[0]} tiles, expected {n * k // RING} for [{n}, {k}]")
    name = _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
    matrix = torch.empty((n, k), dtype=_arrays.torch_dtype(name), device=words.device)
    with _devices.current(str(words.device)) as stream:
        _core.decode_tiles_cuda(
            table,
            _arrays.describe("words", words).core,
            half_bits,
            _arrays.describe("matrix", matrix).core,
            stream,
        )
    return matrix
