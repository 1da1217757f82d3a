"""Tables for KVQuant from the keys and values of a text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers

from quantloom import _checks, _fitting
from quantloom.kv.format import KVFormat, parse_kv_format
from quantloom.kv.tables import KVCalibration, KVTables, RotaryEmbedding

__all__ = ["calibrate"]

_SMALLEST_SCALE = 2.0**-24


class _Recorder(transformers.DynamicCache):
    """Hands keys and values on, and keeps copies of them and of the squares of their gradients."""

    def __init__(self, layers: int, gradients: bool) -> None:
        super().__init__()
        self.gradients = gradients
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.key_gradients: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.value_gradients: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ):
        for x, store, gradients in (
            (key_states, self.keys, self.key_gradients),
            (value_states, self.values, self.value_gradients),
        ):
            store[layer_idx].append(_tokens(x))
            if self.gradients:
                x.register_hook(lambda g, to=gradients[layer_idx]: to.append(_tokens(g)))
        return key_states, value_states


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, head_dim] as float32 [tokens, heads, head_dim] on the CPU."""
    return x.detach()[0].transpose(0, 1).float().cpu().contiguous()


def calibrate(
    model: Any,
    ids: Any,
    format: KVFormat | str = "kvquant:4:1%",
    *,
    windows: int = 16,
    window: int = 512,
    fisher: bool = True,
    q_norm: bool = False,
    pre_rotary: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> KVCalibration:
    """Finds the tables of a kvquant format (KVQuant: Hooper et al., 2024) for each layer of a model.

    Of the keys of each channel, the range between the quantiles that leave out the share of outliers; of the
    values of each token and head, the least range without its outliers. Then, for keys and for values, the
    table with the least squared error of the elements inside, by k-means.

    Args:
        model: a causal language model of transformers.
        ids: token ids, one-dimensional integers; windows are cut from their start.
        format: of the kind kvquant.
        windows, window: how many, and their tokens; the format's first ones of each do not count.
        fisher: weights the error of an element by the square of the gradient of the text's cross entropy with
            respect to it; False: equally.
        q_norm: shifts and scales tables so that mean and deviation of decoded elements are those of the exact
            ones (KVQuant's Q-Norm, for 2 bits).
        pre_rotary: keys are stored without their rotary embeddings, where the model has any.
        progress: called with the windows done and all of them, then layers.

    The keys and values of all windows are held in memory, with their gradients: 16 bytes for each element of
    keys. Raises TypeError or ValueError naming the argument.
    """
    format = parse_kv_format(format)
    if format.kind != "kvquant":
        raise ValueError(f"format: got {format}, expected one of the kind kvquant")
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model: got {_checks.type_name(model)}, expected a model of transformers")
    windows = _checks.integer("windows", windows, 1)
    window = _checks.integer("window", window, format.first + 2)
    for name, value in (("fisher", fisher), ("q_norm", q_norm), ("pre_rotary", pre_rotary)):
        _checks.boolean(name, value)
    text = model.config.get_text_config(decoder=True)
    rows = _windows(ids, windows, window, text.vocab_size)
    rotary = _rotary(model) if pre_rotary else None
    recorder = _Recorder(text.num_hidden_layers, fisher)
    with _evaluating(model):
        for done, row in enumerate(rows):
            if progress is not None:
                progress(done, windows)
            _run(model, torch.from_numpy(row[None]), recorder, fisher)
    layers = []
    for layer in range(text.num_hidden_layers):
        if progress is not None:
            progress(layer, text.num_hidden_layers)
        recorded = [recorder.keys, recorder.values, recorder.key_gradients, recorder.value_gradients]
        keys, values, key_gradients, value_gradients = (each[layer] for each in recorded)
        if len(keys) != windows:
            raise ValueError(f"model: layer {layer} gave keys {len(keys)} times, expected {windows}")
        if rotary is not None:
            keys = [_turned_back(x, rotary) for x in keys]
            key_gradients = [_turned_back(x, rotary, inverse=False) for x in key_gradients]
        stacked = [
            torch.cat([x[format.first :] for x in each]) if each else None
            for each in (keys, values, key_gradients, value_gradients)
        ]
        layers.append(_fit_layer(format, *stacked, q_norm))
        for each in recorded:
            each[layer] = []
    if progress is not None:
        progress(text.num_hidden_layers, text.num_hidden_layers)
    return KVCalibration(format, tuple(layers), rotary)


def _run(model: Any, ids: torch.Tensor, recorder: _Recorder, fisher: bool) -> None:
    embeddings = model.get_input_embeddings()
    ids = ids.to(embeddings.weight.device)
    with torch.set_grad_enabled(fisher):
        inputs = embeddings(ids).detach().requires_grad_(fisher)
        logits = model(inputs_embeds=inputs, past_key_values=recorder, use_cache=True).logits[0]
        if fisher:
            loss = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum")
            loss.backward()


def _windows(ids: Any, windows: int, window: int, vocabulary: int) -> np.ndarray:
    array = np.asarray(ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"ids: got {array.dtype} {list(array.shape)}, expected integers [tokens]")
    if array.size < windows * window:
        raise ValueError(f"ids: got {array.size} tokens, expected at least {windows * window}")
    array = array[: windows * window].astype(np.int64)
    if array.min() < 0 or array.max() >= vocabulary:
        raise ValueError(f"ids: span [{array.min()}, {array.max()}], expected ids in [0, {vocabulary})")
    return array.reshape(windows, window)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and with gradients for activations alone."""
    training = model.training
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


def _rotary(model: Any) -> RotaryEmbedding | None:
    """The rotary embedding that all layers of a model share."""
    found = [
        module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
    ]
    if not found:
        return None
    kinds = {str(getattr(module, "rope_type", "default")) for module in found}
    frequencies = [module.inv_freq.detach().float().cpu() for module in found]
    if kinds & {"dynamic", "longrope"} or any(not torch.equal(x, frequencies[0]) for x in frequencies):
        raise ValueError(
            f"model: has rotary embeddings {sorted(kinds)} that differ between layers or lengths, expected"
            f" one set of frequencies (pass pre_rotary=False)"
        )
    scaling = float(getattr(found[0], "attention_scaling", 1.0))
    return RotaryEmbedding(frequencies[0].numpy(), scaling)


def _turned_back(x: torch.Tensor, rotary: RotaryEmbedding, inverse: bool = True) -> torch.Tensor:
    """[tokens, heads, head_dim] before rotation; gradients, whose map is the transpose, without inverse."""
    cosines, sines = (torch.from_numpy(a)[:, None] for a in rotary.angles(x.shape[0]))
    half = cosines.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    factor = 1 / rotary.scaling**2 if inverse else 1.0
    turned = [(a * cosines + b * sines) * factor, (b * cosines - a * sines) * factor]
    return torch.cat([*turned, x[..., 2 * half :]], dim=-1)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def _fit_layer(
    format: KVFormat,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_gradients: torch.Tensor | None,
    value_gradients: torch.Tensor | None,
    q_norm: bool,
) -> KVTables:
    share = format.outliers
    flat = keys.numpy()
    low, high = (
        torch.from_numpy(np.quantile(flat, q, axis=0).astype(np.float32)) for q in (share / 2, 1 - share / 2)
    )
    scale, middle = _half(((high - low) / 2).clamp(min=_SMALLEST_SCALE)), _half((high + low) / 2)
    key_bounds, key_values = _fit_table(format.key_bits, keys, scale, middle, key_gradients, q_norm)
    value_scale, value_middle = _least_ranges(values, share)
    value_bounds, value_values = _fit_table(
        format.value_bits, values, value_scale, value_middle, value_gradients, q_norm
    )
    return KVTables(key_bounds, key_values, value_bounds, value_values, scale.numpy(), middle.numpy())


def _least_ranges(values: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token and head, half of the least range without outliers and its middle: [tokens, heads, 1]."""
    tokens, _, dim = values.shape
    ends = torch.floor(torch.arange(tokens + 1, dtype=torch.float64) * dim * round(share * 10000) / 10000)
    counts = (ends[1:] - ends[:-1]).long().clamp(max=dim - 1)
    ordered = values.sort(dim=-1).values
    low, high = torch.empty(values.shape[:2]), torch.empty(values.shape[:2])
    for count in counts.unique().tolist():
        rows = ordered[counts == count]
        best = (rows[..., dim - 1 - count :] - rows[..., : count + 1]).argmin(dim=-1, keepdim=True)
        low[counts == count] = rows.gather(-1, best)[..., 0]
        high[counts == count] = rows.gather(-1, best + dim - 1 - count)[..., 0]
    half = _half(((high - low) / 2).clamp(min=_SMALLEST_SCALE))
    return half[..., None], _half((high + low) / 2)[..., None]


def _fit_table(
    bits: int,
    x: torch.Tensor,
    scale: torch.Tensor,
    middle: torch.Tensor,
    gradients: torch.Tensor | None,
    q_norm: bool,
) -> tuple[np.ndarray, np.ndarray]:
    normalized = (x - middle) / scale
    # The ends of a range may lie outside of it by the rounding of scale and middle to float16.
    inside = normalized.abs() <= 1.01
    weights = (scale.expand_as(x) if gradients is None else scale * gradients).square()[inside]
    sample = normalized[inside].contiguous()
    largest = weights.max() if weights.numel() else torch.tensor(0.0)
    weights = weights / largest if largest > 0 else torch.ones_like(weights)
    table = torch.from_numpy(
        _fitting.lloyd_max(sample.numpy(), 2**bits, weights=weights.numpy()).centroids.copy()
    )
    bounds = (table[1:] + table[:-1]) / 2
    if q_norm:
        decoded = table[torch.bucketize(sample, bounds)].double()
        factor = float(sample.double().std() / decoded.std().clamp(min=1e-12))
        table = table * factor + (float(sample.double().mean()) - float(decoded.mean()) * factor)
    return bounds.numpy(), _half(table).numpy()
