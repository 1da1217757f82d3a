"""`quantloom demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantloom.cli import common


@common.reports_errors
def demo(
    model: Annotated[
        Path, typer.Option(help="Folder with a model, its tokenizer, calib.txt and valid.txt.")
    ] = Path("examples/tiny-llama"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("demo-out"),
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    evaluation_windows: Annotated[
        int | None, typer.Option(min=1, help="Evaluation windows. Default: all.", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    threads: common.Threads = 0,
    json: common.Json = False,
    progress: common.Progress = None,
    traceback: common.Traceback = False,
) -> None:
    """Quantize a small trained model to 8, 4, 3 and 2 bits, and show what each costs.

    Prints a table; writes a 4-bit checkpoint, report.json and a plot of KL divergence over bits per weight.

    **Example**

        quantloom demo --model examples/tiny-llama -o demo-out
    """
    common.require_folder(model, "model")
    common.quiet_libraries()
    from quantloom import demo as demonstration

    with common.progress_bar(progress) as update:
        report = demonstration.run(
            model,
            output,
            window=window,
            calibration_windows=windows,
            evaluation_windows=evaluation_windows,
            threads=threads,
            progress=update,
        )
    if json:
        common.print_json(report)
        return
    columns = [
        "format",
        "rounding",
        "bits/weight",
        "files",
        "perplexity",
        "KL divergence",
        "top-1",
        "seconds",
    ]
    rows = [
        [
            row.format,
            {"nearest": "nearest (RTN)", "gptq": "GPTQ"}.get(row.rounding, row.rounding),
            f"{row.bits_per_weight:.3f}",
            common.size(row.file_bytes),
            f"{row.perplexity:.3f}",
            f"{row.kl:.5f}",
            f"{row.top1_agreement:.2%}",
            f"{row.quantize_seconds:.1f}",
        ]
        for row in report.measurements
    ]
    out = common.console()
    validation = report.validation
    title = (
        f"{model.name}: {validation['tokens']:,} tokens of {validation['text']} scored "
        f"in {validation['windows']} windows"
    )
    out.print(common.table(title, columns, rows, set(columns[2:])))
    out.print(
        "bits/weight: of the quantized linear layers as stored, with scales and zero points. files: the "
        "whole checkpoint. KL divergence to the original in nats; top-1: how often both rank the same token "
        "first. seconds: to calibrate, quantize and save."
    )
    out.print(f"4-bit GPTQ model: {report.checkpoint}")
    out.print(f"plot: {report.plot}")
    out.print(f"report: {output / 'report.json'}")
    out.print(f"took {common.duration(report.seconds)}")
