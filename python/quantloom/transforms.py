"""Transforms: the basis in which a matrix is quantized.

``hadamard`` is the orthonormal Hadamard transform of the last axis, on the CPU and on CUDA devices.
``Hadamard`` describes a rotation of a weight matrix, for ``quantize`` and ``Recipe``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core

__all__ = [
    "Hadamard",
    "Transform",
    "hadamard",
    "hadamard_matrix",
    "hadamard_signs",
    "largest_hadamard_block",
    "parse_transform",
    "transform_from_json",
]

_SIDES = ("in", "out", "both")


def _seed(name: str, value: Any) -> int:
    return _checks.integer(name, value, 0, "an integer of 63 bits")


def _block(name: str, value: Any) -> int:
    """A block as the C++ side counts it: 0 for whole rows."""
    if value is None or value == "row":
        return 0
    return _checks.integer(name, value, 1, 'None, "row" or a number of elements')


def hadamard_matrix(n: int) -> np.ndarray:
    """The Hadamard matrix [n, n] of the transform, entries +1 and -1 in int8: ``hadamard(x)`` is
    ``x @ hadamard_matrix(n).T / sqrt(n)``.

    Raises ValueError unless a matrix of order n is known; n is at most 16384.
    """
    return _core.hadamard_matrix(_checks.integer("n", n, 1))


def largest_hadamard_block(n: int) -> int:
    """The largest divisor of n that ``hadamard`` takes as a block; 1 if only that."""
    return _core.largest_hadamard_block(_checks.integer("n", n, 1))


def hadamard_signs(n: int, seed: int) -> np.ndarray:
    """The random signs of `seed`: int8 ``[n]`` of +1 and -1, a pure function of seed and index."""
    bits = _core.random_signs(_checks.integer("n", n, 0), _seed("seed", seed))
    return (1 - 2 * np.unpackbits(bits, count=n, bitorder="little").astype(np.int8)).astype(np.int8)


def _pack_signs(signs: Any, n: int, like: _arrays.Array) -> Any:
    """Signs as bits in uint8, an array of the kind and on the device of `like`."""
    array = _arrays.describe("signs", signs)
    count = (n + 7) // 8
    packed = array.dtype == "uint8"
    if array.shape != ((count,) if packed else (n,)):
        got = _arrays.shape_text(array.shape)
        raise ValueError(
            f"signs: got shape {got}, expected [{n}] of +1 and -1, or their bits in uint8 of shape [{count}]"
        )
    if packed:
        bits = array.value
    else:
        values = array.value.cpu().float().numpy() if array.kind == "torch" else array.value
        values = np.asarray(values, np.float32)
        if not np.all(np.abs(values) == 1):
            raise ValueError("signs: got other values than +1 and -1")
        bits = np.packbits(values < 0, bitorder="little")
    return _like(bits, like)


def _like(value: Any, like: _arrays.Array) -> Any:
    """A vector as an array of the kind and on the device of `like`, contiguous."""
    if like.kind == "numpy":
        if _arrays.is_torch(value):
            value = value.detach().cpu().numpy()
        return np.ascontiguousarray(value)
    import torch

    if not isinstance(value, torch.Tensor):
        value = torch.from_numpy(np.array(value))
    return value.detach().to(like.device).contiguous()


def _scale(scale: Any, n: int, like: _arrays.Array) -> tuple[float, Any]:
    """A scale as a number and a vector of float32 (or None)."""
    if scale is None:
        return 1.0, None
    if not isinstance(scale, (int, float, np.number)) and hasattr(scale, "shape") and len(scale.shape) > 0:
        array = _arrays.describe("scale", scale)
        if array.shape != (n,):
            got = _arrays.shape_text(array.shape)
            raise ValueError(f"scale: got shape {got}, expected a number or shape [{n}]")
        value = array.value
        value = value.float() if array.kind == "torch" else value.astype(np.float32)
        return 1.0, _like(value, like)
    return _checks.real("scale", scale), None


def _rows(argument: str, array: _arrays.Array) -> _arrays.Array:
    """Any array [..., n] as a matrix over the same memory, or a copy where strides leave no other way."""
    n = array.shape[-1]
    rows = 1
    for size in array.shape[:-1]:
        rows *= size
    value = array.value.reshape((rows, n))
    flat = _arrays.describe(argument, value)
    strides = flat.core.strides
    if flat.core.element_count and ((rows > 1 and strides[0] < n) or (n > 1 and strides[1] != 1)):
        value = value.contiguous() if array.kind == "torch" else np.ascontiguousarray(value)
        flat = _arrays.describe(argument, value)
    return flat


def _output(out: Any, x: _arrays.Array) -> _arrays.Array:
    """`out` as a matrix over its own memory."""
    array = _arrays.describe("out", out)
    for what, got, expected in (
        ("kind", array.kind, x.kind),
        ("dtype", array.dtype, x.dtype),
        ("device", array.device, x.device),
    ):
        if got != expected:
            raise TypeError(f"out: got {what} {got}, expected {expected}, as x has")
    if array.shape != x.shape:
        got, expected = _arrays.shape_text(array.shape), _arrays.shape_text(x.shape)
        raise ValueError(f"out: got shape {got}, expected {expected}, as x has")
    if array.kind == "numpy" and not array.value.flags.writeable:
        raise ValueError("out: got a read-only array, expected one that can be written to")
    if not (array.core.contiguous or len(array.shape) == 2):
        raise ValueError("out: got an array with gaps, expected a contiguous array or a matrix")
    value = array.value.reshape((-1, array.shape[-1])) if array.core.element_count else array.value
    return _arrays.matrix("out", value.reshape((-1, array.shape[-1])), cpu=False) if value.size else array


def run(
    x: _arrays.Array,
    out: _arrays.Array,
    block: int,
    inverse: bool,
    bits: Any,
    scale: float,
    channels: Any,
    threads: int,
) -> None:
    """The transform of matrices with contiguous rows, whose other arguments are of the kind and on the device
    of `x`."""
    if x.device == "cpu":
        _core.hadamard(
            x.core,
            out.core,
            block,
            inverse,
            None if bits is None else _arrays.describe("signs", bits).core,
            scale,
            None if channels is None else _arrays.describe("scale", channels).core,
            threads,
        )
        return
    run_cuda(x.value, out.value, block, inverse, bits, scale, channels)


def run_cuda(x: Any, out: Any, block: int, inverse: bool, bits: Any, scale: float, channels: Any) -> None:
    """The same of torch tensors ``[rows, n]`` on a CUDA device, queued on torch's current stream."""
    import torch

    from quantloom import _cuda

    rows, n = x.shape
    dtype = str(x.dtype).removeprefix("torch.")
    with _cuda.on(x.device):
        _core.hadamard_cuda(
            x.data_ptr(),
            x.stride(0) if rows > 1 else n,
            out.data_ptr(),
            out.stride(0) if rows > 1 else n,
            rows,
            n,
            dtype,
            block,
            inverse,
            0 if bits is None else bits.data_ptr(),
            scale,
            0 if channels is None else channels.data_ptr(),
            torch.cuda.current_stream(x.device).cuda_stream,
        )


