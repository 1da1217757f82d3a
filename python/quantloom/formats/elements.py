"""Element formats that a formula describes: small floats, torch's own dtypes, integers, powers of two."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quantloom import _checks, _core
from quantloom.formats import _numerics
from quantloom.formats.base import ScalarFormat, Shape

if TYPE_CHECKING:
    from quantloom.formats.encoded import Planes

__all__ = ["BFLOAT16", "FP16", "FP32", "ExpCeilFormat", "FPFormat", "IntFormat", "TorchFormat", "parse"]

_ROUNDINGS = {"nearest": "RN", "to_zero": "RZ", "to_inf": "RI"}


@dataclass
class FPFormat(ScalarFormat):
    """A small float without codes for infinity and NaN: ``E2M1``, unsigned ``UE2M1``.

    With E exponent and M mantissa bits a value is 2^(e - B) (1 + m / 2^M), and 2^(1 - B) m / 2^M for e = 0,
    with B = 2^(E - 1); the largest is 2^(B - 1) (2 - 2^-M). So E2M1 here is {0, .25, .5, .75, 1, 1.5, 2, 3},
    half of OCP's FP4. Values beyond the largest are clipped; unsigned formats clip below 0.

    Args:
        exponent_bits: 2 to 8.
        mantissa_bits: 0 to 23.
        rounding: ``"nearest"`` (ties toward zero), ``"to_inf"`` (away from zero) or ``"to_zero"``. It is part
            of the format, but not of its short name.
        signed: whether there is a sign; +0 and -0 are one value, so a signed format has 2^bits - 1.

    Rounding is exact for every input, values that are subnormal in float32 included.
    """

    exponent_bits: int
    mantissa_bits: int
    rounding: Literal["nearest", "to_inf", "to_zero"]
    signed: bool
    _type: str = "fp"

    def __post_init__(self) -> None:
        self._elements()

    @classmethod
    def create(
        cls, exponent_bits: int, mantissa_bits: int, rounding: str = "nearest", signed: bool = True
    ) -> FPFormat:
        """A format by its sizes, rounding to nearest and with signs unless told otherwise."""
        return cls(exponent_bits, mantissa_bits, rounding, signed)

    def __str__(self) -> str:
        return f"{'' if self.signed else 'U'}E{self.exponent_bits}M{self.mantissa_bits}"

    def _elements(self) -> _core.Elements:
        return _float_elements(self.exponent_bits, self.mantissa_bits, self.rounding, self.signed)

    @property
    def bits(self) -> float:
        return float(self.signed + self.exponent_bits + self.mantissa_bits)

    @property
    def _bias(self) -> int:
        return 2 ** (self.exponent_bits - 1)

    @property
    def max_absolute(self) -> float:
        """The largest value."""
        return 2.0 ** (self._bias - 1) * (2 - 2.0**-self.mantissa_bits)

    @property
    def min_absolute_normal(self) -> float:
        """The smallest value with a leading 1: 2^(1 - B)... of exponent field 1."""
        return 2.0 ** (1 - self._bias)

    @property
    def min_absolute_subnormal(self) -> float:
        """The smallest value above 0 (the smallest normal one if there are no mantissa bits)."""
        return 2.0 ** (1 - self._bias - self.mantissa_bits)

    @property
    def range(self) -> tuple[float, float]:
        return (-self.max_absolute if self.signed else 0.0, self.max_absolute)

    @property
    def centroids(self) -> tuple[float, ...]:
        return _float_centroids(self.exponent_bits, self.mantissa_bits, self.signed)

    def _reference_codes(self, values: Tensor) -> Tensor:
        size = values.double().abs().nan_to_num(0.0, posinf=math.inf)
        exponent = (torch.frexp(size).exponent - 1).clamp(min=1 - self._bias)
        steps = size.clamp(max=self.max_absolute) * _numerics.power_of_two(self.mantissa_bits - exponent)
        if self.rounding == "nearest":
            rounded = torch.ceil(steps - 0.5)
        else:
            rounded = torch.ceil(steps) if self.rounding == "to_inf" else torch.floor(steps)
        largest = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        place = (exponent.long() - 1 + self._bias) * 2**self.mantissa_bits + rounded.nan_to_num(0.0).long()
        place = torch.where(size >= self.max_absolute, largest, torch.where(size == 0, 0, place))
        if not self.signed:
            return torch.where(values < 0, 0, place)
        return largest + torch.where(values < 0, -place, place)

    def _reference_values(self, codes: Tensor) -> Tensor:
        place = codes
        if self.signed:
            place = (codes - (2 ** (self.exponent_bits + self.mantissa_bits) - 1)).abs()
        field = place >> self.mantissa_bits
        fraction = (place & (2**self.mantissa_bits - 1)).double()
        steps = torch.where(field == 0, fraction, fraction + 2**self.mantissa_bits)
        size = steps * _numerics.power_of_two(field.clamp(min=1) - self._bias - self.mantissa_bits)
        if self.signed:
            size = torch.where(codes < 2 ** (self.exponent_bits + self.mantissa_bits) - 1, -size, size)
        return size.float()


@functools.lru_cache(maxsize=256)
def _float_elements(exponent_bits: int, mantissa_bits: int, rounding: str, signed: bool) -> _core.Elements:
    if exponent_bits < 2:
        raise ValueError(f"exponent_bits: got {exponent_bits}, expected 2 to 8 (IntFormat has none)")
    return _core.Elements.floats(
        _checks.integer("exponent_bits", exponent_bits),
        _checks.integer("mantissa_bits", mantissa_bits),
        _checks.string("rounding", rounding),
        _checks.boolean("signed", signed),
    )


@functools.lru_cache(maxsize=64)
def _float_centroids(exponent_bits: int, mantissa_bits: int, signed: bool) -> tuple[float, ...]:
    return ScalarFormat.centroids.fget(FPFormat(exponent_bits, mantissa_bits, "nearest", signed))


@dataclass
class TorchFormat(ScalarFormat):
    """A dtype of torch: ``FLOAT32``, ``FLOAT16``, ``BFLOAT16``, ``INT8``.

    Values are clipped to the dtype's finite range and cast. Casts to floats round to nearest, ties to even;
    **casts to integers truncate toward zero**, as torch does (``IntFormat(8)`` rounds). ``dtype`` may be
    given as ``torch.bfloat16`` or ``"bfloat16"`` and is kept as the name.
    """

    dtype: str
    _type: str = "torch"

    def __post_init__(self) -> None:
        self.dtype = str(self.dtype).removeprefix("torch.")
        kind = getattr(torch, self.dtype, None)
        if not isinstance(kind, torch.dtype) or kind.is_complex or kind == torch.bool:
            raise ValueError(f"dtype: got {self.dtype!r}, expected a dtype of torch for real numbers")

    def __str__(self) -> str:
        return self.dtype.upper()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def _info(self) -> Any:
        return (
            torch.finfo(self.torch_dtype)
            if self.torch_dtype.is_floating_point
            else torch.iinfo(self.torch_dtype)
        )

    @property
    def bits(self) -> float:
        return float(self._info.bits)

    @property
    def range(self) -> tuple[float, float]:
        return (float(self._info.min), float(self._info.max))

    @property
    def centroids(self) -> tuple[float, ...]:
        raise NotImplementedError(f"{self}: the values of a dtype of torch are not listed")

    def to_idx(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError(f"{self}: the values of a dtype of torch are not numbered")

    def _codes_of(self) -> None:
        return None

    def _stored(self, tensor: Tensor) -> Tensor:
        wide = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
        if not self.torch_dtype.is_floating_point:
            wide = wide.double()  # the ends of int32's range are no float32 values
        elif self.torch_dtype.itemsize >= wide.dtype.itemsize:
            return wide.clamp(*_float_limits(wide.dtype)).to(self.torch_dtype)
        return wide.clamp(*self.range).to(self.torch_dtype)

    def quantise(self, tensor: Tensor) -> Tensor:
        return self._stored(tensor).to(tensor.dtype)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        planes.put("values", self._stored(tensor).cpu().contiguous())

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        return planes.get("values", self.torch_dtype, shape).to(dtype).to(device)


def _float_limits(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype)
    return (info.min, info.max)


FP32 = TorchFormat("float32")
FP16 = TorchFormat("float16")
BFLOAT16 = TorchFormat("bfloat16")


@dataclass
class IntFormat(ScalarFormat):
    """n = round(2^bits) neighbouring integers: ``E0M3`` for 16, ``E0M{2.17}`` for 9; ``-S`` if symmetric.

    Args:
        bits_: may be fractional; becomes log2(n), so that any whole n is possible.
        mode: ``"asymmetric"``: from -(n // 2) to (n - 1) // 2. ``"symmetric"``: from -(n - 1) / 2 to
            (n - 1) / 2, which are half-integers if n is even. Ties go to even integers before the half is
            taken off again.
    """

    bits_: float
    mode: Literal["asymmetric", "symmetric"] = "asymmetric"
    _type: str = "int"

    def __post_init__(self) -> None:
        _checks.choice("mode", self.mode, ("asymmetric", "symmetric"))
        bits = _checks.real("bits", self.bits_)
        if not 0 <= bits <= 32:
            raise ValueError(f"bits: got {bits}, expected 0 to 32")
        self.bits_ = math.log2(round(2**bits))

    @property
    def _count(self) -> int:
        return round(2**self.bits_)

    def __str__(self) -> str:
        mantissa = self.bits_ - 1
        text = f"{mantissa:.0f}" if mantissa == round(mantissa) else f"{{{mantissa:.2f}}}"
        return f"E0M{text}{'-S' if self.mode == 'symmetric' else ''}"

    def _elements(self) -> _core.Elements:
        return _int_elements(self._count, self.mode == "symmetric")

    @property
    def bits(self) -> float:
        return self.bits_

    @property
    def range(self) -> tuple[float, float]:
        count = self._count
        if self.mode == "symmetric":
            return (-(count - 1) / 2, (count - 1) / 2)
        return (float(-(count // 2)), float((count - 1) // 2))

    def _reference_codes(self, values: Tensor) -> Tensor:
        offset = 0.5 if self.mode == "symmetric" and self._count % 2 == 0 else 0.0
        place = torch.round(values.double() + offset) - offset - self.range[0]
        return place.nan_to_num(0.0).clamp(0, self._count - 1).long()

    def _reference_values(self, codes: Tensor) -> Tensor:
        return (codes.double() + self.range[0]).float()


@functools.lru_cache(maxsize=256)
def _int_elements(count: int, symmetric: bool) -> _core.Elements:
    return _core.Elements.integers(count, symmetric)


@dataclass
class ExpCeilFormat(ScalarFormat):
    """Powers of two, 2^-(2^(bits - 1) - 1) to 2^(2^(bits - 1)): ``EXP8``. Always rounds up; there is no 0.

    A format for scales that may not be too small. 0 and negative numbers take the smallest power. Of EXP8,
    2^128 is one of ``centroids``, but beyond float32: numbers above 2^127 take 2^127, so that no scale is
    infinite.
    """

    bits_: int
    _type: str = "exp"

    def __post_init__(self) -> None:
        if not 1 <= _checks.integer("bits", self.bits_) <= 8:
            raise ValueError(f"bits: got {self.bits_}, expected 1 to 8")

    def __str__(self) -> str:
        return f"EXP{self.bits_}"

    def _elements(self) -> _core.Elements:
        return _core.Elements.powers(2**self.bits_)

    @property
    def bits(self) -> float:
        return float(self.bits_)

    @property
    def _exponents(self) -> tuple[int, int]:
        return 1 - 2 ** (self.bits_ - 1), min(2 ** (self.bits_ - 1), 127)

    @property
    def centroids(self) -> tuple[float, ...]:
        lowest = self._exponents[0]
        return tuple(2.0**exponent for exponent in range(lowest, lowest + 2**self.bits_))

    @property
    def range(self) -> tuple[float, float]:
        return (2.0 ** self._exponents[0], 2.0 ** (2 ** (self.bits_ - 1)))

    def _reference_codes(self, values: Tensor) -> Tensor:
        lowest, highest = self._exponents
        fraction, exponent = torch.frexp(values.double().nan_to_num(0.0, posinf=2.0**200))
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
        return torch.where(values > 0, exponent.clamp(lowest, highest), lowest).long() - lowest

    def _reference_values(self, codes: Tensor) -> Tensor:
        lowest, highest = self._exponents
        return _numerics.power_of_two((codes + lowest).clamp(max=highest)).float()


_SPECIAL = {"FP32": FP32, "FP16": FP16, "BFLOAT16": BFLOAT16}
_FLOAT = re.compile(r"(U?)E(\d{1,3})M(\d{1,3})(?:-(RN|RZ|RI))?")
_EXP = re.compile(r"EXP(\d{1,3})")


def parse(s: str) -> ScalarFormat:
    """An element format by name: ``FP32``, ``FP16``, ``BFLOAT16``; ``[U]E<e>M<m>[-RN|-RZ|-RI]``; ``EXP<n>``.

    ``E0M<m>`` is ``IntFormat(1 + m)``. Not the inverse of ``str()``, which leaves roundings out and writes
    FLOAT32 for FP32. Raises ValueError for all else, one exponent bit included.
    """
    _checks.string("format", s, "the name of an element format")
    if s in _SPECIAL:
        return TorchFormat(_SPECIAL[s].dtype)
    if match := _EXP.fullmatch(s):
        return ExpCeilFormat(int(match[1]))
    match = _FLOAT.fullmatch(s)
    expected = "FP32, FP16, BFLOAT16, EXP<n> or [U]E<e>M<m>[-RN|-RZ|-RI]"
    if match is None:
        raise ValueError(f"format: got {s!r}, expected {expected}")
    unsigned, exponent_bits, mantissa_bits, suffix = match[1], int(match[2]), int(match[3]), match[4]
    if exponent_bits == 0:
        if unsigned or suffix:
            raise ValueError(f"format: got {s!r}, expected E0M<m> without U and rounding")
        return IntFormat(1 + mantissa_bits)
    if exponent_bits == 1:
        raise ValueError(
            f"format: got {s!r}, expected 0 or at least 2 exponent bits (use E0M{mantissa_bits + 1})"
        )
    rounding = {short: name for name, short in _ROUNDINGS.items()}[suffix or "RN"]
    return FPFormat(exponent_bits, mantissa_bits, rounding, not unsigned)
