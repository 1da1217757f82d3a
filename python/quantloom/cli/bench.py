"""`quantloom bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from quantloom.cli import common

app = typer.Typer(help="Quick measurements that need no model.", no_args_is_help=True)


@app.command("rotation")
@common.reports_errors
def rotation(
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="Also this format. Repeatable.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(
            min=2, max=16, help="Widths of the block quantizer. Default: 4, 3, 2.", show_default=False
        ),
    ] = None,
    transform: Annotated[
        str, typer.Option(metavar="TRANSFORM", help="How weights of --format are rotated.")
    ] = "hadamard:b128",
    rounding: Annotated[
        str,
        typer.Option(
            metavar="ROUNDING", help="Of --format: nearest, or nearest:search, which searches for the steps."
        ),
    ] = "nearest",
    size: Annotated[int, typer.Option(min=1, help="Rows and columns of the matrix.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Of the matrix.")] = 0,
    threads: common.Threads = 0,
    json: common.Json = False,
    traceback: common.Traceback = False,
) -> None:
    """Errors of block-quantized weights with outliers, with and without a Hadamard rotation.

    Weights 0.02 * N(0, 1) with some outliers of 0.3 to 0.7 are quantized in blocks of 32, with a step set by
    the block's maximum, as they are and in the basis of a Walsh-Hadamard transform of blocks of 128. Rotation
    helps at 4 bits and hurts at 2.

    **Example**

        quantloom bench rotation --format uniform:4:g32 --format codebook:nf4:g32

        quantloom bench rotation --format uniform:2:g32 --rounding nearest:search
    """
    from quantloom.rotation import rotation_table

    rows = rotation_table(
        bits or (4, 3, 2), format or (), transform, size=size, seed=seed, threads=threads, rounding=rounding
    )
    if json:
        common.print_json({"size": size, "seed": seed, "rows": rows})
        return
    columns = ["format", "transform", "bits/weight", "MSE", "max error", "MSE to plain"]
    plain: dict[str, float] = {}
    cells = []
    for row in rows:
        base = plain.setdefault(row.format, row.mean_squared_error)
        cells.append(
            [
                row.format,
                row.transform,
                f"{row.bits_per_weight:.3f}",
                f"{row.mean_squared_error:.3g}",
                f"{row.max_error:.3f}",
                f"{row.mean_squared_error / base:.2f} x" if base else "",
            ]
        )
    common.console().print(common.table(None, columns, cells, set(columns[2:])))
