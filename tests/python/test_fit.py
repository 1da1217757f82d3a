"""Fitted formats: names, bits and errors; and that the search by one sort finds what plain trials find."""

from __future__ import annotations

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")

import quantloom.fit as F
import quantloom.formats as Q

N = 2**16


@pytest.fixture(scope="module")
def x():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return 3 * torch.randn(N)


def bits(fmt, x):
    return fmt.count_bits_tensor(x) / x.numel()


TENSOR = (None,)


def test_names():
    t = F.Scaled(
        3, "t", Q.BFLOAT16, (1, 64), "absmax", "search", Q.BFLOAT16, 2**-10, args={"mode": "asymmetric"}
    )
    assert str(t) == "3b-t(mode=asymmetric){1,64:BFLOAT16:absmax:search}+S[1e-03:BFLOAT16]"
    z = F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms", compressor="optimal")
    assert str(z) == "3b-int+Zoptimal{*,*:BFLOAT16:rms:search}"
    vq = F.Scaled(3, "lloyd_max", Q.BFLOAT16, (1, 64), "signmax", vq_length=2, vq_format=Q.BFLOAT16)
    assert str(vq) == "3bx2-BFLOAT16-lloyd_max{1,64:BFLOAT16:signmax:search}"
    r = F.Scaled(4, "int", Q.BFLOAT16, (None, None), "rms", "moments", rotation=5)
    assert str(r) == "4b-int{*,*:BFLOAT16:rms:moments}+R"
    assert t.supports_error_weight
    assert not any(fmt.supports_error_weight for fmt in (z, vq, r))
    for fmt in (t, z, vq, r):
        assert Q.TensorFormat.load(json.loads(json.dumps(Q.TensorFormat.save(fmt)))) == fmt
        assert dataclasses.replace(fmt) == fmt


def test_compression(x):
    fmt = F.Scaled(4, "int", Q.BFLOAT16, TENSOR, "rms", compressor="optimal").fit(x)
    assert abs(bits(fmt, x) - 4) < 0.1 and Q.qrmse_norm(fmt, x) < 0.08
    assert "[GRID{n=" in str(fmt)
    both = F.Scaled(4, "int", Q.BFLOAT16, (32,), "absmax", "search", Q.FP32, 2**-8, "optimal").fit(x)
    assert abs(bits(both, x) - 4.75) < 0.1 and Q.qrmse_norm(both, x) < 0.08
    huffman = F.Scaled(3, "int", Q.BFLOAT16, TENSOR, "rms", compressor=("huffman", "optimal")).fit(x)
    assert huffman.element_format.compressor == "huffman" and 3 < bits(huffman, x) < 3.2
    measured = fmt.encode(x)
    assert measured.decode().equal(fmt.quantise(x)) and measured.bits_per_element < bits(fmt, x) + 0.1


def test_rotation(x):
    fmt = F.Scaled(4, "int", Q.BFLOAT16, TENSOR, "rms", rotation=123).fit(x)
    assert type(fmt) is Q.RandomRotationFormat and bits(fmt, x) == 4 + 16 / N and Q.qrmse_norm(fmt, x) < 0.14
    square = x.reshape(256, 256)
    spiky = square.clone()
    spiky[:, 7] *= 50
    plain = F.Scaled(4, "int", Q.BFLOAT16, (None, None), "absmax", "moments")
    rotated = dataclasses.replace(plain, rotation=0).fit(spiky)  # 0 is a seed
    assert type(rotated) is Q.RandomRotationFormat and rotated.dims == (0, 1)
    assert Q.qrmse_norm(rotated, spiky) < Q.qrmse_norm(plain.fit(spiky), spiky)


def test_lloyd_max_in_blocks(x):
    fmt = F.Scaled(4, "lloyd_max", Q.BFLOAT16, (32,), "signmax").fit(x)
    assert bits(fmt, x) == 4.5 and Q.qrmse_norm(fmt, x) < 0.081
    assert type(fmt) is Q.LinearScalingFormat and fmt.element_format.range == (-1, 1)


