"""Devices by name, and CUDA devices made current by way of torch, which is imported where one is at hand."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from quantloom import _checks, _core


def device_name(argument: str, device: Any) -> str:
    """``"cpu"`` or ``"cuda:N"`` of a string or a ``torch.device``.

    Raises TypeError or ValueError for anything else, RuntimeError where the device cannot be used.
    """
    text = device if isinstance(device, str) else str(device) if _is_device(device) else None
    expected = '"cpu", "cuda" or "cuda:N"'
    if text is None:
        raise TypeError(f"{argument}: got {_checks.type_name(device)}, expected {expected}")
    if text == "cpu":
        return text
    kind, separator, number = text.partition(":")
    if kind != "cuda" or bool(separator) != number.isdecimal():
        raise ValueError(f"{argument}: got {text!r}, expected {expected}")
    if not _core.built_with_cuda():
        raise RuntimeError(f"{argument}: got {text!r}, but this build of quantloom has no CUDA kernels")
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"{argument}: got {text!r}, but torch finds no CUDA device")
    index = int(number) if separator else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise RuntimeError(
            f"{argument}: got {text!r}, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return f"cuda:{index}"


def _is_device(device: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(device, torch.device)


@contextlib.contextmanager
def current(device: str) -> Iterator[int]:
    """Makes a CUDA device current; gives the address of torch's current stream on it."""
    import torch

    from quantloom import _cuda

    _cuda.find_libraries()
    where = torch.device(device)
    with _cuda.on(where):
        yield torch.cuda.current_stream(where).cuda_stream
