"""Tensors as bytes: what ``TensorFormat.encode`` makes.

A tensor is stored as named planes (``codes``, ``codebook``, ``scale_format.values``, ``outlier_indices``,
``stream``, ...; a nested format's planes begin with its field's name) and a description in JSON: the format,
the shape and the dtype. Tables are planes, not text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantloom import _arrays, _checks
from quantloom.formats import _numerics
from quantloom.formats.base import Shape, TensorFormat

if TYPE_CHECKING:
    from quantloom.tensors import PackedTensor

__all__ = ["Encoded", "Planes", "encode"]

_DTYPES = ("float32", "float16", "bfloat16")
_METADATA = "quantloom.encoded"
_VERSION = 1


class Planes:
    """Planes under a prefix."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def child(self, name: str) -> Planes:
        return Planes(self._tensors, f"{self._prefix}{name}.")

    def put(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if str(tensor.dtype).removeprefix("torch.") not in _arrays.KNOWN_DTYPES:
            tensor = tensor.reshape(-1).view(torch.uint8)
        self._tensors[self._prefix + name] = tensor

    def get(self, name: str, dtype: torch.dtype, shape: Shape | None) -> Tensor:
        """A plane of a dtype and shape (None: any number of dimension 1); ValueError for another."""
        full = self._prefix + name
        if full not in self._tensors:
            raise ValueError(f"planes: got no {full!r}, expected one")
        tensor = self._tensors[full]
        expected = f"{dtype} {'[n]' if shape is None else list(shape)}"
        if tensor.dtype == torch.uint8 and str(dtype).removeprefix("torch.") not in _arrays.KNOWN_DTYPES:
            if tensor.ndim != 1 or shape is None or tensor.numel() != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"plane {full}: got {tensor.numel()} bytes, expected {expected}")
            return tensor.clone().view(dtype).reshape(shape)
        fits = tensor.ndim == 1 if shape is None else tuple(tensor.shape) == tuple(shape)
        if tensor.dtype != dtype or not fits:
            raise ValueError(f"plane {full}: got {tensor.dtype} {list(tensor.shape)}, expected {expected}")
        return tensor

    def put_codes(self, name: str, codes: Tensor | _numerics.Rounded, count: int) -> None:
        packed = codes.pack(count) if isinstance(codes, _numerics.Rounded) else None
        self.put(name, _numerics.pack_codes(codes, count) if packed is None else packed)

    def get_codes(self, name: str, codes: int, count: int) -> Tensor:
        """int32 codes, checked to be below `count`."""
        return self.get_packed(name, codes, count).unpack()

    def get_packed(self, name: str, codes: int, count: int) -> _numerics.Packed:
        """The same, unpacked and checked later."""
        data = self.get(name, torch.uint8, None)
        return _numerics.Packed(data, codes, count, f"plane {self._prefix}{name}")

    def put_table(self, name: str, values: tuple[float, ...]) -> None:
        exact = torch.tensor(values, dtype=torch.float64, device="cpu")
        short = exact.float()
        self.put(name, short if torch.equal(short.double(), exact) else exact)

    def check_table(self, name: str, values: tuple[float, ...]) -> None:
        full = self._prefix + name
        stored = self._tensors.get(full)
        if stored is None or stored.shape != (len(values),) or tuple(stored.double().tolist()) != values:
            raise ValueError(f"plane {full}: got another table than the format's")

    def put_places(self, name: str, places: Tensor) -> None:
        """Ascending places, as distances in as few bits as the largest takes."""
        places = places.cpu()
        gaps = torch.diff(places, prepend=torch.tensor([-1], device="cpu")) - 1
        width = max(1, int(gaps.max()).bit_length()) if gaps.numel() else 1
        self.put(f"{name}_bits", torch.tensor([width], dtype=torch.uint8, device="cpu"))
        self.put_codes(name, gaps, 2**width)

    def get_places(self, name: str, count: int, limit: int) -> Tensor:
        width = int(self.get(f"{name}_bits", torch.uint8, (1,)))
        if not 1 <= width <= 32:
            raise ValueError(f"plane {self._prefix}{name}_bits: got {width}, expected 1 to 32")
        gaps = self.get_codes(name, count, 2**width).long() & 0xFFFFFFFF
        places = torch.cumsum(gaps + 1, 0) - 1
        if count and int(places[-1]) >= limit:
            raise ValueError(
                f"plane {self._prefix}{name}: got place {int(places[-1])}, expected below {limit}"
            )
        return places


