"""Predicts memory, time and size of a run before any work.

Peak memory is the peak resident set of the process (``VmHWM`` of Linux): anonymous memory plus the pages of
mapped files that were touched and are still in memory. Mapped pages of the model are counted in full,
although the system may drop them when memory is short.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantloom as ql
from quantloom import _checks
from quantloom.models.costs import (
    distillation_flops,
    forward_flops,
    hessian_flops,
    loss_flops,
    rounding_flops,
    search_flops,
)
from quantloom.models.distillation import check_distillation, window_passes
from quantloom.models.layouts import LAYOUTS, refusal
from quantloom.models.report import rounding_name
from quantloom.models.source import ModelFolder, build_skeleton, model_names
from quantloom.models.structure import Block, check_integers, find_blocks, find_targets

__all__ = ["ModulePlan", "Plan", "plan"]

_MB = 1 << 20
# Buffers that libraries keep once they have worked: threads' stacks and scratch of matrix products,
# freed memory that the allocator holds on to.
_SCRATCH = 20 * _MB
_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ModulePlan:
    """One Linear: its format, the exact size it is stored in, and why an export layout refuses it, if so.

    `outlier_columns`: those in float16 beside the codes, for static outliers of activations. Unless the
    recipe names them it is an assumption, as calibration finds them, and so are then the format and the bits.
    """

    name: str
    shape: tuple[int, int]
    format: str
    bits: int
    bits_per_weight: float
    refusal: str | None = None
    outlier_columns: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        peak_bytes: peak resident memory of a process that makes this plan and then the run.
        parts: what `peak_bytes` consists of, in bytes by name, in the phase that needs most.
        seconds: estimated time, from rates measured just now.
        output_bytes: tensor data of the checkpoint, exact but for `outlier_share`.
        work_bytes: disk space needed in the output folder while the run lasts, beside the checkpoint.
        bits_per_weight: of the quantized Linears, all side information included.
        modules: one entry for each Linear to be quantized.
        unquantized: the Linears that stay as they are.
        outlier_share: the share of the columns of Linears with static outliers that were taken to be some;
            None if none had to be assumed.
    """

    peak_bytes: int
    parts: dict[str, int]
    seconds: float
    output_bytes: int
    work_bytes: int
    bits_per_weight: float
    modules: tuple[ModulePlan, ...]
    unquantized: tuple[str, ...] = field(default=())
    outlier_share: float | None = None

    @property
    def refusals(self) -> dict[str, str]:
        """Reasons by module for those that the export layout cannot hold."""
        return {module.name: module.refusal for module in self.modules if module.refusal}


