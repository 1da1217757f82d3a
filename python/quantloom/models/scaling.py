"""Scales of input channels inside a decoder block, and where they go.

Linears that read one tensor share the scales s of its channels: their columns are multiplied by s, and what
made the tensor is divided by it. That is the gains of a norm, or the rows of a Linear whose outputs reach the
readers through nothing but sums and products (values and attention, the ungated half of an MLP). Whether a
division is exact is not deduced from the names of a model: every one is tried on real hidden states, and
taken back if the readers' outputs change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import quantloom as ql
from quantloom.models.calibration import BlockCall, HiddenStates, TokenWindows, run_block
from quantloom.models.channel_statistics import ChannelStatistics, statistics_for
from quantloom.models.structure import Block, _same_tensor, find_stages

__all__ = ["StageScaling", "apply_scaling", "read_scaling", "search_scaling", "write_scaling"]

# Linears whose rows can be divided in place of the readers' inputs, by the ends of their names.
_SOURCES = {
    "o_proj": ("v_proj",),
    "out_proj": ("v_proj",),
    "dense": ("v_proj",),
    "down_proj": ("up_proj",),
    "fc2": ("fc1",),
    "w2": ("w3",),
}
_TOLERANCE = 1e-4  # of the readers' outputs in float32
_NORM_RANGE = 1.25  # between a scale asked for and the one that the norm's stored gains give


@dataclass
class StageScaling:
    """What becomes of one stage: the Linears that share an input.

    Attributes:
        modules: their names.
        into: the module that was divided; "input": nothing was, the readers' inputs are at run time; "": no
            scales, although those of an `exponent` above 0 would have helped.
        exponent, loss, loss_unscaled: see ``quantloom.ScaleChoice``.
        columns: float64 ``[k]``: what the columns of `modules` are multiplied by.
        codes: int8 ``[k]`` if `into` is "input".
        rows: float64: what the rows of `into` are divided by, if that is a Linear.
        replaced: parameters with their new values in the dtypes of the model's files, by full name.
    """

    modules: tuple[str, ...]
    into: str = ""
    exponent: float = 0.0
    loss: float = 0.0
    loss_unscaled: float = 0.0
    columns: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)


# -- records -----------------------------------------------------------------------------------------


def write_scaling(stages: Iterable[StageScaling]) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors and a description that ``read_scaling`` reads back."""
    tensors, entries = {}, []
    for index, stage in enumerate(stages):
        for name in ("columns", "codes", "rows"):
            value = getattr(stage, name)
            if value is not None:
                tensors[f"{index}.{name}"] = value.cpu().contiguous()
        tensors |= {f"{index}.replaced.{name}": value for name, value in stage.replaced.items()}
        entries.append(
            {
                "modules": list(stage.modules),
                "into": stage.into,
                "exponent": stage.exponent,
                "loss": stage.loss,
                "loss_unscaled": stage.loss_unscaled,
            }
        )
    return tensors, json.dumps(entries)


def read_scaling(tensors: dict[str, torch.Tensor], description: str) -> list[StageScaling]:
    stages = []
    for index, entry in enumerate(json.loads(description)):
        entry["modules"] = tuple(entry["modules"])
        for name in ("columns", "codes", "rows"):
            entry[name] = tensors.get(f"{index}.{name}")
        prefix = f"{index}.replaced."
        replaced = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        stages.append(StageScaling(**entry, replaced=replaced))
    return stages


# -- applying ----------------------------------------------------------------------------------------


def _set(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, torch.nn.Parameter(value.to(old.device, torch.float32), requires_grad=False))


def _inner(block: Block, name: str) -> str:
    return name.removeprefix(f"{block.name}.")


def apply_scaling(block: Block, stage: StageScaling) -> None:
    """Multiplies and divides the float32 weights of a block; scales beside the weights change nothing."""
    if stage.into in ("", "input"):
        return
    for name in stage.modules:
        linear = block.linears[name]
        columns = stage.columns.to(linear.weight.device)
        _set(linear, "weight", linear.weight.detach().double() * columns)
    if stage.rows is not None:
        source = block.linears[stage.into]
        _set(source, "weight", source.weight.detach().double() / stage.rows.to(source.weight.device)[:, None])
    for name, value in stage.replaced.items():
        owner, _, leaf = _inner(block, name).rpartition(".")
        _set(block.module.get_submodule(owner), leaf, value)


# -- where scales can go -----------------------------------------------------------------------------


@dataclass
class _Norm:
    name: str
    module: torch.nn.Module
    output: torch.Tensor
    input: torch.Tensor


