"""A cache of keys and values for arrays of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantloom import _arrays, _checks, _core
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

    Args:
        format: a ``KVFormat`` or its short form.
        sequences, kv_heads: how many.
        head_dim: a multiple of 8 up to 1024.
        dtype: of all that is appended: float16, bfloat16 or float32; exact tokens are kept in it.
        capacity: tokens.
        tables: for formats of the kind kvquant: ``KVCalibration.core_tables`` of a layer.

    Raises TypeError or ValueError naming the argument.
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
    ) -> None:
        self.format = parse_kv_format(format)
        self.dtype = _arrays.dtype_name("dtype", dtype, _arrays.FLOATS)
        self.kv_heads = _checks.integer("kv_heads", kv_heads, 1)
        self.head_dim = _checks.integer("head_dim", head_dim, 1)
        self._core = _core.KVCache(
            self.format.to_json(),
            _checks.integer("sequences", sequences, 0),
            self.kv_heads,
            self.head_dim,
            self.dtype,
            _checks.integer("capacity", capacity, 0),
            tables,
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return self._core.lengths()

    def coded_keys(self, sequence: int) -> int:
        """How many tokens of a sequence have codes for keys: those from ``format.first`` on."""
        return self._core.coded("keys", _checks.integer("sequence", sequence))

    def coded_values(self, sequence: int) -> int:
        """How many tokens of a sequence have codes for values."""
        return self._core.coded("values", _checks.integer("sequence", sequence))

    def append(self, keys: Any, values: Any, starts: Sequence[int] | None = None, threads: int = 0) -> None:
        """Adds tokens: `keys` and `values` ``[sequences, kv_heads, tokens, head_dim]`` in the cache's dtype.

        `starts`: for each sequence the first of them to take (those before are padding); None: all. Raises
        ValueError, before anything is changed, for values that are not finite or beyond 32752 in magnitude.
        """
        keys, values = _arrays.describe("keys", keys), _arrays.describe("values", values)
        starts = None if starts is None else [_checks.integer("starts", start) for start in starts]
        self._core.append(keys.core, values.core, starts, _checks.thread_count(threads))

    def attend(self, queries: Any, scale: float | None = None, threads: int = 0) -> Any:
        """Attention of the last tokens of each sequence, straight from the codes.

        `queries` ``[sequences, heads, m, head_dim]`` of the last m tokens, already appended; query i sees the
        tokens up to its own, and consecutive heads share a KV head. `scale`: None: ``head_dim ** -0.5``.
        Returns an array of their shape, kind and dtype; zeros where a query sees no token.
        """
        array = _arrays.describe("queries", queries)
        if len(array.shape) != 4:
            raise ValueError(
                f"queries: got shape {_arrays.shape_text(array.shape)}, expected"
                f" [sequences, heads, tokens, head_dim]"
            )
        sequences, heads, tokens, dim = array.shape
        scale = 1 / math.sqrt(self.head_dim) if scale is None else _checks.real("scale", scale)
        out = _arrays.empty(array.kind, (sequences, tokens, heads, dim), "float32")
        core = _arrays.describe("out", out).core
        self._core.attend(array.core, scale, core, _checks.thread_count(threads))
        return _arrays.cast(out, array.dtype).swapaxes(1, 2)

    def keys(self, sequence: int, kind: str = "numpy") -> Any:
        """The keys of a sequence as attention sees them, float32 ``[kv_heads, tokens, head_dim]``."""
        keys = self._read("keys", sequence, kind)
        if not self.format.hadamard or keys.shape[1] == 0:
            return keys
        from quantloom.transforms import hadamard

        return hadamard(keys, inverse=True)

    def values(self, sequence: int, kind: str = "numpy") -> Any:
        """The values of a sequence, likewise."""
        return self._read("values", sequence, kind)

    def _read(self, side: str, sequence: int, kind: str) -> Any:
        _checks.choice("kind", kind, ("numpy", "torch"))
        lengths = self.lengths
        sequence = _checks.integer("sequence", sequence, 0)
        if sequence >= len(lengths):
            raise ValueError(f"sequence: got {sequence}, expected one below {len(lengths)}")
        count = lengths[sequence]
        size = count * self.head_dim
        memory = _arrays.empty(kind, (self.kv_heads * size + _PADDING,), "float32")
        for head in range(self.kv_heads):  # in order: each overwrites the padding of the one before
            out = _arrays.describe("out", memory[head * size : (head + 1) * size + _PADDING])
            self._core.read(side, sequence, head, 0, count, out.core)
        return memory[: self.kv_heads * size].reshape(self.kv_heads, count, self.head_dim)

    def reorder(self, sources: Sequence[int]) -> None:
        """Sequence s becomes what sequence ``sources[s]`` was; their number may change.

        Pages are shared until they are written to.
        """
        self._core.reorder([_checks.integer("sources", source) for source in sources])

    def clear(self) -> None:
        """Forgets all tokens and keeps the memory."""
        self._core.clear()

    def usage(self) -> KVUsage:
        return KVUsage(**self._core.usage())

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._core = self._core.clone()
        return copy

    def __repr__(self) -> str:
        return f"KVCache({self.format.spec!r}, lengths={self.lengths})"
