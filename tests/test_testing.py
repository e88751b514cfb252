"""`funcsgmcmc.testing` itself: what it finds, how small it makes it, and what it refuses."""

import math
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc import random, terms, tree
from funcsgmcmc.samplers.langevin import langevin
from funcsgmcmc.samplers.sgld import SGLD
from funcsgmcmc.testing import (
    LAWS,
    PROFILES,
    SPECS,
    Given,
    Model,
    Problem,
    Quadratic,
    SamplerSpec,
    check_calibration,
    check_law,
    check_laws,
    check_log_prior,
    check_preconditioner,
    check_refusals,
    check_stationary,
    law,
    laws,
    oracles,
    strategies,
)
from funcsgmcmc.testing.calibration import _p_values, _smallest_scale_error

UNSHRUNK = hypothesis.settings(PROFILES["default"], phases=[Phase.generate])
PAGE = Path(__file__).parents[1] / "docs" / "testing.md"


def broken(kind: type) -> SamplerSpec:
    """SGLD with another class, that takes preconditioners and all."""

    def broken_sgld(lr, *, nbeta, noise_level=1.0, preconditioner=None, **settings):
        settings |= {"noise_level": noise_level, "preconditioner": preconditioner}
        sampler = fs.sgld(lr, nbeta=nbeta, **settings)
        fields = {name: getattr(sampler, name) for name in sampler.__dataclass_fields__}
        return kind(**fields, batch_size=sampler.shape, lock=False)

    spec = SPECS["sgld"]
    return SamplerSpec(
        broken_sgld,
        ranges=spec.ranges,
        reference_step=spec.reference_step,
        reference_start=spec.reference_start,
        units=spec.units,
    )


