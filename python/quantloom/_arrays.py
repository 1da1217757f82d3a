"""Arrays of any kind as the C++ side sees them: address, dtype, shape, strides, device.

NumPy arrays and torch tensors are taken as they are, without a copy; anything else comes through DLPack.
torch is never imported here: it is looked up only if the process has it already.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from quantloom import _checks, _core

FLOATS = ("float32", "float16", "bfloat16")
KNOWN_DTYPES = (
    *FLOATS,
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)


class Array(NamedTuple):
    """An array that was checked: what the C++ side needs, and what is needed to answer in kind."""

    core: _core.ArrayRef
    kind: str  # "numpy" or "torch"
    dtype: str
    shape: tuple[int, ...]
    device: str  # "cpu", "cuda:0", ...
    value: Any  # the array itself, as NumPy or torch


def torch_if_loaded() -> Any:
    """The torch module if the process has imported it, else None."""
    return sys.modules.get("torch")


def is_torch(value: Any) -> bool:
    torch = torch_if_loaded()
    return torch is not None and hasattr(torch, "Tensor") and isinstance(value, torch.Tensor)


def shape_text(shape: Any) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def bfloat16() -> np.dtype:
    """NumPy's bfloat16, which the package ml_dtypes brings."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def numpy_dtype(name: str) -> np.dtype:
    return bfloat16() if name == "bfloat16" else np.dtype(name)


def torch_dtype(name: str) -> Any:
    return getattr(torch_if_loaded(), name)


