"""Many settings on one model: quantize, measure against the original, one row for each.

Every setting goes the whole way: `models.quantize` writes a checkpoint, the checkpoint is read back and
decoded, and the decoded weights run in plain Linear layers, so that a row tells what the stored bytes are
worth and nothing of the speed of any kernel. Needs torch and transformers.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Measurement", "Setting", "measure"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setting:
    """A format, a rounding, activations and a distillation in their short forms; all None stand for the
    original. In place of a format, rounding and activations the name of a recipe (``Recipe.named``)."""

    format: str | None = None
    rounding: str | None = None
    activations: str | None = None
    distillation: str | None = None

    @property
    def label(self) -> str:
        parts = (self.format, self.rounding, self.activations, self.distillation)
        return " ".join(part for part in parts if part) if self.format else "original"

    def recipe(self) -> Any:
        """The ``Recipe``. Raises ValueError for what is no short form."""
        import quantloom

        if self.format.partition(":")[0] == "zeroquant":
            if self.rounding is not None or self.activations is not None:
                raise ValueError(
                    f"rounding, activations: got {self.rounding} and {self.activations} beside {self.format},"
                    " expected None, as the recipe has its own"
                )
            named = quantloom.Recipe.named(self.format)
            return dataclasses.replace(named, distillation=self.distillation)
        return quantloom.Recipe.parse(
            self.format,
            self.rounding or "nearest",
            activations=self.activations,
            distillation=self.distillation,
        )


@dataclass(frozen=True)
class Measurement:
    """One setting's row.

    Loss ratios are sums over all layers of tr(E H E^T) over the same sums of rounding to nearest, each on
    the same weights and inputs; None where no Hessian was gathered.
    """

    format: str
    rounding: str
    bits_per_weight: float
    """Of the quantized linear layers, as stored."""
    file_bytes: int
    """Of all safetensors files of the checkpoint."""
    perplexity: float
    kl: float
    top1_agreement: float
    loss_ratio: float | None
    held_out_loss_ratio: float | None
    quantize_seconds: float
    evaluate_seconds: float
    activations: str = ""
    """How inputs of layers are rounded; empty if they are not."""
    distillation: str = ""
    """How layers were trained after rounding; empty if they were not."""


def measure(
    model_path: str | Path,
    settings: Iterable[Setting],
    calibration: np.ndarray,
    validation: np.ndarray,
    work_folder: str | Path,
    *,
    window: int = 512,
    calibration_windows: int = 64,
    held_out_windows: int = 8,
    evaluation_windows: int | None = None,
    keep: dict[Setting, Path] | None = None,
    threads: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    done: Callable[[Measurement], None] | None = None,
) -> list[Measurement]:
    """Measures settings in turn. Rounding to nearest without a scale search goes uncalibrated: its codes do
    not depend on calibration.

    Args:
        calibration, validation: token ids [tokens].
        work_folder: an existing folder for checkpoints, each of which is removed when it is measured.
        keep: settings whose checkpoints are moved to a folder of their own.
        device: where models run and weights are rounded: "cpu", "cuda" or "cuda:N".
        progress: called with a description, the work done and the total of the setting at hand.
        done: called with each row.

    Raises what `models.quantize` and `evaluate.compare` raise.
    """
    import torch

    import quantloom

    reference = quantloom.models.load_reference(model_path, device=device)
    stored = _stored_tensors(model_path)
    tell: Progress = (lambda *_: None) if progress is None else progress
    rows = []
    for setting in settings:
        if setting.format is None:
            row = _original(
                reference, model_path, stored, validation, window, evaluation_windows, setting, tell
            )
        else:
            folder = Path(work_folder) / f"setting-{len(rows)}"
            recipe = setting.recipe()
            rounding = recipe.rounding
            calibrated = not isinstance(rounding, quantloom.Nearest) or rounding.scale_search is not None
            calibrated = calibrated or recipe.distillation is not None
            if recipe.activations is not None:
                calibrated = calibrated or not recipe.activations.calibrated

            def follow(event: Any, label: str = setting.label) -> None:
                tell(f"{label}: {event.phase}", round(5000 * event.fraction), 10_000)

            report = quantloom.models.quantize(
                model_path,
                recipe,
                calibration=calibration if calibrated else None,
                output=folder,
                windows=calibration_windows,
                window=window,
                held_out_windows=held_out_windows,
                threads=threads,
                device=device,
                progress=follow,
                overwrite=True,
                resume=False,
            )
            model = quantloom.models.load(folder, torch.float32, device=device, dequantized=True)
            row = _row(
                setting, model, reference, validation, window, evaluation_windows, report, folder, tell
            )
            if keep and setting in keep:
                shutil.move(folder, keep[setting])
            else:
                shutil.rmtree(folder)
        rows.append(row)
        if done is not None:
            done(row)
    return rows


def _stored_tensors(model_path: str | Path) -> dict[str, tuple[str, float]]:
    """dtype and stored bits per element of every tensor of the original, by name."""
    from quantloom.inspection import inspect

    return {entry.name: (entry.format, entry.bits_per_weight) for entry in inspect(model_path).tensors}


def _original(reference, model_path, stored, validation, window, windows, setting, tell) -> Measurement:
    import torch

    import quantloom

    start = time.perf_counter()
    perplexity = quantloom.evaluate.perplexity(
        reference,
        validation,
        window,
        windows,
        progress=lambda done, total: tell("original: evaluate", done, total),
    )
    names = [name for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {stored[f"{name}.weight"] for name in names if f"{name}.weight" in stored}
    if len(found) != 1:
        raise ValueError(
            f"model_path: got linear layers stored as {sorted(found)}, expected one dtype for all"
        )
    dtype, bits = found.pop()
    return Measurement(
        format={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype),
        rounding="none",
        bits_per_weight=bits,
        file_bytes=_file_bytes(Path(model_path)),
        perplexity=perplexity,
        kl=0.0,
        top1_agreement=1.0,
        loss_ratio=None,
        held_out_loss_ratio=None,
        quantize_seconds=0.0,
        evaluate_seconds=time.perf_counter() - start,
    )


def _row(setting, model, reference, validation, window, windows, report, folder, tell) -> Measurement:
    import quantloom

    comparison = quantloom.evaluate.compare(
        model,
        reference,
        validation,
        window,
        windows,
        progress=lambda done, total: tell(f"{setting.label}: evaluate", total + done, 2 * total),
    )
    return Measurement(
        format=setting.format,
        rounding=setting.rounding or "nearest",
        bits_per_weight=report.bits_per_weight,
        file_bytes=_file_bytes(folder),
        perplexity=comparison.perplexity,
        kl=comparison.kl,
        top1_agreement=comparison.top1_agreement,
        loss_ratio=_ratio(report.modules, "proxy_loss"),
        held_out_loss_ratio=_ratio(report.modules, "held_out_loss"),
        quantize_seconds=report.seconds,
        evaluate_seconds=comparison.seconds,
        activations=_activations(setting),
        distillation=setting.distillation or "",
    )


def _activations(setting: Setting) -> str:
    form = setting.recipe().activations
    return "" if form is None else form.spec


def _ratio(modules, name: str) -> float | None:
    losses = [getattr(module, name) for module in modules]
    nearest = [getattr(module, f"{name}_nearest") for module in modules]
    if any(value is None for value in losses + nearest) or not math.fsum(nearest):
        return None
    return math.fsum(losses) / math.fsum(nearest)


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
