"""What this installation is and what it will use: versions, processor, GPUs, kernels, and a self-check.

Loads neither torch nor transformers; their versions come from the package metadata.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Check", "Examination", "examine"]

_PACKAGES = ("numpy", "torch", "transformers", "safetensors", "compressed-tensors", "matplotlib")


@dataclass(frozen=True)
class Check:
    """One self-check."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Examination:
    build: dict[str, Any]
    """Version, compiler, instruction set picked, CUDA toolkit and architectures: `quantloom.build_info()`."""
    python: str
    platform: str
    packages: dict[str, str | None]
    """Versions; None: not installed."""
    processor: dict[str, Any]
    """name, features (instruction sets of interest), cpus (usable by this process), threads (default)."""
    cuda: dict[str, Any]
    """driver (the CUDA version it supports, or None), driver_version, devices (name, compute capability,
    bytes), reason if there is none, libraries (name, path, problem) that CUDA kernels would load."""
    formats: list[dict[str, Any]]
    kernels: list[dict[str, str]]
    """Which kernel serves which format: `quantloom.kernel_table()`."""
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        return all(check.passed for check in self.checks)


def examine() -> Examination:
    """Collects everything and runs the self-checks. Never raises for a broken installation part: a check
    that fails says so."""
    import quantloom

    cuda = _cuda()
    kernels = [dict(entry) for entry in quantloom.kernel_table()]
    return Examination(
        build=dict(quantloom.build_info()),
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages={name: _version(name) for name in _PACKAGES},
        processor=_processor(),
        cuda=cuda,
        formats=[dict(entry) for entry in quantloom.format_table()],
        kernels=kernels,
        checks=_checks(kernels) + (_cuda_checks(kernels) if cuda["devices"] else []),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Of the kernel's names: what decides which SIMD path can run.
_FEATURES = [
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "sve2",
]


def _processor() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    name = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags.update(value.split())
                    break
    except OSError:
        pass
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = int(limit) if limit.isdecimal() and int(limit) > 0 else cpus
    return {"name": name, "features": [f for f in _FEATURES if f in flags], "cpus": cpus, "threads": threads}


def _cuda() -> dict[str, Any]:
    from quantloom import _core

    return _driver() | {"libraries": [dict(library) for library in _core.cuda_libraries()]}


def _driver() -> dict[str, Any]:
    """Asks the driver, without creating a context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _no_device("no CUDA driver (libcuda.so.1)")
    code = driver.cuInit(0)
    if code != 0:
        return _no_device(f"cuInit failed with code {code}")
    number, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    code = driver.cuDeviceGetCount(ctypes.byref(count))
    if code != 0:
        return _no_device(f"cuDeviceGetCount failed with code {code}", version)
    devices = []
    for index in range(count.value):
        device, text, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(text, 256, device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        devices.append(
            {
                "name": text.value.decode(errors="replace"),
                "compute_capability": f"{major.value}.{minor.value}",
                "bytes": memory.value,
            }
        )
    if not devices:
        return _no_device("the driver shows no device", version)
    return {"driver": version, "driver_version": _driver_version(), "devices": devices, "reason": ""}


def _no_device(reason: str, driver: str | None = None) -> dict[str, Any]:
    return {"driver": driver, "driver_version": _driver_version(), "devices": [], "reason": reason}


def _driver_version() -> str | None:
    """As NVIDIA counts them: "580.159.04"."""
    try:
        management = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if management.nvmlInit_v2() != 0:
        return None
    text = ctypes.create_string_buffer(96)
    code = management.nvmlSystemGetDriverVersion(text, len(text))
    management.nvmlShutdown()
    return text.value.decode(errors="replace") if code == 0 else None


def _checks(kernels: list[dict[str, str]]) -> list[Check]:
    """Every example of every format: quantized, decoded, multiplied, and compared with plain NumPy."""
    import quantloom

    checks = []
    generator = np.random.default_rng(0)
    w = generator.standard_normal((64, 256), dtype=np.float32)
    x = generator.standard_normal((3, 256), dtype=np.float32)
    products = [k for k in kernels if k["operation"] == "matmul" and k["device"] == "cpu"]
    for entry in quantloom.format_table():
        for spec in entry["examples"]:
            try:
                packed = quantloom.quantize(w, spec)
                taken = {k["activations"] for k in products if k["format"] == entry["name"]}
                if not quantloom.can_matmul(packed, activations="int8"):  # not this codebook
                    taken.discard("int8")
                passed, detail = _round_trip(packed, w, x, taken)
            except Exception as error:
                passed, detail = False, f"{type(error).__name__}: {error}"
            checks.append(Check(f"quantize, decode, multiply: {spec}", passed, detail))
    return checks


def _cuda_checks(kernels: list[dict[str, str]]) -> list[Check]:
    """A small product on the device for every example of the formats that have a CUDA kernel."""
    import quantloom
    from quantloom import _arrays, _core

    checks = []
    generator = np.random.default_rng(1)
    w = generator.standard_normal((64, 256), dtype=np.float32)
    # Few bits, so that rounding x to float16 changes nothing.
    x = generator.integers(-8, 9, (3, 256)).astype(np.float32) / 8
    wanted = ("matmul", "cuda", "float16")
    multiplied = {k["format"] for k in kernels if (k["operation"], k["device"], k["activations"]) == wanted}
    for entry in quantloom.format_table():
        for spec in entry["examples"] if entry["name"] in multiplied else []:
            try:
                packed = quantloom.quantize(w, spec)
                y = np.empty((3, 64), dtype=np.float32)
                _core.multiply_on_cuda(
                    _arrays.describe("x", x).core, packed._core(), _arrays.describe("y", y).core
                )
                expected = x.astype(np.float64) @ np.asarray(packed.dequantize(), dtype=np.float64).T
                error = float(np.abs(y - expected).max() / np.abs(expected).max())
                passed, detail = error < 4e-3, f"float16 products {error:.1g}"
            except Exception as error:
                passed, detail = False, f"{type(error).__name__}: {error}"
            checks.append(Check(f"multiply on CUDA: {spec}", passed, detail))
    return checks + _integer_checks(w, x)


def _integer_checks(w: np.ndarray, x: np.ndarray) -> list[Check]:
    """Products of integers on the device against those on the CPU, of formats that both multiply."""
    import quantloom
    from quantloom import _arrays, _core
    from quantloom.activations import parse_activations

    checks = []
    activations = parse_activations("int8:token")
    description = _core.ActivationDescription(activations.to_json())
    for spec in ("uniform:8:channel", "uniform:4:channel:asym", "uniform:4:g128", "sdr:4:g16"):
        json = quantloom.parse_format(spec).to_json()
        if _core.why_not_matmul_integers_cuda(json, description, x.shape[1], "float16"):
            continue
        try:
            packed = quantloom.quantize(w, spec)
            y = np.empty((len(x), len(w)), dtype=np.float32)
            _core.multiply_integers_on_cuda(
                _arrays.describe("x", x).core,
                packed._core(),
                activations.to_json(),
                _arrays.describe("y", y).core,
            )
            expected = quantloom.matmul(x, packed, activations="int8:token").astype(np.float64)
            error = float(np.abs(y - expected).max() / np.abs(expected).max())
            passed, detail = error < 1e-3, f"within {error:.1g} of the CPU's"
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
        checks.append(Check(f"multiply integers on CUDA: {spec}", passed, detail))
    return checks


def _round_trip(packed, w: np.ndarray, x: np.ndarray, activations: set[str]) -> tuple[bool, str]:
    """`activations`: those that the CPU multiplies this format with, as the table of kernels calls them."""
    import quantloom

    decoded = np.asarray(packed.dequantize(), dtype=np.float32)
    error = float(np.linalg.norm(decoded - w) / np.linalg.norm(w))
    if not error < 1:
        return False, f"the decoded weights are {error:.3g} of the weights away"
    if not activations:
        return True, f"weights within {error:.2g}; no CPU kernel multiplies this format"
    expected = x.astype(np.float64) @ decoded.T.astype(np.float64)

    def product_error(path: str) -> float:
        return float(np.abs(quantloom.matmul(x, packed, path) - expected).max() / np.abs(expected).max())

    passed, detail = True, f"weights within {error:.2g}"
    if "float32" in activations:
        exact = product_error("exact")
        passed, detail = passed and exact < 1e-4, f"{detail}, products {exact:.1g}"
    if "int8" in activations:
        int8 = product_error("int8")
        passed, detail = passed and int8 < 0.03, f"{detail}, with int8 activations {int8:.1g}"
    return passed, detail
