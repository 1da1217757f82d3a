"""Activation-aware scaling of single matrices, the scales beside them, and AutoAWQ's layout."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import quantloom as ql
import torch

N, K, TOKENS = 40, 96, 300


@pytest.fixture
def inputs(rng):
    """Correlated inputs of very different channels, one of them dead."""
    x = rng.standard_normal((TOKENS, K)) @ (np.eye(K) + 0.1 * rng.standard_normal((K, K)))
    x *= np.exp(1.5 * rng.standard_normal(K))
    x[:, 7] = 0
    return x.astype(np.float32)


@pytest.fixture
def weights(rng):
    return rng.standard_normal((N, K)).astype(np.float32)


def hessian_of(x):
    hessian = ql.Hessian(x.shape[1])
    hessian.add(x)
    return hessian


def output_error(w, q, x):
    return float(np.square(x @ (w - np.asarray(q.dequantize())).T, dtype=np.float64).sum() / len(x))


@pytest.mark.parametrize("then", ["nearest", "nearest:search", "gptq", "gptq:output-search"])
@pytest.mark.parametrize(
    "spec",
    ["uniform:3:g32:asym", "uniform:4:channel", "codebook:nf3:g32", "outliers:1%:uniform:2:g32"],
)
def test_scaling_lowers_the_output_error_of_any_format_and_rounding(spec, then, weights, inputs):
    hessian, magnitudes = hessian_of(inputs), np.abs(inputs).mean(0)
    q = ql.quantize(weights, spec, ql.AWQ(then, hessian=hessian, magnitudes=magnitudes))
    plain = ql.quantize(weights, spec, ql.Nearest())
    error = output_error(weights, q, inputs)
    assert error < output_error(weights, plain, inputs)
    assert q.report.method == "awq+" + then.partition(":")[0]
    assert q.report.proxy_loss == pytest.approx(error, rel=1e-3)
    assert isinstance(q.transform, ql.ChannelScales) and q.transform.codes[7] == 0
    assert q.size_in_bits == 8 * (sum(p.nbytes for p in q.planes.values()) + K)


def test_clipping_by_output_error_beats_none(weights, inputs):
    hessian = hessian_of(inputs)
    clipped = ql.quantize(weights, "uniform:2:g32:asym", ql.AWQ(hessian=hessian))
    plain = ql.quantize(weights, "uniform:2:g32:asym", ql.AWQ("nearest", hessian=hessian))
    assert clipped.report.scale_search and clipped.report.proxy_loss < plain.report.proxy_loss


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_divide_their_inputs(weights, inputs, kind, dtype):
    q = ql.quantize(weights, "uniform:4:g32", ql.AWQ(hessian=hessian_of(inputs))).to(kind)
    x = torch.from_numpy(inputs[:9]).to(getattr(torch, dtype))
    expected = x.double() @ torch.as_tensor(np.asarray(q.dequantize())).double().T
    y = ql.matmul(x if kind == "torch" or dtype == "bfloat16" else x.numpy(), q)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert float((torch.as_tensor(y).double() - expected).norm() / expected.norm()) < tolerance
    layer = ql.nn.QuantLinear(q.to("torch"))
    assert torch.equal(layer(x), torch.as_tensor(ql.matmul(x, q.to("torch"))))
    assert torch.equal(layer.dequantize(), torch.as_tensor(np.asarray(q.dequantize())))


def test_layers_keep_scales_in_float32_and_in_their_state(weights, inputs):
    q = ql.quantize(weights, "uniform:4:g32", ql.AWQ(hessian=hessian_of(inputs))).to("torch")
    layer = ql.nn.QuantLinear(q)
    x = torch.from_numpy(inputs[:3])
    y = layer(x)
    assert torch.equal(layer.to(torch.bfloat16)(x), y)
    assert layer.input_factors.dtype == torch.float32
    other = ql.nn.QuantLinear(q)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other(x), y)
    plain = ql.nn.QuantLinear(ql.PackedTensor(q.format, q.shape, q.planes))
    with pytest.raises(RuntimeError, match="description"):
        plain.load_state_dict(layer.state_dict())


def test_files_hold_the_scales(tmp_path, weights, inputs):
    q = ql.quantize(weights, "uniform:3:g32:asym", ql.AWQ(hessian=hessian_of(inputs)))
    ql.save_tensors(tmp_path / "w.safetensors", {"layer": q})
    back = ql.load_tensors(tmp_path / "w.safetensors")["layer"]
    assert back.transform == q.transform and back.size_in_bits == q.size_in_bits
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    (entry,) = ql.inspect(tmp_path / "w.safetensors").tensors
    assert entry.bits == q.size_in_bits
    assert pickle.loads(pickle.dumps(q)).transform == q.transform


def test_channel_scales_are_a_transform(rng):
    scales = ql.ChannelScales(rng.integers(-112, 113, 33))
    np.testing.assert_allclose(scales.scales, np.exp2(scales.codes / 16), rtol=1e-6)
    assert ql.transform_from_json(scales.to_json()) == scales
    w = rng.standard_normal((5, 33)).astype(np.float32)
    np.testing.assert_allclose(scales.rotate_weight(scales.rotate_weight(w), inverse=True), w, rtol=1e-6)
    x = rng.standard_normal((4, 33)).astype(np.float32)
    np.testing.assert_allclose(
        scales.rotate_input(x) @ scales.rotate_weight(w).T, x @ w.T, rtol=1e-3, atol=1e-4
    )
    h = x.T.astype(np.float64) @ x
    turned = scales.rotate_input(x)
    np.testing.assert_allclose(
        scales.rotate_hessian(h), turned.T.astype(np.float64) @ turned, rtol=1e-4, atol=1e-9 * h.max()
    )
    for bad, kind in (([113], ValueError), ([0.5], TypeError), ([[1]], TypeError), (["a"], TypeError)):
        with pytest.raises(kind, match="codes"):
            ql.ChannelScales(bad)
    fields = json.loads(scales.to_json())
    for change in ({"version": 2}, {"codes": "%"}, {"codes": 3}, {"more": 1}, {"codes": "//8="}):
        if change == {"codes": "//8="}:
            ql.transform_from_json(json.dumps(fields | change))  # two codes of -1
            continue
        with pytest.raises(ValueError, match="transform"):
            ql.transform_from_json(json.dumps(fields | change))
    with pytest.raises(ValueError, match="expected 20"):
        ql.PackedTensor(
            "uniform:4:g32", (4, 20), ql.quantize(w[:4, :20], "uniform:4:g32").planes, None, scales
        )


def test_extremes_stay_finite(inputs):
    w = np.full((8, K), 6e4, np.float32)
    w[::2] *= -1
    w[:, 3] = 0
    x = inputs.copy()
    x[:, 0] = 6.5e4
    x[:, 1] = 6e-8
    for magnitudes in (None, np.abs(x).mean(0), np.zeros(K), np.full(K, 1e300)):
        q = ql.quantize(
            w.astype(np.float16), "uniform:4:g32", ql.AWQ(hessian=hessian_of(x), magnitudes=magnitudes)
        )
        assert np.isfinite(q.dequantize()).all()
        assert np.isfinite(ql.matmul(x[:4], q)).all()
        assert np.isfinite(q.report.proxy_loss)
    dead = ql.quantize(w, "uniform:4:g32", ql.AWQ("nearest", hessian=hessian_of(np.zeros_like(x))))
    assert dead.transform is None


def test_short_forms_and_json():
    for spec in ("awq", "awq:steps=7", "awq:folded", "awq:steps=5:folded+gptq:search", "awq+nearest"):
        rounding = ql.parse_rounding(spec)
        assert rounding.spec == spec
        assert ql.rounding_from_json(rounding.to_json()).to_json() == rounding.to_json()
    assert ql.parse_rounding("awq+gptq:output-search=12").then.scale_search == ql.ScaleSearch(
        12, output_error=True
    )
    for spec in ("awq:search", "awq+awq", "awq+", "awq:steps=x", "awq:folded:folded", "awq:steps=0", "awqs"):
        with pytest.raises((ValueError, TypeError)):
            ql.parse_rounding(spec)
    with pytest.raises(ValueError, match="keys"):
        ql.rounding_from_json('{"rounding":"awq","steps":3}')
    plain = json.loads(ql.Nearest(ql.ScaleSearch()).to_json())["scale_search"]
    assert plain == {"norm": 2.0, "smallest": 0.4, "steps": 40}, "unchanged where nothing is new"


def test_bad_arguments(weights, inputs):
    hessian = hessian_of(inputs)
    with pytest.raises(ValueError, match="AWQ without a hessian"):
        ql.quantize(weights, "uniform:4:g32", ql.AWQ())
    with pytest.raises(ValueError, match="transform"):
        ql.quantize(weights, "uniform:4:g32", ql.AWQ(hessian=hessian), transform="hadamard:b32")
    with pytest.raises(ValueError, match="transform"):
        ql.Recipe.parse("uniform:4:g32", "awq", transform="hadamard:b32")
    with pytest.raises(ValueError, match="magnitudes"):
        ql.AWQ(hessian=hessian, magnitudes=np.ones(3))
    with pytest.raises(ValueError, match="magnitudes"):
        ql.quantize(weights, "uniform:4:g32", ql.AWQ(hessian=hessian, magnitudes=-np.ones(K)))
    with pytest.raises(ValueError, match="then"):
        ql.AWQ(ql.GPTQ(hessian))
    with pytest.raises(TypeError, match="then"):
        ql.AWQ(ql.AWQ())
    with pytest.raises(ValueError, match="without a Hessian"):
        ql.quantize(weights, "uniform:4:g32", ql.parse_rounding("nearest:output-search"))
    with pytest.raises(ValueError, match="norm"):
        ql.ScaleSearch(norm=2.4, output_error=True)


def test_threads_change_nothing(weights, inputs):
    rounding = ql.AWQ("gptq:output-search", hessian=hessian_of(inputs))
    first, *others = [ql.quantize(weights, "uniform:3:g32", rounding, threads=t) for t in (1, 2, 4)]
    for other in others:
        assert other.transform == first.transform
        for name, plane in first.planes.items():
            np.testing.assert_array_equal(plane, other.planes[name])


@pytest.mark.parametrize("group", [32, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_awq_layout_is_what_autoawq_unpacks(rng, group, symmetric, kind):
    n, k = 24, 96
    q = ql.quantize(rng.standard_normal((n, k)).astype(np.float32), ql.Uniform(4, group, symmetric)).to(kind)
    arrays = {name: np.asarray(value) for name, value in ql.layouts.to_awq(q).items()}

    def fields(words):
        shifted = words.view(np.uint32)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
        return shifted[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1).astype(np.float32)

    codes, zeros = fields(arrays["qweight"]), fields(arrays["qzeros"])
    size = group if isinstance(group, int) else k
    groups = np.arange(k) // size
    decoded = (codes - zeros[groups]) * arrays["scales"].astype(np.float32)[groups]
    np.testing.assert_array_equal(decoded.T, np.asarray(q.dequantize()))
    back = ql.layouts.from_awq(ql.layouts.to_awq(q), group)
    assert back.kind == kind
    np.testing.assert_array_equal(np.asarray(back.dequantize()), np.asarray(q.dequantize()))


def test_awq_layout_refuses(weights, inputs):
    scaled = ql.quantize(weights, "uniform:4:g32:asym", ql.AWQ(hessian=hessian_of(inputs)))
    with pytest.raises(RuntimeError, match="channel_scales"):
        ql.layouts.to_awq(scaled)
    with pytest.raises(RuntimeError, match="4 bits"):
        ql.layouts.to_awq(ql.quantize(weights, "uniform:3:g32"))
    good = ql.layouts.to_awq(ql.quantize(weights, "uniform:4:g32"))
    with pytest.raises(ValueError, match="scales"):
        ql.layouts.from_awq(good, 16)
    with pytest.raises(TypeError, match="qweight"):
        ql.layouts.from_awq(good | {"qweight": good["qweight"].astype(np.int64)}, 32)
