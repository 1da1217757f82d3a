"""The pipeline against slow, obvious counterparts: whole models in memory, hooks on every layer."""

import dataclasses
import json

import model_factory
import numpy as np
import pytest
import quantloom as ql
import torch
import transformers
from quantloom import models
from quantloom.models.structure import find_blocks, find_stages

WINDOWS, WINDOW, HELD_OUT = 6, 32, 2
SETTINGS = {"windows": WINDOWS, "window": WINDOW, "held_out_windows": HELD_OUT}
IDS = model_factory.token_ids((WINDOWS + HELD_OUT) * WINDOW)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=sorted(model_factory.FAMILIES))
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return model_factory.write_model(folder, model_factory.FAMILIES[request.param]())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama())
    model_factory.write_tokenizer(folder)
    return folder


def by_hooks(folder, recipe):
    """The same procedure with the whole model in float32 and one full forward pass per window and Linear."""
    model = models.load_reference(folder)
    windows = torch.from_numpy(IDS.reshape(-1, WINDOW))
    packed = {}
    for block in find_blocks(model):
        calls = []
        handles = [
            linear.register_forward_pre_hook(
                lambda _, args, name=name, calls=calls: calls.append((name, args[0]))
            )
            for name, linear in block.linears.items()
        ]
        with torch.no_grad():
            model(windows[:1], use_cache=False)
        for handle in handles:
            handle.remove()
        stages = []  # lists of (name, input), one input each
        for name, x in calls:
            same = [stage for stage in stages if stage[0][1] is x]
            if same:
                same[0].append((name, x))
            else:
                stages.append([(name, x)])
        for stage in stages:
            inputs = []
            first = block.linears[stage[0][0]]
            handle = first.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            with torch.no_grad():
                for window in windows:
                    model(window[None], use_cache=False)
            handle.remove()
            hessian, held_out = ql.Hessian(first.in_features), ql.Hessian(first.in_features)
            for index, x in enumerate(inputs):
                (hessian if index < WINDOWS else held_out).add(x.flatten(0, -2).numpy())
            rounding = dataclasses.replace(recipe.rounding, hessian=hessian, held_out=held_out)
            for name, _ in stage:
                linear = block.linears[name]
                packed[name] = ql.quantize(linear.weight.detach(), recipe.format_for(name), rounding)
                with torch.no_grad():
                    linear.weight.copy_(packed[name].dequantize())
    return packed


def stored(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= ql.load_tensors(file, kind="torch")
    return tensors


def test_nearest_without_calibration_is_nearest_of_each_matrix(family, tmp_path):
    recipe = ql.Recipe.parse("uniform:4:g32:asym", "nearest")
    report = models.quantize(family, recipe, output=tmp_path / "out")
    original, written = stored(family), stored(tmp_path / "out")
    names = [module.name for module in report.modules]
    assert names and report.fallbacks == ()
    for module in report.modules:
        assert module.method == "nearest" and module.tokens == 0 and module.proxy_loss is None
        packed = written.pop(module.name)
        expected = ql.quantize(original.pop(f"{module.name}.weight"), recipe.format)
        assert packed.planes.keys() == expected.planes.keys()
        for plane in expected.planes:
            assert torch.equal(packed.planes[plane], expected.planes[plane])
        assert module.bits == packed.size_in_bits and module.shape == packed.shape
    assert written.keys() == original.keys()
    for name, value in written.items():
        assert value.dtype == original[name].dtype and torch.equal(value, original[name])
    weights = sum(module.shape[0] * module.shape[1] for module in report.modules)
    assert report.bits_per_weight == sum(module.bits for module in report.modules) / weights


def test_gptq_equals_whole_model_with_hooks(family, tmp_path):
    recipe = ql.Recipe.parse("uniform:3:g32:asym", "gptq")
    report = models.quantize(family, recipe, IDS, output=tmp_path / "out", **SETTINGS)
    expected, written = by_hooks(family, recipe), stored(tmp_path / "out")
    assert written.keys() >= expected.keys() == {module.name for module in report.modules}
    for module in report.modules:
        packed, wanted = written[module.name], expected[module.name]
        for plane in wanted.planes:
            assert torch.equal(packed.planes[plane], wanted.planes[plane]), f"{module.name}.{plane}"
        assert module.method == "gptq" and module.act_order and module.tokens == WINDOWS * WINDOW
        assert module.damping == 0.01 and module.damping_tried == (0.01,)
        assert module.proxy_loss == wanted.report.proxy_loss
        assert module.held_out_loss == wanted.report.held_out_loss
        assert module.proxy_loss < module.proxy_loss_nearest
    assert report.fallbacks == ()


def test_same_bytes_for_any_number_of_threads(llama, tmp_path):
    recipe = ql.Recipe.parse("uniform:3:g32:asym", "nearest:search")
    contents = []
    for threads in (1, 2, 4):
        out = tmp_path / str(threads)
        models.quantize(llama, recipe, IDS, output=out, threads=threads, **SETTINGS)
        contents.append({p.name: p.read_bytes() for p in out.iterdir() if p.name != "timings.json"})
        assert contents[-1] == contents[0]
    assert not (tmp_path / "1" / ".work").exists()


def test_overrides_and_ignore(llama, tmp_path):
    recipe = ql.Recipe.parse(
        "uniform:4:g32",
        ignore=["lm_head", r"re:.*\.o_proj"],
        overrides={r"re:.*\.0\.mlp\.down_proj": ql.Uniform(8, "channel"), "model.layers.1.mlp.up_proj": None},
    )
    report = models.quantize(llama, recipe, output=tmp_path / "out")
    formats = {module.name: module.format for module in report.modules}
    assert (
        formats["model.layers.0.mlp.down_proj"] == "uniform:8:channel:sym:f16"
        or "channel" in formats["model.layers.0.mlp.down_proj"]
    )
    assert "model.layers.1.mlp.up_proj" in report.unquantized
    assert "model.layers.0.self_attn.o_proj" in report.unquantized
    assert len(formats) == 14 - 2 - 1
    assert models.read_report(tmp_path / "out") == report
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quantloom" and set(config["modules"]) == set(formats)
    assert ql.Recipe.from_json(json.dumps(config["recipe"])) == recipe


def test_text_and_ids_calibrate_alike(llama, tmp_path):
    recipe = ql.Recipe.parse("uniform:2:g32", "nearest:search")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(40 + (i * i) % 60) for i in range(400)))
    ids = np.array([ord(c) - 31 for c in text.read_text()])
    settings = {"windows": 4, "window": 40, "held_out_windows": 0}
    models.quantize(llama, recipe, text, output=tmp_path / "a", **settings)
    models.quantize(llama, recipe, ids.tolist(), output=tmp_path / "b", **settings)
    raw = tmp_path / "ids.u16"
    ids.astype("<u2").tofile(raw)
    models.quantize(llama, recipe, str(raw), output=tmp_path / "c", **settings)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] == contents[2]


