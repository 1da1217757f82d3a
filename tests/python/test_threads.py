"""Results do not depend on threads; work runs without the GIL; processes may fork after the import."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import quantloom as ql


def digest(*arrays) -> str:
    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


def everything(threads: int) -> list[str]:
    """Digests of all that the library computes, on fixed inputs."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((70, 300)).astype(np.float32)
    x = (rng.standard_normal((900, 300)) * np.exp(rng.standard_normal(300))).astype(np.float32)
    hessian = ql.Hessian(300)
    hessian.add(x[:500], threads=threads)
    hessian.add(x[500:], threads=threads)
    results = [digest(hessian.sum())]
    search = ql.ScaleSearch(10)
    for rounding in (
        ql.Nearest(),
        ql.Nearest(search, hessian),
        ql.GPTQ(hessian),
        ql.GPTQ(hessian, static_groups=False, scale_search=search),
    ):
        for spec in ("uniform:3:g50:asym", "uniform:4:tensor"):
            q = ql.quantize(w, spec, rounding, threads=threads)
            results.append(digest(*(q.planes[name] for name in sorted(q.planes))))
            results.append(repr(q.report))
            results.append(digest(q.dequantize(threads=threads)))
            for activations in ("exact", "int8"):
                results += [digest(ql.matmul(x[:m], q, activations, threads)) for m in (1, 5)]
            results.append(repr(ql.proxy_loss(w, q, hessian, threads)))
    return results


def test_results_do_not_depend_on_the_number_of_threads():
    one = everything(1)
    for threads in (2, 4):
        assert everything(threads) == one


def test_concurrent_callers_get_the_same_results():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    shared = ql.quantize(w, "uniform:4:g64")
    expected = [digest(shared.planes["codes"]), digest(ql.matmul(x, ql.prepare(shared)))]
    failures = []

    def work() -> None:
        for _ in range(20):
            q = ql.quantize(w, "uniform:4:g64", threads=1)
            got = [digest(q.planes["codes"]), digest(ql.matmul(x, shared, threads=1))]
            if got != expected:
                failures.append(got)

    callers = [threading.Thread(target=work) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_concurrent_adds_to_one_hessian_lose_nothing():
    x = np.random.default_rng(2).standard_normal((50, 64)).astype(np.float32)
    hessian = ql.Hessian(64)
    callers = [
        threading.Thread(target=lambda: [hessian.add(x, threads=1) for _ in range(10)]) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert hessian.tokens == 2000
    exact = x.astype(np.float64)
    np.testing.assert_allclose(hessian.sum(), 40 * exact.T @ exact, rtol=1e-4, atol=1e-3)


def test_the_gil_is_released_during_work():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((1024, 2048)).astype(np.float32)
    search = ql.Nearest(ql.ScaleSearch(60))
    running = threading.Event()
    done = threading.Event()
    ticks_during_work = 0

    def work() -> None:
        running.set()
        ql.quantize(w, "uniform:4:g64", search, threads=1)
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # without a release this thread would not run before the work is done
    try:
        worker = threading.Thread(target=work)
        worker.start()
        running.wait()
        while not done.is_set():
            ticks_during_work += 1
            time.sleep(0.001)
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert ticks_during_work >= 5


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not hasattr(sys, "getswitchinterval") or sys.platform != "linux", reason="needs fork")
def test_a_process_may_fork_after_the_import():
    output = run(
        """
        import os
        import numpy as np
        import quantloom as ql

        w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
        child = os.fork()
        q = ql.quantize(w, "uniform:4:g64", threads=2)
        y = ql.matmul(w[:2], q)
        if child == 0:
            os._exit(0 if np.isfinite(y).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
        # After the parent used threads, a child may still work with one.
        child = os.fork()
        if child == 0:
            again = ql.quantize(w, "uniform:4:g64", threads=1)
            same = np.array_equal(again.planes["codes"], q.planes["codes"])
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("forked")
        """
    )
    assert output == "forked\n"
