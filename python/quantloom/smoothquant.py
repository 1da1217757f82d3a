"""Smoothing of activations: what makes them hard to round moves into the weights, before any rounding."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core
from quantloom.activations import ActivationFormat, parse_activations, round_activations
from quantloom.awq import ChannelScaling, ScaleChoice, quantize_with_scales
from quantloom.calibration import as_hessian
from quantloom.channel_scales import ChannelScales
from quantloom.formats import Format
from quantloom.quantizing import quantize
from quantloom.rounding import GPTQ, Nearest, Rounding
from quantloom.tensors import PackedTensor

__all__ = ["SmoothQuant", "search_smoothing"]

_SMALLEST_WEIGHT = 1e-5  # of a column, as the paper's code has it


@dataclass(frozen=True, eq=False)
class SmoothQuant(ChannelScaling):
    """Divides input channels by scales that make their maxima less different, and multiplies the weights by
    them, before both are rounded (SmoothQuant: Xiao, Lin, Seznec, Wu, Demouth and Han, 2023).

    ``s = max|X_j|**alpha / max|W_j|**(1 - alpha)`` for each input channel j, with the maximum over all layers
    that share the inputs. Scales keep to powers of ``2**(1/16)`` within 128 on both sides of their centre;
    channels that no token uses keep a scale of 1. For one matrix they stay beside it as a transform,
    ``ChannelScales``; in models they move into the layer before wherever that leaves the model's function
    exactly as it was.

    Args:
        then: the rounding of the scaled weights, without Hessians: ``Nearest(...)`` or ``GPTQ(...)``, or a
            short form.
        alpha: above 0, at most 1; None: the one with the least error at the outputs of the layers that
            share the inputs, both sides rounded, among ``1/steps, ..., (steps - 1)/steps`` and no scales.
        steps: of that search.
        explicit: in models, what to do with inputs whose scales fit into no layer before: True keeps them
            beside the layer, which divides its inputs at run time; False leaves it unscaled.
        activations: how inputs are rounded, an ``ActivationFormat`` or its short form, for the errors. None:
            ``"int8:token"``, and in a ``Recipe`` what that says.
        inputs: ``[tokens, k]``, a sample of the inputs. None only inside a ``Recipe``, or if `maxima` and
            `alpha` are given.
        maxima: ``[k]``, max \\|X_j\\|; None: those of `inputs`.
        hessian: for a `then` that needs one, and for the report.
        held_out: optional, a Hessian of other tokens, for the report.
    """

    then: Rounding = field(default_factory=Nearest)
    alpha: float | None = 0.5
    steps: int = 20
    explicit: bool = True
    activations: ActivationFormat | str | None = None
    inputs: Any = None
    maxima: Any = None
    hessian: Any = None
    held_out: Any = None

    name = "smoothquant"

    def __post_init__(self) -> None:
        self._check_then()
        if self.alpha is not None:
            object.__setattr__(self, "alpha", _alpha(self.alpha))
        object.__setattr__(self, "steps", _steps(self.steps))
        _checks.boolean("explicit", self.explicit)
        if self.activations is not None:
            object.__setattr__(self, "activations", parse_activations(self.activations))
        object.__setattr__(self, "hessian", as_hessian("hessian", self.hessian))
        object.__setattr__(self, "held_out", as_hessian("held_out", self.held_out))

    @property
    def spec(self) -> str:
        options = ["smoothquant"]
        if self.alpha is None:
            options.append("search" if self.steps == 20 else f"search={self.steps}")
        elif self.alpha != 0.5:
            options.append(f"alpha={self.alpha:g}")
        if not self.explicit:
            options.append("folded")
        then = "" if self.then.to_json() == Nearest().to_json() else f"+{self.then.spec}"
        return ":".join(options) + then

    def to_json(self) -> str:
        settings = {
            "activations": None if self.activations is None else json.loads(self.activations.to_json()),
            "alpha": self.alpha,
            "explicit": self.explicit,
            "rounding": "smoothquant",
            "steps": self.steps,
            "then": json.loads(self.then.to_json()),
        }
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, spec: str) -> SmoothQuant:
        """The rounding of a short form: ``smoothquant[:alpha=X|:search[=STEPS]][:folded][+ROUNDING]``."""
        own, plus, then = spec.partition("+")
        settings: dict[str, Any] = {"then": then} if plus else {}
        for option in own.split(":")[1:]:
            key, _, value = option.partition("=")
            try:
                if option == "folded":
                    update: dict[str, Any] = {"explicit": False}
                elif key == "alpha":
                    update = {"alpha": float(value)}
                elif option == "search" or (key == "search" and value.isdecimal()):
                    update = {"alpha": None} | ({"steps": int(value)} if value else {})
                else:
                    raise ValueError
            except ValueError:
                raise ValueError(
                    f"rounding: got option {option!r} in {spec!r}, expected alpha=X, search[=STEPS] or"
                    " folded; options of the rounding itself come after a plus, as in smoothquant+gptq"
                ) from None
            if settings.keys() & update.keys():
                raise ValueError(
                    f"rounding: got option {option!r} in {spec!r} beside another alpha or itself"
                )
            settings |= update
        return cls(**settings)

    @classmethod
    def from_fields(cls, settings: dict[str, Any]) -> SmoothQuant:
        """Reads the fields of ``to_json`` back. Raises ValueError."""
        from quantloom.activations import activations_from_json
        from quantloom.rounding import rounding_from_json

        known = {"activations", "alpha", "explicit", "steps", "then"}
        if settings.keys() != known:
            raise ValueError(f"rounding: got keys {sorted(settings)}, expected {sorted(known)}")
        activations = settings["activations"]
        return cls(
            rounding_from_json(json.dumps(settings["then"])),
            settings["alpha"],
            settings["steps"],
            settings["explicit"],
            None if activations is None else activations_from_json(json.dumps(activations)),
        )


def _alpha(value: Any) -> float:
    number = _checks.real("alpha", value, "a number above 0, at most 1")
    if not 0 < number <= 1:
        raise ValueError(f"alpha: got {number}, expected a number above 0, at most 1")
    return number


def _steps(value: Any) -> int:
    number = _checks.integer("steps", value, 2)
    if number > 1000:
        raise ValueError(f"steps: got {number}, expected at most 1000")
    return number


def _host(name: str, value: Any) -> np.ndarray:
    """A matrix as float32 NumPy."""
    value = value.detach().cpu() if _arrays.is_torch(value) else value
    return np.asarray(_arrays.cast(_arrays.matrix(name, value).value, "float32"))


def _column_maxima(values: np.ndarray) -> np.ndarray:
    return np.abs(values).max(0, initial=0).astype(np.float64)


def _maxima(value: Any, k: int) -> np.ndarray:
    value = value.detach().cpu().numpy() if _arrays.is_torch(value) else np.asarray(value)
    if value.shape != (k,) or value.dtype.kind not in "fiu":
        got = _arrays.shape_text(value.shape)
        raise ValueError(f"maxima: got {value.dtype} of shape {got}, expected numbers [{k}]")
    value = value.astype(np.float64)
    if not (np.isfinite(value).all() and (value >= 0).all()):
        raise ValueError("maxima: got negative or infinite numbers or NaN, expected finite ones >= 0")
    return value


def search_smoothing(
    layers: list[tuple[Any, Format]],
    maxima: Any = None,
    inputs: Any = None,
    *,
    alpha: float | None = None,
    steps: int = 20,
    activations: ActivationFormat | str | list[ActivationFormat | str | None] | None = "int8:token",
    powers_of_two: bool = False,
    threads: int = 0,
) -> ScaleChoice:
    """The channel scales of layers that share their inputs; see ``SmoothQuant``. Runs on the CPU.

    Args:
        layers: pairs of a weight matrix ``[n, k]`` and its format.
        maxima: ``[k]``, max \\|X_j\\|; None: those of `inputs`.
        inputs: ``[tokens, k]``, a sample of the inputs, needed to search alpha and for losses.
        alpha, steps: see ``SmoothQuant``.
        activations: how inputs are rounded; None: not at all; a list: for each layer. A static format takes
            the range of the sample.
        powers_of_two: scales are powers of two, by which anything can be divided exactly.
        threads: 0 for OpenMP's default. The result does not depend on it.

    The losses of the result are squared errors of the outputs per token, NaN without inputs.
    """
    if not isinstance(layers, list) or not layers:
        raise TypeError(f"layers: got {_checks.type_name(layers)}, expected a list of pairs")
    for pair in layers:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], Format)):
            raise TypeError(f"layers: got {_checks.type_name(pair)}, expected pairs of a matrix and a format")
    alpha = None if alpha is None else _alpha(alpha)
    steps, threads = _steps(steps), _checks.thread_count(threads)
    weights = [_host("w", w) for w, _ in layers]
    k = weights[0].shape[1]
    for w in weights:
        if w.shape[1] != k:
            raise ValueError(
                f"layers: got matrices of {k} and {w.shape[1]} columns, expected as many in each"
            )
    if inputs is None and (maxima is None or alpha is None):
        raise ValueError("inputs: got None, expected a sample [tokens, k], or both maxima and alpha")
    x = None if inputs is None else _host("inputs", inputs)
    if x is not None and x.shape[1] != k:
        raise ValueError(f"inputs: got shape {_arrays.shape_text(x.shape)}, expected [tokens, {k}]")
    largest = _maxima(_column_maxima(x) if maxima is None else maxima, k)
    if not isinstance(activations, list):
        activations = [activations] * len(layers)
    if len(activations) != len(layers):
        raise ValueError(f"activations: got {len(activations)} formats, expected {len(layers)}, as layers")
    rounded = [None if a is None else _of_the_sample(parse_activations(a)) for a in activations]

    columns = np.maximum.reduce([_column_maxima(w) for w in weights])
    columns = np.where(columns > 0, np.maximum(columns, _SMALLEST_WEIGHT), 0)
    live = (largest > 0) & (columns > 0)

    def codes_at(exponent: float) -> np.ndarray:
        wanted = np.zeros(k)
        wanted[live] = largest[live] ** exponent / columns[live] ** (1 - exponent)
        found = _core.channel_scale_codes(wanted.tolist(), 1.0, 16 if powers_of_two else 1)
        return np.frombuffer(found, np.int8)

    exact = [] if x is None else [x @ w.T for w in weights]

    def loss_of(codes: np.ndarray | None) -> float:
        if x is None:
            return float("nan")
        scales = None if codes is None else ChannelScales(codes).scales
        total = 0.0
        for w, (_, format), form, y in zip(weights, layers, rounded, exact, strict=True):
            scaled, seen = (w, x) if scales is None else (w * scales, x * (1 / scales))
            try:
                decoded = quantize(np.ascontiguousarray(scaled), format, Nearest(), threads=threads)
                if form is not None:
                    chosen = form.outliers_of(_column_maxima(seen)) if form.outlier_percent else form
                    seen = round_activations(np.ascontiguousarray(seen), chosen, threads)
            except ValueError:  # a scale beyond its dtype
                return float("inf")
            error = seen @ decoded.dequantize(threads=threads).T - y
            total += float(np.square(error, dtype=np.float64).sum())
        return total / max(1, len(x))

    unscaled = loss_of(None)
    if alpha is not None:
        codes = codes_at(alpha)
        loss = loss_of(codes)
        return ScaleChoice(codes, alpha, loss, unscaled, (unscaled, loss))
    best = ScaleChoice(np.zeros(k, np.int8), 0.0, unscaled, unscaled, ())
    losses = [unscaled]
    for step in range(1, steps):
        codes = codes_at(step / steps)
        losses.append(loss_of(codes))
        if losses[-1] < best.loss:
            best = replace(best, codes=codes, exponent=step / steps, loss=losses[-1])
    return replace(best, losses=tuple(losses))


def _of_the_sample(format: ActivationFormat) -> ActivationFormat:
    if format.static:
        format = replace(format, static=False, scale=None, zero_point=None)
    if not format.static_outliers or format.outlier_percent:  # a share of columns: chosen as scales are tried
        return format
    return replace(format, static_outliers=False, outlier_columns=None)


def quantize_smoothed(w: Any, format: Format, rounding: SmoothQuant, threads: int) -> PackedTensor:
    """``quantize`` with ``SmoothQuant``."""
    if rounding.inputs is None and (rounding.maxima is None or rounding.alpha is None):
        raise ValueError("rounding: got SmoothQuant without inputs, expected SmoothQuant(inputs=...)")
    if isinstance(rounding.then, GPTQ) and rounding.hessian is None:
        raise ValueError("rounding: got SmoothQuant without a hessian, which gptq needs")
    choice = search_smoothing(
        [(w, format)],
        rounding.maxima,
        rounding.inputs,
        alpha=rounding.alpha,
        steps=rounding.steps,
        activations=rounding.activations or "int8:token",
        threads=threads,
    )
    return quantize_with_scales(w, format, rounding, choice.codes, threads)
