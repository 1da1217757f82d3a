"""Formats: what is stored for a matrix, and how it decodes.

A format is an immutable description. It has a short form for tables and the command line
(``uniform:4:g128``) and a JSON form, which files store.
"""

from __future__ import annotations

import json as _json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantloom import _checks, _core

__all__ = [
    "BCQ",
    "SDR",
    "Codebook",
    "Format",
    "Outliers",
    "SpQR",
    "Trellis",
    "Uniform",
    "VectorCodebook",
    "format_from_json",
    "format_table",
    "parse_format",
]

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

    def size_in_bits(self, n: int, k: int) -> int:
        """Bits of all planes of a matrix ``[n, k]``, padding included, optional planes left out.

        Raises ValueError if the format cannot take that size.
        """
        widths = {"float32": 32, "int32": 32, "float16": 16, "bfloat16": 16, "uint16": 16}
        return sum(
            widths.get(plane["dtype"], 8) * math.prod(plane["shape"])
            for plane in self.planes(n, k)
            if not plane["optional"]
        )

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
        dtype = _scale_dtype(self.scale_dtype)
        set_field(self, "scale_dtype", dtype)
        set_field(self, "_json", _core.uniform_json(self.bits, columns, self.symmetric, dtype))

    def to_json(self) -> str:
        return self._json


@dataclass(frozen=True)
class Codebook(Format):
    """A table of values: ``value = scale * table[code]``.

    Args:
        table: the name of a well-known table, or 2 to 256 finite values that rise strictly:

            - ``"nf4"``: 4-bit NormalFloat (Dettmers et al. 2023, QLoRA)
            - ``"nf3"``: the same quantiles for 8 entries
            - ``"sf4"``: 4-bit Student float with 5 degrees of freedom (Dotzel et al. 2024)
            - ``"fp4"``: 4-bit float E2M1, its 15 values in rising order

            Values are rounded to float16, in which they are stored; two that coincide then are refused.
            Afterwards ``table`` is the name, or a tuple of the rounded values; ``values`` always has them.
        bits: the width of a code, 1 to 8; None: as few as number the entries.
        group_size: columns along in_features that share a scale: an integer > 0 (the last group of a
            row may be shorter), ``"channel"`` (one scale per row) or ``"tensor"`` (one for the matrix).
        scale_dtype: the dtype in which scales are stored: ``"float16"``, ``"bfloat16"`` or
            ``"float32"``. Codes are chosen against the scale as stored.

    Only a named table (at its own width) has a short form that ``parse_format`` reads; others are
    described by their values in JSON.

    Raises TypeError or ValueError naming the argument.
    """

    table: str | Sequence[float] = "nf4"
    bits: int | None = None
    group_size: int | str = 64
    scale_dtype: str = "float16"
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = self.table if isinstance(self.table, str) else _table_values(self.table)
        bits = 0
        if self.bits is not None:
            bits = _checks.integer("bits", self.bits, 1, expected="an integer from 1 to 8")
        columns = group_columns(self.group_size)
        text = _core.codebook_json(table, bits, columns, _scale_dtype(self.scale_dtype))
        entry = _json.loads(text)
        set_field = object.__setattr__
        named = isinstance(entry["table"], str)
        set_field(self, "table", entry["table"] if named else tuple(entry["table"]))
        set_field(self, "bits", entry["bits"])
        set_field(self, "group_size", entry["group_size"])
        set_field(self, "scale_dtype", entry["scale_dtype"])
        set_field(self, "_json", text)

    @property
    def values(self) -> tuple[float, ...]:
        """The entries of the table, as float16 holds them."""
        return tuple(_core.codebook_values(self._json))

    def to_json(self) -> str:
        return self._json


