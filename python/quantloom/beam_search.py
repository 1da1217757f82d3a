"""The rounding for additive quantization: codes by beam search, tables and scales by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core, _devices
from quantloom.calibration import Hessian, as_hessian, require_same_device
from quantloom.formats import Additive
from quantloom.rounding import HESSIANS, Rounding, RoundingReport
from quantloom.tensors import PackedTensor

__all__ = ["BeamSearch", "refit_tables", "search_codes"]

_OPTIONS = {
    "beam": int,
    "seed": int,
    "damp": float,
    "rounds": int,
    "tolerance": float,
    "refit": int,
    "rate": float,
}
_STEPS = {"cg": 10, "adam": 100}  # of a refit, unless told
Refit = tuple[int, bool, bool, float, tuple[float, float]]  # steps, scales, Adam, rate, betas


@dataclass(frozen=True, eq=False)
class BeamSearch(Rounding):
    """Codes, tables and scales of an ``Additive`` format that together make ``tr(E H E^T)``, the squared
    error of the outputs, small (AQLM: Egiazarian et al., 2024).

    Tables are fitted by residual k-means, weighted by diag(H). Then come rounds of two steps: tables and
    scales by weighted least squares for the codes as they are (conjugate gradients), and a sweep that
    searches the codes of all blocks, with `beam` hypotheses for each group of rows. The loss falls with every
    round; the report's ``losses`` has it.

    Args:
        hessian: a ``Hessian`` or an array ``[k, k]`` (float32 or float64) that is taken as H itself.
            None only inside a ``Recipe``.
        beam: hypotheses kept, 1 to 8. A sweep takes `beam` times as long.
        order: of the blocks: ``"shuffled"``, in a random order that changes with each sweep, or
            ``"natural"``, from the first column on.
        seed: of that order.
        float64: True: products and scores in float64: the codes of the search by its definition, several
            times slower.
        damp: added to the diagonal of H, relative to its mean; >= 0.
        rounds: at most; 0 leaves tables and codes as they were fitted.
        tolerance: rounds end once one lowers the loss by less than this part of it; from 0 to below 1.
        refit: steps of the refit in a round; 0: tables and scales stay. None: 10, or 100 of Adam.
        refit_scales: whether scales are fitted, too.
        solver: of the refit: ``"cg"``, conjugate gradients, or ``"adam"`` (Kingma, Ba, 2015, with AMSGrad),
            as published, which takes many more steps.
        rate, betas: the learning rate and the two decay rates of Adam, with the published defaults; a scale
            counts as the norm of what it scales, tables accordingly, and the loss is the mean over rows.
        start: the first codes: ``"nearest"``, or ``"gptq"``: with feedback of errors.
        sweeps: of k-means for each of the first tables, at most.
        held_out: optional, a Hessian of other tokens, for the report.

    On a CUDA device everything runs there; codes are scored by tensor cores (in float32 mode), sums are taken
    in another order than on the CPU, and ``solver="adam"`` and formats with `scale_bits` or `table_bits`
    raise RuntimeError.

    The short form is ``beam_search[:beam=N][:natural][:seed=N][:float64][:damp=X][:rounds=N][:tolerance=X]
    [:refit=N][:adam][:rate=X][:gptq]``.
    """

    hessian: Hessian | Any = None
    beam: int = 1
    order: str = "shuffled"
    seed: int = 0
    float64: bool = False
    damp: float = 0.0
    rounds: int = 100
    tolerance: float = 0.01
    refit: int | None = None
    refit_scales: bool = True
    solver: str = "cg"
    rate: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.95)
    start: str = "nearest"
    sweeps: int = 20
    held_out: Hessian | Any = None

    name = "beam_search"  # in descriptions
    scale_search = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "hessian", as_hessian("hessian", self.hessian))
        set_field(self, "held_out", as_hessian("held_out", self.held_out))
        set_field(self, "beam", _checks.integer("beam", self.beam, 1))
        if self.beam > 8:
            raise ValueError(f"beam: got {self.beam}, expected 1 to 8")
        _checks.choice("order", self.order, ("natural", "shuffled"))
        _checks.choice("start", self.start, ("nearest", "gptq"))
        _checks.choice("solver", self.solver, tuple(_STEPS))
        if self.refit is None:
            set_field(self, "refit", _STEPS[self.solver])
        set_field(self, "rate", _rate(self.rate))
        set_field(self, "betas", _betas(self.betas))
        _checks.boolean("float64", self.float64)
        _checks.boolean("refit_scales", self.refit_scales)
        for name in ("seed", "rounds", "refit", "sweeps"):
            set_field(self, name, _checks.integer(name, getattr(self, name), 0))
        for name in ("damp", "tolerance"):
            set_field(self, name, _checks.real(name, getattr(self, name)))
        if self.damp < 0:
            raise ValueError(f"damp: got {self.damp}, expected a number >= 0")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: got {self.tolerance}, expected a number from 0 to below 1")

    @property
    def spec(self) -> str:
        default = BeamSearch(solver=self.solver)
        if any(getattr(self, name) != getattr(default, name) for name in ("refit_scales", "sweeps", "betas")):
            raise ValueError("rounding: refit_scales, sweeps and betas have no short form")
        options = ["natural"] if self.order == "natural" else []
        options += ["float64"] if self.float64 else []
        options += ["gptq"] if self.start == "gptq" else []
        options += ["adam"] if self.solver == "adam" else []
        options += [
            f"{name}={getattr(self, name)!r}"
            for name in _OPTIONS
            if getattr(self, name) != getattr(default, name)
        ]
        return ":".join(["beam_search", *options])

    @classmethod
    def parse(cls, spec: str) -> BeamSearch:
        """The rounding of a short form."""
        words = {
            "natural": {"order": "natural"},
            "float64": {"float64": True},
            "gptq": {"start": "gptq"},
            "adam": {"solver": "adam"},
        }
        settings: dict[str, Any] = {}
        for option in spec.split(":")[1:]:
            key, equals, value = option.partition("=")
            try:
                update = words[option] if not equals else {key: _OPTIONS[key](value)}
            except (KeyError, ValueError):
                raise ValueError(
                    f"rounding: got option {option!r} in {spec!r}, which beam_search does not have"
                ) from None
            if settings.keys() & update.keys():
                raise ValueError(f"rounding: got option {key!r} twice in {spec!r}")
            settings |= update
        return cls(**settings)

    @classmethod
    def from_fields(cls, settings: dict[str, Any]) -> BeamSearch:
        """Reads the fields of ``to_json`` back. Raises ValueError."""
        known = {item.name for item in fields(cls)} - set(HESSIANS)
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"rounding: got unknown keys {unknown}, expected {sorted(known)}")
        return cls(**settings)

    @property
    def _search(self) -> tuple[int, bool, int, bool, float]:
        return self.beam, self.order == "shuffled", self.seed, self.float64, self.damp

    @property
    def _refit(self) -> Refit:
        return self.refit, self.refit_scales, self.solver == "adam", self.rate, self.betas


def _rate(rate: Any) -> float:
    rate = _checks.real("rate", rate)
    if rate <= 0:
        raise ValueError(f"rate: got {rate}, expected a number above 0")
    return rate


def _betas(betas: Any) -> tuple[float, float]:
    expected = "two numbers from 0 to below 1"
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: got {betas!r}, expected {expected}")
    first, second = (_checks.real("betas", beta) for beta in betas)
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"betas: got {(first, second)}, expected {expected}")
    return first, second


def require_additive(rounding: Any, format: Any) -> None:
    """Raises ValueError for the rounding with another format."""
    if isinstance(rounding, BeamSearch) and not isinstance(format, Additive):
        raise ValueError(f"format: got {format.spec} with BeamSearch, expected additive")


def quantize_searched(
    matrix: _arrays.Array, format: Additive, rounding: BeamSearch, threads: int
) -> PackedTensor:
    """``ql.quantize`` with this rounding, of arguments that are checked."""
    choices = (
        rounding._search,
        rounding._refit,
        rounding.start == "gptq",
        rounding.rounds,
        rounding.tolerance,
        rounding.sweeps,
        rounding.held_out and rounding.held_out._core,
        threads,
    )
    if matrix.device != "cpu":
        from quantloom.quantizing import empty_planes

        planes = empty_planes(format, matrix)
        filled = PackedTensor(format, matrix.shape, planes)._core()
        with _devices.current(matrix.device) as stream:
            report = _core.round_beam_search_cuda(
                matrix.core, filled, rounding.hessian._core, *choices, stream
            )
        return PackedTensor(format, matrix.shape, planes, _report(report))
    packed, report = _core.round_beam_search(matrix.core, format.to_json(), rounding.hessian._core, *choices)
    return PackedTensor._from_core(packed, matrix.kind, _report(report))


def _report(fields: dict[str, Any]) -> RoundingReport:
    lists = {name: tuple(fields[name]) for name in ("damping_tried", "losses")}
    return RoundingReport(**(fields | lists))


def _checked(w: Any, q: PackedTensor, hessian: Any) -> tuple[_arrays.Array, Hessian]:
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    matrix = _arrays.matrix("w", w, cpu=False)
    hessian = as_hessian("hessian", hessian)
    if hessian is None:
        raise ValueError("hessian: got None, expected a Hessian")
    require_same_device("hessian", hessian, matrix.device)
    if q.device != matrix.device:
        raise TypeError(f"q: got planes on {q.device}, expected them on {matrix.device}, as w")
    return matrix, hessian


def _on_device(matrix: _arrays.Array, q: PackedTensor, change: Any) -> PackedTensor:
    """A copy of `q`, whose planes ``change(packed, stream)`` rewrites on their CUDA device."""
    planes = {name: plane.clone() for name, plane in q.planes.items()}
    copy = PackedTensor(q.format, q.shape, planes)
    with _devices.current(matrix.device) as stream:
        change(copy._core(), stream)
    return PackedTensor(q.format, q.shape, planes)


def search_codes(
    w: Any,
    q: PackedTensor,
    hessian: Any,
    *,
    beam: int = 1,
    order: str = "natural",
    seed: int = 0,
    float64: bool = False,
    damp: float = 0.0,
    code_penalties: Any = None,
    row_groups: Sequence[int] | None = None,
    threads: int = 0,
) -> PackedTensor:
    """One sweep of ``BeamSearch`` over all blocks of `q`, a packed tensor of the format ``Additive``, from
    its codes; tables and scales stay.

    Args:
        w, q, hessian: the weights, what they are packed to, and H, on one device.
        beam, order, seed, float64, damp: as of ``BeamSearch``.
        code_penalties: None, or numbers ``[codebooks, 2**bits]`` that each use of a code adds to the loss of
            its group of rows.
        row_groups: None for all, else the groups of rows whose codes are searched.
        threads: 0 for OpenMP's default. The result does not depend on it.
    """
    matrix, hessian = _checked(w, q, hessian)
    search = BeamSearch(beam=beam, order=order, seed=seed, float64=float64, damp=damp)._search
    penalties = [] if code_penalties is None else np.asarray(code_penalties, np.float32).ravel().tolist()
    rows = [] if row_groups is None else [_checks.integer("row_groups", r, 0) for r in row_groups]
    if row_groups is not None and not rows:
        return q
    threads = _checks.thread_count(threads)
    if matrix.device != "cpu":
        return _on_device(
            matrix,
            q,
            lambda packed, stream: _core.search_codes_cuda(
                matrix.core, packed, hessian._core, search, penalties, rows, stream
            ),
        )
    packed = _core.search_codes(matrix.core, q._core(), hessian._core, search, penalties, rows, threads)
    return PackedTensor._from_core(packed, q.kind)


def refit_tables(
    w: Any,
    q: PackedTensor,
    hessian: Any,
    *,
    steps: int | None = None,
    tables: bool = True,
    scales: bool = True,
    solver: str = "cg",
    rate: float = 1e-4,
    betas: tuple[float, float] = (0.0, 0.95),
    damp: float = 0.0,
    threads: int = 0,
) -> PackedTensor:
    """The least squares of the tables of `q`, a packed tensor of the format ``Additive``, for its codes and
    scales; then of its scales: the other step of ``BeamSearch``. What is not less than before stays.

    Args:
        w, q, hessian: the weights, what they are packed to, and H, on one device.
        steps: at most; None: 10, or 100 of Adam.
        tables, scales: whether they are fitted.
        solver, rate, betas: as of ``BeamSearch``. Adam moves tables and scales together.
        damp: added to the diagonal of H, relative to its mean; >= 0.
        threads: 0 for OpenMP's default. The result does not depend on it.
    """
    matrix, hessian = _checked(w, q, hessian)
    _checks.choice("solver", solver, tuple(_STEPS))
    steps = _STEPS[solver] if steps is None else _checks.integer("steps", steps, 0)
    scales = _checks.boolean("scales", scales)
    refit: Refit = (steps, scales, solver == "adam", _rate(rate), _betas(betas))
    choices = (_checks.boolean("tables", tables), _checks.real("damp", damp))
    threads = _checks.thread_count(threads)
    if matrix.device != "cpu":
        return _on_device(
            matrix,
            q,
            lambda packed, stream: _core.refit_tables_cuda(
                matrix.core, packed, hessian._core, refit, *choices, stream
            ),
        )
    packed = _core.refit_tables(matrix.core, q._core(), hessian._core, refit, *choices, threads)
    return PackedTensor._from_core(packed, q.kind)
