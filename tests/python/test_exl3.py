"""EXL3 checkpoints: folders written by hand, against an implementation of the layout in NumPy."""

from __future__ import annotations

import json
import math

import model_factory
import numpy as np
import pytest
import quantloom as ql
import torch
import transformers
from quantloom import layouts, models
from quantloom.cli import app
from safetensors.torch import save_file
from typer.testing import CliRunner

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
IDS = torch.arange(24)[None] * 3 % model_factory.VOCABULARY


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the layout by its definition -----------------------------------------------------------------------


def weights_of_states(states: np.ndarray, codebook: str) -> np.ndarray:
    """float16 arithmetic on 32-bit hashes."""
    states = states.astype(np.uint64)
    if codebook == "mul1":
        hashes = states * MULTIPLIERS["mul1"] % 2**32
        sums = sum(hashes >> (8 * byte) & 255 for byte in range(4)).astype(np.float64)
        slope, offset = (np.array(bits, np.uint16).view(np.float16) for bits in (0x1EEE, 0xC931))
        return ((1024 + sums) * np.float64(slope) + np.float64(offset)).astype(np.float16)
    hashes = states * MULTIPLIERS["mcg"] if codebook == "mcg" else states * 89226354 + 64248484
    pairs = ((hashes % 2**32).astype(np.uint32) & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = (pairs & 0xFFFF).astype(np.uint16), (pairs >> 16).astype(np.uint16)
    return low.view(np.float16) + high.view(np.float16)


def ring_states(words: np.ndarray, bits: float) -> np.ndarray:
    """The 16 bits before the end of each position's own bits, around each ring."""
    stream = np.unpackbits(words.astype(">u4").view(np.uint8), axis=-1)
    ends = np.floor(np.arange(1, 257) * bits).astype(int)
    windows = stream[..., (ends[:, None] - 16 + np.arange(16)) % stream.shape[-1]]
    return windows @ (1 << np.arange(15, -1, -1))


def decode_layer(layer: dict[str, np.ndarray]) -> np.ndarray:
    """W [out, in] of the tensors of a layer, padded, in float64."""
    trellis = np.ascontiguousarray(layer["trellis"])
    rows, columns, shorts = trellis.shape  # of tiles: inputs, outputs
    codebook = next((name for name in MULTIPLIERS if name in layer), "3inst")
    weights = weights_of_states(ring_states(trellis.view(np.uint32), shorts / 16), codebook)
    tiles = np.zeros((rows, columns, 16, 16))
    for t in range(32):
        for e in range(8):
            row = 2 * (t % 4) + e % 2 + 8 * (e // 2 % 2)
            column = t // 4 + 8 * (e // 4)
            tiles[:, :, row, column] = weights[:, :, 8 * t + e]
    inner = tiles.transpose(0, 2, 1, 3).reshape(16 * rows, 16 * columns)
    h = np.array([[1 - 2 * (bin(a & b).count("1") % 2) for a in range(128)] for b in range(128)])
    h = h / math.sqrt(128)
    inner = (h @ inner.reshape(-1, 128, inner.shape[1])).reshape(inner.shape)
    inner = (inner.reshape(inner.shape[0], -1, 128) @ h).reshape(inner.shape)
    sides = []
    for scales, signs in (("suh", "su"), ("svh", "sv")):
        if scales in layer:
            sides.append(np.asarray(layer[scales]).astype(np.float64))
        else:
            fields = np.asarray(layer[signs]).view(np.uint16).astype(int)
            sides.append(1.0 - 2.0 * (fields[:, None] >> np.arange(16) & 1).reshape(-1))
    return (sides[0][:, None] * inner * sides[1]).T


def random_layer(rng, n, k, bits, codebook, signs=False):
    """A layer [n, k] of random bits as NumPy arrays, padded as exllamav3 pads."""
    n, k = (-(-size // 128) * 128 for size in (n, k))
    shorts = round(16 * bits)
    layer = {"trellis": rng.integers(-(2**15), 2**15, (k // 16, n // 16, shorts), dtype=np.int16)}
    if signs:
        layer["su"] = rng.integers(-(2**15), 2**15, k // 16, dtype=np.int16)
        layer["sv"] = rng.integers(-(2**15), 2**15, n // 16, dtype=np.int16)
    else:
        layer["suh"] = (rng.standard_normal(k) / math.sqrt(k)).astype(np.float16)
        layer["svh"] = (1 + 0.3 * rng.standard_normal(n)).astype(np.float16)
    if codebook in MULTIPLIERS:
        layer[codebook] = np.array(MULTIPLIERS[codebook], np.uint32).view(np.int32)
    return layer


CASES = [
    *[(bits, name) for bits in range(1, 9) for name in ("3inst", "mcg", "mul1")],
    *[(bits + 0.5, "mul1") for bits in range(1, 8)],
]


@pytest.mark.parametrize(("bits", "codebook"), CASES)
def test_layers_decode_by_the_definition_and_go_back_bit_for_bit(rng, bits, codebook):
    layer = random_layer(rng, 128, 256, bits, codebook)
    q = layouts.from_exl3(layer)
    assert q.shape == (128, 256) and q.format == ql.Trellis(bits, codebook)
    expected = decode_layer(layer)
    np.testing.assert_allclose(q.dequantize(), expected, atol=1e-6 * np.abs(expected).max())
    back = layouts.to_exl3(q)
    assert back.keys() == layer.keys()
    for name, array in layer.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


def test_sizes_signs_and_kinds(rng):
    layer = random_layer(rng, 200, 130, 3, "3inst", signs=True)
    q = layouts.from_exl3(layer, (200, 130))
    expected = decode_layer(layer)[:200, :130]
    np.testing.assert_allclose(q.dequantize(), expected, atol=1e-6 * np.abs(expected).max())
    again = layouts.from_exl3(layouts.to_exl3(q), (200, 130))
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    tensors = {name: torch.from_numpy(array) for name, array in layer.items()}
    by_torch = layouts.from_exl3(tensors, (200, 130))
    assert by_torch.kind == "torch"
    np.testing.assert_array_equal(by_torch.dequantize().numpy(), q.dequantize())
    assert all(isinstance(value, torch.Tensor) for value in layouts.to_exl3(by_torch).values())
    for shape, error in (
        ((328, 130), ValueError),
        ((128, 130), ValueError),
        ((0, 1), ValueError),
        (5, TypeError),
    ):
        with pytest.raises(error):
            layouts.from_exl3(layer, shape)
    w = rng.standard_normal((128, 128)).astype(np.float32)
    for spec, words in (("trellis:2:mcg-CAF6A435:l16", "CAF6A435"), ("uniform:4", "uniform")):
        with pytest.raises(RuntimeError, match=words):
            layouts.to_exl3(ql.quantize(w, spec))
    rotated = ql.quantize(w, "trellis:2", transform=ql.Hadamard(block=128))
    with pytest.raises(RuntimeError, match="transform"):
        layouts.to_exl3(rotated)


def test_folders_without_a_model(rng, tmp_path):
    layers = {
        "model.layers.0.mlp.experts.0.up_proj": random_layer(rng, 128, 256, 3, "mul1"),
        "model.layers.0.mlp.experts.1.up_proj": random_layer(rng, 200, 256, 2.5, "mul1"),
        "lm_head": random_layer(rng, 128, 128, 6, "3inst", signs=True),
    }
    tensors = {f"{name}.{part}": np.array(a) for name, layer in layers.items() for part, a in layer.items()}
    tensors["model.norm.weight"] = np.ones(256, np.float16)
    names = sorted(tensors)
    for i in range(3):
        part = {name: torch.from_numpy(tensors[name]) for name in names[i::3]}
        save_file(part, tmp_path / f"model-{i + 1:05d}-of-00003.safetensors")
    second = "model.layers.0.mlp.experts.1.up_proj"
    for kind in ("numpy", "torch"):
        read = layouts.read_exl3(tmp_path, {second: (200, 250)}, kind)
        assert read.keys() == {*layers, "model.norm.weight"}
        for name, layer in layers.items():
            expected = decode_layer(layer)
            if name == second:
                expected = expected[:200, :250]
            assert read[name].shape == expected.shape and read[name].kind == kind
            np.testing.assert_allclose(np.asarray(read[name].dequantize()), expected, atol=1e-5)
        assert np.asarray(read["model.norm.weight"]).tolist() == [1.0] * 256
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj: .*[1-9]"):
        layouts.read_exl3(tmp_path, {second: (2000, 250)})
    with pytest.raises(ValueError, match="shapes: got 'other'"):
        layouts.read_exl3(tmp_path, {"other": (1, 1)})
    save_file({names[0]: torch.from_numpy(tensors[names[0]])}, tmp_path / "extra.safetensors")
    with pytest.raises(ValueError, match=r"stored in extra\.safetensors too"):
        layouts.read_exl3(tmp_path)
    (tmp_path / "extra.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="extra"):
        layouts.read_exl3(tmp_path)
    with pytest.raises(FileNotFoundError):
        layouts.read_exl3(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        layouts.read_exl3(tmp_path / "empty")


# -- folders --------------------------------------------------------------------------------------------

BITS = [2, 3, 2.5, 4, 5, 1, 8, 6, 7]


def llama_with_biases():
    config = model_factory.llama(hidden=128, intermediate=200)
    config.attention_bias = config.mlp_bias = True
    return config


def write_folder(folder, rng, shards=1, signs=False, seed=0, head=True):
    """An EXL3 checkpoint of a random Llama, as exllamav3 writes it: mixed bits and codebooks, padded biases,
    a head of its own where the model ties it to the embeddings. Returns decoded weights by module."""
    original = model_factory.build(llama_with_biases(), seed)
    original.config.save_pretrained(folder)
    tensors, decoded = {}, {}
    linears = [(n, m) for n, m in original.named_modules() if isinstance(m, torch.nn.Linear)]
    for index, (name, linear) in enumerate(linears):
        if name == "lm_head" and not head:
            continue
        bits = BITS[index % len(BITS)]
        codebook = "mul1" if bits % 1 else ("3inst", "mcg", "mul1")[index % 3]
        shape = linear.out_features, linear.in_features
        layer = random_layer(rng, *shape, bits, codebook, signs and index % 2 == 0)
        if signs:  # of the size that weights have
            layer["trellis"] = np.where(rng.random(layer["trellis"].shape) < 0.5, layer["trellis"], 0)
        decoded[name] = decode_layer(layer)[: shape[0], : shape[1]]
        tensors |= {f"{name}.{part}": torch.from_numpy(np.array(array)) for part, array in layer.items()}
        if linear.bias is not None:
            bias = torch.zeros(-(-shape[0] // 128) * 128, dtype=torch.float16)
            bias[: shape[0]] = linear.bias.detach().half()
            tensors[f"{name}.bias"] = bias
            linear.bias.data = bias[: shape[0]].float()
    for name, value in original.state_dict().items():
        module = name.rpartition(".")[0]
        if module not in decoded and name != "lm_head.weight":
            tensors[name] = value.to(torch.bfloat16)
    # Linears with several tensors may lie in several files.
    names = sorted(tensors, key=lambda name: hash(name) if shards > 1 else 0)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
    settings = {"quant_method": "exl3", "version": "1.4.1", "bits": 4.0, "head_bits": 6, "codebook": "mul1"}
    model_factory.edit_json(folder / "config.json", lambda c: c.update(quantization_config=settings))
    return decoded, tensors


def reference(folder, decoded, tensors):
    """The model by transformers alone, with decoded weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {f"{name}.weight": torch.from_numpy(w).float() for name, w in decoded.items()}
    for name, value in tensors.items():
        if name.rpartition(".")[2] in ("weight", "bias"):
            n = len(decoded.get(name.removesuffix(".bias"), value))
            state[name] = value[:n].float()
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(("shards", "signs", "head"), [(1, False, True), (3, True, True), (2, False, False)])
def test_folders_load_import_and_go_back(rng, tmp_path, shards, signs, head):
    folder = tmp_path / "exl3"
    folder.mkdir()
    decoded, tensors = write_folder(folder, rng, shards, signs, head=head)
    with torch.no_grad():
        expected = reference(folder, decoded, tensors)(IDS).logits
        loaded = models.load(folder, torch.float32, dequantized=True)
        assert loaded.training is False
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=tolerance)
        packed = models.load(folder, torch.float32)
        assert all(isinstance(packed.get_submodule(name), ql.nn.QuantLinear) for name in decoded)
        torch.testing.assert_close(packed(IDS).logits, expected, rtol=1e-4, atol=tolerance)
        half = models.load(folder, torch.bfloat16)
        assert half(IDS).logits.dtype == torch.bfloat16
        written = [
            model.generate(IDS[:, :5], max_new_tokens=6, min_new_tokens=6, do_sample=False)
            for model in (loaded, packed)
        ]
        assert written[0].tolist() == written[1].tolist() and written[0].shape == (1, 11)
    report = models.import_(folder, tmp_path / "ours")
    assert report.layout == "exl3" and set(report.modules) == decoded.keys()
    ours = models.load(tmp_path / "ours", torch.float32, dequantized=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=tolerance)
    report = models.export(tmp_path / "ours", tmp_path / "back", "exl3")
    assert not report.notes or "multiples of 128" in report.notes[0]
    back = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        back |= ql.load_tensors(file, kind="torch")
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if part in ("su", "sv"):
            n = decoded[module].shape[1 if part == "su" else 0]
            fields = value.numpy().view(np.uint16).astype(int)
            plain = 1.0 - 2.0 * (fields[:, None] >> np.arange(16) & 1).reshape(-1)
            np.testing.assert_array_equal(back[f"{name}h"].numpy()[:n], plain[:n])
        elif part in ("suh", "svh"):
            n = decoded[module].shape[1 if part == "suh" else 0]
            assert back[name].shape == value.shape and back[name][:n].equal(value[:n])
            assert not back[name][n:].any()
        else:
            assert back[name].dtype == value.dtype and back[name].equal(value), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "exl3"
    assert config["quantization_config"]["head_bits"] == (loaded_bits(tensors, "lm_head") if head else 16)
    assert config["tie_word_embeddings"] is not head
    storage = json.loads((tmp_path / "back" / "quantization_config.json").read_text())["tensor_storage"]
    listed = {}
    for module, entry in storage.items():
        listed |= entry["stored_tensors"]
        if module in decoded:
            assert entry["quant_format"] == "exl3"
            assert entry["bits_per_weight"] == loaded_bits(tensors, module)
            for marker, multiplier in MULTIPLIERS.items():
                assert entry.get(f"{marker}_multiplier") == (
                    multiplier if f"{module}.{marker}" in tensors else None
                )
        else:
            assert "quant_format" not in entry
    assert listed.keys() == back.keys()
    for name, entry in listed.items():
        assert entry == {
            "shape": list(back[name].shape),
            "n_bytes": back[name].nbytes,
            "dtype": str(back[name].dtype),
        }
    # A second time around nothing changes.
    models.import_(tmp_path / "back", tmp_path / "again")
    models.export(tmp_path / "again", tmp_path / "twice", "exl3")
    for file in (tmp_path / "back").glob("*.safetensors"):
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes()


def loaded_bits(tensors, module):
    return tensors[f"{module}.trellis"].shape[-1] / 16


def test_a_quantized_model_becomes_an_exl3_folder(tmp_path):
    model = model_factory.write_model(tmp_path / "model", llama_with_biases())
    overrides = {r"re:.*\.1\.mlp\.down_proj": "trellis:4:3inst", r"re:.*q_proj": None}
    models.quantize(model, ql.Recipe.parse("trellis:2", overrides=overrides), output=tmp_path / "q")
    report = models.export(tmp_path / "q", tmp_path / "exl3", "exl3")
    assert report.layout == "exl3" and len(report.modules) == 12
    with torch.no_grad():
        a = models.load(tmp_path / "q", torch.float32, dequantized=True)(IDS).logits
        b = models.load(tmp_path / "exl3", torch.float32, dequantized=True)(IDS).logits
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()))  # biases: bfloat16, float16
    tensors = ql.load_tensors(tmp_path / "exl3" / "model.safetensors", kind="torch")
    prefix = "model.layers.0.mlp.gate_proj."
    assert {n.removeprefix(prefix): (v.dtype, tuple(v.shape)) for n, v in tensors.items() if prefix in n} == {
        "trellis": (torch.int16, (8, 16, 32)),
        "suh": (torch.float16, (128,)),
        "svh": (torch.float16, (256,)),
        "mul1": (torch.int32, ()),
        "bias": (torch.float16, (256,)),
    }
    settings = json.loads((tmp_path / "exl3" / "config.json").read_text())["quantization_config"]
    weights = {name: m for name, m in tensors.items() if name.endswith("trellis")}
    assert len(weights) == 12 and settings["codebook"] == "mul1" and 2 < settings["bits"] < 3
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "exl3"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["layout"] == "exl3"
    entries = {entry["name"]: entry for entry in document["tensors"] if entry["quantized"]}
    assert len(entries) == 12
    assert entries["model.layers.1.mlp.down_proj"]["format"] == "trellis:4:3inst"
    command = ["export", str(tmp_path / "q"), "-o", str(tmp_path / "again"), "--layout", "exl3"]
    assert CliRunner().invoke(app, command).exit_code == 0
    command = ["import", str(tmp_path / "again"), "-o", str(tmp_path / "back"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and json.loads(result.stdout)["layout"] == "exl3"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("trellis:2:mcg-FF7A83E5", "FF7A83E5"),
        ("trellis:2:1mad", "1mad"),
        ("trellis:2:mul1:plain", "plain"),
        ("trellis:2:mul1:l12", "12"),
        ("uniform:4:g32", "uniform"),
    ],
)
def test_what_exl3_cannot_hold_is_refused_first(tmp_path, spec, words):
    model = model_factory.write_model(tmp_path / "model", model_factory.llama(layers=1))
    models.quantize(model, ql.Recipe.parse(spec), output=tmp_path / "q")
    with pytest.raises(ValueError, match=rf"layout: model\.layers\.0\.[a-z_.]*: EXL3 .*{words}.*6 more"):
        models.export(tmp_path / "q", tmp_path / "out", "exl3")
    assert not (tmp_path / "out").exists()
    plan = models.plan(model, ql.Recipe.parse(spec), layout="exl3")
    assert len(plan.refusals) == 7 and all(words in reason for reason in plan.refusals.values())


NAME = "model.layers.0.self_attn.q_proj"


def damage(**changes):
    """Changes of the tensors of one Linear by part; None removes it."""

    def change(tensors):
        for part, value in changes.items():
            tensors.pop(f"{NAME}.{part}", None)
            if value is not None:
                tensors[f"{NAME}.{part}"] = value

    return change


DAMAGES = [
    (damage(trellis=None), f"{NAME}.* is stored, but no {NAME}.trellis"),
    (damage(suh=None), f"{NAME}: .*suh"),
    (damage(svh=torch.ones(256, dtype=torch.float16)), rf"{NAME}: .*svh.*256.*128"),
    (damage(suh=torch.full((128,), math.nan, dtype=torch.float16)), f"{NAME}: .*suh.*finite"),
    (damage(trellis=torch.zeros(8, 8, 33, dtype=torch.int16)), rf"{NAME}: .*trellis.*33"),
    (damage(trellis=torch.zeros(16, 8, 32, dtype=torch.int16)), rf"{NAME}: "),
    (damage(trellis=torch.zeros(8, 8, 32, dtype=torch.int32)), rf"{NAME}: .*trellis.*int32"),
    (damage(mcg=torch.tensor(5, dtype=torch.int32), mul1=None), rf"{NAME}: .*mcg.*00000005"),
    (
        damage(mcg=torch.tensor(0, dtype=torch.int32), mul1=torch.tensor(0, dtype=torch.int32)),
        rf"{NAME}: .*(00000000|mcg and mul1)",
    ),
    (damage(bias=torch.zeros(100, dtype=torch.float16)), rf"{NAME}: .*bias.*100"),
    (
        lambda t: t.update({"model.layers.7.mlp.up_proj.trellis": t[f"{NAME}.trellis"].clone()}),
        r"layers\.7\.mlp\.up_proj.*no Linear",
    ),
    (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight"),
    (lambda t: t.update({"stray": torch.ones(3)}), "stray"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGES)
def test_damaged_folders_are_refused_by_name(rng, tmp_path, change, words):
    folder = tmp_path / "exl3"
    folder.mkdir()
    _, tensors = write_folder(folder, rng)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        models.load(folder)
    if "norm" not in words and "stray" not in words:
        with pytest.raises(ValueError, match=words):
            models.import_(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_scales_of_the_oldest_files_are_left_out(rng, tmp_path):
    folder = tmp_path / "exl3"
    folder.mkdir()
    _, tensors = write_folder(folder, rng)
    with torch.no_grad():
        expected = models.load(folder, torch.float32)(IDS).logits
        tensors[f"{NAME}.scale"] = torch.full((1,), 0.5)
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(models.load(folder, torch.float32)(IDS).logits, expected)
    report = models.import_(folder, tmp_path / "out")
    assert len(report.notes) == 1 and f"{NAME}.scale" in report.notes[0]
    read = layouts.read_exl3(folder)
    assert NAME in read and f"{NAME}.scale" not in read


def test_truncated_files_are_refused(rng, tmp_path):
    folder = tmp_path / "exl3"
    folder.mkdir()
    write_folder(folder, rng, shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    content = file.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="model-00002"):
            models.load(folder)
        with pytest.raises(ValueError, match="model-00002"):
            models.import_(folder, tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        models.load(folder)
    file.write_bytes(content)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        models.load(folder)
    model_factory.write_model(tmp_path / "plain", model_factory.llama(layers=1))
    settings = {"quant_method": "exl3"}
    model_factory.edit_json(
        tmp_path / "plain" / "config.json", lambda c: c.update(quantization_config=settings)
    )
    with pytest.raises(ValueError, match=r"no tensor named \*\.trellis"):
        models.load(tmp_path / "plain")


def test_no_byte_of_a_header_breaks_the_reader(rng, tmp_path):
    layer = random_layer(rng, 128, 128, 1, "mul1")
    file = tmp_path / "model.safetensors"
    save_file({f"layer.{part}": torch.from_numpy(np.array(a)) for part, a in layer.items()}, file)
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    expected = layouts.read_exl3(file)["layer"].dequantize()
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(0, header)] = rng.integers(0, 256)
        file.write_bytes(changed)
        try:
            read = layouts.read_exl3(file)
        except (ValueError, TypeError, OSError):
            refused += 1
            continue
        # What is still a layer decodes to some matrix; nothing else is taken for one.
        for value in read.values():
            if isinstance(value, ql.PackedTensor):
                assert np.isfinite(value.dequantize()).all()
    assert refused > 150
    file.write_bytes(content)
    np.testing.assert_array_equal(layouts.read_exl3(file)["layer"].dequantize(), expected)
