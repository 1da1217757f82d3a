"""Operators for PyTorch, with shape functions for tracing and a gradient with respect to activations.

Of canonical planes, the arrays of a ``PackedTensor``:

``quantloom::matmul(x, planes, names, format, n, k, activations)``
    ``x @ W.T``. The first call prepares W and keeps the result until the planes change or go.
``quantloom::dequantize(planes, names, format, n, k, dtype)``
    W as a matrix ``[n, k]``.

Of prepared planes on a CUDA device, those of a ``PreparedTensor``:

``quantloom::linear(x, planes, bias, names, format, n, k)``
    ``x @ W.T + bias``. Allocates its result and its workspace, and does nothing else but launch kernels on
    the current stream: it can be captured in a CUDA graph.
``quantloom::linear_integers(x, planes, bias, names, format, n, k, activations)``
    The same with rounded activations, of planes in integer order, see ``quantloom.prepare``: a product of
    integers for float16 and bfloat16 x, where their formats allow; else, and for float32 x, of rounded x and
    decoded W. Gradients are those of ``linear``, as if nothing was rounded. `activations` is a short form,
    with the outlier columns that W was prepared with.
``quantloom::dequantize_prepared(planes, names, format, n, k, dtype)``
    W as a matrix ``[n, k]``, of planes in either order.

Of activations alone:

``quantloom::round_activations(x, format)``
    ``quantloom.round_activations`` by a short form; gradients pass unchanged.
``quantloom::round_rms_norm(x, weight, eps, add_one, format)``, ``round_layer_norm(x, weight, bias, eps,
format)``, ``round_silu_mul(gate, up, format)``
    The functions of those names; for inference, without gradients.
``quantloom::hadamard(x, block, signs, scale, channels, inverse)``
    The Hadamard transform of ``quantloom.hadamard``: `block` 0 for whole rows, `signs` as bits, a number and
    optional float32 ``[n]`` that multiply the result.

``names`` are the names of the planes joined by commas, ``format`` is the format's JSON.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from quantloom import _arrays, _cuda, _cuda_integers, activations, kernels, producers, transforms
from quantloom.formats import format_from_json
from quantloom.tensors import PackedTensor

__all__ = ["prepared_cache"]


def _packed(planes: list[torch.Tensor], names: str, format: str, n: int, k: int) -> PackedTensor:
    return PackedTensor(format_from_json(format), (n, k), dict(zip(names.split(","), planes, strict=True)))


def _version(tensor: torch.Tensor) -> int:
    # Tensors made under torch.inference_mode have no counter of changes.
    return -1 if tensor.is_inference() else tensor._version


class _PreparedCache:
    """Prepared tensors of canonical planes, each dropped with its first plane or when a plane changes."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[torch.Tensor], tuple[Any, ...], Any]] = {}
        self._lock = threading.RLock()  # a weak reference may end while the lock is held

    def get(
        self,
        planes: list[torch.Tensor],
        names: str,
        format: str,
        n: int,
        k: int,
        operand: str | activations.ActivationFormat = "exact",
    ) -> kernels.PreparedTensor:
        key = id(planes[0])
        operand = operand if planes[0].is_cuda else "exact"  # one order serves all on the CPU
        signature = (
            names,
            format,
            n,
            k,
            str(operand),
            *((plane.data_ptr(), _version(plane)) for plane in planes),
        )
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry[0]() is planes[0] and entry[1] == signature:
                return entry[2]
            packed = _packed(planes, names, format, n, k)
            prepared = kernels.prepare_now(packed, torch.get_num_threads(), operand)
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


prepared_cache = _PreparedCache()


def _check_inner(x: torch.Tensor, k: int) -> None:
    torch._check(x.shape[-1] == k, lambda: f"x: got shape {tuple(x.shape)}, expected [..., {k}]")


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
    operand = kernels.operand_format(activations)
    q = prepared_cache.get(planes, names, format, n, k, operand)
    return kernels.matmul(x.contiguous(), q, operand, torch.get_num_threads())


