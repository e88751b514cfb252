"""Laws of what users put into a sampler: preconditioners and log-priors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.priors import LogPrior, log_prior_pull
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws import Law, close, identical, law
from funcsgmcmc.testing.laws.law import tensors
from funcsgmcmc.testing.problems import Problem, shown


@law(dtypes=(torch.float64, torch.float32, torch.bfloat16))
def gains_are_scales(problem: Problem) -> None:
    """G is finite, not negative, float32 at least, and like the parameters."""
    preconditioner = problem.settings["preconditioner"]
    averages = preconditioner.init(problem.params)
    for given in problem.given:
        known = given.evaluation
        scaling = preconditioner.update(averages, known.grads, known.hessian_diagonal)
        assert scaling.state.batch_size == averages.batch_size, "averages changed their chains"
        for new, old in zip(tensors(scaling.state), tensors(averages), strict=True):
            assert new.dtype == old.dtype, f"an average was {old.dtype}, is {new.dtype}"
        averages = scaling.state
        for gain in tensors(scaling.gain):
            assert bool(((gain >= 0) & gain.isfinite()).all()), f"G is {gain.tolist()}"
            assert gain.dtype == tree.working_dtype(gain), f"G is kept in {gain.dtype}"
        for what in (scaling.gain, scaling.correction, scaling.drift_grads):
            if what is not None:
                assert tree.names(what) == tree.names(problem.params), "leaves are not those of w"


@law(chains=[()])
def corrections_are_the_gains_derivatives(problem: Problem) -> None:
    """Γ, if there is one, is autograd's ∂G/∂w on L(w) = Σ a w²/2 + w⁴/12, entry by entry."""
    preconditioner, params = problem.settings["preconditioner"], problem.params
    averages = preconditioner.init(params)
    for given in problem.given:  # averages of some steps before
        known = given.evaluation
        averages = preconditioner.update(averages, known.grads, known.hessian_diagonal).state
    stiffness = tree.flatten(problem.start)

    def scaling(w: Tensor) -> Any:
        grads = tree.unflatten(stiffness * w + w**3 / 3, params)
        return preconditioner.update(averages, grads, tree.unflatten(stiffness + w**2, params))

    w = tree.flatten(params)
    correction = scaling(w).correction
    if correction is None:
        return

    def gain(w: Tensor) -> Tensor:
        return tree.flatten(scaling(w).gain)

    jacobian = torch.autograd.functional.jacobian(gain, w)
    close(tree.flatten(correction), jacobian.diagonal().nan_to_num(), "Γ, against ∂G/∂w")


PRECONDITIONER_LAWS: tuple[Law, ...] = (gains_are_scales, corrections_are_the_gains_derivatives)


@dataclass(frozen=True)
class PriorProblem:
    """A log-prior, and parameters of some chains.

    Attributes:
        log_prior: log p(w).
        params: `[C]` chains.
        direction: A tree like one chain's parameters.
    """

    log_prior: LogPrior
    params: TensorDict
    direction: TensorDict

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis prints it."""
        text = f"params {shown(self.params)}, along {shown(self.direction)}"
        printer.text(f"PriorProblem({text})")


@st.composite
def prior_problems(
    draw: st.DrawFn,
    log_prior: LogPrior,
    params: TensorDict,
    elements: strategies.Numbers | None = None,
) -> PriorProblem:
    """Problems for a log-prior of parameters like these, with entries from a strategy."""
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

    def along(step: float) -> Tensor:
        return problem.log_prior(tree.unflatten(w + step * direction, problem.params[0]))

    def slope(step: float) -> float:
        near, far = along(step) - along(-step), along(2 * step) - along(-2 * step)
        return float(8 * near - far) / (12 * step)

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
