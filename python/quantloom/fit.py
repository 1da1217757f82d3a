"""Formats fitted to a tensor: what to fit is a ``Scaled``, what comes out a format of ``quantloom.formats``.

    import quantloom.fit as F
    import quantloom.formats as Q

    fmt = F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms", compressor="optimal").fit(w)
    fmt.quantise(w), fmt.count_bits_tensor(w), fmt.encode(w)

The search for a scale follows "Optimal Formats for Weight Quantisation" (arXiv 2505.12988). Candidates are
not tried on the tensor one by one: values are normalised and sorted once, and every table and scale is looked
up in prefix sums of that order, weighted by the square of each value's block scale, which gives its true
error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quantloom import _checks, _core, _fitting
from quantloom.formats import metrics
from quantloom.formats.base import BlockShape, Compressor, ScalarFormat, Scaling, TensorFormat
from quantloom.formats.compressed import CompressedLUTFormat, bits_of_counts
from quantloom.formats.crd import (
    crd_block_laplace,
    crd_block_normal,
    crd_block_t,
    crd_laplace,
    crd_normal,
    crd_t,
)
from quantloom.formats.elements import FPFormat, IntFormat
from quantloom.formats.lloyd_max import scaled_int8_3d8_lloyd_max, vlut_lloyd_max
from quantloom.formats.tables import LUTFormat
from quantloom.formats.wrappers import (
    MAX_ROTATION_SIZE,
    LinearScalingFormat,
    RandomRotationFormat,
    ScaledFormat,
    SparseFormat,
)

__all__ = ["ElementFamily", "Scaled"]

ElementFamily = Literal["int", "fp", "normal", "laplace", "t", "lloyd_max", "s3d8"]

_FAMILIES = ("int", "fp", "normal", "laplace", "t", "lloyd_max", "s3d8")
_FACTORS = tuple(2.0 ** (step / 4) for step in range(-8, 9))  # 17 from 1/4 to 4
_STUDENT_DF = tuple(np.geomspace(3, 100, 12).tolist())
_MOST_GRID_POINTS = (1 << 20) + 1
_THRESHOLD, _VECTOR_THRESHOLD, _SIGN_THRESHOLD = 1e-4, 1e-2, 1e-3


class _Sample(NamedTuple):
    """Normalised values as the error sees them."""

    values: Tensor  # float32
    weights: Tensor | None  # squared block scales times error weights; None: all the same


@dataclass
class Scaled(TensorFormat):
    """A block-scaled format to be fitted: ``3b-t(mode=asymmetric){1,64:BFLOAT16:absmax:search}``.

    Args:
        element_bits: bits of an element; fractional ones are possible for most families. With a compressor:
            the entropy.
        element_family: ``"int"``, ``"fp"`` (tries all numbers of exponent bits from 2 to element_bits - 1,
            unless `args` has ``exponent_bits``), ``"normal"``, ``"laplace"``, ``"t"`` (tries 12 degrees of
            freedom from 3 to 100, unless `args` has ``df``), ``"lloyd_max"``, or ``"s3d8"`` (3 values in 8
            bits, absmax scaling only). The three laws are tables of cube-root density; absmax scaling
            takes those for blocks, unless a block is a whole dimension.
        scale_format, block_shape, scaling: as of ``LinearScalingFormat``.
        scaling_match: ``"search"`` multiplies the elements by the best of 17 factors from 1/4 to 4 times the
            one that moments suggest, ``"moments"`` takes that one. Either way the elements become a
            ``ScaledFormat``.
        sparse_format, sparse_ratio: outliers stored on their own (``SparseFormat``), if the ratio is not 0.
        compressor: entropy-codes a uniform grid (family int), whose size is chosen so that `element_bits`
            is what is measured. A pair (out, train) measures with the second and counts with the first.
        vq_length, vq_format: vectors of so many elements (family lloyd_max), with the table in `vq_format`.
        rotation: the seed of a random rotation of all dimensions up to 32768. None: none; **0 is a seed**.
        args: for the table or ``IntFormat``, such as ``{"mode": "asymmetric"}``.

    ``fit`` gives the format. Order: outliers leave, the rest is rotated, scaled, rounded.
    """

    element_bits: float
    element_family: ElementFamily
    scale_format: ScalarFormat
    block_shape: BlockShape
    scaling: Scaling
    scaling_match: Literal["search", "moments"] = "search"
    sparse_format: ScalarFormat | None = None
    sparse_ratio: float = 0
    compressor: Compressor | tuple[Compressor, Compressor] | None = None
    vq_length: int | None = None
    vq_format: ScalarFormat | None = None
    rotation: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    _type: str = "fit_scaled"

    def __post_init__(self) -> None:
        _checks.choice("element_family", self.element_family, _FAMILIES)
        _checks.choice("scaling_match", self.scaling_match, ("search", "moments"))
        metrics.require_scaling(self.scaling)
        self.block_shape = tuple(self.block_shape)
        if isinstance(self.compressor, list):
            self.compressor = tuple(self.compressor)
        if self.compressor is not None and self.element_family != "int":
            raise ValueError(f"compressor: got family {self.element_family}, expected int")
        if self.vq_length is not None and self.element_family != "lloyd_max":
            raise ValueError(f"vq_length: got family {self.element_family}, expected lloyd_max")
        if self.vq_length is not None and self.vq_format is None:
            raise ValueError("vq_format: got None, expected the format of the table of vectors")
        if self.sparse_ratio and self.sparse_format is None:
            raise ValueError("sparse_format: got None, expected the format of outliers")

    def __str__(self) -> str:
        vector = "" if self.vq_length is None else f"x{self.vq_length}-{self.vq_format}"
        args = "(" + ",".join(f"{key}={value}" for key, value in self.args.items()) + ")" if self.args else ""
        compressor = self.compressor
        if compressor is not None:
            compressor = f"+Z{compressor if isinstance(compressor, str) else '|Z'.join(compressor)}"
        blocks = ",".join("*" if size is None else str(size) for size in self.block_shape)
        sparse = ""
        if self.sparse_ratio:
            ratio = f"{self.sparse_ratio:.0e}" if self.sparse_ratio < 1e-3 else f"{self.sparse_ratio:.1%}"
            sparse = f"+S[{ratio}:{self.sparse_format}]"
        return (
            f"{self.element_bits:.3g}b{vector}-{self.element_family}{args}{compressor or ''}"
            f"{{{blocks}:{self.scale_format}:{self.scaling}:{self.scaling_match}}}"
            f"{'' if self.rotation is None else '+R'}{sparse}"
        )

    @property
    def supports_error_weight(self) -> bool:
        """Whether ``fit`` can weight errors element by element: not behind a rotation, nor for vectors, nor
        for a compressed grid, which is chosen by its bits alone, nor where there is nothing to choose."""
        if self.rotation is not None or self.vq_length is not None or self.compressor is not None:
            return False
        if self.element_family in ("lloyd_max", "s3d8"):
            return self.element_family == "lloyd_max"
        searched = {"fp": "exponent_bits", "t": "df"}.get(self.element_family)
        return self.scaling_match == "search" or (searched is not None and searched not in self.args)

    def fit(self, tensor: Tensor, error_weight: Tensor | None = None) -> TensorFormat:
        """The format for a tensor (CPU or CUDA; fitted on the CPU).

        Args:
            error_weight: a weight >= 0 for the squared error of each element, such as diagonal Fisher
                information.

        Raises ValueError if the format cannot take weights, sizes do not fit, or there is no element.
        """
        if not tensor.numel():
            raise ValueError(f"tensor: got shape {list(tensor.shape)}, expected at least one element")
        if error_weight is not None:
            if not self.supports_error_weight:
                raise ValueError(f"error_weight: got one, expected None for {self}")
            if error_weight.shape != tensor.shape:
                raise ValueError(
                    f"error_weight: got shape {list(error_weight.shape)}, expected {list(tensor.shape)}"
                )
            error_weight = error_weight.detach().float().cpu()
        inner = tensor.detach().cpu()
        if self.sparse_ratio:
            inner, _, _ = SparseFormat.split(inner, self.sparse_ratio)
        dims = tuple(dim for dim, size in enumerate(inner.shape) if size <= MAX_ROTATION_SIZE)
        if self.rotation is not None:
            inner, _ = RandomRotationFormat.rotate(inner, dims, self.rotation)
        result: TensorFormat = self._fit_linear(inner, error_weight)
        if self.rotation is not None:
            result = RandomRotationFormat(result, dims, self.rotation)
        if self.sparse_ratio:
            result = SparseFormat(result, self.sparse_format, self.sparse_ratio)
        return result

    def _fit_linear(self, tensor: Tensor, error_weight: Tensor | None) -> LinearScalingFormat:
        if self.element_family == "s3d8":
            if self.scaling != "absmax":
                raise ValueError(f"scaling: got {self.scaling}, expected absmax for the family s3d8")
            args = {"threshold": _SIGN_THRESHOLD} | self.args
            return scaled_int8_3d8_lloyd_max(tensor, self.scale_format, self.block_shape, **args)
        if self.vq_length is not None:
            elements: TensorFormat = self._fit_vectors(tensor)
        elif self.compressor is not None:
            elements = self._fit_compressed(tensor)
        elif self.element_family == "lloyd_max":
            elements = self._fit_table(tensor, error_weight)
        else:
            elements = self._fit_scale(tensor, error_weight)
        return LinearScalingFormat(elements, self.scale_format, self.block_shape, self.scaling)

    def _sample(
        self, tensor: Tensor, element_range: tuple[float, float], error_weight: Tensor | None
    ) -> _Sample:
        scales = self.scale_format.quantise(
            metrics.block_scales(tensor, self.block_shape, self.scaling, element_range)
        )
        full = metrics.spread(scales, metrics.blocked_shape(tensor, self.block_shape), tuple(tensor.shape))
        values = metrics.safe_div(tensor.float(), full)
        if scales.numel() <= 1:
            return _Sample(values, error_weight)
        # Relative to the largest scale, so that squares do not underflow.
        weights = (full / scales.abs().max().clamp(min=torch.finfo(torch.float32).tiny)).square()
        return _Sample(values, weights if error_weight is None else weights * error_weight)

    def _candidates(self) -> Iterator[ScalarFormat]:
        bits, args = self.element_bits, self.args
        if self.element_family == "int":
            yield IntFormat(bits, **args)
        elif self.element_family == "fp":
            if bits != int(bits) or bits < 3:
                raise ValueError(f"element_bits: got {bits}, expected an integer >= 3 for the family fp")
            args = dict(args)
            widths = (args.pop("exponent_bits"),) if "exponent_bits" in args else range(2, min(int(bits), 9))
            for exponent_bits in widths:
                yield FPFormat.create(exponent_bits, int(bits) - 1 - exponent_bits, **args)
        else:
            yield from self._density_tables()

    def _density_tables(self) -> Iterator[LUTFormat]:
        bits, args = self.element_bits, dict(self.args)
        degrees = (args.pop("df"),) if "df" in args else _STUDENT_DF
        if self.scaling == "rms" or None in self.block_shape:
            tables: dict[str, Callable[..., LUTFormat]] = {"normal": crd_normal, "laplace": crd_laplace}
            first: tuple[Any, ...] = (bits,)
            student = crd_t
        else:
            tables = {"normal": crd_block_normal, "laplace": crd_block_laplace}
            first = (bits, math.prod(self.block_shape))
            student = crd_block_t
            args["scaling"] = self.scaling
        if self.element_family == "t":
            for df in degrees:
                yield student(*first, df, **args)
        else:
            yield tables[self.element_family](*first, **args)

    def _base_factor(self, elements: ScalarFormat) -> float:
        """What spreads the elements as moments of the data suggest: the range of uniform data of RMS 1."""
        if self.element_family == "int" and self.scaling == "rms":
            return math.sqrt(3) / elements.range[1]
        return 1.0

    def _scaled(self, elements: ScalarFormat, factor: float) -> ScaledFormat:
        """The elements times a factor; blocks are still scaled to the range of the elements, and may clip."""
        element_range = None if self.scaling == "rms" else elements.range
        return ScaledFormat.create(elements, factor, element_range)

    def _fit_scale(self, tensor: Tensor, error_weight: Tensor | None) -> ScalarFormat:
        """The candidate and the factor with the least error; ties go to the first."""
        best: tuple[float, ScalarFormat] | None = None
        samples: dict[tuple[float, float], _core.SortedValues] = {}
        candidates = list(self._candidates())
        steps = _FACTORS if self.scaling_match == "search" else (1.0,)
        for elements in candidates:
            base = self._base_factor(elements)
            factors = [base * step for step in steps]
            fits = [self._scaled(elements, factor) for factor in factors]
            if len(candidates) * len(factors) == 1:
                return fits[0]
            # rms scales do not depend on the range of the elements.
            key = (-1.0, 1.0) if self.scaling == "rms" else elements.range
            if key not in samples:
                sample = self._sample(tensor, key, error_weight)
                samples[key] = _fitting.sort_values(sample.values, sample.weights)
            if elements._codes_of() is None or getattr(elements, "rounding", "nearest") != "nearest":
                errors = [self._plain_error(tensor, fit, error_weight) for fit in fits]
            else:
                errors = _fitting.table_errors(samples[key], [elements.centroids], factors)[0].tolist()
            place = int(np.argmin(errors))
            if best is None or errors[place] < best[0]:
                best = (errors[place], fits[place])
        if best is None:
            raise ValueError(
                f"element_bits: got {self.element_bits}, expected more for {self.element_family}"
            )
        return best[1]

    def _plain_error(self, tensor: Tensor, elements: ScalarFormat, error_weight: Tensor | None) -> float:
        fmt = LinearScalingFormat(elements, self.scale_format, self.block_shape, self.scaling)
        error = (fmt.quantise(tensor.float()) - tensor.float()).double().square()
        return float((error if error_weight is None else error * error_weight).sum())

    def _fit_table(self, tensor: Tensor, error_weight: Tensor | None) -> LUTFormat:
        sample = self._sample(tensor, (-1.0, 1.0), error_weight)
        args = {"threshold": _THRESHOLD, "start": "kmeans++" if self.scaling == "rms" else "uniform_minmax"}
        args |= {("start" if key == "init" else key): value for key, value in self.args.items()}
        fit = _fitting.lloyd_max(sample.values, round(2**self.element_bits), weights=sample.weights, **args)
        return LUTFormat.create(fit.centroids.tolist(), "LM", (-1.0, 1.0))

    def _fit_vectors(self, tensor: Tensor) -> TensorFormat:
        sample = self._sample(tensor, (-1.0, 1.0), None)
        if sample.values.numel() % self.vq_length:
            raise ValueError(
                f"vq_length: got {self.vq_length}, expected a divisor of {sample.values.numel()} elements"
            )
        weights = sample.weights
        if weights is not None:
            weights = weights.reshape(-1, self.vq_length).mean(1)
        args = {"threshold": _VECTOR_THRESHOLD, "init": "kmeans++"} | self.args
        return vlut_lloyd_max(
            sample.values.reshape(-1, self.vq_length),
            self.element_bits,
            element_type=self.vq_format,
            range=(-1.0, 1.0),
            weight=weights,
            **args,
        )

    def _fit_compressed(self, tensor: Tensor) -> CompressedLUTFormat:
        """A uniform grid over the normalised values, of the odd size whose measured bits are closest.

        Values that repeat can take fewer bits on any grid: then the smallest of powers of two that takes as
        many as the finest."""
        out, train = (self.compressor,) * 2 if isinstance(self.compressor, str) else self.compressor
        values = self._sample(tensor, (-1.0, 1.0), None).values
        limit = float(values.abs().max()) if self.scaling == "rms" and values.numel() else 1.0
        limit = limit or 1.0
        ordered = _fitting.sort_values(values)

        def grid(half: int) -> LUTFormat:
            count = 2 * half + 1
            table = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu") * (limit / half)
            return LUTFormat.create(table.float(), f"GRID{{n={count}}}", (-limit, limit))

        def bits(half: int) -> float:
            lut = grid(half)
            if train == "bz2":
                total: float = CompressedLUTFormat.count_bits_compressed(values, lut, train)
            else:
                counts = _fitting.table_counts(ordered, lut.values)
                total = bits_of_counts(counts, None, train)
            return total / max(1, values.numel())

        low, high, most = 1, 2, (_MOST_GRID_POINTS - 1) // 2
        while high < most and bits(high) < self.element_bits:
            low, high = high, 2 * high
        if bits(high) < self.element_bits:
            reached = bits(high)
            if reached > bits(low):
                raise ValueError(
                    f"element_bits: got {self.element_bits}, more than a grid of {2 * high + 1} points gives"
                )
            half = next(half for half in (1 << step for step in range(21)) if bits(half) >= reached)
            return CompressedLUTFormat.train(grid(half), values, compressor=out, **self.args)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if bits(middle) < self.element_bits else (low, middle)
        half = min((low, high), key=lambda size: abs(bits(size) - self.element_bits))
        return CompressedLUTFormat.train(grid(half), values, compressor=out, **self.args)
