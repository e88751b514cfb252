"""The shared part of the overdamped samplers: SGLD, its contour form, the lattice random walk.

They discretize the Langevin diffusion with a diagonal preconditioner G,

    dw = −½ (G ∇U(w) − T Γ) dt + √(T G) dB,    Γ = ∂G/∂w,

which leaves e^(−U/T) invariant, with U = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p. They differ in
how they draw a step.

Source: Ma, Chen and Fox, "A complete recipe for stochastic gradient MCMC", NeurIPS 2015, eq. 3 with
D = G/2 and no curl.
"""

from tensordict import TensorDict

from funcsgmcmc.curvature import HessianDiagonal
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.preconditioners import Preconditioner
from funcsgmcmc.samplers.base import Sampler, State
from funcsgmcmc.terms import Factors, Term, diagonal_factors, scaled


class LangevinState(State, frozen=True):
    """State of a chain without momentum.

    Attributes:
        preconditioner: Running averages of the preconditioner, leaves `[*chains, *shape]`.
    """

    preconditioner: TensorDict


class LangevinSampler(Sampler, frozen=True):
    """Settings of a sampler without momentum.

    Attributes:
        preconditioner: G.
    """

    preconditioner: Preconditioner

    def init(self, params: TensorDict, noise: TensorDict | None = None) -> LangevinState:
        """State at `params`, which are copied; no noise is needed."""
        fields = self.start(params)
        averages = self.preconditioner.init(fields["params"])
        return LangevinState(**fields, preconditioner=averages)

    def uses_first_noise(self) -> bool:
        """There is no momentum; a subclass with another `init` may use it."""
        return type(self).init is not LangevinSampler.init

    def hessian_estimator(self) -> HessianDiagonal | None:
        """The estimator that the preconditioner's Γ needs."""
        return self.preconditioner.hessian_estimator()

    def factors(self, state: LangevinState, evaluation: Evaluation) -> tuple[Factors, TensorDict]:
        """Factors m G, m √G and T m Γ of this step, and the preconditioner's next averages."""
        # G adapts to the raw gradient of the loss: neither nβ nor a pull changes it.
        scaling = self.preconditioner.update(
            state.preconditioner, evaluation.grads, evaluation.hessian_diagonal
        )
        factors = diagonal_factors(scaling.gain, self.mask)
        if scaling.drift_grads is not None:
            factors = factors._replace(drift_grad=Term(self.nbeta, scaling.drift_grads))
        if scaling.correction is not None:
            # G is in Γ already: only the mask is missing.
            correction = Term(self.temperature, scaled(scaling.correction, self.mask))
            factors = factors._replace(correction=correction)
        return factors, scaling.state
