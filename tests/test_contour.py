"""Contour SGLD on a double well, where every average is known by quadrature.

L = w⁴/4 − w²/2 + 0.15 w, at nβ = 2, T = 0.7, with a pull to 0.3: two wells of unequal depth.
"""

import math

import pytest
import torch
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc.samplers import Evaluation

NBETA, TEMPERATURE, GAMMA, ANCHOR, DECAY = 2.0, 0.7, 0.2, 0.3, 0.1
ENERGIES, PARTS = (0.3, 3.0), 12


def loss(w: torch.Tensor) -> torch.Tensor:
    return w**4 / 4 - w**2 / 2 + 0.15 * w


def energy(w: torch.Tensor) -> torch.Tensor:
    return NBETA * loss(w) + GAMMA / 2 * (w - ANCHOR) ** 2 + DECAY / 2 * w**2


def posterior(w: torch.Tensor) -> torch.Tensor:
    """Probabilities on an even grid."""
    return torch.softmax(-energy(w) / TEMPERATURE, 0)


def sampler(lr: float, **settings) -> fs.samplers.Sampler:
    return fs.contour_sgld(
        lr,
        nbeta=NBETA,
        temperature=TEMPERATURE,
        localization=GAMMA,
        weight_decay=DECAY,
        anchor={"w": torch.tensor(ANCHOR)},
        energy_range=ENERGIES,
        num_partitions=PARTS,
        **settings,
    )


def fine_grid() -> torch.Tensor:
    return torch.linspace(-6, 6, 200_001)


def true_theta() -> torch.Tensor:
    w = fine_grid()
    borders = torch.linspace(*ENERGIES, PARTS - 1)
    part = torch.bucketize(energy(w), borders, right=True)
    return torch.zeros(PARTS).scatter_add(0, part, posterior(w))


def true_second_moment() -> float:
    w = fine_grid()
    return float((posterior(w) * w**2).sum())


def weighted_second_moment(contour: fs.samplers.Sampler) -> float:
    """E Ψ^ζ w²/E Ψ^ζ at stationarity and at the true θ, by the transition matrix of the chain."""
    lr = float(contour.lr)
    spread = math.sqrt(lr * TEMPERATURE)
    w = torch.arange(-3.0, 3.0, spread / 5)
    chains = TensorDict({"w": w}, batch_size=len(w))
    state = contour.init(chains)
    state = state.replace(theta=true_theta().expand(len(w), PARTS).clone())
    slope = w**3 - w + 0.15
    evaluation = Evaluation(TensorDict({"w": slope}, batch_size=len(w)), loss=loss(w))
    nothing = chains.apply(torch.zeros_like)
    after, _ = contour.update(state, evaluation, nothing)  # without noise: the mean of the step
    away = (w - after.params["w"][:, None]) / spread
    transition = torch.softmax(-away.square() / 2, 1)
    equations = transition.T - torch.eye(len(w))
    equations[-1] = 1.0
    stationary = torch.linalg.solve(equations, torch.eye(len(w))[-1])
    weights = stationary * contour.log_weight(after).exp()
    return float((weights * w**2).sum() / weights.sum())


@pytest.mark.parametrize(("flatness", "largest"), [(1.0, 0.006), (0.5, 0.013)])
def test_weighted_averages_are_of_weak_order_one(flatness, largest):
    """The error at the largest step is like SGLD's own, 0.008, and falls with the step."""
    truth = true_second_moment()
    steps = torch.tensor([0.0125, 0.00625, 0.003125, 0.0015625])
    errors = [
        weighted_second_moment(sampler(float(lr), weight_lr=0.0, flatness=flatness)) - truth
        for lr in (0.05, *steps)
    ]
    assert abs(errors[0]) < largest
    logs = torch.tensor(errors[1:]).abs().log()
    centered = steps.log() - steps.log().mean()
    order = float((centered * logs).sum() / (centered**2).sum())
    assert order == pytest.approx(1.0, abs=0.35)


