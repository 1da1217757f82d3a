"""How much does each weight matter? Squared gradients of Linear and Embedding layers, gathered by hooks.

>>> from quantloom import sensitivity as S
>>> S.wrap(model)
>>> loss(model(x)).backward()          # as often as wanted
>>> model.layer.grad_weight_sq.sum()   # float32 on the CPU, shape of the weight
>>> S.unwrap(model)

For a layer ``y = x W^T`` whose outputs at different positions are independent, a position adds the square of
its own gradient of the weight, ``(dL/dy)^2^T x^2`` (elementwise squares), so that the sum over positions is
the diagonal of the Fisher information where L is the negative log-likelihood. Squaring the weight's gradient
itself would square the sum over positions instead. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["TwoStageAccumulator", "unwrap", "wrap", "wrapped_modules"]

STATISTICS = ("input_sq", "grad_output_sq", "grad_weight_sq")
_HOOK = "_sensitivity_hook"


class TwoStageAccumulator:
    """A sum of many tensors of one shape: in their own dtype on their device, and in float32 on the CPU.

    A bfloat16 sum of equal terms stops growing at 256 of them. Here the first stage is spilled into the
    second every ``2^(8 - headroom_bits)`` additions, 64 by default, so that it stays that far below the
    standstill, and the device holds one tensor in low precision only.
    """

    def __init__(self, headroom_bits: float = 2) -> None:
        self.headroom_bits = headroom_bits
        self.reset()

    def reset(self) -> None:
        """Back to an empty sum."""
        self.sum0: Tensor | None = None
        self.sum1: Tensor | None = None
        self.count0 = 0
        self.count1 = 0

    @property
    def count(self) -> int:
        """Tensors added since the last reset."""
        return self.count0 + self.count1

    def accumulate(self, value: Tensor) -> None:
        """Adds a tensor; `value` itself is left as it is."""
        value = value.detach()
        if self.sum0 is None:
            self.sum0 = value.clone()
        else:
            self.sum0 += value
        self.count0 += 1
        # 2 / eps terms of equal size are what bfloat16 can add up.
        if self.count0 >= 2 / torch.finfo(torch.bfloat16).eps / 2**self.headroom_bits:
            spilled = self.sum0.to("cpu", torch.float32, copy=True)
            self.sum1 = spilled if self.sum1 is None else self.sum1.add_(spilled)
            self.count1 += self.count0
            self.sum0, self.count0 = None, 0

    def sum(self) -> Tensor:
        """The total as a new float32 tensor on the CPU. Raises RuntimeError if nothing was added."""
        if self.sum0 is None and self.sum1 is None:
            raise RuntimeError("sum: nothing was accumulated, expected at least one tensor")
        parts = [
            part.to("cpu", torch.float32, copy=True) for part in (self.sum1, self.sum0) if part is not None
        ]
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def wrap(model: nn.Module) -> None:
    """Puts hooks on every Linear and Embedding of `model`, `model` itself included.

    Each such module gets three accumulators, which add up over all backward passes until `unwrap`:

    - ``input_sq``: sum over positions of x^2, ``[in_features]``; for an Embedding how often each index
      occurred, ``[num_embeddings]``
    - ``grad_output_sq``: sum over positions of (dL/dy)^2, ``[out_features]`` or ``[embedding_dim]``
    - ``grad_weight_sq``: sum over positions of the squared gradient of the weight, in the weight's shape

    Squares are taken and added over a pass in float32, then stored in the output's dtype. Parameters need no
    gradients of their own: outputs are made to require them, so that freezing the parameters saves memory.
    A weight that two modules share has a part of its sum in each.

    Raises TypeError for subclasses with a forward of their own, whose gradient is unknown (an Embedding that
    multiplies its output by ``embed_scale``, as Gemma's, is known), and ValueError if a module has hooks
    already; no hook is put then.
    """
    found = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    for module in found:
        if hasattr(module, _HOOK):
            raise ValueError(
                f"model: {type(module).__name__} is wrapped already, expected one wrap before unwrap"
            )
        own_forward = type(module).forward not in (nn.Linear.forward, nn.Embedding.forward)
        if own_forward and not (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
            raise TypeError(
                f"model: {type(module).__name__} with its own forward, expected Linear or Embedding"
            )
    for module in found:
        for name in STATISTICS:
            setattr(module, name, TwoStageAccumulator())
        hook = _linear_hook if isinstance(module, nn.Linear) else _embedding_hook
        setattr(module, _HOOK, module.register_forward_hook(hook))


def unwrap(model: nn.Module) -> None:
    """Removes the hooks and accumulators of `wrap`; modules without them are left as they are."""
    for _, module in wrapped_modules(model):
        getattr(module, _HOOK).remove()
        for name in (*STATISTICS, _HOOK):
            delattr(module, name)


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that carry accumulators, with their names."""
    for name, module in list(model.named_modules()):
        if hasattr(module, _HOOK):
            yield name, module


def _linear_hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0].detach()

    def on_gradient(gradient: Tensor) -> None:
        x_sq = x.reshape(-1, x.shape[-1]).float().square()
        gradient_sq = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
        module.input_sq.accumulate(x_sq.sum(0).to(output.dtype))
        module.grad_output_sq.accumulate(gradient_sq.sum(0).to(output.dtype))
        module.grad_weight_sq.accumulate((gradient_sq.T @ x_sq).to(output.dtype))

    return _watch(output, on_gradient)


def _embedding_hook(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    indices = args[0].detach().reshape(-1)
    # dL/d(row) = embed_scale * dL/dy where the output is the row times that.
    scale = getattr(module, "embed_scale", 1.0)

    def on_gradient(gradient: Tensor) -> None:
        gradient_sq = (gradient.detach().reshape(-1, module.embedding_dim).float() * scale).square()
        total = torch.zeros(module.weight.shape, dtype=torch.float32, device=gradient.device)
        total.index_add_(0, indices, gradient_sq)
        counts = torch.bincount(indices, minlength=module.num_embeddings)
        module.input_sq.accumulate(counts.to(output.dtype))
        module.grad_output_sq.accumulate(gradient_sq.sum(0).to(output.dtype))
        module.grad_weight_sq.accumulate(total.to(output.dtype))

    return _watch(output, on_gradient)


def _watch(output: Tensor, on_gradient) -> Tensor:
    if torch.is_grad_enabled():
        if not output.requires_grad:
            output.requires_grad_(True)
        output.register_hook(on_gradient)
    return output
