"""Every sampler: what generic tests run it with, and what they hold it to.

A new sampler adds its entry, and its oracle in `oracles.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict

import funcsgmcmc as fs
import oracles


@dataclass(frozen=True)
class Entry:
    """A sampler.

    Attributes:
        name: Its factory's.
        make: The factory.
        oracle: Its step in NumPy.
        settings: Its own settings, none at a special value.
        ranges: Lowest and highest values that its own settings are drawn from.
        invalid: Settings that must be refused, with the message.
        order: Weak order of averages over w, in powers of `lr`.
        variance: Stationary Var w for U quadratic, of (lr, curvature, T, gradient variance, the
            sampler's own settings); None if it is not known in closed form.
        law_lrs: Three step sizes to test it at, for curvatures up to 7.
    """

    name: str
    make: Callable[..., fs.Sampler]
    oracle: oracles.Step
    settings: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    invalid: tuple[tuple[Mapping[str, Any], str], ...] = ()
    order: float = 1
    variance: Callable[..., Any] | None = None
    law_lrs: tuple[float, float, float] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def has_momentum(self) -> bool:
        return hasattr(self.make(0.1, nbeta=1.0, **self.settings), "refresh_interval")


def sgld_variance(lr, curvature, temperature, gradient_variance, noise_level=1.0):
    noise = noise_level**2 * temperature + lr * gradient_variance / 4
    return noise / (curvature * (1 - lr * curvature / 4))


def adam_variance(lr, curvature, beta1):
    """Of SGLD with Adam's first moment and G = 1, T = 1."""
    a = lr * curvature / 2
    above = 1 + beta1 + 2 * a * beta1 / (1 - beta1)
    return above / (curvature * (1 + beta1 - a * (1 - beta1) / 2))


def sglrw_variance(lr, curvature, temperature, gradient_variance):
    return temperature / curvature


def sghmc_variance(lr, curvature, temperature, gradient_variance, friction=0.1, noise_estimate=0.0):
    plain = temperature / curvature * (2 - friction) / (2 - friction - lr * curvature / 2)
    return plain * (friction - noise_estimate + lr * gradient_variance / 2 / temperature) / friction


def baoa_variance(lr, curvature, temperature, gradient_variance, friction):
    c = math.exp(-friction * lr)
    excess = gradient_variance * lr**2 * (1 + c) / ((1 - c) * (4 - lr**2 * curvature))
    return (temperature + excess) / curvature


REFRESH = (
    ({"refresh_interval": 0}, "refresh_interval must be >= 1, got 0"),
    ({"refresh_interval": torch.tensor([3, 0])}, "refresh_interval must be >= 1, got 0 for chain"),
)

ENTRIES = (
    Entry(
        "sgld",
        fs.sgld,
        oracles.sgld,
        settings={"noise_level": 0.9},
        ranges={"noise_level": (0, 2)},
        invalid=(({"noise_level": -1.0}, "noise_level must be >= 0, got -1"),),
        variance=sgld_variance,
        law_lrs=(0.02, 0.1, 0.3),
    ),
    Entry(
        "sglrw",
        fs.sglrw,
        oracles.sglrw,
        variance=sglrw_variance,
        # Up to here, no drift exceeds the spacing within five standard deviations.
        law_lrs=(0.008, 0.014, 0.02),
    ),
    Entry(
        "contour_sgld",
        fs.contour_sgld,
        oracles.contour_sgld,
        settings={
            "energy_range": (0.0, 30.0),
            "num_partitions": 12,
            "flatness": 0.7,
            "weight_lr": 0.05,
        },
        ranges={"flatness": (0, 1.5), "weight_lr": (0, 0.9)},
        invalid=(
            ({"flatness": -1.0}, "flatness must be >= 0, got -1"),
            ({"weight_lr": 1.0}, "weight_lr must be < 1, got 1"),
            (
                {"weight_lr": fs.polynomial_decay(3.0)},
                "weight_lr at step 0 must be < 1, got 3",
            ),
            (
                {"energy_range": (torch.zeros(2), torch.ones(3))},
                "got 2 for low energy and 3 for high energy",
            ),
            ({"num_partitions": 2}, "num_partitions must be >= 3, got 2"),
            ({"energy_range": (1.0, 1.0)}, "energy_range must be finite with low < high, got 1"),
            ({"energy_range": (0.0, math.inf)}, "energy_range must be finite"),
        ),
    ),
    Entry(
        "sghmc",
        fs.sghmc,
        oracles.sghmc,
        settings={"friction": 0.4, "noise_estimate": 0.1},
        ranges={"friction": (0.2, 1.9), "noise_estimate": (0, 0.1)},
        invalid=(
            ({"friction": -0.1}, "friction must be >= 0, got -0.1"),
            ({"friction": 2.0}, "friction must be < 2, got 2"),
            ({"friction": math.nan}, "friction must be >= 0, got nan"),
            ({"noise_estimate": 0.5}, "noise_estimate must be <= friction, got 0.5 and 0.4"),
            *REFRESH,
        ),
        variance=sghmc_variance,
        law_lrs=(0.02, 0.1, 0.2),
    ),
    Entry(
        "sgnht",
        fs.sgnht,
        oracles.sgnht,
        settings={"diffusion_factor": 0.1},
        ranges={"diffusion_factor": (0, 1)},
        order=0.5,  # in ε, with A in proportion to √ε
        invalid=(({"diffusion_factor": -1.0}, "diffusion_factor must be >= 0, got -1"), *REFRESH),
    ),
    Entry(
        "baoa",
        fs.baoa,
        oracles.baoa,
        settings={"friction": 2.0},
        ranges={"friction": (0, 5)},
        invalid=(({"friction": -1.0}, "friction must be >= 0, got -1"), *REFRESH),
        order=2,
        variance=baoa_variance,
        law_lrs=(0.1, 0.3, 0.6),
    ),
    Entry(
        "badoda",
        fs.badoda,
        oracles.badoda,
        settings={"diffusion_factor": 1.5, "thermostat_mass": 0.8},
        ranges={"diffusion_factor": (0, 5), "thermostat_mass": (0.2, 5)},
        invalid=(
            ({"diffusion_factor": -1.0}, "diffusion_factor must be >= 0, got -1"),
            ({"thermostat_mass": 0.0}, "thermostat_mass must be > 0, got 0"),
            *REFRESH,
        ),
        order=2,
    ),
)


@dataclass(frozen=True)
class Case:
    """A sampler with settings, made for given parameters."""

    name: str
    make: Callable[[TensorDict], fs.Sampler]

    def __str__(self) -> str:
        return self.name


def some_mask(params: TensorDict) -> TensorDict:
    """Every third entry stays, one in three moves at half speed."""
    return TensorDict(
        {
            name: torch.tensor([0.0, 1.0, 0.5])
            .repeat(leaf.numel())[: leaf.numel()]
            .view(leaf.shape)
            for name, leaf in params.items(True, True)
        }
    )


def everything(params: TensorDict) -> dict[str, Any]:
    """All settings that samplers share, none at its default."""
    return {
        "temperature": 0.8,
        "localization": 2.0,
        "weight_decay": 0.5,
        "anchor": params.apply(lambda leaf: leaf + 0.01),
        "bounding_box_size": 0.2,
        "mask": some_mask(params),
    }


def plain_case(entry: Entry) -> Case:
    return Case(entry.name, lambda params: entry.make(1e-3, nbeta=3.0, **entry.settings))


def full_case(entry: Entry) -> Case:
    """With everything, a schedule among it."""

    def make(params: TensorDict) -> fs.Sampler:
        settings = dict(entry.settings) | everything(params)
        if entry.has_momentum:
            settings["refresh_interval"] = 3
        return entry.make(fs.cosine(1e-2, 5e-3, num_steps=4), nbeta=3.0, **settings)

    return Case(f"{entry.name} with everything", make)


def preconditioned(name: str, make: Callable[[TensorDict], fs.Preconditioner]) -> Case:
    return Case(
        name,
        lambda params: fs.sgld(
            1e-2, nbeta=3.0, mask=some_mask(params), preconditioner=make(params)
        ),
    )


CASES = [
    *(plain_case(entry) for entry in ENTRIES),
    *(full_case(entry) for entry in ENTRIES),
    Case("rmsprop_sgld", lambda params: fs.rmsprop_sgld(1e-2, nbeta=3.0, localization=2.0)),
    Case(
        "cyclical_sgld",
        lambda params: fs.cyclical_sgld(1e-2, nbeta=3.0, num_steps_per_cycle=4, exploration=0.5),
    ),
    preconditioned("exact curvature", lambda params: fs.rmsprop(0.9, 0.2, curvature="exact")),
    preconditioned("hutchinson", lambda params: fs.rmsprop(0.9, 0.2, curvature="hutchinson")),
    preconditioned("adam", lambda params: fs.adam(0.8, 0.9, 0.2)),
    preconditioned(
        "composed, curvature first",
        lambda params: fs.compose(fs.rmsprop(0.9, 0.2, curvature="exact"), fs.identity()),
    ),
    preconditioned(
        "composed",
        lambda params: fs.compose(
            fs.diagonal(params.apply(lambda leaf: leaf.square() + 0.1)),
            fs.adam(0.8, 0.9, 0.2),
            fs.rmsprop(0.9, 0.2, curvature="exact"),
        ),
    ),
]
BY_NAME = {case.name: case for case in CASES}
