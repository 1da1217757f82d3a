"""Columns of weights in float16, for the inputs that activations keep as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from quantloom import _arrays, _checks
from quantloom.formats import Outliers
from quantloom.tensors import PackedTensor

__all__ = ["keep_columns"]


def keep_columns(q: PackedTensor, w: Any, columns: Iterable[int], threads: int = 0) -> PackedTensor:
    """`q` with some columns of W in float16 beside the codes, as the format ``Outliers``: what LLM.int8()
    (Dettmers et al., 2022) multiplies outlier inputs with. A column costs 32 bits for each of its weights.

    Args:
        q: W as it was quantized, of any format but ``Outliers``, with a transform or none.
        w: W itself, ``[n, k]``.
        columns: their numbers; with a transform, those of the inputs as it leaves them.
        threads: 0 for OpenMP's default.

    Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    if isinstance(q.format, Outliers):
        raise ValueError(f"q: got the format {q.format.spec}, expected one without outliers")
    n, k = q.shape
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable):
        raise TypeError(f"columns: got {_checks.type_name(columns)}, expected numbers of columns")
    kept = sorted({_checks.integer("columns", column, 0) for column in columns})
    if kept and kept[-1] >= k:
        raise ValueError(f"columns: got {kept[-1]}, expected numbers below {k}, the columns of W")
    value = w.detach().cpu() if _arrays.is_torch(w) else w
    value = np.asarray(_arrays.cast(_arrays.matrix("w", value, shape=q.shape).value, "float32"))
    if not kept or not n:
        return q
    if q.transform is not None:
        value = q.transform.rotate_weight(value, threads=threads)
    host = PackedTensor(q.format, q.shape, q.to("cpu").planes)
    decoded = np.asarray(host.dequantize("float32", threads=threads))
    missing = (value[:, kept] - decoded[:, kept]).astype(np.float16)
    if not np.isfinite(missing).all():
        raise ValueError(
            "w: got weights that float16 cannot hold beside the dense value, expected smaller ones"
        )
    planes = {
        "outlier_offsets": np.arange(n + 1, dtype=np.int32) * np.int32(len(kept)),
        "outlier_columns": np.tile(np.asarray(kept, np.uint16 if k <= 65536 else np.int32), n),
        "outlier_values": missing.reshape(-1),
    }
    if q.kind == "torch":
        planes = {name: _arrays.to_kind(plane, plane.dtype.name, "torch") for name, plane in planes.items()}
    count = n * len(kept)
    report = None if q.report is None else replace(q.report, outliers=count)
    planes = dict(host.planes) | planes
    result = PackedTensor(Outliers(q.format, count=count), q.shape, planes, report, q.transform)
    return result if q.device == "cpu" else result.to(q.device)
