"""Chains at several step sizes: the bias that they tell, against exact laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcsgmcmc as fs
from funcsgmcmc.estimates.bias import extrapolated_bias
from funcsgmcmc.estimates.ladder import rungs_of, temperatures_of
from linear import GAMMA, NBETA, loss, regression, sampled

PULL = {"nbeta": NBETA, "localization": GAMMA}


def test_chains_take_the_sizes_in_turn():
    sizes = fs.step_ladder(0.4, 5)
    assert sizes.tolist() == [0.4, 0.2, 0.4, 0.2, 0.4]
    assert fs.step_ladder(0.9, 6, ratio=3.0, num_sizes=3).tolist() == pytest.approx(
        [0.9, 0.3, 0.1] * 2
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0, got 0"),
        ({"num_chains": 3}, "num_chains must be >= 4, got 3"),
        ({"ratio": 1.0}, "ratio must be > 1, .* got 1.0 with 2 sizes"),
        ({"ratio": 4.0, "num_sizes": 3, "num_chains": 6}, "at most 10, got 4.0 with 3 sizes"),
        ({"num_sizes": 1}, "num_sizes must be >= 2, got 1"),
    ],
)
def test_bad_ladders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fs.step_ladder(**({"lr": 0.1, "num_chains": 8} | arguments))


@given(
    limit=st.floats(-10, 10),
    factor=st.floats(-10, 10),
    order=st.sampled_from([1, 2]),
    ratio=st.floats(1.2, 4),
    number=st.integers(2, 4),
)
def test_a_power_law_is_extrapolated_exactly(limit, factor, order, ratio, number):
    sizes = 0.3 / ratio ** torch.arange(number)
    errors = torch.linspace(0.1, 0.2, number)
    found = extrapolated_bias(sizes, limit + factor * sizes**order, errors, order)
    assert found.value == pytest.approx(factor * float(sizes[-1]) ** order, abs=1e-9)
    alike = extrapolated_bias(sizes, limit + factor * sizes**order, 0 * errors, order)
    assert alike.value == pytest.approx(found.value, abs=1e-9)
    assert alike.error == 0.0


def test_the_error_of_a_bias_is_its_spread():
    generator = torch.Generator().manual_seed(0)
    sizes, errors = torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.2])
    found = [
        extrapolated_bias(sizes, errors * torch.randn(3, generator=generator), errors, 2)
        for _ in range(4000)
    ]
    spread = torch.tensor([each.value for each in found]).std()
    assert found[0].error == pytest.approx(float(spread), rel=0.05)


def test_the_bias_of_sgld_is_that_of_its_law():
    """λ̂(ε) = ½ Σ nβhᵢ/(Λᵢ (1 − εΛᵢ/4)): within three errors, and what is beyond first order."""
    problem = regression()
    inputs, _ = problem.data
    curvature = NBETA * torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    precision = curvature + GAMMA

    def law(lr: float) -> float:
        return float((curvature / precision / (1 - lr * precision / 4)).sum() / 2)

    lr = 2e-3
    sampler = fs.sgld(fs.step_ladder(2 * lr, 256), **PULL)
    estimate = fs.llc(sampled(problem, sampler, num_chains=256, num_draws=400))
    assert abs(estimate.mean - law(lr)) < 4 * estimate.mcse
    linear = law(2 * lr) - law(lr)  # what two exact means would tell
    spread = math.sqrt(2) * estimate.mcse
    assert abs(estimate.bias - linear) < 4 * spread
    # The test sees a factor of two: a power of 2 in place of 1 would tell a third.
    assert linear > 8 * spread
    assert estimate.num_chains == 128
    assert estimate.per_chain.isfinite().all()


SAMPLERS = {
    "sgld": lambda lr: fs.sgld(lr, **PULL),
    "rmsprop_sgld": lambda lr: fs.rmsprop_sgld(lr / 4, **PULL),
    "sghmc": lambda lr: fs.sghmc(lr / 4, friction=0.5, **PULL),
    "baoa": lambda lr: fs.baoa((lr / 2) ** 0.5, **PULL),
    "badoda": lambda lr: fs.badoda((lr / 2) ** 0.5, diffusion_factor=30.0, **PULL),
}


@pytest.mark.parametrize("batch_size", [None, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_total_error_covers_the_truth(name, batch_size):
    """Also for samplers whose law says nothing of the bias, which is NaN without a ladder."""
    problem = regression()
    sampler = SAMPLERS[name](fs.step_ladder(2e-3, 32))
    estimate = fs.llc(sampled(problem, sampler, batch_size=batch_size))
    assert abs(estimate.mean - problem.truth) < 2 * estimate.error
    assert estimate.bias == estimate.bias


class TestRungs:
    def rungs(self, sampler, **settings):
        options = {"num_chains": 8, "num_draws": 5, "num_burnin_steps": 2} | settings
        return [rows.nonzero().flatten().tolist() for rows in rungs_of(self.run(sampler, options))]

    def run(self, sampler, options):
        return sampled(regression(), sampler, **options)

    def test_chains_that_differ_in_the_step_size(self):
        sizes = fs.step_ladder(1e-3, 8)
        assert self.rungs(fs.sgld(sizes, **PULL)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
        assert self.rungs(fs.baoa(sizes, **PULL)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
        assert self.rungs(fs.baoa(sizes, friction=10.0, **PULL)) == [[0, 2, 4, 6], [1, 3, 5, 7]]

    def test_other_runs_are_one(self):
        sizes = fs.step_ladder(1e-3, 8)
        for sampler in (
            fs.sgld(1e-3, **PULL),
            fs.sgld(sizes, nbeta=torch.linspace(10, 20, 8), localization=1.0),
            fs.baoa(sizes, friction=torch.linspace(10, 20, 8), **PULL),
            fs.sgld(torch.logspace(-5, -3, 8), **PULL),
            fs.sgld(fs.schedules.constant(sizes), **PULL),
        ):
            assert self.rungs(sampler) == [list(range(8))]

    def test_a_step_size_without_healthy_chains_is_left_out(self):
        sizes = torch.tensor([0.06, 0.012, 0.006] * 2)
        samples = sampled(regression(), fs.sgld(sizes, **PULL), num_chains=6, num_draws=30)
        assert [rows.nonzero().flatten().tolist() for rows in rungs_of(samples)] == [[1, 4], [2, 5]]
        estimate = fs.llc(samples)
        assert (estimate.num_chains, estimate.num_frozen) == (2, 2)
        assert estimate.per_chain.isnan().tolist() == [True, False, False] * 2

    def test_a_search_over_step_sizes_is_still_refused(self):
        with pytest.raises(ValueError, match="chains must have the same settings"):
            fs.llc(sampled(regression(), fs.sgld(torch.logspace(-5, -3, 4), **PULL), num_chains=4))


class TestTemperatures:
    """Chains at several nβ: how far an estimate is from its limit of large nβ."""

    def test_the_slope_is_that_of_the_law(self):
        """λ(nβ) = ½ Σ nβhᵢ/(nβhᵢ + γ), with a pull that flattens much of the loss."""
        problem, gamma = regression(), 100.0
        inputs, _ = problem.data
        curvature = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))

        def law(nbeta: float) -> float:
            return float((nbeta * curvature / (nbeta * curvature + gamma)).sum() / 2)

        values = torch.tensor([NBETA, NBETA / 4] * 64, dtype=torch.float64)
        sampler = fs.baoa(0.03, nbeta=values, localization=gamma)
        estimate = fs.llc(sampled(problem, sampler, num_chains=128, num_draws=80))
        slope = (law(NBETA) - law(NBETA / 4)) / math.log(4)
        assert abs(estimate.mean - law(NBETA)) < 4 * estimate.mcse
        assert abs(estimate.slope - slope) < 4 * estimate.slope_error < slope / 5
        (warning,) = estimate.warnings
        assert "as nβ grows by a factor e, so that it is no limit of large nβ" in warning
        assert f"{estimate.slope:+.2g} ± {estimate.slope_error:.2g} as nβ grows" in str(estimate)
        assert estimate.num_chains == 64
        alone = [
            float(estimate.per_chain[rows].mean())
            for rows in (slice(0, None, 2), slice(1, None, 2))
        ]
        assert estimate.slope == pytest.approx((alone[0] - alone[1]) / math.log(4))

    def test_of_a_regular_loss_it_is_chance(self):
        values = torch.tensor([NBETA, NBETA / 4] * 16, dtype=torch.float64)
        estimate = fs.llc(sampled(regression(), fs.baoa(0.03, nbeta=values, localization=1e-3)))
        assert estimate.warnings == []
        assert abs(estimate.slope) < 3 * estimate.slope_error

    def test_other_runs_have_none(self):
        for sampler in (
            fs.sgld(1e-3, **PULL),
            fs.sgld(fs.step_ladder(1e-3, 8), **PULL),
            fs.sgld(fs.step_ladder(1e-3, 8), nbeta=torch.linspace(10, 20, 8)),
            fs.sgld(1e-3, nbeta=fs.schedules.constant(torch.linspace(10, 20, 8))),
            fs.sgld(1e-3, nbeta=torch.linspace(0, 20, 8)),
            fs.sgld(1e-3, nbeta=torch.logspace(0, 2, 8)),
        ):
            samples = sampled(regression(), sampler, num_chains=8, num_draws=5)
            assert len(temperatures_of(samples)) == 1
        alone = sampled(regression(), fs.sgld(1e-3, **PULL), num_chains=4, num_draws=5)
        assert math.isnan(fs.llc(alone).slope)

    def test_a_search_over_nbeta_is_still_refused(self):
        samples = sampled(regression(), fs.sgld(1e-3, nbeta=torch.logspace(0, 2, 8)), num_chains=8)
        with pytest.raises(ValueError, match="chains must have the same settings"):
            fs.llc(samples)

    def test_frozen_chains_are_left_out(self):
        values = torch.tensor([NBETA / 2, NBETA, 5 * NBETA] * 4, dtype=torch.float64)
        sampler = fs.sgld(1e-2, nbeta=values, localization=GAMMA)
        estimate = fs.llc(sampled(regression(), sampler, num_chains=12, num_draws=40))
        assert (estimate.num_chains, estimate.num_frozen) == (4, 4)
        assert estimate.warnings[0].startswith("4 of 12 chains diverged and are left out")
        assert estimate.per_chain.isnan().tolist() == [False, False, True] * 4


def test_the_order_of_a_sampler():
    """With gradient noise, a fixed friction leaves BAOA a bias of first order."""
    sizes = fs.step_ladder(1e-2, 4)
    orders = {
        "sgld": (fs.sgld(sizes, **PULL), 1, 1),
        "baoa": (fs.baoa(sizes, **PULL), 2, 2),
        "baoa, one friction": (fs.baoa(sizes, friction=10.0, **PULL), 2, 1),
        "badoda": (fs.badoda(sizes, diffusion_factor=10.0, **PULL), 2, 1),
    }
    for sampler, exact, noisy in orders.values():
        assert sampler.step_order(is_noisy=False) == exact
        assert sampler.step_order(is_noisy=True) == noisy


def test_initial_losses_of_chains_go_with_their_rungs():
    problem = regression()
    sampler = fs.baoa(fs.step_ladder(0.02, 8), **PULL)
    samples = sampled(problem, sampler, num_chains=8, num_draws=20)
    lowest = float(loss(problem.start, problem.data))
    one = fs.llc(samples, lowest)
    own = fs.llc(samples, torch.full((8,), lowest))
    torch.testing.assert_close(one.per_chain, own.per_chain)
    assert one.bias == own.bias
