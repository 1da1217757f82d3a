"""Hessians of the outputs of a model's Linears: which errors of outputs cost the model's prediction."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

import quantloom as ql
from quantloom.models.structure import Block, Targets, check_integers, find_blocks

__all__ = ["output_hessians"]


def output_hessians(
    model: torch.nn.Module,
    ids: Any,
    *,
    windows: int = 32,
    window: int = 512,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ql.Hessian]:
    """The mean over tokens of ``g g^T``, g the gradient of the model's cross entropy with respect to the
    output of a Linear, for each Linear in the decoder blocks.

    The tokens to predict are drawn from the model's own prediction, so that, with the Hessians of the
    inputs, this is the Kronecker-factored Fisher matrix: half of ``tr(H_out E H E^T)`` is about what an
    error E of the weights adds to the KL divergence from the model. For
    ``quantloom.GPTQ(output_hessian=...)`` and ``quantloom.models.quantize(output_hessians=...)``.

    Args:
        model: a causal language model of transformers, as a whole on one device, in any dtype of which
            gradients are good enough (float32, or bfloat16 on a GPU). Its parameters get no gradients.
        ids: token ids, one-dimensional integers; windows are cut from their start.
        windows, window: how many, and their tokens; both >= 1. One window is one forward and one backward
            pass.
        seed: of the tokens drawn.
        threads: of the sums on the CPU; 0: all.
        progress: called with the windows done and all of them.

    Returns a dictionary from full names of modules to Hessians on the model's device. Their sums take
    ``8 * out_features**2`` bytes for each Linear, the gradients of one window the model's activations once
    more. Raises ValueError naming the argument for too few ids and ids out of the vocabulary, and for a
    gradient that is not finite, naming the module; TypeError.
    """
    check_integers(("windows", windows, 1), ("window", window, 1), ("seed", seed, 0), ("threads", threads, 0))
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    rows = _windows(ids, windows, window, int(model.config.vocab_size))
    linears = {name: part for block in find_blocks(model) for name, part in block.linears.items()}
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    where = "cpu" if device.type == "cpu" else str(device)
    hessians = {name: ql.Hessian(part.out_features, where) for name, part in linears.items()}
    generator = torch.Generator().manual_seed(seed)
    handles = []
    try:
        for name, part in linears.items():
            handles.append(part.register_forward_hook(_recorder(name, hessians[name], threads)))
        with _evaluating(model):
            for done, row in enumerate(rows):
                if progress is not None:
                    progress(done, windows)
                x = torch.from_numpy(row[None]).to(device)
                with torch.enable_grad():
                    inputs = embeddings(x).detach().requires_grad_()
                    logits = model(inputs_embeds=inputs, use_cache=False).logits[0].float()
                    chances = logits.detach().softmax(-1).cpu()
                    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(device)
                    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    for name, hessian in hessians.items():
        if hessian.tokens != windows * window:
            raise ValueError(
                f"model: {name} gave gradients for {hessian.tokens} tokens, expected {windows * window}: it"
                " must run once for each token"
            )
    if progress is not None:
        progress(windows, windows)
    return hessians


def _windows(ids: Any, windows: int, window: int, vocabulary: int) -> np.ndarray:
    array = np.asarray(ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids: got ids of dtype {array.dtype}, expected integers")
    if array.ndim != 1:
        raise ValueError(f"ids: got shape {list(array.shape)}, expected one dimension")
    if array.size < windows * window:
        raise ValueError(f"ids: got {array.size} tokens, expected at least {windows * window}")
    array = array[: windows * window].astype(np.int64)
    if array.min() < 0 or array.max() >= vocabulary:
        raise ValueError(
            f"ids: got token ids from {array.min()} to {array.max()}, expected 0 to {vocabulary - 1}"
        )
    return array.reshape(windows, window)


def _recorder(name: str, hessian: ql.Hessian, threads: int) -> Any:
    def add(gradient: torch.Tensor) -> None:
        g = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32).contiguous()
        try:
            hessian.add(g, threads=threads)
        except ValueError as error:
            raise ValueError(f"{name}: the gradient of its output: {error}") from error

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(add)

    return hook


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and with gradients for activations alone."""
    training = model.training
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def checked_outputs(given: Any, blocks: list[Block], targets: Targets, recipe: Any) -> dict[str, ql.Hessian]:
    """Hessians of outputs by names of modules, as ``quantize`` takes them; raises naming what is wrong."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"output_hessians: got {type(given).__name__}, expected a mapping of names to Hessians"
        )
    if not isinstance(recipe.rounding, ql.GPTQ):
        method = json.loads(recipe.rounding.to_json())["rounding"]
        raise ValueError(f"output_hessians: got them with the rounding {method}, expected gptq")
    sizes = {name: part.out_features for block in blocks for name, part in block.linears.items()}
    for name, hessian in given.items():
        if name not in sizes:
            raise ValueError(f"output_hessians: got {name!r}, which is no Linear of the decoder blocks")
        if not isinstance(hessian, ql.Hessian):
            raise TypeError(f"output_hessians: got {type(hessian).__name__} for {name}, expected a Hessian")
        if hessian.k != sizes[name]:
            raise ValueError(
                f"output_hessians: got {hessian.k} outputs for {name}, expected {sizes[name]}, its"
                " out_features"
            )
        form = targets.formats.get(name)
        if form is not None and not (isinstance(form, ql.Trellis) and form.rotation):
            raise ValueError(
                f"output_hessians: got one for {name}, whose format is {form.spec}; expected a trellis with"
                " its rotation"
            )
    return dict(given)
