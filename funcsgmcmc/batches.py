"""Batches: tensors with the examples along their first dimension, in any nesting.

A batch is one tensor, or a tuple, dict or `TensorDict` of them. One pass over the data is made of
pieces: a `Piece` is a batch with its number of examples, its weight in sums over the pass.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import checks

Piece = tuple[Any, int]


def map_examples(function: Callable[[Any], Any], batch: Any) -> Any:
    """Apply a function to every leaf of a batch.

    Raises:
        ValueError: The batch is a `TensorDict` of batch size `[]`.
    """
    if isinstance(batch, TensorDictBase):
        if not batch.batch_size:
            raise ValueError(
                "a TensorDict of data must have a batch size, the number of examples, got ()"
            )
        # The function, applied to a tensor of the old batch size, shows the new one.
        return batch.apply(function, batch_size=function(torch.empty(batch.batch_size)).shape)
    return pytree.tree_map(function, plain(batch))


def plain(batch: Any) -> Any:
    """A batch with a dict in place of a mapping that pytrees do not know, as tokenizers return."""
    is_unknown = isinstance(batch, Mapping) and pytree.tree_is_leaf(batch)
    return dict(batch) if is_unknown else batch


def take_examples(batch: Any, index: Any) -> Any:
    """Index every leaf of a batch along its examples."""
    return map_examples(lambda leaf: leaf[index], batch)


def map_if_examples(function: Callable[[Any], Any], batch: Any, num_examples: int) -> Any:
    """Apply a function to those leaves of a batch that hold its examples; others stay."""

    def map_leaf(leaf: Any) -> Any:
        has_examples = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num_examples
        return function(leaf) if has_examples else leaf

    # All leaves of a `TensorDict` of batch size `[n]` hold its examples.
    return map_examples(function if isinstance(batch, TensorDictBase) else map_leaf, batch)


def slice_examples(batch: Any, index: slice, num_examples: int) -> Any:
    """Slice those leaves of a batch that hold its examples; others stay."""
    return map_if_examples(lambda leaf: leaf[index], batch, num_examples)


def pieces_of(data: Any, num_examples: int, piece_size: int) -> Iterator[Piece]:
    """Cut a batch into pieces of `piece_size` examples; the last one may be smaller."""
    for start in range(0, num_examples, piece_size):
        stop = min(start + piece_size, num_examples)
        # By slices: each piece is a view of the data.
        yield take_examples(data, slice(start, stop)), stop - start


def num_examples(batch: Any) -> int:
    """The first dimension of a batch's first tensor that has one; 0 if none has."""
    leaves = pytree.tree_leaves(plain(batch))
    # A scalar beside the tensors, such as a weight, says nothing of the examples.
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)


def check_examples(leaves: list[Any]) -> int:
    """Check that the leaves of a batch are tensors that share their first dimension.

    Returns:
        The number of examples.

    Raises:
        TypeError: A leaf is not a tensor.
        ValueError: There is no leaf or no example, or lengths differ.
    """
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            hint = ", of which torch.from_numpy makes one" if kind == "ndarray" else ""
            raise TypeError(f"data must hold tensors only, got {kind}{hint}")
        if leaf.layout != torch.strided or leaf.is_meta:
            raise TypeError(f"data must hold dense tensors, got {leaf.layout} on {leaf.device}")
        if leaf.ndim == 0:
            raise ValueError("data must have a first dimension, over examples, got a 0-d tensor")
    lengths = [leaf.shape[0] for leaf in leaves]
    if len(set(lengths)) > 1:
        raise ValueError(f"data must agree on the number of examples, got lengths {lengths}")
    if not lengths or not lengths[0]:
        raise ValueError("data must hold at least one example, got none")
    return lengths[0]


def check_batch_size(value: int | None, num_examples: int) -> int:
    """Check a minibatch size against the data; None means all examples.

    Raises:
        TypeError, ValueError: The size is not an integer in [1, num_examples].
    """
    if value is None:
        return num_examples
    if not checks.count("batch_size", value, minimum=1) <= num_examples:
        raise ValueError(
            f"batch_size must be at most the number of examples {num_examples}, got {value}"
        )
    return value


def check_known_size(size: int) -> int:
    """Check that a piece knows its number of examples, which weights its gradient.

    Raises:
        ValueError: The size is 0, which stands for an unknown number.
    """
    if not size:
        raise ValueError(
            "a batch must hold a tensor with the examples along its first dimension for its "
            "gradient to be weighted by their number, got none"
        )
    return size
