"""Plots of a run, by Matplotlib (the extra `plot`)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.estimates.llc import running_llc
from funcsgmcmc.runs.record import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_llc(samples: Samples) -> "Figure":
    """Plot the loss of every chain, burn-in shaded, above the running learning coefficient.

    The band around the running estimate is two standard errors over chains.

    Args:
        samples: A run for which L(w₀) is known.

    Returns:
        A figure of two axes over a common axis of steps; `figure.savefig("llc.png")` writes it.

    Raises:
        ImportError: The extra `plot` is not installed.
        ValueError: As `llc`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise checks.missing_extra("plot", "matplotlib", "plot_llc") from missing
    mean, error = running_llc(samples)
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _plot_losses(above, samples)
    _plot_running_llc(below, samples, mean, error)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_losses(axes: "Axes", samples: Samples) -> None:
    losses = samples.losses[samples.healthy].float()
    steps = torch.arange(samples.num_steps)
    # Many chains: each pale, and one picture instead of thousands of lines in a PDF.
    axes.plot(steps, losses.T, color="C0", lw=0.5, alpha=min(1.0, 8 / len(losses)), rasterized=True)
    axes.plot(steps, losses.mean(0), color="navy", lw=1, label="mean over chains")
    if samples.initial_loss is not None:
        anchor_loss = float(samples.initial_loss.mean())
        label = f"$L_n(w_0)$ = {anchor_loss:.3g}"
        axes.axhline(anchor_loss, color="0.3", lw=1, ls="--", label=label)
    if samples.num_burnin_steps:
        axes.axvspan(0, samples.num_burnin_steps, color="0.5", alpha=0.2, lw=0, label="burn-in")
    axes.set_ylabel("minibatch loss")
    axes.set_title(samples.health().splitlines()[0], loc="left", fontsize="medium")
    axes.legend(loc="upper right", framealpha=0.9)


def _plot_running_llc(axes: "Axes", samples: Samples, mean: Tensor, error: Tensor) -> None:
    steps = samples.draw_steps
    axes.fill_between(steps, mean - 2 * error, mean + 2 * error, color="C1", alpha=0.3, lw=0)
    axes.plot(steps, mean, color="C1", label=f"{mean[-1]:.4g} ± {2 * error[-1]:.2g} (2 s.e.)")
    if samples.num_burnin_steps:
        axes.axvspan(0, samples.num_burnin_steps, color="0.5", alpha=0.2, lw=0)
    axes.set_ylabel(r"running LLC $\hat\lambda$")
    axes.set_xlabel("step")
    axes.set_xlim(0, samples.num_steps)
    axes.legend(loc="lower right", framealpha=0.9)
