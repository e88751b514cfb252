"""The trial before a run: every function is evaluated once, in the way that the run will.

So a function that cannot be sampled is refused before anything runs, and by name.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import shards, tree
from funcsgmcmc.batches import map_if_examples, num_examples, slice_examples
from funcsgmcmc.gradients import GradientEstimator, estimator_of, loss_and_aux, whole_loss
from funcsgmcmc.priors import log_prior_pull
from funcsgmcmc.runs.data import Batches
from funcsgmcmc.runs.request import ChainMethod, Request, check_observable, observed_by

_FEW_EXAMPLES = 4
_LARGEST_COPY = 1 << 28  # bytes


class Trial(NamedTuple):
    """What the trial found.

    Attributes:
        methods: The chain method that was asked for; for `"auto"`, those that work.
        observed: The observables of the first chain.
    """

    methods: list[ChainMethod]
    observed: dict[str, Tensor]


def try_functions(request: Request, params: TensorDict, batches: Batches, step: int) -> Trial:
    """Try the functions at the first chain's start.

    Args:
        request: The settings of the run.
        params: The chains' starts.
        batches: The run's data.
        step: The run's first step.

    Raises:
        TypeError, ValueError: A function does not return what it should, or is not pure.
    """
    if request.chain_method != "auto":
        vmapped = request.chain_method == "vmap"
        observed = _try_method(request, params, batches, step, vmapped=vmapped)
        return Trial([request.chain_method], observed)
    observed = _try_method(request, params, batches, step, vmapped=False)
    try:
        _try_method(request, params, batches, step, vmapped=True)
    except Exception as error:
        warnings.warn(f"chains are looped over, since they do not vmap: {error}", stacklevel=5)
        return Trial(["loop"], observed)
    return Trial(["loop", "vmap"], observed)


def _try_method(
    request: Request, params: TensorDict, batches: Batches, step: int, *, vmapped: bool
) -> dict[str, Tensor]:
    """Evaluate every function at the first chain's start, in the way that the run will.

    Returns:
        The observables.

    Raises:
        TypeError, ValueError: A function does not return what it should, or is not pure.
    """

    def evaluate(function: Callable[[TensorDict], Any]) -> Callable[[TensorDict], Any]:
        return torch.vmap(function) if vmapped else function

    observed = {}
    start = params[:1] if vmapped else params[0]
    if request.log_prior is not None:
        _check_pure("log_prior", evaluate(log_prior_pull(request.log_prior)), start)
    for name, function in request.observables.items():
        label = f"observable {name!r}"
        observed[name] = _check_pure(label, partial(observed_by, function), params[0])
        check_observable(name, observed[name])
        if vmapped:
            _check_pure(label, evaluate(function), start)
    estimator = request.estimator
    # An estimator's memory would take a pass over the data: the loss alone is tried.
    plain = estimator_of(estimator.loss_fn) if estimator.needs_memory else estimator

    def loss(params: TensorDict, batch: Any) -> Tensor | None:
        return plain.evaluate(params, batch, None).loss

    rows = slice(0, 1) if vmapped else 0
    batch = batches.batch(step, rows)
    mapped = torch.vmap(loss, in_dims=(0, batches.batch_dim)) if vmapped else loss
    _check_pure("the loss", mapped, start, batch)
    first = batches.batch(step, 0)
    # A gradient of zeros is fine, at a minimum: only the graph tells that none was taken.
    _check_dependence(plain, params[0], first)
    _warn_of_a_sum(plain, params[0], first)
    if "aux" in request.record:
        _check_aux(plain.evaluate(params[0], first, None).aux)
    return observed


def _check_pure(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Refuse a function that is more than one of its arguments: it draws, remembers or writes.

    Args:
        name: Its name, for the error.
        function: It is called with copies of the arguments, unless they are large.
        arguments: Trees, or batches.

    Returns:
        The result.

    Raises:
        ValueError: Two evaluations differ, or an argument was written to.
    """
    given = _values(arguments)
    # All data at once may be large: then a write is found after it was made.
    is_small = sum(leaf.numel() * leaf.itemsize for leaf in given) <= _LARGEST_COPY
    copies = pytree.tree_map_only(Tensor, torch.clone, arguments) if is_small else arguments
    tensors = [leaf for leaf in pytree.tree_leaves(copies) if isinstance(leaf, Tensor)]
    versions = [tensor._version for tensor in tensors]
    try:
        result, again = function(*copies), function(*copies)
    except RuntimeError as error:
        # vmap itself refuses random draws and updated buffers, in these words.
        complaints = ("random operation", "mutate a captured Tensor", "will be updated in place")
        if any(complaint in str(error) for complaint in complaints):
            raise _impure(name, str(error)) from error
        error.add_note(_circumstances(name, copies))
        if "dtype" in str(error) or "scalar type" in str(error):
            error.add_note(
                "Class labels must be integers (targets.long()), and inputs have the parameters' "
                "dtype (inputs.float())."
            )
        raise
    except Exception as error:
        error.add_note(_circumstances(name, copies))
        raise
    if versions != [tensor._version for tensor in tensors]:
        raise ValueError(
            f"{name} must not write to what it is given, parameters or batch: clone what you change"
        )
    # Not torch's generator, which another thread may use meanwhile, but what the function gives.
    for one, other in zip(_values(result), _values(again), strict=True):
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            shown = [value.flatten()[:3].tolist() for value in (one, other)]
            raise _impure(name, f"two evaluations gave {shown[0]} and {shown[1]}")
    return result


