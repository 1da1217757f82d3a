"""Rotations folded into the weights of whole models."""

from __future__ import annotations

import model_factory
import pytest
import quantloom as ql
import torch
import transformers


def qwen2():
    return transformers.Qwen2Config(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        vocab_size=model_factory.VOCABULARY,
        max_position_embeddings=model_factory.POSITIONS,
    )


@pytest.mark.parametrize("config", [model_factory.llama, qwen2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("transform", ["hadamard:seed=3", "hadamard:b16:no-signs"])
def test_the_rotated_model_computes_the_same(tmp_path, config, transform):
    folder = model_factory.write_model(tmp_path / "model", config(), dtype=torch.float32)
    result = ql.models.rotate(folder, tmp_path / "out", transform)
    assert result.difference < 1e-5
    tokens = torch.from_numpy(model_factory.token_ids(2 * 40).reshape(2, 40).copy())
    with torch.no_grad():
        before = ql.models.load_reference(folder)(tokens).logits
        rotated = ql.models.load_reference(tmp_path / "out")
        after = rotated(tokens).logits
        own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own, before, atol=1e-4, rtol=1e-4)
    weights = dict(rotated.named_parameters())
    assert all(torch.all(value == 1) for name, value in weights.items() if name.endswith("layernorm.weight"))
    original = dict(ql.models.load_reference(folder).named_parameters())
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(weights[name], original[name], atol=1e-2)


def test_the_rotated_model_can_be_quantized(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama(), dtype=torch.bfloat16)
    ql.models.rotate(folder, tmp_path / "rotated")
    recipe = ql.Recipe.parse("uniform:8:g32", "nearest", transform="hadamard:b32")
    ql.models.quantize(tmp_path / "rotated", recipe, output=tmp_path / "out")
    tokens = torch.from_numpy(model_factory.token_ids(40).copy())[None]
    with torch.no_grad():
        before = ql.models.load_reference(folder)(tokens).logits
        after = ql.models.load(tmp_path / "out", torch.float32)(tokens).logits
    assert (after - before).norm() < 0.05 * before.norm()


def test_refuses_by_name_and_writes_nothing(tmp_path):
    folder = model_factory.write_model(tmp_path / "model", model_factory.llama())
    with pytest.raises(ValueError, match=r"model_path: .*gpt_neox.*llama"):
        ql.models.rotate(
            model_factory.write_model(tmp_path / "neox", model_factory.gpt_neox()), tmp_path / "out"
        )
    for transform in ("hadamard:both", None, "hadamard:b7"):
        with pytest.raises(ValueError, match="transform"):
            ql.models.rotate(folder, tmp_path / "out", transform)
    with pytest.raises(ValueError, match="output"):
        ql.models.rotate(folder, folder)
    with pytest.raises(TypeError, match="dtype"):
        ql.models.rotate(folder, tmp_path / "out", dtype=torch.int8)
    assert not (tmp_path / "out").exists()
    ql.models.rotate(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="overwrite"):
        ql.models.rotate(folder, tmp_path / "out")
    ql.models.rotate(folder, tmp_path / "out", overwrite=True)
