"""Laws of preconditioners: of the gain G and the term Γ, without a sampler around them."""

import torch
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.preconditioners import Scaling
from funcsgmcmc.testing.laws.base import Law, close, law, tensors
from funcsgmcmc.testing.problem import Problem


@law(dtypes=(torch.float64, torch.float32, torch.bfloat16))
def gains_are_scales(problem: Problem) -> None:
    """G is finite, not negative, float32 at least, and like the parameters."""
    preconditioner = problem.settings["preconditioner"]
    averages = preconditioner.init(problem.params)
    for given in problem.given:
        evaluation = given.evaluation
        scaling = preconditioner.update(averages, evaluation.grads, evaluation.hessian_diagonal)
        assert scaling.state.batch_size == averages.batch_size, "averages changed their chains"
        for new, old in zip(tensors(scaling.state), tensors(averages), strict=True):
            assert new.dtype == old.dtype, f"an average was {old.dtype}, is {new.dtype}"
        averages = scaling.state
        for gain in tensors(scaling.gain):
            assert bool(((gain >= 0) & gain.isfinite()).all()), f"G is {gain.tolist()}"
            assert gain.dtype == tree.working_dtype(gain), f"G is kept in {gain.dtype}"
        for given_tree in (scaling.gain, scaling.correction, scaling.drift_grads):
            if given_tree is not None:
                names = tree.names(given_tree)
                assert names == tree.names(problem.params), "leaves are not those of w"


@law(chains=[()])
def corrections_are_the_gains_derivatives(problem: Problem) -> None:
    """Γ, if there is one, is autograd's ∂G/∂w on L(w) = Σ a w²/2 + w⁴/12, entry by entry."""
    preconditioner, params = problem.settings["preconditioner"], problem.params
    averages = preconditioner.init(params)
    for given in problem.given:  # so that the averages are those of a running chain
        evaluation = given.evaluation
        averages = preconditioner.update(
            averages, evaluation.grads, evaluation.hessian_diagonal
        ).state
    a = tree.flatten(problem.start)

    def scaling(w: Tensor) -> Scaling:
        grads = tree.unflatten(a * w + w**3 / 3, params)
        return preconditioner.update(averages, grads, tree.unflatten(a + w**2, params))

    w = tree.flatten(params)
    correction = scaling(w).correction
    if correction is None:
        return

    def gain(w: Tensor) -> Tensor:
        g = scaling(w).gain
        return torch.ones_like(w) if g is None else tree.flatten(g)

    jacobian = torch.autograd.functional.jacobian(gain, w)
    close(tree.flatten(correction), jacobian.diagonal().nan_to_num(), "Γ, against ∂G/∂w")


PRECONDITIONER_LAWS: tuple[Law, ...] = (gains_are_scales, corrections_are_the_gains_derivatives)
