"""From the vocabulary of formats to products: Encoded.to_packed."""

from __future__ import annotations

import numpy as np
import numpy_reference
import pytest
import quantloom as ql
import quantloom.formats as Q
import torch
from quantloom.formats.multiplied import _packed_rows

T = torch.randn(24, 128, generator=torch.Generator().manual_seed(5))


def vectors(count: int, dim: int, scale: float = 0.5) -> Q.VectorLUTFormat:
    table = torch.randn(count, dim, generator=torch.Generator().manual_seed(count)) * scale
    return Q.VectorLUTFormat.create(table, Q.FP16, "own")


linear = Q.LinearScalingFormat
CASES = [
    (linear(Q.NF4, Q.BFLOAT16, (1, 64), "absmax"), ql.Codebook, 64, "float16"),
    (linear(Q.IntFormat(4), Q.FP16, (1, 32), "absmax"), ql.Uniform, 32, "float16"),
    (linear(Q.IntFormat(3), Q.FP32, (1, None), "signmax"), ql.Uniform, "channel", "float32"),
    (linear(Q.IntFormat(2, "symmetric"), Q.FP16, (1, 16), "absmax"), ql.Codebook, 16, "float16"),
    (linear(Q.crd_normal(3), Q.FP32, (None, None), "rms"), ql.Codebook, "tensor", "float32"),
    (linear(Q.lut_grid(0.3, 4), Q.FP32, (1, 128), "rms"), ql.Codebook, "channel", "float32"),
    (linear(Q.FPFormat.create(2, 1), Q.ExpCeilFormat(8), (1, 32), "absmax"), ql.Codebook, 32,
     "float16"),
    (linear(vectors(256, 4), Q.BFLOAT16, (1, 64), "absmax"), ql.VectorCodebook, 64, "float16"),
    (linear(vectors(100, 2), Q.FP32, (1, None), "rms"), ql.VectorCodebook, "channel", "float32"),
    (vectors(64, 8, 1.0), ql.VectorCodebook, "tensor", "float16"),
    (Q.crd_t(4, 7), ql.Codebook, "tensor", "float16"),
    (Q.ScaledFormat.create(Q.NF4, 3.0), ql.Codebook, "tensor", "float16"),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "kind", "group_size", "scale_dtype"), CASES, ids=lambda case: str(case))
def test_values_stay_and_multiply(fmt, kind, group_size, scale_dtype):
    encoded = fmt.encode(T)
    q = encoded.to_packed()
    assert isinstance(q.format, kind)
    assert q.format.group_size == group_size
    assert q.format.scale_dtype == scale_dtype
    expected = encoded.decode()
    # Tables are rounded to float16.
    torch.testing.assert_close(q.dequantize("float32"), expected, rtol=2**-10, atol=1e-7)
    x = torch.randn(3, 128)
    torch.testing.assert_close(ql.matmul(x, q), x @ q.dequantize("float32").T, rtol=1e-4, atol=1e-4)
    module = ql.nn.QuantLinear(q)
    torch.testing.assert_close(module(x), ql.matmul(x, q))
    if kind is ql.Uniform:
        torch.testing.assert_close(q.dequantize("float32"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("element", [Q.IntFormat(3), Q.NF4, vectors(64, 4)], ids=str)
def test_outliers(element):
    inner = linear(element, Q.BFLOAT16, (1, 64), "absmax")
    encoded = Q.SparseFormat(inner, Q.BFLOAT16, 0.02).encode(T)
    q = encoded.to_packed()
    assert q.format.count == int(0.02 * T.numel())
    torch.testing.assert_close(q.dequantize("float32"), encoded.decode(), rtol=2**-10, atol=1e-3)
    x = torch.randn(2, 128)
    torch.testing.assert_close(ql.matmul(x, q), x @ q.dequantize("float32").T, rtol=1e-4, atol=1e-4)


def test_files_keep_what_was_linked(tmp_path):
    inner = linear(vectors(64, 4), Q.BFLOAT16, (1, 64), "absmax")
    q = Q.SparseFormat(inner, Q.BFLOAT16, 0.02).encode(T).to_packed()
    ql.save_tensors(tmp_path / "q.safetensors", {"w": q})
    back = ql.load_tensors(tmp_path / "q.safetensors", kind="torch")["w"]
    assert back.format == q.format
    torch.testing.assert_close(back.dequantize(), q.dequantize(), rtol=0, atol=0)


def test_scales_in_another_dtype():
    fmt = linear(Q.NF4, Q.FP32, (1, 64), "absmax")
    q = fmt.encode(T).to_packed("float16")
    assert q.planes["scales"].dtype == torch.float16
    torch.testing.assert_close(q.dequantize("float32"), fmt.encode(T).decode(), rtol=2**-9, atol=1e-7)
    with pytest.raises(ValueError, match="scale_dtype"):
        fmt.encode(T).to_packed("int8")
    with pytest.raises(ValueError, match="scale_dtype"):
        fmt.encode(T * 1e6).to_packed("float16")


@pytest.mark.parametrize(
    ("fmt", "tensor", "words"),
    [
        (linear(Q.NF4, Q.FP32, (2, 64), "absmax"), T, "block_shape"),
        (linear(Q.NF4, Q.FP32, (None, 1), "absmax"), T, "block_shape"),
        (Q.BFLOAT16, T, "format"),
        (linear(Q.IntFormat(10), Q.FP32, (1, 64), "absmax"), T, "256"),
        (Q.RandomRotationFormat(Q.NF4, (0,), 1), T, "format"),
        (vectors(16, 3), T[:, :64], "length"),  # 24 * 64 elements are whole vectors, 64 are not
    ],
    ids=lambda case: str(case)[:40],
)
def test_other_formats_are_refused(fmt, tensor, words):
    with pytest.raises((RuntimeError, ValueError), match=words):
        fmt.encode(tensor).to_packed()


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="matrix"):
        Q.NF4.encode(T.reshape(-1)).to_packed()


def test_streams_are_those_of_the_library():
    rng = np.random.default_rng(0)
    q = ql.quantize(rng.standard_normal((5, 77)).astype(np.float32), "uniform:3:channel")
    np.testing.assert_array_equal(_packed_rows(numpy_reference.codes(q), 3).numpy(), q.planes["codes"])
