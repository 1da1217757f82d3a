"""The table of what rotation does to block-quantized weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import quantloom.fit as F
import quantloom.formats as Q
from quantloom.cli import app
from quantloom.rotation import outlier_matrix, quantize_blocks, rotation_table
from typer.testing import CliRunner

# Computed independently in float64 at 4096 x 4096: bits, rotated -> MSE, largest error.
FIGURES = {
    (4, False): (4.55e-05, 0.050),
    (4, True): (1.00e-05, 0.038),
    (3, False): (7.43e-05, 0.116),
    (3, True): (5.47e-05, 0.098),
    (2, False): (2.13e-04, 0.349),
    (2, True): (5.44e-04, 0.625),
}


def test_the_matrix_is_as_described():
    w = outlier_matrix(512, 4096, 3)
    assert w.dtype == np.float32
    large = np.abs(w) > 0.2
    assert 0.99 * 20 * 512 < large.sum() <= 20 * 512
    assert np.abs(w).max() < 0.7
    assert abs(w[~large].std() - 0.02) < 1e-4
    np.testing.assert_array_equal(w, outlier_matrix(512, 4096, 3))


def test_blocks_take_the_levels_of_their_step():
    x = np.array([[0.0] * 32 + [7.0, -7.0, 1.4, 0.49] + [0.0] * 28], np.float32)
    decoded = quantize_blocks(x, 4)
    np.testing.assert_array_equal(decoded[0, :32], 0)
    np.testing.assert_allclose(decoded[0, 32:36], [7, -7, 1, 0], atol=1e-6)
    np.testing.assert_allclose(quantize_blocks(x, 2)[0, 32:36], [7, -7, 0, 0], atol=1e-6)
    assert len(np.unique(quantize_blocks(np.linspace(-1, 1, 32)[None], 3))) == 7


def test_rotation_wins_at_four_bits_and_loses_at_two():
    rows = rotation_table(size=2048, seed=1)
    assert [row.transform == "none" for row in rows] == [True, False] * 3
    errors = [row.mean_squared_error for row in rows]
    assert errors[1] < errors[0] / 3
    assert errors[3] < errors[2]
    assert errors[5] > errors[4]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_full_width_figures(bits):
    rows = rotation_table([bits], size=4096)
    for row, rotated in zip(rows, (False, True), strict=True):
        squared, largest = FIGURES[bits, rotated]
        assert row.mean_squared_error == pytest.approx(squared, rel=0.02)
        # The largest error of rotated weights differs much from seed to seed.
        assert row.max_error == pytest.approx(largest, rel=0.4 if rotated else 0.03)
        assert row.bits_per_weight == bits + 1


def test_any_format_can_be_asked_for():
    element = Q.LinearScalingFormat(Q.FPFormat.create(2, 1), Q.FPFormat.create(8, 7), (1, 32), "absmax")
    text = json.dumps(Q.TensorFormat.save(element))
    rows = rotation_table([], ["uniform:4:g32", "codebook:nf4:g64", text, element], size=512)
    assert [row.transform for row in rows] == ["none", "hadamard:b128"] * 4
    assert rows[1].mean_squared_error < rows[0].mean_squared_error
    assert rows[4:6] == rows[6:]
    assert rows[4].format == str(element)
    assert 4.4 < rows[4].bits_per_weight < 4.6
    assert rows[5].mean_squared_error < rows[4].mean_squared_error
    with pytest.raises(ValueError, match="block"):
        rotation_table(size=100, group=4)


def test_a_search_for_steps_errs_less_in_both_bases():
    formats = ["uniform:2:g32", "uniform:3:g32"]
    largest = rotation_table([], formats, size=1024)
    searched = rotation_table([], formats, size=1024, rounding="nearest:search")
    for row, plain in zip(searched, largest, strict=True):
        assert row.mean_squared_error < 0.9 * plain.mean_squared_error
        assert row.bits_per_weight == plain.bits_per_weight
        assert row.format == f"{plain.format}, scales by search over 40"
    with pytest.raises(ValueError, match="rounding"):
        rotation_table([], formats, size=512, rounding="gptq")


def test_rules_are_fitted_in_each_basis():
    rule = F.Scaled(2, "lloyd_max", Q.BFLOAT16, (1, 32), "rms")
    text = json.dumps(Q.TensorFormat.save(rule))
    plain, rotated, *others = rotation_table([], [rule, text], size=512)
    assert plain.format == rotated.format == str(rule)
    assert plain.mean_squared_error != rotated.mean_squared_error
    assert others == [plain, rotated]


def test_the_command_prints_the_table():
    arguments = ["bench", "rotation", "--size", "256"]
    result = CliRunner().invoke(app, [*arguments, "--format", "uniform:3:g32", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.output)["rows"]) == 8
    result = CliRunner().invoke(app, [*arguments, "--bits", "4"])
    assert result.exit_code == 0
    assert "hadamard:b128" in result.output
    result = CliRunner().invoke(app, ["bench", "rotation", "--size", "100"])
    assert result.exit_code == 1