@dataclass(eq=False)
class Encoded:
    """A tensor in a format, as bytes.

    Attributes:
        format: decodes it.
        shape, dtype: of the tensor; dtype by name.
        planes: named CPU tensors. All that decoding needs besides the description is here, tables included.
    """

    format: TensorFormat
    shape: tuple[int, ...]
    dtype: str
    planes: dict[str, Tensor] = field(repr=False)

    def decode(self, device: Any = "cpu") -> Tensor:
        """The values, with the bits of ``format.quantise``. Raises ValueError for planes that do not fit."""
        dtype = getattr(torch, self.dtype)
        try:
            return self.format._decode(Planes(self.planes), self.shape, dtype, torch.device(device))
        except (NotImplementedError, AttributeError) as error:
            raise ValueError(f"format: got {self.format}, which does not decode ({error})") from None

    def __getstate__(self) -> dict[str, Any]:
        # Without what products keep here.
        return {name: value for name, value in self.__dict__.items() if name != "_operands"}

    def scaled_codes(self) -> tuple[np.ndarray, tuple[float, ...], np.ndarray, tuple[int, int]]:
        """A matrix as codes of one table under block scales, as kernels take it.

        Returns codes (uint8 or uint16 ``[n, k]``), the value of each code, float32 scales ``[blocks of rows,
        blocks of columns]``, and the rows and columns of a block: values are
        ``table[code] * scale``, which ``decode`` rounds to the dtype of the tensor.

        Raises RuntimeError for formats of other kinds, ValueError for planes that do not fit.
        """
        from quantloom.formats.wrappers import LinearScalingFormat

        fmt, planes, shape = self.format, Planes(self.planes), self.shape
        if len(shape) != 2:
            raise ValueError(f"shape: got {list(shape)}, expected a matrix")
        scales, block = np.ones((1, 1), np.float32), (max(1, shape[0]), max(1, shape[1]))
        if isinstance(fmt, LinearScalingFormat):
            blocks = fmt._blocked(shape)
            stored = fmt.scale_format._decode(
                planes.child("scale_format"), blocks[::2], torch.float32, torch.device("cpu")
            )
            block = (max(1, blocks[1]), max(1, blocks[3]))
            scales = stored.reshape(blocks[0], blocks[2]).numpy()
            fmt, planes = fmt.element_format, planes.child("element_format")
        coder = fmt._codes_of()
        if coder is None:
            raise RuntimeError(f"format: got {self.format}, expected codes of one table under block scales")
        try:
            table = coder._elements()
            codes = _numerics.as_codes(fmt._get_codes(planes, math.prod(shape)))
        except (NotImplementedError, AttributeError) as error:
            raise ValueError(f"format: got {self.format}, which does not decode ({error})") from None
        if table.count > 65536:
            raise RuntimeError(f"format: got {fmt} with {table.count} values, expected at most 65536")
        every = torch.arange(table.count, dtype=torch.int32, device="cpu")
        values = _numerics.decode(table, every, tuple(every.shape), torch.float32)
        if coder._factor != 1:
            values = values * torch.tensor(coder._factor, dtype=torch.float32, device="cpu")
        width = np.uint8 if table.count <= 256 else np.uint16
        return codes.numpy().astype(width).reshape(shape), tuple(values.tolist()), scales, block

    def to_packed(self, scale_dtype: str | None = None) -> PackedTensor:
        """The matrix as ``ql.matmul``, ``QuantLinear`` and files of packed tensors take it: the same codes.

        Takes tables of up to 256 values and vector tables, with or without block scales along in_features
        (``(1, size)``), for each row (``(1, None)``) or for the matrix (``(None, None)``), and outliers
        beside them. Whole steps around 0 become ``ql.Uniform``, other tables ``ql.Codebook``, vectors
        ``ql.VectorCodebook``, outliers ``ql.Outliers``.

        Tables are rounded to float16, and so is what outliers lack of the dense value; values are not rounded
        to the dtype of the tensor. Beside that, decoded values are those of ``decode``.

        Args:
            scale_dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``; None: the first that holds all scales
                exactly.

        Raises RuntimeError for formats and block shapes of other kinds, ValueError for planes that do not
        fit, and for tables whose values coincide or overflow in float16.
        """
        from quantloom.formats.multiplied import to_packed

        return to_packed(self, scale_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes; a file has the description as well (``len(to_bytes())``)."""
        return sum(plane.numel() * plane.element_size() for plane in self.planes.values())

    @property
    def size_in_bits(self) -> int:
        """8 * nbytes: what ``format.count_bits_tensor`` estimates."""
        return 8 * self.nbytes

    @property
    def bits_per_element(self) -> float:
        """size_in_bits over the number of elements."""
        return self.size_in_bits / max(1, math.prod(self.shape))

    def describe(self) -> str:
        """The description in JSON; tables are named there, not written out."""
        fields = {
            "dtype": self.dtype,
            "format": _without_tables(TensorFormat.save(self.format), "", self.planes),
            "shape": list(self.shape),
            "version": _VERSION,
        }
        return json.dumps(fields, sort_keys=True, allow_nan=False)

    @classmethod
    def from_planes(cls, description: str, planes: dict[str, Tensor]) -> Encoded:
        """The inverse of ``describe`` and ``planes``. Raises ValueError for anything else."""
        try:
            fields = _checks.json_object("description", description)
            if set(fields) != {"dtype", "format", "shape", "version"} or fields["version"] != _VERSION:
                raise ValueError(
                    f"description: got keys {sorted(fields)}, expected version {_VERSION} of the format"
                )
            shape, dtype = fields["shape"], fields["dtype"]
            if dtype not in _DTYPES:
                raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPES)}")
            sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**48 for size in shape)
            if not sizes or len(shape) > 16 or math.prod(shape) >= 2**48:
                raise ValueError(
                    f"shape: got {shape!r}, expected at most 16 sizes of fewer than 2**48 elements"
                )
            fmt = TensorFormat.load(_with_tables(fields["format"], "", planes))
        except RecursionError:
            raise ValueError("description: got JSON that is nested too deeply") from None
        if not isinstance(fmt, TensorFormat):
            raise ValueError(f"format: got {_checks.type_name(fmt)}, expected a format")
        return cls(fmt, tuple(shape), dtype, dict(planes))

    def to_bytes(self) -> bytes:
        """A whole safetensors file."""
        from safetensors.torch import save

        return save(self.planes, {_METADATA: self.describe()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Encoded:
        """Raises ValueError unless the bytes are those of ``to_bytes``; planes are checked by ``decode``."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            planes = load(bytes(data))
            size = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        except (SafetensorError, ValueError, KeyError, RuntimeError, RecursionError) as error:
            raise ValueError(f"data: got bytes that are no safetensors file ({error})") from None
        return cls.from_planes(_description(metadata, "data"), planes)

    def save(self, path: Any) -> None:
        """Writes a safetensors file."""
        from quantloom.tensors import save_tensors

        save_tensors(path, self.planes, {_METADATA: self.describe()})

    @classmethod
    def load(cls, path: Any) -> Encoded:
        """Reads a file of ``save``. Raises ValueError for other contents, OSError if it cannot be read."""
        from quantloom.tensors import load_metadata, load_tensors

        planes = load_tensors(path, kind="torch")
        if not all(isinstance(plane, Tensor) for plane in planes.values()):
            raise ValueError(f"{path}: got packed matrices, expected one encoded tensor")
        return cls.from_planes(_description(load_metadata(path), str(path)), planes)


def _description(metadata: dict[str, str], source: str) -> str:
    if _METADATA not in metadata:
        raise ValueError(f"{source}: got a file without {_METADATA!r}, expected one of Encoded.save")
    return metadata[_METADATA]


def _without_tables(node: Any, prefix: str, planes: dict[str, Tensor]) -> Any:
    """Descriptions name the planes that hold their tables."""
    if isinstance(node, list):
        return node
    if not isinstance(node, dict):
        return node
    if node.get("_type") == "tensor" and node.get("dtype") == "float32":
        # The shortest decimals that give the same float32 numbers.
        return node | {"data": [float(str(np.float32(value))) for value in node["data"]]}
    result = {key: _without_tables(value, f"{prefix}{key}.", planes) for key, value in node.items()}
    tables = [name for name in planes if name == f"{prefix}codebook" or name.startswith(f"{prefix}codebook.")]
    if node.get("_type") == "lut" and tables:
        result["values"] = {"plane": f"{prefix}codebook"}
    if node.get("_type") == "vlut" and tables:
        result["values"] = {
            "plane": f"{prefix}codebook",
            "shape": [len(node["values"]), len(node["values"][0])],
        }
    return result


def _with_tables(node: Any, prefix: str, planes: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    result = {key: _with_tables(value, f"{prefix}{key}.", planes) for key, value in node.items()}
    values = node.get("values")
    if not isinstance(values, dict):
        return result
    name = f"{prefix}codebook"
    if node.get("_type") == "lut":
        result["values"] = _table_plane(values, name, planes)
    elif node.get("_type") == "vlut":
        if values.get("plane") != name:
            raise ValueError(f"values: got {values!r}, expected the plane {name!r}")
        shape = values.get("shape")
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(type(s) is int and 0 < s < 2**24 for s in shape)
        ):
            raise ValueError(f"plane {name}: got shape {shape!r}, expected [K, d]")
        element_type = TensorFormat.load(result.get("element_type"))
        if not isinstance(element_type, TensorFormat):
            raise ValueError("element_type: got no format, expected one")
        table = element_type._decode(
            Planes(planes, f"{name}."), tuple(shape), torch.float32, torch.device("cpu")
        )
        result["values"] = table.tolist()
    return result


def _table_plane(reference: dict[str, Any], name: str, planes: dict[str, Tensor]) -> list[float]:
    """The numbers of the plane that a description refers to."""
    if reference.get("plane") != name:
        raise ValueError(f"description: got {reference!r}, expected the plane {name!r}")
    plane = planes.get(name)
    if plane is None or plane.ndim != 1 or plane.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"plane {name}: got none of floats, expected a table")
    return plane.double().tolist()


