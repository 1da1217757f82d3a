"""Activations as integers.

``ActivationFormat`` says how activations are rounded; ``quantize_activations`` gives their codes and scales,
``round_activations`` the values those stand for. ``ql.matmul`` and ``ql.nn.QuantLinear`` take a format, and
multiply the integers themselves where their scales allow it.
"""

from __future__ import annotations

import functools
import json as _json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core

__all__ = [
    "ActivationFormat",
    "QuantizedActivations",
    "activations_from_json",
    "parse_activations",
    "quantize_activations",
    "round_activations",
]

_SCOPES = ("token", "tensor", "group")


@dataclass(frozen=True)
class ActivationFormat:
    """How activations are rounded to integers of a few bits.

    ``value = scale * (code - zero_point)`` with codes from ``-2**(bits-1)`` to ``2**(bits-1) - 1``, chosen by
    division by the float32 scale and rounding half to even. Symmetric grids have ``scale = max|x| /
    (2**(bits-1) - 1)``, asymmetric ones span from ``min(0, x)`` to ``max(0, x)``.

    With ``base_bits``, the significant digits (SDR) of QRazor (Lee et al., 2025): x is rounded to integers of
    `base_bits` with one scale for each token (or the tensor), then each run of `group_size` integers is cut
    to `bits` bits behind a shift that the run shares.

    Args:
        bits: of a code, 2 to 8.
        scope: what shares a scale: ``"token"``, ``"tensor"`` or, for each token, ``"group"``.
        group_size: inputs of a group, or those that share a shift; None: neither.
        symmetric: False: with a zero point for each scale.
        base_bits: None, or up to 16, more than `bits`.
        static: the scale is fixed in advance, for scope ``"tensor"``. Calibration in a ``Recipe`` finds it,
            or ``with_range``.
        scale, zero_point: those of a static format; zero_point counts from 0 in the middle of the codes.
        outlier_threshold: None, or the magnitude from which on inputs are outliers (LLM.int8(): Dettmers et
            al., 2022; there 6): every input that reaches it in any token of a batch is kept as it is in all
            of them, multiplied with the decoded weights, and counts for no scale. Without base_bits.
        outlier_percent: None, or the share of the inputs that are outliers, above 0 and below 100, rounded up
            to whole inputs: those of the largest magnitudes in calibration. With static_outliers, in place
            of a threshold.
        static_outliers: the outliers are those that calibration found (or ``with_columns``), so that the
            result of a token does not depend on the others. In models, the columns of weights that read them
            stay in float16 (``keep_columns``).
        outlier_columns: those, rising.

    Raises TypeError or ValueError naming the argument.
    """

    bits: int = 8
    scope: str = "token"
    group_size: int | None = None
    symmetric: bool = True
    base_bits: int | None = None
    static: bool = False
    scale: float | None = None
    zero_point: int | None = None
    outlier_threshold: float | None = None
    static_outliers: bool = False
    outlier_columns: tuple[int, ...] | None = None
    outlier_percent: float | None = None
    _description: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "bits", _checks.integer("bits", self.bits, expected="an integer from 2 to 8"))
        _checks.choice("scope", self.scope, _SCOPES)
        for name in ("group_size", "base_bits"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, _checks.integer(name, value, 1))
        for name in ("symmetric", "static", "static_outliers"):
            _checks.boolean(name, getattr(self, name))
        if self.scale is None:
            if self.zero_point is not None:
                raise ValueError(f"zero_point: got {self.zero_point}, expected None without a scale")
        else:
            put(self, "scale", _checks.real("scale", self.scale, "a positive number"))
            zero = 0 if self.zero_point is None else _checks.integer("zero_point", self.zero_point)
            put(self, "zero_point", zero)
        fields = {
            "activations": "int" if self.base_bits is None else "sdr",
            "base_bits": self.base_bits or 0,
            "bits": self.bits,
            "group_size": self.group_size or 0,
            "scale": self.scale,
            "scope": self.scope,
            "static": self.static,
            "symmetric": self.symmetric,
            "version": 1,
            "zero_point": self.zero_point,
        }
        limits = [f for f in ("outlier_threshold", "outlier_percent") if getattr(self, f) is not None]
        if len(limits) == 2:
            raise ValueError("outlier_threshold, outlier_percent: got both, expected one of them")
        if not limits:
            if self.static_outliers or self.outlier_columns is not None:
                raise ValueError("outlier_threshold: got None, expected a number beside static outliers")
        else:
            put(self, limits[0], _checks.real(limits[0], getattr(self, limits[0]), "a positive number"))
            if self.outlier_columns is not None:
                columns = [_checks.integer("outlier_columns", column, 0) for column in self.outlier_columns]
                put(self, "outlier_columns", tuple(columns))
            fields |= {
                limits[0]: getattr(self, limits[0]),
                "static_outliers": self.static_outliers,
                "outlier_columns": self.outlier_columns,
            }
        put(self, "_description", _core.activations_canonical(_json.dumps(fields)))
        for name in ("scale", "outlier_threshold", "outlier_percent"):
            if getattr(self, name) is not None:
                put(self, name, _json.loads(self._description)[name])  # as float32 has it

    @property
    def spec(self) -> str:
        """The short form, which ``parse_activations`` reads back: ``"int8:token"``."""
        return _core.activations_spec(self._description)

    def to_json(self) -> str:
        """The whole description; ``activations_from_json`` reads it back."""
        return self._description

    @property
    def calibrated(self) -> bool:
        """False for a static format whose scale or outliers are still to be found."""
        columns_known = not self.static_outliers or self.outlier_columns is not None
        return columns_known and (not self.static or self.scale is not None)

    def with_range(self, low: float, high: float) -> ActivationFormat:
        """The static format with the grid for values from `low` to `high`, outliers apart."""
        low, high = _checks.real("low", low), _checks.real("high", high)
        return activations_from_json(_core.activations_with_range(self._description, low, high))

    def outliers_of(self, magnitudes: Any) -> ActivationFormat:
        """The format with static outliers at the columns that inputs of these largest magnitudes ``[k]``
        have: those that reach the threshold, or so many percent, of equal ones the first."""
        values = np.asarray(magnitudes, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("magnitudes: got values that are not finite, expected finite ones")
        if self.outlier_percent is None:
            return self.with_columns(np.flatnonzero(values >= self.outlier_threshold).tolist())
        count = min(len(values), math.ceil(round(len(values) * self.outlier_percent / 100, 6)))
        return self.with_columns(np.argsort(-values, kind="stable")[:count].tolist())

    def with_columns(self, columns: Iterable[int]) -> ActivationFormat:
        """The format with static outliers at these columns."""
        if not self.static_outliers:
            raise ValueError(f"columns: got some for {self.spec}, expected a format with static_outliers")
        return replace(self, outlier_columns=tuple(sorted(columns)))

    def __str__(self) -> str:
        return self.spec


def activations_from_json(json: str) -> ActivationFormat:
    """The format that a description (``ActivationFormat.to_json``) stands for. Raises ValueError."""
    return _from_fields(_json.loads(_core.activations_canonical(_checks.string("json", json))))


def parse_activations(spec: str | ActivationFormat) -> ActivationFormat:
    """The format of a short form; an ``ActivationFormat`` is returned as it is.

    - ``int8:token``, ``int8:tensor``, ``int4:g128``: 2 to 8 bits, one scale for each token, for all tokens
      or for each group of 128 inputs; with ``:asym`` also a zero point
    - ``int8:tensor:static``: with a scale that calibration finds; ``int8:tensor:static=0.02``, and
      ``int8:tensor:asym:static=0.02,-5``: a known one
    - ``int8:token:outliers=6``: inputs that reach 6 are kept as they are; with ``:static-outliers``
      those that do in calibration, with ``:columns=3,17`` known ones; ``int8:token:outliers=1%``: that
      share of the inputs, those of the largest magnitudes in calibration
    - ``sdr4:g16[:b16][:tensor[:static]]``: the 4 significant bits of integers of 8 (or 16) bits, the shift
      shared by 16 inputs

    Raises ValueError naming what was not understood.
    """
    if isinstance(spec, ActivationFormat):
        return spec
    spec = _checks.string("activations", spec, "an ActivationFormat or a short form such as 'int8:token'")
    return _parsed(spec)


@functools.lru_cache(maxsize=512)
def _parsed(spec: str) -> ActivationFormat:
    return _from_fields(_json.loads(_core.activations_from_spec(spec)))


def _from_fields(entry: dict[str, Any]) -> ActivationFormat:
    return ActivationFormat(
        entry["bits"],
        entry["scope"],
        entry["group_size"] or None,
        entry["symmetric"],
        entry["base_bits"] or None,
        entry["static"],
        entry["scale"],
        entry["zero_point"],
        entry.get("outlier_threshold"),
        entry.get("static_outliers", False),
        None if entry.get("outlier_columns") is None else tuple(entry["outlier_columns"]),
        entry.get("outlier_percent"),
    )


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """Activations ``[..., k]`` as integers; made by ``quantize_activations``.

    Attributes:
        format: the ``ActivationFormat``.
        shape: of x.
        dtype: of x.
        planes: ``codes`` int8 ``[tokens, k]``; ``scales`` float32 ``[tokens, 1]``, ``[tokens, groups]`` or
            ``[1, 1]``; ``zeros`` int8 of that shape for asymmetric formats; ``shifts`` uint8 ``[tokens,
            groups]`` with base_bits; ``outlier_columns`` int32 and ``outlier_values`` float32 ``[tokens,
            columns]`` with outliers, where codes stand for 0.
    """

    format: ActivationFormat
    shape: tuple[int, ...]
    dtype: str
    planes: Mapping[str, Any]

    @property
    def codes(self) -> Any:
        """``planes["codes"]`` in the shape of x."""
        return self.planes["codes"].reshape(self.shape)

    def dequantize(self, dtype: Any = None, threads: int = 0) -> Any:
        """The values of the codes, of the kind and (by default) in the dtype of x."""
        name = self.dtype if dtype is None else _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
        if _on_cuda(self.planes["codes"]):
            from quantloom import _cuda_activations

            return _cuda_activations.dequantize(self.planes, self.format, name).reshape(self.shape)
        arrays = {name: _arrays.plane(f"plane {name}", plane) for name, plane in self.planes.items()}
        kind = arrays["codes"].kind
        out = _arrays.empty(kind, arrays["codes"].shape, "float32")
        _core.dequantize_activations(
            {name: array.core for name, array in arrays.items()},
            self.format.to_json(),
            _arrays.describe("out", out).core,
            _checks.thread_count(threads),
        )
        return _arrays.cast(out, name).reshape(self.shape)


def _on_cuda(x: Any) -> bool:
    return _arrays.is_torch(x) and x.is_cuda


def _tokens(x: Any) -> tuple[_arrays.Array, tuple[int, ...]]:
    shape = _arrays.describe("x", x).shape
    if not shape:
        raise ValueError("x: got shape [], expected [..., k]")
    return _arrays.tokens("x", x, shape[-1], cpu=not _on_cuda(x)), tuple(shape)


def quantize_activations(x: Any, format: ActivationFormat | str, threads: int = 0) -> QuantizedActivations:
    """The integer codes and scales of `x` ``[..., k]``, float32, float16 or bfloat16.

    Tensors on a CUDA device stay there, with the same planes as on the CPU, queued on torch's current stream;
    only outliers that the batch itself decides make it wait for the device, as their number is a shape.

    Raises ValueError for a static format without its scale, and on the CPU, naming token and input, for
    values that are not finite (or 2**127 and more). A CUDA device cannot raise: there the scale that such a
    value takes part in becomes NaN (a static scale with all its tokens), outliers apart.
    """
    tokens, shape = _tokens(x)
    format = parse_activations(format)
    if tokens.device != "cpu":
        from quantloom import _cuda_activations

        planes = _cuda_activations.quantize(tokens.value, format)
        return QuantizedActivations(format, shape, tokens.dtype, MappingProxyType(planes))
    found = _core.quantize_activations(tokens.core, format.to_json(), _checks.thread_count(threads))
    planes = {name: _arrays.to_kind(value, dtype, tokens.kind) for name, (dtype, value) in found.items()}
    return QuantizedActivations(format, shape, tokens.dtype, MappingProxyType(planes))


def round_activations(x: Any, format: ActivationFormat | str, threads: int = 0) -> Any:
    """`x` rounded to the format, of its kind and dtype: what ``quantize_activations(x,
    format).dequantize()`` gives, bit for bit. Raises as that does.

    On a CUDA device it never waits, and can be captured in a graph. Of a value that is not finite, all that
    share its scale become NaN there; with a static scale those of its token.
    """
    tokens, shape = _tokens(x)
    format = parse_activations(format)
    if tokens.device != "cpu":
        from quantloom import _cuda_activations

        return _cuda_activations.round_values(tokens.value, format).reshape(shape)
    out = _arrays.empty(tokens.kind, tokens.shape, "float32")
    _core.round_activations(
        tokens.core, _arrays.describe("out", out).core, format.to_json(), _checks.thread_count(threads)
    )
    return _arrays.cast(out, tokens.dtype).reshape(shape)
