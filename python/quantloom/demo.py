"""The demo: one small trained model at 8, 4, 3 and 2 bits, rounded to nearest and by GPTQ.

Writes a folder with a quantized checkpoint, `report.json` and a plot. Needs torch, transformers and
matplotlib.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantloom.experiments import Measurement, Setting, measure

__all__ = ["CHECKPOINT", "SETTINGS", "DemoReport", "run"]

SETTINGS = (
    Setting(),
    *(
        Setting(f"uniform:{shape}:asym", rounding)
        for shape in ("8:g128", "4:g128", "4:channel", "3:g128", "2:g128")
        for rounding in ("nearest", "gptq")
    ),
)
"""What the table shows, from many bits to few."""

CHECKPOINT = Setting("uniform:4:g128:asym", "gptq")
"""The setting whose checkpoint is kept."""

_OURS = ("report.json", "divergence.png", "model-4bit")


@dataclass(frozen=True)
class DemoReport:
    model: str
    calibration: dict[str, Any]
    validation: dict[str, Any]
    measurements: tuple[Measurement, ...]
    checkpoint: str
    plot: str
    seconds: float


def run(
    model: str | Path = "examples/tiny-llama",
    output: str | Path = "demo-out",
    *,
    settings: tuple[Setting, ...] = SETTINGS,
    window: int = 512,
    calibration_windows: int = 64,
    evaluation_windows: int | None = None,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    done: Callable[[Measurement], None] | None = None,
) -> DemoReport:
    """Measures all settings and writes `output`: report.json, divergence.png and the folder model-4bit.

    `model` is a folder with a model, its tokenizer, `calib.txt` and `valid.txt`. Files of an earlier demo in
    `output` are replaced, at the end; other files stay. `progress(description, done, total)` follows the
    whole run, `done` gets each row. Raises OSError for missing files, RuntimeError if matplotlib is missing.
    """
    import time

    from quantloom import evaluate
    from quantloom.plots import plot_divergence

    start = time.perf_counter()
    model, output = Path(model), Path(output)
    for name in ("config.json", "calib.txt", "valid.txt"):
        if not (model / name).is_file():
            raise FileNotFoundError(
                f"model: no such file: {model / name}; the demo runs on examples/tiny-llama"
            )
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output: got the file {output}, expected a folder")
    if CHECKPOINT not in settings:
        raise ValueError(f"settings: got none that is {CHECKPOINT.label}, whose checkpoint is kept")
    _require_matplotlib()

    calibration = evaluate.tokens(model, model / "calib.txt")
    validation = evaluate.tokens(model, model / "valid.txt")
    finished = 0

    def follow(description: str, part: int, whole: int) -> None:
        if progress is not None:
            progress(description, 1000 * finished + round(1000 * part / max(whole, 1)), 1000 * len(settings))

    def count(row: Measurement) -> None:
        nonlocal finished
        finished += 1
        if done is not None:
            done(row)

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=output) as scratch:
        work = Path(scratch)
        rows = measure(
            model,
            settings,
            calibration,
            validation,
            work,
            window=window,
            calibration_windows=calibration_windows,
            evaluation_windows=evaluation_windows,
            held_out_windows=0,
            keep={CHECKPOINT: work / "model-4bit"},
            threads=threads,
            progress=follow,
            done=count,
        )
        used = evaluation_windows or validation.size // window
        report = DemoReport(
            model=str(model),
            calibration={"text": "calib.txt", "windows": calibration_windows, "window": window},
            validation={
                "text": "valid.txt",
                "windows": used,
                "window": window,
                "tokens": used * (window - 1),
            },
            measurements=tuple(rows),
            checkpoint=str(output / "model-4bit"),
            plot=str(output / "divergence.png"),
            seconds=time.perf_counter() - start,
        )
        plot_divergence(rows, work / "divergence.png", f"{model.name}: what fewer bits cost")
        (work / "report.json").write_text(_json(report), encoding="utf-8")
        for name in _OURS:
            if (output / name).is_dir():
                shutil.rmtree(output / name)
            os.replace(work / name, output / name)
    return report


def _json(report: DemoReport) -> str:
    """JSON without NaN or infinities, which become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(dataclasses.asdict(report)), indent=2, allow_nan=False) + "\n"


def _require_matplotlib() -> None:
    """Before minutes of work, not after."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("demo: matplotlib is needed for the plot; pip install matplotlib")
