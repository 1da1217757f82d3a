"""Products straight from packed codes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from quantloom import _arrays, _checks, _core, _devices, coded
from quantloom.activations import ActivationFormat, parse_activations
from quantloom.coded import CodedTensor
from quantloom.formats import Format, format_from_json, parse_format
from quantloom.tensors import PackedTensor
from quantloom.transforms import Transform

if TYPE_CHECKING:
    from quantloom.formats.encoded import Encoded

__all__ = ["Possible", "PreparedTensor", "can_matmul", "kernel_table", "matmul", "prepare"]

ACTIVATIONS = ("exact", "int8")


def operand_format(activations: Any) -> str | ActivationFormat:
    """What ``matmul`` takes as activations: a name of ACTIVATIONS, or a format or its short form."""
    if isinstance(activations, str) and activations in ACTIVATIONS:
        return activations
    if not isinstance(activations, (str, ActivationFormat)):
        got = _checks.type_name(activations)
        raise TypeError(f"activations: got {got}, expected 'exact', 'int8' or an ActivationFormat")
    try:
        return parse_activations(activations)
    except ValueError as error:
        expected = str(error).partition(", expected ")[2]
        raise ValueError(
            f"activations: got {activations!r}, expected 'exact', 'int8' or a format: {expected}"
        ) from None


class PreparedTensor:
    """A packed tensor in the order that the kernels of its device read; made by ``prepare``.

    Immutable, may be used by many threads at once. Takes ``byte_count`` bytes beside the packed tensor, which
    it does not keep alive.
    """

    __slots__ = ("_core", "_format", "_planes", "_shape", "_transform")

    def __init__(
        self,
        core: _core.Prepared | _core.PreparedPlanes,
        format: Format | None = None,
        shape: tuple[int, int] = (0, 0),
        planes: Mapping[str, Any] = MappingProxyType({}),
        transform: Transform | None = None,
    ) -> None:
        if format is None or not isinstance(core, (_core.Prepared, _core.PreparedPlanes)):
            raise TypeError(f"PreparedTensor: got {_checks.type_name(core)}, expected a call of prepare()")
        self._core = core
        self._format = format
        self._shape = shape
        self._planes = dict(planes)
        self._transform = transform

    @classmethod
    def _from_planes(
        cls,
        format_json: str,
        shape: tuple[int, int],
        planes: Mapping[str, Any],
        transform: Transform | None = None,
    ) -> PreparedTensor:
        """Over planes in the order of a CUDA device, which are checked."""
        from quantloom import _cuda

        core = _cuda.descriptor(planes, format_json, *shape)
        return cls(core, format_from_json(format_json), shape, planes, transform)

    @property
    def format(self) -> Format:
        """What is stored, and how it decodes."""
        return self._format

    @property
    def transform(self) -> Transform | None:
        """The basis in which the planes hold the matrix; None: its own."""
        return self._transform

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``."""
        return self._shape

    @property
    def planes(self) -> Mapping[str, Any]:
        """On a CUDA device the torch tensors that the kernels read, by name; empty on the CPU, whose order
        is private to the library."""
        return MappingProxyType(self._planes)

    @property
    def device(self) -> str:
        """``"cpu"``, ``"cuda:0"``, ..."""
        return next((str(plane.device) for plane in self._planes.values()), "cpu")

    @property
    def byte_count(self) -> int:
        """Memory in bytes."""
        if isinstance(self._core, _core.Prepared):
            return self._core.byte_count
        return sum(plane.nbytes for plane in self._planes.values())

    def unprepare(self) -> PackedTensor:
        """The packed tensor that this was made of, bit for bit, on the same device.

        Raises RuntimeError on the CPU, where there is no way back.
        """
        if isinstance(self._core, _core.Prepared):
            raise RuntimeError("unprepare: got a tensor prepared for the CPU, expected one for a CUDA device")
        from quantloom import _cuda

        q = _cuda.unprepare(self._planes, self._core, self._format, *self._shape)
        return (
            q if self._transform is None else PackedTensor(q.format, q.shape, q.planes, None, self._transform)
        )

    def dequantize(self, dtype: Any = None) -> Any:
        """Decodes to ``[n, k]`` on the same CUDA device: the values of ``PackedTensor.dequantize``.

        Args:
            dtype: float32 (the default), float16 or bfloat16.

        Raises RuntimeError on the CPU, where there is no way back.
        """
        name = "float32" if dtype is None else _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
        if isinstance(self._core, _core.Prepared) or self.device == "cpu":
            return self.unprepare().dequantize(name)
        from quantloom import _cuda

        if self._transform is not None:
            plain = _cuda.decode(self._planes, self._core, *self._shape, _arrays.torch_dtype("float32"))
            return _arrays.cast(self._transform.rotate_weight(plain, inverse=True), name)
        return _cuda.decode(self._planes, self._core, *self._shape, _arrays.torch_dtype(name))

    def __repr__(self) -> str:
        return f"PreparedTensor(shape={self.shape}, {self.byte_count} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._core, _core.Prepared):
            raise TypeError("cannot pickle a tensor prepared for the CPU: pickle the packed tensor")
        arguments = (self._format.to_json(), self._shape, self._planes, self._transform)
        return PreparedTensor._from_planes, arguments


