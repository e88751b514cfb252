"""Losses of a network, and gradients of a loss on a batch.

A loss is a pure function `loss_fn(params, batch) -> loss`, or `-> (loss, aux)`: the mean over the
batch, a scalar, of one chain's parameters (a `TensorDict` of batch size `[]`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call

from funcsgmcmc import checks, tree

LossFn = Callable[[TensorDict, Any], Tensor | tuple[Tensor, Any]]


class Gradient(NamedTuple):
    """Loss and gradients of one chain at its parameters.

    Attributes:
        loss: L(w) on the batch, a scalar.
        grads: g = ∇L(w), a tree like the parameters.
        aux: What the loss function returned beside the loss; `()` if nothing.
    """

    loss: Tensor
    grads: TensorDict
    aux: Any


def module_loss(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor]
) -> Callable[[TensorDict, Any], Tensor]:
    """Make a loss function from a module.

    Args:
        model: Any module. Its buffers are used as they are and not sampled. Parameters that the
            tree given to the loss lacks keep the module's values.
        criterion: `criterion(model(inputs), targets)`, the mean loss over the batch, for instance
            `torch.nn.functional.cross_entropy`.

    Returns:
        `loss_fn(params, (inputs, targets)) -> scalar`, where `params` is as `params_of(model)`.

    Raises:
        ValueError: Now or when called, if `model` has dropout or batch normalization in train
            mode: the loss must be a function of its arguments alone.
    """
    impure = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.dropout._DropoutNd)
        or (isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats)
    ]

    def check_mode() -> None:
        for name, layer in impure:
            if layer.training and getattr(layer, "p", 1.0) > 0:
                raise ValueError(checks.impure_layer(f"{name!r} ({type(layer).__name__})"))

    def loss_fn(params: TensorDict, batch: Any) -> Tensor:
        check_mode()
        inputs, targets = batch
        leaves = {tree.dotted(name): leaf for name, leaf in tree.leaves(params)}
        return criterion(functional_call(model, leaves, (inputs,)), targets)

    check_mode()
    return loss_fn


def loss_and_aux(loss_fn: LossFn, params: TensorDict, batch: Any) -> tuple[Tensor, Any]:
    """Evaluate a loss function, with `()` for aux if it returns the loss alone.

    Raises:
        TypeError, ValueError: The loss is not a real scalar, or aux holds more than tensors.
    """
    output = loss_fn(params, batch)
    # An empty tuple, since None may not leave a vmap.
    loss, aux = checks.loss_output(output) if isinstance(output, tuple) else (output, ())
    return checks.scalar("loss_fn", loss), aux


def gradient(loss_fn: LossFn) -> Callable[[TensorDict, Any], Gradient]:
    """Make the function that gives a chain's loss and gradients on a batch.

    Args:
        loss_fn: As the module's docstring says.

    Returns:
        A pure function `(params, batch) -> Gradient` of one chain, to be vmapped over chains.

    Raises:
        TypeError, ValueError: When called, if `loss_fn` does not return a real scalar.
    """
    value_and_gradient = torch.func.grad_and_value(
        lambda params, batch: loss_and_aux(loss_fn, params, batch), has_aux=True
    )

    def evaluate(params: TensorDict, batch: Any) -> Gradient:
        # Parameters of a module that are not in the tree must not drag a graph along.
        with torch.no_grad():
            grads, (loss, aux) = value_and_gradient(params, batch)
        return Gradient(loss, grads, aux)

    return evaluate
