"""Contour SGLD: SGLD on a posterior flattened along its energy, with weights that undo it.

The range of the energy U(w) is cut into parts 1, …, m, inner ones of width Δu; the first and the
last are open. J is the part that holds U(w). θ, a point of the simplex, estimates the posterior
probability of each part, and log Ψ(U) is a smooth curve through its logarithm. With the slope of
the curve at the border of parts i and i + 1

    s(i)        = (log θ(i + 1) − log θ(i))/Δu,  limited to  −M ≤ 1 + ζ T s(i) ≤ M

and 0 one width below the range and one above it, d log Ψ/dU is linear between these places, and
the sum of Ψ over the parts' centres is 1. With t = 0, 1, … the step:

    multiplier  = 1 + ζ T d log Ψ/dU
    w'          = SGLD's step from w, with all of its drift times the multiplier
    weight      = Ψ(U(w))^ζ
    θ'(i)       = θ(i) + ω_t min(weight, 1) (1[i = J] − θ(i))

ε ↔ `lr`, ζ ↔ `flatness`, ω_t ↔ `weight_lr`, m ↔ `num_partitions`, M ↔ `max_multiplier`, the range
of energies ↔ `energy_range`, T ↔ `temperature`; the other symbols as for `sgld`. Where a chain has
been often, θ is large: the multiplier is small or negative there, and drives the chain out.

For θ that changes slowly the chain samples a density proportional to e^(−U/T)/Ψ^ζ, nearly flat in
the energy for ζ = 1, so that it crosses barriers. Averages over the posterior are weighted:
E f = Σ Ψ^ζ f/Σ Ψ^ζ, which `funcsgmcmc.weighted_mean` computes; and θ has the probabilities of the
parts as its fixed point, whatever M is. Energies are those of the minibatch: with noisy ones, θ and
the weights are those of the noisy energy.

At a fixed θ weighted averages are of weak order 1 in ε, once a step changes the energy by less than
the width of a part: √(εT) ‖∇U‖ < Δu.

Source: Deng, Lin and Liang, "A contour stochastic gradient Langevin dynamics algorithm for
simulations of multi-modal distributions", NeurIPS 2020, eqs. 5, 7, 8 and algorithm 1; their ε is
ε/2 here, their τ is T, their Ũ is U on the minibatch. Four things differ. Their slope is constant
over a part and jumps at its border: on a double well the weighted second moment was off by 4 % at
step sizes where it is off by 0.4 % with a continuous one. Their multiplier has no limit (M = ∞),
and pushed chains over the edge where SGLD is stable. Their weight, also in the update of θ, is
θ(J)^ζ, which differs from the density's by a factor of order Δu. And above the range the chain is
SGLD, where their slope of the last part goes on, uphill without end while θ(m) is small.
"""

import math
from typing import Any, Unpack

import torch
from tensordict import TensorClass, TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.preconditioners import Preconditioner, check_preconditioner, identity
from funcsgmcmc.samplers.langevin import LangevinSampler, LangevinState
from funcsgmcmc.samplers.settings import SharedSettings, build, takes_shared_settings
from funcsgmcmc.schedules import Schedule, polynomial_decay, setting
from funcsgmcmc.terms import Slope, Term, Terms, move, step_terms


class EnergyPartition(TensorClass, frozen=True):
    """The parts that the range of the energy is cut into.

    Attributes:
        low: Where the second part begins, `[*chains]` or `[]`; the first is all below.
        width: Δu, of the same shape.
        start: θ before the first step, uniform, `[*chains, m]` or `[m]`.
    """

    low: Tensor
    width: Tensor
    start: Tensor

    def place(self, energy: Tensor) -> Tensor:
        """How many widths an energy lies above the beginning of the first part, `[*chains]`.

        Borders of parts are at 1, …, m − 1; energies beyond the open parts' first width are at the
        ends, 0 and m.
        """
        last = self.start.shape[-1]
        # An energy that is not finite must stay an index.
        places = torch.nan_to_num((energy - self.low) / self.width + 1, nan=last)
        return places.clamp(0, last)


class ContourState(LangevinState, frozen=True):
    """State of a chain of contour SGLD.

    Attributes:
        theta: θ, `[*chains, m]`.
        log_weight: ζ log Ψ of the parameters that the last step started from, `[*chains]`.
    """

    theta: Tensor
    log_weight: Tensor


