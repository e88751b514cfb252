"""Preconditioners: their equations, Γ against autograd, and what Γ is for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from tensordict import TensorDict
from torch.nn.functional import cross_entropy, mse_loss

import funcsgmcmc as fs
from funcsgmcmc import preconditioners as pre
from funcsgmcmc import tree
from funcsgmcmc.curvature import ExactDiagonal, Hutchinson
from problems import arrays, classification, numbers

SHAPES = {"a": (2, 3), "b": (), "c": (4,)}


@given(
    alpha=numbers(0, 0.999),
    eps=numbers(1e-3, 1),
    betas=st.tuples(numbers(0, 0.99), numbers(0, 0.999)),
    chains=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equations(alpha, eps, betas, chains, seed):
    rng = np.random.default_rng(seed)
    params, hessian = arrays(rng, SHAPES, chains), arrays(rng, SHAPES, chains)
    rms, adam = (
        pre.rmsprop(alpha, eps, curvature="exact"),
        pre.adam(*betas, eps),
    )
    rms_state, adam_state = rms.init(params), adam.init(params)
    square, first, second = (dict.fromkeys(SHAPES, 0.0) for _ in range(3))
    for t in range(1, 4):
        grads = arrays(rng, SHAPES, chains)
        by_rms = rms.update(rms_state, grads, hessian)
        by_adam = adam.update(adam_state, grads)
        rms_state, adam_state = by_rms.state, by_adam.state
        for name in SHAPES:
            g, h = grads[name].numpy(), hessian[name].numpy()
            square[name] = alpha * square[name] + (1 - alpha) * g**2
            gain = 1 / (np.sqrt(square[name]) + eps)
            np.testing.assert_allclose(by_rms.gain[name], gain, rtol=1e-10)
            # Chain rule, step by step: dG = −G² d√V, d√V = dV/(2√V), dV = 2 (1 − α) g h dw.
            slope = -(gain**2) * (2 * (1 - alpha) * g * h) / (2 * np.sqrt(square[name]))
            np.testing.assert_allclose(by_rms.correction[name], slope, rtol=1e-9, atol=1e-12)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g**2
            unbiased = second[name] / (1 - betas[1] ** t)
            np.testing.assert_allclose(by_adam.gain[name], 1 / (unbiased**0.5 + eps), rtol=1e-8)
            mean = first[name] / (1 - betas[0] ** t)
            np.testing.assert_allclose(by_adam.drift_grads[name], mean, rtol=1e-8, atol=1e-12)


def test_composition_multiplies_gains_and_keeps_the_product_rule():
    """Γ of a product is autograd's derivative of it."""
    params = TensorDict({"w": torch.tensor([0.5, -1.0, 2.0])})
    scales = {"w": torch.tensor([2.0, 3.0, 4.0])}

    def loss(w):
        return (w**4).sum() / 4 + w[0] * w[1]

    def gain_of(w):
        (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
        rms = [(((1 - a) * g**2).sqrt() + e).reciprocal() for a, e in ((0.3, 0.1), (0.6, 0.5))]
        return scales["w"] * rms[0] * rms[1], g

    w = params["w"].clone().requires_grad_()
    gain, g = gain_of(w)
    expected = torch.stack(
        [torch.autograd.grad(x, w, retain_graph=True)[0][i] for i, x in enumerate(gain)]
    )
    hessian = torch.autograd.functional.hessian(loss, w).diagonal()
    product = pre.compose(
        pre.rmsprop(0.3, 0.1, curvature="exact"),
        pre.diagonal(scales),
        pre.rmsprop(0.6, 0.5, curvature="exact"),
    )
    scaling = product.update(
        product.init(params), TensorDict({"w": g.detach()}), TensorDict({"w": hessian})
    )
    torch.testing.assert_close(scaling.gain["w"], gain.detach())
    torch.testing.assert_close(scaling.correction["w"], expected)


def test_exact_curvature_is_autograds():
    model, data = classification()
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    names = tree.names(params)

    def flat_loss(flat):
        return loss_fn(tree.unflatten(flat, params), data)

    hessian = torch.autograd.functional.hessian(flat_loss, tree.flatten(params))
    exact = ExactDiagonal().evaluate(loss_fn, params, data, fs.key(0))
    torch.testing.assert_close(tree.flatten(exact), hessian.diagonal())
    assert tree.names(exact) == names


@pytest.mark.parametrize("curvature", ["exact", "hutchinson"])
@pytest.mark.parametrize("vmapped", ["vmap", "loop"])
def test_curvature_of_a_squared_error(curvature, vmapped):
    """Whose backward has no forward derivative in torch 2.13."""
    model, targets = torch.nn.Linear(3, 1), torch.randn(20, 1)
    inputs = torch.randn(20, 3)
    samples = fs.sample(
        fs.module_loss(model, mse_loss),
        fs.params_of(model),
        (inputs, targets),
        fs.rmsprop_sgld(1e-3, nbeta=5.0, curvature=curvature),
        num_chains=2,
        num_draws=2,
        key=fs.key(0),
        chain_method=vmapped,
    )
    assert samples.healthy.all()
    exact = ExactDiagonal().evaluate(
        fs.module_loss(model, mse_loss), fs.params_of(model), (inputs, targets), fs.key(0)
    )
    torch.testing.assert_close(exact["weight"], 2 * inputs.square().mean(0)[None])


def test_hutchinsons_estimate_is_unbiased_with_its_variance():
    model, data = classification()
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    hessian = torch.autograd.functional.hessian(
        lambda flat: loss_fn(tree.unflatten(flat, params), data), tree.flatten(params)
    )
    keys = fs.random.split(fs.key(0), 4_000)
    estimates = torch.vmap(lambda key: Hutchinson().evaluate(loss_fn, params, data, key))(keys)
    flat = tree.flatten(estimates)
    score = (flat.mean(0) - hessian.diagonal()) / flat.std(0) * len(keys) ** 0.5
    assert score.abs().max() < 4.5
    variance = hessian.square().sum(1) - hessian.diagonal().square()
    fourth = (flat - flat.mean(0)).pow(4).mean(0)
    error = ((fourth - flat.var(0).square()).clamp(min=1e-30) / len(keys)).sqrt()
    assert ((flat.var(0) - variance) / error).abs().max() < 4.5


# RMSprop on U = w²/2 + w⁴/12, where the gain 1/(√V + eps) falls with |w|, with and without Γ.

LR, EPS = 0.02, 0.5
NUM_CHAINS, NUM_STEPS, BURNIN, SPREAD = 4_000, 700, 300, 0.9


def slope(w):
    return w + w**3 / 3


def rmsprop_step(w, square, alpha, with_correction):
    """Mean and variance of w', and V', in NumPy."""
    gradient, hessian = slope(w), 1 + w**2
    square = alpha * square + (1 - alpha) * gradient**2
    gain = 1 / (np.sqrt(square) + EPS)
    drift = gain * gradient
    if with_correction:
        with np.errstate(invalid="ignore"):
            gamma = -(1 - alpha) * gradient * hessian * gain**2 / np.sqrt(square)
        drift = drift - np.where(square > 0, gamma, 0.0)
    return w - LR / 2 * drift, LR * gain, square


def stationary_second_moment(with_correction):
    """E w² of the scheme with α = 0, whose w' is normal given w: by its transition matrix."""
    grid = np.linspace(-5, 5, 1001)
    mean, variance, _ = rmsprop_step(grid, 0.0, 0.0, with_correction)
    density = np.exp(-((grid[:, None] - mean) ** 2) / 2 / variance) / np.sqrt(variance)
    transition = density / density.sum(0)
    system = np.vstack([transition - np.eye(len(grid)), np.ones(len(grid))])
    law = np.linalg.lstsq(system, np.append(np.zeros(len(grid)), 1.0), rcond=None)[0]
    return law @ grid**2


def simulated_second_moment(alpha, with_correction):
    """E w² of the scheme, and its standard error, over chains that NumPy draws."""
    rng = np.random.default_rng(0)
    w, square = SPREAD * rng.normal(size=NUM_CHAINS), np.zeros(NUM_CHAINS)
    total = np.zeros(NUM_CHAINS)
    for step in range(BURNIN + NUM_STEPS):
        total += w**2 / NUM_STEPS if step >= BURNIN else 0.0
        mean, variance, square = rmsprop_step(w, square, alpha, with_correction)
        w = mean + np.sqrt(variance) * rng.normal(size=NUM_CHAINS)
    return total.mean(), total.std() / NUM_CHAINS**0.5


def sampled_second_moment(alpha, curvature):
    """E w² of our chains, and its standard error."""
    samples = fs.sample(
        lambda params, batch: (params["w"] ** 2 / 2 + params["w"] ** 4 / 12).sum(),
        {"w": torch.zeros(1)},
        torch.zeros(1),
        fs.rmsprop_sgld(LR, nbeta=1.0, alpha=alpha, eps=EPS, curvature=curvature),
        num_chains=NUM_CHAINS,
        num_draws=NUM_STEPS,
        num_burnin_steps=BURNIN,
        init_noise=SPREAD,
        key=fs.key(2),
        observables={"square": lambda params: params["w"][0] ** 2},
        initial_loss=0.0,
    )
    per_chain = samples.observables["square"].mean(1)
    return float(per_chain.mean()), float(per_chain.std()) / NUM_CHAINS**0.5


@pytest.mark.parametrize("curvature", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_second_moment_of_rmsprop_is_that_of_its_equations(curvature, alpha):
    mean, error = sampled_second_moment(alpha, curvature)
    if alpha == 0:
        expected, expected_error = stationary_second_moment(curvature is not None), 0.0
    else:
        expected, expected_error = simulated_second_moment(alpha, curvature is not None)
    assert abs(mean - expected) < 4 * math.hypot(error, expected_error)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_curvature_brings_rmsprop_closer_to_the_truth(alpha):
    """Γ takes away more of the bias than its noise of four standard errors could."""

    def density(w):
        return np.exp(-(w**2) / 2 - w**4 / 12)

    total = quad(density, 0, 8, epsabs=1e-12)[0]
    truth = quad(lambda w: w * w * density(w), 0, 8, epsabs=1e-12)[0] / total
    without, error_without = sampled_second_moment(alpha, None)
    corrected, error = sampled_second_moment(alpha, "exact")
    assert without - truth > 4 * error_without
    assert abs(without - truth) - abs(corrected - truth) > 4 * math.hypot(error, error_without)


def test_gain_of_an_optimizer():
    model, (inputs, labels) = classification()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.0)
    squares: dict[str, list[torch.Tensor]] = {}
    for _ in range(3):
        adam.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        for name, param in model.named_parameters():
            squares.setdefault(name, []).append(param.grad.square())
        adam.step()
    gain = pre.optimizer_gain(adam, model, eps=1e-3)
    for name, seen in squares.items():
        weights = [0.1 * 0.9 ** (len(seen) - 1 - i) for i in range(len(seen))]
        average = sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(gain[name], 1 / (average.sqrt() + 1e-3))
    fs.sgld(1e-3, nbeta=1.0, preconditioner=pre.diagonal(gain)).init(fs.params_of(model))

    rms = torch.optim.RMSprop(model.parameters(), lr=1e-4)
    with pytest.raises(ValueError, match=r"for '0.weight', got a RMSprop that holds nothing"):
        pre.optimizer_gain(rms, model)
    rms.zero_grad()
    cross_entropy(model(inputs), labels).backward()
    rms.step()
    expected = 1 / (rms.state[model[0].weight]["square_avg"].sqrt() + 0.1)
    torch.testing.assert_close(pre.optimizer_gain(rms, model, eps=0.1)["0.weight"], expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pre.rmsprop(1.0), ValueError, "alpha must be < 1, got 1"),
        (
            lambda: pre.rmsprop(curvature="diag"),
            ValueError,
            "curvature must be one of 'exact', 'h",
        ),
        (lambda: pre.adam(beta2=1.0), ValueError, "beta2 must be < 1, got 1"),
        (lambda: pre.adam(eps=0.0), ValueError, "eps must be > 0, got 0"),
        (
            lambda: pre.diagonal({"w": -torch.ones(2)}),
            ValueError,
            r"gain\['w'\] must be >= 0",
        ),
        (
            lambda: pre.diagonal(2.0),
            TypeError,
            "gain must be a TensorDict or a mapping",
        ),
        (
            lambda: pre.compose(),
            ValueError,
            "compose needs at least one preconditioner",
        ),
        (
            lambda: pre.compose(pre.identity(), 2.0),
            TypeError,
            "preconditioner must be one made by",
        ),
        (
            lambda: pre.compose(
                pre.adam(),
                pre.compose(pre.identity(), pre.adam()),
            ),
            ValueError,
            "compose takes one preconditioner that averages the gradients of the drift .* got 2",
        ),
        (
            lambda: pre.compose(
                pre.rmsprop(curvature="exact"),
                pre.rmsprop(curvature="hutchinson"),
            ),
            ValueError,
            "curvature must be of one kind in a product, got ExactDiagonal and Hutchinson",
        ),
        (
            lambda: pre.optimizer_gain(3, torch.nn.Linear(1, 1)),
            TypeError,
            "optimizer must be a Optimizer, got int",
        ),
    ],
)
def test_bad_preconditioners_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_gain_of_another_structure_is_refused():
    sampler = fs.sgld(0.1, nbeta=1.0, preconditioner=pre.diagonal({"v": torch.ones(2)}))
    with pytest.raises(ValueError, match="gain has unknown key 'v'"):
        sampler.init({"w": torch.ones(2)})


def test_a_step_without_its_curvature_is_refused():
    params = TensorDict({"w": torch.ones(2)})
    sampler = fs.rmsprop_sgld(0.1, nbeta=1.0, curvature="exact")
    with pytest.raises(ValueError, match="rmsprop with curvature needs hessian_diagonal, got None"):
        sampler.update(sampler.init(params), fs.samplers.Evaluation(params), params)