@pytest.mark.parametrize("family", ["int", "fp", "normal", "laplace", "t", "lloyd_max"])
def test_families(family, x):
    sparse = {"sparse_format": Q.FP32, "sparse_ratio": 2**-8}
    for block, scaling, more, nominal in (
        (TENSOR, "rms", {}, 4),
        ((16,), "rms", sparse, 5.25),
        ((32,), "absmax", {}, 4.5),
    ):
        fmt = F.Scaled(4, family, Q.BFLOAT16, block, scaling, **more).fit(x)
        assert abs(bits(fmt, x) - nominal) < 0.1 and Q.qrmse_norm(fmt, x) < 0.12
        assert fmt.encode(x).decode().equal(fmt.quantise(x))


def test_three_values_in_eight_bits():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        w = torch.randn(64, 128).bfloat16()
    fmt = F.Scaled(8 / 3, "s3d8", Q.BFLOAT16, (1, None), "absmax").fit(w)
    assert type(fmt) is Q.LinearScalingFormat and type(fmt.element_format) is Q.Sign3D8Format
    assert 0.15 < Q.qrmse_norm(fmt, w) < 0.25 and fmt.quantise(w).dtype == torch.bfloat16


def test_vectors_beat_scalars(x):
    scalar = F.Scaled(3, "lloyd_max", Q.BFLOAT16, (32,), "absmax").fit(x)
    vectors = F.Scaled(3, "lloyd_max", Q.BFLOAT16, (32,), "absmax", vq_length=2, vq_format=Q.BFLOAT16).fit(x)
    assert Q.qrmse_norm(vectors, x) < Q.qrmse_norm(scalar, x)
    assert bits(vectors, x) == 3.5 + 64 * 2 * 16 / N


@pytest.mark.parametrize("scaling", ["rms", "absmax", "signmax"])
@pytest.mark.parametrize("family", ["int", "fp", "t"])
def test_the_search_finds_what_trials_find(family, scaling):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        w = torch.distributions.StudentT(4.0).sample((64, 96)) * torch.rand(64, 1)
        weight = torch.rand(64, 96) ** 4
    args = {"mode": "asymmetric"} if (family, scaling) == ("t", "signmax") else {}
    spec = F.Scaled(4, family, Q.BFLOAT16, (1, 32), scaling, args=args)
    for error_weight in (None, weight):
        found = spec.fit(w, error_weight)
        best = float("inf")
        for elements in spec._candidates():
            for factor in F._FACTORS:
                scaled = Q.ScaledFormat.create(elements, spec._base_factor(elements) * factor, elements.range)
                trial = Q.LinearScalingFormat(scaled, Q.BFLOAT16, (1, 32), scaling)
                best = min(best, float(Q.qrmse_norm(trial, w, error_weight)))
        assert float(Q.qrmse_norm(found, w, error_weight)) == pytest.approx(best, rel=1e-4)


def test_weights_matter(x):
    w = x.reshape(256, 256)
    weight = (w.abs() > 5).float() + 1e-3
    for family in ("int", "lloyd_max"):
        spec = F.Scaled(3, family, Q.BFLOAT16, (None, None), "rms")
        plain, weighted = spec.fit(w), spec.fit(w, weight)
        assert Q.qrmse_norm(weighted, w, weight) < Q.qrmse_norm(plain, w, weight)
        assert Q.qrmse_norm(weighted, w) > Q.qrmse_norm(plain, w)


def test_moments_and_whole_dimensions(x):
    w = x.reshape(256, 256)
    moments = F.Scaled(4, "normal", Q.BFLOAT16, (1, None), "absmax", "moments").fit(w)
    assert moments.element_format == Q.ScaledFormat.create(
        Q.crd_normal(4), 1
    )  # a whole row is no block of known size
    block = F.Scaled(4, "normal", Q.BFLOAT16, (1, 64), "absmax", "moments").fit(w)
    assert block.element_format == Q.ScaledFormat.create(Q.crd_block_normal(4, 64), 1)
    factor = F.Scaled(4, "int", Q.BFLOAT16, (None, None), "rms", "moments").fit(w).element_format.scale
    assert factor == pytest.approx(3**0.5 / 7)


