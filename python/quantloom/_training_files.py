"""The state of a converted module: its tensors and a description, and the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import fit as F
from quantloom import formats as Q
from quantloom import quantisation_training as T
from quantloom._training_weights import UnquantisedWeight, is_weight_module

META = "_quantisation_meta"
VERSION = 1
_MAX_META_BYTES = 1 << 26
_KEYS = {"version", "mode", "scaling_mode", "clip_gradient", "fmt", "activation_fmt"}


def save(module: nn.Module) -> dict[str, Tensor]:
    weights = {
        name: owner for name, owner in module.named_modules(remove_duplicate=False) if is_weight_module(owner)
    }
    if not weights:
        raise ValueError("module: got no converted layer, expected a module after `convert`")
    trained = [owner for owner in weights.values() if not isinstance(owner, UnquantisedWeight)]
    settings = {(owner.scaling_mode, owner.clip_gradient) for owner in trained}
    one_shot = {getattr(owner, "one_shot", False) for owner in weights.values()}
    if len(settings) > 1 or len(one_shot) > 1:
        raise ValueError("module: it was converted with several settings, expected one call of `convert`")
    scaling_mode, clip_gradient = settings.pop() if settings else ("dynamic", False)
    activations = {
        name: layer.activation_fmt
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, T.Linear) and layer.activation_fmt is not None
    }
    meta = {
        "version": VERSION,
        "mode": "one-shot" if one_shot.pop() else "qat",
        "scaling_mode": scaling_mode,
        "clip_gradient": clip_gradient,
        "fmt": {name: Q.TensorFormat.save(owner.fmt) for name, owner in weights.items()},
        "activation_fmt": {name: Q.TensorFormat.save(fmt) for name, fmt in activations.items()},
    }
    state = dict(module.state_dict())
    if META in state:
        raise ValueError(f"module: it has a tensor named {META!r}, which the description takes")
    text = bytearray(json.dumps(meta).encode())
    state[META] = torch.frombuffer(text, dtype=torch.uint8)
    return state


def load_convert(module: nn.Module, state: Any) -> None:
    if not isinstance(state, Mapping):
        state = _read(state)
    meta = _meta(state)
    if any(is_weight_module(owner) for owner in module.modules()):
        raise ValueError("module: got a converted module, expected one before `convert`")
    layers = T._layers(module)
    names = {f"{name}.weight" if name else "weight": name for name in layers}
    _same_names("fmt", meta["fmt"], names)
    linears = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    if not set(meta["activation_fmt"]) <= linears:
        raise ValueError(f"state: {META} quantizes inputs of layers that are no Linear layers of the module")

    weights: dict[nn.Parameter, nn.Module] = {}
    replacements = {}
    for weight_name, name in names.items():
        layer = layers[name]
        fmt = _load_format(f"fmt[{weight_name!r}]", meta["fmt"][weight_name])
        if layer.weight not in weights:
            weights[layer.weight] = _build(weight_name, layer.weight.detach(), fmt, meta)
        elif weights[layer.weight].fmt != fmt:
            raise ValueError(
                f"state: {META} has another format for {weight_name!r} than for the weight it shares"
            )
        activation = meta["activation_fmt"].get(name)
        if activation is not None:
            activation = _load_format(f"activation_fmt[{name!r}]", activation)
        replacements[name] = T._layer(layer, weights[layer.weight], activation)
    tensors = {name: value for name, value in state.items() if name != META}
    _check_tensors(tensors, _expected(module, replacements))
    for name, replacement in replacements.items():
        T._replace(module, name, replacement)
    module.load_state_dict(tensors)


def _read(path: Any) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    file = _checks.path("state", path)
    if not file.is_file():
        raise FileNotFoundError(f"state: no such file: {file}")
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"state: {file} is no readable safetensors file: {error}") from None


def _meta(state: Mapping[str, Tensor]) -> dict[str, Any]:
    raw = state.get(META)
    if not isinstance(raw, Tensor) or raw.dtype != torch.uint8 or raw.ndim != 1:
        raise ValueError(f"state: got no {META!r} of bytes, expected what `save` returns")
    if raw.numel() > _MAX_META_BYTES:
        raise ValueError(f"state: {META} has {raw.numel()} bytes, expected at most {_MAX_META_BYTES}")
    try:
        meta = json.loads(raw.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"state: {META} is no JSON: {error}") from None
    if not isinstance(meta, dict) or set(meta) != _KEYS:
        raise ValueError(f"state: {META} is not an object of {sorted(_KEYS)}")
    if meta["version"] != VERSION:
        raise ValueError(f"state: {META} has version {meta['version']!r}, expected {VERSION}")
    valid = {
        "mode": ("qat", "one-shot"),
        "scaling_mode": ("parameter", "dynamic"),
        "clip_gradient": (True, False),
    }
    for key, values in valid.items():
        if not any(
            meta[key] is value or meta[key] == value for value in values if type(meta[key]) is type(value)
        ):
            raise ValueError(f"state: {META} has {key} {meta[key]!r}, expected one of {values}")
    for key in ("fmt", "activation_fmt"):
        if not isinstance(meta[key], dict):
            raise ValueError(f"state: {META} has {key} {_checks.type_name(meta[key])}, expected an object")
    return meta


def _same_names(what: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"state: {what} lacks {len(missing)} {missing[:3]}; {len(unknown)} are unknown {unknown[:3]}"
        )


def _load_format(what: str, description: Any) -> Q.TensorFormat:
    try:
        fmt = Q.TensorFormat.load(description)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"state: {what} describes no format: {error}") from error
    if not isinstance(fmt, Q.TensorFormat) or isinstance(fmt, F.Scaled):
        raise ValueError(f"state: {what} describes a {_checks.type_name(fmt)}, expected a format")
    return fmt


def _build(name: str, value: Tensor, fmt: Q.TensorFormat, meta: dict[str, Any]) -> nn.Module:
    if meta["mode"] == "one-shot":
        return UnquantisedWeight(value, fmt, one_shot=True)
    try:
        with torch.no_grad():
            return T._weight(value, fmt, meta["scaling_mode"], meta["clip_gradient"], "qat")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"state: the format of {name!r} does not fit it: {error}") from error


def _expected(module: nn.Module, replacements: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The state dict that the module will have."""
    prefixes = tuple(f"{name}." if name else "" for name in replacements)
    expected = {key: value for key, value in module.state_dict().items() if not key.startswith(prefixes)}
    for name, replacement in replacements.items():
        expected.update(replacement.state_dict(prefix=f"{name}." if name else ""))
    return expected


def _check_tensors(tensors: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    _same_names("the state", tensors, expected)
    for name, like in expected.items():
        value = tensors[name]
        if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
            got = (
                f"{value.dtype} {list(value.shape)}"
                if isinstance(value, Tensor)
                else _checks.type_name(value)
            )
            raise ValueError(f"state: {name} is {got}, expected {like.dtype} {list(like.shape)}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"state: {name} holds NaN or infinities, expected finite values")
        if name.endswith(".sparse_idx"):
            size = expected[name.removesuffix("sparse_idx") + "master"].numel()
            if value.numel() and (int(value.min()) < 0 or int(value.max()) >= size):
                raise ValueError(f"state: {name} has indices outside [0, {size})")
            if value.unique().numel() != value.numel():
                raise ValueError(f"state: {name} has an index twice")
