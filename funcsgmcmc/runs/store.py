"""The store of a record: fields, written for one chunk of chains at a time, and their recorder.

Shapes: C chains, T steps, D draws; a field holds `[C, T, …]` or `[C, D, …]`.
"""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import shards, tree
from funcsgmcmc.norms import Metrics
from funcsgmcmc.runs.looks import Look
from funcsgmcmc.runs.request import Observable, Recorded, check_observable, observed_by
from funcsgmcmc.stepping import Info

Rows = int | slice
"""The chains of a chunk, as rows of a run's tensors: a slice of them, or one without its axis."""

Each = Literal["step", "draw", "full_draw"]


class Field(NamedTuple):
    """A quantity that a run records.

    Attributes:
        group: The kind of quantity; two groups may use one name.
        name: Its name within the group.
        schedule: Whether it is written at each step, at each draw, or at each draw that all data
            is evaluated at.
    """

    group: Literal[
        "loss",
        "distance",
        "log_prior",
        "metrics",
        "log_weight",
        "observables",
        "draws",
        "full_data",
    ]
    name: tree.Name
    schedule: Each

    @property
    def dimensions(self) -> tuple[str, str]:
        """Names of its leading dimensions; those of a single value follow."""
        return ("chain", self.schedule)


class Store(Protocol):
    """The contract of a store, which decides where the values of fields are kept."""

    def write(self, field: Field, rows: Rows, index: int, value: Tensor) -> None:
        """Keep the value of some chains, `[…]` of one or `[c, …]` of a slice, at a step or draw."""

    def write_steps(self, field: Field, rows: Rows, first: int, values: Tensor) -> None:
        """Keep the values of some chains at steps that follow one another, `[steps, …]`."""

    def read(self, field: Field, start: int, stop: int) -> Tensor:
        """Values of all chains at some steps or draws, `[C, stop - start, …]`, on the CPU."""

    def fields(self, group: str) -> list[Field]:
        """The fields of a group that have values, in the order of their first values."""


class MemoryStore:
    """A store in memory.

    Args:
        sizes: C, T and D, under the names of these dimensions.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._values: dict[Field, Tensor] = {}

    def write(self, field: Field, rows: Rows, index: int, value: Tensor) -> None:
        """Keep the value of some chains; the first one fixes the field's shape and dtype."""
        self._values_of(field, rows, value)[rows, index] = value  # copied to where the values are

    def write_steps(self, field: Field, rows: Rows, first: int, values: Tensor) -> None:
        """Keep the values of some chains at steps that follow one another."""
        kept = self._values_of(field, rows, values[0])
        by_chain = values if isinstance(rows, int) else values.movedim(0, 1)
        kept[rows, first : first + len(values)] = by_chain

    def _values_of(self, field: Field, rows: Rows, value: Tensor) -> Tensor:
        """All values of a field, of which one for some chains is given."""
        values = self._values.get(field)
        if values is None:
            shape = value.shape if isinstance(rows, int) else value.shape[1:]
            # No step waits for a copy: values of each step stay on their device until they are
            # read. Draws are as large as the parameters, and a device has no room for many.
            values = torch.empty(
                (*(self._sizes[name] for name in field.dimensions), *shape),
                dtype=value.dtype,
                device=value.device if field.schedule == "step" else "cpu",
            )
            self._values[field] = values
        return values

    def read(self, field: Field, start: int, stop: int) -> Tensor:
        """Values of all chains; `[C, 0]` of a field that was never written."""
        if field not in self._values:
            return torch.empty(self._sizes["chain"], 0)
        return self._values[field][:, start:stop].cpu()

    def fields(self, group: str) -> list[Field]:
        """The fields of a group that have values."""
        return [field for field in self._values if field.group == group]


_LOSS = Field("loss", "loss", "step")
_DISTANCE = Field("distance", "distance", "step")
_LOOK = [Field("full_data", name, "full_draw") for name in Look._fields]
_LOG_PRIOR = Field("log_prior", "log_prior", "step")
_LOG_WEIGHT = Field("log_weight", "log_weight", "draw")
# The distance is recorded without metrics, too.
_METRICS = {
    name: Field("metrics", name, "step") for name in Metrics._fields if name != "distance"
} | {"distance": _DISTANCE}


def _of_steps(info: Info) -> Iterator[tuple[Field, Tensor]]:
    """What is recorded of every step."""
    yield _LOSS, info.loss
    yield _DISTANCE, info.distance
    if info.log_prior is not None:
        yield _LOG_PRIOR, info.log_prior
    if info.metrics is not None:
        for name, value in info.metrics._asdict().items():
            if name != "distance":
                yield _METRICS[name], value


def _part_of_name(key: Any) -> str:
    """A key of a pytree's path as people read it: that of a dict, or an index."""
    return str(getattr(key, "key", getattr(key, "idx", key)))


