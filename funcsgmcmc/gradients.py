"""Losses, and estimates of a loss's gradient on a batch.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.export import register_dataclass
from torch.utils import _pytree as pytree

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.batches import (
    Piece,
    check_batch_size,
    check_examples,
    check_known_size,
    num_examples,
    pieces_of,
    slice_examples,
)

LossFn = Callable[[TensorDict, Any], Tensor | tuple[Tensor, Any]]


@dataclass(frozen=True)
class Evaluation:
    """The potential at a chain's parameters, before a step, as far as it is known.

    Unknown and absent parts are None. An evaluation is a pytree, which `torch.vmap` may return.

    Attributes:
        grads: g = ∇L(w), raw: without nβ. A tree like the parameters.
        loss: L(w) on the batch, `[*chains]`.
        aux: The second value of the loss function, if it returned one.
        prior_pull: −∇log p(w) of a user's log-prior, a tree like the parameters.
        log_prior: log p(w), `[*chains]`.
        hessian_diagonal: h, the diagonal of ∇²L(w), a tree like the parameters.
    """

    grads: TensorDict
    loss: Tensor | None = None
    aux: Any = None
    prior_pull: TensorDict | None = None
    log_prior: Tensor | None = None
    hessian_diagonal: TensorDict | None = None


register_dataclass(Evaluation)  # fields that are None drop out, so that a vmap may return it


def loss_and_aux(loss_fn: LossFn, params: TensorDict, batch: Any) -> tuple[Tensor, Any]:
    """Evaluate a loss function, with None for aux if it returns the loss alone.

    Raises:
        TypeError, ValueError: The loss is not a real scalar, or aux holds more than tensors.
    """
    output = loss_fn(params, batch)
    if not isinstance(output, tuple):
        return checks.scalar("loss_fn", output), None
    if len(output) != 2:
        raise TypeError(f"loss_fn must return a loss or (loss, aux), got {len(output)} values")
    loss, aux = output
    if aux is not None:
        # `torch.vmap` and `torch.func.grad` return nothing but tensors.
        for leaf in pytree.tree_leaves(aux):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"aux must hold tensors only, got {type(leaf).__name__}")
    return checks.scalar("loss_fn", loss), aux


def whole_loss(loss_fn: LossFn, params: TensorDict, batch: Any) -> Tensor:
    """The loss alone, put together where the parameters are sharded."""
    if tree.is_sharded(params):
        loss: Tensor = shards.whole_result(loss_and_aux, loss_fn, params, batch)[0]
        return loss
    return loss_and_aux(loss_fn, params, batch)[0]


def mean_loss(loss_fn: LossFn, params: TensorDict, pieces: Iterable[Piece] | None) -> Tensor | None:
    """L(w) of one chain's parameters over pieces of data, weighted by their numbers of examples.

    Returns:
        The mean; None if there are no pieces, or a piece does not know its number.
    """
    # 0-d, so that it adds to a loss on any device.
    total, count = torch.zeros(()), 0
    for piece, size in pieces or ():
        # A mean over pieces of unknown size would be another loss.
        if not size:
            return None
        loss = whole_loss(loss_fn, params, piece)
        total, count = total + tree.widened(loss) * size, count + size
    return total / count if count else None


class GradientEstimator(ABC):
    """The contract of an estimator: a loss with its own way to estimate the gradient.

    Called, it is the loss itself. An estimator may need more than the batch, its memory: a run asks
    `prepare` for it before the first step, at the anchor, and keeps it; or at the chain's own
    parameters, at every step that `refresh_interval` divides.

    Attributes:
        loss_fn: L.
        needs_memory: Whether it needs a memory.
        refresh_interval: Steps after which the memory is made anew; None for never.
    """

    needs_memory = False
    refresh_interval: int | None = None

    def __init__(self, loss_fn: LossFn) -> None:
        checks.function("loss_fn", loss_fn)
        self.loss_fn = loss_fn

    def __call__(self, params: TensorDict, batch: Any) -> Tensor | tuple[Tensor, Any]:
        """L(w) on a batch."""
        return self.loss_fn(params, batch)

    @abstractmethod
    def evaluate(self, params: TensorDict, batch: Any, memory: Any) -> Evaluation:
        """Loss, estimated gradient and aux of one chain; `memory` is as `prepare` made it."""

    def prepare(self, params: TensorDict, pieces: Iterable[Piece]) -> Any:
        """Make the memory at some parameters, of one chain or of many, by one pass over the data.

        Returns:
            A pytree of tensors, with the chains first; None for an estimator without memory.
        """
        return None

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Split the batch that `kernel` is given into the minibatch and the memory."""
        return batch, None


