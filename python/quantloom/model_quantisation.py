"""Whole models in the formats of `quantloom.formats`, in place.

>>> from quantloom import fit as F, formats as Q, model_quantisation as M
>>> log = M.quantise_2d_fixed(model, F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms",
compressor="optimal"))
>>> log["bits_per_param"], log["params"]["layer.weight"]["rmse"]

Every matrix (parameter with two dimensions) is replaced by what its format decodes to, in its own dtype;
other parameters stay and count with the bits of their dtype. A tensor that two modules share is quantized
once. Needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import fit as F
from quantloom import formats as Q

__all__ = [
    "DEFAULT_IGNORE",
    "FmtSpec",
    "named_matrices",
    "no_quantisation",
    "quantise_2d_fixed",
    "quantise_2d_heuristic",
    "quantise_2d_variable",
    "quantise_parameter_",
]

FmtSpec: TypeAlias = "Q.TensorFormat | F.Scaled"
"""A format, or the description of one that is fitted to each matrix."""

DEFAULT_IGNORE = ("vision_model", "multi_modal_projector")
"""Parts of dotted names: parameters that have one are neither quantized nor counted as quantized."""


def quantise_parameter_(
    param: nn.Parameter,
    fmt_spec: FmtSpec,
    error_weight: Tensor | None = None,
    encoded: bool = False,
) -> None:
    """Quantizes one parameter in place and describes it in ``param._quantised``:

    - ``fmt``: the format, fitted if `fmt_spec` was not yet
    - ``bits``: its nominal count for this tensor
    - ``rmse``: the root of the mean squared change, not normalised
    - ``encoded``, if asked for: the tensor as it is stored (`quantloom.formats.Encoded`); the parameter's new
      value is what decodes from it

    Args:
        error_weight: a weight >= 0 for each element's squared error, in the parameter's shape, where the fit
            can use one (`F.Scaled.supports_error_weight`).

    Raises ValueError if the parameter was quantized before, holds NaN or infinities, or cannot have the
    format.
    """
    _check_spec(fmt_spec)
    if hasattr(param, "_quantised"):
        raise ValueError(f"param: a parameter of shape {list(param.shape)} was quantized before")
    _check_weight("error_weight", error_weight, param, fmt_spec)
    with torch.no_grad():
        value = param.detach()
        if not bool(value.isfinite().all()):
            raise ValueError("param: got NaN or infinities, expected finite values")
        fmt = fmt_spec.fit(value, error_weight) if isinstance(fmt_spec, F.Scaled) else fmt_spec
        log = {"fmt": fmt, "bits": fmt.count_bits_tensor(value)}
        if encoded:
            log["encoded"] = fmt.encode(value)
            new_value = log["encoded"].decode().to(value)
        else:
            new_value = fmt.quantise(value)
        log["rmse"] = float((new_value.float() - value.float()).square().mean(dtype=torch.float64).sqrt())
        param.copy_(new_value)
        param._quantised = log


def named_matrices(
    model: nn.Module, ignore: tuple[str, ...] = DEFAULT_IGNORE
) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are quantized: two dimensions, and no part of the dotted name in `ignore`."""
    return [
        (name, param)
        for name, param in model.named_parameters()
        if param.ndim == 2 and not _ignored(name, ignore)
    ]


def no_quantisation(
    model: nn.Module, ignore: tuple[str, ...] = DEFAULT_IGNORE, verbose_log: bool = False
) -> dict[str, Any]:
    """The log of the model as it is, nothing quantized."""
    return _log(model, ignore, verbose_log)


def quantise_2d_fixed(
    model: nn.Module,
    fmt_spec: FmtSpec,
    error_weight: Mapping[str, Tensor] | None = None,
    ignore: tuple[str, ...] = DEFAULT_IGNORE,
    verbose_log: bool = False,
    encoded: bool = False,
) -> dict[str, Any]:
    """Quantizes all matrices alike.

    Args:
        error_weight: weights of the squared errors for `F.Scaled`, by parameter name.
        ignore: parts of dotted names; parameters that have one stay as they are.
        verbose_log: keep the formats in the log.
        encoded: encode each matrix and set the parameter to what decodes; the log then tells measured bits.

    Returns ``bits_per_param``, nominal, over all parameters of the model, and ``params``: ``bits`` and
    ``rmse`` (and ``fmt``) by name. With `encoded` also ``measured_bits_per_param`` and ``measured_bits`` and
    ``encoded`` for each parameter, tables and everything that is stored included.

    Arguments are checked before the first matrix is touched. A matrix that cannot be fitted raises ValueError
    naming it; matrices before it are quantized by then.
    """
    _check_spec(fmt_spec)
    specs = {name: fmt_spec for name, _ in named_matrices(model, ignore)}
    return _quantise(model, specs, error_weight, ignore, verbose_log, encoded)


