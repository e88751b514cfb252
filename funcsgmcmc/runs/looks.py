"""Looks at all data, which a run takes at some of its draws."""

from typing import NamedTuple

import torch
from torch import Tensor


class Look(NamedTuple):
    """What a look finds at a draw of each chain, each `[*chains]`.

    Attributes:
        loss: L_n(w), on all data.
        virial: ⟨w − w₀, nβ g⟩, with g the gradient on all data.
        force: ⟨nβ g, m ∇U⟩: of ‖∇U‖², the part that the loss has.
        noise: (nβ)² (ĝ − g)ᵀ m (ĝ − g), with ĝ the gradient as the step estimates it.
    """

    loss: Tensor
    virial: Tensor
    force: Tensor
    noise: Tensor


class Looks(NamedTuple):
    """Looks at all data, K of them at some draws; `[C, K]` each unless said.

    Attributes:
        draws: Indices of the draws, `[K]`.
        losses: L_n(w).
        virials: As in `Look`.
        forces: As in `Look`.
        noises: As in `Look`.
        num_examples: How many examples were evaluated; None if their number is not known.
        is_all: Whether these are all data; else they are a fixed part, evenly spread.
    """

    draws: Tensor
    losses: Tensor
    virials: Tensor
    forces: Tensor
    noises: Tensor
    num_examples: int | None
    is_all: bool

    @classmethod
    def of(cls, look: Look, every: int, num_examples: int | None, is_all: bool) -> "Looks":
        """Those that a run recorded, of every so many draws the last."""
        draws = torch.arange(1, look.loss.shape[1] + 1) * every - 1
        return cls(draws, *look, num_examples, is_all)

    def of_chains(self, rows: Tensor) -> "Looks":
        """Those of some chains."""
        return self._replace(
            losses=self.losses[rows],
            virials=self.virials[rows],
            forces=self.forces[rows],
            noises=self.noises[rows],
        )

    def followed_by(self, more: "Looks", num_draws: int) -> "Looks":
        """Those of this run, of some draws, and of one that went on from it."""
        return self._replace(
            draws=torch.cat([self.draws, more.draws + num_draws]),
            losses=torch.cat([self.losses, more.losses], 1),
            virials=torch.cat([self.virials, more.virials], 1),
            forces=torch.cat([self.forces, more.forces], 1),
            noises=torch.cat([self.noises, more.noises], 1),
        )


def followed(one: Looks | None, two: Looks | None, num_draws: int) -> Looks | None:
    """The looks of two runs; None where one has none, or they looked at other examples."""
    if one is None or two is None or one.num_examples != two.num_examples:
        return None
    return one.followed_by(two, num_draws)
