"""Products straight from packed codes."""

from __future__ import annotations

import threading
from typing import Any

from quantloom import _arrays, _checks, _core
from quantloom.tensors import PackedTensor

__all__ = ["PreparedTensor", "kernel_table", "matmul", "prepare"]

ACTIVATIONS = ("exact", "int8")


class PreparedTensor:
    """A packed tensor in the order that the CPU kernels read; made by ``prepare``.

    Immutable, may be used by many threads at once. Takes ``byte_count`` bytes beside the packed tensor, which
    it does not keep alive.
    """

    __slots__ = ("_core",)

    def __init__(self, core: _core.Prepared) -> None:
        if not isinstance(core, _core.Prepared):
            raise TypeError(f"PreparedTensor: got {_checks.type_name(core)}, expected a call of prepare()")
        self._core = core

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``."""
        return self._core.n, self._core.k

    @property
    def byte_count(self) -> int:
        """Memory in bytes."""
        return self._core.byte_count

    def __repr__(self) -> str:
        return f"PreparedTensor(shape={self.shape}, {self.byte_count} bytes)"


def prepare(q: PackedTensor, threads: int = 0) -> PreparedTensor:
    """Brings a packed tensor on the CPU into the order that the kernels read.

    Raises RuntimeError if no CPU kernel takes its format (``kernel_table`` lists them).
    """
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    if q.device != "cpu":
        raise TypeError(f'q: got planes on {q.device}, expected planes on the CPU (pass q.to("cpu"))')
    return PreparedTensor(_core.prepare(q._core(), _checks.thread_count(threads)))


_prepare_lock = threading.Lock()


def _prepared_of(q: PackedTensor, threads: int) -> PreparedTensor:
    if q._prepared is None:
        with _prepare_lock:
            if q._prepared is None:
                q._prepared = prepare(q, threads)
    return q._prepared


def matmul(x: Any, q: PackedTensor | PreparedTensor, activations: str = "exact", threads: int = 0) -> Any:
    """``x @ W.T`` straight from the packed codes of W.

    Args:
        x: ``[..., k]``, float32, float16 or bfloat16, NumPy or torch.
        q: W ``[n, k]``, a ``PackedTensor`` or what ``prepare`` made of one. A packed tensor is prepared in
            the first call and keeps the result, which takes about as much memory again; use ``prepare``
            to own that memory.
        activations: ``"exact"``: x enters in float32, sums are taken in float32. ``"int8"``: x is rounded to
            8 bits with one scale for each block of at most 128 inputs, which is faster below 8 bits
            per weight and adds a relative error of about 0.5%; x must then be finite, and W uniform.
        threads: 0 for OpenMP's default. The result does not depend on it.

    Returns ``[..., n]``, of the kind and dtype of `x`, without a gradient (``quantloom.nn.QuantLinear`` has
    one). With planes on a CUDA device it decodes W to the
    dtype of `x`, then multiplies with cuBLAS; activations must be ``"exact"`` there.

    Raises TypeError (kind, dtype, device), ValueError (shape, activations), RuntimeError if no kernel
    takes the format with these activations.
    """
    if not isinstance(q, (PackedTensor, PreparedTensor)):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor or a PreparedTensor")
    _checks.choice("activations", activations, ACTIVATIONS)
    threads = _checks.thread_count(threads)
    n, k = q.shape
    on_cpu = isinstance(q, PreparedTensor) or q.device == "cpu"
    tokens = _arrays.tokens("x", x, k, cpu=on_cpu)
    shape = (*_arrays.describe("x", x).shape[:-1], n)
    if not on_cpu:
        if tokens.device != q.device:
            raise TypeError(f"x: got an array on {tokens.device}, expected one on {q.device}, as q")
        if activations != "exact":
            raise RuntimeError(
                f"activations: got {activations!r}, but on a CUDA device there is only 'exact'"
            )
        weight = q.dequantize(tokens.dtype)
        return (tokens.value @ weight.T).reshape(shape)
    prepared = q if isinstance(q, PreparedTensor) else _prepared_of(q, threads)
    y = _arrays.empty(tokens.kind, (tokens.shape[0], n), "float32")
    _core.matmul(tokens.core, prepared._core, _arrays.describe("y", y).core, activations, threads)
    return _arrays.cast(y, tokens.dtype).reshape(shape)


def kernel_table() -> list[dict[str, str]]:
    """Which kernel serves which operation, format, width, device and number of tokens in this process."""
    return _core.kernel_table()
