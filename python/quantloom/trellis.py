"""Trellis-coded quantization, below the format ``quantloom.Trellis``: codebooks, rings, and their distortion.

A ring is a closed string of ``bits`` bits for each weight. The state of weight i is the window of 16 bits
that ends with the weight's own bits, and the codebook maps states to weights (float16 numbers), one or two
at a time. Any string of bits is a ring.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from quantloom import _arrays, _checks, _core, _fitting
from quantloom._trellis_search import PUBLISHED_MCG, MultiplierSearch, SearchRow, search

__all__ = [
    "SEARCHES",
    "Codebook",
    "DistortionRow",
    "MultiplierSearch",
    "SearchRow",
    "best_ratio",
    "codebook",
    "codebook_names",
    "decode",
    "decode_rings",
    "decode_tiles",
    "distortion",
    "distortion_table",
    "encode",
    "encode_rings",
    "gather_tiles",
    "pack",
    "quantize",
    "search",
    "unpack",
]

SEARCHES = ("fast", "normal", "best")
MULTIPLIERS = tuple(f"mcg-{multiplier:08X}" for multiplier in PUBLISHED_MCG)
_BITS = "1 to 8 in steps of 1/2"


class Codebook(NamedTuple):
    """The weights of all states.

    name: in its shortest form. rms: of all weights. values: float32 ``[2**window, weights_per_step]``, each
    a float16 number.
    """

    name: str
    rms: float
    values: np.ndarray


def codebook_names() -> list[str]:
    """The names that ``codebook`` takes, without multipliers."""
    return _core.trellis_codebook_names()


def _named(name: Any, window: Any) -> tuple[str, int]:
    return (
        _checks.string("codebook", name, "the name of a codebook"),
        _checks.integer("window", window, expected="an integer from 4 to 24"),
    )


def codebook(name: str, window: int = 16) -> Codebook:
    """The codebook of a name.

    - ``"3inst"``: the state s makes ``89226354 s + 64248484``, whose masked halves are two float16 numbers;
      their sum is the weight (QTIP, Tseng et al. 2024)
    - ``"mcg"``, ``"mcg-HEX"``: the same of ``multiplier * s``, 0xCBAC1FED by default
    - ``"mul1"``, ``"mul1-HEX"``: the sum of the four bytes of ``multiplier * s``, scaled by one float16 FMA;
      0x83DCD12D by default
    - ``"octagon"``, ``"octagon-HEX"``: two weights a state from ``multiplier * s``, whose four bytes are
      steps along axes at 0, 90, 45 and 135 degrees, 0xF3C14DB7 by default; for products at the speed of
      memory, at an error that is 3% above mul1's at 2 bits and 12% at 4
    - ``"1mad"``: the byte sum of ``34038481 s + 76625530`` (QTIP)
    - ``"hyb"``: two weights a state, by a hash that looks into a table of 512 pairs (QTIP)
    - ``"rptc"``, ``"rptc2"``: normal quantiles in random order, one or two weights a state (Mao, Gray and
      Linder 2010): a table of all states, the yardstick of the others

    window: bits of a state, 4 to 24 (``"hyb"``: at least 15).

    Raises ValueError.
    """
    return Codebook(*_core.trellis_codebook(*_named(name, window)))


def best_ratio(bits: float, codebook: str = "mul1") -> float:
    """What a normal source's standard deviation should be over the codebook's RMS at so many bits.

    Measured with a window of 16, for ``"octagon"`` and ``"mul1"``; other codebooks take mul1's.
    """
    return _core.trellis_best_ratio(_half_bits(bits), _named(codebook, 16)[0])


def _half_bits(bits: Any) -> int:
    number = _checks.real("bits", bits, _BITS)
    if not 1 <= number <= 8 or 2 * number != round(2 * number):
        raise ValueError(f"bits: got {bits!r}, expected {_BITS}")
    return round(2 * number)


def _search(value: Any) -> str:
    return _checks.choice("search", value, SEARCHES)


def _rings(argument: str, value: Any, dtype: type) -> np.ndarray:
    """A matrix of one ring a row."""
    array = _arrays.describe(argument, value)
    if array.kind != "numpy":
        raise TypeError(f"{argument}: got {_checks.type_name(value)}, expected a NumPy array")
    if array.dtype != np.dtype(dtype).name:
        raise TypeError(f"{argument}: got {array.dtype}, expected {np.dtype(dtype).name}")
    if len(array.shape) != 2:
        raise ValueError(f"{argument}: got shape {_arrays.shape_text(array.shape)}, expected one ring a row")
    return np.ascontiguousarray(array.value)


def _core_array(argument: str, array: np.ndarray) -> Any:
    return _arrays.describe(argument, array).core


def encode(
    targets: np.ndarray,
    bits: float,
    codebook: str = "mul1",
    window: int = 16,
    search: str = "normal",
    threads: int = 0,
) -> np.ndarray:
    """The states of rings near `targets`, by a Viterbi search: uint32 ``[rings, length / weights_per_step]``.

    Args:
        targets: float32 ``[rings, length]`` in the codebook's units and the order of the ring.
        search: ``"normal"``: two passes, the first of 128 weights to each side of the ring's seam.
            ``"fast"``: of 64, for 0.5 to 0.8% more squared error. ``"best"``: two rounds that close where
            they meet, for 0.1 to 0.3% less.
        threads: 0 for OpenMP's default. The states are the same for any number, and on every processor.

    Raises TypeError or ValueError naming the argument.
    """
    name, window = _named(codebook, window)
    half_bits = _half_bits(bits)
    array = _rings("targets", targets, np.float32)
    steps, _ = _core.trellis_words(name, window, half_bits, array.shape[1])
    states = np.empty((len(array), steps), np.uint32)
    _core.trellis_encode(
        name,
        window,
        half_bits,
        _core_array("targets", array),
        _core_array("states", states),
        _search(search),
        _checks.thread_count(threads),
    )
    return states


def decode(
    states: np.ndarray, bits: float, codebook: str = "mul1", window: int = 16, threads: int = 0
) -> np.ndarray:
    """The weights of states: float32 ``[rings, length]``."""
    name, window = _named(codebook, window)
    array = _rings("states", states, np.uint32)
    per_step = _core.trellis_codebook(name, window)[2].shape[1]
    weights = np.empty((len(array), array.shape[1] * per_step), np.float32)
    _core.trellis_decode(
        name,
        window,
        _half_bits(bits),
        _core_array("states", array),
        _core_array("weights", weights),
        _checks.thread_count(threads),
    )
    return weights


def pack(states: np.ndarray, bits: float, codebook: str = "mul1", window: int = 16) -> np.ndarray:
    """The bits of rings: uint32 ``[rings, words]``, the earliest bit of a word its most significant.

    Raises ValueError, naming ring and step, unless each state continues the one before, around the ring.
    """
    name, window = _named(codebook, window)
    array = _rings("states", states, np.uint32)
    length = array.shape[1] * _core.trellis_codebook(name, window)[2].shape[1]
    _, count = _core.trellis_words(name, window, _half_bits(bits), length)
    words = np.empty((len(array), count), np.uint32)
    _core.trellis_pack(
        name, window, _half_bits(bits), length, _core_array("states", array), _core_array("words", words)
    )
    return words


def unpack(
    words: np.ndarray, bits: float, codebook: str = "mul1", window: int = 16, length: int = 256
) -> np.ndarray:
    """The states of the words of rings of `length` weights."""
    name, window = _named(codebook, window)
    array = _rings("words", words, np.uint32)
    length = _checks.integer("length", length, 2)
    steps, _ = _core.trellis_words(name, window, _half_bits(bits), length)
    states = np.empty((len(array), steps), np.uint32)
    _core.trellis_unpack(
        name, window, _half_bits(bits), length, _core_array("words", array), _core_array("states", states)
    )
    return states


def encode_rings(
    targets: Any,
    bits: float,
    codebook: Any = "mul1",
    search: str = "normal",
    workspace_bytes: int | None = None,
) -> tuple[Any, Any]:
    """Packed rings near `targets`, torch tensors on a CUDA device: words and squared errors.

    Args:
        targets: finite ``[rings, 256]``, in units of the codebook and in the order of the ring. Beyond 12
            from zero they are searched as 12.
        bits: a weight, 1 to 8 in steps of 1/2; at most 4 for codebooks with two weights a step.
        codebook: a name as ``codebook`` takes it, with a window of 16; or the 65536 weights of the states.
        search: ``"normal"`` (on a normal source within 0.03% of a float32 search up to 6 bits, 0.3% at 8),
            ``"fast"`` (0.1 to 0.9% more), or ``"best"`` (up to 4 bits 0.01 to 0.3% less).
        workspace_bytes: memory to work in; None for what is fast, at most half of what is free.

    Returns:
        Words ``[rings, 8 * bits]`` of int32 with the bits that ``pack`` gives, and the squared errors
        ``[rings]`` in float32. The same for any workspace and any other rings beside.

    Raises TypeError or ValueError naming the argument, RuntimeError in a build without CUDA.
    """
    return _on_cuda("targets", targets).encode_rings(targets, bits, codebook, search, workspace_bytes)


def decode_rings(words: Any, bits: float, codebook: Any = "mul1", dtype: Any = "float32") -> Any:
    """The weights ``[rings, 256]`` of packed rings ``[rings, 8 * bits]``, torch tensors on a CUDA device.

    Raises TypeError or ValueError naming the argument, RuntimeError in a build without CUDA.
    """
    return _on_cuda("words", words).decode_rings(words, bits, codebook, dtype)


def gather_tiles(matrix: Any, factor: float = 1.0) -> Any:
    """The tiles of a matrix ``[n, k]`` times `factor`, as targets ``[k / 16 * n / 16, 256]`` for
    ``encode_rings``; torch tensors on a CUDA device.

    Tiles are 16 x 16, those of the same 16 columns next to each other, in the order of a ring.

    Raises TypeError or ValueError naming the argument, RuntimeError in a build without CUDA.
    """
    return _on_cuda("matrix", matrix).gather_tiles(matrix, factor)


def decode_tiles(
    words: Any, shape: tuple[int, int], bits: float, codebook: Any = "mul1", dtype: Any = "float32"
) -> Any:
    """The matrix ``[n, k]`` of packed tiles ``[k / 16 * n / 16, 8 * bits]``, as ``gather_tiles`` orders them;
    torch tensors on a CUDA device.

    Raises TypeError or ValueError naming the argument, RuntimeError in a build without CUDA.
    """
    return _on_cuda("words", words).decode_tiles(words, shape, bits, codebook, dtype)


def _on_cuda(argument: str, value: Any) -> Any:
    """The functions for CUDA tensors, if `value` is one."""
    if not _arrays.is_torch(value) or value.device.type != "cuda":
        raise TypeError(
            f"{argument}: got {_checks.type_name(value)}, expected a torch tensor on a CUDA device"
        )
    if not _core.built_with_cuda():
        raise RuntimeError(f"{argument}: got a CUDA tensor, but this build of quantloom has no CUDA kernels")
    from quantloom import _cuda_trellis

    return _cuda_trellis


def quantize(
    w: Any,
    format: Any,
    hessian: Any,
    *,
    consistent_hessian: bool = True,
    refit: bool = True,
    damp: float = 0.01,
    act_order: bool = True,
    held_out: Any = None,
    ratio_factors: Any = None,
    output_hessian: Any = None,
    threads: int = 0,
) -> Any:
    """``quantloom.quantize(w, format, GPTQ(hessian))`` for a rotated trellis, with the choices of its own.

    Scales are fitted to root mean squares, W is divided by them and rotated, and error feedback walks over 16
    columns of that basis at a time.

    Args:
        w: ``[out_features, in_features]`` on the CPU or a CUDA device.
        format: a ``Trellis`` with its rotation (on a CUDA device of a window of 16), or its short form.
        hessian, damp, act_order, held_out, ratio_factors, output_hessian: as of ``GPTQ``.
        consistent_hessian: True: the Hessian is brought into the basis with the scales, so that the walk
            minimises the error of the layer's output. False: with their signs alone, as EXL3's own quantizer
            does; to compare with.
        refit: multiplies the scales afterwards by the factors that minimise the error of the layer's output:
            each output scale for its row, then all input scales together, then output scales again.

    Returns a ``PackedTensor``. Raises TypeError or ValueError naming the argument.
    """
    from quantloom.formats import Trellis, parse_format
    from quantloom.quantizing import quantize_trellis, require_hessians
    from quantloom.rounding import GPTQ

    matrix = _arrays.matrix("w", w, cpu=False)
    form = parse_format(format)
    if not isinstance(form, Trellis):
        raise ValueError(f"format: got {form.spec!r}, expected a trellis")
    rounding = GPTQ(
        hessian,
        damp=damp,
        act_order=act_order,
        held_out=held_out,
        ratio_factors=ratio_factors,
        output_hessian=output_hessian,
    )
    if rounding.hessian is None:
        raise ValueError("hessian: got None, expected a Hessian")
    require_hessians(matrix, rounding)
    return quantize_trellis(
        matrix,
        form,
        rounding,
        _checks.thread_count(threads),
        _checks.boolean("consistent_hessian", consistent_hessian),
        _checks.boolean("refit", refit),
    )


def distortion(
    codebook: str,
    bits: float,
    ratio: float = 1.0,
    tiles: int = 1024,
    seed: int = 0,
    window: int = 16,
    search: str = "normal",
    threads: int = 0,
) -> float:
    """The mean squared error of coding `tiles` rings of 256 independent N(0, 1) numbers, over their own mean
    square.

    ratio: the source's standard deviation over the codebook's RMS when it is coded. The bound for any code is
    ``4 ** -bits``.
    """
    name, window = _named(codebook, window)
    return _core.trellis_distortion(
        name,
        window,
        _half_bits(bits),
        _checks.real("ratio", ratio),
        _checks.integer("tiles", tiles, 1),
        _checks.integer("seed", seed, 0),
        _search(search),
        _checks.thread_count(threads),
    )


@dataclass(frozen=True)
class DistortionRow:
    """One line of the table: errors over the variance of a normal source.

    Attributes:
        code: a codebook, with ``:lWINDOW`` if its window is not 16, or ``"lloyd-max"``.
        bits: per weight.
        rms: of the codebook; None for ``"lloyd-max"``.
        unscaled: a source of unit variance on the codebook as it is; None for ``"lloyd-max"``.
        matched: the source scaled to the codebook's RMS.
        best, best_ratio: the least error of all ratios tried, and the source's standard deviation over the
            RMS there; None unless asked for.
        bound: ``4 ** -bits``.
    """

    code: str
    bits: float
    rms: float | None
    unscaled: float | None
    matched: float
    best: float | None
    best_ratio: float | None
    bound: float

    @property
    def equivalent_bits(self) -> float:
        """The bits at which the bound is the least error of this row."""
        return -0.5 * math.log2(self.matched if self.best is None else min(self.best, self.matched))


def _normal_quantiles(count: int) -> np.ndarray:
    inverse = statistics.NormalDist().inv_cdf
    return np.fromiter((inverse((i + 0.5) / count) for i in range(count)), np.float32, count)


def _lloyd_max_row(bits: float) -> DistortionRow:
    """The best table of 2^bits values, fitted to normal quantiles."""
    sample = _normal_quantiles(1 << 18)
    fit = _fitting.lloyd_max(sample, round(2**bits), start="quantile", threshold=0.0)
    centroids = np.asarray(fit.centroids, np.float64)
    edges = (centroids[1:] + centroids[:-1]) / 2
    error = np.square(sample - centroids[np.searchsorted(edges, sample)], dtype=np.float64).mean()
    return DistortionRow("lloyd-max", bits, None, None, float(error), None, None, 4.0**-bits)


def _parse_code(code: Any) -> tuple[str, int]:
    """``"mul1"``, ``"rptc:l20"``."""
    text = _checks.string("codes", code, "names of codebooks")
    name, _, window = text.partition(":l")
    if not window:
        return name, 16
    if not window.isdecimal():
        raise ValueError(f"codes: got {code!r}, expected the name of a codebook, perhaps with :lWINDOW")
    return name, int(window)


def _trellis_row(
    code: str, bits: float, tiles: int, seed: int, best: bool, search: str, threads: int
) -> DistortionRow:
    name, window = _parse_code(code)
    name, rms, _ = codebook(name, window)

    def at(ratio: float, count: int = tiles) -> float:
        return distortion(name, bits, ratio, count, seed, window, search, threads)

    matched, least, chosen = at(1.0), None, None
    if best:
        sample = max(tiles // 8, min(tiles, 64))
        chosen = min((round(0.70 + 0.05 * i, 2) for i in range(13)), key=lambda ratio: at(ratio, sample))
        least = matched if chosen == 1.0 else at(chosen)
    shown = name if window == 16 else f"{name}:l{window}"
    return DistortionRow(shown, bits, rms, at(1 / rms), matched, least, chosen, 4.0**-bits)


def distortion_table(
    codes: Iterable[str] = (
        *("lloyd-max", "3inst", "mcg", *MULTIPLIERS[:2], "mul1", "1mad", "octagon", "hyb", "rptc"),
    ),
    bits: Iterable[float] = (1, 2, 3, 4, 5),
    tiles: int = 1024,
    seed: int = 0,
    best: bool = False,
    search: str = "normal",
    threads: int = 0,
    progress: Any = None,
) -> list[DistortionRow]:
    """Errors of trellis codes on a normal source, in both conventions.

    Args:
        codes: names of codebooks, with ``:lWINDOW`` for a window other than 16; ``"lloyd-max"`` is the best
            scalar table.
        bits: of each code; those that a code cannot take are left out.
        tiles: rings of 256 numbers. 1024 of them know an error to about 0.3%; all codes see the same numbers.
        best: searches for the ratio of source and codebook with the least error too.
        progress: called with a text, the rows done and the rows in all, before each row.

    Raises TypeError or ValueError naming the argument.
    """
    chosen = [_parse_code(code) for code in codes]
    widths = [_half_bits(width) / 2 for width in bits]
    tiles, seed = _checks.integer("tiles", tiles, 1), _checks.integer("seed", seed, 0)
    most = {
        code: 8 // codebook(*code).values.shape[1] for code in dict.fromkeys(chosen) if code[0] != "lloyd-max"
    }
    cases = [
        (width, name, window)
        for width in widths
        for name, window in chosen
        if (width == int(width) if name == "lloyd-max" else width <= most[name, window])
    ]
    rows = []
    for width, name, window in cases:
        code = name if window == 16 else f"{name}:l{window}"
        if progress is not None:
            progress(f"{code}, {width:g} bits", len(rows), len(cases))
        if name == "lloyd-max":
            rows.append(_lloyd_max_row(width))
        else:
            rows.append(_trellis_row(code, width, tiles, seed, best, _search(search), threads))
    return rows
