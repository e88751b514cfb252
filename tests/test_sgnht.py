"""SGNHT: its equation against an independent one, and the laws it obeys exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import funcsgmcmc as fs
from problems import run
from test_sgld import arrays, numbers


def reference_step(w, w0, p, xi, g, eta, pull, s):
    """One step of one chain in NumPy, entries of all leaves in one vector (design, section 5)."""
    force = s["nbeta"] * g + s["localization"] * (w - w0) + s["weight_decay"] * w + pull
    shock = np.sqrt(2 * s["diffusion_factor"] * s["lr"]) * eta
    p = p - xi * p + s["mask"] * (shock - s["lr"] * force)
    w = w + p
    if s["box"] is not None:
        out = np.abs(w - w0) > s["box"]
        w = np.where(out, w0 + s["box"] * np.sign(w - w0), w)
        p = np.where(out, -p, p)
    sampled = max(1, int(np.sum(s["mask"] != 0)))
    return w, p, xi + np.sum(p * p) / sampled - s["lr"]


@given(
    chains=st.sampled_from([(), (3,)]),
    masked=st.booleans(),
    box=st.one_of(st.none(), numbers(0.5, 3)),
    settings=st.fixed_dictionaries(
        {
            "lr": numbers(0, 0.5),
            "nbeta": numbers(0, 10),
            "diffusion_factor": numbers(0, 1),
            "localization": numbers(0, 5),
            "weight_decay": numbers(0, 5),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_update_is_the_equation(chains, masked, box, settings, seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 3), "b": (), "c": (4,)}
    params, grads, noise, pulls, start = (arrays(rng, shapes, chains) for _ in range(5))
    mask = arrays(rng, shapes, ()).apply(lambda leaf: (leaf > 0).double()) if masked else None
    sampler = fs.sgnht(**settings, mask=mask, bounding_box_size=box)
    state = sampler.init(params, start)

    def rows(tree, batch=chains):
        """`[chains, n]`, the entries of all leaves in a row."""
        leaves = [tree[name].reshape(*batch, -1) for name in shapes]
        return torch.cat(leaves, -1).reshape(-1, 11).numpy()

    m = np.ones((1, 11)) if mask is None else rows(mask, ())
    expected_w, expected_p = rows(params), math.sqrt(settings["lr"]) * m * rows(start)
    expected_xi = np.full(len(expected_w), settings["diffusion_factor"])
    for _ in range(3):
        state, _terms = sampler.update(state, grads, noise, pulls)
        s = settings | {"mask": m[0], "box": box}
        for c in range(len(expected_w)):
            expected_w[c], expected_p[c], expected_xi[c] = reference_step(
                expected_w[c],
                rows(params)[c],
                expected_p[c],
                expected_xi[c],
                rows(grads)[c],
                rows(noise)[c],
                rows(pulls)[c],
                s,
            )
        np.testing.assert_allclose(rows(state.params), expected_w, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(rows(state.momentum), expected_p, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(state.thermostat.reshape(-1), expected_xi, rtol=1e-9, atol=1e-9)


def test_terms_add_up_with_the_momentum():
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3), "b": ()}
    params, grads, noise, start = (arrays(rng, shapes, (4,)) for _ in range(4))
    sampler = fs.sgnht(0.1, nbeta=2.0, diffusion_factor=0.3, localization=1.0, weight_decay=0.5)
    state = sampler.init(params, start)
    for _ in range(2):
        before = state.params
        state, terms = sampler.update(state, grads, noise)
        for name in shapes:
            step = terms.momentum.value()[name] + terms.noise.value()[name]
            for term in (terms.scaled_grad, terms.localization, terms.weight_decay):
                step = step - term.value()[name]
            torch.testing.assert_close(state.params[name] - before[name], step)


# The laws, on U = ½ Σ Λ w² with independent chains, each averaged over time: the chains' averages
# are independent, so that a z-score from their spread has sd 1.

CURVATURE = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(4).double()
NUM_CHAINS, NUM_STEPS, NUM_BURNIN_STEPS = 400, 3000, 500
LAW_CASES = [
    {"lr": 0.05, "nbeta": 1.0, "diffusion_factor": 0.1},
    {"lr": 0.02, "nbeta": 2.5, "diffusion_factor": 0.05},
    {"lr": 0.1, "nbeta": 0.7, "diffusion_factor": 0.2, "localization": 0.8},
    {"lr": 0.05, "nbeta": 1.0, "diffusion_factor": 0.1, "weight_decay": 0.5},
]


def z_score(per_chain: torch.Tensor, expected: float) -> float:
    return float((per_chain.mean() - expected) / (per_chain.std() / len(per_chain) ** 0.5))


@pytest.mark.parametrize("noise_sd", [0.0, 2.0])
@pytest.mark.parametrize("settings", LAW_CASES, ids=str)
def test_kinetic_and_virial_laws(settings, noise_sd):
    sampler, lr = fs.sgnht(**settings, anchor={"w": torch.zeros(16)}), settings["lr"]
    total = settings["nbeta"] * CURVATURE
    total = total + settings.get("localization", 0.0) + settings.get("weight_decay", 0.0)
    start = TensorDict({"w": torch.zeros(NUM_CHAINS, 16)}, batch_size=NUM_CHAINS)
    keys = fs.fold_in(fs.key(3), torch.arange(NUM_CHAINS))
    state = sampler.init(start, fs.normal_like(fs.fold_in(keys, 0), start))
    generator = torch.Generator().manual_seed(0)
    kinetic, virial, temperature, thermostat, shock = torch.zeros(5, NUM_CHAINS)
    for step in range(1, NUM_STEPS + 1):
        w, p, xi = state.params["w"], state.momentum["w"], state.thermostat
        if step > NUM_BURNIN_STEPS:
            kinetic += p.square().mean(1)
            temperature += (total * w.square()).mean(1)
            virial += (lr * total * w.square() - p.square() + xi[:, None] * w * p).mean(1)
            thermostat += xi
        force = noise_sd * torch.randn(w.shape, generator=generator)
        noise = TensorDict({"w": torch.randn(w.shape, generator=generator)}, NUM_CHAINS)
        grads = TensorDict({"w": CURVATURE * w + force}, batch_size=NUM_CHAINS)
        state, _ = sampler.update(state, grads, noise)
        if step > NUM_BURNIN_STEPS:
            # p' without friction and force is noise: the sampler's and the gradient's.
            left = state.momentum["w"] - (1 - xi[:, None]) * p + lr * total * w
            shock += left.square().mean(1)
    num = NUM_STEPS - NUM_BURNIN_STEPS
    kinetic, virial, temperature, thermostat, shock = (
        value / num for value in (kinetic, virial, temperature, thermostat, shock)
    )
    assert abs(z_score(kinetic, lr)) < 4
    assert abs(z_score(virial, 0.0)) < 4
    # Together they give Λ Var w = 1 − E[ξ w p]/ε: 1 but for the friction, and never 2A.
    xi = float(thermostat.mean())
    assert 1 - xi < float(temperature.mean()) < 1
    # Friction balances all noise: A without gradient noise, more with it.
    assert (xi > 1.5 * settings["diffusion_factor"]) == (noise_sd > 0)
    variance = 2 * settings["diffusion_factor"] * lr + (lr * settings["nbeta"] * noise_sd) ** 2
    assert abs(z_score(shock, variance)) < 4


def test_momentum_needs_noise_and_settings_their_range():
    with pytest.raises(ValueError, match="sgnht needs noise for its momenta"):
        fs.sgnht(0.1, nbeta=1.0).init({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="diffusion_factor must be >= 0, got -1"):
        fs.sgnht(0.1, nbeta=1.0, diffusion_factor=-1.0)


def test_each_chain_has_its_thermostat():
    samples = run(fs.sgnht(1e-3, nbeta=3.0), num_chains=20)
    assert len(samples.state.thermostat.unique()) == 20


def test_masked_entries_stay_and_do_not_count():
    params = TensorDict({"w": torch.ones(4)})
    mask = {"w": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    samples = fs.sample(
        lambda p, batch: (p["w"] ** 2).sum(),
        params,
        torch.zeros(1),
        fs.sgnht(0.05, nbeta=1.0, mask=mask),
        num_chains=3,
        num_draws=20,
        key=fs.key(0),
        save_draws=True,
        save_metrics=True,
    )
    assert torch.equal(samples.draws["w"][..., 1::2], torch.ones(3, 20, 2))
    assert (samples.metrics.numel == 2).all()
