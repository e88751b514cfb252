"""What users might write: samplers and preconditioners, right ones and broken ones."""

import dataclasses
import math
from collections.abc import Callable
from typing import Unpack

import torch
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc import tree
from funcsgmcmc.preconditioners import Identity, Preconditioner, RMSprop, Scaling
from funcsgmcmc.samplers import Sampler, State, Term
from funcsgmcmc.samplers.baoa import BAOA
from funcsgmcmc.samplers.base import clamp_to_box
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.samplers.sgld import SGLD
from funcsgmcmc.terms import Factors, add, combine, move, step_terms
from funcsgmcmc.testing import SPECS, SamplerSpec


class HeavyBall(Sampler, frozen=True):
    """A velocity of another name, no weight decay, and terms that say so."""

    def init(self, params, noise=None):
        start = self.start(params)
        still = tree.map_leaves(lambda leaf: 0 * tree.widened(leaf), start["params"])
        return Moving(**start, velocity=still)

    def advance(self, state, evaluation, noise):
        slope = self.slope(state, evaluation)._replace(weight_decay=None, distance=None)
        one = torch.ones_like(self.lr)
        made = step_terms(
            slope,
            Factors(),
            Term(self.lr**0.5, noise),
            drift=self.lr,
            momentum=Term(one / 2, state.velocity),
        )
        velocity = made.total()
        params = add(state.params, Term(one, velocity))
        return state.replace(params=params, velocity=velocity, step=state.step + 1), made


class Moving(State, frozen=True):
    velocity: TensorDict


def heavy_ball(lr, *, nbeta):
    """Two settings, both plain numbers."""
    if not lr >= 0:
        raise ValueError(f"lr must be >= 0, got {lr}")
    return build(HeavyBall, lr, {"nbeta": nbeta})


def heavy_ball_step(chain, g, eta, pull, **s):
    velocity = chain["velocity"] / 2 - s["lr"] * (s["nbeta"] * g + pull)
    velocity = velocity + math.sqrt(s["lr"]) * eta
    return {"params": chain["params"] + velocity, "velocity": velocity}


class Layerwise(Preconditioner, frozen=True):
    """One number a leaf, of which each has a rate of its own."""

    rates: TensorDict

    def init(self, params):
        return tree.build({}, params.batch_size)

    def update(self, state, grads, hessian_diagonal=None):
        def gain(leaf, rate):
            row = tree.widened(leaf).reshape(*grads.batch_size, -1)
            return tree.expand_right(rate / (1 + row.norm(dim=-1)), leaf).expand(leaf.shape)

        return Scaling(tree.map_leaves(gain, grads, self.rates), state)


def layerwise(params):
    rates = tree.map_leaves(lambda leaf: torch.tensor(0.5, dtype=leaf.dtype), params)
    return Layerwise(rates=rates, lock=False)


def broken(kind: type) -> SamplerSpec:
    """SGLD, with preconditioners and all, or BAOA with another class."""
    if issubclass(kind, BAOA):
        return dataclasses.replace(SPECS["baoa"], make=broken_baoa(kind), name="")

    def broken_sgld(lr, *, nbeta, noise_level=1.0, preconditioner=None, **settings):
        settings |= {"noise_level": noise_level, "preconditioner": preconditioner}
        sampler = fs.sgld(lr, nbeta=nbeta, **settings)
        fields = {name: getattr(sampler, name) for name in sampler.__dataclass_fields__}
        return kind(**fields, batch_size=sampler.shape, lock=False)

    spec = SPECS["sgld"]
    return SamplerSpec(
        broken_sgld,
        ranges=spec.ranges,
        oracle_step=spec.oracle_step,
        oracle_start=spec.oracle_start,
        units=spec.units,
    )


def broken_baoa(kind: type) -> Callable[..., Sampler]:
    """A factory like `baoa`."""

    def broken_baoa(lr, *, nbeta, friction, refresh_interval=None, **settings):
        settings |= {"friction": friction, "refresh_interval": refresh_interval}
        sampler = fs.baoa(lr, nbeta=nbeta, **settings)
        fields = {name: getattr(sampler, name) for name in sampler.__dataclass_fields__}
        return kind(**fields, batch_size=sampler.shape, lock=False)

    return broken_baoa


class StartsHot(BAOA, frozen=True):
    """Its first momenta have the temperature 1."""

    def init(self, params, noise=None):
        return super().init(params, noise).replace(momentum=noise)


class StartsLate(BAOA, frozen=True):
    """Its first momenta have the temperature of step 1."""

    def init(self, params, noise=None):
        one = torch.ones(self.shape, dtype=torch.int64)
        now = self.at(one)
        fields = {name: getattr(now, name) for name in now.__dataclass_fields__}
        later = BAOA(**fields, batch_size=self.shape, lock=False)
        return later.init(params, noise)


