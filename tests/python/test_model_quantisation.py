"""Whole models in formats: what is replaced, what is counted, what is refused."""

import math

import pytest

torch = pytest.importorskip("torch")
from quantloom import fit as F
from quantloom import formats as Q
from quantloom import model_quantisation as M
from torch import nn

TENSOR_RMS = F.Scaled(4, "fp", Q.BFLOAT16, (None, None), "rms")
BLOCK = F.Scaled(3, "int", Q.BFLOAT16, (1, 8), "absmax", scaling_match="moments")


def mlp():
    torch.manual_seed(100)
    return nn.Sequential(nn.Linear(80, 200), nn.Tanh(), nn.Linear(200, 30))


class Decoder(nn.Module):
    """Named as transformers names its models."""

    def __init__(self, layers=4):
        super().__init__()
        torch.manual_seed(7)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(50, 32)
        self.model.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.vision_model = nn.Linear(32, 32)


def test_fixed():
    model = mlp()
    original = [parameter.detach().clone() for parameter in model.parameters()]
    x = torch.randn(100, 80)
    expected = model(x)
    log = M.quantise_2d_fixed(model, TENSOR_RMS)
    assert 4 < log["bits_per_param"] < 4.5
    matrices = {name for name, value in model.named_parameters() if value.ndim == 2}
    assert set(log["params"]) == matrices
    assert all(set(entry) == {"bits", "rmse"} for entry in log["params"].values())
    assert 0.11 < float(Q.rmse_norm(expected, model(x)).detach()) < 0.15
    bits = 32 * 230
    for (name, value), before in zip(model.named_parameters(), original):
        if name not in matrices:
            assert value.equal(before)
            continue
        rmse = float((value - before).square().mean().sqrt())
        assert log["params"][name]["rmse"] == pytest.approx(rmse, rel=1e-5)
        fitted = TENSOR_RMS.fit(before)
        assert value.equal(fitted.quantise(before))
        assert log["params"][name]["bits"] == fitted.count_bits_tensor(before)
        bits += log["params"][name]["bits"]
    assert log["bits_per_param"] == bits / sum(value.numel() for value in original)


def test_fixed_with_a_format_and_bfloat16():
    model = mlp().bfloat16()
    fmt = Q.LinearScalingFormat(Q.IntFormat(4), Q.BFLOAT16, (1, None), "absmax")
    expected = fmt.quantise(model[0].weight.detach())
    log = M.quantise_2d_fixed(model, fmt, verbose_log=True)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.equal(expected)
    assert log["params"]["0.weight"]["fmt"] == fmt
    assert log["bits_per_param"] == (22000 * 4 + 230 * 16 + 230 * 16) / 22230


def test_no_quantisation():
    assert M.no_quantisation(mlp()) == {"bits_per_param": 32.0, "params": {}}
    assert M.no_quantisation(mlp().half())["bits_per_param"] == 16


def test_measured_bits_are_those_of_the_bytes():
    model = mlp()
    plain = mlp()
    log = M.quantise_2d_fixed(model, BLOCK, encoded=True)
    M.quantise_2d_fixed(plain, BLOCK)
    stored = 32 * 230
    for name, value in model.named_parameters():
        if value.ndim == 2:
            encoded = log["params"][name]["encoded"]
            assert value.equal(encoded.decode())
            assert value.equal(plain.get_parameter(name)), "encoding changes nothing"
            assert log["params"][name]["measured_bits"] == encoded.size_in_bits
            stored += encoded.size_in_bits
    assert log["measured_bits_per_param"] == stored / 22230
    assert log["bits_per_param"] <= log["measured_bits_per_param"] < log["bits_per_param"] + 0.1


