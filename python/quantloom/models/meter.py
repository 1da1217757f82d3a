"""Progress of a run, weighted by arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import quantloom as ql
from quantloom.models.costs import distillation_flops, forward_flops, loss_flops, rounding_flops, search_flops
from quantloom.models.distillation import window_passes
from quantloom.models.report import Progress, rounding_name
from quantloom.models.structure import Block

__all__ = ["Meter"]


class Meter:
    """Measures how much of the work is done and tells the caller."""

    def __init__(self, run: Any, progress: Callable[[Progress], None] | None) -> None:
        self.run, self.progress = run, progress
        tokens = 0 if run.tokens is None else run.tokens.ids.size
        gptq = "gptq" in rounding_name(run.recipe.rounding)
        sizes = {
            name: (linear.out_features, linear.in_features)
            for block in run.blocks
            for name, linear in block.linears.items()
            if name in run.targets.formats
        }
        self.calibrate = {name: forward_flops(n, k, tokens) for name, (n, k) in sizes.items()}
        steps = getattr(run.recipe.rounding, "steps", 0)
        searched = isinstance(run.recipe.rounding, ql.BeamSearch)
        self.quantize = {
            name: search_flops(n, k, run.targets.formats[name], run.recipe.rounding)
            if searched
            else rounding_flops(n, k, gptq) + loss_flops(n, k, steps)
            for name, (n, k) in sizes.items()
        }
        self.total = sum(self.calibrate.values()) + sum(self.quantize.values())
        self.passes = 0
        distillation = run.recipe.distillation
        if distillation is not None:
            windows, held_out = run.tokens.calibration, len(run.tokens.ids) - run.tokens.calibration
            self.passes = window_passes(distillation, windows, held_out)
        window = 0 if run.tokens is None else run.tokens.ids.shape[1]
        self.distil = {
            block.name: sum(
                distillation_flops(*sizes[name], window, self.passes)
                for name in block.linears
                if name in sizes
            )
            for block in run.blocks
        }
        self.total += sum(self.distil.values())
        self.taken_over = self.done = 0.0
        self.begun = time.monotonic()

    def start(self) -> None:
        """Takes note of what an earlier run has done."""
        run = self.run
        self.taken_over = sum(self.calibrate[name] + self.quantize[name] for name in run.reports)
        if run.distiller is not None:
            self.taken_over += sum(
                flops for block, flops in self.distil.items() if run.work.distilled(block) is not None
            )
        self.done = self.taken_over
        self.begun = time.monotonic()

    def window(self, names: tuple[str, ...], block: int, stage: int) -> None:
        """One window of a stage's calibration is done."""
        self.done += sum(self.calibrate[name] for name in names) / len(self.run.tokens.ids)
        self.report("calibrate", block, stage)

    def distilled(self, block: Block, passes: int) -> None:
        """A block's distillation has taken some forward passes more."""
        self.done += self.distil[block.name] * passes / max(1, self.passes)
        self.report("distil", block.index)

    def module(self, name: str, block: int, stage: int) -> None:
        self.done += self.quantize[name]
        self.report("quantize", block, stage, name)

    def report(self, phase: str, block: int = 0, stage: int = 0, module: str = "") -> None:
        if self.progress is None:
            return
        run, worked = self.run, self.done - self.taken_over
        eta = None
        if worked > 0:
            eta = (time.monotonic() - self.begun) * max(0.0, self.total - self.done) / worked
        fraction = min(1.0, self.done / self.total) if self.total else 1.0
        self.progress(
            Progress(
                phase,
                block,
                len(run.blocks),
                stage,
                module,
                len(run.reports),
                len(run.targets.formats),
                fraction,
                eta,
            )
        )
