"""Caches for ``generate()`` of transformers, and the attention that reads them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin

from quantloom import _checks
from quantloom.kv.format import KVFormat, parse_kv_format
from quantloom.kv.plain import KVCache, KVUsage
from quantloom.kv.tables import KVCalibration

__all__ = ["KIVICache", "KVQuantCache", "QuantizedKVCache", "use_attention"]

ATTENTION = "quantloom"
_PREFILLS = ("exact", "quantized")
_RUN = 512  # queries that one mask serves
_UNKNOWN = ("softcap", "sliding_window", "position_bias", "s_aux")


class _Layer(CacheLayerMixin):
    """One layer of a ``QuantizedKVCache``."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, settings: _Settings, index: int) -> None:
        super().__init__()
        self.settings = settings
        self.index = index
        self.cache: KVCache | None = None
        self.columns = 0  # tokens of the batch, padding included
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"values: got shape {list(value_states.shape)}, expected that of the keys,"
                f" {list(key_states.shape)}"
            )
        sequences, heads, _, dim = key_states.shape
        settings = self.settings
        tables = settings.tables(self.index)
        self.cache = KVCache(
            settings.format, sequences, heads, dim, key_states.dtype, settings.capacity, tables
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if self._new is not None:
            raise RuntimeError(
                "the keys of the last call were never attended to: the model's attention hands them on"
                " changed; call set_attn_implementation('sdpa') and give the cache padding="
            )
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = key_states.detach(), value_states.detach()
        self.columns += key_states.shape[2]
        if self.settings.direct:
            # The mask tells which tokens are padding, and only the attention gets it: it adds the tokens.
            self._new = (key_states, value_states)
            marked = key_states.view_as(key_states)
            marked._quantloom_layer = self
            return marked, value_states
        return self._dense(key_states, value_states, self.settings.padding)

    def attend(self, queries: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Adds the tokens of the last update and attends; [sequences, tokens, heads, head_dim]."""
        keys, values = self._new
        self._new = None
        if keys.shape[2] == 1 or self.settings.prefill == "quantized":
            self._append(keys, values, mask)
            return self.cache.attend(queries, scale).swapaxes(1, 2)
        past = (
            None if self.columns == keys.shape[2] else self._stored(keys.dtype, self.columns - keys.shape[2])
        )
        self._append(keys, values, mask)
        if past is not None:
            keys, values = (torch.cat([old, new], dim=2) for old, new in zip(past, (keys, values)))
        return _exact_attention(queries, keys, values, self._visible(), scale)

    def _dense(self, keys: torch.Tensor, values: torch.Tensor, padding: torch.Tensor | None):
        """Adds tokens and returns all keys and values, padding as zeros, for other attentions."""
        mask = None
        if padding is not None:
            more = self.columns - padding.shape[1]
            mask = torch.cat([padding, padding.new_ones(padding.shape[0], max(more, 0))], dim=1)
            mask = mask[:, : self.columns]
            if mask.shape[0] != keys.shape[0]:
                mask = mask.repeat_interleave(keys.shape[0] // mask.shape[0], dim=0)
        count = keys.shape[2]
        exact = count > 1 and self.settings.prefill == "exact"
        past = self._stored(keys.dtype, self.columns - count) if exact and self.columns > count else None
        self._append(keys, values, mask)
        if not exact:
            return self._stored(keys.dtype, self.columns)
        if past is None:
            return keys, values
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(past, (keys, values)))

    def _append(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        count = keys.shape[2]
        lengths = self.cache.lengths
        starts = [0] * len(lengths)
        if mask is not None:
            if mask.shape != (len(lengths), self.columns):
                raise ValueError(
                    f"attention_mask: got shape {list(mask.shape)}, expected [{len(lengths)}, {self.columns}]"
                )
            mask = mask.bool().cpu()
            starts = (
                self.columns - mask.sum(dim=1) - (self.columns - count - torch.tensor(lengths))
            ).tolist()
            for s, start in enumerate(starts):
                pads = self.columns - lengths[s] - (count - start)
                if start < 0 or start > count or bool(mask[s, :pads].any()) or (start and lengths[s]):
                    raise ValueError(
                        f"attention_mask: row {s} has zeros that are not padding on the left, or other ones"
                        f" than in earlier calls; the cache takes left padding only"
                    )
        elif any(length != self.columns - count for length in lengths):
            raise ValueError("attention_mask: got none, expected the mask of earlier calls, extended")
        self.cache.append(keys, values, starts)

    def _visible(self) -> torch.Tensor | None:
        pads = [self.columns - length for length in self.cache.lengths]
        if not any(pads):
            return None
        return torch.arange(self.columns)[None, :] >= torch.tensor(pads)[:, None]

    def _stored(self, dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the cache, [sequences, heads, columns, head_dim], with zeros for padding."""
        cache = self.cache
        lengths = cache.lengths
        shape = (len(lengths), cache.kv_heads, columns, cache.head_dim)
        keys, values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        for s, length in enumerate(lengths):
            keys[s, :, columns - length :] = cache.keys(s, "torch")
            values[s, :, columns - length :] = cache.values(s, "torch")
        return keys, values

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.cache is not None:
            self.cache.clear()
        self.columns = 0
        self._new = None

    def _reorder(self, sources: list[int]) -> None:
        if self.cache is not None:
            self.cache.reorder(sources)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self._reorder([s for s in range(len(self.cache.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.cache is not None:
            self._reorder(torch.arange(len(self.cache.lengths))[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("crop: tokens cannot be taken out of a quantized cache")

    def offload(self) -> None:
        raise RuntimeError("offload: the cache stays where it is")


class _Settings:
    """What the layers of a cache share."""

    def __init__(
        self,
        config: Any,
        format: KVFormat,
        prefill: str,
        capacity: int,
        padding: Any,
        calibration: KVCalibration | None,
    ) -> None:
        self.config = config
        self.format = format
        self.calibration = calibration
        self.prefill = prefill
        self.capacity = capacity
        self.padding = padding

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settings:
        return self  # nothing in it changes; the config is the model's own

    def tables(self, layer: int) -> Any:
        if self.calibration is None:
            return None
        positions = getattr(self.config, "max_position_embeddings", None) or 0
        return self.calibration.core_tables(layer, max(positions, self.capacity))

    @property
    def direct(self) -> bool:
        return self.config._attn_implementation == ATTENTION


class QuantizedKVCache(Cache):
    """A cache for ``generate()`` in any ``KVFormat``.

        ql.kv.use_attention(model)
        cache = ql.kv.QuantizedKVCache(model.config, "kivi:2")
        model.generate(**inputs, past_key_values=cache)

    With ``use_attention``, decoding reads the codes, and padding (on the left) never enters the cache: what a
    sequence holds does not depend on its batch mates. With another attention of transformers the whole cache
    is decoded at each step, and padding must be given as `padding`.

    Every token is quantized as soon as it leaves the format's window, whether it came with the prompt or was
    generated. Works with greedy search, sampling and beams; tokens cannot be taken out again (assisted
    generation). On the CPU.

    Args:
        config: of the model (``model.config``), whose layers all attend to all earlier tokens.
        format: a ``KVFormat`` or its short form.
        prefill: what the tokens of a call with several of them see. ``"exact"``: each other as they are, and
            earlier ones as they are stored. ``"quantized"``: all of them as they are stored after the call. A
            single token always sees what is stored, itself included.
        capacity: tokens of each sequence to take memory for at the start.
        padding: the attention mask of the prompt ``[sequences, tokens]``; only without ``use_attention``.
        calibration: for formats of the kind kvquant: a ``KVCalibration`` of the model in this format.
    """

    def __init__(
        self,
        config: Any,
        format: KVFormat | str,
        prefill: str = "exact",
        capacity: int = 0,
        padding: torch.Tensor | None = None,
        calibration: KVCalibration | None = None,
    ) -> None:
        if not isinstance(config, transformers.PretrainedConfig):
            raise TypeError(f"config: got {_checks.type_name(config)}, expected the config of a model")
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"config: has layers {sorted(kinds)}, expected full_attention alone")
        if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None) is not None:
            raise ValueError(
                "config: has a sliding_window, expected layers that attend to all earlier tokens"
            )
        if padding is not None and (not isinstance(padding, torch.Tensor) or padding.ndim != 2):
            raise TypeError("padding: expected a tensor [sequences, tokens] or None")
        self.format = parse_kv_format(format)
        self.prefill = _checks.choice("prefill", prefill, _PREFILLS)
        capacity = _checks.integer("capacity", capacity, 0)
        needed = self.format.kind == "kvquant"
        if needed != isinstance(calibration, KVCalibration):
            got = "none" if calibration is None else _checks.type_name(calibration)
            raise ValueError(f"calibration: got {got}, expected {'a KVCalibration' if needed else 'none'}")
        if needed and calibration.format != self.format:
            raise ValueError(f"calibration: is for {calibration.format}, expected {self.format}")
        if needed and len(calibration.layers) != text.num_hidden_layers:
            raise ValueError(
                f"calibration: has {len(calibration.layers)} layers, expected {text.num_hidden_layers}"
            )
        settings = _Settings(text, self.format, prefill, capacity, padding, calibration)
        super().__init__(layers=[_Layer(settings, index) for index in range(text.num_hidden_layers)])

    def usage(self) -> KVUsage:
        """What all layers hold together; ``tokens`` and the coded ones are those of the first layer."""
        each = [layer.cache.usage() for layer in self.layers if layer.cache is not None]
        if not each:
            return KVUsage(0, 0, 0, 0, 0, 0, 0)
        totals = {
            name: sum(getattr(usage, name) for usage in each)
            for name in ("code_bytes", "exact_bytes", "page_bytes", "reserved_bytes")
        }
        return KVUsage(each[0].tokens, each[0].coded_keys, each[0].coded_values, **totals)


class KIVICache(QuantizedKVCache):
    """``QuantizedKVCache`` in the format of KIVI (Liu et al., 2024).

    Args:
        config: of the model.
        bits: of keys and of values; or a pair of both. 1, 2, 3, 4 or 8.
        group_size: tokens of a group of keys, channels of a group of values.
        window: recent tokens that stay exact, a multiple of group_size.
        others: as in ``QuantizedKVCache``.
    """

    def __init__(
        self,
        config: Any,
        bits: int | tuple[int, int] = 2,
        group_size: int = 32,
        window: int = 128,
        first: int = 0,
        hadamard: bool = False,
        prefill: str = "exact",
        capacity: int = 0,
        padding: torch.Tensor | None = None,
    ) -> None:
        key_bits, value_bits = bits if isinstance(bits, tuple) else (bits, bits)
        format = KVFormat("kivi", key_bits, value_bits, group_size, window, first, hadamard)
        super().__init__(config, format, prefill, capacity, padding)


class KVQuantCache(QuantizedKVCache):
    """``QuantizedKVCache`` in the format of a calibration (KVQuant: Hooper et al., 2024).

        calibration = ql.kv.calibrate(model, ids, "kvquant:3:1%")
        cache = ql.kv.KVQuantCache(model.config, calibration)

    Args:
        config: of the model.
        calibration: a ``KVCalibration``, or the path of one that was saved.
        others: as in ``QuantizedKVCache``. Keys are taken to have the position of their place in the
            sequence; a `capacity` beyond the model's max_position_embeddings allows for longer ones.
    """

    def __init__(
        self,
        config: Any,
        calibration: KVCalibration | Any,
        prefill: str = "exact",
        capacity: int = 0,
        padding: torch.Tensor | None = None,
    ) -> None:
        if not isinstance(calibration, KVCalibration):
            calibration = KVCalibration.load(calibration)
        super().__init__(config, calibration.format, prefill, capacity, padding, calibration)


def use_attention(model: Any) -> Any:
    """Makes a model of transformers attend straight from the codes of its cache; returns the model.

    The same as ``model.set_attn_implementation("quantloom")``. Without a ``QuantizedKVCache`` the model
    attends with PyTorch's scaled_dot_product_attention.
    """
    model.set_attn_implementation(ATTENTION)
    return model


def _exact_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """PyTorch's attention of the last tokens, [sequences, tokens, heads, head_dim].

    `visible` [sequences, keys]: those that are no padding. Queries go in runs, so that masks stay small.
    """
    count, columns = queries.shape[2], keys.shape[2]
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    if visible is None and count == columns:
        return attend(queries, keys, values, is_causal=True, scale=scale).transpose(1, 2)
    runs = []
    for first in range(0, count, _RUN):
        part = queries[:, :, first : first + _RUN]
        end = columns - count + first + part.shape[2]
        mask = torch.ones(part.shape[2], end, dtype=torch.bool, device=queries.device)
        mask = mask.tril(end - part.shape[2])[None, None]
        if visible is not None:
            mask = mask & visible.to(queries.device)[:, None, None, :end]
        out = attend(part, keys[:, :, :end], values[:, :, :end], attn_mask=mask, scale=scale)
        blind = ~mask.any(dim=-1, keepdim=True)  # rows of padding
        runs.append(out.masked_fill(blind, 0.0))
    return torch.cat(runs, dim=2).transpose(1, 2)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention "quantloom" of transformers; the mask is that of padding, [sequences, tokens]."""
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attention: the model asks for {name}, which the attention 'quantloom' does not have"
            )
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError("attention: the model is not causal, expected a decoder")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = getattr(key, "_quantloom_layer", None)
    if layer is not None:
        return layer.attend(query.detach(), attention_mask, scale).contiguous(), None
    if dropout:
        raise ValueError(f"dropout: got {dropout}, expected 0 with the attention 'quantloom'")
    visible = None if attention_mask is None else attention_mask.bool()
    return _exact_attention(query, key, value, visible, scale).contiguous(), None


def _mask(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """What the attention gets as its mask: that of padding alone."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


transformers.AttentionInterface.register(ATTENTION, attention)
transformers.AttentionMaskInterface.register(ATTENTION, _mask)
