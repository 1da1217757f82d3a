"""Killed runs: resumed ones end with the same bytes; work of another run is refused."""

import errno
import hashlib
import multiprocessing
import os
import signal

import model_factory
import pytest
import quantloom as ql
import torch
from quantloom import models

SETTINGS = {"windows": 4, "window": 24, "held_out_windows": 1}
IDS = model_factory.token_ids(5 * 24)
RECIPE = ql.Recipe.parse("uniform:3:g32:asym", "gptq")

# Children start from a process that has imported everything and run nothing: no thread pool is forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "accelerate",
        "transformers.conversion_mapping",
        "transformers.models.llama.modeling_llama",
        "quantloom.models.quantization",
        "test_models_resume",
    ]
)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama(layers=3))


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "timings.json"
    }


def run_and_die(model, out, torch_threads, event):
    """Runs until event number `event`, then dies as by power loss."""
    torch.set_num_threads(torch_threads)
    seen = 0

    def progress(_):
        nonlocal seen
        seen += 1
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)

    models.quantize(model, RECIPE, IDS, output=out, progress=progress, **SETTINGS)


def run_and_die_in_install(model, out, torch_threads, moves):
    """Dies after `moves` files of the finished checkpoint were moved in place."""
    torch.set_num_threads(torch_threads)
    from quantloom.models import checkpoint

    replace, done = os.replace, 0

    def counting(source, target):
        nonlocal done
        if "final" in str(source) and str(target).startswith(str(out)) and ".work" not in str(target):
            if done == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
        replace(source, target)

    checkpoint.os.replace = counting
    models.quantize(model, RECIPE, IDS, output=out, **SETTINGS)


def die(target, *arguments):
    child = PROCESSES.Process(target=target, args=arguments)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    events = []
    models.quantize(model, RECIPE, IDS, output=out, progress=events.append, **SETTINGS)
    return hashes(out), len(events)


