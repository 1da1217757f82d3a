"""Modules for PyTorch.

Importing this module imports torch and registers the operators behind the modules, ``quantloom::linear``,
``linear_integers``, ``matmul``, ``dequantize`` and ``dequantize_prepared``, so that modules work under
``torch.compile``, ``torch.export`` and in CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

import quantloom._operators  # noqa: F401 - registers the operators
from quantloom import _arrays, _checks, _core, _cuda, _cuda_integers, kernels
from quantloom.activations import ActivationFormat, parse_activations
from quantloom.channel_scales import ChannelScales
from quantloom.formats import Format, parse_format
from quantloom.quantizing import quantize
from quantloom.rounding import Rounding
from quantloom.tensors import PackedTensor
from quantloom.transforms import Transform, parse_transform

__all__ = ["QuantLinear", "RoundedLinear"]

_PREFIX = "prepared_"
# What autocast casts; it leaves other dtypes, such as float64, alone.
_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def _keeps_prepared(device: torch.device) -> bool:
    """Whether modules on this device keep the planes in the order of its kernels only."""
    return device.type == "cuda"


def _known_scale(activations: str | ActivationFormat) -> str | ActivationFormat:
    if isinstance(activations, ActivationFormat) and not activations.calibrated:
        raise ValueError(f"activations: got {activations.spec}, expected one with its scale (with_range)")
    return activations


class RoundedLinear(torch.nn.Linear):
    """A linear layer whose inputs are rounded by ``quantloom.round_activations``: what a ``QuantLinear`` with
    an ``ActivationFormat`` computes, from decoded weights.

    Args:
        linear: its weight and bias are used as they are.
        activations: an ``ActivationFormat`` or its short form.
        transform: the basis in which inputs are rounded; None: their own.
    """

    def __init__(
        self,
        linear: torch.nn.Linear,
        activations: ActivationFormat | str,
        transform: Transform | str | None = None,
    ) -> None:
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear: got {_checks.type_name(linear)}, expected a torch.nn.Linear")
        activations = _known_scale(parse_activations(activations))
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.activations, self._operand = activations, activations.spec
        self.transform = parse_transform(transform)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in_features]``; returns ``[..., out_features]``."""
        transform = self.transform
        if transform is not None and transform.has_input:
            x = transform.rotate_input(x)
        x = torch.ops.quantloom.round_activations(x, self._operand)
        if transform is not None and transform.has_input:
            x = transform.rotate_input(x, inverse=True)
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activations={self.activations}"


