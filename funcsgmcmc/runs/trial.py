"""The trial before a run: every function is evaluated once, in the way that the run will.

So a function that cannot be sampled is refused before anything runs, and by name.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.gradients import GradientEstimator, estimator_of, loss_and_aux
from funcsgmcmc.priors import log_prior_pull
from funcsgmcmc.runs.data import Batches
from funcsgmcmc.runs.request import ChainMethod, Request, check_observable


def usable_methods(
    request: Request, params: TensorDict, batches: Batches, step: int
) -> list[ChainMethod]:
    """Try the functions at the first chain's start.

    Args:
        request: The settings of the run.
        params: The chains' starts.
        batches: The run's data.
        step: The run's first step.

    Returns:
        The chain method that was asked for; for `"auto"`, those that work.

    Raises:
        TypeError, ValueError: A function does not return what it should, or is not pure.
    """
    if request.chain_method != "auto":
        _try_functions(request, params, batches, step, vmapped=request.chain_method == "vmap")
        return [request.chain_method]
    _try_functions(request, params, batches, step, vmapped=False)
    try:
        _try_functions(request, params, batches, step, vmapped=True)
    except Exception as error:
        warnings.warn(f"chains are looped over, since they do not vmap: {error}", stacklevel=4)
        return ["loop"]
    return ["loop", "vmap"]


def _try_functions(
    request: Request, params: TensorDict, batches: Batches, step: int, *, vmapped: bool
) -> None:
    def evaluate(function: Callable[[TensorDict], Any]) -> Any:
        return torch.vmap(function)(params[:1]) if vmapped else function(params[0])

    if request.log_prior is not None:
        evaluate(log_prior_pull(request.log_prior))
    for name, function in request.observables.items():
        check_observable(name, function(params[0]))
        evaluate(function)
    estimator = request.estimator
    # An estimator's memory would take a pass over the data: the loss alone is tried.
    plain = estimator_of(estimator.loss_fn) if estimator.needs_memory else estimator
    _try_loss(plain, params, batches, step, vmapped=vmapped)
    # A gradient of zeros is fine, at a minimum: only the graph tells that none was taken.
    _check_dependence(plain, params[0], batches.batch(step, 0))


def _try_loss(
    estimator: GradientEstimator,
    params: TensorDict,
    batches: Batches,
    step: int,
    *,
    vmapped: bool,
) -> None:
    """Evaluate the gradient of the first chain's first loss.

    Raises:
        ValueError: The loss draws random numbers or updates buffers.
    """

    def loss(params: TensorDict, batch: Any) -> Tensor | None:
        return estimator.evaluate(params, batch, None).loss

    try:
        if vmapped:
            first = batches.batch(step, slice(0, 1))
            torch.vmap(loss, in_dims=(0, batches.batch_dim))(params[:1], first)
        else:
            # The batch comes first: a loader may draw from torch's generator to shuffle.
            batch = batches.batch(step, 0)
            _check_same_twice(lambda: loss(params[0], batch))
    except RuntimeError as error:
        # vmap itself refuses random draws and updated buffers, in these words.
        complaints = ("random operation", "mutate a captured Tensor", "will be updated in place")
        if any(complaint in str(error) for complaint in complaints):
            raise _impure(str(error)) from error
        raise


def _check_same_twice(evaluate: Callable[[], Any]) -> None:
    """Refuse a loss that draws random numbers or changes what it depends on.

    Raises:
        ValueError: It differs from one evaluation to the next, or moved torch's generator.
    """
    # A loop has no transform that would complain, so that draws have to be found out.
    generator = torch.get_rng_state()
    loss, again = evaluate(), evaluate()
    drew = not torch.equal(generator, torch.get_rng_state())
    if drew or not torch.equal(loss.nan_to_num(), again.nan_to_num()):
        raise _impure(f"two evaluations gave {loss.item():g} and {again.item():g}")


def _impure(what_happened: str) -> ValueError:
    return ValueError(
        "the loss must be a function of its arguments alone, but it draws random numbers or "
        "updates buffers (dropout, batch normalization in train mode): call model.eval(). "
        f"What happened: {what_happened}"
    )


def _check_dependence(loss_fn: GradientEstimator, params: TensorDict, batch: Any) -> None:
    """Refuse a loss that does not depend on the parameters it is given.

    Raises:
        ValueError: Its gradient is known to vanish, for every leaf.
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in tree.leaves(params)}
    with torch.enable_grad():
        loss, _ = loss_and_aux(loss_fn, tree.build(leaves, torch.Size()), batch)
        grads: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(
            "loss_fn must depend on the params it is given, got a loss without gradient: evaluate "
            "the model with them (module_loss, or torch.func.functional_call), and do not detach"
        )
