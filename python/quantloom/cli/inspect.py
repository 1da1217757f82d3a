"""`quantloom inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantloom.cli import common


@common.reports_errors
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A safetensors file or a model folder.", show_default=False)
    ],
    planes: Annotated[bool, typer.Option("--planes", help="List what is stored for each matrix.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Totals only, without the tensors.")] = False,
    json: common.Json = False,
    traceback: common.Traceback = False,
) -> None:
    """List tensors, formats and true bits per weight of a checkpoint.

    Bits are counted from the stored bytes: codes, scales, zero points, indices and padding. Reads originals,
    quantized models of this library, and the GPTQ, compressed-tensors and EXL3 layouts. Checksums are
    verified.

    **Examples**

        quantloom inspect OUT
        quantloom inspect MODEL/model-00001-of-00004.safetensors --json
    """
    from quantloom.inspection import inspect as inspect_checkpoint

    result = inspect_checkpoint(path)
    if json:
        document = result.to_dict()
        if summary:
            del document["tensors"]
        common.print_json(document)
        return
    out = common.console()
    if not summary:
        columns = ["tensor", "format", "shape", "bits/weight", "bytes"]
        rows = []
        for entry in result.tensors:
            shape = " × ".join(map(str, entry.shape)) or "scalar"
            size = f"{entry.bits // 8:,}"
            rows.append([entry.name, entry.format, shape, f"{entry.bits_per_weight:.3f}", size])
            if planes:
                rows += [[f"  .{name}", "", stored, "", ""] for name, stored in entry.planes.items()]
        out.print(common.table(None, columns, rows, {"bits/weight", "bytes"}))
    lines = [("layout", result.layout)]
    if result.architecture:
        lines.append(("architecture", result.architecture))
    if result.bits_per_weight is not None:
        count = sum(entry.quantized for entry in result.tensors)
        lines.append(
            (
                "quantized",
                f"{count} matrices, {result.quantized_weights:,} weights, "
                f"{result.bits_per_weight:.4f} bits per weight",
            )
        )
    lines.append(
        ("all tensors", f"{result.weights:,} weights, {result.model_bits_per_weight:.4f} bits per weight")
    )
    lines.append(("files", f"{len(result.files)}, {common.size(result.file_bytes)}"))
    for file, entries in result.metadata.items():
        # Every file says "format": "pt".
        own = sorted((key, value) for key, value in entries.items() if key != "format")
        lines += [(f"metadata of {file}", f"{key} = {value}") for key, value in own]
    out.print(common.table(None, ["", ""], [list(line) for line in lines], show_header=False))
