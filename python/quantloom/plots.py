"""Plots of measurements. Needs matplotlib; draws to a file, never to a screen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["plot_divergence"]

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plot: matplotlib is needed ({error}); pip install matplotlib") from None

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
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


def _bits(row: Any) -> float:
    return row.bits_per_weight


def _per_channel(row: Any) -> bool:
    return ":channel" in row.format


def _all_groups_of(rows: list[Any], size: int) -> bool:
    return all(f":g{size}" in row.format for row in rows)


def _figures(value: float) -> str:
    """Two significant figures, without an exponent above 1e-4."""
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"
