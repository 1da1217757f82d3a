"""Sweeps: many settings, each a run of its own, in one process or in one per GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from quantloom import _checks
from quantloom.experiments import store
from quantloom.experiments.store import AttrDict, Experiment

__all__ = ["iter_dict_product", "run_sweep"]

Runner = Callable[[AttrDict, Experiment], "dict[str, Any] | None"]


def iter_dict_product(config: dict[str, Any], *axes: str, progress: bool = False) -> Iterator[dict[str, Any]]:
    """The configs that have one value for each axis: the product of the lists at `axes`, the last one
    fastest.

    >>> list(E.iter_dict_product(dict(model="a", bits=[3, 4]), "bits"))
    [{'model': 'a', 'bits': 3}, {'model': 'a', 'bits': 4}]

    `progress` shows a bar on stderr. Raises KeyError for an axis that is not in `config`.
    """
    for axis in axes:
        if axis not in config:
            raise KeyError(f"axes: got {axis!r}, expected one of {sorted(config)}")
    products = list(itertools.product(*(config[axis] for axis in axes)))
    for values in store._tracked(products, "settings", progress):
        yield {**config, **dict(zip(axes, values))}


def run_sweep(
    runner: Runner | type,
    configs: Iterable[dict[str, Any]],
    *,
    experiment: str | None = None,
    processes: int | None = None,
    resume: bool = True,
    progress: bool = False,
    folder: str | Path | None = None,
) -> list[AttrDict]:
    """Runs every config as an `Experiment`; returns their records in the order of `configs`.

    Args:
        runner: called with the config (an AttrDict without "experiment") and the open `Experiment`; a dict
            that it returns is added to the summary. A class is instantiated once in each process and the
            instance called, so that models are loaded once. For several processes it must be importable by
            name.
        configs: dicts, such as those of `iter_dict_product`.
        experiment: the experiment's name, for configs without an entry of that name.
        processes: None: one per CUDA device, or one if there is none. With 1 the runs happen in this process.
            Each of several processes sees one CUDA device of its own and its share of the CPU's threads.
        resume: take over the run of a config that finished before, instead of running it again.
        progress: a bar on stderr.

    A run that raises is recorded as "failed" with its error, and the sweep goes on: look at ``meta.status``.
    A process that dies (killed, out of memory) leaves its run "running" and ends the sweep with a
    RuntimeError; the same call goes on from there.
    """
    wanted: list[tuple[str, dict[str, Any]]] = []
    for config in configs:
        config = dict(config)
        name = store._name("experiment", config.pop("experiment", experiment))
        wanted.append((name, config))
    folder = store.runs_folder(folder).absolute()
    if processes is None:
        processes = _cuda_devices() or 1
    processes = _checks.integer("processes", processes, 1)

    records: dict[int, AttrDict] = {}
    if resume:
        finished = {name: _finished(name, folder) for name in {name for name, _ in wanted}}
        for index, (name, config) in enumerate(wanted):
            record = finished[name].get(_key(config))
            if record is not None:
                records[index] = record
    tasks = [
        (index, name, config, folder) for index, (name, config) in enumerate(wanted) if index not in records
    ]
    if processes == 1 or len(tasks) <= 1:
        call = runner() if isinstance(runner, type) else runner
        for task in store._tracked(tasks, "runs", progress):
            records[task[0]] = _run(call, *task)
    else:
        records.update(_run_in_processes(runner, tasks, processes, progress))
    return [records[index] for index in range(len(wanted))]


def _run(call: Runner, index: int, name: str, config: dict[str, Any], folder: Path) -> AttrDict:
    with_name = {"experiment": name, **config}
    experiment = Experiment(with_name, folder)
    with contextlib.suppress(Exception), experiment:  # what was raised is in the record
        result = call(AttrDict(config), experiment)
        if result is not None:
            experiment.summary(**result)
    return experiment.record()


def _key(config: dict[str, Any]) -> str:
    return json.dumps(store.plain(config, "config"), sort_keys=True)


def _finished(name: str, folder: Path) -> dict[str, AttrDict]:
    done = [record for record in store.runs(name, folder=folder) if record.meta.status == "finished"]
    return {json.dumps(record.config, sort_keys=True): record for record in done}


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _run_in_processes(runner, tasks, processes: int, progress: bool) -> dict[int, AttrDict]:
    from concurrent.futures import ProcessPoolExecutor, as_completed

    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    count = _cuda_devices()
    processes = min(processes, len(tasks))
    for index in range(processes):
        devices.put(_visible(index % count) if count else None)
    threads = max(1, (os.cpu_count() or 1) // processes)
    records = {}
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start, initargs=(devices, runner, threads)
    ) as pool:
        futures = [pool.submit(_run_in_worker, task) for task in tasks]
        for future in store._tracked(_Completed(as_completed(futures), len(futures)), "runs", progress):
            index, record = future.result()
            records[index] = record
    return records


class _Completed:
    """An iterator with a length, for the bar."""

    def __init__(self, items: Iterable[Any], length: int) -> None:
        self._items, self._length = items, length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return self._length


def _visible(index: int) -> str:
    """The name of a device for a child: where this process sees some of the devices only, theirs."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[index].strip() if names else str(index)


_CALL: Runner | None = None


def _start(devices: Any, runner: Runner | type, threads: int) -> None:
    global _CALL
    device = devices.get(timeout=60)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(threads)
    _CALL = runner() if isinstance(runner, type) else runner


def _run_in_worker(task: tuple[Any, ...]) -> tuple[int, AttrDict]:
    assert _CALL is not None
    return task[0], _run(_CALL, *task)
