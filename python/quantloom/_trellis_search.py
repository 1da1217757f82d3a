"""Screening of multipliers: the search behind ``quantloom.trellis.search``."""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core, _devices

# For 3INST's mask; then EXL3's own for mcg and mul1, one more for mul1, and octagon's.
PUBLISHED_MCG = (0xFF7A83E5, 0xCAF6A435, 0xE2A54B45, 0xA2EC794D, 0x00D0AA65, 0xB26DB26D, 0xEAB209FD)
PUBLISHED = (*PUBLISHED_MCG, 0xCBAC1FED, 0x83DCD12D, 0xAD9A2EC5, 0xF3C14DB7)
CODES = ("mul1", "mcg", "octagon")
RING = 256
_SMALLEST_ROUND = 64  # rings, of the first look
_KEPT = 6  # one in so many goes on to the next round, which has four times the rings


@dataclass(frozen=True)
class SearchRow:
    """What a multiplier does.

    Attributes:
        codebook: its name, such as ``"octagon-F3C14DB7"``, or ``"octagon"`` for the code's default.
        multiplier: 8 hexadecimal digits.
        published: whether it is one of the multipliers that every search holds the others to.
        rms: of the codebook.
        tiles: rings of the last round that it took part in.
        distortion: at each of the search's bits, over the source's mean square.
        excess_bits: by how much a rate is above the least one that allows its distortion, on average over the
            bits: ``bits + log2(distortion) / 2``. What the rows are ranked by.
    """

    codebook: str
    multiplier: str
    published: bool
    rms: float
    tiles: int
    distortion: tuple[float, ...]
    excess_bits: float


