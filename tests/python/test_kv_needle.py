"""Hidden passages: ql.kv.needle."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import numpy as np
import quantloom as ql

VOCABULARY = 4000


class Copier(torch.nn.Module):
    """Predicts what followed the last four tokens when they came before, at most `reach` tokens ago."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache=None):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for s, row in enumerate(input_ids.tolist()):
            for t in range(4, len(row)):
                for before in range(t - 1, max(3, t - self.reach), -1):
                    if row[before - 3 : before + 1] == row[t - 3 : t + 1]:
                        logits[s, t, row[before + 1]] = 100
                        break
        return SimpleNamespace(logits=logits)


def text():
    return np.random.default_rng(1).integers(1, VOCABULARY, 2000)


def test_a_model_that_copies_finds_everything_and_one_that_forgets_only_what_is_near():
    settings = {"context": 120, "count": 5, "cue": 6, "length": 5, "depths": (0.0, 0.3, 0.9)}
    result = ql.kv.needle(Copier(200), text(), **settings)
    assert result.recall == 1
    assert result.baseline == 0
    assert result.tokens == 5 * 5 * 3
    assert result.log_probability > -1e-6
    assert result.baseline_log_probability == pytest.approx(-np.log(VOCABULARY))
    result = ql.kv.needle(Copier(60), text(), **settings)
    assert result.by_depth == {0.0: 0, 0.3: 0, 0.9: 1}
    assert result.recall == pytest.approx(1 / 3)


def test_the_same_seed_hides_the_same_passages():
    seen = []

    class Recorder(Copier):
        def forward(self, input_ids, use_cache=None):
            seen.append(input_ids)
            return super().forward(input_ids)

    for seed, batch in ((0, 3), (0, 8), (1, 8)):
        ql.kv.needle(Recorder(9), text(), context=50, count=3, cue=4, length=4, seed=seed, batch=batch)
    seen = [torch.cat(seen[a:b]) for a, b in ((0, 4), (4, 6), (6, 8))]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    for row, other in zip(seen[0][:6], seen[0][6:]):
        cue = row[-8:]
        assert torch.equal(cue, other[-8:])
        places = [t for t in range(42) if torch.equal(row[t : t + 8], cue)]
        assert len(places) == 1
        assert not any(torch.equal(other[t : t + 8], cue) for t in range(42))


def test_bad_input_is_refused_by_name():
    model = Copier(9)
    with pytest.raises(ValueError, match="ids"):
        ql.kv.needle(model, text()[:1000])
    with pytest.raises(ValueError, match="context"):
        ql.kv.needle(model, text(), context=64)
    with pytest.raises(ValueError, match="depths"):
        ql.kv.needle(model, text(), context=100, depths=(1.0,))
    with pytest.raises(ValueError, match="depths"):
        ql.kv.needle(model, text(), context=100, depths=(0.5, 0.5))
    with pytest.raises(TypeError, match="depths"):
        ql.kv.needle(model, text(), context=100, depths=0.5)
    with pytest.raises(TypeError, match="model"):
        ql.kv.needle("model", text(), context=100)
    model.config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=99)
    with pytest.raises(ValueError, match="context: got 100, but the model has 99 positions"):
        ql.kv.needle(model, text(), context=100)
    with pytest.raises(ValueError, match="ids: span"):
        ql.kv.needle(model, text() + VOCABULARY, context=99)
    with pytest.raises(ValueError, match="count"):
        ql.kv.needle(model, text(), context=100, count=0)
