"""The laws that samplers obey exactly, as z-tests with Monte Carlo errors, and their weak orders.

The potential is U = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖², L quadratic and anisotropic, temperature not
1. Chains are independent: a z-score of an average over them has sd 1. The tests were seen
to fail with the noise scale, the temperature, the friction or a pull off by 2 %.
"""

import math

import pytest
import torch
from scipy.integrate import quad
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc.samplers import Evaluation
from funcsgmcmc.testing import SPECS, Quadratic, SamplerSpec, check_stationary
from funcsgmcmc.testing.stationary import GaussianLaw, QuadraticChains
from problems import check_means

MOMENTUM = [spec for spec in SPECS.values() if spec.has_momentum]
HESSIAN = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
MINIMUM = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
SETTINGS = {"nbeta": 1.5, "temperature": 0.6, "localization": 0.5, "weight_decay": 0.3}
ANCHOR = 0.3
CURVATURE = 1.5 * HESSIAN + 0.5 + 0.3
NUM_CHAINS = 20_000


def quadratic(noise_sd: float = 0.0, copies: int = 1) -> Quadratic:
    """The loss, or the sum of as many as there are copies."""
    return Quadratic({"w": HESSIAN.repeat(copies)}, {"w": MINIMUM.repeat(copies)}, noise_sd)


def chains_of(
    sampler: fs.samplers.Sampler,
    *,
    variance: torch.Tensor | None = None,
    noise_sd: float = 0.0,
    num_chains: int = NUM_CHAINS,
    copies: int = 1,
) -> QuadraticChains:
    """Independent chains, which start with the variance given, or that of the posterior."""
    target = quadratic(noise_sd, copies)
    law = GaussianLaw(sampler, target, None if variance is None else {"w": variance})
    return QuadraticChains(sampler, target, law, num_chains=num_chains)


def around_mean(chains: QuadraticChains) -> torch.Tensor:
    return chains.w - chains.law.mean


def momentum_of(chains: QuadraticChains) -> torch.Tensor:
    return chains.state.momentum["w"]


def make(spec: SamplerSpec, lr: float, copies: int = 1, **settings) -> fs.samplers.Sampler:
    anchor = {"w": torch.full((4 * copies,), ANCHOR)}
    own = dict(spec.settings) | SETTINGS | {"anchor": anchor} | settings
    return spec.make(lr, **own)


# Three step sizes each, for curvatures up to 7. The lattice random walk's are small: up to them, no
# drift exceeds its spacing within five standard deviations.
LAW_LRS = {
    "sgld": (0.02, 0.1, 0.3),
    "sglrw": (0.008, 0.014, 0.02),
    "sghmc": (0.02, 0.1, 0.2),
    "baoa": (0.1, 0.3, 0.6),
}


@pytest.mark.parametrize("noise_sd", [0.0, 1.5])
@pytest.mark.parametrize(("name", "lr"), [(name, lr) for name in LAW_LRS for lr in LAW_LRS[name]])
def test_stationary_law(name, lr, noise_sd):
    spec = SPECS[name]
    own = {k: v for k, v in spec.settings.items() if k in spec.ranges}
    gradient_variance = (SETTINGS["nbeta"] * noise_sd) ** 2
    variance = spec.variance(lr, CURVATURE, SETTINGS["temperature"], gradient_variance, **own)
    found = check_stationary(
        make(spec, lr),
        quadratic(noise_sd),
        variance={"w": variance},
        num_chains=8_000,
        # Eight times what the slowest entry needs to forget, at least.
        num_steps=200 if spec.has_momentum else math.ceil(8 / (lr * float(CURVATURE.min()))),
    )
    # The lattice random walk's moves are as large whatever the noise, which chooses their signs.
    if name != "sglrw" and not noise_sd:
        assert found.smallest_noise_error < 0.015