@_matmul.register_fake
def _(x, planes, names, format, n, k, activations):
    _check_inner(x, k)
    return x.new_empty((*x.shape[:-1], n))


def _remember(ctx, inputs, output):
    _, planes, *ctx.description, _ = inputs
    ctx.save_for_backward(*planes)


def _backward(ctx, gradient):
    weight = torch.ops.quantloom.dequantize(list(ctx.saved_tensors), *ctx.description, gradient.dtype)
    return gradient @ weight, [None] * len(ctx.saved_tensors), None, None, None, None, None


_matmul.register_autograd(_backward, setup_context=_remember)


# Registered without the wrapper of torch.library.custom_op, which takes longer than a small product.
_library = torch.library.Library("quantloom", "FRAGMENT")
_library.define(
    "linear(Tensor x, Tensor[] planes, Tensor? bias, str names, str format, int n, int k) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_integers(Tensor x, Tensor[] planes, Tensor? bias, str names, str format, int n, int k,"
    " str activations) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "dequantize_prepared(Tensor[] planes, str names, str format, int n, int k, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear_cuda(x, planes, bias, names, format, n, k):
    prepared = _cuda.cached_descriptor(planes, names, format, n, k)
    return _cuda.product(x, prepared, n, k, planes[0].device, bias)


def _linear_fake(x, planes, bias, names, format, n, k):
    _check_inner(x, k)
    return x.new_empty((*x.shape[:-1], n))


def _linear_integers_cuda(x, planes, bias, names, format, n, k, activations):
    operand = kernels.operand_format(activations)
    columns = _cuda_integers.columns_of(operand)
    prepared = _cuda_integers.cached_descriptor(planes, names, format, n, k, columns)
    named = dict(zip(names.split(","), planes, strict=True))
    return _cuda_integers.multiply(x, named, prepared, format, n, k, columns, operand, bias)


def _linear_integers_fake(x, planes, bias, names, format, n, k, activations):
    return _linear_fake(x, planes, bias, names, format, n, k)


def _dequantize_prepared(planes, names, format, n, k, dtype):
    named = dict(zip(names.split(","), planes, strict=True))
    if "integers" in named:
        return _cuda_integers.decode(named, n, k, dtype, format)
    return kernels.PreparedTensor._from_planes(format, (n, k), named).dequantize(dtype)


def _dequantize_prepared_fake(planes, names, format, n, k, dtype):
    return planes[0].new_empty((n, k), dtype=dtype)


_library.impl("linear", _linear_cuda, "CUDA")
_library.impl("linear_integers", _linear_integers_cuda, "CUDA")
_library.impl("dequantize_prepared", _dequantize_prepared, "CUDA")
torch.library.register_fake("quantloom::linear", _linear_fake, lib=_library)
torch.library.register_fake("quantloom::linear_integers", _linear_integers_fake, lib=_library)
torch.library.register_fake("quantloom::dequantize_prepared", _dequantize_prepared_fake, lib=_library)


def _linear_remember(ctx, inputs, output):
    _, planes, bias, *ctx.description = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*planes)


def _linear_backward(ctx, gradient):
    planes = list(ctx.saved_tensors)
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ torch.ops.quantloom.dequantize_prepared(planes, *ctx.description, gradient.dtype)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        rows = (
            gradient.reshape(-1, gradient.shape[-1])
            if gradient.numel()
            else gradient.new_zeros((1, gradient.shape[-1]))
        )
        to_bias = rows.sum(0, dtype=torch.float32).to(gradient.dtype)
    return to_x, [None] * len(planes), to_bias, None, None, None, None


torch.library.register_autograd(
    "quantloom::linear", _linear_backward, setup_context=_linear_remember, lib=_library
)


def _linear_integers_remember(ctx, inputs, output):
    _linear_remember(ctx, inputs[:-1], output)


def _linear_integers_backward(ctx, gradient):
    return *_linear_backward(ctx, gradient), None


torch.library.register_autograd(
    "quantloom::linear_integers",
    _linear_integers_backward,
    setup_context=_linear_integers_remember,
    lib=_library,
)


def _check_vector(name, vector, size, dtype, x):
    if vector is None:
        return
    if tuple(vector.shape) != (size,) or vector.dtype != dtype or vector.device != x.device:
        got = f"{vector.dtype} {tuple(vector.shape)} on {vector.device}"
        raise ValueError(f"{name}: got {got}, expected {dtype} ({size},) on {x.device}")


@torch.library.custom_op(
    "quantloom::round_activations", mutates_args=(), schema="(Tensor x, str format) -> Tensor"
)
def _round_activations(x, format):
    return activations.round_activations(x.contiguous(), format, torch.get_num_threads())


@_round_activations.register_fake
def _(x, format):
    return x.new_empty(x.shape)


_round_activations.register_autograd(lambda ctx, gradient: (gradient, None))


@torch.library.custom_op(
    "quantloom::round_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, float eps, bool add_one, str format) -> Tensor",
)
def _round_rms_norm(x, weight, eps, add_one, format):
    return producers.round_rms_norm(x.contiguous(), weight, format, eps, add_one, torch.get_num_threads())


@_round_rms_norm.register_fake
def _(x, weight, eps, add_one, format):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "quantloom::round_layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, str format) -> Tensor",
)
def _round_layer_norm(x, weight, bias, eps, format):
    return producers.round_layer_norm(x.contiguous(), weight, bias, format, eps, torch.get_num_threads())


