"""Files of KVQuant's tables: one of a released version, and damaged ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import quantloom as ql

GOLDEN = Path(__file__).parent.parent / "golden" / "kvquant-0.1.safetensors"
FIELDS = ("key_bounds", "key_values", "value_bounds", "value_values", "key_scale", "key_middle")


def halves(x):
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def calibration(rotary=True):
    """The content of the golden file, by formulas."""
    layers = []
    for index in range(2):
        tables = [halves(np.linspace(-1, 1, 8) ** power) for power in (1 + 2 * index, 1)]
        key_bounds, value_bounds = ((x[1:] + x[:-1]) / 2 for x in tables)
        channels = np.arange(2 * 16).reshape(2, 16) + 32 * index
        scale, middle = halves(0.5 + channels / 64), halves(channels / 128 - 0.25)
        layers.append(ql.kv.KVTables(key_bounds, tables[0], value_bounds, tables[1], scale, middle))
    frequencies = (0.25 ** np.arange(8)).astype(np.float32)
    found = ql.kv.RotaryEmbedding(frequencies, 1.25) if rotary else None
    return ql.kv.KVCalibration(ql.kv.parse_kv_format("kvquant:3:2%:r32"), layers, found)


def contents(path):
    """Tensors and metadata of a file."""
    tensors = {name: np.array(x) for name, x in ql.load_tensors(path).items()}
    return tensors, json.loads(ql.tensors.load_metadata(path)["kv_cache"])


def write(path, tensors, about):
    ql.save_tensors(path, tensors, {"kv_cache": about if isinstance(about, str) else json.dumps(about)})


def test_the_golden_file_is_read_and_written_again(tmp_path):
    loaded, made = ql.kv.KVCalibration.load(GOLDEN), calibration()
    assert loaded.format == made.format
    assert loaded.rotary.scaling == 1.25
    np.testing.assert_array_equal(loaded.rotary.inverse_frequencies, made.rotary.inverse_frequencies)
    for a, b in zip(loaded.layers, made.layers, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for each in (loaded, made):
        each.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == GOLDEN.read_bytes()
    calibration(rotary=False).save(tmp_path / "plain")
    assert ql.kv.KVCalibration.load(tmp_path / "plain").rotary is None


def test_bad_calibrations_are_refused_by_name(tmp_path):
    made = calibration()
    with pytest.raises(TypeError, match="layers: got int"):
        ql.kv.KVCalibration(made.format, 5)
    with pytest.raises(TypeError, match="layers: number 0 is int"):
        ql.kv.KVCalibration(made.format, (5,))
    with pytest.raises(TypeError, match="rotary: got int"):
        ql.kv.KVCalibration(made.format, made.layers, 5)
    with pytest.raises(ValueError, match="layer: got 2, expected one below 2"):
        made.core_tables(2, 8)
    with pytest.raises(ValueError, match="layer: got -1"):
        made.core_tables(-1, 8)
    with pytest.raises(ValueError, match="positions: got -8"):
        made.core_tables(0, -8)
    tensors, about = contents(GOLDEN)
    without = {name: value for name, value in about.items() if name != "scaling"}
    for more, said in (({}, without), ({"more": np.zeros(1, np.float32)}, about)):
        write(tmp_path / "file", tensors | more, said)
        with pytest.raises(ValueError, match=r"holds \d+ tensors, expected"):
            ql.kv.KVCalibration.load(tmp_path / "file")


def test_every_shorter_file_is_refused(tmp_path):
    data, path = GOLDEN.read_bytes(), tmp_path / "short"
    for size in [*range(1200), *range(1200, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises((ValueError, OSError)):
            ql.kv.KVCalibration.load(path)


def assert_works(loaded, rng):
    """A cache takes the tables of every layer."""
    for index, layer in enumerate(loaded.layers):
        heads, dim = layer.key_scale.shape
        cache = ql.kv.KVCache(loaded.format, 1, heads, dim, tables=loaded.core_tables(index, 8))
        x = rng.standard_normal((1, heads, 8, dim)).astype(np.float16)
        cache.append(x, x)
        assert cache.lengths == [8]


def test_damaged_bytes_are_found(tmp_path, rng):
    """Of tensors all; of the header all but a few, which change metadata to others that are right."""
    data, path, taken = np.frombuffer(GOLDEN.read_bytes(), np.uint8), tmp_path / "damaged", []
    for place in rng.permutation(data.size)[:600]:
        damaged = data.copy()
        damaged[place] ^= rng.integers(1, 256)
        path.write_bytes(damaged.tobytes())
        try:
            loaded = ql.kv.KVCalibration.load(path)
        except (ValueError, OSError) as error:
            assert "damaged" in str(error)
            continue
        assert_works(loaded, rng)
        taken.append(place)
    header = 8 + int.from_bytes(data[:8].tobytes(), "little")
    assert all(place < header for place in taken)
    assert len(taken) < 60


def test_hostile_files_are_refused_or_hold_tables_that_work(tmp_path, rng):
    """Whatever the content is: an error that names the file, or tables that a cache takes."""
    path, taken = tmp_path / "hostile", 0
    for _ in range(300):
        tensors, about = contents(GOLDEN)
        name = str(rng.choice(sorted(tensors)))
        kind = rng.integers(4)
        if kind == 0:  # any numbers
            flat = tensors[name].view(np.uint32).reshape(-1)
            flat[rng.integers(flat.size)] ^= np.uint32(1) << rng.integers(32, dtype=np.uint32)
        elif kind == 1:  # any shape
            tensors[name] = np.resize(tensors[name], rng.integers(0, 20, int(rng.integers(0, 3))))
        elif kind == 2:
            tensors[name] = tensors[str(rng.choice(sorted(tensors)))]
        text = bytearray(json.dumps(about).encode())
        if kind == 3:
            text[rng.integers(len(text))] = rng.integers(32, 127)
        write(path, tensors, text.decode())
        try:
            loaded = ql.kv.KVCalibration.load(path)
        except ValueError as error:
            assert "hostile" in str(error)
            continue
        taken += 1
        assert_works(loaded, rng)
    assert 10 < taken < 290


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("key_bounds", lambda x: x[:-1], "key_bounds: got 6 numbers, expected 7"),
        ("key_values", lambda x: np.append(x, x[-1:]), "key_values: got 9 numbers, expected 8"),
        ("key_values", lambda x: x * 1.0001, "float16"),
        ("value_bounds", lambda x: x[::-1].copy(), "rising"),
        ("value_values", lambda x: x * np.float32(np.nan), "finite"),
        ("value_values", lambda x: x.astype(np.float64), "value_values: got float64, expected .* float32"),
        ("value_values", lambda x: x[None], r"value_values: got shape \[1, 8\], expected \[2\*\*bits\]"),
        ("key_scale", lambda x: x * 0, "above 0"),
        ("key_scale", lambda x: -x, "above 0"),
        ("key_scale", lambda x: x.ravel(), r"\[kv_heads, head_dim\]"),
        ("key_scale", lambda x: x[:, :8].copy(), r"\[kv_heads, head_dim\]"),
        ("key_middle", lambda x: x + np.float32(np.inf), "finite"),
        ("key_middle", None, "key_middle"),
    ],
)
def test_wrong_tables_are_refused_by_name(tmp_path, name, change, reason):
    path = tmp_path / "wrong"
    tensors, about = contents(GOLDEN)
    tensor = tensors.pop(f"layers.1.{name}")
    if change is not None:
        tensors[f"layers.1.{name}"] = change(tensor)
    write(path, tensors, about)
    with pytest.raises(ValueError, match=f"wrong: not a calibration of a KV cache: .*{reason}"):
        ql.kv.KVCalibration.load(path)


@pytest.mark.parametrize(
    ("frequencies", "reason"),
    [
        (np.zeros((2, 4), np.float32), "inverse_frequencies"),
        (np.zeros(0, np.float32), "inverse_frequencies"),
        (np.zeros(9, np.float32), "rotated"),
        (np.full(8, np.nan, np.float32), "finite"),
    ],
)
def test_wrong_frequencies_are_refused(tmp_path, frequencies, reason):
    path = tmp_path / "wrong"
    tensors, about = contents(GOLDEN)
    write(path, tensors | {"inverse_frequencies": frequencies}, about)
    with pytest.raises(ValueError, match=reason):
        ql.kv.KVCalibration.load(path)


@pytest.mark.parametrize(
    "about",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"layers": 2}',
        {"layers": 3},
        {"layers": 10**15},
        {"layers": -1},
        {"layers": 1.5},
        {"layers": "2"},
        {"scaling": "much"},
        {"scaling": None},
        {"scaling": 0.0},
        {"scaling": -1.0},
        {"scaling": 1e300},
        {"format": {}},
        {"format": "kvquant:3"},
        {"format": {"kv_cache": "kivi"}},
    ],
)
def test_wrong_metadata_is_refused(tmp_path, about):
    path = tmp_path / "wrong"
    tensors, right = contents(GOLDEN)
    write(path, tensors, right | about if isinstance(about, dict) else about)
    with pytest.raises(ValueError, match="wrong: not a calibration of a KV cache"):
        ql.kv.KVCalibration.load(path)
