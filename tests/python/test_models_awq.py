"""Channel scales in whole models: where they go, that nothing changes by it, and what is written."""

import hashlib
import json

import model_factory
import pytest
import quantloom as ql
import torch
import transformers
from quantloom import models
from quantloom.models.calibration import BlockCall, HiddenStates, TokenWindows, float_block, run_block
from quantloom.models.scaling import read_scaling, search_scaling, write_scaling
from quantloom.models.structure import find_blocks

SETTINGS = {"windows": 4, "window": 24, "held_out_windows": 1}
IDS = model_factory.token_ids(5 * 24)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def qwen2():
    """Biases of query, key and value; grouped-query attention."""
    return transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **model_factory._COMMON,
    )


def llama_heads(key_value_heads):
    config = model_factory.llama(layers=1)
    config.num_key_value_heads = key_value_heads
    return config


def relu_opt():
    config = model_factory.opt(layers=1)
    config.activation_function = "relu"
    return config


def one_layer(make):
    config = make()
    config.num_hidden_layers = 1
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:1]
    return config


# The modules that scales move into, by the end of the reader's name; None: beside the weights.
LLAMA = {
    "q_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "o_proj": "self_attn.v_proj",
    "gate_proj": "post_attention_layernorm",
    "down_proj": "mlp.up_proj",
}
CASES = {
    "llama": (lambda: llama_heads(2), LLAMA),
    "llama, every head its own values": (lambda: llama_heads(4), LLAMA),
    "llama, one head's values for all": (lambda: llama_heads(1), LLAMA),
    "qwen2": (qwen2, LLAMA),
    "gemma2": (
        lambda: one_layer(model_factory.gemma2),
        LLAMA | {"gate_proj": "pre_feedforward_layernorm"},
    ),
    "opt": (
        relu_opt,
        {
            "q_proj": "self_attn_layer_norm",
            "out_proj": "self_attn.v_proj",
            "fc1": "final_layer_norm",
            "fc2": "fc1",
        },
    ),
    "gpt_neox": (
        lambda: one_layer(model_factory.gpt_neox),
        {
            "query_key_value": "input_layernorm",
            "dense": None,
            "dense_h_to_4h": "post_attention_layernorm",
            "dense_4h_to_h": None,  # behind a GELU
        },
    ),
    "phi": (
        lambda: one_layer(model_factory.phi),
        {"q_proj": "input_layernorm", "fc1": "input_layernorm", "dense": "self_attn.v_proj", "fc2": None},
    ),
}