class Plain(GradientEstimator):
    """The gradient of the loss on the batch: the estimator of a plain loss."""

    def evaluate(self, params: TensorDict, batch: Any, memory: Any) -> Evaluation:
        """Loss, gradient and aux of one chain."""
        if tree.is_sharded(params):
            return self._evaluate_sharded(params, batch)

        def loss(params: TensorDict) -> tuple[Tensor, list[Any]]:
            value, aux = loss_and_aux(self.loss_fn, params, batch)
            return value, [] if aux is None else [aux]  # None may not leave the transform

        # Parameters of a module that are not in the tree must not drag a graph along.
        with torch.no_grad():
            grads, (value, aux) = torch.func.grad_and_value(loss, has_aux=True)(params)
        return Evaluation(grads, value, aux[0] if aux else None)

    def _evaluate_sharded(self, params: TensorDict, batch: Any) -> Evaluation:
        """The same of parameters of several processes."""
        names = tree.names(params)

        def loss(given: Sequence[Tensor]) -> tuple[Tensor, Any]:
            leaves = dict(zip(names, given, strict=True))
            return loss_and_aux(self.loss_fn, tree.build(leaves, params.batch_size), batch)

        grads, value, aux = shards.grads_and_value(loss, [params[name] for name in names])
        by_name = dict(zip(names, grads, strict=True))
        return Evaluation(tree.build(by_name, params.batch_size), value, aux)


def estimator_of(loss_fn: LossFn) -> GradientEstimator:
    """The loss function itself if it is an estimator, else the plain estimator of it."""
    return loss_fn if isinstance(loss_fn, GradientEstimator) else Plain(loss_fn)


def mean_evaluation(
    estimator: GradientEstimator,
    params: TensorDict,
    pieces: Iterable[Piece],
    memory: Any = None,
    memory_dim: int | None = None,
) -> Evaluation:
    """Loss and gradient over pieces of data, weighted by their numbers of examples.

    Args:
        estimator: Gives the gradient on a piece.
        params: w, of one chain or of many.
        pieces: The data; one piece is held at a time.
        memory: The estimator's.
        memory_dim: 0 if each chain has a memory of its own, as for `chains_step`.

    Returns:
        The mean; `aux` is the tuple of the pieces'.

    Raises:
        ValueError: There are no pieces, or a piece does not know its number.
    """
    evaluate = estimator.evaluate
    if params.batch_size:
        # One vmap a piece: loading a piece is no part of the traced function.
        evaluate = torch.vmap(estimator.evaluate, in_dims=(0, None, memory_dim))
    total: Any = None
    count, auxes = 0, []
    for piece, size in pieces:
        here = evaluate(params, piece, memory)
        assert here.loss is not None  # an estimator evaluates the loss
        count += check_known_size(size)
        auxes.append(here.aux)
        # Summed piece by piece: the activations of one piece are held at a time.
        weighted = (tree.widened(here.loss) * size, _times(size, here.grads))
        if total is not None:
            weighted = (total[0] + weighted[0], tree.map_leaves(torch.add, total[1], weighted[1]))
        total = weighted
    if total is None:
        raise ValueError("data must hold at least one batch, got none")
    loss, grads = total
    return Evaluation(_times(1 / count, grads), loss / count, tuple(auxes))


def _times(number: float, grads: TensorDict) -> TensorDict:
    """Gradients times a number, in float32 or better: they are summed over many examples."""
    return tree.map_leaves(lambda leaf: tree.widened(leaf) * number, grads)


def _memoryless(loss_fn: LossFn) -> GradientEstimator:
    """The inner estimator of one that wraps a loss.

    Raises:
        TypeError: The inner estimator needs a memory, which only the outermost is given.
    """
    estimator = estimator_of(loss_fn)
    if estimator.needs_memory:
        raise TypeError(
            "control variates must be the outermost estimator, as in svrg(accumulated(loss, 4), "
            f"100); got {type(estimator).__name__} inside another"
        )
    return estimator


