"""Tests of what is sampled: what they find, and that it is as much as they say."""

import math
from dataclasses import replace

import pytest
import torch

import funcsgmcmc as fs
from funcsgmcmc import random, tree
from funcsgmcmc.samplers.sgld import SGLD
from funcsgmcmc.testing import (
    SPECS,
    Model,
    Quadratic,
    check_calibration,
    check_stationary,
    scores,
)
from funcsgmcmc.testing.calibration import _p_values, _smallest_scale_error

INPUTS = torch.tensor([[1.0, 0.5], [-0.3, 1.0], [0.7, -1.0], [0.2, 0.2]]).double()
REGRESSION = Model(
    prior=lambda key: {"w": random.normal(key, (2,), torch.float64)},
    simulate=lambda params, key: (
        INPUTS @ params["w"] + 0.5 * random.normal(key, (4,), torch.float64)
    ),
    loss=lambda params, data: ((INPUTS @ params["w"] - data) ** 2).mean() / 2 / 0.25,
)

GAUSSIAN = Quadratic({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.0])})


def sgld_law(noise_level, lr=0.2):
    curvature = 3 * torch.tensor([1.0, 2.0])
    variance = SPECS["sgld"].variance(lr, curvature, 1.0, 0.0)
    sampler = fs.sgld(lr, nbeta=3.0, noise_level=noise_level)
    return check_stationary(sampler, GAUSSIAN, variance={"w": variance}, num_steps=100)


def test_the_smallest_error_stated_is_found():
    found = sgld_law(1.0)
    assert 0.002 < found.smallest_noise_error < 0.01
    assert "is found" in str(found)
    for sign in (1, -1):
        with pytest.raises(AssertionError, match="variance of all: off by"):
            sgld_law(1 + sign * found.smallest_noise_error)


def test_the_variance_may_be_a_function_of_the_settings():
    """As `SPECS["sgld"].variance` is; gradient noise is that of nβ g."""
    target = Quadratic({"w": torch.tensor([1.0, 2.0])}, {"w": torch.zeros(2)}, gradient_sd=0.5)
    sampler = fs.sgld(0.3, nbeta=2.0, temperature=0.7, localization=0.5)
    tree = {"w": SPECS["sgld"].variance(0.3, torch.tensor([2.5, 4.5]), 0.7, 1.0)}
    by_tree = check_stationary(sampler, target, variance=tree, num_steps=100)
    by_function = check_stationary(sampler, target, variance=SPECS["sgld"].variance, num_steps=100)
    assert by_tree.scores == pytest.approx(by_function.scores)
    with pytest.raises(AssertionError, match="variance of all: off by"):
        check_stationary(sampler, target, num_steps=100)


def test_power_and_false_alarms_are_those_stated():
    """Over many seeds: a right sampler fails as often as asked for, the smallest error is found."""
    lr, curvature = 0.5, 3 * torch.tensor([1.0, 2.0])
    variance = {"w": SPECS["sgld"].variance(lr, curvature, 1.0, 0.0)}
    options = {"variance": variance, "num_chains": 400, "num_steps": 40, "false_alarm": 0.2}
    right, alarms, found = fs.sgld(lr, nbeta=3.0), 0, 0
    for seed in range(60):
        try:
            result = check_stationary(right, GAUSSIAN, seed=seed, power=0.5, **options)
        except AssertionError:
            alarms += 1
        wrong = fs.sgld(lr, nbeta=3.0, noise_level=1.014)
        try:
            check_stationary(wrong, GAUSSIAN, seed=seed, power=0.5, **options)
        except AssertionError:
            found += 1
    assert abs(result.smallest_noise_error - 0.014) < 0.002
    assert alarms / 60 < 0.2 + 2.5 * (0.2 * 0.8 / 60) ** 0.5
    assert found / 60 > 0.5 - 2.5 * (0.25 / 60) ** 0.5


