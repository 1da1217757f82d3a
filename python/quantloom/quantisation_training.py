"""Quantization-aware training: layers whose weights are quantized in every forward pass.

>>> from quantloom import quantisation_training as T
>>> T.convert(model, F.Scaled(3, "int", Q.BFLOAT16, (1, 64), "absmax"), "parameter", clip_gradient=True)
>>> optimiser = torch.optim.Adam([{"params": T.get_named_parameters(model, "weight"), "lr": 1e-4}, ...])
>>> ...                                        # train
>>> state = T.save(model)                      # tensors and a description; T.load_convert(fresh_model, state)

A weight is kept as its dense values (`master`), the format's points (`centroids`) and, if scales are
parameters, `scale`; its value is ``scale * nearest centroid of (master / scale)``. Gradients go straight
through the rounding to `master`, to the scale as the formula says, and to each centroid from the elements
that took it. Vector tables are trained likewise. `encode` stores what was trained. Arithmetic is float32
whatever the dtype of the weights, and centroids are kept in float32, because a fine grid rounded to bfloat16
is no longer even. Needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import fit as F
from quantloom import formats as Q
from quantloom._training_weights import (
    Quantise_STE,
    ScalingMode,
    Sign3D8Weight,
    StraightThrough,
    UnquantisedWeight,
    VectorWeight,
    Weight,
    is_sign_3d8,
    is_vector,
    is_weight_module,
)

__all__ = [
    "Embedding",
    "Linear",
    "Quantise_STE",
    "ScalingMode",
    "Sign3D8Weight",
    "StraightThrough",
    "UnquantisedWeight",
    "VectorWeight",
    "Weight",
    "convert",
    "count_bits",
    "count_parameters",
    "encode",
    "get_named_parameters",
    "load_convert",
    "load_encoded",
    "save",
]

FmtSpec: TypeAlias = "Q.TensorFormat | F.Scaled"
Mode: TypeAlias = Literal["qat", "one-shot"]
Kind: TypeAlias = Literal["weight", "scale", "centroids", "other"]


class Linear(nn.Module):
    """A Linear layer with a `Weight` (or another weight module of this package).

    With an `activation_fmt` the input, taken as rows ``[tokens, in_features]``, is quantized too; its
    gradient passes straight through.
    """

    def __init__(
        self,
        weight: nn.Module,
        bias: nn.Parameter | None = None,
        activation_fmt: Q.TensorFormat | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.activation_fmt = activation_fmt
        self.out_features, self.in_features = weight.shape

    def forward(self, input: Tensor) -> Tensor:
        if self.activation_fmt is not None:
            rows = input.detach().reshape(-1, input.shape[-1])
            input = StraightThrough.apply(input, self.activation_fmt.quantise(rows).view(input.shape))
        return nn.functional.linear(input, self.weight(), self.bias)

    def extra_repr(self) -> str:
        return f"activation_fmt={self.activation_fmt}" if self.activation_fmt is not None else ""


class Embedding(nn.Module):
    """An Embedding with a `Weight` (or another weight module of this package)."""

    def __init__(
        self, weight: nn.Module, padding_idx: int | None = None, scale_grad_by_freq: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.padding_idx = padding_idx
        self.scale_grad_by_freq = scale_grad_by_freq
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(
            input, self.weight(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


def convert(
    module: nn.Module,
    fmt_spec: FmtSpec | dict[str, FmtSpec],
    scaling_mode: ScalingMode,
    clip_gradient: bool,
    error_weight: Mapping[str, Tensor] | None = None,
    activation_fmt: Q.TensorFormat | None = None,
    mode: Mode = "qat",
) -> None:
    """Replaces every Linear and Embedding of `module`, `module` itself included, by a trainable quantized
    one.

    A weight that several layers share stays shared.

    Args:
        fmt_spec: a format, or an `F.Scaled` that is fitted to each weight, or one of these for each weight by
            its name ("layer.weight"). Weights can be trained in a `Q.LinearScalingFormat` of scalar elements,
            vectors or `Q.Sign3D8Format`, the first two also inside a `Q.SparseFormat`; elements take the
            nearest centroid, whatever rounding the format itself asks for. With a dtype (`Q.TorchFormat`,
            such as `Q.BFLOAT16`) a weight is left as it is, in the dtype it has.
        scaling_mode: "parameter": scales are parameters, which start as the format has them. "dynamic": they
            are computed from `master` and rounded to the scale format in every pass, gradients included.
        clip_gradient: no gradient for elements more than half a step beyond the outermost centroids.
        error_weight: weights of squared errors for the fit, by the weight's full name.
        activation_fmt: also quantize the inputs of Linear layers.
        mode: "one-shot" quantizes once (any format), then trains the dense values freely: what a direct cast
            costs after the same training.

    Raises TypeError and ValueError before anything is replaced: for subclasses of Linear and Embedding, whose
    forward is unknown, for an Embedding with max_norm or sparse gradients, and for formats that do not fit.
    """
    _checks.choice("scaling_mode", scaling_mode, ("parameter", "dynamic"))
    _checks.choice("mode", mode, ("qat", "one-shot"))
    _checks.boolean("clip_gradient", clip_gradient)
    layers = _layers(module)
    names = {f"{name}.weight" if name else "weight": layer for name, layer in layers.items()}
    first_name = {layer.weight: name for name, layer in reversed(names.items())}
    specs = fmt_spec if isinstance(fmt_spec, dict) else dict.fromkeys(names, fmt_spec)
    missing, unknown = sorted(set(first_name.values()) - set(specs)), sorted(set(specs) - set(names))
    if missing or unknown:
        raise ValueError(f"fmt_spec: no entry for {missing[:3]}, entries for unknown weights {unknown[:3]}")

    weights: dict[nn.Parameter, nn.Module] = {}
    with torch.no_grad():
        for parameter, name in first_name.items():
            spec = specs[name]
            if not isinstance(spec, (Q.TensorFormat, F.Scaled)):
                raise TypeError(
                    f"fmt_spec: got {_checks.type_name(spec)}, expected Q.TensorFormat or F.Scaled"
                )
            value = parameter.detach()
            if isinstance(spec, F.Scaled):
                if error_weight is not None and name not in error_weight:
                    raise ValueError(f"error_weight: got no entry {name!r}, expected one for every weight")
                spec = spec.fit(value, None if error_weight is None else error_weight[name])
            try:
                weights[parameter] = _weight(value, spec, scaling_mode, clip_gradient, mode)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            weights[parameter].train(module.training)
    for name, layer in layers.items():
        _replace(module, name, _layer(layer, weights[layer.weight], activation_fmt))


def get_named_parameters(module: nn.Module, kind: Kind) -> list[tuple[str, nn.Parameter]]:
    """The parameters of one kind, with their names, shared ones once; the four kinds have no parameter in
    common.

    - "weight": the values of converted layers (`master`, `sparse_weight`, dense ones of a one-shot
      conversion)
    - "scale": trainable scales
    - "centroids": trainable centroids
    - "other": everything else, such as biases and norms
    """
    _checks.choice("kind", kind, ("weight", "scale", "centroids", "other"))
    kinds = {}
    for owner in module.modules():
        if is_weight_module(owner):
            for name, parameter in owner.named_parameters(recurse=False):
                kinds[parameter] = name if name in ("scale", "centroids") else "weight"
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if kinds.get(parameter, "other") == kind
    ]


def count_bits(module: nn.Module, compute_dtype: torch.dtype, include_other: bool = True) -> float:
    """Nominal bits of a converted module: its weights (`Weight.count_bits`), shared ones once, and the other
    parameters, if included, at the width of `compute_dtype`."""
    weights = {owner for owner in module.modules() if is_weight_module(owner)}
    total = sum(owner.count_bits(compute_dtype) for owner in weights)
    if include_other:
        inside = {parameter for owner in weights for parameter in owner.parameters()}
        total += sum(p.numel() for p in module.parameters() if p not in inside) * compute_dtype.itemsize * 8
    return total


def count_parameters(module: nn.Module, include_other: bool = True) -> int:
    """Weights as dense ones, shared ones once, and the other parameters, if included."""
    weights = {owner for owner in module.modules() if is_weight_module(owner)}
    total = sum(math.prod(owner.shape) for owner in weights)
    if include_other:
        inside = {parameter for owner in weights for parameter in owner.parameters()}
        total += sum(p.numel() for p in module.parameters() if p not in inside)
    return total


def encode(module: nn.Module, scale_format: Q.ScalarFormat | None = None) -> dict[str, Q.Encoded | Tensor]:
    """The trained weights of a converted module as bytes, by the names they had before the conversion, shared
    ones once; `Q.save_encoded` writes them to a file. Weights that were left in their dtype, or quantized in
    one shot and then trained freely, are dense: plain tensors.

    `load_encoded` puts them into a module that was not converted.

    Args:
        scale_format: of scales that are parameters; None: that of each format.

    Raises what the weights' `encode` raises.
    """
    result: dict[str, Q.Encoded | Tensor] = {}
    for name, owner in module.named_modules():
        if isinstance(owner, UnquantisedWeight):
            result[name] = owner.weight.detach()
        elif is_weight_module(owner):
            result[name] = owner.encode(scale_format if owner.scaling_mode == "parameter" else None)
    return result


def load_encoded(module: nn.Module, tensors: Mapping[str, Q.Encoded | Tensor]) -> None:
    """Sets parameters of a module to encoded or plain tensors, by name, each in its own dtype.

    Raises ValueError for names that the module does not have, shapes that differ, and bytes that do not
    decode; `module` is unchanged then.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    unknown = sorted(set(tensors) - set(parameters))
    if unknown:
        raise ValueError(f"tensors: got {unknown[:3]}, which the module does not have")
    values = {}
    for name, item in tensors.items():
        if tuple(item.shape) != tuple(parameters[name].shape):
            raise ValueError(
                f"tensors[{name!r}]: got shape {list(item.shape)}, expected {list(parameters[name].shape)}"
            )
        values[name] = item.decode() if isinstance(item, Q.Encoded) else item
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def save(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a converted module and, in the entry ``_quantisation_meta``, its formats and settings
    as bytes of JSON; `safetensors.torch.save_file` can write it (after cloning tensors that share memory).

    Raises ValueError for a module that was converted in several calls with different settings.
    """
    from quantloom import _training_files

    return _training_files.save(module)


def load_convert(module: nn.Module, state: Mapping[str, Tensor] | Any) -> None:
    """Converts a module like the one that `save` saw, and loads its tensors.

    Args:
        module: not converted; the same layers, shapes and dtypes as the module before its conversion.
        state: what `save` returned, or the path of a safetensors file with it.

    Raises ValueError for a state that is damaged, hostile or of another module, and OSError for a file that
    cannot be read; `module` is unchanged then.
    """
    from quantloom import _training_files

    _training_files.load_convert(module, state)


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Embedding by its name; a layer that is in several places by each of them."""
    layers = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        if type(layer) not in (nn.Linear, nn.Embedding):
            raise TypeError(
                f"{name}: got {_checks.type_name(layer)}, expected nn.Linear or nn.Embedding itself"
            )
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
            raise ValueError(
                f"{name}: got max_norm={layer.max_norm}, sparse={layer.sparse}, expected an Embedding without"
            )
        layers[name] = layer
    return layers


def _weight(
    value: Tensor, fmt: Q.TensorFormat, scaling_mode: ScalingMode, clip_gradient: bool, mode: Mode
) -> nn.Module:
    if mode == "one-shot":
        return UnquantisedWeight(fmt.quantise(value), fmt, one_shot=True)
    if isinstance(fmt, Q.TorchFormat):
        return UnquantisedWeight(value, fmt)
    if is_sign_3d8(fmt):
        return Sign3D8Weight(value, fmt, scaling_mode, clip_gradient)
    if is_vector(fmt):
        return VectorWeight(value, fmt, scaling_mode, clip_gradient)
    return Weight(value, fmt, scaling_mode, clip_gradient)


def _layer(layer: nn.Module, weight: nn.Module, activation_fmt: Q.TensorFormat | None) -> nn.Module:
    if isinstance(layer, nn.Linear):
        result: nn.Module = Linear(weight, layer.bias, activation_fmt)
    else:
        result = Embedding(weight, layer.padding_idx, layer.scale_grad_by_freq)
    return result.train(layer.training)


def _replace(module: nn.Module, name: str, replacement: nn.Module) -> None:
    if name:
        module.set_submodule(name, replacement)
    else:
        # The caller holds the module itself, so it must become the other one.
        module.__class__, module.__dict__ = replacement.__class__, replacement.__dict__
