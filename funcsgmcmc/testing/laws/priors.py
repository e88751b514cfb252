"""Laws of log-priors: a log-density is a pure scalar, maps over chains, and has its gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict

from funcsgmcmc import checks, tree
from funcsgmcmc.priors import LogPrior, log_prior_pull
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws.base import close, identical, tensors
from funcsgmcmc.testing.problem import format_value


@dataclass(frozen=True)
class PriorProblem:
    """A log-prior, and parameters to try it on.

    Attributes:
        log_prior: log p(w).
        params: w of several chains.
        direction: The direction in which a slope is measured, a tree of one chain.
    """

    log_prior: LogPrior
    params: TensorDict
    direction: TensorDict

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the problem in hypothesis's reports."""
        text = f"params {format_value(self.params)}, along {format_value(self.direction)}"
        printer.text(f"PriorProblem({text})")


@st.composite
def prior_problems(
    draw: st.DrawFn,
    log_prior: LogPrior,
    params: TensorDict,
    elements: strategies.Numbers | None = None,
) -> PriorProblem:
    """Problems for a log-prior: trees of the structure of `params`, their entries in `elements`."""
    num_chains, exact = draw(st.integers(1, 3)), elements is not None
    many = draw(strategies.trees_like(params.expand(num_chains), elements, exact=exact))
    return PriorProblem(log_prior, many, draw(strategies.trees_like(params)))


def density_is_a_scalar(problem: PriorProblem) -> None:
    """Log p(w) of one chain is one real number, finite, the same every time, and writes nothing."""
    one = problem.params[0]
    held = [leaf.clone() for leaf in tensors(one)]
    value = checks.scalar("log_prior", problem.log_prior(one))
    assert bool(value.isfinite()), f"log p is {float(value)}"
    identical(problem.log_prior(one), value, "the same log p twice")
    identical(tensors(one), held, "log_prior wrote to the parameters")


def density_is_mapped_over_chains(problem: PriorProblem) -> None:
    """Under torch.vmap, log p and its gradient are those of each chain by itself."""
    pull = log_prior_pull(problem.log_prior)
    together, values = torch.vmap(pull)(problem.params)
    for chain, params in enumerate(problem.params):
        alone, value = pull(params)
        close(together[chain], alone, f"gradient of chain {chain} under vmap")
        close(values[chain], value, f"log p of chain {chain} under vmap")


def gradient_is_the_slope(problem: PriorProblem) -> None:
    """Autograd's gradient is the slope of log p, by differences of fourth order."""
    pull, value = log_prior_pull(problem.log_prior)(problem.params[0])
    w, direction = tree.flatten(problem.params[0]), tree.flatten(problem.direction)

    def change(step: float) -> float:
        ends = [
            problem.log_prior(tree.unflatten(w + signed * direction, problem.params[0]))
            for signed in (step, -step)
        ]
        return float(ends[0] - ends[1])

    def slope(step: float) -> float:
        return (8 * change(step) - change(2 * step)) / (12 * step)

    # Two steps show how far differences can be trusted: not at all across a kink, as |w| has at 0.
    coarse, fine = slope(1e-3), slope(5e-4)
    expected = -float(tree.flatten(pull) @ direction)
    assert math.isfinite(expected), f"autograd's slope of log p is {expected}"
    tolerance = 10 * abs(coarse - fine) + 1e-8 * (1 + abs(float(value)) + abs(fine))
    assert not abs(fine - expected) > tolerance, (
        f"autograd's slope of log p is {expected}, by differences {fine}"
    )


PRIOR_LAWS: tuple[Callable[[PriorProblem], None], ...] = (
    density_is_a_scalar,
    density_is_mapped_over_chains,
    gradient_is_the_slope,
)
