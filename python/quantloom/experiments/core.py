"""What runs and sweeps are made of, under one name; `quantloom.experiments` has all of it as well."""

from __future__ import annotations

from typing import Any

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
    "delete_run",
    "experiments",
    "iter_dict_product",
    "run",
    "run_sweep",
    "run_tensors",
    "runs",
    "update_run",
]

MODELS = [
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "microsoft/phi-4",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-3B",
    "Qwen/Qwen2.5-7B",
    "google/gemma-3-1b-pt",
    "google/gemma-3-4b-pt",
    "google/gemma-3-12b-pt",
]
"""The models that the comparison of "Optimal Formats for Weight Quantisation" measures; loaded from local
folders only."""


def __getattr__(name: str) -> Any:
    if name == "RequantisableModel":
        from quantloom.experiments.requantising import RequantisableModel

        return RequantisableModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
