"""What importing the package does, and does not do, to the process."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
import types

import pytest

HEAVY = [
    "torch",
    "transformers",
    "safetensors",
    "matplotlib",
    "scipy",
    "pandas",
    "typer",
    "rich",
    "ml_dtypes",
]


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


def test_importing_loads_numpy_only():
    output = run(
        f"""
        import sys
        import numpy
        before = set(sys.modules)
        import quantloom
        new = {{name.split(".")[0] for name in set(sys.modules) - before}}
        print(sorted(new & set({HEAVY!r})))
        print(sorted(name for name in new if name not in sys.stdlib_module_names))
        """
    )
    assert output.splitlines() == ["[]", "['quantloom']"]


def test_the_main_job_needs_no_torch():
    output = run(
        """
        import sys
        import tempfile
        import numpy as np
        import quantloom as ql

        w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
        hessian = ql.Hessian(64)
        hessian.add(w)
        q = ql.quantize(w, "uniform:4:g32", ql.GPTQ(hessian))
        ql.matmul(w, q)
        with tempfile.TemporaryDirectory() as folder:
            ql.save_tensors(folder + "/w.safetensors", {"w": q})
            ql.load_tensors(folder + "/w.safetensors")["w"].dequantize()
        ql.layouts.to_compressed_tensors(q)
        ql.kernel_table(), ql.build_info(), dir(ql)
        print("torch" in sys.modules)
        """
    )
    assert output == "False\n"


def test_importing_and_calling_leave_the_process_as_it_was():
    output = run(
        """
        import ctypes
        import locale
        import os
        import random
        import signal
        import sys
        import threading
        import numpy as np

        libm = ctypes.CDLL("libm.so.6")

        def floating_point_environment():
            # x86: 28 bytes of x87 state, then MXCSR; its low six bits are flags that any operation sets.
            state = (ctypes.c_uint32 * 8)()
            libm.fegetenv(ctypes.byref(state))
            return libm.fegetround(), state[0] & 0xFFFF, state[7] & ~0x3F

        def state():
            return {
                "floats": floating_point_environment(),
                "smallest": float(np.float32(1.17549435e-38) / np.float32(2)),
                "errstate": np.geterr(),
                "random": random.getstate(),
                "numpy random": np.random.get_state()[1].tolist(),
                "signals": [signal.getsignal(s) for s in signal.valid_signals()],
                "locale": locale.setlocale(locale.LC_ALL),
                "environment": dict(os.environ),
                "folder": os.getcwd(),
                "python threads": threading.active_count(),
                "switch interval": sys.getswitchinterval(),
                "warnings": list(__import__("warnings").filters),
                "hooks": [sys.excepthook, sys.displayhook, list(sys.path), list(sys.meta_path)],
                "logging": list(__import__("logging").root.handlers),
            }

        np.random.seed(1)
        before = state()
        threads = len(os.listdir("/proc/self/task"))
        import quantloom as ql
        assert len(os.listdir("/proc/self/task")) == threads, "the import started threads"
        assert state() == before, "import"

        w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
        hessian = ql.Hessian(64)
        hessian.add(w)
        for rounding in (ql.Nearest(ql.ScaleSearch()), ql.GPTQ(hessian)):
            q = ql.quantize(w, "uniform:4:g32:asym", rounding, threads=3)
            q.dequantize()
            for activations in ("exact", "int8"):
                ql.matmul(w, q, activations)
        for bad in (w * np.float32("nan"), w[0], "w"):
            try:
                ql.quantize(bad, "uniform:4")
            except (TypeError, ValueError):
                pass
        assert state() == before, "calls"
        print("level")
        """
    )
    assert output == "level\n"


def test_openmp_settings_are_left_alone():
    output = run(
        """
        import ctypes
        import numpy as np
        import quantloom as ql

        library = next(line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line)
        gomp = ctypes.CDLL(library)
        before = gomp.omp_get_max_threads(), gomp.omp_get_dynamic()
        w = np.ones((64, 64), np.float32)
        ql.matmul(w, ql.quantize(w, "uniform:4:g32", threads=3), threads=3)
        print((gomp.omp_get_max_threads(), gomp.omp_get_dynamic()) == before)
        """
    )
    assert output == "True\n"


def test_every_public_name_is_there_and_documented():
    import quantloom as ql

    for name in ql.__all__:
        value = getattr(ql, name)
        assert isinstance(value, str) or value.__doc__, name
        if isinstance(value, type):
            for member in vars(value):
                if not member.startswith("_") and not isinstance(
                    vars(value)[member], types.MemberDescriptorType
                ):
                    attribute = inspect.getattr_static(value, member)
                    is_code = isinstance(attribute, (property, classmethod)) or callable(attribute)
                    assert not is_code or inspect.getdoc(getattr(value, member)), f"{name}.{member}"
    assert {*ql.__all__, "nn", "models", "evaluate", "inspect"} <= set(dir(ql))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ql.nothing


def test_a_star_import_needs_no_torch():
    output = run("import sys; from quantloom import *; print(Uniform(4), 'torch' in sys.modules)")
    assert output == "uniform:4:g128:sym False\n"
