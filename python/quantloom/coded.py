"""Entropy-coded weights that products read without ever holding them decoded as a whole.

    w = ql.code(q)                       # of a PackedTensor, or of formats.Encoded
    y = ql.matmul(x, w)                  # on the CPU or, after w.to("cuda"), on a GPU
    w.bits_per_weight, w.dequantize()

Codes are coded in pairs by a tabled asymmetric numeral system (Duda, 2013), which a GPU decodes by one
look-up and two shifts a pair, in as many streams as keep it busy. ``formats.Encoded`` and files hold another
kind of stream, which is a little smaller; this one is for memory.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from quantloom import _arrays, _checks, _core, _devices
from quantloom.tensors import PackedTensor

if TYPE_CHECKING:
    from quantloom.formats.encoded import Encoded

__all__ = ["CodedTensor", "code"]


class CodedTensor:
    """A matrix ``[n, k]`` of entropy-coded weights on one device; made by ``code``. Immutable."""

    __slots__ = ("_core", "_cuda", "_device")

    def __init__(self, core: Any, device: str = "cpu", cuda: Any = None) -> None:
        if not isinstance(core, _core.CodedTensor):
            raise TypeError(f"CodedTensor: got {_checks.type_name(core)}, expected a call of code()")
        self._core = core
        self._device = device
        self._cuda = cuda

    @classmethod
    def _from_parts(cls, parts: dict[str, Any], device: str) -> CodedTensor:
        parts = dict(parts)
        scales = _arrays.cast(parts.pop("scales"), parts.pop("scale_dtype"))
        arrays = {
            name: _arrays.describe(name, parts.pop(name)).core for name in ("symbols", "begins", "words")
        }
        core = _core.coded_from_parts(**parts, **arrays, scales=_arrays.describe("scales", scales).core)
        return cls(core).to(device)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``."""
        return self._core.n, self._core.k

    @property
    def device(self) -> str:
        """``"cpu"``, ``"cuda:0"``, ... The CPU keeps a copy of what is on a CUDA device."""
        return self._device

    @property
    def byte_count(self) -> int:
        """Memory on the device, in bytes, with tables and scales."""
        return self._core.byte_count if self._cuda is None else self._cuda.byte_count

    @property
    def bits_per_weight(self) -> float:
        """8 * byte_count over the number of weights."""
        return 8 * self.byte_count / max(1, self.shape[0] * self.shape[1])

    @property
    def splits(self) -> int:
        """Streams of each block of 16 rows."""
        return self._core.splits

    @property
    def table_bits(self) -> int:
        """log2 of the states of the decoder."""
        return self._core.table_bits

    def to(self, device: Any) -> CodedTensor:
        """The same weights on a device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or a ``torch.device``.

        Raises RuntimeError where the device cannot be used.
        """
        name = _devices.device_name("device", device)
        if name == self._device:
            return self
        if name == "cpu":
            return CodedTensor(self._core)
        with _devices.current(name) as stream:
            return CodedTensor(self._core, name, _core.CudaCodedTensor(self._core, stream))

    def dequantize(self, dtype: Any = None, threads: int = 0) -> Any:
        """Decodes to ``[n, k]``: a NumPy array on the CPU, a torch tensor on a CUDA device.

        Args:
            dtype: float32 (the default), float16 or bfloat16.
            threads: on the CPU; 0 for OpenMP's default.
        """
        name = "float32" if dtype is None else _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
        n, k = self.shape
        if self._cuda is None:
            out = np.empty((n, k), np.float32)
            self._core.dequantize(_arrays.describe("out", out).core, _checks.thread_count(threads))
            return _arrays.cast(out, name)
        import torch

        with _devices.current(self._device) as stream:
            decoded = torch.empty((n, k), dtype=_arrays.torch_dtype(name), device=self._device)
            if decoded.numel():
                self._cuda.dequantize(0, n, decoded.data_ptr(), name, k, stream)
            return decoded

    def __repr__(self) -> str:
        return f"CodedTensor(shape={self.shape}, {self.bits_per_weight:.4g} bits per weight, {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        return CodedTensor._from_parts, (self._core.parts(), self._device)