@dataclass(frozen=True)
class MultiplierSearch:
    """A ranked table: best first, those of later rounds before those that were left behind."""

    code: str
    bits: tuple[float, ...]
    count: int
    tiles: int
    seed: int
    search: str
    unscaled: bool
    window: int
    device: str
    rows: tuple[SearchRow, ...]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table as JSON; the file appears whole or not at all."""
        target = _checks.path("path", path)
        text = json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def candidates(count: int, seed: int) -> list[int]:
    """Odd multipliers: the published ones, then `count` more at random."""
    draw = random.Random(seed)
    chosen = dict.fromkeys(PUBLISHED)
    while len(chosen) < count + len(PUBLISHED):
        chosen[draw.getrandbits(32) | 1] = None
    return list(chosen)


def search(
    code: str = "octagon",
    bits: Iterable[float] = (2, 3, 4),
    count: int = 256,
    tiles: int = 1024,
    seed: int = 0,
    *,
    search: str = "fast",
    unscaled: bool = False,
    window: int = 16,
    device: Any = None,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> MultiplierSearch:
    """Screens multipliers of a codebook by the error of coding independent N(0, 1) numbers.

    All of them are looked at with 64 rings; the best sixth goes on to four times as many, and so on up to
    `tiles`. Eleven published multipliers, among them the defaults of all codes, stay to the end.

    Args:
        code: ``"mul1"``, ``"mcg"`` or ``"octagon"``.
        bits: the rates, averaged in the ranking.
        count: random odd multipliers beside the published ones.
        tiles: rings of 256 numbers in the last round. 1024 know an error to about 0.3%, and the difference of
            two codebooks, which see the same numbers, better than that.
        seed: of the multipliers and the numbers. The same seed gives the same table on the same kind of
            device; a GPU's float16 costs differ in the fourth figure.
        search: how rings are closed, see ``encode``.
        unscaled: codes the numbers on the codebook as it is, instead of at the ratio ``best_ratio`` gives.
        window: bits of a state; 16 on a GPU.
        device: ``"cuda"``, ``"cuda:N"`` or ``"cpu"``; None takes a GPU if there is one, and the result says
            which.
        threads: on the CPU; the table does not depend on it.
        progress: called with a text, the multipliers done and all of them in this round.

    Raises TypeError or ValueError naming the argument, RuntimeError for a device that is not there.
    """
    _checks.choice("code", code, CODES)
    widths = tuple(_checks.real("bits", width) for width in bits)
    if not widths:
        raise ValueError("bits: got none, expected at least one")
    count, tiles = _checks.integer("count", count, 0), _checks.integer("tiles", tiles, 1)
    seed = _checks.integer("seed", seed, 0)
    window = _checks.integer("window", window, expected="an integer from 4 to 24")
    unscaled = _checks.boolean("unscaled", unscaled)
    where = _default_device() if device is None else _devices.device_name("device", device)
    _checks.choice("search", search, ("fast", "normal", "best"))
    most = 8 // _codebook(code, window)[2].shape[1]
    for width in widths:
        if not 1 <= width <= most or 2 * width != round(2 * width):
            raise ValueError(f"bits: got {width!r}, expected 1 to {most} in steps of 1/2 for {code}")
    kind = _Cpu if where == "cpu" else _Cuda
    measure = kind(code, widths, seed, search, unscaled, window, where, _checks.thread_count(threads))

    running = candidates(count, seed)
    rows: dict[int, SearchRow] = {}
    rings = min(tiles, _SMALLEST_ROUND)
    while True:
        done = measure.rows(running, rings, progress)
        rows.update(zip(running, done, strict=True))
        if rings == tiles:
            break
        ranked = sorted(running, key=lambda multiplier: (rows[multiplier].excess_bits, multiplier))
        ahead = set(ranked[: -(-len(running) // _KEPT)])
        running = [multiplier for multiplier in running if multiplier in ahead or multiplier in PUBLISHED]
        rings = min(tiles, 4 * rings)
    order = sorted(rows, key=lambda multiplier: (-rows[multiplier].tiles, rows[multiplier].excess_bits))
    return MultiplierSearch(
        code, widths, count, tiles, seed, search, unscaled, window, where, tuple(rows[key] for key in order)
    )


def _default_device() -> str:
    if not _core.built_with_cuda():
        return "cpu"
    try:
        return _devices.device_name("device", "cuda")
    except (RuntimeError, ImportError):
        return "cpu"


def _codebook(name: str, window: int) -> tuple[str, float, np.ndarray]:
    return _core.trellis_codebook(name, window)


class _Measure:
    """Distortions of multipliers, with all numbers the same for each."""

    def __init__(
        self,
        code: str,
        bits: tuple[float, ...],
        seed: int,
        search: str,
        unscaled: bool,
        window: int,
        device: str,
        threads: int,
    ) -> None:
        self.code, self.bits, self.seed, self.search = code, bits, seed, search
        self.unscaled, self.window, self.device, self.threads = unscaled, window, device, threads

    def row(self, multiplier: int, tiles: int) -> SearchRow:
        name, rms, _ = _codebook(f"{self.code}-{multiplier:08X}", self.window)
        distortion = []
        for bits in self.bits:
            half_bits = round(2 * bits)
            ratio = 1 / rms if self.unscaled else _core.trellis_best_ratio(half_bits, self.code)
            distortion.append(self.distortion(name, half_bits, ratio, ratio * rms, tiles))
        excess = math.fsum(
            bits + 0.5 * math.log2(error) for bits, error in zip(self.bits, distortion, strict=True)
        ) / len(self.bits)
        return SearchRow(
            name, f"{multiplier:08X}", multiplier in PUBLISHED, rms, tiles, tuple(distortion), excess
        )

    def distortion(self, name: str, half_bits: int, ratio: float, scale: float, tiles: int) -> float:
        raise NotImplementedError

    def rows(
        self, multipliers: Sequence[int], tiles: int, progress: Callable[[str, int, int], None] | None
    ) -> list[SearchRow]:
        return self._collect((self.row(m, tiles) for m in multipliers), len(multipliers), tiles, progress)

    def _collect(self, rows: Iterable[SearchRow], total: int, tiles: int, progress: Any) -> list[SearchRow]:
        result = []
        for row in rows:
            if progress is not None:
                progress(f"{tiles} tiles each", len(result), total)
            result.append(row)
        return result


class _Cpu(_Measure):
    def rows(self, multipliers, tiles, progress):
        # A multiplier for each thread: one alone has too few rings to share.
        with ThreadPoolExecutor(self.threads or os.cpu_count() or 1) as pool:
            found = pool.map(lambda multiplier: self.row(multiplier, tiles), multipliers)
            return self._collect(found, len(multipliers), tiles, progress)

    def distortion(self, name, half_bits, ratio, scale, tiles):
        return _core.trellis_distortion(name, self.window, half_bits, ratio, tiles, self.seed, self.search, 1)


class _Cuda(_Measure):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._numbers: Any = None

    def distortion(self, name, half_bits, ratio, scale, tiles):
        import torch

        from quantloom import trellis

        if self.window != 16:
            raise ValueError(f"window: got {self.window}, expected 16 on {self.device}")
        if self._numbers is None or len(self._numbers) != tiles:
            numbers = np.empty((tiles, RING), np.float32)
            _core.trellis_source(self.seed, _arrays.describe("numbers", numbers).core)
            self._numbers = torch.from_numpy(numbers).to(self.device)
        targets = self._numbers * scale
        _, errors = trellis.encode_rings(targets, half_bits / 2, name, self.search)
        return float(errors.double().sum() / targets.double().square().sum())