def test_shards_keep_modules_together(tmp_path):
    model = model_factory.write_model(tmp_path / "model", model_factory.llama(), max_shard_size="60KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    recipe = ql.Recipe.parse("uniform:4:g32:asym")
    models.quantize(model, recipe, output=tmp_path / "one")
    models.quantize(model, recipe, output=tmp_path / "many", max_shard_bytes=20_000)
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert one.keys() == many.keys()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    homes = {}
    for name, file in index["weight_map"].items():
        assert (tmp_path / "many" / file).is_file()
        homes.setdefault(name.rpartition(".")[0], set()).add(file)
    assert all(len(files) == 1 for files in homes.values())
    total = sum(v.size_in_bits // 8 if isinstance(v, ql.PackedTensor) else v.nbytes for v in many.values())
    assert index["metadata"]["total_size"] == total
    logits = [
        models.load(tmp_path / f, torch.float32, dequantized=True)(torch.arange(9)[None]).logits
        for f in ("one", "many")
    ]
    assert torch.equal(*logits)


def test_progress_rises_to_the_end(llama, tmp_path):
    events = []
    recipe = ql.Recipe.parse("uniform:4:g32", "nearest:search")
    models.quantize(llama, recipe, IDS, output=tmp_path / "out", progress=events.append, **SETTINGS)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == pytest.approx(1)
    assert [event.phase for event in events if event.module and event.phase == "quantize"] == [
        "quantize"
    ] * 14
    assert events[-1].done == events[-1].total == 14
    assert {event.phase for event in events} == {"check", "calibrate", "quantize", "propagate", "save"}


REFUSED = {
    "recipe": (TypeError, "recipe", {"recipe": "uniform:4:g32"}),
    "no calibration": (ValueError, "calibration", {"recipe": ql.Recipe.parse("uniform:4", "gptq")}),
    "windows": (ValueError, "windows", {"windows": 0}),
    "window type": (TypeError, "window", {"window": 1.5}),
    "too long": (ValueError, "window", {"window": 49, "calibration": IDS}),
    "too few": (
        ValueError,
        "calibration: got 256 tokens, expected at least 288",
        {"calibration": IDS, "windows": 7},
    ),
    "id": (ValueError, "calibration: got token ids", {"calibration": np.full(4096, 97)}),
    "negative": (ValueError, "calibration: got token ids", {"calibration": np.full(4096, -1)}),
    "float ids": (TypeError, "calibration", {"calibration": np.zeros(4096)}),
    "2-d ids": (ValueError, "calibration", {"calibration": np.zeros((64, 64), int)}),
    "no text": (FileNotFoundError, "calibration", {"calibration": "/nonexistent/text"}),
    "no model": (OSError, "model_path", {"model_path": "/nonexistent/model"}),
    "threads": (ValueError, "threads", {"threads": -1}),
    "shards": (ValueError, "max_shard_bytes", {"max_shard_bytes": 0}),
    "pattern": (
        ValueError,
        "overrides",
        {"recipe": ql.Recipe.parse("uniform:4", overrides={"re:.*qproj": None})},
    ),
    "outside": (
        ValueError,
        "lm_head",
        {"recipe": ql.Recipe.parse("uniform:4", overrides={"lm_head": "uniform:8"})},
    ),
    "nothing": (ValueError, "recipe", {"recipe": ql.Recipe.parse("uniform:4", ignore=["re:.*"])}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case, llama, tmp_path):
    kind, message, change = REFUSED[case]
    arguments = {"model_path": llama, "recipe": ql.Recipe.parse("uniform:4:g32"), "output": tmp_path / "out"}
    with pytest.raises(kind, match=message):
        models.quantize(**(arguments | SETTINGS | change))
    assert not (tmp_path / "out").exists()


def test_refuses_outputs_that_hold_something(llama, tmp_path):
    recipe = ql.Recipe.parse("uniform:4:g32")
    with pytest.raises(ValueError, match="own folder"):
        models.quantize(llama, recipe, output=llama)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        models.quantize(llama, recipe, output=tmp_path / "file")
    models.quantize(llama, recipe, output=tmp_path / "out", max_shard_bytes=20_000)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="overwrite=True"):
        models.quantize(llama, recipe, output=tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "notes.md").write_text("mine")
    models.quantize(llama, ql.Recipe.parse("uniform:2:g32"), output=tmp_path / "out", overwrite=True)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "notes.md" in names and "model.safetensors" in names
    assert not any(name.startswith("model-") or name.endswith("index.json") for name in names)


def test_weights_that_are_not_finite_are_named(tmp_path):
    config = model_factory.llama()
    model = model_factory.build(config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: got nan at row 5, column 7"):
        models.quantize(tmp_path / "model", ql.Recipe.parse("uniform:4:g32"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stages_follow_execution():
    def stages(config):
        model = model_factory.build(config)
        block = find_blocks(model)[0]
        found = find_stages(block, lambda: model(torch.arange(8)[None], use_cache=False), set(block.linears))
        return [[name.removeprefix(block.name + ".") for name in stage] for stage in found]

    attention = [f"self_attn.{part}_proj" for part in "qkv"]
    assert stages(model_factory.llama()) == [
        attention, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ]  # fmt: skip
    assert [set(stage) for stage in stages(model_factory.phi())] == [
        {*attention, "mlp.fc1"}, {"self_attn.dense"}, {"mlp.fc2"},
    ]  # fmt: skip
    assert stages(model_factory.gpt_neox())[0] == ["attention.query_key_value"]
    assert len(stages(model_factory.opt())) == 4


def test_structures_that_cannot_be_calibrated_are_named():
    conv = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match="Conv1D"):
        find_blocks(model_factory.build(conv))
    model = model_factory.build(model_factory.llama())
    block = find_blocks(model)[0]

    def run():
        model(torch.arange(8)[None], use_cache=False)

    mlp = model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) + original(x)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj: ran 2 times"):
        find_stages(block, run, set(block.linears))
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"mlp\.gate_proj: ran 0 times"):
        find_stages(block, run, set(block.linears))
    assert len(find_stages(block, run, {n for n in block.linears if "mlp" not in n})) == 2
    mlp.up_proj = mlp.gate_proj
    model.model.layers[1].mlp.gate_proj = mlp.gate_proj
    with pytest.raises(ValueError, match="shared"):
        find_blocks(model)


def test_activations_that_overflow_are_named(tmp_path):
    model = model_factory.build(model_factory.llama())
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            linear.weight.mul_(1e25)
    model.save_pretrained(tmp_path / "model")
    recipe = ql.Recipe.parse("uniform:4:g32:sym:f32", "gptq")
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.down_proj: its input in calibration window 0: .*row"
    ):
        models.quantize(tmp_path / "model", recipe, IDS, output=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out" / "config.json").exists()


def test_inputs_that_depend_on_tokens_are_refused(llama, tmp_path, monkeypatch):
    original = transformers.models.llama.modeling_llama.LlamaModel.forward

    def forward(self, input_ids=None, **kwargs):
        # As models with token types or routing tables do: another input of the blocks follows the tokens.
        return original(self, input_ids=input_ids, per_token=input_ids.float(), **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaModel, "forward", forward)
    recipe = ql.Recipe.parse("uniform:4:g32", "gptq")
    with pytest.raises(ValueError, match=r"layers\.0: the model passes it inputs that depend on the tokens"):
        models.quantize(llama, recipe, IDS, output=tmp_path / "out", **SETTINGS)


def test_global_state_is_left_alone(llama, tmp_path):
    def state():
        return (
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global generator is what is looked at
            torch.nn.Module.register_parameter,
        )

    before = state()
    recipe = ql.Recipe.parse("uniform:4:g32", "gptq")
    models.plan(llama, recipe)
    models.quantize(llama, recipe, IDS, output=tmp_path / "out", **SETTINGS)
    models.load(tmp_path / "out")
    assert state() == before
