"""Caches of keys and values on a CUDA device: beside those of the CPU, and in models."""

from __future__ import annotations

import copy
import gc
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import model_factory
import quantloom as ql
from cuda_cases import needs_cuda
from kv_cases import config, generate, logits_by_token, prompt
from quantloom.cli import app
from quantloom.kv import generation
from typer.testing import CliRunner

pytestmark = needs_cuda

SPECS = [
    "kivi:2",
    "kivi:4:g16:r32:first3",
    "kivi:3,1:g8:r8:hadamard",
    "token:4",
    "token:8:g16:r9",
    "sdr:4:g16",
    "kvquant:3:1%",
]
MODEL_SPECS = ["kivi:2:g4:r8", "kivi:4:g8:r8:first2:hadamard", "token:4", "sdr:4:r3"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def tables(spec, heads, dim, positions=1024):
    if not spec.startswith("kvquant"):
        return None
    format = ql.kv.parse_kv_format(spec)
    values = np.linspace(-1, 1, 2**format.key_bits).astype(np.float16).astype(np.float32)
    bounds = (values[1:] + values[:-1]) / 2
    scale = np.full((heads, dim), 3, np.float32)
    layer = ql.kv.KVTables(bounds, values, bounds, values, scale, np.zeros_like(scale))
    frequencies = (10000.0 ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    calibration = ql.kv.KVCalibration(format, (layer,), ql.kv.RotaryEmbedding(frequencies))
    return calibration.core_tables(0, positions)


def vectors(rng, sequences, heads, tokens, dim, dtype=torch.float16):
    x = torch.from_numpy(rng.standard_normal((sequences, heads, tokens, dim)).astype(np.float32))
    x[..., dim // 3] = x[..., dim // 3] * 6 + 4
    return x.to(dtype)


def pair(spec, sequences, heads, dim, dtype=torch.float16, capacity=0):
    """A cache on the CPU and one on the device."""
    made = tables(spec, heads, dim)
    return [
        ql.kv.KVCache(spec, sequences, heads, dim, dtype, capacity, made, device) for device in (None, "cuda")
    ]


def append(caches, keys, values, starts=None):
    caches[0].append(keys, values, starts)
    caches[1].append(keys.cuda(), values.cuda(), starts)


def assert_same(ours, theirs):
    """Both hold the same tokens: the same codes, and so the same numbers."""
    assert theirs.lengths == ours.lengths
    exact = not ours.format.hadamard and ours.format.kind != "kvquant"
    for s in range(len(ours.lengths)):
        assert theirs.coded_keys(s) == ours.coded_keys(s)
        assert theirs.coded_values(s) == ours.coded_values(s)
        for x, y in ((ours.keys(s, "torch"), theirs.keys(s)), (ours.values(s, "torch"), theirs.values(s))):
            assert y.device == torch.device("cuda:0")
            assert y.dtype == torch.float32
            if exact:
                assert torch.equal(y.cpu(), x)
            else:  # turned by other instructions: a code in a thousand may be its neighbour
                near = torch.isclose(y.cpu(), x, rtol=2e-3, atol=2e-3)
                assert near.float().mean() > 0.998 if near.numel() else True


def softmax_attention(queries, keys, values, window=None):
    """In float64: queries [heads, m, dim], keys and values [kv_heads, tokens, dim]."""
    heads, m, dim = queries.shape
    tokens = keys.shape[1]
    keys, values = (x.double().repeat_interleave(heads // x.shape[0], 0) for x in (keys, values))
    scores = queries.double() @ keys.transpose(1, 2) * dim**-0.5
    ago = torch.arange(m)[:, None] + tokens - m - torch.arange(tokens)[None, :]
    hidden = (ago < 0) | (ago >= (window or tokens))
    return scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1) @ values


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_holds_what_a_cache_on_the_cpu_holds(rng, spec, dtype):
    caches = pair(spec, 3, 2, 32, dtype)
    for tokens, starts in ((150, [0, 70, 150]), (1, None), (40, None), (200, None)):
        starts = starts if starts is None else list(starts)
        append(caches, vectors(rng, 3, 2, tokens, 32, dtype), vectors(rng, 3, 2, tokens, 32, dtype), starts)
        assert_same(*caches)
    usage, other = (cache.usage() for cache in caches)
    for name in ("tokens", "coded_keys", "coded_values", "code_bytes", "exact_bytes"):
        assert getattr(other, name) == getattr(usage, name)
    if not caches[0].format.hadamard and caches[0].format.kind != "kvquant":
        ours, theirs = (cache._core.record(0, 0, 1) for cache in caches)
        assert ours == theirs


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_attention_is_that_of_the_stored_vectors(rng, spec, dtype, tokens):
    _, cache = pair(spec, 2, 2, 64, dtype)
    keys, values = (vectors(rng, 2, 2, 700, 64, dtype).cuda() for _ in range(2))
    cache.append(keys, values, [0, 413])
    # Small ones: float16 keeps the softmax where scores are no larger than some tens.
    queries = torch.from_numpy(rng.standard_normal((2, 6, tokens, 64))).to(dtype).cuda() * 0.5
    out = cache.attend(queries)
    assert out.shape == queries.shape
    assert out.dtype == dtype
    assert out.device == queries.device
    assert torch.equal(cache.attend(queries), out)
    for s in range(2):
        expected = softmax_attention(queries[s], cache.keys(s), cache.values(s))
        unit = 1e-2 if dtype == torch.bfloat16 else 4e-3
        torch.testing.assert_close(out[s].double(), expected, rtol=0, atol=unit * float(values.abs().max()))


def test_tensors_with_strides_are_taken_as_they_are(rng):
    x = vectors(rng, 2, 40, 3, 64, torch.bfloat16).cuda()  # [sequences, tokens, heads, dim]
    cache, same = (ql.kv.KVCache("kivi:2:g8:r8", 2, 3, 64, "bfloat16", device="cuda:0") for _ in range(2))
    cache.append(x.transpose(1, 2), x.transpose(1, 2))
    same.append(x.transpose(1, 2).contiguous(), x.transpose(1, 2).contiguous())
    queries = x[:, :2].transpose(1, 2)
    assert torch.equal(cache.attend(queries), same.attend(queries.contiguous()))
    assert torch.equal(cache.keys(1), same.keys(1))


def test_copies_and_reordered_caches_are_their_own(rng):
    x = vectors(rng, 2, 1, 200, 16)
    caches = pair("kivi:2:g8:r16", 2, 1, 16)
    append(caches, x, x)
    twins = copy.deepcopy(caches)
    for cache in caches:
        cache.reorder([1, 1, 0])
    assert_same(*caches)
    more = vectors(rng, 3, 1, 60, 16)
    append(caches, more, more)
    assert_same(*caches)
    assert_same(*twins)
    for cache in caches:
        cache.clear()
    assert caches[1].lengths == [0] * 3
    assert caches[1].usage().page_bytes == 0
    append(caches, more, more)
    assert_same(*caches)
    append(twins, more[:2], more[:2])
    assert_same(*twins)


def test_work_is_queued_on_the_current_stream(rng):
    x = vectors(rng, 1, 1, 300, 64).cuda()
    expected = ql.kv.KVCache("kivi:2", 1, 1, 64, device="cuda")
    expected.append(x, x)
    cache = ql.kv.KVCache("kivi:2", 1, 1, 64, capacity=512, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        cache.append(late, late, check=False)  # must wait for the copy
        out = cache.attend(x[:, :, -2:])
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    assert torch.equal(out, expected.attend(x[:, :, -2:]))


def test_nothing_is_allocated_for_a_token(rng):
    cache = ql.kv.KVCache("kivi:2", 2, 2, 64, device=torch.device("cuda"))
    x = vectors(rng, 2, 2, 200, 64).cuda()
    cache.append(x, x)
    cache.reserve(400)
    step = vectors(rng, 2, 2, 1, 64).cuda()
    sizes = []
    gc.collect()  # what other tests left
    for _ in range(60):
        cache.append(step, step, check=False)
        cache.attend(step)
        torch.cuda.synchronize()
        sizes.append((cache.usage().reserved_bytes, torch.cuda.mem_get_info()[0]))
    assert len(set(sizes[10:])) == 1
    assert cache.lengths == [260, 260]


def test_a_captured_graph_adds_tokens_with_each_replay(rng):
    x = vectors(rng, 2, 2, 150, 64).cuda()
    steps = [vectors(rng, 2, 2, 1, 64).cuda() for _ in range(40)]
    expected = ql.kv.KVCache("kivi:2", 2, 2, 64, device="cuda")
    cache = copy.deepcopy(expected)
    static, queries = steps[0].clone(), steps[0].repeat(1, 2, 1, 1)
    for each in (expected, cache):
        each.append(x, x)
        each.reserve(300)
        each.attend(queries)  # takes what memory it needs
    warm = copy.deepcopy(cache)
    with torch.cuda.stream(torch.cuda.Stream()):
        warm.append(static, static, check=False)
        warm.attend(queries)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(static, static, check=False)
        out = cache.attend(queries)
    for step in steps:
        static.copy_(step)
        queries.copy_(step.repeat(1, 2, 1, 1))
        graph.replay()
        expected.append(step, step)
        assert torch.equal(out, expected.attend(queries))
    assert cache.lengths == expected.lengths == [190, 190]
    for s in range(2):
        assert torch.equal(cache.keys(s), expected.keys(s))
        assert torch.equal(cache.values(s), expected.values(s))


def test_the_operator_compiles(rng):
    cache, other = (ql.kv.KVCache("kivi:2:g8:r8", 1, 2, 64, device="cuda") for _ in range(2))

    def step(queries, keys, values):
        return cache.append_attend(queries * 2, keys, values) + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for tokens in (20, 1, 1, 1):
        keys, values = (vectors(rng, 1, 2, tokens, 64).cuda() for _ in range(2))
        queries = vectors(rng, 1, 4, tokens, 64).cuda()
        other.append(keys, values)
        assert torch.equal(compiled(queries, keys, values), other.attend(queries * 2) + 1)
    assert cache.lengths == other.lengths == [23]


def test_bad_input_is_refused_by_name(rng):
    x = vectors(rng, 1, 2, 5, 64)
    cache, on_cpu = ql.kv.KVCache("kivi:2", 1, 2, 64, device="cuda"), ql.kv.KVCache("kivi:2", 1, 2, 64)
    with pytest.raises(TypeError, match="keys: got a tensor on cpu, expected one on cuda:0"):
        cache.append(x, x.cuda())
    with pytest.raises(TypeError, match="values: got a tensor on cpu, expected one on cuda:0"):
        cache.append(x.cuda(), x)
    with pytest.raises(TypeError, match="queries: got a tensor on cpu, expected one on cuda:0"):
        cache.attend(x)
    with pytest.raises(TypeError, match="keys: got a tensor on cuda:0, expected one on cpu"):
        on_cpu.append(x.cuda(), x.cuda())
    x = x.cuda()
    with pytest.raises(TypeError, match="keys: got float32, expected float16"):
        cache.append(x.float(), x.float())
    with pytest.raises(ValueError, match="values: got shape"):
        cache.append(x, x[:, :, :4])
    with pytest.raises(ValueError, match="starts"):
        cache.append(x, x, starts=[6])
    with pytest.raises(ValueError, match="kind"):
        cache.keys(0, "numpy")
    with pytest.raises(ValueError, match="sources"):
        cache.reorder([1])
    with pytest.raises(ValueError, match="device"):
        ql.kv.KVCache("kivi:2", 1, 2, 64, device="gpu")
    with pytest.raises(RuntimeError, match="device"):
        ql.kv.KVCache("kivi:2", 1, 2, 64, device="cuda:99")
    narrow = ql.kv.KVCache("kivi:2", 1, 2, 16, device="cuda")
    narrow.append(x[..., :16], x[..., :16])
    with pytest.raises(RuntimeError, match="heads of 16 channels"):
        narrow.attend(x[..., :16])
    bad = x.clone()
    bad[0, 1, 3, 7] = torch.nan
    with pytest.raises(ValueError, match="values"):
        cache.append(x, bad)
    assert cache.lengths == [0]
    cache.append(x, bad, check=False)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="values"):
        cache.attend(x)


# Models. Codes near the middle between two may differ between devices, so that logits are compared with how
# far those of the exact cache are away, and tokens with the logits that the CPU gives them.


@pytest.fixture(scope="module")
def models():
    """One model on the CPU and on the device, with our attention; and there with PyTorch's."""
    ours = model_factory.build(config(head_dim=64))
    there, theirs = copy.deepcopy(ours).cuda(), copy.deepcopy(ours).cuda()
    ql.kv.use_attention(ours)
    ql.kv.use_attention(there)
    theirs.set_attn_implementation("sdpa")
    return ours, there, theirs


def rms(x):
    return float(x.double().square().mean().sqrt())


def exact_logits(models, ids):
    with torch.no_grad():
        return models[0](ids, use_cache=False).logits


@pytest.mark.parametrize("spec", MODEL_SPECS)
def test_single_tokens_see_what_they_see_on_the_cpu(models, spec):
    ids = prompt(60, 2)
    expected = logits_by_token(models[0], ids, ql.kv.QuantizedKVCache(models[0].config, spec))
    error = rms(expected - exact_logits(models, ids))
    for model in models[1:]:
        cache = ql.kv.QuantizedKVCache(model.config, spec)
        actual = logits_by_token(model, ids.cuda(), cache).cpu()
        assert rms(actual - expected) < 0.4 * error
        assert cache.layers[0].cache.device == "cuda:0"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 13])
def test_exact_attention_of_the_last_tokens(rng, dtype, window, monkeypatch):
    monkeypatch.setattr(generation, "_RUN", 16)
    queries = torch.from_numpy(rng.standard_normal((2, 8, 40, 64))).to(dtype).cuda()
    keys, values = (torch.from_numpy(rng.standard_normal((2, 2, 100, 64))).to(dtype).cuda() for _ in "kv")
    for count in (40, 17, 16, 1):
        part = queries[:, :, :count]
        out = generation._exact_attention(part, keys, values, None, 0.125, window)
        assert out.shape == (2, count, 8, 64)
        for s in range(2):
            expected = softmax_attention(part[s], keys[s], values[s], window)
            error = float((out[s].transpose(0, 1).double() - expected).abs().max())
            assert error < {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_on_long_caches_make_no_large_matrices(dtype):
    queries = torch.randn((1, 8, 2048, 64), device="cuda").to(dtype)
    keys = torch.randn((1, 2, 32768, 64), device="cuda").to(dtype)
    generation._exact_attention(queries[:, :, :600], keys, keys, None, 0.125)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generation._exact_attention(queries, keys, keys, None, 0.125)
    # Scores would be 2048 * 32768 * 8 numbers. float32 repeats keys and values for the heads that share them.
    repeated = 2 * 4 * keys.nbytes if dtype == torch.float32 else 0
    assert torch.cuda.max_memory_allocated() - before < repeated + 8 * queries.nbytes + (32 << 20)


@pytest.mark.parametrize("spec", MODEL_SPECS)
@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_pieces_of_a_prompt_see_what_they_see_on_the_cpu(models, spec, prefill, monkeypatch):
    monkeypatch.setattr(generation, "_RUN", 16)
    ids = prompt(90, 2)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    results = []
    for model in models[:2]:
        cache, where = ql.kv.QuantizedKVCache(model.config, spec, prefill), model.device
        end, parts = 0, []
        for part in ids.split([40, 6, 44], dim=1):
            end += part.shape[1]
            with torch.no_grad():
                out = model(
                    part.to(where), attention_mask=mask[:, :end].to(where), past_key_values=cache
                ).logits
            parts.append(out.cpu())
        results.append(torch.cat(parts, dim=1))
        assert [layer.cache.lengths for layer in cache.layers] == [[90, 77]] * 2
    with torch.no_grad():
        exact = models[0](ids, attention_mask=mask, use_cache=False).logits
    expected, actual = results
    for rows in ((0, slice(0, 90)), (1, slice(13, 90))):
        error = rms(expected[rows] - exact[rows])
        assert rms(actual[rows] - expected[rows]) < 0.4 * error
    if prefill == "exact":
        torch.testing.assert_close(actual[0, :40], exact[0, :40], rtol=1e-3, atol=1e-3)


def assert_likely(model, spec, row, start, tokens):
    """Each of the tokens has nearly the largest logit that the model on the CPU gives after those before."""
    cache = ql.kv.QuantizedKVCache(model.config, spec)
    ids = torch.cat([row, tokens])[None, start:]
    count = len(row) - start
    with torch.no_grad():
        first = model(ids[:, :count], past_key_values=cache).logits[:, -1:]
    rest = logits_by_token(model, ids[:, count:-1], cache)
    logits = torch.cat([first, rest], dim=1)[0]
    missing = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    assert float(missing.max()) < 0.3 * float(logits.std())
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("spec", MODEL_SPECS)
def test_a_batch_with_padding_generates_what_each_row_would_alone(models, spec):
    lengths = [33, 5, 17]
    rows = [prompt(length, seed=10 + length)[0] for length in lengths]
    ids = torch.stack([torch.nn.functional.pad(row, (33 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (33 - len(row), 0)) for row in rows])
    cache = ql.kv.QuantizedKVCache(models[1].config, spec)
    batch = generate(models[1], ids.cuda(), cache, attention_mask=mask.cuda()).cpu()
    assert [layer.cache.lengths for layer in cache.layers] == [[length + 11 for length in lengths]] * 2
    for s, length in enumerate(lengths):
        assert_likely(models[0], spec, ids[s], 33 - length, batch[s, 33:])


@pytest.mark.parametrize("spec", ["kivi:2:g4:r8", "token:8"])
def test_beams_have_the_scores_of_their_tokens(models, spec):
    ids = prompt(21, 2)
    cache = ql.kv.QuantizedKVCache(models[1].config, spec)
    found = generate(
        models[1], ids.cuda(), cache, num_beams=3, return_dict_in_generate=True, output_scores=True
    )
    for s in range(2):
        tokens = found.sequences[s, 21:].cpu()
        cpu = ql.kv.QuantizedKVCache(models[0].config, spec)
        with torch.no_grad():
            first = models[0](ids[s : s + 1], past_key_values=cpu).logits[:, -1:]
        logits = torch.cat([first, logits_by_token(models[0], tokens[None, :-1], cpu)], dim=1)[0]
        score = logits.log_softmax(-1).gather(-1, tokens[:, None]).sum() / len(tokens)
        assert abs(float(score) - float(found.sequences_scores[s])) < 0.1


def test_samples_depend_on_the_seed_alone(models):
    sampled = []
    for _ in range(2):
        torch.manual_seed(5)
        cache = ql.kv.KIVICache(models[1].config, 4, group_size=4, window=8)
        ids = prompt(21, 2).cuda()
        sampled.append(generate(models[1], ids, cache, do_sample=True, num_return_sequences=2))
    assert torch.equal(*sampled)
    assert sampled[0].shape == (4, 33)


def test_a_cache_can_be_copied_and_reset(models):
    model, ids = models[1], prompt(30).cuda()
    cache = ql.kv.KIVICache(model.config, group_size=4, window=8)
    with torch.no_grad():
        model(ids[:, :29], past_key_values=cache)
    twin = copy.deepcopy(cache)
    first = generate(model, ids, cache)
    assert torch.equal(generate(model, ids, twin), first)
    cache.reset()
    with torch.no_grad():
        model(ids[:, :29], past_key_values=cache)
    assert torch.equal(generate(model, ids, cache), first)


@pytest.fixture
def no_waiting():
    """Makes torch raise an error for what waits for the device, when it is called with True."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_tokens_neither_wait_nor_allocate(models, padded, dtype, no_waiting):
    model = copy.deepcopy(models[1]).to(dtype)
    ids = prompt(100, 2).cuda()
    mask = torch.ones_like(ids)
    mask[1, : 7 if padded else 0] = 0
    masks = [mask[:, :end].contiguous() for end in range(101)]
    cache = ql.kv.KIVICache(model.config, 2, group_size=4, window=8, capacity=256)
    sizes = []
    gc.collect()  # what other tests left
    with torch.no_grad():
        model(ids[:, :40], attention_mask=masks[40], past_key_values=cache)
        for end in range(41, 101):
            no_waiting(end > 45)
            model(ids[:, end - 1 : end], attention_mask=masks[end], past_key_values=cache)
            no_waiting(False)
            torch.cuda.synchronize()
            sizes.append((cache.layers[0].cache.usage().reserved_bytes, torch.cuda.mem_get_info()[0]))
    assert len(set(sizes[10:])) == 1
    assert cache.layers[0].cache.lengths == [100, 93 if padded else 100]


def test_a_captured_step_of_a_model_generates(models):
    model, ids = models[1], prompt(90, 2).cuda()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    caches = [ql.kv.KIVICache(model.config, 2, group_size=4, window=8) for _ in range(2)]
    places = (torch.arange(90).cuda() - torch.tensor([[0], [7]]).cuda()).clamp(min=0)
    with torch.no_grad():

        def step(cache, start, end):
            given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
            return model(ids[:, start:end], past_key_values=cache, **given).logits

        for cache in caches:
            step(cache, 0, 40)
            step(cache, 40, 41)
            cache.reserve(90)
        eager, captured = caches
        token, place = ids[:, 41:42].clone(), places[:, 41:42].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, position_ids=place, past_key_values=captured).logits
        for start in range(41, 80):
            token.copy_(ids[:, start : start + 1])
            place.copy_(places[:, start : start + 1])
            graph.replay()
            expected = step(eager, start, start + 1)
            assert rms(logits - expected) < 0.05 * rms(expected)
        assert captured.get_seq_length() == eager.get_seq_length() == 80
        assert captured.layers[1].cache.lengths == [80, 73]
        # And on without the graph.
        logits, expected = (step(cache, 80, 81) for cache in (captured, eager))
        assert rms(logits - expected) < 0.05 * rms(expected)


def test_masks_that_change_are_found_later(models):
    model, ids = models[1], prompt(20, 2).cuda()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = ql.kv.KIVICache(model.config)
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        model(ids[:, 10:11], attention_mask=mask[:, :11], past_key_values=cache)
        cache.usage()
        wrong = mask[:, :12].clone()
        wrong[1, 11] = 0
        model(ids[:, 11:12], attention_mask=wrong, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask: row 1"):
            cache.usage()


def test_layers_may_be_on_different_devices(rng):
    module = type("Attention", (), {"is_causal": True})()
    cache = ql.kv.KIVICache(config(head_dim=64), group_size=4, window=4)
    cache.layers[0].settings.config._attn_implementation = generation.ATTENTION
    keys, values = (vectors(rng, 1, 2, 20, 64, torch.float32) for _ in range(2))
    queries = vectors(rng, 1, 4, 20, 64, torch.float32)
    for part in ((0, 19), (19, 20)):
        k, v, q = (x[:, :, slice(*part)] for x in (keys, values, queries))
        outs = []
        for layer, device in enumerate(("cpu", "cuda")):
            moved = cache.update(k.to(device), v.to(device), layer)
            outs.append(generation.attention(module, q.to(device), *moved, None)[0])
            assert outs[-1].device.type == device
        torch.testing.assert_close(outs[0], outs[1].cpu(), rtol=1e-2, atol=3e-2)
    assert [layer.cache.device for layer in cache.layers] == ["cpu", "cuda:0"]


def test_a_text_read_through_a_cache_and_calibration(models):
    model = copy.deepcopy(models[2])
    ids = model_factory.token_ids(300)
    calibration = ql.kv.calibrate(model, ids, "kvquant:3:1%", windows=6, window=48)
    on_cpu = ql.kv.calibrate(copy.deepcopy(models[2]).cpu(), ids, "kvquant:3:1%", windows=6, window=48)
    np.testing.assert_allclose(
        calibration.layers[0].key_scale, on_cpu.layers[0].key_scale, rtol=1e-2, atol=1e-3
    )
    reference = copy.deepcopy(model)
    for format, tables in (("kivi:4:g4:r4", None), (calibration.format, calibration)):
        kl = []
        for where in ("cuda", "cpu"):
            cached = ql.kv.CachedModel(copy.deepcopy(model).to(where), format, calibration=tables)
            kl.append(ql.evaluate.compare(cached, reference.to(where), ids[:96], window=48).kl)
        assert kl[0] == pytest.approx(kl[1], rel=0.2, abs=1e-4)
        assert kl[0] > 1e-5


def test_commands_take_the_device(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", config(head_dim=64))
    text, output = tmp_path / "text.u16", tmp_path / "kv.safetensors"
    model_factory.token_ids(1000).astype("<u2").tofile(text)
    made = f"kv-calibrate {folder} --calibration {text} --window 48 --windows 2 --device cuda -o {output}"
    run = CliRunner().invoke(app, made.split())
    assert run.exit_code == 0, run.output
    for kv in ("kivi:2:g4:r8", str(output)):
        measured = f"eval {folder} --reference {folder} --text {text} --window 96 --windows 2 --kv {kv}"
        run = CliRunner().invoke(app, f"{measured} --kv-chunk 16 --needle 1 --device cuda --json".split())
        assert run.exit_code == 0, run.output
        result = json.loads(run.stdout)
        assert 1e-5 < result["kl"] < 1
        assert result["needle"]["tokens"] == 2 * 16
