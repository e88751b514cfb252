"""Losses of a network, and estimates of a loss's gradient on a batch.

A loss is a pure function `loss_fn(params, batch) -> loss`, or `-> (loss, aux)`: the mean over the
batch, a scalar, of one chain's parameters (a `TensorDict` of batch size `[]`). An estimator wraps a
loss, and stands where a loss does in `kernel` and `sample`:

    plain               g_B(w)                                      any loss
    `accumulated`       Σ_b (n_b/n) g_b(w), b the micro-batches     the same, with less memory
    `control_variates`  g_B(w) − g_B(w₀) + g(w₀)                    less noise near the anchor
    `svrg`              g_B(w) − g_B(ŵ) + g(ŵ)                      ŵ where the chain was lately

with g_B the gradient on a batch and g that on all data.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, tree
from funcsgmcmc.data import Piece, map_examples, num_examples

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


class GradientEstimator(ABC):
    """A loss with its own way to estimate the gradient; called, it is the loss itself."""

    def __init__(self, loss_fn: LossFn) -> None:
        checks.function("loss_fn", loss_fn)
        checks.unnested(loss_fn, ControlVariates)
        self.loss_fn = loss_fn

    @abstractmethod
    def __call__(self, params: TensorDict, batch: Any) -> Tensor | tuple[Tensor, Any]:
        """L(w) on a batch."""

    @abstractmethod
    def gradient(self, params: TensorDict, batch: Any) -> Gradient:
        """Loss and estimated gradient of one chain."""


def gradient(loss_fn: LossFn) -> Callable[[TensorDict, Any], Gradient]:
    """Make the function that gives a chain's loss and gradients on a batch.

    Args:
        loss_fn: As the module's docstring says: a loss, or an estimator.

    Returns:
        A pure function `(params, batch) -> Gradient` of one chain, to be vmapped over chains.

    Raises:
        TypeError, ValueError: When called, if `loss_fn` does not return a real scalar.
    """
    if isinstance(loss_fn, GradientEstimator):
        return loss_fn.gradient
    value_and_gradient = torch.func.grad_and_value(
        lambda params, batch: loss_and_aux(loss_fn, params, batch), has_aux=True
    )

    def evaluate(params: TensorDict, batch: Any) -> Gradient:
        # Parameters of a module that are not in the tree must not drag a graph along.
        with torch.no_grad():
            grads, (loss, aux) = value_and_gradient(params, batch)
        return Gradient(loss, grads, aux)

    return evaluate


def mean_loss(loss_fn: LossFn, params: TensorDict, pieces: Iterable[Piece] | None) -> Tensor | None:
    """L(w) of one chain's parameters over pieces of data, weighted by their numbers of examples.

    Returns:
        None if there are no pieces, or a piece does not know its number.
    """
    total, count = torch.zeros(()), 0
    for piece, size in pieces or ():
        if not size:
            return None
        loss, _ = loss_and_aux(loss_fn, params, piece)
        total, count = total + tree.widened(loss) * size, count + size
    return total / count if count else None


def mean_gradient(
    evaluate: Callable[[TensorDict, Any], Gradient], params: TensorDict, pieces: Iterable[Piece]
) -> Gradient:
    """Loss and gradient over pieces of data, weighted by their numbers of examples.

    Args:
        evaluate: Gives the gradients of a piece, of one chain or of many.
        params: w, of the batch size that `evaluate` takes.
        pieces: The data; one piece is held at a time.

    Returns:
        The mean; `aux` is the tuple of the pieces'.

    Raises:
        ValueError: There are no pieces, or a piece does not know its number.
    """
    total: Gradient | None = None
    count = 0
    for piece, size in pieces:
        here = evaluate(params, piece)
        count += checks.known_size(size)
        loss, grads = tree.widened(here.loss) * size, _times(size, here.grads)
        if total is None:
            total = Gradient(loss, grads, (here.aux,))
            continue
        grads = tree.map_leaves(torch.add, total.grads, grads)
        total = Gradient(total.loss + loss, grads, (*total.aux, here.aux))
    if total is None:
        raise ValueError(checks.no_examples())
    return Gradient(total.loss / count, _times(1 / count, total.grads), total.aux)


def _times(number: float, grads: TensorDict) -> TensorDict:
    """In float32 or better: sums over many examples."""
    return tree.map_leaves(lambda leaf: tree.widened(leaf) * number, grads)


class Accumulated(GradientEstimator):
    """See `accumulated`."""

    def __init__(self, loss_fn: LossFn, num_microbatches: int) -> None:
        super().__init__(loss_fn)
        self._num_microbatches = checks.count("num_microbatches", num_microbatches, minimum=1)
        self._gradient = gradient(loss_fn)

    def __call__(self, params: TensorDict, batch: Any) -> Tensor:
        """L(w) on a batch."""
        loss = mean_loss(self.loss_fn, params, self._microbatches(batch))
        assert loss is not None  # every micro-batch has its number
        return loss

    def gradient(self, params: TensorDict, batch: Any) -> Gradient:
        """Loss and gradient on a batch; `aux` is the tuple of the micro-batches'."""
        mean = mean_gradient(self._gradient, params, self._microbatches(batch))
        grads = tree.map_leaves(lambda leaf, like: leaf.to(like.dtype), mean.grads, params)
        return Gradient(mean.loss, grads, mean.aux if pytree.tree_leaves(mean.aux) else ())

    def _microbatches(self, batch: Any) -> Iterator[Piece]:
        size = checks.known_size(num_examples(batch))
        # The last batch of a pass over the data may have fewer examples than that.
        number = min(self._num_microbatches, size)
        bounds = [size * i // number for i in range(number + 1)]
        for start, stop in itertools.pairwise(bounds):
            part = slice(start, stop)
            yield map_examples(lambda leaf, part=part: leaf[part], batch), stop - start


class Reference(NamedTuple):
    """Where control variates are taken, and what is known there.

    Attributes:
        params: ŵ, a tree.
        grads: ∇L(ŵ) on all data, a tree like it.
    """

    params: TensorDict
    grads: TensorDict


class ControlVariates(GradientEstimator):
    """See `control_variates` and `svrg`; takes batches `(minibatch, reference)`.

    Attributes:
        loss_fn: L.
        refresh_interval: Steps after which each chain's reference moves to where it is; None if the
            reference stays at the anchor.
    """

    def __init__(self, loss_fn: LossFn, refresh_interval: int | None) -> None:
        super().__init__(loss_fn)
        self.refresh_interval = refresh_interval
        self._gradient = gradient(loss_fn)

    def __call__(self, params: TensorDict, batch: Any) -> Tensor | tuple[Tensor, Any]:
        """L(w) on the minibatch."""
        return self.loss_fn(params, checks.with_reference(batch, Reference)[0])

    def gradient(self, params: TensorDict, batch: Any) -> Gradient:
        """Loss on the minibatch, and g_B(w) − g_B(ŵ) + g(ŵ)."""
        minibatch, reference = checks.with_reference(batch, Reference)
        here = self._gradient(params, minibatch)
        there = self._gradient(reference.params, minibatch)

        def combined(here: Tensor, there: Tensor, known: Tensor) -> Tensor:
            return (tree.widened(here) - there + known).to(here.dtype)

        grads = tree.map_leaves(combined, here.grads, there.grads, reference.grads)
        return Gradient(here.loss, grads, here.aux)


def accumulated(loss_fn: LossFn, num_microbatches: int) -> Accumulated:
    """Accumulate the gradient of a batch over micro-batches.

        g = Σ_b (n_b/n) g_b

    with n_b of the n examples in micro-batch b: the gradient of the whole batch, to rounding.

    Memory: the activations of one micro-batch a chain instead of those of the batch, and a second
    tree of gradients. Time: that of the batch, in smaller pieces.

    Args:
        loss_fn: A loss, the mean over its batch's examples, along the first dimension.
        num_microbatches: ≥ 1; sizes differ by one at most. A batch of fewer examples has one in
            each.

    Returns:
        An estimator, to be given to `sample` or `kernel` in place of the loss.

    Raises:
        TypeError, ValueError: An argument is out of its range.
    """
    return Accumulated(loss_fn, num_microbatches)


def control_variates(loss_fn: LossFn) -> ControlVariates:
    """Take most of the minibatches' noise out of gradients near the anchor.

        g = g_B(w) − g_B(w₀) + ∇L(w₀)

    It is unbiased; its variance, that of g_B(w) − g_B(w₀), is of order ‖w − w₀‖²: small where the
    posterior is narrow around the anchor (its mode, for a trained network), larger than without
    further away. The loss that is reported stays that of the minibatch.

    Memory: two trees (w₀ and ∇L(w₀)) for all chains if they share the anchor (per-chain settings
    give each its own), and a second tree of gradients a chain. Time: two gradients a step, and one
    pass over the data at the start.

    Source: Baker, Fearnhead, Fox and Nemeth, "Control variates for stochastic gradient MCMC",
    Statistics and Computing 29 (2019), eq. 5.

    Args:
        loss_fn: A loss, the mean over its batch's examples.

    Returns:
        An estimator. Given to `sample` in place of the loss, its reference is at the sampler's
        anchor. Given to `kernel`, the step takes batches `(minibatch, reference)`, with
        `reference(loss_fn, params, data)`.
    """
    return ControlVariates(loss_fn, None)


def svrg(loss_fn: LossFn, refresh_interval: int) -> ControlVariates:
    """Take most of the minibatches' noise out of gradients near where a chain was lately.

        g = g_B(w) − g_B(ŵ) + ∇L(ŵ)

    with ŵ the chain's own parameters at the last step t that `refresh_interval` divides (stochastic
    variance reduced gradients). It is unbiased, as `control_variates` is, and does not need a mode.

    Memory: two trees (ŵ and ∇L(ŵ)) and a second tree of gradients a chain. Time: two gradients a
    step, and one pass over the data every `refresh_interval` steps.

    Source: Dubey, Reddi, Williamson, Póczos, Smola and Xing, "Variance reduction in stochastic
    gradient Langevin dynamics", NeurIPS 2016, algorithm 2.

    Args:
        loss_fn: A loss, the mean over its batch's examples.
        refresh_interval: Steps between passes over the data, ≥ 1.

    Returns:
        An estimator, as `control_variates` gives; with `kernel`, you refresh the reference.

    Raises:
        TypeError, ValueError: An argument is out of its range.
    """
    return ControlVariates(loss_fn, checks.count("refresh_interval", refresh_interval, minimum=1))


def reference(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor],
    data: Any,
    *,
    batch_size: int | None = None,
) -> Reference:
    """Make the reference of `control_variates` or `svrg`, for loops of your own.

    Args:
        loss_fn: The loss, or the estimator made of it.
        params: ŵ, of one chain; vmap for many.
        data: All data, tensors `[n, …]` in the structure of a batch.
        batch_size: Examples evaluated at once (default: all).

    Returns:
        ŵ and ∇L(ŵ).
    """
    params = checks.parameters(params)
    plain = loss_fn.loss_fn if isinstance(loss_fn, ControlVariates) else loss_fn
    size = checks.examples(pytree.tree_leaves(data))
    step = checks.batch_size(batch_size, size)
    pieces = (
        (map_examples(lambda leaf, i=i: leaf[i : i + step], data), min(step, size - i))
        for i in range(0, size, step)
    )
    return Reference(params, mean_gradient(gradient(plain), params, pieces).grads)
