"""Preconditioners: their equations, Γ against autograd, and what Γ is for."""

import functools

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
from problems import arrays, check_means, classification, numbers

SHAPES = {"a": (2, 3), "b": (), "c": (4,)}
# A few roundings to float64's 2·10⁻¹⁶ each, which a division by 1 − β ≥ 0.001 enlarges.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


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
            np.testing.assert_allclose(by_rms.gain[name], gain, **ROUNDING)
            # Chain rule, step by step: dG = −G² d√V, d√V = dV/(2√V), dV = 2 (1 − α) g h dw.
            slope = -(gain**2) * (2 * (1 - alpha) * g * h) / (2 * np.sqrt(square[name]))
            np.testing.assert_allclose(by_rms.correction[name], slope, **ROUNDING)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g**2
            unbiased = second[name] / (1 - betas[1] ** t)
            gain = 1 / (np.sqrt(unbiased) + eps)
            np.testing.assert_allclose(by_adam.gain[name], gain, **ROUNDING)
            mean = first[name] / (1 - betas[0] ** t)
            np.testing.assert_allclose(by_adam.drift_grads[name], mean, **ROUNDING)


def test_at_alpha_1_nothing_is_learned():
    rms = pre.rmsprop(1.0, 0.25, curvature="exact")
    params = TensorDict({"w": torch.tensor([0.5, -1.0])})
    state = rms.init(params)
    for _ in range(3):
        scaling = rms.update(state, params, params)
        state = scaling.state
        assert scaling.gain["w"].tolist() == [4.0, 4.0]
        assert scaling.correction["w"].tolist() == [0.0, 0.0]


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
    torch.testing.assert_close(scaling.gain["w"], gain.detach(), **ROUNDING)
    torch.testing.assert_close(scaling.correction["w"], expected, **ROUNDING)


def test_exact_curvature_is_autograds():
    model, data = classification()
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    names = tree.names(params)

    def flat_loss(flat):
        return loss_fn(tree.unflatten(flat, params), data)

    hessian = torch.autograd.functional.hessian(flat_loss, tree.flatten(params))
    exact = ExactDiagonal().evaluate(loss_fn, params, data, fs.key(0))
    torch.testing.assert_close(tree.flatten(exact), hessian.diagonal(), **ROUNDING)
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
    expected = 2 * inputs.square().mean(0)[None]
    torch.testing.assert_close(exact["weight"], expected, **ROUNDING)


def test_hutchinsons_estimate_is_unbiased_with_its_variance():
    model, data = classification()
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    hessian = torch.autograd.functional.hessian(
        lambda flat: loss_fn(tree.unflatten(flat, params), data), tree.flatten(params)
    )
    keys = fs.random.split(fs.key(0), 4_000)
    estimates = torch.vmap(lambda key: Hutchinson().evaluate(loss_fn, params, data, key))(keys)
    away = tree.flatten(estimates) - hessian.diagonal()
    check_means(away, 0.0)
    check_means(away.square(), hessian.square().sum(1) - hessian.diagonal().square())


# RMSprop on U = w²/2 + w⁴/12, where the gain 1/(√V' + eps) falls with |w|: its law, with Γ and
# without.

EPS = 0.5


def second_moment_on_grid(lr: float, alpha: float, with_correction: bool, size: int) -> float:
    """E w² of the scheme, whose w' is normal given w and V': from its law on a grid of w and √V'.

    A √V' between two nodes is shared out between them. For α = 0 it is |g|, and a node itself.
    """
    w = 4.5 * (2 * (torch.arange(size) + 0.5) / size - 1)
    g, h = w + w**3 / 3, 1 + w**2
    root = g[g > 0]
    gain = 1 / (root[:, None] + EPS)
    slope = -gain * g
    if with_correction:
        floor = (1 - alpha) ** 0.5 * g.abs()  # of √V', which the lower of two nodes may miss
        slope = slope - (1 - alpha) * g * h * gain**2 / torch.maximum(root[:, None], floor)
    away = w - (w + lr / 2 * slope)[..., None]
    transition = torch.softmax(-(away**2) / (2 * lr * gain[..., None]), -1)  # [√V', w, w']
    new_root = (alpha * root**2 + (1 - alpha) * g[:, None] ** 2).sqrt()  # [w, √V]
    upper = torch.searchsorted(root, new_root).clamp(1, len(root) - 1)
    share = (new_root - root[upper - 1]) / (root[upper] - root[upper - 1])
    law = torch.full(share.shape, 1 / share.numel())
    for _ in range(int(20 / lr)):
        pushed = torch.zeros_like(law).scatter_add(1, upper - 1, law * (1 - share))
        pushed = pushed.scatter_add(1, upper, law * share)
        law = torch.bmm(pushed.T[:, None], transition)[:, 0].T
    return float(law.sum(1) @ w**2)