def prepare(q: PackedTensor, threads: int = 0) -> PreparedTensor:
    """Brings a packed tensor into the order that the kernels of its device read.

    On a CUDA device the work is queued on torch's current stream; ``threads`` is for the CPU.
    Raises RuntimeError if no kernel takes its format (``kernel_table`` lists them).
    """
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    threads = _checks.thread_count(threads)
    if q.device == "cpu":
        return PreparedTensor(_core.prepare(q._core(), threads), q.format, q.shape, {}, q.transform)
    from quantloom import _cuda

    return PreparedTensor._from_planes(q.format.to_json(), q.shape, _cuda.prepare(q), q.transform)


_prepare_lock = threading.Lock()


def _prepared_of(q: PackedTensor, threads: int) -> PreparedTensor:
    if q._prepared is None:
        with _prepare_lock:
            if q._prepared is None:
                q._prepared = prepare_now(q, threads)
    return q._prepared


def prepare_now(q: PackedTensor, threads: int = 0) -> PreparedTensor:
    """``prepare``, and waits for it: the result may be kept and used on any stream."""
    if q.device == "cpu":
        return prepare(q, threads)
    import torch

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "q: got a packed tensor that has not been prepared, which cannot be done while a CUDA graph is"
            " captured (call prepare() before)"
        )
    prepared = prepare(q, threads)
    torch.cuda.current_stream(q.device).synchronize()
    return prepared


