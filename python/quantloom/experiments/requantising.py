"""A model that can be quantized again and again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantloom.models import load_reference

__all__ = ["RequantisableModel"]


@dataclass
class RequantisableModel:
    """A model beside a copy of its original parameters on the CPU, to which it can be set back.

    `path` is the folder it came from, None for a model that was made in memory.
    """

    model: nn.Module
    original_params: dict[str, Tensor]
    path: Path | None = None

    @classmethod
    def load(
        cls, name: str | Path, device: Any = "cpu", dtype: torch.dtype = torch.float32
    ) -> RequantisableModel:
        """Loads the transformers model in the folder `name`; see `quantloom.models.load_reference`."""
        return cls.of(load_reference(name, dtype, device=device), Path(name))

    @classmethod
    def of(cls, model: nn.Module, path: Path | None = None) -> RequantisableModel:
        """A model that is in memory already."""
        original = {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}
        return cls(model, original, path)

    @property
    def device(self) -> torch.device:
        """The device of all parameters. Raises RuntimeError if they are on several."""
        devices = {parameter.device for parameter in self.model.parameters()}
        if len(devices) != 1:
            raise RuntimeError(f"device: the parameters are on {sorted(map(str, devices))}, not on one")
        return devices.pop()

    def reset(self) -> None:
        """Sets all parameters back."""
        for name, parameter in self.model.named_parameters():
            self._reset(name, parameter)

    def reset_parameter(self, name: str) -> None:
        """Sets one parameter back. Raises KeyError if there is none of that name."""
        parameters = dict(self.model.named_parameters())
        if name not in parameters:
            raise KeyError(f"name: the model has no parameter {name!r}")
        self._reset(name, parameters[name])

    def _reset(self, name: str, parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter.copy_(self.original_params[name])
        if hasattr(parameter, "_quantised"):
            del parameter._quantised
