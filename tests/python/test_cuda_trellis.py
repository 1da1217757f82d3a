"""Trellis-coded rings on a CUDA device, against the definitions of their codebooks in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda
from quantloom import trellis

pytestmark = needs_cuda

STATES = np.arange(1 << 16, dtype=np.uint64)


def _halves(hashes):
    halves = ((hashes & 0x8FFF8FFF) ^ 0x3B603B60).astype(np.uint32)
    parts = halves.view(np.uint16).view(np.float16).reshape(-1, 2).astype(np.float64)
    return parts.sum(axis=1).astype(np.float16)


def _byte_sum(hashes):
    return sum((hashes >> shift & 255).astype(np.float64) for shift in (0, 8, 16, 24))


def _weights(name):
    if name == "3inst":
        return _halves((89226354 * STATES + 64248484) & 0xFFFFFFFF)
    if name == "mcg":
        return _halves((0xCBAC1FED * STATES) & 0xFFFFFFFF)
    if name == "mul1":
        total = _byte_sum((0x83DCD12D * STATES) & 0xFFFFFFFF)
        return ((1024 + total) * np.float64(0.00676727294921875) - 10.3828125).astype(np.float16)
    total = _byte_sum((34038481 * STATES + 76625530) & 0xFFFFFFFF)
    return ((total - 510) / 147.800537109375).astype(np.float16)


def _decode(words, bits, weights):
    """The rings' weights by strings of bits."""
    rings = np.unpackbits(words.astype(">i4").view(np.uint8).reshape(len(words), -1), axis=1)
    wrapped = np.concatenate([rings[:, -16:], rings], axis=1)
    states = np.zeros((len(words), 256), dtype=np.int64)
    for i in range(16):
        # Bit -16 + i of the 16 before the end of each position, 16 further on in `wrapped`.
        states = states * 2 + wrapped[:, bits * np.arange(1, 257) + i]
    return weights[states]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", ["3inst", "mcg", "mul1", "1mad"])
def test_words_decode_to_the_weights_of_the_definition(rng, codebook, bits):
    words = rng.integers(-(2**31), 2**31, size=(5, 8 * bits)).astype(np.int32)
    decoded = trellis.decode_rings(torch.from_numpy(words).cuda(), bits, codebook)
    np.testing.assert_array_equal(decoded.cpu().numpy(), _decode(words, bits, _weights(codebook)))


@pytest.mark.parametrize("search", ["fast", "normal", "best"])
@pytest.mark.parametrize(("bits", "least"), [(2, 0.0683), (3, 0.0175), (4, 0.00457)])
def test_errors_are_those_of_the_weights(rng, bits, least, search):
    targets = torch.from_numpy(rng.standard_normal((300, 256)).astype(np.float32)).cuda()
    words, errors = trellis.encode_rings(targets, bits, search=search)
    weights = trellis.decode_rings(words, bits)
    torch.testing.assert_close(errors, (targets - weights).square().sum(dim=1), rtol=1e-4, atol=0)
    assert float(errors.mean()) / 256 == pytest.approx(least, rel=0.03)


@pytest.mark.parametrize(
    ("codebook", "bits", "error"),
    [("mul1", 2.5, 0.0345), ("hyb", 2, 0.0803), ("mul1", 3.5, 0.0089), ("octagon", 2, 0.0703)],
)
def test_half_bits_and_two_weights_a_step(rng, codebook, bits, error):
    targets = torch.from_numpy(rng.standard_normal((200, 256)).astype(np.float32)).cuda()
    words, errors = trellis.encode_rings(targets, bits, codebook)
    assert words.shape == (200, round(8 * bits))
    weights = trellis.decode_rings(words, bits, codebook)
    torch.testing.assert_close(errors, (targets - weights).square().sum(dim=1), rtol=1e-4, atol=0)
    assert float(errors.mean()) / 256 == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("codebook", "bits"), [("mul1", 2), ("mcg-FF7A83E5", 3.5), ("rptc2", 2)])
def test_rings_are_those_of_the_cpu_functions(rng, codebook, bits):
    targets = rng.standard_normal((9, 256)).astype(np.float32)
    words, errors = trellis.encode_rings(torch.from_numpy(targets).cuda(), bits, codebook)
    states = trellis.unpack(words.cpu().numpy().view(np.uint32), bits, codebook)
    weights = trellis.decode(states, bits, codebook)
    np.testing.assert_array_equal(trellis.decode_rings(words, bits, codebook).cpu().numpy(), weights)
    on_cpu = trellis.decode(trellis.encode(targets, bits, codebook), bits, codebook)
    loss = np.square(targets - on_cpu).sum()
    assert float(errors.sum()) == pytest.approx(float(loss), rel=0.005)


