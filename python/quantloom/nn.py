"""Modules for PyTorch, and the operators behind them.

Importing this module imports torch and registers two operators, which have shape functions for tracing and
a gradient with respect to activations, so that modules work under ``torch.compile`` and ``torch.export``:

``quantloom::matmul(x, planes, names, format, n, k, activations)``
    ``x @ W.T``; on the CPU straight from the packed codes, on a CUDA device it decodes, then multiplies with
    cuBLAS.
``quantloom::dequantize(planes, names, format, n, k, dtype)``
    W as a matrix ``[n, k]``.

``planes`` are the arrays of a ``PackedTensor``, ``names`` their names joined by commas, ``format`` its JSON.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from quantloom import _arrays, _checks, kernels
from quantloom.formats import Format, format_from_json
from quantloom.rounding import Rounding, quantize
from quantloom.tensors import PackedTensor

__all__ = ["QuantLinear"]


def _packed(planes: list[torch.Tensor], names: str, format: str, n: int, k: int) -> PackedTensor:
    return PackedTensor(format_from_json(format), (n, k), dict(zip(names.split(","), planes, strict=True)))


def _version(tensor: torch.Tensor) -> int:
    # Tensors made under torch.inference_mode have no counter of changes.
    return -1 if tensor.is_inference() else tensor._version


class _PreparedCache:
    """Prepared tensors of planes on the CPU, each dropped with its first plane or when a plane changes."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[torch.Tensor], tuple[Any, ...], Any]] = {}
        self._lock = threading.RLock()  # a weak reference may end while the lock is held

    def get(
        self, planes: list[torch.Tensor], names: str, format: str, n: int, k: int
    ) -> kernels.PreparedTensor:
        key = id(planes[0])
        signature = (names, format, n, k, *((plane.data_ptr(), _version(plane)) for plane in planes))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry[0]() is planes[0] and entry[1] == signature:
                return entry[2]
            prepared = kernels.prepare(_packed(planes, names, format, n, k), torch.get_num_threads())
            self._entries[key] = (weakref.ref(planes[0], self._dropper(key)), signature, prepared)
            return prepared

    def _dropper(self, key: int) -> Callable[[Any], None]:
        def drop(reference: Any) -> None:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None and entry[0] is reference:
                    del self._entries[key]

        return drop

    def __len__(self) -> int:
        return len(self._entries)


_prepared_cache = _PreparedCache()


@torch.library.custom_op(
    "quantloom::dequantize",
    mutates_args=(),
    schema="(Tensor[] planes, str names, str format, int n, int k, ScalarType dtype) -> Tensor",
)
def _dequantize(planes, names, format, n, k, dtype):
    return _packed(planes, names, format, n, k).dequantize(dtype, torch.get_num_threads())


@_dequantize.register_fake
def _(planes, names, format, n, k, dtype):
    return planes[0].new_empty((n, k), dtype=dtype)


@torch.library.custom_op(
    "quantloom::matmul",
    mutates_args=(),
    schema="(Tensor x, Tensor[] planes, str names, str format, int n, int k, str activations) -> Tensor",
)
def _matmul(x, planes, names, format, n, k, activations):
    x = x.contiguous()
    if planes[0].device.type == "cpu":
        q = _prepared_cache.get(planes, names, format, n, k)
    else:
        q = _packed(planes, names, format, n, k)
    return kernels.matmul(x, q, activations, torch.get_num_threads())


@_matmul.register_fake
def _(x, planes, names, format, n, k, activations):
    torch._check(x.shape[-1] == k, lambda: f"x: got shape {tuple(x.shape)}, expected [..., {k}]")
    return x.new_empty((*x.shape[:-1], n))


def _remember(ctx, inputs, output):
    _, planes, *ctx.description, _ = inputs
    ctx.save_for_backward(*planes)


def _backward(ctx, gradient):
    weight = torch.ops.quantloom.dequantize(list(ctx.saved_tensors), *ctx.description, gradient.dtype)
    return gradient @ weight, [None] * len(ctx.saved_tensors), None, None, None, None, None


_matmul.register_autograd(_backward, setup_context=_remember)


