"""What this build holds."""

from __future__ import annotations

from typing import Any

from quantloom import _core

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """Facts of this build and process.

    Keys: ``version``; ``cuda`` (True if CUDA kernels are built in); ``cuda_toolkit`` ("13.0", or "" without
    CUDA); ``architectures`` (a list such as ``["80", "90a"]``); ``compiler``; ``cpu_target`` (the instruction
    set that run-time dispatch picked).
    """
    return _core.build_info()