def dtype_name(argument: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The name of a dtype given as a string, a NumPy dtype or type, or a torch dtype."""
    if isinstance(value, str):
        name = value
    elif isinstance(value, np.dtype):
        name = value.name
    elif isinstance(value, type):
        name = value.__name__
    elif str(value).startswith("torch."):
        name = str(value).removeprefix("torch.")
    else:
        raise TypeError(f"{argument}: got {_checks.type_name(value)}, expected one of {', '.join(allowed)}")
    if name not in allowed:
        raise TypeError(f"{argument}: got {name}, expected one of {', '.join(allowed)}")
    return name


def _describe_torch(argument: str, value: Any) -> Array:
    torch = torch_if_loaded()
    if value.layout != torch.strided:
        raise TypeError(f"{argument}: got a {value.layout} tensor, expected a dense one")
    device = str(value.device)
    if value.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{argument}: got a tensor on {device}, expected one on the CPU or a CUDA device")
    name = str(value.dtype).removeprefix("torch.")
    if name not in KNOWN_DTYPES:
        raise TypeError(f"{argument}: got {name}, expected one of {', '.join(KNOWN_DTYPES)}")
    value = value.detach().resolve_neg()
    try:
        address = value.data_ptr()
    except RuntimeError:
        raise TypeError(f"{argument}: got a tensor without memory (fake), expected one with values") from None
    shape = tuple(value.shape)
    core = _core.ArrayRef(address, name, shape, tuple(value.stride()), device, value)
    return Array(core, "torch", name, shape, device, value)


def _describe_numpy(argument: str, value: np.ndarray) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{argument}: got a masked array, expected a plain one (its mask would be lost)")
    dtype = value.dtype
    name = dtype.name
    if name not in KNOWN_DTYPES:
        raise TypeError(f"{argument}: got dtype {name}, expected one of {', '.join(KNOWN_DTYPES)}")
    if not dtype.isnative:
        raise TypeError(
            f"{argument}: got {name} in foreign byte order, expected native order"
            f" (pass {argument}.astype({argument}.dtype.newbyteorder('=')))"
        )
    if not value.flags.aligned:
        raise ValueError(
            f"{argument}: got memory that is not aligned to {dtype.alignment} bytes, expected aligned memory"
            f" (pass a copy)"
        )
    if any(stride % dtype.itemsize for stride in value.strides):
        raise ValueError(
            f"{argument}: got strides {value.strides} in bytes, expected multiples of {dtype.itemsize}"
        )
    strides = tuple(stride // dtype.itemsize for stride in value.strides)
    address = value.__array_interface__["data"][0]
    core = _core.ArrayRef(address, name, value.shape, strides, "cpu", value)
    return Array(core, "numpy", name, value.shape, "cpu", value)


def describe(argument: str, value: Any) -> Array:
    """Any array of a dtype that the library knows; its memory is not touched."""
    if isinstance(value, np.ndarray):
        return _describe_numpy(argument, value)
    if is_torch(value):
        return _describe_torch(argument, value)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
        try:
            return _describe_numpy(argument, np.from_dlpack(value))
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{argument}: got {_checks.type_name(value)}, which NumPy cannot take through DLPack"
                f" ({error}), expected a NumPy array or a torch tensor"
            ) from None
    raise TypeError(
        f"{argument}: got {_checks.type_name(value)}, expected a NumPy array, a torch tensor or an object"
        f" with __dlpack__"
    )


def _check_float(argument: str, array: Array, allowed: tuple[str, ...]) -> None:
    if array.dtype in allowed:
        return
    hint = ""
    if array.dtype == "float64":
        hint = (
            f" (pass {argument}.astype('float32'))"
            if array.kind == "numpy"
            else f" (pass {argument}.float())"
        )
    raise TypeError(
        f"{argument}: got {array.dtype}, expected {', '.join(allowed[:-1])} or {allowed[-1]}{hint}"
        if len(allowed) > 1
        else f"{argument}: got {array.dtype}, expected {allowed[0]}{hint}"
    )


def _check_last_axis(argument: str, array: Array) -> None:
    stride = array.core.strides[-1]
    if array.shape[-1] > 1 and array.core.element_count > 0 and stride != 1:
        raise ValueError(
            f"{argument}: got elements {stride} apart along the last axis, expected them next to each other"
            f" (pass a contiguous copy)"
        )


def _check_rows(argument: str, array: Array) -> None:
    """Elements of a row next to each other, rows that go forward and do not overlap."""
    (rows, cols), strides = array.shape, array.core.strides
    _check_last_axis(argument, array)
    if rows > 1 and cols > 0 and strides[0] < cols:
        raise ValueError(
            f"{argument}: got rows {strides[0]} elements apart, expected at least {cols}, so that they go"
            f" forward and do not overlap (pass a contiguous copy)"
        )


def require_cpu(argument: str, array: Array) -> None:
    if array.device != "cpu":
        hint = f"{argument}.cpu()"
        raise TypeError(f"{argument}: got a tensor on {array.device}, expected one on the CPU (pass {hint})")


def matrix(
    argument: str,
    value: Any,
    allowed: tuple[str, ...] = FLOATS,
    shape: tuple[int, int] | None = None,
    *,
    cpu: bool = True,
) -> Array:
    """A matrix with contiguous rows, of one of the dtypes `allowed`; on the CPU unless `cpu` is False."""
    array = describe(argument, value)
    if len(array.shape) != 2:
        expected = "2 dimensions" if shape is None else f"shape {shape_text(shape)}"
        raise ValueError(f"{argument}: got shape {shape_text(array.shape)}, expected {expected}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{argument}: got shape {shape_text(array.shape)}, expected {shape_text(shape)}")
    _check_float(argument, array, allowed)
    if cpu:
        require_cpu(argument, array)
    _check_rows(argument, array)
    return array


def tokens(argument: str, value: Any, k: int, *, cpu: bool = True) -> Array:
    """Activations ``[..., k]`` of a float dtype, seen as a matrix ``[tokens, k]``.

    Leading dimensions are flattened, by a copy only where strides leave no other way.
    """
    array = describe(argument, value)
    if not array.shape or array.shape[-1] != k:
        raise ValueError(f"{argument}: got shape {shape_text(array.shape)}, expected [..., {k}]")
    _check_float(argument, array, FLOATS)
    if cpu:
        require_cpu(argument, array)
    _check_last_axis(argument, array)
    count = 1
    for size in array.shape[:-1]:
        count *= size
    flat = describe(argument, array.value.reshape((count, k)))
    if array.device == "cpu":
        _check_rows(argument, flat)
    return flat


def plane(argument: str, value: Any) -> Array:
    """A contiguous array of any dtype."""
    array = describe(argument, value)
    if not array.core.contiguous:
        raise ValueError(f"{argument}: got strides {array.core.strides}, expected a contiguous array")
    return array


def to_kind(value: np.ndarray, name: str, kind: str) -> Any:
    """A NumPy array from the C++ side (bfloat16 as its 16 bits) as an array of `kind`.

    Not copied, but for read-only memory that becomes a torch tensor: torch could write to it.
    """
    if kind == "numpy":
        return value.view(bfloat16()) if name == "bfloat16" else value
    import torch

    if not value.flags.writeable:
        value = value.copy()
    if name in ("bfloat16", "uint16"):
        return torch.from_numpy(value.view(np.int16)).view(getattr(torch, name))
    return torch.from_numpy(value)


def empty(kind: str, shape: tuple[int, ...], name: str) -> Any:
    """New uninitialized memory on the CPU."""
    if kind == "numpy":
        return np.empty(shape, numpy_dtype(name))
    import torch

    return torch.empty(shape, dtype=getattr(torch, name), device="cpu")


def cast(value: Any, name: str) -> Any:
    """The array in another dtype; the same array if it has it already."""
    if isinstance(value, np.ndarray):
        return value.astype(numpy_dtype(name), copy=False)
    return value.to(torch_dtype(name))
