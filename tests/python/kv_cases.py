"""What the tests of caches share: a model's config, prompts, ways to feed them."""

import pytest

torch = pytest.importorskip("torch")

import model_factory


def config(positions=256, head_dim=16):
    made = model_factory.llama()
    made.max_position_embeddings = positions
    made.head_dim = head_dim
    return made


def prompt(length, rows=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model_factory.VOCABULARY, (rows, length), generator=generator)


def generate(model, ids, cache, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)


def logits_by_token(model, ids, cache):
    """Teacher forced, one token at a time."""
    with torch.no_grad():
        steps = [
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ]
    return torch.cat(steps, dim=1)