def plan(
    model_path: str | Path,
    recipe: Any,
    *,
    calibrated: bool | None = None,
    windows: int = 64,
    window: int = 512,
    held_out_windows: int = 8,
    threads: int = 0,
    layout: str | None = None,
    outlier_share: float = 0.01,
) -> Plan:
    """Predicts what ``quantize`` will take; arguments as there.

    Only the config and the headers of the weights are read; rates are measured for a fraction of a second.

    Args:
        calibrated: whether calibration is given; None: where the rounding needs it.
        layout: an export layout that every module must fit, see ``Plan.refusals``.
        outlier_share: of the inputs of a Linear whose activations have static outliers: those taken to be
            outliers, from 0 to 1, rounded up to whole columns. Calibration finds the real ones; a column of
            them costs 32 bits for each of its weights.

    Raises ValueError, TypeError or OSError as ``quantize`` does.
    """
    check_integers(
        ("windows", windows, 1),
        ("window", window, 1),
        ("held_out_windows", held_out_windows, 0),
        ("threads", threads, 0),
    )
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected None or one of {', '.join(LAYOUTS)}")
    if not isinstance(recipe, ql.Recipe):
        raise TypeError(f"recipe: got {type(recipe).__name__}, expected a Recipe")
    outlier_share = _checks.real("outlier_share", outlier_share)
    if not 0 <= outlier_share <= 1:
        raise ValueError(f"outlier_share: got {outlier_share}, expected a number from 0 to 1")
    distillation = recipe.distillation
    gptq = "gptq" in rounding_name(recipe.rounding)
    steps = getattr(recipe.rounding, "steps", 0)
    formats = [recipe.activations, *recipe.activation_overrides.values()]
    needed = not isinstance(recipe.rounding, ql.Nearest) or distillation is not None
    needed = needed or any(form is not None and not form.calibrated for form in formats)
    calibrated = needed if calibrated is None else calibrated
    if needed and not calibrated:
        raise ValueError("calibrated: got False, expected True: the recipe needs calibration")
    folder = ModelFolder(model_path)
    model = build_skeleton(folder.path)
    blocks = find_blocks(model)
    targets = find_targets(model, blocks, recipe)
    check_distillation(recipe, targets, held_out_windows)
    sizes = {
        name: (linear.out_features, linear.in_features)
        for block in blocks
        for name, linear in block.linears.items()
        if name in targets.formats
    }
    modules = tuple(
        _module(
            name,
            recipe.rounding.stored_format(targets.formats[name], *shape),
            *shape,
            layout,
            _outlier_columns(recipe.activations_for(name), shape[1], outlier_share),
        )
        for name, shape in sizes.items()
    )
    tokens = (windows + held_out_windows) * window if calibrated else 0
    seconds = _seconds(folder, blocks, sizes, tokens, window, gptq, threads, steps)
    searched = isinstance(recipe.rounding, ql.BeamSearch)
    if searched:
        seconds += _search_seconds(sizes, targets.formats, recipe.rounding, threads)
    passes = 0 if distillation is None else window_passes(distillation, windows, held_out_windows)
    seconds += _distillation_seconds(sizes, window, passes)
    bits = sum(module.bits for module in modules)
    hessians = (2 if held_out_windows else 1) if calibrated else 0
    rotates = recipe.transform is not None
    phases = _phases(folder, model, blocks, sizes, bits // 8, hessians, window, gptq, threads, rotates)
    if searched:
        memory = max(_search_bytes(*shape, recipe.rounding.beam, threads) for shape in sizes.values())
        phases["quantize"]["working memory"] = max(phases["quantize"]["working memory"], memory)
    if steps:
        phases["scale"] = _scaling(phases["quantize"], blocks, sizes, threads)
    if passes:
        phases["distil"] = _distillation(phases["quantize"], model, blocks, sizes, window)
    worst = max(phases.values(), key=lambda parts: sum(parts.values()))
    parts = {"process": _resident_bytes(), "scratch of libraries": _SCRATCH} | worst
    names, _ = model_names(model, folder.tensors)
    kept = sum(
        folder.tensors[stored].bytes
        for stored, name in names.items()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in sizes)
    )
    weights = sum(n * k for n, k in sizes.values())
    hidden = _hidden_size(model)
    states = (tokens if distillation is None else 2 * tokens) * hidden * 4
    embeddings = sum(e.numel() * 4 for e in _embeddings(model)) if calibrated else 0
    return Plan(
        peak_bytes=sum(parts.values()),
        parts=parts,
        seconds=seconds,
        output_bytes=bits // 8 + kept,
        work_bytes=bits // 8 + max(2 * states, tokens * hidden * 4 + embeddings),
        bits_per_weight=bits / weights,
        modules=modules,
        unquantized=targets.left,
        outlier_share=outlier_share
        if any(_unknown_share(recipe.activations_for(n)) for n in sizes)
        else None,
    )


def _assumed(activations: Any) -> bool:
    """Whether calibration has outliers to find."""
    return activations is not None and activations.static_outliers and activations.outlier_columns is None


def _unknown_share(activations: Any) -> bool:
    return _assumed(activations) and activations.outlier_percent is None


def _outlier_columns(activations: Any, k: int, share: float) -> int:
    """Columns of weights that stay in float16."""
    if _assumed(activations):
        percent = activations.outlier_percent
        return math.ceil(round((share if percent is None else percent / 100) * k, 6))
    return len((activations and activations.outlier_columns) or ())


