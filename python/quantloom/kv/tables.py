"""What calibration finds for KVQuant: tables of values, ranges of channels, rotary embeddings."""

from __future__ import annotations

import json as _json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core
from quantloom.kv.format import KVFormat, kv_format_from_json
from quantloom.tensors import load_metadata, load_tensors, save_tensors

__all__ = ["KVCalibration", "KVTables", "RotaryEmbedding"]

_KEY = "kv_cache"


def _floats(name: str, value: Any, shape: str) -> np.ndarray:
    """An array of float32 with as many dimensions as `shape` names."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        got = value.dtype if isinstance(value, np.ndarray) else _checks.type_name(value)
        raise TypeError(f"{name}: got {got}, expected a NumPy array of float32")
    if value.ndim != shape.count(",") + 1 or value.size == 0:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {shape}")
    return np.ascontiguousarray(value)


def _core_array(name: str, value: np.ndarray) -> _core.ArrayRef:
    return _arrays.describe(name, value).core


@dataclass(frozen=True, eq=False)
class KVTables:
    """Tables of one layer, float32 NumPy arrays whose numbers (but for bounds) float16 holds.

    Attributes:
        key_bounds, value_bounds: ``[2**bits - 1]``, rising: a normalized element takes the code c where c of
            them are below it.
        key_values, value_values: ``[2**bits]``: what a code stands for, normalized.
        key_scale, key_middle: ``[kv_heads, head_dim]``: half of the range of each channel of the keys,
            above 0, and its middle.
    """

    key_bounds: np.ndarray
    key_values: np.ndarray
    value_bounds: np.ndarray
    value_values: np.ndarray
    key_scale: np.ndarray
    key_middle: np.ndarray

    def __post_init__(self) -> None:
        shapes = {"bounds": "[2**bits - 1]", "values": "[2**bits]"}
        for entry in fields(self):
            shape = shapes.get(entry.name.partition("_")[2], "[kv_heads, head_dim]")
            object.__setattr__(self, entry.name, _floats(entry.name, getattr(self, entry.name), shape))

    def _with(self, rotation: Any) -> _core.KVTables:
        arrays = {entry.name: _core_array(entry.name, getattr(self, entry.name)) for entry in fields(self)}
        return _core.KVTables(**arrays, rotation=rotation)


@dataclass(frozen=True, eq=False)
class RotaryEmbedding:
    """Positions as rotations of channels i and i + len(inverse_frequencies), by position * frequency.

    Attributes:
        inverse_frequencies: float32 ``[rotated / 2]``.
        scaling: multiplies cosines and sines.
    """

    inverse_frequencies: np.ndarray
    scaling: float = 1.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        frequencies = _floats("inverse_frequencies", self.inverse_frequencies, "[rotated / 2]")
        if not np.isfinite(frequencies).all():
            raise ValueError("inverse_frequencies: got values that are not finite, expected finite ones")
        put(self, "inverse_frequencies", frequencies)
        put(self, "scaling", _checks.real("scaling", self.scaling))
        if not 2.0**-64 <= self.scaling <= 2.0**64:
            raise ValueError(f"scaling: got {self.scaling}, expected one from 2**-64 to 2**64")

    def angles(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 ``[positions, rotated / 2]``."""
        positions = _checks.integer("positions", positions, 0)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found where it is used
            angles = np.arange(positions, dtype=np.float32)[:, None] * self.inverse_frequencies[None, :]
            scaling = np.float32(self.scaling)
            return np.cos(angles) * scaling, np.sin(angles) * scaling


@dataclass(frozen=True, eq=False)
class KVCalibration:
    """What ``ql.kv.calibrate`` finds for all layers of a model.

    Raises ValueError for tables that are not those of the format.

    Attributes:
        format: a ``KVFormat`` of the kind kvquant.
        layers: ``KVTables`` of each.
        rotary: the ``RotaryEmbedding`` that is taken off keys before they are stored; None: none.
    """

    format: KVFormat
    layers: tuple[KVTables, ...]
    rotary: RotaryEmbedding | None = None
    _rotations: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.format, KVFormat) or self.format.kind != "kvquant":
            raise ValueError(f"format: got {self.format}, expected one of the kind kvquant")
        if not isinstance(self.layers, Iterable):
            raise TypeError(f"layers: got {_checks.type_name(self.layers)}, expected KVTables of each")
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.rotary is not None and not isinstance(self.rotary, RotaryEmbedding):
            raise TypeError(
                f"rotary: got {_checks.type_name(self.rotary)}, expected a RotaryEmbedding or None"
            )
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, KVTables):
                raise TypeError(f"layers: number {index} is {_checks.type_name(layer)}, expected KVTables")
            if layer.key_middle.shape != layer.key_scale.shape:
                raise ValueError(
                    f"layers: number {index} has key_scale {list(layer.key_scale.shape)} and key_middle"
                    f" {list(layer.key_middle.shape)}, expected [kv_heads, head_dim]"
                )
            try:
                tables = self.core_tables(index, 2)
                _core.require_valid_kv_tables(tables, self.format.to_json(), *layer.key_scale.shape)
            except ValueError as error:
                raise ValueError(f"layers: number {index}: {error}") from None

    def core_tables(self, layer: int, positions: int) -> _core.KVTables:
        """The tables of a layer as ``KVCache`` takes them, for `positions` positions."""
        layer = _checks.integer("layer", layer, 0)
        if layer >= len(self.layers):
            raise ValueError(f"layer: got {layer}, expected one below {len(self.layers)}")
        if self.rotary is None:
            return self.layers[layer]._with(None)
        if positions not in self._rotations:
            cosines, sines = self.rotary.angles(positions)
            self._rotations[positions] = _core.KVRotation(
                _core_array("cosines", cosines), _core_array("sines", sines)
            )
        return self.layers[layer]._with(self._rotations[positions])

    def save(self, path: Any) -> None:
        """Writes a safetensors file."""
        tensors = {
            f"layers.{index}.{entry.name}": getattr(layer, entry.name)
            for index, layer in enumerate(self.layers)
            for entry in fields(layer)
        }
        about: dict[str, Any] = {"format": _json.loads(self.format.to_json()), "layers": len(self.layers)}
        if self.rotary is not None:
            tensors["inverse_frequencies"] = self.rotary.inverse_frequencies
            about["scaling"] = self.rotary.scaling
        save_tensors(path, tensors, {_KEY: _json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Any) -> KVCalibration:
        """Reads what ``save`` wrote. Raises ValueError naming the file, OSError."""
        about = load_metadata(path).get(_KEY)
        if about is None:
            raise ValueError(f"{path}: no calibration of a KV cache")
        tensors = load_tensors(path)
        try:
            entry = _json.loads(about)
            format = kv_format_from_json(_json.dumps(entry["format"]))
            names: Sequence[str] = [each.name for each in fields(KVTables)]
            count = _checks.integer("layers", entry["layers"], 0)
            layers = [
                KVTables(**{name: np.array(tensors[f"layers.{index}.{name}"]) for name in names})
                for index in range(count)
            ]
            rotary = None
            if "scaling" in entry:
                rotary = RotaryEmbedding(np.array(tensors["inverse_frequencies"]), entry["scaling"])
            expected = count * len(names) + ("scaling" in entry)
            if len(tensors) != expected:
                raise ValueError(f"holds {len(tensors)} tensors, expected {expected} for {count} layers")
            return cls(format, tuple(layers), rotary)
        except KeyError as error:
            raise ValueError(f"{path}: not a calibration of a KV cache: holds no {error}") from None
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a calibration of a KV cache: {error}") from None