@dataclass(frozen=True)
class VectorCodebook(Format):
    """Tables of short vectors: ``values = scale * (table[0][code 0] + table[1][code 1] + ...)``.

    The weights of `dim` consecutive columns are one code of each table; with one table (the usual case) that
    is vector quantization, at ``log2(entries) / dim`` bits per weight beside scales and the table.

    Args:
        entries: of each table, 2 to 65536; a code takes as few bits as number them.
        dim: columns of a vector, 1 to 16. CUDA kernels take 2, 4 and 8.
        group_size: columns along in_features that share a scale: a multiple of `dim` (the last group of a
            row may be shorter), ``"channel"`` (one scale per row) or ``"tensor"`` (one for the matrix). The
            scale of a group is its largest magnitude, and tables are in units of it.
        codebooks: tables whose entries are added, 1 to 8.
        scale_dtype: the dtype in which scales are stored: ``"float16"``, ``"bfloat16"`` or
            ``"float32"``. Codes are chosen against the scale as stored.
        table: None: ``quantize`` fits tables to each matrix (k-means of an even subset of its vectors over
            their scales, one table after the other). Else values ``[entries, dim]`` or
            ``[codebooks, entries, dim]``, which are rounded to float16; afterwards a read-only float16 array
            ``[codebooks, entries, dim]``. A packed tensor holds its tables in the plane ``codebook``, not in
            its format.

    Codes are the nearest entries of one table after the other: with one table, the nearest vector.

    Only formats without a table have a short form that ``parse_format`` reads; others are described by their
    values in JSON.

    Raises TypeError or ValueError naming the argument.
    """

    entries: int
    dim: int
    group_size: int | str = 64
    codebooks: int = 1
    scale_dtype: str = "float16"
    table: Any = field(default=None, compare=False)
    _json: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name, most in (("entries", 65536), ("dim", 16), ("codebooks", 8)):
            least = 2 if name == "entries" else 1
            value = _checks.integer(name, getattr(self, name), expected=f"an integer from {least} to {most}")
            set_field(self, name, value)
        columns = group_columns(self.group_size)
        if columns > 0:
            set_field(self, "group_size", columns)
        set_field(self, "scale_dtype", _scale_dtype(self.scale_dtype))
        values: list[float] = []
        if self.table is not None:
            table = _vector_tables(self.table, self.codebooks, self.entries, self.dim)
            values = table.ravel().tolist()
            set_field(self, "table", table)
        text = _core.vector_codebook_json(
            self.entries, self.dim, columns, self.codebooks, self.scale_dtype, values
        )
        set_field(self, "_json", text)

    @property
    def bits(self) -> int:
        """The width of a code."""
        return (self.entries - 1).bit_length()

    def to_json(self) -> str:
        return self._json


@dataclass(frozen=True)
class Outliers(Format):
    """Another format, and a few weights more exactly: ``value = dense value + outlier``.

    Args:
        dense: the format of all weights, or its short form.
        percent: of the weights, above 0 and below 100: those of the largest magnitude in the matrix become
            outliers. The dense format is fitted to the others; an outlier is what the dense value lacks, in
            float16, with its column in 16 bits (32 where in_features is above 65536).
        count: of the outliers, in place of `percent`: the format of a packed tensor. ``quantize`` does not
            take it, as it does not say which weights are meant.

    Raises TypeError or ValueError naming the argument.
    """

    dense: Format | str
    percent: float | None = None
    count: int | None = None
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "dense", parse_format(self.dense))
        if (self.percent is None) == (self.count is None):
            raise ValueError("percent, count: got both or none, expected one of them")
        if self.percent is not None:
            set_field(
                self, "percent", _checks.real("percent", self.percent, "a number above 0 and below 100")
            )
        else:
            set_field(self, "count", _checks.integer("count", self.count, 0))
        set_field(self, "_json", _core.outliers_json(self.dense.to_json(), self.percent, self.count or 0))

    @property
    def group_size(self) -> int | str:
        """That of the dense format."""
        return self.dense.group_size

    @property
    def scale_dtype(self) -> str:
        """That of the dense format."""
        return self.dense.scale_dtype

    def to_json(self) -> str:
        return self._json