def _watch(block: Block, run: Callable[[], Any]) -> tuple[dict[str, torch.Tensor], list[_Norm]]:
    """The input of each Linear, and the norms with their outputs, in one pass."""
    inputs: dict[str, torch.Tensor] = {}
    norms: list[_Norm] = []
    handles = []
    for name, linear in block.linears.items():
        handles.append(
            linear.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args[0]))
        )
    for inner, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 1 and next(module.children(), None) is None:
            handles.append(
                module.register_forward_hook(
                    lambda module, args, out, name=f"{block.name}.{inner}": norms.append(
                        _Norm(name, module, out, args[0])
                    )
                )
            )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs, norms


def _gain_offset(norm: _Norm) -> float | None:
    """0 if the norm multiplies by its weight, 1 if by one plus its weight, None if by neither."""
    if not isinstance(norm.output, torch.Tensor) or norm.output.shape != norm.input.shape:
        return None
    weight = norm.module.weight
    bias = getattr(norm.module, "bias", None)
    try:
        with torch.no_grad():
            norm.module.weight = torch.nn.Parameter(torch.zeros_like(weight), requires_grad=False)
            bare = norm.module(norm.input)
    finally:
        norm.module.weight = weight
    size = norm.output.norm()
    shift = torch.zeros_like(weight) if bias is None else bias
    if (bare - shift).norm() <= _TOLERANCE * size:
        return 0.0
    if (bare * (1 + weight) - norm.output).norm() <= _TOLERANCE * size:
        return 1.0
    return None


def _into_norm(
    stage: StageScaling, norm: _Norm, offset: float, scales: torch.Tensor, dtypes: dict[str, torch.dtype]
) -> StageScaling:
    """The scales as the stored gains can hold them: gains are rounded to their dtype first, and the columns
    take the quotient of old and new, so that nothing is lost by the rounding."""
    name = f"{norm.name}.weight"
    old = norm.module.weight.detach().double().cpu() + offset
    new = (old / scales - offset).to(dtypes[name])
    quotient = old / (new.double() + offset)
    usable = torch.isfinite(quotient) & (old != 0)
    usable &= (quotient / scales < _NORM_RANGE) & (scales / quotient < _NORM_RANGE)
    stage.into = norm.name
    stage.columns = torch.where(usable, quotient, torch.ones_like(quotient))
    stage.replaced[name] = torch.where(usable, new, norm.module.weight.detach().cpu().to(new.dtype))
    bias = getattr(norm.module, "bias", None)
    if bias is not None:
        # Only powers of two come here: nothing is rounded.
        shifted = bias.detach().double().cpu() / stage.columns
        stage.replaced[f"{norm.name}.bias"] = shifted.to(dtypes[f"{norm.name}.bias"])
    return stage


def _row_of_channel(block: Block, reader: torch.nn.Linear, source: torch.nn.Linear, owner: Any) -> Any:
    """For each input of `reader` the row of `source` that it comes from; None if sizes tell of no such map.

    With grouped-query attention several heads read the values of one.
    """
    n, k = source.out_features, reader.in_features
    if n == k:
        return torch.arange(k)
    size = getattr(owner, "head_dim", None)
    if not isinstance(size, int) or size < 1 or n % size or k % n:
        return None
    channel = torch.arange(k)
    return channel // size // (k // n) * size + channel % size


def _into_rows(
    stage: StageScaling, block: Block, name: str, row_of: torch.Tensor, scales: torch.Tensor,
    dtypes: dict[str, torch.dtype],
) -> StageScaling:  # fmt: skip
    """The scales divided out of the rows of a Linear that is quantized itself; its bias is stored, and scales
    are bent so that its rounding loses nothing."""
    source = block.linears[name]
    rows = torch.ones(source.out_features, dtype=torch.float64)
    rows[row_of] = scales
    if source.bias is not None:
        bias = source.bias.detach().double().cpu()
        new = (bias / rows).to(dtypes[f"{name}.bias"])
        bent = torch.where(bias == 0, rows, bias / new.double())
        usable = torch.isfinite(bent) & (bent / rows < _NORM_RANGE) & (rows / bent < _NORM_RANGE)
        rows = torch.where(usable, bent, torch.ones_like(rows))
        stage.replaced[f"{name}.bias"] = torch.where(usable, new, bias.to(new.dtype))
    stage.into, stage.rows, stage.columns = name, rows, rows[row_of]
    return stage


# -- search ------------------------------------------------------------------------------------------


