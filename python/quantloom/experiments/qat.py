"""Quantization-aware training of language models: the quantized model learns to predict what the original
does.

>>> test = qat.QAT(F.Scaled(3, "int", Q.BFLOAT16, (1, 64), "absmax"), train_text="calib.txt", steps=100)
>>> token_prediction.run_sweep([token_prediction.Run("qat", test, "path/to/model", "valid.txt")])
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import formats as Q
from quantloom import model_quantisation as M
from quantloom import quantisation_training as T
from quantloom.experiments import store
from quantloom.experiments.requantising import RequantisableModel
from quantloom.experiments.token_prediction import Dataset, Test

__all__ = ["QAT", "kl_loss", "stored_bits", "train"]


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
class QAT(Test):
    """Converts a copy of the model, trains it towards the original on `train_text`, then measures it.

    AdamW with `betas` and `eps`, a cosine from the learning rate to 0, and one rate for weights and scales;
    for centroids it is `centroids_rate` times that. `learning_rate` None: 2^(-14 - bits) for B bits an
    element, so that steps are in proportion to the format's. The norms and biases are not trained.
    """

    fmt: M.FmtSpec
    train_text: str
    scaling_mode: Literal["parameter", "dynamic"] = "parameter"
    clip_gradient: bool = False
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
        student = copy.deepcopy(model.model)
        text = Dataset.load(
            model.model,
            self.train_text,
            data.sequence_length,
            self.train_batch_size,
            kl_topk=0,
            seed=self.seed,
        )
        T.convert(student, self.fmt, self.scaling_mode, self.clip_gradient, mode=self.mode)
        losses = train(
            student,
            model.model,
            text,
            steps=self.steps,
            learning_rate=self.learning_rate or 2.0 ** (-14 - _element_bits(self.fmt)),
            centroids_rate=self.centroids_rate,
            betas=self.betas,
            eps=self.eps,
        )
        dtype = next(model.model.parameters()).dtype
        count = T.count_parameters(student)
        summary = {"bits_per_param": T.count_bits(student, dtype) / count, "train_loss": losses}
        if self.mode == "one-shot":
            return {**summary, **data.evaluate(student)}
        encoded = T.encode(student)
        stored = copy.deepcopy(model.model)
        T.load_encoded(stored, encoded)
        items = {**dict(stored.named_parameters()), **encoded}
        bits = sum(stored_bits(item) for item in items.values())
        return {**summary, "measured_bits_per_param": bits / count, **data.evaluate(stored)}


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
    _checks.integer("steps", steps, 0)
    groups = [
        {"params": _parameters(student, "weight"), "lr": learning_rate},
        {"params": _parameters(student, "scale"), "lr": learning_rate},
    ]
    if centroids_rate:
        groups.append({"params": _parameters(student, "centroids"), "lr": learning_rate * centroids_rate})
    optimiser = torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=betas, eps=eps, weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
    )
    frozen = _parameters(student, "other")
    if centroids_rate == 0:
        frozen += _parameters(student, "centroids")  # their gradients take time
    needed = [parameter.requires_grad for parameter in frozen]
    losses = []
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
                raise RuntimeError(
                    f"train: the loss is {losses[-1]} at step {step}, learning rate {learning_rate}"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    finally:
        for parameter, value in zip(frozen, needed):
            parameter.requires_grad_(value)
    return losses


def _parameters(module: nn.Module, kind: T.Kind) -> list[nn.Parameter]:
    return [parameter for _, parameter in T.get_named_parameters(module, kind)]


def _element_bits(fmt: M.FmtSpec) -> float:
    bits = getattr(fmt, "element_bits", None)
    if bits is None:
        raise ValueError(f"learning_rate: got None with {fmt}, which does not tell its bits; expected a rate")
    return bits
