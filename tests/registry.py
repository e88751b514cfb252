"""Every sampler, with settings that generic tests run it with. A new sampler adds its entries."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict

from funcsgmcmc import Sampler, rmsprop_sgld, sghmc, sgld, sgnht


@dataclass(frozen=True)
class Case:
    """A sampler with settings, made for given parameters."""

    name: str
    make: Callable[[TensorDict], Sampler]

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


CASES = [
    Case("sgld", lambda params: sgld(1e-2, nbeta=3.0)),
    Case(
        "sgld with everything",
        lambda params: sgld(
            1e-2,
            nbeta=3.0,
            localization=2.0,
            weight_decay=0.5,
            noise_level=0.9,
            anchor=params.apply(lambda leaf: leaf + 0.01),
            bounding_box_size=0.2,
            mask=some_mask(params),
        ),
    ),
    Case("rmsprop_sgld", lambda params: rmsprop_sgld(1e-2, nbeta=3.0, localization=2.0)),
    Case(
        "rmsprop_sgld, masked",
        lambda params: rmsprop_sgld(
            1e-2, nbeta=3.0, alpha=0.9, eps=0.2, weight_decay=1.0, mask=some_mask(params)
        ),
    ),
    Case("sghmc", lambda params: sghmc(1e-3, nbeta=3.0, localization=2.0)),
    Case(
        "sghmc with everything",
        lambda params: sghmc(
            1e-2,
            nbeta=3.0,
            friction=0.4,
            noise_estimate=0.1,
            localization=2.0,
            weight_decay=0.5,
            anchor=params.apply(lambda leaf: leaf + 0.01),
            bounding_box_size=0.2,
            mask=some_mask(params),
        ),
    ),
    Case("sgnht", lambda params: sgnht(1e-3, nbeta=3.0, localization=2.0)),
    Case(
        "sgnht with everything",
        lambda params: sgnht(
            1e-2,
            nbeta=3.0,
            diffusion_factor=0.1,
            localization=2.0,
            weight_decay=0.5,
            anchor=params.apply(lambda leaf: leaf + 0.01),
            bounding_box_size=0.2,
            mask=some_mask(params),
        ),
    ),
]
