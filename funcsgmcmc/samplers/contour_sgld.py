"""Contour SGLD: SGLD on a posterior flattened along its energy, with weights that undo it.

The range of the energy U(w) is cut into m parts of width Δu, the first and the last open; J(w) is
the part that holds U(w). θ, a point of the simplex, estimates the posterior probability of each
part. With t = 0, 1, … the step:

    θ'(i)       = θ(i) + ω_t θ(J)^ζ (1[i = J] − θ(i))                             J = J(w)
    multiplier  = 1 + ζ T (log θ'(J) − log θ'(max(J − 1, 1)))/Δu
    w'          = SGLD's step from w, with all of its drift times the multiplier
    weight      = θ'(J)^ζ, of w

ε ↔ `lr`, ζ ↔ `flatness`, ω_t ↔ `weight_lr`, m ↔ `num_partitions`, the range of energies ↔
`energy_range`, T ↔ `temperature`; the other symbols as for `sgld`. Where a chain has been often, θ
is large and rising: the multiplier is small or negative, and drives it out.

The chain samples a density proportional to e^(−U/T)/θ(J)^ζ, nearly flat in the energy for ζ = 1, so
that it crosses barriers. Averages over the posterior are weighted: E f = Σ θ^ζ f/Σ θ^ζ, which
`funcsgmcmc.weighted_mean` computes. Energies are those of the minibatch: with noisy ones, θ and the
weights are those of the noisy energy.

Source: Deng, Lin and Liang, "A contour stochastic gradient Langevin dynamics algorithm for
simulations of multi-modal distributions", NeurIPS 2020, eqs. 7, 8 and algorithm 1; their ε is ε/2
here, their τ is T, their Ũ is U on the minibatch; θ is updated before the step instead of after it,
from the same energies.
"""

from collections.abc import Mapping
from typing import cast

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.preconditioners import Preconditioner, identity
from funcsgmcmc.samplers.base import Evaluation, State, shared_settings
from funcsgmcmc.samplers.langevin import LangevinSampler, LangevinState
from funcsgmcmc.schedules import Schedule, polynomial_decay, setting
from funcsgmcmc.terms import Parts, Term, Terms, decompose, move


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

    def index(self, energy: Tensor) -> Tensor:
        """J − 1, the part that holds an energy, counted from 0: int64 `[*chains]`."""
        last = self.start.shape[-1] - 1
        # Inside the range parts are 1, …, m − 2; an energy that is not finite must stay an index.
        part = torch.nan_to_num(torch.floor((energy - self.low) / self.width), nan=last)
        return (part + 1).clamp(0, last).to(torch.int64)


class ContourState(LangevinState, frozen=True):
    """State of a chain of contour SGLD.

    Attributes:
        theta: θ, `[*chains, m]`.
        log_weight: ζ log θ'(J) of the parameters that the last step started from, `[*chains]`.
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
    weight_lr: Tensor | Schedule
    partition: EnergyPartition

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> ContourState:
        """State at `params`, which are copied, with θ uniform; no noise is needed."""
        start = super().init(params, noise)
        shape = (*start.shape, self.partition.start.shape[-1])
        theta = self.partition.start.to(tree.device(start.params)).expand(shape).clone()
        return self.weighted(start, theta, torch.zeros_like(theta[..., 0]))

    def weighted(self, arrived: LangevinState, theta: Tensor, log_weight: Tensor) -> ContourState:
        """The state that a chain has arrived at, with its θ."""
        return ContourState(
            params=arrived.params,
            step=arrived.step,
            anchor=arrived.anchor,
            preconditioner=arrived.preconditioner,
            theta=theta,
            log_weight=log_weight,
            batch_size=arrived.shape,
            lock=False,
        )

    def log_weight(self, state: State) -> Tensor:
        """Log of the weight of the parameters that the last step started from."""
        return cast(ContourState, state).log_weight

    def advance(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[ContourState, Terms]:
        """Make one step; the equation stands in the module's docstring."""
        state = cast(ContourState, state)
        lr, temperature = cast(Tensor, self.lr), cast(Tensor, self.temperature)
        parts, averages = self.preconditioned(state, evaluation, noise)
        part = self.partition.index(self.energy(state, parts, evaluation)).unsqueeze(-1)
        theta = reweighted(state.theta, part, cast(Tensor, self.weight_lr), self.flatness)
        log_theta = theta.clamp(min=torch.finfo(theta.dtype).tiny).log()
        here = log_theta.gather(-1, part).squeeze(-1)
        below = log_theta.gather(-1, (part - 1).clamp(min=0)).squeeze(-1)
        slope = self.flatness * temperature * (here - below) / self.partition.width
        terms = decompose(parts, drift=lr / 2 * (1 + slope), diffusion=lr**0.5)
        moved = move(state.params, minus=terms.down(), plus=terms.up())
        arrived = self.arrived(state, moved, averages)
        return self.weighted(arrived, theta, self.flatness * here), terms

    def energy(self, state: State, parts: Parts, evaluation: Evaluation) -> Tensor:
        """U(w) = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p, `[*chains]`.

        Raises:
            ValueError: The loss, or the value of the log-prior, was not given.
        """
        loss, log_prior = evaluation.loss, evaluation.log_prior
        if loss is None or (evaluation.prior_pull is not None and log_prior is None):
            raise ValueError(checks.no_energy("loss" if loss is None else "log_prior"))
        distance = cast(Term, parts.distance).direction
        pulls = self.localization * tree.dot(distance, distance)
        pulls = pulls + self.weight_decay * tree.dot(state.params, state.params)
        potential = cast(Tensor, self.nbeta) * loss + pulls / 2
        return potential if log_prior is None else potential - log_prior


