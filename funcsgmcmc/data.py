"""Where a run's batches come from.

Tensors are held in memory, and each chain draws minibatches of its own, chosen by the key: a chain
sees the same examples whatever runs beside it. Any other iterable (a `DataLoader`, a list of
batches) gives one batch a step to all chains, in the iterable's own order; it is started again when
it ends.

A `Piece` is some of the examples, with their number: one pass over the data is made of them.

Shapes: n examples; C chains; a minibatch's leaves are `[C, batch_size, …]`, a shared batch's
`[batch, …]`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, TensorDataset

from funcsgmcmc import checks, random

Piece = tuple[Any, int]

# Choosing the examples of many steps at once costs little more than those of one.
_BLOCK_SIZE = 1 << 18


class TensorData:
    """Examples in memory; minibatches are chosen by the key, each chain's its own.

    Attributes:
        shared: Whether all chains see one batch: only when the batch is all the data.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int | None,
        minibatches: str,
        key: Tensor,
        chains: Tensor,
        device: torch.device,
    ) -> None:
        self._n = checks.examples(pytree.tree_leaves(data))
        self._batch_size = checks.batch_size(batch_size, self._n)
        self._epochs = minibatches == "epochs"
        self._keys = random.fold_in(key, chains)
        self._block_length = self._n // self._batch_size
        if not self._epochs:
            self._block_length = max(1, _BLOCK_SIZE // (len(chains) * self._batch_size))
        self._block = (-1, torch.empty(0))
        self._data = map_examples(lambda leaf: leaf.to(device), data)
        self.shared = batch_size is None

    def batch(self, step: int, chains: int | slice) -> Any:
        """The batch of one chain, or those of a slice of chains, at a step: the data's structure
        with leaves `[batch_size, …]` or `[c, batch_size, …]`.
        """
        if self.shared:
            return self._data
        block, position = divmod(step, self._block_length)
        if self._block[0] != block:
            examples = self._permutations(block) if self._epochs else self._draws(block)
            self._block = (block, examples)
        index = self._block[1][chains, position]
        return map_examples(lambda leaf: leaf[index], self._data)

    def one_pass(self) -> Iterator[Piece]:
        """All examples, in pieces of `batch_size`."""
        for start in range(0, self._n, self._batch_size):
            piece = slice(start, min(start + self._batch_size, self._n))
            examples = map_examples(lambda leaf, piece=piece: leaf[piece], self._data)
            yield examples, piece.stop - start

    def _draws(self, block: int) -> Tensor:
        """Examples for a block of steps, `[C, steps, batch_size]`: uniform with replacement."""
        first = block * self._block_length
        steps = torch.arange(first, first + self._block_length, device=self._keys.device)
        words = random.bits(random.fold_in(self._keys[:, None], steps), (self._batch_size,))
        # The high word of the product word · n: uniform up to a relative n/2**32.
        return ((words.to(torch.int64) & 0xFFFFFFFF) * self._n) >> 32

    def _permutations(self, epoch: int) -> Tensor:
        """Examples for an epoch of steps, `[C, steps, batch_size]`: a permutation a chain. What is
        left at its end, less than a batch, is not used.
        """
        words = random.bits(random.fold_in(self._keys, epoch), (2, self._n)).to(torch.int64)
        high, low = words.unbind(-2)
        # Sorting 64 bits: two examples would share a sort key once in 2**64 pairs.
        order = ((high << 32) | (low & 0xFFFFFFFF)).argsort(-1)
        used = self._block_length * self._batch_size
        return order[:, :used].reshape(len(order), self._block_length, self._batch_size)


class IterableData:
    """Batches of an iterable; every chain sees the same one at a step.

    Attributes:
        shared: Always True.
    """

    def __init__(self, data: Iterable[Any], *, device: torch.device) -> None:
        self._iterable = data
        self._iterator = iter(data)
        self._device = device
        self._latest: tuple[int, Any] = (-1, None)
        self.shared = True

    def batch(self, step: int, chains: int | slice) -> Any:
        """The batch of a step, on the run's device; steps are asked for in order.

        Raises:
            ValueError: The iterable is empty, or an iterator that has ended.
        """
        while self._latest[0] < step:
            self._latest = (self._latest[0] + 1, self._to_device(self._next(step)))
        return self._latest[1]

    def one_pass(self) -> Iterator[Piece] | None:
        """One pass over the batches, each with its number of examples: 0 for a batch that holds no
        tensor with a first dimension.

        Returns:
            None if the data cannot be passed over twice (an iterator), or has no known length.
        """
        if isinstance(self._iterable, Iterator) or _length(self._iterable) is None:
            return None
        return ((self._to_device(batch), num_examples(batch)) for batch in self._iterable)

    def _next(self, step: int) -> Any:
        with contextlib.suppress(StopIteration):
            return next(self._iterator)
        if not isinstance(self._iterable, Iterator):
            self._iterator = iter(self._iterable)
            with contextlib.suppress(StopIteration):
                return next(self._iterator)
        raise ValueError(checks.data_ended(step))

    def _to_device(self, batch: Any) -> Any:
        return map_examples(
            lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch
        )


def stream(
    data: Any,
    *,
    batch_size: int | None,
    minibatches: str,
    key: Tensor,
    chains: Tensor,
    device: torch.device,
) -> TensorData | IterableData:
    """Take the data given to `sample`.

    Args:
        data: Tensors `[n, …]` in memory: one, or a tuple, dict, `TensorDict` or `TensorDataset` of
            them. Or any other iterable, of batches.
        batch_size: Examples a minibatch, for tensors; None means all n.
        minibatches: `"replacement"` or `"epochs"`, for tensors.
        key: What chooses the minibatches.
        chains: Indices of the run's chains, `[C]`.
        device: Where batches go.

    Raises:
        TypeError: The data is neither tensors nor an iterable of batches.
        ValueError: It is empty, its tensors differ in length, or an option does not fit it.
    """
    checks.choice("minibatches", minibatches, ("replacement", "epochs"))
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Tensor | TensorDictBase | tuple | Mapping):
        return TensorData(
            data,
            batch_size=batch_size,
            minibatches=minibatches,
            key=key,
            chains=chains,
            device=device,
        )
    checks.iterable_data(
        data,
        is_dataset=isinstance(data, Dataset),
        batch_size=batch_size,
        minibatches=minibatches,
    )
    return IterableData(data, device=device)


def map_examples(function: Any, data: Any) -> Any:
    """Apply to every leaf; a `TensorDict` takes its new batch size from the result."""
    if isinstance(data, TensorDictBase):
        checks.batched(data)
        return data.apply(function, batch_size=function(torch.empty(data.batch_size)).shape)
    return pytree.tree_map(function, data)


def num_examples(batch: Any) -> int:
    """The first dimension of a batch's first tensor that has one; 0 if none has."""
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None