def _circumstances(name: str, arguments: Any) -> str:
    """What was tried, for an error from a user's function."""
    shapes = pytree.tree_map_only(
        Tensor,
        lambda leaf: f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}",
        arguments,
    )
    return (
        f"This happened when {name} was tried, before the run, with {shapes}. A loss is called as "
        "loss_fn(params, batch), which module_loss makes; what torch.vmap does not map runs with "
        "chain_method='loop'."
    )


def _values(result: Any) -> list[Tensor]:
    """The tensors in the result of a function."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return [shards.local(leaf.detach()) for leaf in tensors]


def _impure(name: str, what_happened: str) -> ValueError:
    return ValueError(
        f"{name} must be a function of its arguments alone, but it draws random numbers or "
        "updates buffers (dropout, batch normalization in train mode): call model.eval(). "
        f"What happened: {what_happened}"
    )


def _check_aux(aux: Any) -> None:
    """Refuse to record what the loss does not return.

    Raises:
        ValueError: It returns the loss alone.
    """
    leaves = [] if aux is None else pytree.tree_leaves(aux)
    if not leaves:
        raise ValueError("record=['aux'] needs a loss that returns (loss, aux), got the loss alone")
    for leaf in leaves:
        check_observable("aux", leaf)


def _warn_of_a_sum(loss_fn: GradientEstimator, params: TensorDict, batch: Any) -> None:
    """Warn of a loss that is the sum over its batch, where a mean is asked for.

    Repeating a few examples leaves a mean as it is, and doubles a sum.
    """
    size = num_examples(batch)
    if not size:
        return
    few = slice_examples(batch, slice(0, _FEW_EXAMPLES), size)
    number = min(size, _FEW_EXAMPLES)
    twice = map_if_examples(lambda leaf: torch.cat([leaf, leaf]), few, number)
    try:
        with torch.no_grad():
            once, doubled = (whole_loss(loss_fn, params, each) for each in (few, twice))
    except Exception:
        return  # a loss may need batches of one size: then it cannot be tried like this
    if once != 0 and torch.isclose(doubled, 2 * once, rtol=1e-3, atol=0.0):
        warnings.warn(
            "the loss is twice as large on a batch that is repeated: it must be the mean over its "
            "batch, not the sum (reduction='mean')",
            stacklevel=6,
        )


def _check_dependence(loss_fn: GradientEstimator, params: TensorDict, batch: Any) -> None:
    """Refuse a loss that does not depend on the parameters it is given.

    Raises:
        ValueError: Its gradient is known to vanish, for every leaf.
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in tree.leaves(params)}
    replicating = shards.implicit_replication if tree.is_sharded(params) else nullcontext
    with torch.enable_grad(), replicating():
        loss, _ = loss_and_aux(loss_fn, tree.build(leaves, torch.Size()), batch)
        loss = shards.whole(loss)
        grads: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(
            "loss_fn must depend on the params it is given, got a loss without gradient: evaluate "
            "the model with them (module_loss, or torch.func.functional_call), and do not detach"
        )
