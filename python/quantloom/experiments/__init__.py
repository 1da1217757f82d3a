"""Experiments: run many settings, keep what came out, look at it again.

>>> from quantloom import experiments as E
>>> with E.Experiment(dict(experiment="formats", bits=3, family="int")) as experiment:
...     experiment.summary(kl=0.2, bits_per_param=3.0)
>>> [(run.config.bits, run.summary.kl) for run in E.runs("formats")]

- Runs (`Experiment`, `run`, `runs`, `update_run`, `delete_run`, `experiments`) live in a local folder as JSON
  lines and safetensors; `run_sweep` works through many settings, resumes, and takes one process per GPU.
- `token_prediction`: cross-entropy and top-k KL divergence to the original model.
- `fisher`: the diagonal of the Fisher information. `weight_stats`: moments, maxima, histograms, fits.
- `qat`: quantization-aware training towards the original's predictions. `downstream`: questions with several
  answers.
- `measure`: formats and roundings on whole checkpoints.

Names that need torch import it on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from quantloom.experiments.core import MODELS
from quantloom.experiments.measuring import Measurement, Setting, measure
from quantloom.experiments.store import (
    AttrDict,
    Experiment,
    delete_run,
    experiments,
    run,
    run_tensors,
    runs,
    update_run,
)
from quantloom.experiments.sweeping import iter_dict_product, run_sweep

__all__ = [
    "MODELS",
    "AttrDict",
    "Experiment",
    "Measurement",
    "Setting",
    "delete_run",
    "experiments",
    "iter_dict_product",
    "measure",
    "run",
    "run_sweep",
    "run_tensors",
    "runs",
    "update_run",
]

_LAZY_MODULES = ("downstream", "fisher", "plots", "qat", "token_prediction", "weight_stats")


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "RequantisableModel":
        return importlib.import_module(f"{__name__}.requantising").RequantisableModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY_MODULES, "RequantisableModel"])
