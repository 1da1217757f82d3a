"""Models on disk: a folder of safetensors files, attached to a transformers model without copying.

Weights are views of the memory-mapped files: pages are read when they are touched, and the system may drop
them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from quantloom import _checks

__all__ = [
    "ModelFolder",
    "StoredTensor",
    "attach",
    "build_skeleton",
    "mapped_tensors",
    "model_names",
    "read_json",
    "tensor_files",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises OSError if there are none, ValueError if the index names a file outside the folder.
    """
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / _INDEX}: expected a non-empty object 'weight_map'")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{folder / _INDEX}: got file {name!r}, expected a plain file name")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: named by {_INDEX}, but there is no such file")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise FileNotFoundError(f"{folder}: no {_SINGLE} and no {_INDEX}; weights must be safetensors files")


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def bytes(self) -> int:
        return self.elements * _BYTES[self.dtype]


class ModelFolder:
    """A model folder: its config and the headers of its tensors. No weight is read.

    Raises OSError if the folder, its config or its weights are missing, ValueError for a model that is
    already quantized, for duplicate tensors and for damaged headers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _checks.path("model_path", path)
        if not self.path.is_dir():
            raise NotADirectoryError(
                f"model_path: got {str(path)!r}, expected a folder with config.json and weights"
            )
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"model_path: {self.path} holds no config.json")
        self.config_json = read_json(self.path / "config.json")
        quantized = self.config_json.get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ValueError(
                f"model_path: {self.path} is already quantized ({method}), expected the original model"
            )
        self.files = tensor_files(self.path)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if name in self.tensors:
                        raise ValueError(
                            f"{file}: tensor {name!r} is stored in {self.tensors[name].file.name} too"
                        )
                    entry = handle.get_slice(name)
                    dtype = entry.get_dtype()
                    if dtype not in _BYTES:
                        raise ValueError(
                            f"{file}: tensor {name!r} has dtype {dtype}, expected one of {sorted(_BYTES)}"
                        )
                    self.tensors[name] = StoredTensor(file, dtype, tuple(entry.get_shape()))

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    def mapped(self) -> dict[str, torch.Tensor]:
        """All tensors as views of the mapped files."""
        return {name: view for file in self.files for name, view in mapped_tensors(file).items()}


def mapped_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file as views of the mapped file. Writing to them changes no file."""
    with _open(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping


def file_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with _open(file) as handle:
        return dict(handle.metadata() or {})


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a valid safetensors file ({error})") from None


def build_skeleton(folder: Path, *, own_head: bool = False) -> torch.nn.Module:
    """The transformers model of a folder, in evaluation mode: parameters on the meta device, buffers real.

    `own_head`: the head is stored, even if the config ties it to the embeddings.

    Raises ValueError for configs that transformers does not know as causal language models.
    """
    from accelerate import init_empty_weights

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if own_head:
            config.tie_word_embeddings = False
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: transformers builds no causal language model of it: {error}") from error
    model.eval()
    model.requires_grad_(False)
    return model


def model_names(model: torch.nn.Module, stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Maps stored names to names of the model; second: stored names that the model has no place for.

    Checkpoints of a bare decoder lack the prefix of the causal model's decoder ("model."), which is added;
    names of older versions of an architecture are renamed as transformers does.
    """
    places = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamings = _renamings(model)
    names, unused = {}, []
    for name in stored:
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for candidate in (name, renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if candidate in places:
                names[name] = candidate
                break
        else:
            unused.append(name)
    return names, unused


def _renamings(model: torch.nn.Module) -> list[Any]:
    """transformers' renamings of stored tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]


def _converted(model: torch.nn.Module, stored: Iterable[str]) -> list[str]:
    """Names of stored tensors that transformers merges, splits or transposes when it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    entries = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    return [name for name in stored if any(entry.rename_source_key(name)[1] for entry in entries)]


def attach(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], origin: Path, *, filled: Iterable[str] = ()
) -> list[str]:
    """Puts tensors (by name) in the places of the model's parameters and buffers, without copying.

    `filled` names parameters that are taken care of otherwise. Returns the names that the model has no
    place for. Raises ValueError naming the tensor for wrong shapes and for parameters that nothing fills.
    """
    names, unused = model_names(model, tensors)
    for stored, name in names.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old, new = getattr(module, leaf), tensors[stored]
        if old.shape != new.shape:
            raise ValueError(
                f"{origin}: tensor {stored!r} has shape {list(new.shape)}, expected {list(old.shape)}"
            )
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(new, requires_grad=False)
        else:
            module._buffers[leaf] = new
    places = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    missing = set(places) - set(names.values()) - set(filled)
    if missing:
        model.tie_weights(missing_keys=missing)
    empty = sorted(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.device.type == "meta" and name not in filled
    )
    if empty:
        shown = ", ".join(empty[:5]) + (" ..." if len(empty) > 5 else "")
        hint = f"; tensors without a place: {', '.join(unused[:5])}" if unused else ""
        if converted := _converted(model, unused):
            hint = f"; transformers makes them of others, such as {converted[0]}, which is not supported"
        raise ValueError(
            f"{origin}: {len(empty)} parameters of the model are not in the files: {shown}{hint}"
        )
    ignorable = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return [name for name in unused if not any(p.search(name) for p in ignorable)]
