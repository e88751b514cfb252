"""Parameters of few digits: steps below half a unit in the last place are lost, and said to be."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.runs import rounding


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def problem(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 3)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 20, generator=generator)
    return model, (inputs, torch.randint(3, (100,), generator=generator))


def distance(sampler, params, loss_fn, data, **settings) -> float:
    """Root mean square of w − w₀ over chains, and the entries of all parameters."""
    options = {"num_chains": 4, "num_draws": 100, "batch_size": 20, "key": fs.key(0)}
    samples = fs.sample(loss_fn, params, data, sampler, **(options | settings))
    away = samples.state.params.float() - params.float()
    return float(fs.tree.norm(away).square().mean() / fs.tree.size(params)) ** 0.5


@pytest.mark.parametrize(("lr", "ratio"), [(1e-7, 1.08), (1e-9, 0.39)])
def test_small_steps_of_bfloat16_are_lost_with_a_warning_and_the_remedy_is_right(lr, ratio):
    """Between half a unit and a third of one steps are too long on average, below too short."""
    model, data = problem()
    # All runs have the same noise; the pull of the loss is small beside it.
    sampler = fs.sgld(lr, nbeta=20.0)
    narrow = (data[0].bfloat16(), data[1])
    with pytest.warns(UserWarning, match=r"\d+% of the half-precision parameters did not move"):
        lost = distance(sampler, fs.params_of(model), fs.module_loss(model, cross_entropy), narrow)
    wide = fs.params_of(model).float()
    remedy = distance(
        sampler, wide, fs.module_loss(model, cross_entropy, dtype=torch.bfloat16), data
    )
    exact_model = problem(torch.float32)[0]
    exact = distance(sampler, wide, fs.module_loss(exact_model, cross_entropy), data)
    assert remedy == pytest.approx(exact, rel=1e-3)
    assert exact == pytest.approx((lr * 100) ** 0.5, rel=0.02)
    assert lost / exact == pytest.approx(ratio, abs=0.05)


def test_large_steps_masks_and_runs_without_noise_have_no_warning():
    model, (inputs, targets) = problem()
    data, params = (inputs.bfloat16(), targets), fs.params_of(model)
    loss_fn = fs.module_loss(model, cross_entropy)
    stay = {name: False for name in fs.tree.names(params) if name != "2.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance(fs.sgld(1e-3, nbeta=20.0), params, loss_fn, data)
        # What the mask keeps in place was not lost.
        distance(fs.sgld(1e-4, nbeta=20.0, mask=stay), params, loss_fn, data)
        distance(fs.sgld(1e-7, nbeta=20.0, temperature=0.0), params, loss_fn, data)
        distance(fs.sgld(1e-7, nbeta=20.0, noise_level=0.0), params, loss_fn, data)
        distance(fs.sgld(0.0, nbeta=20.0), params, loss_fn, data)


def test_a_schedule_that_ends_too_small_is_noticed():
    model, (inputs, targets) = problem()
    loss_fn = fs.module_loss(model, cross_entropy)
    shrinking = fs.schedules.cosine(1e-3, 1e-9, num_steps=100)
    with pytest.warns(UserWarning, match="did not move in a step"):
        distance(
            fs.sgld(shrinking, nbeta=20.0),
            fs.params_of(model),
            loss_fn,
            (inputs.bfloat16(), targets),
            chain_method="loop",
        )


def test_the_share_that_did_not_move_is_that_of_rounding():
    """P(|s η| < u/2) for a step of standard deviation s, at numbers that are u apart."""
    generator = torch.Generator().manual_seed(0)
    before = fs.tree.build({"w": torch.full((100_000,), 1.3).bfloat16()}, torch.Size())
    spacing = 2**-7
    for size, warns in ((0.8, True), (1.1, False)):
        step = size * spacing * torch.randn(100_000, generator=generator)
        after = before.apply(lambda leaf, step=step: (leaf.float() + step).bfloat16())
        expected = torch.special.erf(torch.tensor(0.5 / size / 2**0.5))
        share = (after["w"] == before["w"]).double().mean()
        assert share == pytest.approx(float(expected), abs=0.01)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rounding.warn_of_lost_steps(before, after, None)
        assert bool(caught) == warns
