"""Finds the parts of a causal language model: decoder blocks, their Linears, and the order they run in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import quantloom as ql
from quantloom import _core
from quantloom.awq import ChannelScaling

__all__ = [
    "Block",
    "Targets",
    "check_integers",
    "find_blocks",
    "find_stages",
    "find_targets",
    "require_cuda_rounding",
]


@dataclass(frozen=True)
class Block:
    """One decoder block. `linears` maps full module names to its Linears, in the order of definition."""

    index: int
    name: str
    module: torch.nn.Module
    linears: dict[str, torch.nn.Linear]


def check_integers(*arguments: tuple[str, Any, int]) -> None:
    """Raises TypeError or ValueError for (name, value, least) that are no integers >= least."""
    for name, value, least in arguments:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an integer >= {least}")
        if value < least:
            raise ValueError(f"{name}: got {value}, expected an integer >= {least}")


def find_blocks(model: torch.nn.Module) -> list[Block]:
    """The decoder blocks of a model: the longest ModuleList whose items all hold Linears.

    Lists inside an item of another list (experts of a layer) do not count. Raises ValueError if there is
    no such list, or if blocks share a Linear.
    """
    lists: list[tuple[str, torch.nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(outer + ".") for outer, _ in lists):
            continue
        if all(any(isinstance(part, torch.nn.Linear) for part in item.modules()) for item in module):
            lists.append((name, module))
    if not lists:
        kinds = sorted({type(m).__name__ for m in model.modules() if next(m.children(), None) is None})
        raise ValueError(
            f"model {type(model).__name__}: found no list of decoder blocks that hold torch.nn.Linear; "
            f"its layers are {', '.join(kinds)}"
        )
    name, module = max(lists, key=lambda entry: len(entry[1]))
    blocks, owners = [], {}
    for index, item in enumerate(module):
        block_name = f"{name}.{index}"
        linears = {
            f"{block_name}.{inner}" if inner else block_name: part
            for inner, part in item.named_modules()
            if isinstance(part, torch.nn.Linear)
        }
        for linear_name, part in linears.items():
            if id(part) in owners:
                raise ValueError(
                    f"model: {linear_name} and {owners[id(part)]} are one shared Linear, expected two"
                )
            owners[id(part)] = linear_name
        blocks.append(Block(index, block_name, item, linears))
    return blocks


@dataclass(frozen=True)
class Targets:
    """Which Linears get which format. `formats` is in the order of blocks; `left` names the others."""

    formats: dict[str, Any]
    left: tuple[str, ...]


def find_targets(model: torch.nn.Module, blocks: list[Block], recipe: Any) -> Targets:
    """Applies a recipe to the Linears of a model.

    Linears outside the decoder blocks (heads, projections of embeddings) stay as they are. Raises
    ValueError if an override asks for one of those, if a pattern of the overrides matches nothing, if a
    layer has no size that the transform takes, or if nothing at all would be quantized.
    """
    inside = {name: part for block in blocks for name, part in block.linears.items()}
    outside = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in inside]
    for pattern, override in recipe.overrides.items():
        matched = [name for name in [*inside, *outside] if _matches(pattern, name)]
        if not matched:
            raise ValueError(f"recipe overrides: {pattern!r} matches no Linear of the model")
        if override is not None:
            for name in matched:
                if name not in inside and recipe.format_for(name) is override:
                    raise ValueError(
                        f"recipe overrides: {pattern!r} asks for {name}, which lies outside the decoder "
                        "blocks; only Linears inside them are quantized"
                    )
    formats, left = {}, list(outside)
    for name, part in inside.items():
        chosen = recipe.format_for(name)
        if chosen is None:
            left.append(name)
            continue
        chosen.planes(part.out_features, part.in_features)  # refuses sizes the format cannot take
        if recipe.transform is not None:
            try:
                recipe.transform.check(part.out_features, part.in_features)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        formats[name] = chosen
    if not formats:
        raise ValueError(
            "recipe: leaves every Linear of the model as it is, expected at least one to quantize"
        )
    return Targets(formats, tuple(left))


def _matches(pattern: str, name: str) -> bool:
    from quantloom.recipes import _matches as matches

    return matches(pattern, name)


def find_stages(block: Block, run: Callable[[], object], wanted: set[str]) -> list[tuple[str, ...]]:
    """Groups the Linears of a block by their input, in the order they run; only names in `wanted`.

    `run` runs the block once. Linears that read the very same tensor (query, key and value) form one stage
    and share a Hessian. Raises ValueError naming a wanted Linear that does not run exactly once: its
    inputs would be incomplete.
    """
    calls: dict[str, int] = dict.fromkeys(block.linears, 0)
    inputs: list[torch.Tensor] = []  # keeps the tensors alive, so that no address comes twice
    groups: list[list[str]] = []
    hooks = []

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def record(_: Any, args: tuple[Any, ...]) -> None:
            calls[name] += 1
            if name not in wanted:
                return
            x = args[0]
            for known, group in zip(inputs, groups, strict=True):
                if _same_tensor(known, x):
                    group.append(name)
                    return
            inputs.append(x)
            groups.append([name])

        return record

    try:
        for name, part in block.linears.items():
            hooks.append(part.register_forward_pre_hook(hook(name)))
        run()
    finally:
        for handle in hooks:
            handle.remove()
    for name in block.linears:
        if name in wanted and calls[name] != 1:
            raise ValueError(
                f"{name}: ran {calls[name]} times in one pass of its block, expected once; leave it out of "
                "the recipe (ignore), or quantize with Nearest and no calibration"
            )
    return [tuple(group) for group in groups]


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a._version == b._version
    )


def require_cuda_rounding(targets: Targets, device: str, rounding: Any) -> None:
    """Raises RuntimeError naming the first module that no CUDA kernel rounds so."""
    last = rounding.then if isinstance(rounding, ChannelScaling) else rounding
    if isinstance(last, ql.BeamSearch):
        return
    search = last.scale_search
    for name, form in targets.formats.items():
        if not _core.rounds_on_cuda(form.to_json()):
            raise RuntimeError(
                f"device: got {device!r}, but no CUDA kernel rounds to {form.spec}, the format of {name}; "
                "expected uniform, codebook, bcq, spqr, additive or a rotated trellis with a window of 16,"
                ' or "cpu"'
            )
        if isinstance(form, ql.Outliers) and not isinstance(last, ql.Nearest):
            raise RuntimeError(
                f"device: got {device!r}, but no CUDA kernel feeds back errors beside the outliers of"
                f' {form.spec}, the format of {name}; expected a search such as gptq:outliers=1%, or "cpu"'
            )
        if search is not None and isinstance(form, ql.Additive):
            raise RuntimeError(
                f"device: got {device!r}, but a scale search for {form.spec}, the format of {name}, runs on"
                ' the CPU only; expected none, or "cpu"'
            )
        if search is not None and search.output_error and getattr(form, "group_size", None) == "tensor":
            raise RuntimeError(
                f"device: got {device!r}, but a search by output error for {form.spec}, the format of {name},"
                " runs on the CPU only; expected another scale search, or groups"
            )
