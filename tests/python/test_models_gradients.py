"""Hessians of outputs against gradients by hand, and whole models rounded with them."""

import dataclasses

import model_factory
import numpy as np
import pytest
import quantloom as ql
import torch
from quantloom import models

IDS = model_factory.token_ids(8 * 32)
SETTINGS = {"windows": 6, "window": 32, "held_out_windows": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return model_factory.write_model(tmp_path_factory.mktemp("model"), model_factory.llama(tied=False))


def test_gradients_are_those_of_the_models_own_prediction(llama):
    model = models.load_reference(llama).requires_grad_(True)
    calls = []
    found = models.output_hessians(
        model, IDS, windows=3, window=32, seed=5, progress=lambda *done: calls.append(done)
    )
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    name = "model.layers.0.mlp.down_proj"
    assert not any("lm_head" in other for other in found)
    assert found[name].tokens == 96
    # A constant added to the output has its gradient.
    generator = torch.Generator().manual_seed(5)
    total = np.zeros((64, 64))
    for row in IDS[:96].reshape(3, 32):
        shift = torch.zeros(1, 32, 64, requires_grad=True)
        handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, out, s=shift: out + s)
        logits = model(torch.from_numpy(row[None])).logits[0]
        handle.remove()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        chosen = logits.log_softmax(-1)[torch.arange(32), drawn]
        (gradient,) = torch.autograd.grad(-chosen.sum(), shift)
        g = gradient[0].double().numpy()
        total += g.T @ g
    np.testing.assert_allclose(found[name].sum(), total, rtol=1e-3, atol=1e-4 * np.abs(total).max())
    again = models.output_hessians(model, torch.from_numpy(IDS), windows=3, window=32, seed=5)
    np.testing.assert_array_equal(again[name].sum(), found[name].sum())


def test_gradients_refuse(llama):
    model = models.load_reference(llama)
    for arguments, error, words in [
        ({"ids": IDS[:40]}, ValueError, "ids: got 40 tokens, expected at least 64"),
        ({"ids": IDS.reshape(2, -1)}, ValueError, "ids.*dimension"),
        ({"ids": IDS.astype(float)}, TypeError, "ids"),
        ({"ids": IDS + 100_000}, ValueError, "ids"),
        ({"windows": 0}, ValueError, "windows"),
        ({"seed": "a"}, TypeError, "seed"),
    ]:
        with pytest.raises(error, match=words):
            models.output_hessians(model, **{"ids": IDS, "windows": 2, "window": 32} | arguments)
    with pytest.raises(TypeError, match="model"):
        models.output_hessians("model", IDS, windows=1, window=32)


def test_models_take_hessians_of_outputs(llama, tmp_path):
    recipe = ql.Recipe.parse("trellis:2:mul1:l10", "gptq")
    outputs = models.output_hessians(models.load_reference(llama), IDS, windows=6, window=32)
    one = models.quantize(llama, recipe, IDS, output=tmp_path / "one", **SETTINGS)
    two = models.quantize(llama, recipe, IDS, output=tmp_path / "two", output_hessians=outputs, **SETTINGS)
    assert all(module.two_sided_loss is None for module in one.modules)
    for module in two.modules:
        assert module.two_sided_loss < module.two_sided_loss_nearest
    models.load(tmp_path / "two")
    some = {name: hessian for name, hessian in outputs.items() if name.endswith("q_proj")}
    part = models.quantize(llama, recipe, IDS, output=tmp_path / "part", output_hessians=some, **SETTINGS)
    for module in part.modules:
        assert (module.two_sided_loss is not None) == module.name.endswith("q_proj")

    name = next(iter(outputs))
    bad = [
        (recipe, {"x": outputs[name]}, ValueError, "'x'"),
        (recipe, {name: 1}, TypeError, "output_hessians.*int"),
        (recipe, {name: ql.Hessian(3)}, ValueError, "3 outputs"),
        (recipe, [1], TypeError, "mapping"),
        (ql.Recipe.parse("uniform:4", "gptq"), outputs, ValueError, "uniform:4"),
        (dataclasses.replace(recipe, rounding=ql.Nearest()), outputs, ValueError, "nearest"),
    ]
    for chosen, given, error, words in bad:
        with pytest.raises(error, match=words):
            models.quantize(llama, chosen, IDS, output=tmp_path / "bad", output_hessians=given, **SETTINGS)
    assert not (tmp_path / "bad").exists()