@dataclass(frozen=True)
class SpQR(Format):
    """An evenly spaced grid whose scales and zero points are codes themselves, those of several rows on one
    grid: ``value = scale * (code - zero_point)``, ``scale = step * (scale code - zero)``, and zero points,
    which need not be integers, likewise (the bilevel quantization of SpQR: Dettmers et al., 2023).

    The outliers of SpQR come from the rounding: ``ql.quantize(w, ql.SpQR(3), ql.GPTQ(hessian,
    outliers=ql.OutlierSearch(percent=1)))`` makes the format ``Outliers`` around this one.

    Args:
        bits: of a weight, 1 to 8 (the paper's b_w).
        group_size: columns along in_features that share scale and zero point, an integer > 0 (beta 1).
        scale_bits, zero_bits: of the code of a scale and of a zero point, 1 to 8 (b_s, b_z).
        block: rows whose scales (and whose zero points) lie on one grid of two float16 numbers (beta 2).

    With a ``ScaleSearch``, roundings also search among all codes of scale and zero point of each group.

    Raises TypeError or ValueError naming the argument.
    """

    bits: int
    group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    block: int = 16
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = ("bits", "group_size", "scale_bits", "zero_bits", "block")
        for name in names:
            expected = "an integer from 1 to 8" if name.endswith("bits") else "an integer > 0"
            object.__setattr__(self, name, _checks.integer(name, getattr(self, name), expected=expected))
        object.__setattr__(self, "_json", _core.spqr_json(*(getattr(self, name) for name in names)))

    def average_bits(self, outlier_rate: float = 0.0) -> float:
        """Bits per weight by the formula of the paper: ``bits + (scale_bits + zero_bits) / group_size + 64 /
        (group_size * block) + 32 * outlier_rate``. ``PackedTensor.bits_per_weight`` counts stored bits, with
        the padding of rows and 32 bits for each row that has outliers beside it.
        """
        return _core.spqr_average_bits(self._json, _checks.real("outlier_rate", outlier_rate))

    def to_json(self) -> str:
        return self._json


@dataclass(frozen=True)
class SDR(Format):
    """The significant digits of 8-bit integers (SDR, the codec of QRazor: Lee et al., 2025).

    Each row is rounded to 8-bit integers with one scale, ``max|w| / 127``; the integers of a group of columns
    are cut to `bits` bits behind a shift that the group shares: ``value = scale * code * 2**shift``. A group
    thus costs 3 bits (for 4-bit codes) instead of a scale of 16.

    Args:
        bits: of a code, 2 to 7.
        group_size: columns along in_features that share a shift, an integer > 0.
        scale_dtype: of the rows' scales: ``"float16"``, ``"bfloat16"`` or ``"float32"``.

    Raises TypeError or ValueError naming the argument.
    """

    bits: int = 4
    group_size: int = 16
    scale_dtype: str = "float16"
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expected = "an integer from 2 to 7"
        object.__setattr__(self, "bits", _checks.integer("bits", self.bits, expected=expected))
        size = _checks.integer("group_size", self.group_size, expected="an integer > 0")
        object.__setattr__(self, "group_size", size)
        dtype = _scale_dtype(self.scale_dtype)
        object.__setattr__(self, "scale_dtype", dtype)
        object.__setattr__(self, "_json", _core.sdr_json(self.bits, size, dtype))

    def average_bits(self, k: int) -> float:
        """Bits of a weight in rows of k: ``bits + shift_bits / group_size + scale bits / k``, where a shift
        takes 3 bits for codes of 4 and less, 2 for 5 and 6, 1 for 7. ``PackedTensor.bits_per_weight`` also
        counts the padding of rows to whole words of 32 bits."""
        return _core.sdr_average_bits(self._json, _checks.integer("k", k, 1))

    def to_json(self) -> str:
        return self._json


def _vector_tables(table: Any, codebooks: int, entries: int, dim: int) -> np.ndarray:
    shapes = [(codebooks, entries, dim), *([(entries, dim)] if codebooks == 1 else [])]
    expected = "numbers of shape " + " or ".join(map(str, shapes))
    if hasattr(table, "detach"):  # a torch tensor
        table = table.detach().cpu()
        table = table.float() if table.is_floating_point() else table
    try:
        values = np.asarray(table)
    except ValueError:  # rows of different lengths
        raise ValueError(f"table: got rows of different lengths, expected {expected}") from None
    if values.dtype.kind not in "fiu":
        raise TypeError(f"table: got {values.dtype.name} values, expected {expected}")
    if values.shape not in shapes:
        raise ValueError(f"table: got shape {values.shape}, expected {expected}")
    if not np.isfinite(values).all() or (np.abs(values) > 65504).any():
        raise ValueError("table: got values that float16 cannot hold, expected finite ones of at most 65504")
    values = values.astype(np.float16).reshape(shapes[0]) + np.float16(0)  # -0 becomes 0
    values.setflags(write=False)
    return values


