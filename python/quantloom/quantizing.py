"""``quantize``: from a weight matrix to a packed tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core, _devices
from quantloom.calibration import Hessian, require_same_device
from quantloom.formats import Format, Outliers, Trellis, format_from_json, parse_format
from quantloom.rounding import GPTQ, HESSIANS, Nearest, Rounding, RoundingReport
from quantloom.tensors import PackedTensor
from quantloom.transforms import Transform, parse_transform

__all__ = ["empty_planes", "quantize", "quantize_trellis", "require_hessians"]


def quantize(
    w: Any,
    format: Format | str,
    rounding: Rounding | None = None,
    *,
    transform: Transform | str | None = None,
    threads: int = 0,
) -> PackedTensor:
    """Compresses a weight matrix.

    Args:
        w: ``[out_features, in_features]``, finite float32, float16 or bfloat16: a NumPy array, a torch
            tensor on the CPU or a CUDA device, or anything with ``__dlpack__`` (then the planes are NumPy
            arrays). Rows may be strided, elements of a row must be next to each other.
        format: a ``Format`` or its short form.
        rounding: ``Nearest()`` (the default), ``GPTQ(hessian)``, ``AWQ(hessian=...)``,
            ``SmoothQuant(inputs=...)``, or ``BeamSearch(hessian)`` for an ``additive`` format; Hessians on
            the device of `w`.
        transform: None, a ``Transform`` such as ``Hadamard(block=128)`` or its short form: the basis in which
            codes are chosen. W is rotated in float32, Hessians in float64, on the CPU. The losses of the
            report are the same in either basis, up to roundings.
        threads: 0 for OpenMP's default. The result does not depend on it.

    Returns a ``PackedTensor`` whose planes are of the same kind and on the same device as `w` and whose
    ``report`` says what was done. Raises TypeError (kind, dtype, device), ValueError (shape, NaN or infinite
    values by row and column, a Hessian of another size or that cannot be factored) before anything is
    computed.

    On a CUDA device the work runs on torch's current stream, and the host waits for it. There, nearest
    rounding gives the CPU's codes and scales bit for bit (but a search by output error sums in another order,
    so that factors whose errors agree to about 1e-5 may change places); GPTQ takes its sums in another
    order, so that weights close to the middle between two codes may take the other one. A ``trellis`` takes
    no scale search there, and its rings are searched with float16 costs: other codes, at an error within
    0.03% on normal weights. Of ``additive`` formats, tables of more than 1024 entries start from other
    blocks of W, and there is no scale search. ``BeamSearch`` sums in another order, too. Raises RuntimeError
    for formats other than ``uniform``, ``codebook``, ``bcq``, ``spqr``, ``additive`` (without levels of
    scales and tables), for ``Nearest`` those with ``outliers``, and a ``trellis`` with its rotation and a
    window of 16, and where cuBLAS or cuSOLVER is missing.
    """
    matrix = _arrays.matrix("w", w, cpu=False)
    format = parse_format(format)
    rounding = Nearest() if rounding is None else rounding
    from quantloom.awq import AWQ, ChannelScaling, quantize_scaled
    from quantloom.beam_search import BeamSearch, quantize_searched, require_additive

    if not isinstance(rounding, (Nearest, GPTQ, ChannelScaling, BeamSearch)):
        names = "Nearest(...), GPTQ(...), AWQ(...), SmoothQuant(...) or BeamSearch(...)"
        raise TypeError(f"rounding: got {_checks.type_name(rounding)}, expected {names}")
    require_additive(rounding, format)
    threads = _checks.thread_count(threads)
    require_hessians(matrix, rounding)
    if isinstance(rounding, (GPTQ, BeamSearch)) and rounding.hessian is None:
        name = type(rounding).__name__
        raise ValueError(f"rounding: got {name} without a hessian, expected {name}(hessian)")
    transform = parse_transform(transform)
    if isinstance(rounding, ChannelScaling):
        if transform is not None:
            raise ValueError(
                f"transform: got {transform.spec}, expected None: {type(rounding).__name__} makes a transform"
                " of its own"
            )
        if not isinstance(rounding, AWQ):
            from quantloom.smoothquant import quantize_smoothed

            return quantize_smoothed(matrix.value, format, rounding, threads)
        return quantize_scaled(matrix.value, format, rounding, threads)
    if transform is not None:
        if getattr(rounding, "output_hessian", None) is not None:
            raise ValueError(
                f"output_hessian: got one with the transform {transform.spec}, expected None: a trellis has a"
                " basis of its own"
            )
        return _quantize_transformed(matrix, format, rounding, transform, threads)
    if isinstance(rounding, BeamSearch):
        if matrix.device != "cpu":
            _require_kernels(matrix)
        return quantize_searched(matrix, format, rounding, threads)
    trellis = isinstance(format, Trellis) and format.rotation is not None
    if isinstance(rounding, GPTQ):
        if trellis and rounding.scale_search is None and rounding.outliers is None:
            return quantize_trellis(matrix, format, rounding, threads)
        for name in ("ratio_factors", "output_hessian"):
            value = getattr(rounding, name)
            if value is not None and not trellis:
                raise ValueError(
                    f"{name}: got {value!r} for {format.spec}, expected None: it is for a trellis with its"
                    " rotation"
                )
    search = rounding.scale_search and (
        rounding.scale_search.steps,
        rounding.scale_search.smallest,
        rounding.scale_search.norm,
        rounding.scale_search.output_error,
    )
    budget = getattr(rounding, "outliers", None)
    outliers = None if budget is None else (budget.percent, budget.bits, budget.threshold)
    hessian = rounding.hessian and rounding.hessian._core
    held_out = rounding.held_out and rounding.held_out._core
    if matrix.device != "cpu":
        return _quantize_cuda(matrix, format, rounding, search, outliers, hessian, held_out)
    if isinstance(rounding, GPTQ):
        packed, report = _core.round_error_feedback(
            matrix.core,
            format.to_json(),
            hessian,
            rounding.damp,
            list(rounding.damp_ladder),
            rounding.act_order,
            rounding.static_groups,
            rounding.block,
            search,
            outliers,
            held_out,
            threads,
        )
    else:
        packed, report = _core.round_nearest(
            matrix.core, format.to_json(), search, hessian, held_out, threads
        )
    report["damping_tried"] = tuple(report["damping_tried"])
    return PackedTensor._from_core(packed, matrix.kind, RoundingReport(**report))


def require_hessians(matrix: _arrays.Array, rounding: Rounding) -> None:
    n, k = matrix.shape
    for name in HESSIANS:
        hessian = getattr(rounding, name, None)
        if hessian is None:
            continue
        if name == "output_hessian" and hessian.k != n:
            raise ValueError(f"{name}: got a Hessian of {hessian.k} outputs, expected {n}, as w has rows")
        if name != "output_hessian" and hessian.k != k:
            raise ValueError(f"{name}: got a Hessian of {hessian.k} inputs, expected {k}, as w has columns")
        require_same_device(name, hessian, matrix.device)


def quantize_trellis(
    matrix: _arrays.Array,
    format: Trellis,
    rounding: GPTQ,
    threads: int,
    consistent_hessian: bool = True,
    refit: bool = True,
) -> PackedTensor:
    """GPTQ to a rotated trellis, of arguments that are checked."""
    choices = (
        rounding.hessian._core,
        consistent_hessian,
        refit,
        list(rounding.ratio_factors or ()),
        rounding.damp,
        list(rounding.damp_ladder),
        rounding.act_order,
        rounding.block,
        rounding.held_out and rounding.held_out._core,
        rounding.output_hessian and rounding.output_hessian._core,
    )
    if matrix.device == "cpu":
        packed, report = _core.round_trellis_feedback(matrix.core, format.to_json(), *choices, threads)
        report["damping_tried"] = tuple(report["damping_tried"])
        return PackedTensor._from_core(packed, matrix.kind, RoundingReport(**report))
    _require_cuda_rounding(matrix, format, rounding)
    planes = empty_planes(format, matrix)
    packed = PackedTensor(format, matrix.shape, planes)._core()
    with _devices.current(matrix.device) as stream:
        report = _core.round_trellis_feedback_cuda(matrix.core, packed, *choices, stream)
    report["damping_tried"] = tuple(report["damping_tried"])
    return PackedTensor(format, matrix.shape, planes, RoundingReport(**report))


def _quantize_transformed(
    matrix: _arrays.Array, format: Format, rounding: Rounding, transform: Transform, threads: int
) -> PackedTensor:
    transform.check(*matrix.shape)
    w = _arrays.cast(matrix.value, "float32")
    finite = w.isfinite() if matrix.kind == "torch" else np.isfinite(w)
    if not bool(finite.all()):
        row, column = np.argwhere(~np.asarray(finite.cpu() if matrix.kind == "torch" else finite))[0].tolist()
        got = float(w[row, column])
        raise ValueError(f"w: got {got} at row {row}, column {column}, expected finite values")
    rotated = transform.rotate_weight(w, threads=threads)
    hessians = {
        name: _rotated(getattr(rounding, name), transform)
        for name in ("hessian", "held_out")
        if getattr(rounding, name) is not None
    }
    q = quantize(rotated, format, replace(rounding, **hessians), threads=threads)
    return PackedTensor(q.format, q.shape, q.planes, q.report, transform)


def _rotated(hessian: Hessian, transform: Transform) -> Hessian:
    if hessian.tokens == 0 or not transform.has_input:
        return hessian
    total = transform.rotate_hessian(hessian.sum())
    # Exactly symmetric again, and nothing negative by a rounding on the diagonal.
    total = (total + total.T) / 2
    np.fill_diagonal(total, np.maximum(total.diagonal(), 0))
    return Hessian.from_sum(total, hessian.tokens).to(hessian.device)


def _require_kernels(matrix: _arrays.Array) -> None:
    if not _core.built_with_cuda():
        raise RuntimeError(
            f"w: got a tensor on {matrix.device}, but this build of quantloom has no CUDA kernels"
            " (pass w.cpu())"
        )


def _require_cuda_rounding(matrix: _arrays.Array, format: Format, rounding: Rounding) -> None:
    _require_kernels(matrix)
    if not _core.rounds_on_cuda(format.to_json()):
        raise RuntimeError(
            f"format: got {format.spec} for a tensor on {matrix.device}, but no CUDA kernel rounds to it;"
            " expected uniform, codebook, bcq, spqr, additive or a rotated trellis with a window of 16, or"
            " w.cpu()"
        )
    if isinstance(rounding, GPTQ) and isinstance(format, Outliers):
        raise RuntimeError(
            f"format: got {format.spec} for a tensor on {matrix.device}, but there errors are fed back beside"
            " outliers that GPTQ(outliers=...) finds; expected that, or w.cpu()"
        )


def _quantize_cuda(
    matrix: _arrays.Array,
    format: Format,
    rounding: Rounding,
    search: Any,
    outliers: Any,
    hessian: Any,
    held_out: Any,
) -> PackedTensor:
    _require_cuda_rounding(matrix, format, rounding)
    indexed = isinstance(rounding, GPTQ) and _core.walk_needs_group_index(
        format.to_json(), matrix.shape[1], rounding.act_order, rounding.static_groups
    )
    planes = empty_planes(format, matrix, indexed)
    packed = PackedTensor(format, matrix.shape, planes)._core()
    with _devices.current(matrix.device) as stream:
        if isinstance(rounding, GPTQ):
            report = _core.round_error_feedback_cuda(
                matrix.core,
                packed,
                hessian,
                rounding.damp,
                list(rounding.damp_ladder),
                rounding.act_order,
                rounding.static_groups,
                rounding.block,
                search,
                outliers,
                held_out,
                stream,
            )
        else:
            report = _core.round_nearest_cuda(matrix.core, packed, search, hessian, held_out, stream)
    report["damping_tried"] = tuple(report["damping_tried"])
    kept = {
        name: planes[name] if name in planes else _copied_plane(packed, name, matrix.device)
        for name in _core.packed_plane_names(packed)
    }
    if packed.format_json != format.to_json():  # with outliers, as many as were found
        format = format_from_json(packed.format_json)
    return PackedTensor(format, matrix.shape, kept, RoundingReport(**report))


class _DeviceMemory:
    """What torch makes a tensor of without copying."""

    def __init__(self, address: int, shape: list[int], dtype: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": tuple(shape),
            "typestr": {"int32": "<i4", "uint16": "<i2", "float16": "<f2"}[dtype],
            "version": 2,
        }


def _copied_plane(packed: Any, name: str, device: str) -> Any:
    """A plane that a rounding on the device has added, in memory of torch."""
    import torch

    address, shape, dtype = _core.plane_memory(packed, name)
    if 0 in shape:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    plane = torch.as_tensor(_DeviceMemory(address, shape, dtype), device=device).clone()
    torch.cuda.current_stream(plane.device).synchronize()  # before the memory is given back
    return plane.view(torch.uint16) if dtype == "uint16" else plane


def empty_planes(format: Format, matrix: _arrays.Array, indexed: bool = False) -> dict[str, Any]:
    """Planes for a matrix, on its CUDA device, not initialized; `indexed`: with the plane group_index."""
    import torch

    return {
        plane["name"]: torch.empty(plane["shape"], dtype=getattr(torch, plane["dtype"]), device=matrix.device)
        for plane in _core.format_planes(format.to_json(), *matrix.shape)
        if not plane["optional"] or (indexed and plane["name"] == "group_index")
    }