def _module(name: str, form: Any, n: int, k: int, layout: str | None, columns: int) -> ModulePlan:
    if columns:
        form = ql.Outliers(form, count=n * columns)
    bits = form.size_in_bits(n, k)
    reason = refusal(form, n, k, layout) if layout is not None else None
    return ModulePlan(name, (n, k), form.spec, bits, bits / (n * k) if n * k else 0.0, reason, columns)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _embeddings(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            yield module.weight


def _hidden_size(model: torch.nn.Module) -> int:
    size = getattr(model.config, "hidden_size", None)
    return int(size) if size else next(_embeddings(model)).shape[1]


# -- memory ------------------------------------------------------------------------------------------


def _phases(
    folder: ModelFolder,
    model: torch.nn.Module,
    blocks: list[Block],
    sizes: dict[str, tuple[int, int]],
    records: int,
    hessians: int,
    window: int,
    gptq: bool,
    threads: int,
    rotates: bool,
) -> dict[str, dict[str, int]]:
    """What each phase of a run holds beyond the process itself, in bytes by name.

    `hessians`: gathered at a time, 0 without calibration. `records`: bytes of all packed modules.
    """
    names, _ = model_names(model, folder.tensors)
    prefixes = tuple(f"{block.name}." for block in blocks)
    embeddings = {
        f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)
    }
    inner = sum(folder.tensors[s].bytes for s, name in names.items() if name.startswith(prefixes))
    embedded = [folder.tensors[stored] for stored, name in names.items() if name in embeddings]
    save = {
        "mapped pages of the model": folder.bytes,
        "mapped pages of the records": min(records, _SHARD_BYTES),
    }
    rounding = {shape: _rounding_bytes(*shape, gptq, hessians > 0, threads) for shape in sizes.values()}
    if rotates:
        rounding = {shape: _rotated_bytes(*shape, count, hessians) for shape, count in rounding.items()}
    if not hessians:
        quantize = {"mapped pages of the model": inner, "working memory": max(rounding.values())}
        return {"quantize": quantize, "save": save}
    block = max(4 * sum(p.numel() for p in block.module.parameters()) for block in blocks)
    activations = _activation_bytes(model, blocks, window)
    before = inner + sum(tensor.bytes for tensor in embedded)
    # The stage whose Hessians and working copies together are the largest.
    n, k = max(rounding, key=lambda shape: 8 * shape[1] ** 2 * hessians + rounding[shape])
    return {
        "capture": {
            "mapped pages of the model": before,
            "mapped pages of embeddings in float32": sum(
                4 * t.elements for t in embedded if t.dtype != "F32"
            ),
            "one block in float32": block,
            "working memory": activations,
        },
        "quantize": {
            "mapped pages of the model": before,
            "one block in float32": block,
            "Hessians of one stage": 8 * k * k * hessians,
            "working memory": max(rounding[n, k], activations),
        },
        "save": save,
    }


