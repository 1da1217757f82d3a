"""Encoded tensors: the bits of quantise, measured sizes, files, hostile bytes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import quantloom.formats as Q

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits_of(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def sample(rng, shape=(24, 96), dtype=torch.float32):
    x = torch.tensor(rng.standard_normal(shape), dtype=dtype)
    x.reshape(-1)[: x.numel() // 50] *= 20
    return x


def formats():
    x = sample(np.random.default_rng(5))
    table = torch.tensor(Q.crd_normal(3).values)
    vectors = Q.VectorLUTFormat.create(torch.cartesian_prod(table, table), Q.BFLOAT16, "product")
    grid = Q.CompressedLUTFormat.train_grid(x, 0.4)
    yield from map(Q.parse, ("FP32", "FP16", "BFLOAT16", "E2M1", "UE3M2", "E4M3-RI", "E0M3", "EXP5", "E5M10"))
    yield from (Q.IntFormat(3.17), Q.IntFormat(3, "symmetric"), Q.TorchFormat("int8"), Q.NF4, Q.crd_t(2.6, 5))
    yield from (Q.TorchFormat("float8_e4m3fn"), Q.LUTFormat((0.25,), "one"), vectors, grid)
    yield from (Q.ScaledFormat.create(Q.NF4, 0.3), Q.ScaledFormat.create(Q.FP16, 0.3))
    yield Q.CompressedLUTFormat(grid.lut, grid.model_logp, "huffman")
    for elements in (
        Q.NF4,
        vectors,
        grid,
        Q.ScaledFormat.create(Q.parse("E2M1"), 1.3),
        Q.TorchFormat("int8"),
    ):
        for block in ((1, 32), (None, None), (8, 6)):
            for scaling in ("absmax", "rms", "signmax"):
                yield Q.LinearScalingFormat(elements, Q.BFLOAT16, block, scaling)
    inner = Q.LinearScalingFormat(Q.crd_block_t(3, 32, 7), Q.parse("UE5M3-RI"), (1, 32), "absmax")
    rotated = Q.RandomRotationFormat(inner, (0, 1), 11)
    yield from (rotated, Q.SparseFormat(inner, Q.FP16, 0.01), Q.SparseFormat(rotated, Q.BFLOAT16, 0.0))
    yield Q.scaled_int8_3d8_lloyd_max(x, Q.BFLOAT16, (1, None), 1e-2)


@pytest.mark.parametrize("fmt", list(formats()), ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_gives_the_bits_of_quantise(fmt, dtype, rng):
    x = sample(rng, dtype=dtype)
    quantised = fmt.quantise(x)
    encoded = fmt.encode(x)
    decoded = encoded.decode()
    assert decoded.dtype == dtype and bits_of(decoded).equal(bits_of(quantised))
    again = Q.Encoded.from_bytes(encoded.to_bytes())
    assert again.format == fmt and again.shape == (24, 96)
    assert bits_of(again.decode()).equal(bits_of(quantised))
    assert again.size_in_bits == encoded.size_in_bits == sum(8 * p.nbytes for p in encoded.planes.values())
    turned = fmt.encode(x.T.contiguous().T).decode()
    assert bits_of(turned).equal(bits_of(quantised))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (0, 32), (3, 5, 32), (1, 1)])
def test_odd_shapes(shape, rng):
    x = torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
    for elements in (Q.NF4, Q.parse("E2M1"), Q.BFLOAT16):
        e = elements.encode(x)
        assert e.decode().equal(elements.quantise(x))
        fmt = Q.LinearScalingFormat(elements, Q.FP16, (None,) * len(shape), "absmax")
        assert fmt.encode(x).decode().equal(fmt.quantise(x)) and fmt.quantise(x).shape == x.shape


def test_measured_sizes(rng):
    x = sample(rng, (256, 512))
    for fmt, over in (
        (Q.LinearScalingFormat(Q.parse("E2M1"), Q.BFLOAT16, (1, 64), "absmax"), 0),
        (Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, 64), "absmax"), 16 * 32),  # the table
        (Q.LinearScalingFormat(Q.IntFormat(math.log2(9)), Q.BFLOAT16, (1, 64), "absmax"), 0.031 * x.numel()),
    ):
        nominal, measured = fmt.count_bits_tensor(x), fmt.encode(x).size_in_bits
        assert nominal <= measured + 64 <= nominal + over + 64 + 64
    nine = Q.IntFormat(math.log2(9)).encode(x)  # 20 codes in 64 bits, not 4 bits each
    assert nine.bits_per_element == pytest.approx(3.2, abs=0.01)
    outliers = Q.SparseFormat(Q.parse("E2M1"), Q.BFLOAT16, 2**-8)
    assert outliers.encode(x).size_in_bits < outliers.count_bits((256, 512))


@pytest.mark.parametrize("compressor, over", [("optimal", 0.03), ("huffman", 0.05)])
def test_streams_are_near_their_count(compressor, over, rng):
    x = torch.tensor(rng.standard_normal((512, 1024)), dtype=torch.float32)
    fmt = Q.CompressedLUTFormat.train_grid(x, 0.3, compressor=compressor)
    counted = fmt.count_bits_tensor(x) / x.numel()
    assert counted - 0.01 <= fmt.encode(x).bits_per_element <= counted + over


def test_files(tmp_path, rng):
    x = sample(rng)
    fmt = Q.SparseFormat(Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, 32), "absmax"), Q.FP16, 0.01)
    fmt.encode(x).save(tmp_path / "x.safetensors")
    loaded = Q.Encoded.load(tmp_path / "x.safetensors")
    assert loaded.format == fmt and loaded.decode().equal(fmt.quantise(x))
    assert {"format.element_format.codes", "format.element_format.codebook", "outlier_indices"} <= set(
        loaded.planes
    )
    import quantloom as ql

    ql.save_tensors(tmp_path / "y.safetensors", {"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"quantloom\.encoded"):
        Q.Encoded.load(tmp_path / "y.safetensors")
    with pytest.raises(OSError):
        Q.Encoded.load(tmp_path / "none.safetensors")


def test_what_is_not_encoded(rng):
    with pytest.raises(ValueError, match="NaN"):
        Q.NF4.encode(torch.tensor([1.0, torch.nan]))
    with pytest.raises(TypeError, match="float64"):
        Q.NF4.encode(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="NumPy"):
        Q.NF4.encode(np.zeros(3))


def survives(data):
    """Bytes load and decode, or end in ValueError."""
    try:
        return Q.Encoded.from_bytes(data).decode()
    except ValueError:
        return None


HOSTILE = [
    Q.SparseFormat(Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, 32), "absmax"), Q.FP16, 0.01),
    Q.LinearScalingFormat(Q.IntFormat(3.17), Q.parse("UE4M3"), (2, None), "rms"),
    Q.VectorLUTFormat.create([(0.0, 1), (1, 0), (-1, -1)], Q.BFLOAT16, "three"),
    Q.CompressedLUTFormat.train_grid(torch.linspace(-3, 3, 100), 0.5),
]


@pytest.mark.parametrize("fmt", HOSTILE, ids=str)
def test_hostile_bytes_end_in_value_errors(fmt, rng):
    data = fmt.encode(sample(rng)).to_bytes()
    assert survives(data) is not None
    for cut in (0, 1, 8, 9, len(data) // 2, len(data) - 1):
        assert survives(data[:cut]) is None
    for _ in range(300):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        survives(bytes(broken))


@pytest.mark.parametrize("fmt", HOSTILE, ids=str)
def test_hostile_planes_and_descriptions(fmt, rng):
    e = fmt.encode(sample(rng))
    for name, plane in e.planes.items():
        for other in (plane[:-1], plane.reshape(1, -1), plane.float() + 0.5, torch.cat([plane, plane])):
            planes = {**e.planes, name: other.contiguous()}
            with pytest.raises(ValueError):
                Q.Encoded(fmt, e.shape, e.dtype, planes).decode()
        without = {key: value for key, value in e.planes.items() if key != name}
        with pytest.raises(ValueError):
            Q.Encoded.from_planes(e.describe(), without).decode()
    fields = json.loads(e.describe())
    changes = [
        {"version": 2},
        {"dtype": "int8"},
        {"shape": [24, -96]},
        {"shape": [2**47, 2**47]},
        {"shape": "24"},
        {"format": {"_type": "nothing"}},
        {"format": [1]},
        {"format": 7},
        {"more": 1},
    ]
    for change in changes:
        with pytest.raises(ValueError):
            Q.Encoded.from_planes(json.dumps({**fields, **change}), e.planes)
    with pytest.raises(ValueError):
        Q.Encoded.from_planes("[" * 100000, e.planes)
    for shape in ([24, 97], [2**30, 2**10], [1]):
        with pytest.raises(ValueError):
            Q.Encoded.from_planes(json.dumps({**fields, "shape": shape}), e.planes).decode()


def test_codes_beyond_the_table_are_refused():
    three = Q.LUTFormat((0.0, 1.0, 2.0), "three")
    e = three.encode(torch.tensor([0.0, 1, 2, 0]))
    e.planes["codes"][:] = 255
    with pytest.raises(ValueError, match="codes"):
        e.decode()
    with pytest.raises(ValueError, match="codebook"):
        Q.Encoded(Q.LUTFormat((0.0, 1.0, 3.0), "other"), (4,), "float32", e.planes).decode()


JUNK = [None, True, -1, 0, 1, 3, 1.5, 1e308, 2**40, 2**70, "", "lut", "E2M1", [], [1], [[1, 2], [3]], {}]
JUNK += [{"_type": "lut"}, {"plane": "codebook"}, {"_type": "fit_scaled"}, "float32", "rms"]
JUNK += [{"_type": "tensor", "data": [1], "shape": [1], "dtype": "float32"}]


def places_in(node, path=()):
    """Paths to all nodes of a description."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places_in(value, (*path, key))


