"""`quantloom quantize` and `quantloom plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from quantloom.cli import common

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face model.", show_default=False)
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        "-f",
        metavar="FORMAT",
        help="What is stored, see above.",
        rich_help_panel="Recipe",
    ),
]
Rounding = Annotated[
    str,
    typer.Option(
        "--rounding",
        "-r",
        metavar="ROUNDING",
        help="How codes are chosen: nearest, gptq, awq or smoothquant, with options as above.",
        rich_help_panel="Recipe",
    ),
]
Damp = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="GPTQ: added to the Hessian's diagonal, relative to its mean. Default: 0.01.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
ActOrder = Annotated[
    bool | None,
    typer.Option(
        "--act-order/--no-act-order",
        help="GPTQ: walk the columns by falling activation energy. Default: on.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
StaticGroups = Annotated[
    bool | None,
    typer.Option(
        "--static-groups/--dynamic-groups",
        help="GPTQ: fit groups before the walk, or on the updated weights. Default: static.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
ScaleSearch = Annotated[
    bool | None,
    typer.Option(
        "--scale-search/--no-scale-search",
        help="Shrink each group's range to the least weighted error. Default: off.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Linear layers that stay as they are: a name, or re:REGEX for the whole name. Repeatable. "
        " Default: lm_head.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=FORMAT",
        help="Another format (or none) for some layers. Repeatable, the first match counts.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
Transform = Annotated[
    str,
    typer.Option(
        "--transform",
        metavar="TRANSFORM",
        help="The basis of the weights: none, or hadamard with options as above.",
        rich_help_panel="Recipe",
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="FORMAT",
        help="How layers round their inputs at run time: exact, or a format as above.",
        rich_help_panel="Recipe",
    ),
]
ActivationOverride = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=FORMAT",
        help="Other activations (or exact) for some layers. Repeatable, the first match counts.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A published recipe as above, or a file with one as JSON, in place of all other recipe options.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
Distillation = Annotated[
    str | None,
    typer.Option(
        "--distillation",
        metavar="DISTILLATION",
        help="Train every layer towards the original's when its weights are rounded: none, or lkd with"
        " options as above. Takes the place of the recipe's.",
        show_default=False,
        rich_help_panel="Calibration",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="FILE",
        help="Calibration text (UTF-8), or token ids (.u16). GPTQ, AWQ and SmoothQuant need it, and so do"
        " static activations and distillation.",
        show_default=False,
        rich_help_panel="Calibration",
    ),
]
Windows = Annotated[int, typer.Option(min=1, help="Calibration windows.", rich_help_panel="Calibration")]
Window = Annotated[int, typer.Option(min=2, help="Tokens in a window.", rich_help_panel="Calibration")]
HeldOut = Annotated[
    int,
    typer.Option(
        min=0,
        help="Further windows, for the report's losses and for the steps that distillation keeps.",
        rich_help_panel="Calibration",
    ),
]


@common.reports_errors
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    format: Format = "uniform:4:g128",
    rounding: Rounding = "gptq",
    damp: Damp = None,
    act_order: ActOrder = None,
    static_groups: StaticGroups = None,
    scale_search: ScaleSearch = None,
    ignore: Ignore = None,
    override: Override = None,
    transform: Transform = "none",
    activations: Activations = "exact",
    activation_override: ActivationOverride = None,
    recipe: RecipeFile = None,
    distillation: Distillation = None,
    calibration: Calibration = None,
    windows: Windows = 64,
    window: Window = 512,
    held_out_windows: HeldOut = 8,
    two_sided: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="WINDOWS",
            help="GPTQ to a trellis: feedback along rows too, by gradients of the whole model over so many"
            " windows; it must fit in memory in float32. 0: none.",
            rich_help_panel="Calibration",
        ),
    ] = 0,
    threads: common.Threads = 0,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to calibrate and round: cpu, cuda or cuda:N.")
    ] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")] = False,
    json: common.Json = False,
    progress: common.Progress = None,
    traceback: common.Traceback = False,
) -> None:
    """Quantize the linear layers of a model, block by block.

    The calibration text runs through the blocks already quantized, so that each layer is fitted to the
    inputs it will really see. An interrupted run goes on when the same command is given again.

    **Formats, roundings and transforms**

        uniform:BITS[:gN|:channel|:tensor][:sym|:asym][:f16|:bf16|:f32]
        codebook:nf4|nf3|sf4|fp4[:gN|:channel|:tensor][:f16|:bf16|:f32]
        vector_codebook:[TABLESx]ENTRIESxDIM[:gN|:channel|:tensor][:f16|:bf16|:f32]
        additive:TABLESxBITS[:gIN|:gOUTxIN][:scaleN|:channel][:sBITS][:t[GROUPSx]BITS][:f16|:bf16|:f32]
        spqr:BITS[:gN][:sBITS][:zBITS][:bROWS]
        sdr:BITS[:gN][:f16|bf16|f32]
        bcq:BITS[:gN|:channel][:offset][:f16|:bf16|:f32][:rN][:greedy]
        outliers:PERCENT%:FORMAT
        nearest[:search[=STEPS]]
        gptq[:search[=STEPS]][:damp=X][:no-act-order][:dynamic-groups][:outliers=PERCENT%|:bits=BITS]
            [:ratio=X[,X...]]
        beam_search[:beam=N][:natural][:seed=N][:gptq][:rounds=N][:tolerance=X][:refit=N][:damp=X][:float64]
            (additive)
        awq[:steps=N][:folded][+ROUNDING]
        smoothquant[:alpha=X|:search[=STEPS]][:folded][+ROUNDING]
        hadamard[:bN][:seed=N|:no-signs][:in|:out|:both]
        intBITS:token|gN[:asym], intBITS:tensor[:static][:asym] (activations)
        intBITS:...:outliers=LIMIT[:static-outliers] (LLM.int8()), sdrBITS:gN[:bBASE][:tensor[:static]]
        zeroquant[:wBITS[/BITS]aBITS][:gN|:channel] (recipe; of weights the first BITS are those of MLPs)
        lkd[:steps=N][:batch=N][:rate=X][:weight-decay=X][:inputs=student|both][:checks=N][:seed=N]
            (distillation)

    **Examples**

        quantloom quantize MODEL -o OUT --format uniform:4:g128 --rounding gptq --calibration text.txt
        quantloom quantize MODEL -o OUT -f uniform:3:g64:asym -r gptq:search -c text.txt --windows 128
        quantloom quantize MODEL -o OUT -f uniform:4:g128:asym -r awq -c text.txt
        quantloom quantize MODEL -o OUT -f uniform:8:channel -r smoothquant:search --activations int8:token
            -c text.txt
        quantloom quantize MODEL -o OUT -f spqr:3:g16:s3:z3:b16 -r gptq:search:bits=4 -c text.txt
        quantloom quantize MODEL -o OUT -f uniform:8:channel -r nearest --override 're:.*down_proj=none'
        quantloom quantize MODEL -o OUT --recipe zeroquant:w4/8a8 --distillation lkd -c text.txt
    """
    settings = _recipe(
        format,
        rounding,
        damp,
        act_order,
        static_groups,
        scale_search,
        ignore,
        override,
        recipe,
        calibration,
        transform=transform,
        activations=activations,
        activation_override=activation_override,
        distillation=distillation,
    )
    common.require_folder(model, "model")
    if calibration is not None:
        common.require_file(calibration, "calibration")
    if two_sided and calibration is None:
        raise typer.BadParameter(
            "missing, but --two-sided needs a calibration text", param_hint="--calibration"
        )
    common.quiet_libraries()
    import quantloom

    outputs = None
    if two_sided:
        reference = quantloom.models.load_reference(model, device=device)
        ids = quantloom.evaluate.tokens(model, calibration)
        outputs = quantloom.models.output_hessians(
            reference, ids, windows=two_sided, window=window, threads=threads
        )
        del reference
    with common.progress_bar(progress) as update:
        report = quantloom.models.quantize(
            model,
            settings,
            calibration=calibration,
            output=output,
            windows=windows,
            window=window,
            held_out_windows=held_out_windows,
            threads=threads,
            progress=common.follow_quantization(update),
            overwrite=overwrite,
            resume=resume,
            device=device,
            output_hessians=outputs,
        )
    if json:
        common.print_json({"output": str(report.output)} | report.to_json() | {"timings": report.timings()})
    else:
        _show(report)


@common.reports_errors
def plan(
    model: Model,
    format: Format = "uniform:4:g128",
    rounding: Rounding = "gptq",
    damp: Damp = None,
    act_order: ActOrder = None,
    static_groups: StaticGroups = None,
    scale_search: ScaleSearch = None,
    ignore: Ignore = None,
    override: Override = None,
    transform: Transform = "none",
    activations: Activations = "exact",
    activation_override: ActivationOverride = None,
    recipe: RecipeFile = None,
    distillation: Distillation = None,
    calibration: Calibration = None,
    windows: Windows = 64,
    window: Window = 512,
    held_out_windows: HeldOut = 8,
    layout: Annotated[
        common.Layout | None, typer.Option(help="Tell which layers this export layout cannot hold.")
    ] = None,
    outlier_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Static outliers of activations: the share of the inputs that calibration is taken to find.",
        ),
    ] = 0.01,
    threads: common.Threads = 0,
    json: common.Json = False,
    traceback: common.Traceback = False,
) -> None:
    """Tell peak memory, time and output size of a quantization, before any work.

    Takes the options of `quantize`. Weights are not read; speed is measured for a fraction of a second.

    **Example**

        quantloom plan MODEL --format uniform:4:g128 --rounding gptq --windows 128
    """
    settings = _recipe(
        format,
        rounding,
        damp,
        act_order,
        static_groups,
        scale_search,
        ignore,
        override,
        recipe,
        None,
        check=False,
        transform=transform,
        activations=activations,
        activation_override=activation_override,
        distillation=distillation,
    )
    common.require_folder(model, "model")
    common.quiet_libraries()
    import quantloom

    result = quantloom.models.plan(
        model,
        settings,
        calibrated=True if calibration is not None else None,
        windows=windows,
        window=window,
        held_out_windows=held_out_windows,
        threads=threads,
        layout=None if layout is None else layout.value,
        outlier_share=outlier_share,
    )
    if json:
        common.print_json(common.plain(result) | {"refusals": result.refusals})
    else:
        _show_plan(result)


def _show(report) -> None:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    def ratio(loss: float | None, nearest: float | None) -> str:
        return "" if loss is None or not nearest else f"{loss / nearest:.3f}"

    rows = [
        [
            module.name,
            " × ".join(map(str, module.shape)),
            module.format,
            module.method,
            f"{module.bits_per_weight:.3f}",
            number(module.proxy_loss),
            ratio(module.proxy_loss, module.proxy_loss_nearest),
            ratio(module.held_out_loss, module.held_out_loss_nearest),
            number(module.damping) if module.method == "gptq" else "",
        ]
        for module in report.modules
    ]
    columns = [
        "layer",
        "shape",
        "format",
        "rounding",
        "bits/weight",
        "loss",
        "loss/nearest",
        "held out",
        "damping",
    ]
    out = common.console()
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    columns = [columns[i] for i in used]
    out.print(common.table(None, columns, [[row[i] for i in used] for row in rows], set(columns[4:])))
    out.print(
        f"{len(report.modules)} layers, {report.bits_per_weight:.4f} bits per weight "
        f"({report.model_bits_per_weight:.4f} over the whole model), {common.duration(report.seconds)}, "
        f"in {report.output}"
    )
    if report.unquantized:
        out.print(f"left as they are: {', '.join(report.unquantized)}")
    if report.resumed_modules:
        out.print(f"{report.resumed_modules} layers taken over from an interrupted run")
    for fallback in report.fallbacks:
        out.print(f"fallback: {fallback}")
    if report.distillation:
        rows = [
            [
                block.block,
                f"{block.best_step} of {block.steps}" if block.best_step else "none: start kept",
                *(
                    f"{value:.4g}"
                    for value in (
                        block.loss_before,
                        block.loss_after,
                        block.held_out_before,
                        block.held_out_after,
                    )
                ),
            ]
            for block in report.distillation
        ]
        columns = ["distilled", "best step", "loss before", "after", "held out before", "after"]
        out.print(common.table(None, columns, rows, set(columns[2:])))


def _show_plan(result) -> None:
    out = common.console()
    rows = [
        ["peak memory", common.size(result.peak_bytes)],
        *([f"  {name}", common.size(count)] for name, count in result.parts.items()),
        ["time", f"about {common.duration(result.seconds)}"],
        ["checkpoint", common.size(result.output_bytes)],
        ["disk while it runs", common.size(result.work_bytes)],
        ["layers", f"{len(result.modules)}, {result.bits_per_weight:.4f} bits per weight"],
        ["left as they are", ", ".join(result.unquantized) or "none"],
    ]
    out.print(common.table(None, ["", ""], rows, show_header=False))
    if result.outlier_share is not None:
        out.print(
            f"assumed: {result.outlier_share:.1%} of the inputs of a layer with static outliers are some, and"
            " their weights stay in float16; calibration finds how many there are (--outlier-share)"
        )
    for name, reason in result.refusals.items():
        out.print(f"cannot be exported: {name}: {reason}")


def _recipe(
    format,
    rounding,
    damp,
    act_order,
    static_groups,
    scale_search,
    ignore,
    override,
    recipe,
    calibration,
    check=True,
    transform="none",
    activations="exact",
    activation_override=None,
    distillation=None,
):
    """The recipe of the options; wrong ones are wrong usage (exit code 2)."""
    import quantloom

    if recipe is not None and str(recipe).partition(":")[0] == "zeroquant":
        result = _option("--recipe", quantloom.Recipe.named, str(recipe))
    elif recipe is not None:
        common.require_file(Path(recipe), "recipe")
        result = quantloom.Recipe.from_json(Path(recipe).read_text(encoding="utf-8"))
    else:
        parsed = _option("--rounding", quantloom.parse_rounding, rounding)
        changes = {"damp": damp, "act_order": act_order, "static_groups": static_groups}
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes and not isinstance(parsed, quantloom.GPTQ):
            flags = ", ".join("--" + name.replace("_", "-") for name in changes)
            raise typer.BadParameter(f"{flags}: only gptq has this, but the rounding is {rounding!r}")
        if scale_search is not None and isinstance(parsed, quantloom.BeamSearch):
            raise typer.BadParameter("--scale-search: beam_search fits scales itself")
        if scale_search is not None and isinstance(parsed, (quantloom.AWQ, quantloom.SmoothQuant)):
            raise typer.BadParameter(
                "--scale-search: the rounding after the scales has its own, as in awq+gptq:search"
            )
        if scale_search is not None:
            changes["scale_search"] = quantloom.ScaleSearch() if scale_search else None
        chosen = _option("--format", quantloom.parse_format, format)
        settings = {
            "overrides": dict(_override(entry) for entry in override or ()),
            "transform": _option("--transform", quantloom.parse_transform, transform),
            "activations": _activations("--activations", activations),
            "activation_overrides": dict(_activation_override(entry) for entry in activation_override or ()),
        }
        if ignore is not None:
            settings["ignore"] = tuple(ignore)
        changed = _option("--damp", lambda: dataclasses.replace(parsed, **changes))
        result = _option("--ignore", lambda: quantloom.Recipe(chosen, changed, **settings))
    if distillation is not None:
        trained = _option("--distillation", quantloom.parse_distillation, distillation)
        result = dataclasses.replace(result, distillation=trained)
    if check and calibration is None and result.distillation is not None:
        raise typer.BadParameter(
            "missing, but distillation needs a calibration text", param_hint="--calibration"
        )
    if check and calibration is None and not isinstance(result.rounding, quantloom.Nearest):
        name = type(result.rounding).__name__.lower()
        raise typer.BadParameter(f"missing, but {name} needs a calibration text", param_hint="--calibration")
    return result


def _override(entry: str):
    import quantloom

    pattern, separator, spec = entry.rpartition("=")
    if not separator or not pattern:
        raise typer.BadParameter(f"got {entry!r}, expected PATTERN=FORMAT", param_hint="--override")
    return pattern, None if spec == "none" else _option("--override", quantloom.parse_format, spec)


def _activations(hint: str, spec: str):
    import quantloom

    return None if spec == "exact" else _option(hint, quantloom.parse_activations, spec)


def _activation_override(entry: str):
    pattern, separator, spec = entry.partition("=")
    if not separator or not pattern:
        raise typer.BadParameter(
            f"got {entry!r}, expected PATTERN=FORMAT", param_hint="--activation-override"
        )
    return pattern, _activations("--activation-override", spec)


def _option(hint: str, function, *arguments):
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None
