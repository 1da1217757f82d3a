"""GPTQ against an explicit float64 version, and the settings of roundings and recipes."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql


def correlated(rng, tokens: int, k: int) -> np.ndarray:
    """Inputs whose features are correlated and of different sizes, as those of real layers are."""
    mixing = rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    return (rng.standard_normal((tokens, k)) @ mixing * np.exp(rng.standard_normal(k))).astype(np.float32)


def hessian_of(x: np.ndarray) -> ql.Hessian:
    hessian = ql.Hessian(x.shape[1])
    hessian.add(x)
    return hessian


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("spec", "n", "k"),
    [("uniform:4:g16", 9, 64), ("uniform:3:g16:asym", 7, 40), ("uniform:2:channel:asym:f32", 12, 33)],
)
def test_gptq_is_the_explicit_algorithm_in_float64(rng, spec, n, k, act_order):
    w = rng.standard_normal((n, k)).astype(np.float32)
    hessian = hessian_of(correlated(rng, 300, k))
    q = ql.quantize(w, spec, ql.GPTQ(hessian, damp=0.05, act_order=act_order))
    expected = reference.gptq_codes(w, hessian.sum(), hessian.tokens, q, 0.05, act_order)
    actual = reference.codes(q)
    # A value next to the middle between two codes may fall to the other side in float32.
    rows_equal = (actual == expected).all(axis=1)
    assert rows_equal.mean() >= 0.75
    decoded = q.dequantize()
    scales, zeros = reference.scales_and_zeros(q)
    group = reference.group_of_column(q)
    explicit = scales[:, group] * (expected - zeros[:, group])
    loss = ql.proxy_loss(w, explicit.astype(np.float32), hessian)
    assert ql.proxy_loss(w, decoded, hessian) == pytest.approx(loss, rel=0.02)
    assert q.report.proxy_loss == pytest.approx(ql.proxy_loss(w, decoded, hessian), rel=1e-4)


def test_many_layers_agree_with_the_explicit_algorithm(rng):
    equal = total = 0
    for _ in range(25):
        n, k = int(rng.integers(1, 12)), int(rng.integers(2, 48))
        w = rng.standard_normal((n, k)).astype(np.float32)
        hessian = hessian_of(correlated(rng, int(rng.integers(k, 4 * k)), k))
        q = ql.quantize(w, "uniform:4:g8:asym", ql.GPTQ(hessian, damp=0.01))
        expected = reference.gptq_codes(w, hessian.sum(), hessian.tokens, q, q.report.damping, True)
        equal += int((reference.codes(q) == expected).all(axis=1).sum())
        total += n
    assert equal / total > 0.95


@pytest.mark.parametrize("spec", ["uniform:4:g32", "uniform:3:channel:asym", "uniform:2:tensor"])
@pytest.mark.parametrize("static_groups", [True, False])
def test_gptq_with_an_identity_is_nearest_rounding(rng, spec, static_groups):
    w = rng.standard_normal((21, 100)).astype(np.float32)
    rounding = ql.GPTQ(np.eye(100), act_order=False, static_groups=static_groups)
    gptq, nearest = ql.quantize(w, spec, rounding), ql.quantize(w, spec)
    for name, plane in nearest.planes.items():
        np.testing.assert_array_equal(gptq.planes[name], plane)
    assert gptq.report.method == "gptq"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_has_a_lower_loss_than_nearest(rng, bits, static_groups, act_order):
    x = correlated(rng, 600, 96)
    hessian, held_out = hessian_of(x[:500]), hessian_of(x[500:])
    w = rng.standard_normal((48, 96)).astype(np.float32)
    rounding = ql.GPTQ(hessian, act_order=act_order, static_groups=static_groups, held_out=held_out)
    q = ql.quantize(w, ql.Uniform(bits, 32, symmetric=False), rounding)
    nearest = ql.quantize(w, q.format)
    report = q.report
    # At 2 bits, groups fitted late in a walk without order take up what was pushed onto them.
    if bits > 2 or act_order or static_groups:
        assert report.proxy_loss < report.proxy_loss_nearest
    assert report.proxy_loss == pytest.approx(ql.proxy_loss(w, q, hessian), rel=1e-4)
    assert report.proxy_loss_nearest == pytest.approx(ql.proxy_loss(w, nearest, hessian), rel=1e-4)
    assert report.held_out_loss == pytest.approx(ql.proxy_loss(w, q, held_out), rel=1e-4)
    assert report.held_out_loss_nearest == pytest.approx(ql.proxy_loss(w, nearest, held_out), rel=1e-4)
    assert (report.method, report.act_order, report.static_groups) == ("gptq", act_order, static_groups)
    assert report.tokens == 500
    assert report.damping == 0.01
    assert report.damping_tried == (0.01,)
    assert ("group_index" in q.planes) == (act_order and not static_groups)
    np.testing.assert_array_equal(q.dequantize(), reference.decode(q))


def test_dead_inputs_are_counted_and_their_weights_zeroed(rng):
    x = correlated(rng, 200, 32)
    x[:, [3, 30]] = 0
    w = rng.standard_normal((5, 32)).astype(np.float32)
    q = ql.quantize(w, "uniform:4:g8:asym", ql.GPTQ(hessian_of(x)))
    assert q.report.dead_columns == 2
    assert (q.dequantize()[:, [3, 30]] == 0).all()


def test_the_damping_that_was_needed_is_reported(rng):
    # Three tokens for 40 inputs: of rank three, no factor without damping.
    hessian = hessian_of(correlated(rng, 3, 40))
    w = rng.standard_normal((4, 40)).astype(np.float32)
    q = ql.quantize(w, "uniform:4:g8", ql.GPTQ(hessian, damp=0.0, damp_ladder=(1e-3, 0.1)))
    assert q.report.damping > 0
    assert q.report.damping_tried[0] == 0
    assert q.report.damping_tried[-1] == q.report.damping
    assert np.isfinite(q.dequantize()).all()
    with pytest.raises(ValueError, match=r"(?i)hessian"):
        ql.quantize(w, "uniform:4:g8", ql.GPTQ(hessian, damp=0.0, damp_ladder=()))


def test_an_array_counts_as_the_hessian_itself(rng):
    hessian = hessian_of(correlated(rng, 300, 24))
    w = rng.standard_normal((6, 24)).astype(np.float32)
    expected = ql.quantize(w, "uniform:3:g8", ql.GPTQ(hessian))
    given = ql.quantize(w, "uniform:3:g8", ql.GPTQ(hessian.sum() / hessian.tokens))
    assert given.report.tokens == 1
    assert given.report.proxy_loss == pytest.approx(expected.report.proxy_loss, rel=1e-6)
    assert ql.GPTQ(np.eye(24, dtype=np.float32)).hessian.k == 24


def test_roundings_round_trip_through_text():
    specs = [
        "nearest",
        "nearest:search",
        "nearest:search=8",
        "gptq",
        "gptq:search:damp=0.05:no-act-order:dynamic-groups",
    ]
    for spec in specs:
        rounding = ql.parse_rounding(spec)
        assert rounding.spec == spec
        assert ql.rounding_from_json(rounding.to_json()).to_json() == rounding.to_json()
    rounding = ql.GPTQ(damp=0.2, damp_ladder=(0.5,), block=64, scale_search=ql.ScaleSearch(9, 0.3, 2.4))
    again = ql.rounding_from_json(rounding.to_json())
    for item in dataclasses.fields(rounding):
        assert getattr(again, item.name) == getattr(rounding, item.name)
    with pytest.raises(ValueError, match="short form"):
        _ = rounding.spec


def test_recipes_choose_formats_by_name():
    recipe = ql.Recipe.parse(
        "uniform:4:g128",
        "gptq",
        ignore=["lm_head", r"re:.*\.gate"],
        overrides={r"re:.*\.down_proj": "uniform:8:channel", "model.first": None, "lm_head": ql.Uniform(6)},
    )
    assert recipe.format_for("model.layers.0.q_proj") == ql.Uniform(4, 128)
    assert recipe.format_for("model.layers.0.down_proj") == ql.Uniform(8, "channel")
    assert recipe.format_for("model.layers.0.down_proj.x") == ql.Uniform(4, 128)  # the whole name counts
    assert recipe.format_for("model.first") is None
    assert recipe.format_for("lm_head") == ql.Uniform(6)  # overrides go first
    assert recipe.format_for("mlp.gate") is None
    assert ql.Recipe("uniform:4").format_for("lm_head") is None


def test_recipes_round_trip_through_json():
    recipe = ql.Recipe(
        ql.Uniform(3, 64, False),
        ql.GPTQ(damp=0.02, scale_search=ql.ScaleSearch()),
        ("a", "re:b.*"),
        {"z": None, "a": "uniform:8:channel:bf16"},
    )
    again = ql.Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert list(again.overrides) == ["z", "a"]
    assert again.rounding.scale_search == ql.ScaleSearch()
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert ql.Recipe("uniform:4") != recipe


def test_reports_are_plain_data(rng):
    q = ql.quantize(rng.standard_normal((4, 16)).astype(np.float32), "uniform:4:g8")
    fields = dataclasses.asdict(q.report)
    assert fields["method"] == "nearest"
    assert math.isnan(fields["held_out_loss"])
