"""`quantloom export` and `quantloom import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantloom.cli import common

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in the output folder.")]


@common.reports_errors
def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder that `quantize` wrote.", show_default=False)
    ],
    output: Output,
    layout: Annotated[
        common.Layout, typer.Option(help="Checkpoint layout.")
    ] = common.Layout.compressed_tensors,
    overwrite: Overwrite = False,
    json: common.Json = False,
    traceback: common.Traceback = False,
) -> None:
    """Write a quantized model in a layout that transformers, vLLM or exllamav3 load.

    The codes, scales and zero points stay what they are. What a layout cannot hold is refused by name.

    **Examples**

        quantloom export OUT -o OUT-vllm --layout compressed-tensors
        quantloom export OUT -o OUT-gptq --layout gptq
        quantloom export OUT-trellis -o OUT-exl3 --layout exl3
        quantloom export OUT-additive -o OUT-aqlm --layout aqlm
        quantloom export OUT-spqr -o OUT-tiles --layout spqr
    """
    common.require_folder(model, "model")
    common.quiet_libraries()
    import quantloom

    _show(quantloom.models.export(model, output, layout.value, overwrite=overwrite), json)


@common.reports_errors
def import_(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder in the GPTQ, AWQ, compressed-tensors, EXL3 or SpQR layout.",
            show_default=False,
        ),
    ],
    output: Output,
    overwrite: Overwrite = False,
    json: common.Json = False,
    traceback: common.Traceback = False,
) -> None:
    """Read a GPTQ, AWQ, compressed-tensors, EXL3 or SpQR checkpoint and write it in quantloom's layout.

    **Example**

        quantloom import Llama-GPTQ -o Llama-quantloom
    """
    common.require_folder(model, "model")
    common.quiet_libraries()
    import quantloom

    _show(quantloom.models.import_(model, output, overwrite=overwrite), json)


@common.reports_errors
def rotate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Llama, Mistral, Qwen2 or Qwen3 model.", show_default=False),
    ],
    output: Output,
    transform: Annotated[
        str, typer.Option(metavar="TRANSFORM", help="hadamard[:bN][:seed=N|:no-signs].")
    ] = "hadamard",
    overwrite: Overwrite = False,
    json: common.Json = False,
    traceback: common.Traceback = False,
) -> None:
    """Write the same model with a rotated residual stream, folded into its weights.

    The result is a plain model to be quantized like any other; nothing is rotated at run time. Its logits are
    compared with the original's before anything is written.

    **Example**

        quantloom rotate MODEL -o ROTATED && quantloom quantize ROTATED -o OUT -r nearest
    """
    common.require_folder(model, "model")
    common.quiet_libraries()
    import quantloom

    result = quantloom.models.rotate(model, output, transform, overwrite=overwrite)
    if json:
        common.print_json(result)
    else:
        typer.echo(
            f"{result.output}: {result.transform}, logits differ by {result.difference:.2g} of their norm"
        )


def _show(report, json: bool) -> None:
    if json:
        common.print_json(report)
        return
    typer.echo(f"{len(report.modules)} layers in {report.output}")
    for note in report.notes:
        typer.echo(f"note: {note}")