def test_a_table_is_a_codebook(rng):
    table = rng.standard_normal(1 << 16).astype(np.float16)
    words = torch.from_numpy(rng.integers(-(2**31), 2**31, size=(7, 24)).astype(np.int32)).cuda()
    decoded = trellis.decode_rings(words, 3, table)
    np.testing.assert_array_equal(decoded.cpu().numpy(), _decode(words.cpu().numpy(), 3, table))
    again, errors = trellis.encode_rings(decoded, 3, table)
    assert torch.equal(again, words)
    assert not errors.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiles_go_to_rings_and_back(rng, dtype):
    matrix = torch.from_numpy(rng.standard_normal((48, 80)).astype(np.float32)).cuda().to(dtype)
    targets = trellis.gather_tiles(matrix, 0.5)
    assert targets.shape == (15, 256)
    # Tile 4 is at block row 1, block column 1; lane 5 holds its positions 40 to 47.
    tile = matrix[16:32, 16:32].float().cpu().numpy() / 2
    lane = [tile[row, column] for row in (1, 9) for column in (2, 3, 10, 11)]
    np.testing.assert_array_equal(targets[4, 40:48].cpu().numpy(), lane)
    words, errors = trellis.encode_rings(targets, 4, "mcg")
    decoded = trellis.decode_tiles(words, (48, 80), 4, "mcg")
    expected = (0.5 * matrix.float() - decoded).double().square().sum()
    torch.testing.assert_close(errors.double().sum(), expected, rtol=1e-5, atol=0)
    rounded = trellis.decode_tiles(words, (48, 80), 4, "mcg", dtype)
    assert torch.equal(rounded, decoded.to(dtype))


def test_dtypes_and_empty_inputs():
    words, errors = trellis.encode_rings(torch.empty((0, 256), device="cuda"), 2)
    assert words.shape == (0, 16) and errors.shape == (0,)
    assert trellis.decode_rings(words, 2, dtype="bfloat16").dtype == torch.bfloat16


def test_the_workspace_does_not_change_the_rings(rng):
    targets = torch.from_numpy(rng.standard_normal((50, 256)).astype(np.float32)).cuda()
    words, errors = trellis.encode_rings(targets, 2, "mcg")
    for size in (8 << 20, 50 << 20):
        other = trellis.encode_rings(targets, 2, "mcg", workspace_bytes=size)
        assert torch.equal(other[0], words) and torch.equal(other[1], errors)


def test_bad_input_is_named():
    targets = torch.zeros((3, 256), device="cuda")
    with pytest.raises(TypeError, match="targets: got Tensor, expected a torch tensor on a CUDA device"):
        trellis.encode_rings(targets.cpu(), 2)
    with pytest.raises(ValueError, match=r"targets: got shape \[3, 255\]"):
        trellis.encode_rings(targets[:, :255], 2)
    with pytest.raises(ValueError, match="targets: got NaN"):
        trellis.encode_rings(targets / 0, 2)
    for bits in (0.5, 2.25, 9):
        with pytest.raises(ValueError, match=f"bits: got {bits}, expected 1 to 8"):
            trellis.encode_rings(targets, bits)
    with pytest.raises(ValueError, match="bits: got 5, expected 1 to 4"):
        trellis.encode_rings(targets, 5, "hyb")
    with pytest.raises(ValueError, match="search: got 'slow'"):
        trellis.encode_rings(targets, 2, search="slow")
    with pytest.raises(ValueError, match="workspace_bytes: got 5"):
        trellis.encode_rings(targets, 2, workspace_bytes=5)
    with pytest.raises(ValueError, match="4mad"):
        trellis.encode_rings(targets, 2, "4mad")
    with pytest.raises(ValueError, match=r"codebook: got shape \[3\]"):
        trellis.encode_rings(targets, 2, np.zeros(3))
    with pytest.raises(TypeError, match="words: got"):
        trellis.decode_rings(targets[:, :16], 2)
    with pytest.raises(ValueError, match=r"matrix: got \[3, 256\], expected multiples of 16"):
        trellis.gather_tiles(targets)
    words = torch.zeros((2, 16), dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="words: got 2 tiles, expected 1 "):
        trellis.decode_tiles(words, (16, 16), 2)


def test_search_finds_what_the_cpu_finds():
    here, there = (
        trellis.search("octagon", (2, 3.5), count=4, tiles=80, device=device) for device in ("cuda", "cpu")
    )
    assert here.device.startswith("cuda:")
    expected = {row.multiplier: row for row in there.rows}
    for row in here.rows:
        if row.tiles == expected[row.multiplier].tiles:
            assert row.distortion == pytest.approx(expected[row.multiplier].distortion, rel=2e-3)
    assert here == trellis.search("octagon", (2, 3.5), count=4, tiles=80)
    with pytest.raises(ValueError, match="window: got 18"):
        trellis.search(window=18, device="cuda")


