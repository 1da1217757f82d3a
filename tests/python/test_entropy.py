"""Entropy coding of codes: streams come back bit for bit, cost what they should, and refuse nonsense."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantloom import _core

CODERS = ("rans", "huffman")


def entropy(codes):
    counts = np.unique(codes, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


@st.composite
def code_arrays(draw):
    alphabet = draw(st.sampled_from([1, 2, 5, 17, 64, 256, 300, 4096]))
    size = draw(st.integers(0, 3000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([0.0, 1.0, 4.0]))
    values = (alphabet * rng.random(size) ** (1 + skew)).astype(np.int64)
    dtype = np.uint16 if alphabet > 256 or draw(st.booleans()) else np.uint8
    return values.astype(dtype)


@settings(max_examples=150, deadline=None)
@given(
    codes=code_arrays(),
    coder=st.sampled_from(CODERS),
    chunk=st.sampled_from([0, 128, 512]),
    threads=st.integers(1, 3),
)
def test_streams_come_back(codes, coder, chunk, threads):
    stream = _core.entropy_encode(codes, coder=coder, chunk=chunk, threads=threads)
    decoded = _core.entropy_decode(stream, threads=threads)
    assert decoded.dtype == (np.uint16 if codes.size and codes.max() > 255 else np.uint8)
    np.testing.assert_array_equal(decoded, codes)
    facts = _core.entropy_describe(stream)
    assert (facts["coder"], facts["count"], facts["bytes"]) == (coder, codes.size, stream.size)
    if codes.size > 2:
        np.testing.assert_array_equal(
            _core.entropy_decode(stream, first=1, count=codes.size - 2), codes[1:-1]
        )


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 2**16), coder=st.sampled_from(CODERS))
def test_random_bytes_are_refused(data, cut, coder):
    sound = _core.entropy_encode((np.arange(900) % 7).astype(np.uint8), coder=coder, chunk=256).tobytes()
    for stream in (data, sound[: cut % len(sound)], sound + data[:1] if data else sound[:-1]):
        with pytest.raises(ValueError, match="entropy stream"):
            _core.entropy_decode(stream)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_rans_is_within_a_hundredth_of_a_bit(bits):
    values = np.random.default_rng(bits).standard_normal(1 << 20)
    codes = np.rint(values * 2.0**bits / 4.13)  # entropy of about `bits`
    codes = (codes - codes.min()).astype(np.uint8)
    stream = _core.entropy_encode(codes)
    assert entropy(codes) <= 8 * stream.size / codes.size <= entropy(codes) + 0.01
    assert abs(_core.entropy_of(list(_core.count_codes(codes, 256))) - entropy(codes)) < 1e-9


def test_the_compressed_grid_of_student_t():
    # Student's t with 10 degrees of freedom on a grid of 0.58: entropy 2.9975, Huffman 3.058.
    values = np.random.default_rng(100).standard_t(10, 1 << 21)
    codes = np.rint(values / 0.58)
    codes = (codes - codes.min()).astype(np.uint8)
    assert abs(entropy(codes) - 2.9975) < 0.004
    assert 8 * _core.entropy_encode(codes).size / codes.size <= 3.01 + 0.002
    counts = _core.count_codes(codes, int(codes.max()) + 1)
    lengths = _core.huffman_lengths([float(c) for c in counts])
    ideal = float((lengths * counts).sum()) / codes.size
    assert abs(ideal - 3.058) < 0.004
    coded = 8 * _core.entropy_encode(codes, coder="huffman").size / codes.size
    assert ideal <= coded <= ideal + 0.02


def test_a_given_model_and_wrong_arguments():
    codes = np.array([0, 1, 1, 3], np.uint8)
    stream = _core.entropy_encode(codes, [5, 9, 1, 2])
    np.testing.assert_array_equal(_core.entropy_decode(stream, expected=4), codes)
    with pytest.raises(ValueError, match="expected 5"):
        _core.entropy_decode(stream, expected=5)
    with pytest.raises(ValueError, match="frequencies"):
        _core.entropy_encode(codes, [5, 9, 1, 0])
    with pytest.raises(ValueError, match="below 2"):
        _core.entropy_encode(codes, [5, 9])
    with pytest.raises(ValueError, match="frequencies"):
        _core.entropy_encode(codes, [])
    with pytest.raises(ValueError, match="coder"):
        _core.entropy_encode(codes, coder="zip")
    with pytest.raises(ValueError, match="chunk"):
        _core.entropy_encode(codes, chunk=100)
    with pytest.raises(ValueError, match="contiguous"):
        _core.entropy_encode(codes[::2])
    with pytest.raises(TypeError, match="uint8 or uint16"):
        _core.entropy_encode(codes.astype(np.int32))
    with pytest.raises(ValueError, match="first"):
        _core.entropy_decode(stream, first=5)
    with pytest.raises(ValueError, match="count"):
        _core.entropy_decode(stream, count=5)


def test_codes_beyond_the_alphabet_are_named():
    codes = np.array([0, 4095, 5000, 1], np.uint16)
    with pytest.raises(ValueError, match=r"the code 5000, expected codes below 4096"):
        _core.entropy_encode(codes)
    np.testing.assert_array_equal(_core.count_codes(codes[:2], 4096).nonzero()[0], [0, 4095])


def test_huffman_lengths_cost_what_merging_the_lightest_costs():
    """With a last symbol of weight 1, as coders that mark the end of their input have."""
    rng = np.random.default_rng(3)
    for size in (1, 2, 7, 64, 500):
        weights = [*(rng.dirichlet(np.full(size, 0.3)) * 2**20), 1.0]
        lengths = _core.huffman_lengths(weights)
        heap = sorted(w for w in weights if w > 0)
        cost = 0.0
        while len(heap) > 1:
            merged = heapq.heappop(heap) + heapq.heappop(heap)
            cost += merged
            heapq.heappush(heap, merged)
        assert float(lengths @ np.array(weights)) == pytest.approx(cost, rel=1e-9)


@pytest.mark.skipif(_core.built_with_cuda(), reason="for builds without CUDA")
def test_a_build_without_cuda_says_so():
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        _core.CudaEntropyStream(_core.entropy_encode(np.zeros(3, np.uint8)))
