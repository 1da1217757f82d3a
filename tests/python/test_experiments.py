"""Runs in a folder: what is written is read back, whatever interrupts, whoever else writes."""

import copy
import json
import math
import multiprocessing
import os
import pickle
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from quantloom import experiments as E


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The default folder of runs."""
    path = tmp_path / "runs"
    monkeypatch.setenv("QUANTLOOM_RUNS", str(path))
    return path


def lines(folder, experiment="exp"):
    return (folder / experiment / "runs.jsonl").read_text().splitlines()


def test_attr_dict():
    value = E.AttrDict(a=1, b=E.AttrDict(c=[2]))
    assert value.a == value["a"] == 1
    value.d = 4
    assert value["d"] == 4
    del value.d
    assert "d" not in value
    with pytest.raises(AttributeError, match="no entry 'd'"):
        value.d  # noqa: B018
    nested = E.AttrDict.of({"x": [{"y": (1, 2)}]})
    assert nested.x[0].y == [1, 2]
    for copied in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert copied == value
        assert copied.b.c == [2]


@dataclass
class Settings:
    bits: int
    block: tuple


def test_experiment_is_recorded(folder):
    config = {
        "experiment": "exp",
        "bits": 3,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "settings": Settings(4, (1, None)),
        "array": np.arange(3),
        "tensor": torch.tensor([1.5]),
        "scalar": np.float32(0.5),
        "path": folder,
        "names": {"b", "a"},
    }
    with E.Experiment(config) as experiment:
        assert E.run(experiment.id).meta.status == "running"
        experiment.summary(kl=0.25, values=torch.tensor([1.0, math.inf]))
        experiment.summary(kl=0.5, nan=math.nan)
        experiment.tensors({"w": torch.arange(6).view(2, 3).T, "v": np.ones(2, np.float16)})
    assert config["experiment"] == "exp", "the config given is left as it is"
    (run,) = E.runs("exp")
    assert run == E.run(run.id) == E.run(experiment.id)
    assert run.config == {
        "bits": 3,
        "dtype": "bfloat16",
        "device": "cpu",
        "settings": {"bits": 4, "block": [1, None]},
        "array": [0, 1, 2],
        "tensor": [1.5],
        "scalar": 0.5,
        "path": str(folder),
        "names": ["a", "b"],
    }
    assert run.summary.kl == 0.5
    assert run.summary["values"] == [1.0, math.inf]
    assert math.isnan(run.summary.nan)
    assert (run.meta.status, run.error) == ("finished", None)
    assert run.meta.duration > 0
    tensors = E.run_tensors(run.id)
    assert tensors["w"].equal(torch.arange(6).view(2, 3).T)
    assert tensors["v"].dtype == torch.float16
    # Every line is a whole record, and every record is JSON.
    assert [json.loads(line)["run_id"] for line in lines(folder)] == [run.run_id] * 4


def test_failure_is_recorded_and_raised(folder):
    with pytest.raises(ZeroDivisionError), E.Experiment({"experiment": "exp"}):
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ZeroDivisionError("outer") from inner
    (run,) = E.runs("exp")
    assert run.meta.status == "failed"
    assert (run.error.type, run.error.message) == ("ZeroDivisionError", "outer")
    assert run.error.cause.type == "KeyError"
    assert "test_failure_is_recorded" in run.error.trace[0]


def test_runs_are_updated_deleted_and_counted(folder):
    assert E.runs("exp") == [] == E.experiments()
    for bits in (3, 4, 5):
        with E.Experiment({"experiment": "exp", "bits": bits}) as experiment:
            experiment.tensors({"x": torch.ones(1)})
    with E.Experiment({"experiment": "other"}):
        pass
    first, second, third = E.runs("exp", progress=True)
    assert [run.config.bits for run in (first, second, third)] == [3, 4, 5]
    second.summary.note = "looked at"
    E.update_run(second)
    assert E.run(second.id).summary.note == "looked at"
    E.delete_run(first.id)
    assert [run.id for run in E.runs("exp")] == [second.id, third.id]
    assert E.experiments() == [{"experiment": "exp", "runs": 2}, {"experiment": "other", "runs": 1}]
    for call in (E.run, E.delete_run, E.run_tensors):
        with pytest.raises((KeyError, FileNotFoundError), match=first.run_id):
            call(first.id)
    with pytest.raises(KeyError, match=first.run_id):
        E.update_run(first)


def test_folder_argument(tmp_path, folder):
    with E.Experiment({"experiment": "exp"}, folder=tmp_path / "elsewhere") as experiment:
        pass
    assert not folder.exists()
    assert [run.id for run in E.runs("exp", folder=tmp_path / "elsewhere")] == [experiment.id]


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_unfinished_line_is_no_line(folder, cut):
    """A process that dies while it writes loses its own line only."""
    for _ in range(2):
        with E.Experiment({"experiment": "exp"}):
            pass
    file = folder / "exp" / "runs.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:cut])
    assert len(E.runs("exp")) == 2
    with E.Experiment({"experiment": "exp"}):
        pass
    assert len(E.runs("exp")) == 3
    assert file.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in lines(folder))


def test_very_long_unfinished_line(folder):
    with E.Experiment({"experiment": "exp"}):
        pass
    file = folder / "exp" / "runs.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b"x" * 300_000)
    with E.Experiment({"experiment": "exp"}):
        pass
    assert file.read_bytes().startswith(whole + b"{")


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[1, 2]",
        b"{}",
        b'{"run_id": 3}',
        b'{"run_id": "a", "experiment": "exp"}',
        b'{"run_id": "a", "experiment": "other", "meta": {"time": ""}}',
        b'{"run_id": "a", "experiment": "exp", "meta": {"time": 3}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_damaged_line_is_named(folder, line):
    with E.Experiment({"experiment": "exp"}):
        pass
    with open(folder / "exp" / "runs.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl: line 3"):
        E.runs("exp")


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "a\0", 3, None])
def test_bad_names(folder, name):
    with pytest.raises((TypeError, ValueError), match="experiment"):
        E.Experiment({"experiment": name})
    with pytest.raises((TypeError, ValueError), match="experiment"):
        E.runs(name)
    assert not folder.exists()


def test_bad_values(folder):
    with pytest.raises(ValueError, match="expected a dict that names the experiment"):
        E.Experiment({"bits": 3})
    with pytest.raises(TypeError, match=r"config\.f: got function"):
        E.Experiment({"experiment": "exp", "f": lambda: None})
    with pytest.raises(TypeError, match=r"config\.d: got the key 3"):
        E.Experiment({"experiment": "exp", "d": {3: 4}})
    assert not folder.exists()
    with E.Experiment({"experiment": "exp"}) as experiment:
        with pytest.raises(TypeError, match=r"summary\.x\[1\]: got object"):
            experiment.summary(x=[0, object()])
        with pytest.raises(TypeError, match=r"tensors\['x'\]: got list"):
            experiment.tensors({"x": [1.0]})
        experiment.summary(fine=True)
    assert E.run(experiment.id).summary == {"fine": True}
    with pytest.raises(ValueError, match="expected '<experiment>/<run_id>'"):
        E.run("exp")


def test_damaged_tensors(folder):
    with E.Experiment({"experiment": "exp"}) as experiment:
        experiment.tensors({"x": torch.ones(100)})
    file = folder / "exp" / f"{experiment.run_id}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        E.run_tensors(experiment.id)


def _write_many(folder, count):
    for index in range(count):
        with E.Experiment({"experiment": "exp", "index": index, "long": "x" * 5000}, folder=folder):
            pass


def test_processes_write_at_once(folder):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(folder, 20)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    runs = E.runs("exp")
    assert len({run.run_id for run in runs}) == 80
    assert all(run.meta.status == "finished" for run in runs)


def test_iter_dict_product():
    config = {"model": "m", "bits": [3, 4], "block": [None, 64], "other": [1, 2]}
    product = list(E.iter_dict_product(config, "bits", "block"))
    assert [(item["bits"], item["block"]) for item in product] == [(3, None), (3, 64), (4, None), (4, 64)]
    assert all(item["model"] == "m" and item["other"] == [1, 2] for item in product)
    assert list(E.iter_dict_product(config)) == [config]
    with pytest.raises(KeyError, match="axes: got 'absent'"):
        list(E.iter_dict_product(config, "absent"))


class Runner:
    """Counts how often it was made, squares its setting, and fails where it is told to."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def __call__(self, config, experiment):
        if config.x == 13:
            raise ValueError("unlucky")
        experiment.summary(process=os.getpid(), threads=torch.get_num_threads())
        return {"square": config.x**2}


