"""Calibration: what a layer's inputs say about which errors matter."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core, _devices

__all__ = ["Hessian", "proxy_loss"]


class Hessian:
    """The Hessian of a linear layer's squared output error, ``H = X^T X / tokens``, gathered in a stream.

    Products are taken in float32 over chunks of a fixed number of tokens and summed in float64, so that
    the result depends on the sequence of tokens in the calls of ``add`` only, not on threads. Takes
    ``8 * k * k`` bytes on its device. Calls from several threads of Python wait for each other.

    On a CUDA device the products are cuBLAS's, queued on torch's current stream; they differ from the CPU's
    in the order of their sums, about 1e-6 relative.

    Args:
        k: in_features, >= 1.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or a ``torch.device``: where the inputs are.
    """

    __slots__ = ("_core", "_device")

    def __init__(self, k: int, device: Any = "cpu") -> None:
        k = _checks.integer("k", k, 1)
        self._device = _devices.device_name("device", device)
        if self._device == "cpu":
            self._core = _core.Hessian(k)
        else:
            with _devices.current(self._device):
                self._core = _core.CudaHessian(k)

    @classmethod
    def _of(cls, core: Any, device: str) -> Hessian:
        hessian = cls.__new__(cls)
        hessian._core, hessian._device = core, device
        return hessian

    @classmethod
    def from_sum(cls, sum: Any, tokens: int = 1) -> Hessian:
        """A Hessian given as a whole.

        Args:
            sum: ``[k, k]``, float32 or float64, symmetric to 1e-6 relative: the sum over tokens of x x^T.
                The Hessian is on its device.
            tokens: >= 1; with 1, `sum` is H itself.
        """
        matrix = _arrays.matrix("sum", sum, ("float64", "float32"), cpu=False)
        if matrix.device != "cpu":
            return cls.from_sum(matrix.value.cpu(), tokens).to(matrix.device)
        k = matrix.shape[1]
        if matrix.shape != (k, k) or k == 0:
            raise ValueError(
                f"sum: got shape {_arrays.shape_text(matrix.shape)}, expected a square [k, k], k >= 1"
            )
        if matrix.dtype != "float64":
            matrix = _arrays.matrix("sum", _arrays.cast(matrix.value, "float64"), ("float64",))
        hessian = cls._of(_core.Hessian.from_sum(matrix.core, _checks.integer("tokens", tokens, 1)), "cpu")
        diagonal = hessian.diagonal()
        if diagonal.min() < 0:
            row = int(diagonal.argmin())
            raise ValueError(
                f"sum: got {diagonal[row] * tokens} at row {row}, column {row}, expected a diagonal >= 0"
            )
        return hessian

    def add(self, x: Any, threads: int = 0) -> None:
        """Adds inputs ``x`` ``[..., k]``, float32, float16 or bfloat16, on the Hessian's device.

        Raises TypeError for another device, ValueError for a wrong width and for NaN or infinite values;
        nothing is added then. On a CUDA device such values are found without waiting for them: the next use
        of the Hessian raises the ValueError, which names the value's row among all tokens added.
        """
        threads = _checks.thread_count(threads)
        on_cpu = self._device == "cpu"
        array = _arrays.tokens("x", x, self.k, cpu=on_cpu)
        if on_cpu:
            self._core.add(array.core, threads)
            return
        if array.device != self._device:
            raise TypeError(
                f"x: got an array on {array.device}, expected one on {self._device}, as the Hessian"
            )
        with _devices.current(self._device) as stream:
            self._core.add(array.core, stream)

    def to(self, device: Any) -> Hessian:
        """The Hessian on another device; the same object if it is there already."""
        target = _devices.device_name("device", device)
        if target == self._device:
            return self
        if self._device != "cpu":
            with _devices.current(self._device) as stream:
                return Hessian._of(self._core.to_cpu(stream), "cpu").to(target)
        with _devices.current(target):
            return Hessian._of(_core.CudaHessian.from_cpu(self._core), target)

    @property
    def device(self) -> str:
        """``"cpu"``, ``"cuda:0"``, ..."""
        return self._device

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
        return self._read("sum")

    def diagonal(self) -> np.ndarray:
        """diag(H), float64 ``[k]``."""
        return self._read("diagonal")

    def _read(self, name: str) -> np.ndarray:
        if self._device == "cpu":
            return getattr(self._core, name)()
        with _devices.current(self._device) as stream:
            return getattr(self._core, name)(stream)

    def __repr__(self) -> str:
        where = "" if self._device == "cpu" else f", {self._device}"
        return f"Hessian(k={self.k}, tokens={self.tokens}{where})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.k, self.tokens, self.sum(), self._device)


def _rebuild(k: int, tokens: int, sum: np.ndarray, device: str) -> Hessian:
    return Hessian.from_sum(sum, tokens).to(device) if tokens > 0 else Hessian(k, device)


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


def require_same_device(argument: str, hessian: Hessian, device: str) -> None:
    if hessian.device != device:
        raise TypeError(
            f"{argument}: got a Hessian on {hessian.device}, expected one on {device}, as w"
            f" (pass hessian.to({device!r}))"
        )


def proxy_loss(
    w: Any, decoded: Any, hessian: Hessian | Any, threads: int = 0, output_hessian: Hessian | Any = None
) -> float:
    """tr(E H E^T) for E = W - W': the mean squared output error per token, summed over out_features.

    Args:
        w: ``[n, k]``, float32, float16 or bfloat16.
        decoded: a ``PackedTensor`` or a decoded matrix, of the shape of `w`.
        hessian: a ``Hessian`` of k inputs with at least one token, or an array ``[k, k]`` that is H.
        output_hessian: optional, one of n outputs: the loss is then ``tr(H_out E H E^T)``.
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
    require_same_device("hessian", gathered, "cpu")
    outputs = as_hessian("output_hessian", output_hessian)
    if outputs is not None:
        if outputs.k != matrix.shape[0]:
            raise ValueError(
                f"output_hessian: got {outputs.k} outputs, expected {matrix.shape[0]}, as w has rows"
            )
        require_same_device("output_hessian", outputs, "cpu")
    return _core.proxy_loss(
        matrix.core, other.core, gathered._core, outputs and outputs._core, _checks.thread_count(threads)
    )