def test_arguments_take_the_place_of_searches(x):
    w = x.reshape(256, 256)
    floats = F.Scaled(4, "fp", Q.BFLOAT16, (None, None), "rms", args={"exponent_bits": 3}).fit(w)
    assert floats.element_format.format == Q.FPFormat.create(3, 0)
    student = F.Scaled(4, "t", Q.BFLOAT16, (None, None), "rms", args={"df": 5}).fit(w)
    assert student.element_format.format == Q.crd_t(4, 5)
    spec = F.Scaled(8 / 3, "s3d8", Q.BFLOAT16, (1, None), "absmax", args={"threshold": 0.5})
    assert type(spec.fit(w).element_format) is Q.Sign3D8Format
    with pytest.raises(ValueError, match="scaling: got rms, expected absmax"):
        dataclasses.replace(spec, scaling="rms").fit(w)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"element_family": "int"}, True),
        ({"element_family": "int", "scaling_match": "moments"}, False),
        ({"element_family": "int", "compressor": "optimal"}, False),
        ({"element_family": "int", "rotation": 1}, False),
        ({"element_family": "fp", "scaling_match": "moments"}, True),
        ({"element_family": "fp", "scaling_match": "moments", "args": {"exponent_bits": 2}}, False),
        ({"element_family": "t", "scaling_match": "moments"}, True),
        ({"element_family": "t", "scaling_match": "moments", "args": {"df": 5}}, False),
        ({"element_family": "lloyd_max", "scaling_match": "moments"}, True),
        ({"element_family": "lloyd_max", "vq_length": 2, "vq_format": Q.FP32}, False),
        ({"element_family": "s3d8"}, False),
    ],
)
def test_where_errors_can_be_weighted(more, expected):
    spec = F.Scaled(4, scale_format=Q.FP32, block_shape=(1, 64), scaling="absmax", **more)
    assert spec.supports_error_weight is expected


def test_what_is_refused(x):
    with pytest.raises(ValueError, match="element_family"):
        F.Scaled(4, "cauchy", Q.BFLOAT16, TENSOR, "rms")
    with pytest.raises(ValueError, match="compressor"):
        F.Scaled(4, "t", Q.BFLOAT16, TENSOR, "rms", compressor="optimal")
    with pytest.raises(ValueError, match="tensor"):
        F.Scaled(4, "t", Q.BFLOAT16, TENSOR, "rms").fit(x[:0])
    with pytest.raises(ValueError, match="vq_length"):
        F.Scaled(4, "t", Q.BFLOAT16, TENSOR, "rms", vq_length=2)
    with pytest.raises(ValueError, match="sparse_format"):
        F.Scaled(4, "t", Q.BFLOAT16, TENSOR, "rms", sparse_ratio=0.1)
    with pytest.raises(ValueError, match="error_weight"):
        F.Scaled(4, "int", Q.BFLOAT16, TENSOR, "rms", rotation=1).fit(x, x.abs())
    with pytest.raises(ValueError, match="error_weight"):
        F.Scaled(4, "int", Q.BFLOAT16, TENSOR, "rms").fit(x, x.abs()[:5])
    with pytest.raises(ValueError, match="block_shape"):
        F.Scaled(4, "int", Q.BFLOAT16, (33,), "rms").fit(x)
    with pytest.raises(ValueError, match="element_bits"):
        F.Scaled(2, "fp", Q.BFLOAT16, TENSOR, "rms").fit(x)


def test_values_that_repeat_take_fewer_bits():
    """No grid reaches the entropy that is asked for: the smallest one that tells the values apart."""
    spec = F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms", compressor="optimal")
    for values, points in (
        (torch.zeros(8, 8), 3),
        (torch.ones(8, 8), 3),
        (torch.arange(4.0).repeat(4, 4), 9),
    ):
        fmt = spec.fit(values)
        assert len(fmt.element_format.lut.values) == points
        assert fmt.quantise(values).sub(values).abs().max() < 0.5
        assert fmt.encode(values).decode().equal(fmt.quantise(values))
        assert fmt.count_bits_tensor(values) / values.numel() < 3
    many = torch.linspace(-1, 1, 1 << 21)
    with pytest.raises(ValueError, match="element_bits"):
        F.Scaled(21, "int", Q.FP32, (None,), "rms", compressor="optimal").fit(many)