class TiresAfterFiveSteps(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        tired = tree.expand_right((state.step > 5).double(), torch.zeros(state.shape))
        kept = tree.map_leaves(
            lambda new, old: torch.where(tree.expand_right(tired, new) > 0, old, new),
            after.params,
            state.params,
        )
        return after.replace(params=kept), made


class PullsToWhereItIs(SGLD, frozen=True):
    """Without a log-prior its localization has the wrong center."""

    def slope(self, state, evaluation):
        slope = super().slope(state, evaluation)
        if evaluation.prior_pull is not None:
            return slope
        return slope._replace(localization=Term(self.localization, state.params))


class MakesAnAnchor(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        return after.replace(anchor=self.center(state)), made


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
        return super().advance(state, dataclasses.replace(evaluation, grads=huge), noise)


class MixesChains(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        if state.shape:
            noise = tree.map_leaves(lambda leaf: leaf.roll(1, 0), noise)
        return super().advance(state, evaluation, noise)


class SpreadsFailures(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        mean = tree.map_leaves(lambda leaf: leaf + 0 * leaf.sum(), evaluation.grads)
        return super().advance(state, dataclasses.replace(evaluation, grads=mean), noise)


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
        return super().advance(state, dataclasses.replace(evaluation, grads=clipped), noise)


class CubesNoise(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        cubed = tree.map_leaves(lambda leaf: leaf**3, noise)
        return super().advance(state, evaluation, cubed)


class ReportsHalfOfTheNoise(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        return after, made.with_noise(made.noise.times(0.5))


class IsNeverCold(SGLD, frozen=True):
    def at(self, step):
        now = super().at(step)
        return now.replace(temperature=torch.clamp(now.temperature, min=0.1))


class HasHalfABoxMore(SGLD, frozen=True):
    def boxed(self, params, center):
        wide = None if self.bounding_box_size is None else 1.5 * self.bounding_box_size
        return params if wide is None else clamp_to_box(params, center, wide)


class PullsAtDoubleStrength(SGLD, frozen=True):
    def slope(self, state, evaluation):
        slope = super().slope(state, evaluation)
        return slope._replace(weight_decay=slope.weight_decay.times(2))


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
        return after, dataclasses.replace(made, **swapped)


class MislabelsTheGradient(SGLD, frozen=True):
    def advance(self, state, evaluation, noise):
        after, made = super().advance(state, evaluation, noise)
        return after, dataclasses.replace(made, unscaled_grad=made.unscaled_grad.times(7))


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
        after, made = super().advance(state, evaluation, noise)
        halfway = combine(state.params, minus=made.down(), plus=())
        params = self.boxed(add(halfway, *made.up()), self.center(state))
        return after.replace(params=params), made


class WrongGamma(RMSprop, frozen=True):
    def update(self, state, grads, hessian_diagonal=None):
        scaling = super().update(state, grads, hessian_diagonal)
        return scaling._replace(correction=tree.map_leaves(torch.neg, scaling.correction))


class NegativeGain(Identity, frozen=True):
    def update(self, state, grads, hessian_diagonal=None):
        return Scaling(grads, state)


def wrong_gamma(params):
    right = fs.preconditioners.rmsprop(0.5, 0.3, curvature="exact")
    return WrongGamma(alpha=right.alpha, eps=right.eps, hessian=right.hessian, lock=False)


class KeptNoise(State, frozen=True):
    """State with the noise of the last step."""

    noise: TensorDict


class LeimkuhlerMatthews(Sampler, frozen=True):
    """A right sampler with its last noise in its state: w' = w − (ε/2) m ∇U + √(εT) m (η + η')/2.

    Source: Leimkuhler and Matthews 2013: of weak order 2, exact on quadratics.
    """

    def init(self, params, noise=None):
        return KeptNoise(**self.start(params), noise=noise.clone())

    def advance(self, state, evaluation, noise):
        both = tree.map_leaves(lambda a, b: (a + b) / 2, state.noise, noise)
        shock = Term((self.lr * self.temperature) ** 0.5, both)
        factors = Factors(self.mask, self.mask, self.mask)
        terms = step_terms(self.slope(state, evaluation), factors, shock, drift=self.lr / 2)
        params = self.boxed(move(state.params, terms), self.center(state))
        return state.replace(params=params, noise=noise.clone(), step=state.step + 1), terms


@takes_shared_settings
def leimkuhler_matthews(lr, **shared: Unpack[SharedSettings]):
    return build(LeimkuhlerMatthews, lr, shared)
