"""Quantizes a model block by block, and can be killed at any time.

For each decoder block, stage by stage in the order its Linears run: gather the Hessian of the stage's
input over the calibration windows, with all earlier stages and blocks already quantized; quantize the
stage's Linears; put the decoded weights in their place. Then the block is distilled, if the recipe says so,
and its outputs become the next block's inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantloom as ql
from quantloom import _devices
from quantloom.awq import ChannelScaling, quantize_with_scales
from quantloom.models.calibration import (
    BlockCall,
    HiddenStates,
    InputRange,
    TokenWindows,
    capture,
    float_block,
    gather_hessians,
    run_block,
    settle_activations,
)
from quantloom.models.checkpoint import assemble, final_files, install
from quantloom.models.distillation import Distiller, check_distillation
from quantloom.models.gradients import checked_outputs
from quantloom.models.meter import Meter
from quantloom.models.records import WORK, WorkFolder, file_hash
from quantloom.models.report import ModuleReport, Progress, QuantizationReport, read_report, rounding_name
from quantloom.models.scaling import (
    StageScaling,
    apply_scaling,
    read_scaling,
    search_scaling,
    write_scaling,
)
from quantloom.models.source import ModelFolder, attach, build_skeleton
from quantloom.models.structure import (
    Block,
    Targets,
    check_integers,
    find_blocks,
    find_stages,
    find_targets,
    require_cuda_rounding,
)

__all__ = ["quantize"]

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def quantize(
    model_path: str | Path,
    recipe: Any,
    calibration: Any = None,
    *,
    output: str | Path,
    windows: int = 64,
    window: int = 512,
    held_out_windows: int = 8,
    threads: int = 0,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
    resume: bool = True,
    max_shard_bytes: int = 5_000_000_000,
    device: Any = "cpu",
    output_hessians: Mapping[str, Any] | None = None,
) -> QuantizationReport:
    """Quantizes the Linears in the decoder blocks of a model and writes a checkpoint to `output`.

    A run that was killed goes on where it was when it is called again with the same arguments, and ends
    with the same bytes in every file but ``timings.json``. Results do not depend on `threads`; those that
    are calibrated can depend on ``torch.get_num_threads()``, which a resumed run must therefore repeat.

    Args:
        model_path: folder of a decoder-only causal language model: config.json and safetensors files.
        recipe: a ``Recipe``.
        calibration: the path of a text file (or of raw little-endian uint16 ids, ``.u16``), or token ids
            (one-dimensional, integers); the windows are cut from its start. None: no calibration, for
            ``Nearest`` only. If given it is used with any rounding: it weights scale searches and fills the
            losses of the report.
        output: folder of the checkpoint; created if absent.
        windows, window: calibration windows and their tokens; both >= 1.
        held_out_windows: further windows whose loss is only reported; >= 0.
        threads: of the quantization itself; 0: all.
        progress: called with a ``Progress`` many times a second or minute; an exception it raises ends
            the run, which can be resumed.
        overwrite: replace a checkpoint in `output`. Other files there stay.
        resume: False drops unfinished work in `output` instead of going on with it.
        max_shard_bytes: size that a safetensors file of the checkpoint does not pass, single modules aside.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``: where blocks run and weights are rounded. Embeddings
            and the hidden states between blocks stay on the CPU, so that one block at a time, in float32,
            its Hessians and the working copies of one weight matrix take memory of a GPU. Codes of
            calibrated roundings differ a little between devices, because sums are taken in other orders.
        output_hessians: Hessians of outputs by the names of modules, as ``output_hessians(model, ids)``
            gathers them: those Linears are rounded with feedback along rows as well. For ``GPTQ`` and
            formats that are a trellis with its rotation.

    Calibration runs with exact activations, as SmoothQuant's published one does: scales of channels, static
    ranges, outlier columns and Hessians are of the inputs that a layer has behind quantized weights, without
    the noise of rounded activations, which is no property of the inputs, and which a range found in a few
    windows should not be widened by. Only distillation rounds activations, in the block it trains.

    Memory: the pages of the mapped model, one block in float32, the Hessians of one stage, and working
    copies of one weight matrix; ``plan`` predicts the peak.

    Raises ValueError or TypeError naming the argument and OSError before any work; ValueError naming the
    module if its inputs are not finite or its Hessian cannot be used; RuntimeError if another process works
    in `output`.
    """
    started = time.monotonic()
    device = _devices.device_name("device", device)
    recipe, output = _check_arguments(
        model_path, recipe, calibration, output, windows, window, held_out_windows, threads, max_shard_bytes
    )
    folder = ModelFolder(model_path)
    model = build_skeleton(folder.path)
    blocks = find_blocks(model)
    targets = find_targets(model, blocks, recipe)
    if device != "cpu":
        require_cuda_rounding(targets, device, recipe.rounding)
    output_hessians = checked_outputs(output_hessians, blocks, targets, recipe)
    check_distillation(recipe, targets, held_out_windows)
    tokens = None
    if calibration is not None:
        tokens = TokenWindows.read(calibration, folder.path, model.config, windows, window, held_out_windows)
    check_output(folder.path, output, overwrite)

    existed = output.exists()
    output.mkdir(parents=True, exist_ok=True)
    run = None
    try:
        with WorkFolder(output) as work:
            run = _Run(
                folder,
                model,
                blocks,
                targets,
                recipe,
                tokens,
                work,
                threads,
                progress,
                max_shard_bytes,
                device,
                output_hessians,
            )
            return run.execute(resume, overwrite, started)
    finally:
        # A run refused before its work began leaves nothing behind.
        if run is not None and not run.begun and not (output / WORK / "manifest.json").exists():
            shutil.rmtree(output / WORK, ignore_errors=True)
            if not existed:
                output.rmdir()


def _check_arguments(
    model_path: Any, recipe: Any, calibration: Any, output: Any, windows: Any, window: Any, held_out: Any,
    threads: Any, max_shard_bytes: Any,
) -> tuple[Any, Path]:  # fmt: skip
    check_integers(
        ("windows", windows, 1),
        ("window", window, 1),
        ("held_out_windows", held_out, 0),
        ("threads", threads, 0),
        ("max_shard_bytes", max_shard_bytes, 1),
    )
    if not isinstance(recipe, ql.Recipe):
        raise TypeError(f"recipe: got {type(recipe).__name__}, expected a Recipe")
    for name, value in (("model_path", model_path), ("output", output)):
        if not isinstance(value, (str, Path)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a path")
    formats = [recipe.activations, *recipe.activation_overrides.values()]
    uncalibrated = [form.spec for form in formats if form is not None and not form.calibrated]
    if calibration is None and uncalibrated:
        raise ValueError(
            f"calibration: got None, expected a text file or token ids, which {uncalibrated[0]} needs"
        )
    if calibration is None and recipe.distillation is not None:
        raise ValueError("calibration: got None, expected a text file or token ids, which distillation needs")
    if calibration is None and not isinstance(recipe.rounding, ql.Nearest):
        method = rounding_name(recipe.rounding)
        raise ValueError(f"calibration: got None, expected a text file or token ids, which {method} needs")
    return recipe, Path(output)


def check_output(model_path: Path, output: Path, overwrite: bool) -> None:
    """Raises ValueError if `output` cannot take a checkpoint."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, expected a folder")
    if output.exists() and output.samefile(model_path):
        raise ValueError(f"output: got the model's own folder {output}, expected another one")
    if output.is_dir() and not overwrite and not (output / WORK).is_dir():
        taken = sorted(entry.name for entry in final_files(output))
        if taken:
            raise ValueError(
                f"output: {output} holds a model already ({', '.join(taken[:3])}); "
                "pass overwrite=True to replace it"
            )