class QuantLinear(torch.nn.Module):
    """A linear layer, ``y = x W^T + bias``, that keeps W packed.

    Takes the place of ``torch.nn.Linear`` in inference and as a frozen layer in training: gradients flow to
    `x` and to the bias, not to W. The planes are buffers named after the planes of the format (``codes``,
    ``scales``, ...); they move between devices with the module and never change dtype: ``.half()`` or
    ``.to(torch.bfloat16)`` act on the bias alone. ``state_dict`` holds the planes, the bias and a
    description of the format; loading the state of another format, shape or dtype is refused.

    On the CPU the first call brings W into the order that the kernels read, which takes about as much memory
    again and is kept until the planes change or go.

    Args:
        packed: W ``[out_features, in_features]``, a ``PackedTensor``; NumPy planes are copied.
        bias: None or ``[out_features]``, floating point; a ``torch.nn.Parameter`` is used as it is.
        activations: ``"exact"`` or ``"int8"``, see ``quantloom.matmul``.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self, packed: PackedTensor, bias: torch.Tensor | None = None, activations: str = "exact"
    ) -> None:
        super().__init__()
        if not isinstance(packed, PackedTensor):
            raise TypeError(f"packed: got {_checks.type_name(packed)}, expected a PackedTensor")
        self.activations = _checks.choice("activations", activations, kernels.ACTIVATIONS)
        packed = packed if packed.kind == "torch" else packed.to("torch")
        self.out_features, self.in_features = packed.shape
        self._format = packed.format
        self._names = tuple(packed.planes)
        for name, plane in packed.planes.items():
            self.register_buffer(name, plane)
        self.register_parameter("bias", self._check_bias(bias, packed.device))

    def _check_bias(self, bias: Any, device: str) -> torch.nn.Parameter | None:
        if bias is None:
            return None
        if not isinstance(bias, torch.Tensor):
            raise TypeError(f"bias: got {_checks.type_name(bias)}, expected None or a torch tensor")
        if tuple(bias.shape) != (self.out_features,):
            got = _arrays.shape_text(bias.shape)
            raise ValueError(f"bias: got shape {got}, expected [{self.out_features}]")
        if not bias.is_floating_point():
            raise TypeError(f"bias: got {bias.dtype}, expected a floating-point dtype")
        if str(bias.device) != device:
            raise TypeError(f"bias: got a tensor on {bias.device}, expected one on {device}, as the planes")
        return bias if isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        format: Format | str,
        rounding: Rounding | None = None,
        activations: str = "exact",
    ) -> QuantLinear:
        """Quantizes the weights of a ``torch.nn.Linear`` (on the CPU) and takes its bias over.

        Args:
            format, rounding: see ``quantloom.quantize``.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear: got {_checks.type_name(linear)}, expected a torch.nn.Linear")
        weight = linear.weight.detach()
        packed = quantize(weight.cpu(), format, rounding, threads=torch.get_num_threads())
        return cls(packed.to(weight.device), linear.bias, activations)

    @property
    def packed(self) -> PackedTensor:
        """W as a ``PackedTensor`` over the module's buffers."""
        return PackedTensor(
            self._format, (self.out_features, self.in_features), dict(zip(self._names, self._planes()))
        )

    @property
    def format(self) -> Format:
        """What is stored, and how it decodes."""
        return self._format

    def _planes(self) -> list[torch.Tensor]:
        return [self._buffers[name] for name in self._names]

    def _description(self) -> tuple[str, str, int, int]:
        return ",".join(self._names), self._format.to_json(), self.out_features, self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in_features]``, float32, float16 or bfloat16; returns ``[..., out_features]`` in its
        dtype. Raises TypeError or ValueError for other dtypes, shapes and devices."""
        y = torch.ops.quantloom.matmul(x, self._planes(), *self._description(), self.activations)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W as a matrix ``[out_features, in_features]``."""
        return torch.ops.quantloom.dequantize(self._planes(), *self._description(), dtype)

    def extra_repr(self) -> str:
        bits = sum(8 * plane.nbytes for plane in self._planes())
        count = self.out_features * self.in_features
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" format={self._format.spec}, {bits / count if count else 0:.3f} bits/weight"
        )
        return text if self.activations == "exact" else f"{text}, activations={self.activations}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # Module.half() and .to(dtype) cast every floating-point buffer; the codes were chosen against the
        # scales as they are stored.
        planes = self._planes()

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result.dtype != tensor.dtype and any(tensor is plane for plane in planes):
                return tensor.to(result.device)
            return result

        return super()._apply(keep_dtype, recurse)

    def get_extra_state(self) -> torch.Tensor:
        # A tensor of text, because many writers of state dicts take tensors only.
        text = f'{{"format":{self._format.to_json()},"shape":[{self.out_features},{self.in_features}]}}'
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        own = self.get_extra_state()
        if not isinstance(state, torch.Tensor) or not torch.equal(state.cpu(), own):
            got = bytes(state.cpu().tolist()).decode() if isinstance(state, torch.Tensor) else repr(state)
            raise ValueError(f"state: got a description {got}, expected {bytes(own.tolist()).decode()}")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # The description is checked before any plane is copied; a copy would cast silently.
        errors = []
        for name in self._names:
            given, own = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(given, torch.Tensor) and given.dtype != own.dtype:
                errors.append(f"{prefix}{name}: got {given.dtype}, expected {own.dtype}")
        description = state_dict.get(prefix + "_extra_state")
        if description is not None:
            try:
                self.set_extra_state(description)
            except ValueError as error:
                errors.append(f"{prefix}{error}")
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
