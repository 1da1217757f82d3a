"""Distillation layer by layer: a decoder block whose weights are rounded is trained towards its original.

The original's outputs are written to ``teacher-N.f32`` in the work folder before the block is touched: they
are what its rounded form is trained towards, and, as ``inputs="teacher"`` has it, what the next one reads.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

import quantloom as ql
from quantloom._trained_matrices import trained_matrix, training_refusal
from quantloom._training_weights import StraightThrough
from quantloom.models.calibration import BlockCall, HiddenStates, TokenWindows, run_block
from quantloom.models.records import WorkFolder
from quantloom.models.report import DistillationReport
from quantloom.models.structure import Block, Targets

__all__ = ["Distiller", "check_distillation", "window_passes"]

_BETAS = (0.9, 0.95)
# Gradients of a relative loss, shared by millions of weights, are far below AdamW's usual 1e-8.
_EPS = 1e-16

Values = dict[str, torch.Tensor]


def check_distillation(recipe: Any, targets: Targets, held_out_windows: int) -> None:
    """Raises ValueError if the recipe asks for a distillation that cannot be done."""
    if recipe.distillation is None:
        return
    for name, form in targets.formats.items():
        reason = training_refusal(form)
        if reason is not None:
            raise ValueError(f"distillation: {name}: {reason}")
    if held_out_windows < 1:
        raise ValueError(
            "held_out_windows: got 0, expected at least 1: distillation chooses its result by them"
        )


def window_passes(settings: Any, windows: int, held_out: int) -> int:
    """What the distillation of a block takes, in forward passes of a window; a backward one counts twice."""
    every = windows + held_out
    return (
        2 * every + windows + settings.checks * held_out + 3 * settings.steps * min(settings.batch, windows)
    )


class Distiller:
    """Distils the blocks of one run; its settings are those of ``LayerDistillation``.

    `tick` is told how many forward passes of a window a block has taken since the last call.
    """

    def __init__(
        self, settings: Any, model: torch.nn.Module, targets: Targets, tokens: TokenWindows, work: WorkFolder,
        threads: int, device: str, tick: Callable[[Block, int], None],
    ) -> None:  # fmt: skip
        self.settings, self.targets, self.tokens, self.work = settings, targets, tokens, work
        self.threads, self.device, self.tick = threads, device, tick
        places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.shared = {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if places[id(parameter)] > 1
        }
        self.hidden = 0
        self.weights: Values = {}

    def concerns(self, block: Block) -> bool:
        return any(name in self.targets.formats for name in block.linears)

    def finished(self, blocks: list[Block]) -> bool:
        """Whether an earlier run has distilled all blocks."""
        return all(self.work.distilled(block.name) is not None for block in blocks if self.concerns(block))

    def states(self, index: int) -> HiddenStates:
        path = self.work.path / f"teacher-{index}.f32"
        return HiddenStates(path, *self.tokens.ids.shape, self.hidden)

    def _inputs(self, block: Block, inputs: HiddenStates, teacher: bool) -> HiddenStates:
        """What enters the original block or the rounded one; `inputs` is what calibration has."""
        own = ("teacher", "both") if teacher else ("teacher",)
        return self.states(block.index) if self.settings.inputs in own and block.index else inputs

    def teach(self, block: Block, call: BlockCall, inputs: HiddenStates) -> None:
        """Writes the outputs of the block as it was; `inputs` are the hidden states that calibration has."""
        self.hidden = inputs.shape[2]
        targets = self.states(block.index + 1)
        if targets.path.is_file():
            targets.check()
            return
        source = self._inputs(block, inputs, True)
        source.check()
        with targets.writer() as append:
            for hidden in source.read():
                append(run_block(block, call, hidden.to(self.device)))
                self.tick(block, 1)

    def remember(self, block: Block) -> None:
        """Takes note of the weights that will be rounded, after channels were scaled."""
        self.weights = {
            name: linear.weight.detach()
            for name, linear in block.linears.items()
            if name in self.targets.formats
        }

    def forget(self, index: int) -> None:
        """Drops the states that no block to come reads."""
        self.states(index).path.unlink(missing_ok=True)

    def distil(
        self, block: Block, call: BlockCall, inputs: HiddenStates, dtypes: dict[str, torch.dtype]
    ) -> None:
        """Trains the block, or takes the record of an earlier run, and puts the result in its place.

        `dtypes`: of the block's parameters in the model's files, by full name.
        """
        if not self.weights:
            return
        names = list(self.weights)
        if self.work.distilled(block.name) is None:
            begun = time.monotonic()
            student = _Student(self, block, call, dtypes)
            source, targets = self._inputs(block, inputs, False), self.states(block.index + 1)
            report, masters = self._train(student, source, targets)
            packed = {name: student.matrices[name].packed(student.of(masters, name)) for name in names}
            replaced = {
                f"{block.name}.{inner}": masters[inner].to(dtypes[f"{block.name}.{inner}"]).cpu()
                for inner in student.vectors
            }
            self.work.save_distilled(block.name, packed, replaced, report, time.monotonic() - begun)
        self.weights = {}
        for name in names:
            decoded = self.work.packed(name, self.targets.formats[name]).dequantize(threads=self.threads)
            _put(block, _weight(block, name), decoded.to(self.device))
        for name, value in self.work.distilled_vectors(block.name).items():
            _put(block, name.removeprefix(f"{block.name}."), value.to(self.device, torch.float32))

    def _train(
        self, student: _Student, inputs: HiddenStates, targets: HiddenStates
    ) -> tuple[DistillationReport, Values]:
        settings, block = self.settings, student.block
        calibration, count = self.tokens.calibration, len(self.tokens.ids)
        change = sum(
            float((target - hidden).square().sum(dtype=torch.float64))
            for _, hidden, target in zip(range(calibration), inputs.read(), targets.read(), strict=False)
        ) / (calibration * math.prod(inputs.shape[1:]))
        change = change or 1.0  # of a block that does nothing

        def loss(values: Values, window: int) -> torch.Tensor:
            hidden = inputs.window(window).to(self.device)
            return (student.run(values, hidden) - targets.window(window).to(self.device)).square().mean()

        def measure(values: Values, first: int, last: int) -> float:
            total = 0.0
            with torch.no_grad():
                for window in range(first, last):
                    total += float(loss(values, window)) / change
                    self.tick(block, 1)
            return total / (last - first)

        with student.rounding_inputs(), _deterministic(self.device):
            values, masters = student.start()
            before = measure(values, 0, calibration)
            held_before = best = measure(values, calibration, count)
            result = None
            step = best_step = 0
            relative = settings.rate * math.sqrt(before)
            if relative > 0:
                optimizer = student.optimizer(masters, relative, settings.weight_decay)
                due = {round((i + 1) * settings.steps / settings.checks) for i in range(settings.checks)}
                windows = self._order(block)
                for step in range(1, settings.steps + 1):
                    values = student.rounded(masters)
                    for value in values.values():
                        value.requires_grad_()
                    batch = [next(windows) for _ in range(min(settings.batch, calibration))]
                    total = 0.0
                    for window in batch:
                        part = loss(values, window) / (change * len(batch))
                        part.backward()
                        total += float(part.detach())
                        self.tick(block, 3)
                    if not math.isfinite(total):
                        break
                    for name, gradient in student.gradients(masters, values).items():
                        masters[name].grad = gradient
                    for group in optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * (1 - (step - 1) / settings.steps)
                    optimizer.step()
                    if step in due:
                        found = measure(student.rounded(masters), calibration, count)
                        if found < best:
                            best, best_step = found, step
                            result = {name: master.detach().clone() for name, master in masters.items()}
            if result is None:
                result = student.stored()
            after = measure(student.rounded(result), 0, calibration) if best_step else before
            report = DistillationReport(
                block.name, step, best_step, relative, before, after, held_before, best
            )
        return report, result

    def _order(self, block: Block) -> Iterator[int]:
        """Calibration windows, shuffled anew each time all were used."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + block.index)
        while True:
            yield from torch.randperm(self.tokens.calibration, generator=generator).tolist()


