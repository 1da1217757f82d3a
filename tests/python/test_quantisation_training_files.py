"""Files of weights that are quantized in every pass: what they hold, and refusals of damaged ones."""

import copy
import json
import math

import pytest

torch = pytest.importorskip("torch")
import safetensors.torch
from quantloom import formats as Q
from quantloom import quantisation_training as T
from torch import nn
from training_cases import INT8_ROWS, TRAINED, spec, three_layers


def converted():
    model = three_layers()
    T.convert(model, TRAINED, "parameter", True, activation_fmt=INT8_ROWS)
    return T.save(model)


def meta_of(state):
    return json.loads(state["_quantisation_meta"].numpy().tobytes())


def with_meta(state, change):
    meta = meta_of(state)
    change(meta)
    return {
        **state,
        "_quantisation_meta": torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8),
    }


def refused(state, match=None):
    model = three_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        T.load_convert(model, state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert [type(layer) for layer in model] == [nn.Linear, nn.RMSNorm, nn.Linear]


def test_meta_is_described():
    meta = meta_of(converted())
    assert (meta["version"], meta["mode"], meta["scaling_mode"]) == (1, "qat", "parameter")
    assert set(meta["fmt"]) == {"0.weight", "2.weight"}
    assert Q.TensorFormat.load(meta["activation_fmt"]["2"]) == INT8_ROWS


def test_damaged_meta_is_refused():
    state = converted()
    refused(
        {name: value for name, value in state.items() if name != "_quantisation_meta"},
        "no '_quantisation_meta'",
    )
    refused({**state, "_quantisation_meta": torch.zeros(3)}, "of bytes")
    for text in (b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"version": 1}'):
        raw = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8)
            if text
            else torch.zeros(0, dtype=torch.uint8)
        )
        refused({**state, "_quantisation_meta": raw}, "_quantisation_meta")
    for key, values in {
        "version": [0, 2, "1", None],
        "mode": ["", "train", None, 3],
        "scaling_mode": ["auto", None, []],
        "clip_gradient": [0, 1, "yes", None],
        "fmt": [[], None, {}, {"0.weight": {}}, {"0.weight": {}, "2.weight": {}, "9.weight": {}}],
        "activation_fmt": [None, [], {"1": {}}, {"9": {}}, {"0": {}}, {"0": {"_type": "no such"}}],
    }.items():
        for value in values:
            refused(with_meta(state, lambda meta, k=key, v=value: meta.__setitem__(k, v)))
    refused(with_meta(state, lambda meta: meta.__setitem__("more", 1)))
    for description in (
        3,
        "int",
        [],
        {"_type": "int"},
        {"_type": "int", "bits_": "many"},
        {"_type": "int", "bits_": -1e9},
    ):
        refused(
            with_meta(state, lambda meta, d=description: meta["fmt"].__setitem__("0.weight", d)),
            "0.weight|fmt",
        )
    refused(
        with_meta(state, lambda meta: meta["fmt"].__setitem__("0.weight", Q.TensorFormat.save(Q.BFLOAT16))),
        "state",
    )


def test_every_damaged_format_ends_in_an_error():
    """Each leaf of a format's description in turn is replaced by a value of another kind."""
    state = converted()
    reference = meta_of(state)["fmt"]["0.weight"]

    def leaves(value, path=()):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from leaves(item, (*path, key))
        elif isinstance(value, list):
            for index, item in enumerate(value[:4]):
                yield from leaves(item, (*path, index))
        else:
            yield path

    for path in leaves(reference):
        for replacement in ("x", None, [], {}, -1, math.inf):
            damaged = copy.deepcopy(reference)
            target = damaged
            for key in path[:-1]:
                target = target[key]
            if target[path[-1]] == replacement:
                continue
            target[path[-1]] = replacement
            model = three_layers()
            try:
                T.load_convert(
                    model, with_meta(state, lambda m, d=damaged: m["fmt"].__setitem__("0.weight", d))
                )
            except ValueError:
                assert [type(layer) for layer in model] == [nn.Linear, nn.RMSNorm, nn.Linear]
            else:
                model(torch.randn(2, 64))  # a name, say: nothing that matters


def test_damaged_tensors_are_refused():
    state = converted()
    assert "0.weight.sparse_idx" in state
    for name in state:
        if name == "_quantisation_meta":
            continue
        refused({key: value for key, value in state.items() if key != name}, "lacks")
        refused({**state, name: state[name].flatten()[1:]}, name)
        refused({**state, name: state[name].double()}, name)
        if state[name].is_floating_point():
            damaged = state[name].clone()
            damaged.view(-1)[0] = math.nan
            refused({**state, name: damaged}, "NaN")
    refused({**state, "extra": torch.ones(1)}, "unknown")
    for value in (-1, 64 * 512, 2**40):
        damaged = state["0.weight.sparse_idx"].clone()
        damaged[0] = value
        refused({**state, "0.weight.sparse_idx": damaged}, "outside")
    damaged = state["0.weight.sparse_idx"].clone()
    damaged[0] = damaged[1]
    refused({**state, "0.weight.sparse_idx": damaged}, "twice")


def test_files_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        T.load_convert(three_layers(), file)
    safetensors.torch.save_file(converted(), file)
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file)
    file.write_bytes(whole[:8] + b"\0" + whole[9:])
    refused(file, "no readable safetensors file")


def test_save_and_load_refuse_other_modules():
    with pytest.raises(ValueError, match="no converted layer"):
        T.save(three_layers())
    state = converted()
    model = three_layers()
    T.load_convert(model, state)
    with pytest.raises(ValueError, match="before `convert`"):
        T.load_convert(model, state)
    mixed = three_layers()
    T.convert(mixed[0], spec(), "dynamic", False)
    T.convert(mixed[2], spec(), "parameter", False)
    with pytest.raises(ValueError, match="several settings"):
        T.save(mixed)
    with pytest.raises(ValueError, match="state"):
        T.load_convert(nn.Sequential(nn.Linear(64, 256), nn.RMSNorm((256,)), nn.Linear(256, 64)), state)