def matmul(
    x: Any,
    q: PackedTensor | PreparedTensor | CodedTensor | Encoded,
    activations: str | ActivationFormat = "exact",
    threads: int = 0,
    *,
    bias: Any = None,
    kernel: str | None = None,
) -> Any:
    """``x @ W.T + bias`` straight from the packed codes of W.

    Args:
        x: ``[..., k]``, float32, float16 or bfloat16, NumPy or torch, on the device of `q`.
        q: W ``[n, k]``, a ``PackedTensor`` or what ``prepare`` made of one. A packed tensor is prepared in
            the first call and keeps the result, which takes about as much memory again; use ``prepare``
            to own that memory. Or entropy-coded weights, which ``code`` made. Or an
            ``Encoded`` matrix, which is coded (if it is entropy-coded) or packed in the first call on a
            device and keeps the result.
        activations: ``"exact"``: x enters as it is, sums are taken in float32. ``"int8"`` (on the CPU): x is
            rounded to 8 bits with one scale for each block of at most 128 inputs, which is faster below
            8 bits per weight and adds a relative error of about 0.5%; x must then be finite,
            and W uniform or a trellis of the codebook ``mul1`` or ``1mad``. An ``ActivationFormat`` or its
            short form (``"int8:token"``), on the CPU: the product of ``round_activations(x, ...)``, one of
            integers for uniform, spqr and sdr weights where the inputs that share scales make whole steps of
            16, else of the rounded values. A transform of W comes before the rounding.
        threads: 0 for OpenMP's default. The result does not depend on it.
        bias: None or ``[n]``, of the kind and dtype of `x`.
        kernel: on a CUDA device the name of a kernel, as in ``kernel_table()``; None: the one that suits. For
            a trellis, up to 4 tokens, ``"trellis_exact"`` multiplies the weights as the format defines
            them in float16, where ``"trellis_stream"`` leaves out that rounding (2e-4 of a weight), and
            activations with 22 bits instead of 16.

    Returns ``[..., n]``, of the kind and dtype of `x`, without a gradient (``quantloom.nn.QuantLinear`` has
    one). On a CUDA device the work is queued on torch's current stream of that device.

    Raises TypeError (kind, dtype, device), ValueError (shape, activations), RuntimeError if no kernel
    takes the product (``can_matmul`` tells why).
    """
    activations = operand_format(activations)
    threads = _checks.thread_count(threads)
    if coded.is_encoded(q):
        device = _arrays.describe("x", x).device
        q = coded.operand_of(q, device, threads)
    if not isinstance(q, (PackedTensor, PreparedTensor, CodedTensor)):
        raise TypeError(
            f"q: got {_checks.type_name(q)}, expected a PackedTensor, a PreparedTensor or coded weights"
        )
    n, k = q.shape
    on_cpu = q.device == "cpu"
    tokens = _arrays.tokens("x", x, k, cpu=on_cpu)
    shape = (*_arrays.describe("x", x).shape[:-1], n)
    added = None if bias is None else _bias(bias, tokens, n)
    if not on_cpu and tokens.device != q.device:
        raise TypeError(f"x: got an array on {tokens.device}, expected one on {q.device}, as q")
    if not on_cpu and activations != "exact":
        raise RuntimeError(
            f"activations: got {str(activations)!r}, but on a CUDA device there is only 'exact'"
        )
    if kernel is not None:
        _checks.string("kernel", kernel, "a name of kernel_table()")
        if on_cpu or isinstance(q, CodedTensor):
            raise RuntimeError(
                f"kernel: got {kernel!r}, but only packed codes on a CUDA device have a choice"
            )
    if isinstance(q, CodedTensor):
        if activations != "exact":
            raise RuntimeError(f"activations: got {str(activations)!r}, but coded weights take only 'exact'")
        return coded.multiply(tokens, q, added, threads).reshape(shape)
    prepared = q if isinstance(q, PreparedTensor) else _prepared_of(q, threads)
    transform = prepared.transform
    if transform is not None:
        rotated = transform.rotate_input(tokens.value, threads=threads)
        tokens = _arrays.tokens("x", rotated, k, cpu=on_cpu)
    if not on_cpu:
        from quantloom import _cuda

        late = transform is not None and transform.has_output  # outputs are rotated back before the bias
        y = _cuda.product(
            tokens.value,
            prepared._core,
            n,
            k,
            tokens.value.device,
            None if late else added,
            _cuda.options(kernel),
        )
        if late:
            y = transform.rotate_output(y, inverse=True)
            y = y if added is None else y + added
        return y.reshape(shape)
    y = _arrays.empty(tokens.kind, (tokens.shape[0], n), "float32")
    out = _arrays.describe("y", y).core
    if isinstance(activations, ActivationFormat):
        _core.matmul_activations(tokens.core, prepared._core, out, activations.to_json(), threads)
    else:
        _core.matmul(tokens.core, prepared._core, out, activations, threads)
    if transform is not None:
        y = transform.rotate_output(y, inverse=True, threads=threads)
    if added is not None:
        y += _arrays.cast(added, "float32")
    return _arrays.cast(y, tokens.dtype).reshape(shape)


