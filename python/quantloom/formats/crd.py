"""Tables whose density of values is proportional to a power of the data's probability density.

The error of many values is least at the power 1/3, the cube root (Panter and Dite, 1951; "Optimal Formats for
Weight Quantisation", arXiv 2505.12988, sections 3 and 4). Places are quantiles of a law of the same family.
Data have unit RMS, or, for the block tables, are divided by the absolute maximum of their block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from quantloom import _checks
from quantloom.formats.tables import LUTFormat

__all__ = ["crd_block_laplace", "crd_block_normal", "crd_block_t", "crd_laplace", "crd_normal", "crd_t"]

Mode = Literal["symmetric", "repeat_zero", "asymmetric"]
Quantile = Callable[[np.ndarray], np.ndarray]

_EULER_GAMMA = 0.5772156649015329
# Which ends of the two halves [0, 1/2] and [1/2, 1] of the probabilities belong to the table.
_HALVES = {
    ("asymmetric", "rms"): ((False, True), (False, False)),
    ("asymmetric", "absmax"): ((True, True), (False, True)),
    ("asymmetric", "signmax"): ((False, True), (False, True)),
    ("repeat_zero", "rms"): ((False, True), (True, False)),
    ("repeat_zero", "absmax"): ((True, True), (True, True)),
}
_LETTERS = {
    "rms": "R",
    "absmax": "A",
    "signmax": "S",
    "symmetric": "S",
    "repeat_zero": "Z",
    "asymmetric": "A",
}


def _half(low: float, high: float, count: int, ends: tuple[bool, bool]) -> np.ndarray:
    first, last = ends
    places = np.linspace(low, high, count + (not first) + (not last))
    return places[0 if first else 1 : None if last else -1]


def _probabilities(bits: float, mode: str, scaling: str) -> np.ndarray:
    count = round(2 ** _checks.real("bits", bits))
    if mode not in ("symmetric", "repeat_zero", "asymmetric"):
        raise ValueError(f"mode: got {mode!r}, expected symmetric, repeat_zero or asymmetric")
    if not 2 <= count <= 1 << 20:
        raise ValueError(f"bits: got {bits}, expected 1 to 20")
    if mode == "symmetric" and scaling != "signmax":
        return np.linspace(0, 1, count + 2)[1:-1] if scaling == "rms" else np.linspace(0, 1, count)
    if (mode, scaling) not in _HALVES:
        raise KeyError(f"mode, scaling: got {mode}, {scaling}; signmax goes with asymmetric only")
    low, high = _HALVES[mode, scaling]
    # Both halves meet at 1/2, and a table with it in the middle of an odd number has one value less.
    return np.concatenate((_half(0, 0.5, count // 2, low), _half(0.5, 1, count // 2, high)))


def _name(law: str, power: float, scaling: str, mode: str) -> str:
    text = ""
    if power != 1 / 3:
        text = f"{{1/{1 / power:.3g}}}" if 0 < power < 1 else f"{{{power:.3g}}}"
    return f"CRD{text}-{law}-{_LETTERS[scaling]}{_LETTERS[mode]}"


def _power(power: float) -> float:
    power = _checks.real("power", power)
    if power < 0:
        raise ValueError(f"power: got {power}, expected a number >= 0")
    return power


def _rms_table(
    law: str, bits: float, mode: str, power: float, quantile: Callable[[np.ndarray, float], np.ndarray]
) -> LUTFormat:
    power = _power(power)
    if power == 0:
        raise ValueError("power: got 0, expected a number > 0 (values of equal density need an absmax)")
    places = quantile(_probabilities(bits, mode, "rms"), power)
    return LUTFormat.create(places.astype(np.float32).tolist(), _name(law, power, "rms", mode))


def _block_table(
    law: str,
    bits: float,
    block_size: int,
    scaling: str,
    mode: str,
    power: float,
    law_of: Callable[[float], tuple[Quantile, Quantile]],
) -> LUTFormat:
    """`law_of(power)`: the distribution function and its inverse, of values over their block's maximum."""
    power = _power(power)
    if scaling not in ("absmax", "signmax"):
        raise ValueError(f"scaling: got {scaling!r}, expected absmax or signmax")
    if _checks.integer("block_size", block_size) < 4:
        raise ValueError(f"block_size: got {block_size}, expected at least 4 values")
    p = _probabilities(bits, mode, scaling)
    if power == 0:
        places = 2 * p - 1
    else:
        cumulative, quantile = law_of(power)
        low = cumulative(np.array(-1.0))
        places = np.clip(quantile(low + p * (1 - 2 * low)), -1, 1)
        # Both ends and the middle are known without rounding errors.
        places = np.where(p == 0, -1.0, np.where(p == 1, 1.0, np.where(p == 0.5, 0.0, places)))
    return LUTFormat.create(places.astype(np.float32).tolist(), _name(law, power, scaling, mode))