class Recorder:
    """Writes what chains report into a store, and reads it as `Samples` has it.

    Args:
        store: Where the record is kept.
        observables: Functions of one chain's parameters, evaluated at each draw.
        record: What is recorded, as `sample` is asked for it.
    """

    def __init__(
        self,
        store: Store,
        observables: Mapping[str, Observable] = MappingProxyType({}),
        record: Collection[Recorded] = (),
    ) -> None:
        self._store = store
        self._functions = observables
        self._record = record

    def write_draw(self, rows: Rows, draw: int, params: TensorDict) -> dict[str, Tensor]:
        """Write a draw of some chains.

        Returns:
            The observables, `[*chains, …]`.
        """
        observed = {}
        for name, function in self._functions.items():
            versions = [leaf._version for _, leaf in tree.leaves(params)]
            # A chunk of one row has no chain dimension to map over.
            value = (
                observed_by(function, params)
                if isinstance(rows, int)
                else torch.vmap(function)(params)
            )
            if versions != [leaf._version for _, leaf in tree.leaves(params)]:
                raise ValueError(
                    f"observable {name!r} must not write to the parameters, which are the chain's"
                )
            check_observable(name, value)
            observed[name] = value
            if "observable_moments" not in self._record:
                self._store.write(Field("observables", name, "draw"), rows, draw, value)
        if "draws" in self._record:
            for key, leaf in tree.leaves(params):
                self._store.write(Field("draws", key, "draw"), rows, draw, leaf)
        return observed

    def write_step(self, rows: Rows, step: int, draw: int | None, info: Info) -> None:
        """Write the report of a step of some chains, which made a draw or none."""
        for field, value in _of_steps(info):
            self._store.write(field, rows, step, value)
        if draw is not None and info.log_weight is not None:
            self._store.write(_LOG_WEIGHT, rows, draw, info.log_weight)
        if draw is not None and "aux" in self._record:
            for path, leaf in pytree.tree_leaves_with_path(shards.whole(info.aux)):
                name = ".".join(["aux", *map(_part_of_name, path)])
                self._store.write(Field("observables", name, "draw"), rows, draw, leaf)

    def write_steps(
        self, rows: Rows, first: int, number: int, draw: int | None, info: Info
    ) -> None:
        """Write the reports of steps that follow one another, without aux.

        Args:
            rows: The chains.
            first: The first step, which made a draw or none; the others made none.
            number: Of steps.
            draw: The draw of the first step.
            info: Leaves `[at least number, *chains, …]`.
        """
        for field, values in _of_steps(info):
            self._store.write_steps(field, rows, first, values[:number])
        if draw is not None and info.log_weight is not None:
            self._store.write(_LOG_WEIGHT, rows, draw, info.log_weight[0])

    def losses(self, num_steps: int) -> Tensor:
        """Losses of the first steps, `[C, T]`."""
        return self._store.read(_LOSS, 0, num_steps)

    def distances(self, num_steps: int) -> Tensor:
        """Distances of the first steps, `[C, T]`."""
        return self._store.read(_DISTANCE, 0, num_steps)

    def write_look(self, rows: Rows, index: int, look: Look) -> None:
        """Write a look at all data of some chains."""
        for field, value in zip(_LOOK, look, strict=True):
            self._store.write(field, rows, index, value)

    def looks(self, number: int) -> Look:
        """The first looks at all data, each `[C, K]`."""
        return Look(*(self._store.read(field, 0, number) for field in _LOOK))

    def at_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Losses and distances of one step, each `[C]`."""
        losses, distances = (
            self._store.read(field, step, step + 1)[:, 0] for field in (_LOSS, _DISTANCE)
        )
        return losses, distances

    def log_priors(self, num_steps: int) -> Tensor | None:
        """Log-priors of the first steps, `[C, T]`; None without a log-prior."""
        if not self._store.fields("log_prior"):
            return None
        return self._store.read(_LOG_PRIOR, 0, num_steps)

    def metrics(self, num_steps: int) -> Metrics | None:
        """Metrics of the first steps, each `[C, T]`; None if none were recorded."""
        if not self._store.fields("metrics"):
            return None
        read = {name: self._store.read(field, 0, num_steps) for name, field in _METRICS.items()}
        return Metrics(**read)

    @property
    def observable_names(self) -> list[str]:
        """Names of the observables whose values are kept."""
        return [tree.dotted(field.name) for field in self._store.fields("observables")]

    def observables(self, num_draws: int, only: str | None = None) -> dict[str, Tensor]:
        """Observables of the first draws, each `[C, D, …]`; all, or one."""
        fields = self._store.fields("observables")
        named = {tree.dotted(field.name): field for field in fields}
        chosen = named if only is None else {name: named[name] for name in named if name == only}
        return {name: self._store.read(field, 0, num_draws) for name, field in chosen.items()}

    def draws(self, num_draws: int) -> TensorDict | None:
        """Parameters of the first draws, leaves `[C, D, *shape]`; None if not asked for."""
        fields = self._store.fields("draws")
        if not fields:
            return None
        leaves = {field.name: self._store.read(field, 0, num_draws) for field in fields}
        return tree.build(leaves, leaves[fields[0].name].shape[:2])

    def log_weights(self, draw_steps: Tensor, frozen_at: Tensor) -> Tensor | None:
        """Log weights of the draws at some steps, `[C, D]`; None if all count alike.

        A frozen chain makes no more draws of its own: their weights are NaN.
        """
        if not self._store.fields("log_weight"):
            return None
        stopped = (frozen_at[:, None] >= 0) & (draw_steps >= frozen_at[:, None])
        values = self._store.read(_LOG_WEIGHT, 0, len(draw_steps))
        return values.masked_fill(stopped, torch.nan)