class Accumulated(GradientEstimator):
    """See `accumulated`."""

    def __init__(self, loss_fn: LossFn, num_microbatches: int) -> None:
        super().__init__(loss_fn)
        self._inner = _memoryless(loss_fn)
        self._num_microbatches = checks.count("num_microbatches", num_microbatches, minimum=1)

    def __call__(self, params: TensorDict, batch: Any) -> Tensor:
        """L(w) on a batch, micro-batch by micro-batch."""
        loss = mean_loss(self.loss_fn, params, self._microbatches(batch))
        assert loss is not None  # every micro-batch has its number
        return loss

    def evaluate(self, params: TensorDict, batch: Any, memory: Any) -> Evaluation:
        """Loss and gradient on a batch; `aux` is the tuple of the micro-batches'."""
        mean = mean_evaluation(self._inner, params, self._microbatches(batch))
        # Summed in float32 or better; a plain gradient has the parameters' dtype.
        grads = tree.map_leaves(lambda leaf, like: leaf.to(like.dtype), mean.grads, params)
        # A tuple of None may not leave a vmap.
        has_aux = any(aux is not None for aux in mean.aux)
        return Evaluation(grads, mean.loss, mean.aux if has_aux else None)

    def _microbatches(self, batch: Any) -> Iterator[Piece]:
        size = check_known_size(num_examples(batch))
        # The last batch of a pass over the data may have fewer examples than micro-batches.
        number = min(self._num_microbatches, size)
        bounds = [size * i // number for i in range(number + 1)]
        for start, stop in itertools.pairwise(bounds):
            yield slice_examples(batch, slice(start, stop), size), stop - start


class ControlPoint(NamedTuple):
    """The point ŵ of control variates, and the gradient there.

    Attributes:
        params: ŵ, a tree.
        grads: ∇L(ŵ) on all data, a tree like `params`.
    """

    params: TensorDict
    grads: TensorDict


class ControlVariates(GradientEstimator):
    """See `control_variates` and `svrg`; the memory is a `ControlPoint`."""

    needs_memory = True

    def __init__(self, loss_fn: LossFn, refresh_interval: int | None) -> None:
        super().__init__(loss_fn)
        self._inner = _memoryless(loss_fn)
        self.refresh_interval = refresh_interval

    def evaluate(self, params: TensorDict, batch: Any, memory: Any) -> Evaluation:
        """Loss on the minibatch, and g_B(w) − g_B(ŵ) + g(ŵ)."""
        # On one batch, so that its noise is common to both and cancels.
        here = self._inner.evaluate(params, batch, None)
        there = self._inner.evaluate(memory.params, batch, None)

        def combined(here: Tensor, there: Tensor, known: Tensor) -> Tensor:
            # In float32 at least: near ŵ the first two are almost equal.
            return (tree.widened(here) - there + known).to(here.dtype)

        grads = tree.map_leaves(combined, here.grads, there.grads, memory.grads)
        return Evaluation(grads, here.loss, here.aux)

    def prepare(self, params: TensorDict, pieces: Iterable[Piece]) -> ControlPoint:
        """ŵ = `params`, and ∇L(ŵ)."""
        return ControlPoint(params, mean_evaluation(self._inner, params, pieces).grads)

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Split a pair (minibatch, control point).

        Raises:
            TypeError: The batch is no such pair.
        """
        is_pair = isinstance(batch, tuple) and len(batch) == 2
        if not (is_pair and isinstance(batch[1], ControlPoint)):
            raise TypeError(
                "control variates take batches (minibatch, point), with point made by "
                f"funcsgmcmc.gradients.control_point, got {type(batch).__name__}"
            )
        return batch[0], batch[1]


def accumulated(loss_fn: LossFn, num_microbatches: int) -> Accumulated:
    """Accumulate the gradient of a batch over micro-batches.

        g = Σ_b (n_b/n) g_b

    with n_b of the n examples in micro-batch b: the gradient of the whole batch, to rounding.

    Memory: the activations of one micro-batch a chain instead of those of the batch, and a second
    tree of gradients. Time: that of the batch, in smaller pieces.

    Args:
        loss_fn: A loss, the mean over its batch's examples. These are the entries along the first
            dimension of the batch's first tensor; tensors of that length are cut with it, and
            others (class weights, a scalar) go to every micro-batch as they are.
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
        An estimator. Given to `sample` in place of the loss, its control point is the sampler's
        anchor. Given to `kernel`, the step takes batches `(minibatch, point)`, with
        `point = control_point(loss_fn, params, data)`.

    Raises:
        TypeError: `loss_fn` is not a function.
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
        An estimator, as `control_variates` gives; with `kernel`, you make the control point anew.

    Raises:
        TypeError, ValueError: An argument is out of its range.
    """
    return ControlVariates(loss_fn, checks.count("refresh_interval", refresh_interval, minimum=1))


def control_point(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor],
    data: Any,
    *,
    batch_size: int | None = None,
) -> ControlPoint:
    """Make the control point of `control_variates` or `svrg`, for loops of your own.

    Args:
        loss_fn: The loss, or the estimator made of it.
        params: ŵ, of one chain; vmap for many.
        data: All data, tensors `[n, …]` in the structure of a batch.
        batch_size: Examples evaluated at once (default: all).

    Returns:
        ŵ and ∇L(ŵ).

    Raises:
        TypeError, ValueError: The parameters are no tree, or the data no tensors of one length.
    """
    estimator = estimator_of(loss_fn)
    if not estimator.needs_memory:
        # Both estimators have the same control point.
        estimator = ControlVariates(loss_fn, None)
    size = check_examples(pytree.tree_leaves(data))
    pieces = pieces_of(data, size, check_batch_size(batch_size, size))
    params = tree.parameters(params)
    tree.check_finite("params", params)
    try:
        point: ControlPoint = estimator.prepare(params, pieces)
    except Exception as error:
        error.add_note("This happened when loss_fn(params, batch) was evaluated on pieces of data.")
        raise
    return point
