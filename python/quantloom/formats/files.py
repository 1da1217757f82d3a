"""Files with many encoded tensors: the weights of a model, say, each in a format of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantloom import _checks
from quantloom.formats.encoded import Encoded

__all__ = ["load_encoded", "save_encoded"]

_METADATA = "quantloom.encoded_tensors"
_SEPARATOR = ":"


def save_encoded(
    path: Any, tensors: Mapping[str, Encoded | Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes encoded tensors, and plain ones beside them, to one safetensors file.

    Plane ``codes`` of the encoded tensor ``layer.weight`` is stored as ``layer.weight:codes``; descriptions
    are in the metadata. Written through a temporary file; the same input gives the same bytes.

    Args:
        tensors: by names that are not empty and have no colon.
        metadata: free-form strings; keys that begin with ``quantloom`` are taken.

    Raises TypeError or ValueError naming the entry, OSError where the system refuses.
    """
    from quantloom.tensors import save_tensors

    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: got {_checks.type_name(tensors)}, expected a mapping of names to tensors")
    planes: dict[str, Tensor] = {}
    descriptions: dict[str, Any] = {}
    for name, value in tensors.items():
        if not _checks.string("tensors", name, "names that are strings") or _SEPARATOR in name:
            raise ValueError(f"tensors: got the name {name!r}, expected one that has no colon")
        if isinstance(value, Encoded):
            descriptions[name] = json.loads(value.describe())
            planes |= {f"{name}{_SEPARATOR}{plane}": tensor for plane, tensor in value.planes.items()}
        elif isinstance(value, Tensor):
            planes[name] = value
        else:
            raise TypeError(
                f"tensors[{name!r}]: got {_checks.type_name(value)}, expected an Encoded or a torch tensor"
            )
    entries = dict(metadata or {})
    taken = sorted(key for key in entries if str(key).startswith("quantloom"))
    if taken:
        raise ValueError(
            f"metadata: got the key {taken[0]!r}, expected keys that do not begin with quantloom"
        )
    text = json.dumps(descriptions, sort_keys=True, allow_nan=False, separators=(",", ":"))
    save_tensors(path, planes, entries | {_METADATA: text})


def load_encoded(path: Any) -> dict[str, Encoded | Tensor]:
    """Reads a file of ``save_encoded``: encoded tensors, which are checked by ``decode``, and plain ones.

    Raises ValueError for other contents, OSError if the file cannot be read.
    """
    from quantloom.tensors import load_metadata, load_tensors

    metadata = load_metadata(path)
    if _METADATA not in metadata:
        raise ValueError(f"{path}: got a file without {_METADATA!r}, expected one of save_encoded")
    try:
        descriptions = _checks.json_object(_METADATA, metadata[_METADATA])
    except RecursionError:
        raise ValueError(f"{path}: {_METADATA} is nested too deeply") from None
    planes: dict[str, dict[str, Tensor]] = {name: {} for name in descriptions}
    result: dict[str, Encoded | Tensor] = {}
    for name, value in load_tensors(path, kind="torch").items():
        owner, separator, plane = name.partition(_SEPARATOR)
        if not isinstance(value, torch.Tensor) or (separator and owner not in planes):
            raise ValueError(f"{path}: {name!r} is neither a plane of an encoded tensor nor a plain tensor")
        if separator:
            planes[owner][plane] = value
        else:
            result[name] = value
    result |= {name: _described(f"{path}: {name}", planes[name], descriptions[name]) for name in planes}
    return dict(sorted(result.items()))


def _described(what: str, planes: dict[str, Tensor], description: Any) -> Encoded:
    try:
        return Encoded.from_planes(json.dumps(description), planes)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