class _Run:
    def __init__(
        self, folder: ModelFolder, model: torch.nn.Module, blocks: list[Block], targets: Targets, recipe: Any,
        tokens: TokenWindows | None, work: WorkFolder, threads: int, progress: Any, max_shard_bytes: int,
        device: str, output_hessians: dict[str, ql.Hessian],
    ) -> None:  # fmt: skip
        self.output_hessians = output_hessians
        self.folder, self.model, self.blocks, self.targets = folder, model, blocks, targets
        self.recipe, self.tokens, self.work, self.threads = recipe, tokens, work, threads
        self.max_shard_bytes, self.device = max_shard_bytes, device
        self.begun = False
        self.reports: dict[str, ModuleReport] = {}
        self.scalings: dict[str, StageScaling] = {}  # by module
        self.resumed = 0
        self.meter = Meter(self, progress)
        self.distiller = None
        if recipe.distillation is not None:
            self.distiller = Distiller(
                recipe.distillation, model, targets, tokens, work, threads, device, self.meter.distilled
            )

    # -- the whole run -------------------------------------------------------------------------------

    def execute(self, resume: bool, overwrite: bool, started: float) -> QuantizationReport:
        work = self.work
        if resume and (work.staging / "COMPLETE").is_file() and (work.path / "manifest.json").is_file():
            # Killed while the finished files were moved: the rest of the move is all that is left, if
            # this is the same run.
            work.begin(self._fingerprint(), resume)
            self.begun = True
            return self._finish(started)
        fingerprint = self._fingerprint()
        unused = attach(self.model, self.folder.mapped(), self.folder.path)
        self._check_weights(scan=not (resume and (work.path / "manifest.json").is_file()))
        work.begin(fingerprint, resume)
        self.begun = True
        self.resumed = sum(work.has(name) for name in self.targets.formats)
        for name in self.targets.formats:
            if work.has(name):
                self.reports[name] = work.report(name)
        self.meter.start()
        if self.tokens is None:
            self._quantize_plain()
        else:
            self._quantize_calibrated()
        self.meter.report("save")
        report = self._report(unused, time.monotonic() - started)
        assemble(
            self.folder,
            self.model,
            self.targets,
            self.recipe,
            work,
            report,
            self.max_shard_bytes,
            self._replaced(),
        )
        return self._finish(started)

    def _finish(self, started: float) -> QuantizationReport:
        self.meter.report("save")
        install(self.work)
        self.work.remove()
        return read_report(self.work.output)

    def _fingerprint(self) -> dict[str, Any]:
        """All that decides the bytes of the result."""
        self.meter.report("check")
        fingerprint: dict[str, Any] = {
            "quantloom": ql.__version__,
            "recipe": json.loads(self.recipe.to_json()),
            "config.json": file_hash(self.folder.path / "config.json"),
            "weights": {
                file.name: file_hash(file, lambda _: self.meter.report("check")) for file in self.folder.files
            },
            "max_shard_bytes": self.max_shard_bytes,
            "calibration": None,
            "device": "cpu" if self.device == "cpu" else torch.cuda.get_device_name(self.device),
        }
        if self.output_hessians:
            fingerprint["output_hessians"] = {
                name: hashlib.sha256(
                    hessian.tokens.to_bytes(8, "little") + np.ascontiguousarray(hessian.sum()).tobytes()
                ).hexdigest()
                for name, hessian in self.output_hessians.items()
                if name in self.targets.formats
            }
        if self.tokens is not None:
            import transformers

            fingerprint["calibration"] = {
                "tokens": self.tokens.hash,
                "windows": self.tokens.calibration,
                "window": self.tokens.ids.shape[1],
                "held_out_windows": len(self.tokens.ids) - self.tokens.calibration,
                "torch": torch.__version__,
                "torch_threads": torch.get_num_threads(),
                "transformers": transformers.__version__,
            }
        return fingerprint

    def _check_weights(self, scan: bool) -> None:
        """Raises ValueError naming tensor, row and column of the first weight that is not finite."""
        for block in self.blocks:
            for name, linear in block.linears.items():
                if name not in self.targets.formats:
                    continue
                weight = linear.weight
                if weight.dtype not in _FLOATS:
                    raise ValueError(
                        f"{name}.weight: got dtype {weight.dtype}, expected float32, float16 or bfloat16"
                    )
                if scan and not bool(torch.isfinite(weight).all()):
                    row, column = torch.nonzero(~torch.isfinite(weight))[0].tolist()
                    value = weight[row, column].item()
                    raise ValueError(
                        f"{name}.weight: got {value} at row {row}, column {column}, expected finite values"
                    )

    # -- without calibration -------------------------------------------------------------------------

    def _quantize_plain(self) -> None:
        for block in self.blocks:
            for name, linear in block.linears.items():
                if name in self.targets.formats and name not in self.reports:
                    self._quantize_module(block, 0, name, linear.weight.detach(), self.recipe.rounding)

    # -- with calibration ----------------------------------------------------------------------------

    def _quantize_calibrated(self) -> None:
        distiller = self.distiller
        distilled = distiller is None or distiller.finished(self.blocks)
        if distilled and len(self.reports) == len(self.targets.formats):
            return
        tokens = self.tokens
        self.meter.report("calibrate")
        calls, hidden, write_first = capture(self.model, self.blocks, tokens, self.work.path)

        def states(index: int) -> HiddenStates:
            return HiddenStates(self.work.path / f"hidden-{index}.f32", *tokens.ids.shape, hidden)

        present = [block.index for block in self.blocks if states(block.index).path.is_file()]
        first = max(present, default=0)
        if present:
            states(first).check()
        else:
            write_first(states(0))
        for block in self.blocks[first:]:
            self._quantize_block(block, calls[block.index], states(block.index), states(block.index + 1))
            if block.index > 0:
                states(block.index - 1).path.unlink(missing_ok=True)
                if distiller is not None:
                    distiller.forget(block.index - 1)

    def _quantize_block(
        self, block: Block, call: BlockCall, inputs: HiddenStates, outputs: HiddenStates
    ) -> None:
        wanted = {name for name in block.linears if name in self.targets.formats}
        call = call.to(self.device)
        dtypes = {f"{block.name}.{name}": p.dtype for name, p in block.module.named_parameters()}
        distiller = self.distiller
        with float_block(block.module, self.device), torch.no_grad():
            if distiller is not None:
                distiller.teach(block, call, inputs)
            if wanted and isinstance(self.recipe.rounding, ChannelScaling):
                self._scale(block, call, inputs, dtypes)
            if distiller is not None:
                distiller.remember(block)
            if wanted:
                probe = next(inputs.read()).to(self.device)
                stages = find_stages(block, lambda: run_block(block, call, probe), wanted)
                for stage, names in enumerate(stages):
                    self._quantize_stage(block, call, inputs, stage, names)
            if distiller is not None:
                distiller.distil(block, call, inputs, dtypes)
            if block.index + 1 < len(self.blocks):
                with outputs.writer() as append:
                    for hidden in inputs.read():
                        append(run_block(block, call, hidden.to(self.device)))
                        self.meter.report("propagate", block.index)

    def _scale(
        self, block: Block, call: BlockCall, inputs: HiddenStates, dtypes: dict[str, torch.dtype]
    ) -> None:
        """Scales the input channels of a block's Linears, by the record of a killed run if there is one."""
        kept = self.work.scaling(block.name)
        if kept is not None:
            stages = read_scaling(*kept)
            for stage in stages:
                apply_scaling(block, stage)
        else:
            self.meter.report("calibrate", block.index)
            stages = search_scaling(
                block,
                call,
                inputs,
                self.targets.formats,
                self.recipe.rounding,
                self.tokens,
                self.threads,
                lambda: self.meter.report("calibrate", block.index),
                self.device,
                dtypes,
                {name: self.recipe.activations_for(name) for name in self.targets.formats},
            )
            self.work.save_scaling(block.name, *write_scaling(stages))
        self.scalings |= {name: stage for stage in stages for name in stage.modules}

    def _replaced(self) -> dict[str, torch.Tensor]:
        """Parameters of the model into which scales went or that were trained, by name."""
        found: dict[str, torch.Tensor] = {}
        for block in self.blocks:
            kept = self.work.scaling(block.name)
            for stage in [] if kept is None else read_scaling(*kept):
                found |= stage.replaced
            if self.work.distilled(block.name) is not None:
                found |= self.work.distilled_vectors(block.name)
        return found

    def _quantize_stage(
        self, block: Block, call: BlockCall, inputs: HiddenStates, stage: int, names: tuple[str, ...]
    ) -> None:
        missing = tuple(name for name in names if name not in self.reports)
        if missing:
            self._quantize_missing(block, call, inputs, stage, missing)
        for name in names:
            linear = block.linears[name]
            packed = self.work.packed(name, self.targets.formats[name])
            if self.device != "cpu":
                packed = packed.to(self.device)
            decoded = packed.dequantize(threads=self.threads)
            linear.weight = torch.nn.Parameter(decoded, requires_grad=False)

    def _quantize_missing(
        self, block: Block, call: BlockCall, inputs: HiddenStates, stage: int, missing: tuple[str, ...]
    ) -> None:
        self.meter.report("calibrate", block.index, stage, missing[0])
        formats = [self.recipe.activations_for(name) for name in missing]
        static = any(form is not None and not form.calibrated for form in formats)
        span = InputRange(self._transform_of(missing[0])) if static else None
        hessian, held_out = gather_hessians(
            block,
            call,
            inputs,
            missing,
            self.tokens,
            self.threads,
            lambda: self.meter.window(missing, block.index, stage),
            self.device,
            span,
        )
        rounding = dataclasses.replace(self.recipe.rounding, hessian=hessian, held_out=held_out)
        for name in missing:
            weight = block.linears[name].weight.detach()
            outputs = self.output_hessians.get(name)
            own = rounding
            if outputs is not None:
                own = dataclasses.replace(rounding, output_hessian=outputs.to(self.device))
            self._quantize_module(block, stage, name, weight, own, span)

    def _transform_of(self, name: str) -> Any:
        """The basis in which a module sees its inputs; Linears of one stage have the same."""
        codes = self.scalings[name].codes if name in self.scalings else None
        return self.recipe.transform if codes is None else ql.ChannelScales(codes.numpy())

    # -- one module ----------------------------------------------------------------------------------

    def _quantize_module(
        self, block: Block, stage: int, name: str, weight: torch.Tensor, rounding: Any,
        span: InputRange | None = None,
    ) -> None:  # fmt: skip
        begun = time.monotonic()
        scaling = self.scalings.get(name, StageScaling((name,)))
        form = self.targets.formats[name]
        try:
            weight = weight.to(self.device)
            if isinstance(rounding, ChannelScaling):
                codes = None if scaling.codes is None else scaling.codes.numpy()
                packed = quantize_with_scales(weight, form, rounding, codes, self.threads)
            else:
                packed = ql.quantize(
                    weight, form, rounding=rounding, transform=self.recipe.transform, threads=self.threads
                )
            activations = self.recipe.activations_for(name)
            if activations is not None:
                packed, activations = settle_activations(packed, weight, activations, span, self.threads)
        except (ValueError, RuntimeError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"{name}: {error}") from error
        smoothing = {}
        if isinstance(rounding, ql.SmoothQuant) and scaling.loss_unscaled > 0:
            smoothing = {"output_error": scaling.loss, "output_error_unscaled": scaling.loss_unscaled}
        report = dataclasses.replace(
            ModuleReport.of(name, packed, time.monotonic() - begun),
            scaled_by=scaling.into,
            scale_exponent=scaling.exponent,
            activations="" if activations is None else activations.spec,
            **smoothing,
        )
        self.work.save(name, packed, report)
        self.reports[name] = report
        self.meter.module(name, block.index, stage)

    def _report(self, unused: list[str], seconds: float) -> QuantizationReport:
        modules = tuple(self.reports[name] for name in self.targets.formats)
        asked = rounding_name(self.recipe.rounding)
        weights = sum(report.shape[0] * report.shape[1] for report in modules)
        bits = sum(report.bits for report in modules)
        kept = [
            parameter
            for name, parameter in self.model.named_parameters()
            if not (name.endswith(".weight") and name.removesuffix(".weight") in self.targets.formats)
        ]
        kept_bits = sum(parameter.numel() * parameter.element_size() * 8 for parameter in kept)
        kept_weights = sum(parameter.numel() for parameter in kept)
        return QuantizationReport(
            output=self.work.output,
            recipe=self.recipe.to_json(),
            modules=modules,
            unquantized=self.targets.left,
            unused_tensors=tuple(unused),
            bits_per_weight=bits / weights if weights else 0.0,
            model_bits_per_weight=(bits + kept_bits) / (weights + kept_weights),
            fallbacks=tuple(
                f"{report.name}: {report.method} instead of {asked}"
                for report in modules
                if report.method != asked
            )
            + tuple(
                f"{report.name}: channels not scaled, as no layer before can be divided exactly"
                for report in modules
                if report.scale_exponent and not report.scaled_by
            ),
            distillation=tuple(
                report for block in self.blocks if (report := self.work.distilled(block.name)) is not None
            ),
            seconds=seconds,
            resumed_modules=self.resumed,
        )
