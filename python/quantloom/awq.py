"""Activation-aware scaling of input channels, before any rounding."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from quantloom import _arrays, _checks, _core, _devices
from quantloom.calibration import Hessian, as_hessian
from quantloom.channel_scales import ChannelScales
from quantloom.formats import Format
from quantloom.quantizing import quantize
from quantloom.rounding import GPTQ, Nearest, Rounding, ScaleSearch
from quantloom.tensors import PackedTensor

__all__ = ["AWQ", "ChannelScaling", "ScaleChoice", "search_channel_scales"]


class ChannelScaling(Rounding):
    """Base class of roundings that scale input channels first, then round by ``then``."""

    then: Rounding
    explicit: bool
    name: str  # in descriptions and reports

    def _check_then(self) -> None:
        from quantloom.rounding import parse_rounding

        then = parse_rounding(self.then)
        if not isinstance(then, (Nearest, GPTQ)):
            raise TypeError(f"then: got {_checks.type_name(then)}, expected Nearest(...) or GPTQ(...)")
        if then.hessian is not None or then.held_out is not None:
            given = type(self).__name__
            raise ValueError(f"then: got a Hessian, expected it as an argument of {given} itself")
        object.__setattr__(self, "then", then)


@dataclass(frozen=True, eq=False)
class AWQ(ChannelScaling):
    """Scales input channels by a power of their mean magnitude before they are rounded (AWQ: Lin, Tang, Tang,
    Yang, Chen, Wang, Xiao, Dang, Gan and Han, 2024).

    ``W diag(s)`` is rounded in place of W, with ``s = m**a`` for the mean magnitude m of each input. The
    exponent a is that with the least output error of nearest rounding, tr(E H E^T), over all layers that
    share the inputs. For one matrix the scales stay beside it as a transform, ``ChannelScales``; in models
    they move into the layer before wherever that leaves the model's function exactly as it was.

    Args:
        then: the rounding of the scaled weights, without Hessians: ``Nearest(...)`` or ``GPTQ(...)``, or a
            short form. By default ``Nearest`` with the clipping of AWQ: each group's range shrinks to the
            factor in 1, 0.95, ..., 0.55 with the least output error of the group, e^T H e.
        steps: exponents tried, ``0, 1/steps, ..., (steps - 1)/steps``.
        explicit: in models, what to do with inputs whose scales fit into no layer before: True keeps them
            beside the layer, which divides its inputs at run time; False leaves it unscaled.
        hessian: a ``Hessian`` or an array ``[k, k]``. None only inside a ``Recipe``.
        held_out: optional, a Hessian of other tokens, for the report.
        magnitudes: ``[k]``, the mean of \\|x\\| over tokens; None: the root of diag(H).
    """

    then: Rounding = field(default_factory=lambda: Nearest(ScaleSearch(10, 0.55, output_error=True)))
    steps: int = 20
    explicit: bool = True
    hessian: Hessian | Any = None
    held_out: Hessian | Any = None
    magnitudes: Any = None

    name = "awq"

    def __post_init__(self) -> None:
        self._check_then()
        object.__setattr__(self, "steps", _checks.integer("steps", self.steps, 1))
        if self.steps > 1000:
            raise ValueError(f"steps: got {self.steps}, expected at most 1000")
        _checks.boolean("explicit", self.explicit)
        object.__setattr__(self, "hessian", as_hessian("hessian", self.hessian))
        object.__setattr__(self, "held_out", as_hessian("held_out", self.held_out))
        if self.magnitudes is not None and self.hessian is not None:
            _magnitudes(self.magnitudes, self.hessian)

    @property
    def spec(self) -> str:
        options = ["awq"]
        if self.steps != 20:
            options.append(f"steps={self.steps}")
        if not self.explicit:
            options.append("folded")
        then = "" if self.then.to_json() == AWQ().then.to_json() else f"+{self.then.spec}"
        return ":".join(options) + then

    def to_json(self) -> str:
        settings = {
            "explicit": self.explicit,
            "rounding": "awq",
            "steps": self.steps,
            "then": json.loads(self.then.to_json()),
        }
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, spec: str) -> AWQ:
        """The rounding of a short form: ``awq[:steps=N][:folded][+ROUNDING]``."""
        own, plus, then = spec.partition("+")
        settings: dict[str, Any] = {"then": then} if plus else {}
        for option in own.split(":")[1:]:
            if option == "folded":
                update: dict[str, Any] = {"explicit": False}
            elif option.startswith("steps=") and option[6:].isdecimal():
                update = {"steps": int(option[6:])}
            else:
                raise ValueError(
                    f"rounding: got option {option!r} in {spec!r}, expected steps=N or folded; options of the"
                    " rounding itself come after a plus, as in awq+gptq:search"
                )
            if settings.keys() & update.keys():
                raise ValueError(f"rounding: got option {option!r} twice in {spec!r}")
            settings |= update
        return cls(**settings)

    @classmethod
    def from_fields(cls, settings: dict[str, Any]) -> AWQ:
        """Reads the fields of ``to_json`` back. Raises ValueError."""
        from quantloom.rounding import rounding_from_json

        known = {"explicit", "steps", "then"}
        if settings.keys() != known:
            raise ValueError(f"rounding: got keys {sorted(settings)}, expected {sorted(known)}")
        return cls(rounding_from_json(json.dumps(settings["then"])), settings["steps"], settings["explicit"])


@dataclass(frozen=True)
class ScaleChoice:
    """What a search for channel scales found.

    Attributes:
        codes: int8 ``[k]``, see ``ChannelScales``.
        exponent: 0 if scaling does not help.
        loss, loss_unscaled: tr(E H E^T) of nearest rounding, summed over the layers, with and without scales.
        losses: at each exponent tried; infinite where scaled weights do not fit their format.
    """

    codes: np.ndarray
    exponent: float
    loss: float
    loss_unscaled: float
    losses: tuple[float, ...]


def _magnitudes(magnitudes: Any, hessian: Hessian) -> list[float]:
    if magnitudes is None:
        return np.sqrt(hessian.diagonal()).tolist()
    if _arrays.is_torch(magnitudes):
        magnitudes = magnitudes.detach().cpu().double().numpy()
    values = np.asarray(magnitudes)
    if values.shape != (hessian.k,) or values.dtype.kind not in "fiu":
        got = _arrays.shape_text(values.shape)
        raise ValueError(f"magnitudes: got {values.dtype} of shape {got}, expected numbers [{hessian.k}]")
    return values.astype(np.float64).tolist()


def search_channel_scales(
    layers: list[tuple[Any, Format]],
    hessian: Hessian,
    magnitudes: Any = None,
    *,
    steps: int = 20,
    powers_of_two: bool = False,
    threads: int = 0,
) -> ScaleChoice:
    """The channel scales of layers that share their inputs; see ``AWQ``.

    Layers on a CUDA device are searched there if kernels round to all their formats (uniform, codebook, bcq
    and spqr, with outliers or without), else on the CPU. Losses are the CPU's to about 1e-6, so that
    exponents whose losses agree so far may change places; the codes of an
    exponent are the same.

    Args:
        layers: pairs of a weight matrix ``[n, k]`` and its format.
        hessian: of the inputs.
        magnitudes: ``[k]``, >= 0; None: the root of diag(H).
        steps: exponents tried.
        powers_of_two: scales are powers of two, by which anything can be divided exactly.
        threads: 0 for OpenMP's default. The result does not depend on it.
    """
    gathered = as_hessian("hessian", hessian)
    for pair in layers:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], Format)):
            raise TypeError(f"layers: got {_checks.type_name(pair)}, expected pairs of a matrix and a format")
    if gathered is None:
        raise TypeError("hessian: got NoneType, expected a Hessian or an array [k, k]")
    matrices = [_arrays.matrix("w", w, cpu=False) for w, _ in layers]
    formats = [format.to_json() for _, format in layers]
    device = _search_device(matrices, formats)
    hessian = gathered.to(device)
    settings = (
        _magnitudes(magnitudes, hessian),
        _checks.integer("steps", steps, 1),
        16 if powers_of_two else 1,
    )
    threads = _checks.thread_count(threads)
    if device == "cpu":
        cores = [_arrays.matrix("w", m.value.cpu() if m.device != "cpu" else m.value).core for m in matrices]
        found = _core.search_channel_scales(cores, formats, hessian._core, *settings, threads)
    else:
        cores = [m.core for m in matrices]
        with _devices.current(device) as stream:
            found = _core.search_channel_scales_cuda(cores, formats, hessian._core, *settings, stream)
    return ScaleChoice(
        np.frombuffer(found["codes"], np.int8),
        found["exponent"],
        found["loss"],
        found["losses"][0],
        tuple(found["losses"]),
    )


def _search_device(matrices: list[_arrays.Array], formats: list[str]) -> str:
    """The device of all matrices if it is a CUDA device that rounds to all formats, else "cpu"."""
    devices = {matrix.device for matrix in matrices}
    if len(devices) != 1 or devices == {"cpu"} or not _core.built_with_cuda():
        return "cpu"
    found = all(
        _core.rounds_on_cuda(text) and json.loads(text)["format"] not in ("trellis", "additive")
        for text in formats
    )
    return devices.pop() if found else "cpu"


def quantize_scaled(w: Any, format: Format, rounding: AWQ, threads: int) -> PackedTensor:
    """``quantize`` with ``AWQ``."""
    if rounding.hessian is None:
        raise ValueError("rounding: got AWQ without a hessian, expected AWQ(hessian=...)")
    choice = search_channel_scales(
        [(w, format)], rounding.hessian, rounding.magnitudes, steps=rounding.steps, threads=threads
    )
    return quantize_with_scales(w, format, rounding, choice.codes, threads)


def quantize_with_scales(
    w: Any, format: Format, rounding: ChannelScaling, codes: np.ndarray | None, threads: int
) -> PackedTensor:
    """Rounds W by ``rounding.then``, under the scales of `codes`; None: W as it is, already scaled."""
    then = replace(rounding.then, hessian=rounding.hessian, held_out=rounding.held_out)
    transform = ChannelScales(codes) if codes is not None and np.any(codes) else None
    q = quantize(w, format, then, transform=transform, threads=threads)
    q.report = replace(q.report, method=f"{rounding.name}+{q.report.method}")
    return q
