"""Rotates the residual stream of a model, and folds the rotation into its weights.

Between two blocks of a pre-norm decoder nothing depends on the basis of the hidden states but the weights
that read and write them: an RMS norm only needs their length, once its gains are moved into the Linears
behind it. So embeddings and Linears that write are multiplied by an orthonormal R, Linears that read by its
transpose, and the model computes the same (Ashkboos et al., "SliceGPT" and "QuaRot", 2024). What was outliers
of a few channels is then spread over all; no work is left for run time.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantloom import _checks
from quantloom.models.checkpoint import copy_companions, final_files, load_reference
from quantloom.models.source import ModelFolder
from quantloom.transforms import Hadamard, hadamard_in_numpy, parse_transform

__all__ = ["RotatedModel", "rotate"]

# Pre-norm decoders with RMS norms whose gains multiply the normalized states, and nothing else on the stream.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_CHECKED_TOKENS = 32
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class RotatedModel:
    """What ``rotate`` did.

    Attributes:
        output: the folder.
        transform: the short form of the rotation.
        difference: of the logits of some tokens before and after, in float32, before the weights are rounded
            to their dtype: norm of the difference over that of the logits.
    """

    output: Path
    transform: str
    difference: float


def rotate(
    model_path: str | Path,
    output: str | Path,
    transform: Hadamard | str = "hadamard",
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> RotatedModel:
    """Writes the same model with a rotated residual stream: plain weights, to be quantized like any other.

    Args:
        model_path: folder of a Llama, Mistral, Qwen2 or Qwen3 model.
        output: folder to write.
        transform: a ``Hadamard`` of the side "in", or its short form; whole rows or blocks that divide the
            hidden size.
        dtype: of the weights that are written; None: that of the model's embedding.
        overwrite: replace a model in `output`.

    Input embeddings and head are stored apart, even if the model had them tied: the gains of the last norm go
    into the head. Needs memory for the model in float32. Raises ValueError or TypeError naming the argument
    (another family, a size without a known matrix) before any work, RuntimeError if the rotated model does
    not compute the same, and nothing is written then.
    """
    basis = parse_transform(transform)
    if not isinstance(basis, Hadamard) or basis.sides != "in":
        raise ValueError(f"transform: got {transform!r}, expected a Hadamard of the side 'in'")
    folder = ModelFolder(model_path)
    family = folder.config_json.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_path: got a model of type {family!r}, expected one of {', '.join(FAMILIES)}")
    target = _checks.path("output", output)
    if target.exists() and (not target.is_dir() or target.samefile(folder.path)):
        raise ValueError(f"output: got {target}, expected another folder than the model's")
    if final_files(target) and not overwrite:
        raise ValueError(f"output: {target} holds a model already; pass overwrite=True to replace it")
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: got {dtype!r}, expected float32, float16 or bfloat16")
    basis.check(1, int(folder.config_json["hidden_size"]))

    model = load_reference(folder.path)
    stored = next(tensor for tensor in folder.mapped().values() if tensor.ndim == 2).dtype
    ids = torch.arange(_CHECKED_TOKENS)[None] * 7919 % model.config.vocab_size
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        _fold(model, basis)
        after = model(ids, use_cache=False).logits
    difference = float((after - before).norm() / before.norm().clamp_min(1e-30))
    if not difference < _TOLERANCE:
        raise RuntimeError(
            f"model_path: the rotated model's logits differ by {difference:.3g} of their norm, expected less"
            f" than {_TOLERANCE}"
        )
    model.to(dtype or stored)
    target.mkdir(parents=True, exist_ok=True)
    staging = target / ".rotating"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        copy_companions(folder.path, staging)
        # config.json goes first and comes last: without it the folder is no model, so that no mixture of two
        # can be loaded.
        for old in final_files(target):
            old.unlink()
        for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return RotatedModel(target, basis.spec, difference)


def _fold(model: Any, basis: Hadamard) -> None:
    decoder = model.model
    signs = basis.input_signs(model.config.hidden_size)

    def rotated(matrix: torch.Tensor) -> torch.Tensor:
        """R applied to the last axis, in float64."""
        return hadamard_in_numpy(matrix.double(), basis.block, signs)

    def put(module: Any, name: str, value: torch.Tensor) -> None:
        # New memory: other modules may share the old one.
        setattr(module, name, torch.nn.Parameter(value.float(), requires_grad=False))

    def read(linear: Any, gains: torch.Tensor) -> None:
        put(linear, "weight", rotated(linear.weight.double() * gains))

    def write(linear: Any) -> None:
        put(linear, "weight", rotated(linear.weight.t()).t().contiguous())
        if linear.bias is not None:
            put(linear, "bias", rotated(linear.bias[None])[0])

    def take_gains(norm: Any) -> torch.Tensor:
        gains = norm.weight.double()
        put(norm, "weight", torch.ones_like(norm.weight))
        return gains

    model.config.tie_word_embeddings = False
    read(model.lm_head, take_gains(decoder.norm))
    put(decoder.embed_tokens, "weight", rotated(decoder.embed_tokens.weight))
    for layer in decoder.layers:
        for norm, readers in _READERS.items():
            gains = take_gains(layer.get_submodule(norm))
            for name in readers:
                read(layer.get_submodule(name), gains)
        for name in _WRITERS:
            write(layer.get_submodule(name))
