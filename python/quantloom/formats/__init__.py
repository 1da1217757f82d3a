"""Formats: what is stored for a matrix, and how it decodes.

Two families. ``Uniform``, ``Codebook``, ``VectorCodebook``, ``Additive``, ``BCQ``, ``SpQR``, ``SDR``,
``Trellis`` and ``Outliers`` are the formats that ``ql.quantize`` packs matrices to and that kernels multiply
with; they need NumPy only. The others are a vocabulary to compare formats with, for torch tensors of any
shape: element formats (floats, integers, tables, vector tables), density-based tables, Lloyd-Max, and
wrappers that add block scales, outliers, rotations and entropy coding::

    import quantloom.formats as Q

    fmt = Q.LinearScalingFormat(Q.crd_t(4, df=7), Q.BFLOAT16, (1, 64), "absmax")
    Q.qrmse_norm(fmt, w), fmt.count_bits_tensor(w)      # error, nominal bits
    e = fmt.encode(w)                                   # bytes: e.size_in_bits, e.decode(), e.save(path)
    ql.matmul(x, e.to_packed())                         # tables, scalar or of vectors; outliers

Names and meanings of that vocabulary follow "Optimal Formats for Weight Quantisation" (Orr et al., 2025,
arXiv 2505.12988). ``quantise(t)`` returns the decoded values; ``encode(t).decode()`` returns the same bits.
These names import torch when first used.
"""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

from quantloom.formats.additive import Additive
from quantloom.formats.packed import (
    BCQ,
    SDR,
    Codebook,
    Format,
    Outliers,
    SpQR,
    Trellis,
    Uniform,
    VectorCodebook,
    format_from_json,
    format_table,
    group_columns,
    parse_format,
)

_LAZY = {
    "base": ("BlockShape", "Compressor", "ScalarFormat", "Scaling", "Shape", "TensorFormat"),
    "metrics": (
        "block_normalise",
        "blocked_scale",
        "blocked_shape",
        "qrmse_norm",
        "rmse_norm",
        "safe_div",
        "shuffle",
        "snr",
    ),
    "elements": (
        "BFLOAT16",
        "FP16",
        "FP32",
        "ExpCeilFormat",
        "FPFormat",
        "IntFormat",
        "TorchFormat",
        "parse",
    ),
    "tables": ("NF4", "SF4_DF5", "LUTFormat", "lut_function", "lut_grid", "nf_approx"),
    "vectors": ("Sign3D8Format", "VectorLUTFormat", "nearest_neighbour"),
    "crd": ("crd_block_laplace", "crd_block_normal", "crd_block_t", "crd_laplace", "crd_normal", "crd_t"),
    "wrappers": ("LinearScalingFormat", "RandomRotationFormat", "ScaledFormat", "SparseFormat"),
    "compressed": ("CompressedLUTFormat",),
    "lloyd_max": ("lut_lloyd_max", "scaled_int8_3d8_lloyd_max", "vlut_lloyd_max"),
    "encoded": ("Encoded",),
    "files": ("load_encoded", "save_encoded"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "Additive",
    "BCQ",
    "Codebook",
    "Format",
    "Outliers",
    "SDR",
    "SpQR",
    "Trellis",
    "Uniform",
    "VectorCodebook",
    "format_from_json",
    "format_table",
    "group_columns",
    "parse_format",
    *_HOME,
]


def __getattr__(name: str) -> _Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quantloom.formats' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"quantloom.formats.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
