"""quantloom: compression of the weights of large language models.

    import quantloom as ql

    q = ql.quantize(W, ql.Uniform(bits=4, group_size=128))            # round to nearest
    q = ql.quantize(W, "uniform:3:g128:asym", ql.GPTQ(hessian))       # error feedback
    q.bits_per_weight, q.dequantize(), ql.matmul(x, q)                # NumPy or torch in, the same kind out
    ql.save_tensors("w.safetensors", {"layer": q})

Importing this package imports NumPy only; ``ql.models``, ``ql.nn`` and ``ql.evaluate`` import torch when
they are first used. A wrong argument raises TypeError (kind, dtype, device) or ValueError (shape, value)
before any work, naming the argument, what was given and what is expected; OSError names the file;
RuntimeError says what this build cannot do.
"""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

from quantloom import layouts
from quantloom._core import __version__
from quantloom.activations import (
    ActivationFormat,
    QuantizedActivations,
    activations_from_json,
    parse_activations,
    quantize_activations,
    round_activations,
)
from quantloom.awq import AWQ, ScaleChoice, search_channel_scales
from quantloom.beam_search import BeamSearch
from quantloom.calibration import Hessian, proxy_loss
from quantloom.channel_scales import ChannelScales
from quantloom.coded import CodedTensor, code
from quantloom.distillation import LayerDistillation, distillation_from_json, parse_distillation
from quantloom.formats import (
    BCQ,
    SDR,
    Additive,
    Codebook,
    Format,
    Outliers,
    SpQR,
    Trellis,
    Uniform,
    VectorCodebook,
    format_from_json,
    format_table,
    parse_format,
)
from quantloom.info import build_info
from quantloom.kernels import (
    PreparedTensor,
    can_matmul,
    kernel_table,
    matmul,
    matmul_is_integer,
    prepare,
)
from quantloom.outlier_columns import keep_columns
from quantloom.producers import (
    quantize_layer_norm,
    quantize_rms_norm,
    quantize_silu_mul,
    round_layer_norm,
    round_rms_norm,
    round_silu_mul,
)
from quantloom.quantizing import quantize
from quantloom.recipes import Recipe
from quantloom.rounding import (
    GPTQ,
    Nearest,
    OutlierSearch,
    Rounding,
    RoundingReport,
    ScaleSearch,
    parse_rounding,
    rounding_from_json,
)
from quantloom.smoothquant import SmoothQuant, search_smoothing
from quantloom.tensors import PackedTensor, load_metadata, load_tensors, save_tensors
from quantloom.transforms import (
    Hadamard,
    Transform,
    hadamard,
    hadamard_matrix,
    hadamard_signs,
    largest_hadamard_block,
    parse_transform,
    transform_from_json,
)

__all__ = [
    "AWQ",
    "BCQ",
    "GPTQ",
    "SDR",
    "ActivationFormat",
    "Additive",
    "BeamSearch",
    "ChannelScales",
    "Codebook",
    "CodedTensor",
    "Format",
    "Hadamard",
    "Hessian",
    "LayerDistillation",
    "Nearest",
    "OutlierSearch",
    "Outliers",
    "PackedTensor",
    "PreparedTensor",
    "QuantizedActivations",
    "Recipe",
    "Rounding",
    "RoundingReport",
    "ScaleChoice",
    "ScaleSearch",
    "SmoothQuant",
    "SpQR",
    "Transform",
    "Trellis",
    "Uniform",
    "VectorCodebook",
    "__version__",
    "activations_from_json",
    "build_info",
    "can_matmul",
    "code",
    "distillation_from_json",
    "format_from_json",
    "format_table",
    "hadamard",
    "hadamard_matrix",
    "hadamard_signs",
    "keep_columns",
    "kernel_table",
    "largest_hadamard_block",
    "layouts",
    "load_metadata",
    "load_tensors",
    "matmul",
    "matmul_is_integer",
    "parse_activations",
    "parse_distillation",
    "parse_format",
    "parse_rounding",
    "parse_transform",
    "prepare",
    "proxy_loss",
    "quantize",
    "quantize_activations",
    "quantize_layer_norm",
    "quantize_rms_norm",
    "quantize_silu_mul",
    "round_activations",
    "round_layer_norm",
    "round_rms_norm",
    "round_silu_mul",
    "rounding_from_json",
    "save_tensors",
    "search_channel_scales",
    "search_smoothing",
    "transform_from_json",
]

# Not in __all__: a star import must not import torch, nor hide the standard library's inspect.
_LAZY_MODULES = (
    "analysis",
    "evaluate",
    "experiments",
    "fit",
    "kv",
    "model_quantisation",
    "models",
    "nn",
    "quantisation_training",
    "sensitivity",
    "trellis",
)


def __getattr__(name: str) -> _Any:
    if name in _LAZY_MODULES:
        return _importlib.import_module(f"quantloom.{name}")
    if name == "inspect":
        return _importlib.import_module("quantloom.inspection").inspect
    raise AttributeError(f"module 'quantloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY_MODULES, "inspect"])
