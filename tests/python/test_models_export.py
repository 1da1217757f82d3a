"""Checkpoints in other libraries' layouts: their keys, what transformers computes from them, and back."""

import json

import model_factory
import numpy as np
import pytest
import quantloom as ql
import torch
import transformers
from quantloom import models
from quantloom.models.layouts import refusal

LAYOUTS = ("gptq", "gptq_v2", "compressed-tensors")  # of uniform formats
IDS = torch.arange(24)[None] * 3 % model_factory.VOCABULARY


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama())
    model_factory.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """Checkpoints by short form, made when first asked for."""
    made = {}

    def get(spec, **settings):
        key = (spec, repr(settings))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "out"
            models.quantize(model, ql.Recipe.parse(spec, **settings), output=made[key])
        return made[key]

    return get


def stored(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= ql.load_tensors(file, kind="torch")
    return tensors


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_gptq_config_has_all_keys_that_loaders_ask_for(quantized, tmp_path):
    report = models.export(quantized("uniform:4:g32"), tmp_path / "out", "gptq")
    assert report.layout == "gptq" and len(report.modules) == 14
    config = config_of(tmp_path / "out")
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"quantloom:{ql.__version__}"]},
    }
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    tensors = stored(tmp_path / "out")
    prefix = "model.layers.0.self_attn.k_proj."
    parts = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in parts.items()} == {
        "qweight": (torch.int32, (8, 32)),
        "qzeros": (torch.int32, (2, 4)),
        "scales": (torch.float16, (2, 32)),
        "g_idx": (torch.int32, (64,)),
    }
    assert (parts["qzeros"] == 0x77777777).all() and parts["g_idx"].tolist() == [0] * 32 + [1] * 32
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / ".work").exists()


def test_compressed_tensors_config_has_all_keys_that_loaders_ask_for(quantized, tmp_path):
    models.export(quantized("uniform:4:g32:asym:bf16"), tmp_path / "out", "compressed-tensors")
    assert config_of(tmp_path / "out") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "actorder": None,
                    "observer": "minmax",
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    prefix = "model.layers.0.self_attn.k_proj."
    parts = {n.removeprefix(prefix): v for n, v in stored(tmp_path / "out").items() if n.startswith(prefix)}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in parts.items()} == {
        "weight_packed": (torch.int32, (32, 8)),
        "weight_scale": (torch.bfloat16, (32, 2)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (4, 2)),
    }
    assert parts["weight_shape"].tolist() == [32, 64]


OVERRIDES = {r"re:.*\.1\.mlp\.down_proj": "uniform:8:channel", "model.layers.0.self_attn.q_proj": None}