@pytest.mark.parametrize("fmt", HOSTILE, ids=str)
def test_changed_descriptions_end_in_value_errors(fmt, rng):
    e = fmt.encode(sample(rng))
    for path in places_in(json.loads(e.describe())):
        for value in JUNK:
            fields = node = json.loads(e.describe())
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            try:
                Q.Encoded.from_planes(json.dumps(fields), e.planes).decode()
            except ValueError as error:
                assert str(error)


def test_files_of_many_tensors(tmp_path, rng):
    matrix = torch.from_numpy(rng.standard_normal((8, 64)).astype("float32"))
    blocks = Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, 64), "absmax")
    grid = Q.CompressedLUTFormat.train_grid(matrix, 0.3)
    content = {
        "a.weight": blocks.encode(matrix),
        "b.weight": grid.encode(matrix.bfloat16()),
        "norm": matrix[0],
    }
    file = tmp_path / "model.safetensors"
    Q.save_encoded(file, content, {"made": "here"})
    first = file.read_bytes()
    Q.save_encoded(file, content, {"made": "here"})
    assert file.read_bytes() == first
    loaded = Q.load_encoded(file)
    assert list(loaded) == ["a.weight", "b.weight", "norm"]
    assert loaded["norm"].equal(matrix[0])
    assert loaded["a.weight"].format == blocks
    assert loaded["a.weight"].decode().equal(blocks.quantise(matrix))
    assert loaded["b.weight"].decode().equal(grid.quantise(matrix.bfloat16()))
    Q.save_encoded(file, {})
    assert Q.load_encoded(file) == {}
    for bad in ("", "a:b"):
        with pytest.raises(ValueError, match="colon"):
            Q.save_encoded(file, {bad: matrix})
    with pytest.raises(TypeError, match="Encoded"):
        Q.save_encoded(file, {"a": 3})
    with pytest.raises(TypeError, match="mapping"):
        Q.save_encoded(file, [matrix])
    with pytest.raises(ValueError, match="metadata"):
        Q.save_encoded(file, content, {"quantloom": "x"})
    with pytest.raises(FileNotFoundError):
        Q.load_encoded(tmp_path / "none")
    content["a.weight"].save(file)
    with pytest.raises(ValueError, match="save_encoded"):
        Q.load_encoded(file)