def test_no_power_is_claimed_where_there_is_none():
    """A thermostat makes up for noise that is too loud; a short run has seen none of it."""
    found = check_stationary(fs.badoda(0.05, nbeta=1.0, diffusion_factor=1.0), num_steps=400)
    assert found.smallest_noise_error == math.inf
    assert str(found).endswith("; no error in the noise scale is found")
    frozen = check_stationary(fs.sgld(1e-6, nbeta=1.0), num_steps=20)
    assert frozen.smallest_noise_error == math.inf
    drowned = fs.sgld(0.01, nbeta=1.0)
    noisy = Quadratic({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.0])}, gradient_sd=20.0)
    variance = {"w": SPECS["sgld"].variance(0.01, torch.tensor([1.0]), 1.0, 400.0)}
    plain = check_stationary(drowned, noisy, variance=variance)
    assert plain.smallest_noise_error > 0.01


class MixesEntries(SGLD, frozen=True):
    """Half of the second entry's noise is the first's."""

    def advance(self, state, evaluation, noise):
        def mix(leaf):
            return torch.stack([leaf[..., 0], 0.6 * leaf[..., 0] + 0.8 * leaf[..., 1]], -1)

        return super().advance(state, evaluation, tree.map_leaves(mix, noise))


def test_noise_that_entries_share_is_found():
    right = fs.sgld(0.01, nbeta=3.0)
    fields = {name: getattr(right, name) for name in right.__dataclass_fields__}
    with pytest.raises(AssertionError, match="covariance of entries 1 and 0: off by"):
        check_stationary(MixesEntries(**fields, lock=False), GAUSSIAN, num_steps=600)


@pytest.mark.parametrize(
    "sampler",
    [
        fs.baoa(0.2, nbeta=4.0, friction=2.0, weight_decay=1.0),
        fs.badoda(0.1, nbeta=4.0, diffusion_factor=2.0, weight_decay=1.0),
        fs.sgld(0.01, nbeta=4.0, weight_decay=1.0),
        fs.sghmc(0.01, nbeta=4.0, weight_decay=1.0, friction=0.3),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_are_calibrated(sampler):
    found = check_calibration(sampler, REGRESSION, num_simulations=1_000)
    assert found.ranks.shape == (1_000, 3)  # two entries and the loss
    assert found.ranks.max() == 15
    assert found.smallest_scale_error < 0.21


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 1.4},
        {"nbeta": 8.0},
        {"weight_decay": 2.5},
        {"localization": 3.0, "anchor": {"w": torch.ones(2).double()}},
    ],
    ids=str,
)
def test_what_is_not_calibrated_is_found(changed):
    settings = {"nbeta": 4.0, "friction": 2.0, "weight_decay": 1.0} | changed
    with pytest.raises(AssertionError, match="BAOA is not calibrated"):
        check_calibration(fs.baoa(0.2, **settings), REGRESSION)


@pytest.mark.parametrize("num_draws", [3, 15, 60])
def test_the_smallest_scale_error_stated_is_found(num_draws):
    """Ranks of normal truths among normal draws with a standard deviation so much too large."""
    generator = torch.Generator().manual_seed(num_draws)
    limit, repeats, count = 1e-3, 400, 500
    delta = _smallest_scale_error(count, num_draws, limit, 0.8)
    truths = torch.randn(repeats, count, 1, generator=generator)
    draws = (1 + delta) * torch.randn(repeats, count, num_draws, generator=generator)
    ranks = (draws < truths).sum(-1)
    found = [
        _p_values(each[:, None], num_draws)["spread of ranks of quantity 0"] < limit
        for each in ranks
    ]
    # The statistic varies less where the error is, so that power is a little above what is stated.
    assert 0.72 < sum(found) / repeats < 0.95


def test_p_values_are_uniform():
    generator = torch.Generator().manual_seed(0)
    for num_simulations, num_draws in ((20, 100), (200, 15), (1_000, 2)):
        ranks = torch.randint(num_draws + 1, (400, num_simulations, 1), generator=generator)
        p_values = [_p_values(each, num_draws) for each in ranks]
        for name in p_values[0]:
            alarms = sum(p[name] < 0.1 for p in p_values) / 400
            assert abs(alarms - 0.1) < 4 * (0.09 / 400) ** 0.5