def quantise_2d_variable(
    model: nn.Module,
    fmt_spec: F.Scaled,
    fisher_sum: Mapping[str, float],
    error_weight: Mapping[str, Tensor] | None = None,
    min_element_bits: float | None = None,
    ignore: tuple[str, ...] = DEFAULT_IGNORE,
    verbose_log: bool = False,
    encoded: bool = False,
) -> dict[str, Any]:
    """Quantizes each matrix with as many bits as its sensitivity asks for.

    Where errors shrink by 2 for each bit, the sum of Fisher-weighted squared errors is least for
    ``b_t = b0 + log2(RMS_t) + log2(mean Fisher_t) / 2``. b0 makes the mean over elements
    ``fmt_spec.element_bits``; then the bits are rounded to integers, unless a compressor is set, and raised
    to the minimum, so that the model's mean is near the target, not at it.

    Args:
        fisher_sum: for each matrix the sum of its diagonal Fisher information
            (`experiments.fisher.fisher_sum`). Raises ValueError before any work if one is missing or is not
            above 0.
        min_element_bits: None: 3 for the family "fp", else 2.

    Other arguments, the result and errors as `quantise_2d_fixed`.
    """
    bits = _variable_bits(model, fmt_spec, fisher_sum, min_element_bits, ignore)
    specs = {name: dataclasses.replace(fmt_spec, element_bits=width) for name, width in bits.items()}
    return _quantise(model, specs, error_weight, ignore, verbose_log, encoded)


def quantise_2d_heuristic(
    model: nn.Module,
    fmt_spec: F.Scaled,
    highp_add_bits: float,
    highp_names: tuple[str, ...],
    highp_first_layers: int,
    highp_last_layers: int,
    error_weight: Mapping[str, Tensor] | None = None,
    ignore: tuple[str, ...] = DEFAULT_IGNORE,
    verbose_log: bool = False,
    encoded: bool = False,
) -> dict[str, Any]:
    """Quantizes with `highp_add_bits` more bits where models are said to be sensitive: parameters that have a
    part of their dotted name in `highp_names`, and the first and last so many decoder layers
    (``model.model.layers`` or ``model.language_model.model.layers``, as transformers names them).

    Other arguments, the result and errors as `quantise_2d_fixed`.
    """
    _check_scaled(fmt_spec)
    _checks.integer("highp_first_layers", highp_first_layers, 0)
    _checks.integer("highp_last_layers", highp_last_layers, 0)
    chosen = set()
    if highp_first_layers or highp_last_layers:
        layers = list(_decoder_layers(model))
        chosen_layers = layers[:highp_first_layers] + layers[max(len(layers) - highp_last_layers, 0) :]
        chosen = {parameter for layer in chosen_layers for parameter in layer.parameters()}
    more = dataclasses.replace(fmt_spec, element_bits=fmt_spec.element_bits + highp_add_bits)
    specs = {
        name: more if parameter in chosen or _ignored(name, highp_names) else fmt_spec
        for name, parameter in named_matrices(model, ignore)
    }
    return _quantise(model, specs, error_weight, ignore, verbose_log, encoded)


def _quantise(model, specs, error_weight, ignore, verbose_log, encoded) -> dict[str, Any]:
    matrices = dict(named_matrices(model, ignore))
    for name, param in matrices.items():
        if hasattr(param, "_quantised"):
            raise ValueError(f"model: {name} was quantized before")
        if error_weight is not None:
            if name not in error_weight:
                raise ValueError(f"error_weight: got no entry {name!r}, expected one for every matrix")
            _check_weight(f"error_weight[{name!r}]", error_weight[name], param, specs[name])
    for name, param in matrices.items():
        weight = None if error_weight is None else error_weight[name].to(param.device)
        try:
            quantise_parameter_(param, specs[name], weight, encoded)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"Failed to quantise {name!r}: {error}") from error
    return _log(model, ignore, verbose_log)


