"""How keys and values are kept."""

from __future__ import annotations

import json as _json
import math
from dataclasses import dataclass, field
from typing import Any

from quantloom import _checks, _core

__all__ = ["KVFormat", "kv_format_from_json", "parse_kv_format"]

_KINDS = ("kivi", "token", "sdr", "kvquant")


@dataclass(frozen=True)
class KVFormat:
    """How the keys and values of attention are kept.

    Each group of elements has a scale and a least value in float16: ``value = scale * code + least`` with
    codes from 0 to ``2**bits - 1``. After T tokens, `first` of them and the last ones are exact, the others
    codes; what is stored depends on the tokens alone, not on how they were split into calls.

    Args:
        kind: ``"kivi"`` (Liu et al., 2024): keys in groups of tokens for each channel, values in groups of
            channels for each token. ``"token"``: both by token. ``"sdr"``: both by token, as 8-bit integers
            cut to their significant digits behind a shift that a group shares (QRazor: Lee et al., 2025).
            ``"kvquant"`` (Hooper et al., 2024): tables of values that ``ql.kv.calibrate`` finds, for
            keys with fixed ranges of channels, usually before rotary embeddings, for values with a range
            for each token and head; and corrections in float16 for the elements of a token that err most.
        key_bits: 1, 2, 3, 4 or 8; of sdr 2 to 7, of kvquant 1 to 4.
        value_bits: likewise; None: as key_bits.
        group_size: tokens or channels of a group; 0 (token, kvquant): all channels of a head. None: 32 for
            kivi, 0 for token and kvquant, 16 for sdr.
        window: recent tokens that are kept exact; of kivi a multiple of group_size, and its keys leave the
            window all at once when it is full. None: 128 for kivi, else 0.
        first: tokens at the start of a sequence that are kept exact. None: 1 for kvquant, else 0.
        hadamard: keys are stored rotated by a Hadamard matrix over the channels of a head, queries with them.
        outliers: share of the elements of a token with a correction, a multiple of 0.0001 up to 0.1. None:
            0.01 for kvquant, else 0.

    Raises TypeError or ValueError naming the argument.
    """

    kind: str = "kivi"
    key_bits: int = 2
    value_bits: int | None = None
    group_size: int | None = None
    window: int | None = None
    first: int | None = None
    hadamard: bool = False
    outliers: float | None = None
    _description: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        _checks.choice("kind", self.kind, _KINDS)
        kivi = self.kind == "kivi"
        defaults = {
            "value_bits": self.key_bits,
            "group_size": 32 if kivi else 16 if self.kind == "sdr" else 0,
            "window": 128 if kivi else 0,
            "first": 1 if self.kind == "kvquant" else 0,
        }
        for name in ("key_bits", "value_bits", "group_size", "window", "first"):
            value = getattr(self, name)
            value = defaults[name] if value is None and name in defaults else value
            put(self, name, _checks.integer(name, value, 0))
        _checks.boolean("hadamard", self.hadamard)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("kind",)}
        del fields["_description"]
        outliers = (0.01 if self.kind == "kvquant" else 0.0) if self.outliers is None else self.outliers
        outliers = _checks.real("outliers", outliers)
        fields["outliers"] = round(outliers * 10000)
        if not math.isclose(fields["outliers"] / 10000, outliers, abs_tol=1e-9) or not 0 <= outliers <= 0.1:
            raise ValueError(f"outliers: got {outliers}, expected a multiple of 0.0001 from 0 to 0.1")
        put(self, "outliers", fields["outliers"] / 10000)
        fields |= {"kv_cache": self.kind, "version": 1}
        put(self, "_description", _core.kv_format_canonical(_json.dumps(fields)))

    @property
    def spec(self) -> str:
        """The short form, which ``parse_kv_format`` reads back: ``"kivi:2:g32:r128"``."""
        return _core.kv_format_spec(self._description)

    def to_json(self) -> str:
        """The whole description; ``kv_format_from_json`` reads it back."""
        return self._description

    def average_bits(self, head_dim: int) -> float:
        """Stored bits of an element whose token has left the window, scales included."""
        head_dim = _checks.integer("head_dim", head_dim)
        return _core.kv_layout(self._description, head_dim)["average_bits"]

    def __str__(self) -> str:
        return self.spec


def kv_format_from_json(json: str) -> KVFormat:
    """The format that a description (``KVFormat.to_json``) stands for. Raises ValueError."""
    entry: dict[str, Any] = _json.loads(_core.kv_format_canonical(_checks.string("json", json)))
    return KVFormat(
        entry["kv_cache"],
        entry["key_bits"],
        entry["value_bits"],
        entry["group_size"],
        entry["window"],
        entry["first"],
        entry["hadamard"],
        entry["outliers"] / 10000,
    )


def parse_kv_format(spec: str | KVFormat) -> KVFormat:
    """The format of a short form; a ``KVFormat`` is returned as it is.

    - ``kivi:2[:g32][:r128]``: KIVI with groups of 32 and a window of 128 tokens; ``kivi:4,2`` has keys of 4
      bits and values of 2
    - ``token:4[:g64]``: keys and values by token, one scale for all channels of a head or for groups
    - ``sdr:4[:g16]``: the 4 significant bits of 8-bit integers, the shift shared by 16 channels
    - ``kvquant:3[:1%]``: tables of 8 values, corrections for 1% of the elements
    - each also with ``:r32`` (recent tokens that stay exact), ``:first4`` (tokens at the start that stay
      exact) and, but for kvquant, ``:hadamard`` (keys rotated)

    Raises ValueError naming what was not understood.
    """
    if isinstance(spec, KVFormat):
        return spec
    spec = _checks.string("kv_cache", spec, "a KVFormat or a short form such as 'kivi:2'")
    return kv_format_from_json(_core.kv_format_from_spec(spec))
