"""Quantization-aware training of language models: the quantized model learns to predict what the original
does.

>>> test = qat.QAT(F.Scaled(3, "int", Q.BFLOAT16, (1, 64), "absmax"), "parameter", clip_gradient=False)
>>> train = qat.TrainingSettings(100, 8, text="calib.txt", valid_text="valid.txt", sequence_length=512)
>>> opt = qat.OptimiserSettings(lr=2.0**-17)
>>> qat.run_sweep([qat.Run("qat", "path/to/model", test, train, opt)])
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from quantloom import _checks, evaluate
from quantloom import formats as Q
from quantloom import model_quantisation as M
from quantloom import quantisation_training as T
from quantloom.experiments import downstream, store, sweeping
from quantloom.experiments.requantising import RequantisableModel
from quantloom.experiments.token_prediction import Baseline, Dataset, Test

__all__ = [
    "QAT",
    "ExecutionSettings",
    "LRModifiers",
    "OptimiserSettings",
    "Run",
    "TrainingSettings",
    "kl_loss",
    "run_sweep",
    "stored_bits",
    "train",
]


def kl_loss(logits: Tensor, reference_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum over positions of KL(reference || model), over the whole vocabulary.

    Args:
        logits, reference_logits: ``[..., vocabulary]``.
        mask: bool ``[...]``, the positions that count; None: all.
    """
    expected = reference_logits.detach().float().log_softmax(-1)
    actual = logits.float().log_softmax(-1)
    # A token that the reference rules out contributes nothing.
    terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - actual)).sum(-1)
    return (terms if mask is None else terms[mask]).sum()


@dataclass
class TrainingSettings:
    """How long to train on which file, and what to measure on."""

    steps: int
    batch_size: int
    text: str
    valid_text: str
    log_interval: int = 100
    """Steps between two entries of the log."""
    valid_sequences: int | None = 132
    sequence_length: int = 1024


@dataclass
class LRModifiers:
    """What the learning rate is multiplied by, for each kind of parameter; at 0 they are not trained."""

    weight: float = 1.0
    scale: float = 1.0
    centroids: float = 0.0
    other: float = 1.0


Each: TypeAlias = Callable[[nn.Module, list[float]], None]
LRSchedule: TypeAlias = Literal["constant", "cosine", "linear"]


@dataclass
class OptimiserSettings:
    """AdamW, with a learning rate that stays or falls to 0."""

    lr: float
    lr_modifiers: LRModifiers = field(default_factory=LRModifiers)
    lr_schedule: LRSchedule = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.0


@dataclass
class ExecutionSettings:
    """Where, and in which dtype: of the reference, of what is trained, and of the arithmetic.

    `compile`: a mode of ``torch.compile`` for the decoder layers, None for none.
    """

    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: str | None = None


@dataclass
class QAT(Test):
    """Converts a copy of the model, trains it towards the original, then measures it.

    In a `Run` the run's settings say how it is trained; in a `token_prediction.Run` those here do:

    AdamW with `betas` and `eps`, a cosine from the learning rate to 0, and one rate for weights and scales;
    for centroids it is `centroids_rate` times that. `learning_rate` None: 2^(-14 - bits) for B bits an
    element, so that steps are in proportion to the format's. The norms and biases are not trained.
    """

    fmt: M.FmtSpec
    scaling_mode: Literal["parameter", "dynamic"] = "parameter"
    clip_gradient: bool = False
    train_text: str | None = None
    mode: Literal["qat", "one-shot"] = "qat"
    steps: int = 100
    train_batch_size: int = 4
    learning_rate: float | None = None
    centroids_rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    seed: int = 0
    type: str = "qat"

    def run(self, model: RequantisableModel, data: Dataset, **args: Any) -> dict[str, Any]:
        """``bits_per_param`` of the converted model, counted; ``train_loss`` of each step; and what
        `Dataset.evaluate` tells.

        With mode "qat" the trained weights are encoded, scales and outliers in their formats:
        ``measured_bits_per_param`` counts those bytes, and what is evaluated was decoded from them."""
        if self.train_text is None:
            raise ValueError("train_text: got None, expected a file to train on")
        opt = OptimiserSettings(
            self.learning_rate or 2.0 ** (-14 - _element_bits(self.fmt)),
            LRModifiers(centroids=self.centroids_rate, other=0.0),
            betas=self.betas,
            eps=self.eps,
        )
        settings = TrainingSettings(
            self.steps, self.train_batch_size, self.train_text, "", sequence_length=data.sequence_length
        )
        losses: list[float] = []
        summary, trained = self.trained(
            model.model, settings, opt, each=lambda student, so_far: losses.extend(so_far[-1:])
        )
        return {**summary, "train_loss": losses, **data.evaluate(trained)}

    def trained(
        self,
        reference: nn.Module,
        settings: TrainingSettings,
        opt: OptimiserSettings,
        compile: str | None = None,
        each: Each | None = None,
    ) -> tuple[dict[str, Any], nn.Module]:
        """Bits of the converted model, counted and measured, and the trained model: dense, with weights that
        were decoded from what is stored (mode "qat"), or as they are (mode "one-shot").

        `each`: called with the model and the losses so far, before the first step and after each."""
        student = copy.deepcopy(reference)
        text = Dataset.load(
            reference,
            settings.text,
            settings.sequence_length,
            settings.batch_size,
            kl_topk=0,
            seed=self.seed,
        )
        T.convert(student, self.fmt, self.scaling_mode, self.clip_gradient, mode=self.mode)
        if opt.lr_modifiers.centroids == 0:
            # Tables that are not trained are those of the format, which does not count them.
            for parameter in _parameters(student, "centroids"):
                parameter.requires_grad_(False)
        if compile is not None:
            for layer in M._decoder_layers(student):
                layer.compile(mode=compile)
        _fit(student, reference, text, settings.steps, opt, each=each)
        count = T.count_parameters(student)
        summary = {"bits_per_param": _bits_per_param(student), "params": count}
        if self.mode == "one-shot":
            return summary, student
        encoded = T.encode(student)
        stored = copy.deepcopy(reference)
        names = dict(stored.named_parameters())
        # What was trained beside the weights is stored as it is.
        dense = {name: value for name, value in T.get_named_parameters(student, "other") if name in names}
        T.load_encoded(stored, {**dense, **encoded})
        items = {**names, **encoded}
        bits = sum(stored_bits(item) for item in items.values())
        return {**summary, "measured_bits_per_param": bits / count}, stored


