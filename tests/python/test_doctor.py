"""The examination of an installation."""

import json

import pytest
import quantloom as ql
from quantloom import doctor
from quantloom.cli import common


def cpu_checks(result):
    return [check for check in result.checks if "CUDA" not in check.name]


def test_examination():
    result = doctor.examine()
    assert result.healthy
    assert all(check.passed for check in result.checks)
    examples = [spec for entry in ql.format_table() for spec in entry["examples"]]
    assert len(cpu_checks(result)) == len(examples) > 0
    assert (len(result.checks) > len(examples)) == bool(result.cuda["devices"] and result.build["cuda"])
    assert result.build["version"] == ql.__version__
    assert result.build["cpu_target"]
    assert result.kernels == ql.kernel_table()
    assert result.packages["numpy"]
    assert result.processor["cpus"] >= 1
    assert result.processor["threads"] >= 1
    assert bool(result.cuda["devices"]) != bool(result.cuda["reason"])
    assert bool(result.cuda["libraries"]) == result.build["cuda"]
    assert all(library["name"].startswith("cu") for library in result.cuda["libraries"])
    assert all(bool(library["path"]) != bool(library["problem"]) for library in result.cuda["libraries"])
    json.dumps(common.plain(result), allow_nan=False)


@pytest.mark.parametrize("value", ["3", "3,2", "nonsense", "0", ""])
def test_threads_follow_the_environment(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    processor = doctor.examine().processor
    assert processor["threads"] == (3 if value.startswith("3") else processor["cpus"])


@pytest.mark.parametrize("path", ["exact", "int8"])
def test_wrong_products_are_found(monkeypatch, path):
    """A kernel that is off by one part in a thousand (int8: a tenth) fails the check."""
    matmul, wrong = ql.matmul, {"exact": 1.001, "int8": 1.1}[path]

    def broken(x, q, activations):
        return matmul(x, q, activations) * (wrong if activations == path else 1)

    monkeypatch.setattr(ql, "matmul", broken)
    result = doctor.examine()
    name = {"exact": "float32", "int8": "int8"}[path]
    affected = {row["format"] for row in result.kernels if row["activations"] == name}
    assert "uniform" in affected
    for check in result.checks:
        spec = check.name.rpartition(" ")[2]
        multiplied = spec.partition(":")[0] in affected and ql.can_matmul(spec, activations=path)
        assert check.passed == (not multiplied), check
    assert not result.healthy


def test_a_format_without_a_cpu_kernel(monkeypatch):
    monkeypatch.setattr(ql, "kernel_table", list)
    result = doctor.examine()
    assert result.healthy
    assert all("no CPU kernel" in check.detail for check in result.checks)


def test_wrong_codes_are_found(monkeypatch):
    quantize = ql.quantize
    monkeypatch.setattr(ql, "quantize", lambda w, spec: quantize(-w, spec))
    assert not doctor.examine().healthy


def test_an_exception_is_a_failed_check(monkeypatch):
    def broken(w, spec):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ql, "quantize", broken)
    result = doctor.examine()
    assert not result.healthy
    assert result.checks[0].detail == "RuntimeError: no such instruction"
