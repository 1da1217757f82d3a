"""The diagonal of the Fisher information of a language model's weights.

A small change d of the weights changes the model's predictions by ``KL ~ sum(F * d^2) / 2`` per token, where
F is the mean over tokens of the squared gradient of a token's log-likelihood, with tokens drawn from the
model itself. Cross terms between the positions of a sequence are left out (see `quantloom.sensitivity`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import sensitivity as S
from quantloom.experiments import store
from quantloom.experiments.token_prediction import Dataset

__all__ = ["diag_fisher", "fetch_fisher", "fetch_fisher_sum", "fisher_sum", "record_fisher"]

DEFAULT_IGNORE = ("vision_model", "multi_modal_projector")


def diag_fisher(
    data: Dataset,
    model: nn.Module,
    mode: Literal["single_sample", "empirical"] = "single_sample",
    progress: bool = False,
    ignore: tuple[str, ...] = DEFAULT_IGNORE,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of the weights of all Linear and Embedding layers.

    Args:
        data: the sequences; those that only fill up a batch do not count.
        mode: where the predicted tokens come from: "single_sample" draws one from the model's prediction at
            each position, which is the Fisher information; "empirical" takes the text's.
        ignore: parts of dotted names; weights that have one are left out.
        seed: of the draws.

    Returns float32 tensors on the CPU in the shapes of the weights, by the names of
    `model.named_parameters()`: the mean over predicted tokens. A shared weight has the sum over its uses. The
    parameters' `requires_grad` and the model's mode are as before afterwards. Raises what
    `quantloom.sensitivity.wrap` raises.
    """
    _checks.choice("mode", mode, ("single_sample", "empirical"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    needed = {parameter: parameter.requires_grad for parameter in names}
    training = model.training
    generator = torch.Generator(data.device).manual_seed(seed)
    S.wrap(model)
    try:
        model.eval()
        for parameter in names:
            parameter.requires_grad_(False)  # the hooks need the outputs' gradients only
        for index in store._tracked(list(range(data.n_batch)), "fisher", progress):
            tokens = data.tokens[index]
            logits = data.logits(model, index)[:, :-1].float()
            targets = tokens if mode == "empirical" else _sample(logits.detach(), generator)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            mask = data.masks[index].unsqueeze(1).expand(targets.shape)
            (loss * mask.flatten()).sum().backward()
        predictions = int(data.masks.sum()) * (data.sequence_length - 1)
        results: dict[str, Tensor] = {}
        for _, module in S.wrapped_modules(model):
            name = names[module.weight]
            if module.grad_weight_sq.count and not set(ignore) & set(name.split(".")):
                mean = module.grad_weight_sq.sum() / predictions
                results[name] = results[name] + mean if name in results else mean
        return results
    finally:
        S.unwrap(model)
        model.train(training)
        for parameter, value in needed.items():
            parameter.requires_grad_(value)


def fisher_sum(fisher: dict[str, Tensor]) -> dict[str, float]:
    """The sum over each tensor, as `quantise_2d_variable` takes it."""
    return {name: float(value.sum(dtype=torch.float64)) for name, value in fisher.items()}


def record_fisher(
    experiment: str,
    model_name: str,
    data: Dataset,
    model: nn.Module,
    mode: Literal["single_sample", "empirical"] = "single_sample",
    progress: bool = False,
    folder: str | Path | None = None,
) -> store.AttrDict:
    """Computes the diagonal and stores it as a run: tensors in bfloat16, their sums in ``summary.fisher``."""
    config = {"experiment": experiment, "type": "fisher", "model": str(model_name), "mode": mode}
    config |= {"data": data.name, "sequence_length": data.sequence_length}
    config["sequences"] = int(data.masks.sum())
    with store.Experiment(config, folder) as run:
        fisher = diag_fisher(data, model, mode, progress)
        run.tensors({name: value.bfloat16() for name, value in fisher.items()})
        run.summary(fisher=fisher_sum(fisher))
    return run.record()


def fetch_fisher(
    experiment: str, model_name: str, device: Any = "cpu", folder: str | Path | None = None
) -> dict[str, Tensor]:
    """The diagonal that `record_fisher` stored last for a model. Raises KeyError if there is none."""
    run = _latest(experiment, model_name, folder)
    return {name: value.to(device) for name, value in store.run_tensors(run.id, folder).items()}


def fetch_fisher_sum(experiment: str, model_name: str, folder: str | Path | None = None) -> dict[str, float]:
    """The sums that `record_fisher` stored last for a model. Raises KeyError if there are none."""
    return dict(_latest(experiment, model_name, folder).summary.fisher)


def _latest(experiment: str, model_name: str, folder: str | Path | None) -> store.AttrDict:
    for run in reversed(store.runs(experiment, folder=folder)):
        if run.config.get("model") == str(model_name) and "fisher" in run.summary:
            return run
    raise KeyError(f"model_name: no Fisher information of {str(model_name)!r} in {experiment!r}")


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token from each prediction, by the largest of logits plus Gumbel noise."""
    # rand is in [0, 1): 0 would give an infinite noise that wins against everything.
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    uniform.clamp_(min=torch.finfo(torch.float32).tiny)
    return (logits - uniform.log_().neg_().log_()).argmax(-1)
