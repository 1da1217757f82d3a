"""Vector codebooks fitted on a CUDA device, against the CPU: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom.formats as Q
import torch
from cuda_cases import needs_cuda
from quantloom import _fitting

pytestmark = needs_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "entries", "d"), [(0, 4, 2), (1, 1, 1), (5003, 300, 4), (2001, 77, 11)])
def test_nearest_neighbour_is_that_of_the_cpu(rng, n, entries, d, dtype):
    x = torch.from_numpy(rng.standard_normal((n, d)).astype(np.float32)).to(dtype)
    centroids = torch.from_numpy(rng.standard_normal((entries, d)).astype(np.float32))
    codes = _fitting.nearest_neighbour(x.cuda(), centroids.cuda())
    assert codes.device.type == "cuda"
    np.testing.assert_array_equal(codes.cpu().numpy(), _fitting.nearest_neighbour(x, centroids))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", ["kmeans++", "random", "given"])
def test_kmeans_is_that_of_the_cpu(rng, start, weighted):
    x = torch.from_numpy(rng.standard_normal((20_000, 4)).astype(np.float32))
    weights = torch.from_numpy(rng.exponential(size=20_000).astype(np.float32)) if weighted else None
    given = x[:500] if start == "given" else start
    there = _fitting.kmeans(
        x.cuda(), 500, weights=None if weights is None else weights.cuda(), start=given, max_sweeps=20
    )
    here = _fitting.kmeans(x, 500, weights=weights, start=given, max_sweeps=20)
    np.testing.assert_array_equal(there.centroids.cpu().numpy(), here.centroids)
    np.testing.assert_array_equal(there.codes.cpu().numpy(), here.codes)
    assert there.sweeps == here.sweeps
    assert there.squared_error == pytest.approx(here.squared_error, rel=1e-11)


def test_formats_fit_where_their_data_lie(rng):
    t = torch.from_numpy(rng.standard_normal((5000, 2)).astype(np.float32))
    here = Q.vlut_lloyd_max(t, 3, 1e-3, Q.BFLOAT16)
    there = Q.vlut_lloyd_max(t.cuda(), 3, 1e-3, Q.BFLOAT16)
    assert here == there
    codes = Q.nearest_neighbour(t.cuda(), t[:64].cuda())
    assert codes.dtype == torch.int64
    assert torch.equal(codes.cpu(), Q.nearest_neighbour(t, t[:64]))


def test_bad_input_is_named(rng):
    x = torch.from_numpy(rng.standard_normal((100, 2)).astype(np.float32)).cuda()
    with pytest.raises(TypeError, match="centroids: got an array on cpu"):
        _fitting.nearest_neighbour(x, x.cpu())
    with pytest.raises(TypeError, match="weights: got an array on cpu"):
        _fitting.kmeans(x, 4, weights=torch.ones(100))
    with pytest.raises(ValueError, match="weights: got 3 of them"):
        _fitting.kmeans(x, 4, weights=torch.ones(3).cuda())
    with pytest.raises(ValueError, match="count: got 0"):
        _fitting.kmeans(x, 0)
    x[7, 1] = torch.nan
    with pytest.raises(ValueError, match="x: got nan at row 7, column 1"):
        _fitting.kmeans(x, 4)