@functools.cache
def second_moment(lr: float, alpha: float, with_correction: bool) -> float:
    """E w² of the scheme; a grid's error goes as the square of its spacing."""
    fine, coarse = (second_moment_on_grid(lr, alpha, with_correction, n) for n in (200, 100))
    return fine + (fine - coarse) / 3


@pytest.mark.parametrize(
    ("curvature", "lr"),
    [
        (None, 0.2),
        ("exact", 0.2),
        ("hutchinson", 0.2),
        pytest.param(None, 0.1, marks=pytest.mark.slow),
        pytest.param("exact", 0.1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_second_moment_of_rmsprop_is_that_of_its_equations(alpha, curvature, lr):
    samples = fs.sample(
        lambda params, batch: (params["w"] ** 2 / 2 + params["w"] ** 4 / 12).sum(),
        {"w": torch.zeros(2)},
        torch.zeros(1),
        fs.rmsprop_sgld(lr, nbeta=1.0, alpha=alpha, eps=EPS, curvature=curvature),
        num_chains=4_000,
        num_draws=int(25 / lr),
        num_burnin_steps=int(15 / lr),
        init_noise=0.9,
        key=fs.key(2),
        observables={"square": lambda params: params["w"] ** 2},
        initial_loss=0.0,
    )
    squares = samples.observables["square"].mean(1)
    check_means(squares, second_moment(lr, alpha, curvature is not None))
    with pytest.raises(AssertionError, match="off by"):
        check_means(squares, second_moment(lr, alpha, curvature is None))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_curvature_brings_rmsprop_closer_to_the_truth(alpha):
    """For ε → 0, the law is e^(−U)/G without Γ, and e^(−U) G^(−α) with it."""

    def small_step_limit(power):
        def density(w):
            return np.exp(-(w**2) / 2 - w**4 / 12) * (w + w**3 / 3 + EPS) ** power

        total = quad(density, 0, 8, epsabs=1e-12)[0]
        return quad(lambda w: w * w * density(w), 0, 8, epsabs=1e-12)[0] / total

    for with_correction, power in ((False, 1.0), (True, alpha)):
        limit = small_step_limit(power)
        biases = [abs(second_moment(lr, alpha, with_correction) - limit) for lr in (0.1, 0.2)]
        assert biases[0] < biases[1]
    truth = small_step_limit(0.0)
    for lr in (0.1, 0.2):
        without, corrected = (second_moment(lr, alpha, each) - truth for each in (False, True))
        assert abs(corrected) < abs(without)


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
        torch.testing.assert_close(gain[name], 1 / (average.sqrt() + 1e-3), **ROUNDING)
    fs.sgld(1e-3, nbeta=1.0, preconditioner=pre.diagonal(gain)).init(fs.params_of(model))

    rms = torch.optim.RMSprop(model.parameters(), lr=1e-4)
    with pytest.raises(ValueError, match=r"for '0.weight', got a RMSprop that holds nothing"):
        pre.optimizer_gain(rms, model)
    rms.zero_grad()
    cross_entropy(model(inputs), labels).backward()
    rms.step()
    expected = 1 / (rms.state[model[0].weight]["square_avg"].sqrt() + 0.1)
    gain = pre.optimizer_gain(rms, model, eps=0.1)
    torch.testing.assert_close(gain["0.weight"], expected, **ROUNDING)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pre.rmsprop(1.5), ValueError, "alpha must be <= 1, got 1.5"),
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