def scaled_block(config, tmp_path, dtype, rounding="awq", spec="uniform:3:g16:asym", spread=1.0):
    """The first block of a random model before and after its channels were scaled."""
    model = model_factory.build(config)
    block = find_blocks(model)[0]
    with torch.no_grad():
        for parameter in block.module.parameters():  # channels of different sizes, everywhere
            if parameter.ndim == 2:
                parameter.mul_(torch.exp(spread * torch.randn(len(parameter)))[:, None])
    model.to(dtype)
    hidden = model.get_input_embeddings().weight.shape[1]
    if config.model_type == "opt":
        hidden = config.hidden_size
    calls = []

    def record(module, args, kwargs):
        calls.append((args, kwargs))

    model.float()
    handle = block.module.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(torch.from_numpy(IDS[:24])[None], use_cache=False)
    handle.remove()
    args, kwargs = calls[0]
    call = BlockCall(args[1:], kwargs, None) if args else BlockCall(
        (), {k: v for k, v in kwargs.items() if k != "hidden_states"}, "hidden_states"
    )  # fmt: skip
    states = HiddenStates(tmp_path / "states.f32", 4, 24, hidden)
    torch.manual_seed(1)
    windows = torch.randn(4, 1, 24, hidden) * torch.exp(torch.randn(hidden))
    with states.writer() as append:
        for window in windows:
            append(window)
    model.to(dtype)
    dtypes = {f"{block.name}.{name}": p.dtype for name, p in block.module.named_parameters()}
    formats = {name: ql.parse_format(spec) for name in block.linears}
    tokens = TokenWindows(IDS[:96].reshape(4, 24), 4)
    with float_block(block.module), torch.no_grad():
        before = [run_block(block, call, window) for window in windows]
        old = {name: p.detach().clone() for name, p in block.module.named_parameters()}
        stages = search_scaling(
            block, call, states, formats, ql.parse_rounding(rounding), tokens, 1, lambda: None, "cpu", dtypes
        )
        after = [run_block(block, call, window) for window in windows]
        new = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    return block, stages, before, after, old, new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_folding_leaves_the_block_as_it_was(case, dtype, tmp_path):
    make, expected = CASES[case]
    block, stages, before, after, old, new = scaled_block(make(), tmp_path, dtype)
    found = {name.removeprefix(f"{block.name}."): stage for stage in stages for name in stage.modules}
    for ending, place in expected.items():
        name = next(name for name in found if name.endswith(ending))
        stage = found[name]
        assert stage.exponent > 0 and stage.loss < stage.loss_unscaled, name
        if place is None:
            assert stage.into == "input" and stage.codes is not None, name
            assert torch.equal(old[f"{name}.weight"], new[f"{name}.weight"])
        else:
            assert stage.into == f"{block.name}.{place}", name
            assert not torch.equal(old[f"{name}.weight"], new[f"{name}.weight"])
            spread = stage.columns.max() / stage.columns.min()
            assert spread > 1.5, name
    # Exact up to float32: nothing was lost by the rounding of gains and biases to the stored dtype.
    for a, b in zip(after, before, strict=True):
        assert float((a - b).norm() / b.norm()) < 3e-6
    for stage in stages:
        for name, value in stage.replaced.items():
            assert value.dtype == dtype
            assert torch.equal(new[name.removeprefix(f"{block.name}.")], value.float())
    # Everything not replaced is a Linear's weight or unchanged.
    replaced = {name for stage in stages for name in stage.replaced}
    for name, value in new.items():
        if f"{block.name}.{name}" not in replaced and not name.endswith("weight"):
            assert torch.equal(value, old[name]), name
    again = read_scaling(*write_scaling(stages))
    for a, b in zip(again, stages, strict=True):
        assert (a.modules, a.into, a.exponent, a.replaced.keys()) == (
            b.modules, b.into, b.exponent, b.replaced.keys()
        )  # fmt: skip


def test_norms_with_zero_gains_and_tiny_ones_stay_finite(tmp_path):
    config = llama_heads(2)
    build = model_factory.build

    def with_odd_gains(config):
        model = build(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight[3] = 0
                layer.input_layernorm.weight[5] = 6e-8  # the smallest of float16
                layer.input_layernorm.weight[6] = 6e4
        return model

    model_factory.build = with_odd_gains
    try:
        _, stages, before, after, _, new = scaled_block(config, tmp_path, torch.float16)
    finally:
        model_factory.build = build
    assert all(torch.isfinite(value).all() for value in new.values())
    assert all(torch.isfinite(v).all() for stage in stages for v in stage.replaced.values())
    for a, b in zip(after, before, strict=True):
        assert float((a - b).norm() / b.norm()) < 3e-6


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama())


def stored(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= ql.load_tensors(file, kind="torch")
    return tensors


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "timings.json"
    }


