"""Targets with many modes: what is made for them finds the modes, and plain SGLD does not."""

import pytest
import torch

import funcsgmcmc as fs

# 25 Gaussians on a grid, as in Zhang et al. 2020, section 5.1.
GRID = torch.arange(-4.0, 5.0, 2.0).double()
MODES = torch.cartesian_prod(GRID, GRID)


def many_modes(params, batch):
    squares = ((params["w"] - MODES) ** 2).sum(1)
    return -torch.logsumexp(-squares / (2 * 0.03), 0)


def modes_visited(draws: torch.Tensor) -> list[int]:
    """How many modes each chain's draws `[C, D, 2]` come within three standard deviations of."""
    distance, mode = (draws[:, :, None] - MODES).norm(dim=-1).min(-1)
    near = distance < 3 * 0.03**0.5
    return [len(mode[chain][near[chain]].unique()) for chain in range(len(draws))]


def run(sampler, num_chains, num_draws):
    return fs.sample(
        many_modes,
        {"w": torch.zeros(2)},
        torch.zeros(1),
        sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_steps_between_draws=10,
        key=fs.key(0),
        record=["draws"],
        compile=True,
        initial_loss=0.0,
    )


@pytest.mark.slow
def test_cyclical_sgld_visits_25_modes_where_sgld_stays_in_one():
    """The paper's budget and settings: 50,000 steps, 30 cycles, their step size 0.09 = ε/2."""
    length = 50_000 // 30
    sampler = fs.cyclical_sgld(0.18, nbeta=1.0, num_steps_per_cycle=length, exploration=0.25)
    cyclical = run(sampler, 16, 3_700)
    assert cyclical.num_steps <= 50_000
    # Nine chains in ten visit all; which ones is chaotic, down to the rounding of a logarithm.
    visited = modes_visited(cyclical.draws["w"])
    assert min(visited) >= 23
    assert sum(visited) / len(visited) > 24.5
    # Draws are made in sampling phases only.
    assert ((cyclical.draw_steps - 1) % length / length >= 0.25).all()
    # Once steps are small, draws have the spread that SGLD's law gives to a mode.
    led_by = cyclical.draw_steps - 1
    late = led_by % length / length > 0.6
    away = (cyclical.draws["w"][:, late][:, :, None] - MODES).norm(dim=-1).min(-1).values
    expected = (0.06 / (1 - sampler.lr(led_by[late]) / 0.03 / 4)).mean()
    assert abs(away.square().mean() / expected - 1) < 0.1

    plain = run(fs.sgld(fs.schedules.polynomial_decay(0.1, power=0.55), nbeta=1.0), 4, 5_000)
    assert plain.num_steps == 50_000
    assert max(modes_visited(plain.draws["w"])) == 1


# Two Gaussians, as in Deng et al. 2020, section 4.1: 0.4 N(−6, 1) + 0.6 N(4, 1).
WEIGHTS, MEANS = torch.tensor([0.4, 0.6]).double(), torch.tensor([-6.0, 4.0]).double()


def two_modes(params, batch):
    return -torch.logsumexp(WEIGHTS.log() - (params["w"] - MEANS) ** 2 / 2, 0)


@pytest.mark.slow
def test_contour_sgld_crosses_a_barrier_and_its_weighted_moments_are_right():
    def run(sampler, num_chains, num_draws):
        return fs.sample(
            two_modes,
            {"w": torch.tensor(4.0)},
            torch.zeros(1),
            sampler,
            num_chains=num_chains,
            num_draws=num_draws,
            num_burnin_steps=num_draws // 2,
            key=fs.key(0),
            observables={"x": lambda params: params["w"]},
            compile=True,
            initial_loss=0.0,
        )

    plain = run(fs.sgld(0.1, nbeta=1.0), 100, 5_000)
    assert plain.observables["x"].min() > -2
    contour = fs.contour_sgld(
        0.1, nbeta=1.0, energy_range=(1.5, 13.5), num_partitions=15, flatness=0.75
    )
    samples = run(contour, 200, 40_000)
    x = samples.observables["x"]
    assert ((x < -4).any(1) & (x > 2).any(1)).all()
    # Flattened: between the modes, where the posterior has 5e-6 of its mass, it is often.
    assert ((x - -1.0).abs() < 1).double().mean() > 0.01
    for values, truth in ((x, 0.0), (x**2, 25.0), (x**3, -48.0), ((x < -1).double(), 0.4)):
        estimate = fs.weighted_mean(values, samples.log_weights)
        assert abs(estimate.mean - truth) < 4 * estimate.mcse
    assert fs.weighted_mean((x < -1).double(), samples.log_weights).mcse < 0.02
    with pytest.raises(ValueError, match=r"the draws have weights .* use weighted_mean"):
        fs.llc(samples)
    with pytest.raises(ValueError, match="the draws have weights"):
        fs.summary(samples)