@dataclass(frozen=True)
class Trellis(Format):
    """Trellis-coded tiles of 16 x 16 weights (QTIP, Tseng et al. 2024), in the layout of EXL3: the least
    error for its bits, from a search that costs minutes where a grid costs seconds.

    ``W = diag(output_scales) P Q P diag(input_scales)``: Q are the weights that the tiles' rings decode to,
    P is an orthonormal Hadamard transform of blocks of 128, which makes any weights nearly normal, and
    scales carry random signs.

    Args:
        bits: 1, 1.5, 2, ... 8; at most 4 for ``"octagon"``, ``"hyb"`` and ``"rptc2"``.
        codebook: how a window of bits becomes weights; see ``quantloom.trellis.codebook``:
            ``"mul1"`` (default), ``"3inst"``, ``"mcg"``, ``"1mad"``, ``"octagon"``, ``"hyb"``, ``"rptc"``,
            ``"rptc2"``, and ``"mcg-HEX"``, ``"mul1-HEX"`` or ``"octagon-HEX"`` for an odd multiplier of 8
            hexadecimal digits.
        rotation: 128, or None for none: weights should then be nearly normal as they are.
        window: bits of a state, 8 to 20 (16 with a table). More bits err less; encoding takes twice as long
            for each.

    Matrices of any size: tiles are padded to multiples of 128 rows and columns (16 without rotation), and
    the padding counts as stored bits.

    Raises TypeError or ValueError naming the argument.
    """

    bits: float
    codebook: str = "mul1"
    rotation: int | None = 128
    window: int = 16
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        bits = _checks.real("bits", self.bits, "1 to 8 in steps of 1/2")
        codebook = _checks.string("codebook", self.codebook, "the name of a codebook")
        rotation = 0
        if self.rotation is not None:
            rotation = _checks.integer("rotation", self.rotation, 1, "128 or None")
        window = _checks.integer("window", self.window, expected="an integer from 8 to 20")
        text = _core.trellis_json(bits, codebook, rotation, window)
        entry = _json.loads(text)
        set_field(self, "bits", entry["bits"])
        set_field(self, "codebook", entry["codebook"])
        set_field(self, "rotation", entry["rotation"] or None)
        set_field(self, "window", window)
        set_field(self, "_json", text)

    def to_json(self) -> str:
        return self._json


@dataclass(frozen=True)
class BCQ(Format):
    """Binary coding: ``value = offset + sum of +-scale`` over planes of signs (LUT-GEMM: Park et al. 2024).

    Args:
        bits: planes, 1 to 8.
        group_size: columns along in_features that share the planes' scales: an integer > 0 or ``"channel"``.
        offset: whether a group has an offset too. Without one a grid is symmetric about zero.
        scale_dtype: of scales and offsets: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        rounds: of the alternating least squares that fit a group, 0 to 1000: scales for the signs, signs for
            the scales. Columns are weighted by diag(H) where the rounding has a Hessian.
        start: ``"best"``: of several, the one that ends with the least error. ``"greedy"``: one plane after
            the other, each with the mean magnitude of what is left; then 0 rounds are the greedy fit, 1 the
            refined and more the alternating one of the literature.

    ``quantloom.layouts.to_bcq`` writes a uniform tensor as binary coding.

    Raises TypeError or ValueError naming the argument.
    """

    bits: int
    group_size: int | str = 128
    offset: bool = False
    scale_dtype: str = "float16"
    rounds: int = 15
    start: str = "best"
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "bits", _checks.integer("bits", self.bits, expected="an integer from 1 to 8"))
        columns = group_columns(self.group_size)
        if columns > 0:
            set_field(self, "group_size", columns)
        _checks.boolean("offset", self.offset)
        dtype = _scale_dtype(self.scale_dtype)
        set_field(self, "scale_dtype", dtype)
        set_field(
            self, "rounds", _checks.integer("rounds", self.rounds, expected="an integer from 0 to 1000")
        )
        greedy = _checks.choice("start", self.start, ("best", "greedy")) == "greedy"
        set_field(self, "_json", _core.bcq_json(self.bits, columns, self.offset, dtype, self.rounds, greedy))

    def to_json(self) -> str:
        return self._json


