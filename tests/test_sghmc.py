"""SGHMC: its equation against an independent one, and its exact stationary law."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import funcsgmcmc as fs
from test_sgld import arrays, numbers


def reference_step(w, w0, p, g, eta, pull, m, s):
    """One step of one chain in NumPy: Chen et al.'s eq. 15, with forces and shock one by one."""
    force = s["nbeta"] * g + s["localization"] * (w - w0) + s["weight_decay"] * w + pull
    shock = np.sqrt(2 * (s["friction"] - s["noise_estimate"]) * s["lr"]) * eta
    p = p - s["friction"] * p + m * (shock - s["lr"] * force)
    return w + p, p


@given(
    chains=st.sampled_from([(), (3,)]),
    masked=st.booleans(),
    share=numbers(0, 1),
    settings=st.fixed_dictionaries(
        {
            "lr": numbers(0, 0.5),
            "nbeta": numbers(0, 10),
            "friction": numbers(0, 1.9),
            "localization": numbers(0, 5),
            "weight_decay": numbers(0, 5),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_update_is_the_equation(chains, masked, share, settings, seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 3), "b": (), "c": (4,)}
    params, grads, noise, pulls, start = (arrays(rng, shapes, chains) for _ in range(5))
    mask = arrays(rng, shapes, ()).apply(lambda leaf: (leaf > 0).double()) if masked else None
    settings = settings | {"noise_estimate": share * settings["friction"]}
    sampler = fs.sghmc(**settings, mask=mask)
    state = sampler.init(params, start)
    expected = {
        name: (
            params[name].numpy(),
            math.sqrt(settings["lr"])
            * (1.0 if mask is None else mask[name].numpy())
            * start[name].numpy(),
        )
        for name in shapes
    }
    for _ in range(3):
        state, _terms = sampler.update(state, grads, noise, pulls)
        for name in shapes:
            m = 1.0 if mask is None else mask[name].numpy()
            given_ = (tree[name].numpy() for tree in (grads, noise, pulls))
            w, p = expected[name]
            w, p = reference_step(w, params[name].numpy(), p, *given_, m, settings)
            expected[name] = (w, p)
            np.testing.assert_allclose(state.params[name], w, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(state.momentum[name], p, rtol=1e-10, atol=1e-10)


CURVATURE = torch.tensor([0.5, 1.0, 2.0, 4.0]).double()
NUM_CHAINS = 20_000


@pytest.mark.parametrize("noise_sd", [0.0, 2.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"nbeta": 1.0, "friction": 0.3},
        {"nbeta": 2.5, "friction": 0.8, "localization": 0.7},
        {"nbeta": 0.6, "friction": 1.3, "weight_decay": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("lr", [0.02, 0.1, 0.2])
def test_stationary_law(settings, lr, noise_sd):
    """Second moments of w, p and their product, over independent chains and four curvatures."""
    variance = (settings["nbeta"] * noise_sd) ** 2
    estimate = min(lr * variance / 4, settings["friction"])  # half of what the gradients give
    sampler = fs.sghmc(lr, **settings, noise_estimate=estimate, anchor={"w": torch.zeros(4)})
    total = settings["nbeta"] * CURVATURE
    total = total + settings.get("localization", 0.0) + settings.get("weight_decay", 0.0)
    friction = settings["friction"]
    excess = (friction - estimate + lr * variance / 2) / friction
    kinetic = excess * 2 * lr / (2 - friction - lr * total / 2)
    position = kinetic * (2 - friction) / (2 * lr * total)

    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(NUM_CHAINS, 4, generator=generator)  # noqa: E731
    # Started with the law's own variances; the correlation settles within the steps.
    start = TensorDict({"w": position.sqrt() * draw()}, batch_size=NUM_CHAINS)
    state = sampler.init(start, TensorDict({"w": draw()}, batch_size=NUM_CHAINS))
    for _ in range(300):
        grads = CURVATURE * state.params["w"] + noise_sd * draw()
        state, _ = sampler.update(
            state,
            TensorDict({"w": grads}, batch_size=NUM_CHAINS),
            TensorDict({"w": draw()}, batch_size=NUM_CHAINS),
        )
    w, p = state.params["w"], state.momentum["w"]
    for values, expected in (
        (w**2 / position, 1.0),
        (p**2 / kinetic, 1.0),
        (w * p / (position * kinetic).sqrt(), (kinetic / position).sqrt() / 2),
    ):
        z = (values - expected).mean() / (values.std(0).square().sum().sqrt() / 4) * NUM_CHAINS**0.5
        assert abs(z) < 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"friction": -0.1}, "friction must be >= 0, got -0.1"),
        ({"friction": 2.0}, "friction must be < 2, got 2"),
        ({"friction": math.nan}, "friction must be >= 0, got nan"),
        ({"noise_estimate": 0.2}, "noise_estimate must be <= friction, got 0.2 and 0.1"),
        (
            {"friction": torch.tensor([0.25, 0.5]), "noise_estimate": 0.375},
            r"noise_estimate must be <= friction, got \[0.375, 0.375\] and \[0.25, 0.5\]",
        ),
    ],
)
def test_settings_have_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        fs.sghmc(0.1, nbeta=1.0, **settings)


def test_momentum_needs_noise():
    with pytest.raises(ValueError, match="sghmc needs noise for its momenta"):
        fs.sghmc(0.1, nbeta=1.0).init({"w": torch.ones(2)})
