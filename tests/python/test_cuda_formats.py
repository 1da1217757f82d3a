"""Formats of the vocabulary on CUDA tensors: the values and bytes of the CPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import quantloom.fit as F
import quantloom.formats as Q
from quantloom import _core
from quantloom.formats.encoded import Planes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_kernels = pytest.mark.skipif(not _core.built_with_cuda(), reason="needs a build with CUDA")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ELEMENTS = [
    *map(
        Q.parse, ("FP16", "BFLOAT16", "E2M1", "UE3M2", "E4M3-RI", "E5M2-RZ", "E8M7", "E0M3", "EXP8", "EXP5")
    ),
    Q.IntFormat(3.17),
    Q.IntFormat(4, "symmetric"),
    Q.NF4,
    Q.nf_approx(7),
    Q.TorchFormat("int8"),
    Q.ScaledFormat.create(Q.NF4, 0.3),
    Q.ScaledFormat.create(Q.parse("E2M1"), 1.7),
]


def sample(rng, dtype):
    x = torch.tensor(rng.standard_normal((96, 192)), dtype=torch.float32)
    x.view(-1)[:500] *= 100
    x.view(-1)[500:900] = torch.arange(-200, 200) / 16  # ties
    x.view(-1)[900:950] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_elements_equal_those_of_the_cpu(fmt, dtype, rng):
    x = sample(rng, dtype)
    assert fmt.quantise(x.cuda()).cpu().equal(fmt.quantise(x))
    assert fmt.quantise(x.cuda().T).cpu().equal(fmt.quantise(x.T))
    if fmt._codes_of() is not None:
        assert fmt.to_idx(x.cuda()).cpu().equal(fmt.to_idx(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", ["absmax", "signmax"])
@pytest.mark.parametrize("fmt", ELEMENTS[2:], ids=str)
def test_scaled_blocks_equal_those_of_the_cpu(fmt, scaling, dtype, rng):
    x = sample(rng, dtype)
    for block in ((1, 64), (None, None), (8, 3)):
        linear = Q.LinearScalingFormat(fmt, Q.BFLOAT16, block, scaling)
        assert linear.quantise(x.cuda()).cpu().equal(linear.quantise(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoded_on_the_device(dtype, rng):
    x = sample(rng, dtype).cuda()
    table = torch.tensor(Q.nf_approx(3).values) * 2
    vectors = Q.VectorLUTFormat.create(torch.cartesian_prod(table, table), Q.BFLOAT16, "product")
    grid = Q.CompressedLUTFormat.train_grid(x, 0.4)
    for elements in (Q.NF4, Q.parse("E2M1"), vectors, grid):
        for scaling in ("absmax", "rms"):
            inner = Q.LinearScalingFormat(elements, Q.BFLOAT16, (1, 64), scaling)
            for fmt in (inner, Q.SparseFormat(inner, Q.FP16, 0.01), Q.RandomRotationFormat(inner, (0, 1), 3)):
                quantised = fmt.quantise(x)
                encoded = fmt.encode(x)
                assert encoded.decode("cuda").equal(quantised), str(fmt)
                assert quantised.is_cuda and all(not plane.is_cuda for plane in encoded.planes.values())
                if not isinstance(fmt, Q.RandomRotationFormat):
                    assert encoded.decode().equal(quantised.cpu())
    s3d8 = Q.scaled_int8_3d8_lloyd_max(x, Q.BFLOAT16, (1, None), 1e-2)
    assert s3d8.encode(x).decode("cuda").equal(s3d8.quantise(x))


@needs_kernels
def test_entropy_coded_on_the_device():
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(12))
    for step, compressor in ((0.3, "rans"), (0.3, "huffman"), (0.01, "rans")):
        fmt = Q.CompressedLUTFormat.train_grid(x, step, compressor=compressor)
        encoded = fmt.encode(x)
        codes = fmt._get_codes_on(Planes(encoded.planes), x.numel(), torch.device("cuda"))
        on_device = len(fmt.lut.values) <= 256
        assert (codes.is_cuda, codes.dtype) == (on_device, torch.uint8 if on_device else torch.int32)
        assert encoded.decode("cuda").cpu().equal(encoded.decode())
        stream = encoded.planes["stream"]
        stream[-9:] ^= 0x5A
        with pytest.raises((ValueError, OSError), match="chunk"):
            encoded.decode("cuda")


@needs_kernels
def test_vectors_equal_those_of_the_cpu(rng):
    x = torch.tensor(rng.standard_normal((20000, 2)), dtype=torch.float32)
    fitted = Q.vlut_lloyd_max(x.cuda(), 3, 1e-3, Q.BFLOAT16)
    assert fitted == Q.vlut_lloyd_max(x, 3, 1e-3, Q.BFLOAT16)
    assert fitted.quantise(x.cuda()).cpu().equal(fitted.quantise(x))
    centroids = torch.tensor(rng.standard_normal((100, 2)), dtype=torch.float32)
    expected = torch.cdist(x.double(), centroids.double()).argmin(1)
    for method in ("auto", "triton", "torch"):
        found = Q.nearest_neighbour(x.cuda(), centroids.cuda(), method=method)
        assert found.is_cuda and (found.cpu() == expected).float().mean() > 0.9999
        out = torch.empty_like(found)
        assert Q.nearest_neighbour(x.cuda(), centroids.cuda(), out=out, method=method) is out
        assert out.equal(found)


@pytest.mark.parametrize("family", ["int", "fp", "t", "lloyd_max"])
def test_fits_of_cuda_tensors(family, rng):
    if family == "t":
        pytest.importorskip("scipy")
    x = sample(rng, torch.float32)
    for scaling, block in (("absmax", (1, 64)), ("rms", (None, None))):
        spec = F.Scaled(4, family, Q.BFLOAT16, block, scaling)
        fmt = spec.fit(x.cuda(), x.abs().cuda())
        assert fmt == spec.fit(x, x.abs())
        assert float(Q.qrmse_norm(fmt, x.cuda())) == pytest.approx(float(Q.qrmse_norm(fmt, x)), rel=1e-4)
