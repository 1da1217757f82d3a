"""Plots of measurements and codebooks. Needs matplotlib; draws to a file, never to a screen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["plot_codebooks", "plot_distortion", "plot_divergence"]

_COLORS = {"nearest": "#b4530a", "gptq": "#1d5fa8"}
_NAMES = {"nearest": "nearest (RTN)", "gptq": "GPTQ"}


def plot_divergence(rows: Iterable[Any], path: str | Path, title: str) -> None:
    """KL divergence over bits per weight, log scale, one series for each rounding.

    `rows` are measurements of `quantloom.experiments`. Those with groups are joined by a line, those with
    one scale per channel are open markers. Raises RuntimeError if matplotlib is missing, ValueError if
    there is nothing to draw.
    """
    rows = [row for row in rows if row.kl > 0]
    if not rows:
        raise ValueError("rows: got no measurement with a divergence above 0, expected at least one")
    figure = _new_figure(8, 5, dpi=150)
    axes = figure.add_subplot()
    for rounding in dict.fromkeys(row.rounding for row in rows):
        color = _COLORS.get(rounding.split(":")[0])
        name = _NAMES.get(rounding, rounding)
        grouped = sorted((r for r in rows if r.rounding == rounding and not _per_channel(r)), key=_bits)
        channel = sorted((r for r in rows if r.rounding == rounding and _per_channel(r)), key=_bits)
        if grouped:
            axes.plot(
                [_bits(row) for row in grouped],
                [row.kl for row in grouped],
                marker="o",
                color=color,
                linewidth=2,
                markersize=7,
                label=f"{name}, groups of 128" if _all_groups_of(grouped, 128) else f"{name}, groups",
            )
        if channel:
            axes.plot(
                [_bits(row) for row in channel],
                [row.kl for row in channel],
                marker="s",
                linestyle="none",
                markerfacecolor="white",
                markeredgewidth=2,
                color=color,
                markersize=7,
                label=f"{name}, per channel",
            )
    # RTN lies above GPTQ: its labels go above the point, the others below.
    for row in rows:
        if _per_channel(row):
            continue
        above = row.rounding.startswith("nearest")
        axes.annotate(
            _figures(row.kl),
            (_bits(row), row.kl),
            xytext=(7, 6) if above else (-7, -6),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            fontsize=8.5,
            color=_COLORS.get(row.rounding.split(":")[0]),
        )
    axes.set_yscale("log")
    low, high = min(row.kl for row in rows), max(row.kl for row in rows)
    axes.set_ylim(low / 2.2, high * 2.2)
    left, right = min(map(_bits, rows)), max(map(_bits, rows))
    axes.set_xlim(left - 0.55, right + 0.6)
    axes.set_xticks(range(int(left), int(right) + 1))
    axes.set_xlabel("bits per weight of the quantized layers, as stored")
    axes.set_ylabel("KL divergence to the original (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.grid(True, which="minor", axis="y", color="#eeeeee", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9.5, loc="upper right")
    figure.savefig(path)


def plot_codebooks(
    names: Iterable[str], path: str | Path | BinaryIO, bits: float = 2, window: int = 16
) -> None:
    """What trellis codebooks are made of, a row of pictures for each.

    The histogram of all weights over their root mean square, next to a normal law; how often which weight
    follows which, over all states and all fresh bits at `bits` a weight; and for two weights a state, how
    often which pair makes up a state. A normal source wants a round cloud without gaps.

    Args:
        names: as `quantloom.trellis.codebook` takes them.
        path: a file, or an open one, for a PNG image.

    Raises RuntimeError if matplotlib is missing, ValueError for a name or width that is not known.
    """
    from quantloom import trellis

    books = [trellis.codebook(name, window) for name in names]
    if not books:
        raise ValueError("names: got none, expected at least one codebook")
    for book in books:
        fresh = bits * book.values.shape[1]
        if not 1 <= fresh <= 8 or fresh != int(fresh):
            raise ValueError(f"bits: got {bits!r}, expected whole bits for each state of {book.name}, 1 to 8")
    figure = _new_figure(8.4, 2.6 * len(books), dpi=75)
    for i, book in enumerate(books):
        weights = book.values / book.rms
        panels = figure.add_subplot(len(books), 3, 3 * i + 1)
        panels.hist(weights.ravel(), bins=np.linspace(-4, 4, 129), density=True, color="#7ba7d0")
        x = np.linspace(-4, 4, 200)
        panels.plot(x, np.exp(-x * x / 2) / math.sqrt(2 * math.pi), color="#b4530a", linewidth=1)
        panels.set_title(book.name, loc="left", fontsize=10)
        panels.set_yticks([])
        panels.set_xlabel("weight / RMS", fontsize=8)

        states = np.arange(len(weights), dtype=np.uint32)
        count = round(bits * weights.shape[1])
        following = (states[:, None] << count | np.arange(1 << count, dtype=np.uint32)) & (len(weights) - 1)
        last = np.broadcast_to(weights[:, -1:], following.shape)
        clouds = [(last, weights[following, 0], "next state's weight against weight")]
        if weights.shape[1] == 2:
            clouds.append((weights[:, 0], weights[:, 1], "second weight of a state against first"))
        for column, (first, second, label) in enumerate(clouds, 2):
            panels = figure.add_subplot(len(books), 3, 3 * i + column)
            panels.hist2d(first.ravel(), second.ravel(), bins=96, range=[[-4, 4]] * 2, cmap="Blues")
            panels.set_aspect("equal")
            panels.set_title(label, loc="left", fontsize=8)
            panels.set_xticks([-3, 0, 3])
            panels.set_yticks([-3, 0, 3])
    figure.savefig(path, format="png")


def plot_distortion(rows: Iterable[Any], path: str | Path | BinaryIO, title: str = "") -> None:
    """Distortion over bits of the codes of `quantloom.trellis.distortion_table`, and over the bound.

    Takes the least of `matched` and `best` of each row. `path`: a file, or an open one, for a PNG image.
    Raises RuntimeError if matplotlib is missing, ValueError without a row.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        least = row.matched if row.best is None else min(row.best, row.matched)
        series.setdefault(row.code, []).append((row.bits, least))
    if not series:
        raise ValueError("rows: got none, expected at least one")
    figure = _new_figure(9.5, 4.2, dpi=100)
    absolute, relative = (figure.add_subplot(1, 2, i) for i in (1, 2))
    widths = sorted({bits for points in series.values() for bits, _ in points})
    bound = np.linspace(widths[0], widths[-1], 50)
    absolute.plot(bound, 4.0**-bound, color="black", linestyle="--", linewidth=1, label="bound")
    for code, points in series.items():
        points.sort()
        x, y = np.array(points).T
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "label": code}
        if code == "lloyd-max":
            style["color"] = "#888888"
        absolute.plot(x, y, **style)
        relative.plot(x, y * 4.0**x, **style)
    absolute.set_yscale("log")
    absolute.set_ylabel("mean squared error over variance")
    relative.set_ylabel("mean squared error over the bound")
    for axes in (absolute, relative):
        axes.set_xlabel("bits per weight")
        axes.grid(True, color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    absolute.set_title(title, loc="left", fontsize=10)
    relative.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png")


def _new_figure(width: float, height: float, dpi: int) -> Any:
    """A figure apart from pyplot's state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plot: matplotlib is needed ({error}); pip install matplotlib") from None
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bits(row: Any) -> float:
    return row.bits_per_weight


def _per_channel(row: Any) -> bool:
    return ":channel" in row.format


def _all_groups_of(rows: list[Any], size: int) -> bool:
    return all(f":g{size}" in row.format for row in rows)


def _figures(value: float) -> str:
    """Two significant figures, without an exponent above 1e-4."""
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"
