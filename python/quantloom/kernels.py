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

__all__ = [
    "Possible",
    "PreparedTensor",
    "can_matmul",
    "kernel_table",
    "matmul",
    "matmul_is_integer",
    "prepare",
]

ACTIVATIONS = ("exact", "int8")
_INTEGER_KERNEL = "integer_tiles"


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

    __slots__ = ("_columns", "_core", "_format", "_planes", "_shape", "_transform")

    def __init__(
        self,
        core: _core.Prepared | _core.PreparedPlanes | _core.IntegerPlanes,
        format: Format | None = None,
        shape: tuple[int, int] = (0, 0),
        planes: Mapping[str, Any] = MappingProxyType({}),
        transform: Transform | None = None,
    ) -> None:
        kinds = (_core.Prepared, _core.PreparedPlanes, _core.IntegerPlanes)
        if format is None or not isinstance(core, kinds):
            raise TypeError(f"PreparedTensor: got {_checks.type_name(core)}, expected a call of prepare()")
        self._core = core
        self._format = format
        self._shape = shape
        self._planes = dict(planes)
        self._transform = transform
        self._columns = tuple(core.outlier_columns) if isinstance(core, _core.IntegerPlanes) else None

    @classmethod
    def _from_planes(
        cls,
        format_json: str,
        shape: tuple[int, int],
        planes: Mapping[str, Any],
        transform: Transform | None = None,
        columns: tuple[int, ...] | None = None,
    ) -> PreparedTensor:
        """Over planes in the order of a CUDA device, which are checked: in integer order with these outlier
        columns, or (None) in that of exact products."""
        from quantloom import _cuda, _cuda_integers

        if columns is None:
            core = _cuda.descriptor(planes, format_json, *shape)
        else:
            core = _cuda_integers.descriptor(planes, format_json, *shape, columns)
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
        from quantloom import _cuda, _cuda_integers

        orders = _cuda if self._columns is None else _cuda_integers
        q = orders.unprepare(self._planes, self._core, self._format, *self._shape)
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
        if self._transform is not None:
            plain = self._decode("float32")
            return _arrays.cast(self._transform.rotate_weight(plain, inverse=True), name)
        return self._decode(name)

    def _decode(self, name: str) -> Any:
        from quantloom import _cuda, _cuda_integers

        dtype = _arrays.torch_dtype(name)
        if self._columns is not None:
            return _cuda_integers.decode(self._planes, *self._shape, dtype, self._format.to_json())
        return _cuda.decode(self._planes, self._core, *self._shape, dtype)

    def __repr__(self) -> str:
        return f"PreparedTensor(shape={self.shape}, {self.byte_count} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._core, _core.Prepared):
            raise TypeError("cannot pickle a tensor prepared for the CPU: pickle the packed tensor")
        arguments = (self._format.to_json(), self._shape, self._planes, self._transform, self._columns)
        return PreparedTensor._from_planes, arguments


def _calibrated(activations: str | ActivationFormat) -> str | ActivationFormat:
    if isinstance(activations, ActivationFormat) and not activations.calibrated:
        raise ValueError(
            f"activations: got {activations.spec}, expected one whose scale and outliers are known"
        )
    return activations


def prepare(
    q: PackedTensor, threads: int = 0, *, activations: str | ActivationFormat = "exact"
) -> PreparedTensor:
    """Brings a packed tensor into the order that the kernels of its device read.

    Args:
        threads: for the CPU; on a CUDA device the work is queued on torch's current stream.
        activations: how inputs will enter products, see ``matmul``. On a CUDA device an ``ActivationFormat``
            whose integers can be multiplied with those of `q` (``matmul_is_integer`` tells) gives integer
            order, for activations with these static outliers, of 8 bits to a weight, or 4 if `q` has at most
            4 and no outliers; otherwise, as for ``"exact"``, the order of exact products. On the CPU there is
            one order.

    Raises RuntimeError if no kernel takes its format (``kernel_table`` lists them).
    """
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    threads = _checks.thread_count(threads)
    activations = operand_format(activations)
    if q.device == "cpu":
        return PreparedTensor(_core.prepare(q._core(), threads), q.format, q.shape, {}, q.transform)
    from quantloom import _cuda, _cuda_integers

    columns = _cuda_integers.order(q, _calibrated(activations))
    planes = _cuda.prepare(q) if columns is None else _cuda_integers.prepare(q, columns)
    return PreparedTensor._from_planes(q.format.to_json(), q.shape, planes, q.transform, columns)


