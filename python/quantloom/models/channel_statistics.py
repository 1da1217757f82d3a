"""What the search for channel scales knows of a stage's inputs, gathered window by window."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

import quantloom as ql

__all__ = ["ChannelStatistics", "Maxima", "MeanMagnitudes", "statistics_for"]

_SAMPLE = 512  # tokens that errors of rounded activations are measured on


class ChannelStatistics(Protocol):
    """Statistics of the inputs that some Linears share."""

    def add(self, x: torch.Tensor, threads: int) -> None:
        """Takes note of inputs float32 ``[tokens, k]``."""

    def share(self, row_of: torch.Tensor) -> None:
        """Channels whose entries of `row_of` are equal get one statistic, and so one scale."""

    def choose(self, layers: list[Any], names: tuple[str, ...], powers: bool, threads: int) -> Any:
        """The ``ScaleChoice`` of layers, by their names; `powers`: scales are powers of two."""


class MeanMagnitudes:
    """What ``AWQ`` scales by: mean magnitudes, and the Hessian that errors are weighed with."""

    def __init__(self, rounding: Any, k: int, device: str) -> None:
        self.rounding = rounding
        self.hessian = ql.Hessian(k, device)
        self.sums = torch.zeros(k, dtype=torch.float64)
        self.groups: torch.Tensor | None = None

    def add(self, x: torch.Tensor, threads: int) -> None:
        self.hessian.add(x, threads=threads)
        self.sums += x.abs().sum(0, dtype=torch.float64).cpu()

    def share(self, row_of: torch.Tensor) -> None:
        self.groups = row_of

    def choose(self, layers: list[Any], names: tuple[str, ...], powers: bool, threads: int) -> Any:
        magnitudes = self.sums / max(1, self.hessian.tokens)
        if self.groups is not None:
            rows = int(self.groups.max()) + 1
            mean = torch.zeros(rows, dtype=torch.float64).index_add_(0, self.groups, magnitudes)
            magnitudes = (mean / torch.bincount(self.groups, minlength=rows))[self.groups]
        return ql.search_channel_scales(
            layers,
            self.hessian,
            magnitudes.numpy(),
            steps=self.rounding.steps,
            powers_of_two=powers,
            threads=threads,
        )


class Maxima:
    """What ``SmoothQuant`` scales by: the largest magnitudes, and a sample to measure errors on."""

    def __init__(self, rounding: Any, k: int, windows: int, activations: dict[str, Any]) -> None:
        self.rounding, self.activations = rounding, activations
        self.per_window = max(1, _SAMPLE // windows)
        self.maxima = torch.zeros(k, dtype=torch.float64)
        self.sample: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, threads: int) -> None:
        largest = x.abs().amax(0).double().cpu()
        if not bool(torch.isfinite(largest).all()):
            column = int(torch.nonzero(~torch.isfinite(largest))[0])
            raise ValueError(f"got {largest[column].item()} in channel {column}, expected finite values")
        self.maxima = torch.maximum(self.maxima, largest)
        places = torch.linspace(0, len(x) - 1, min(self.per_window, len(x))).round().long()
        self.sample.append(x[places.to(x.device)].cpu())

    def share(self, row_of: torch.Tensor) -> None:
        rows = np.zeros(int(row_of.max()) + 1)
        np.maximum.at(rows, row_of.numpy(), self.maxima.numpy())
        self.maxima = torch.from_numpy(rows)[row_of]

    def choose(self, layers: list[Any], names: tuple[str, ...], powers: bool, threads: int) -> Any:
        own = self.rounding.activations
        return ql.search_smoothing(
            layers,
            self.maxima.numpy(),
            np.ascontiguousarray(torch.cat(self.sample).numpy()),
            alpha=self.rounding.alpha,
            steps=self.rounding.steps,
            activations=[self.activations.get(name) if own is None else own for name in names],
            powers_of_two=powers,
            threads=threads,
        )


def statistics_for(
    rounding: Any, k: int, windows: int, activations: dict[str, Any], device: str
) -> ChannelStatistics:
    """Empty statistics for a rounding that scales channels; `activations`: formats by module, if any."""
    if isinstance(rounding, ql.SmoothQuant):
        return Maxima(rounding, k, windows, activations)
    return MeanMagnitudes(rounding, k, device)
