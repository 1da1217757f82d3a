"""Calibration: what a layer's inputs say about which errors matter."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core

__all__ = ["Hessian", "proxy_loss"]


class Hessian:
    """The Hessian of a linear layer's squared output error, ``H = X^T X / tokens``, gathered in a stream.

    Products are taken in float32 over chunks of a fixed number of tokens and summed in float64, so that
    the result depends on the sequence of tokens in the calls of ``add`` only, not on threads. Takes
    ``8 * k * k`` bytes. Calls from several threads of Python wait for each other.

    Args:
        k: in_features, >= 1.
    """

    __slots__ = ("_core",)

    def __init__(self, k: int) -> None:
        self._core = _core.Hessian(_checks.integer("k", k, 1))

    @classmethod
    def from_sum(cls, sum: Any, tokens: int = 1) -> Hessian:
        """A Hessian given as a whole.

        Args:
            sum: ``[k, k]``, float32 or float64, symmetric to 1e-6 relative: the sum over tokens of x x^T.
            tokens: >= 1; with 1, `sum` is H itself.
        """
        matrix = _arrays.matrix("sum", sum, ("float64", "float32"))
        k = matrix.shape[1]
        if matrix.shape != (k, k) or k == 0:
            raise ValueError(
                f"sum: got shape {_arrays.shape_text(matrix.shape)}, expected a square [k, k], k >= 1"
            )
        if matrix.dtype != "float64":
            matrix = _arrays.matrix("sum", _arrays.cast(matrix.value, "float64"), ("float64",))
        hessian = cls.__new__(cls)
        hessian._core = _core.Hessian.from_sum(matrix.core, _checks.integer("tokens", tokens, 1))
        diagonal = hessian.diagonal()
        if diagonal.min() < 0:
            row = int(diagonal.argmin())
            raise ValueError(
                f"sum: got {diagonal[row] * tokens} at row {row}, column {row}, expected a diagonal >= 0"
            )
        return hessian

    def add(self, x: Any, threads: int = 0) -> None:
        """Adds inputs ``x`` ``[..., k]``, float32, float16 or bfloat16, on the CPU.

        Raises ValueError for a wrong width and for NaN or infinite values; nothing is added then.
        """
        self._core.add(_arrays.tokens("x", x, self.k).core, _checks.thread_count(threads))

    @property
    def k(self) -> int:
        """in_features."""
        return self._core.k

    @property
    def tokens(self) -> int:
        """The number of inputs added."""
        return self._core.tokens

    def sum(self) -> np.ndarray:
        """The sum over tokens of x x^T, float64 ``[k, k]``, a copy; divide by ``tokens`` for H."""
        return self._core.sum()

    def diagonal(self) -> np.ndarray:
        """diag(H), float64 ``[k]``."""
        return self._core.diagonal()

    def __repr__(self) -> str:
        return f"Hessian(k={self.k}, tokens={self.tokens})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.k, self.tokens, self.sum())


def _rebuild(k: int, tokens: int, sum: np.ndarray) -> Hessian:
    return Hessian.from_sum(sum, tokens) if tokens > 0 else Hessian(k)


def as_hessian(argument: str, value: Any) -> Hessian | None:
    """None, a Hessian, or an array ``[k, k]`` that is H itself."""
    if value is None or isinstance(value, Hessian):
        return value
    try:
        return Hessian.from_sum(value)
    except (TypeError, ValueError) as error:
        message = str(error)
        if message.startswith("sum:"):
            message = argument + message[3:]
        raise type(error)(message) from None


def proxy_loss(w: Any, decoded: Any, hessian: Hessian | Any, threads: int = 0) -> float:
    """tr(E H E^T) for E = W - W': the mean squared output error per token, summed over out_features.

    Args:
        w: ``[n, k]``, float32, float16 or bfloat16.
        decoded: a ``PackedTensor`` or a decoded matrix, of the shape of `w`.
        hessian: a ``Hessian`` of k inputs with at least one token, or an array ``[k, k]`` that is H.
    """
    from quantloom.tensors import PackedTensor

    matrix = _arrays.matrix("w", w)
    if isinstance(decoded, PackedTensor):
        if decoded.shape != matrix.shape:
            got, expected = _arrays.shape_text(decoded.shape), _arrays.shape_text(matrix.shape)
            raise ValueError(f"decoded: got a packed tensor {got}, expected {expected}, as w")
        decoded = decoded.to("cpu").dequantize()
    other = _arrays.matrix("decoded", decoded, shape=matrix.shape)
    if other.dtype != "float32":
        other = _arrays.matrix("decoded", _arrays.cast(other.value, "float32"))
    gathered = as_hessian("hessian", hessian)
    if gathered is None:
        raise TypeError("hessian: got None, expected a Hessian or an array [k, k]")
    if gathered.k != matrix.shape[1]:
        raise ValueError(f"hessian: got {gathered.k} inputs, expected {matrix.shape[1]}, as w has columns")
    return _core.proxy_loss(matrix.core, other.core, gathered._core, _checks.thread_count(threads))
