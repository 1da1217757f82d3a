"""Loading quantized checkpoints: what they compute, and what is refused."""

import json
import shutil

import model_factory
import pytest
import quantloom as ql
import torch
from quantloom import models

IDS = torch.arange(24)[None] * 5 % model_factory.VOCABULARY


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama())


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "out"
    models.quantize(model, ql.Recipe.parse("uniform:4:g32:asym"), output=out)
    return out


@pytest.fixture
def copy(quantized, tmp_path):
    return shutil.copytree(quantized, tmp_path / "copy")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", sorted(model_factory.FAMILIES))
def test_load_computes_with_decoded_weights(family, tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.FAMILIES[family]())
    report = models.quantize(folder, ql.Recipe.parse("uniform:4:g32:asym"), output=tmp_path / "out")
    reference = models.load_reference(folder)
    original = logits(reference)
    with torch.no_grad():  # by hand: the original model with each weight replaced
        for module in report.modules:
            weight = reference.get_submodule(module.name).weight
            weight.copy_(ql.quantize(weight, "uniform:4:g32:asym").dequantize())
    expected = logits(reference)
    assert not torch.equal(expected, original)
    assert torch.equal(logits(models.load(tmp_path / "out", torch.float32, dequantized=True)), expected)
    packed = models.load(tmp_path / "out", torch.float32)
    assert not packed.training
    kinds = [type(packed.get_submodule(module.name)) for module in report.modules]
    assert kinds == [ql.nn.QuantLinear] * len(kinds)
    torch.testing.assert_close(logits(packed), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_reference_is_what_transformers_loads(model):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ours = models.load_reference(model)
    assert torch.equal(logits(theirs), logits(ours))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert models.load_reference(model, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_devices(model, quantized):
    assert torch.equal(logits(models.load(quantized, device="cpu")), logits(models.load(quantized)))
    assert models.load_reference(model, device=torch.device("cpu")).device.type == "cpu"
    for load in (
        lambda device: models.load(quantized, device=device),
        lambda d: models.load_reference(model, device=d),
    ):
        with pytest.raises(ValueError, match=r"device.*'moon'.*cuda"):
            load("moon")
        with pytest.raises(ValueError, match=r"device.*'meta'.*cuda"):
            load("meta")
        with pytest.raises(RuntimeError, match=r"device.*'cuda:99'"):
            load("cuda:99")


def test_dtypes(quantized):
    stored = models.load(quantized)
    assert stored.model.embed_tokens.weight.dtype == torch.bfloat16
    assert logits(stored).dtype == torch.bfloat16
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    single = models.load(quantized, torch.float32)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert single.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(TypeError, match="dtype"):
        models.load(quantized, torch.int8)
    with pytest.raises(TypeError, match="dtype"):
        models.load(quantized, "float32")


def test_generates(quantized):
    loaded = models.load(quantized, torch.float32)
    out = loaded.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = models.load(quantized, torch.float32, dequantized=True)
    assert torch.equal(out, plain.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_config_keeps_what_the_original_says(model, quantized):
    before = json.loads((model / "config.json").read_text())
    after = json.loads((quantized / "config.json").read_text())
    settings = after.pop("quantization_config")
    assert after == before
    assert settings["version"] == 1 and len(settings["modules"]) == 14
    for entry in settings["modules"].values():
        assert ql.format_from_json(json.dumps(entry)) == ql.parse_format("uniform:4:g32:asym")


def test_wrong_folders(model, tmp_path):
    with pytest.raises(NotADirectoryError, match="path"):
        models.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="quant_method None"):
        models.load(model)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected an object"):
        models.load(tmp_path)


def test_originals_that_cannot_be_read(model, quantized, tmp_path):
    recipe = ql.Recipe.parse("uniform:4:g32")
    with pytest.raises(ValueError, match="already quantized"):
        models.quantize(quantized, recipe, output=tmp_path / "out")
    copy = shutil.copytree(model, tmp_path / "copy")
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a valid safetensors file"):
        models.load_reference(copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        models.load_reference(copy)
    tensors = ql.load_tensors(model / "model.safetensors", kind="torch")
    norm = tensors.pop("model.norm.weight")
    ql.save_tensors(file, tensors)
    with pytest.raises(
        ValueError, match=r"1 parameters of the model are not in the files: model\.norm\.weight"
    ):
        models.quantize(copy, recipe, output=tmp_path / "out")
    ql.save_tensors(file, tensors | {"model.norm.weight": norm[:-1]})
    with pytest.raises(ValueError, match=r"model\.norm\.weight' has shape \[63\], expected \[64\]"):
        models.quantize(copy, recipe, output=tmp_path / "out")
    ql.save_tensors(file, tensors | {"model.norm.weight": norm, "model.extra": norm})
    report = models.quantize(copy, recipe, output=tmp_path / "good")
    assert report.unused_tensors == ("model.extra",)
    model_factory.edit_json(copy / "config.json", lambda c: c.update(model_type="no-such-model"))
    with pytest.raises(ValueError, match="no-such-model"):
        models.load_reference(copy)
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="plain file name"):
        models.load_reference(copy)


def test_checkpoints_of_a_bare_decoder(tmp_path):
    config = model_factory.llama()
    model_factory.write_model(tmp_path / "full", config)
    tensors = ql.load_tensors(tmp_path / "full" / "model.safetensors", kind="torch")
    bare = shutil.copytree(tmp_path / "full", tmp_path / "bare")
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
    ql.save_tensors(bare / "model.safetensors", renamed)
    for name in ("full", "bare"):
        models.quantize(tmp_path / name, ql.Recipe.parse("uniform:4:g32"), output=tmp_path / f"{name}-out")
    results = [logits(models.load(tmp_path / f"{n}-out", torch.float32)) for n in ("full", "bare")]
    assert torch.equal(*results)


def test_damaged_files_are_named(copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for position in (-1, -len(whole) // 2):
        content = bytearray(whole)
        content[position] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            models.load(copy)
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        models.load(copy)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        models.load(copy)


def test_config_and_files_must_agree(copy):
    path = copy / "config.json"
    original = path.read_text()
    name = "model.layers.1.mlp.up_proj"

    def change(edit):
        path.write_text(original)
        model_factory.edit_json(path, lambda config: edit(config, config["quantization_config"]))

    change(lambda _, settings: settings["modules"].pop(name))
    with pytest.raises(ValueError, match=f"does not list {name}"):
        models.load(copy)
    change(lambda _, settings: settings["modules"].update({name: json.loads(ql.Uniform(3).to_json())}))
    with pytest.raises(ValueError, match=f"{name} has format"):
        models.load(copy)
    change(lambda _, settings: settings["modules"].update(ghost=json.loads(ql.Uniform(3).to_json())))
    with pytest.raises(ValueError, match="ghost"):
        models.load(copy)
    change(lambda _, settings: settings.update(version=2))
    with pytest.raises(ValueError, match="version 2"):
        models.load(copy)
    change(lambda _, settings: settings.update(modules={}))
    with pytest.raises(ValueError, match="no modules"):
        models.load(copy)
    change(lambda config, _: config.update(intermediate_size=128))
    with pytest.raises(ValueError, match=r"mlp\.\w+ is \[\d+, \d+\], expected"):
        models.load(copy)


def test_architectures_whose_tensors_are_converted_are_refused(tmp_path):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=model_factory.VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    folder = model_factory.write_model(tmp_path / "model", config)
    with pytest.raises(ValueError, match=r"experts\..*transformers makes them of others"):
        models.quantize(folder, ql.Recipe.parse("uniform:4:g32"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
