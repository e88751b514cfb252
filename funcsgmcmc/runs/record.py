"""The record that a run returns."""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, shards
from funcsgmcmc.norms import Metrics
from funcsgmcmc.runs.looks import Looks, followed
from funcsgmcmc.runs.moments import DrawMoments, Moments, ObservableMoments
from funcsgmcmc.runs.rows import rows_of, setting_labels
from funcsgmcmc.samplers.base import Sampler, State

M = TypeVar("M", bound=Moments)
AnyClass = TypeVar("AnyClass", State, Sampler)


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


@dataclass(frozen=True, eq=False)
class Draw:
    """One draw of each chain, as `on_draw` is given it when it has been recorded.

    Attributes:
        index: Index of the draw, from 0.
        step: The step that it was made at.
        losses: L(w) on the draws' batches, `[C]`; NaN for frozen chains.
        distances: ‖w − w₀‖, `[C]`; NaN for frozen chains.
        observables: Name to values `[C, …]`.
        params: w, leaves `[C, *shape]`.
        healthy: Which chains are not frozen, bool `[C]`.
    """

    index: int
    step: int
    losses: Tensor
    distances: Tensor
    observables: dict[str, Tensor]
    params: TensorDict
    healthy: Tensor


@dataclass(frozen=True, repr=False)
class Samples:
    """Record of a run: C chains, T steps, D draws.

    Step t evaluates its loss at the parameters w_t before it, and draw d is made at step
    `draw_steps[d]`: the draw, its observables, its loss and its metrics belong to the same w_t.
    Steps are counted from a chain's first one: a run that goes on from another begins at its
    `first_step`, which is the first that `losses` and `metrics` hold.

    `samples[rows]` is the record of some chains: an index, a slice, a list, or a tensor of indices
    or of booleans, such as `samples.healthy`. `samples.groups()` parts a sweep by its settings.

    A frozen chain keeps its place: its losses and distances are NaN after the step that failed, its
    draws and observables repeat its last finite parameters. Estimates and diagnostics leave it out.

    Attributes:
        losses: L(w_t) on the step's batch, `[C, T]`.
        distances: ‖w_t − w₀‖, over all parameters, `[C, T]`.
        looks: What all data says at some draws; None if it was not evaluated.
        draws: Parameters, leaves `[C, D, *shape]`; None if not asked for.
        observables: Name to values `[C, D, …]`; empty if their moments were asked for.
        draw_moments: Means and variances of each chain's parameters over its draws, of batch size
            `[C]`; None if not asked for, or before the first draw. Those of all healthy chains:
            `samples.draw_moments[samples.healthy].pooled()`.
        observable_moments: Means and covariances of each chain's observables likewise.
        log_weights: Logs of the draws' importance weights, `[C, D]`, NaN from where a chain was
            frozen; None if all count alike.
        log_priors: log p(w_t) of the user's log-prior, `[C, T]`; None without one.
        metrics: Each `[C, T]`; None if not asked for.
        state: The chains after the last step, of batch size `[C]`.
        sampler: The sampler, with its anchor.
        key: The run's key.
        chains: Indices of the chains, `[C]`.
        initial_loss: L(w₀) on all data, `[]`, or `[C]` for an anchor per chain; None if the data
            could not be passed over.
        frozen_at: Step at which a chain was frozen, `[C]`; −1 for healthy chains.
        first_step: The run's first step; 0 unless it went on from another.
        draw_steps: The step of each draw, `[D]`: the last of every `num_steps_between_draws` steps
            after burn-in. Where the temperature is scheduled, a step counts only if a step at T > 0
            led to it.
        num_burnin_steps: Steps of this run before the first draw's.
        num_steps_between_draws: Steps a draw.
        chain_method: How the chains were run, `"vmap"` or `"loop"`.
        options: Other settings of the run, plain values by the name of `sample`'s argument; and
            `num_examples`, where the data is tensors, and `gradient`, the class of its estimator.
            `shared_batches` says whether all chains saw the same minibatches, of an iterable too.
    """

    losses: Tensor
    distances: Tensor
    looks: Looks | None
    draws: TensorDict | None
    observables: dict[str, Tensor]
    draw_moments: DrawMoments | None
    observable_moments: ObservableMoments | None
    log_weights: Tensor | None
    log_priors: Tensor | None
    metrics: Metrics | None
    state: State
    sampler: Sampler
    key: Tensor
    chains: Tensor
    initial_loss: Tensor | None
    frozen_at: Tensor
    first_step: int
    draw_steps: Tensor
    num_burnin_steps: int
    num_steps_between_draws: int
    chain_method: str
    options: dict[str, Any]

    def __repr__(self) -> str:
        kept = "" if self.draws is None else ", draws kept"
        return (
            f"Samples({int(self.healthy.sum())} of {self.num_chains} chains healthy, "
            f"{self.num_draws} draws in {self.num_steps} steps of {type(self.sampler).__name__}"
            f"{kept})"
        )

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
    def observable_names(self) -> list[str]:
        """Names of the observables whose values were recorded."""
        return list(self.observables)

    def observable(self, name: str) -> Tensor:
        """The values of one observable, `[C, D, …]`: of a record on disk, they alone are read.

        Raises:
            ValueError: It was not recorded, or only its moments were.
        """
        return observable_of(name, self.observables)

    @property
    def draw_losses(self) -> Tensor:
        """L(w) on the draws' batches, `[C, D]`."""
        return self.losses[:, self.draw_rows]

    @property
    def draw_rows(self) -> Tensor:
        """Where the draws' steps stand among the steps of this run, `[D]`."""
        return self.draw_steps - self.first_step

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
            if step < self.first_step:
                reason = "in the run that this one went on from"
            else:
                reason = self._reason(row, step - self.first_step)
            report.append(Frozen(int(self.chains[row]), step, reason))
        return report

    def _reason(self, row: int, column: int) -> str:
        """Why a chain was frozen at a step: its loss, its log-prior, or the state it led to."""
        values = {"loss": self.losses, "log_prior": self.log_priors}
        for name, value in values.items():
            if value is not None and not value[row, column].isfinite():
                return f"{name} is {float(value[row, column])}"
        for name, value in {"loss": self.losses, "distance": self.distances}.items():
            limit = self.options.get(f"max_{name}")
            if limit is not None and value[row, column] > limit:
                return f"{name} is {float(value[row, column]):g}, above max_{name}={limit:g}"
        return "its state is not finite after the update"

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "Samples":
        """The record of some chains.

        Raises:
            IndexError: A chain does not exist, or none is left.
            TypeError: It is no index.
        """
        picked = rows_of(rows, self.num_chains)

        def pick(value: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda leaf: leaf[picked], value)

        return self.replaced(
            losses=pick(self.losses),
            distances=pick(self.distances),
            looks=None if self.looks is None else self.looks.of_chains(picked),
            draws=None if self.draws is None else self.draws[picked],
            observables=pick(self.observables),
            draw_moments=_of_rows(self.draw_moments, picked),
            observable_moments=_of_rows(self.observable_moments, picked),
            log_weights=pick(self.log_weights),
            log_priors=pick(self.log_priors),
            metrics=pick(self.metrics),
            state=_rows(self.state, picked),
            # What chains share stays shared.
            sampler=_rows(self.sampler, picked) if self.sampler.shape else self.sampler,
            chains=pick(self.chains),
            initial_loss=of_chains(self.initial_loss, picked),
            frozen_at=pick(self.frozen_at),
        )

    def replaced(self, **changes: Any) -> "Samples":
        """The record with other values of some attributes, in memory."""
        # Of a record on disk, values that are read when they are used would be lost by a copy.
        kept = {
            name: getattr(self, name)
            for name in Samples.__dataclass_fields__
            if name not in changes
        }
        return Samples(**kept, **changes)

    def groups(self, labels: Sequence[Any] | Tensor | None = None) -> dict[Any, "Samples"]:
        """Part the chains into groups, each of which samples one distribution.

        Args:
            labels: A label for each chain, `[C]`; chains with the same label are a group. Default:
                the settings in which chains differ, such as `"lr=0.001"`, anchors among them.

        Returns:
            The record of each group by its label, in the order of their first chains.

        Raises:
            TypeError: The labels are no list of labels.
            ValueError: There is not one label for each chain.
        """
        if labels is None:
            labels = self._labels()
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_meta:
            labels = labels.tolist()
        if not isinstance(labels, list | tuple):
            raise TypeError(
                f"labels must be a list, or a tensor of one dimension, got {type(labels).__name__}"
            )
        if len(labels) != self.num_chains:
            raise ValueError(
                f"labels must be one for each of {self.num_chains} chains, got {labels}"
            )
        rows: dict[Any, list[int]] = {}
        for row, label in enumerate(labels):
            rows.setdefault(label, []).append(row)
        return {label: self[chains] for label, chains in rows.items()}

    @property
    def is_sweep(self) -> bool:
        """Whether healthy chains differ in settings, so that they sample several distributions."""
        return self.is_sweep_of(self.sampler)

    def is_sweep_of(self, sampler: Sampler) -> bool:
        """Whether healthy chains differ in the settings of some sampler, in place of theirs."""
        labels, healthy = self._labels(sampler), self.healthy.tolist()
        return len({label for label, good in zip(labels, healthy, strict=True) if good}) > 1

    def joined(self, more: "Samples") -> "Samples":
        """The record of this run and of one that went on from it, as one.

        Raises:
            ValueError: The other run did not go on from here, or recorded something else.
        """
        checks.instance("more", more, Samples)
        end = self.first_step + self.num_steps
        if more.first_step != end or more.chains.tolist() != self.chains.tolist():
            raise ValueError(
                f"the other run must go on from step {end} of chains {self.chains.tolist()}, got "
                f"one from step {more.first_step} of chains {more.chains.tolist()}"
            )
        recorded = [
            (each.draws, each.observables, each.log_weights, each.log_priors, each.metrics)
            for each in (self, more)
        ]
        # Trees that differ in what they hold have no common structure.
        leaves, structures = zip(*map(pytree.tree_flatten, recorded), strict=True)
        if structures[0] != structures[1]:
            raise ValueError("both runs must have recorded the same draws, metrics and observables")
        both = [None if a is None else torch.cat([a, b], 1) for a, b in zip(*leaves, strict=True)]
        draws, observables, log_weights, log_priors, metrics = pytree.tree_unflatten(
            both, structures[0]
        )
        return more.replaced(
            losses=torch.cat([self.losses, more.losses], 1),
            distances=torch.cat([self.distances, more.distances], 1),
            looks=followed(self.looks, more.looks, self.num_draws),
            draws=draws,
            observables=observables,
            draw_moments=_merged(self.draw_moments, more.draw_moments),
            observable_moments=_merged(self.observable_moments, more.observable_moments),
            log_weights=log_weights,
            log_priors=log_priors,
            metrics=metrics,
            first_step=self.first_step,
            draw_steps=torch.cat([self.draw_steps, more.draw_steps]),
            num_burnin_steps=self.num_burnin_steps,
            initial_loss=self.initial_loss if more.initial_loss is None else more.initial_loss,
        )

    def health(self) -> str:
        """Say how many chains estimates use, in one line, and why others were frozen."""
        used = f"{int(self.healthy.sum())} of {self.num_chains} chains"
        return "\n".join([used, *map(str, self.frozen)])

    def _labels(self, sampler: Sampler | None = None) -> list[str]:
        """Each chain's settings, as far as chains differ in them."""
        settings = self.sampler if sampler is None else sampler
        return setting_labels(settings, self.num_chains, anchors=self._uses_anchor())

    def _uses_anchor(self) -> bool:
        """Whether the anchor is more than where chains started."""
        has_own_loss = self.initial_loss is not None and self.initial_loss.ndim > 0
        is_pulled = bool((self.sampler.localization > 0).any())
        return has_own_loss or is_pulled or self.sampler.bounding_box_size is not None

    def usable_chains(self) -> Tensor:
        """The chains that estimates use: the healthy ones, bool `[C]`.

        Raises:
            ValueError: No draw was made, or no chain is healthy.
        """
        if self.num_draws < 1:
            raise ValueError("estimates need at least one draw, got a run that stopped in burn-in")
        if not self.healthy.any():
            raise ValueError(
                f"estimates need at least one healthy chain, got {self.num_chains} frozen ones, "
                f"of which {self.frozen[0]}: lower lr, or look at data and start if it is step 0"
            )
        return self.healthy

    def check_poolable(self) -> None:
        """Refuse draws whose plain average would mean nothing.

        Raises:
            ValueError: No draw was made, no chain is healthy, chains have different settings, or
                draws have weights.
        """
        self.usable_chains()
        if self.is_sweep:
            labels = ", ".join(dict.fromkeys(self._labels()))
            raise ValueError(
                "chains must have the same settings for one average over them, got a sweep over "
                f"{labels}: group them first, {{label: llc(group) for label, group in "
                "samples.groups().items() if group.healthy.any()}"
            )
        if self.log_weights is not None:
            raise ValueError(
                "the draws have weights (samples.log_weights), which a plain average would ignore: "
                "use weighted_mean(values[samples.healthy], samples.log_weights[samples.healthy]), "
                "with values from samples.observables or llc_draws(samples)"
            )