def encode(fmt: TensorFormat, tensor: Tensor) -> Encoded:
    """See ``TensorFormat.encode``."""
    _require_encodable(tensor)
    planes: dict[str, Tensor] = {}
    fmt._encode(tensor.detach(), Planes(planes))
    return Encoded(fmt, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), planes)


def encode_parts(
    fmt: TensorFormat,
    tensor: Tensor,
    scales: Tensor | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
) -> Encoded:
    """What a ``LinearScalingFormat``, or a ``SparseFormat`` around one, stores where scales and outliers were
    not computed from the tensor but trained.

    Args:
        scales: one for each block, in the shape of the blocks; rounded to the scale format. None: those that
            the format computes.
        outliers: places in row-major order, each once, in any order, and values. They replace what the tensor
            has there; their number must be the format's for this shape. Needed by a ``SparseFormat``.
    """
    _require_encodable(tensor)
    planes: dict[str, Tensor] = {}
    root, linear = Planes(planes), fmt
    if outliers is not None:
        places, order = outliers[0].sort()
        expected = fmt.n_sparse(tuple(tensor.shape), fmt.sparse_ratio)
        if places.numel() != expected:
            raise ValueError(f"outliers: got {places.numel()}, expected {expected}")
        fmt.sparse_format._encode(outliers[1][order], root.child("sparse_format"))
        root.put_places("outlier_indices", places)
        root, linear = root.child("format"), fmt.format
    stored = linear.scales(tensor) if scales is None else linear.scale_format.quantise(scales.float())
    linear._encode_scaled(tensor, stored, root)
    return Encoded(fmt, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), planes)


def _require_encodable(tensor: Tensor) -> None:
    if isinstance(tensor, np.ndarray):
        raise TypeError("tensor: got a NumPy array, expected a torch tensor (torch.from_numpy)")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise TypeError(f"tensor: got {dtype}, expected one of {', '.join(_DTYPES)}")
    if _numerics.has_nan(tensor):
        raise ValueError("tensor: got NaN, expected numbers")