class _Student:
    """A block with its weights on their stored grids; its parameters go by their names inside the block."""

    def __init__(
        self, distiller: Distiller, block: Block, call: BlockCall, dtypes: dict[str, torch.dtype]
    ) -> None:
        self.block, self.call, self.threads = block, call, distiller.threads
        work, targets = distiller.work, distiller.targets
        self.originals = distiller.weights
        packed = {name: work.packed(name, targets.formats[name]) for name in self.originals}
        self.matrices = {name: trained_matrix(q.to(distiller.device)) for name, q in packed.items()}
        self.transforms = {name: q.transform for name, q in packed.items()}
        self.activations = {
            name: ql.parse_activations(spec)
            for name in self.originals
            if (spec := work.report(name).activations)
        }
        # Biases of Linears that stay as they are do so as well.
        left = {f"{name}.bias" for name in block.linears if name not in self.originals}
        self.vectors = {
            inner: dtypes[full]
            for inner, parameter in block.module.named_parameters()
            if parameter.ndim == 1
            and (full := f"{block.name}.{inner}") not in left
            and full not in distiller.shared
        }

    def run(self, values: Values, hidden: torch.Tensor) -> torch.Tensor:
        module = self.block.module

        def called(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(module, values, args, kwargs)

        return self.call.run(called, hidden)

    @contextlib.contextmanager
    def rounding_inputs(self) -> Iterator[None]:
        """While it lasts, Linears round their inputs as at run time, gradients passing straight through."""

        def hook(name: str) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
            form, transform = self.activations[name], self.transforms[name]

            def rounded(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
                with torch.no_grad():
                    value = args[0].detach().contiguous()
                    if transform is not None:
                        value = transform.rotate_input(value)
                    value = ql.round_activations(value, form, self.threads)
                    if transform is not None:
                        value = transform.rotate_input(value, inverse=True)
                return (StraightThrough.apply(args[0], value), *args[1:])

            return rounded

        handles = [
            self.block.linears[name].register_forward_pre_hook(hook(name)) for name in self.activations
        ]
        try:
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, masters: Values, name: str) -> Values:
        """The parameters of a Linear's weight by their own names."""
        inner = f"{_weight(self.block, name)}:"
        return {key.removeprefix(inner): value for key, value in masters.items() if key.startswith(inner)}

    def _all(self, parameters: dict[str, Values]) -> Values:
        """Parameters of Linears' weights, by names that ``of`` takes apart."""
        return {
            f"{_weight(self.block, name)}:{key}": value
            for name, own in parameters.items()
            for key, value in own.items()
        }

    def stored(self) -> Values:
        """Parameters of what is stored."""
        return self._all({name: matrix.stored() for name, matrix in self.matrices.items()}) | {
            inner: self.block.module.get_parameter(inner).detach() for inner in self.vectors
        }

    def start(self) -> tuple[Values, Values]:
        """The values that are stored, and what is trained: the weights before they were rounded, where
        rounding them to the stored grid gives what is stored, and elsewhere that itself; or tables."""
        values = {_weight(self.block, name): matrix.values for name, matrix in self.matrices.items()}
        vectors = {inner: self.block.module.get_parameter(inner).detach() for inner in self.vectors}
        starts = {name: matrix.start(self.originals[name]) for name, matrix in self.matrices.items()}
        masters = self._all(starts) | {inner: value.clone() for inner, value in vectors.items()}
        for master in masters.values():
            master.requires_grad_()
        return values | vectors, masters

    @torch.no_grad()
    def rounded(self, masters: Values) -> Values:
        """What is trained as it would be stored."""
        values = {
            _weight(self.block, name): matrix.round(self.of(masters, name))
            for name, matrix in self.matrices.items()
        }
        return values | {
            inner: masters[inner].to(dtype).to(torch.float32, copy=True)
            for inner, dtype in self.vectors.items()
        }

    @torch.no_grad()
    def gradients(self, masters: Values, values: Values) -> Values:
        """Of what is trained, from those of ``rounded(masters)``."""
        found = {}
        for name, matrix in self.matrices.items():
            gradient = values[_weight(self.block, name)].grad
            found[name] = matrix.gradients(self.of(masters, name), gradient)
        return self._all(found) | {inner: values[inner].grad for inner in self.vectors}

    def optimizer(self, masters: Values, relative: float, decay: float) -> torch.optim.AdamW:
        """AdamW with steps of `relative` to the RMS of each tensor; a bias counts by the larger one of its
        own and its Linear's."""
        groups = []
        matrices = {_weight(self.block, name): matrix for name, matrix in self.matrices.items()}
        for inner, master in masters.items():
            size = master.detach().square().mean().sqrt()
            weight = f"{inner.removesuffix('bias')}weight"
            if inner.endswith("bias") and weight in matrices:
                beside = masters.get(f"{weight}:", matrices[weight].values)
                size = torch.maximum(size, beside.detach().square().mean().sqrt())
            rate = relative * float(size)
            owner = matrices.get(inner.partition(":")[0])
            groups.append(
                {
                    "params": [master],
                    "lr": rate,
                    "initial_lr": rate,
                    "weight_decay": decay if owner is not None and owner.decayed else 0.0,
                }
            )
        return torch.optim.AdamW(groups, betas=_BETAS, eps=_EPS)


@contextlib.contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Attention whose gradients are summed in the same order in every run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with contextlib.nullcontext() if device == "cpu" else sdpa_kernel(SDPBackend.MATH):
        yield


def _weight(block: Block, name: str) -> str:
    """The name of a Linear's weight inside its block."""
    return f"{name}.weight".removeprefix(f"{block.name}.")


def _put(block: Block, inner: str, value: torch.Tensor) -> None:
    owner, _, leaf = inner.rpartition(".")
    module = block.module.get_submodule(owner)
    setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