@dataclass
class Run:
    """A test of a model (a folder): training, cross-entropy and KL divergence, downstream tasks."""

    experiment: str
    model: str
    test: QAT | Baseline
    train: TrainingSettings
    opt: OptimiserSettings
    exe: ExecutionSettings = field(default_factory=ExecutionSettings)
    tasks: tuple[downstream.Task, ...] = ()
    tag: str = ""
    type: str = "qat"


def run_sweep(
    runs: Iterable[Run],
    processes: int | None = None,
    resume: bool = True,
    progress: bool = False,
    folder: str | Path | None = None,
) -> list[store.AttrDict]:
    """Runs all tests as runs of their experiments; see `experiments.run_sweep`.

    A record's config has the fields of `Run`. Its summary:

    - ``train``: lists, an entry before the first step and one after every `log_interval` of them: ``loss``,
      the mean over these steps (the first is None), ``duration`` of a step in seconds, ``bits_per_param``,
      ``valid_cross_entropy`` and ``valid_kl_div`` of the model in training
    - ``bits_per_param`` and ``params`` of the result, ``measured_bits_per_param`` of its bytes,
      ``duration_train`` in seconds
    - ``cross_entropy`` and ``kl_div`` of the result, one value for each sequence, and their means,
      ``valid_cross_entropy`` and ``valid_kl_div``; in mode "qat" of what was decoded from its bytes
    - ``downstream``: what `downstream.evaluate` tells of each task, by its name
    """
    configs = []
    for run in runs:
        if not isinstance(run, Run):
            raise TypeError(f"runs: got {_checks.type_name(run)}, expected qat.Run")
        if not isinstance(run.test, (QAT, Baseline)):
            raise TypeError(f"test: got {_checks.type_name(run.test)}, expected qat.QAT or Baseline")
        configs.append({item.name: getattr(run, item.name) for item in dataclasses.fields(run)})
    return sweeping.run_sweep(
        _measure, configs, processes=processes, resume=resume, progress=progress, folder=folder
    )


def _measure(config: store.AttrDict, experiment: store.Experiment) -> dict[str, Any]:
    train, exe = config.train, config.exe
    dtype = getattr(torch, _checks.choice("dtype", exe.dtype, ("float32", "bfloat16", "float16")))
    questions = {task.name: downstream.load(task) for task in config.tasks}  # bad files end it at once
    model = RequantisableModel.load(config.model, exe.device, dtype).model
    data = Dataset.load(
        model,
        train.valid_text,
        train.sequence_length,
        train.batch_size,
        kl_topk=min(128, model.config.vocab_size),
        sequence_limit=train.valid_sequences,
    )
    summary: dict[str, Any] = {"bits_per_param": _bits_per_param(model), "params": T.count_parameters(model)}
    start, log = time.perf_counter(), _Log(_checks.integer("log_interval", train.log_interval, 1), data)
    if isinstance(config.test, QAT):
        summary, model = config.test.trained(model, train, config.opt, exe.compile, log)
        summary["duration_train"] = time.perf_counter() - start
    else:
        log(model, [])
    summary["train"] = log.entries
    experiment.summary(**summary)
    losses = data.evaluate(model)
    summary |= {**losses, **_means(losses)}
    if questions:
        tokenizer = evaluate.tokenizer(config.model)
        summary["downstream"] = {
            name: downstream.evaluate(model, task, tokenizer) for name, task in questions.items()
        }
    return summary


