"""Laws to compare formats on: samples, and the formats that suit a law.

>>> from quantloom import analysis as A, formats as Q
>>> law = A.StudentT(df=5)
>>> x = law.sample(1 << 20, seed=1)
>>> Q.qrmse_norm(Q.ScaledFormat.create(law.quantiser(3), A.rms(x)), x)

Needs torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantloom import _checks
from quantloom import formats as Q

__all__ = ["Distribution", "Laplace", "Normal", "StudentT", "rms"]

MAX_GRID = 1 << 20
REACH = 1e6  # of quadratures, in scales of the law


def rms(tensor: Tensor) -> Tensor:
    """The root of the mean square, computed in float32, in the tensor's dtype."""
    return tensor.float().square().mean().sqrt().to(tensor.dtype)


@dataclass
class Distribution:
    """Base class: a symmetric law around 0."""

    def sample(self, n: int, *, seed: int, device: Any = "cpu") -> Tensor:
        """`n` independent float32 samples, the same ones for the same seed and device. The global random
        state stays as it is."""
        n = _checks.integer("n", n, 0)
        device = torch.device(device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_checks.integer("seed", seed, 0))
            arguments = {
                name: torch.tensor(float(value), device=device) for name, value in vars(self).items()
            }
            law = getattr(torch.distributions, type(self).__name__)
            return law(loc=torch.tensor(0.0, device=device), **arguments).sample((n,))

    def quadrature(self, n: int = 1 << 18) -> tuple[Tensor, Tensor]:
        """(float32 points, float64 weights): ``(weights * f(points)).sum()`` is the mean of f under the law.

        Where samples of heavy tails miss a mean by percents, as their rarest values decide it, the points go
        out to 1e6 scales, ever farther apart. They are ascending and symmetric, and none is 0.
        """
        half = math.asinh(REACH)
        step = 2 * half / _checks.integer("n", n, 2)
        place = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) * step - half
        points = torch.sinh(place) * self.scale
        arguments = {
            name: torch.tensor(float(value), dtype=torch.float64, device="cpu")
            for name, value in vars(self).items()
        }
        law = getattr(torch.distributions, type(self).__name__)
        density = (
            law(loc=torch.tensor(0.0, dtype=torch.float64, device="cpu"), **arguments).log_prob(points).exp()
        )
        return points.float(), density * torch.cosh(place) * self.scale * step

    def expected_error(self, fmt: Q.TensorFormat, n: int = 1 << 18) -> float:
        """The relative RMS error that a format has under the law: what ``Q.qrmse_norm`` tends to on ever more
        samples, by quadrature. For formats of constants: `fmt` must not take scales from the data."""
        points, weights = self.quadrature(n)
        error = (fmt.quantise(points).double() - points.double()).square()
        return math.sqrt(float((weights * error).sum() / (weights * points.double().square()).sum()))

    def expected_entropy(self, fmt: Q.ScalarFormat, n: int = 1 << 18) -> float:
        """The entropy of a format's codes under the law, in bits: what entropy coding takes."""
        points, weights = self.quadrature(n)
        share = torch.bincount(fmt.to_idx(points), weights)
        share = share[share > 0] / share.sum()
        return -float((share * share.log2()).sum())

    def quantiser(
        self,
        bits: float,
        scaling: Literal["rms", "absmax", "signmax"] = "rms",
        block_size: int | None = None,
        mode: Literal["symmetric", "repeat_zero", "asymmetric"] = "symmetric",
        **args: Any,
    ) -> Q.LUTFormat:
        """The table whose density is the law's to the power 1/3, which errs least (Panter and Dite 1951).

        For `scaling` "rms" it is for data of unit RMS, otherwise for blocks of `block_size` values over their
        largest. `args` go to `Q.crd_normal` and its like. Raises ValueError for a block size that does not go
        with the scaling.
        """
        if (scaling == "rms") != (block_size is None):
            raise ValueError(
                f"block_size: got {block_size} with scaling {scaling!r}, expected None for 'rms' alone"
            )
        kind = {"Normal": "normal", "Laplace": "laplace", "StudentT": "t"}[type(self).__name__]
        shape = {name: value for name, value in vars(self).items() if name != "scale"}
        if scaling == "rms":
            return getattr(Q, f"crd_{kind}")(bits, mode=mode, **shape, **args)
        return getattr(Q, f"crd_block_{kind}")(bits, block_size, scaling=scaling, mode=mode, **shape, **args)

    def find_compressed_quantiser(
        self,
        bits: float,
        X: Tensor,
        X_train: Tensor,
        scaling: Literal["rms", "absmax", "signmax"] = "rms",
        block_size: int | None = None,
        power: float = 0,
        compressor: Q.Compressor = "optimal",
    ) -> Q.CompressedLUTFormat:
        """The table with entropy coding that takes `bits` bits per element of `X`, as near as its size
        allows.

        With power 0, the density that errs least at a given entropy (Gish and Pierce 1968), and scaling "rms"
        it is a uniform grid of an odd number of points over the range of `X_train`; otherwise the law's table
        of that power. Probabilities are trained on `X_train`. `X` and `X_train` are normalised already.
        """
        _checks.real("bits", bits)
        if not 0 < bits <= 16:
            raise ValueError(f"bits: got {bits}, expected a number in (0, 16]")
        formats: dict[int, tuple[float, Q.CompressedLUTFormat]] = {}
        largest = float(X_train.abs().max())

        def excess(half: int) -> float:
            """Bits per element over those wanted, of a table of 2 * half + 1 points."""
            if half not in formats:
                points = 2 * half + 1
                if power == 0 and scaling == "rms":
                    table = Q.LUTFormat.create(
                        torch.linspace(-largest, largest, points, device="cpu"), "GRID"
                    )
                else:
                    table = self.quantiser(math.log2(points), scaling, block_size, power=power)
                fmt = Q.CompressedLUTFormat.train(table, X_train, compressor=compressor)
                formats[half] = (fmt.count_bits_tensor(X) / X.numel() - bits, fmt)
            return formats[half][0]

        low, high = 0, max(1, round(2 ** (bits - 1)))
        while excess(high) < 0:
            if 2 * high > MAX_GRID:
                raise ValueError(f"bits: {bits} bits per element need a table of more than {MAX_GRID} points")
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if excess(middle) < 0:
                low = middle
            else:
                high = middle
        return min(formats.values(), key=lambda item: abs(item[0]))[1]


@dataclass
class Normal(Distribution):
    """The normal law; `scale` is its standard deviation."""

    scale: float = 1.0


@dataclass
class Laplace(Distribution):
    """The law of density exp(-|x| / scale) / (2 scale)."""

    scale: float = 1.0


@dataclass
class StudentT(Distribution):
    """Student's t with `df` degrees of freedom, times `scale`."""

    df: float
    scale: float = 1.0
