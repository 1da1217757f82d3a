"""PackedTensor: a compressed matrix, and the files that hold it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from quantloom import _arrays, _checks, _core
from quantloom.formats import Format, format_from_json, parse_format
from quantloom.transforms import Transform, transform_from_json

if TYPE_CHECKING:
    from quantloom.kernels import PreparedTensor
    from quantloom.rounding import RoundingReport

__all__ = ["PackedTensor", "load_metadata", "load_tensors", "save_tensors"]

# The key of a file's metadata that describes the transforms of its packed tensors, by name.
_TRANSFORMS = "quantloom.transforms"


class PackedTensor:
    """A matrix ``[out_features, in_features]`` as the planes that its format prescribes.

    ``quantize`` and ``load_tensors`` make packed tensors; the constructor takes planes that are at hand.
    Planes are to be treated as constant: ``matmul`` keeps a copy of them in the order of its kernels.

    Args:
        format: a ``Format`` or its short form.
        shape: ``(n, k)``.
        planes: maps names to arrays, all NumPy arrays or all torch tensors on one device. Not copied.
        report: what a rounding did, if one made the planes.
        transform: the planes hold the matrix in another basis, that of this ``Transform``: decoding undoes
            it, and products apply it to their inputs and undo it on their outputs.

    Raises TypeError or ValueError, naming the plane, unless the planes are just those that the format
    prescribes for the shape, and hold values that decode safely.
    """

    __slots__ = ("_format", "_kind", "_orders", "_planes", "_prepared", "_shape", "_transform", "report")

    def __init__(
        self,
        format: Format | str,
        shape: tuple[int, int],
        planes: Mapping[str, Any],
        report: RoundingReport | None = None,
        transform: Transform | None = None,
    ) -> None:
        self._format = parse_format(format)
        if isinstance(shape, (str, bytes)) or not hasattr(shape, "__len__") or len(shape) != 2:
            raise TypeError(f"shape: got {shape!r}, expected a pair (n, k)")
        self._shape = (_checks.integer("shape", shape[0], 0), _checks.integer("shape", shape[1], 0))
        if not isinstance(planes, Mapping):
            raise TypeError(f"planes: got {_checks.type_name(planes)}, expected a mapping of names to arrays")
        self._planes = dict(planes)
        arrays = [_arrays.plane(f"plane {name}", value) for name, value in self._planes.items()]
        if len({(array.kind, array.device) for array in arrays}) > 1:
            got = ", ".join(f"{array.kind} on {array.device}" for array in arrays)
            raise TypeError(f"planes: got {got}, expected one kind on one device")
        self._kind = arrays[0].kind if arrays else "numpy"
        self._prepared: PreparedTensor | None = None
        self._orders: dict[str, PreparedTensor] = {}  # on a CUDA device, by how activations enter
        self._transform = _checked_transform(transform, self._shape)
        self.report = report
        self._core()

    @classmethod
    def _from_core(
        cls,
        packed: _core.Packed,
        kind: str,
        report: RoundingReport | None = None,
        *,
        shared: bool = False,
        transform: Transform | None = None,
    ) -> PackedTensor:
        """`shared`: the planes may be memory of a mapped file or of the caller's arrays."""
        self = cls.__new__(cls)
        self._format = format_from_json(packed.format_json)
        self._shape = (packed.n, packed.k)
        self._planes = {
            name: _arrays.to_kind(array, dtype, kind)
            for name, (dtype, array) in packed.planes(writeable=not shared).items()
        }
        if kind == "numpy":
            for array in self._planes.values():
                array.setflags(write=False)
        self._kind = kind
        self._prepared = None
        self._orders = {}
        self._transform = _checked_transform(transform, self._shape)
        self.report = report
        return self

    def _core(self) -> _core.Packed:
        """The C++ view of the planes, which it keeps alive; checks them again, as they can be changed."""
        planes = {name: _arrays.plane(f"plane {name}", value).core for name, value in self._planes.items()}
        return _core.Packed(self._format.to_json(), *self._shape, planes)

    @property
    def format(self) -> Format:
        """What is stored, and how it decodes."""
        return self._format

    @property
    def transform(self) -> Transform | None:
        """The basis in which the planes hold the matrix; None: its own."""
        return self._transform

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)`` = (out_features, in_features)."""
        return self._shape

    @property
    def planes(self) -> Mapping[str, Any]:
        """The stored arrays by name, read-only mapping; the arrays are those of the tensor, not copies."""
        return MappingProxyType(self._planes)

    @property
    def kind(self) -> str:
        """``"numpy"`` or ``"torch"``."""
        return self._kind

    @property
    def device(self) -> str:
        """``"cpu"``, ``"cuda:0"``, ..."""
        for value in self._planes.values():
            return str(value.device) if self._kind == "torch" else "cpu"
        return "cpu"

    @property
    def size_in_bits(self) -> int:
        """All stored bits: every plane, padding included, and the numbers of the transform."""
        basis = 0 if self._transform is None else self._transform.size_in_bits
        return sum(8 * value.nbytes for value in self._planes.values()) + basis

    @property
    def bits_per_weight(self) -> float:
        """``size_in_bits / (n * k)``; 0 for an empty matrix."""
        n, k = self._shape
        return self.size_in_bits / (n * k) if n * k else 0.0

    def dequantize(self, dtype: Any = None, threads: int = 0) -> Any:
        """Decodes to ``[n, k]``, an array of the same kind on the same device.

        Args:
            dtype: float32 (the default), float16 or bfloat16, as a string or a NumPy or torch dtype. Values
                are decoded in float32 and rounded to it.
            threads: 0 for OpenMP's default; CPU only.

        On a CUDA device the work is queued on torch's current stream; formats other than ``uniform`` are
        first brought into the order of the product kernels, which takes about as much memory again until
        then. Raises RuntimeError there if this build has no CUDA kernels.
        """
        name = "float32" if dtype is None else _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
        threads = _checks.thread_count(threads)
        core = self._core()
        if self._transform is not None:
            plain = PackedTensor(self._format, self._shape, self._planes).dequantize(threads=threads)
            return _arrays.cast(self._transform.rotate_weight(plain, inverse=True, threads=threads), name)
        if self.device != "cpu":
            return _dequantize_cuda(self, core, name)
        out = _arrays.empty(self._kind, self._shape, "float32")
        _core.dequantize(core, _arrays.describe("out", out).core, threads)
        return _arrays.cast(out, name)

    def to(self, target: Any) -> PackedTensor:
        """The same tensor as another kind or on another device; itself if nothing changes.

        Args:
            target: ``"numpy"``, ``"torch"`` (on the CPU), or a torch device such as ``"cpu"``, ``"cuda"``,
                ``"cuda:1"``. ``"cpu"`` leaves NumPy planes as they are.
        """
        text = str(target) if type(target).__name__ == "device" else target
        _checks.string("target", text, 'a string such as "numpy", "torch", "cpu" or "cuda"')
        if text == self._kind == "numpy" or (text == "cpu" and self.device == "cpu"):
            return self
        if text == "numpy":
            planes = {name: _torch_to_numpy(value) for name, value in self._planes.items()}
        else:
            planes = self._to_torch("cpu" if text == "torch" else text)
            if self._kind == "torch" and all(planes[name] is value for name, value in self._planes.items()):
                return self
        return PackedTensor(self._format, self._shape, planes, self.report, self._transform)

    def _to_torch(self, device: str) -> dict[str, Any]:
        import torch

        try:
            target = torch.device(device)
        except RuntimeError:
            expected = '"numpy", "torch" or a torch device such as "cpu" or "cuda"'
            raise ValueError(f"target: got {device!r}, expected {expected}") from None
        if target.type not in ("cpu", "cuda"):
            raise ValueError(f"target: got {device!r}, expected the CPU or a CUDA device")
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"target: got {device!r}, but torch finds no CUDA device")
        planes = {}
        for name, value in self._planes.items():
            if self._kind == "numpy":
                bits = value.view(np.uint16) if value.dtype.name == "bfloat16" else value
                value = _arrays.to_kind(bits, value.dtype.name, "torch")
            planes[name] = value.to(target)
        return planes

    def __repr__(self) -> str:
        n, k = self._shape
        where = self._kind if self.device == "cpu" else self.device
        bits = f"{self.bits_per_weight:.3f} bits/weight"
        basis = "" if self._transform is None else f", {self._transform.spec}"
        return f"PackedTensor({self._format.spec}{basis}, shape=({n}, {k}), {bits}, {where})"

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedTensor, (self._format, self._shape, dict(self._planes), self.report, self._transform)


def _checked_transform(transform: Any, shape: tuple[int, int]) -> Transform | None:
    if transform is not None:
        if not isinstance(transform, Transform):
            raise TypeError(f"transform: got {_checks.type_name(transform)}, expected None or a Transform")
        transform.check(*shape)
    return transform


def _torch_to_numpy(value: Any) -> np.ndarray:
    import torch

    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(_arrays.bfloat16())
    return value.numpy()


@functools.cache
def _decoded_as_stored() -> frozenset[str]:
    """The formats whose canonical planes a CUDA kernel decodes."""
    return frozenset(
        row["format"]
        for row in _core.kernel_table()
        if (row["operation"], row["device"]) == ("dequantize", "cuda") and row["kernel"] != "decode_fragments"
    )


def _dequantize_cuda(q: PackedTensor, core: _core.Packed, name: str) -> Any:
    import torch

    if not _core.built_with_cuda():
        raise RuntimeError(
            "dequantize: got planes on a CUDA device, but this build of quantloom has no CUDA kernels"
        )
    if json.loads(q.format.to_json())["format"] not in _decoded_as_stored():
        from quantloom.kernels import prepare

        return prepare(q).dequantize(name)
    with torch.cuda.device(q.device):
        out = torch.empty(q.shape, dtype=getattr(torch, name), device=q.device)
        stream = torch.cuda.current_stream().cuda_stream
        _core.dequantize_cuda(core, _arrays.describe("out", out).core, stream)
    return out


def save_tensors(path: Any, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Args:
        path: the file; written through a temporary file in the same folder, synced and renamed, so that an
            earlier file stays whole on any failure.
        tensors: maps names to packed tensors or arrays (NumPy, torch, DLPack; copied to the CPU if on a
            device). Plane ``codes`` of packed tensor ``layer`` is stored as tensor ``layer.codes``.
        metadata: free-form strings; the keys ``quantloom`` and ``quantloom.transforms`` are taken.

    The same input gives the same bytes. Raises TypeError or ValueError naming the entry, OSError where the
    system refuses.
    """
    text = str(_checks.path("path", path))
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: got {_checks.type_name(tensors)}, expected a mapping of names to tensors")
    packed: dict[str, _core.Packed] = {}
    plain: dict[str, _core.ArrayRef] = {}
    for name, value in tensors.items():
        _checks.string("tensors", name, "names that are strings")
        if isinstance(value, PackedTensor):
            packed[name] = value.to("cpu")._core()
            continue
        if _arrays.is_torch(value) and value.layout == _arrays.torch_if_loaded().strided:
            value = value.detach().cpu()
        array = _arrays.describe(f"tensors[{name!r}]", value)
        if not array.core.contiguous:
            value = array.value.contiguous() if array.kind == "torch" else np.ascontiguousarray(array.value)
            array = _arrays.describe(f"tensors[{name!r}]", value.reshape(array.shape))
        plain[name] = array.core
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(
            f"metadata: got {_checks.type_name(metadata)}, expected a mapping of strings to strings"
        )
    entries = dict(metadata or {})
    for key, value in entries.items():
        _checks.string("metadata", key, "keys that are strings")
        _checks.string(f"metadata[{key!r}]", value)
    for key in ("quantloom", _TRANSFORMS):
        if key in entries:
            raise ValueError(
                f"metadata: got the key {key!r}, expected other keys: this one describes the planes"
            )
    transforms = {
        name: json.loads(value.transform.to_json())
        for name, value in tensors.items()
        if isinstance(value, PackedTensor) and value.transform is not None
    }
    if transforms:
        entries[_TRANSFORMS] = json.dumps(transforms, sort_keys=True, separators=(",", ":"))
    _core.save_packed(text, packed, plain, entries)


