"""Statistics of weights, against formulas and known laws."""

import math

import pytest

torch = pytest.importorskip("torch")
from quantloom.experiments import weight_stats as W
from torch import nn


def test_tensor_stats_by_hand():
    w = torch.tensor([[3.0, -4.0], [0.0, 5.0]], dtype=torch.bfloat16)
    stats = W.tensor_stats(w)
    rms = math.sqrt(50 / 4)
    assert stats["shape"] == [2, 2]
    assert stats["mean"] == 1.0
    assert stats["std"] == pytest.approx(math.sqrt(50 / 4 - 1))
    assert stats["rm2"] == pytest.approx(rms)
    assert stats["rm4"] == pytest.approx(((81 + 256 + 625) / 4) ** 0.25)
    assert stats["max"] == 5.0
    assert stats["block_max"] == [3.0, 4.5, 5.0]
    assert sum(stats["hist"]) == pytest.approx(1)
    assert stats["hist"][:2] == [0.5, 0.5]  # 3 and 0 are below the RMS of 3.54, 4 and 5 are between 1 and 2
    rows, columns = stats["channel_hist"]
    assert rows[:2] == [0.5, 0.5]
    assert columns[:2] == [0.5, 0.5]


def test_odd_sizes_and_zeros():
    for size in (1, 2, 3, 7, 129):
        stats = W.tensor_stats(torch.ones(size))
        assert len(stats["block_max"]) == size.bit_length()
        assert stats["hist"][0] == 1
    zeros = W.tensor_stats(torch.zeros(5, 3))
    assert zeros["fit"] == {}
    assert zeros["rm4"] == 0
    with pytest.raises(ValueError, match="expected at least one element"):
        W.tensor_stats(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="expected one"):
        W.studentt_fit(torch.zeros(4))


@pytest.mark.parametrize(("df", "scale"), [(1.0, 2.0), (3.5, 0.01), (7.0, 1.0), (30.0, 100.0)])
def test_student_t_is_found(df, scale):
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(1 << 17, generator=generator, dtype=torch.float64)
    # Quantiles of chi-square by the gamma sampler, seeded apart from the global generator.
    with torch.random.fork_rng():
        torch.manual_seed(6)
        chi = torch.distributions.Chi2(torch.tensor(df, dtype=torch.float64)).sample((1 << 17,))
    t = scale * normal / (chi / df).sqrt()
    found_df, found_scale = W.studentt_fit(t)
    assert found_df == pytest.approx(df, rel=0.05 if df < 10 else 0.2)
    assert found_scale == pytest.approx(scale, rel=0.02)

    fits = W.dist_fit_stats(t)
    assert fits["StudentT"]["log_likelihood"] >= max(
        fits["Normal"]["log_likelihood"], fits["Laplace"]["log_likelihood"]
    )
    law = torch.distributions.StudentT(found_df, 0.0, found_scale)
    assert fits["StudentT"]["log_likelihood"] == pytest.approx(float(law.log_prob(t).mean()), rel=1e-5)
    # No scale or degrees of freedom nearby are more likely.
    for other_df, other_scale in ((1.2, 1), (1 / 1.2, 1), (1, 1.05), (1, 1 / 1.05)):
        other = torch.distributions.StudentT(found_df * other_df, 0.0, found_scale * other_scale)
        assert float(other.log_prob(t).mean()) < fits["StudentT"]["log_likelihood"] + 1e-9


def test_laplace_and_normal_are_recognised():
    generator = torch.Generator().manual_seed(7)
    normal = 3 * torch.randn(1 << 16, generator=generator)
    fits = W.dist_fit_stats(normal)
    assert fits["Normal"]["log_likelihood"] > fits["Laplace"]["log_likelihood"]
    assert fits["Normal"]["scale"] == pytest.approx(3, rel=0.02)
    assert fits["StudentT"]["df"] > 50
    law = torch.distributions.Normal(0.0, fits["Normal"]["scale"])
    assert fits["Normal"]["log_likelihood"] == pytest.approx(float(law.log_prob(normal).mean()), rel=1e-5)

    uniform = torch.rand(1 << 16, generator=generator) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    fits = W.dist_fit_stats(laplace)
    assert fits["Laplace"]["log_likelihood"] > fits["Normal"]["log_likelihood"]
    law = torch.distributions.Laplace(0.0, fits["Laplace"]["scale"])
    assert fits["Laplace"]["log_likelihood"] == pytest.approx(float(law.log_prob(laplace).mean()), rel=1e-5)


def test_extreme_values():
    for scale in (1e-30, 1e30):
        fit = W.tensor_stats(scale * torch.randn(1000, generator=torch.Generator().manual_seed(1)))["fit"]
        assert fit["StudentT"]["scale"] == pytest.approx(scale, rel=0.2)


def test_model_stats():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 2))
    model.vision_model = nn.Linear(2, 2)
    assert sorted(W.model_stats(model)) == ["0.weight", "2.weight"]
    assert "vision_model.weight" in W.model_stats(model, ignore=())
