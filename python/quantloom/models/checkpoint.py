"""Quantized checkpoints: a model folder whose Linears are stored packed.

``config.json`` is the original one with ``quantization_config`` added: ``quant_method`` "quantloom",
``version``, the recipe, and the format of every packed module. The weights are in
``model.safetensors``, or in numbered shards with an index; all tensors of a module are in one file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import quantloom as ql
from quantloom import _checks, _devices
from quantloom.models import exl3
from quantloom.models.records import WorkFolder, sync_folder, write_json
from quantloom.models.report import REPORT_FILE, TIMINGS_FILE, QuantizationReport
from quantloom.models.source import ModelFolder, attach, build_skeleton, model_names, read_json, tensor_files
from quantloom.models.structure import Targets

__all__ = [
    "QuantizedFolder",
    "assemble",
    "final_files",
    "install",
    "load",
    "load_reference",
    "open_quantized",
    "write_shards",
]

QUANT_METHOD = "quantloom"
CONFIG_VERSION = 1
INDEX = "model.safetensors.index.json"
# What makes a model usable beside its weights: copied from the original where present.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


# -- writing -----------------------------------------------------------------------------------------


@dataclass
class _Shard:
    packed: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    bytes: int = 0


def final_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in a folder that a new checkpoint would replace."""
    if not folder.is_dir():
        return []
    found = [
        folder / name
        for name in (
            "config.json", INDEX, REPORT_FILE, TIMINGS_FILE,
            "quantize_config.json", "quantization_config.json",
        )
    ]  # fmt: skip
    return [path for path in found if path.exists()] + sorted(folder.glob("*.safetensors"))


