"""Activations rounded where they are made: after RMSNorm, LayerNorm or SiLU(gate) * up.

What is normalized (or gated) is computed in float32 and rounded once to the dtype of x, then to the format:
the same as ``quantize_activations`` and ``round_activations`` of the result. On a CUDA device one kernel does
both for formats with a scale for each token (or a static one, for values), without writing what lies between.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from quantloom import _arrays, _checks, _core
from quantloom.activations import ActivationFormat, QuantizedActivations, parse_activations

__all__ = [
    "quantize_layer_norm",
    "quantize_rms_norm",
    "quantize_silu_mul",
    "round_layer_norm",
    "round_rms_norm",
    "round_silu_mul",
]

_KINDS = {"rms_norm": 0, "layer_norm": 1, "silu_mul": 2}


class _Call:
    """Checked arguments of one call, x as tokens ``[m, k]``."""

    def __init__(
        self,
        kind: str,
        x: Any,
        format: ActivationFormat | str,
        *,
        weight: Any = None,
        bias: Any = None,
        up: Any = None,
        eps: float = 0.0,
        add_one: bool = False,
        threads: int = 0,
    ) -> None:
        name = "gate" if kind == "silu_mul" else "x"
        self.on_cuda = _arrays.is_torch(x) and x.is_cuda
        self.shape = tuple(_arrays.describe(name, x).shape)
        if not self.shape:
            raise ValueError(f"{name}: got shape [], expected [..., k]")
        k = self.shape[-1]
        self.kind = _KINDS[kind]
        self.x = _arrays.tokens(name, x, k, cpu=not self.on_cuda)
        self.format = parse_activations(format)
        self.eps = _checks.real("eps", eps, "a number, 0 or more")
        self.add_one = _checks.boolean("add_one", add_one)
        self.threads = _checks.thread_count(threads)
        self.weight = self._vector("weight", weight, k)
        self.bias = self._vector("bias", bias, k)
        self.up = None
        if kind == "silu_mul":
            shape = tuple(_arrays.describe("up", up).shape)
            if shape != self.shape:
                got, expected = _arrays.shape_text(shape), _arrays.shape_text(self.shape)
                raise ValueError(f"up: got shape {got}, expected {expected}, as the gate")
            self.up = _arrays.tokens("up", up, k, cpu=not self.on_cuda)
            if (self.up.dtype, self.up.kind, self.up.device) != (self.x.dtype, self.x.kind, self.x.device):
                got = f"{self.up.dtype} of {self.up.kind} on {self.up.device}"
                expected = f"{self.x.dtype} of {self.x.kind} on {self.x.device}"
                raise TypeError(f"up: got {got}, expected {expected}, as the gate")

    def _vector(self, name: str, value: Any, k: int) -> _arrays.Array | None:
        if value is None:
            return None
        vector = _arrays.describe(name, value)
        if vector.shape != (k,):
            raise ValueError(f"{name}: got shape {_arrays.shape_text(vector.shape)}, expected [{k}]")
        if vector.dtype not in ("float32", self.x.dtype):
            raise TypeError(f"{name}: got {vector.dtype}, expected float32 or {self.x.dtype}, as x")
        if vector.device != self.x.device:
            raise TypeError(f"{name}: got one on {vector.device}, expected one on {self.x.device}, as x")
        if self.on_cuda:
            return _arrays.plane(name, value)
        return _arrays.plane(name, _arrays.cast(vector.value, "float32"))

    def produced(self) -> Any:
        """On the CPU: float32 ``[m, k]`` of values that x's dtype holds."""
        out = _arrays.empty(self.x.kind, self.x.shape, "float32")
        _core.produce_activations(
            self.x.core,
            self.kind,
            None if self.weight is None else self.weight.core,
            None if self.bias is None else self.bias.core,
            self.eps,
            self.add_one,
            None if self.up is None else self.up.core,
            _arrays.describe("out", out).core,
            self.threads,
        )
        return out

    def quantized(self) -> QuantizedActivations:
        if self.on_cuda:
            from quantloom import _cuda_activations

            planes = _cuda_activations.quantize_produced(self)
        else:
            values = _arrays.describe("x", self.produced())
            found = _core.quantize_activations(values.core, self.format.to_json(), self.threads)
            planes = {
                name: _arrays.to_kind(value, dtype, self.x.kind) for name, (dtype, value) in found.items()
            }
        return QuantizedActivations(self.format, self.shape, self.x.dtype, MappingProxyType(planes))

    def rounded(self) -> Any:
        if self.on_cuda:
            from quantloom import _cuda_activations

            return _cuda_activations.round_produced(self).reshape(self.shape)
        values = self.produced()
        core = _arrays.describe("x", values).core
        _core.round_activations(core, core, self.format.to_json(), self.threads)
        return _arrays.cast(values, self.x.dtype).reshape(self.shape)


def quantize_rms_norm(
    x: Any,
    weight: Any,
    format: ActivationFormat | str,
    eps: float = 1e-6,
    add_one: bool = False,
    threads: int = 0,
) -> QuantizedActivations:
    """``x / sqrt(mean(x**2) + eps) * weight`` as integers; `weight` float32 or of x's dtype, or None.

    ``add_one=True``: with ``weight + 1`` (Gemma). Raises as ``quantize_activations``.
    """
    return _Call("rms_norm", x, format, weight=weight, eps=eps, add_one=add_one, threads=threads).quantized()


def round_rms_norm(
    x: Any,
    weight: Any,
    format: ActivationFormat | str,
    eps: float = 1e-6,
    add_one: bool = False,
    threads: int = 0,
) -> Any:
    """The values of ``quantize_rms_norm``, of the kind and dtype of `x`."""
    return _Call("rms_norm", x, format, weight=weight, eps=eps, add_one=add_one, threads=threads).rounded()


def quantize_layer_norm(
    x: Any,
    weight: Any,
    bias: Any,
    format: ActivationFormat | str,
    eps: float = 1e-5,
    threads: int = 0,
) -> QuantizedActivations:
    """LayerNorm of `x` as integers; `weight` and `bias` float32 or of x's dtype, or None.

    Raises as ``quantize_activations``.
    """
    return _Call("layer_norm", x, format, weight=weight, bias=bias, eps=eps, threads=threads).quantized()


def round_layer_norm(
    x: Any,
    weight: Any,
    bias: Any,
    format: ActivationFormat | str,
    eps: float = 1e-5,
    threads: int = 0,
) -> Any:
    """The values of ``quantize_layer_norm``, of the kind and dtype of `x`."""
    return _Call("layer_norm", x, format, weight=weight, bias=bias, eps=eps, threads=threads).rounded()


def quantize_silu_mul(
    gate: Any, up: Any, format: ActivationFormat | str, threads: int = 0
) -> QuantizedActivations:
    """``silu(gate) * up`` as integers, both ``[..., k]`` of one dtype. Raises as ``quantize_activations``."""
    return _Call("silu_mul", gate, format, up=up, threads=threads).quantized()


def round_silu_mul(gate: Any, up: Any, format: ActivationFormat | str, threads: int = 0) -> Any:
    """The values of ``quantize_silu_mul``, of the kind and dtype of `gate`."""
    return _Call("silu_mul", gate, format, up=up, threads=threads).rounded()
