"""ql.kv without transformers: formats, storage and attention of plain arrays."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import quantloom as ql

SPECS = [
    "kivi:2",
    "kivi:4:g16:r32:first3",
    "kivi:3,1:g8:r8:hadamard",
    "token:4",
    "token:8:g20:r9",
    "sdr:4:g16",
]


def vectors(rng, sequences, heads, tokens, dim, dtype="float16"):
    x = rng.standard_normal((sequences, heads, tokens, dim)).astype(np.float32)
    x[..., dim // 3] = x[..., dim // 3] * 6 + 4
    return x.astype(dtype)


def softmax_attention(queries, keys, values):
    """In float64: queries [heads, m, dim], keys and values [kv_heads, tokens, dim]."""
    heads, m, dim = queries.shape
    tokens = keys.shape[1]
    keys = np.repeat(keys.astype(np.float64), heads // keys.shape[0], axis=0)
    values = np.repeat(values.astype(np.float64), heads // values.shape[0], axis=0)
    scores = queries.astype(np.float64) @ keys.transpose(0, 2, 1) / np.sqrt(dim)
    scores[:, np.arange(tokens)[None, :] > np.arange(m)[:, None] + tokens - m] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def test_formats_come_back_and_say_what_they_are():
    for spec in SPECS:
        format = ql.kv.parse_kv_format(spec)
        assert ql.kv.parse_kv_format(format.spec) == format
        assert ql.kv.kv_format_from_json(format.to_json()) == format
        assert ql.kv.parse_kv_format(format) is format
    assert ql.kv.KVFormat() == ql.kv.parse_kv_format("kivi:2:g32:r128")
    assert ql.kv.KVFormat("sdr", 4) == ql.kv.parse_kv_format("sdr:4")
    assert ql.kv.KVFormat("kivi", 4, 2) == ql.kv.parse_kv_format("kivi:4,2")
    assert ql.kv.KVFormat("kivi", 4).average_bits(128) == 5.0
    assert ql.kv.KVFormat("kivi", 2).average_bits(128) == 3.0


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"kind": "kivy"}, ValueError, "kind"),
        ({"kind": 3}, TypeError, "kind"),
        ({"key_bits": 5}, ValueError, "key_bits"),
        ({"key_bits": 2.0}, TypeError, "key_bits"),
        ({"value_bits": 9}, ValueError, "value_bits: got 9, expected 1, 2, 3, 4 or 8"),
        ({"first": 2**25}, ValueError, "first: got 33554432, expected 0 to"),
        ({"kind": "kvquant", "group_size": 8}, ValueError, "group_size: got 8, expected 0 for kvquant"),
        ({"outliers": 0.01}, ValueError, "outliers: got 100 of 10000 elements, expected none for kivi"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"window": 100}, ValueError, "window"),
        ({"window": -1}, ValueError, "window"),
        ({"first": True}, TypeError, "first"),
        ({"hadamard": 1}, TypeError, "hadamard"),
    ],
)
def test_wrong_formats_are_refused_by_name(arguments, error, name):
    with pytest.raises(error, match=name):
        ql.kv.KVFormat(**arguments)


@pytest.mark.parametrize("spec", ["kivi", "kivi:5", "kivi:2:r100", "sdr:1", "int4", ""])
def test_wrong_short_forms_are_refused(spec):
    with pytest.raises(ValueError, match=r"bits|window|kv_cache"):
        ql.kv.parse_kv_format(spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_is_that_of_the_stored_vectors(spec, dtype, rng):
    keys, values = vectors(rng, 2, 2, 300, 40, dtype), vectors(rng, 2, 2, 300, 40, dtype)
    if "hadamard" in spec:
        keys, values = keys[..., :32].copy(), values[..., :32].copy()
    cache = ql.kv.KVCache(spec, 2, 2, keys.shape[-1], dtype)
    cache.append(keys, values, starts=[0, 113])
    assert cache.lengths == [300, 187]
    queries = vectors(rng, 2, 6, 3, keys.shape[-1], "float32")
    out = cache.attend(queries)
    assert out.shape == queries.shape
    assert out.dtype == np.float32
    for s in range(2):
        expected = softmax_attention(queries[s], cache.keys(s), cache.values(s))
        np.testing.assert_allclose(out[s], expected, atol=3e-5 * np.abs(values).max())


@pytest.mark.parametrize("spec", SPECS)
def test_stored_vectors_are_near_the_given_ones_and_the_window_is_exact(spec, rng):
    keys, values = vectors(rng, 1, 2, 300, 32), vectors(rng, 1, 2, 300, 32)
    cache = ql.kv.KVCache(spec, 1, 2, 32)
    cache.append(keys, values)
    for x, stored, coded in (
        (keys, cache.keys(0), cache.coded_keys(0)),
        (values, cache.values(0), cache.coded_values(0)),
    ):
        error = np.abs(stored - x[0].astype(np.float32))
        first = cache.format.first
        rotated = cache.format.hadamard and x is keys
        inside, outside = (
            error[:, first : first + coded],
            np.delete(error, np.s_[first : first + coded], axis=1),
        )
        assert outside.size == 0 or outside.max() <= (0.02 if rotated else 0)
        assert 0 < inside.max() < 14
        assert inside.mean() > 1e-4  # codes, not the values themselves


def test_torch_tensors_with_strides_are_taken_as_they_are(rng):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(vectors(rng, 2, 40, 3, 32, "float32")).bfloat16()  # [sequences, tokens, heads, dim]
    cache = ql.kv.KVCache("kivi:2:g8:r8", 2, 3, 32, torch.bfloat16)
    cache.append(x.transpose(1, 2), x.transpose(1, 2))
    same = ql.kv.KVCache("kivi:2:g8:r8", 2, 3, 32, "bfloat16")
    same.append(x.transpose(1, 2).contiguous(), x.transpose(1, 2).contiguous())
    queries = x[:, :2].transpose(1, 2)
    out = cache.attend(queries)
    assert out.dtype == torch.bfloat16
    assert out.shape == queries.shape
    assert torch.equal(out, same.attend(queries))
    assert torch.equal(cache.keys(1, "torch"), torch.from_numpy(same.keys(1)))


def test_copies_and_reordered_caches_are_their_own(rng):
    x = vectors(rng, 2, 1, 200, 16)
    cache = ql.kv.KVCache("kivi:2:g8:r16", 2, 1, 16)
    cache.append(x, x)
    twin = copy.deepcopy(cache)
    cache.reorder([1, 1, 0])
    np.testing.assert_array_equal(cache.keys(0), twin.keys(1))
    np.testing.assert_array_equal(cache.values(2), twin.values(0))
    assert cache.lengths == [200] * 3
    cache.clear()
    assert cache.lengths == [0] * 3
    assert cache.usage().page_bytes == 0
    assert twin.lengths == [200] * 2


def test_usage_counts_stored_bytes(rng):
    x = vectors(rng, 2, 2, 1024, 64)
    cache = ql.kv.KVCache("kivi:2", 2, 2, 64, capacity=1024)
    reserved = cache.usage().reserved_bytes
    cache.append(x, x)
    usage = cache.usage()
    assert usage.reserved_bytes == reserved
    assert usage.tokens == 2048
    elements = (usage.coded_keys + usage.coded_values) * 2 * 64
    assert usage.code_bytes * 8 / elements == 3.0
    assert usage.exact_bytes == 2 * 128 * 2 * 64 * 2  # the window of the values; that of the keys is empty


def test_reserved_memory_is_enough(rng):
    x = vectors(rng, 2, 2, 1000, 64)
    cache = ql.kv.KVCache("kivi:2:r32:first3", 2, 2, 64)
    cache.append(x[:, :, :300], x[:, :, :300], starts=[0, 250])
    cache.reserve(1000)
    reserved = cache.usage().reserved_bytes
    cache.reserve(700)
    cache.append(x[:, :, 300:], x[:, :, 300:])
    assert cache.lengths == [1000, 750]
    assert cache.usage().reserved_bytes == reserved
    cache.reorder([0, 0])
    cache.reserve(1250)  # one of them needs pages of its own
    reserved = cache.usage().reserved_bytes
    cache.append(x[:, :, :250], x[:, :, :250])
    assert cache.lengths == [1250] * 2
    assert cache.usage().reserved_bytes == reserved
    with pytest.raises(ValueError, match="tokens"):
        cache.reserve(-1)
    for tokens in (2**40, 2**62):
        with pytest.raises(ValueError, match=r"capacity: got \d+ pages, expected fewer than 2\^31"):
            cache.reserve(tokens)
    assert cache.usage().reserved_bytes == reserved
    assert cache.lengths == [1250] * 2


def test_appending_and_attending_compile_as_one_operator(rng):
    torch = pytest.importorskip("torch")
    caches = [ql.kv.KVCache("kivi:2:g8:r8", 2, 2, 32, "float32") for _ in range(2)]
    twin = ql.kv.KVCache("kivi:2:g8:r8", 2, 2, 32, "float32")

    class Step(torch.nn.Module):
        def forward(self, queries, keys, values):
            # Two calls that look the same must not become one.
            first = caches[0].append_attend(queries, keys, values)
            caches[1].append_attend(queries, keys, values)  # nobody needs the result
            return first + caches[0].append_attend(queries, keys, values)

    for backend in ("eager", "aot_eager"):
        step = torch.compile(Step(), backend=backend, fullgraph=True)
        for cache in (*caches, twin):
            cache.clear()
        for tokens in (20, 1, 1):
            keys, values = (torch.from_numpy(vectors(rng, 2, 2, tokens, 32, "float32")) for _ in range(2))
            queries = torch.from_numpy(vectors(rng, 2, 4, tokens, 32, "float32"))
            out = step(queries, keys, values)
            expected = 0
            for _ in range(2):
                twin.append(keys, values)
                expected = twin.attend(queries) + expected
            torch.testing.assert_close(out, expected)
        assert caches[0].lengths == twin.lengths == [44, 44]
        assert caches[1].lengths == [22, 22]
    torch.library.opcheck(
        torch.ops.quantloom.kv_append_attend.default,
        (queries, keys, values, None, twin._handle, 0.5),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_bad_input_is_refused_by_name(rng):
    x = vectors(rng, 1, 2, 5, 16)
    cache = ql.kv.KVCache("kivi:2", 1, 2, 16)
    with pytest.raises(TypeError, match="keys: got float32, expected float16"):
        cache.append(x.astype(np.float32), x)
    with pytest.raises(ValueError, match="values: got shape"):
        cache.append(x, x[:, :, :4])
    with pytest.raises(ValueError, match="keys"):
        cache.append(x[0], x)
    with pytest.raises(ValueError, match="next to each other"):
        cache.append(np.asfortranarray(x), x)
    with pytest.raises(ValueError, match="starts"):
        cache.append(x, x, starts=[6])
    bad = x.copy()
    bad[0, 1, 3, 7] = np.nan
    with pytest.raises(ValueError, match="values: got nan for sequence 0, head 1, token 3, channel 7"):
        cache.append(x, bad)
    assert cache.lengths == [0]
    with pytest.raises(ValueError, match="queries"):
        cache.attend(x[:, :1, :1].repeat(3, axis=1)[..., :8].copy())
    with pytest.raises(ValueError, match="queries"):
        cache.attend(x[0])
    with pytest.raises(ValueError, match="sequence"):
        cache.keys(1)
    with pytest.raises(ValueError, match="sources"):
        cache.reorder([1])
    with pytest.raises(ValueError, match="head_dim"):
        ql.kv.KVCache("kivi:2", 1, 1, 12)
    with pytest.raises(TypeError, match="dtype"):
        ql.kv.KVCache("kivi:2", 1, 1, 16, "int8")
    for arguments, name in {
        (2**62, 1, 16): "sequences",
        (1, 2**40, 16): "sequences",
        (1, 1, 16, "float16", 2**45): "capacity",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: got .*, expected fewer than 2"):
            ql.kv.KVCache("kivi:2", *arguments)
    with pytest.raises(TypeError, match="tables: got str"):
        ql.kv.KVCache("kivi:2", 1, 1, 16, tables="file")
    with pytest.raises(TypeError, match="starts: got int, expected a sequence of integers"):
        cache.append(x, x, starts=0)
    with pytest.raises(TypeError, match="sources: got int, expected a sequence of integers"):
        cache.reorder(0)
    with pytest.raises(TypeError, match="check"):
        cache.append(x, x, check=1)
    with pytest.raises(ValueError, match="device"):
        ql.kv.KVCache("kivi:2", 1, 1, 16, device="gpu")
    with pytest.raises(TypeError, match="device"):
        ql.kv.KVCache("kivi:2", 1, 1, 16, device=0)
    with pytest.raises(ValueError, match="kind"):
        cache.keys(0, "cupy")


def test_needs_no_torch():
    code = "import sys, quantloom as ql; ql.kv.KVCache('kivi:2', 1, 1, 16); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_operator_takes_tensors_alone():
    torch = pytest.importorskip("torch")
    cache = ql.kv.KVCache("kivi:2", 1, 1, 64)
    x = np.zeros((1, 1, 1, 64), np.float16)
    with pytest.raises(TypeError, match=r"keys: got ndarray, expected a torch\.Tensor"):
        cache.append_attend(torch.from_numpy(x), x, x)
    assert cache.lengths == [0]


def test_the_operator_refuses_queries_before_it_appends():
    torch = pytest.importorskip("torch")
    cache = ql.kv.KVCache("kivi:2", 1, 2, 64)
    x = torch.zeros((1, 2, 1, 64), dtype=torch.float16)
    for queries, scale, error, name in (
        (x[0], None, ValueError, "queries"),
        (x[:, :1], None, ValueError, "queries"),
        (x[..., :8], None, ValueError, "queries"),
        (x.int(), None, TypeError, "queries"),
        (x, float("nan"), ValueError, "scale"),
        (x, 1e39, ValueError, "scale"),
        (x, "1", TypeError, "scale"),
    ):
        with pytest.raises(error, match=name):
            cache.append_attend(queries, x, x, scale)
    with pytest.raises(TypeError, match="keys: got a tensor on meta, expected one on cpu"):
        cache.append_attend(x, x.to("meta"), x)
    assert cache.lengths == [0]