class QuantLinear(torch.nn.Module):
    """A linear layer, ``y = x W^T + bias``, that keeps W packed.

    Takes the place of ``torch.nn.Linear`` in inference and as a frozen layer in training: gradients flow to
    `x` and to the bias, not to W. ``.half()`` or ``.to(torch.bfloat16)`` act on the bias alone: planes never
    change dtype. ``state_dict`` holds the canonical planes, the bias and a description of the format,
    whatever the device; loading the state of another format, shape or dtype is refused.

    On the CPU the planes are buffers named after the planes of the format (``codes``, ``scales``, ...). The
    first call brings W into the order that the kernels read, which takes about as much memory again and is
    kept until the planes change or go.

    On a CUDA device the module holds W once, in the order that the kernels read: moving it there prepares
    it, moving it away brings the same canonical bytes back, and ``packed`` and ``state_dict`` make a
    canonical copy when they are called. The buffers are then ``prepared_codes``, ``prepared_scales`` and so
    on. Calls queue kernels on torch's current stream and can be captured in CUDA graphs; ``load_state_dict``
    writes to the same memory, so that a captured graph sees the new weights.

    With an ``ActivationFormat`` there, W is held in integer order, 8 bits to a weight, if integers of both
    formats can be multiplied (``quantloom.matmul_is_integer(module.prepared, module.activations)`` tells);
    float32 inputs are then rounded, and multiplied with W decoded for the call. Otherwise inputs are rounded,
    and multiplied as exact ones. Another format given to ``activations`` brings W into the order for it, in
    new memory. Gradients pass the rounding unchanged.

    A tensor with a transform is multiplied in its basis: inputs are rotated before the product, outputs
    rotated back after it, in the dtype of `x`. The signs of the rotations are buffers outside of the state
    (``input_signs``, ``output_signs``), whose description holds their seed.

    Args:
        packed: W ``[out_features, in_features]``, a ``PackedTensor``; NumPy planes are copied.
        bias: None or ``[out_features]``, floating point; a ``torch.nn.Parameter`` is used as it is.
        activations: ``"exact"``, an ``ActivationFormat`` or its short form, or on the CPU ``"int8"``, see
            ``quantloom.matmul``. A format is part of the description in ``state_dict``.

    Raises TypeError or ValueError naming the argument, RuntimeError if no kernel of a CUDA device takes the
    format.
    """

    def __init__(
        self,
        packed: PackedTensor,
        bias: torch.Tensor | None = None,
        activations: str | ActivationFormat = "exact",
    ) -> None:
        super().__init__()
        if not isinstance(packed, PackedTensor):
            raise TypeError(f"packed: got {_checks.type_name(packed)}, expected a PackedTensor")
        self._is_prepared = False
        self._columns: tuple[int, ...] | None = None  # of outliers, for planes in integer order
        self.activations = activations
        packed = packed if packed.kind == "torch" else packed.to("torch")
        self.out_features, self.in_features = packed.shape
        self._format = packed.format
        self._transform = packed.transform
        self._names = tuple(packed.planes)  # of the canonical planes
        self._stored: tuple[str, ...] = ()  # names of the buffers
        bias = self._check_bias(bias, packed.device)
        self._store(packed.planes, prepared=False)
        self._settle()
        self.register_parameter("bias", bias)
        for name, signs in self._signs(self._planes()[0].device).items():
            self.register_buffer(name, signs, persistent=False)

    def _signs(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """The bits of the rotations' signs, or the factors of the inputs, by the names of their buffers."""
        transform, signs = self._transform, {"input_signs": None, "output_signs": None}
        if isinstance(transform, ChannelScales):
            return signs | {"input_factors": torch.from_numpy(1 / transform.scales).to(device)}
        if transform is not None and transform.has_input:
            signs["input_signs"] = transform.input_signs(self.in_features)
        if transform is not None and transform.has_output:
            signs["output_signs"] = transform.output_signs(self.out_features)
        return {
            name: None if bits is None else torch.from_numpy(bits.copy()).to(device)
            for name, bits in signs.items()
        }

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
        activations: str | ActivationFormat = "exact",
        transform: Transform | str | None = None,
    ) -> QuantLinear:
        """Quantizes the weights of a ``torch.nn.Linear`` and takes its bias over.

        Args:
            format, rounding, transform: see ``quantloom.quantize``. Weights are rounded on the device of
                the rounding's Hessians; without any, where they are, or on the CPU if no kernel of a CUDA
                device rounds to the format.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear: got {_checks.type_name(linear)}, expected a torch.nn.Linear")
        weight, format = linear.weight.detach(), parse_format(format)
        hessians = [getattr(rounding, name, None) for name in ("hessian", "held_out")]
        place = next((hessian.device for hessian in hessians if hessian is not None), None)
        if place is None:
            place = weight.device if _core.rounds_on_cuda(format.to_json()) else "cpu"
        threads = torch.get_num_threads()
        packed = quantize(weight.to(place), format, rounding, transform=transform, threads=threads)
        return cls(packed.to(weight.device), linear.bias, activations)

    @property
    def activations(self) -> str | ActivationFormat:
        """How inputs enter the product, see ``quantloom.matmul``."""
        return self._activations

    @activations.setter
    def activations(self, value: str | ActivationFormat) -> None:
        value = _known_scale(kernels.operand_format(value))
        if self._is_prepared and value != self._activations:
            packed = self.packed
            if _cuda_integers.order(packed, value) != self._columns:
                self._prepare(packed, value)
        self._activations = value
        self._operand = str(self._activations)  # what the operator takes; compiled code cannot make it

    @property
    def packed(self) -> PackedTensor:
        """W as a ``PackedTensor``: over the module's buffers on the CPU, a copy on a CUDA device."""
        prepared = self.prepared
        if prepared is not None:
            return prepared.unprepare()
        planes = dict(zip(self._stored, self._planes()))
        return PackedTensor(self._format, self._shape, planes, None, self._transform)

    @property
    def prepared(self) -> kernels.PreparedTensor | None:
        """W as a ``PreparedTensor`` over the module's buffers on a CUDA device; None on the CPU."""
        if not self._is_prepared:
            return None
        planes = dict(zip(self._description[0].split(","), self._planes()))
        return kernels.PreparedTensor._from_planes(
            self._format.to_json(), self._shape, planes, self._transform, self._columns
        )

    @property
    def format(self) -> Format:
        """What is stored, and how it decodes."""
        return self._format

    @property
    def transform(self) -> Transform | None:
        """The basis in which W is stored; None: its own."""
        return self._transform

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _planes(self) -> list[torch.Tensor]:
        return [self._buffers[name] for name in self._stored]

    def _store(
        self,
        planes: Mapping[str, torch.Tensor],
        prepared: bool,
        columns: tuple[int, ...] | None = None,
    ) -> None:
        """Makes these planes the module's buffers, in place of those it has; `columns`: of outliers, for
        planes in integer order."""
        for name in self._stored:
            delattr(self, name)
        # Prepared planes are no part of the state: it holds the canonical ones.
        for name, plane in planes.items():
            self.register_buffer(_PREFIX + name if prepared else name, plane, persistent=not prepared)
        self._stored = tuple(_PREFIX + name if prepared else name for name in planes)
        self._is_prepared, self._columns = prepared, columns
        self._description = (",".join(planes), self._format.to_json(), *self._shape)

    def _settle(self) -> None:
        """Prepares canonical planes that have come to a device where modules keep prepared ones."""
        if not self._is_prepared and _keeps_prepared(self._planes()[0].device):
            self._prepare(self.packed, self._activations)

    def _prepare(self, packed: PackedTensor, activations: str | ActivationFormat) -> None:
        """Brings canonical planes on a CUDA device into the order for these activations."""
        columns = _cuda_integers.order(packed, activations)
        planes = _cuda.prepare(packed) if columns is None else _cuda_integers.prepare(packed, columns)
        self._store(planes, prepared=True, columns=columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in_features]``, float32, float16 or bfloat16; returns ``[..., out_features]`` in its
        dtype, or in autocast's. Raises TypeError or ValueError for other dtypes, shapes and devices,
        RuntimeError if no kernel takes the product."""
        place = x.device.type
        if place in ("cpu", "cuda") and torch.is_autocast_enabled(place) and x.dtype in _AUTOCAST:
            x = x.to(torch.get_autocast_dtype(place))
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        transform = self._transform
        if transform is None:
            return self._product(x, bias)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {self.in_features}]")
        if isinstance(transform, ChannelScales):
            return self._product((x * self.input_factors).to(x.dtype), bias)
        block = transform.columns
        if transform.has_input and self.in_features:
            x = torch.ops.quantloom.hadamard(x, block, self.input_signs, 1.0, None, False)
        if not (transform.has_output and self.out_features):
            return self._product(x, bias)
        y = torch.ops.quantloom.hadamard(self._product(x, None), block, self.output_signs, 1.0, None, True)
        return y if bias is None else y + bias

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same in the basis in which W is stored."""
        if not self._is_prepared:
            y = torch.ops.quantloom.matmul(x, self._planes(), *self._description, self._operand)
            return y if bias is None else y + bias
        if self._operand == "int8":
            raise RuntimeError(
                "activations: got 'int8', but on a CUDA device there is only 'exact' or a format such as"
                " 'int8:token'"
            )
        if self._columns is not None:
            return torch.ops.quantloom.linear_integers(
                x, self._planes(), bias, *self._description, self._operand
            )
        if self._operand != "exact":
            x = torch.ops.quantloom.round_activations(x, self._operand)
        return torch.ops.quantloom.linear(x, self._planes(), bias, *self._description)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W as a matrix ``[out_features, in_features]``."""
        if self._transform is not None:
            return (self.prepared or self.packed).dequantize(dtype)
        name = "dequantize_prepared" if self._is_prepared else "dequantize"
        return getattr(torch.ops.quantloom, name)(self._planes(), *self._description, dtype)

    def _canonical_specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the canonical planes."""
        return {
            plane["name"]: (getattr(torch, plane["dtype"]), tuple(plane["shape"]))
            for plane in self._format.planes(*self._shape)
            if plane["name"] in self._names
        }

    def extra_repr(self) -> str:
        bits = sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in self._canonical_specs().values())
        count = self.out_features * self.in_features
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" format={self._format.spec}, {bits / count if count else 0:.3f} bits/weight"
        )
        if self._transform is not None:
            text = f"{text}, transform={self._transform.spec}"
        return text if self.activations == "exact" else f"{text}, activations={self.activations}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        source = self._planes()[0]
        target = fn(source.new_empty(0)).device
        if self._is_prepared and not _keeps_prepared(target):
            # Unprepared where the planes are: fast, and with memory for one module more.
            self._store(self._empty_planes("meta") if target.type == "meta" else self.packed.planes, False)
        elif not self._is_prepared and source.device.type == "meta" and _keeps_prepared(target):
            # to_empty(): there is nothing to prepare.
            format, grouped = self._format.to_json(), "group_index" in self._names
            columns = _cuda_integers.described_order(self._format, *self._shape, self._activations, target)
            if columns is None:
                names = _cuda.empty_planes(format, *self._shape, grouped, "meta")
            else:
                names = _cuda_integers.empty_planes(format, *self._shape, len(columns), grouped, "meta")
            self._store(names, prepared=True, columns=columns)
        planes = self._planes()
        if self._buffers.get("input_factors") is not None:
            planes = [*planes, self.input_factors]

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            if not any(tensor is plane for plane in planes):
                return fn(tensor)
            # Module.half() and .to(dtype) cast every floating-point buffer, but the codes were chosen against
            # the scales as they are stored; .to(memory_format=...) would permute planes of 4 dimensions.
            flat = tensor.view(-1)
            result = fn(flat)
            if result is flat:
                return tensor
            return (tensor.to(result.device) if result.dtype != flat.dtype else result).view(tensor.shape)

        super()._apply(keep_dtype, recurse)
        if source.device.type == "meta" and target.type != "meta":
            self._buffers.update(self._signs(target))  # to_empty(): no state fills them
        self._settle()
        return self

    def _empty_planes(self, device: str) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (dtype, shape) in self._canonical_specs().items()
        }

    def get_extra_state(self) -> torch.Tensor:
        # A tensor of text, because many writers of state dicts take tensors only.
        basis = "" if self._transform is None else f',"transform":{self._transform.to_json()}'
        shape = f"[{self.out_features},{self.in_features}]"
        if isinstance(self.activations, ActivationFormat):
            basis += f',"activations":{self.activations.to_json()}'
        text = f'{{"format":{self._format.to_json()},"shape":{shape}{basis}}}'
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        own = self.get_extra_state()
        if not isinstance(state, torch.Tensor) or not torch.equal(state.cpu(), own):
            got = bytes(state.cpu().tolist()).decode() if isinstance(state, torch.Tensor) else repr(state)
            raise ValueError(f"state: got a description {got}, expected {bytes(own.tolist()).decode()}")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_prepared:
            destination.update({prefix + name: plane for name, plane in self.packed.planes.items()})

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Everything is checked before any plane is copied; a copy would cast silently.
        specs = self._canonical_specs()
        given = {name: state_dict[prefix + name] for name in self._names if prefix + name in state_dict}
        errors = []
        for name, value in given.items():
            dtype, shape = specs[name]
            if isinstance(value, torch.Tensor) and value.dtype != dtype:
                errors.append(f"{prefix}{name}: got {value.dtype}, expected {dtype}")
            elif self._is_prepared and not isinstance(value, torch.Tensor):
                errors.append(f"{prefix}{name}: got {_checks.type_name(value)}, expected a tensor")
            elif self._is_prepared and tuple(value.shape) != shape:
                got, expected = _arrays.shape_text(value.shape), _arrays.shape_text(shape)
                errors.append(f"{prefix}{name}: got shape {got}, expected {expected}")
        description = state_dict.get(prefix + "_extra_state")
        if description is not None:
            try:
                self.set_extra_state(description)
            except ValueError as error:
                errors.append(f"{prefix}{error}")
        if errors:
            error_msgs.extend(errors)
            return
        unknown = [] if self._is_prepared else None
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys if unknown is None else unknown,
            error_msgs,
        )
        if unknown is None:
            self._settle()  # assign=True may have brought planes on another device
            return
        unexpected_keys.extend(key for key in unknown if key.removeprefix(prefix) not in self._names)
        if strict:
            missing_keys.extend(prefix + name for name in self._names if name not in given)
        if given:
            try:
                self._load_planes(given, bool(local_metadata.get("assign_to_params_buffers", False)))
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"{prefix}{error}")

    @torch.no_grad()
    def _load_planes(self, given: dict[str, torch.Tensor], assign: bool) -> None:
        """Takes canonical planes over where the module holds prepared ones."""
        device = next(iter(given.values())).device if assign else self._planes()[0].device
        planes = dict(self.packed.planes) if len(given) < len(self._names) else {}
        planes |= given
        # Made on the CPU or on the device, a PackedTensor checks what it can see there.
        kinds = {plane.device for plane in planes.values()}
        if len(kinds) > 1:
            planes = {name: plane.to(device) for name, plane in planes.items()}
        packed = PackedTensor(
            self._format, self._shape, {name: planes[name].contiguous() for name in self._names}
        )
        if assign:
            self._store(packed.planes, prepared=False)
            self._settle()
            return
        packed = packed.to(device)
        if self._columns is None:
            fresh = _cuda.prepare(packed)
        else:
            fresh = _cuda_integers.prepare(packed, self._columns)
        for name, plane in zip(self._stored, self._planes()):
            plane.copy_(fresh[name.removeprefix(_PREFIX)])