def test_killed_anywhere_ends_the_same(model, whole, tmp_path):
    expected, events = whole
    points = sorted({2, 4, 9, events // 4, events // 2, 2 * events // 3, events - 3, events - 1, events})
    for point in points:
        out = tmp_path / str(point)
        die(run_and_die, model, out, torch.get_num_threads(), point)
        assert not (out / "config.json").exists()
        report = models.quantize(model, RECIPE, IDS, output=out, **SETTINGS)
        assert hashes(out) == expected, f"killed at event {point} of {events}"
        if events // 2 <= point < events - 1:
            assert report.resumed_modules > 0


def test_killed_again_and_again(model, whole, tmp_path):
    expected, events = whole
    out = tmp_path / "out"
    for point in (events // 3, events // 3, events // 3):
        die(run_and_die, model, out, torch.get_num_threads(), point)
    models.quantize(model, RECIPE, IDS, output=out, **SETTINGS)
    assert hashes(out) == expected


@pytest.mark.parametrize("moves", [0, 1, 4])
def test_killed_while_files_are_moved(model, whole, tmp_path, moves):
    out = tmp_path / "out"
    die(run_and_die_in_install, model, out, torch.get_num_threads(), moves)
    assert not (out / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        models.load(out)
    models.quantize(model, RECIPE, IDS, output=out, **SETTINGS)
    assert hashes(out) == whole[0]


class Interrupted(Exception):
    pass


def interrupt(model, out, after=6, **settings):
    """Ends a run after some modules by an exception of the callback."""

    def progress(event):
        if event.done == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        models.quantize(model, RECIPE, IDS, output=out, progress=progress, **(SETTINGS | settings))


DIFFERENT = {
    "recipe.format.bits": {"recipe": ql.Recipe.parse("uniform:4:g32:asym", "gptq")},
    "recipe.rounding": {"recipe": ql.Recipe.parse("uniform:3:g32:asym", "gptq:damp=0.02")},
    "recipe.overrides": {
        "recipe": ql.Recipe.parse("uniform:3:g32:asym", "gptq", overrides={"re:.*o_proj": None})
    },
    "calibration.tokens": {"calibration": model_factory.token_ids(5 * 24, seed=2)},
    "calibration.windows": {"windows": 3},
    "calibration.held_out_windows": {"held_out_windows": 0},
    "max_shard_bytes": {"max_shard_bytes": 1000},
}


def test_other_runs_are_refused_and_say_why(model, whole, tmp_path):
    out = tmp_path / "out"
    interrupt(model, out)
    arguments = {"model_path": model, "recipe": RECIPE, "calibration": IDS, "output": out} | SETTINGS
    for difference, change in DIFFERENT.items():
        with pytest.raises(ValueError, match=f"differs in .*{difference}"):
            models.quantize(**(arguments | change))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=r"calibration\.torch_threads"):
            models.quantize(**arguments)
    finally:
        torch.set_num_threads(threads)
    report = models.quantize(**arguments)
    assert report.resumed_modules == 6 and hashes(out) == whole[0]


def test_one_changed_weight_byte_is_refused(tmp_path):
    model = model_factory.write_model(tmp_path / "model", model_factory.llama(layers=3))
    interrupt(model, tmp_path / "out")
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"differs in .*weights\.model"):
        models.quantize(model, RECIPE, IDS, output=tmp_path / "out", **SETTINGS)


def test_resume_false_starts_over(model, whole, tmp_path):
    out = tmp_path / "out"
    interrupt(model, out)
    report = models.quantize(model, RECIPE, IDS, output=out, resume=False, **SETTINGS)
    assert report.resumed_modules == 0 and hashes(out) == whole[0]


def test_damaged_work_is_refused(model, tmp_path):
    for pattern, change in {
        "records/*q_proj.safetensors": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        "records/*k_proj.safetensors": lambda b: b[: len(b) // 2],
        "records/*v_proj.json": lambda b: b[: len(b) // 2],
        "hidden-0.f32": lambda b: b[:-4],
        "manifest.json": lambda b: b[: len(b) // 2],
    }.items():
        out = tmp_path / pattern.replace("/", "-").replace("*", "")
        interrupt(model, out, after=3)
        for path in (out / ".work").glob(pattern):
            path.write_bytes(change(path.read_bytes()))
        with pytest.raises(ValueError, match="resume=False"):
            models.quantize(model, RECIPE, IDS, output=out, **SETTINGS)


def hold(model, out, ready, release):
    def progress(event):
        if event.done == 2:
            ready.set()
            release.wait(60)

    models.quantize(model, RECIPE, IDS, output=out, progress=progress, **SETTINGS)


def test_a_second_process_is_refused(model, tmp_path):
    ready, release = PROCESSES.Event(), PROCESSES.Event()
    child = PROCESSES.Process(target=hold, args=(model, tmp_path / "out", ready, release))
    child.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match=f"in use by process {child.pid}"):
        models.quantize(model, RECIPE, IDS, output=tmp_path / "out", **SETTINGS)
    release.set()
    child.join(60)
    assert child.exitcode == 0
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failing_disk_calls_leave_work_to_resume(model, whole, tmp_path, monkeypatch, function):
    """The n-th call fails as on a full disk; the next run ends with the same bytes."""
    from quantloom.models import calibration, checkpoint, records

    real = getattr(os, function)
    calls, failing = 0, 0

    def flaky(*arguments):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    for module in (calibration, checkpoint, records):
        monkeypatch.setattr(module.os, function, flaky)
    models.quantize(model, RECIPE, IDS, output=tmp_path / "count", **SETTINGS)
    total = calls
    for failing in sorted({1, 2, 3, total // 2, total - 1, total}):
        calls = 0
        out = tmp_path / str(failing)
        with pytest.raises(OSError, match="No space left"):
            models.quantize(model, RECIPE, IDS, output=out, **SETTINGS)
        calls = -(10**9)
        models.quantize(model, RECIPE, IDS, output=out, **SETTINGS)
        assert hashes(out) == whole[0], f"{function} {failing} of {total}"
