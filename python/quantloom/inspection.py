"""What a checkpoint holds: tensors, formats, and bits per weight counted from the stored bytes.

Takes one safetensors file or a model folder: an original, one of ours, or one in the GPTQ,
compressed-tensors or EXL3 layout. Loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantloom import _checks

__all__ = ["Inspection", "TensorEntry", "inspect"]


@dataclass(frozen=True)
class TensorEntry:
    """One plain tensor, or one quantized matrix with all that is stored for it."""

    name: str
    file: str
    format: str
    """The format's short form, or the dtype of a plain tensor."""
    shape: tuple[int, ...]
    """Of the weights; (out_features, in_features) of a quantized matrix."""
    quantized: bool
    bits: int
    """Stored, with scales, zero points, indices and padding."""
    planes: dict[str, str]
    """Stored tensors as `dtype [shape]`; empty for a plain tensor."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    path: str
    layout: str
    """"plain", "quantloom", "gptq", "gptq_v2", "awq", "compressed-tensors", "exl3", "aqlm", or another
    library's quant_method."""
    architecture: str | None
    """From config.json, if there is one."""
    files: dict[str, int]
    """Names and bytes of the safetensors files."""
    metadata: dict[str, dict[str, str]]
    """Free-form metadata of each file that has any."""
    tensors: tuple[TensorEntry, ...]

    @property
    def weights(self) -> int:
        return sum(entry.weights for entry in self.tensors)

    @property
    def quantized_weights(self) -> int:
        return sum(entry.weights for entry in self.tensors if entry.quantized)

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized matrices; None if there are none."""
        count = self.quantized_weights
        return sum(entry.bits for entry in self.tensors if entry.quantized) / count if count else None

    @property
    def model_bits_per_weight(self) -> float:
        """Of all tensors."""
        return sum(entry.bits for entry in self.tensors) / self.weights if self.weights else 0.0

    @property
    def file_bytes(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {
            "path": self.path,
            "layout": self.layout,
            "architecture": self.architecture,
            "weights": self.weights,
            "quantized_weights": self.quantized_weights,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "file_bytes": self.file_bytes,
            "files": dict(self.files),
            "metadata": {file: dict(entries) for file, entries in self.metadata.items()},
            "tensors": [
                {
                    "name": entry.name,
                    "file": entry.file,
                    "format": entry.format,
                    "shape": list(entry.shape),
                    "quantized": entry.quantized,
                    "weights": entry.weights,
                    "bits": entry.bits,
                    "bits_per_weight": entry.bits_per_weight,
                    "planes": dict(entry.planes),
                }
                for entry in self.tensors
            ],
        }


def inspect(path: str | Path) -> Inspection:
    """Lists a safetensors file or a model folder.

    Files are checked as `load_tensors` checks them: the container's rules, our descriptions and checksums.
    Raises OSError if there is nothing to read, ValueError naming the file and tensor that breaks a rule.
    """
    path = _checks.path("path", path)
    config: dict[str, Any] = {}
    if path.is_dir():
        files = _files(path)
        if (path / "config.json").is_file():
            config = _json_object(path / "config.json")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"path: no such file or folder: {path}")
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}

    entries: list[TensorEntry] = []
    stored: dict[str, tuple[str, _Stored]] = {}
    metadata = {}
    for file in files:
        packed, plain, information = _load(file)
        if information:
            metadata[file.name] = information
        entries += packed
        for name, tensor in plain.items():
            if name in stored:
                raise ValueError(f"{file}: tensor {name!r} is stored in {stored[name][0]} too")
            stored[name] = (file.name, tensor)
    ours = bool(entries)
    foreign = _foreign_matrices(stored, quantization)
    entries += foreign
    taken = {f"{entry.name}.{plane}" for entry in foreign for plane in entry.planes}
    for name, (file, tensor) in stored.items():
        if name not in taken:
            entries.append(TensorEntry(name, file, tensor.dtype, tensor.shape, False, tensor.bits, {}))
    architectures = config.get("architectures")
    return Inspection(
        path=str(path),
        layout=_layout(ours, foreign, quantization),
        architecture=architectures[0] if isinstance(architectures, list) and architectures else None,
        files={file.name: file.stat().st_size for file in files},
        metadata=metadata,
        tensors=tuple(sorted(entries, key=lambda entry: _natural(entry.name))),
    )


@dataclass(frozen=True)
class _Stored:
    dtype: str
    shape: tuple[int, ...]
    bits: int
    array: np.ndarray

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected an object 'weight_map' that names the files")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index}: got file {name!r}, expected a name without a folder")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: the index names it, but there is no such file")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"path: no safetensors file in {folder}")
    return files


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: got a JSON {type(value).__name__}, expected an object")
    return value


def _load(file: Path) -> tuple[list[TensorEntry], dict[str, _Stored], dict[str, str]]:
    """Packed tensors, all other tensors, and free-form metadata of one file."""
    # Not load_tensors(): bfloat16 as a NumPy array would need ml_dtypes.
    from quantloom.tensors import _load as load

    packed, plain, metadata, transforms = load(file)
    entries = []
    for name, tensor in packed.items():
        planes = {plane: _stored(*entry) for plane, entry in tensor.planes().items()}
        basis = f" {transforms[name].spec}" if name in transforms else ""
        entries.append(
            TensorEntry(
                name=name,
                file=file.name,
                format=_spec(tensor.format_json) + basis,
                shape=(tensor.n, tensor.k),
                quantized=True,
                bits=sum(plane.bits for plane in planes.values())
                + (transforms[name].size_in_bits if name in transforms else 0),
                planes={plane: str(tensor) for plane, tensor in sorted(planes.items())},
            )
        )
    return entries, {name: _stored(*entry) for name, entry in plain.items()}, dict(metadata)


def _stored(dtype: str, array: np.ndarray) -> _Stored:
    return _Stored(dtype, tuple(array.shape), 8 * array.nbytes, array)


def _spec(format_json: str) -> str:
    from quantloom.formats import format_from_json

    return format_from_json(format_json).spec


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _layout(ours: bool, foreign: list[TensorEntry], quantization: dict[str, Any]) -> str:
    if ours:
        return "quantloom"
    if foreign and any("qweight" in entry.planes for entry in foreign):
        if quantization.get("quant_method") == "awq":
            return "awq"
        return str(quantization.get("checkpoint_format", "gptq"))
    for plane, layout in (("trellis", "exl3"), ("codebooks", "aqlm")):
        if foreign and any(plane in entry.planes for entry in foreign):
            return layout
    if foreign:
        return "compressed-tensors"
    return str(quantization.get("quant_method", "plain"))


# -- other libraries' layouts ------------------------------------------------------------------------------

_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_AQLM = ("codes", "codebooks", "scales")
_EXL3 = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")


def _foreign_matrices(
    stored: dict[str, tuple[str, _Stored]], quantization: dict[str, Any]
) -> list[TensorEntry]:
    """Groups the tensors of each GPTQ, compressed-tensors, EXL3 or AQLM layer."""
    entries = []
    for name, (file, _) in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            parts, describe = _GPTQ, _describe_gptq
        elif leaf == "weight_packed":
            parts, describe = _COMPRESSED, _describe_compressed
        elif leaf == "trellis":
            parts, describe = _EXL3, _describe_exl3
        elif leaf == "codebooks":
            parts, describe = _AQLM, _describe_aqlm
        else:
            continue
        planes = {part: stored[f"{module}.{part}"][1] for part in parts if f"{module}.{part}" in stored}
        described = describe(planes, quantization)
        if described is None:
            continue  # another library's use of the same names: listed tensor by tensor
        label, shape = described
        entries.append(
            TensorEntry(
                name=module,
                file=file,
                format=label,
                shape=shape,
                quantized=True,
                bits=sum(plane.bits for plane in planes.values()),
                planes={part: str(plane) for part, plane in planes.items()},
            )
        )
    return entries


def _describe_aqlm(
    planes: dict[str, _Stored], quantization: dict[str, Any]
) -> tuple[str, tuple[int, int]] | None:
    if len(planes) != len(_AQLM) or [len(planes[part].shape) for part in _AQLM] != [3, 4, 4]:
        return None
    from quantloom.formats import Additive

    rows, blocks, _ = planes["codes"].shape
    codebooks, entries, out_group, in_group = planes["codebooks"].shape
    try:
        form = Additive(codebooks, entries.bit_length() - 1, in_group, out_group)
    except ValueError:
        return None
    return form.spec, (rows * out_group, blocks * in_group)


def _describe_gptq(
    planes: dict[str, _Stored], quantization: dict[str, Any]
) -> tuple[str, tuple[int, int]] | None:
    if not all(part in planes and len(planes[part].shape) == 2 for part in ("qweight", "qzeros", "scales")):
        return None
    words, n = planes["qweight"].shape
    groups = planes["scales"].shape[0]
    if quantization.get("quant_method") == "awq":
        k, n = words, 8 * n
        if groups == 0 or planes["scales"].shape[1] != n:
            return None
        size = quantization.get("group_size", quantization.get("q_group_size"))
        label = _label(4, k, groups, size, False, planes["scales"].dtype)
        return (label, (n, k)) if label else None
    if "g_idx" in planes and planes["g_idx"].shape != (0,):
        k = planes["g_idx"].shape[0]
        bits = 32 * words // k if k else 0
    else:
        bits = quantization.get("bits")
        k = 32 * words // bits if isinstance(bits, int) and bits > 0 else 0
    if not 1 <= bits <= 8 or k * bits != 32 * words or groups == 0 or planes["scales"].shape[1] != n:
        return None
    zeros = np.unique(planes["qzeros"].array.view(np.uint32))
    constants = {2: (0x55555555, 0xAAAAAAAA), 4: (0x77777777, 0x88888888), 8: (0x7F7F7F7F, 0x80808080)}
    symmetric = quantization.get("sym")
    if not isinstance(symmetric, bool):
        symmetric = zeros.size == 1 and int(zeros[0]) in constants.get(bits, ())
    label = _label(bits, k, groups, quantization.get("group_size"), symmetric, planes["scales"].dtype)
    return (label, (n, k)) if label else None


def _describe_compressed(
    planes: dict[str, _Stored], quantization: dict[str, Any]
) -> tuple[str, tuple[int, int]] | None:
    if "weight_shape" not in planes or planes["weight_shape"].shape != (2,) or "weight_scale" not in planes:
        return None
    n, k = (int(extent) for extent in planes["weight_shape"].array)
    packed, scale = planes["weight_packed"].shape, planes["weight_scale"].shape
    if len(packed) != 2 or packed[0] != n or n <= 0 or k <= 0:
        return None
    settings = _weight_settings(quantization)
    bits = settings.get("num_bits")
    if not isinstance(bits, int) or packed[1] not in (-(-k * bits // 32), -(-k // (32 // bits))):
        bits = 32 * packed[1] // k
    if not 1 <= bits <= 8:
        return None
    groups = scale[1] if len(scale) == 2 else 1
    symmetric, scale_dtype = "weight_zero_point" not in planes, planes["weight_scale"].dtype
    if math.prod(scale) == 1 and n > 1:
        label = _uniform(bits, "tensor", symmetric, scale_dtype)
    else:
        label = _label(bits, k, groups, settings.get("group_size"), symmetric, scale_dtype)
    return (label, (n, k)) if label else None


def _describe_exl3(
    planes: dict[str, _Stored], quantization: dict[str, Any]
) -> tuple[str, tuple[int, int]] | None:
    """The shape is padded to multiples of 128: files do not hold the layer's own."""
    from quantloom.layouts import from_exl3

    try:
        packed = from_exl3({part: plane.array for part, plane in planes.items()})
    except (TypeError, ValueError):
        return None
    return packed.format.spec, packed.shape


def _weight_settings(quantization: dict[str, Any]) -> dict[str, Any]:
    """The settings of weights, if all groups of layers share them."""
    groups = quantization.get("config_groups")
    found = (
        [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    )
    same = [s for s in found if isinstance(s, dict)]
    return same[0] if len(same) == 1 else {}


def _label(bits: int, k: int, groups: int, stated: Any, symmetric: bool, scale_dtype: str) -> str | None:
    if isinstance(stated, int) and stated > 0 and -(-k // stated) == groups:
        return _uniform(bits, stated, symmetric, scale_dtype)
    return _uniform(bits, "channel" if groups == 1 else -(-k // groups), symmetric, scale_dtype)


def _uniform(bits: int, group_size: int | str, symmetric: bool, scale_dtype: str) -> str | None:
    """The short form; None for a dtype of scales that no format of ours has."""
    from quantloom.formats import Uniform

    try:
        return Uniform(bits, group_size, symmetric, scale_dtype).spec
    except ValueError:
        return None
