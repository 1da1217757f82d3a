"""Checkpoints of exllamav3 in the EXL3 layout: folders of them, and the configuration they want.

Linears are stored as ``NAME.trellis, NAME.suh, NAME.svh`` and a codebook's marker, padded to multiples of
128; everything else keeps its name and dtype. Each Linear has its own bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import quantloom as ql
from quantloom import _checks
from quantloom.models.source import build_skeleton, mapped_tensors, model_names, read_json, tensor_files

__all__ = [
    "HEAD",
    "QUANT_METHOD",
    "Exl3Folder",
    "bias_tensor",
    "config",
    "describe_storage",
    "linear_tensors",
]

QUANT_METHOD = "exl3"
_MARK = "trellis"
_PARTS = (_MARK, "suh", "svh", "su", "sv", "mcg", "mul1")
HEAD = "lm_head"


class Exl3Folder:
    """A checkpoint folder in the EXL3 layout, with the interface of ``QuantizedFolder``.

    Everything is checked when it is made: the tensors of each Linear, and that the model has a Linear of that
    name and size. Weights are views of the mapped files. `left_out` names tensors ``scale`` of the oldest
    files, which are not read, as exllamav3 does not. Raises ValueError naming folder, file and module, or
    OSError.
    """

    recipe = None

    def __init__(self, path: str | Path, argument: str = "path") -> None:
        self.path = _checks.path(argument, path)
        self.config_json = read_json(self.path / "config.json")
        self.files = tensor_files(self.path)
        self._tensors: dict[Path, dict[str, Any]] = {file: {} for file in self.files}
        stored: dict[str, tuple[Path, torch.Tensor]] = {}
        for file in self.files:
            for name, tensor in mapped_tensors(file).items():
                if name in stored:
                    raise ValueError(f"{file}: {name} is stored in {stored[name][0].name} too")
                stored[name] = (file, tensor)
        suffix = f".{_MARK}"
        names = [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]
        if not names:
            raise ValueError(f"{argument}: {self.path} holds no tensor named *{suffix}")
        sizes = self._sizes(names)
        self.formats = {}
        self.left_out = sorted(f"{name}.scale" for name in names if f"{name}.scale" in stored)
        for name in self.left_out:
            del stored[name]
        for name in names:
            file = stored[name + suffix][0]
            parts = {part: stored.pop(f"{name}.{part}")[1] for part in _PARTS if f"{name}.{part}" in stored}
            try:
                packed = ql.layouts.from_exl3(parts, sizes[name])
                if f"{name}.bias" in stored:
                    where, bias = stored[f"{name}.bias"]
                    stored[f"{name}.bias"] = where, _cut(bias, sizes[name][0])
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{file}: {name}: {error}") from error
            self._tensors[file][name] = packed
            self.formats[name] = packed.format
        for name, (file, tensor) in stored.items():
            if name.rpartition(".")[2] in _PARTS:
                module = name.rpartition(".")[0]
                raise ValueError(f"{file}: {name} is stored, but no {module}{suffix} beside it")
            self._tensors[file][name] = tensor

    def _sizes(self, names: list[str]) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the model's Linears by stored name: files hold padded sizes only."""
        model = build_skeleton(self.path)
        places, _ = model_names(model, [f"{name}.weight" for name in names])
        sizes = {}
        for name in names:
            place = places.get(f"{name}.weight", "").removesuffix(".weight")
            linear = model.get_submodule(place) if place else None
            if not isinstance(linear, torch.nn.Linear):
                raise ValueError(
                    f"{self.path}: {name!r} is stored as a trellis, but is no Linear of the model as "
                    "transformers builds it; quantloom.layouts.read_exl3 reads tensors without the model"
                )
            sizes[name] = linear.out_features, linear.in_features
        return sizes

    def shards(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The files in order with their tensors, those of a Linear in the file of its trellis."""
        for file in self.files:
            yield file, dict(self._tensors[file])


def _cut(bias: torch.Tensor, n: int) -> torch.Tensor:
    """A bias without the padding that files may have."""
    padded = -(-n // 128) * 128
    if tuple(bias.shape) not in ((n,), (padded,)):
        raise ValueError(f"tensor bias: got {list(bias.shape)}, expected [{n}] or [{padded}]")
    return bias[:n].clone() if bias.shape[0] > n else bias


def linear_tensors(name: str, packed: Any) -> dict[str, torch.Tensor]:
    """What is stored for a Linear, less its bias. Raises RuntimeError for what the layout cannot hold."""
    return {f"{name}.{part}": tensor for part, tensor in ql.layouts.to_exl3(packed).items()}


def bias_tensor(bias: torch.Tensor) -> torch.Tensor:
    """A bias as loaders want it: float16, padded like the outputs. Raises ValueError if that is no finite
    number."""
    half = bias.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError("bias: expected numbers that float16 holds, at most 65504")
    padded = torch.zeros(-(-len(half) // 128) * 128, dtype=torch.float16)
    padded[: len(half)] = half
    return padded


def config(formats: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The entry ``quantization_config`` of config.json."""
    weights = {name: math.prod(sizes[name]) for name in formats if name != HEAD}
    bits = sum(formats[name].bits * count for name, count in weights.items())
    codebooks = Counter(form.codebook for form in formats.values())
    return {
        "quant_method": QUANT_METHOD,
        "version": ql.__version__,
        "bits": round(bits / sum(weights.values()), 3) if weights else formats[HEAD].bits,
        "head_bits": formats[HEAD].bits if HEAD in formats else 16,
        "codebook": codebooks.most_common(1)[0][0],
        "quantizer": f"quantloom:{ql.__version__}",
    }


def describe_storage(tensors: Mapping[str, torch.Tensor], modules: dict[str, dict[str, Any]]) -> None:
    """Adds what quantization_config.json says of tensors, by module."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        entry = modules.setdefault(module, {"stored_tensors": {}})
        entry["stored_tensors"][name] = {
            "shape": list(tensor.shape),
            "n_bytes": tensor.nbytes,
            "dtype": str(tensor.dtype),
        }
        if part == _MARK:
            bits = tensor.shape[-1] / 16
            entry["quant_format"] = QUANT_METHOD
            entry["bits_per_weight"] = int(bits) if bits == int(bits) else bits
        elif part in ("mcg", "mul1"):
            entry[f"{part}_multiplier"] = int(tensor.item()) & 0xFFFFFFFF
