"""A picture of SmoothQuant's alpha: KL divergence of the settings that table.py measured, over their alpha.

    python bench/quality/table.py MODEL ... -o alpha.json --settings uniform:8:channel=nearest=int8:token \
      uniform:8:channel=smoothquant:alpha=0.{1,2,3,4,5,6,7,8,9}=int8:token
    python bench/quality/alpha_plot.py alpha.json -o alpha.svg

One line for each format and activations; dashed, what the same has without smoothing, and dotted with alpha
searched for each layer, if those were measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COLORS = ("#1d5fa8", "#b4530a", "#3b7d3b", "#7a3b7d")


def alpha_of(rounding: str) -> float | None:
    """That of ``smoothquant[:alpha=X]``; None for other roundings and for one that is searched."""
    import quantloom

    parsed = quantloom.parse_rounding(rounding)
    smooth = isinstance(parsed, quantloom.SmoothQuant) and "+" not in rounding
    return parsed.alpha if smooth else None


def series_of(rows: list[dict]) -> dict[str, dict]:
    """By format and activations: points (alpha, KL), and the divergences without and with a search."""
    found: dict[str, dict] = {}
    for row in rows:
        if not row.get("activations"):
            continue
        name = f"{row['format']}, {row['activations']}"
        entry = found.setdefault(name, {"points": [], "nearest": None, "searched": None})
        if row["rounding"] == "nearest":
            entry["nearest"] = row["kl"]
        elif row["rounding"] == "smoothquant:search":
            entry["searched"] = row["kl"]
        elif (alpha := alpha_of(row["rounding"])) is not None:
            entry["points"].append((alpha, row["kl"]))
    return {name: entry for name, entry in found.items() if len(entry["points"]) > 1}


def draw(series: dict[str, dict], path: Path, title: str) -> None:
    """Raises ValueError if there is nothing to draw."""
    import matplotlib
    from quantloom.experiments.plots import new_figure

    if not series:
        raise ValueError("measurements: got fewer than two with smoothquant:alpha=X, expected more")
    figure, axes = new_figure(7, 4)
    for color, (name, entry) in zip(COLORS * len(series), series.items()):
        points = sorted(entry["points"])
        axes.plot(*zip(*points), marker="o", color=color, label=name)
        for key, style in (("nearest", "--"), ("searched", ":")):
            if entry[key] is not None:
                axes.axhline(entry[key], color=color, linestyle=style, linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("alpha (dashed: without smoothing; dotted: alpha searched for each layer)")
    axes.set_ylabel("KL divergence to the original (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)
    # The same measurements give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "quantloom", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurements", type=Path, nargs="+", help="JSON files of table.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write: .svg or .png")
    arguments = parser.parse_args()
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.measurements]
    if any(document["conditions"] != documents[0]["conditions"] for document in documents):
        parser.error("measurements: the files were measured under different conditions")
    rows = [row for document in documents for row in document["measurements"]]
    draw(series_of(rows), arguments.output, "SmoothQuant: weights and activations rounded")


if __name__ == "__main__":
    main()
