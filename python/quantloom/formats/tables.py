"""Tables of numbers as element formats."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantloom import _checks, _core
from quantloom.formats import _numerics
from quantloom.formats.base import ScalarFormat

if TYPE_CHECKING:
    from quantloom.formats.encoded import Planes

__all__ = ["NF4", "SF4_DF5", "LUTFormat", "lut_function", "lut_grid", "nf_approx"]


def numbers(name: str, values: Iterable[float] | Tensor) -> tuple[float, ...]:
    """A tuple of finite floats."""
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().tolist()
    return tuple(_checks.real(name, value, "finite numbers") for value in values)


def optional_range(value: Iterable[float] | None) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = numbers("range", value)
    return (low, high)


@dataclass
class LUTFormat(ScalarFormat):
    """A table of values: ``LUT4[NF]``, with ceil(log2 n) bits in the name and log2 n in ``bits``.

    x takes the nearest value; codes are chosen among midpoints in float32, and **x equal to a midpoint takes
    the lower value**. The table itself is not in ``count_bits``; it is in the bytes of ``encode``.

    Args:
        values: ascending numbers.
        name: for ``str()``.
        _range: the range that block scales refer to (see ``LinearScalingFormat``); (min, max) by default.
    """

    values: tuple[float, ...]
    name: str
    _range: tuple[float, float] | None = None
    _type: str = "lut"

    def __post_init__(self) -> None:
        self.values = numbers("values", self.values)
        if not self.values or any(b < a for a, b in zip(self.values, self.values[1:])):
            raise ValueError(f"values: got {len(self.values)} numbers, expected at least one, ascending")
        _checks.string("name", self.name)
        self._range = optional_range(self._range) or (self.values[0], self.values[-1])

    @classmethod
    def create(
        cls, values: Iterable[float] | Tensor, name: str, range: tuple[float, float] | None = None
    ) -> LUTFormat:
        """A table of values (any iterable or a tensor)."""
        return cls(tuple(values.tolist()) if isinstance(values, Tensor) else tuple(values), name, range)

    def __str__(self) -> str:
        return f"LUT{math.ceil(self.bits)}[{self.name}]"

    def _elements(self) -> _core.Elements:
        return _table_elements(self.values)

    @property
    def bits(self) -> float:
        return math.log2(len(self.values))

    @property
    def range(self) -> tuple[float, float]:
        return self._range

    @property
    def centroids(self) -> tuple[float, ...]:
        return self.values

    @property
    def boundaries(self) -> Tensor:
        """The midpoints between neighbouring values, float32."""
        table = torch.tensor(self.values, dtype=torch.float32, device="cpu")
        return (table[1:] + table[:-1]) / 2

    def _reference_codes(self, values: Tensor) -> Tensor:
        places = torch.bucketize(values.contiguous(), self.boundaries.to(values.device))
        return torch.where(values.isnan(), 0, places)

    def _reference_values(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=codes.device)[codes]

    def _put_codes(self, codes: Tensor | _numerics.Rounded, planes: Planes) -> None:
        planes.put_table("codebook", self.values)
        super()._put_codes(codes, planes)

    def _get_codes(self, planes: Planes, count: int) -> Tensor | _numerics.Packed:
        planes.check_table("codebook", self.values)
        return super()._get_codes(planes, count)


@functools.lru_cache(maxsize=256)
def _table_elements(values: tuple[float, ...]) -> _core.Elements:
    return _core.Elements.table(values)


def lut_function(fn: Callable[[Tensor], Tensor], bits: int, name: str) -> LUTFormat:
    """The values of an ascending function at 2^bits evenly spaced places in [-1, 1]."""
    return LUTFormat.create(
        fn(torch.linspace(-1, 1, 2 ** _checks.integer("bits", bits, 0), device="cpu")), name
    )


def nf_approx(bits: int) -> LUTFormat:
    """(x + x^3) / 2: close to NormalFloat at any number of bits, ``LUT5[NF-approx]``."""
    return lut_function(lambda x: (x + x**3) / 2, bits, "NF-approx")


def lut_grid(resolution: float, max: float) -> LUTFormat:
    """Multiples of `resolution`, as far as needed to reach +-`max`: 2 ceil(max / resolution) + 1 values.

    ``LUT6[GRID{0.58}]``: made to be entropy-coded (``CompressedLUTFormat``), so that the number of values is
    of no matter.
    """
    step, limit = _checks.real("resolution", resolution), _checks.real("max", max)
    if step <= 0 or limit < 0:
        raise ValueError(f"resolution, max: got {step}, {limit}, expected a step > 0 and a limit >= 0")
    # 0.9 / 0.06 is a little more than 15 in floating point.
    half = math.ceil(limit / step * (1 - 1e-12))
    if half >= 1 << 23:
        raise ValueError(f"resolution: got {step}, expected steps of which 2**24 reach {limit}")
    return LUTFormat.create(step * torch.arange(-half, half + 1, device="cpu"), f"GRID{{{resolution}}}")


NF4 = LUTFormat(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "NF",
)
"""NormalFloat (Dettmers et al., 2023, QLoRA)."""

SF4_DF5 = LUTFormat(
    (
        -1.0,
        -0.628,
        -0.455,
        -0.334,
        -0.237,
        -0.153,
        -0.075,
        0.0,
        0.066,
        0.133,
        0.205,
        0.284,
        0.376,
        0.491,
        0.657,
        1.0,
    ),
    "SF_DF5",
)
"""Student float with 5 degrees of freedom (Dotzel et al., 2024), to three decimals."""
