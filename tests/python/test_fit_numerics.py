"""Fits of tables and codebooks on samples, against plain NumPy versions."""

from __future__ import annotations

import numpy as np
import pytest
from quantloom import _fitting


def codes_of(table, x):
    middles = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
    return np.searchsorted(middles, x, side="left")


def plain_sweep(x, weights, table):
    codes = codes_of(table, x)
    mass = np.bincount(codes, weights, len(table))
    sums = np.bincount(codes, weights * x.astype(np.float64), len(table))
    updated = np.where(mass > 0, sums / np.where(mass > 0, mass, 1), table).astype(np.float32)
    return np.maximum.accumulate(updated)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", [*_fitting.TABLE_STARTS, ("uniform_rms", 3.0)])
def test_lloyd_max_ends_where_the_plain_version_stays(rng, start, weighted):
    x = rng.standard_t(5, 20_000).astype(np.float32)
    weights = rng.exponential(size=x.shape).astype(np.float32) if weighted else None
    plain_weights = np.ones(x.shape) if weights is None else weights.astype(np.float64)
    fit = _fitting.lloyd_max(x, 16, weights=weights, start=start, threshold=0.0, seed=3)
    assert fit.converged
    assert fit.changed == 0
    np.testing.assert_allclose(plain_sweep(x, plain_weights, fit.centroids), fit.centroids, atol=2e-6)
    error = np.sum(plain_weights * (fit.centroids[codes_of(fit.centroids, x)].astype(np.float64) - x) ** 2)
    assert fit.squared_error == pytest.approx(error, rel=1e-9)


def test_the_student_t_table(rng):
    """3 bits of t(10): the population's optimum is R = 0.21146 (its tails spread samples by about 0.002)."""
    x = rng.standard_t(10, 2**20).astype(np.float32)
    sample = _fitting.sort_values(x)
    fit = _fitting.lloyd_max(sample, 8)
    assert np.sqrt(fit.squared_error / sample.moments[2]) == pytest.approx(0.2115, abs=0.002)
    grid = (0.58 * np.arange(-40, 41)).astype(np.float32)
    counts = _fitting.table_counts(sample, grid)
    share = counts[counts > 0] / x.size
    assert -np.sum(share * np.log2(share)) == pytest.approx(2.9975, abs=0.01)


def test_table_errors_are_those_of_rounding(rng):
    x = rng.standard_normal(3001).astype(np.float32)
    weights = rng.exponential(size=x.shape).astype(np.float32)
    tables = [np.sort(rng.standard_normal(n)).astype(np.float32) for n in (1, 4, 61)]
    scales = np.logspace(-2, 2, 17, base=2).astype(np.float32)
    errors = _fitting.table_errors(x, tables, scales, weights=weights)
    assert errors.shape == (3, 17)
    for t, table in enumerate(tables):
        for s, scale in enumerate(scales):
            decoded = table[codes_of(table, x / scale)].astype(np.float64) * scale
            assert errors[t, s] == pytest.approx(np.sum(weights * (decoded - x) ** 2), rel=1e-9)
    for threads in (1, 2, 4):
        np.testing.assert_array_equal(
            errors, _fitting.table_errors(x, tables, scales, weights=weights, threads=threads)
        )


def test_samples_may_be_of_any_float_type(rng):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((64, 33)).astype(np.float32))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        values = x.to(dtype)
        expected = np.sort(values.float().numpy().reshape(-1))
        np.testing.assert_array_equal(_fitting.sort_values(values).values, expected)
        np.testing.assert_array_equal(_fitting.sort_values(values.T).values, expected)
    np.testing.assert_array_equal(_fitting.sort_values([2, 1]).values, np.array([1, 2], np.float32))


def test_bad_input_is_named(rng):
    x = rng.standard_normal(10).astype(np.float32)
    bad = x.copy()
    bad[3] = np.nan
    with pytest.raises(ValueError, match="values: got nan at index 3"):
        _fitting.lloyd_max(bad, 2)
    with pytest.raises(ValueError, match="weights: got -"):
        _fitting.lloyd_max(x, 2, weights=-np.abs(x))
    with pytest.raises(ValueError, match="weights: got 3 of them"):
        _fitting.lloyd_max(x, 2, weights=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="count: got 0"):
        _fitting.lloyd_max(x, 0)
    with pytest.raises(ValueError, match="start: got 'best'"):
        _fitting.lloyd_max(x, 2, start="best")
    with pytest.raises(ValueError, match="threshold: got 2"):
        _fitting.lloyd_max(x, 2, threshold=2)
    with pytest.raises(ValueError, match="seed: got -1"):
        _fitting.lloyd_max(x, 2, seed=-1)
    with pytest.raises(ValueError, match="centroids: got 3 of them"):
        _fitting.lloyd_max(x, 2, start=np.arange(3, dtype=np.float32))
    with pytest.raises(ValueError, match=r"tables\[1\]"):
        _fitting.table_errors(x, [np.zeros(2, np.float32), np.array([1, 0], np.float32)], [1.0])
    with pytest.raises(ValueError, match="scale: got 0"):
        _fitting.table_errors(x, [np.zeros(2, np.float32)], [0.0])
    with pytest.raises(TypeError, match="values: got int64"):
        _fitting.sort_values(np.arange(3))
    with pytest.raises(TypeError, match="weights"):
        _fitting.lloyd_max(_fitting.sort_values(x), 2, weights=np.abs(x))


