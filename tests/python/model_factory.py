"""Tiny random causal language models of several families, written as transformers writes real ones."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 97
POSITIONS = 48

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def llama(hidden=64, layers=2, intermediate=96, tied=True):
    """Grouped-query attention, no biases, tied embeddings."""
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **_COMMON,
    )


def gpt_neox(hidden=64, layers=2):
    """Parallel residuals, a fused query-key-value projection, biases, an untied head named embed_out."""
    return transformers.GPTNeoXConfig(
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=False,
        **_COMMON,
    )


def opt(hidden=64, layers=2):
    """Learned positions, biases, projections of the embeddings outside the blocks."""
    return transformers.OPTConfig(
        hidden_size=hidden,
        ffn_dim=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        pad_token_id=1,
        do_layer_norm_before=True,
        **_COMMON,
    )


def phi(hidden=64, layers=2):
    """Attention and MLP read the same normalized input; biases."""
    return transformers.PhiConfig(
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        **_COMMON,
    )


def gemma2(hidden=64, layers=2):
    """Scaled embeddings, norms around each part, blocks with different attention masks."""
    return transformers.Gemma2Config(
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        pad_token_id=0,
        **_COMMON,
    )


def gemma3(hidden=64, layers=3, window=16):
    """Attention to a window in all layers but every third; norms of queries and keys."""
    return transformers.Gemma3TextConfig(
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=window,
        layer_types=["full_attention" if i % 3 == 1 else "sliding_attention" for i in range(layers)],
        pad_token_id=0,
        **_COMMON,
    )


FAMILIES = {"llama": llama, "gemma2": gemma2, "gpt_neox": gpt_neox, "opt": opt, "phi": phi}


def build(config, seed=0):
    """A model whose layers matter: weights of unit gain, random norms and biases."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write_model(folder, config, seed=0, dtype=torch.bfloat16, **settings):
    """Writes a random model to `folder`; returns the folder."""
    folder = Path(folder)
    build(config, seed).to(dtype).save_pretrained(folder, **settings)
    return folder


def write_tokenizer(folder):
    """A byte tokenizer whose ids are below the vocabulary's size for ASCII text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {"<unk>": 0} | {character: index + 1 for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder)


def token_ids(count, seed=1):
    """Ids that repeat often, so that Hessians are far from the identity."""
    generator = np.random.default_rng(seed)
    return generator.zipf(1.3, count).clip(1, VOCABULARY) - 1


def edit_json(path, change):
    """Applies `change` to the JSON object in a file."""
    value = json.loads(Path(path).read_text())
    change(value)
    Path(path).write_text(json.dumps(value))
