"""The format of additive quantization (AQLM)."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantloom import _checks, _core
from quantloom.formats.packed import Format, _scale_dtype

__all__ = ["Additive"]


@dataclass(frozen=True)
class Additive(Format):
    """Additive quantization (AQLM: Egiazarian et al., 2024): the weights of `out_group` rows by `in_group`
    columns are one code of each of several tables, ``values = scale * (table[0][code 0] + ...)``.

    Args:
        codebooks: tables whose entries are added, 1 to 8.
        bits: of a code, 1 to 16; a table has ``2**bits`` entries.
        in_group, out_group: columns and rows of a block, at most 16 weights together.
        scale_group: columns that share a scale: a multiple of `in_group`, or ``"channel"``: one scale for
            each group of rows. A scale is the root mean square of what it scales, tables are in units of it.
        scale_dtype: the dtype in which scales are stored: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        scale_bits: 0: scales are stored as they are. 1 to 15: as codes of so many bits into ``2**scale_bits``
            levels that each group of rows has, if it has more scales than that.
        table_bits: the same for the numbers of tables: ``2**table_bits`` levels for each place in an entry.
        table_groups: runs of entries with levels of their own, a divisor of ``2**bits``.

    Tables are fitted to each matrix, one to what those before leave (residual k-means); a packed tensor holds
    them in the plane ``codebook``. ``Nearest`` and ``GPTQ`` choose codes one table after the other;
    ``BeamSearch`` chooses them together, and refines tables and scales, for the least error of the outputs.
    Levels are found by one-dimensional k-means; where there are as many as numbers, these are stored exactly,
    as they are. A tensor with levels is rounded on the CPU; products on CUDA devices expand them when they
    are prepared.

    The short form is ``additive:TABLESxBITS[:gIN|:gOUTxIN][:scaleN|:channel][:sBITS][:t[GROUPSx]BITS]
    [:f16|:bf16|:f32]``.

    Raises TypeError or ValueError naming the argument.
    """

    codebooks: int = 2
    bits: int = 8
    in_group: int = 8
    out_group: int = 1
    scale_group: int | str = "channel"
    scale_dtype: str = "float16"
    scale_bits: int = 0
    table_bits: int = 0
    table_groups: int = 1
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name, most in (("codebooks", 8), ("bits", 16), ("in_group", 16), ("out_group", 16)):
            value = _checks.integer(name, getattr(self, name), expected=f"an integer from 1 to {most}")
            set_field(self, name, value)
        columns = -1
        if self.scale_group != "channel":
            expected = f'a multiple of in_group = {self.in_group}, or "channel"'
            if isinstance(self.scale_group, str):
                raise ValueError(f"scale_group: got {self.scale_group!r}, expected {expected}")
            columns = _checks.integer("scale_group", self.scale_group, 1, expected)
            set_field(self, "scale_group", columns)
        set_field(self, "scale_dtype", _scale_dtype(self.scale_dtype))
        for name, least in (("scale_bits", 0), ("table_bits", 0), ("table_groups", 1)):
            set_field(self, name, _checks.integer(name, getattr(self, name), least))
        sizes = (self.codebooks, self.bits, self.in_group, self.out_group, columns)
        levels = (self.scale_bits, self.table_bits, self.table_groups)
        set_field(self, "_json", _core.additive_json(*sizes, self.scale_dtype, *levels))

    def average_bits(self, n: int, k: int) -> float:
        """Bits per weight of a matrix ``[n, k]`` as publications of AQLM count them: codes, tables and
        scales, without padding; with `scale_bits`, scales count so many bits even where they are stored as
        they are. 2.008 for 2 tables of 8 bits at 4096 x 4096, 2.504 for 1 of 16.

        ``size_in_bits(n, k) / (n * k)`` are those of the bytes that are stored."""
        n, k = _checks.integer("n", n, 0), _checks.integer("k", k, 0)
        return _core.additive_average_bits(self._json, n, k)

    def to_json(self) -> str:
        return self._json