def observable_of(name: Any, known: Mapping[str, Tensor]) -> Tensor:
    """An observable of a record.

    Raises:
        TypeError: The name is none.
        ValueError: There is no such observable.
    """
    checks.instance("the observable's name", name, str)
    if name not in known:
        names = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"there must be an observable {name!r}, got values of {names}")
    return known[name]


def of_chains(value: Tensor | None, rows: Tensor) -> Tensor | None:
    """A value that chains share, or have one each of."""
    return value if value is None or not value.shape else value[rows]


def _rows(value: AnyClass, rows: Tensor) -> AnyClass:
    """Some chains of a state or a sampler, sharded as they are."""
    if shards.mesh_of(value) is None:
        return value[rows]
    # torch takes no plain index for a DTensor.
    picked: AnyClass = value.apply(
        lambda leaf: shards.with_rows(shards.local(leaf)[rows.to(leaf.device)], leaf),
        batch_size=[len(rows)],
    )
    return picked


def _of_rows(moments: M | None, rows: Tensor) -> M | None:
    """The moments of some chains; None if there are none."""
    return None if moments is None else moments[rows]


def _merged(one: M | None, two: M | None) -> M | None:
    """The moments of two runs' draws; None if there are none.

    Raises:
        ValueError: Only one run has them.
    """
    if (one is None) != (two is None):
        raise ValueError("both runs must have recorded moments, got those of one")
    return None if one is None or two is None else one.merged(two)


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
    if isinstance(value, Tensor):
        checks.real_values("initial_loss", value)
    # Users pass the loss that they have computed, with its graph and on its device.
    loss = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if loss.shape not in (torch.Size(), torch.Size((num_chains,))):
        raise ValueError(
            f"initial_loss must have shape () or ({num_chains},), got shape {tuple(loss.shape)}"
        )
    if not loss.isfinite().all():
        raise ValueError(f"initial_loss must be finite, got {loss.tolist()}")
    return loss
