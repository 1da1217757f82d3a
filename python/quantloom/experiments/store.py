"""Runs in a local folder.

Layout, under the folder of runs:

- ``<experiment>/runs.jsonl``: one JSON object a line, each the whole record of a run at that moment. The last
  line with a run's id counts; ``{"run_id": ..., "deleted": true}`` removes it. Numbers that are not finite
  are written as NaN, Infinity and -Infinity, as Python's JSON reads them.
- ``<experiment>/<run_id>.safetensors``: the tensors of a run, if it stored any.

Lines are appended under a lock, so that several processes can write. A process that dies in the middle of a
line leaves no trace of it: readers ignore an unfinished last line, the next writer removes it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import platform
import secrets
import string
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from quantloom import _arrays, _checks

__all__ = [
    "AttrDict",
    "Experiment",
    "delete_run",
    "experiments",
    "run",
    "run_tensors",
    "runs",
    "update_run",
]

FOLDER_VARIABLE = "QUANTLOOM_RUNS"
DEFAULT_FOLDER = "quantloom-runs"
_RUNS = "runs.jsonl"
_NAME = set(string.ascii_letters + string.digits + "._-+")


class AttrDict(dict):
    """A dict whose entries are attributes too: ``run.config.bits``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}, expected one of {sorted(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}, expected one of {sorted(map(str, self))}") from None

    @classmethod
    def of(cls, value: Any) -> Any:
        """`value` with every dict inside it turned into an AttrDict; tuples become lists."""
        if isinstance(value, dict):
            return cls({key: cls.of(item) for key, item in value.items()})
        if isinstance(value, (list, tuple)):
            return [cls.of(item) for item in value]
        return value


class Experiment:
    """A run while it is under way: a context manager that keeps its record up to date.

    >>> with E.Experiment(dict(experiment="formats", bits=3)) as experiment:
    ...     experiment.summary(kl=0.2)

    The record has ``experiment``, ``run_id``, ``config`` (the rest of the config given), ``meta`` (status
    "running", "finished" or "failed", time, duration in seconds, host, process), ``summary`` and ``error``
    (None, or type, message and traceback of the exception that ended the block, which is raised on).

    Args:
        config: settings; entry "experiment" names the experiment (letters, digits and ``._-+``). Values may
            be whatever JSON knows, and tuples, sets, dataclasses, paths, NumPy and torch scalars and arrays,
            dtypes, devices; formats are stored by their JSON description.
        folder: the folder of runs. None: the environment's QUANTLOOM_RUNS, else ``quantloom-runs`` in the
            current folder.

    Raises TypeError for a value that has no JSON form, ValueError for a bad name; nothing is written then.
    """

    def __init__(self, config: dict[str, Any], folder: str | Path | None = None) -> None:
        if not isinstance(config, dict) or "experiment" not in config:
            raise ValueError("config: got no entry 'experiment', expected a dict that names the experiment")
        config = dict(config)
        self.experiment = _name("experiment", config.pop("experiment"))
        self.run_id = new_id()
        self._folder = runs_folder(folder)
        self._record: dict[str, Any] = {
            "experiment": self.experiment,
            "run_id": self.run_id,
            "config": plain(config, "config"),
            "meta": {
                "status": "running",
                "time": datetime.datetime.now(datetime.timezone.utc).isoformat(),
                "host": platform.node(),
                "process": os.getpid(),
                **_device(),
            },
            "summary": {},
            "error": None,
        }
        self._start = time.perf_counter()
        _append(self._folder, self._record)

    @property
    def id(self) -> str:
        """``<experiment>/<run_id>``, as `run` takes it."""
        return f"{self.experiment}/{self.run_id}"

    def summary(self, **values: Any) -> None:
        """Adds entries to the summary, or replaces them, and writes the record."""
        self._record["summary"] = {**self._record["summary"], **plain(values, "summary")}
        _append(self._folder, self._record)

    def tensors(self, tensors: dict[str, Any]) -> None:
        """Stores named torch tensors or NumPy arrays beside the record; they replace those stored before."""
        _write_tensors(self._folder / self.experiment / f"{self.run_id}.safetensors", tensors)

    def record(self) -> AttrDict:
        """A copy of the record as it is now."""
        return _with_id(AttrDict.of(self._record))

    def __enter__(self) -> Experiment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._record["error"] = _describe(error)
        self._record["meta"]["status"] = "finished" if error is None else "failed"
        self._record["meta"]["duration"] = time.perf_counter() - self._start
        _append(self._folder, self._record)


def run(id: str, folder: str | Path | None = None) -> AttrDict:
    """The record of one run, by its id ``<experiment>/<run_id>``. Raises KeyError if there is none."""
    experiment, run_id = _split(id)
    records = _read(runs_folder(folder) / experiment)
    if run_id not in records:
        raise KeyError(f"id: no run {id!r} in {runs_folder(folder)}")
    return _with_id(records[run_id])


def runs(experiment: str, progress: bool = False, folder: str | Path | None = None) -> list[AttrDict]:
    """All runs of an experiment, oldest first; none if it does not exist.

    `progress` shows a bar on stderr while they are read. Each record has an entry ``id`` besides those that
    `Experiment` lists. Raises ValueError for a file that is damaged, naming the line.
    """
    path = runs_folder(folder) / _name("experiment", experiment)
    records = _read(path, progress).values()
    return sorted(map(_with_id, records), key=lambda record: record.meta.time)


def run_tensors(id: str, folder: str | Path | None = None) -> dict[str, Any]:
    """The torch tensors that a run stored, on the CPU. Raises FileNotFoundError if it stored none."""
    import safetensors
    import safetensors.torch

    experiment, run_id = _split(id)
    path = runs_folder(folder) / experiment / f"{run_id}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"id: the run {id!r} stored no tensors ({path})")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"id: {path} is no readable safetensors file: {error}") from None


def update_run(run: dict[str, Any], folder: str | Path | None = None) -> None:
    """Writes a record that was changed by hand, in the place of the one stored.

    Raises KeyError if there is no such run.
    """
    record = {key: value for key, value in run.items() if key != "id"}
    for key in ("experiment", "run_id", "config", "meta", "summary"):
        if key not in record:
            raise ValueError(f"run: got no entry {key!r}, expected a record as `runs` returns it")
    path = runs_folder(folder)
    if _checks.string("run_id", record["run_id"]) not in _read(
        path / _name("experiment", record["experiment"])
    ):
        raise KeyError(f"run: no run {record['experiment']}/{record['run_id']} in {path}")
    _append(path, plain(record, "run"))


def delete_run(id: str, folder: str | Path | None = None) -> None:
    """Removes a run and its tensors. Raises KeyError if there is none."""
    experiment, run_id = _split(id)
    path = runs_folder(folder)
    if run_id not in _read(path / experiment):
        raise KeyError(f"id: no run {id!r} in {path}")
    _append(path, {"experiment": experiment, "run_id": run_id, "deleted": True})
    (path / experiment / f"{run_id}.safetensors").unlink(missing_ok=True)


def experiments(progress: bool = False, folder: str | Path | None = None) -> list[AttrDict]:
    """The experiments in the folder of runs, by name: ``experiment`` and the number of its ``runs``."""
    counts: collections.Counter[str] = collections.Counter()
    for file in sorted(runs_folder(folder).glob(f"*/{_RUNS}")):
        counts[file.parent.name] = len(_read(file.parent, progress))
    return [AttrDict(experiment=name, runs=count) for name, count in sorted(counts.items()) if count]


def runs_folder(folder: str | Path | None) -> Path:
    """The folder of runs: `folder`, or the default (see `Experiment`)."""
    if folder is None:
        folder = os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER
    return _checks.path("folder", folder)


def new_id() -> str:
    """Ten random letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(10))


def plain(value: Any, name: str) -> Any:
    """`value` as JSON has it; `name` leads to it in messages. Raises TypeError for what has no JSON form."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), name)
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name}: got the key {key!r} ({_checks.type_name(key)}), expected strings")
        return {key: plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return plain(sorted(value, key=repr), name)
    if hasattr(value, "to_config"):
        return plain(value.to_config(), name)
    described = _described(value)
    if described is not None:
        return plain(described, name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return plain(fields, name)
    torch = _arrays.torch_if_loaded()
    if torch is not None:
        if isinstance(value, torch.Tensor):
            return plain(value.tolist(), name)
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value).removeprefix("torch.")
    raise TypeError(f"{name}: got {_checks.type_name(value)}, which has no JSON form")


def _described(value: Any) -> dict[str, Any] | None:
    """A format's own description."""
    formats = sys.modules.get("quantloom.formats.base")  # not there: then no value is a format
    if formats is not None and isinstance(value, formats.TensorFormat):
        return formats.TensorFormat.save(value)
    return None


def _name(argument: str, value: Any) -> str:
    _checks.string(argument, value)
    if not value or value.startswith(".") or not set(value) <= _NAME:
        raise ValueError(
            f"{argument}: got {value!r}, expected letters, digits and '._-+', not starting with a dot"
        )
    return value


def _split(id: str) -> tuple[str, str]:
    parts = _checks.string("id", id).split("/")
    if len(parts) != 2:
        raise ValueError(f"id: got {id!r}, expected '<experiment>/<run_id>'")
    return _name("id", parts[0]), _name("id", parts[1])


def _with_id(record: AttrDict) -> AttrDict:
    record["id"] = f"{record['experiment']}/{record['run_id']}"
    return record


def _device() -> dict[str, Any]:
    torch = _arrays.torch_if_loaded()
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    return {"device": torch.cuda.get_device_name()}


def _describe(error: BaseException) -> dict[str, Any]:
    cause = {"cause": _describe(error.__cause__)} if error.__cause__ else {}
    trace = traceback.format_tb(error.__traceback__)
    return {"type": type(error).__qualname__, "message": str(error), "trace": trace, **cause}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file of runs, open for reading and writing, while no other process writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _append(folder: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with _locked(folder / record["experiment"] / _RUNS) as descriptor:
        end = _end_of_lines(descriptor)
        os.ftruncate(descriptor, end)
        written = 0
        while written < len(line):
            written += os.pwrite(descriptor, line[written:], end + written)


def _end_of_lines(descriptor: int) -> int:
    """The offset after the last line that was written to its end."""
    position = os.fstat(descriptor).st_size
    step = 1 << 16
    while position > 0:
        start = max(0, position - step)
        found = os.pread(descriptor, position - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _read(path: Path, progress: bool = False) -> dict[str, AttrDict]:
    """The latest record of each run in an experiment's folder."""
    file = path / _RUNS
    if not file.is_file():
        return {}
    text = file.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].split(b"\n")[:-1]
    records: dict[str, AttrDict] = {}
    for number, line in enumerate(_tracked(lines, "runs", progress), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: line {number} is no JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("run_id"), str):
            raise ValueError(f"{file}: line {number} is no record of a run")
        if record.get("deleted") is True:
            records.pop(record["run_id"], None)
            continue
        meta = record.get("meta")
        if (
            record.get("experiment") != path.name
            or not isinstance(meta, dict)
            or not isinstance(meta.get("time"), str)
        ):
            raise ValueError(f"{file}: line {number} is no record of a run of {path.name!r}")
        records[record["run_id"]] = AttrDict.of(record)
    return records


def _tracked(items: list[Any], description: str, progress: bool) -> Iterator[Any]:
    if not progress:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, console=Console(stderr=True))


def _write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    import safetensors.torch
    import torch

    named = {}
    for name, value in tensors.items():
        _checks.string("tensors", name, "names as strings")
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"tensors[{name!r}]: got {_checks.type_name(value)}, expected a tensor or an array"
            )
        named[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.torch.save_file(named, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
