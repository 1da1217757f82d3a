"""A cache of keys and values for arrays of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantloom import _arrays, _checks, _core, _devices
from quantloom.kv.format import KVFormat, parse_kv_format

__all__ = ["KVCache", "KVUsage"]

_PADDING = 16  # elements that the C++ side writes past the last one


@dataclass(frozen=True)
class KVUsage:
    """What a cache holds, in bytes."""

    tokens: int
    """Of all sequences together."""
    coded_keys: int
    """Tokens whose keys are codes."""
    coded_values: int
    code_bytes: int
    """Codes and scales of those tokens."""
    exact_bytes: int
    """Exact keys and values in use."""
    page_bytes: int
    """Pages in use, whole; shared ones once."""
    reserved_bytes: int
    """All memory of the cache."""


class KVCache:
    """The keys and values of one layer for a batch of sequences: pages of codes and a window of exact tokens.

    Memory for `capacity` tokens of each sequence is taken at the start, and none for a token that fits;
    beyond it, more pages are added. No token is moved once it is written. What a sequence holds does not
    depend on the others.

    On a CUDA device all work is queued on torch's current stream, and a CUDA graph may hold it: capture
    ``append(..., check=False)`` and ``attend`` after ``reserve``, and each replay adds its tokens.

    Args:
        format: a ``KVFormat`` or its short form.
        sequences, kv_heads: how many.
        head_dim: a multiple of 8 up to 1024.
        dtype: of all that is appended: float16, bfloat16 or float32; exact tokens are kept in it.
        capacity: tokens.
        tables: for formats of the kind kvquant: ``KVCalibration.core_tables`` of a layer.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a ``torch.device``: where the cache is, and all arrays
            that it takes and gives. None: the CPU.

    Raises TypeError or ValueError naming the argument, RuntimeError for a device that cannot be used.
    """

    def __init__(
        self,
        format: KVFormat | str,
        sequences: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any = "float16",
        capacity: int = 0,
        tables: _core.KVTables | None = None,
        device: Any = None,
    ) -> None:
        self.format = parse_kv_format(format)
        self.dtype = _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
        self.kv_heads = _checks.integer("kv_heads", kv_heads, 1)
        self.head_dim = _checks.integer("head_dim", head_dim, 1)
        self.device = "cpu" if device is None else _devices.device_name("device", device)
        if tables is not None and not isinstance(tables, _core.KVTables):
            raise TypeError(
                f"tables: got {_checks.type_name(tables)}, expected those of KVCalibration.core_tables"
            )
        make = _core.KVCache if self.device == "cpu" else _core.CudaKVCache
        self._core = self._queued(
            make,
            self.format.to_json(),
            _checks.integer("sequences", sequences, 0),
            self.kv_heads,
            self.head_dim,
            self.dtype,
            _checks.integer("capacity", capacity, 0),
            tables,
        )
        # Made before a compiler sees the cache, but for one that is older than torch's import.
        self._handle = None if _arrays.torch_if_loaded() is None else self._new_handle()

    def _new_handle(self) -> Any:
        from quantloom.kv import operators

        return operators.handle(self)

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A call of the C++ side that queues nothing."""
        if self.device == "cpu":
            return call(*arguments)
        with _devices.current(self.device):
            return call(*arguments)

    def _queued(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A call of the C++ side; on a CUDA device with the current stream as its last argument."""
        if self.device == "cpu":
            return call(*arguments)
        with _devices.current(self.device) as stream:
            return call(*arguments, stream)

    def _take(self, name: str, value: Any) -> _arrays.Array:
        array = _arrays.describe(name, value)
        if array.device != self.device:
            raise TypeError(
                f"{name}: got a tensor on {array.device}, expected one on {self.device}, as the cache"
            )
        return array

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return self._ask(self._core.lengths)

    def coded_keys(self, sequence: int) -> int:
        """How many tokens of a sequence have codes for keys: those from ``format.first`` on."""
        return self._ask(self._core.coded, "keys", _checks.integer("sequence", sequence))

    def coded_values(self, sequence: int) -> int:
        """How many tokens of a sequence have codes for values."""
        return self._ask(self._core.coded, "values", _checks.integer("sequence", sequence))

    def reserve(self, tokens: int) -> None:
        """Takes memory for `tokens` tokens of each sequence, those that it has included."""
        self._queued(self._core.reserve, _checks.integer("tokens", tokens, 0))

    def append(
        self,
        keys: Any,
        values: Any,
        starts: Sequence[int] | None = None,
        threads: int = 0,
        check: bool = True,
    ) -> None:
        """Adds tokens: `keys` and `values` ``[sequences, kv_heads, tokens, head_dim]`` in the cache's dtype.

        `starts`: for each sequence the first of them to take (those before are padding); None: all. Raises
        ValueError, before anything is changed, for values that are not finite or beyond 32752 in magnitude.

        `check`: on a CUDA device, looking at the values means waiting for it. False: they are written as they
        come, without waiting, and a later call raises the error.
        """
        keys, values = self._take("keys", keys), self._take("values", values)
        starts = None if starts is None else _checks.integers("starts", starts)
        threads, check = _checks.thread_count(threads), _checks.boolean("check", check)
        option = threads if self.device == "cpu" else check
        self._queued(self._core.append, keys.core, values.core, starts, option)

    def attend(self, queries: Any, scale: float | None = None, threads: int = 0) -> Any:
        """Attention of the last tokens of each sequence, straight from the codes.

        `queries` ``[sequences, heads, m, head_dim]`` of the last m tokens, already appended; query i sees the
        tokens up to its own, and consecutive heads share a KV head. `scale`: None: ``head_dim ** -0.5``.
        Returns an array of their shape, kind, dtype and device; zeros where a query sees no token.

        On a CUDA device head_dim is 64, 80, 96, 128 or 256, else RuntimeError is raised; products are of
        float16.
        """
        array = self._take("queries", queries)
        if len(array.shape) != 4:
            raise ValueError(
                f"queries: got shape {_arrays.shape_text(array.shape)}, expected"
                f" [sequences, heads, tokens, head_dim]"
            )
        sequences, heads, tokens, dim = array.shape
        scale = 1 / math.sqrt(self.head_dim) if scale is None else _checks.real("scale", scale)
        threads = _checks.thread_count(threads)
        shape = (sequences, tokens, heads, dim)
        if self.device != "cpu":
            out = array.value.new_empty(shape)
            self._queued(self._core.attend, array.core, scale, _arrays.describe("out", out).core)
            return out.swapaxes(1, 2)
        out = _arrays.empty(array.kind, shape, "float32")
        self._core.attend(array.core, scale, _arrays.describe("out", out).core, threads)
        return _arrays.cast(out, array.dtype).swapaxes(1, 2)

    def append_attend(self, queries: Any, keys: Any, values: Any, scale: float | None = None) -> Any:
        """``append`` without a check, then ``attend``, as one operator of PyTorch: for torch tensors.

        ``torch.compile`` takes it as it is. Raises TypeError for other arrays; queries that cannot attend are
        refused before anything is appended.
        """
        import torch

        from quantloom.kv import operators

        for name, value in (("queries", queries), ("keys", keys), ("values", values)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name}: got {_checks.type_name(value)}, expected a torch.Tensor")
        if self._handle is None:
            self._handle = self._new_handle()
        scale = 1 / math.sqrt(self.head_dim) if scale is None else _checks.real("scale", scale)
        return operators.append_attend(queries, keys, values, None, self._handle, scale).transpose(1, 2)

    def _append_attend(self, queries: Any, keys: Any, values: Any, mask: Any, scale: float) -> Any:
        if mask is not None:
            raise ValueError("mask: got a tensor, expected None: the tokens of a KVCache are no padding")
        self._ask(self._core.require_queries, self._take("queries", queries).core, scale)
        self.append(keys, values, check=False)
        return self.attend(queries, scale).transpose(1, 2).contiguous()

    def keys(self, sequence: int, kind: str | None = None) -> Any:
        """The keys of a sequence as attention sees them, float32 ``[kv_heads, tokens, head_dim]``.

        `kind`: ``"numpy"`` or ``"torch"``; None: NumPy of a cache on the CPU, else torch, on the cache's
        device, which is all that there is.
        """
        return self._read("keys", sequence, kind)

    def values(self, sequence: int, kind: str | None = None) -> Any:
        """The values of a sequence, likewise."""
        return self._read("values", sequence, kind)

    def _read(self, side: str, sequence: int, kind: str | None, dtype: str = "float32") -> Any:
        on_cpu = self.device == "cpu"
        kind = ("numpy" if on_cpu else "torch") if kind is None else kind
        _checks.choice("kind", kind, ("numpy", "torch"))
        if kind == "numpy" and not on_cpu:
            raise ValueError(f"kind: got 'numpy', expected 'torch' of a cache on {self.device}")
        lengths = self.lengths
        sequence = _checks.integer("sequence", sequence, 0)
        if sequence >= len(lengths):
            raise ValueError(f"sequence: got {sequence}, expected one below {len(lengths)}")
        read = self._read_cpu if on_cpu else self._read_cuda
        found = read(side, sequence, lengths[sequence], kind, dtype)
        if side == "values" or not self.format.hadamard or found.shape[1] == 0:
            return found
        from quantloom.transforms import hadamard

        return hadamard(found, inverse=True)

    def _read_cpu(self, side: str, sequence: int, count: int, kind: str, dtype: str) -> Any:
        size = count * self.head_dim
        memory = _arrays.empty(kind, (self.kv_heads * size + _PADDING,), "float32")
        for head in range(self.kv_heads):  # in order: each overwrites the padding of the one before
            out = _arrays.describe("out", memory[head * size : (head + 1) * size + _PADDING])
            self._core.read(side, sequence, head, 0, count, out.core)
        found = memory[: self.kv_heads * size].reshape(self.kv_heads, count, self.head_dim)
        return _arrays.cast(found, dtype)

    def _read_cuda(self, side: str, sequence: int, count: int, kind: str, dtype: str) -> Any:
        import torch

        shape = (self.kv_heads, count, self.head_dim)
        found = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        out = _arrays.describe("out", found)
        self._queued(self._core.read, side, sequence, 0, count, out.core)
        return found

    def reorder(self, sources: Sequence[int]) -> None:
        """Sequence s becomes what sequence ``sources[s]`` was; their number may change.

        Pages are shared until they are written to.
        """
        self._queued(self._core.reorder, _checks.integers("sources", sources))

    def clear(self) -> None:
        """Forgets all tokens and keeps the memory."""
        self._queued(self._core.clear)

    def usage(self) -> KVUsage:
        return KVUsage(**self._ask(self._core.usage))

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._core = self._queued(self._core.clone)
        copy._handle = None if self._handle is None else copy._new_handle()
        return copy

    def __repr__(self) -> str:
        place = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"KVCache({self.format.spec!r}, lengths={self.lengths}{place})"