def reweighted(theta: Tensor, part: Tensor, lr: Tensor, flatness: Tensor) -> Tensor:
    """θ'(i) = θ(i) + ω θ(J)^ζ (1[i = J] − θ(i)).

    Args:
        theta: θ, `[*chains, m]`.
        part: J − 1, `[*chains, 1]`.
        lr: ω, `[*chains]` or `[]`.
        flatness: ζ, likewise.
    """
    is_here = torch.arange(theta.shape[-1], device=theta.device) == part
    rate = lr.unsqueeze(-1) * theta.gather(-1, part) ** flatness.unsqueeze(-1)
    return theta + rate * (is_here.to(theta.dtype) - theta)


def contour_sgld(
    lr: float | Tensor | Schedule,
    *,
    nbeta: float | Tensor | Schedule,
    energy_range: tuple[float | Tensor, float | Tensor],
    num_partitions: int = 100,
    flatness: float | Tensor = 1.0,
    weight_lr: float | Tensor | Schedule | None = None,
    temperature: float | Tensor | Schedule = 1.0,
    localization: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    preconditioner: Preconditioner | None = None,
    anchor: TensorDictBase | Mapping[str, Tensor] | None = None,
    bounding_box_size: float | Tensor | None = None,
    mask: TensorDictBase | Mapping[str, Tensor] | None = None,
) -> ContourSGLD:
    """Make a sampler of contour SGLD, which crosses barriers between modes (Deng et al. 2020).

        w' = w − (ε/2) (1 + ζT (log θ(J) − log θ(J−1))/Δu) m G ∇U(w) + √(εT) m √G η

    with θ(J) the estimated probability of the energies near U(w), learned as the chain goes: the
    module's docstring has the equations. Draws carry weights, `Samples.log_weights`, and averages
    over the posterior are `weighted_mean(values, log_weights)`.

    Args:
        lr: Step size ε ≥ 0, in units of w².
        nbeta: As for `sgld`.
        energy_range: The energies U(w) between which the range is cut into parts: from about the
            lowest that the chain meets, to above the barriers.
        num_partitions: m ≥ 3, the parts: m − 2 of width Δu within the range, one below it and one
            above. Δu of about T or less follows the energy well.
        flatness: ζ ≥ 0; 0 is plain SGLD, 1 a density flat in the energy.
        weight_lr: ω_t in [0, 1), the step size of θ (default: `polynomial_decay(10, offset=1000,
            power=0.8)`, from 0.04 down). For the weights to converge it must decay.
        temperature: As for `sgld`.
        localization: As for `sgld`.
        weight_decay: As for `sgld`.
        preconditioner: As for `sgld`.
        anchor: As for `sgld`.
        bounding_box_size: As for `sgld`.
        mask: As for `sgld`.

    Raises:
        TypeError: A setting is not of the type above.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    preconditioner = identity() if preconditioner is None else preconditioner
    checks.preconditioner(preconditioner, Preconditioner)
    low, high = checks.energy_range(energy_range)
    num_inner = checks.count("num_partitions", num_partitions, minimum=3) - 2
    bounds, chains = checks.per_chain({"low": low, "width": (high - low) / num_inner})
    start = torch.full((*chains, num_partitions), 1 / num_partitions, dtype=torch.float64)
    if weight_lr is None:
        weight_lr = polynomial_decay(10.0, offset=1000.0, power=0.8)
    fields, chains = checks.per_chain(
        {
            **shared_settings(
                lr=lr,
                nbeta=nbeta,
                temperature=temperature,
                localization=localization,
                weight_decay=weight_decay,
                anchor=anchor,
                mask=mask,
                bounding_box_size=bounding_box_size,
            ),
            "preconditioner": preconditioner,
            "flatness": checks.hyperparameter("flatness", flatness),
            "weight_lr": setting("weight_lr", weight_lr, below=1.0),
            "partition": EnergyPartition(**bounds, start=start, batch_size=chains, lock=False),
        }
    )
    return ContourSGLD(**fields, batch_size=chains, lock=False)
