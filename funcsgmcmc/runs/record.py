"""The record that a run returns, and the errors that carry one."""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc.norms import Metrics
from funcsgmcmc.samplers.base import Sampler, State


@dataclass(frozen=True)
class Frozen:
    """Why and when a chain was frozen.

    Attributes:
        chain: Index of the chain.
        step: The step that failed; the chain stays at the parameters before it.
        reason: Names the value that was not finite.
    """

    chain: int
    step: int
    reason: str

    def __str__(self) -> str:
        return f"chain {self.chain} frozen at step {self.step}: {self.reason}"


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
            after burn-in. Where the temperature is scheduled, a step counts only if a step at T > 0
            led to it.
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
        """The number of chains, C."""
        return self.losses.shape[0]

    @property
    def num_steps(self) -> int:
        """The number of steps made, T."""
        return self.losses.shape[1]

    @property
    def num_draws(self) -> int:
        """The number of draws made, D."""
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
            # A step fails by its loss, or else by the state that it led to.
            finite = torch.isfinite(self.losses[row, step])
            reason = "its state is not finite after the update" if finite else f"loss is {loss}"
            report.append(Frozen(int(self.chains[row]), step, reason))
        return report

    @property
    def is_sweep(self) -> bool:
        """Whether chains have different settings, so that they do not sample one distribution."""
        if not self.sampler.shape:
            return False
        # Anchors may differ in one experiment, as those of chains with different starts do.
        names = [name for name in self.sampler.__dataclass_fields__ if name != "anchor"]
        settings = [getattr(self.sampler, name) for name in names]
        leaves = [leaf for leaf in pytree.tree_leaves(settings) if isinstance(leaf, Tensor)]
        return any(bool((leaf != leaf[:1]).any()) for leaf in leaves)

    def health(self) -> str:
        """Say how many chains estimates use, in one line, and why others were frozen."""
        used = f"{int(self.healthy.sum())} of {self.num_chains} chains"
        if self.is_sweep:
            used += ", which have different settings: what is pooled over them mixes these"
        return "\n".join([used, *map(str, self.frozen)])

    def usable_chains(self) -> Tensor:
        """The chains that estimates use: the healthy ones, bool `[C]`.

        Raises:
            ValueError: No draw was made, or no chain is healthy.
        """
        if self.num_draws < 1:
            raise ValueError("estimates need at least one draw, got a run that stopped in burn-in")
        if not self.healthy.any():
            raise ValueError(
                f"estimates need at least one healthy chain, got {self.num_chains} frozen ones: "
                "lower lr, or see samples.frozen for the reasons"
            )
        return self.healthy

    def check_unweighted(self) -> None:
        """Refuse draws that do not count alike, for a plain average.

        Raises:
            ValueError: They have weights.
        """
        if self.log_weights is not None:
            raise ValueError(
                "the draws have weights (samples.log_weights), which a plain average would ignore: "
                "use weighted_mean(values[samples.healthy], samples.log_weights[samples.healthy]), "
                "with values from samples.observables or llc_draws(samples)"
            )


class SamplingError(RuntimeError):
    """A run stopped before its end.

    Attributes:
        samples: The record until then.
    """

    def __init__(self, message: str, samples: Samples) -> None:
        super().__init__(message)
        self.samples = samples


class DivergenceError(SamplingError):
    """A chain became non-finite, and `on_divergence="raise"` was asked for."""


def check_initial_loss(value: Any, num_chains: int) -> Tensor:
    """Check L(w₀).

    Returns:
        float64, `[]` or `[num_chains]`, detached, on the CPU.

    Raises:
        TypeError: It is not a real number or tensor.
        ValueError: It has another shape, or is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"initial_loss must be a number or a tensor, got {type(value).__name__}")
    # Users pass the loss that they have computed, with its graph and on its device.
    loss = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if loss.shape not in (torch.Size(), torch.Size((num_chains,))):
        raise ValueError(
            f"initial_loss must have shape () or ({num_chains},), got shape {tuple(loss.shape)}"
        )
    if not loss.isfinite().all():
        raise ValueError(f"initial_loss must be finite, got {loss.tolist()}")
    return loss