def test_exceptions_are_named_in_both_configs(quantized, tmp_path):
    source = quantized("uniform:4:g32", overrides=OVERRIDES)
    models.export(source, tmp_path / "gptq", "gptq")
    config = config_of(tmp_path / "gptq")
    assert config["dynamic"] == {
        r"-:^model\.layers\.0\.self_attn\.q_proj$": {},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }
    models.export(source, tmp_path / "ct", "compressed-tensors")
    config = config_of(tmp_path / "ct")
    groups = config["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    assert groups["group_1"]["targets"] == ["model.layers.1.mlp.down_proj"]
    assert groups["group_1"]["weights"]["strategy"] == "channel"
    assert groups["group_1"]["weights"]["group_size"] is None
    assert len(groups["group_0"]["targets"]) == 12
    assert config["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]


ROUND_TRIPS = [
    ("gptq", "uniform:4:g32"),
    ("gptq", "uniform:8:channel"),
    ("gptq", "uniform:3:g32"),
    ("gptq_v2", "uniform:4:g32:asym"),
    ("gptq_v2", "uniform:2:g16:asym:bf16"),
    ("awq", "uniform:4:g16:asym"),
    ("awq", "uniform:4:channel:asym"),
    *[("compressed-tensors", f"uniform:{bits}:g32:asym") for bits in (1, 2, 4, 7)],
    ("compressed-tensors", "uniform:4:channel"),
    ("compressed-tensors", "uniform:8:tensor:sym:f32"),
]


@pytest.mark.parametrize(("layout", "spec"), ROUND_TRIPS)
def test_import_gives_back_what_was_exported(layout, spec, quantized, tmp_path):
    source = quantized(spec)
    models.export(source, tmp_path / "other", layout)
    report = models.import_(tmp_path / "other", tmp_path / "back")
    before, after = stored(source), stored(tmp_path / "back")
    assert before.keys() == after.keys() and len(report.modules) == 14
    for name, value in before.items():
        if isinstance(value, ql.PackedTensor):
            assert after[name].format == value.format and after[name].shape == value.shape
            assert after[name].planes.keys() == value.planes.keys()
            for plane in value.planes:
                assert torch.equal(after[name].planes[plane], value.planes[plane])
        else:
            assert torch.equal(after[name], value)


def test_round_trip_of_exceptions(quantized, tmp_path):
    source = quantized("uniform:4:g32", overrides=OVERRIDES)
    for layout in LAYOUTS:
        models.export(source, tmp_path / layout, layout)
        models.import_(tmp_path / layout, tmp_path / f"{layout}-back")
        before, after = config_of(source)["modules"], config_of(tmp_path / f"{layout}-back")["modules"]
        assert before == after


def loaded_by_transformers(folder, symmetric):
    """What transformers makes of a compressed-tensors checkpoint, in float32.

    Asymmetric weights are decompressed while they are loaded, in the dtype of the scales: compressed-tensors
    0.20 allots zero points of the wrong shape when it keeps them packed.
    """
    pytest.importorskip("compressed_tensors")
    settings = {}
    if not symmetric:
        settings["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@pytest.mark.parametrize(
    "spec",
    [
        "uniform:4:g32",
        "uniform:8:channel",
        "uniform:3:g32",
        "uniform:4:g32:asym:f32",
        "uniform:5:channel:asym:f32",
    ],
)
def test_transformers_computes_the_same_from_compressed_tensors(spec, quantized, tmp_path):
    source = quantized(spec)
    models.export(source, tmp_path / "out", "compressed-tensors")
    theirs = loaded_by_transformers(tmp_path / "out", symmetric="asym" not in spec)
    ours = models.load(source, torch.float32)
    with torch.no_grad():
        a, b = theirs(IDS).logits, ours(IDS).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_transformers_computes_the_same_from_mixed_formats_of_another_family(tmp_path):
    model = model_factory.write_model(tmp_path / "model", model_factory.gpt_neox(), seed=3)
    recipe = ql.Recipe.parse("uniform:4:g32", overrides={r"re:.*dense_4h_to_h": "uniform:8:channel"})
    models.quantize(model, recipe, output=tmp_path / "quantized")
    models.export(tmp_path / "quantized", tmp_path / "out", "compressed-tensors")
    theirs = loaded_by_transformers(tmp_path / "out", symmetric=True)
    ours = models.load(tmp_path / "quantized", torch.float32)
    with torch.no_grad():
        a, b = theirs(IDS).logits, ours(IDS).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_exported_shards_have_an_index(model, tmp_path):
    models.quantize(model, ql.Recipe.parse("uniform:4:g32"), output=tmp_path / "q", max_shard_bytes=20_000)
    models.export(tmp_path / "q", tmp_path / "out", "gptq")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(stored(tmp_path / "out"))
    for name, file in index.items():
        assert name in ql.load_tensors(tmp_path / "out" / file)
    models.import_(tmp_path / "out", tmp_path / "back")
    assert stored(tmp_path / "back").keys() == stored(tmp_path / "q").keys()


REFUSALS = [
    ("uniform:5:g32", "gptq", "2, 3, 4 and 8 bits"),
    ("uniform:4:tensor", "gptq", "scale per row"),
    ("uniform:4:g32:sym:f32", "gptq_v2", "float16 and bfloat16"),
    ("uniform:4:g48", "gptq", "divides in_features"),
    ("uniform:4:g48", "compressed-tensors", "divides in_features"),
    ("uniform:1:g32:sym", "compressed-tensors", "zero point"),
]


@pytest.mark.parametrize(("spec", "layout", "message"), REFUSALS)
def test_what_a_layout_cannot_hold_is_refused_first(spec, layout, message, model, quantized, tmp_path):
    source = quantized(spec)
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.[a-z_.]*: .*{message}.*1. more"):
        models.export(source, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()
    plan = models.plan(model, ql.Recipe.parse(spec), layout=layout)
    assert len(plan.refusals) >= 12 and all(message in reason for reason in plan.refusals.values())


def test_zero_points_that_gptq_v1_cannot_hold_are_refused(quantized, tmp_path, model):
    tensors = stored(model)
    for name, value in tensors.items():
        if "proj" in name:
            tensors[name] = value.abs()  # lo = 0, so every zero point is 0
    positive = tmp_path / "model"
    positive.mkdir()
    ql.save_tensors(positive / "model.safetensors", tensors)
    (positive / "config.json").write_bytes((model / "config.json").read_bytes())
    models.quantize(positive, ql.Recipe.parse("uniform:4:g32:asym"), output=tmp_path / "q")
    with pytest.raises(ValueError, match=r"layout: model\.layers\.\d.*zero"):
        models.export(tmp_path / "q", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    models.export(tmp_path / "q", tmp_path / "out", "gptq_v2")


def test_mislabelled_zero_points_are_refused(quantized, tmp_path):
    models.export(quantized("uniform:4:g32"), tmp_path / "gptq", "gptq")
    for name in ("config.json", "quantize_config.json"):
        model_factory.edit_json(
            tmp_path / "gptq" / name,
            lambda c: c.get("quantization_config", c).update(checkpoint_format="gptq_v2"),
        )
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.\w+\.\w+: .*qzeros"):
        models.import_(tmp_path / "gptq", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_bad_arguments(quantized, model, tmp_path):
    source = quantized("uniform:4:g32")
    with pytest.raises(ValueError, match="layout"):
        models.export(source, tmp_path / "out", "awq-gemm")
    with pytest.raises(ValueError, match="quant_method"):
        models.export(model, tmp_path / "out", "gptq")
    with pytest.raises(ValueError, match="own folder"):
        models.export(source, source, "gptq")
    with pytest.raises(ValueError, match="not quantized"):
        models.import_(model, tmp_path / "out")
    with pytest.raises(ValueError, match="'quantloom', expected 'gptq',"):
        models.import_(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        models.import_(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    models.export(source, tmp_path / "out", "gptq")
    with pytest.raises(ValueError, match="overwrite=True"):
        models.export(source, tmp_path / "out", "compressed-tensors")
    models.export(source, tmp_path / "out", "compressed-tensors", overwrite=True)
    assert config_of(tmp_path / "out")["quant_method"] == "compressed-tensors"
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_notes_say_which_scales_get_rounded(quantized, tmp_path):
    report = models.export(quantized("uniform:4:g32"), tmp_path / "a", "compressed-tensors")
    assert any("bfloat16" in note for note in report.notes)
    report = models.export(quantized("uniform:4:g32:sym:bf16"), tmp_path / "b", "compressed-tensors")
    assert report.notes == ()


def test_refusals_agree_with_the_converters():
    generator = np.random.default_rng(0)
    for spec in (
        "uniform:4:g32",
        "uniform:3:channel:asym",
        "uniform:5:g32",
        "uniform:8:tensor",
        "uniform:1:g32",
    ):
        for n, k in ((32, 64), (33, 64), (64, 96)):
            q = ql.quantize(generator.standard_normal((n, k), dtype=np.float32), spec)
            for layout in LAYOUTS:
                if refusal(q.format, n, k, layout) is None:
                    if layout == "compressed-tensors":
                        assert ql.layouts.to_compressed_tensors(q)
                    else:
                        assert ql.layouts.to_gptq(q, "gptq_v2")


def test_spqr_tiles_come_back(model, quantized, tmp_path):
    recipe = ql.Recipe(ql.SpQR(3), rounding=ql.GPTQ(outliers=ql.OutlierSearch(percent=2)))
    folder = tmp_path / "quantized"
    ids = torch.arange(24 * 4) * 7 % model_factory.VOCABULARY
    models.quantize(model, recipe, calibration=ids, output=folder, windows=4, window=24, held_out_windows=0)
    report = models.export(folder, tmp_path / "tiles", "spqr")
    assert report.layout == "spqr" and len(report.modules) == 14
    config, tensors = config_of(tmp_path / "tiles"), stored(tmp_path / "tiles")
    assert (config["quant_method"], config["bits"], config["beta1"], config["beta2"]) == ("spqr", 3, 16, 16)
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert len(config["shapes"]) == 4 * 14
    for name, length in config["shapes"].items():
        assert tuple(tensors[name.removesuffix(".shape")].shape) == (length,)
    models.import_(tmp_path / "tiles", tmp_path / "back")
    before, after = stored(folder), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, ql.PackedTensor):
            assert torch.equal(value.dequantize(), after[name].dequantize()), name
    with pytest.raises(ValueError, match="spqr holds"):
        models.export(quantized("uniform:4:g32"), tmp_path / "no", "spqr")
    broken = json.loads((tmp_path / "tiles" / "config.json").read_text())
    broken["quantization_config"]["beta1"] = 32
    (tmp_path / "tiles" / "config.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="beta1 32"):
        models.import_(tmp_path / "tiles", tmp_path / "refused")
