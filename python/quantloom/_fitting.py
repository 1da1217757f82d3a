"""Fits of tables and codebooks on samples: arguments checked here, numbers made in C++.

Samples, weights and tables are NumPy arrays or torch tensors on the CPU; results are NumPy arrays. Vectors
may be torch tensors on a CUDA device; results lie there then, as torch tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from quantloom import _arrays, _checks, _core, _devices

TABLE_STARTS = ("quantile", "kmeans++", "cuberoot", "uniform_minmax", "random")


def _float32(argument: str, value: Any) -> _arrays.Array:
    """Any array of floats on the CPU (or a list of numbers) as contiguous float32 memory."""
    if isinstance(value, (list, tuple)):
        value = np.asarray(value, np.float32)
    array = _arrays.describe(argument, value)
    _arrays.require_cpu(argument, array)
    if array.dtype not in (*_arrays.FLOATS, "float64"):
        raise TypeError(f"{argument}: got {array.dtype}, expected float32, float16, bfloat16 or float64")
    if array.dtype == "float32" and array.core.contiguous:
        return array
    flat = array.value.reshape(-1)
    if array.kind == "torch":
        return _arrays.describe(argument, flat.float().contiguous())
    return _arrays.describe(argument, np.ascontiguousarray(flat, np.float32))


def sort_values(values: Any, weights: Any = None, threads: int = 0) -> _core.SortedValues:
    """A sample, sorted once: what ``lloyd_max``, ``table_errors`` and ``table_counts`` look things up in.

    Args:
        values: floats of any shape, all finite; float64 is rounded to float32.
        weights: None, or as many finite numbers >= 0.
        threads: 0 for OpenMP's default; the result does not depend on it.

    Raises:
        ValueError: NaN, infinity, a negative weight or a wrong number of weights.
    """
    weight_array = None if weights is None else _float32("weights", weights)
    return _core.SortedValues(
        _float32("values", values).core,
        None if weight_array is None else weight_array.core,
        _checks.thread_count(threads),
    )


def _sample(values: Any, weights: Any) -> _core.SortedValues:
    if not isinstance(values, _core.SortedValues):
        return sort_values(values, weights)
    if weights is not None:
        raise TypeError("weights: got an array beside a sorted sample, expected None (sort them together)")
    return values


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"seed: got {_checks.type_name(value)}, expected an integer")
    if not 0 <= value < 2**64:
        raise ValueError(f"seed: got {value}, expected 0 to 2**64 - 1")
    return int(value)


class TableFit(NamedTuple):
    """What ``lloyd_max`` found."""

    centroids: np.ndarray  # float32 [count], ascending
    sweeps: int
    changed: float  # fraction of the values that changed their cell in the last sweep
    converged: bool
    squared_error: float  # weighted, summed over the sample


def lloyd_max(
    values: Any,
    count: int,
    *,
    weights: Any = None,
    start: Any = "kmeans++",
    threshold: float = 1e-4,
    max_sweeps: int = 10_000,
    seed: int = 0,
) -> TableFit:
    """The table of `count` values with the least weighted squared error on a sample, from a start.

    Exact on the sorted sample and deterministic: no subsampling, the same result for any number of threads.
    A cell without weight keeps its centroid, so that tables stay finite. A value exactly between two
    centroids belongs to the lower one; the boundaries are midpoints in float32.

    Args:
        values: a sample of any shape, or one from ``sort_values``.
        count: centroids, 1 to 65536.
        weights: None, or as many finite numbers >= 0.
        start: ``"quantile"``, ``"kmeans++"``, ``"cuberoot"`` (density proportional to the cube root of the
            sample's), ``"uniform_minmax"``, ``("uniform_rms", width)`` for mean -+ width standard deviations,
            ``"random"``, or an ascending array of `count` centroids.
        threshold: in [0, 1]; stops once at most this fraction of the values changes its cell.
        max_sweeps: stops after so many, `converged` or not.
        seed: of the starts ``"kmeans++"`` and ``"random"``; in [0, 2**64).

    Raises:
        ValueError, TypeError: naming the argument that is out of range.
    """
    name, width, centroids = "given", 3.0, None
    if isinstance(start, str):
        name = _checks.choice("start", start, TABLE_STARTS)
    elif isinstance(start, tuple) and len(start) == 2 and start[0] == "uniform_rms":
        name, width = "uniform_rms", _checks.real("start", start[1])
    else:
        centroids = _float32("start", start)
    fields = _core.lloyd_max(
        _sample(values, weights),
        _checks.integer("count", count),
        name,
        None if centroids is None else centroids.core,
        width,
        _checks.real("threshold", threshold),
        _checks.integer("max_sweeps", max_sweeps),
        _seed(seed),
    )
    return TableFit(**fields)


def table_errors(
    values: Any, tables: Sequence[Any], scales: Any, *, weights: Any = None, threads: int = 0
) -> np.ndarray:
    """How well tables describe a sample at many scales: float64 ``[len(tables), len(scales)]``.

    Entry [t, s] is ``sum(weight * (scales[s] * q(x / scales[s]) - x)**2)`` with q the nearest value of
    ``tables[t]``, a value between two taking the lower. The sample is sorted once; each entry then costs
    O(K log n).

    Args:
        values: a sample of any shape, or one from ``sort_values``.
        tables: ascending arrays of finite values.
        scales: finite numbers > 0.
        weights: None, or as many finite numbers >= 0. For values that were divided by a scale of their block,
            weights of block_scale**2 give the error of the values before.
    """
    arrays = [_float32(f"tables[{i}]", table) for i, table in enumerate(tables)]
    scale_array = _float32("scales", scales)
    return _core.table_errors(
        _sample(values, weights),
        [array.core for array in arrays],
        scale_array.core,
        _checks.thread_count(threads),
    )


def table_counts(values: Any, table: Any, scale: float = 1.0) -> np.ndarray:
    """How many values of a sample take each entry of an ascending table: int64 ``[len(table)]``.

    The codes are those of ``x / scale`` in float32 among midpoints in float32, the lower one on a tie.
    """
    return _core.table_counts(
        _sample(values, None), _float32("table", table).core, _checks.real("scale", scale)
    )


def _vectors(argument: str, value: Any, device: str = "cpu") -> _arrays.Array:
    """Rows of floats on a device: of float32 on the CPU, without gaps within rows."""
    array = _arrays.describe(argument, value)
    if len(array.shape) != 2:
        raise ValueError(f"{argument}: got shape {_arrays.shape_text(array.shape)}, expected 2 dimensions")
    if array.device != device:
        raise TypeError(f"{argument}: got an array on {array.device}, expected one on {device}")
    if device != "cpu":
        if array.dtype not in _arrays.FLOATS:
            raise TypeError(f"{argument}: got {array.dtype}, expected float32, float16 or bfloat16")
        return array if array.core.contiguous else _arrays.describe(argument, array.value.contiguous())
    if array.dtype == "float32" and array.core.contiguous:
        return array
    flat = _float32(argument, array.value)
    return _arrays.describe(argument, flat.value.reshape(array.shape))


def _device_of(x: Any) -> str:
    device = _arrays.describe("x", x).device
    if device != "cpu" and not _core.built_with_cuda():
        raise RuntimeError(f"x: got a tensor on {device}, but this build of quantloom has no CUDA kernels")
    return device


def nearest_neighbour(x: Any, centroids: Any, threads: int = 0) -> Any:
    """The index of the centroid nearest to each row of x: int32 ``[n]``, where x lies.

    The squared distance is taken in float64, the lowest index wins a tie; neither the device, the processor
    nor the number of threads changes the result.

    Args:
        x: ``[n, d]`` finite floats, d from 1 to 16; on the CPU, or a torch tensor on a CUDA device.
        centroids: ``[K, d]`` finite floats on the same device, K from 1 to 65536.
        threads: 0 for OpenMP's default.

    Raises:
        ValueError: other shapes, NaN or infinity.
    """
    team = _checks.thread_count(threads)
    device = _device_of(x)
    rows, table = _vectors("x", x, device), _vectors("centroids", centroids, device)
    if device == "cpu":
        return _core.nearest_neighbour(rows.core, table.core, team)
    import torch

    codes = torch.empty(rows.shape[0], dtype=torch.int32, device=device)
    with _devices.current(device) as stream:
        _core.nearest_neighbour_cuda(rows.core, table.core, _arrays.describe("codes", codes).core, stream)
    return codes


class CodebookFit(NamedTuple):
    """What ``kmeans`` found; torch tensors on the device of a sample that lies on a CUDA device."""

    centroids: Any  # float32 [count, d]
    codes: Any  # int32 [n]: the nearest of these centroids
    sweeps: int
    changed: float  # fraction of the rows that changed their code in the last sweep
    converged: bool
    squared_error: float  # weighted, summed over the rows


def kmeans(
    x: Any,
    count: int,
    *,
    weights: Any = None,
    start: Any = "kmeans++",
    threshold: float = 1e-3,
    max_sweeps: int = 1000,
    reseed_empty: bool = False,
    seed: int = 0,
    threads: int = 0,
) -> CodebookFit:
    """A codebook of `count` vectors with little weighted squared error on the rows of x (Lloyd, 1982).

    Deterministic: rows are summed in fixed point, so that neither their order, the number of threads nor the
    device changes the result (but for the last bits of `squared_error`). A centroid without rows stays where
    it is, unless `reseed_empty`.

    Args:
        x: ``[n, d]`` finite floats, d from 1 to 16; on the CPU, or a torch tensor on a CUDA device.
        count: centroids, 1 to 65536.
        weights: None, or a finite number >= 0 for each row, on the same device.
        start: ``"kmeans++"`` (in batches, from a subset of large samples), ``"random"`` rows, or an array
            ``[count, d]``.
        threshold: in [0, 1]; stops once at most this fraction of the rows changes its code.
        max_sweeps: stops after so many, `converged` or not.
        reseed_empty: move a centroid without rows to the row that is described worst.
        seed: of the starts; in [0, 2**64).
        threads: 0 for OpenMP's default.

    Raises:
        ValueError, TypeError: naming the argument that is out of range.
    """
    device = _device_of(x)
    name, centroids = "given", None
    if isinstance(start, str):
        name = _checks.choice("start", start, ("kmeans++", "random"))
    else:
        on_cpu = start.detach().cpu() if _arrays.is_torch(start) else start
        centroids = _vectors("start", on_cpu)
    options = (
        name,
        None if centroids is None else centroids.core,
        _checks.real("threshold", threshold),
        _checks.integer("max_sweeps", max_sweeps),
        _checks.boolean("reseed_empty", reseed_empty),
        _seed(seed),
        _checks.thread_count(threads),
    )
    count = _checks.integer("count", count)
    if not 1 <= count <= 65536:
        raise ValueError(f"count: got {count}, expected 1 to 65536 centroids")
    rows = _vectors("x", x, device)
    if device != "cpu":
        return _kmeans_cuda(rows, count, weights, options)
    weight_array = None if weights is None else _float32("weights", weights)
    fields = _core.kmeans(rows.core, count, None if weight_array is None else weight_array.core, *options)
    return CodebookFit(**fields)


def _kmeans_cuda(rows: _arrays.Array, count: int, weights: Any, options: tuple[Any, ...]) -> CodebookFit:
    import torch

    weight_array = None
    if weights is not None:
        weight_array = _arrays.describe("weights", weights)
        if weight_array.device != rows.device:
            raise TypeError(
                f"weights: got an array on {weight_array.device}, expected one on {rows.device}, as x is"
            )
        flat = weight_array.value.reshape(-1).float().contiguous()
        weight_array = _arrays.describe("weights", flat)
    n, d = rows.shape
    centroids = torch.empty((count, d), dtype=torch.float32, device=rows.device)
    codes = torch.empty(n, dtype=torch.int32, device=rows.device)
    with _devices.current(rows.device) as stream:
        fields = _core.kmeans_cuda(
            rows.core,
            count,
            None if weight_array is None else weight_array.core,
            *options,
            _arrays.describe("centroids", centroids).core,
            _arrays.describe("codes", codes).core,
            stream,
        )
    return CodebookFit(centroids, codes, **fields)