@pytest.mark.parametrize("rounding", ["awq", "awq+gptq"])
def test_models_compute_with_folded_scales(rounding, llama, tmp_path):
    """At 8 bits in small groups the logits are the original's: gains and weights belong together."""
    report = models.quantize(
        llama, ql.Recipe.parse("uniform:8:g16:asym:f32", rounding), IDS, output=tmp_path / "out", **SETTINGS
    )
    assert {module.method for module in report.modules} == {f"awq+{rounding.partition('+')[2] or 'nearest'}"}
    assert not report.fallbacks
    places = {m.name: m.scaled_by for m in report.modules if m.scaled_by}
    assert places and all(place.startswith("model.layers.") for place in places.values())
    ids = torch.from_numpy(IDS[:24])[None]
    with torch.no_grad():
        expected = models.load_reference(llama)(ids).logits
        for dequantized in (True, False):
            logits = models.load(tmp_path / "out", torch.float32, dequantized=dequantized)(ids).logits
            assert float((logits - expected).norm() / expected.norm()) < 0.02
    original, written = stored(llama), stored(tmp_path / "out")
    for place in set(places.values()):
        if place.endswith("layernorm"):
            name = f"{place}.weight"
            assert written[name].dtype == original[name].dtype
            assert not torch.equal(written[name], original[name])
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(entry.get("scaled_by") for entry in again["modules"])


def test_scales_beside_weights_in_a_model(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.gpt_neox())
    recipe = ql.Recipe.parse("uniform:4:g16:asym:f32", "awq")
    report = models.quantize(folder, recipe, IDS, output=tmp_path / "out", **SETTINGS)
    beside = [m.name for m in report.modules if m.scaled_by == "input"]
    assert any(name.endswith("dense_4h_to_h") for name in beside)
    packed = {name: q for name, q in stored(tmp_path / "out").items() if isinstance(q, ql.PackedTensor)}
    for module in report.modules:
        q = packed[module.name]
        assert (q.transform is not None) == (module.scaled_by == "input")
        assert q.size_in_bits == module.bits
    ids = torch.from_numpy(IDS[:24])[None]
    with torch.no_grad():
        a = models.load(tmp_path / "out", torch.float32)(ids).logits
        b = models.load(tmp_path / "out", torch.float32, dequantized=True)(ids).logits
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    folded = models.quantize(
        folder,
        ql.Recipe.parse("uniform:4:g16:asym:f32", "awq:folded"),
        IDS,
        output=tmp_path / "two",
        **SETTINGS,
    )
    assert not [m for m in folded.modules if m.scaled_by == "input"]
    assert any("not scaled" in text for text in folded.fallbacks)


def test_readers_that_stay_unquantized_keep_their_input(llama, tmp_path):
    recipe = ql.Recipe.parse("uniform:4:g16", "awq:folded", overrides={"re:.*k_proj": None})
    report = models.quantize(llama, recipe, IDS, output=tmp_path / "out", **SETTINGS)
    found = {m.name: m.scaled_by for m in report.modules}
    for layer in range(2):
        assert found[f"model.layers.{layer}.self_attn.q_proj"] == ""
        assert found[f"model.layers.{layer}.mlp.gate_proj"].endswith("post_attention_layernorm")
    original, written = stored(llama), stored(tmp_path / "out")
    assert torch.equal(
        original["model.layers.0.input_layernorm.weight"], written["model.layers.0.input_layernorm.weight"]
    )