def _described_transform(name: str, fields: Any, packed: _core.Packed) -> Transform:
    try:
        transform = transform_from_json(json.dumps(fields))
        transform.check(packed.n, packed.k)
    except ValueError as error:
        raise ValueError(f"transform of {name}: {error}") from None
    return transform


def _load(path: Any) -> tuple[Any, Any, dict[str, str], dict[str, Transform]]:
    """Packed tensors, plain arrays, metadata and the transforms of packed tensors."""
    text = str(_checks.path("path", path))
    os.stat(text)  # a missing file raises FileNotFoundError
    packed, plain, metadata = _core.load_packed(text)
    metadata = dict(metadata)
    transforms: dict[str, Transform] = {}
    if _TRANSFORMS in metadata:
        try:
            described = _checks.json_object(_TRANSFORMS, metadata.pop(_TRANSFORMS))
            unknown = sorted(described.keys() - packed.keys())
            if unknown:
                raise ValueError(f"{_TRANSFORMS}: {unknown[0]!r} is no packed tensor of the file")
            for name, fields in described.items():
                transforms[name] = _described_transform(name, fields, packed[name])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{text}: {error}") from None
    return packed, plain, metadata, transforms


def stored_transforms(metadata: Mapping[str, str]) -> dict[str, Transform]:
    """The transforms of packed tensors that the metadata of a file describes, by name."""
    described = _checks.json_object(_TRANSFORMS, metadata.get(_TRANSFORMS, "{}"))
    return {name: transform_from_json(json.dumps(fields)) for name, fields in described.items()}


def load_tensors(path: Any, kind: str = "numpy") -> dict[str, Any]:
    """Reads a safetensors file: maps names to packed tensors and plain arrays.

    Args:
        path: the file. One that another library wrote loads as plain arrays.
        kind: ``"numpy"``: read-only arrays over the mapped file, read from disk when touched (do not change
            the file in place meanwhile; replacing it, as ``save_tensors`` does, is safe). ``"torch"``:
            tensors in memory of their own.

    All rules of the container, the description of each packed tensor and all checksums are verified
    first. Raises ValueError naming the file and the tensor that breaks a rule, OSError where the system
    refuses.
    """
    _checks.choice("kind", kind, ("numpy", "torch"))
    packed, plain, _, transforms = _load(path)
    result: dict[str, Any] = {}
    for name, tensor in packed.items():
        transform = transforms.get(name)
        result[name] = PackedTensor._from_core(tensor, kind, shared=True, transform=transform)
    for name, (dtype, array) in plain.items():
        result[name] = _arrays.to_kind(array, dtype, kind)
    return dict(sorted(result.items()))


def load_metadata(path: Any) -> dict[str, str]:
    """The free-form metadata of a safetensors file; the file is verified as by ``load_tensors``."""
    return dict(_load(path)[2])
