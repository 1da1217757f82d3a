"""Models that read a text through a quantized cache, for ``ql.evaluate``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers

from quantloom import _checks
from quantloom.kv.format import KVFormat, parse_kv_format
from quantloom.kv.generation import QuantizedKVCache, use_attention
from quantloom.kv.plain import KVUsage
from quantloom.kv.tables import KVCalibration

__all__ = ["CachedModel"]

_ROUNDED = ("float16", "bfloat16")


class _RoundedCache(transformers.DynamicCache):
    """Keys and values rounded to a 16-bit dtype, and kept as they are."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self._dtype = getattr(torch, dtype)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        rounded = (x.to(self._dtype).to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


class CachedModel(torch.nn.Module):
    """A causal language model of transformers that is fed a text in pieces, through a cache.

        ql.evaluate.compare(ql.kv.CachedModel(model, "kivi:2"), reference, ids)

    Every call starts with an empty cache and forces the given tokens; what is predicted after token t has
    seen the tokens before it as the cache stores them then.

    Args:
        model: a model, which gets the attention of ``use_attention``.
        format: a ``KVFormat`` or its short form; or ``"float16"``, ``"bfloat16"``: keys and values rounded to
            that.
        chunk: tokens of a piece. 1: token by token, as in decoding.
        calibration: a ``KVCalibration``, for formats of the kind kvquant.
        prefill: what the tokens of a larger piece see of each other: ``"quantized"`` or ``"exact"``, as in
            ``QuantizedKVCache``; not for 16-bit dtypes nor for single tokens, which see what is stored.

    Attributes:
        usage: what the cache held at the end of the last call, or None; not for 16-bit dtypes.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        model: Any,
        format: KVFormat | str,
        chunk: int = 1,
        prefill: str = "quantized",
        calibration: KVCalibration | None = None,
    ) -> None:
        super().__init__()
        rounded = isinstance(format, str) and format in _ROUNDED
        self.format = format if rounded else parse_kv_format(format)
        self.chunk = _checks.integer("chunk", chunk, 1)
        self.prefill = _checks.choice("prefill", prefill, ("quantized", "exact"))
        self.calibration = calibration
        self.usage: KVUsage | None = None
        if not hasattr(model, "set_attn_implementation"):
            raise TypeError(f"model: got {_checks.type_name(model)}, expected a model of transformers")
        if prefill == "exact" and (rounded or self.chunk == 1):
            what = str(format) if rounded else "single tokens"
            raise ValueError(f"prefill: got 'exact' for {what}, expected 'quantized': all see what is stored")
        if not rounded:  # what no cache can be made of is refused now
            QuantizedKVCache(model.config, self.format, prefill, calibration=calibration)
        elif calibration is not None:
            raise ValueError(f"calibration: got {_checks.type_name(calibration)}, expected none for {format}")
        self.model = model if rounded else use_attention(model)

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> Any:
        """An object with `logits` ``[sequences, tokens, vocabulary]``; `use_cache` changes nothing."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            shape = list(getattr(input_ids, "shape", [])) or _checks.type_name(input_ids)
            raise ValueError(f"input_ids: got {shape}, expected a tensor [sequences, tokens] with tokens")
        count = input_ids.shape[1]
        if isinstance(self.format, str):
            cache = _RoundedCache(self.format)
        else:
            if self.prefill == "exact" and self.chunk >= count:
                raise ValueError(
                    f"chunk: got {self.chunk} for {count} tokens with exact prefill, expected less: no token"
                    f" would see the cache"
                )
            cache = QuantizedKVCache(
                self.model.config, self.format, self.prefill, capacity=count, calibration=self.calibration
            )
        logits = [
            self.model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            for piece in input_ids.split(self.chunk, dim=1)
        ]
        self.usage = None if isinstance(self.format, str) else cache.usage()
        return SimpleNamespace(logits=torch.cat(logits, dim=1))