class ContourSGLD(LangevinSampler, frozen=True):
    """Settings of contour SGLD; made by `contour_sgld`.

    Attributes:
        flatness: ζ.
        weight_lr: ω_t.
        max_multiplier: M.
        partition: How the range of the energy is cut.
    """

    flatness: Tensor
    weight_lr: Tensor
    max_multiplier: Tensor
    partition: EnergyPartition

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> ContourState:
        """State at `params`, which are copied, with θ uniform; no noise is needed."""
        fields = self.start(params)
        start = fields["params"]
        shape = (*start.shape, self.partition.start.shape[-1])
        # Cloned: an expanded θ would be the sampler's own memory.
        theta = self.partition.start.to(tree.device(start)).expand(shape).clone()
        return ContourState(
            **fields,
            preconditioner=self.preconditioner.init(start),
            theta=theta,
            # No weight is known before a step has met an energy.
            log_weight=torch.zeros_like(theta[..., 0]),
        )

    def uses_first_noise(self) -> bool:
        """There is no momentum."""
        return type(self).init is not ContourSGLD.init

    def schedulable(self) -> tuple[str, ...]:
        """θ has a step size of its own."""
        return (*super().schedulable(), "weight_lr")

    def log_weight(self, state: ContourState) -> Tensor:
        """The log weight ζ log Ψ of the parameters that the last step started from."""
        return state.log_weight

    def advance(
        self, state: ContourState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[ContourState, Terms]:
        """Make one step, by the equation in the module's docstring."""
        slope = self.slope(state, evaluation)
        factors, averages = self.factors(state, evaluation)
        place = self.partition.place(self.energy(state, slope, evaluation))
        log_psi, rise = log_density(state.theta, place, *self.limits())
        multiplier = 1 + self.flatness * self.temperature * rise / self.partition.width
        log_weight = self.flatness * log_psi
        theta = next_theta(state.theta, place, self.weight_lr * log_weight.exp().clamp(max=1))
        # The multiplier is the drift's only: noise is that of SGLD.
        shock = Term((self.lr * self.temperature) ** 0.5, noise)
        terms = step_terms(slope, factors, shock, drift=self.lr / 2 * multiplier)
        params = self.boxed(move(state.params, terms), self.center(state))
        state = state.replace(params=params, preconditioner=averages, step=state.step + 1)
        return state.replace(theta=theta, log_weight=log_weight), terms

    def limits(self) -> tuple[Tensor, Tensor]:
        """The least and the largest rise of log Ψ over a width, for −M ≤ multiplier ≤ M."""
        strength = self.flatness * self.temperature
        # Where nothing multiplies the rise, nothing limits it.
        widths = torch.where(strength > 0, self.partition.width / strength, math.inf)
        highest = torch.where(self.max_multiplier > 1, (self.max_multiplier - 1) * widths, 0.0)
        return -(1 + self.max_multiplier) * widths, highest.where(strength > 0, math.inf)

    def energy(self, state: ContourState, slope: Slope, evaluation: Evaluation) -> Tensor:
        """U(w) = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p, `[*chains]`.

        Raises:
            ValueError: The loss, or the value of the log-prior, was not given.
        """
        loss, log_prior = evaluation.loss, evaluation.log_prior
        if loss is None or (evaluation.prior_pull is not None and log_prior is None):
            missing = "loss" if loss is None else "log_prior"
            raise ValueError(
                f"this sampler looks at the energy: update needs {missing}=…, got None"
            )
        assert slope.distance is not None  # the slope of a sampler has it always
        distance = slope.distance.direction
        # In float64, so that the part does not depend on how the loss's dtype meets a chain's.
        pulls = self.localization * tree.dot(distance, distance).double()
        pulls = pulls + self.weight_decay * tree.dot(state.params, state.params).double()
        potential = self.nbeta * loss.double() + pulls / 2
        return potential if log_prior is None else potential - log_prior.double()


def next_theta(theta: Tensor, place: Tensor, rate: Tensor) -> Tensor:
    """θ'(i) = θ(i) + rate (1[i = J] − θ(i)).

    Args:
        theta: θ, `[*chains, m]`.
        place: Where the energy lies, in widths, `[*chains]`.
        rate: ω Ψ^ζ, `[*chains]`.
    """
    part = place.floor().clamp(max=theta.shape[-1] - 1).unsqueeze(-1)
    is_here = torch.arange(theta.shape[-1], device=theta.device) == part
    # The difference of two distributions: θ keeps its sum 1.
    return theta + rate.unsqueeze(-1) * (is_here.to(theta.dtype) - theta)


def log_density(
    theta: Tensor, place: Tensor, lowest: Tensor, highest: Tensor
) -> tuple[Tensor, Tensor]:
    """The density of the energy, estimated by a smooth curve: log Ψ, and its rise over a width.

    Args:
        theta: θ, `[*chains, m]`.
        place: Where the energy lies, in widths from the beginning of the first part, `[*chains]`.
        lowest: Limit of the rise from one part to the next, `[*chains]` or `[]`.
        highest: The other limit.

    Returns:
        log Ψ and Δu d log Ψ/dU, `[*chains]`.
    """
    # A part that is never visited may underflow to 0.
    log_theta = theta.clamp(min=torch.finfo(theta.dtype).tiny).log()
    rises = log_theta.diff(dim=-1).clamp(lowest.unsqueeze(-1), highest.unsqueeze(-1))
    # At places 0, 1, …, m: the derivative, and by the trapezoid rule its integral.
    rises = torch.nn.functional.pad(rises, (1, 1))
    start, end = rises[..., :-1], rises[..., 1:]
    below = ((start + end) / 2).cumsum(-1) - (start + end) / 2
    # At the centre of each part; exact, as the derivative is linear.
    total = (below + (3 * start + end) / 8).logsumexp(-1)
    part = place.floor().clamp(max=theta.shape[-1] - 1)
    share, index = place - part, part.to(torch.int64).unsqueeze(-1)  # `gather` takes int64

    def here(values: Tensor) -> Tensor:
        return values.gather(-1, index).squeeze(-1)

    rise = here(start) + (here(end) - here(start)) * share
    log_psi = here(below) + (here(start) + rise) / 2 * share - total
    return log_psi, rise


def _check_energy_range(value: Any) -> tuple[Tensor, Tensor]:
    """Check the two bounds of a range of energies, each shared or one a chain.

    Raises:
        TypeError: The value is no pair of real numbers or tensors.
        ValueError: A bound is not finite, or the first is not below the second.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"energy_range must be a pair (low, high), got {value!r}")
    names = ("low energy", "high energy")
    # Energies may be negative.
    bounds = (checks.hyperparameter("energy_range", each, minimum=-math.inf) for each in value)
    low, high = checks.per_chain(dict(zip(names, bounds, strict=True)))[0].values()
    if checks.has_values(low) and not bool((low < high).all() & low.isfinite().all()):
        raise ValueError(
            f"energy_range must be finite with low < high, got {low.tolist()} and {high.tolist()}"
        )
    return low, high


@takes_shared_settings
def contour_sgld(
    lr: float | Tensor | Schedule,
    *,
    energy_range: tuple[float | Tensor, float | Tensor],
    num_partitions: int = 100,
    flatness: float | Tensor = 1.0,
    weight_lr: float | Tensor | Schedule | None = None,
    max_multiplier: float | Tensor = 1.0,
    preconditioner: Preconditioner | None = None,
    **shared: Unpack[SharedSettings],
) -> ContourSGLD:
    """Make a sampler of contour SGLD, which crosses barriers between modes (Deng et al. 2020).

        w' = w − (ε/2) (1 + ζT d log Ψ(U)/dU) m G ∇U(w) + √(εT) m √G η

    with Ψ(U) the estimated probability of energies near U(w), learned as the chain goes: the
    module's docstring has the equations. Draws carry weights, `Samples.log_weights`, and averages
    over the posterior are `weighted_mean(values, log_weights)`.

    Args:
        lr: Step size ε ≥ 0, in units of w². Stable for ε < 4/(M · largest curvature of U), for
            M = 1 where SGLD is; accurate where √(εT) ‖∇U‖ < Δu.
        energy_range: The energies U(w) between which the range is cut into parts: from some T
            above the lowest minimum (parts that hold no energies make θ jump), to above the
            barriers.
        num_partitions: m ≥ 3, the parts: m − 2 of width Δu within the range, one below it and one
            above. Δu of about T or less follows the energy well.
        flatness: ζ ≥ 0; 0 is plain SGLD, 1 a density flat in the energy.
        weight_lr: ω_t in [0, 1), the step size of θ (default: 10/(1000 + t)). For the weights to
            be right θ must change slowly: at the default, 5,000 steps left 3 % in the second
            moment of a Gaussian.
        max_multiplier: M ≥ 1, the limit of the drift's multiplier, up or down. At 1 no drift is
            longer than SGLD's; larger ones flatten more, and ask for an ε smaller by as much.
        preconditioner: G (default: `identity()`).
        **shared: The settings that all samplers share.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    preconditioner = identity() if preconditioner is None else preconditioner
    check_preconditioner(preconditioner)
    low, high = _check_energy_range(energy_range)
    # The first and the last part are open, without a width.
    num_inner = checks.count("num_partitions", num_partitions, minimum=3) - 2
    bounds, chains = checks.per_chain({"low": low, "width": (high - low) / num_inner})
    start = torch.full((*chains, num_partitions), 1 / num_partitions, dtype=torch.float64)
    if weight_lr is None:
        weight_lr = polynomial_decay(10.0, offset=1000.0, power=1.0)
    return build(
        ContourSGLD,
        lr,
        shared,
        preconditioner=preconditioner,
        flatness=checks.hyperparameter("flatness", flatness),
        weight_lr=setting("weight_lr", weight_lr, below=1.0),
        max_multiplier=checks.hyperparameter("max_multiplier", max_multiplier, minimum=1.0),
        partition=EnergyPartition(**bounds, start=start, batch_size=chains, lock=False),
    )