def code(
    q: PackedTensor | Encoded,
    device: Any = None,
    *,
    overhead: float = 0.01,
    splits: int = 0,
    table_bits: int = 0,
    threads: int = 0,
) -> CodedTensor:
    """Entropy-codes a matrix for products.

    Args:
        q: a ``PackedTensor`` (uniform and symmetric, or codebook, its columns in place), or an
            ``Encoded`` matrix of at most 256 different codes, with or without block scales.
        device: where products run; None: the device of `q`.
        overhead: bits per weight that streams may cost, of which there is at least one for each 16 rows. The
            more there are, the faster a GPU can be: ask for 0.05 or 0.1 where matrices are small.
        splits: streams for each 16 rows, 1 to 16; 0: by `overhead`.
        table_bits: log2 of the states, 8 to 14; 0: as few as cost next to nothing.
        threads: 0 for OpenMP's default. The result does not depend on it.

    Raises RuntimeError for formats that it does not take, ValueError for options out of range.
    """
    options = {
        "overhead": _checks.real("overhead", overhead),
        "splits": _checks.integer("splits", splits, 0),
        "table_bits": _checks.integer("table_bits", table_bits, 0),
        "threads": _checks.thread_count(threads),
    }
    if isinstance(q, PackedTensor):
        place = q.device if device is None else device
        if q.transform is not None:
            raise RuntimeError("q: got a packed tensor with a transform, which coded tensors do not have")
        packed = q if q.device == "cpu" else q.to("cpu")
        return CodedTensor(_core.coded_from_packed(packed._core(), **options)).to(place)
    if not is_encoded(q):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor or an Encoded matrix")
    return CodedTensor(_core_of_encoded(q, options)).to("cpu" if device is None else device)


def is_encoded(value: Any) -> bool:
    module = sys.modules.get("quantloom.formats.encoded")
    return module is not None and isinstance(value, module.Encoded)


def _core_of_encoded(q: Encoded, options: dict[str, Any]) -> Any:
    if len(q.shape) != 2:
        raise ValueError(f"q: got shape {_arrays.shape_text(q.shape)}, expected a matrix [n, k]")
    codes, values, scales, block = q.scaled_codes()
    if len(values) > 256:
        raise RuntimeError(f"q: got {q.format} with {len(values)} values, expected at most 256")
    return _core.coded_from_codes(
        _arrays.describe("codes", np.ascontiguousarray(codes)).core,
        list(values),
        _arrays.describe("scales", scales).core,
        *block,
        **options,
    )


def multiply(x: _arrays.Array, w: CodedTensor, added: Any, threads: int) -> Any:
    """x ``[tokens, k]`` times the transpose of `w`, plus `added`; arguments are checked."""
    n, k = w.shape
    if w._cuda is None:
        y = _arrays.empty(x.kind, (x.shape[0], n), "float32")
        w._core.matmul(x.core, _arrays.describe("y", y).core, threads)
        if added is not None:
            y += _arrays.cast(added, "float32")
        return _arrays.cast(y, x.dtype)
    from quantloom import _cuda

    return _cuda.product(x.value, w._cuda, n, k, x.value.device, added)


def operand_of(q: Encoded, device: str, threads: int) -> CodedTensor | PackedTensor:
    """What products on a device read instead of `q`, which keeps it: coded weights where it is entropy-coded,
    else a packed tensor."""
    kept = q.__dict__.setdefault("_operands", {})
    if device not in kept:
        if "cpu" in kept:
            kept[device] = kept["cpu"].to(device)
        elif _entropy_coded(q.format):
            kept[device] = code(q, device, threads=threads)
        else:
            kept[device] = q.to_packed().to(device)
    return kept[device]


def _entropy_coded(fmt: Any) -> bool:
    from quantloom.formats import CompressedLUTFormat, LinearScalingFormat, ScaledFormat

    while isinstance(fmt, (LinearScalingFormat, ScaledFormat)):
        fmt = fmt.element_format if isinstance(fmt, LinearScalingFormat) else fmt.format
    return isinstance(fmt, CompressedLUTFormat)
