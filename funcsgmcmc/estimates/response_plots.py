"""Plots of responses: susceptibilities, influence, and losses of single examples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.figures import figure_of
from funcsgmcmc.estimates.response import Response, trace_of
from funcsgmcmc.runs.record import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_MOST_LABELS, _MOST_PANELS = 40, 12


def plot_susceptibilities(
    found: Response, labels: Sequence[str] | None = None, *, per_component: bool = True
) -> "Figure":
    """Plot susceptibilities as a heat map, components down and examples (or tokens) across.

    Values that are less than two standard errors from 0 are pale, so that what the eye follows is
    more than noise.

    Args:
        found: As `susceptibilities` gives them.
        labels: Names of the examples or tokens, in the order of the columns; shown where there are
            40 at most.
        per_component: Whether each row is divided by its largest value: components of many
            parameters respond more than those of few.

    Returns:
        A figure; `figure.savefig("susceptibilities.png")` writes it.

    Raises:
        ImportError: The extra `plot` is not installed.
        TypeError, ValueError: These are no susceptibilities, or labels are not one a column.
    """
    figure_class = figure_of("plot_susceptibilities")
    checks.instance("found", found, Response)
    checks.switch("per_component", per_component)
    if not found.components:
        raise ValueError("found must have components, as susceptibilities gives them, got none")
    values = found.values.reshape(len(found.components), -1)
    mcse = found.mcse.reshape(values.shape)
    names = _labels(labels, values.shape[1])
    clear = values.abs() > 2 * mcse
    if per_component:
        values = values / _largest(values.abs(), 1)[:, None]
    height = 1.4 + 0.28 * len(values)
    figure = figure_class(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    image = _signed_image(axes, values, clear)
    axes.set_yticks(range(len(values)), found.components)
    axes.set_xlabel("token" if found.values.ndim > 2 else "example")
    if names:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    label = r"$\chi$ / largest of its row" if per_component else r"$\chi$"
    figure.colorbar(image, ax=axes, label=label, pad=0.01)
    axes.set_title(_of_chains(found), loc="left", fontsize="medium")
    return figure


def plot_influence(found: Response, order: Sequence[int] | Tensor | None = None) -> "Figure":
    """Plot an influence matrix, or a matrix of correlations, of examples.

    Values that are less than two standard errors from 0 are pale.

    Args:
        found: As `influence` gives it, of examples on examples, or on other quantities.
        order: The order of rows, and of columns where the matrix is square: for instance by class,
            `targets.argsort()`. Default: as they are.

    Returns:
        A figure.

    Raises:
        ImportError: The extra `plot` is not installed.
        TypeError, ValueError: It is no matrix, or the order no permutation.
    """
    figure_class = figure_of("plot_influence")
    checks.instance("found", found, Response)
    if found.values.ndim != 2 or found.components:
        raise ValueError(
            "found must be a matrix, as influence gives it per example, got shape "
            f"{tuple(found.values.shape)}"
        )
    values, clear = found.values, found.values.abs() > 2 * found.mcse
    if order is not None:
        rows = _permutation(order, len(values))
        columns = rows if len(values) == values.shape[1] else torch.arange(values.shape[1])
        values, clear = values[rows][:, columns], clear[rows][:, columns]
    figure = figure_class(figsize=(6.6, 5.6), layout="constrained")
    axes = figure.subplots()
    # The variances on the diagonal would leave the rest without colour.
    is_square = len(values) == values.shape[1]
    off = values[~torch.eye(len(values), dtype=torch.bool)] if is_square else values
    limit = float(_largest(off.abs().reshape(1, -1), 1)) if off.numel() else None
    image = _signed_image(axes, values, clear, limit)
    axes.set_xlabel("on")
    axes.set_ylabel("of example")
    figure.colorbar(image, ax=axes, label="influence", pad=0.01)
    axes.set_title(_of_chains(found), loc="left", fontsize="medium")
    return figure


def plot_traces(samples: Samples, of: str, examples: Sequence[int] | Tensor) -> "Figure":
    """Plot the losses of some examples over the draws, a panel each, a line a chain.

    Args:
        samples: A run.
        of: Name of the observable that holds the losses; of tokens, each example's mean.
        examples: Which examples, 12 at most.

    Returns:
        A figure of as many panels, over a common axis of steps.

    Raises:
        ImportError: The extra `plot` is not installed.
        TypeError, ValueError: There is no such observable, or no such example.
    """
    figure_class = figure_of("plot_traces")
    trace = trace_of(samples, of)
    if trace.ndim < 3:
        raise ValueError(f"of must have losses of examples, got values {tuple(trace.shape[2:])}")
    if trace.ndim > 3:
        trace = trace.nanmean(tuple(range(3, trace.ndim)))
    chosen = _permutation(examples, trace.shape[2], is_whole=False, name="examples")
    if not 1 <= len(chosen) <= _MOST_PANELS:
        raise ValueError(f"examples must be 1 to {_MOST_PANELS}, got {len(chosen)}")
    figure = figure_class(figsize=(8, 1.2 + 1.3 * len(chosen)), layout="constrained")
    panels = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
    for axes, example in zip(panels, chosen.tolist(), strict=True):
        values = trace[:, :, example]
        alpha = min(1.0, 8 / len(values))
        axes.plot(samples.draw_steps, values.T, lw=0.6, alpha=alpha, color="C0", rasterized=True)
        axes.plot(samples.draw_steps, values.mean(0), color="navy", lw=1)
        axes.set_ylabel(f"example {example}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(
        f"losses {of!r}, {samples.health().splitlines()[0]}, and their mean",
        loc="left",
        fontsize="medium",
    )
    panels[-1].set_xlabel("step")
    return figure


def _signed_image(
    axes: "Axes", values: Tensor, clear: Tensor, limit: float | None = None
) -> "AxesImage":
    """Draw a matrix, red above 0 and blue below, pale where it is not clear of noise."""
    bound = float(_largest(values.abs().reshape(1, -1), 1)) if limit is None else limit
    return axes.imshow(
        values.numpy(),
        alpha=torch.where(clear, 1.0, 0.25).numpy(),
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        interpolation="nearest",
    )


def _largest(values: Tensor, dim: int) -> Tensor:
    """The largest value along a dimension, of those that are known; 1 where all are 0."""
    largest = values.nan_to_num(nan=0.0).amax(dim)
    return torch.where(largest > 0, largest, 1.0)


def _of_chains(found: Response) -> str:
    frozen = f", {found.num_frozen} frozen and left out" if found.num_frozen else ""
    return f"{found.num_chains} chains{frozen}; pale: within two standard errors of 0"


def _labels(labels: Any, number: int) -> list[str]:
    """Labels of columns; none where there are too many to read.

    Raises:
        TypeError, ValueError: They are not one for each column.
    """
    if labels is None:
        return []
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f"labels must be a list of names, got {type(labels).__name__}")
    if len(labels) != number:
        raise ValueError(f"labels must be one for each of {number} columns, got {len(labels)}")
    return list(map(str, labels)) if number <= _MOST_LABELS else []


def _permutation(order: Any, size: int, *, is_whole: bool = True, name: str = "order") -> Tensor:
    """Indices of rows, int64.

    Raises:
        TypeError, ValueError: They are no indices, out of range, or not all where they must be.
    """
    if isinstance(order, str) or not isinstance(order, Sequence | Tensor):
        raise TypeError(f"{name} must be a list of indices, got {type(order).__name__}")
    given = order if isinstance(order, Tensor) else torch.tensor(list(order))
    if given.is_floating_point() or given.is_complex() or given.ndim != 1 or given.is_meta:
        raise TypeError(f"{name} must be indices, got {given.dtype} of shape {tuple(given.shape)}")
    rows = given.cpu().long()
    if is_whole and rows.sort().values.tolist() != list(range(size)):
        raise ValueError(f"{name} must have each of {size} rows once, got {rows.tolist()}")
    if not bool(((rows >= 0) & (rows < size)).all()):
        raise ValueError(f"{name} must be within {size} rows, got {rows.tolist()}")
    return rows
