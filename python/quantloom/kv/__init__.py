"""Keys and values of attention in a few bits.

    cache = ql.kv.KVCache("kivi:2", sequences=1, kv_heads=8, head_dim=128)  # device="cuda": on a GPU
    cache.append(keys, values)                            # [sequences, kv_heads, tokens, head_dim]
    out = cache.attend(queries)                           # straight from the codes

    ql.kv.use_attention(model)                            # a model of transformers
    model.generate(**inputs, past_key_values=ql.kv.KIVICache(model.config, bits=2))

``KVFormat`` and ``KVCache`` need NumPy alone; the caches for transformers import it when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from quantloom.kv.format import KVFormat, kv_format_from_json, parse_kv_format
from quantloom.kv.needle import NeedleResult, needle
from quantloom.kv.plain import KVCache, KVUsage
from quantloom.kv.tables import KVCalibration, KVTables, RotaryEmbedding

__all__ = [
    "KVCache",
    "KVCalibration",
    "KVFormat",
    "KVTables",
    "KVUsage",
    "NeedleResult",
    "RotaryEmbedding",
    "kv_format_from_json",
    "needle",
    "parse_kv_format",
]

_LAZY = {
    "CachedModel": "evaluation",
    "KIVICache": "generation",
    "KVQuantCache": "generation",
    "calibrate": "calibration",
    "QuantizedKVCache": "generation",
    "use_attention": "generation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"quantloom.kv.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'quantloom.kv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