def assemble(
    folder: ModelFolder,
    model: torch.nn.Module,
    targets: Targets,
    recipe: Any,
    work: WorkFolder,
    report: QuantizationReport,
    max_shard_bytes: int,
    replaced: dict[str, torch.Tensor],
) -> None:
    """Writes all files of the checkpoint to the work folder; ``install`` puts them in place.

    `replaced`: parameters of the model that are not the original's, by name, in its dtypes.
    """
    shutil.rmtree(work.staging, ignore_errors=True)
    work.staging.mkdir()
    names, _ = model_names(model, folder.tensors)
    # Everything keeps the name it has in the original files, which other programs know.
    stored_of = {name: stored for stored, name in names.items()}
    packed = {stored_of[f"{name}.weight"].removesuffix(".weight"): name for name in targets.formats}
    kept = {
        stored: folder.tensors[stored].bytes
        for stored in names
        if stored.removesuffix(".weight") not in packed or not stored.endswith(".weight")
    }
    sizes = {report.name: report.bits // 8 for report in report.modules}
    views = folder.mapped() | {stored_of[name]: tensor for name, tensor in replaced.items()}

    def content(shard: _Shard) -> dict[str, Any]:
        plain = {name: views[name] for name in shard.plain}
        return plain | {
            name: work.packed(packed[name], targets.formats[packed[name]]) for name in shard.packed
        }

    modules = {stored: sizes[name] for stored, name in packed.items()}
    write_shards(work.staging, _shards(modules, kept, max_shard_bytes), content)
    config = dict(folder.config_json)
    config["quantization_config"] = quantization_config(
        json.loads(recipe.to_json()),
        {
            stored: work.stored_format(name, targets.formats[name]).to_json()
            for stored, name in packed.items()
        },
        {
            stored: ql.parse_activations(spec).to_json()
            for stored, name in packed.items()
            if (spec := work.report(name).activations)
        },
    )
    write_json(work.staging / "config.json", config)
    copy_companions(folder.path, work.staging)
    write_json(work.staging / REPORT_FILE, report.to_json())
    write_json(work.staging / TIMINGS_FILE, report.timings())
    write_json(work.staging / "COMPLETE", {"files": sorted(os.listdir(work.staging))})


def quantization_config(
    recipe: Any, formats: dict[str, str], activations: dict[str, str] | None = None
) -> dict[str, Any]:
    """The entry ``quantization_config`` of our own checkpoints; `formats` and `activations` are JSON by
    module name."""
    config = {
        "quant_method": QUANT_METHOD,
        "version": CONFIG_VERSION,
        "recipe": recipe,
        "modules": {name: json.loads(text) for name, text in formats.items()},
    }
    if activations:
        config["activations"] = {name: json.loads(text) for name, text in activations.items()}
    return config


def copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            with open(target / name, "rb") as file:
                os.fsync(file.fileno())


def _shards(modules: dict[str, int], kept: dict[str, int], limit: int) -> list[_Shard]:
    """Deals tensors to files in order; what belongs to one module stays together."""
    units: dict[str, _Shard] = {}
    for name, size in modules.items():
        unit = units.setdefault(name, _Shard())
        unit.packed.append(name)
        unit.bytes += size
    for name, size in kept.items():
        unit = units.setdefault(name.rpartition(".")[0], _Shard())
        unit.plain.append(name)
        unit.bytes += size
    shards = [_Shard()]
    for name in sorted(units, key=natural_key):
        unit = units[name]
        if shards[-1].bytes and shards[-1].bytes + unit.bytes > limit:
            shards.append(_Shard())
        shards[-1].packed += unit.packed
        shards[-1].plain += unit.plain
        shards[-1].bytes += unit.bytes
    return shards


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts "layers.10" after "layers.9"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def write_shards(target: Path, shards: list[Any], content: Any) -> None:
    """Writes one file for each shard, and an index if there are several.

    `content(shard)` gives the tensors of a shard, packed or plain, by name.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for index, shard in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = content(shard)
        ql.save_tensors(str(target / file), tensors)
        for name, value in tensors.items():
            if isinstance(value, ql.PackedTensor):
                weight_map |= {f"{name}.{plane}": file for plane in value.planes}
                total += value.size_in_bits // 8
            else:
                weight_map[name] = file
                total += value.nbytes
    if len(shards) > 1:
        write_json(
            target / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )


def install(work: WorkFolder) -> None:
    """Moves the finished files in place, config.json last: without it, the folder is no checkpoint."""
    files = read_json(work.staging / "COMPLETE")["files"]
    if (work.staging / "config.json").exists():
        # Files of the checkpoint that is replaced go first, so that no mixture of two can be loaded.
        moved = {name for name in files if not (work.staging / name).exists()}
        for path in final_files(work.output):
            if path.name not in moved:
                path.unlink()
    for name in sorted(files, key=lambda name: name == "config.json"):
        if (work.staging / name).exists():
            os.replace(work.staging / name, work.output / name)
    sync_folder(work.output)


# -- reading -----------------------------------------------------------------------------------------


class QuantizedFolder:
    """A checkpoint folder of ours: config, formats by module, files. Raises ValueError or OSError."""

    def __init__(self, path: str | Path, argument: str = "path") -> None:
        self.path = _checks.path(argument, path)
        if not self.path.is_dir():
            raise NotADirectoryError(
                f"{argument}: got {str(path)!r}, expected a folder that quantize() wrote"
            )
        if not (self.path / "config.json").is_file():
            unfinished = " (unfinished: call quantize() again)" if (self.path / ".work").is_dir() else ""
            raise FileNotFoundError(f"{argument}: {self.path} holds no config.json{unfinished}")
        self.config_json = read_json(self.path / "config.json")
        settings = self.config_json.get("quantization_config")
        if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise ValueError(
                f"{argument}: {self.path} has quant_method {method!r} in config.json, "
                f"expected {QUANT_METHOD!r}"
            )
        if settings.get("version") != CONFIG_VERSION:
            raise ValueError(
                f"{argument}: {self.path} has version {settings.get('version')!r} in quantization_config, "
                f"expected {CONFIG_VERSION}"
            )
        modules = settings.get("modules")
        if not isinstance(modules, dict) or not modules:
            raise ValueError(f"{argument}: {self.path}: quantization_config lists no modules")
        self.recipe = settings.get("recipe")
        self.formats = {name: ql.format_from_json(json.dumps(text)) for name, text in modules.items()}
        activations = settings.get("activations", {})
        if not isinstance(activations, dict) or activations.keys() - self.formats.keys():
            raise ValueError(
                f"{argument}: {self.path}: quantization_config has activations of modules that are not packed"
            )
        self.activations = {
            name: ql.activations_from_json(json.dumps(text)) for name, text in activations.items()
        }
        self.files = tensor_files(self.path)

    def shards(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The files in order, with their tensors, checksums verified."""
        seen: set[str] = set()
        for file in self.files:
            tensors = ql.load_tensors(str(file), kind="torch")
            for name, value in tensors.items():
                if name in seen:
                    raise ValueError(f"{file}: {name} is stored in another file too")
                seen.add(name)
                if isinstance(value, ql.PackedTensor) != (name in self.formats):
                    listed = "lists" if name in self.formats else "does not list"
                    raise ValueError(
                        f"{file}: config.json {listed} {name} as packed, which the file contradicts"
                    )
                if name in self.formats and value.format != self.formats[name]:
                    raise ValueError(
                        f"{file}: {name} has format {value.format.spec}, expected {self.formats[name].spec}"
                    )
            yield file, tensors
        missing = sorted(self.formats.keys() - seen)
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} packed modules are not in the files: {missing[0]} ..."
            )


