"""Formats: what is stored for a matrix, and how it decodes.

A format is an immutable description. It has a short form for tables and the command line
(``uniform:4:g128``) and a JSON form, which files store.
"""

from __future__ import annotations

import json as _json
from dataclasses import dataclass, field
from typing import Any

from quantloom import _checks, _core

__all__ = ["Format", "Uniform", "format_from_json", "format_table", "parse_format"]

_NAMED_GROUPS = {"channel": -1, "tensor": -2}  # as the C++ side counts them


def group_columns(value: int | str) -> int:
    """A group size as the C++ side counts it."""
    if isinstance(value, str) and value in _NAMED_GROUPS:
        return _NAMED_GROUPS[value]
    expected = 'an integer > 0, "channel" or "tensor"'
    columns = 0 if isinstance(value, str) else _checks.integer("group_size", value, expected=expected)
    if columns <= 0:
        raise ValueError(f"group_size: got {value!r}, expected {expected}")
    return columns


class Format:
    """Base class of all formats."""

    @property
    def spec(self) -> str:
        """The short form, such as ``"uniform:4:g128:sym"``; ``parse_format`` reads it back."""
        return _core.format_spec(self.to_json())

    def to_json(self) -> str:
        """The whole description as a JSON object; ``format_from_json`` reads it back."""
        raise NotImplementedError

    def planes(self, n: int, k: int) -> list[dict[str, Any]]:
        """The arrays that a matrix ``[n, k]`` is stored as: name, dtype, shape, optional.

        Raises ValueError if the format cannot take that size.
        """
        n = _checks.integer("n", n, 0, "out_features")
        k = _checks.integer("k", k, 0, "in_features")
        return _core.format_planes(self.to_json(), n, k)

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True)
class Uniform(Format):
    """An evenly spaced grid: ``value = scale * (code - zero_point)``.

    Args:
        bits: 1 to 8.
        group_size: columns along in_features that share a scale: an integer > 0 (the last group of a
            row may be shorter), ``"channel"`` (one scale per row) or ``"tensor"`` (one for the matrix).
        symmetric: True: the zero point is the constant ``2**(bits - 1)`` (0.5 for 1 bit). False: every
            group stores an integer zero point.
        scale_dtype: the dtype in which scales are stored: ``"float16"``, ``"bfloat16"`` or
            ``"float32"``. Codes are chosen against the scale as stored.

    Raises TypeError or ValueError naming the argument.
    """

    bits: int
    group_size: int | str = 128
    symmetric: bool = True
    scale_dtype: str = "float16"
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "bits", _checks.integer("bits", self.bits, expected="an integer from 1 to 8"))
        columns = group_columns(self.group_size)
        if columns > 0:
            set_field(self, "group_size", columns)
        _checks.boolean("symmetric", self.symmetric)
        dtype = self.scale_dtype
        if not isinstance(dtype, str):  # np.float16, np.dtype("float16"), torch.float16
            name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
            dtype = name.removeprefix("torch.")
        if dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError(f'scale_dtype: got {dtype!r}, expected "float16", "bfloat16" or "float32"')
        set_field(self, "scale_dtype", dtype)
        set_field(self, "_json", _core.uniform_json(self.bits, columns, self.symmetric, dtype))

    def to_json(self) -> str:
        return self._json


def format_from_json(json: str) -> Format:
    """The format that a JSON description (``Format.to_json``) stands for.

    Raises ValueError for unknown formats, unknown or contradictory keys.
    """
    # The C++ side reads, checks and normalizes; only then are the fields picked from its answer.
    entry = _json.loads(_core.format_canonical(_checks.string("json", json)))
    return _from_fields(entry)


def parse_format(spec: str | Format) -> Format:
    """The format of a short form; a ``Format`` is returned as it is.

    ``uniform:BITS[:gN|:channel|:tensor][:sym|:asym][:f16|:bf16|:f32]``; defaults: g128, sym, f16.
    Raises ValueError naming what was not understood.
    """
    if isinstance(spec, Format):
        return spec
    spec = _checks.string("format", spec, "a Format or a short form such as 'uniform:4:g128'")
    return _from_fields(_json.loads(_core.format_from_spec(spec)))


def format_table() -> list[dict[str, Any]]:
    """All formats: name, summary, examples in their short form."""
    return _core.format_table()


def _from_fields(entry: dict[str, Any]) -> Format:
    if entry["format"] != "uniform":
        raise RuntimeError(
            f"format: got {entry['format']!r}, which this version of the package cannot describe"
        )
    return Uniform(entry["bits"], entry["group_size"], entry["symmetric"], entry["scale_dtype"])