def test_posterior_of_badoda():
    """Its law is the posterior's, to second order in h."""
    sampler = fs.badoda(0.05, nbeta=1.0, diffusion_factor=1.0)
    check_stationary(sampler, num_steps=2_000)


def test_stationary_law_of_sghmc_and_baoa_with_their_momenta():
    temperature = SETTINGS["temperature"]
    lr, friction = 0.1, 0.4
    spec = SPECS["sghmc"]
    chains = chains_of(make(spec, lr, noise_estimate=0.0))
    for _ in range(150):
        chains.step()
    kinetic = 2 * lr * temperature / (2 - friction - lr * CURVATURE / 2)
    check_means(momentum_of(chains).square(), kinetic)
    check_means(around_mean(chains) * momentum_of(chains), kinetic / 2)

    spec, lr, noise_sd = SPECS["baoa"], 0.4, 1.5
    c, gradient_variance = math.exp(-2.0 * lr), (1.5 * noise_sd) ** 2
    stiff = 4 - lr**2 * CURVATURE
    variance = spec.variance(lr, CURVATURE, temperature, gradient_variance, friction=2.0)
    chains = chains_of(make(spec, lr), variance=variance, noise_sd=noise_sd)
    for _ in range(60):
        chains.step()
    kinetic = temperature + 4 * gradient_variance * lr**2 * c**2 / ((1 - c**2) * stiff)
    product = temperature + 2 * gradient_variance * lr**2 * c / ((1 - c) * stiff)
    check_means(momentum_of(chains).square(), kinetic)
    check_means(around_mean(chains) * momentum_of(chains), lr / 2 * product)


@pytest.mark.parametrize("spec", MOMENTUM, ids=str)
def test_momenta_start_and_restart_at_the_temperature(spec):
    """After a refreshed step, p' + its push by the force is a momentum of its own."""
    lr = 0.09
    sampler = make(spec, lr, refresh_interval=3)
    splits = spec.name in ("baoa", "badoda")
    expected = SETTINGS["temperature"] * (1.0 if splits else lr)
    chains = chains_of(sampler, num_chains=100_000)
    check_means(momentum_of(chains).square(), expected)
    for _ in range(5):
        chains.step()
    before, momentum = around_mean(chains), momentum_of(chains)
    chains.step()
    fresh = momentum_of(chains) if splits else momentum_of(chains) + lr * CURVATURE * before
    check_means(fresh.square(), expected)
    check_means(fresh * momentum, 0.0)
    check_means(fresh * before, 0.0)


@pytest.mark.parametrize("interval", [1, 4])
def test_refreshment_leaves_the_law_of_baoa_and_keeps_sghmc_near(interval):
    temperature = SETTINGS["temperature"]
    spec = SPECS["baoa"]
    chains = chains_of(make(spec, 0.5, friction=0.1, refresh_interval=interval))
    for _ in range(80):
        chains.step()
    check_means(around_mean(chains).square(), temperature / CURVATURE)
    check_means(momentum_of(chains).square(), temperature)

    spec = SPECS["sghmc"]
    lr, friction = 0.1, 0.1
    settings = {"friction": friction, "noise_estimate": 0.0}
    variance = sghmc_with_refreshment(lr, friction, interval, temperature)
    chains = chains_of(make(spec, lr, **settings, refresh_interval=interval), variance=variance)
    for _ in range(160):
        chains.step()
    check_means(around_mean(chains).square(), variance)


def sghmc_with_refreshment(lr, friction, interval, temperature):
    """Var w after a whole number of intervals, by iterating the moments of the linear scheme."""
    variances = []
    for curvature in CURVATURE.tolist():
        moments = torch.zeros(2, 2)
        for t in range(4000 * interval):
            fresh = (t + 1) % interval == 0
            keep = 0.0 if fresh else 1 - friction
            noise = lr * temperature * (1.0 if fresh else 2 * friction)
            move = torch.tensor([[1 - lr * curvature, keep], [-lr * curvature, keep]])
            moments = move @ moments @ move.T + noise
        variances.append(moments[0, 0])
    return torch.stack(variances)


