"""What a step goes down: the gradient of the declared potential."""

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.priors import LogPrior, log_prior_pull
from funcsgmcmc.samplers import Evaluation
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws.law import adapts, close, law, may_be, parameter_like, without
from funcsgmcmc.testing.problems import Problem, of_all_chains

PLAIN = {"nbeta": 1.0, "localization": 0.0, "weight_decay": 0.0}


@law(
    exempt=lambda spec: adapts(spec) or without("nbeta")(spec) or may_be(**PLAIN)(spec),
    adaptive=False,
    max_steps=1,
    further=lambda problem: {"log_prior": st.none() | strategies.log_priors()},
)
def pulls_are_the_priors_gradient(problem: Problem, log_prior: LogPrior | None) -> None:
    """The pulls act as autograd's gradient of the declared prior does, put into the loss."""
    params, known = problem.params, problem.given[0].evaluation
    of_prior: tuple[TensorDict | None, Tensor | None] = (None, None)
    if log_prior is not None:
        pull = log_prior_pull(log_prior)
        of_prior = torch.vmap(pull)(params) if params.batch_dims else pull(params)
    declared = problem.with_evaluation(
        known._replace(prior_pull=of_prior[0], log_prior=of_prior[1])
    )
    plain = problem.changed(**PLAIN)
    close(
        parameter_like(declared.final()),
        parameter_like(plain.with_evaluation(all_in_loss(problem, log_prior)).final()),
        "pulls, against their gradient in the loss",
    )


def all_in_loss(problem: Problem, log_prior: LogPrior | None) -> Evaluation:
    """A loss that is the whole potential, with its gradient by autograd.

    nβ (L + ⟨g, w⟩ − ⟨g, stopped w⟩) + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p(w)
    """
    sampler, known = problem.sampler, problem.given[0].evaluation
    now, params = sampler.at(problem.initial().step), problem.params
    w = tree.map_leaves(lambda leaf: leaf.clone().requires_grad_(), params)
    away = tree.map_leaves(torch.sub, w, of_all_chains(sampler.center(problem.initial()), w))
    linear = tree.dot(known.grads, w) - tree.dot(known.grads, params)
    loss = linear if known.loss is None else known.loss + linear
    nbeta = torch.as_tensor(now.nbeta)
    density = torch.zeros(())
    if log_prior is not None:
        density = torch.vmap(log_prior)(w) if w.batch_dims else log_prior(w)
    # Pulls that are no settings of the factory stay where they are.
    precisions = {
        name: getattr(now, name) if problem.spec.takes(name) else 0.0
        for name in ("localization", "weight_decay")
    }
    pulls = precisions["localization"] * tree.dot(away, away)
    pulls = pulls + precisions["weight_decay"] * tree.dot(w, w)
    potential = nbeta * loss + pulls / 2 - density
    return Evaluation(
        grads=gradient(potential.sum(), w),
        loss=potential.detach(),
        hessian_diagonal=known.hessian_diagonal,
    )


def gradient(value: Tensor, w: TensorDict) -> TensorDict:
    """Autograd's gradient, a tree."""
    names, leaves = zip(*tree.leaves(w), strict=True)
    grads = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
    return tree.build(dict(zip(names, grads, strict=True)), w.batch_size)