def test_interrupted_runs_end_with_the_same_bytes(llama, tmp_path):
    recipe = ql.Recipe.parse("uniform:3:g16:asym", "awq")
    events = []
    models.quantize(llama, recipe, IDS, output=tmp_path / "whole", progress=events.append, **SETTINGS)
    expected = hashes(tmp_path / "whole")

    class Stop(Exception):
        pass

    for point in (len(events) // 5, len(events) // 2, len(events) - 3):
        out, seen = tmp_path / str(point), []

        def stop(event, seen=seen, point=point):
            seen.append(event)
            if len(seen) == point:
                raise Stop

        with pytest.raises(Stop):
            models.quantize(llama, recipe, IDS, output=out, progress=stop, **SETTINGS)
        models.quantize(llama, recipe, IDS, output=out, **SETTINGS)
        assert hashes(out) == expected, point


def test_awq_needs_calibration(llama, tmp_path):
    recipe = ql.Recipe.parse("uniform:4:g16", "awq")
    with pytest.raises(ValueError, match="calibration"):
        models.quantize(llama, recipe, output=tmp_path / "out")
    with pytest.raises(ValueError, match="calibrated"):
        models.plan(llama, recipe, calibrated=False)
    plan = models.plan(llama, recipe, windows=4, window=24)
    assert plan.peak_bytes > 0 and plan.seconds > 0


def test_export_and_import_of_the_awq_layout(llama, tmp_path):
    recipe = ql.Recipe.parse("uniform:4:g32:asym", "awq")
    models.quantize(llama, recipe, IDS, output=tmp_path / "ours", **SETTINGS)
    report = models.export(tmp_path / "ours", tmp_path / "awq", "awq")
    assert report.layout == "awq" and len(report.modules) == 14
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    tensors = stored(tmp_path / "awq")
    prefix = "model.layers.0.self_attn.k_proj."
    parts = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == {
        "qweight": (torch.int32, (64, 4)),
        "qzeros": (torch.int32, (2, 4)),
        "scales": (torch.float16, (2, 32)),
    }
    entry = next(e for e in ql.inspect(tmp_path / "awq").tensors if e.name == prefix[:-1])
    assert (entry.format, entry.shape) == ("uniform:4:g32:asym", (32, 64))
    assert ql.inspect(tmp_path / "awq").layout == "awq"
    models.import_(tmp_path / "awq", tmp_path / "back")
    first, second = stored(tmp_path / "ours"), stored(tmp_path / "back")
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, ql.PackedTensor):
            assert value.format == second[name].format
            assert all(torch.equal(plane, second[name].planes[p]) for p, plane in value.planes.items())
        else:
            assert torch.equal(value, second[name])
    with pytest.raises(ValueError, match="group size"):
        mixed = ql.Recipe.parse("uniform:4:g32", overrides={"re:.*down_proj": "uniform:4:g16"})
        models.quantize(llama, mixed, output=tmp_path / "mixed")
        models.export(tmp_path / "mixed", tmp_path / "no", "awq")
    for change in ({"bits": 3}, {"version": "gemv"}, {"zero_point": False}):
        broken = tmp_path / f"broken-{next(iter(change))}"
        models.export(tmp_path / "ours", broken, "awq")
        model_factory.edit_json(
            broken / "config.json", lambda c, change=change: c["quantization_config"].update(change)
        )
        with pytest.raises(ValueError, match=next(iter(change))):
            models.import_(broken, tmp_path / "never")


def test_what_cuda_devices_do_not_round_is_refused():
    from quantloom.models.structure import Targets, require_cuda_rounding

    targets = Targets({"layer": ql.Uniform(4)}, ())
    require_cuda_rounding(targets, "cuda", ql.parse_rounding("awq+nearest:search"))
    whole = Targets({"layer": ql.Uniform(4, "tensor")}, ())
    require_cuda_rounding(whole, "cuda", ql.parse_rounding("awq+nearest:search"))
    for spec in ("awq", "nearest:output-search", "awq+gptq:output-search"):
        require_cuda_rounding(targets, "cuda", ql.parse_rounding(spec))
        with pytest.raises(RuntimeError, match="CPU only"):
            require_cuda_rounding(whole, "cuda", ql.parse_rounding(spec))
    with pytest.raises(RuntimeError, match="no CUDA kernel rounds"):
        vectors = Targets({"layer": ql.parse_format("vector_codebook:16x2")}, ())
        require_cuda_rounding(vectors, "cuda", ql.parse_rounding("nearest"))
    additive = Targets({"layer": ql.Additive(2, 8)}, ())
    for spec in ("nearest", "gptq", "beam_search:gptq"):
        require_cuda_rounding(additive, "cuda", ql.parse_rounding(spec))
    with pytest.raises(RuntimeError, match="CPU only"):
        require_cuda_rounding(additive, "cuda", ql.parse_rounding("gptq:search"))
