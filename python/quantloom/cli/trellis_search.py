"""`quantloom trellis-search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantloom.cli import common


@common.reports_errors
def trellis_search(
    code: Annotated[
        str, typer.Option("--code", "-c", metavar="CODE", help="mul1, mcg or octagon.")
    ] = "octagon",
    bits: Annotated[
        list[float] | None,
        typer.Option(help="Bits per weight. Repeatable. Default: 2, 3, 4.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(min=0, help="Random multipliers beside the published ones.")] = 256,
    tiles: Annotated[int, typer.Option(min=1, help="Rings of 256 numbers in the last round.")] = 1024,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the whole table to this JSON file.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows to print, beside the published ones.")] = 10,
    search: Annotated[str, typer.Option(help="fast, normal or best: how rings are closed.")] = "fast",
    unscaled: Annotated[
        bool, typer.Option("--unscaled", help="Code the numbers on the codebook as it is.")
    ] = False,
    window: Annotated[int, typer.Option(help="Bits of a state; 16 on a GPU.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the multipliers and the numbers.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(
            help='Where to search: "cpu", "cuda", "cuda:1", ... Default: a GPU if there is one.',
            show_default=False,
        ),
    ] = None,
    threads: common.Threads = 0,
    progress: common.Progress = None,
    json: common.Json = False,
    traceback: common.Traceback = False,
) -> None:
    """Screen multipliers of a trellis codebook by the error of coding independent N(0, 1) numbers.

    All are looked at with 64 rings; the best sixth goes on to four times as many, and so on. Eleven published
    multipliers stay to the end. Ranked by the bits that a code needs above the least that allow its error.

    **Example**

        quantloom trellis-search --code mul1 --bits 2 --count 100 -o mul1.json

        quantloom bench distortion --code mul1-AD9A2EC5
    """
    import dataclasses

    from quantloom import trellis

    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"output: no such folder: {output.parent}")
    with common.progress_bar(progress) as update:
        table = trellis.search(
            code,
            bits or (2, 3, 4),
            count,
            tiles,
            seed,
            search=search,
            unscaled=unscaled,
            window=window,
            device=device,
            threads=threads,
            progress=update,
        )
    if output is not None:
        table.save(output)
    if json:
        common.print_json(dataclasses.asdict(table))
        return
    columns = ["rank", "code", "RMS", *(f"{width:g} bits" for width in table.bits), "excess bits", "tiles"]
    cells = [
        [
            str(rank),
            row.codebook,
            f"{row.rms:.6f}",
            *(f"{error:.4g}" for error in row.distortion),
            f"{row.excess_bits:.4f}",
            str(row.tiles),
        ]
        for rank, row in enumerate(table.rows, 1)
        if rank <= top or row.published
    ]
    out = common.console()
    out.print(
        f"{len(table.rows)} multipliers of {table.code} on {table.device}, search {table.search}, seed "
        f"{table.seed}; errors over the source's mean square"
    )
    out.print(common.table(None, columns, cells, {*columns} - {"code"}))
    if output is not None:
        out.print(f"whole table: {output}")
