"""The examination of an installation."""

import json

import pytest
import quantloom as ql
from quantloom import doctor
from quantloom.cli import common


def test_examination():
    result = doctor.examine()
    assert result.healthy
    assert all(check.passed is not False for check in result.checks)
    assert any(check.passed for check in result.checks)
    examples = [spec for entry in ql.format_table() for spec in entry["examples"]]
    assert len(result.checks) == len(examples) > 0
    assert result.build["version"] == ql.__version__
    assert result.build["cpu_target"]
    assert result.kernels == ql.kernel_table()
    assert result.packages["numpy"]
    assert result.processor["cpus"] >= 1
    assert result.processor["threads"] >= 1
    assert bool(result.cuda["devices"]) != bool(result.cuda["reason"])
    json.dumps(common.plain(result), allow_nan=False)


@pytest.mark.parametrize("value", ["3", "3,2", "nonsense", "0", ""])
def test_threads_follow_the_environment(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    processor = doctor.examine().processor
    assert processor["threads"] == (3 if value.startswith("3") else processor["cpus"])


def test_wrong_products_are_found(monkeypatch):
    """A matmul that is off by one part in a thousand fails the check."""
    matmul = ql.matmul
    monkeypatch.setattr(ql, "matmul", lambda x, q: matmul(x, q) * 1.001)
    result = doctor.examine()
    assert not result.healthy
    assert {check.passed for check in result.checks} <= {False, None}


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