@_round_layer_norm.register_fake
def _(x, weight, bias, eps, format):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "quantloom::round_silu_mul", mutates_args=(), schema="(Tensor gate, Tensor up, str format) -> Tensor"
)
def _round_silu_mul(gate, up, format):
    return producers.round_silu_mul(gate, up, format, torch.get_num_threads())


@_round_silu_mul.register_fake
def _(gate, up, format):
    return gate.new_empty(gate.shape)


@torch.library.custom_op(
    "quantloom::hadamard",
    mutates_args=(),
    schema="(Tensor x, int block, Tensor? signs, float scale, Tensor? channels, bool inverse) -> Tensor",
)
def _hadamard(x, block, signs, scale, channels, inverse):
    n = x.shape[-1]
    _check_vector("signs", signs, (n + 7) // 8, torch.uint8, x)
    _check_vector("channels", channels, n, torch.float32, x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
        rows = rows.contiguous()
    target = out.view(rows.shape)
    if x.is_cuda:
        transforms.run_cuda(rows, target, block, inverse, signs, scale, channels)
    else:
        transforms.run(
            _arrays.describe("x", rows),
            _arrays.describe("out", target),
            block,
            inverse,
            signs,
            scale,
            channels,
            torch.get_num_threads(),
        )
    return out


@_hadamard.register_fake
def _(x, block, signs, scale, channels, inverse):
    return x.new_empty(x.shape)


def _hadamard_remember(ctx, inputs, output):
    _, ctx.block, signs, ctx.scale, channels, ctx.inverse = inputs
    ctx.has_signs, ctx.has_channels = signs is not None, channels is not None
    ctx.save_for_backward(*(vector for vector in (signs, channels) if vector is not None))


def _hadamard_backward(ctx, gradient):
    saved = list(ctx.saved_tensors)
    signs = saved.pop(0) if ctx.has_signs else None
    dtype = gradient.dtype
    if ctx.has_channels:
        gradient = gradient.float() * saved.pop(0)
    to_x = torch.ops.quantloom.hadamard(
        gradient.contiguous(), ctx.block, signs, ctx.scale, None, not ctx.inverse
    )
    return to_x.to(dtype), None, None, None, None, None


_hadamard.register_autograd(_hadamard_backward, setup_context=_hadamard_remember)
