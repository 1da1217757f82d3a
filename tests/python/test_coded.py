"""Entropy-coded weights and their products on the CPU."""

import pickle

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import _core
from quantloom import formats as Q


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(7, (n, k)).astype(np.float32)


def compressed(w: torch.Tensor, step: float = 0.6, block: tuple = (None, None)) -> Q.LinearScalingFormat:
    element = Q.CompressedLUTFormat.train_grid(w / w.std() * 1.3, step)
    return Q.LinearScalingFormat(element, Q.FP32, block, "rms")


FORMATS = [
    "uniform:3:g128",
    "uniform:4:channel",
    "uniform:2:tensor:sym:f32",
    "uniform:1:g32:sym:bf16",
    "uniform:8:g16",
    "codebook:nf4:g64",
]


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 131), (33, 256), (5, 1000)])
def test_packed_tensors_keep_their_values(spec, shape):
    q = ql.quantize(weights(*shape), spec)
    w = ql.code(q)
    assert w.shape == shape and w.device == "cpu"
    np.testing.assert_array_equal(w.dequantize(), q.dequantize())
    x = np.random.default_rng(1).standard_normal((3, shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    np.testing.assert_allclose(ql.matmul(x, w), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 16), (4, 12)])
def test_encoded_matrices_multiply(dtype, block):
    w = torch.from_numpy(weights(24, 96)).to(dtype)
    encoded = compressed(w.float(), block=block).encode(w)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = ql.matmul(x, encoded)
    assert y.shape == (2, 3, 24) and y.dtype == dtype
    expected = x.double() @ encoded.decode().double().T
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()
    bias = torch.randn(24).to(dtype)
    torch.testing.assert_close(
        ql.matmul(x, encoded, bias=bias).float(), y.float() + bias.float(), rtol=1e-2, atol=3e-2
    )
    np.testing.assert_allclose(
        ql.code(encoded).dequantize(),
        encoded.decode().float().numpy(),
        rtol={2: 1e-2}.get(dtype.itemsize, 1e-7),
    )


def test_other_elements_than_entropy_coded_ones():
    w = torch.from_numpy(weights(20, 64))
    formats = [
        Q.LinearScalingFormat(Q.parse("E2M1"), Q.BFLOAT16, (1, 32), "absmax"),
        Q.LinearScalingFormat(Q.ScaledFormat.create(Q.NF4, 0.7), Q.FP32, (1, None), "signmax"),
        Q.NF4,
        Q.CompressedLUTFormat.train_grid(w, 0.3),
    ]
    for fmt in formats:
        encoded = fmt.encode(w)
        np.testing.assert_allclose(ql.code(encoded).dequantize(), encoded.decode().numpy(), rtol=1e-6)


def test_encoded_matrices_without_entropy_coding_multiply():
    w = torch.from_numpy(weights(24, 128))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(4))
    inner = Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, 64), "absmax")
    for fmt in (inner, Q.SparseFormat(inner, Q.BFLOAT16, 0.01)):
        encoded = fmt.encode(w)
        expected = x.double() @ encoded.decode().double().T
        assert (ql.matmul(x, encoded).double() - expected).abs().max() <= 2e-3 * expected.abs().max()
        assert isinstance(encoded.__dict__["_operands"]["cpu"], ql.PackedTensor)


def test_bits_are_near_the_entropy():
    w = torch.from_numpy(weights(1024, 2048))
    encoded = compressed(w).encode(w)
    codes = encoded.scaled_codes()[0]
    entropy = _core.entropy_of(np.bincount(codes.ravel()).tolist())
    coded = ql.code(encoded)
    tables = 32 * (2**coded.table_bits + 256) / codes.size
    assert coded.splits == 1
    assert entropy < coded.bits_per_weight - tables < entropy + 0.04
    assert ql.code(encoded, overhead=1).splits == 16
    assert ql.code(encoded, splits=4).splits == 4
    assert ql.code(encoded, table_bits=9).table_bits == 9


def test_results_do_not_depend_on_threads():
    q = ql.quantize(weights(70, 300), "uniform:4:g64")
    x = weights(4, 300, 3)
    reference = ql.matmul(x, ql.code(q, threads=1), threads=1)
    for threads in (2, 4):
        np.testing.assert_array_equal(ql.matmul(x, ql.code(q, threads=threads), threads=threads), reference)


def test_pickles_and_refuses_damaged_ones():
    w = ql.code(ql.quantize(weights(20, 90), "uniform:3:g32"))
    again = pickle.loads(pickle.dumps(w))
    np.testing.assert_array_equal(again.dequantize(), w.dequantize())
    rebuild, (parts, device) = w.__reduce__()
    parts["words"] = parts["words"].copy()
    parts["words"][-1] ^= 0xFFFF0000
    parts["words"][3] ^= 0xFFFF
    with pytest.raises((OSError, ValueError), match="coded matrix"):
        rebuild(parts, device)


def test_an_encoded_matrix_is_coded_once():
    w = torch.from_numpy(weights(16, 64))
    encoded = compressed(w).encode(w)
    ql.matmul(torch.ones(1, 64), encoded)
    kept = encoded.__dict__["_operands"]["cpu"]
    ql.matmul(torch.ones(2, 64), encoded)
    assert encoded.__dict__["_operands"]["cpu"] is kept
    assert "_operands" not in pickle.loads(pickle.dumps(encoded)).__dict__


def test_refuses_what_it_does_not_take():
    w = torch.from_numpy(weights(8, 32))
    with pytest.raises(TypeError, match="q: got ndarray"):
        ql.code(w.numpy())
    with pytest.raises(RuntimeError, match="zero points"):
        ql.code(ql.quantize(w, "uniform:4:g32:asym"))
    with pytest.raises(RuntimeError, match="one table"):
        ql.code(Q.SparseFormat(Q.NF4, Q.BFLOAT16, 0.01).encode(w))
    with pytest.raises(RuntimeError, match="at most 256"):
        ql.code(Q.parse("E0M8").encode(w))
    with pytest.raises(ValueError, match="a matrix"):
        ql.code(Q.NF4.encode(w.reshape(-1)))
    q = ql.quantize(w, "uniform:4:g32")
    for name, value in (
        ("overhead", -1),
        ("splits", 17),
        ("table_bits", 7),
        ("table_bits", 15),
        ("threads", -1),
    ):
        with pytest.raises(ValueError, match=name):
            ql.code(q, **{name: value})
    coded = ql.code(q)
    with pytest.raises(ValueError, match="x: got shape"):
        ql.matmul(torch.ones(1, 31), coded)
    with pytest.raises(RuntimeError, match="only 'exact'"):
        ql.matmul(torch.ones(1, 32), coded, activations="int8")
    with pytest.raises(ValueError, match="bias"):
        ql.matmul(torch.ones(1, 32), coded, bias=torch.ones(9))
    with pytest.raises(TypeError, match="CodedTensor"):
        ql.CodedTensor(3)


def test_empty_matrices():
    for shape in ((0, 8), (8, 0)):
        w = ql.code(ql.quantize(np.zeros(shape, np.float32), "uniform:4:channel"))
        x = np.ones((2, shape[1]), np.float32)
        np.testing.assert_array_equal(ql.matmul(x, w), np.zeros((2, shape[0]), np.float32))
        assert w.dequantize().shape == shape