class WritesToNoise(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        for _, leaf in tree.leaves(noise):
            leaf.mul_(0.5)
        return super().advance(state, evaluation, noise)


class SharesParams(SGLD, frozen=True):
    def init(self, params, noise=None):
        return super().init(params, noise).replace(params=params)


class DrawsItself(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        return super().advance(state, evaluation, tree.map_leaves(torch.randn_like, noise))


class WidensParams(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        return after.replace(params=after.params.double()), made


class ForgetsItsStep(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        return after.replace(step=state.step), made


class SquaresGradients(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        huge = tree.map_leaves(lambda leaf: leaf**9 / (1 + leaf**8), evaluation.grads)
        return super().advance(state, evaluation._replace(grads=huge), noise)


class MixesChains(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        if state.shape:
            noise = tree.map_leaves(lambda leaf: leaf.roll(1, 0), noise)
        return super().advance(state, evaluation, noise)


class SpreadsFailures(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        mean = tree.map_leaves(lambda leaf: leaf + 0 * leaf.sum(), evaluation.grads)
        return super().advance(state, evaluation._replace(grads=mean), noise)


class LooksAhead(SGLD, frozen=True):
    def at(self, step):
        return super().at(step + 1)


class SharesNoiseOfLeaves(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        _, first = next(iter(tree.leaves(noise)))
        number = first.reshape(*state.shape, -1).mean(-1)
        same = tree.map_leaves(lambda leaf: tree.expand_right(number, leaf) + 0 * leaf, noise)
        return super().advance(state, evaluation, same)


class ClipsEntries(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        clipped = tree.map_leaves(lambda leaf: leaf.clamp(-1, 1), evaluation.grads)
        return super().advance(state, evaluation._replace(grads=clipped), noise)


class CubesNoise(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        cubed = tree.map_leaves(lambda leaf: leaf**3, noise)
        return super().advance(state, evaluation, cubed)


class ReportsHalfOfTheNoise(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        half = terms.Term(made.noise.coefficient / 2, made.noise.direction)
        return after, made._replace(noise=half)


class IsNeverCold(SGLD, frozen=True):
    def at(self, step):
        now = super().at(step)
        fields = {name: getattr(now, name) for name in now.__dataclass_fields__}
        fields["temperature"] = torch.clamp(now.temperature, min=0.1)
        return type(now)(**fields, batch_size=now.shape, lock=False)


class HasHalfABoxMore(SGLD, frozen=True):
    def boxed(self, params, center):
        wide = None if self.bounding_box_size is None else 1.5 * self.bounding_box_size
        return params if wide is None else fs.samplers.base.boxed(params, center, wide)


class PullsAtDoubleStrength(SGLD, frozen=True):
    def parts(self, *arguments):
        parts = super().parts(*arguments)
        coefficient, direction = parts.weight_decay
        return parts._replace(weight_decay=terms.Term(2 * coefficient, direction))


class MovesWithoutStep(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        return after.replace(params=tree.map_leaves(lambda leaf: leaf + 1e-6, after.params)), made


class CountsInFloat16(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        narrow = tree.map_leaves(lambda leaf: leaf.half().to(leaf.dtype), noise)
        return super().advance(state, evaluation, narrow)


class SwapsItsTerms(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        swapped = {"localization": made.weight_decay, "weight_decay": made.localization}
        return after, made._replace(**swapped)


class MislabelsTheGradient(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        coefficient, direction = made.unscaled_grad
        return after, made._replace(unscaled_grad=terms.Term(7 * coefficient, direction))


class StaysOnTheCPU(SGLD, frozen=True):
    def init(self, params, noise=None):
        return super().init(params, noise).replace(step=torch.zeros(params.batch_size).long())


class UsesOneMask(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        if self.mask is None or not self.mask.batch_dims or not state.shape:
            return super().advance(state, evaluation, noise)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["mask"] = self.mask[:1].expand(state.shape)
        return SGLD(**fields, batch_size=self.shape, lock=False).advance(state, evaluation, noise)


class RoundsTwice(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        parts, averages = self.preconditioned(state, evaluation, noise)
        coefficient, direction = parts.noise
        parts = parts._replace(noise=terms.Term(self.noise_level * coefficient, direction))
        made = langevin(parts, self.lr)
        halfway = terms.move(state.params, minus=made.down(), plus=())
        moved = terms.move(halfway, minus=(), plus=made.up())
        return self.arrived(state, moved, averages), made


@pytest.mark.parametrize(
    ("kind", "found_by"),
    [
        (WritesToNoise, "purity"),
        (SharesParams, "ownership"),
        (DrawsItself, "purity"),
        (WidensParams, "kinds_are_kept"),
        (ForgetsItsStep, "kinds_are_kept"),
        (SquaresGradients, "finiteness"),
        (RoundsTwice, "narrow_leaves_are_rounded_once"),
        (SwapsItsTerms, "terms_are_what_they_are_called"),
        (MislabelsTheGradient, "terms_are_what_they_are_called"),
        (StaysOnTheCPU, "devices_are_kept"),
        (UsesOneMask, "vmap_is_a_loop"),
        (MovesWithoutStep, "zero_step_size"),
        (IsNeverCold, "zero_temperature"),
        (HasHalfABoxMore, "box"),
        (ReportsHalfOfTheNoise, "terms_add_up"),
        (CubesNoise, "linearity_in_noise"),
        (CountsInFloat16, "reference"),
        (MixesChains, "vmap_is_a_loop"),
        (MixesChains, "chunks_and_order"),
        (SpreadsFailures, "failures_stay_in_their_chain"),
        (LooksAhead, "schedules_are_followed"),
        (SharesNoiseOfLeaves, "splitting_a_leaf"),
        (SharesNoiseOfLeaves, "names_and_order_of_leaves"),
        (ClipsEntries, "rotation"),
        (ClipsEntries, "scale_of_the_loss"),
        (ClipsEntries, "units_of_length"),
        (CubesNoise, "reference"),
        (PullsAtDoubleStrength, "pulls_are_the_priors_gradient"),
    ],
)
def test_a_broken_sampler_breaks_a_law(kind, found_by):
    spec = broken(kind)
    (its_law,) = [each for each in LAWS if each.name == found_by]
    check_law(its_law, SPECS["sgld"], profile="quick")
    with pytest.raises(AssertionError) as caught:
        check_law(its_law, spec, profile=UNSHRUNK)
    assert caught.value.__notes__[-1].startswith(f"broken_sgld does not obey {found_by}: ")


def problem_of(error: BaseException) -> str:
    """The counterexample that hypothesis reports."""
    (note,) = [note for note in error.__notes__ if "case=" in note]
    return note


@pytest.mark.parametrize("kind", [CubesNoise, ClipsEntries, PullsAtDoubleStrength, LooksAhead])
def test_counterexamples_are_small(kind):
    with pytest.raises(AssertionError) as caught:
        check_law(laws.reference, broken(kind))
    shown = problem_of(caught.value)
    params = re.search(r"params (.*)", shown).group(1)
    assert len(re.findall(r"-?\d+\.\d+", params)) <= 2
    assert shown.count("step ") <= 2


def test_all_laws_are_checked_and_the_exempt_named():
    checked = check_laws(fs.sgld, profile="quick")
    names = {each.name for each in LAWS}
    assert {*checked.held, *checked.exempt} == names
    assert checked.exempt["reference"] == "no reference_step is given"
    assert "reference was not tried: no reference_step is given" in str(checked)


def test_the_default_dtype_is_left_alone():
    torch.set_default_dtype(torch.float32)
    check_law(laws.purity, fs.sgld, profile="quick")
    with pytest.raises(AssertionError):
        check_law(laws.purity, broken(WritesToNoise), profile="quick")
    assert torch.get_default_dtype() == torch.float32


def test_a_law_of_ones_own():
    @law(nbeta=0.0)
    def never(problem):
        """No parameter is above one."""
        assert (tree.flatten(problem.params) <= 1).all()

    with pytest.raises(AssertionError) as caught:
        check_law(never, fs.sgld)
    assert "never: No parameter is above one." in caught.value.__notes__[-1]
    shown = problem_of(caught.value)
    assert "nbeta=0.0" in shown
    assert len(re.findall(r"-?\d+\.\d+", re.search(r"params (.*)", shown).group(1))) == 1


def some(strategy, predicate):
    """An example that the strategy draws."""
    quiet = hypothesis.settings(
        max_examples=2_000, database=None, suppress_health_check=list(HealthCheck)
    )
    return hypothesis.find(strategy, predicate, settings=quiet)


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda params: any(leaf.ndim == 0 for _, leaf in tree.leaves(params)),
        lambda params: any(leaf.numel() == 0 for _, leaf in tree.leaves(params)),
        lambda params: any(isinstance(name, tuple) for name in tree.names(params)),
        lambda params: {leaf.dtype for _, leaf in tree.leaves(params)} >= {*DTYPES[:2]},
        lambda params: tree.noise_dtype(params) == torch.float32,
        lambda params: any(leaf.dtype == torch.bfloat16 for _, leaf in tree.leaves(params)),
        lambda params: tree.size(params) >= 6,
    ],
)
def test_trees_are_of_all_kinds(predicate):
    found = some(strategies.trees(dtypes=DTYPES), predicate)
    assert predicate(found)
    assert tree.size(found) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_of_all_sizes(dtype):
    limits = torch.finfo(dtype)
    numbers = strategies.any_numbers(dtype)
    for predicate in (
        lambda x: 0 < abs(x) < limits.smallest_normal,
        lambda x: abs(x) > limits.max**0.25 / 2,
        lambda x: x == 0 and math.copysign(1, x) == -1,
    ):
        some(numbers, predicate)
        as_stored = st.builds(lambda x: float(torch.tensor(x, dtype=dtype)), numbers)
        some(as_stored, predicate)


def test_samplers_of_every_kind():
    params = TensorDict({"w": torch.zeros(3, 2)}, batch_size=3)
    kinds = {type(spec.make(0.1, nbeta=1.0, **spec.settings)) for spec in SPECS.values()}
    drawn: list[fs.Sampler] = []

    @hypothesis.settings(max_examples=300, database=None)
    @hypothesis.given(strategies.samplers(params))
    def collect(sampler):
        drawn.append(sampler)

    collect()
    assert {type(sampler) for sampler in drawn} == kinds
    assert {sampler.shape for sampler in drawn} == {(), (3,)}
    assert {sampler.mask is None for sampler in drawn} == {True, False}


def test_chunkings_cut_all_chains():
    @hypothesis.given(st.data())
    def cuts(data):
        count = data.draw(st.integers(1, 9))
        sizes = data.draw(strategies.chunkings(count))
        assert sum(sizes) == count
        assert min(sizes) > 0

    cuts()
    assert len(some(strategies.chunkings(6), lambda sizes: len(sizes) == 4)) == 4


def test_problems_print_as_settings_and_numbers():
    params = TensorDict(
        {"w": torch.tensor([0.5]), "v": TensorDict({"b": torch.ones(1).bfloat16()})}
    )
    given = Given(fs.Evaluation(params, loss=torch.tensor(2.0)), params)
    settings = {"lr": fs.cosine(0.1, num_steps=3), "nbeta": 2.0, "mask": params, "anchor": None}
    shown = "{w: [0.5], v.b: [1.0] bfloat16}"
    assert repr(Problem(SPECS["sgld"], settings, params, params, (given,))) == (
        "Problem(\n"
        f"    sgld(lr=Cosine(start=0.1, end=0.0, num_steps=3.0), nbeta=2.0, mask={shown})\n"
        f"    params {shown}\n"
        f"    start {shown}\n"
        f"    step 0: grads {shown}, loss 2.0, noise {shown}\n"
        ")"
    )


# Right samplers of users must pass.


class HeavyBall(fs.Sampler, frozen=True):
    """A velocity of another name, no weight decay, and terms that say so."""

    def init(self, params, noise=None):
        start = self.start(params)
        still = tree.map_leaves(lambda leaf: 0 * tree.widened(leaf), start.params)
        kept = {name: getattr(start, name) for name in ("params", "step", "anchor")}
        return Moving(**kept, velocity=still, batch_size=start.shape, lock=False)

    def advance(self, state, evaluation, noise):
        parts = self.parts(state, evaluation, noise)
        made = terms.decompose(parts, drift=self.lr, diffusion=self.lr**0.5)
        made = made._replace(
            weight_decay=(),
            distance=(),
            momentum=terms.Term(0.5 * torch.ones_like(self.lr), state.velocity),
        )
        velocity = terms.move(
            tree.map_leaves(torch.zeros_like, state.velocity),
            minus=made.down(),
            plus=[*made.up(), made.momentum],
        )
        params = terms.move(state.params, (), [terms.Term(torch.ones_like(self.lr), velocity)])
        return state.replace(params=params, velocity=velocity, step=state.step + 1), made


class Moving(fs.State, frozen=True):
    velocity: TensorDict


def heavy_ball(lr, *, nbeta):
    """Two settings, both plain numbers."""
    if not lr >= 0:
        raise ValueError(f"lr must be >= 0, got {lr}")
    settings = {"localization": 0.0, "weight_decay": 0.0, "temperature": 1.0}
    shared = fs.samplers.base.shared_settings(
        lr=lr, nbeta=nbeta, **settings, anchor=None, mask=None, bounding_box_size=None
    )
    return HeavyBall(**shared, lock=False)


def heavy_ball_step(chain, g, eta, pull, **s):
    velocity = chain["velocity"] / 2 - s["lr"] * (s["nbeta"] * g + pull)
    velocity = velocity + math.sqrt(s["lr"]) * eta
    return {"params": chain["params"] + velocity, "velocity": velocity}


def test_a_right_sampler_of_few_settings_passes():
    spec = SamplerSpec(
        heavy_ball,
        per_chain=False,
        schedulable=(),
        reference_step=heavy_ball_step,
        units={"lr": (-1, 2)},
        isotropic=True,
    )
    checked = check_laws(spec, profile="quick")
    assert checked.exempt.keys() == {
        "zero_temperature",
        "masked_entries_stay",
        "masked_entries_are_not_seen",
        "mask_of_ones",
        "box",
        "units_of_energy",
    }


class Layerwise(fs.Preconditioner, frozen=True):
    """One number a leaf, of which each has a rate of its own."""

    rates: TensorDict

    def init(self, params):
        return tree.build({}, params.batch_size)

    def update(self, state, grads, hessian_diagonal=None):
        def gain(leaf, rate):
            row = tree.widened(leaf).reshape(*grads.batch_size, -1)
            return tree.expand_right(rate / (1 + row.norm(dim=-1)), leaf).expand(leaf.shape)

        return fs.Scaling(tree.map_leaves(gain, grads, self.rates), state)


def layerwise(params):
    rates = tree.map_leaves(lambda leaf: torch.tensor(0.5, dtype=leaf.dtype), params)
    return Layerwise(rates=rates, lock=False)


def test_a_right_preconditioner_of_whole_leaves_passes():
    checked = check_preconditioner(layerwise, entrywise=False, profile="quick")
    assert checked.exempt["splitting_a_leaf"] == "it is not entrywise"
    with pytest.raises((AssertionError, RuntimeError)):
        check_preconditioner(layerwise, profile="quick")


@pytest.mark.parametrize(
    ("log_prior", "elements"),
    [
        (lambda params: -params["w"].abs().sum(), None),
        (lambda params: (2 * params["w"].log() - params["w"]).sum(), st.floats(0.1, 5)),
        (lambda params: -params["block"]["w"].square().sum() / 2, None),
    ],
    ids=["laplace", "gamma", "nested"],
)
def test_right_log_priors_pass(log_prior, elements):
    params = {"w": torch.ones(2), "block": {"w": torch.ones(3)}}
    check_log_prior(log_prior, params, elements=elements)


# Preconditioners and log-priors.


class WrongGamma(fs.preconditioners.RMSprop, frozen=True):
    def update(self, state, grads, hessian_diagonal=None):
        scaling = super().update(state, grads, hessian_diagonal)
        return scaling._replace(correction=tree.map_leaves(torch.neg, scaling.correction))


class NegativeGain(fs.preconditioners.Identity, frozen=True):
    def update(self, state, grads, hessian_diagonal=None):
        return fs.Scaling(grads, state)


def wrong_gamma(params):
    right = fs.rmsprop(0.5, 0.3, curvature="exact")
    return WrongGamma(alpha=right.alpha, eps=right.eps, hessian=right.hessian, lock=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong_gamma, "corrections_are_the_gains_derivatives"),
        (lambda params: NegativeGain(lock=False), "gains_are_scales"),
    ],
)
def test_a_broken_preconditioner_is_found(make, message):
    with pytest.raises(AssertionError) as caught:
        check_preconditioner(make)
    assert message in caught.value.__notes__[-1]


def writes(params):
    params["w"].mul_(2.0)
    return -params["w"].square().sum()


@pytest.mark.parametrize(
    ("log_prior", "error", "message"),
    [
        (writes, AssertionError, "wrote to the parameters|the same log p twice"),
        (lambda params: -params["w"].log().sum(), AssertionError, "log p is"),
        (lambda params: -params["w"].detach().square().sum(), AssertionError, "slope of log p"),
        (
            lambda params: -(params["w"] ** 2).sqrt().sum(),
            AssertionError,
            "slope of log p is -?nan",
        ),
        (lambda params: torch.randn(()) - params["w"].sum(), AssertionError, "same log p twice"),
        (lambda params: -params["w"], ValueError, "log_prior must return a scalar"),
        (lambda params: -params["w"].sum().item(), TypeError, "log_prior must return a"),
        (
            lambda params: -params["w"].sum() * (1 if params["w"].sum() > 0 else 2),
            RuntimeError,
            "vmap",
        ),
    ],
)
def test_a_broken_log_prior_is_found(log_prior, error, message):
    with pytest.raises(error, match=message):
        check_log_prior(log_prior, {"w": torch.zeros(2)})


# What is sampled.

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


def no_momentum(chain, grads, noise, prior_pull, **settings):
    return {"w": grads}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_laws(fs.sgld(0.1, nbeta=1.0)), TypeError, "need its factory.* got SGLD"),
        (lambda: check_laws(fs.baoa), ValueError, "got no friction"),
        (lambda: check_laws(fs.sgld, laws=[]), ValueError, "at least one law, got none"),
        (lambda: check_laws(fs.sgld, laws=["purity"]), TypeError, "a law must be a Law, got str"),
        (
            lambda: SamplerSpec(fs.sgld, ranges={"lrr": (0, 1)}),
            ValueError,
            "sgld has no setting lrr",
        ),
        (
            lambda: check_law(laws.reference, SamplerSpec(fs.sgld, reference_step=no_momentum)),
            ValueError,
            "the reference must give params, got",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0, temperature=0.0)),
            ValueError,
            "Var w must be positive and finite, got",
        ),
        (
            lambda: check_stationary(
                SPECS["contour_sgld"].make(0.1, nbeta=1.0, **SPECS["contour_sgld"].settings)
            ),
            ValueError,
            "draws must all count alike",
        ),
        (
            lambda: check_calibration(fs.sgld(0.1, nbeta=1.0, localization=2.0), REGRESSION),
            ValueError,
            "localization needs an anchor that all chains share .* got 2.0 and no anchor",
        ),
        (lambda: check_laws(fs.sgld, profile="slow"), ValueError, "profile must be one of 'quick'"),
        (
            lambda: check_refusals(SamplerSpec(fs.sgld, refused=(({"lr": 0.1}, "no"),))),
            AssertionError,
            r"sgld takes \{'lr': 0.1\}; it must say 'no'",
        ),
        (
            lambda: check_refusals(SamplerSpec(fs.sgld, refused=(({"lr": -1.0}, "no"),))),
            AssertionError,
            "sgld refuses .* with 'lr must be >= 0, got -1', not with 'no'",
        ),
        (lambda: check_stationary(fs.sgld), TypeError, "sampler must be one made by a factory"),
        (
            lambda: check_stationary(fs.sgld(torch.tensor([0.1, 0.2]), nbeta=1.0)),
            ValueError,
            "settings must be shared by all chains, got 2",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0, bounding_box_size=1.0)),
            ValueError,
            "known without bounding_box_size",
        ),
        (
            lambda: check_stationary(fs.sgld(fs.cosine(0.1, num_steps=3), nbeta=1.0)),
            ValueError,
            "lr must not change with the step, got a schedule",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0), false_alarm=0.0),
            ValueError,
            "false_alarm must be between 0 and 1, got 0",
        ),
        (
            lambda: check_stationary(fs.sgld(0.1, nbeta=1.0), variance={"v": torch.ones(2)}),
            ValueError,
            "variance",
        ),
        (lambda: Quadratic({"w": torch.zeros(2)}), ValueError, "minimum|hessian"),
        (
            lambda: Quadratic({"w": torch.zeros(2)}, {"w": torch.zeros(2)}),
            ValueError,
            "hessian must be > 0, got",
        ),
        (
            lambda: oracles.gains(3, None, None, None),
            TypeError,
            "no oracle for a preconditioner of type int",
        ),
    ],
)
def test_bad_calls_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


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
    assert found.ranks.shape == (1_000, 2)
    assert found.ranks.max() == 15
    assert found.smallest_scale_error < 0.2


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
        sampler, REGRESSION, quantities=lambda params: (params["w"] > 0).double(), num_steps=200
    )


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


# The documentation, and the extra.


def test_the_page_lists_the_laws():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(each.name, each.statement) for each in LAWS]


def test_without_the_extra_it_is_named():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "try:\n    import funcsgmcmc.testing\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "funcsgmcmc.testing needs hypothesis, which is not installed: "
        "pip install 'funcsgmcmc[test]'"
    )