def _log(model: nn.Module, ignore: tuple[str, ...], verbose: bool) -> dict[str, Any]:
    params: dict[str, Any] = {}
    bits = measured = count = 0
    all_encoded = True
    for name, param in model.named_parameters():
        count += param.numel()
        plain = param.numel() * param.itemsize * 8
        # Ignored parameters are there all the same: they count as they are stored.
        if _ignored(name, ignore) or not hasattr(param, "_quantised"):
            bits += plain
            measured += plain
            continue
        entry = dict(param._quantised)
        if "encoded" in entry:
            entry["measured_bits"] = entry["encoded"].size_in_bits
            measured += entry["measured_bits"]
        else:
            all_encoded = False
        bits += entry["bits"]
        if not verbose:
            del entry["fmt"]
        params[name] = entry
    if not count:
        raise ValueError("model: got no parameters, expected at least one")
    log = {"bits_per_param": bits / count, "params": params}
    if params and all_encoded:
        log["measured_bits_per_param"] = measured / count
    return log


def _variable_bits(
    model: nn.Module,
    fmt_spec: F.Scaled,
    fisher_sum: Mapping[str, float],
    min_element_bits: float | None,
    ignore: tuple[str, ...],
) -> dict[str, float]:
    _check_scaled(fmt_spec)
    if min_element_bits is None:
        min_element_bits = 3 if fmt_spec.element_family == "fp" else 2
    matrices = named_matrices(model, ignore)
    if not matrices:
        return {}
    for name, _ in matrices:
        value = fisher_sum.get(name)
        if value is None or not 0 < float(value) < float("inf"):
            raise ValueError(
                f"fisher_sum: got {value} for {name!r}, expected a finite sum > 0 for every matrix"
            )
    sizes = torch.tensor([param.numel() for _, param in matrices], dtype=torch.float64, device="cpu")
    squares = [param.detach().float().square().mean(dtype=torch.float64).cpu() for _, param in matrices]
    rms = torch.stack(squares).sqrt()
    if not bool((rms > 0).all()):
        raise ValueError(f"model: {matrices[int(rms.argmin())][0]} is all zeros, which asks for no bits")
    fisher = (
        torch.tensor([float(fisher_sum[name]) for name, _ in matrices], dtype=torch.float64, device="cpu")
        / sizes
    )
    delta = rms.log2() + 0.5 * fisher.log2()
    bits = fmt_spec.element_bits + delta - (delta * sizes).sum() / sizes.sum()
    if fmt_spec.compressor is None:
        bits = bits.round()
    result = {name: max(float(width), min_element_bits) for (name, _), width in zip(matrices, bits)}
    if fmt_spec.compressor is None:
        return {name: int(width) if float(width).is_integer() else width for name, width in result.items()}
    return result


def _decoder_layers(model: nn.Module) -> nn.Module:
    modules = dict(model.named_modules())
    for path in ("model.layers", "language_model.model.layers", "model.language_model.layers"):
        if path in modules:
            return modules[path]
    raise ValueError("model: found no decoder layers at model.layers, expected a model of transformers")


def _ignored(name: str, parts: tuple[str, ...]) -> bool:
    return not set(parts).isdisjoint(name.split("."))


def _check_spec(fmt_spec: Any) -> None:
    if not isinstance(fmt_spec, (Q.TensorFormat, F.Scaled)):
        raise TypeError(f"fmt_spec: got {_checks.type_name(fmt_spec)}, expected a Q.TensorFormat or F.Scaled")


def _check_scaled(fmt_spec: Any) -> None:
    if not isinstance(fmt_spec, F.Scaled):
        raise TypeError(
            f"fmt_spec: got {_checks.type_name(fmt_spec)}, expected F.Scaled, whose bits can change"
        )


def _check_weight(name: str, error_weight: Tensor | None, param: Tensor, fmt_spec: FmtSpec) -> None:
    if error_weight is None:
        return
    if not isinstance(fmt_spec, F.Scaled):
        raise ValueError(f"{name}: got a weight with a format that needs no fit, expected F.Scaled")
    if not fmt_spec.supports_error_weight:
        raise ValueError(f"{name}: got a weight, but the fit of {fmt_spec} cannot use one")
    if error_weight.shape != param.shape:
        raise ValueError(f"{name}: got shape {list(error_weight.shape)}, expected {list(param.shape)}")
