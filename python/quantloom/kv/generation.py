"""Caches for ``generate()`` of transformers, and the attention that reads them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from quantloom import _checks
from quantloom.kv import operators
from quantloom.kv.format import KVFormat, parse_kv_format
from quantloom.kv.padding import Padding
from quantloom.kv.plain import KVCache, KVUsage
from quantloom.kv.tables import KVCalibration

__all__ = ["KIVICache", "KVQuantCache", "QuantizedKVCache", "use_attention"]

ATTENTION = "quantloom"
_PREFILLS = ("exact", "quantized")
_RUN = 512  # queries that one mask serves
_FEW = 8  # tokens for which a CUDA kernel reads the codes; of more, the cache is decoded once for all
_UNKNOWN = ("softcap", "position_bias", "s_aux")


class _Layer(CacheLayerMixin):
    """One layer of a ``QuantizedKVCache`` that attends to all earlier tokens."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, settings: _Settings, padding: Padding, index: int, leads: bool) -> None:
        super().__init__()
        self.settings = settings
        self.padding = padding
        self.index = index
        self.leads = leads  # the first of the layers that share `padding`
        self.cache: KVCache | None = None
        self.columns = 0  # tokens of the batch that came, padding included
        self.stored = 0  # those that are in the cache
        self.captured = False  # by a CUDA graph, whose replays add tokens
        self.before = 0  # of `stored`, padding before the first sequence; known once captured
        self.handle = operators.handle(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            setattr(twin, name, operators.handle(twin) if name == "handle" else copy.deepcopy(value, memo))
        return twin

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
            settings.format,
            sequences,
            heads,
            dim,
            key_states.dtype,
            settings.capacity,
            tables,
            key_states.device,
        )
        self.is_initialized = True

    def _catch_up(self) -> None:
        """Counts the tokens that replays of a CUDA graph added."""
        if self.captured and not torch.cuda.is_current_stream_capturing():
            self.columns = self.stored = self.before + self.cache.lengths[0]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        self._catch_up()
        if self.columns != self.stored:
            raise RuntimeError(
                "the keys of the last call were never attended to: it was interrupted (reset() the cache), or"
                " the model's attention hands them on changed (call set_attn_implementation('sdpa') and give"
                " the cache padding=)"
            )
        key_states, value_states = key_states.detach(), value_states.detach()
        columns = self.columns + key_states.shape[2]
        if self.leads:
            self.padding.columns = columns
        elif columns != self.padding.columns and not self.captured:
            raise RuntimeError(
                f"layer {self.index} of the cache holds {self.columns} tokens, expected"
                f" {self.padding.columns - key_states.shape[2]} as in the first: an earlier call failed"
                f" between them; reset() the cache"
            )
        self.columns = columns
        if self.settings.direct:
            # The mask tells which tokens are padding, and only the attention gets it: it adds the tokens.
            marked = key_states.view_as(key_states)
            marked._quantloom_layer = self
            return marked, value_states
        try:
            return self._dense(key_states, value_states, self.settings.padding)
        except BaseException:
            self.columns = self.stored
            raise

    def _append_attend(self, *call: Any) -> torch.Tensor:
        try:
            return self._attended(*call)
        except BaseException:
            self.columns = self.stored
            raise

    def _attended(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Adds the tokens of the last update and attends; [sequences, tokens, heads, head_dim]."""
        count = keys.shape[2]
        starts = self._starts(keys, values, mask)
        if count == 1 or self.settings.prefill == "quantized":
            self._append(keys, values, starts)
            if count <= _FEW or not keys.is_cuda:
                return self.cache.attend(queries, scale).swapaxes(1, 2).contiguous()
            return self._attend_each(queries, None, starts, scale)
        if any(self.cache.lengths) or starts is not None:
            out = self._attend_each(queries, (keys, values), starts, scale)
        else:
            out = _exact_attention(queries, keys, values, None, scale)
        self._append(keys, values, starts)
        if alone := _alone(starts, count):
            out[alone, -1] = self.cache.attend(queries[:, :, -1:], scale)[alone, :, 0]
        return out.contiguous()

    def _attend_each(
        self,
        queries: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        starts: list[int] | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention to the decoded cache and then to `new` keys and values, one sequence after the other."""
        sequences, heads, count, dim = queries.shape
        out = queries.new_zeros((sequences, count, heads, dim))
        for s, start in enumerate([0] * sequences if starts is None else starts):
            if start == count:
                continue
            seen = self._stored(s, queries.dtype)
            if new is not None:
                seen = [torch.cat([old, x[s, :, start:]], dim=1) for old, x in zip(seen, new)]
            keys, values = (x[None] for x in seen)
            out[s, start:] = _exact_attention(queries[s : s + 1, :, start:], keys, values, None, scale)[0]
        return out

    def _dense(self, keys: torch.Tensor, values: torch.Tensor, padding: torch.Tensor | None):
        """Adds tokens and returns all keys and values, padding as zeros, for other attentions."""
        mask = None
        if padding is not None:
            more = self.columns - padding.shape[1]
            mask = torch.cat([padding, padding.new_ones(padding.shape[0], max(more, 0))], dim=1)
            mask = mask[:, : self.columns]
            if mask.shape[0] != keys.shape[0]:
                if mask.shape[0] == 0 or keys.shape[0] % mask.shape[0]:
                    raise ValueError(
                        f"padding: got {mask.shape[0]} rows, expected {keys.shape[0]} or a divisor"
                    )
                mask = mask.repeat_interleave(keys.shape[0] // mask.shape[0], dim=0)
        starts = self._starts(keys, values, mask)
        count = keys.shape[2]
        if count == 1 or self.settings.prefill == "quantized":
            self._append(keys, values, starts)
            return self._stored_batch(keys, self.columns)
        past = self._stored_batch(keys, self.columns - count) if self.columns > count else None
        self._append(keys, values, starts)
        if alone := _alone(starts, count):
            keys, values = keys.clone(), values.clone()
            for s in alone:
                keys[s, :, -1], values[s, :, -1] = (x[:, -1] for x in self._stored(s, keys.dtype))
        if past is None:
            return keys, values
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(past, (keys, values)))

    def _starts(
        self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> list[int] | None:
        """For each sequence the first token that is no padding; None: all tokens of all."""
        if self.cache is None:
            self.lazy_initialization(keys, values)
        if keys.is_cuda and torch.cuda.is_current_stream_capturing():
            if not self.captured:
                self.captured, self.before = True, self.stored - self.cache.lengths[0]
            return None
        return self.padding.starts(mask, self.cache.lengths, self.stored, keys.shape[2], self.leads)

    def _append(self, keys: torch.Tensor, values: torch.Tensor, starts: list[int] | None) -> None:
        # The values of a prompt are looked at before it is stored; single tokens never wait for the device.
        self.cache.append(keys, values, starts, check=keys.shape[2] > 1)
        self.stored += keys.shape[2]

    def _stored(self, sequence: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """The keys and the values of a sequence, [kv_heads, tokens, head_dim] each."""
        name = str(dtype).removeprefix("torch.")
        return [self.cache._read(side, sequence, "torch", name) for side in ("keys", "values")]

    def _stored_batch(self, like: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the cache, [sequences, heads, columns, head_dim], with zeros for padding."""
        lengths = self.cache.lengths
        shape = (len(lengths), self.cache.kv_heads, columns, self.cache.head_dim)
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        for s, length in enumerate(lengths):
            keys[s, :, columns - length :], values[s, :, columns - length :] = self._stored(s, like.dtype)
        return keys, values

    def get_seq_length(self) -> int:
        self._catch_up()
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.cache is not None:
            self.cache.clear()
        self.columns = self.stored = self.before = 0

    def _reorder(self, sources: list[int]) -> None:
        if self.cache is None:
            return
        self._catch_up()
        self.cache.reorder(sources)
        if self.captured and sources:
            self.before = self.stored - self.cache.lengths[0]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        repeats = _checks.integer("repeats", repeats, 1)
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


def _alone(starts: list[int] | None, count: int) -> list[int]:
    """The sequences with one new token: it sees what is stored, whatever its batch mates brought."""
    return [s for s, start in enumerate(starts or []) if start == count - 1]


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
        self.padding = None if padding is None else padding.cpu()

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


def _layer_kinds(config: Any) -> list[str]:
    """The kind of attention of each layer. Raises ValueError."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    known = {"full_attention", "sliding_attention"}
    if set(kinds) - known or "full_attention" not in kinds:
        raise ValueError(
            f"config: has layers {sorted(set(kinds))}, expected full_attention in some and no others than"
            f" {' and '.join(sorted(known))}"
        )
    return list(kinds)


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
    generation). Layers with a sliding window keep the tokens of it as they are.

    Each layer's cache is on the device of its keys. On a CUDA device single tokens are generated without
    waiting for it: values that cannot be stored, and masks that are not those of the prompt with ones for new
    tokens, raise their error with a later call.

    Args:
        config: of the model (``model.config``), some of whose layers attend to all earlier tokens.
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
        kinds = _layer_kinds(text)
        if padding is not None and (not isinstance(padding, torch.Tensor) or padding.ndim != 2):
            raise TypeError("padding: expected a tensor [sequences, tokens] or None")
        self.format = parse_kv_format(format)
        self.prefill = _checks.choice("prefill", prefill, _PREFILLS)
        capacity = _checks.integer("capacity", capacity, 0)
        needed = self.format.kind == "kvquant"
        if not isinstance(calibration, KVCalibration) if needed else calibration is not None:
            got = "none" if calibration is None else _checks.type_name(calibration)
            expected = "a KVCalibration (ql.kv.calibrate)" if needed else "none"
            raise ValueError(f"calibration: got {got}, expected {expected} for {self.format}")
        if needed and calibration.format != self.format:
            raise ValueError(f"calibration: is for {calibration.format}, expected {self.format}")
        if needed and len(calibration.layers) != text.num_hidden_layers:
            raise ValueError(
                f"calibration: has {len(calibration.layers)} layers, expected {text.num_hidden_layers}"
            )
        settings = _Settings(text, self.format, prefill, capacity, padding, calibration)
        self._padding = Padding()
        leader = kinds.index("full_attention")
        layers = [
            _Layer(settings, self._padding, index, index == leader)
            if kind == "full_attention"
            else DynamicSlidingWindowLayer(text.sliding_window)
            for index, kind in enumerate(kinds)
        ]
        super().__init__(layers=layers)

    def _quantized(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        sources = beam_idx.tolist()  # once for all layers: it waits for the device
        for layer in self.layers:
            if isinstance(layer, _Layer):
                layer._reorder(sources)
            else:
                layer.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self._quantized():  # before others are cut
            layer.crop(tokens_to_remove)

    def reserve(self, tokens: int) -> None:
        """Takes memory for `tokens` tokens of each sequence, those that are there included; after the prompt.

        A CUDA graph can then capture the step of a model for single tokens, with positions as a tensor of its
        own; each replay adds its tokens.
        """
        _checks.integer("tokens", tokens, 0)
        for layer in self._quantized():
            if layer.cache is None:
                raise RuntimeError("reserve: the cache has no tokens yet, expected a prompt (or capacity=)")
            layer.cache.reserve(tokens)

    def usage(self) -> KVUsage:
        """What all quantized layers hold together; ``tokens`` and the coded ones are those of the first."""
        self._padding.raise_if_wrong(wait=True)
        each = [layer.cache.usage() for layer in self._quantized() if layer.cache is not None]
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
        if isinstance(bits, tuple) and len(bits) != 2:
            raise ValueError(f"bits: got {len(bits)} of them, expected one number or a pair")
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
    attends with PyTorch's scaled_dot_product_attention. Raises TypeError for what is no such model.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model: got {_checks.type_name(model)}, expected a model of transformers")
    model.set_attn_implementation(ATTENTION)
    return model


def _exact_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """PyTorch's attention of the last tokens, [sequences, tokens, heads, head_dim].

    `visible` [sequences, keys]: those that are no padding. `window`: how many tokens one sees, itself
    included. Queries go in runs, so that masks stay small.
    """
    count, columns = queries.shape[2], keys.shape[2]
    groups = queries.shape[1] // keys.shape[1]
    plain = visible is None and (window is None or columns <= window)
    # Of PyTorch's kernels, those for 16 bits without a mask on a CUDA device take fewer KV heads.
    shared = groups > 1 and plain and queries.is_cuda and queries.dtype != torch.float32
    if groups > 1 and not shared:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    settings = {"scale": scale, "enable_gqa": shared}
    attend = torch.nn.functional.scaled_dot_product_attention
    if plain and count == columns:
        return attend(queries, keys, values, is_causal=True, **settings).transpose(1, 2)
    runs = []
    for first in range(0, count, _RUN):
        part = queries[:, :, first : first + _RUN]
        rows, end = part.shape[2], columns - count + first + part.shape[2]
        begin = 0 if window is None else max(0, end - rows - window + 1)
        seen = (x[:, :, begin:end] for x in (keys, values))
        if plain and queries.is_cuda:
            runs.append(attend(part, *seen, attn_mask=causal_lower_right(rows, end), **settings))
            continue
        mask = torch.ones(rows, end - begin, dtype=torch.bool, device=queries.device).tril(end - begin - rows)
        if window is not None:
            mask = mask.triu(end - begin - rows - window + 1)
        mask = mask[None, None]
        if visible is not None:
            mask = mask & visible.to(queries.device)[:, None, None, begin:end]
        out = attend(part, *seen, attn_mask=mask, **settings)
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
    window = kwargs.get("sliding_window")
    layer = getattr(key, "_quantloom_layer", None)
    if layer is not None:
        if window is not None:
            raise ValueError("attention: a layer of all earlier tokens has a sliding_window, expected none")
        states = (query.detach(), key.detach(), value.detach())
        return operators.append_attend(*states, attention_mask, layer.handle, scale), None
    if dropout:
        raise ValueError(f"dropout: got {dropout}, expected 0 with the attention 'quantloom'")
    # A cache with a window has the last keys alone.
    visible = None if attention_mask is None else attention_mask.bool()[:, -key.shape[2] :]
    return _exact_attention(query, key, value, visible, scale, window).contiguous(), None


def _mask(
    attention_mask: torch.Tensor | None = None,
    q_offset: Any = 0,
    q_length: int = 0,
    kv_offset: int = 0,
    kv_length: int = 0,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What the attention gets as its mask: that of padding alone."""
    if not allow_is_causal_skip:
        raise ValueError("attention: the model asks for a mask of its own, expected one of padding alone")
    if isinstance(q_offset, torch.Tensor) or (
        attention_mask is None and kv_offset + kv_length != q_offset + q_length
    ):
        raise ValueError(
            "past_key_values: gives keys of tokens to come, as static caches do; expected one that grows"
        )
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask
    # Looking at it waits for the device: not for each token.
    return None if q_offset == 0 and bool(attention_mask.all()) else attention_mask


transformers.AttentionInterface.register(ATTENTION, attention)
transformers.AttentionMaskInterface.register(ATTENTION, _mask)
