"""What a run of `sample` returns."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc.metrics import Metrics
from funcsgmcmc.samplers.base import Sampler, State

if TYPE_CHECKING:
    from xarray import DataTree

    from funcsgmcmc.diagnostics import Summary
    from funcsgmcmc.llc import LLC


@dataclass(frozen=True)
class Frozen:
    """Why and when a chain was frozen.

    Attributes:
        chain: Index of the chain.
        step: The step that failed; the chain stays at the parameters before it.
        reason: What was not finite.
    """

    chain: int
    step: int
    reason: str

    def __str__(self) -> str:
        return f"chain {self.chain} frozen at step {self.step}: {self.reason}"


def _tensors(settings: list[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(settings) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Samples:
    """Record of a run: C chains, T steps, D draws.

    Step t evaluates its loss at the parameters w_t before it, and draw d is made at step
    `draw_steps[d]`: the draw, its observables, its loss and its metrics belong to the same w_t.

    A frozen chain keeps its place: its losses are NaN after the step that failed, its draws and
    observables repeat its last finite parameters. Estimates and diagnostics leave it out.

    Attributes:
        losses: L(w_t) on step t's batch, `[C, T]`.
        draws: Parameters, leaves `[C, D, *shape]`; None if not asked for.
        observables: Name to values `[C, D, …]`.
        log_weights: Logs of the draws' importance weights, `[C, D]`, NaN from where a chain was
            frozen; None if all count alike.
        metrics: Each `[C, T]`; None if not asked for.
        state: The chains after the last step, of batch size `[C]`.
        sampler: The sampler, with its anchor.
        key: The run's key.
        chains: Indices of the chains, `[C]`.
        initial_loss: L(w₀) on all data, `[]`, or `[C]` for an anchor per chain; None if the data
            could not be passed over.
        frozen_at: Step at which a chain was frozen, `[C]`; −1 for healthy chains.
        draw_steps: The step of each draw, `[D]`: the last of every `num_steps_between_draws` steps
            after burn-in; where the temperature is scheduled, only those count that a step at T > 0
            led to.
        num_burnin_steps: Steps before the first draw's.
        num_steps_between_draws: Steps a draw.
        chain_method: How the chains were run, `"vmap"` or `"loop"`.
    """

    losses: Tensor
    draws: TensorDict | None
    observables: dict[str, Tensor]
    log_weights: Tensor | None
    metrics: Metrics | None
    state: State
    sampler: Sampler
    key: Tensor
    chains: Tensor
    initial_loss: Tensor | None
    frozen_at: Tensor
    draw_steps: Tensor
    num_burnin_steps: int
    num_steps_between_draws: int
    chain_method: str

    @property
    def num_chains(self) -> int:
        """C."""
        return self.losses.shape[0]

    @property
    def num_steps(self) -> int:
        """T, the number of steps made."""
        return self.losses.shape[1]

    @property
    def num_draws(self) -> int:
        """D, the number of draws made."""
        return len(self.draw_steps)

    @property
    def draw_losses(self) -> Tensor:
        """L(w) on the draws' batches, `[C, D]`."""
        return self.losses[:, self.draw_steps]

    @property
    def healthy(self) -> Tensor:
        """Which chains were not frozen, bool `[C]`."""
        return self.frozen_at < 0

    @property
    def frozen(self) -> list[Frozen]:
        """The frozen chains, each with its step and the reason."""
        report = []
        for row in (~self.healthy).nonzero().flatten().tolist():
            step = int(self.frozen_at[row])
            loss = float(self.losses[row, step])
            finite = torch.isfinite(self.losses[row, step])
            reason = "its state is not finite after the update" if finite else f"loss is {loss}"
            report.append(Frozen(int(self.chains[row]), step, reason))
        return report

    @property
    def is_sweep(self) -> bool:
        """Whether chains have different settings, so that they do not sample one distribution.

        Their anchors may differ, as those of chains with different starts do.
        """
        if not self.sampler.shape:
            return False
        settings = [
            getattr(self.sampler, name)
            for name in self.sampler.__dataclass_fields__
            if name != "anchor"
        ]
        return any(bool((leaf != leaf[:1]).any()) for leaf in _tensors(settings))

    def health(self) -> str:
        """One line that says how many chains estimates use, and one for each frozen chain."""
        used = f"{int(self.healthy.sum())} of {self.num_chains} chains"
        if self.is_sweep:
            used += ", which have different settings: what is pooled over them mixes these"
        return "\n".join([used, *map(str, self.frozen)])

    def llc(self) -> "LLC":
        """Estimate the local learning coefficient; see `funcsgmcmc.llc.llc`."""
        from funcsgmcmc.llc import llc

        return llc(self)

    def summary(self) -> "Summary":
        """Estimates and diagnostics as a table; see `funcsgmcmc.diagnostics.summary`."""
        from funcsgmcmc.diagnostics import summary

        return summary(self)

    def to_datatree(self) -> "DataTree":
        """The record for ArviZ; see `funcsgmcmc.diagnostics.to_datatree`."""
        from funcsgmcmc.diagnostics import to_datatree

        return to_datatree(self)
