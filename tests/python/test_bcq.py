"""Binary coding from Python: fits, conversion, products, files and models."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import quantloom as ql
import torch

N, K = 24, 200


@pytest.fixture
def weights(rng):
    return rng.standard_normal((N, K)).astype(np.float32)


def values_of(q):
    """W, straight from the description of the planes."""
    planes = {name: np.asarray(plane) for name, plane in q.planes.items()}
    bits = len(planes["signs"])
    signs = np.unpackbits(planes["signs"].view(np.uint8), axis=-1, bitorder="little", count=q.shape[1])
    size = q.format.group_size if isinstance(q.format.group_size, int) else q.shape[1]
    group = planes.get("group_index", np.arange(q.shape[1]) // size)
    value = np.zeros(q.shape, np.float32)
    if q.format.offset:
        value = planes["offsets"].astype(np.float32)[:, group]
    for plane in range(bits):
        scales = planes["scales"][plane].astype(np.float32)[:, group]
        value = value + np.where(signs[plane] == 1, scales, -scales)
    return value


@pytest.mark.parametrize(
    "spec", ["bcq:1:g32", "bcq:3:g128:offset", "bcq:2:channel:f32", "bcq:4:g50:greedy:r2"]
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_planes_decode_as_described(spec, kind, weights):
    q = ql.quantize(weights if kind == "numpy" else torch.from_numpy(weights), spec)
    assert q.kind == kind and isinstance(q.format, ql.BCQ)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), values_of(q))
    assert q.size_in_bits == 8 * sum(np.asarray(plane).nbytes for plane in q.planes.values())


def test_short_forms_and_json():
    for spec in ("bcq:3:g128", "bcq:2:channel:offset:bf16", "bcq:8:g64:f32:r0:greedy"):
        format = ql.parse_format(spec)
        assert format.spec == spec and ql.format_from_json(format.to_json()) == format
    assert ql.BCQ(3) == ql.parse_format("bcq:3")
    assert ql.BCQ(4, "channel", True, "bfloat16", 3, "greedy").spec == "bcq:4:channel:offset:bf16:r3:greedy"
    for bad, error in (
        ({"bits": 9}, ValueError),
        ({"bits": 3, "group_size": "tensor"}, ValueError),
        ({"bits": 3, "offset": 1}, TypeError),
        ({"bits": 3, "rounds": -1}, ValueError),
        ({"bits": 3, "start": "last"}, ValueError),
        ({"bits": 3, "scale_dtype": "int8"}, ValueError),
    ):
        with pytest.raises(error):
            ql.BCQ(**bad)


def test_error_falls_with_rounds_and_bits(weights):
    errors = {
        (bits, rounds): ql.quantize(
            weights, ql.BCQ(bits, 40, True, "float32", rounds)
        ).report.mean_squared_error
        for bits in (1, 2, 3, 4)
        for rounds in (0, 1, 4, 20)
    }
    for bits in (1, 2, 3):
        assert errors[bits + 1, 20] < errors[bits, 20]
    greedy = [
        ql.quantize(weights, ql.BCQ(3, 40, False, "float32", rounds, "greedy")).report.mean_squared_error
        for rounds in (0, 1, 2, 5, 20)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(greedy))
    best = ql.quantize(weights, ql.BCQ(3, 40, False, "float32", 20)).report.mean_squared_error
    assert best <= greedy[-1] * (1 + 1e-6)
    grid = ql.quantize(weights, "uniform:3:g40:asym:f32").report.mean_squared_error
    assert ql.quantize(weights, ql.BCQ(3, 40, True, "float32")).report.mean_squared_error < grid


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "awq+gptq"])
def test_any_rounding_takes_it(rounding, weights, rng):
    x = rng.standard_normal((300, K)) @ (np.eye(K) + 0.2 * rng.standard_normal((K, K)))
    x = (x * np.exp(rng.standard_normal(K))).astype(np.float32)
    hessian = ql.Hessian(K)
    hessian.add(x)
    made = {
        "nearest": ql.Nearest(hessian=hessian),
        "gptq": ql.GPTQ(hessian),
        "awq+gptq": ql.AWQ("gptq", hessian=hessian),
    }[rounding]
    q = ql.quantize(weights, "bcq:3:g50:offset", made)
    plain = ql.quantize(weights, "bcq:3:g50:offset")
    loss = ql.proxy_loss(weights, q, hessian)
    assert loss == pytest.approx(q.report.proxy_loss, rel=1e-3)
    assert loss < 0.9 * ql.proxy_loss(weights, plain, hessian)


@pytest.mark.parametrize(
    "spec", ["uniform:4:g128", "uniform:3:g32:asym", "uniform:2:tensor", "uniform:1:channel"]
)
def test_uniform_tensors_convert(spec, weights, rng, tmp_path):
    x = rng.standard_normal((300, K)).astype(np.float32)
    hessian = ql.Hessian(K)
    hessian.add(x)
    for rounding in (ql.Nearest(), ql.GPTQ(hessian, static_groups=False)):
        q = ql.quantize(weights, spec, rounding)
        exact = ql.layouts.to_bcq(q, "float32")
        np.testing.assert_array_equal(exact.dequantize(), q.dequantize())
        np.testing.assert_array_equal(values_of(exact), q.dequantize())
        own = ql.layouts.to_bcq(q)
        assert own.format.scale_dtype == "float16"
        np.testing.assert_allclose(own.dequantize(), q.dequantize(), atol=0 if "asym" not in spec else 4e-3)
        ql.save_tensors(tmp_path / "w.safetensors", {"w": own})
        back = ql.load_tensors(tmp_path / "w.safetensors")["w"]
        np.testing.assert_array_equal(back.dequantize(), own.dequantize())
        np.testing.assert_allclose(ql.matmul(x[:5], own), x[:5] @ own.dequantize().T, rtol=1e-3, atol=1e-3)
    turned = ql.quantize(weights, spec, transform="hadamard:b8")
    assert ql.layouts.to_bcq(turned).transform == turned.transform
    with pytest.raises(ValueError, match="uniform"):
        ql.layouts.to_bcq(ql.quantize(weights, "bcq:2:g32"))


def test_layers_compute_with_it(weights, rng):
    q = ql.quantize(weights, "bcq:3:g40:offset").to("torch")
    layer = ql.nn.QuantLinear(q)
    x = torch.from_numpy(rng.standard_normal((7, K)).astype(np.float32))
    torch.testing.assert_close(layer(x), x @ q.dequantize().T, rtol=1e-4, atol=1e-4)
    other = ql.nn.QuantLinear(ql.quantize(torch.from_numpy(2 * weights), "bcq:3:g40:offset"))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_whole_models_take_it(tmp_path):
    model_factory = pytest.importorskip("model_factory")
    model = model_factory.write_model(tmp_path / "model", model_factory.llama())
    ids = model_factory.token_ids(5 * 24)
    report = ql.models.quantize(
        model,
        ql.Recipe.parse("bcq:3:g32:offset", "gptq"),
        ids,
        output=tmp_path / "out",
        windows=4,
        window=24,
        held_out_windows=1,
    )
    assert all(m.proxy_loss < m.proxy_loss_nearest for m in report.modules)
    plan = ql.models.plan(model, ql.Recipe.parse("bcq:3:g32:offset", "gptq"))
    assert plan.bits_per_weight == pytest.approx(report.bits_per_weight) == 3 + 4 * 16 / 32
    logits = [
        ql.models.load(tmp_path / "out", torch.float32, dequantized=plain)(
            torch.from_numpy(ids[None, :24])
        ).logits
        for plain in (False, True)
    ]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="uniform formats only"):
        ql.models.export(tmp_path / "out", tmp_path / "no", "gptq")
