"""Plots of runs and formats. Needs matplotlib; draws to a file, never to a screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["new_figure", "plot_histogram", "plot_series", "plot_tradeoff"]


def plot_tradeoff(runs: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """KL divergence over bits per parameter of the runs of `token_prediction`, a series for each format
    without its number of bits. Runs that did not finish, and baselines, are left out.

    Raises ValueError if no run is left, RuntimeError if matplotlib is missing.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        summary = run["summary"]
        if run["meta"]["status"] != "finished" or "kl_div" not in summary or "bits_per_param" not in summary:
            continue
        test = run["config"]["test"]
        name = test.get("fmt_str", test["type"]).split("b-", 1)[-1]
        kl = sum(summary["kl_div"]) / len(summary["kl_div"])
        series.setdefault(name, []).append((summary["bits_per_param"], kl))
    plot_series(series, path, "bits per parameter", "KL divergence (nats per token)", title, log=True)


def plot_series(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    x_label: str,
    y_label: str,
    title: str = "",
    log: bool = False,
) -> None:
    """Named series of (x, y), each joined in the order of x. Raises as `plot_tradeoff`."""
    if not any(series.values()):
        raise ValueError("series: got no point, expected at least one")
    figure, axes = new_figure()
    for name, points in series.items():
        if points:
            axes.plot(*zip(*sorted(points)), marker="o", markersize=5, linewidth=1.6, label=name)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(path)


def plot_histogram(stats: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """How often which magnitude over the RMS occurs, from one entry of `weight_stats.model_stats`."""
    from quantloom.experiments.weight_stats import HISTOGRAM_EDGES

    points = [(edge, share) for edge, share in zip((0.0, *HISTOGRAM_EDGES), stats["hist"]) if share > 0]
    plot_series({"share": points}, path, "magnitude over RMS, from", "share of elements", title, log=True)


def new_figure(width: float = 8, height: float = 5) -> tuple[Any, Any]:
    """A figure with one pair of axes in the style of the project, apart from pyplot's state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plot: matplotlib is needed ({error}); pip install matplotlib") from None
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