def hadamard(
    x: Any,
    block: int | str | None = None,
    signs: Any = None,
    seed: int | None = None,
    scale: Any = None,
    inverse: bool = False,
    out: Any = None,
    threads: int = 0,
) -> Any:
    """The orthonormal Hadamard transform of the last axis: ``scale * H (signs * x)``.

    H is ``hadamard_matrix(block) / sqrt(block)``, so its length is kept, and ``inverse=True`` undoes it.
    Blocks are powers of two, or m times a power of two for an order m of a known dense Hadamard matrix (12,
    20, 28, ..., 108, 148, 172, 924, ...).

    Args:
        x: ``[..., n]``, float32, float16 or bfloat16: a NumPy array, a torch tensor on the CPU or a CUDA
            device, or anything with ``__dlpack__``.
        block: elements that are transformed together, a divisor of n; None or "row": n.
        signs: ``[n]`` of +1 and -1, or the bits (1 where negative, lowest first) in uint8 of shape
            ``[ceil(n / 8)]``. Signs belong to the n columns, not to a block.
        seed: instead of `signs`, those of ``hadamard_signs(n, seed)``.
        scale: a number, or ``[n]``: multiplies the result, in both directions.
        inverse: ``scale * signs * H^T x`` instead.
        out: where the result goes; may be `x` itself, and must not overlap it otherwise. Gradients do not
            flow through it.
        threads: 0 for OpenMP's default; CPU only, and the result does not depend on it.

    Returns an array of the kind, dtype and shape of `x`. Computed in float32 and rounded once. For torch
    tensors it is the operator ``quantloom::hadamard``, whose gradient with respect to `x` is its transpose.
    On a CUDA device the work is queued on torch's current stream; signs or scales that are not on the device
    yet are copied there first, which a CUDA graph cannot capture.

    Raises TypeError or ValueError naming the argument (a size without a known matrix: with the largest block
    that would work), RuntimeError for a block that no CUDA kernel takes.
    """
    array = _arrays.describe("x", x)
    if not array.shape:
        raise ValueError("x: got a number, expected [..., n]")
    _arrays._check_float("x", array, _arrays.FLOATS)
    n = array.shape[-1]
    columns = _block("block", block)
    _checks.boolean("inverse", inverse)
    threads = _checks.thread_count(threads)
    if signs is not None and seed is not None:
        raise ValueError("seed: got one beside signs, expected either")
    if n:
        _core.require_hadamard_block(n, columns)
    bits = None
    if seed is not None:
        bits = _like(_core.random_signs(n, _seed("seed", seed)), array)
    elif signs is not None:
        bits = _pack_signs(signs, n, array)
    factor, channels = _scale(scale, n, array)
    if out is None and array.kind == "torch":
        import torch

        import quantloom._operators  # noqa: F401 - registers the operator

        return torch.ops.quantloom.hadamard(x, columns, bits, factor, channels, inverse)
    flat = _rows("x", array)
    if out is None:
        result = np.empty(array.shape, array.value.dtype)
        target = _arrays.describe("out", result.reshape(flat.shape))
        run(flat, target, columns, inverse, bits, factor, channels, threads)
        return result
    target = _output(out, array)
    if array.core.element_count:
        run(flat, target, columns, inverse, bits, factor, channels, threads)
    return out


