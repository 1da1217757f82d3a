"""Roundings: how the codes of a format are chosen."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from quantloom import _checks
from quantloom.calibration import Hessian, as_hessian
from quantloom.formats import Format, Outliers, parse_format

__all__ = [
    "GPTQ",
    "Nearest",
    "OutlierSearch",
    "Rounding",
    "RoundingReport",
    "ScaleSearch",
    "parse_rounding",
    "rounding_from_json",
]


@dataclass(frozen=True)
class ScaleSearch:
    """Shrinks each group's range to the factor with the least weighted rounding error.

    The error of a group is ``sum(weight * |w - w'|**norm)`` over its columns, with weight = diag(H) where
    a Hessian is at hand and 1 otherwise; the codes of the trial are chosen by nearest rounding.

    Args:
        steps: factors tried, evenly spaced from 1 down to `smallest`; at least 1.
        smallest: the smallest factor, in (0, 1).
        norm: > 0; 2 is the squared error.
        output_error: measure ``e^T H e`` instead, for the errors e of a group's columns and its block of the
            Hessian: what they add to the squared output error, correlations between inputs included. Needs a
            Hessian and norm 2.
    """

    steps: int = 40
    smallest: float = 0.4
    norm: float = 2.0
    output_error: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _checks.integer("steps", self.steps, 1))
        object.__setattr__(self, "smallest", _checks.real("smallest", self.smallest))
        object.__setattr__(self, "norm", _checks.real("norm", self.norm))
        if self.steps > 10_000:
            raise ValueError(f"steps: got {self.steps}, expected at most 10000")
        if not 0 < self.smallest < 1:
            raise ValueError(f"smallest: got {self.smallest}, expected a factor in (0, 1)")
        if not self.norm > 0:
            raise ValueError(f"norm: got {self.norm}, expected a number > 0")
        _checks.boolean("output_error", self.output_error)
        if self.output_error and self.norm != 2:
            raise ValueError(f"norm: got {self.norm}, expected 2 for a search by output error")

    def to_fields(self) -> dict[str, Any]:
        """The settings by name, without those that later versions added and that are at their default."""
        fields = {"norm": self.norm, "smallest": self.smallest, "steps": self.steps}
        return fields | ({"output_error": True} if self.output_error else {})


@dataclass(frozen=True)
class OutlierSearch:
    """Which weights ``GPTQ`` keeps in float16 beside a dense format (SpQR: Dettmers et al., 2023).

    A weight's rounding error counts squared, over its entry on the diagonal of the inverse of what is left of
    H when the walk comes to it. Before a group is fitted, weights are left out without which the others round
    better by more than a threshold; on the walk, weights that round worse than it become outliers. Just one
    of these is given:

    Args:
        percent: of the weights of a matrix, at most: from 0 to below 100.
        bits: stored bits per weight, at most: of all planes of a matrix, padding included.
        threshold: > 0, in units of the mean over columns of (mean w^2 / that entry): weights beyond it.

    For the first two a threshold is searched, matrix by matrix, that spends all but 1% of the outliers they
    allow, where counts let it. That takes 5 to 10 walks; on matrices of 2048 rows and more, most of them over
    an eighth of the rows.
    """

    percent: float | None = None
    bits: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = {item.name for item in fields(self) if getattr(self, item.name) is not None}
        if len(given) != 1:
            got = ", ".join(sorted(given)) or "none"
            raise ValueError(f"percent, bits, threshold: got {got}, expected one of them")
        for name in given:
            object.__setattr__(self, name, _checks.real(name, getattr(self, name)))
        if self.percent is not None and not 0 <= self.percent < 100:
            raise ValueError(f"percent: got {self.percent}, expected a number from 0 to below 100")
        if self.bits is not None and not 0 < self.bits <= 64:
            raise ValueError(f"bits: got {self.bits}, expected a number above 0, at most 64")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold: got {self.threshold}, expected a number > 0")

    @property
    def _option(self) -> str:
        if self.percent is not None:
            return f"outliers={self.percent!r}%"
        return f"bits={self.bits!r}" if self.bits is not None else f"outlier-threshold={self.threshold!r}"

    def _stored_format(self, format: Format, n: int, k: int) -> Format:
        """What a matrix [n, k] is stored in, with as many outliers as the search may take."""
        if self.threshold is not None or not n * k:
            return format
        if self.percent is not None:
            return Outliers(format, count=int(self.percent * n * k / 100))
        none, one = (Outliers(format, count=count).size_in_bits(n, k) for count in (0, 1))
        return Outliers(format, count=min(max(0, int((self.bits * n * k - none) // (one - none))), n * k))


# What a rounding takes from calibration, in place of a description.
HESSIANS = ("hessian", "held_out", "output_hessian")
# Settings that descriptions leave out where they are None.
_LEFT_OUT = ("ratio_factors",)


class Rounding:
    """Base class of all roundings."""

    hessian: Any
    held_out: Any
    name = ""  # in descriptions; empty: that of the class

    @property
    def spec(self) -> str:
        """The short form, such as ``"gptq:search"``; ``parse_rounding`` reads it back."""
        raise NotImplementedError

    def to_json(self) -> str:
        """The settings, without Hessians, as a JSON object; ``rounding_from_json`` reads it back."""
        settings: dict[str, Any] = {"rounding": self.name or type(self).__name__.lower()}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if item.name in HESSIANS or (item.name in _LEFT_OUT and value is None):
                continue
            if isinstance(value, ScaleSearch):
                value = value.to_fields()
            if item.name == "outliers":
                if value is None:
                    continue
                value = {part.name: getattr(value, part.name) for part in fields(value)}
            settings[item.name] = list(value) if isinstance(value, tuple) else value
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))

    def stored_format(self, format: Format | str, n: int, k: int) -> Format:
        """What a matrix [n, k] is stored in that is rounded to `format`: with outliers, if the rounding adds
        some, as many as it may."""
        search, format = self.outlier_search, parse_format(format)
        return format if search is None else search._stored_format(format, n, k)

    @property
    def outlier_search(self) -> OutlierSearch | None:
        """That of the rounding, or of the one that it leads to."""
        return getattr(getattr(self, "then", self), "outliers", None)


def _check_scale_search(value: Any) -> None:
    if value is not None and not isinstance(value, ScaleSearch):
        raise TypeError(f"scale_search: got {_checks.type_name(value)}, expected None or a ScaleSearch")


def _search_options(search: ScaleSearch | None) -> list[str]:
    if search is None:
        return []
    default = ScaleSearch()
    if replace(search, steps=default.steps, output_error=False) != default:
        raise ValueError(f"scale_search: got {search}, which has no short form: only `steps` can differ")
    name = "output-search" if search.output_error else "search"
    return [name if search.steps == default.steps else f"{name}={search.steps}"]


@dataclass(frozen=True, eq=False)
class Nearest(Rounding):
    """Round to nearest (RTN): every weight takes the nearest code of its group's own grid.

    Args:
        scale_search: None, or a ``ScaleSearch`` for each group's range.
        hessian: optional, a ``Hessian`` or an array ``[k, k]`` (float32 or float64): weights the scale
            search by its diagonal and fills the report's proxy losses.
        held_out: optional, the same of other tokens, for the report.
    """

    scale_search: ScaleSearch | None = None
    hessian: Hessian | Any = None
    held_out: Hessian | Any = None

    def __post_init__(self) -> None:
        _check_scale_search(self.scale_search)
        object.__setattr__(self, "hessian", as_hessian("hessian", self.hessian))
        object.__setattr__(self, "held_out", as_hessian("held_out", self.held_out))

    @property
    def spec(self) -> str:
        return ":".join(["nearest", *_search_options(self.scale_search)])


def _numbers(argument: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{argument}: got {_checks.type_name(values)}, expected a sequence of numbers")
    return tuple(_checks.real(argument, value) for value in values)


@dataclass(frozen=True, eq=False)
class GPTQ(Rounding):
    """Error feedback: each column's rounding error is pushed onto the columns to come, weighted by the
    inverse of the Hessian (GPTQ: Frantar, Ashkboos, Hoefler and Alistarh, 2022).

    Args:
        hessian: a ``Hessian`` or an array ``[k, k]`` (float32 or float64) that is taken as H itself.
            None only inside a ``Recipe``.
        damp: added to the diagonal of H, relative to its mean; >= 0.
        damp_ladder: rising values tried in turn if H plus damping cannot be factored; the report says
            which was used.
        act_order: walk the columns in order of falling diag(H).
        static_groups: True: the groups are of consecutive columns and are fitted before the walk.
            False: a group is fitted on the updated weights when its first column comes; with `act_order`
            its columns are then not consecutive and a plane ``group_index`` is stored.
        block: columns between updates of the whole remainder; changes the speed only, up to the order in
            which floating-point sums are taken.
        scale_search: None, or a ``ScaleSearch`` weighted by diag(H); with `outliers` and without
            `static_groups`, by what errors cost on the walk.
        held_out: optional, a Hessian of other tokens, for the report.
        outliers: None, or an ``OutlierSearch``: the result's format is then ``Outliers`` around the format
            asked for, which must have scalar codes (``Uniform``, ``Codebook``, ``SpQR``). The
            threshold found on a CUDA device may be another one, within the same budget.
        ratio_factors: of a ``trellis`` with its rotation: how large the weights are to the codebook, as
            factors of what is best for weights coded as they come. Feedback adds errors to them, which take
            room at the codebook's ends. Several factors, each in [0.25, 4], are tried with feedback on half
            of the rows of tiles, at most 8, and a parabola through their losses says which factor between
            them is best; a single one is taken as it is. None: (0.65, 0.75, 0.85, 0.95) below 2 bits, (0.75,
            0.85, 0.95, 1.05) below 3, and (0.96,) from 3 bits on, where a search gains nothing. It took 9%
            off the loss at 1 bit and 2.5% at 2 on layers of a small model, and 0.14 s for 4096 inputs on an
            H200, where 4096 outputs take 0.26 s; on the CPU an eighth of the time at 4096 outputs, more of
            smaller layers.
        output_hessian: of a ``trellis`` with its rotation, optional: a ``Hessian`` of the layer's outputs,
            such as one of the gradients of a loss with respect to them
            (``quantloom.models.output_hessians``).
            Feedback then runs along rows as well as along columns and minimises ``tr(H_out E H E^T)``, what
            the errors of all outputs cost together (Tseng, Sun and De Sa, 2025). At 2 bits it took a quarter
            off the KL divergence of a small model, 9% of a larger one; on a GPU it takes about twice the
            time.
    """

    hessian: Hessian | Any = None
    damp: float = 0.01
    damp_ladder: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    act_order: bool = True
    static_groups: bool = True
    block: int = 128
    scale_search: ScaleSearch | None = None
    held_out: Hessian | Any = None
    outliers: OutlierSearch | None = None
    ratio_factors: tuple[float, ...] | None = None
    output_hessian: Hessian | Any = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "hessian", as_hessian("hessian", self.hessian))
        set_field(self, "held_out", as_hessian("held_out", self.held_out))
        set_field(self, "output_hessian", as_hessian("output_hessian", self.output_hessian))
        set_field(self, "damp", _checks.real("damp", self.damp))
        if self.damp < 0:
            raise ValueError(f"damp: got {self.damp}, expected a number >= 0")
        ladder = _numbers("damp_ladder", self.damp_ladder)
        if any(low >= high for low, high in pairwise(ladder)) or any(v <= 0 for v in ladder):
            raise ValueError(f"damp_ladder: got {ladder}, expected rising numbers > 0")
        set_field(self, "damp_ladder", ladder)
        _checks.boolean("act_order", self.act_order)
        _checks.boolean("static_groups", self.static_groups)
        set_field(self, "block", _checks.integer("block", self.block, 1))
        _check_scale_search(self.scale_search)
        if self.outliers is not None and not isinstance(self.outliers, OutlierSearch):
            got = _checks.type_name(self.outliers)
            raise TypeError(f"outliers: got {got}, expected None or an OutlierSearch")
        if self.ratio_factors is not None:
            factors = _numbers("ratio_factors", self.ratio_factors)
            if not factors or any(not 0.25 <= factor <= 4 for factor in factors):
                raise ValueError(f"ratio_factors: got {factors}, expected numbers from 0.25 to 4")
            set_field(self, "ratio_factors", factors)

    @property
    def spec(self) -> str:
        default = GPTQ()
        if self.block != default.block or self.damp_ladder != default.damp_ladder:
            raise ValueError("rounding: block and damp_ladder have no short form")
        options = _search_options(self.scale_search)
        if self.outliers is not None:
            options.append(self.outliers._option)
        if self.damp != default.damp:
            options.append(f"damp={self.damp!r}")
        if not self.act_order:
            options.append("no-act-order")
        if not self.static_groups:
            options.append("dynamic-groups")
        if self.ratio_factors is not None:
            options.append("ratio=" + ",".join(map(repr, self.ratio_factors)))
        return ":".join(["gptq", *options])


@dataclass(frozen=True)
class RoundingReport:
    """What a rounding really did. Losses are NaN where no Hessian was given.

    Attributes:
        method: the method that made the codes, ``"nearest"``, ``"gptq"`` or ``"beam_search"``; ``"awq+..."``
            if channels were scaled before.
        scale_search, act_order, static_groups: as used.
        damping: as used in the end, relative to mean(diag(H)).
        damping_tried: the values tried, up to and including `damping`.
        dead_columns: inputs that were zero in all calibration tokens; their weights became zero.
        tokens: calibration tokens behind the Hessian.
        mean_squared_error: of the weights.
        proxy_loss: tr(E H E^T) with E = W - W', the mean squared output error per token summed over
            out_features; ..._nearest: the same for nearest rounding in the same format; held_out_...: the
            same on the held-out Hessian.
        outliers: that an ``OutlierSearch`` found; outlier_threshold: the threshold it found them by, infinite
            for none, NaN without a search.
        two_sided_loss, two_sided_loss_nearest: tr(H_out E H E^T), with a Hessian of the outputs.
        losses: of ``BeamSearch``: tr(E H E^T), with its damping, of the start, after each round, in the end.
        trellis_ratio: of GPTQ to a rotated trellis: the standard deviation of the weights over the codebook's
            RMS, as used.
    """

    method: str
    scale_search: bool
    act_order: bool
    static_groups: bool
    damping: float
    damping_tried: tuple[float, ...]
    dead_columns: int
    tokens: int
    mean_squared_error: float
    proxy_loss: float
    proxy_loss_nearest: float
    held_out_loss: float
    held_out_loss_nearest: float
    outliers: int = 0
    outlier_threshold: float = math.nan
    two_sided_loss: float = math.nan
    two_sided_loss_nearest: float = math.nan
    trellis_ratio: float = math.nan
    losses: tuple[float, ...] = ()


def parse_rounding(spec: str | Rounding) -> Rounding:
    """The rounding of a short form; a ``Rounding`` is returned as it is.

    ``nearest[:search[=STEPS]]``,
    ``gptq[:search[=STEPS]][:damp=X][:no-act-order][:dynamic-groups][:ratio=X[,X...]]``,
    ``awq[:steps=N][:folded][+ROUNDING]`` or ``smoothquant[:alpha=X|:search[=STEPS]][:folded][+ROUNDING]``
    with one of the first two after the plus, or ``beam_search`` with the options of ``BeamSearch``;
    ``output-search`` in place of ``search`` is a search by output error; ``gptq`` takes
    ``:outliers=PERCENT%``, ``:bits=BITS`` or
    ``:outlier-threshold=X`` for an ``OutlierSearch``.
    """
    if isinstance(spec, Rounding):
        return spec
    _checks.string("rounding", spec, "a Rounding or a short form such as 'gptq'")
    name, *options = spec.split(":")
    if name.partition("+")[0] == "awq":
        from quantloom.awq import AWQ

        return AWQ.parse(spec)
    if name.partition("+")[0] == "smoothquant":
        from quantloom.smoothquant import SmoothQuant

        return SmoothQuant.parse(spec)
    if name == "beam_search":
        from quantloom.beam_search import BeamSearch

        return BeamSearch.parse(spec)
    if name not in ("nearest", "gptq"):
        names = "nearest, gptq, awq, smoothquant or beam_search"
        raise ValueError(f"rounding: got {spec!r}, expected {names}, with options after colons")
    settings: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        try:
            if key in ("search", "output-search"):
                steps = {"steps": int(value)} if value else {}
                update = {"scale_search": ScaleSearch(**steps, output_error=key == "output-search")}
            elif name == "gptq" and key == "damp":
                update = {"damp": float(value)}
            elif name == "gptq" and key == "outliers" and value.endswith("%"):
                update = {"outliers": OutlierSearch(percent=float(value[:-1]))}
            elif name == "gptq" and key == "bits":
                update = {"outliers": OutlierSearch(bits=float(value))}
            elif name == "gptq" and key == "outlier-threshold":
                update = {"outliers": OutlierSearch(threshold=float(value))}
            elif name == "gptq" and key == "ratio":
                update = {"ratio_factors": tuple(map(float, value.split(",")))}
            elif name == "gptq" and option == "no-act-order":
                update = {"act_order": False}
            elif name == "gptq" and option == "dynamic-groups":
                update = {"static_groups": False}
            else:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"rounding: got option {option!r} in {spec!r}, which {name} does not have"
            ) from None
        if settings.keys() & update.keys():
            raise ValueError(f"rounding: got option {key!r} twice in {spec!r}")
        settings |= update
    return GPTQ(**settings) if name == "gptq" else Nearest(**settings)


def rounding_from_json(text: str) -> Rounding:
    """Reads ``Rounding.to_json`` back. Raises ValueError for unknown names and keys."""
    settings = _checks.json_object("rounding", text)
    kinds = {"gptq": GPTQ, "nearest": Nearest}
    name = settings.pop("rounding", None)
    if name == "awq":
        from quantloom.awq import AWQ

        return AWQ.from_fields(settings)
    if name == "smoothquant":
        from quantloom.smoothquant import SmoothQuant

        return SmoothQuant.from_fields(settings)
    if name == "beam_search":
        from quantloom.beam_search import BeamSearch

        return BeamSearch.from_fields(settings)
    kind = kinds.get(name)
    if kind is None:
        names = "awq, beam_search, gptq, nearest, smoothquant"
        raise ValueError(f"rounding: got {text!r}, expected a description with one of {names}")
    known = {item.name for item in fields(kind)} - set(HESSIANS)
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"rounding: got unknown keys {unknown}, expected {sorted(known)}")
    search = settings.get("scale_search")
    if search is not None:
        if not isinstance(search, dict) or search.keys() - {"steps", "smallest", "norm", "output_error"}:
            raise ValueError(
                f"rounding scale_search: got {search!r}, expected steps, smallest, norm, output_error"
            )
        settings["scale_search"] = ScaleSearch(**search)
    outliers = settings.get("outliers")
    if outliers is not None:
        if not isinstance(outliers, dict) or outliers.keys() - {"percent", "bits", "threshold"}:
            raise ValueError(f"rounding outliers: got {outliers!r}, expected percent, bits or threshold")
        settings["outliers"] = OutlierSearch(**outliers)
    return kind(**settings)
