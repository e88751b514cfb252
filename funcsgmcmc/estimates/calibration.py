"""Sweeps over settings: the grid in one run, an estimate and a verdict for each cell.

The rules of the verdicts stand in `estimates/verdicts.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from tensordict import TensorDictBase
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.advice import Proposal, Recommendation, propose, recommend
from funcsgmcmc.estimates.cells import FIGURES, SweepCell, judged, table
from funcsgmcmc.estimates.convergence import needs_arviz
from funcsgmcmc.estimates.verdicts import Verdict
from funcsgmcmc.gradients import LossFn
from funcsgmcmc.runs.grid import Axis, Label, axes_of, cells_of, name_of
from funcsgmcmc.runs.need import Cost
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.sweep import (
    Part,
    Runs,
    SweepRequest,
    options_of,
    parameters_of,
    run_cells,
    run_grid,
)
from funcsgmcmc.samplers.base import Sampler

if TYPE_CHECKING:
    from xarray import Dataset


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """The cells of a grid, with an estimate and a verdict for each; made by `sweep`.

    `print(sweep)` shows a table. Estimates are made when they are first asked for.

    Attributes:
        request: What was asked.
        parts: The runs: one of the grid, and one of each refinement.
    """

    request: SweepRequest
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        number = sum(len(part.cells) for part in self.parts)
        return f"Sweep({number} cells over {', '.join(self.axes)})"

    def __str__(self) -> str:
        return table(self.cells)

    @property
    def axes(self) -> dict[str, list[Label]]:
        """The labels of each axis: numbers in rising order, names in theirs."""
        return {
            name: list(axis.settings) if axis.is_named else sorted(axis.settings)
            for name, axis in self.request.axes.items()
        }

    @cached_property
    def samples(self) -> dict[str, Samples]:
        """The record of each cell by its name, in the order of the grid."""
        number = self.request.chains_per_cell
        found = {
            name_of(cell): part.samples[slice(row * number, (row + 1) * number)]
            for part in self.parts
            for row, cell in enumerate(part.cells)
        }
        return {
            name: found[name] for name in map(name_of, cells_of(self._sorted())) if name in found
        }

    @cached_property
    def cells(self) -> list[SweepCell]:
        """All cells with their estimates and verdicts, in the order of the grid.

        Raises:
            ImportError: The extra `diagnostics` is not installed.
            ValueError: L(w₀) is not known, since the data cannot be passed over twice; or draws
                have weights.
        """
        labels = [cell for cell in cells_of(self._sorted()) if name_of(cell) in self.samples]
        return judged(labels, [self.samples[name_of(cell)] for cell in labels])

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """The verdict on each cell by its name."""
        return {cell.name: cell.verdict for cell in self.cells}

    def cell(self, **labels: Label) -> SweepCell:
        """The one cell with some labels: `sweep.cell(lr=1e-3, checkpoint="last")`.

        Raises:
            ValueError: There is none, or there are several.
        """
        chosen = self._with(labels)
        if len(chosen) != 1:
            raise ValueError(
                f"labels must pick one cell, got {name_of(labels) or 'none'}, which {len(chosen)} "
                f"cells have, of {', '.join(self.samples)}"
            )
        return chosen[0]

    def dataset(self) -> "Dataset":
        """The table of all cells, labelled by the axes of the grid.

        Returns:
            Variables over the axes, NaN or `""` where the grid has no cell: `llc`, `error`, `mcse`,
            `bias`, `drift`, `corrected` as in `LLC`; `r_hat`, `ess`, `distance`, `reach`,
            `signal_to_noise`, `frozen` as in `Findings`; `control` as in `SweepCell`; `verdict` and
            `reason`.

        Raises:
            ImportError: The extra `diagnostics` is not installed.
            ValueError: As `cells`.
        """
        with needs_arviz():
            import xarray
        shape = tuple(len(labels) for labels in self.axes.values())
        nothing = torch.full(shape, math.nan, dtype=torch.float64).numpy()
        figures = {name: nothing.copy() for name in FIGURES}
        texts = {name: nothing.astype(object) for name in ("verdict", "reason")}
        for text in texts.values():
            text[...] = ""
        for cell in self.cells:
            place = tuple(labels.index(cell.labels[name]) for name, labels in self.axes.items())
            for name, figure in FIGURES.items():
                figures[name][place] = figure(cell)
            texts["verdict"][place] = cell.verdict.name
            texts["reason"][place] = cell.verdict.reason
        dimensions = list(self.axes)
        return xarray.Dataset(
            {name: (dimensions, values) for name, values in (figures | texts).items()},
            coords=dict(self.axes),
            attrs={"chains_per_cell": self.request.chains_per_cell},
        )

    def recommend(self, **labels: Label) -> Recommendation:
        """Choose settings: of those that are fine in most cells, the ones with the smallest error.

        A step size is good or bad; nβ and localization say what is estimated, and to choose them is
        yours: `sweep.recommend(nbeta=240.0)`.

        Where the grid has axes of names (checkpoints, layers, masks), settings are chosen for all
        of them alike, so that their estimates can be compared: first by the number of cells that
        are fine, then by the largest total error of one of these, in units of its estimate.

        Args:
            **labels: Labels of some axes, among whose cells to choose; default: all cells.

        Raises:
            ValueError: No cell is fine; the message counts the verdicts, and says what to do. Or
                there is no cell with these labels.
        """
        return recommend(self._with(labels))

    def propose(self) -> Proposal:
        """Propose the cells to run next: step sizes around those that are fine, or towards them.

        Raises:
            ValueError: The grid has no axis of step sizes, `lr`.
        """
        return propose(self.cells)

    def refine(self, grid: Mapping[str, Any] | None = None) -> "Sweep":
        """Run further cells, from the same arguments; those that were run before are kept.

        A store takes them, too.

        Args:
            grid: Further labels of some axes, as for `sweep`: the cells are those of the grid with
                these labels on these axes, and all labels on the others. Default: what `propose`
                gives.

        Returns:
            The sweep of all cells.

        Raises:
            ValueError: An axis is no axis of the grid. Else as `sweep`.
        """
        given = self.propose().grid if grid is None else grid
        further = axes_of(given, self.request.factory)
        for name, axis in further.items():
            checks.choice("an axis of grid", name, tuple(self.request.axes))
            if axis.is_named != self.request.axes[name].is_named:
                raise ValueError(
                    f"grid[{name!r}] must have names where the sweep has, else numbers"
                )
        request = self.request.with_axes(further)
        cells = cells_of({**request.axes, **further})
        return Sweep(*run_cells(Runs(request, self.parts), cells))

    def _with(self, labels: Mapping[str, Label]) -> list[SweepCell]:
        """The cells with some labels.

        Raises:
            ValueError: There are none.
        """
        for name in labels:
            checks.choice("an axis", name, tuple(self.request.axes))
        chosen = [cell for cell in self.cells if labels.items() <= cell.labels.items()]
        if not chosen:
            raise ValueError(
                f"labels must be those of a cell, got {name_of(labels)}, of "
                f"{', '.join(self.samples)}"
            )
        return chosen

    def _sorted(self) -> dict[str, Axis]:
        axes = self.request.axes
        return {
            name: Axis(name, {label: {} for label in labels}, axes[name].is_named)
            for name, labels in self.axes.items()
        }


@overload
def sweep(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor],
    data: Any,
    factory: Callable[..., Sampler],
    *,
    grid: Mapping[str, Any],
    chains_per_cell: int,
    shared_noise: bool = True,
    store: str | Path | None = None,
    resume: bool = False,
    dry_run: Literal[False] = False,
    **run: Any,
) -> Sweep: ...
@overload
def sweep(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor],
    data: Any,
    factory: Callable[..., Sampler],
    *,
    grid: Mapping[str, Any],
    chains_per_cell: int,
    shared_noise: bool = True,
    store: str | Path | None = None,
    resume: bool = False,
    dry_run: Literal[True],
    **run: Any,
) -> Cost: ...
def sweep(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor],
    data: Any,
    factory: Callable[..., Sampler],
    *,
    grid: Mapping[str, Any],
    chains_per_cell: int,
    shared_noise: bool = True,
    store: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    **run: Any,
) -> Sweep | Cost:
    """Sample all cells of a grid of settings in one run, and judge each.

        sweep(loss_fn, params, data, fs.sgld, grid={"lr": [1e-4, 1e-3], "nbeta": [100.0, 240.0]},
              chains_per_cell=4, num_draws=200, num_burnin_steps=200, batch_size=64, key=fs.key(0))

    All chains step together. Those that diverge freeze, and the others go on as if they had not
    been there, bit for bit. Chain k of every cell has the index k, and with it the noise and the
    minibatches of chain k of a run of that cell alone, by `sample` with the same key: cells differ
    by their settings, and not by chance.

    Args:
        loss_fn: As for `sample`.
        params: Where chains start, and their anchor: one tree. `grid` may give cells others.
        data: As for `sample`.
        factory: The sampler's, such as `sgld`, or `functools.partial(sgld, weight_decay=1.0)`.
        grid: The axes, name to values. A name is a setting of the factory, with numbers: one, a
            list, or a tensor (`"lr": [1e-4, 1e-3]`); or with named values
            (`"mask": {"first": {"2.weight": False}, …}`). Besides the factory's settings there are
            `params`, where a cell starts, `initial_loss`, L(w₀) there, and `only`, the parameters
            that are sampled, as `params_of` takes them (`"only": ["0.*", "2.*"]`). Any other name
            is yours, with names of settings that go together
            (`"checkpoint": {"step 100": {"params": tree, "nbeta": 50.0}, …}`).
        chains_per_cell: K ≥ 1.
        shared_noise: Whether chain k has the same noise and minibatches in every cell, so that
            differences between cells have less noise than each has. If not, chains of the i-th cell
            have the indices from i K.
        store: A folder for the records, as for `sample`: it has one of them for the grid and one
            for each refinement (`run-0`, `run-1`, …), each of which `open_run` reads.
        resume: Whether to go on with the sweep in `store`: cells that are complete are read, those
            that are not go on, and those that the store lacks are run.
        dry_run: Whether to tell the cost, from a few steps that are timed, in place of the sweep.
        **run: Other arguments of `sample`, for all cells: `num_draws`, `num_burnin_steps`,
            `num_steps_between_draws`, `batch_size`, `key`, `compile`, `full_loss`, `progress`, ….

    Returns:
        The sweep; its cost if `dry_run`.

    Raises:
        TypeError, ValueError: An argument breaks a rule; nothing has run yet.
        FileExistsError: The store holds a sweep that is not to be resumed, or something else.
        SamplingError, SamplingInterrupt: As `sample`; their `samples` are the chains of all cells
            of the run, K of each, in the order of the grid.
    """
    checks.switch("dry_run", dry_run)
    checks.switch("resume", resume)
    if store is not None:
        checks.instance("store", store, str | Path)
    elif resume:
        raise ValueError("resume must be left out without store, the folder of the sweep")
    request = SweepRequest(
        loss_fn=loss_fn,
        params=parameters_of(params),
        data=data,
        factory=factory,
        axes=axes_of(grid, factory),
        chains_per_cell=chains_per_cell,
        shared_noise=shared_noise,
        options=options_of(run),
        store=None if store is None else Path(store),
    )
    if dry_run:
        return request.cost()
    return Sweep(*run_grid(request, resume=resume))
