"""`quantloom kv-calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantloom.cli import common


@common.reports_errors
def kv_calibrate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a model, quantized or not.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Safetensors file for the tables.", show_default=False)
    ],
    calibration: Annotated[Path, typer.Option(help="UTF-8 text, or token ids (.u16).", show_default=False)],
    format: Annotated[
        str, typer.Option(help="kvquant:BITS[:PERCENT%][:firstTOKENS][:rWINDOW].")
    ] = "kvquant:4:1%",
    windows: Annotated[int, typer.Option(min=1, help="Windows from the start of the text.")] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    equal: Annotated[
        bool, typer.Option("--equal", help="Do not weight errors by squared gradients: faster.")
    ] = False,
    q_norm: Annotated[
        bool, typer.Option("--q-norm", help="Give decoded elements the mean and deviation of exact ones.")
    ] = False,
    post_rotary: Annotated[
        bool, typer.Option("--post-rotary", help="Store keys with their rotary embeddings.")
    ] = False,
    device: Annotated[str, typer.Option(help='Where the model runs: "cpu", "cuda", "cuda:1", ...')] = "cpu",
    json: common.Json = False,
    progress: common.Progress = None,
    traceback: common.Traceback = False,
) -> None:
    """Find the tables of KVQuant for a model's keys and values.

    **Example**

        quantloom kv-calibrate MODEL --format kvquant:3:1% --calibration calib.txt -o kv3.safetensors

        quantloom eval MODEL --reference MODEL --text valid.txt --kv kv3.safetensors
    """
    common.require_folder(model, "model")
    common.require_file(calibration, "calibration")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output: no such folder: {output.absolute().parent}")
    common.quiet_libraries()
    import quantloom
    from quantloom.cli.evaluate import load_model

    wanted = quantloom.kv.parse_kv_format(format)
    ids = quantloom.evaluate.tokens(model, calibration)
    with common.progress_bar(progress) as update:
        update("loading", 0, 1)
        found = quantloom.kv.calibrate(
            load_model(model, device=device),
            ids,
            wanted,
            windows=windows,
            window=window,
            fisher=not equal,
            q_norm=q_norm,
            pre_rotary=not post_rotary,
            progress=lambda done, total: update("calibrating", done, total),
        )
    found.save(output)
    result = {
        "model": str(model),
        "output": str(output),
        "format": found.format.spec,
        "layers": len(found.layers),
        "rotary": found.rotary is not None,
        "bytes": output.stat().st_size,
    }
    if json:
        common.print_json(result)
        return
    rows = [
        ["layers", str(result["layers"])],
        ["keys stored", "before rotary embeddings" if result["rotary"] else "as they are"],
        ["file", f"{output}, {result['bytes']} bytes"],
    ]
    common.console().print(common.table(result["format"], ["measure", "value"], rows))
