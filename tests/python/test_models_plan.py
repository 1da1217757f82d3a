"""Plans: exact sizes, and a peak that a fresh process confirms."""

import json
import subprocess
import sys

import model_factory
import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import models

MEASURE = """
import json, sys
import numpy as np
import quantloom as ql

model, spec, rounding, output, distillation = sys.argv[1:]
recipe = ql.Recipe.parse(spec, rounding, distillation=distillation)
settings = {"windows": 2, "window": 32, "held_out_windows": 1}
plan = ql.models.plan(model, recipe, **settings)
ids = np.arange(96) % 97
ql.models.quantize(model, recipe, ids, output=output, **settings)
# VmHWM and not ru_maxrss, which a new program inherits from the process that started it.
with open("/proc/self/status") as status:
    peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(json.dumps({"plan": plan.peak_bytes, "parts": plan.parts, "peak": peak}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama())


@pytest.mark.parametrize("distillation", ["none", "lkd:steps=2:checks=1:batch=1"])
def test_peak_memory_is_what_a_process_needs(distillation, tmp_path):
    config = model_factory.llama(hidden=768, layers=1, intermediate=1536)
    model = model_factory.write_model(tmp_path / "model", config)
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(model),
        "uniform:4:g128:asym",
        "gptq",
        str(tmp_path / "out"),
        distillation,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert abs(measured["plan"] - measured["peak"]) <= 0.10 * measured["peak"], measured


@pytest.mark.parametrize("spec", ["uniform:4:g32", "uniform:3:g48:asym", "uniform:2:channel:asym:f32"])
def test_sizes_are_exact(spec, model, tmp_path):
    recipe = ql.Recipe.parse(spec, overrides={r"re:.*down_proj": "uniform:8:tensor", "re:.*o_proj": None})
    plan = models.plan(model, recipe)
    report = models.quantize(model, recipe, output=tmp_path / "out")
    assert [(m.name, m.shape, m.format, m.bits) for m in plan.modules] == [
        (m.name, m.shape, m.format, m.bits) for m in report.modules
    ]
    assert plan.bits_per_weight == report.bits_per_weight and plan.unquantized == report.unquantized
    tensors = ql.load_tensors(tmp_path / "out" / "model.safetensors", kind="torch")
    stored = sum(
        v.size_in_bits // 8 if isinstance(v, ql.PackedTensor) else v.nbytes for v in tensors.values()
    )
    assert plan.output_bytes == stored
    assert plan.seconds > 0 and plan.peak_bytes == sum(plan.parts.values()) and plan.refusals == {}


def test_static_outliers_are_counted(model, tmp_path):
    columns = "int8:token:outliers=6:columns=3,17"
    recipe = ql.Recipe.parse(
        "uniform:8:g32", activations="int8:token", activation_overrides={"re:.*q_proj": columns}
    )
    plan = models.plan(model, recipe)
    report = models.quantize(model, recipe, output=tmp_path / "out")
    assert [module.bits for module in plan.modules] == [module.bits for module in report.modules]
    assert {m.name.rpartition(".")[2] for m in plan.modules if m.outlier_columns == 2} == {"q_proj"}
    assert plan.outlier_share is None

    recipe = ql.Recipe.parse("uniform:8:g32", activations="int8:token:outliers=6:static-outliers")
    plain = models.plan(model, ql.Recipe.parse("uniform:8:g32"))
    for share in (0.0, 0.02, 1.0):
        plan = models.plan(model, recipe, outlier_share=share)
        assert plan.outlier_share == share
        for module, other in zip(plan.modules, plain.modules, strict=True):
            n, k = module.shape
            count = -(-round(share * 100) * k // 100)
            assert module.outlier_columns == count
            assert module.bits == other.bits + (32 * n * count + 32 * (n + 1) if count else 0)
        assert plan.output_bytes - plain.output_bytes == sum(
            (a.bits - b.bits) // 8 for a, b in zip(plan.modules, plain.modules, strict=True)
        )
    recipe = ql.Recipe.parse("uniform:8:g32", activations="int8:token:outliers=3%")
    sample = {"windows": 2, "window": 32, "held_out_windows": 1}
    plan = models.plan(model, recipe, outlier_share=1.0)
    report = models.quantize(model, recipe, np.arange(96) % 97, output=tmp_path / "share", **sample)
    assert plan.outlier_share is None
    assert all(m.outlier_columns == -(-3 * m.shape[1] // 100) for m in plan.modules)
    assert [module.bits for module in plan.modules] == [module.bits for module in report.modules]
    with pytest.raises(ValueError, match=r"outlier_share: got 2\.0"):
        models.plan(model, recipe, outlier_share=2)
    with pytest.raises(ValueError, match="calibrated: got False"):
        models.plan(model, recipe, calibrated=False)


def test_parts_follow_the_model(model, tmp_path):
    wide = model_factory.write_model(tmp_path / "wide", model_factory.llama(hidden=128, intermediate=512))
    recipe = ql.Recipe.parse("uniform:4:g32", "gptq")
    narrow_plan, wide_plan = models.plan(model, recipe), models.plan(wide, recipe)
    assert narrow_plan.parts["Hessians of one stage"] == 2 * 8 * 96**2
    assert wide_plan.parts["Hessians of one stage"] == 2 * 8 * 512**2
    alone = models.plan(wide, recipe, held_out_windows=0)
    assert alone.parts["Hessians of one stage"] == 8 * 512**2
    block = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 512 + 2 * 128)
    assert wide_plan.parts["one block in float32"] == block
    assert "one block in float32" not in models.plan(wide, ql.Recipe.parse("uniform:4:g32")).parts


def test_nothing_is_written_and_no_weight_is_read(model, tmp_path):
    header = (model / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(header[:8], "little")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((model / "config.json").read_bytes())
    # Weights that are all NaN: whoever reads them would stumble.
    (copy / "model.safetensors").write_bytes(header[:length] + b"\xff" * (len(header) - length))
    recipe = ql.Recipe.parse("uniform:4:g32", "gptq")
    before = sorted(path.name for path in copy.iterdir())
    assert models.plan(copy, recipe).output_bytes == models.plan(model, recipe).output_bytes
    assert sorted(path.name for path in copy.iterdir()) == before


def test_refusals(model):
    recipe = ql.Recipe.parse("uniform:4:g48", overrides={"re:.*gate_proj": "uniform:5:g32"})
    plan = models.plan(model, recipe, layout="gptq")
    assert len(plan.refusals) == 2 + 10
    assert "48 for 64" in plan.refusals["model.layers.0.self_attn.q_proj"]
    assert "got 5" in plan.refusals["model.layers.0.mlp.gate_proj"]
    assert "model.layers.0.mlp.down_proj" not in plan.refusals  # 96 = 2 * 48
    assert len(models.plan(model, recipe, layout="compressed-tensors").refusals) == 10


def test_bad_arguments(model, tmp_path):
    recipe = ql.Recipe.parse("uniform:4:g32", "gptq")
    with pytest.raises(TypeError, match="recipe"):
        models.plan(model, "uniform:4")
    with pytest.raises(ValueError, match="layout"):
        models.plan(model, recipe, layout="gguf")
    with pytest.raises(ValueError, match="calibrated"):
        models.plan(model, recipe, calibrated=False)
    with pytest.raises(ValueError, match="windows"):
        models.plan(model, recipe, windows=0)
    with pytest.raises(TypeError, match="threads"):
        models.plan(model, recipe, threads=1.0)
    with pytest.raises(OSError, match="model_path"):
        models.plan(tmp_path / "nothing", recipe)
    assert torch.is_grad_enabled()
