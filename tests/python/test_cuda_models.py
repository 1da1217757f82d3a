"""Whole models on a CUDA device: loading, generating text, evaluating."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import quantloom as ql
import torch
from cuda_cases import needs_cuda
from quantloom.nn import QuantLinear

transformers = pytest.importorskip("transformers")
pytestmark = needs_cuda

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
PROMPT = "And it came to pass"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "out"
    ql.models.quantize(TINY, ql.Recipe.parse("uniform:4:g64:asym"), output=output)
    return output


@pytest.fixture(scope="module")
def prompt():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    return tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"].cuda()


def generate(model, prompt, **options):
    with torch.inference_mode():
        return model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            **options,
        )


def assert_greedy(model, ids, start):
    """Every token is the most likely one after those before it, within the rounding of 16 bits."""
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
    chosen = logits.gather(-1, ids[0, start:, None])[:, 0]
    assert bool((logits.max(-1).values - chosen <= 0.02 * logits.abs().max()).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loads_and_computes_as_on_the_cpu(quantized, prompt, dtype):
    model = ql.models.load(quantized, dtype, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert {b.device.type for b in model.buffers()} == {"cuda"}
    modules = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert modules
    assert all(m.prepared is not None for m in modules)
    reference = ql.models.load(quantized, torch.float32)
    with torch.inference_mode():
        # As few tokens as one step of generating has.
        expected = reference(input_ids=prompt[:, :4].cpu()).logits
        logits = model(input_ids=prompt[:, :4]).logits
    largest = float(expected.abs().max())
    tolerance = {torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    torch.testing.assert_close(logits.float().cpu(), expected, rtol=0, atol=tolerance * largest)
    state, other = model.state_dict(), reference.state_dict()
    assert state.keys() == other.keys()
    for name in other:
        if name.endswith((".codes", ".scales", ".zeros")):
            assert torch.equal(state[name].cpu(), other[name]), name


def test_models_of_tables(prompt, tmp_path):
    ql.models.quantize(TINY, ql.Recipe.parse("codebook:nf4:g64"), output=tmp_path / "out")
    reference = ql.models.load(tmp_path / "out", torch.float32)
    decoded = ql.models.load(tmp_path / "out", torch.float32, device="cuda", dequantized=True)
    multiplied = ql.models.load(tmp_path / "out", torch.float16, device="cuda")
    with torch.inference_mode():
        expected = reference(input_ids=prompt[:, :4].cpu()).logits
        for model, tolerance in ((decoded, 1e-3), (multiplied, 0.01)):
            logits = model(input_ids=prompt[:, :4]).logits.float().cpu()
            torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_the_model_is_on_the_device_once(quantized):
    ql.models.load(quantized, torch.float16, device="cuda")
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = ql.models.load(quantized, torch.float16, device="cuda")
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert held <= sum(tensors.values()) + 512 * len(tensors)
    largest = max(m.prepared.byte_count for m in model.modules() if isinstance(m, QuantLinear))
    assert torch.cuda.max_memory_allocated() - before <= held + 2 * largest + 2**20


def test_generates(quantized, prompt):
    model = ql.models.load(quantized, torch.float16, device="cuda")
    ids = generate(model, prompt)
    assert ids.shape == (1, prompt.shape[1] + 24)
    assert_greedy(model, ids, prompt.shape[1])
    assert torch.equal(generate(model, prompt), ids)
    pair = generate(model, prompt.repeat(2, 1))
    assert torch.equal(pair[0], pair[1])
    assert_greedy(model, pair[:1], prompt.shape[1])


def test_generates_with_a_static_cache_and_compilation(quantized, prompt):
    pytest.importorskip("triton")
    torch.compiler.reset()
    model = ql.models.load(quantized, torch.float16, device="cuda")
    ids = generate(model, prompt, cache_implementation="static")
    assert_greedy(model, ids, prompt.shape[1])
    assert torch.equal(generate(model, prompt, cache_implementation="static"), ids)


def test_a_step_in_a_cuda_graph_gives_the_same_bytes(quantized, prompt):
    model = ql.models.load(quantized, torch.float16, device="cuda")
    ids = prompt[:, :4].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(2):
            model(input_ids=ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        logits = model(input_ids=ids, use_cache=False).logits
    for shift in (0, 7):
        ids.copy_(prompt[:, :4] + shift)
        graph.replay()
        torch.cuda.synchronize()
        with torch.inference_mode():
            assert torch.equal(logits, model(input_ids=ids, use_cache=False).logits)


def test_evaluates(quantized):
    ids = ql.evaluate.tokens(TINY, TINY / "valid.txt")
    settings = {"window": 64, "windows": 4}
    expected = ql.evaluate.compare(
        ql.models.load(quantized, torch.float32), ql.models.load_reference(TINY), ids, **settings
    )
    reference = ql.models.load_reference(TINY, device="cuda")
    decoded = ql.models.load(quantized, torch.float32, device="cuda", dequantized=True)
    result = ql.evaluate.compare(decoded, reference, ids, **settings)
    assert result.perplexity == pytest.approx(expected.perplexity, rel=0.01)
    assert result.kl == pytest.approx(expected.kl, rel=0.05)
    multiplied = ql.models.load(quantized, torch.bfloat16, device="cuda")
    result = ql.evaluate.compare(multiplied, reference, ids, **settings)
    assert result.perplexity == pytest.approx(expected.perplexity, rel=0.02)
    assert ql.evaluate.perplexity(multiplied, ids, **settings) == pytest.approx(result.perplexity, rel=1e-6)


def test_the_command_evaluates_on_the_device(quantized):
    from quantloom.cli import app
    from typer.testing import CliRunner

    arguments = ["eval", quantized, "--text", TINY / "valid.txt", "--window", 64, "--windows", 3, "--json"]
    found = {}
    for options in ([], ["--device", "cuda"], ["--device", "cuda", "--packed"]):
        result = CliRunner().invoke(app, [str(part) for part in [*arguments, *options]])
        assert result.exit_code == 0, result.output
        found[tuple(options)] = json.loads(result.stdout)["perplexity"]
    assert list(found.values()) == pytest.approx([found[()]] * 3, rel=0.02)


def test_wrong_devices_are_named(quantized):
    with pytest.raises(RuntimeError, match=r"device.*cuda:99"):
        ql.models.load(quantized, device="cuda:99")
    with pytest.raises(ValueError, match=r"device.*'moon'"):
        ql.models.load(quantized, device="moon")


@pytest.mark.parametrize("spec", ["trellis:3:octagon", "trellis:2.5:mul1"])
def test_a_model_becomes_a_trellis_on_the_device(spec, prompt, tmp_path):
    recipe = ql.Recipe.parse(spec, "gptq")
    calibration = TINY / "calib.txt"
    report = ql.models.quantize(
        TINY, recipe, calibration, output=tmp_path / "out", windows=8, window=256, device="cuda"
    )
    assert all(module.proxy_loss < module.proxy_loss_nearest for module in report.modules)
    model = ql.models.load(tmp_path / "out", torch.float16, device="cuda")
    ids = generate(model, prompt)
    assert_greedy(model, ids, prompt.shape[1])
    plain = ql.models.load(tmp_path / "out", torch.float16, device="cuda", dequantized=True)
    with torch.inference_mode():
        logits, expected = (m(input_ids=ids).logits.float() for m in (model, plain))
    assert float((logits - expected).abs().max()) < 0.03 * float(expected.abs().max())