def _layer(rng, n, k):
    w = torch.tensor((0.02 * rng.standard_normal((n, k))).astype(np.float32))
    mixed = rng.standard_normal((4 * k, k)) @ (np.eye(k) + 0.1 * rng.standard_normal((k, k)))
    x = torch.tensor((mixed * np.exp(0.5 * rng.standard_normal(k))).astype(np.float32))
    here, there = ql.Hessian(k), ql.Hessian(k, device="cuda")
    here.add(x)
    there.add(x.cuda())
    return w, here, there


@pytest.mark.parametrize(("spec", "shape"), [("trellis:2:mul1", (128, 256)), ("trellis:3:mcg", (100, 200))])
def test_quantizing_errs_like_the_cpu(rng, spec, shape):
    w, here, there = _layer(rng, *shape)
    q = ql.quantize(w.cuda(), spec, ql.GPTQ(there, ratio_factors=(0.9,)))
    expected = ql.quantize(w, spec, ql.GPTQ(here, ratio_factors=(0.9,))).report
    assert q.device == "cuda:0" and q.report.method == "gptq"
    assert q.report.proxy_loss == pytest.approx(expected.proxy_loss, rel=0.06)
    assert q.report.proxy_loss_nearest == pytest.approx(expected.proxy_loss_nearest, rel=0.06)
    error = w.double() - q.to("cpu").dequantize(torch.float32).double()
    assert float(error.square().mean()) == pytest.approx(q.report.mean_squared_error, rel=1e-5)
    again = ql.quantize(w.cuda(), spec, ql.GPTQ(there, ratio_factors=(0.9,)))
    assert all(torch.equal(q.planes[name], again.planes[name]) for name in q.planes)
    nearest = ql.quantize(w.cuda(), spec)
    on_cpu = ql.quantize(w, spec)
    assert nearest.report.mean_squared_error == pytest.approx(on_cpu.report.mean_squared_error, rel=0.02)


def test_two_sided_feedback_errs_like_the_cpus(rng):
    w, here, there = _layer(rng, 128, 256)
    _, outputs, _ = _layer(rng, 256, 128)
    rounding = ql.GPTQ(there, ratio_factors=(0.9,), output_hessian=outputs.to("cuda"))
    q = ql.quantize(w.cuda(), "trellis:2", rounding)
    on_cpu = ql.GPTQ(here, ratio_factors=(0.9,), output_hessian=outputs)
    expected = ql.quantize(w, "trellis:2", on_cpu).report
    assert q.report.trellis_ratio == expected.trellis_ratio
    assert q.report.two_sided_loss == pytest.approx(expected.two_sided_loss, rel=0.2)
    assert q.report.two_sided_loss == pytest.approx(
        ql.proxy_loss(w, q, here, output_hessian=outputs), rel=1e-3
    )
    with pytest.raises(TypeError, match="output_hessian"):
        ql.quantize(w.cuda(), "trellis:2", ql.GPTQ(there, output_hessian=outputs))
    with pytest.raises(ValueError, match="output_hessian"):
        ql.quantize(w.cuda(), "uniform:4", ql.GPTQ(there, output_hessian=outputs.to("cuda")))


def test_the_consistent_hessian_errs_less(rng):
    w, _, there = _layer(rng, 128, 256)
    w *= torch.exp(torch.tensor(0.7 * rng.standard_normal(256), dtype=torch.float32))
    losses = {
        (consistent, refit): trellis.quantize(
            w.cuda(), "trellis:2", there, consistent_hessian=consistent, refit=refit
        ).report.proxy_loss
        for consistent, refit in [(True, True), (True, False), (False, False)]
    }
    assert losses[True, True] < losses[True, False] < losses[False, False]


def test_what_quantizing_on_the_device_refuses(rng):
    w, here, there = _layer(rng, 32, 48)
    with pytest.raises(RuntimeError, match="rotated trellis"):
        ql.quantize(w.cuda(), "trellis:2:mul1:plain")
    with pytest.raises(ValueError, match="scale_search"):
        ql.quantize(w.cuda(), "trellis:2", ql.Nearest(scale_search=ql.ScaleSearch()))
    with pytest.raises((TypeError, ValueError), match="hessian"):
        trellis.quantize(w.cuda(), "trellis:2", here)
    with pytest.raises((TypeError, ValueError), match="hessian"):
        trellis.quantize(w, "trellis:2", there)