_prepare_lock = threading.Lock()


def _prepared_of(
    q: PackedTensor, threads: int, activations: str | ActivationFormat = "exact"
) -> PreparedTensor:
    if q.device == "cpu":
        if q._prepared is None:
            with _prepare_lock:
                if q._prepared is None:
                    q._prepared = prepare_now(q, threads)
        return q._prepared
    key = activations.to_json() if isinstance(activations, ActivationFormat) else "exact"
    found = q._orders.get(key)
    if found is None:
        with _prepare_lock:
            found = q._orders.get(key) or _prepared_as(q, activations)
            q._orders[key] = found
    return found


def _prepared_as(q: PackedTensor, activations: str | ActivationFormat) -> PreparedTensor:
    """On a CUDA device, in an order that `q` has been brought into already if that serves."""
    from quantloom import _cuda_integers

    if q._orders:
        _refuse_capture()
        columns = _cuda_integers.order(q, activations)
        for known in q._orders.values():
            if known._columns == columns:
                return known
    return prepare_now(q, activations=activations)


def _refuse_capture() -> None:
    import torch

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "q: got a packed tensor that has not been prepared, which cannot be done while a CUDA graph is"
            " captured (call prepare() before)"
        )


def prepare_now(
    q: PackedTensor, threads: int = 0, activations: str | ActivationFormat = "exact"
) -> PreparedTensor:
    """``prepare``, and waits for it: the result may be kept and used on any stream."""
    if q.device == "cpu":
        return prepare(q, threads)
    import torch

    _refuse_capture()
    prepared = prepare(q, threads, activations=activations)
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
            short form (``"int8:token"``): the product of ``round_activations(x, ...)``, of the integers
            themselves where that is possible, else of the rounded values (``matmul_is_integer`` tells
            which). On the CPU integers of uniform, spqr and sdr weights are multiplied where the inputs that
            share scales make whole steps of 16. On a CUDA device of compute capability 8.0 or later those of
            float16 or bfloat16 x with one scale for each token or for all, and of uniform weights (2 bits and
            more) with one scale for each output, for all or for each group of a multiple of 32 consecutive
            columns, or sdr weights; on devices of 9.0 also with static outliers, multiplied as float16, which
            groups do not take. A transform of W comes before the rounding.
        threads: 0 for OpenMP's default. The result does not depend on it.
        bias: None or ``[n]``, of the kind and dtype of `x`.
        kernel: on a CUDA device the name of a kernel, as in ``kernel_table()``; None: the one that suits.
            ``"integer_tiles"`` multiplies integers or raises RuntimeError; others multiply rounded values.
            For a trellis, up to 4 tokens, ``"trellis_exact"`` multiplies the weights as the format defines
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
    if not on_cpu and activations == "int8":
        raise RuntimeError(
            "activations: got 'int8', but on a CUDA device there is only 'exact' or a format such as"
            " 'int8:token'"
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
    if on_cpu:
        prepared = q if isinstance(q, PreparedTensor) else _prepared_of(q, threads)
    else:
        prepared = _prepared_on_cuda(q, tokens.dtype, _calibrated(activations), kernel)
    transform = prepared.transform
    if transform is not None:
        rotated = transform.rotate_input(tokens.value, threads=threads)
        tokens = _arrays.tokens("x", rotated, k, cpu=on_cpu)
    if not on_cpu:
        late = transform is not None and transform.has_output  # outputs are rotated back before the bias
        y = _multiply_cuda(tokens.value, prepared, activations, None if late else added, kernel)
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


def _prepared_on_cuda(
    q: PackedTensor | PreparedTensor, dtype: str, activations: str | ActivationFormat, kernel: str | None
) -> PreparedTensor:
    if kernel == _INTEGER_KERNEL:
        possible = matmul_is_integer(q, activations, dtype)
        if not possible:
            raise RuntimeError(f"kernel: got {kernel!r}, but {possible.reason}")
    exact = kernel is not None and kernel != _INTEGER_KERNEL
    if isinstance(q, PreparedTensor):
        if exact and q._columns is not None:
            raise RuntimeError(f"kernel: got {kernel!r}, but q was prepared for products of integers")
        return q
    if dtype == "float32":
        from quantloom import _cuda_integers

        exact = exact or _cuda_integers.has_fragments(q.format.to_json())
    return _prepared_of(q, 0, "exact" if exact else activations)


def _multiply_cuda(
    x: Any, w: PreparedTensor, activations: str | ActivationFormat, bias: Any, kernel: str | None
) -> Any:
    from quantloom import _cuda, _cuda_activations, _cuda_integers

    if w._columns is not None:
        format = w.format.to_json()
        return _cuda_integers.multiply(x, w._planes, w._core, format, *w.shape, w._columns, activations, bias)
    if isinstance(activations, ActivationFormat) and x.numel():
        x = _cuda_activations.round_values(x, activations)
    return _cuda.product(x, w._core, *w.shape, x.device, bias, _cuda.options(kernel))


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
    return _can_matmul_on_cuda(q, format, tokens, name, place, activations, kernel)


def _can_matmul_on_cuda(
    q: PackedTensor | PreparedTensor | Format | str,
    format: Format,
    tokens: int,
    dtype: str,
    place: str,
    activations: str | ActivationFormat,
    kernel: str | None,
) -> Possible:
    from quantloom import _cuda, _cuda_integers

    if activations == "int8":
        return Possible(
            False, "on a CUDA device activations are 'exact' or a format such as 'int8:token', not 'int8'"
        )
    if isinstance(activations, ActivationFormat) and not activations.calibrated:
        return Possible(False, f"the scale of {activations.spec} is not known yet")
    text = format.to_json()
    if kernel == _INTEGER_KERNEL:
        if isinstance(q, (PackedTensor, PreparedTensor)) and q.device != "cpu":
            return matmul_is_integer(q, activations, dtype)
        return _formats_are_integers(format, activations, dtype, place)
    if kernel is None and _core.why_not_integers(text) is None:
        # Weights in integer order are multiplied in any case: if need be, decoded.
        in_order = isinstance(q, PreparedTensor) and q._columns is not None
        if in_order:
            return Possible(True, "")
        if not _cuda_integers.has_fragments(text):
            weights = q.to("torch") if isinstance(q, PackedTensor) else format
            reason = _cuda_integers.why_not_order(weights, activations)
            return Possible(reason is None, reason or "")
        if _formats_are_integers(format, activations, dtype, place):
            return Possible(True, "")
    reason = _cuda.why_not(text, tokens, dtype, place, kernel)
    return Possible(reason is None, reason or "")


def _formats_are_integers(
    format: Format, activations: str | ActivationFormat, dtype: str, place: str
) -> Possible:
    if not isinstance(activations, ActivationFormat):
        return Possible(False, f"{activations!r} activations are no integers with scales of their own")
    from quantloom import _cuda_integers

    reason = _cuda_integers.why_not(format.to_json(), activations, 0, dtype, place)
    return Possible(reason is None, reason or "")


def matmul_is_integer(
    q: PackedTensor | PreparedTensor, activations: str | ActivationFormat, dtype: Any = None
) -> Possible:
    """Whether ``matmul(x, q, activations)`` multiplies the integers of both, or else rounds x and multiplies
    the values: the result is the same up to the order and precision of sums.

    Args:
        q: where it is. On the CPU a packed tensor is prepared for the answer, and keeps the result.
        activations: an ``ActivationFormat`` or its short form.
        dtype: of x; float16 if None.

    Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(q, (PackedTensor, PreparedTensor)):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor or a PreparedTensor")
    activations = _calibrated(operand_format(activations))
    name = "float16" if dtype is None else _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
    if not isinstance(activations, ActivationFormat):
        return Possible(False, f"{activations!r} activations are no integers with scales of their own")
    if q.device == "cpu":
        possible = _can_matmul_on_cpu(q.format, "exact")
        if not possible:
            return possible
        prepared = q if isinstance(q, PreparedTensor) else _prepared_of(q, 0)
        if _core.matmul_is_integer(prepared._core, activations.to_json()):
            return Possible(True, "")
        return Possible(
            False, f"the CPU does not multiply integers of {activations.spec} and {q.format.spec}"
        )
    from quantloom import _cuda_integers

    if isinstance(q, PackedTensor):
        reason = _cuda_integers.why_not_tensor(q, activations, name)
    elif q._columns is None:
        reason = "q was prepared for exact products (prepare takes activations)"
    else:
        reason = _cuda_integers.why_not_product(
            q.format.to_json(), q.shape[1], q._columns, activations, _arrays.torch_dtype(name), q.device
        )
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
