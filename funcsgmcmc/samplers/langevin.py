"""What the overdamped samplers share (SGLD, its contour form, the lattice random walk).

They discretize the Langevin diffusion with a diagonal preconditioner G,

    dw = −½ (G ∇U(w) − T Γ) dt + √(T G) dB,    Γ = ∂G/∂w,

which leaves e^(−U/T) invariant, with U = nβ L + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p. They differ in
how a step is drawn.

Source: Ma, Chen and Fox, "A complete recipe for stochastic gradient MCMC", NeurIPS 2015, eq. 3 with
D = G/2 and no curl.
"""

from typing import cast

from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc.curvature import HessianDiagonal
from funcsgmcmc.preconditioners import Preconditioner
from funcsgmcmc.samplers.base import Evaluation, Sampler, State
from funcsgmcmc.terms import Parts, Term, Terms, decompose
from funcsgmcmc.tree import Scalar


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
        start = self.start(params)
        return LangevinState(
            params=start.params,
            step=start.step,
            anchor=start.anchor,
            preconditioner=self.preconditioner.init(start.params),
            batch_size=start.batch_size,
            lock=False,
        )

    def curvature(self) -> HessianDiagonal | None:
        """What the preconditioner's Γ asks for."""
        return self.preconditioner.curvature()

    def preconditioned(
        self, state: LangevinState, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[Parts, TensorDict]:
        """Collect what the update is made of.

        Returns:
            The parts, with G and Γ in them, and the preconditioner's next state.
        """
        scaling = self.preconditioner.update(
            state.preconditioner, evaluation.grads, evaluation.hessian_diagonal
        )
        parts = self.parts(state, evaluation, noise, scaling.gain)
        if scaling.drift_grads is not None:
            parts = parts._replace(drift_grad=Term(cast(Tensor, self.nbeta), scaling.drift_grads))
        if scaling.correction is not None:
            parts = parts._replace(
                correction=Term(cast(Tensor, self.temperature), scaling.correction)
            )
        return parts, scaling.state

    def arrived(
        self, state: LangevinState, moved: TensorDict, averages: TensorDict
    ) -> LangevinState:
        """The next state: parameters in their box, and the preconditioner's averages."""
        return LangevinState(
            params=self.boxed(moved, self.center(state)),
            step=state.step + 1,
            anchor=state.anchor,
            preconditioner=averages,
            batch_size=state.shape,
            lock=False,
        )


def langevin(parts: Parts, lr: Scalar) -> Terms:
    """Terms of a step of SGLD: drift ε/2, noise √ε."""
    return decompose(parts, drift=lr / 2, diffusion=lr**0.5)
