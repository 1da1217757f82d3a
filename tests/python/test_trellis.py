"""Trellis codes: codebooks, rings, the format and its distortion, against NumPy by the definition."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import trellis
from quantloom._trellis_search import PUBLISHED
from quantloom.cli import app
from typer.testing import CliRunner

CODEBOOKS = [
    *("3inst", "mcg", "mcg-CAF6A435", "mul1", "mul1-AD9A2EC5", "1mad"),
    *("octagon", "octagon-9E3779B1", "hyb", "rptc", "rptc2"),
]


DEFAULTS = {"mcg": "CBAC1FED", "mul1": "83DCD12D", "octagon": "F3C14DB7"}


def halves(words: np.ndarray) -> np.ndarray:
    masked = (words & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    low = (masked & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
    high = (masked >> np.uint32(16)).astype(np.uint16).view(np.float16)
    return (low + high).astype(np.float32)


def byte_sums(words: np.ndarray) -> np.ndarray:
    return words.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.int64)


def reference_values(name: str, window: int) -> np.ndarray:
    """Weights of all states by float16 arithmetic of NumPy."""
    s = np.arange(1 << window, dtype=np.uint32)
    code, _, hexadecimal = name.partition("-")
    multiplier = np.uint32(int(hexadecimal or DEFAULTS.get(code, "1"), 16))
    with np.errstate(over="ignore"):
        if code == "3inst":
            return halves(np.uint32(89226354) * s + np.uint32(64248484))
        if code == "mcg":
            return halves(multiplier * s)
        if code == "1mad":
            sums = byte_sums(np.uint32(34038481) * s + np.uint32(76625530))
            return ((sums - 510) / 147.800537109375).astype(np.float16).astype(np.float32)
        if code == "octagon":
            centered = 2 * (multiplier * s).view(np.uint8).reshape(-1, 4).astype(np.int64) - 255
            pairs = centered @ np.array([[99, 0], [0, 99], [70, 70], [70, -70]])
            return (pairs * 203 / 2.0**22).astype(np.float16).astype(np.float32)
        exact = (1024 + byte_sums(multiplier * s)) * 0.00676727294921875 - 10.3828125
    return exact.astype(np.float16).astype(np.float32)


def reference_states(words: np.ndarray, bits: float, window: int, per_step: int) -> np.ndarray:
    """The states of one ring, from its string of bits."""
    stream = "".join(f"{int(word):032b}" for word in words)
    steps = 256 // per_step
    ends = [math.floor((i + 1) * bits * per_step) for i in range(steps)]
    doubled = stream + stream
    return np.array([int(doubled[e + len(stream) - window : e + len(stream)], 2) for e in ends])


def reference_decode(q: ql.PackedTensor) -> np.ndarray:
    form = q.format
    if not q.shape[0] * q.shape[1]:
        return np.zeros(q.shape)
    values = trellis.codebook(form.codebook, form.window).values
    planes = {name: np.asarray(plane) for name, plane in q.planes.items()}
    tile_columns, tile_rows, _ = planes["codes"].shape
    inner = np.zeros((16 * tile_rows, 16 * tile_columns))
    p = np.arange(256)
    row = (p // 32) + 8 * ((p // 4) % 2)
    column = 2 * ((p // 8) % 4) + p % 2 + 8 * ((p // 2) % 2)
    for i in range(tile_columns):
        for j in range(tile_rows):
            words = planes["codes"][i, j].view(np.uint32)
            weights = values[reference_states(words, form.bits, form.window, values.shape[1])].reshape(-1)
            inner[16 * j + row, 16 * i + column] = weights
    if form.rotation:
        h = ql.hadamard_matrix(128) / math.sqrt(128)
        for axis in (0, 1):
            blocks = np.moveaxis(inner, axis, 0).reshape(-1, 128, inner.shape[1 - axis])
            inner = np.moveaxis((h @ blocks).reshape(-1, inner.shape[1 - axis]), 0, axis)
    n, k = q.shape
    outputs, inputs = planes["output_scales"].astype(np.float64), planes["input_scales"].astype(np.float64)
    return outputs[:, None] * inner[:n, :k] * inputs


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("window", [15, 16])
def test_codebooks(name, window):
    book = trellis.codebook(name, window)
    assert book.name == name
    per_step = 2 if name.startswith(("hyb", "rptc2", "octagon")) else 1
    assert book.values.shape == (1 << window, per_step)
    np.testing.assert_array_equal(book.values, book.values.astype(np.float16).astype(np.float32))
    assert book.rms == pytest.approx(math.sqrt(np.square(book.values, dtype=np.float64).mean()), rel=1e-12)
    if name not in ("hyb", "rptc", "rptc2"):
        np.testing.assert_array_equal(
            book.values.squeeze(1) if per_step == 1 else book.values, reference_values(name, window)
        )
    if name == "rptc":
        np.testing.assert_allclose(np.sort(book.values[:, 0]), -np.sort(book.values[:, 0])[::-1], atol=1e-6)


def test_names():
    assert set(trellis.codebook_names()) <= set(CODEBOOKS)
    assert trellis.codebook("mcg-cbac1fed").name == "mcg"
    for bad in ("", "mul", "mul1-", "1mad-83DCD12D", "mcg-00000002"):
        with pytest.raises(ValueError, match="codebook"):
            trellis.codebook(bad)
    with pytest.raises(ValueError, match="window"):
        trellis.codebook("hyb", 12)


@pytest.mark.parametrize(
    ("name", "bits", "window"), [("mul1", 2, 16), ("3inst", 2.5, 12), ("hyb", 1.5, 16), ("rptc", 6, 10)]
)
def test_rings(rng, name, bits, window):
    book = trellis.codebook(name, window)
    targets = (book.rms * rng.standard_normal((5, 256))).astype(np.float32)
    states = trellis.encode(targets, bits, name, window)
    words = trellis.pack(states, bits, name, window)
    assert words.shape == (5, 8 * bits)
    np.testing.assert_array_equal(trellis.unpack(words, bits, name, window), states)
    for ring in range(5):
        expected = reference_states(words[ring], bits, window, book.values.shape[1])
        np.testing.assert_array_equal(states[ring], expected)
    weights = trellis.decode(states, bits, name, window)
    np.testing.assert_array_equal(weights, book.values[states].reshape(5, 256))
    assert np.mean((weights - targets) ** 2) < 4 * book.rms**2 * 4.0**-bits
    again = trellis.encode(weights, bits, name, window)
    np.testing.assert_array_equal(trellis.decode(again, bits, name, window), weights)
    for search in trellis.SEARCHES:
        a, b = (trellis.encode(targets, bits, name, window, search, threads) for threads in (1, 4))
        np.testing.assert_array_equal(a, b)


def test_random_words_are_rings(rng):
    words = rng.integers(0, 2**32, (3, 24), dtype=np.uint32)
    states = trellis.unpack(words, 3)
    np.testing.assert_array_equal(trellis.pack(states, 3), words)
    weights = trellis.decode(states, 3)
    np.testing.assert_array_equal(trellis.decode(trellis.encode(weights, 3), 3), weights)


def test_rings_refuse():
    targets = np.zeros((2, 256), np.float32)
    for arguments, error, words in [
        ((targets.astype(np.float64), 2), TypeError, "targets.*float64.*float32"),
        ((targets[0], 2), ValueError, "targets.*ring"),
        ((targets[:, :255], 2), ValueError, "length"),
        ((targets, 2.3), ValueError, "bits"),
        ((targets, 2, "no"), ValueError, "codebook"),
        ((targets, 2, "mul1", 16, "slow"), ValueError, "search"),
        ((targets + np.nan, 2), ValueError, "targets.*row 0"),
    ]:
        with pytest.raises(error, match=words):
            trellis.encode(*arguments)
    with pytest.raises(ValueError, match="continue"):
        trellis.pack(np.arange(256, dtype=np.uint32)[None], 2)
    with pytest.raises(ValueError, match="states"):
        trellis.decode(np.full((1, 256), 65536, np.uint32), 2)
    with pytest.raises(ValueError, match="words"):
        trellis.unpack(np.zeros((1, 15), np.uint32), 2)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (17, 31), (130, 40), (128, 256)])
@pytest.mark.parametrize(
    "form", [ql.Trellis(2, window=10), ql.Trellis(3.5, "mcg", None, 9), ql.Trellis(2, "rptc2", window=8)]
)
def test_decoding_follows_the_definition(rng, shape, form):
    w = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    q = ql.quantize(w, form)
    assert q.format == form == ql.parse_format(form.spec) == ql.format_from_json(form.to_json())
    np.testing.assert_allclose(q.dequantize(), reference_decode(q), atol=1e-6)
    specs = {plane["name"]: plane for plane in form.planes(*shape)}
    assert set(specs) == set(q.planes)
    for name, plane in q.planes.items():
        assert (plane.dtype.name, plane.shape) == (specs[name]["dtype"], specs[name]["shape"])
    if w.size:
        expected = np.mean((w - q.dequantize()) ** 2.0)
        assert q.report.mean_squared_error == pytest.approx(expected, rel=1e-5)


def test_format(rng, tmp_path):
    form = ql.Trellis(2.5, "mul1-83dcd12d")
    assert form == ql.Trellis(2.5) == ql.parse_format("trellis:2.5")
    assert hash(form) == hash(ql.Trellis(2.5))
    assert form.spec == "trellis:2.5:mul1"
    assert ql.Trellis(2, "mcg-FF7A83E5", None, 18).spec == "trellis:2:mcg-FF7A83E5:plain:l18"
    assert json.loads(form.to_json())["bits"] == 2.5
    assert (ql.Trellis(2.0).bits, form.rotation, ql.Trellis(1, rotation=None).rotation) == (2, 128, None)
    assert pickle.loads(pickle.dumps(form)) == form
    w = rng.standard_normal((256, 128)).astype(np.float32)
    w[3, 5] = 40
    q = ql.quantize(w, form)
    assert q.bits_per_weight == pytest.approx(2.5 + 16 * 384 / w.size)
    error = np.mean((w - q.dequantize()) ** 2.0) / np.var(w)
    assert error < 0.05
    path = tmp_path / "w.safetensors"
    ql.save_tensors(path, {"layer": q})
    back = ql.load_tensors(path)["layer"]
    assert back.format == form
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    assert ql.Recipe.parse("trellis:3:3inst", "nearest").format == ql.Trellis(3, "3inst")


def test_less_error_than_a_grid(rng):
    w = rng.standard_normal((128, 256)).astype(np.float32)
    errors = {
        spec: np.mean((w - ql.quantize(w, spec).dequantize()) ** 2.0)
        for spec in ("trellis:2", "trellis:2:mul1:plain", "uniform:2:g128:asym", "codebook:nf3:g64")
    }
    assert errors["trellis:2"] < 0.072
    assert errors["trellis:2:mul1:plain"] < 0.072
    assert errors["uniform:2:g128:asym"] > 2 * errors["trellis:2"]


def test_error_feedback(rng):
    sizes = np.exp(0.7 * rng.standard_normal(256))
    w = (rng.standard_normal((128, 256)) * sizes).astype(np.float32)
    hessian, held_out = ql.Hessian(256), ql.Hessian(256)
    for h in (hessian, held_out):
        h.add(
            ((rng.standard_normal((600, 256)) + rng.standard_normal((600, 1))) * sizes[::-1]).astype(
                np.float32
            )
        )
    form = ql.Trellis(2, window=12)
    q = ql.quantize(w, form, ql.GPTQ(hessian, held_out=held_out))
    report = q.report
    assert report.method == "gptq"
    assert report.proxy_loss < 0.8 * report.proxy_loss_nearest
    assert report.held_out_loss < report.held_out_loss_nearest
    assert report.proxy_loss == pytest.approx(ql.proxy_loss(w, q, hessian), rel=1e-4)
    same = trellis.quantize(w, form.spec, hessian)
    np.testing.assert_array_equal(same.planes["codes"], q.planes["codes"])
    np.testing.assert_array_equal(same.planes["output_scales"], q.planes["output_scales"])
    signs_only = trellis.quantize(w, form, hessian, consistent_hessian=False, refit=False)
    consistent = trellis.quantize(w, form, hessian, refit=False)
    assert report.proxy_loss <= consistent.report.proxy_loss < signs_only.report.proxy_loss
    for arguments, error, words in [
        ((w, "uniform:4", hessian), ValueError, "format.*trellis"),
        ((w, "trellis:2:plain", hessian), ValueError, "format.*rotated"),
        ((w, form, None), ValueError, "hessian"),
        ((w[:, :128], form, hessian), ValueError, "hessian.*256.*128"),
        ((w + np.nan, form, hessian), ValueError, "w.*row 0"),
    ]:
        with pytest.raises(error, match=words):
            trellis.quantize(*arguments)
    with pytest.raises(TypeError, match="refit"):
        trellis.quantize(w, form, hessian, refit=1)
    with pytest.raises(ValueError, match="scale_search"):
        ql.quantize(w, form, ql.GPTQ(hessian, scale_search=ql.ScaleSearch()))


def correlated(rng, k, tokens=900):
    x = rng.standard_normal((tokens, k)) + rng.standard_normal((tokens, 1))
    hessian = ql.Hessian(k)
    hessian.add((x * np.exp(0.4 * rng.standard_normal(k))).astype(np.float32))
    return hessian


def test_ratio_factors(rng):
    w = rng.standard_normal((256, 256)).astype(np.float32)
    hessian = correlated(rng, 256)
    form = ql.Trellis(2, window=10)
    best = trellis.best_ratio(2)
    searched = ql.quantize(w, form, ql.GPTQ(hessian)).report
    assert 0.75 * best <= searched.trellis_ratio <= 1.05 * best
    factor = round(searched.trellis_ratio / best, 2)
    for rounding in (ql.GPTQ(hessian, ratio_factors=[factor]), ql.GPTQ(hessian, ratio_factors=(factor,))):
        assert ql.quantize(w, form, rounding).report.proxy_loss == searched.proxy_loss
    assert trellis.quantize(w, form, hessian, ratio_factors=(2.5, 0.9)).report.trellis_ratio == 0.9 * best
    assert ql.quantize(w, "trellis:4:mul1:l10", ql.GPTQ(hessian)).report.trellis_ratio == pytest.approx(
        0.96 * trellis.best_ratio(4)
    )
    assert math.isnan(ql.quantize(w, "uniform:4", ql.GPTQ(hessian)).report.trellis_ratio)
    for bad in ((), (0.1,), (math.nan,), (5,)):
        with pytest.raises(ValueError, match="ratio_factors"):
            ql.GPTQ(hessian, ratio_factors=bad)
    with pytest.raises(TypeError, match="ratio_factors"):
        ql.GPTQ(hessian, ratio_factors="1")
    for spec in ("uniform:4", "trellis:2:mul1:plain:l10", "outliers:1%:uniform:4"):
        with pytest.raises(ValueError, match=r"ratio_factors.*trellis"):
            ql.quantize(w, spec, ql.GPTQ(hessian, ratio_factors=(1,)))

    rounding = ql.parse_rounding("gptq:no-act-order:ratio=0.8,1.0")
    assert rounding.ratio_factors == (0.8, 1.0)
    assert rounding.spec == "gptq:no-act-order:ratio=0.8,1.0"
    assert "ratio_factors" not in ql.GPTQ().to_json()
    recipe = ql.Recipe.parse("trellis:2", rounding)
    assert ql.Recipe.from_json(recipe.to_json()).rounding.ratio_factors == (0.8, 1.0)
    for bad in ("gptq:ratio", "gptq:ratio=x", "nearest:ratio=1"):
        with pytest.raises(ValueError, match="ratio"):
            ql.parse_rounding(bad)


def test_two_sided_feedback(rng):
    n, k = 128, 200
    w = rng.standard_normal((n, k)).astype(np.float32)
    hessian, outputs = correlated(rng, k), correlated(rng, n)
    form = ql.Trellis(2, window=10)
    one = ql.quantize(w, form, ql.GPTQ(hessian))
    two = ql.quantize(w, form, ql.GPTQ(hessian, output_hessian=outputs))
    loss = ql.proxy_loss(w, two, hessian, output_hessian=outputs)
    error = w.astype(np.float64) - two.dequantize()
    h, h_out = hessian.sum() / hessian.tokens, outputs.sum() / outputs.tokens
    assert loss == pytest.approx(np.sum((h_out @ error) * (error @ h)), rel=1e-4)
    assert two.report.two_sided_loss == pytest.approx(loss, rel=1e-6)
    assert loss < 0.8 * ql.proxy_loss(w, one, hessian, output_hessian=outputs)
    assert loss < two.report.two_sided_loss_nearest
    assert two.report.proxy_loss > one.report.proxy_loss
    assert math.isnan(one.report.two_sided_loss)
    same = trellis.quantize(w, form, hessian, output_hessian=h_out, threads=1)
    np.testing.assert_array_equal(same.planes["codes"], two.planes["codes"])
    lopsided = np.eye(n)
    lopsided[0, 1] = 1
    broken = np.eye(n)
    broken[3, 3] = np.nan
    negative = np.eye(n)
    negative[5, 5] = -1
    for bad, words in ((h, "got a Hessian of 200 outputs, expected 128"), (lopsided, "symmetric")):
        with pytest.raises(ValueError, match=words):
            ql.quantize(w, form, ql.GPTQ(hessian, output_hessian=bad))
    for bad in (broken, negative, np.zeros((n, k)), np.zeros((n, n))):
        with pytest.raises(ValueError, match=r"hessian"):
            ql.quantize(w, form, ql.GPTQ(hessian, output_hessian=bad))
    for spec in ("uniform:4", "trellis:2:mul1:plain:l10"):
        with pytest.raises(ValueError, match=r"output_hessian.*trellis"):
            ql.quantize(w, spec, ql.GPTQ(hessian, output_hessian=outputs))
    with pytest.raises(ValueError, match=r"output_hessian.*hadamard"):
        ql.quantize(w, form, ql.GPTQ(hessian, output_hessian=outputs), transform="hadamard:b8")
    with pytest.raises(ValueError, match="output_hessian: got 200 outputs"):
        ql.proxy_loss(w, two, hessian, output_hessian=hessian)
    with pytest.raises(ValueError, match="output_hessian"):
        ql.Recipe(form, ql.GPTQ(output_hessian=outputs))


def test_distortion_table():
    rows = trellis.distortion_table(
        ["lloyd-max", "3inst", "mul1", "hyb", "rptc:l12"], [1, 2, 2.5], tiles=48, best=True
    )
    table = {(row.code, row.bits): row for row in rows}
    assert len(table) == len(rows) == 14
    assert table["lloyd-max", 1].matched == pytest.approx(0.3634, abs=2e-4)
    assert table["lloyd-max", 2].matched == pytest.approx(0.1175, abs=2e-4)
    assert table["3inst", 2].matched == pytest.approx(0.0688, rel=0.03)
    assert table["3inst", 2].unscaled == pytest.approx(0.0745, rel=0.03)
    assert table["mul1", 2].unscaled == pytest.approx(table["mul1", 2].matched, rel=1e-3)
    assert table["mul1", 1].best == pytest.approx(0.2728, rel=0.03)
    assert table["hyb", 2].matched == pytest.approx(0.071, rel=0.03)
    assert table["rptc:l12", 2].matched == pytest.approx(0.0733, rel=0.03)
    for row in rows:
        assert row.bound == 4.0**-row.bits < row.matched
        assert row.best is None or row.best <= 1.01 * row.matched
        assert row.equivalent_bits < row.bits
    fast, best = (trellis.distortion("mul1", 2, tiles=32, search=search) for search in ("fast", "best"))
    assert best < fast
    assert trellis.distortion("mul1", 2, tiles=65, threads=1) == trellis.distortion(
        "mul1", 2, tiles=65, threads=3
    )
    with pytest.raises(ValueError, match="ratio"):
        trellis.distortion("mul1", 2, 0.0)
    with pytest.raises(ValueError, match="codes"):
        trellis.distortion_table(["mul1:lx"])


def test_distortion_command():
    arguments = [
        "bench",
        "distortion",
        "--code",
        "mul1",
        "--code",
        "lloyd-max",
        "--bits",
        "2",
        "--tiles",
        "8",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["tiles"] == 8
    assert [row["code"] for row in document["rows"]] == ["mul1", "lloyd-max"]
    assert 0.05 < document["rows"][0]["matched"] < 0.09
    shown = CliRunner().invoke(app, [*arguments, "--best"])
    assert shown.exit_code == 0
    assert "lloyd-max" in shown.output
    wrong = CliRunner().invoke(app, ["bench", "distortion", "--code", "mul9", "--tiles", "1"])
    assert wrong.exit_code == 1


def test_search():
    table = trellis.search("octagon", (2, 4), count=12, tiles=128, seed=3, device="cpu", threads=2)
    assert (table.code, table.bits, table.device, table.window) == ("octagon", (2, 4), "cpu", 16)
    assert table.tiles == 128
    assert len(table.rows) == 12 + len(PUBLISHED) == len({row.multiplier for row in table.rows})
    published = {int(row.multiplier, 16) for row in table.rows if row.published}
    assert published == set(PUBLISHED)
    seven = {"FF7A83E5", "CAF6A435", "E2A54B45", "A2EC794D", "00D0AA65", "B26DB26D", "EAB209FD"}
    assert seven < {row.multiplier for row in table.rows if row.published}
    keys = [(-row.tiles, row.excess_bits) for row in table.rows]
    assert keys == sorted(keys)
    last = [row for row in table.rows if row.tiles == 128]
    assert all(row.tiles == 128 for row in table.rows if row.published)
    assert len(PUBLISHED) < len(last) < len(table.rows)
    assert table.rows[0].codebook == "octagon", "the code's own is the best of thousands"
    for row in last[:2]:
        for bits, error in zip((2, 4), row.distortion, strict=True):
            ratio = trellis.best_ratio(bits, "octagon")
            expected = trellis.distortion(row.codebook, bits, ratio, 128, 3, search="fast")
            assert error == expected
        excess = [bits + math.log2(error) / 2 for bits, error in zip((2, 4), row.distortion, strict=True)]
        assert row.excess_bits == pytest.approx(np.mean(excess))
    again = trellis.search("octagon", (2, 4), count=12, tiles=128, seed=3, device="cpu", threads=1)
    assert again == table


def test_search_of_published_multipliers(tmp_path):
    progress = []
    table = trellis.search(
        "mcg", [2], 0, 32, unscaled=True, device="cpu", progress=lambda *step: progress.append(step)
    )
    assert len(progress) == len(table.rows) == len(PUBLISHED)
    by_name = {row.codebook: row for row in table.rows}
    assert "mcg" in by_name
    # Near 1, a codebook's root mean square decides what a source of unit variance errs by.
    assert by_name["mcg-B26DB26D"].excess_bits < by_name["mcg"].excess_bits
    assert by_name["mcg"].distortion[0] == trellis.distortion(
        "mcg", 2, 1 / by_name["mcg"].rms, 32, search="fast"
    )
    path = tmp_path / "table.json"
    table.save(path)
    document = json.loads(path.read_text())
    assert document["rows"][0]["codebook"] == table.rows[0].codebook
    assert document["bits"] == [2.0]
    assert list(tmp_path.iterdir()) == [path]
    for arguments, options, words in [
        (("hyb",), {}, "code"),
        (("octagon", [4.5]), {}, "bits.*4.5.*4"),
        (("mul1", []), {}, "bits"),
        (("mul1", [2], -1), {}, "count"),
        (("mul1", [2], 1, 0), {}, "tiles"),
        (("mul1",), {"search": "slow"}, "search"),
        (("mul1",), {"window": 25}, "window"),
        (("mul1",), {"device": "tpu"}, "device"),
    ]:
        with pytest.raises(ValueError, match=words):
            trellis.search(*arguments, **{"device": "cpu", **options})


def test_search_command(tmp_path):
    path = tmp_path / "table.json"
    arguments = ["trellis-search", "--code", "mul1", "--bits", "2", "--count", "3", "--tiles", "8"]
    arguments += ["--device", "cpu", "--threads", "2"]
    shown = CliRunner().invoke(app, [*arguments, "-o", str(path), "--top", "1"])
    assert shown.exit_code == 0, shown.output
    assert "mul1-AD9A2EC5" in shown.output
    written = json.loads(path.read_text())
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout) == written
    assert len(written["rows"]) == 3 + len(PUBLISHED)
    wrong = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "no" / "table.json")])
    assert wrong.exit_code == 1
    assert "output: no such folder" in wrong.output


def test_functions_for_cuda_tensors_take_no_others(rng):
    targets = rng.standard_normal((2, 256)).astype(np.float32)
    for value in (targets, torch.from_numpy(targets), [[0.0] * 256]):
        with pytest.raises(TypeError, match=r"targets: got .*, expected a torch tensor on a CUDA device"):
            trellis.encode_rings(value, 2)
        with pytest.raises(TypeError, match="words: got"):
            trellis.decode_rings(value, 2)
        with pytest.raises(TypeError, match="words: got"):
            trellis.decode_tiles(value, (16, 32), 2)
        with pytest.raises(TypeError, match="matrix: got"):
            trellis.gather_tiles(value)
