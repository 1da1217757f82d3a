"""Entropy coded streams decoded on a CUDA device, to codes and to values."""

import numpy as np
import pytest
from quantloom import _arrays, _core

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or not _core.built_with_cuda():
    pytest.skip("needs a CUDA device and a build with CUDA", allow_module_level=True)


def core(tensor):
    return _arrays.describe("tensor", tensor).core


def stream_address():
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("coder", ["rans", "huffman"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (300, 1000), (512, 4096)])
def test_codes_and_values(coder, shape):
    rng = np.random.default_rng(shape[1])
    codes = np.clip(np.rint(rng.standard_normal(shape) * 3 + 20), 0, 40).astype(np.uint8)
    stream = _core.CudaEntropyStream(_core.entropy_encode(codes, coder=coder), stream_address())
    assert stream.count == codes.size
    out = torch.empty(codes.size, dtype=torch.uint8, device="cuda")
    stream.decode(0, core(out), stream_address())
    stream.check(stream_address())
    np.testing.assert_array_equal(out.cpu().numpy().reshape(shape), codes)

    table = torch.linspace(-1, 1, 41, device="cuda")
    n, k = shape
    scales = torch.rand((n, -(-k // 64)), device="cuda", dtype=torch.float32).to(torch.bfloat16)
    values = torch.empty(shape, dtype=torch.float16, device="cuda")
    stream.decode_values(n, core(table), core(scales), 1, 64, 0, core(values), stream_address())
    stream.check(stream_address())
    spread = scales.float().repeat_interleave(64, dim=1)[:, :k]
    expected = (table[torch.from_numpy(codes.astype(np.int64)).cuda()] * spread).half()
    assert torch.equal(values, expected)


def test_wrong_arguments_and_broken_words():
    codes = (np.arange(5000) % 11).astype(np.uint8)
    bytes_ = _core.entropy_encode(codes).copy()
    stream = _core.CudaEntropyStream(bytes_, stream_address())
    with pytest.raises(TypeError, match="out"):
        stream.decode(0, core(torch.empty(5000, dtype=torch.uint8)), stream_address())
    with pytest.raises(TypeError, match="uint8"):
        stream.decode(0, core(torch.empty(5000, dtype=torch.int8, device="cuda")), stream_address())
    with pytest.raises(ValueError, match="range"):
        stream.decode(1, core(torch.empty(5000, dtype=torch.uint8, device="cuda")), stream_address())
    bytes_[-100:] ^= 0x5A
    broken = _core.CudaEntropyStream(bytes_, stream_address())
    out = torch.empty(5000, dtype=torch.uint8, device="cuda")
    broken.decode(0, core(out), stream_address())
    with pytest.raises(ValueError, match="no encoder writes"):
        broken.check(stream_address())
