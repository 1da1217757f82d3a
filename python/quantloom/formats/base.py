"""What every format of the vocabulary can do, and its JSON form."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from quantloom import _checks, _core
from quantloom.formats import _numerics

if TYPE_CHECKING:
    from quantloom.formats.encoded import Encoded, Planes

__all__ = ["BlockShape", "Compressor", "ScalarFormat", "Scaling", "Shape", "TensorFormat"]

Shape = tuple[int, ...]
"""The shape of a tensor; a ``torch.Size`` is one."""
BlockShape = tuple[int | None, ...]
"""The sizes of a block, one for each dimension; None takes the whole dimension."""
Scaling = Literal["rms", "absmax", "signmax"]
Compressor = Literal["optimal", "huffman", "rans", "arithmetic", "bz2"]

_MOST_CENTROIDS = 1 << 24


class TensorFormat:
    """A way to store a tensor of floats, with a number of bits and a loss.

    Formats are dataclasses: ``dataclasses.replace``, ``asdict``, ``fields`` and ``==`` work, ``str()`` is
    short and ``save``/``load`` go through JSON. ``quantise`` takes tensors of any strides, on the CPU
    (float32, float16, bfloat16 in C++; other dtypes through float32) or a CUDA device (the same formulas in
    torch).
    """

    _types: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        tag = cls.__dict__.get("_type")
        if isinstance(tag, str):
            TensorFormat._types[tag] = cls

    def quantise(self, tensor: Tensor) -> Tensor:
        """The values that the format keeps of `tensor`, in its shape and dtype."""
        raise NotImplementedError

    def count_bits(self, shape: Shape) -> int:
        """The nominal bits of any tensor of a shape."""
        raise NotImplementedError

    def count_bits_tensor(self, tensor: Tensor) -> float:
        """The nominal bits of one tensor, which entropy coding makes fractional;
        ``encode(tensor).size_in_bits`` is what bytes really take."""
        return self.count_bits(tuple(tensor.shape))

    def encode(self, tensor: Tensor) -> Encoded:
        """The tensor as bytes; decoding them gives ``quantise(tensor)``, bit for bit.

        Raises ValueError for NaN, and TypeError for dtypes other than float32, float16 and bfloat16.
        """
        from quantloom.formats.encoded import encode

        return encode(self, tensor)

    def _codes_of(self) -> ScalarFormat | None:
        """The scalar format that chooses the codes, which `_put_codes` stores, if each element has one."""
        return None

    def _put_codes(self, codes: Tensor | _numerics.Rounded, planes: Planes) -> None:
        raise NotImplementedError

    def _get_codes(self, planes: Planes, count: int) -> Tensor | _numerics.Packed:
        raise NotImplementedError

    def _get_codes_on(self, planes: Planes, count: int, device: torch.device) -> Tensor | _numerics.Packed:
        """`_get_codes` or, where they can be decoded on the device, integers that lie there."""
        return self._get_codes(planes, count)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        raise NotImplementedError(f"{self}: this format has no encoding")

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise NotImplementedError(f"{self}: this format has no encoding")

    @staticmethod
    def save(obj: Any) -> Any:
        """A format, or any nesting of formats, tensors, lists and plain values, as JSON can hold it."""
        if isinstance(obj, Tensor):
            dtype = str(obj.dtype).removeprefix("torch.")
            return {
                "_type": "tensor",
                "data": obj.flatten().tolist(),
                "shape": list(obj.shape),
                "dtype": dtype,
            }
        if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
            if getattr(obj, "_type", None) not in TensorFormat._types:
                raise TypeError(f"save: got {_checks.type_name(obj)}, expected a format")
            return {
                field.name: TensorFormat.save(getattr(obj, field.name)) for field in dataclasses.fields(obj)
            }
        if isinstance(obj, Mapping):
            return {_checks.string("save: key", key): TensorFormat.save(value) for key, value in obj.items()}
        if isinstance(obj, (list, tuple)):
            return [TensorFormat.save(value) for value in obj]
        if obj is None or isinstance(obj, (bool, int, float, str)):
            return obj
        raise TypeError(f"save: got {_checks.type_name(obj)}, expected a format or plain values")

    @staticmethod
    def load(obj: Any) -> Any:
        """What ``save`` was given; lists come back as tuples. Raises ValueError for anything else."""
        if isinstance(obj, (list, tuple)):
            return tuple(TensorFormat.load(value) for value in obj)
        if not isinstance(obj, Mapping):
            return obj
        fields = {key: TensorFormat.load(value) for key, value in obj.items() if key != "_type"}
        if "_type" not in obj:
            return fields
        tag = obj["_type"]
        if tag == "tensor":
            return _load_tensor(fields)
        _import_all()
        if not isinstance(tag, str) or tag not in TensorFormat._types:
            raise ValueError(f"_type: got {tag!r}, expected one of {', '.join(sorted(TensorFormat._types))}")
        try:
            return TensorFormat._types[tag](**fields)
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"format {tag}: got fields that do not fit ({error})") from None


def _import_all() -> None:
    from quantloom import fit  # noqa: F401
    from quantloom.formats import compressed, elements, tables, vectors, wrappers  # noqa: F401


def _load_tensor(fields: dict[str, Any]) -> Tensor:
    expected = "data, shape and dtype of a tensor"
    lists = all(isinstance(fields.get(name), tuple) for name in ("data", "shape"))
    if set(fields) != {"data", "shape", "dtype"} or not lists:
        raise ValueError(f"tensor: got {sorted(fields)}, expected {expected}")
    dtype = getattr(torch, str(fields["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"tensor: got dtype {fields['dtype']!r}, expected {expected}")
    try:
        return torch.tensor(fields["data"], dtype=dtype, device="cpu").reshape(fields["shape"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"tensor: got values that do not fit ({error}), expected {expected}") from None


@functools.lru_cache(maxsize=64)
def _all_centroids(kind: type, key: Any, elements: _core.Elements) -> tuple[float, ...]:
    codes = torch.arange(elements.count, dtype=torch.int32, device="cpu")
    return tuple(_numerics.decode(elements, codes, tuple(codes.shape), torch.float32).tolist())


class ScalarFormat(TensorFormat):
    """A format that rounds each value on its own, to one of an ascending set of numbers."""

    @property
    def bits(self) -> float:
        """Bits for each value; not always a whole number."""
        raise NotImplementedError

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        raise NotImplementedError

    @property
    def centroids(self) -> tuple[float, ...]:
        """All values, ascending."""
        elements = self._elements()
        if elements.count > _MOST_CENTROIDS:
            raise ValueError(f"centroids: {self} has {elements.count} values, expected at most 2**24")
        return _all_centroids(type(self), str(self), elements)

    def count_bits(self, shape: Shape) -> int:
        return math.ceil(self.bits * math.prod(shape))

    def quantise(self, tensor: Tensor) -> Tensor:
        return _numerics.round_values(self._elements(), self, tensor)

    def to_idx(self, tensor: Tensor) -> Tensor:
        """The place of each rounded value among ``centroids``, int64. NaN takes place 0."""
        return _numerics.round_codes(self._elements(), self, tensor).to(torch.int64) & 0xFFFFFFFF

    _factor: ClassVar[float] = 1.0
    """What values of the set are multiplied by."""

    def _elements(self) -> _core.Elements:
        """The set of values as C++ knows it, without the factor."""
        raise NotImplementedError

    def _reference_codes(self, values: Tensor) -> Tensor:
        """int64 codes of float32 values, in torch operations: what CUDA tensors use."""
        raise NotImplementedError

    def _reference_values(self, codes: Tensor) -> Tensor:
        """float32 values of int64 codes, in torch operations."""
        raise NotImplementedError

    def _codes_of(self) -> ScalarFormat | None:
        return self

    def _put_codes(self, codes: Tensor | _numerics.Rounded, planes: Planes) -> None:
        planes.put_codes("codes", codes, self._elements().count)

    def _get_codes(self, planes: Planes, count: int) -> Tensor | _numerics.Packed:
        return planes.get_packed("codes", count, self._elements().count)

    def _encode(self, tensor: Tensor, planes: Planes) -> None:
        self._put_codes(_numerics.Rounded(self._elements(), self, tensor), planes)

    def _decode(self, planes: Planes, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        codes = self._get_codes_on(planes, math.prod(shape), device)
        return _numerics.decode(self._elements(), codes, shape, dtype, factor=self._factor).to(device)