@pytest.mark.parametrize("noise_sd", [0.0, 1.5])
@pytest.mark.parametrize("lr", [0.01, 0.03, 0.06])
def test_kinetic_and_virial_laws_of_sgnht(lr, noise_sd):
    spec = SPECS["sgnht"]
    temperature, diffusion_factor = SETTINGS["temperature"], spec.settings["diffusion_factor"]
    chains = chains_of(make(spec, lr, copies=4), noise_sd=noise_sd, num_chains=400, copies=4)
    kinetic, virial, shock, thermostat = torch.zeros(4, 400)
    burnin, steps, curvature = 300, 2000, CURVATURE.repeat(4)
    for step in range(burnin + steps):
        w, p, xi = around_mean(chains), momentum_of(chains), chains.state.thermostat
        chains.step()
        if step < burnin:
            continue
        kinetic += p.square().mean(1) / steps
        virial += (lr * curvature * w.square() - p.square() + xi[:, None] * w * p).mean(1) / steps
        # p' without friction and force is noise: the sampler's and the gradient's.
        left = momentum_of(chains) - (1 - xi[:, None]) * p + lr * curvature * w
        shock += left.square().mean(1) / steps
        thermostat += xi / steps
    check_means(kinetic, lr * temperature)
    check_means(virial, 0.0)
    check_means(
        shock, 2 * diffusion_factor * lr * temperature + (lr * SETTINGS["nbeta"] * noise_sd) ** 2
    )
    # Friction balances all noise: A without gradient noise, more with it.
    assert (float(thermostat.mean()) > 1.5 * diffusion_factor) == (noise_sd > 0)


@pytest.mark.parametrize("noise_sd", [0.0, 1.5])
@pytest.mark.parametrize("lr", [0.1, 0.25, 0.4])
def test_kinetic_and_virial_laws_of_badoda(lr, noise_sd):
    spec = SPECS["badoda"]
    temperature, mass = SETTINGS["temperature"], spec.settings["thermostat_mass"]
    chains = chains_of(make(spec, lr, copies=4), noise_sd=noise_sd, num_chains=400, copies=4)
    kinetic, virial, shock = torch.zeros(3, 400)
    burnin, steps, curvature = 300, 2000, CURVATURE.repeat(4)
    for step in range(burnin + steps):
        w, xi = around_mean(chains), chains.state.thermostat
        chains.step()
        if step < burnin:
            continue
        after = momentum_of(chains)
        halfway = around_mean(chains) - lr / 2 * after
        kicked = (halfway - w) * 2 / lr
        kinetic += (kicked.square() + after.square()).mean(1) / 2 / steps
        gap = (kicked.square() + after.square()) / 2 - (kicked - after) * halfway / lr
        virial += (gap - curvature * w.square()).mean(1) / steps
        # What p' has beyond the momentum kept is noise, of the variance that friction asks for.
        xi = xi + lr / 2 * (kicked.square().mean(1) - temperature) / mass
        variance = spec.settings["diffusion_factor"] * temperature * (1 - (-2 * xi * lr).exp()) / xi
        left = after - (-xi * lr).exp()[:, None] * kicked
        shock += left.square().mean(1) / variance / steps
    check_means(kinetic, temperature)
    check_means(virial, 0.0)
    check_means(shock, 1.0)


def adam_variance(lr, curvature, beta1):
    """Of SGLD with Adam's first moment and G = 1, T = 1."""
    a = lr * curvature / 2
    above = 1 + beta1 + 2 * a * beta1 / (1 - beta1)
    return above / (curvature * (1 + beta1 - a * (1 - beta1) / 2))