class _Log:
    """What a record tells of training."""

    def __init__(self, interval: int, data: Dataset) -> None:
        self._interval, self._data = interval, data
        self._start = time.perf_counter()
        self.entries: dict[str, list[Any]] = {}

    def __call__(self, model: nn.Module, losses: list[float]) -> None:
        if len(losses) % self._interval:
            return
        entry: dict[str, Any] = {"loss": None, "duration": None}
        if losses:
            entry["loss"] = sum(losses[-self._interval :]) / self._interval
            entry["duration"] = (time.perf_counter() - self._start) / self._interval
        entry["bits_per_param"] = _bits_per_param(model)
        entry |= _means(self._data.evaluate(model))
        for key, value in entry.items():
            self.entries.setdefault(key, []).append(value)
        self._start = time.perf_counter()  # measuring takes time as well


def _means(losses: dict[str, Tensor]) -> dict[str, float]:
    return {f"valid_{key}": float(value.double().mean()) for key, value in losses.items()}


def _bits_per_param(model: nn.Module) -> float:
    return T.count_bits(model, next(model.parameters()).dtype) / T.count_parameters(model)


def stored_bits(item: Q.Encoded | Tensor) -> int:
    """The bits of an encoded tensor's planes, or of a plain tensor."""
    return item.size_in_bits if isinstance(item, Q.Encoded) else 8 * item.itemsize * item.numel()


def train(
    student: nn.Module,
    reference: nn.Module,
    data: Dataset,
    *,
    steps: int,
    learning_rate: float,
    centroids_rate: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
    progress: bool = False,
) -> list[float]:
    """Trains a converted model towards a reference; returns the loss of each step in nats per token.

    Every step takes the next batch of `data`, from the start again when all were seen. Arguments as in `QAT`.
    Raises RuntimeError, naming the step, if the loss is not finite.
    """
    modifiers = LRModifiers(centroids=centroids_rate, other=0.0)
    opt = OptimiserSettings(learning_rate, modifiers, betas=betas, eps=eps)
    return _fit(student, reference, data, steps, opt, progress)


def _fit(
    student: nn.Module,
    reference: nn.Module,
    data: Dataset,
    steps: int,
    opt: OptimiserSettings,
    progress: bool = False,
    each: Each | None = None,
) -> list[float]:
    _checks.integer("steps", steps, 0)
    groups, frozen = [], []
    for kind in ("weight", "scale", "centroids", "other"):
        parameters, rate = _parameters(student, kind), getattr(opt.lr_modifiers, kind)
        if rate == 0:
            frozen += parameters  # their gradients take time
        elif parameters:
            groups.append({"params": parameters, "lr": opt.lr * rate})
    optimiser = torch.optim.AdamW(groups, betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _schedule(opt.lr_schedule, steps))
    needed = [parameter.requires_grad for parameter in frozen]
    losses: list[float] = []
    if each is not None:
        each(student, losses)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for step in store._tracked(list(range(steps)), "training", progress):
            index = step % data.n_batch
            mask = data.masks[index]
            with torch.no_grad():
                expected = data.logits(reference, index)[mask]
            loss = kl_loss(data.logits(student, index)[mask], expected) / (
                int(mask.sum()) * data.sequence_length
            )
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"train: the loss is {losses[-1]} at step {step}, learning rate {opt.lr}")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            if each is not None:
                each(student, losses)
    finally:
        for parameter, value in zip(frozen, needed):
            parameter.requires_grad_(value)
    return losses


def _schedule(name: LRSchedule, steps: int) -> Callable[[int], float]:
    _checks.choice("lr_schedule", name, ("constant", "cosine", "linear"))
    if name == "constant":
        return lambda step: 1.0
    if name == "linear":
        return lambda step: 1 - step / max(steps, 1)
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _parameters(module: nn.Module, kind: T.Kind) -> list[nn.Parameter]:
    return [parameter for _, parameter in T.get_named_parameters(module, kind)]


def _element_bits(fmt: M.FmtSpec) -> float:
    bits = getattr(fmt, "element_bits", None)
    if bits is None:
        raise ValueError(f"learning_rate: got None with {fmt}, which does not tell its bits; expected a rate")
    return bits
