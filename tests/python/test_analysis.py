"""Laws, their samples and the formats that suit them."""

import math

import pytest

torch = pytest.importorskip("torch")
from quantloom import analysis as A
from quantloom import formats as Q

LAWS = [A.Normal(), A.Laplace(), A.StudentT(7), A.Normal(2.5), A.StudentT(5, 0.1)]


def deviation(law):
    if isinstance(law, A.StudentT):
        return law.scale * math.sqrt(law.df / (law.df - 2))
    return law.scale * (math.sqrt(2) if isinstance(law, A.Laplace) else 1)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_samples(law):
    state = torch.random.get_rng_state()
    x = law.sample(1 << 18, seed=3)
    assert torch.random.get_rng_state().equal(state), "the global state stays"
    assert x.equal(law.sample(1 << 18, seed=3))
    assert not x.equal(law.sample(1 << 18, seed=4))
    assert (x.dtype, x.shape) == (torch.float32, (1 << 18,))
    assert float(A.rms(x)) == pytest.approx(deviation(law), rel=0.03)
    assert abs(float(x.mean())) < 0.02 * deviation(law)
    assert law.sample(0, seed=1).shape == (0,)


def test_rms():
    assert A.rms(torch.tensor([3.0, 4.0], dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert float(A.rms(torch.full((1 << 16,), 300.0).half())) == 300, "squares do not overflow"


@pytest.mark.parametrize(
    ("law", "expected"), [(A.Normal(), 0.0975), (A.Laplace(), 0.1241), (A.StudentT(7), 0.1248)]
)
def test_quantiser_errs_as_published(law, expected):
    x = law.sample(1 << 20, seed=11)
    fmt = Q.ScaledFormat.create(law.quantiser(4), float(A.rms(x)))
    assert float(Q.qrmse_norm(fmt, x)) == pytest.approx(expected, abs=0.002)


def test_quantiser_takes_the_laws_table():
    assert A.Normal().quantiser(4) == Q.crd_normal(4)
    assert A.Laplace(3.0).quantiser(3, mode="asymmetric") == Q.crd_laplace(3, mode="asymmetric")
    assert A.StudentT(5).quantiser(3, power=0.5) == Q.crd_t(3, 5, power=0.5)
    block = A.StudentT(7).quantiser(4, "signmax", 64, "asymmetric")
    assert block == Q.crd_block_t(4, 64, 7, scaling="signmax", mode="asymmetric")
    for arguments in (("rms", 64), ("absmax", None)):
        with pytest.raises(ValueError, match="block_size"):
            A.Normal().quantiser(4, *arguments)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("law", [A.Normal(), A.Laplace()], ids=str)
def test_compressed_quantiser_meets_its_bits(law, bits):
    x, train = law.sample(1 << 16, seed=1), law.sample(1 << 16, seed=2)
    fmt = law.find_compressed_quantiser(bits, x, train)
    counted = fmt.count_bits_tensor(x) / x.numel()
    assert counted == pytest.approx(bits, abs=0.15), "a grid of two points more or less is not nearer"
    # The error is near the high-rate limit of entropy coding, far below any table's.
    limit = {A.Normal: 1.193, A.Laplace: 1.110}[type(law)]
    assert float(Q.qrmse_norm(fmt, x)) * 2**counted == pytest.approx(limit, rel=0.06)
    assert Q.qrmse_norm(fmt, x) * 2**counted < Q.qrmse_norm(law.quantiser(bits), x) * 2**bits


def test_compressed_quantiser_of_blocks():
    law = A.Normal()
    x = law.sample(1 << 16, seed=1).view(-1, 64)
    blocks = x / x.abs().amax(1, keepdim=True)
    fmt = law.find_compressed_quantiser(3, blocks, blocks, "absmax", 64, power=0.5)
    assert fmt.count_bits_tensor(blocks) / blocks.numel() == pytest.approx(3, abs=0.2)
    with pytest.raises(ValueError, match="bits"):
        law.find_compressed_quantiser(0, x, x)