@pytest.mark.parametrize("beta1", [0.0, 0.8])
@pytest.mark.parametrize("lr", [0.05, 0.15])
def test_stationary_law_with_adam(lr, beta1):
    """With a large eps, G is 1/eps, and only the drift's average is left of Adam."""
    eps, nbeta, temperature = 1e9, SETTINGS["nbeta"], SETTINGS["temperature"]
    preconditioner = fs.preconditioners.adam(beta1, 0.9, eps)
    sampler = fs.sgld(lr * eps, nbeta=nbeta, temperature=temperature, preconditioner=preconditioner)
    curvature = nbeta * HESSIAN
    found = check_stationary(
        sampler,
        quadratic(),
        variance={"w": temperature * adam_variance(lr, curvature, beta1)},
        num_chains=8_000,
        num_steps=math.ceil(8 / (lr * float(curvature.min()))),
    )
    assert found.smallest_noise_error < 0.015


@pytest.mark.parametrize("name", ["sgld", "sglrw"])
def test_a_diagonal_preconditioner_leaves_the_law(name):
    """… but for the step size: ε G in place of ε, coordinate by coordinate."""
    spec = SPECS[name]
    gain, lr = torch.tensor([3.0, 2.0, 1.0, 0.5]).double(), 0.015
    settings = {"noise_level": 1.0} if name == "sgld" else {}
    preconditioner = fs.preconditioners.diagonal({"w": gain})
    found = check_stationary(
        make(spec, lr, preconditioner=preconditioner, **settings),
        quadratic(),
        variance={"w": spec.variance(lr * gain, CURVATURE, SETTINGS["temperature"], 0.0)},
        num_chains=8_000,
        num_steps=200,
    )
    assert found.smallest_noise_error < 0.015 or name == "sglrw"


def test_the_lattice_walk_is_exact_without_correlations_only():
    """With them the covariance solves HΣ + ΣH = 2T + (ε/2) offdiag(HΣH): 5.154, not 5.263."""
    hessian, lr, eye = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), 0.1, torch.eye(2)
    # Both sides are linear in Σ: row by row, the equation for each of its four entries.
    units = torch.eye(4).view(4, 2, 2)
    left = hessian @ units + units @ hessian - lr / 2 * (1 - eye) * (hessian @ units @ hessian)
    covariance = torch.linalg.solve(left.view(4, 4).T, 2 * eye.flatten()).view(2, 2)
    assert float(covariance[0, 0]) == pytest.approx(5.154, abs=5e-4)
    assert float(torch.linalg.inv(hessian)[0, 0]) == pytest.approx(5.263, abs=5e-4)
    sampler, generator = fs.sglrw(lr, nbeta=1.0), torch.Generator().manual_seed(0)

    def normals():
        return torch.randn(NUM_CHAINS, 2, generator=generator)

    w = normals() @ torch.linalg.cholesky(covariance).T
    state = sampler.init(TensorDict({"w": w}, NUM_CHAINS))
    squares = torch.zeros(NUM_CHAINS)
    for _ in range(1_000):
        evaluation = Evaluation(TensorDict({"w": state.params["w"] @ hessian}, NUM_CHAINS))
        state, _ = sampler.update(state, evaluation, TensorDict({"w": normals()}, NUM_CHAINS))
        squares += state.params["w"].square().mean(1) / 1_000
    check_means(squares, covariance[0, 0])
    assert squares.std() / NUM_CHAINS**0.5 < 0.025


