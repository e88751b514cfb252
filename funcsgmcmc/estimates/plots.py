"""Plots, by Matplotlib (the extra `plot`): of a run, of a sweep, of responses."""

from typing import TYPE_CHECKING

import torch

from funcsgmcmc import checks
from funcsgmcmc.estimates.figures import figure_of
from funcsgmcmc.estimates.llc import LLC, RunningLLC, llc, running_llc
from funcsgmcmc.estimates.response_plots import plot_influence, plot_susceptibilities, plot_traces
from funcsgmcmc.estimates.sweep_plots import plot_sweep
from funcsgmcmc.runs.record import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_influence", "plot_llc", "plot_susceptibilities", "plot_sweep", "plot_traces"]


def plot_llc(samples: Samples) -> "Figure":
    """Plot the loss of every chain, burn-in shaded, above the running learning coefficient.

    The band around the running estimate is its Monte Carlo standard error (MCSE), on both sides:
    that which `llc` reports, as the legend does.

    Args:
        samples: A run for which L(w₀) is known.

    Returns:
        A figure of two axes over a common axis of steps; `figure.savefig("llc.png")` writes it.

    Raises:
        ImportError: The extra `plot` is not installed.
        ValueError: As `llc`.
    """
    figure_class = figure_of("plot_llc")
    checks.instance("samples", samples, Samples)
    estimate, running = llc(samples), running_llc(samples)
    figure = figure_class(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _plot_losses(above, samples)
    _plot_running_llc(below, samples, estimate, running)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_losses(axes: "Axes", samples: Samples) -> None:
    losses = samples.losses[samples.healthy].float()
    steps = samples.first_step + torch.arange(samples.num_steps)
    # Many chains: each pale, and one picture instead of thousands of lines in a PDF.
    axes.plot(steps, losses.T, color="C0", lw=0.5, alpha=min(1.0, 8 / len(losses)), rasterized=True)
    axes.plot(steps, losses.mean(0), color="navy", lw=1, label="mean over chains")
    if samples.initial_loss is not None:
        anchor_loss = float(samples.initial_loss.mean())
        label = f"$L_n(w_0)$ = {anchor_loss:.3g}"
        axes.axhline(anchor_loss, color="0.3", lw=1, ls="--", label=label)
    _shade_burnin(axes, samples, "burn-in")
    axes.set_ylabel("minibatch loss")
    axes.set_title(samples.health().splitlines()[0], loc="left", fontsize="medium")
    axes.legend(loc="upper right", framealpha=0.9)


def _plot_running_llc(axes: "Axes", samples: Samples, estimate: LLC, running: RunningLLC) -> None:
    steps = samples.draw_steps[running.num_draws - 1]
    mean, mcse = running.mean, running.mcse
    axes.fill_between(steps, mean - mcse, mean + mcse, color="C1", alpha=0.3, lw=0)
    axes.plot(steps, mean, color="C1", label=str(estimate).splitlines()[0])
    _shade_burnin(axes, samples)
    axes.set_ylabel(r"running LLC $\hat\lambda$ ± MCSE")
    axes.set_xlabel("step")
    axes.set_xlim(samples.first_step, samples.first_step + samples.num_steps)
    axes.legend(loc="best", framealpha=0.9)


def _shade_burnin(axes: "Axes", samples: Samples, label: str | None = None) -> None:
    if samples.num_burnin_steps:
        start, stop = samples.first_step, samples.first_step + samples.num_burnin_steps
        axes.axvspan(start, stop, color="0.5", alpha=0.2, lw=0, label=label)
