"""Contour SGLD: SGLD on a posterior flattened along its energy, with weights that undo it.

The range of the energy U(w) is cut into parts 1, …, m, inner ones of width Δu from u to u + Δu; the
first and the last are open. J is the part that holds U(w). θ, a point of the simplex, estimates the
posterior probability of each part. With t = 0, 1, … the step:

    θ'(i)       = θ(i) + ω_t θ(J)^ζ (1[i = J] − θ(i))
    slope       = (log θ'(J) − log θ'(J − 1))/Δu              0 in the first and the last part
    multiplier  = 1 + ζ T slope
    w'          = SGLD's step from w, with all of its drift times the multiplier
    Ψ(w)        = θ'(J − 1) exp(slope · (U(w) − u))           θ'(1) in the first part
    weight      = Ψ(w)^ζ

ε ↔ `lr`, ζ ↔ `flatness`, ω_t ↔ `weight_lr`, m ↔ `num_partitions`, the range of energies ↔
`energy_range`, T ↔ `temperature`; the other symbols as for `sgld`. Where a chain has been often, θ
is large: the multiplier is small or negative there, and drives the chain out.

For θ that changes slowly the chain samples a density proportional to e^(−U/T)/Ψ^ζ, nearly flat in
the energy for ζ = 1, so that it crosses barriers. Averages over the posterior are weighted:
E f = Σ Ψ^ζ f/Σ Ψ^ζ, which `funcsgmcmc.weighted_mean` computes. Energies are those of the minibatch:
with noisy ones, θ and the weights are those of the noisy energy.

Source: Deng, Lin and Liang, "A contour stochastic gradient Langevin dynamics algorithm for
simulations of multi-modal distributions", NeurIPS 2020, eqs. 5, 7, 8 and algorithm 1; their ε is
ε/2 here, their τ is T, their Ũ is U on the minibatch. Three things differ: θ is updated before the
step instead of after it, from the same energies; the weight is that of the density sampled (their
Ψ) where they take its value at the end of the part, θ(J)^ζ, which differs by a factor of order Δu;
and above the range the chain is SGLD, where their slope of the last part goes on, uphill without
end while θ(m) is small.
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

    def locate(self, energy: Tensor) -> tuple[Tensor, Tensor]:
        """The part that holds an energy, and how far into it the energy lies.

        Returns:
            J − 1, counted from 0, int64 `[*chains]`; and a share of the part's width, `[*chains]`:
            0 in the last part, which is open.
        """
        last = self.start.shape[-1] - 1
        # Inside the range parts are 1, …, m − 2; an energy that is not finite must stay an index.
        place = torch.nan_to_num((energy - self.low) / self.width + 1, nan=last)
        part = place.floor().clamp(0, last)
        share = torch.where(part == last, 0.0, place - part)
        # `gather` takes int64.
        return part.to(torch.int64), share


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
        partition: How the range of the energy is cut.
    """

    flatness: Tensor
    weight_lr: Tensor
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
        part, share = self.partition.locate(self.energy(state, slope, evaluation))
        theta = next_theta(state.theta, part, self.weight_lr, self.flatness)
        log_psi, rise = log_density(theta, part, share)
        multiplier = 1 + self.flatness * self.temperature * rise / self.partition.width
        # The multiplier is the drift's only: noise is that of SGLD.
        shock = Term((self.lr * self.temperature) ** 0.5, noise)
        terms = step_terms(slope, factors, shock, drift=self.lr / 2 * multiplier)
        params = self.boxed(move(state.params, terms), self.center(state))
        state = state.replace(params=params, preconditioner=averages, step=state.step + 1)
        return state.replace(theta=theta, log_weight=self.flatness * log_psi), terms

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


def next_theta(theta: Tensor, part: Tensor, lr: Tensor, flatness: Tensor) -> Tensor:
    """θ'(i) = θ(i) + ω θ(J)^ζ (1[i = J] − θ(i)).

    Args:
        theta: θ, `[*chains, m]`.
        part: J − 1, `[*chains]`.
        lr: ω, `[*chains]` or `[]`.
        flatness: ζ, likewise.
    """
    part = part.unsqueeze(-1)
    is_here = torch.arange(theta.shape[-1], device=theta.device) == part
    rate = lr.unsqueeze(-1) * theta.gather(-1, part) ** flatness.unsqueeze(-1)
    # The difference of two distributions: θ keeps its sum 1.
    return theta + rate * (is_here.to(theta.dtype) - theta)


def log_density(theta: Tensor, part: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Density of the energy: log Ψ, and its rise over the part.

    Args:
        theta: θ, `[*chains, m]`.
        part: J − 1, `[*chains]`.
        share: (U − u)/Δu, how far into the part the energy lies.

    Returns:
        log Ψ and log θ(J) − log θ(J − 1), the latter 0 in the first and the last part; `[*chains]`.
    """
    # A part that is never visited may underflow to 0.
    log_theta = theta.clamp(min=torch.finfo(theta.dtype).tiny).log()
    # The first part has none below: with itself its slope is 0.
    below = (part - 1).clamp(min=0)
    end = torch.where(part == theta.shape[-1] - 1, below, part)
    start = log_theta.gather(-1, below.unsqueeze(-1)).squeeze(-1)
    rise = log_theta.gather(-1, end.unsqueeze(-1)).squeeze(-1) - start
    return start + rise * share, rise


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
    preconditioner: Preconditioner | None = None,
    **shared: Unpack[SharedSettings],
) -> ContourSGLD:
    """Make a sampler of contour SGLD, which crosses barriers between modes (Deng et al. 2020).

        w' = w − (ε/2) (1 + ζT (log θ(J) − log θ(J − 1))/Δu) m G ∇U(w) + √(εT) m √G η

    with θ(J) the estimated probability of the energies near U(w), learned as the chain goes: the
    module's docstring has the equations. Draws carry weights, `Samples.log_weights`, and averages
    over the posterior are `weighted_mean(values, log_weights)`.

    Args:
        lr: Step size ε ≥ 0, in units of w².
        energy_range: The energies U(w) between which the range is cut into parts: from some T
            above the lowest minimum (parts that hold no energies make θ, and with it the drift,
            jump), to above the barriers.
        num_partitions: m ≥ 3, the parts: m − 2 of width Δu within the range, one below it and one
            above. Δu of about T or less follows the energy well.
        flatness: ζ ≥ 0; 0 is plain SGLD, 1 a density flat in the energy.
        weight_lr: ω_t in [0, 1), the step size of θ (default: 10/(1000 + t)). For the weights to
            be right θ must change slowly: at the default, 5,000 steps left 3 % in the second
            moment of a Gaussian.
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
        partition=EnergyPartition(**bounds, start=start, batch_size=chains, lock=False),
    )
