"""The law that a step goes down the gradient of the declared potential."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.priors import LogPrior, log_prior_pull
from funcsgmcmc.samplers import Evaluation
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.laws.base import (
    close,
    comparable_fields,
    if_adaptive,
    law,
    unless_allowed,
    unless_taken,
)
from funcsgmcmc.testing.problem import Problem, expand_to_chains

LOSS_ALONE = {"nbeta": 1.0, "localization": 0.0, "weight_decay": 0.0}


@law(
    exempt=lambda spec: (
        if_adaptive(spec) or unless_taken("nbeta")(spec) or unless_allowed(**LOSS_ALONE)(spec)
    ),
    adaptive=False,
    max_steps=1,
    arguments=lambda problem: {"log_prior": st.none() | strategies.log_priors()},
)
def pulls_are_the_priors_gradient(problem: Problem, log_prior: LogPrior | None) -> None:
    """Localization, weight decay and log-prior act as autograd's gradient of them in the loss."""
    params, evaluation = problem.params, problem.given[0].evaluation
    pull: TensorDict | None = None
    value: Tensor | None = None
    if log_prior is not None:
        evaluate = log_prior_pull(log_prior)
        pull, value = (torch.vmap(evaluate) if params.batch_dims else evaluate)(params)
    as_pulls = problem.with_evaluation(replace(evaluation, prior_pull=pull, log_prior=value))
    in_loss = problem.with_settings(**LOSS_ALONE).with_evaluation(_whole(problem, log_prior))
    close(
        comparable_fields(as_pulls.final()),
        comparable_fields(in_loss.final()),
        "pulls, against their gradient in the loss",
    )


def _whole(problem: Problem, log_prior: LogPrior | None) -> Evaluation:
    """The evaluation of the whole potential as a loss, with autograd's gradient:

    nβ (L + ⟨g, w − w_now⟩) + (γ/2)‖w − w₀‖² + (λ/2)‖w‖² − log p(w), at w = w_now.
    """
    evaluation, params, start = problem.given[0].evaluation, problem.params, problem.initial()
    sampler = problem.sampler.at(start.step)
    w = tree.map_leaves(lambda leaf: leaf.clone().requires_grad_(), params)
    away = tree.map_leaves(torch.sub, w, expand_to_chains(sampler.center(start), w))
    loss = tree.dot(evaluation.grads, w) - tree.dot(evaluation.grads, params)
    if evaluation.loss is not None:
        loss = loss + evaluation.loss
    density = torch.zeros(())
    if log_prior is not None:
        density = (torch.vmap(log_prior) if w.batch_dims else log_prior)(w)
    # A precision that the factory fixes acts on both sides, as a pull, and is left out here.
    precisions = {
        name: getattr(sampler, name) if problem.spec.takes(name) else 0.0
        for name in ("localization", "weight_decay")
    }
    pulls = precisions["localization"] * tree.dot(away, away)
    pulls = pulls + precisions["weight_decay"] * tree.dot(w, w)
    potential = torch.as_tensor(sampler.nbeta) * loss + pulls / 2 - density
    return Evaluation(
        grads=_gradient(potential.sum(), w),
        loss=potential.detach(),
        hessian_diagonal=evaluation.hessian_diagonal,
    )


def _gradient(value: Tensor, w: TensorDict) -> TensorDict:
    """Autograd's gradient, a tree; zero where the value does not depend on a leaf."""
    names, leaves = zip(*tree.leaves(w), strict=True)
    grads = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
    return tree.build(dict(zip(names, grads, strict=True)), w.batch_size)