def test_damaged_files_of_many_tensors(tmp_path):
    from quantloom.tensors import save_tensors

    file = tmp_path / "model.safetensors"
    item = Q.IntFormat(3).encode(torch.ones(4))
    description = item.describe()
    good = '{"w":' + description + "}"
    planes = {"w:codes": item.planes["codes"]}
    save_tensors(file, planes, {"quantloom.encoded_tensors": good})
    assert Q.load_encoded(file)["w"].decode().equal(torch.ones(4))
    for names, text in (
        (planes, "[]"),
        (planes, "{"),
        (planes, "{}"),
        (planes, '{"w":3}'),
        (planes, "[" * 100_000),
        ({"v:codes": item.planes["codes"]}, good),
    ):
        save_tensors(file, names, {"quantloom.encoded_tensors": text})
        with pytest.raises(ValueError, match=r"model\.safetensors|encoded_tensors"):
            Q.load_encoded(file)
    save_tensors(file, {}, {"quantloom.encoded_tensors": good})
    with pytest.raises(ValueError, match="codes"):
        Q.load_encoded(file)["w"].decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_in_torch_operations_is_that_of_the_cpu(dtype):
    """What CUDA tensors are decoded with."""
    from quantloom.formats import _numerics

    generator = torch.Generator().manual_seed(11)
    for fmt in (Q.NF4, Q.parse("E2M1"), Q.parse("E0M7"), Q.parse("E5M14"), Q.ScaledFormat.create(Q.NF4, 0.3)):
        elements = fmt._codes_of()._elements()
        codes = torch.randint(0, min(elements.count, 2**24), (12, 30), generator=generator, dtype=torch.int32)
        scales = torch.randn(4, 5, generator=generator)
        for grid in (None, _numerics.Grid(scales, 3, 6)):
            expected = _numerics.decode(elements, codes, (12, 30), dtype, grid, fmt._factor)
            assert _numerics._decode_reference(elements, codes, dtype, grid, fmt._factor).equal(expected)
