"""What a run of the pipeline tells: progress while it works, a report when it is done."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantloom import _checks

__all__ = [
    "DistillationReport",
    "ModuleReport",
    "Progress",
    "QuantizationReport",
    "read_report",
    "rounding_name",
]

REPORT_FILE = "report.json"
TIMINGS_FILE = "timings.json"
_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """One event of a run, passed to the `progress` callback.

    Attributes:
        phase: "check" (weights are hashed and scanned), "calibrate" (activations are gathered),
            "quantize" (a module is done), "distil" (a rounded block is trained), "propagate" (a block's
            outputs are computed), "save".
        block, blocks: the decoder block at work, counted from 0, and their number.
        stage: the stage inside the block, counted from 0: modules that share their input.
        module: the module at work, or "".
        done, total: modules quantized so far (those of an earlier, killed run included), and their number.
        fraction: the share of the whole work that is done, from 0 to 1, weighted by arithmetic.
        eta_seconds: the time left, from the speed measured in this run; None before anything is measured.
    """

    phase: str
    block: int
    blocks: int
    stage: int
    module: str
    done: int
    total: int
    fraction: float
    eta_seconds: float | None


@dataclass(frozen=True)
class ModuleReport:
    """What became of one Linear.

    Losses are ``tr(E H E^T)``, the mean squared error of the layer's output per token summed over
    out_features, or None where no Hessian was gathered; `*_nearest` is the loss that rounding to nearest
    has on the same weights; `held_out_*` are of tokens that no rounding saw; `two_sided_*` are
    ``tr(H_out E H E^T)``, with Hessians of outputs. `trellis_ratio`: as ``RoundingReport`` has it.

    `activations` is the short form of how inputs are rounded at run time, with the scale that calibration
    found; empty if they are not. `output_error` is the mean squared error of the outputs of all Linears that
    share the inputs, summed over them, on a sample of tokens with weights and inputs rounded, of smoothed
    layers, `output_error_unscaled` that without scales.

    `scaled_by` says where the scales of the input channels went, if there are any: the name of the module
    before, or "input" if they stay beside the weights; weights and losses are then those of the scaled
    layer. `scale_exponent` is the power of the channels' magnitudes; with `scaled_by` empty, one that would
    have helped.
    """

    name: str
    shape: tuple[int, int]
    format: str
    method: str
    bits_per_weight: float
    bits: int
    mean_squared_error: float
    scale_search: bool = False
    act_order: bool = False
    static_groups: bool = True
    damping: float = 0.0
    damping_tried: tuple[float, ...] = ()
    dead_columns: int = 0
    tokens: int = 0
    proxy_loss: float | None = None
    proxy_loss_nearest: float | None = None
    held_out_loss: float | None = None
    held_out_loss_nearest: float | None = None
    two_sided_loss: float | None = None
    two_sided_loss_nearest: float | None = None
    trellis_ratio: float | None = None
    scaled_by: str = ""
    scale_exponent: float = 0.0
    outliers: int = 0
    outlier_threshold: float | None = None
    activations: str = ""
    output_error: float | None = None
    output_error_unscaled: float | None = None
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """All fields except `seconds`, which differ from run to run; those of scales, of Hessians of outputs
        and of trellises if there are any."""
        fields = asdict(self)
        del fields["seconds"]
        optional = ("two_sided_loss", "two_sided_loss_nearest", "trellis_ratio", "output_error")
        for name in (*optional, "output_error_unscaled"):
            if fields[name] is None:
                del fields[name]
        if not self.activations:
            del fields["activations"]
        if not self.scaled_by and not self.scale_exponent:
            del fields["scaled_by"], fields["scale_exponent"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any], seconds: float = 0.0) -> ModuleReport:
        values = dict(fields)
        values["shape"] = tuple(values["shape"])
        values["damping_tried"] = tuple(values["damping_tried"])
        return cls(**values, seconds=seconds)

    @classmethod
    def of(cls, name: str, packed: Any, seconds: float) -> ModuleReport:
        """The report of a packed tensor that a rounding just made."""
        rounding = packed.report
        return cls(
            name=name,
            shape=tuple(int(extent) for extent in packed.shape),
            format=packed.format.spec,
            method=rounding.method,
            bits_per_weight=packed.bits_per_weight,
            bits=packed.size_in_bits,
            mean_squared_error=rounding.mean_squared_error,
            scale_search=rounding.scale_search,
            act_order=rounding.act_order,
            static_groups=rounding.static_groups,
            damping=rounding.damping,
            damping_tried=tuple(rounding.damping_tried),
            dead_columns=rounding.dead_columns,
            tokens=rounding.tokens,
            proxy_loss=_finite(rounding.proxy_loss),
            proxy_loss_nearest=_finite(rounding.proxy_loss_nearest),
            held_out_loss=_finite(rounding.held_out_loss),
            held_out_loss_nearest=_finite(rounding.held_out_loss_nearest),
            outliers=rounding.outliers,
            outlier_threshold=_finite(rounding.outlier_threshold),
            two_sided_loss=_finite(rounding.two_sided_loss),
            two_sided_loss_nearest=_finite(rounding.two_sided_loss_nearest),
            trellis_ratio=_finite(rounding.trellis_ratio),
            seconds=seconds,
        )


@dataclass(frozen=True)
class DistillationReport:
    """What the distillation of one decoder block did.

    Losses are as ``LayerDistillation`` defines them: the mean squared error of the block's outputs over the
    mean square of what the original adds to its inputs, on calibration and on held-out tokens.

    Attributes:
        block: its name.
        steps: of the optimizer; fewer than asked for if the loss was not finite any more.
        best_step: the one whose weights were kept; 0: none was better than the start, which was kept.
        relative_rate: the first step's size over the RMS of a tensor.
        loss_before, loss_after, held_out_before, held_out_after: of what is stored.
    """

    block: str
    steps: int
    best_step: int
    relative_rate: float
    loss_before: float
    loss_after: float
    held_out_before: float
    held_out_after: float
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """All fields except `seconds`, which differ from run to run."""
        fields = asdict(self)
        del fields["seconds"]
        return fields


def rounding_name(rounding: Any) -> str:
    """The word by which reports know a rounding: "nearest", "gptq", "awq+nearest"."""
    name = json.loads(rounding.to_json())["rounding"]
    then = getattr(rounding, "then", None)
    return name if then is None else f"{name}+{rounding_name(then)}"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


@dataclass(frozen=True)
class QuantizationReport:
    """What a run of ``quantize`` did.

    Attributes:
        output: the folder of the quantized checkpoint.
        modules: one entry for each quantized Linear, in the order of the model.
        unquantized: the Linears that stay as they are.
        unused_tensors: tensors of the input that the model has no place for; they are not written.
        bits_per_weight: of the quantized Linears, scales, zero points and padding included.
        model_bits_per_weight: of all tensors of the checkpoint, over the model's parameters.
        fallbacks: modules that got another method than the recipe's, with the reason; empty unless asked.
        seconds: wall time of the whole work, killed runs that were resumed included up to their last record.
        resumed_modules: modules taken over from an earlier, killed run.
        distillation: one entry for each distilled block. Errors and losses of its `modules` are those of the
            rounding before.
    """

    output: Path
    recipe: str
    modules: tuple[ModuleReport, ...]
    unquantized: tuple[str, ...]
    unused_tensors: tuple[str, ...]
    bits_per_weight: float
    model_bits_per_weight: float
    fallbacks: tuple[str, ...] = ()
    distillation: tuple[DistillationReport, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    resumed_modules: int = field(default=0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """What ``report.json`` holds: everything that is the same in every run."""
        fields = {
            "version": _VERSION,
            "recipe": json.loads(self.recipe),
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "fallbacks": list(self.fallbacks),
            "unquantized": list(self.unquantized),
            "unused_tensors": list(self.unused_tensors),
            "modules": [module.to_json() for module in self.modules],
        }
        if self.distillation:
            fields["distillation"] = [block.to_json() for block in self.distillation]
        return fields

    def timings(self) -> dict[str, Any]:
        """What ``timings.json`` holds: the seconds, which differ from run to run."""
        fields = {
            "seconds": self.seconds,
            "resumed_modules": self.resumed_modules,
            "modules": {module.name: module.seconds for module in self.modules},
        }
        if self.distillation:
            fields["distillation"] = {block.block: block.seconds for block in self.distillation}
        return fields


def read_report(path: str | Path) -> QuantizationReport:
    """The report in a folder that ``quantize`` wrote. Raises OSError if there is none."""
    folder = _checks.path("path", path)
    fields = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    if fields.get("version") != _VERSION:
        raise ValueError(
            f"{folder / REPORT_FILE}: got version {fields.get('version')!r}, expected {_VERSION}"
        )
    timings: dict[str, Any] = {"seconds": 0.0, "resumed_modules": 0, "modules": {}}
    if (folder / TIMINGS_FILE).is_file():
        timings = json.loads((folder / TIMINGS_FILE).read_text(encoding="utf-8"))
    return QuantizationReport(
        output=folder,
        recipe=json.dumps(fields["recipe"], sort_keys=True, separators=(",", ":")),
        modules=tuple(
            ModuleReport.from_json(entry, timings["modules"].get(entry["name"], 0.0))
            for entry in fields["modules"]
        ),
        unquantized=tuple(fields["unquantized"]),
        unused_tensors=tuple(fields["unused_tensors"]),
        bits_per_weight=fields["bits_per_weight"],
        model_bits_per_weight=fields["model_bits_per_weight"],
        fallbacks=tuple(fields["fallbacks"]),
        distillation=tuple(
            DistillationReport(**entry, seconds=timings.get("distillation", {}).get(entry["block"], 0.0))
            for entry in fields.get("distillation", ())
        ),
        seconds=timings["seconds"],
        resumed_modules=timings["resumed_modules"],
    )