def _rounding_bytes(n: int, k: int, gptq: bool, measured: bool, threads: int) -> int:
    """Working memory while one matrix is quantized."""
    codes = -(-n // 64) * 64 * k
    workers = threads or os.cpu_count() or 1
    slabs = 4 * 2 * 256 * k * min(workers, -(-n // 256)) if gptq else 4 * 64 * k * workers
    factor = 8 * k * k + 8 * 128 * k if gptq else 0
    errors = 4 * min(n, 1024) * k if measured else 0
    decoded = 4 * n * k if measured else 0
    return max(codes + factor + slabs, (2 if gptq else 1) * (codes + codes // 2) + errors, decoded)


def _search_bytes(n: int, k: int, beam: int, threads: int) -> int:
    """The same of a beam search: W, its values and their products with H in float32, H in float32, and the
    errors of all hypotheses of 64 rows for each thread."""
    workers = min(threads or os.cpu_count() or 1, -(-n // 64))
    return 4 * k * k + 12 * n * k + 4 * 64 * k * workers * (2 * beam if beam > 1 else 1)


def _rotated_bytes(n: int, k: int, rounding: int, hessians: int) -> int:
    """The same of a matrix that is rotated: W and its Hessians once more, and copies while H is turned."""
    matrices, square = 2 * 4 * n * k, 8 * k * k
    turning = (hessians + 3) * square if hessians else 0
    return matrices + max(rounding + hessians * square, turning)


def _scaling(
    quantize: dict[str, int], blocks: list[Block], sizes: dict[str, tuple[int, int]], threads: int
) -> dict[str, int]:
    """The search for channel scales of a block: the Hessians of all its stages at once, one of them scaled
    twice over, and a scaled copy of one matrix that is rounded to nearest."""
    widths = {
        block.name: _stages([block], {name: sizes[name] for name in block.linears if name in sizes})
        for block in blocks
    }
    hessians = max((sum(8 * k * k for k in of_block) for of_block in widths.values()), default=0)
    working = max(
        2 * 8 * k * k + 4 * n * k + _rounding_bytes(n, k, False, True, threads) for n, k in sizes.values()
    )
    return quantize | {"Hessians of one stage": hessians, "working memory": working}


def _distillation(
    quantize: dict[str, int], model: torch.nn.Module, blocks: list[Block], sizes: dict[str, tuple[int, int]],
    window: int,
) -> dict[str, int]:  # fmt: skip
    """Training a block: of its quantized weights, in float32 each, what they were, are, are trained to be and
    as they are rounded, gradients, the optimizer's two moments and the best so far; of activations, what the
    way back needs."""
    trained = max(
        4 * sum(math.prod(sizes[name]) for name in block.linears if name in sizes) for block in blocks
    )
    largest = max(4 * n * k for n, k in sizes.values())
    activations = 3 * _activation_bytes(model, blocks, window)
    rest = {name: count for name, count in quantize.items() if name != "Hessians of one stage"}
    return rest | {"weights in training": 8 * trained + 3 * largest, "working memory": activations}


def _activation_bytes(model: torch.nn.Module, blocks: list[Block], window: int) -> int:
    """One window through one block: every Linear's output, and the attention scores of all heads."""
    outputs = max(sum(linear.out_features for linear in block.linears.values()) for block in blocks)
    heads = getattr(model.config, "num_attention_heads", 1)
    return 4 * window * (outputs + 4 * _hidden_size(model)) + 4 * heads * window * window


# -- time --------------------------------------------------------------------------------------------


def _seconds(
    folder: ModelFolder, blocks: list[Block], sizes: dict[str, tuple[int, int]], tokens: int, window: int,
    gptq: bool, threads: int, steps: int,
) -> float:  # fmt: skip
    """Arithmetic over measured rates, plus reading and writing."""
    widest = max(k for _, k in sizes.values())
    tallest = max(n for n, _ in sizes.values())
    generator = np.random.default_rng(0)
    k, n, rows = min(widest, 768), min(tallest, 768), min(window, 512)
    x = generator.standard_normal((rows, k), dtype=np.float32)
    w = generator.standard_normal((n, k), dtype=np.float32)
    seconds = 4.0 * folder.bytes / 1e9  # hashing, scanning, writing
    hessian = ql.Hessian(k)
    if tokens:
        a, b = torch.from_numpy(x), torch.from_numpy(w)
        forward = _best(lambda: torch.nn.functional.linear(a, b)) / (2.0 * n * k * rows)
        seconds += forward * sum(forward_flops(*size, tokens) for size in sizes.values())
        gather = _best(lambda: hessian.add(x, threads=threads)) / hessian_flops(k, rows)
        passes = 2 if steps else 1
        seconds += gather * passes * sum(hessian_flops(width, tokens) for width in _stages(blocks, sizes))
        seconds += gather * sum(loss_flops(*size, steps) for size in sizes.values())
    rounding = ql.GPTQ(hessian=hessian) if gptq else ql.Nearest()
    once = _best(lambda: ql.quantize(w, "uniform:4:g128", rounding, threads=threads), repeats=2)
    rate = once / rounding_flops(n, k, gptq)
    seconds += rate * sum(rounding_flops(*size, gptq) for size in sizes.values())
    if steps:
        nearest = _best(lambda: ql.quantize(w, "uniform:4:g128", threads=threads), repeats=2) / (n * k)
        seconds += nearest * steps * sum(n * k for n, k in sizes.values())
    return seconds


def _search_seconds(
    sizes: dict[str, tuple[int, int]], formats: Mapping[str, Any], rounding: Any, threads: int
) -> float:
    """By the rate of one round for a small matrix of each format."""
    n = k = 256
    w = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    hessian = ql.Hessian(k)
    hessian.add(w)
    one = replace(rounding, hessian=hessian, rounds=1)
    seconds = 0.0
    for form in set(formats.values()):
        rate = _best(lambda form=form: ql.quantize(w, form, one, threads=threads), repeats=1)
        rate /= search_flops(n, k, form, one)
        seconds += rate * sum(
            search_flops(*size, form, rounding) for name, size in sizes.items() if formats[name] == form
        )
    return seconds


def _distillation_seconds(sizes: dict[str, tuple[int, int]], window: int, passes: int) -> float:
    """By the rate of a matrix product; rounding and attention take about as long again as they are small."""
    if not passes:
        return 0.0
    n, k = (min(768, max(size[i] for size in sizes.values())) for i in (0, 1))
    x, w = torch.ones(min(window, 512), k), torch.ones(n, k)
    rate = _best(lambda: torch.nn.functional.linear(x, w)) / (2.0 * n * k * len(x))
    return 2 * rate * sum(distillation_flops(*size, window, passes) for size in sizes.values())


def _best(work: Any, repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


def _stages(blocks: list[Block], sizes: dict[str, tuple[int, int]]) -> list[int]:
    """The widths of the Hessians to gather. Which Linears share one shows only when the block runs; those of
    one parent module with the same in_features are taken to."""
    widths = []
    for block in blocks:
        groups = {(name.rpartition(".")[0], sizes[name][1]) for name in block.linears if name in sizes}
        widths += [width for _, width in groups]
    return widths