def test_no_multiplier_leads_beyond_the_stability_of_sgld():
    """Whatever θ is, a drift is no longer than SGLD's; with a limit M, than M times that."""
    w = torch.linspace(-3, 3, 301)
    chains = TensorDict({"w": w}, batch_size=len(w))
    slope = Evaluation(TensorDict({"w": w**3 - w + 0.15}, batch_size=len(w)), loss=loss(w))
    nothing = chains.apply(torch.zeros_like)
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(len(w), PARTS, generator=generator) ** 30
    theta = theta / theta.sum(1, keepdim=True)
    plain = fs.contour_sgld(0.05, nbeta=NBETA, energy_range=ENERGIES, flatness=0.0)
    for most in (1.0, 4.0):
        contour = fs.contour_sgld(
            0.05, nbeta=NBETA, energy_range=ENERGIES, num_partitions=PARTS, max_multiplier=most
        )
        state = contour.init(chains).replace(theta=theta)
        moved = contour.update(state, slope, nothing)[0].params["w"] - w
        drift = plain.update(plain.init(chains), slope, nothing)[0].params["w"] - w
        ratio = moved / drift
        assert ratio.abs().max() <= most * (1 + 1e-12)
        assert ratio.min() < -0.99 * most  # and the limit is reached
    assert ratio.max() > 3


def test_theta_stays_a_distribution():
    """Also where parts are far wider than T, so that Ψ exceeds 1 at the end of one."""
    contour = fs.contour_sgld(
        0.05,
        nbeta=NBETA,
        temperature=0.05,
        energy_range=(4.5, 13.5),
        num_partitions=4,
        weight_lr=0.9,
    )
    w = torch.linspace(-2, 2, 50)
    chains = TensorDict({"w": w}, batch_size=50)
    slope = Evaluation(TensorDict({"w": w**3 - w + 0.15}, batch_size=50), loss=loss(w))
    state = contour.init(chains)
    state = state.replace(theta=torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(50, 4).clone())
    for _ in range(5):
        state, _ = contour.update(state, slope, chains.apply(torch.zeros_like))
        assert (state.theta >= 0).all()
        torch.testing.assert_close(state.theta.sum(1), torch.ones(50))
    assert contour.log_weight(state).max() > 0.2


def run(lr: float, **settings) -> fs.Samples:
    """300 chains, with w² as observable."""
    return fs.sample(
        lambda params, batch: loss(params["w"]) + 0 * batch.mean(),
        {"w": torch.tensor(0.4)},
        torch.zeros(1),
        sampler(lr),
        num_chains=300,
        key=fs.key(0),
        observables={"square": lambda params: params["w"] ** 2},
        **settings,
    )


@pytest.mark.slow
def test_chains_stay_where_sgld_does_and_weights_are_right():
    """At a step size where chains of the published multiplier became NaN."""
    samples = run(0.05, num_draws=3_000, num_burnin_steps=2_000)
    assert samples.healthy.all()
    estimate = fs.weighted_mean(samples.observables["square"], samples.log_weights)
    # SGLD itself is at 0.771 at this step size, where quadrature says 0.780.
    assert abs(estimate.mean - true_second_moment()) < 0.02
    assert estimate.mcse < 0.005


@pytest.mark.slow
def test_what_is_learned_of_theta_leaves_the_weights_right():
    samples = run(0.0125, num_draws=12_000, num_burnin_steps=4_000, compile=True)
    estimate = fs.weighted_mean(samples.observables["square"], samples.log_weights)
    # The scheme's own error is +0.003 here (see the order above).
    assert abs(estimate.mean - true_second_moment()) < 0.003 + 4 * estimate.mcse
    assert estimate.mcse < 0.006
    learned = samples.state.theta.mean(0)
    torch.testing.assert_close(learned, true_theta(), rtol=0.1, atol=1e-3)
