"""Rounding of activations on a CUDA device, on torch's current stream.

Imports torch; imported only where a tensor on a CUDA device is at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from quantloom import _core, _cuda

if TYPE_CHECKING:
    from quantloom.activations import ActivationFormat
    from quantloom.producers import _Call

__all__ = ["dequantize", "quantize", "quantize_produced", "round_produced", "round_values"]


@functools.lru_cache(maxsize=512)
def _description(json: str) -> _core.ActivationDescription:
    return _core.ActivationDescription(json)


@functools.lru_cache(maxsize=512)
def _outlier_index(columns: tuple[int, ...], k: int, device: torch.device) -> torch.Tensor:
    """Outlier columns as kernels read them. Made on the first call, which a graph cannot capture."""
    inside = [column for column in columns if column < k]  # others are refused with the batch
    return torch.from_numpy(_core.outlier_index(inside, k)).to(device)


def _workspace(format: _core.ActivationDescription, m: int, k: int, device: torch.device) -> torch.Tensor:
    # From torch's allocator: it keeps the memory for this stream, or for the graph being captured.
    return torch.empty(format.cuda_workspace(m, k), dtype=torch.uint8, device=device)


def _matrix(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int, str]]:
    """x ``[m, k]`` with rows that go forward, and its address, stride, sizes and dtype."""
    m, k = x.shape
    if m > 1 and x.stride(0) < k:
        x = x.contiguous()
    stride = x.stride(0) if m > 1 else k
    return x, (x.data_ptr(), stride, m, k, str(x.dtype).removeprefix("torch."))


def _refs(planes: Mapping[str, torch.Tensor]) -> dict[str, _core.ArrayRef]:
    refs = {}
    for name, plane in planes.items():
        if not plane.is_contiguous():
            raise ValueError(f"plane {name}: got strides {plane.stride()}, expected a contiguous tensor")
        dtype = str(plane.dtype).removeprefix("torch.")
        shape, strides = tuple(plane.shape), tuple(plane.stride())
        refs[name] = _core.ArrayRef(plane.data_ptr(), dtype, shape, strides, str(plane.device), None)
    return refs


def quantize(x: torch.Tensor, format: ActivationFormat) -> dict[str, torch.Tensor]:
    """The planes of x ``[m, k]``."""
    _cuda.require_kernels("quantize_activations")
    description, device = _description(format.to_json()), x.device
    x, matrix = _matrix(x)
    m, k = x.shape
    with _cuda.on(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        index, outliers = None, 0
        if format.static_outliers and format.outlier_columns is not None:
            index = _outlier_index(format.outlier_columns, k, device)
            outliers = len(format.outlier_columns)
        elif format.outlier_threshold is not None and not format.static_outliers:
            index = torch.empty(_core.outlier_index_words(k, k), dtype=torch.int32, device=device)
            count = torch.empty(1, dtype=torch.int32, device=device)
            _core.find_activation_outliers_cuda(
                *matrix, description, index.data_ptr(), count.data_ptr(), stream
            )
            outliers = int(count)
        planes = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, dtype, shape in description.planes(m, k, outliers)
        }
        workspace = _workspace(description, m, k, device)
        _core.quantize_activations_cuda(
            *matrix,
            description,
            _refs(planes),
            0 if index is None else index.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            stream,
        )
    return planes


def round_values(x: torch.Tensor, format: ActivationFormat) -> torch.Tensor:
    """x ``[m, k]`` rounded to the format."""
    _cuda.require_kernels("round_activations")
    description, device = _description(format.to_json()), x.device
    x, matrix = _matrix(x)
    m, k = x.shape
    out = torch.empty((m, k), dtype=x.dtype, device=device)
    with _cuda.on(device):
        index = None
        if format.static_outliers and format.outlier_columns is not None:
            index = _outlier_index(format.outlier_columns, k, device)
        workspace = _workspace(description, m, k, device)
        _core.round_activations_cuda(
            *matrix,
            description,
            out.data_ptr(),
            k,
            0 if index is None else index.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            torch.cuda.current_stream(device).cuda_stream,
        )
    return out


def _producer(call: _Call) -> tuple[_core.CudaProducer, list[torch.Tensor]]:
    """What the kernels read, and the tensors that must live until they are queued."""
    vectors = [vector for vector in (call.weight, call.bias) if vector is not None]
    kept = [vector.value for vector in vectors]
    dtypes = {vector.dtype for vector in vectors}
    if len(dtypes) > 1:
        raise TypeError(f"bias: got {call.bias.dtype}, expected {call.weight.dtype}, as the weight")
    up = (0, 0)
    if call.up is not None:
        value, (address, stride, *_) = _matrix(call.up.value)
        kept.append(value)
        up = (address, stride)
    m, k = call.x.shape
    producer = _core.CudaProducer(
        call.kind,
        0 if call.weight is None else call.weight.value.data_ptr(),
        0 if call.bias is None else call.bias.value.data_ptr(),
        dtypes.pop() if dtypes else "float32",
        call.eps,
        call.add_one,
        up[0],
        up[1],
        m,
        k,
        call.x.dtype,
    )
    return producer, kept


def quantize_produced(call: _Call) -> dict[str, torch.Tensor]:
    """The planes of what a norm or a gated activation makes."""
    _cuda.require_kernels("quantize_activations")
    format, device = call.format, call.x.value.device
    if format.outlier_threshold is not None and not format.static_outliers:
        return quantize(_produced(call), format)
    description = _description(format.to_json())
    producer, kept = _producer(call)
    x, matrix = _matrix(call.x.value)
    m, k = x.shape
    with _cuda.on(device):
        index = None if format.outlier_columns is None else _outlier_index(format.outlier_columns, k, device)
        planes = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, dtype, shape in description.planes(m, k, len(format.outlier_columns or ()))
        }
        size = description.produced_cuda_workspace(call.x.dtype, m, k)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        _core.quantize_produced_cuda(
            *matrix,
            producer,
            description,
            _refs(planes),
            0 if index is None else index.data_ptr(),
            workspace.data_ptr(),
            size,
            torch.cuda.current_stream(device).cuda_stream,
        )
    del kept
    return planes


def round_produced(call: _Call) -> torch.Tensor:
    """The same rounded to the format, ``[m, k]``."""
    _cuda.require_kernels("round_activations")
    format, device = call.format, call.x.value.device
    description = _description(format.to_json())
    producer, kept = _producer(call)
    x, matrix = _matrix(call.x.value)
    m, k = x.shape
    out = torch.empty((m, k), dtype=x.dtype, device=device)
    with _cuda.on(device):
        index = None if format.outlier_columns is None else _outlier_index(format.outlier_columns, k, device)
        size = description.produced_cuda_workspace(call.x.dtype, m, k)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        _core.round_produced_cuda(
            *matrix,
            producer,
            description,
            out.data_ptr(),
            k,
            0 if index is None else index.data_ptr(),
            workspace.data_ptr(),
            size,
            torch.cuda.current_stream(device).cuda_stream,
        )
    del kept
    return out


def _produced(call: _Call) -> torch.Tensor:
    """The values themselves, ``[m, k]``."""
    producer, kept = _producer(call)
    x, matrix = _matrix(call.x.value)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _cuda.on(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _core.produce_activations_cuda(*matrix, producer, out.data_ptr(), x.shape[1], stream)
    del kept
    return out


def dequantize(planes: Mapping[str, torch.Tensor], format: ActivationFormat, dtype: str) -> torch.Tensor:
    """The values ``[m, k]`` of planes on a CUDA device."""
    _cuda.require_kernels("dequantize")
    codes = planes["codes"]
    if codes.dim() != 2:
        raise ValueError(f"plane codes: got {codes.dim()} dimensions, expected [tokens, k]")
    m, k = codes.shape
    out = torch.empty((m, k), dtype=getattr(torch, dtype), device=codes.device)
    for name, plane in planes.items():
        if plane.device != codes.device:
            raise TypeError(f"plane {name}: got a tensor on {plane.device}, expected one on {codes.device}")
    with _cuda.on(codes.device):
        _core.dequantize_activations_cuda(
            _refs(planes),
            _description(format.to_json()),
            m,
            k,
            out.data_ptr(),
            dtype,
            torch.cuda.current_stream(codes.device).cuda_stream,
        )
    return out