def plain_codes(x, centroids):
    differences = x[:, None, :].astype(np.float64) - centroids[None, :, :]
    return np.argmin((differences**2).sum(axis=2), axis=1)


@pytest.mark.parametrize(
    ("n", "entries", "d"), [(1, 1, 1), (500, 33, 2), (257, 64, 3), (300, 100, 16), (0, 4, 2)]
)
def test_nearest_neighbour_is_the_plain_version(rng, n, entries, d):
    x = rng.standard_normal((n, d)).astype(np.float32)
    centroids = rng.standard_normal((entries, d)).astype(np.float32)
    for threads in (1, 2, 4):
        codes = _fitting.nearest_neighbour(x, centroids, threads)
        np.testing.assert_array_equal(codes, plain_codes(x, centroids))


def test_vectors_may_have_gaps_and_other_types(rng):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((40, 12)).astype(np.float32))
    centroids = torch.from_numpy(rng.standard_normal((9, 4)).astype(np.float32))
    for view in (x[:, 2:6], x[::2, :4], x[:, ::3], x.T[:, 5:9], x[:, :4].to(torch.bfloat16)):
        codes = _fitting.nearest_neighbour(view, centroids)
        np.testing.assert_array_equal(codes, plain_codes(view.float().numpy(), centroids.numpy()))


def test_kmeans_of_separate_clusters_finds_them(rng):
    centers = 20 * rng.standard_normal((12, 3))
    labels = rng.integers(0, 12, 3000)
    x = (centers[labels] + 0.01 * rng.standard_normal((3000, 3))).astype(np.float32)
    best = min(
        (_fitting.kmeans(x, 12, threshold=0.0, seed=seed) for seed in range(8)),
        key=lambda fit: fit.squared_error,
    )
    assert best.converged
    assert best.squared_error < 2 * 3000 * 3 * 0.01**2
    found = best.centroids[plain_codes(centers.astype(np.float32), best.centroids)]
    np.testing.assert_allclose(found, centers, atol=0.01)
    np.testing.assert_array_equal(best.codes, plain_codes(x, best.centroids))


def test_kmeans_from_random_rows_ends_where_the_plain_version_stays(rng):
    x = rng.standard_normal((2000, 2)).astype(np.float32)
    fit = _fitting.kmeans(x, 16, start="random", threshold=0.0, seed=1)
    assert fit.converged
    codes = plain_codes(x, fit.centroids)
    means = [x[codes == k].mean(axis=0, dtype=np.float64) for k in range(16)]
    np.testing.assert_allclose(fit.centroids, means, atol=1e-6)


def test_kmeans_goes_on_from_given_centroids_and_weights(rng):
    x = rng.standard_normal((4000, 2)).astype(np.float32)
    weights = (rng.random(4000) < 0.5).astype(np.float32)
    first = _fitting.kmeans(x, 20, weights=weights, threshold=0.0)
    again = _fitting.kmeans(x, 20, weights=weights, start=first.centroids, threshold=0.0)
    assert again.sweeps == 1
    np.testing.assert_array_equal(again.centroids, first.centroids)
    # Rows without weight do not count.
    without = _fitting.kmeans(x[weights > 0], 20, start=first.centroids, threshold=0.0)
    np.testing.assert_allclose(without.centroids, first.centroids, atol=1e-6)


def test_bad_vectors_are_named(rng):
    x = rng.standard_normal((10, 2)).astype(np.float32)
    with pytest.raises(ValueError, match=r"x: got shape \[20\]"):
        _fitting.kmeans(x.reshape(-1), 2)
    with pytest.raises(ValueError, match="x: got vectors of 17 dimensions"):
        _fitting.kmeans(np.zeros((3, 17), np.float32), 2)
    with pytest.raises(ValueError, match="count: got 65537"):
        _fitting.kmeans(x, 65537)
    with pytest.raises(ValueError, match="centroids: got 3 vectors"):
        _fitting.kmeans(x, 2, start=np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="centroids: got vectors of 3 dimensions"):
        _fitting.nearest_neighbour(x, np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="weights: got 0 of them"):
        _fitting.kmeans(x, 2, weights=np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="x: got nan at row 4, column 1"):
        bad = x.copy()
        bad[4, 1] = np.nan
        _fitting.nearest_neighbour(bad, x)
    with pytest.raises(TypeError, match="reseed_empty"):
        _fitting.kmeans(x, 2, reseed_empty=1)
