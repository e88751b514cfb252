"""Samplers that whole runs are tested with: all of the registry, plain and with everything."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc.testing import SPECS, SamplerSpec


@dataclass(frozen=True)
class Case:
    """A sampler with settings, made for given parameters."""

    name: str
    make: Callable[[TensorDict], fs.samplers.Sampler]

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


def plain_case(spec: SamplerSpec) -> Case:
    return Case(spec.name, lambda params: spec.make(1e-3, nbeta=3.0, **spec.settings))


def full_case(spec: SamplerSpec) -> Case:
    """With everything, a schedule among it."""

    def make(params: TensorDict) -> fs.samplers.Sampler:
        settings = dict(spec.settings) | everything(params)
        if spec.has_momentum:
            settings["refresh_interval"] = 3
        lr = fs.schedules.cosine(1e-2, 5e-3, num_steps=4) if "lr" in spec.schedulable else 1e-2
        return spec.make(lr, nbeta=3.0, **settings)

    return Case(f"{spec.name} with everything", make)


def preconditioned(
    name: str, make: Callable[[TensorDict], fs.preconditioners.Preconditioner]
) -> Case:
    return Case(
        name,
        lambda params: fs.sgld(
            1e-2, nbeta=3.0, mask=some_mask(params), preconditioner=make(params)
        ),
    )


CASES = [
    *(plain_case(spec) for spec in SPECS.values()),
    *(full_case(spec) for spec in SPECS.values()),
    preconditioned(
        "exact curvature", lambda params: fs.preconditioners.rmsprop(0.9, 0.2, curvature="exact")
    ),
    preconditioned(
        "hutchinson", lambda params: fs.preconditioners.rmsprop(0.9, 0.2, curvature="hutchinson")
    ),
    preconditioned("adam", lambda params: fs.preconditioners.adam(0.8, 0.9, 0.2)),
    preconditioned(
        "composed, curvature first",
        lambda params: fs.preconditioners.compose(
            fs.preconditioners.rmsprop(0.9, 0.2, curvature="exact"), fs.preconditioners.identity()
        ),
    ),
    preconditioned(
        "composed",
        lambda params: fs.preconditioners.compose(
            fs.preconditioners.diagonal(params.apply(lambda leaf: leaf.square() + 0.1)),
            fs.preconditioners.adam(0.8, 0.9, 0.2),
            fs.preconditioners.rmsprop(0.9, 0.2, curvature="exact"),
        ),
    ),
]
BY_NAME = {case.name: case for case in CASES}
