"""Whole models: calibrate, quantize, save, load, export, plan.

>>> recipe = ql.Recipe.parse("uniform:4:g128", "gptq")
>>> report = ql.models.quantize("path/to/model", recipe, calibration="calib.txt", output="out")
>>> model = ql.models.load("out")

A model is a folder as Hugging Face transformers writes it (``config.json`` and safetensors files): any
decoder-only causal language model whose decoder blocks hold ``torch.nn.Linear`` layers. Needs torch and
transformers; both are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "quantize": "quantization",
    "load": "checkpoint",
    "load_reference": "checkpoint",
    "export": "exporting",
    "import_": "exporting",
    "ExportReport": "exporting",
    "plan": "planning",
    "Plan": "planning",
    "ModulePlan": "planning",
    "DistillationReport": "report",
    "ModuleReport": "report",
    "QuantizationReport": "report",
    "Progress": "report",
    "read_report": "report",
    "rotate": "rotation",
    "output_hessians": "gradients",
    "RotatedModel": "rotation",
}

__all__ = [
    "DistillationReport",
    "ExportReport",
    "ModulePlan",
    "ModuleReport",
    "Plan",
    "Progress",
    "QuantizationReport",
    "RotatedModel",
    "export",
    "import_",
    "load",
    "load_reference",
    "output_hessians",
    "plan",
    "quantize",
    "read_report",
    "rotate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