def open_quantized(path: str | Path, argument: str = "path") -> QuantizedFolder | exl3.Exl3Folder:
    """A quantized checkpoint of ours or in the EXL3 layout."""
    folder = _checks.path(argument, path)
    if (folder / "config.json").is_file():
        settings = read_json(folder / "config.json").get("quantization_config")
        if isinstance(settings, dict) and settings.get("quant_method") == exl3.QUANT_METHOD:
            return exl3.Exl3Folder(folder, argument)
    return QuantizedFolder(folder, argument)


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: str | torch.device | None = None,
    dequantized: bool = False,
) -> torch.nn.Module:
    """The transformers model of a quantized checkpoint, in evaluation mode.

    Args:
        path: a folder that ``quantize`` or ``import_`` wrote, or one of exllamav3 in the EXL3 layout.
        dtype: floating-point dtype of everything that is not packed, and so of the activations; None: as
            stored.
        device: where the model goes, such as ``"cuda"``; None: the CPU. Modules move one after the other, so
            that the device needs memory for the model and one canonical module more. The kernels of a
            CUDA device may not take every dtype: ``quantloom.can_matmul`` tells.
        dequantized: False: packed Linears become ``quantloom.nn.QuantLinear``, which multiply from packed
            codes. True: they become plain Linears with decoded weights (in `dtype`, or float32), which
            need more memory and are faster for many tokens at once; those whose activations are rounded
            become ``quantloom.nn.RoundedLinear``, which compute the same up to the order of sums.

    Raises OSError or ValueError naming the file: not such a folder, damaged files, wrong checksums;
    TypeError, ValueError or RuntimeError if `device` is none that can be used, RuntimeError if no kernel of
    it takes a format.
    """
    _check_dtype(dtype)
    target = torch.device(_devices.device_name("device", "cpu" if device is None else device))
    folder = open_quantized(path)
    model = build_skeleton(folder.path, own_head=exl3.HEAD in folder.formats)
    plain: dict[str, torch.Tensor] = {}
    packed: dict[str, Any] = {}
    for _, tensors in folder.shards():
        for name, value in tensors.items():
            (packed if name in folder.formats else plain)[name] = value
    linears = packed_linears(model, folder)
    for name, (_, linear) in linears.items():
        expected = (linear.out_features, linear.in_features)
        if packed[name].shape != expected:
            raise ValueError(
                f"{folder.path}: {name} is {list(packed[name].shape)}, expected {list(expected)}"
            )
    filled = {f"{place}.weight" for place, _ in linears.values()}
    unused = attach(model, plain, folder.path, filled=filled)
    if unused:
        raise ValueError(f"{folder.path}: the model has no place for tensor {unused[0]!r}")
    _cast(model, dtype)
    rounded = getattr(folder, "activations", {})
    for name, (place, linear) in linears.items():
        weight = packed.pop(name).to(target)
        owner, _, leaf = place.rpartition(".")
        bias = linear.bias
        if bias is not None and bias.device != target:
            bias = torch.nn.Parameter(bias.detach().to(target), requires_grad=False)
        if dequantized:
            linear.weight = torch.nn.Parameter(
                weight.dequantize().to(dtype or torch.float32), requires_grad=False
            )
            if bias is not None:
                linear.bias = torch.nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
            if name in rounded:
                linear = ql.nn.RoundedLinear(linear, rounded[name], weight.transform)
                setattr(model.get_submodule(owner), leaf, linear)
        else:
            module = ql.nn.QuantLinear(weight, bias, rounded.get(name, "exact"))
            setattr(model.get_submodule(owner), leaf, module)
    _generation_config(model, folder.path)
    return _moved(model.eval(), target)


def load_reference(
    path: str | Path, dtype: torch.dtype = torch.float32, *, device: str | torch.device | None = None
) -> torch.nn.Module:
    """The original model with all weights in `dtype`, in evaluation mode, on `device` (None: the CPU): what
    a quantized one is compared to."""
    _check_dtype(dtype)
    target = torch.device(_devices.device_name("device", "cpu" if device is None else device))
    folder = ModelFolder(path)
    model = build_skeleton(folder.path)
    attach(model, folder.mapped(), folder.path)
    _cast(model, dtype)
    _generation_config(model, folder.path)
    return _moved(model, target)


def _moved(model: torch.nn.Module, target: torch.device) -> torch.nn.Module:
    return model if target.type == "cpu" else model.to(target)


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype")


def packed_linears(
    model: torch.nn.Module, folder: QuantizedFolder | exl3.Exl3Folder
) -> dict[str, tuple[str, torch.nn.Linear]]:
    """The places of the packed modules: by stored name, the module's name and the Linear.

    Raises ValueError naming a module that the model does not have.
    """
    names, _ = model_names(model, [f"{name}.weight" for name in folder.formats])
    linears = {}
    for name in folder.formats:
        place = names.get(f"{name}.weight", "").removesuffix(".weight")
        linear = model.get_submodule(place) if place else None
        if not isinstance(linear, torch.nn.Linear):
            raise ValueError(
                f"{folder.path}: config.json lists {name!r} as packed, which is no Linear of the model"
            )
        linears[name] = (place, linear)
    return linears


def _cast(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Casts parameters in place, tied ones once. Buffers keep their dtype: tables of positions need it."""
    if dtype is None:
        return
    # Keyed by the parameters themselves (hashed by identity), which keeps them alive meanwhile.
    done: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.device.type == "meta" or not parameter.is_floating_point():
                continue
            if parameter not in done:
                done[parameter] = torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            module._parameters[name] = done[parameter]


def _generation_config(model: torch.nn.Module, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
