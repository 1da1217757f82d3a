"""Tables of cube-root density: golden values, names, and their place next to Lloyd-Max."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")

import quantloom.formats as Q

# The positive half of symmetric tables; all values of the others.
GOLDEN = [
    (Q.crd_normal, (3,), {}, [0.241985, 0.746042, 1.324516, 2.114211]),
    (
        Q.crd_normal,
        (3, "asymmetric"),
        {},
        [-1.992464, -1.168251, -0.551900, 0, 0.438810, 0.908288, 1.457731, 2.219712],
    ),
    (
        Q.crd_normal,
        (4,),
        {},
        [0.127810, 0.386261, 0.653662, 0.937724, 1.249713, 1.608901, 2.055652, 2.710186],
    ),
    (
        Q.crd_laplace,
        (4,),
        {},
        [0.128604, 0.411867, 0.738870, 1.125633, 1.598991, 2.209257, 3.069379, 4.539766],
    ),
    (Q.crd_t, (4, 7), {}, [0.147636, 0.449925, 0.774943, 1.144421, 1.594679, 2.199145, 3.148109, 5.219262]),
    (Q.crd_t, (3, 5), {}, [0.305407, 1.0, 2.064178, 4.758770]),
    (
        Q.crd_block_normal,
        (4, 64),
        {},
        [0.049770, 0.150316, 0.254029, 0.363575, 0.482726, 0.617614, 0.780080, 1],
    ),
    (
        Q.crd_block_laplace,
        (4, 64),
        {},
        [0.034439, 0.109500, 0.194667, 0.293091, 0.409672, 0.552661, 0.737635, 1],
    ),
    (
        Q.crd_block_t,
        (4, 64, 7),
        {},
        [0.041608, 0.126254, 0.215433, 0.313079, 0.424922, 0.560488, 0.738049, 1],
    ),
    (
        Q.crd_block_normal,
        (3, 64, "signmax", "asymmetric"),
        {},
        [-0.636064, -0.392278, -0.188710, 0, 0.188710, 0.392278, 0.636064, 1],
    ),
]


@pytest.mark.parametrize("make, args, options, expected", GOLDEN)
def test_golden_tables(make, args, options, expected):
    values = make(*args, **options).values
    if len(values) == 2 * len(expected):
        expected = [-v for v in reversed(expected)] + expected
    assert values == pytest.approx(expected, abs=1.01e-6)


def test_names():
    assert str(Q.crd_block_t(4, 64, 7)) == "LUT4[CRD-T[7]-AS]"
    assert str(Q.crd_normal(3)) == "LUT3[CRD-N-RS]"
    assert str(Q.crd_laplace(3, "repeat_zero")) == "LUT3[CRD-L-RZ]"
    assert str(Q.crd_block_normal(3, 64, "signmax", "asymmetric")) == "LUT3[CRD-N-SA]"
    assert str(Q.crd_normal(3, power=1 / 2)) == "LUT3[CRD{1/2}-N-RS]"
    assert str(Q.crd_normal(3, power=1)) == "LUT3[CRD{1}-N-RS]"


def test_the_power_one_is_the_quantile_table():
    p = torch.linspace(0, 1, 10, dtype=torch.float64)[1:-1]
    expected = torch.distributions.Normal(0, 1).icdf(p)
    assert Q.crd_normal(3, power=1).values == pytest.approx(expected.tolist(), abs=1e-5)
    assert Q.crd_block_normal(2, 64, power=0).values == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert Q.crd_block_t(2, 64, 5, power=0).values == Q.crd_block_laplace(2, 64, power=0).values


def test_sizes_and_ends():
    assert len(Q.crd_normal(2.585).values) == 6
    assert len(Q.crd_normal(2.81, "asymmetric").values) == 6  # 7 is odd: two halves of 3
    zeros = Q.crd_normal(3, "repeat_zero").values
    assert zeros.count(0.0) == 2 and len(zeros) == 8
    for mode in ("symmetric", "repeat_zero", "asymmetric"):
        values = Q.crd_block_normal(4, 128, mode=mode).values
        assert values[0] == -1 and values[-1] == 1
        assert 0.0 in values or mode == "symmetric"


def test_what_is_refused():
    with pytest.raises(KeyError):
        Q.crd_block_normal(3, 64, "signmax")
    with pytest.raises(ValueError, match="power"):
        Q.crd_normal(3, power=0)
    with pytest.raises(ValueError, match="mode"):
        Q.crd_normal(3, "upside down")
    with pytest.raises(ValueError, match="scaling"):
        Q.crd_block_normal(3, 64, "rms")
    with pytest.raises(ValueError, match="df"):
        Q.crd_t(3, 2)


LAWS = {
    "normal": (torch.distributions.Normal(0, 1), 1.0, Q.crd_normal(3)),
    "laplace": (torch.distributions.Laplace(0, 1), 2**-0.5, Q.crd_laplace(3)),
    "t": (torch.distributions.StudentT(9), (7 / 9) ** 0.5, Q.crd_t(3, 9)),
}
# What the three tables err on each law, and Lloyd-Max, for the whole population.
ERRORS = {"normal": (0.186, 0.218, 0.206), "laplace": (0.273, 0.234, 0.236), "t": (0.226, 0.224, 0.217)}
LLOYD_MAX = {"normal": 0.186, "laplace": 0.233, "t": 0.215}


@pytest.mark.parametrize("law", LAWS)
def test_each_law_has_its_table(law):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        x = LAWS[law][0].sample((2**18,)) * LAWS[law][1]
    errors = [float(Q.qrmse_norm(table, x)) for _, _, table in LAWS.values()]
    assert errors == pytest.approx(ERRORS[law], abs=0.003)
    assert int(torch.tensor(errors).argmin()) == list(LAWS).index(law)
    fitted = float(Q.qrmse_norm(Q.lut_lloyd_max(x, 3, 1e-4), x))
    assert fitted == pytest.approx(LLOYD_MAX[law], abs=0.003) and fitted <= min(errors)