def _normal(p: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri

    return ndtri(p)


def _laplace(p: np.ndarray) -> np.ndarray:
    return np.where(p < 0.5, np.log(2 * np.minimum(p, 0.5)), -np.log(2 * np.minimum(1 - p, 0.5)))


def _student(p: np.ndarray, df: float) -> np.ndarray:
    from scipy.special import stdtrit

    # The lower tail keeps relative precision.
    return np.where(p < 0.5, stdtrit(df, p), -stdtrit(df, 1 - p))


def _student_name(df: float) -> str:
    df = _checks.real("df", df)
    return f"T[{df:.0f}]" if df == round(df) else f"T[{df:.1f}]"


def _student_df(df: float, power: float) -> float:
    """The degrees of freedom of a density proportional to a power of Student's."""
    df = _checks.real("df", df)
    if df <= 2:
        raise ValueError(f"df: got {df}, expected more than 2 (the variance must be finite)")
    result = power * (df + 1) - 1
    if result <= 0:
        raise ValueError(f"power: got {power}, expected more than 1 / (df + 1) = {1 / (df + 1):.4g}")
    return result


def crd_normal(bits: float, mode: Mode = "symmetric", *, power: float = 1 / 3) -> LUTFormat:
    """Table for Normal data of unit RMS, with round(2^bits) values: ``LUT4[CRD-N-RS]``.

    Args:
        bits: may be fractional.
        mode: ``"symmetric"``; ``"asymmetric"``: the lower half ends in 0, the upper begins above it;
            ``"repeat_zero"``: both halves have 0. The last two have one value less if the number is odd.
        power: of the density; 1/3 is best for the squared error.
    """
    return _rms_table("N", bits, mode, power, lambda p, power: _normal(p) / math.sqrt(power))


def crd_laplace(bits: float, mode: Mode = "symmetric", *, power: float = 1 / 3) -> LUTFormat:
    """Table for Laplace data of unit RMS: ``LUT4[CRD-L-RS]``. Arguments as for ``crd_normal``."""
    return _rms_table("L", bits, mode, power, lambda p, power: _laplace(p) / (power * math.sqrt(2)))


def crd_t(bits: float, df: float, mode: Mode = "symmetric", *, power: float = 1 / 3) -> LUTFormat:
    """Table for Student-t data of unit RMS with `df` > 2: ``LUT4[CRD-T[7]-RS]``. Else as ``crd_normal``."""

    def quantile(p: np.ndarray, power: float) -> np.ndarray:
        inner = _student_df(df, power)
        return _student(p, inner) * math.sqrt((df - 2) / inner)

    return _rms_table(_student_name(df), bits, mode, power, quantile)


def crd_block_normal(
    bits: float,
    block_size: int,
    scaling: Literal["absmax", "signmax"] = "absmax",
    mode: Mode = "symmetric",
    *,
    power: float = 1 / 3,
) -> LUTFormat:
    """Table for Normal data in blocks of `block_size`, each over its maximum: ``LUT4[CRD-N-AS]``.

    The law is cut off at -1 and 1 and scaled by the maximum that is expected of a block. ``signmax`` (the
    extreme value of a block becomes +1) goes with mode ``"asymmetric"`` only, else KeyError.
    """

    def law(power: float) -> tuple[Quantile, Quantile]:
        from scipy.special import ndtr

        scale = power**-0.5 / math.sqrt(2 * math.log(block_size / math.pi))
        return lambda x: ndtr(x / scale), lambda p: _normal(p) * scale

    return _block_table("N", bits, block_size, scaling, mode, power, law)


def crd_block_laplace(
    bits: float,
    block_size: int,
    scaling: Literal["absmax", "signmax"] = "absmax",
    mode: Mode = "symmetric",
    *,
    power: float = 1 / 3,
) -> LUTFormat:
    """Table for Laplace data in blocks: ``LUT4[CRD-L-AS]``. Else as ``crd_block_normal``."""

    def law(power: float) -> tuple[Quantile, Quantile]:
        scale = 1 / (power * (_EULER_GAMMA + math.log(block_size)))

        def cumulative(x: np.ndarray) -> np.ndarray:
            tail = np.exp(-np.abs(x) / scale) / 2
            return np.where(x < 0, tail, 1 - tail)

        return cumulative, lambda p: _laplace(p) * scale

    return _block_table("L", bits, block_size, scaling, mode, power, law)


def crd_block_t(
    bits: float,
    block_size: int,
    df: float,
    scaling: Literal["absmax", "signmax"] = "absmax",
    mode: Mode = "symmetric",
    *,
    power: float = 1 / 3,
) -> LUTFormat:
    """Table for Student-t data in blocks: ``LUT4[CRD-T[7]-AS]``. Else as ``crd_block_normal``."""

    def law(power: float) -> tuple[Quantile, Quantile]:
        from scipy.special import stdtr

        inner = _student_df(df, power)
        spread = 2 * math.log(block_size / math.pi)
        scale = math.sqrt((df - 2) / inner) * spread ** ((3 - df) / (2 * df)) * block_size ** (-1 / df)
        return lambda x: stdtr(inner, x / scale), lambda p: _student(p, inner) * scale

    return _block_table(_student_name(df), bits, block_size, scaling, mode, power, law)