@pytest.mark.parametrize("flatness", [0.4, 1.0])
def test_weighted_moments_of_contour_sgld_at_a_fixed_theta(flatness):
    """Whatever θ is, as long as it stays, the weights undo what it does, to the order of SGLD."""
    spec = SPECS["contour_sgld"]
    lr, temperature = 0.02, SETTINGS["temperature"]
    settings = {"flatness": flatness, "weight_lr": 0.0, "energy_range": (1.0, 9.0)}
    sampler = make(spec, lr, **settings)
    chains = chains_of(sampler)
    theta = torch.linspace(1.0, 0.2, 12) ** 2
    spread = (theta / theta.sum()).expand(NUM_CHAINS, 12).clone()
    chains.state = chains.state.replace(theta=spread)
    total, weighted = torch.zeros(NUM_CHAINS), torch.zeros(NUM_CHAINS, 4)
    for step in range(400):
        w = around_mean(chains)
        chains.step()
        if step >= 150:
            weight = sampler.log_weight(chains.state).exp()
            total += weight
            weighted += weight[:, None] * w.square()
    variance = SPECS["sgld"].variance(lr, CURVATURE, temperature, 0.0)
    # A ratio: what is averaged over chains has mean zero if the moments are right.
    check_means((weighted - variance * total[:, None]) / total.mean() / variance, 0.0)
    # Unweighted, draws have a larger variance: the density that is sampled is flatter.
    ratio = around_mean(chains).square() / variance
    with pytest.raises(AssertionError, match=r"off by \+0"):
        check_means(ratio, 1.0)


# Weak order, on a potential that is not quadratic: U = Σ w²/2 − cos(1.4 w + 1/2).


def error_of_second_moment(sampler, lr, dt, num_chains, time, seed):
    """Relative error of E w² at stationarity, and its standard error."""
    temperature = 0.8

    def weight(w):
        return math.exp((math.cos(1.4 * w + 0.5) - w * w / 2) / temperature)

    truth = quad(lambda w: w * w * weight(w), -10, 10)[0] / quad(weight, -10, 10)[0]
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return TensorDict({"w": torch.randn(num_chains, 4, generator=generator)}, num_chains)

    state = sampler.init(draw() * truth**0.5, draw())
    burnin, steps = int(10 / dt), int(time / dt)
    squares = torch.zeros(num_chains)
    for step in range(burnin + steps):
        w = state.params["w"]
        if step >= burnin:
            squares += w.square().mean(1) / steps
        grads = TensorDict({"w": w + 1.4 * (1.4 * w + 0.5).sin()}, num_chains)
        state, _ = sampler.update(state, Evaluation(grads), draw())
    error = squares / truth - 1
    return float(error.mean()), float(error.std()) / num_chains**0.5


# Settings, step sizes, time that a step takes, chains and time of a run.
ORDERS = {
    "sgld": ({}, (0.05, 0.1, 0.2), lambda lr: lr / 2, (20_000, 40)),
    "sglrw": ({}, (0.1, 0.2, 0.4), lambda lr: lr / 2, (20_000, 40)),
    "sghmc": ({"friction": 0.3}, (0.05, 0.1, 0.2), math.sqrt, (60_000, 40)),
    "sgnht": ({}, (0.002, 0.008, 0.032), math.sqrt, (40_000, 40)),
    "baoa": ({"friction": 1.0}, (0.3, 0.4, 0.55), lambda lr: lr, (400_000, 160)),
    "badoda": ({"diffusion_factor": 1.0}, (0.4, 0.6, 0.9), lambda lr: lr, (200_000, 160)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDERS)
def test_weak_order(name):
    """Slope of the error of E w² against the step size, by weighted regression."""
    spec = SPECS[name]
    settings, lrs, dt, (num_chains, time) = ORDERS[name]
    points = []
    for seed, lr in enumerate(lrs):
        own = {"diffusion_factor": math.sqrt(lr)} if name == "sgnht" else settings
        sampler = spec.make(lr, nbeta=1.0, temperature=0.8, **own, anchor={"w": torch.zeros(4)})
        error, se = error_of_second_moment(sampler, lr, dt(lr), num_chains, time, seed)
        points.append((math.log(lr), math.log(abs(error)), (abs(error) / se) ** 2))
    x, y, weight = torch.tensor(points).T
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    slope = float((weight * x * y).sum() / (weight * x * x).sum())
    slope_error = float((weight * x * x).sum() ** -0.5)
    assert slope_error < 0.1
    assert abs(slope - spec.order) < 0.3