@pytest.mark.parametrize("processes", [1, 2])
def test_sweep_records_and_resumes(folder, processes):
    configs = list(E.iter_dict_product({"experiment": "exp", "x": [2, 13, 5, 7]}, "x"))
    Runner.made = 0
    before = torch.get_num_threads()
    records = E.run_sweep(Runner, configs, processes=processes)
    assert torch.get_num_threads() == before
    assert [record.config.x for record in records] == [2, 13, 5, 7]
    assert [record.meta.status for record in records] == ["finished", "failed", "finished", "finished"]
    assert [record.summary.get("square") for record in records] == [4, None, 25, 49]
    assert records[1].error.message == "unlucky"
    assert records == [E.run(record.id) for record in records]
    if processes == 1:
        assert Runner.made == 1
    else:
        assert os.getpid() not in {record.summary.get("process") for record in records}

    again = E.run_sweep(Runner, [*configs, {"experiment": "exp", "x": 3}], processes=processes)
    assert [record.id for record in again[:1] + again[2:4]] == [
        record.id for record in records[:1] + records[2:]
    ]
    assert again[1].id != records[1].id, "what failed runs again"
    assert again[4].summary.square == 9
    assert len(E.runs("exp")) == 6
    fresh = E.run_sweep(Runner, configs[:1], resume=False, processes=processes)
    assert fresh[0].id != records[0].id


def test_sweep_with_a_function(folder):
    (record,) = E.run_sweep(lambda config, experiment: None, [{"bits": 3}], experiment="exp", processes=1)
    assert (record.meta.status, record.summary) == ("finished", {})
    with pytest.raises(TypeError, match="experiment"):
        E.run_sweep(lambda config, experiment: None, [{"bits": 3}], processes=1)
