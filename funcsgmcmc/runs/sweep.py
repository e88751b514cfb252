"""The runs of a sweep: one for the cells of its grid, and one for those of each refinement.

store/
    sweep.json      the cells of each run, by their labels
    run-0, run-1    the runs, each as `sample` keeps it
"""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.gradients import LossFn
from funcsgmcmc.runs.checkpoint import has_checkpoint
from funcsgmcmc.runs.grid import Axis, Cell, Chains, Factory, Label, cells_of, chains_of
from funcsgmcmc.runs.need import Cost
from funcsgmcmc.runs.processes import processes_of
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.sampling import expected_cost, sample

_ARGUMENTS = inspect.signature(sample).parameters
# Those of `sample` that a sweep has in another form.
_OWN = ("loss_fn", "params", "data", "sampler", "num_chains", "initial_loss", "store", "resume")
# Those that do not say what is run.
_OF_A_FOLDER = ("checkpoint_seconds", "progress", "mesh")


class Part(NamedTuple):
    """The cells that were run at once.

    Attributes:
        cells: By their labels.
        samples: The record of all their chains, K for each cell, one cell after the other.
    """

    cells: list[Cell]
    samples: Samples


@dataclass(frozen=True, eq=False)
class SweepRequest:
    """What a sweep was asked; each is the argument of `sweep` of that name.

    Attributes:
        axes: The grid.
        options: Arguments of `sample` that all cells share.
        store: The folder; None where records are kept in memory.
    """

    loss_fn: LossFn
    params: TensorDict
    data: Any
    factory: Factory
    axes: dict[str, Axis]
    chains_per_cell: int
    shared_noise: bool
    options: dict[str, Any]
    store: Path | None

    def __post_init__(self) -> None:
        checks.count("chains_per_cell", self.chains_per_cell, minimum=1)
        checks.switch("shared_noise", self.shared_noise)
        checks.count("chain_offset", self.options.get("chain_offset", 0), minimum=0)

    def with_axes(self, axes: Mapping[str, Axis]) -> "SweepRequest":
        """The same, with further labels of its axes."""
        merged = {
            name: replace(axis, settings={**axis.settings, **axes[name].settings})
            if name in axes
            else axis
            for name, axis in self.axes.items()
        }
        return replace(self, axes=merged)

    def with_labels(self, cells: Iterable[Cell]) -> "SweepRequest":
        """The same, with the labels of some cells.

        Raises:
            ValueError: One is a name that its axis lacks.
        """
        further: dict[str, dict[Label, Mapping[str, Any]]] = {name: {} for name in self.axes}
        for cell in cells:
            for name, label in cell.items():
                further[name][label] = self.axes[name].of(label)
        return self.with_axes(
            {name: replace(self.axes[name], settings=each) for name, each in further.items()}
        )

    def chains(self, cells: Sequence[Cell]) -> Chains:
        """The chains of some cells."""
        return chains_of(cells, self.axes, self.params, self.factory, self.chains_per_cell)

    def indices(self, num_cells: int, first_cell: int) -> Tensor:
        """Indices of the chains of some cells, `[C]`, which their keys follow from.

        Chain k of a cell has the index k, or i K + k in the i-th cell without shared noise.
        """
        of_cell = self.options.get("chain_offset", 0) + torch.arange(self.chains_per_cell)
        first = 0 if self.shared_noise else first_cell
        step = 0 if self.shared_noise else self.chains_per_cell
        return ((first + torch.arange(num_cells))[:, None] * step + of_cell).reshape(-1)

    def arguments(self, cells: Sequence[Cell], first_cell: int) -> dict[str, Any]:
        """The arguments of `sample` for some cells."""
        chains = self.chains(cells)
        return {
            **self.options,
            "loss_fn": self.loss_fn,
            "params": chains.params,
            "data": self.data,
            "sampler": chains.sampler,
            "initial_loss": chains.initial_loss,
            "num_chains": len(cells) * self.chains_per_cell,
            "chain_offset": self.indices(len(cells), first_cell),
        }

    def run(self, cells: list[Cell], first_cell: int, index: int) -> Part:
        """Run some cells, or go on with them where the store has them.

        Args:
            cells: By their labels.
            first_cell: How many cells were run before.
            index: How many runs were made before.
        """
        arguments = self.arguments(cells, first_cell)
        if self.store is not None:
            arguments |= {"store": self.store / f"run-{index}", "resume": True}
        return Part(cells, sample(**arguments))

    def lead(self, work: Callable[[], object]) -> None:
        """Let one process do something before all go on: the first, where several run the cells."""
        with processes_of(self.options.get("mesh")) as processes:
            processes.lead(work)

    def cost(self) -> Cost:
        """What the whole grid costs, from a few steps that are timed."""
        arguments = self.arguments(cells_of(self.axes), 0)
        return expected_cost(
            **{name: value for name, value in arguments.items() if name not in _OF_A_FOLDER}
        )


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check which arguments of `sample` a sweep was given.

    Raises:
        TypeError: One is unknown, or missing.
    """
    for name in given:
        if name not in _ARGUMENTS or name in _OWN:
            hint = {
                "num_chains": ": chains_per_cell says how many",
                "initial_loss": ": grid has it, since it is that of a cell",
            }.get(name, "")
            raise TypeError(f"sweep() got an unexpected keyword argument {name!r}{hint}")
    for name, each in _ARGUMENTS.items():
        if each.default is each.empty and name not in _OWN and name not in given:
            raise TypeError(f"sweep() missing 1 required keyword-only argument: {name!r}")
    return dict(given)


class Runs(NamedTuple):
    """The runs of a sweep.

    Attributes:
        request: What was asked, with all labels that cells have.
        parts: One for the grid, and one for each refinement.
    """

    request: SweepRequest
    parts: tuple[Part, ...]


def run_grid(request: SweepRequest, *, resume: bool) -> Runs:
    """Run the grid; of a store that has a part of it, the rest. Other cells of the store come too.

    Raises:
        FileExistsError: The store holds a sweep that is not to be resumed, or something else.
        ValueError: It holds another sweep.
    """
    cells = cells_of(request.axes)
    request.chains(cells)  # refused before anything is written
    recorded: list[list[Cell]] = []
    if request.store is not None:
        folder = _Folder(request.store)
        request.lead(lambda: folder.begin(request, resume=resume))
        recorded = folder.runs()
        request = request.with_labels(cell for each in recorded for cell in each)
    parts: list[Part] = []
    for each in recorded:
        parts.append(request.run(each, sum(len(part.cells) for part in parts), len(parts)))
    return run_cells(Runs(request, tuple(parts)), cells)


def run_cells(runs: Runs, cells: Sequence[Cell]) -> Runs:
    """Run those of some cells that were not run before, as one more part."""
    request, parts = runs
    known = [cell for part in parts for cell in part.cells]
    new = [cell for cell in cells if cell not in known]
    if not new:
        return runs
    if request.store is not None:
        request.chains(new)  # refused before the store has them
        folder = _Folder(request.store)
        request.lead(lambda: folder.add(new))
    return Runs(request, (*parts, request.run(new, len(known), len(parts))))


class _Folder:
    """The folder of a sweep."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path / "sweep.json"

    def runs(self) -> list[list[Cell]]:
        """The cells of each run that is in it."""
        found: list[list[Cell]] = self._read()["runs"]
        return found

    def begin(self, request: SweepRequest, *, resume: bool) -> None:
        """Take up the folder.

        Raises:
            FileExistsError, ValueError: As `run_grid`.
        """
        settings = {
            "axes": list(request.axes),
            "chains_per_cell": request.chains_per_cell,
            "shared_noise": request.shared_noise,
        }
        found = self._read() if self._file.exists() else None
        if found is None and self._path.exists() and not _is_empty_folder(self._path):
            raise FileExistsError(
                f"store must be a new folder, or that of a sweep, got {self._path}"
            )
        # A run that was refused before its first step left nothing.
        runs: list[list[Cell]] = [
            cells
            for index, cells in enumerate(found["runs"] if found else [])
            if has_checkpoint(self._path / f"run-{index}")
        ]
        if found is not None and runs:
            if not resume:
                raise FileExistsError(
                    f"store {self._path} holds a sweep already: resume=True goes on with it, or "
                    "give another"
                )
            names = [name for name, value in settings.items() if found[name] != value]
            if names:
                raise ValueError(
                    f"store {self._path} holds another sweep: it differs in {', '.join(names)}"
                )
        self._write({**settings, "runs": runs})

    def add(self, cells: Sequence[Cell]) -> None:
        """Note the cells of a further run, before it begins."""
        found = self._read()
        self._write({**found, "runs": [*found["runs"], list(cells)]})

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.read_text())
        return found

    def _write(self, content: Mapping[str, Any]) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1))
        new.replace(self._file)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def parameters_of(params: Any) -> TensorDict:
    """Take the parameters given to `sweep`: one tree.

    Raises:
        TypeError, ValueError: They are something else.
    """
    if isinstance(params, Samples):
        raise TypeError("params must be a tree, got the record of a run")
    taken = tree.parameters(params)
    shards.refuse("sweep", taken)
    if taken.batch_size:
        raise ValueError(
            f"params must be one tree, got batch size {tuple(taken.batch_size)}: grid has the "
            "starts of cells by name, {'checkpoint': {'first': {'params': …}, …}}"
        )
    return taken
