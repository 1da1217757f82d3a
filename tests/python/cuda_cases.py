"""What the tests of CUDA products share: which formats, shapes and tokens, and how near a product must be."""

from __future__ import annotations

import math

import pytest
import quantloom as ql
import torch
from quantloom import _core

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and ql.build_info()["cuda"]),
    reason="needs a CUDA device and a build with CUDA",
)

HALVES = [torch.float16, torch.bfloat16]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}


def _has_order(spec: str) -> bool:
    try:
        _core.prepared_planes(ql.parse_format(spec).to_json(), 1, 1, False)
    except RuntimeError:
        return False
    return True


# Formats that have an order for CUDA kernels: the examples of every format, and each width with groups that
# make columns change places.
SPECS = [
    spec
    for spec in [
        *(example for entry in ql.format_table() for example in entry["examples"]),
        *(f"uniform:{bits}:g{group}:asym" for bits in range(1, 9) for group in (16, 20)),
    ]
    if _has_order(spec)
]


def packed(spec: str, n: int, k: int) -> ql.PackedTensor:
    """On the CPU."""
    return ql.quantize(torch.randn(n, k), spec)


def permuted(spec: str, n: int, k: int, **options) -> ql.PackedTensor:
    """With a plane group_index, on the CPU; `options` of GPTQ."""
    hessian = ql.Hessian(k)
    hessian.add(torch.randn(2 * k, k) * torch.randn(k).exp())
    q = ql.quantize(torch.randn(n, k), spec, ql.GPTQ(hessian, static_groups=False, **options))
    assert "group_index" in q.planes
    return q


def same_planes(a: ql.PackedTensor, b: ql.PackedTensor) -> bool:
    return a.planes.keys() == b.planes.keys() and all(
        a.planes[name].dtype == b.planes[name].dtype
        and torch.equal(a.planes[name].cpu(), b.planes[name].cpu())
        for name in a.planes
    )


def assert_product(
    y: torch.Tensor, x: torch.Tensor, q: ql.PackedTensor, bias: torch.Tensor | None = None
) -> None:
    """`y` is x W^T + bias within the rounding of y's dtype; `q` may be anywhere.

    Each element: within the error that rounding every weight and the result may cause. All together: within
    twice the error of torch's own product in that dtype.
    """
    w = q.to("cpu").dequantize().to(y.device)
    n, k = q.shape
    tokens = math.prod(x.shape[:-1])
    assert y.shape == (*x.shape[:-1], n)
    assert y.dtype == x.dtype
    rows, y = x.detach().reshape(tokens, k), y.detach().reshape(tokens, n)
    assert bool(y.isfinite().all())
    expected = rows.double() @ w.double().T
    terms = rows.double().abs() @ w.double().abs().T
    theirs = rows @ w.to(y.dtype).T
    if bias is not None:
        expected, theirs = expected + bias.double(), theirs + bias
    unit = UNIT[y.dtype]
    error = (y.double() - expected).abs()
    bound = unit * (expected.abs() + 2 * terms) + 1e-6
    worst = int((error - bound).argmax()) if error.numel() else 0
    assert bool((error <= bound).all()), (
        f"element {worst} of {tuple(y.shape)}: got {y.reshape(-1)[worst].item()}, "
        f"expected {expected.reshape(-1)[worst].item()}"
    )
    if error.numel() >= 512:
        assert error.square().mean().sqrt() <= 2 * (theirs.double() - expected).square().mean().sqrt() + 1e-6


def runs(q: ql.PackedTensor | ql.PreparedTensor, x: torch.Tensor) -> bool:
    """Whether a kernel takes the product; if none does, that calling it raises the reason."""
    possible, reason = ql.can_matmul(q, math.prod(x.shape[:-1]), x.dtype, x.device)
    if not possible:
        assert reason
        with pytest.raises(RuntimeError):
            ql.matmul(x, q)
    return possible
