"""The command line: one module for each command, shared parts in `common`.

Importing it loads neither torch nor transformers; commands that need them import them when they run.
Exit codes: 0 done, 1 failed (one line `error: ...` on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quantloom.cli import (
    bench,
    checkpoints,
    demo,
    doctor,
    evaluate,
    inspect,
    kv_calibrate,
    quantize,
    trellis_search,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="quantloom",
    help="Quantize large language models, and measure what it costs.",
    epilog="More: quantloom COMMAND --help. Exit codes: 0 done, 1 failed, 2 wrong usage.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        import quantloom

        typer.echo(f"quantloom {quantloom.build_info()['version']}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("quantize")(quantize.quantize)
app.command("plan")(quantize.plan)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("export")(checkpoints.export)
app.command("import")(checkpoints.import_)
app.command("rotate")(checkpoints.rotate)
app.command("kv-calibrate")(kv_calibrate.kv_calibrate)
app.command("trellis-search")(trellis_search.trellis_search)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits the process."""
    app(args=sys.argv[1:] if arguments is None else arguments, prog_name="quantloom")