def test_tied_weights_are_quantised_once():
    model = Decoder()
    model.lm_head.weight = model.model.embed_tokens.weight
    log = M.quantise_2d_fixed(model, BLOCK)
    assert "lm_head.weight" not in log["params"]
    assert "model.embed_tokens.weight" in log["params"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_ignored_parameters_stay_and_count_as_stored():
    model = Decoder()
    before = model.vision_model.weight.detach().clone()
    log = M.quantise_2d_fixed(model, BLOCK)
    assert model.vision_model.weight.equal(before)
    assert "vision_model.weight" not in log["params"]
    total = sum(value.numel() for value in model.parameters())
    quantised = sum(entry["bits"] for entry in log["params"].values())
    others = total - sum(model.get_parameter(name).numel() for name in log["params"])
    assert log["bits_per_param"] == (quantised + 32 * others) / total
    assert (
        "model.embed_tokens.weight" not in M.quantise_2d_fixed(Decoder(), BLOCK, ignore=("model",))["params"]
    )


def test_error_weight_changes_the_fit():
    # Only small values count, so that a finer grid that clips the others is best.
    weights = {
        name: (value.abs() < 0.3 * value.abs().max()).float() for name, value in mlp().named_parameters()
    }
    spec = F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms")
    plain, weighted, original = mlp(), mlp(), mlp()
    M.quantise_2d_fixed(plain, spec)
    M.quantise_2d_fixed(weighted, spec, error_weight=weights)
    for index in (0, 2):
        errors = [
            Q.rmse_norm(original[index].weight, m[index].weight, weights[f"{index}.weight"]).item()
            for m in (plain, weighted)
        ]
        assert errors[1] <= errors[0]
    assert not plain[0].weight.equal(weighted[0].weight)


def test_variable_bits_follow_the_formula():
    model = Decoder()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.weight *= 4.0**index
    matrices = dict(M.named_matrices(model))
    fisher = {name: float(10 ** (index % 3)) for index, name in enumerate(matrices)}
    delta = {
        name: math.log2(float(value.detach().square().mean().sqrt()))
        + 0.5 * math.log2(fisher[name] / value.numel())
        for name, value in matrices.items()
    }
    count = sum(value.numel() for value in matrices.values())
    mean = sum(delta[name] * matrices[name].numel() for name in matrices) / count
    spec = F.Scaled(4, "int", Q.BFLOAT16, (1, 16), "absmax", scaling_match="moments")
    log = M.quantise_2d_variable(model, spec, fisher, verbose_log=True)
    widths = set()
    for name, value in matrices.items():
        bits = max(round(4 + delta[name] - mean), 2)
        widths.add(bits)
        assert log["params"][name]["bits"] == bits * value.numel() + 16 * value.numel() // 16
    assert len(widths) > 2
    assert 2 in widths, "the minimum is reached"


def test_variable_bits_with_compression_are_fractions():
    model, spec = Decoder(), F.Scaled(4, "int", Q.BFLOAT16, (None, None), "rms", compressor="optimal")
    fisher = {name: 3.0**index for index, (name, _) in enumerate(M.named_matrices(model))}
    log = M.quantise_2d_variable(model, spec, fisher)
    each = [log["params"][name]["bits"] / value.numel() for name, value in M.named_matrices(model)]
    assert any(abs(bits - round(bits)) > 0.1 for bits in each)
    assert len({round(bits, 1) for bits in each}) == len(each)


def test_heuristic():
    model = Decoder(layers=4)
    log = M.quantise_2d_heuristic(model, BLOCK, 2, ("lm_head",), highp_first_layers=1, highp_last_layers=2)
    widths = {
        name: entry["bits"] / model.get_parameter(name).numel() - 2 for name, entry in log["params"].items()
    }
    assert widths == {
        "model.embed_tokens.weight": 3,
        "model.layers.0.weight": 5,
        "model.layers.1.weight": 3,
        "model.layers.2.weight": 5,
        "model.layers.3.weight": 5,
        "lm_head.weight": 5,
    }
    # More layers than there are: all of them, once.
    log = M.quantise_2d_heuristic(Decoder(2), BLOCK, 1, (), highp_first_layers=9, highp_last_layers=9)
    assert log["params"]["model.layers.0.weight"]["bits"] == 32 * 32 * 6
    # Names alone need no decoder layers.
    M.quantise_2d_heuristic(mlp(), TENSOR_RMS, 1, ("0",), 0, 0)
    with pytest.raises(ValueError, match="found no decoder layers"):
        M.quantise_2d_heuristic(mlp(), BLOCK, 1, (), 1, 0)


def unchanged(model, call, match, error=ValueError):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(error, match=match):
        call()
    for parameter, value in zip(model.parameters(), before):
        assert parameter.equal(value) or parameter.isnan().any()


def test_refusals_come_before_any_work():
    model = Decoder()
    fisher = {name: 1.0 for name, _ in M.named_matrices(model)}
    weights = {name: torch.ones_like(value) for name, value in M.named_matrices(model)}
    spec = F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms")
    last = "lm_head.weight"

    unchanged(model, lambda: M.quantise_2d_fixed(model, "int4"), "fmt_spec: got str", TypeError)
    unchanged(
        model, lambda: M.quantise_2d_variable(model, Q.BFLOAT16, fisher), "expected F.Scaled", TypeError
    )
    for bad in (None, 0.0, -1.0, math.nan, math.inf):
        sums = {name: value for name, value in {**fisher, last: bad}.items() if value is not None}
        unchanged(
            model, lambda sums=sums: M.quantise_2d_variable(model, spec, sums), "fisher_sum: got .*lm_head"
        )
    less = {name: value for name, value in weights.items() if name != last}
    unchanged(
        model, lambda: M.quantise_2d_fixed(model, spec, less), "error_weight: got no entry 'lm_head.weight'"
    )
    wrong = {**weights, last: torch.ones(3)}
    unchanged(model, lambda: M.quantise_2d_fixed(model, spec, wrong), r"lm_head.weight'\]: got shape \[3\]")
    unchanged(
        model,
        lambda: M.quantise_2d_fixed(
            model, Q.LinearScalingFormat(Q.IntFormat(3), Q.FP32, (1, 16), "rms"), weights
        ),
        "expected F.Scaled",
    )
    compressed = F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms", compressor="optimal")
    unchanged(model, lambda: M.quantise_2d_fixed(model, compressed, weights), "cannot use one")
    with torch.no_grad():
        model.model.layers[0].weight.zero_()
    unchanged(model, lambda: M.quantise_2d_variable(model, spec, fisher), "is all zeros")


def test_twice_and_not_finite():
    model = mlp()
    M.quantise_2d_fixed(model, BLOCK, ignore=("2",))
    unchanged(model, lambda: M.quantise_2d_fixed(model, BLOCK), "0.weight was quantized before")
    with pytest.raises(ValueError, match="was quantized before"):
        M.quantise_parameter_(model[0].weight, BLOCK)
    model = mlp()
    with torch.no_grad():
        model[0].weight[3, 4] = math.nan
    unchanged(model, lambda: M.quantise_2d_fixed(model, BLOCK), "Failed to quantise '0.weight'.*NaN")
    with pytest.raises(ValueError, match=r"Failed to quantise '2.weight'"):  # 200 is no multiple of 48
        M.quantise_2d_fixed(mlp(), F.Scaled(3, "int", Q.BFLOAT16, (1, 48), "absmax"), ignore=("0",))