def _gather(
    block: Block, call: BlockCall, states: HiddenStates, stages: list[tuple[str, ...]],
    windows: TokenWindows, statistics: list[ChannelStatistics], threads: int, tick: Callable[[], None],
    device: str,
) -> None:  # fmt: skip
    """Adds the calibration windows' inputs of each stage to its statistics, in one pass."""
    linears = [block.linears[names[0]] for names in stages]
    where = 0

    def hook(index: int) -> Callable[[Any, tuple[Any, ...]], None]:
        def add(_: Any, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, linears[index].in_features).to(torch.float32).contiguous()
            try:
                statistics[index].add(x, threads)
            except (ValueError, RuntimeError) as error:
                message = f"{stages[index][0]}: its input in calibration window {where}: {error}"
                raise ValueError(message) from error

        return add

    handles = [linear.register_forward_pre_hook(hook(index)) for index, linear in enumerate(linears)]
    try:
        for where, hidden in enumerate(states.read()):
            if where >= windows.calibration:
                break
            run_block(block, call, hidden.to(device))
            tick()
    finally:
        for handle in handles:
            handle.remove()


def _outputs(block: Block, names: Iterable[str], run: Callable[[], Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    handles = [
        block.linears[name].register_forward_hook(lambda _, args, out: found.append(out)) for name in names
    ]
    try:
        found.append(run())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _try(block: Block, stage: StageScaling, run: Callable[[], Any]) -> bool:
    """Applies a stage's scales; takes them back and returns False if the block computes something else."""
    kept = {id(m): (m, dict(m._parameters)) for m in block.module.modules()}
    before = _outputs(block, stage.modules, run)
    apply_scaling(block, stage)
    after = _outputs(block, stage.modules, run)
    if all(float((a - b).norm()) <= _TOLERANCE * float(b.norm()) for a, b in zip(after, before, strict=True)):
        return True
    for module, parameters in kept.values():
        module._parameters.update(parameters)
    return False


def search_scaling(
    block: Block,
    call: BlockCall,
    states: HiddenStates,
    formats: dict[str, Any],
    rounding: Any,
    windows: TokenWindows,
    threads: int,
    tick: Callable[[], None],
    device: str,
    dtypes: dict[str, torch.dtype],
    activations: dict[str, Any] | None = None,
) -> list[StageScaling]:
    """Searches the scales of all stages of a block and applies them to its float32 weights.

    Args:
        formats: of the Linears that are quantized, by name.
        rounding: an ``AWQ`` or a ``SmoothQuant``.
        dtypes: of the block's parameters in the model's files, by full name.
        activations: how the inputs of Linears are rounded, by name, if they are.
    """
    probe = next(states.read()).to(device)

    def run() -> torch.Tensor:
        return run_block(block, call, probe)

    wanted = {name for name in block.linears if name in formats}
    stages = find_stages(block, run, wanted)
    inputs, norms = _watch(block, run)
    statistics = [
        statistics_for(
            rounding, block.linears[names[0]].in_features, windows.calibration, activations or {}, device
        )
        for names in stages
    ]
    _gather(block, call, states, stages, windows, statistics, threads, tick, device)
    result = []
    for names, known in zip(stages, statistics, strict=True):
        x = inputs[names[0]]
        shared = all(name in wanted for name, other in inputs.items() if _same_tensor(x, other))
        norm = next(
            (n for n in norms if isinstance(n.output, torch.Tensor) and _same_tensor(n.output, x)), None
        )
        offset = _gain_offset(norm) if norm is not None and shared else None
        owner_name, _, leaf = names[0].rpartition(".")
        owner = (
            block.module.get_submodule(_inner(block, owner_name))
            if owner_name != block.name
            else block.module
        )
        source = next(
            (s for ending in _SOURCES.get(leaf, ()) if (s := f"{owner_name}.{ending}") in formats), None
        )
        row_of = None
        if norm is None and source is not None and shared:
            row_of = _row_of_channel(block, block.linears[names[0]], block.linears[source], owner)
        if row_of is not None:
            known.share(row_of)
        layers = [(block.linears[name].weight.detach(), formats[name]) for name in names]
        has_bias = offset is not None and getattr(norm.module, "bias", None) is not None
        choice = known.choose(layers, names, has_bias, threads)
        scales = torch.from_numpy(np.array(ql.ChannelScales(choice.codes).scales)).double()
        facts = {"exponent": choice.exponent, "loss": choice.loss, "loss_unscaled": choice.loss_unscaled}
        stage = StageScaling(names)
        if choice.exponent == 0:
            pass
        elif (
            offset is not None
            and _try(
                block, folded := _into_norm(StageScaling(names, **facts), norm, offset, scales, dtypes), run
            )
        ) or (
            row_of is not None
            and _try(
                block,
                folded := _into_rows(StageScaling(names, **facts), block, source, row_of, scales, dtypes),
                run,
            )
        ):
            stage = folded
        elif rounding.explicit:
            stage = StageScaling(names, "input", **facts, codes=torch.from_numpy(choice.codes.copy()))
        else:
            stage = StageScaling(names, **facts)
        result.append(stage)
    return result