def _scale_dtype(dtype: Any) -> str:
    if not isinstance(dtype, str):  # np.float16, np.dtype("float16"), torch.float16
        name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
        dtype = name.removeprefix("torch.")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f'scale_dtype: got {dtype!r}, expected "float16", "bfloat16" or "float32"')
    return dtype


def _table_values(table: Any) -> list[float]:
    expected = "the name of a table or a sequence of 2 to 256 numbers"
    try:
        values = list(table)
    except TypeError:
        raise TypeError(f"table: got {_checks.type_name(table)}, expected {expected}") from None
    if len(values) > 256:
        raise ValueError(f"table: got {len(values)} entries, expected {expected}")
    return [_checks.real("table", value, "finite numbers") for value in values]


def format_from_json(json: str) -> Format:
    """The format that a JSON description (``Format.to_json``) stands for.

    Raises ValueError for unknown formats, unknown or contradictory keys.
    """
    # The C++ side reads, checks and normalizes; only then are the fields picked from its answer.
    entry = _json.loads(_core.format_canonical(_checks.string("json", json)))
    return _from_fields(entry)


def parse_format(spec: str | Format) -> Format:
    """The format of a short form; a ``Format`` is returned as it is.

    - ``uniform:BITS[:gN|:channel|:tensor][:sym|:asym][:f16|:bf16|:f32]``; defaults: g128, sym, f16
    - ``codebook:TABLE[:gN|:channel|:tensor][:f16|:bf16|:f32]`` with TABLE nf4, nf3, sf4 or fp4; defaults:
      g64, f16
    - ``vector_codebook:[TABLESx]ENTRIESxDIM[:gN|:channel|:tensor][:f16|:bf16|:f32]``, with tables fitted to
      each matrix; defaults: g64 (or the next multiple of DIM), f16
    - ``additive:TABLESxBITS[:gIN|:gOUTxIN][:scaleN|:channel][:sBITS][:t[GROUPSx]BITS][:f16|:bf16|:f32]``;
      defaults: g8, channel, f16, and scales and tables as they are
    - ``trellis:BITS[:CODEBOOK][:plain][:lWINDOW]``; defaults: mul1, rotated, l16
    - ``spqr:BITS[:gN][:sBITS][:zBITS][:bROWS]``; defaults: g16, s3, z3, b16
    - ``sdr:BITS[:gN][:f16|:bf16|:f32]`` with 2 to 7 BITS; defaults: g16, f16
    - ``bcq:BITS[:gN|:channel][:offset][:f16|:bf16|:f32][:rROUNDS][:greedy]``; defaults: g128, no offset, f16,
      r15
    - ``outliers:PERCENT%:DENSE`` with the short form of another format; ``outliers:nCOUNT:DENSE`` for the
      format of a packed tensor

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
    if entry["format"] == "uniform":
        return Uniform(entry["bits"], entry["group_size"], entry["symmetric"], entry["scale_dtype"])
    if entry["format"] == "codebook":
        return Codebook(entry["table"], entry["bits"], entry["group_size"], entry["scale_dtype"])
    if entry["format"] == "vector_codebook":
        codebooks, entries, dim = (entry[name] for name in ("codebooks", "entries", "dim"))
        table = entry.get("table")
        if table is not None:
            table = np.array(table, dtype=np.float16).reshape(codebooks, entries, dim)
        return VectorCodebook(entries, dim, entry["group_size"], codebooks, entry["scale_dtype"], table)
    if entry["format"] == "additive":
        from quantloom.formats.additive import Additive

        return Additive(**{name: value for name, value in entry.items() if name not in ("format", "version")})
    if entry["format"] == "outliers":
        return Outliers(_from_fields(entry["dense"]), entry.get("percent"), entry.get("count"))
    if entry["format"] == "spqr":
        names = ("bits", "group_size", "scale_bits", "zero_bits", "block")
        return SpQR(*(entry[name] for name in names))
    if entry["format"] == "sdr":
        return SDR(entry["bits"], entry["group_size"], entry["scale_dtype"])
    if entry["format"] == "bcq":
        return BCQ(*(entry[n] for n in ("bits", "group_size", "offset", "scale_dtype", "rounds", "start")))
    if entry["format"] == "trellis":
        return Trellis(entry["bits"], entry["codebook"], entry["rotation"] or None, entry["window"])
    raise RuntimeError(f"format: got {entry['format']!r}, which this version of the package cannot describe")