def _bias(value: Any, x: _arrays.Array, n: int) -> Any:
    array = _arrays.describe("bias", value)
    if array.shape != (n,):
        raise ValueError(f"bias: got shape {_arrays.shape_text(array.shape)}, expected [{n}]")
    got, expected = [f"{a.dtype} ({a.kind}, {a.device})" for a in (array, x)]
    if got != expected:
        raise TypeError(f"bias: got {got}, expected {expected}, as x")
    return array.value if array.core.contiguous or x.device == "cpu" else array.value.contiguous()


class Possible(NamedTuple):
    """An answer that is true or false, with the reason."""

    yes: bool
    reason: str
    """Why not, in words; empty if it is possible."""

    def __bool__(self) -> bool:
        return self.yes


def can_matmul(
    q: PackedTensor | PreparedTensor | Format | str,
    tokens: int = 1,
    dtype: Any = None,
    device: Any = None,
    activations: str | ActivationFormat = "exact",
    kernel: str | None = None,
) -> Possible:
    """Whether ``matmul`` has a kernel, asked before any work.

    Args:
        q: a tensor, or a format or its short form.
        tokens: rows of x.
        dtype: of x; float16 if None.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or a ``torch.device``; None: the device of the tensor, the
            CPU for a format.
        activations, kernel: as for ``matmul``.
    """
    activations = operand_format(activations)
    if kernel is not None:
        _checks.string("kernel", kernel, "a name of kernel_table()")
    tokens = _checks.integer("tokens", tokens, 0)
    name = "float16" if dtype is None else _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
    if isinstance(q, (PackedTensor, PreparedTensor)):
        format, place = q.format, q.device
    else:
        format, place = parse_format(q), "cpu"
    try:
        place = place if device is None else _devices.device_name("device", device)
    except RuntimeError as error:  # no such device, or no kernels for it
        return Possible(False, str(error))
    if place == "cpu":
        if kernel is not None:
            return Possible(False, f"only a CUDA device has a choice of kernels, got {kernel!r}")
        if isinstance(activations, ActivationFormat):
            if not activations.calibrated:
                return Possible(False, f"the scale of {activations.spec} is not known yet")
            return _can_matmul_on_cpu(format, "exact")  # at worst the rounded values are multiplied
        return _can_matmul_on_cpu(format, activations)
    if activations != "exact":
        return Possible(False, f"on a CUDA device activations can only be 'exact', got {str(activations)!r}")
    from quantloom import _cuda

    reason = _cuda.why_not(format.to_json(), tokens, name, place, kernel)
    return Possible(reason is None, reason or "")


def _can_matmul_on_cpu(format: Format, activations: str) -> Possible:
    fields = json.loads(format.to_json())
    if fields["format"] == "outliers":  # added to the product of the dense format
        fields = fields["dense"]
    stands_for = "float32" if activations == "exact" else activations
    sums_bytes = str(fields.get("codebook")).partition("-")[0] in ("mul1", "1mad")
    if fields["format"] == "trellis" and activations != "exact" and not sums_bytes:
        return Possible(
            False, f"int8 activations need the codebook mul1 or 1mad, and the trellis is {format.spec}"
        )
    for row in kernel_table():
        first, _, last = row["bits"].partition("-")
        if (
            (row["operation"], row["device"], row["activations"]) == ("matmul", "cpu", stands_for)
            and row["format"] == fields["format"]
            and int(first) <= fields.get("bits", int(first)) <= int(last or first)
        ):
            return Possible(True, "")
    return Possible(False, f"no CPU kernel multiplies {format.spec} with {activations} activations")


def kernel_table() -> list[dict[str, str]]:
    """Which kernel serves which operation, format, width, device and number of tokens in this process."""
    return _core.kernel_table()