def test_ties_are_broken_at_random():
    sampler = fs.baoa(0.2, nbeta=4.0, friction=2.0, weight_decay=1.0)
    check_calibration(
        sampler,
        REGRESSION,
        quantities=lambda params, data: (params["w"] > 0).double(),
        num_steps=200,
    )


@pytest.mark.parametrize(
    "idle",
    [fs.baoa(0.2, nbeta=0.0, friction=2.0, weight_decay=1.0), fs.sgld(1e-9, nbeta=4.0)],
    ids=["ignores the data", "never moves"],
)
def test_draws_from_the_prior_are_not_calibrated(idle):
    """Ranks of parameters alone would pass them."""
    check_calibration(idle, REGRESSION, quantities=lambda params, data: params["w"], num_steps=100)
    with pytest.raises(AssertionError, match="mean rank of quantity 2"):
        check_calibration(idle, REGRESSION, num_steps=100)


def test_a_broken_model_is_named():
    sampler = fs.baoa(0.2, nbeta=4.0, friction=2.0, weight_decay=1.0)
    nan = torch.tensor(math.nan)
    for changed, message in (
        ({"prior": lambda key: {"w": nan + random.normal(key, (2,))}}, "what prior returns"),
        ({"prior": lambda key: random.normal(key, (2,))}, "what prior returns must be a"),
        ({"simulate": lambda params, key: nan * params["w"]}, "what simulate returns must be fin"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            check_calibration(sampler, replace(REGRESSION, **changed), num_simulations=20)
    few = {"num_simulations": 20, "num_steps": 1}
    with pytest.raises(ValueError, match=r"quantities of parameters .* must be finite, got .* nan"):
        check_calibration(
            sampler, REGRESSION, quantities=lambda params, data: params["w"].log(), **few
        )
    with pytest.raises(ValueError, match=r"quantities must return a number at least"):
        check_calibration(
            sampler, REGRESSION, quantities=lambda params, data: params["w"][:0], **few
        )
    with pytest.raises(TypeError, match="loss must be a function, got 3"):
        replace(REGRESSION, loss=3)
    with pytest.raises(TypeError, match="model must be a Model, got NoneType"):
        check_calibration(sampler, None)
    masked = fs.sgld(0.1, nbeta=4.0, mask={"w": torch.tensor([1.0, 0.0])})
    with pytest.raises(ValueError, match="what is sampled is known without mask"):
        check_calibration(masked, REGRESSION)


def test_scores_of_squares_are_normal():
    """Student's statistic of 50 squares would raise four times the alarms."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(4_000, 50, generator=generator).square() - 1
    limit = 2.5758
    alarms = sum(abs(scores.skewed_z_score(each)) > limit for each in squares) / 4_000
    of_student = sum(abs(scores.z_score(each)) > limit for each in squares) / 4_000
    assert abs(alarms - 0.01) < 0.01
    assert of_student > 0.03


def test_a_log_prior_is_calibrated_as_the_same_weight_decay():
    model = Model(
        REGRESSION.prior,
        REGRESSION.simulate,
        REGRESSION.loss,
        log_prior=lambda params: -params["w"].square().sum() / 2,
    )
    check_calibration(fs.baoa(0.2, nbeta=4.0, friction=2.0), model, num_simulations=500)
    with pytest.raises(AssertionError, match="chains diverged"):
        check_calibration(fs.sgld(50.0, nbeta=4.0), model, num_simulations=20)


def test_a_localization_of_each_chains_own_is_refused():
    with pytest.raises(ValueError, match=r"needs an anchor that all .* got 2.0 and no anchor"):
        check_calibration(fs.sgld(0.1, nbeta=1.0, localization=2.0), REGRESSION)
    sweep = fs.sgld(torch.tensor([0.1, 0.2]), nbeta=1.0)
    with pytest.raises(ValueError, match="settings must be shared by all chains, got 2"):
        check_calibration(sweep, REGRESSION)
    weighted = SPECS["contour_sgld"].make(0.1, nbeta=1.0, **SPECS["contour_sgld"].settings)
    with pytest.raises(ValueError, match="draws must all count alike"):
        check_calibration(weighted, REGRESSION, num_simulations=20, num_steps=1)