class Transform:
    """Base class of all transforms of weight matrices."""

    @property
    def spec(self) -> str:
        """The short form, such as ``"hadamard:b128:seed=1"``; ``parse_transform`` reads it back."""
        raise NotImplementedError

    def to_json(self) -> str:
        """The description as a JSON object; ``transform_from_json`` reads it back."""
        raise NotImplementedError

    @property
    def size_in_bits(self) -> int:
        """What has to be stored for it, beyond a few numbers."""
        return 0

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True)
class Hadamard(Transform):
    """Rotates a weight matrix W ``[n, k]`` before it is quantized: ``R_out W R_in^T`` is stored.

    R is ``H diag(signs)``, orthonormal, so that ``y = R_out^T (W' (R_in x))`` is the same product. Rotated
    weights are closer to a normal distribution: outliers are spread over a block.

    Args:
        block: ``"row"`` for whole rows (columns on the output side), or the elements of a block.
        seed: of the random signs, of the input side those of ``hadamard_signs(k, seed)``, of the output side
            those of ``hadamard_signs(n, seed + 1)``; None for no signs.
        sides: ``"in"``, ``"out"`` or ``"both"``. The input side is applied to x before the product, the
            output side is undone after it.
    """

    block: int | str = "row"
    seed: int | None = 0
    sides: str = "in"

    def __post_init__(self) -> None:
        if not isinstance(self.block, str) or self.block != "row":
            if isinstance(self.block, str):
                raise ValueError(f'block: got {self.block!r}, expected "row" or a number of elements')
            object.__setattr__(self, "block", _checks.integer("block", self.block, 1))
        if self.seed is not None:
            object.__setattr__(self, "seed", _seed("seed", self.seed))
            if self.seed > 2**63 - 2:
                raise ValueError(f"seed: got {self.seed}, expected at most 2^63 - 2")
        _checks.choice("sides", self.sides, _SIDES)

    @property
    def spec(self) -> str:
        parts = ["hadamard"]
        if self.block != "row":
            parts.append(f"b{self.block}")
        if self.seed is None:
            parts.append("no-signs")
        elif self.seed != 0:
            parts.append(f"seed={self.seed}")
        if self.sides != "in":
            parts.append(self.sides)
        return ":".join(parts)

    def to_json(self) -> str:
        fields = {
            "block": self.block,
            "seed": self.seed,
            "sides": self.sides,
            "transform": "hadamard",
            "version": 1,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @property
    def has_input(self) -> bool:
        """Whether inputs are rotated."""
        return self.sides != "out"

    @property
    def has_output(self) -> bool:
        """Whether outputs are rotated."""
        return self.sides != "in"

    @property
    def columns(self) -> int:
        """The block as the operator ``quantloom::hadamard`` takes it: 0 for whole rows."""
        return 0 if self.block == "row" else int(self.block)

    def check(self, n: int, k: int) -> None:
        """Raises ValueError, naming the side and the largest block that works, unless W can be ``[n, k]``."""
        for side, size, used in (("in", k, self.has_input), ("out", n, self.has_output)):
            if not used or size == 0:
                continue
            try:
                _core.require_hadamard_block(size, self.columns)
            except ValueError as error:
                raise ValueError(f"transform: side {side!r}: {error}") from None

    def input_signs(self, k: int) -> np.ndarray | None:
        """The bits of the signs of the input side, as ``hadamard`` takes them; None without signs."""
        return None if self.seed is None else _kept_signs(k, self.seed)

    def output_signs(self, n: int) -> np.ndarray | None:
        """The same of the output side."""
        return None if self.seed is None else _kept_signs(n, self.seed + 1)

    def rotate_input(self, x: Any, inverse: bool = False, threads: int = 0) -> Any:
        """``R_in`` (or its inverse) applied to the last axis of `x` ``[..., k]``, such as rows of W."""
        if not self.has_input or x.shape[-1] == 0:
            return x
        signs = self.input_signs(x.shape[-1])
        return hadamard(x, self.block, signs=signs, inverse=inverse, threads=threads)

    def rotate_output(self, y: Any, inverse: bool = False, threads: int = 0) -> Any:
        """``R_out`` (or its inverse) applied to the last axis of `y` ``[..., n]``."""
        if not self.has_output or y.shape[-1] == 0:
            return y
        signs = self.output_signs(y.shape[-1])
        return hadamard(y, self.block, signs=signs, inverse=inverse, threads=threads)

    def rotate_weight(self, w: Any, inverse: bool = False, threads: int = 0) -> Any:
        """``R_out W R_in^T`` (or, inverse, the W of which this is the rotation), of the dtype of `w`."""
        w = self.rotate_input(w, inverse, threads)
        if self.has_output:
            w = _transposed(self.rotate_output(_transposed(w), inverse, threads))
        return w

    def rotate_hessian(self, h: np.ndarray) -> np.ndarray:
        """``R_in H R_in^T`` of a matrix ``[k, k]``, in its dtype; float64 stays float64."""
        if not self.has_input or h.shape[0] == 0:
            return h
        signs = self.input_signs(h.shape[0])
        for _ in range(2):
            h = hadamard_in_numpy(h, self.block, signs).T
        return np.ascontiguousarray(h)


def _transposed(w: Any) -> Any:
    return w.t().contiguous() if _arrays.is_torch(w) else np.ascontiguousarray(w.T)


@functools.lru_cache(maxsize=256)
def _kept_signs(n: int, seed: int) -> np.ndarray:
    bits = _core.random_signs(n, seed)
    bits.setflags(write=False)
    return bits


@functools.lru_cache(maxsize=8)
def _base_entries(order: int) -> np.ndarray:
    return _core.hadamard_matrix(order)


def hadamard_in_numpy(x: Any, block: int | str = "row", signs: Any = None) -> np.ndarray:
    """``hadamard`` of NumPy arrays or torch tensors in their own dtype, float64 included, by plain array
    operations: for Hessians, and as a reference. `signs`: bits in uint8, or None."""
    n = x.shape[-1]
    size = n if block == "row" else block
    order, power = _core.hadamard_size(_core.require_hadamard_block(n, size))
    torch = _arrays.torch_if_loaded() if _arrays.is_torch(x) else None

    def like(values: np.ndarray) -> Any:
        return torch.from_numpy(values.copy()).to(x) if torch else values.astype(x.dtype)

    y = x
    if signs is not None:
        y = y * like(1.0 - 2.0 * np.unpackbits(np.asarray(signs), count=n, bitorder="little"))
    shape = tuple(x.shape)
    y = y.reshape((-1, order, 1 << power))
    if order > 1:
        base = like(_base_entries(order))
        y = base @ y
    for i in range(power):
        y = y.reshape((-1, 2, 1 << i))
        a, b = y[:, 0], y[:, 1]
        y = torch.stack((a + b, a - b), 1) if torch else np.stack((a + b, a - b), 1)
    return y.reshape(shape) / float(np.sqrt(size))


def parse_transform(spec: Any) -> Transform | None:
    """The transform of a short form; None and a ``Transform`` are returned as they are.

    ``none`` or ``hadamard[:bN][:seed=N|:no-signs][:in|:out|:both]``.
    """
    if spec is None or isinstance(spec, Transform):
        return spec
    _checks.string("transform", spec, "None, a Transform or a short form such as 'hadamard:b128'")
    name, *options = spec.split(":")
    if spec == "none":
        return None
    if name != "hadamard":
        raise ValueError(f"transform: got {spec!r}, expected none or hadamard, with options after colons")
    settings: dict[str, Any] = {}
    for option in options:
        if option in _SIDES:
            update: dict[str, Any] = {"sides": option}
        elif option == "no-signs":
            update = {"seed": None}
        elif option.startswith("seed=") and option[5:].isdecimal():
            update = {"seed": int(option[5:])}
        elif option.startswith("b") and option[1:].isdecimal():
            update = {"block": int(option[1:])}
        else:
            raise ValueError(
                f"transform: got option {option!r} in {spec!r}, expected bN, seed=N, no-signs, in, out, both"
            )
        if settings.keys() & update.keys():
            raise ValueError(f"transform: got {next(iter(update))} twice in {spec!r}")
        settings |= update
    return Hadamard(**settings)


def transform_from_json(text: str) -> Transform:
    """Reads ``Transform.to_json`` back. Raises ValueError for unknown names, keys and versions."""
    fields = _checks.json_object("transform", text)
    if fields.get("transform") == "channel_scales":
        from quantloom.channel_scales import ChannelScales

        return ChannelScales.from_fields(fields)
    expected = {"block", "seed", "sides", "transform", "version"}
    if set(fields) != expected or fields["transform"] != "hadamard" or fields["version"] != 1:
        raise ValueError(
            f"transform: got {text[:200]!r}, expected a hadamard of version 1 with keys {sorted(expected)}"
        )
    try:
        return Hadamard(fields["block"], fields["seed"], fields["sides"])
    except TypeError as error:
        raise ValueError(f"transform: {error}") from None
