"""Quantized caches with generate() of transformers."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import model_factory
import quantloom as ql
from kv_cases import config, generate, logits_by_token, prompt

SPECS = ["kivi:2:g4:r8", "kivi:4:g8:r8:first2:hadamard", "token:4", "sdr:4:r3"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models():
    """The same model with our attention and with PyTorch's."""
    ours = model_factory.build(config())
    theirs = copy.deepcopy(ours)
    ql.kv.use_attention(ours)
    theirs.set_attn_implementation("sdpa")
    return ours, theirs


def test_without_a_cache_and_with_a_dynamic_one_it_is_plain_attention(models):
    ours, theirs = models
    ids = prompt(30, 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        for settings in ({}, {"attention_mask": mask}):
            a, b = (model(ids, use_cache=False, **settings).logits for model in (ours, theirs))
            rows = slice(7, None) if settings else slice(None)
            torch.testing.assert_close(a[:, rows], b[:, rows], rtol=1e-4, atol=1e-4)
    a, b = (generate(model, ids, None, attention_mask=mask) for model in models)
    assert torch.equal(a, b)


def test_long_prompts_go_in_runs(models, monkeypatch):
    ours, theirs = models
    ids = prompt(50, 2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    results = []
    for run in (512, 7):
        monkeypatch.setattr("quantloom.kv.generation._RUN", run)
        cache = ql.kv.KIVICache(ours.config, window=256)
        with torch.no_grad():
            parts = [
                ours(part, attention_mask=mask[:, :end], past_key_values=cache).logits
                for part, end in zip(ids.split([20, 30], dim=1), (20, 50))
            ]
        results.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(results[0][1, 9:], expected[1, 9:], rtol=1e-4, atol=1e-4)


def test_a_window_that_holds_everything_is_exact(models):
    ours, theirs = models
    ids = prompt(40)
    expected = generate(theirs, ids, None)
    for spec in ("kivi:2:g32:r256", "token:2:r256", "kivi:1:first256"):
        cache = ql.kv.QuantizedKVCache(ours.config, spec)
        assert torch.equal(generate(ours, ids, cache), expected)
        dense = ql.kv.QuantizedKVCache(theirs.config, spec)
        assert torch.equal(generate(theirs, ids, dense), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_our_attention_and_decoding_for_theirs_give_the_same(models, spec):
    ids = prompt(37)
    logits = [logits_by_token(model, ids, ql.kv.QuantizedKVCache(model.config, spec)) for model in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_generated_tokens_are_quantized(models, spec):
    """The prompt fits into the window: only what is generated can differ from the exact cache."""
    ours, theirs = models
    ids = prompt(60)
    format = ql.kv.parse_kv_format(spec)
    cache = ql.kv.QuantizedKVCache(ours.config, spec)
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    actual = logits_by_token(ours, ids, cache)
    difference = (actual - expected).abs().amax(dim=(0, 2))
    exact = format.first + max(format.window - 1, 0)
    rotated = 1e-3 if format.hadamard else 1e-4
    assert difference[:exact].amax() < rotated if exact else True
    assert difference[format.first + 2 * format.window + 4 :].amin() > 1e-3
    # Of 60 tokens all but those that the format keeps are codes, in every layer.
    for layer in cache.layers:
        coded = layer.cache.coded_values(0)
        assert coded == 60 - format.first - format.window
        assert layer.cache.coded_keys(0) >= coded
        states = layer.cache.values(0)[:, format.first : format.first + coded]
        for row in states.reshape(-1, states.shape[-1]):
            group = row[: format.group_size or None]
            assert len(set(group.tolist())) <= 2**format.value_bits


@pytest.mark.parametrize("spec", SPECS)
def test_the_prompt_and_single_tokens_store_the_same(models, spec):
    ours, _ = models
    ids = prompt(50)
    one, many = (ql.kv.QuantizedKVCache(ours.config, spec) for _ in range(2))
    logits_by_token(ours, ids, one)
    with torch.no_grad():
        ours(ids, past_key_values=many, use_cache=True)
    first, second = one.layers[0].cache, many.layers[0].cache
    # The first layer's keys and values do not depend on attention.
    torch.testing.assert_close(first.keys(0, "torch"), second.keys(0, "torch"), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.values(0, "torch"), second.values(0, "torch"), rtol=1e-3, atol=1e-3)
    assert first.coded_keys(0) == second.coded_keys(0)


@pytest.mark.parametrize("spec", SPECS)
def test_chunks_of_a_prompt_see_what_is_stored(models, spec):
    """The tokens of a call see each other exactly, or all as they are stored, by the setting; earlier ones as
    they are stored."""
    ours, theirs = models
    ids = prompt(48)
    with torch.no_grad():
        exact = ours(ids, past_key_values=ql.kv.QuantizedKVCache(ours.config, spec)).logits
        plain = theirs(ids, use_cache=False).logits
        cache = ql.kv.QuantizedKVCache(ours.config, spec, prefill="quantized")
        quantized = ours(ids, past_key_values=cache).logits
        dense = theirs(
            ids, past_key_values=ql.kv.QuantizedKVCache(theirs.config, spec, prefill="quantized")
        ).logits
        chunked = ql.kv.QuantizedKVCache(ours.config, spec)
        parts = [ours(part, past_key_values=chunked).logits for part in ids.split([20, 7, 21], dim=1)]
        dense_chunked = ql.kv.QuantizedKVCache(theirs.config, spec)
        dense_parts = [
            theirs(part, past_key_values=dense_chunked).logits for part in ids.split([20, 7, 21], dim=1)
        ]
    torch.testing.assert_close(exact, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantized, dense, rtol=1e-3, atol=1e-3)
    assert (quantized - plain).abs().amax() > 1e-2
    torch.testing.assert_close(torch.cat(parts, 1), torch.cat(dense_parts, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parts[0], plain[:, :20], rtol=1e-4, atol=1e-4)
    assert (torch.cat(parts, 1) - plain)[:, 27:].abs().amax() > 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_a_sequence_does_not_depend_on_its_batch_mates(models, spec):
    ours, theirs = models
    lengths = [33, 5, 17, 1]
    rows = [prompt(length, seed=10 + length)[0] for length in lengths]
    ids = torch.stack([torch.nn.functional.pad(row, (33 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (33 - len(row), 0)) for row in rows])
    cache = ql.kv.QuantizedKVCache(ours.config, spec)
    batch = generate(ours, ids, cache, attention_mask=mask)
    padded = ql.kv.QuantizedKVCache(theirs.config, spec, padding=mask)
    assert torch.equal(generate(theirs, ids, padded, attention_mask=mask), batch)
    for s, row in enumerate(rows):
        alone = ql.kv.QuantizedKVCache(ours.config, spec)
        assert torch.equal(generate(ours, row[None], alone)[0, len(row) :], batch[s, 33:])
        for layer, other in zip(cache.layers, alone.layers):
            assert layer.cache.lengths[s] == other.cache.lengths[0] == len(row) + 11
            torch.testing.assert_close(
                layer.cache.values(s, "torch"), other.cache.values(0, "torch"), rtol=0.01, atol=0.01
            )


@pytest.mark.parametrize("direct", [True, False])
def test_a_refused_call_leaves_the_cache_as_it_was(models, direct):
    model = models[0 if direct else 1]
    ids, mask = prompt(20, 2), torch.ones(2, 20, dtype=torch.long)
    cache = ql.kv.QuantizedKVCache(model.config, "kivi:2:g4:r8", "quantized")
    twin = ql.kv.QuantizedKVCache(model.config, "kivi:2:g4:r8", "quantized")
    with torch.no_grad():
        for each in (cache, twin):
            model(ids[:, :19], attention_mask=mask[:, :19], past_key_values=each)
        with pytest.raises(ValueError, match="keys: got shape"):
            model(ids[:1, 19:], past_key_values=cache)
        if direct:
            hole = mask.clone()
            hole[0, 5] = 0
            with pytest.raises(ValueError, match="attention_mask: row 0"):
                model(ids[:, 19:], attention_mask=hole, past_key_values=cache)
        assert cache.get_seq_length() == 19
        assert cache.usage() == twin.usage()
        after, expected = (model(ids[:, 19:], attention_mask=mask, past_key_values=c) for c in (cache, twin))
    assert torch.equal(after.logits, expected.logits)


@pytest.mark.parametrize("direct", [True, False])
def test_a_call_that_fails_between_layers_is_told_until_a_reset(models, direct):
    model = models[0 if direct else 1]
    ids = prompt(20)
    cache = ql.kv.QuantizedKVCache(model.config, "token:4")
    weight = model.model.layers[1].self_attn.v_proj.weight
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
        kept = weight[0, 0].item()
        weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="values: got nan"):
            model(ids, past_key_values=cache)
        weight[0, 0] = kept
        with pytest.raises(RuntimeError, match=r"layer 1 of the cache holds 20 tokens, expected 40.*reset"):
            model(ids, past_key_values=cache)
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_a_sequence_may_start_in_a_later_piece_of_the_prompt(models):
    ours, theirs = models
    ids = prompt(40, 2)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    for prefill in ("exact", "quantized"):
        cache = ql.kv.QuantizedKVCache(ours.config, "kivi:2:g32:r256", prefill)
        with torch.no_grad():
            parts = [
                ours(part, attention_mask=mask[:, :end], past_key_values=cache).logits
                for part, end in zip(ids.split([20, 15, 5], dim=1), (20, 35, 40))
            ]
            expected = theirs(ids, attention_mask=mask).logits
        actual = torch.cat(parts, dim=1)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual[1, 25:], expected[1, 25:], rtol=1e-4, atol=1e-4)
        assert cache.layers[1].cache.lengths == [40, 15]


def test_beams_and_samples(models):
    ours, theirs = models
    ids = prompt(21, 2)
    # A window that holds everything: beams must be those of PyTorch's attention.
    exact = generate(ours, ids, ql.kv.KIVICache(ours.config, 2, window=256), num_beams=3)
    assert torch.equal(exact, generate(theirs, ids, None, num_beams=3))
    for spec in SPECS:
        caches = [ql.kv.QuantizedKVCache(model.config, spec) for model in models]
        beams = [generate(model, ids, cache, num_beams=3) for model, cache in zip(models, caches)]
        assert torch.equal(*beams)
    sampled = []
    for _ in range(2):
        torch.manual_seed(5)
        cache = ql.kv.KIVICache(ours.config, 4, group_size=4, window=8)
        sampled.append(generate(ours, ids, cache, do_sample=True, num_return_sequences=2))
    assert torch.equal(*sampled)
    assert sampled[0].shape == (4, 33)


def test_a_cache_goes_on_after_a_prompt_and_can_be_copied_and_reset(models):
    ours, _ = models
    ids = prompt(30)
    cache = ql.kv.KIVICache(ours.config, group_size=4, window=8)
    with torch.no_grad():
        ours(ids[:, :29], past_key_values=cache)
    results = [generate(ours, ids, copy.deepcopy(cache)) for _ in range(2)]
    assert torch.equal(*results)
    assert cache.get_seq_length() == 29
    first = generate(ours, ids, cache)
    assert torch.equal(first, results[0])
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        ours(ids[:, :29], past_key_values=cache)
    assert torch.equal(generate(ours, ids, cache), first)


def test_reserved_memory_serves_all_layers(models):
    ours, _ = models
    cache = ql.kv.KIVICache(ours.config, group_size=4, window=8)
    with pytest.raises(RuntimeError, match="reserve"):
        cache.reserve(10)
    ids = prompt(60)
    with torch.no_grad():
        ours(ids[:, :20], past_key_values=cache)
    cache.reserve(60)
    reserved = cache.usage().reserved_bytes
    logits_by_token(ours, ids[:, 20:], cache)
    assert cache.usage().reserved_bytes == reserved
    assert cache.get_seq_length() == 60


def test_usage_is_that_of_all_layers(models):
    ours, _ = models
    cache = ql.kv.KIVICache(ours.config, bits=(4, 2), group_size=16, window=16, capacity=128)
    assert cache.usage().tokens == 0
    generate(ours, prompt(40), cache)
    usage = cache.usage()
    assert usage.tokens == 51
    assert usage.coded_keys == 48
    assert usage.coded_values == 35
    # 2 layers of 2 heads of 16 channels
    assert usage.code_bytes == 2 * 2 * 16 * (48 * 6 + 35 * 4) // 8
    assert usage.exact_bytes == 2 * 2 * 16 * 4 * (3 + 16)
    generate(ours, prompt(2), cache.__class__(ours.config, group_size=16, window=16))


def test_models_with_biases_and_other_families():
    for family in ("phi", "gpt_neox", "opt"):
        made = model_factory.FAMILIES[family]()
        made.max_position_embeddings = 128
        ours = model_factory.build(made)
        theirs = copy.deepcopy(ours)
        theirs.set_attn_implementation("sdpa")
        ql.kv.use_attention(ours)
        ids = prompt(20, 2)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        expected = generate(theirs, ids, None, attention_mask=mask)
        cache = ql.kv.KIVICache(ours.config, window=256)
        assert torch.equal(generate(ours, ids, cache, attention_mask=mask), expected), family


@pytest.mark.parametrize("run", [512, 5])
def test_layers_with_a_sliding_window_keep_its_tokens_exactly(run, monkeypatch):
    monkeypatch.setattr("quantloom.kv.generation._RUN", run)
    made = model_factory.gemma3()
    made.max_position_embeddings = 128
    ours = model_factory.build(made)
    theirs = copy.deepcopy(ours)
    ql.kv.use_attention(ours)
    theirs.set_attn_implementation("sdpa")
    ids = prompt(50, 2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask, use_cache=False).logits for model in (ours, theirs))
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a[1, 9:], b[1, 9:], rtol=1e-4, atol=1e-4)
    expected = generate(theirs, ids, None, attention_mask=mask)
    for beams in (1, 2):
        expected = generate(theirs, ids, None, attention_mask=mask, num_beams=beams)
        assert torch.equal(generate(ours, ids, None, attention_mask=mask, num_beams=beams), expected)
        cache = ql.kv.KIVICache(ours.config, window=128)
        assert torch.equal(generate(ours, ids, cache, attention_mask=mask, num_beams=beams), expected)
        assert [layer.is_sliding for layer in cache.layers] == [True, False, True]
        assert cache.usage().tokens == beams * (61 + 52)
    spec = "kivi:2:g4:r8"
    caches = [ql.kv.QuantizedKVCache(model.config, spec) for model in (ours, theirs)]
    logits = [logits_by_token(model, ids, cache) for model, cache in zip((ours, theirs), caches)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    assert (logits[0] - b)[0].abs().amax() > 1e-2
    assert caches[0].layers[1].cache.coded_keys(0) == 48
    with pytest.raises(RuntimeError, match="crop"):
        caches[0].crop(-1)
    assert caches[0].layers[0].get_seq_length() == 50


def test_a_step_compiles_without_breaks(models):
    """New caches and longer ones need no new code."""
    ours, _ = models
    ids = prompt(40, 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for settings in ({}, {"attention_mask": mask}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        results = []
        for model in (ours, compiled, compiled):
            cache = ql.kv.KIVICache(ours.config, group_size=4, window=8)
            parts, end = [], 0
            with torch.no_grad():
                for part in (ids[:, :30], *ids[:, 30:].split(1, dim=1)):
                    end += part.shape[1]
                    given = {name: x[:, :end] for name, x in settings.items()}
                    parts.append(model(part, past_key_values=cache, **given).logits)
            results.append(torch.cat(parts, dim=1))
            assert [layer.cache.lengths for layer in cache.layers] == [[40, 33 if settings else 40]] * 2
        for actual in results[1:]:
            torch.testing.assert_close(actual, results[0], rtol=1e-4, atol=1e-4)
        # The prompt and, as lengths turn out to change, single tokens.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_what_cannot_be_done_is_refused(models):
    ours, theirs = models
    with pytest.raises(ValueError, match="full_attention"):
        ql.kv.KIVICache(model_factory.gemma3(layers=1))
    static = transformers.StaticCache(config=ours.config, max_cache_len=32)
    with pytest.raises(ValueError, match="past_key_values"), torch.no_grad():
        ours(prompt(10), past_key_values=static)
    capped = model_factory.build(model_factory.gemma2())
    ql.kv.use_attention(capped)
    with pytest.raises(ValueError, match="softcap"), torch.no_grad():
        capped(prompt(10), past_key_values=ql.kv.KIVICache(capped.config))
    with pytest.raises(TypeError, match="config"):
        ql.kv.KIVICache(ours)
    with pytest.raises(ValueError, match="prefill"):
        ql.kv.KIVICache(ours.config, prefill="none")
    with pytest.raises(ValueError, match="window"):
        ql.kv.KIVICache(ours.config, window=100)
    with pytest.raises(ValueError, match="bits: got 3"):
        ql.kv.KIVICache(ours.config, bits=(2, 2, 2))
    with pytest.raises(ValueError, match="calibration: got int, expected none for kivi:2"):
        ql.kv.QuantizedKVCache(ours.config, "kivi:2", calibration=5)
    with pytest.raises(TypeError, match="model: got Linear"):
        ql.kv.use_attention(torch.nn.Linear(1, 1))
    cache = ql.kv.KIVICache(ours.config)
    ids = prompt(10)
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="left padding only"), torch.no_grad():
        ours(ids, attention_mask=mask, past_key_values=cache)
    cache = ql.kv.KIVICache(ours.config)
    with torch.no_grad():
        ours(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="repeats"):
        cache.batch_repeat_interleave(-1)
    assert cache.layers[0].cache.lengths == [10]
    padded = ql.kv.KIVICache(theirs.config, padding=torch.ones(2, 10))
    with pytest.raises(ValueError, match="padding: got 2 rows, expected 1"), torch.no_grad():
        theirs(ids, past_key_values=padded)
    assert not cache.is_croppable
