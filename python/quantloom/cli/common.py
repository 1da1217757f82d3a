"""What all commands share: options, errors as one line, JSON on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="On an error, show Python's traceback.")]
Progress = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="Progress bars on stderr. Default: if it is a terminal."),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all. Results do not depend on it.")]


class Layout(str, Enum):
    """Layouts of other libraries' checkpoints."""

    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    exl3 = "exl3"
    spqr = "spqr"
    aqlm = "aqlm"


def reports_errors(function: Callable) -> Callable:
    """Wraps a command: an exception ends it with one line on stderr and exit code 1."""

    @functools.wraps(function)
    def wrapper(*args, traceback: bool = False, **kwargs):
        try:
            return function(*args, traceback=traceback, **kwargs)
        except KeyboardInterrupt:
            typer.echo("error: interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of a pipe has gone, as in `| head`; keep Python from flushing into it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if traceback:
                raise
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(1) from None

    return wrapper


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError)) and message:
        return message
    name = type(error).__name__
    return f"{name}: {message} (--traceback shows where)" if message else f"{name} (--traceback shows where)"


def plain(value: Any) -> Any:
    """`value` as JSON types: dataclasses become objects, paths strings, NaN and infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return str(value)


def print_json(document: Any) -> None:
    typer.echo(json.dumps(plain(document), indent=2, allow_nan=False))


def console():
    """Standard output through rich, never wrapped to 80 columns when it goes to a file or a pipe."""
    from rich.console import Console

    out = Console(highlight=False, markup=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = Console(highlight=False, markup=False, width=200)
    return out


def table(
    title: str | None,
    columns: list[str],
    rows: list[list[str]],
    numbers: set[str] | frozenset[str] = frozenset(),
    show_header: bool = True,
):
    """A rich table of plain strings; the columns in `numbers` are set to the right."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title, title_justify="left", title_style="bold", show_header=show_header)
    for column in columns:
        right = column in numbers
        result.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))
    return result


@contextmanager
def progress_bar(enabled: bool | None) -> Iterator[Callable[[str, int, int], None]]:
    """Yields `update(description, done, total)`, which draws on stderr, or does nothing."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    err = Console(stderr=True, highlight=False, force_terminal=True if enabled else None)
    if enabled is False or not err.is_terminal:
        yield lambda description, done, total: None
        return
    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    with bars:
        task = bars.add_task("", total=None)

        def update(description: str, done: int, total: int) -> None:
            bars.update(task, description=description, completed=done, total=total)

        yield update


def follow_quantization(update: Callable[[str, int, int], None]) -> Callable[[Any], None]:
    """A callback for `quantloom.models.quantize` that draws on a progress bar."""

    def follow(event: Any) -> None:
        where = event.module or (f"block {event.block + 1} of {event.blocks}" if event.block >= 0 else "")
        update(f"{event.phase} {where}".rstrip(), round(10_000 * event.fraction), 10_000)

    return follow


def quiet_libraries() -> None:
    """Keeps transformers' own progress bars and advice out of the output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def require_folder(path: Path, name: str) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: no such folder: {path}")


def require_file(path: Path, name: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file: {path}")


def size(count: int | float) -> str:
    """Bytes for people: 8.4 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
