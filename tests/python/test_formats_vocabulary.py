"""Names, signatures and short names of the vocabulary."""

import copy
import dataclasses
import inspect
import json
import math

import pytest

torch = pytest.importorskip("torch")

from quantloom import fit as F
from quantloom import formats as Q

SIGNATURES = {
    "shuffle": "t",
    "rmse_norm": "x qx weight",
    "qrmse_norm": "fmt x weight",
    "snr": "x qx",
    "safe_div": "a b",
    "blocked_shape": "t block_shape",
    "blocked_scale": "block_t scaling element_range",
    "block_normalise": "t block_shape scaling element_range scale_format",
    "parse": "s",
    "nearest_neighbour": "tensor centroids out method",
    "lut_function": "fn bits name",
    "nf_approx": "bits",
    "lut_grid": "resolution max",
    "crd_normal": "bits mode power",
    "crd_laplace": "bits mode power",
    "crd_t": "bits df mode power",
    "crd_block_normal": "bits block_size scaling mode power",
    "crd_block_laplace": "bits block_size scaling mode power",
    "crd_block_t": "bits block_size df scaling mode power",
    "lut_lloyd_max": "t bits threshold weight range init incremental max_samples dtype progress seed",
    "vlut_lloyd_max": "t bits threshold element_type range init incremental dtype progress weight seed",
    "scaled_int8_3d8_lloyd_max": "t2d scale_format block_shape threshold args",
}
FIELDS = {
    "FPFormat": "exponent_bits mantissa_bits rounding signed",
    "TorchFormat": "dtype",
    "IntFormat": "bits_ mode",
    "ExpCeilFormat": "bits_",
    "LUTFormat": "values name _range",
    "VectorLUTFormat": "values element_type name _range",
    "Sign3D8Format": "lut",
    "ScaledFormat": "format scale _range",
    "LinearScalingFormat": "element_format scale_format block_shape scaling",
    "SparseFormat": "format sparse_format sparse_ratio",
    "RandomRotationFormat": "format dims seed",
    "CompressedLUTFormat": "lut model_logp compressor",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert list(inspect.signature(getattr(Q, name)).parameters) == SIGNATURES[name].split()


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    fields = [field.name for field in dataclasses.fields(getattr(Q, name))]
    assert fields == [*FIELDS[name].split(), "_type"]


BLOCKS = ((1, 64), "absmax")
NAMES = {
    "E0M{0.58}": lambda: Q.IntFormat(math.log2(3)),
    "E0M{2.17}": lambda: Q.IntFormat(math.log2(9)),
    "LUT4[CRD{1/4}-N-RS]": lambda: Q.crd_normal(4, power=1 / 4),
    "LUT4[CRD{1}-N-RS]": lambda: Q.crd_normal(4, power=1),
    "LUT4[CRD{0}-N-AS]": lambda: Q.crd_block_normal(4, 64, power=0),
    "LUT4[CRD-T[4.1]-RS]": lambda: Q.crd_t(4, 4.12),
    "LUT4[CRD-T[1000]-RS]": lambda: Q.crd_t(4, 1000),
    "LUT4[CRD-L-AZ]": lambda: Q.crd_block_laplace(4, 64, mode="repeat_zero"),
    "LUT5[GRID{0.1234}]": lambda: Q.lut_grid(0.1234, 1.5),
    "LUT4[NF]{rot[0, 1]}": lambda: Q.RandomRotationFormat(Q.NF4, (0, 1), 3),
    "LUT4[NF]+S[1e-03:BFLOAT16]": lambda: Q.SparseFormat(Q.NF4, Q.BFLOAT16, 2**-10),
    "3b-t(mode=asymmetric){1,64:BFLOAT16:absmax:search}+S[1e-03:BFLOAT16]": lambda: F.Scaled(
        3,
        "t",
        Q.BFLOAT16,
        *BLOCKS,
        sparse_format=Q.BFLOAT16,
        sparse_ratio=2**-10,
        args={"mode": "asymmetric"},
    ),
    "3b-int+Zhuffman|Zoptimal{*,*:BFLOAT16:rms:search}": lambda: F.Scaled(
        3, "int", Q.BFLOAT16, (None, None), "rms", compressor=("huffman", "optimal")
    ),
    "3bx2-BFLOAT16-lloyd_max{1,64:BFLOAT16:absmax:search}": lambda: F.Scaled(
        3, "lloyd_max", Q.BFLOAT16, *BLOCKS, vq_length=2, vq_format=Q.BFLOAT16
    ),
    "4b-int{1,64:BFLOAT16:absmax:search}+R+S[1.0%:FLOAT32]": lambda: F.Scaled(
        4, "int", Q.BFLOAT16, *BLOCKS, rotation=3, sparse_format=Q.FP32, sparse_ratio=0.01
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_short_names(name):
    fmt = NAMES[name]()
    assert str(fmt) == name
    assert Q.TensorFormat.load(json.loads(json.dumps(Q.TensorFormat.save(fmt)))) == fmt
    assert dataclasses.replace(fmt) == fmt == copy.deepcopy(fmt)


def test_powers_of_two_reach_beyond_float32():
    fmt = Q.ExpCeilFormat(8)
    assert fmt.range == (2.0**-127, 2.0**128) and len(set(fmt.centroids)) == 256
    assert fmt.quantise(torch.tensor([3e38, 1.5])).tolist() == [2.0**127, 2.0]  # finite all the same


def test_grids_have_no_step_too_many():
    assert 0.9 / 0.06 > 15
    assert len(Q.lut_grid(0.06, 0.9).values) == 31 and len(Q.lut_grid(0.06, 0.901).values) == 33


def test_compressed_tables_are_compared_by_value():
    lut = Q.LUTFormat.create((-2, -1, 0, 1, 2), "five")
    p = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1])
    fmt = Q.CompressedLUTFormat(lut, p.log(), "optimal")
    assert fmt == copy.deepcopy(fmt) and fmt.centroids == lut.values
    assert fmt != Q.CompressedLUTFormat(lut, p.flip(0).log(), "optimal") and fmt != lut
    assert fmt.model_logp.exp().allclose(p)
    bits = fmt.count_bits_tensor(torch.tensor([-2.0, 0.0, 2.0]))
    assert bits == pytest.approx(-math.log2(0.3 * 0.2 * 0.1), abs=1e-5)
    x = torch.linspace(-2, 2, 1000)
    stored = fmt.encode(x)
    assert Q.Encoded.from_bytes(stored.to_bytes()).format == fmt
    assert "0.10000000149" not in stored.describe()


def every_kind(x):
    """Formats of each kind, made and fitted."""
    grid = Q.CompressedLUTFormat.train_grid(x, 0.3)
    vectors = Q.vlut_lloyd_max(x.reshape(-1, 2), 2, 1e-2, Q.BFLOAT16)
    block = Q.LinearScalingFormat(Q.crd_block_t(4, 32, 7), Q.BFLOAT16, (1, 32), "absmax")
    yield from (
        Q.FP16,
        Q.NF4,
        Q.parse("E2M1"),
        Q.parse("EXP6"),
        Q.IntFormat(2.3, "symmetric"),
        Q.nf_approx(3),
    )
    yield from (grid, vectors, block, Q.ScaledFormat.create(Q.NF4, 0.3), Q.SparseFormat(block, Q.FP16, 0.01))
    yield Q.LinearScalingFormat(vectors, Q.BFLOAT16, (None, None), "rms")
    yield Q.LinearScalingFormat(grid, Q.BFLOAT16, (None, None), "rms")
    yield Q.RandomRotationFormat(block, (0, 1), 3)
    yield Q.scaled_int8_3d8_lloyd_max(x, Q.BFLOAT16, (1, None), 1e-2)
    yield Q.lut_lloyd_max(x, 3, 1e-3, weight=x.abs(), init=("uniform_rms", 3.0), max_samples=1000)
    for family in ("int", "fp", "t", "lloyd_max"):
        yield F.Scaled(4, family, Q.BFLOAT16, (1, 32), "absmax").fit(x)
    yield F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms", compressor="optimal").fit(x)


def test_the_default_device_is_of_no_matter():
    """Scripts set torch's default device; tensors of another one keep theirs."""
    x = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    expected = [(str(fmt), fmt.quantise(x), fmt.count_bits_tensor(x)) for fmt in every_kind(x)]
    with torch.device("meta"):
        found = list(every_kind(x))
        assert len(found) == len(expected)
        for fmt, (name, values, bits) in zip(found, expected):
            assert str(fmt) == name
            assert fmt.quantise(x).equal(values) and fmt.encode(x).decode().equal(values), name
            assert fmt.count_bits_tensor(x) == bits
            assert Q.TensorFormat.load(Q.TensorFormat.save(fmt)) == fmt
            assert float(Q.qrmse_norm(fmt, x)) < 2
