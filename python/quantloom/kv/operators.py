"""The operator of caches for PyTorch.

``quantloom::kv_append_attend(queries, keys, values, mask, handle, scale)``
    Adds the tokens of `keys` and `values` ``[sequences, kv_heads, m, head_dim]`` to a cache and attends to it
    with `queries` ``[sequences, heads, m, head_dim]``; gives ``[sequences, m, heads, head_dim]``. `handle`
    stands for the cache. It says that it changes `handle`, so that compilers neither drop calls nor change
    their order. For inference, without gradients.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

__all__ = ["append_attend", "handle"]

_library = torch.library.Library("quantloom", "FRAGMENT")
_library.define(
    "kv_append_attend(Tensor queries, Tensor keys, Tensor values, Tensor? mask, Tensor(a!) handle,"
    " float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_caches: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def handle(cache: Any) -> torch.Tensor:
    """The tensor that stands for `cache`, as long as it lives: an object with the method `_append_attend`.

    A tensor and no number, for which a compiler would make new code with each cache.
    """
    number = next(_numbers)
    _caches[number] = cache
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def _append_attend(queries, keys, values, mask, handle, scale):
    return _caches[handle.item()]._append_attend(queries, keys, values, mask, scale)


def _append_attend_fake(queries, keys, values, mask, handle, scale):
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.device != queries.device:
            raise TypeError(f"{name}: got a tensor on {tensor.device}, expected one on {queries.device}")
    sequences, heads, tokens, dim = queries.shape
    return queries.new_empty((sequences, tokens, heads, dim))


_library.impl("kv_append_attend", _append_attend, "CompositeExplicitAutograd")
torch.library.register_fake("quantloom::kv_append_attend", _append_attend_fake, lib=_library)

append_attend = torch.ops.quantloom.kv_append_attend.default
