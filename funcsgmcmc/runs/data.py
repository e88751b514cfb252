"""The data of a run: the batch that each step sees, and passes over all batches.

Tensors are held in memory, and each chain draws minibatches of its own, chosen by its key: a chain
sees the same examples whatever runs beside it. Or all chains share the minibatches that the run's
key chooses. Any other iterable (a `DataLoader`, a list of batches) gives one batch a step to all
chains, in its own order, and is started again at its end.

Shapes: n examples; C chains; a minibatch's leaves are `[C, batch_size, …]`, a shared batch's
`[batch, …]`.
"""

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensorclass
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    TensorDataset,
)

from funcsgmcmc import checks, random
from funcsgmcmc.batches import (
    Piece,
    check_batch_size,
    check_examples,
    map_examples,
    num_examples,
    pieces_of,
    plain,
    take_examples,
)
from funcsgmcmc.runs.encoding import decode, digest, encode
from funcsgmcmc.runs.progress import logger
from funcsgmcmc.runs.store import Rows

# Choosing the examples of many steps at once costs little more than those of one.
_BLOCK_SIZE = 1 << 18
_SECONDS_OF_A_QUIET_PASS = 5.0


class TensorData:
    """Examples in memory; each chain's minibatches are chosen by its key, or all by one key.

    Args:
        data: Tensors `[n, …]`, in any nesting.
        batch_size: Examples a minibatch; None means all n.
        epochs: Whether minibatches are drawn by permutations, not independently.
        keys: The chains' keys for minibatches, `[C, 2]`; one key, `[2]`, for minibatches that all
            chains share.
        device: Where the examples are held.

    Attributes:
        batch_dim: 0, for the chains; None if all chains see one batch.
        is_all_data: Whether a batch is all the data.
        is_shared: Whether all chains see one batch, with the same noise.
        num_examples: n.
        batch_size: Examples a minibatch.
        examples: All of them, in the data's structure.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int | None,
        epochs: bool,
        keys: Tensor,
        device: torch.device,
    ) -> None:
        self.num_examples = check_examples(pytree.tree_leaves(data))
        self.batch_size = check_batch_size(batch_size, self.num_examples)
        self._epochs = epochs
        is_shared = keys.ndim == 1
        self._keys = keys.reshape(-1, 2)
        self._steps_per_block = self.num_examples // self.batch_size
        if not epochs:
            self._steps_per_block = max(1, _BLOCK_SIZE // (len(self._keys) * self.batch_size))
        self._blocks: dict[int, Tensor] = {}
        self._shared_batch: tuple[int, Any] = (-1, None)
        self.examples = map_examples(lambda leaf: leaf.to(device), data)
        self.is_all_data = batch_size is None
        self.is_shared = is_shared and not self.is_all_data
        self.batch_dim: int | None = None if self.is_all_data or self.is_shared else 0

    def batch(self, step: int, rows: Rows) -> Any:
        """The batch of some chains at a step: the data's structure, with leaves
        `[batch_size, …]` of one chain or of all, or `[c, batch_size, …]` of a slice.
        """
        if self.is_all_data:
            return self.examples
        if self.batch_dim is not None:
            return take_examples(self.examples, self._chosen(step, rows))
        # All chunks of a step ask for it.
        if self._shared_batch[0] != step:
            self._shared_batch = (step, take_examples(self.examples, self._chosen(step, 0)))
        return self._shared_batch[1]

    def chosen(self, first: int, number: int, rows: Rows) -> tuple[Tensor, ...]:
        """Which examples are the batches of some steps: each `batch` takes its row of them.

        Args:
            first: The first step.
            number: Of steps.
            rows: The chains.

        Returns:
            Nothing where every batch is all the data; else `[number, batch_size]`, of one chain or
            of all, or `[number, c, batch_size]` of a slice.
        """
        if self.is_all_data:
            return ()
        rows = rows if self.batch_dim is not None else 0
        parts, stop = [], first + number
        while first < stop:
            block, position = divmod(first, self._steps_per_block)
            here = self._examples_of(block)[:, position : position + stop - first]
            parts.append(here[rows])
            first += here.shape[1]
        return (torch.cat(parts, -2).movedim(-2, 0),)

    def _chosen(self, step: int, rows: Rows) -> Tensor:
        """The examples of some rows of keys at a step, `[batch_size]` or `[c, batch_size]`."""
        block, position = divmod(step, self._steps_per_block)
        return self._examples_of(block)[rows, position]

    def _examples_of(self, block: int) -> Tensor:
        """The examples of a block of steps, `[keys, steps, batch_size]`."""
        # Chunks of one step share a block, and so do many steps; steps that are made at once may
        # reach into the next one: keep the last two.
        if block not in self._blocks:
            examples = self._permutations(block) if self._epochs else self._draws(block)
            self._blocks = dict([*self._blocks.items()][-1:]) | {block: examples}
        return self._blocks[block]

    def digests(self) -> dict[str, str]:
        """Digests of the data, which name it."""
        leaves = pytree.tree_leaves(self.examples)
        return {f"data, tensor {i}": digest(leaf) for i, leaf in enumerate(leaves)}

    def digests_of_batch(self) -> dict[str, str]:
        """What else names the data: nothing."""
        return {}

    def position(self, next_step: int) -> None:
        """Where the run is in the data: its step says so."""

    def why_not_resumed(self) -> str | None:
        """Why a run cannot be resumed on this data: it always can."""
        return None

    def one_pass(self) -> Iterator[Piece]:
        """All examples, in pieces of `batch_size`."""
        return pieces_of(self.examples, self.num_examples, self.batch_size)

    def part(self, num_examples: int) -> Callable[[], Iterator[Piece]]:
        """Passes over a fixed part of the examples, in pieces of `batch_size`.

        They are spread over the data evenly, which may be sorted.
        """
        index = torch.arange(num_examples) * self.num_examples // num_examples
        chosen = take_examples(self.examples, index.to(self._keys.device))
        return lambda: pieces_of(chosen, num_examples, self.batch_size)

    def _draws(self, block: int) -> Tensor:
        """Choose examples uniformly with replacement, for the steps of a block.

        Returns:
            `[keys, steps, batch_size]`.
        """
        first = block * self._steps_per_block
        steps = torch.arange(first, first + self._steps_per_block, device=self._keys.device)
        # Keyed by the step, not the block: the size of a block depends on the number of chains.
        words = random.bits(random.fold_in(self._keys[:, None], steps), (self.batch_size,))
        # The high word of the product word · n: uniform up to a relative n/2**32.
        return ((words.to(torch.int64) & 0xFFFFFFFF) * self.num_examples) >> 32

    def _permutations(self, epoch: int) -> Tensor:
        """Permute the examples for each key, for the steps of an epoch.

        Returns:
            `[keys, steps, batch_size]`; the incomplete batch at the end of an epoch is left out.
        """
        words = random.bits(random.fold_in(self._keys, epoch), (2, self.num_examples)).to(
            torch.int64
        )
        high, low = words.unbind(-2)
        # Sorting 64 bits: two examples would share a sort key once in 2**64 pairs.
        order = ((high << 32) | (low & 0xFFFFFFFF)).argsort(-1)
        used = self._steps_per_block * self.batch_size
        return order[:, :used].reshape(len(order), self._steps_per_block, self.batch_size)


class IterableData:
    """Batches of an iterable; all chains see the same one at a step.

    Attributes:
        batch_dim: Always None.
        is_all_data: Always False, as far as it is known.
        is_shared: Always True: batches are all chains'.
        num_examples: None: it is not known.
        batch_size: None: batches may differ.
    """

    batch_dim: int | None = None
    is_all_data = False
    is_shared = True
    num_examples = None
    batch_size = None

    def __init__(
        self,
        data: Iterable[Any],
        *,
        first_step: int,
        device: torch.device,
        position: dict[str, Any] | None = None,
    ) -> None:
        self._iterable = data  # kept, to be started again at its end
        self._device = device
        self._first_step = first_step
        self._latest: tuple[int, Any] = (first_step - 1, None)
        self._digest: str | None = None  # of a batch that an earlier process has used
        if position is not None:
            self._go_to(position)
        else:
            self._iterator = iter(data)

    def digests(self) -> dict[str, str]:
        """What names the data: its kind, and its length where that is known."""
        return {"data": digest((type(self._iterable).__name__, _length(self._iterable)))}

    def digests_of_batch(self) -> dict[str, str]:
        """What names the batch that was read last."""
        step, batch = self._latest
        return {f"data, the batch of step {step}": self._digest or _digest_of(batch)}

    def position(self, next_step: int) -> dict[str, Any]:
        """Where the run is in the data, as plain values.

        Args:
            next_step: The step that not all chains have made yet; some may have.
        """
        taken, batch = self._latest[0], self._latest[1]
        position: dict[str, Any] = {
            "batches": taken + 1 - self._first_step,
            "step": taken,
            "digest": self._digest or _digest_of(batch),
            # Chains that have not made their step are given this batch again.
            "latest": encode("a batch", batch) if taken == next_step else None,
        }
        data: Any = self._iterable
        if _is_stateful(data):
            position["state"] = data.state_dict()
        return position

    def why_not_resumed(self) -> str | None:
        """Why a run cannot be resumed on this data; None if it can."""
        data: Any = self._iterable
        if _is_stateful(data):
            generator = getattr(data, "generator", None)
            if (
                generator is not None
                and getattr(getattr(data, "sampler", None), "generator", None) is generator
            ):
                # Seeds of workers are drawn from it too, at other places after loading a state.
                return (
                    f"{type(data).__name__} with a generator shuffles its next epochs otherwise "
                    "when its state was loaded: leave generator out, and call torch.manual_seed "
                    "before you make it"
                )
            return None
        if isinstance(data, list):
            return None
        what = None
        if isinstance(data, Iterator):
            what = f"{type(data).__name__} cannot be read again from its beginning"
        elif _length(data) is None:
            what = f"{type(data).__name__} has no length"
        elif isinstance(data, DataLoader):
            if not isinstance(data.sampler, SequentialSampler) or not _is_plain_sampler(data):
                what = "a DataLoader that shuffles has an order of its own in every process"
        else:
            first, again = (_digest_of(next(iter(_reread(data)), None)) for _ in range(2))
            if first != again:
                what = f"{type(data).__name__} gives other batches each time it is read"
        if what is None:
            return None
        return (
            f"{what}: give tensors, whose minibatches the key chooses, or a loader with state_dict "
            "and load_state_dict, such as torchdata's StatefulDataLoader"
        )

    def _go_to(self, position: dict[str, Any]) -> None:
        """Go to where an earlier process was in the data.

        Raises:
            ValueError: The data has other batches than it had.
        """
        data: Any = self._iterable
        if "state" in position:
            data.load_state_dict(position["state"])
            self._iterator = iter(data)
        else:
            length = _length(self._iterable)
            assert length  # the run would not have begun
            self._iterator = iter(self._iterable)
            # It is read from its beginning as often as it has ended.
            skipped = list(itertools.islice(self._iterator, position["batches"] % length))
            if skipped and _digest_of(self._to_device(skipped[-1])) != position["digest"]:
                raise ValueError(
                    f"data must give the batches that it gave before, to resume a run on it, but "
                    f"batch {position['batches'] - 1} is another"
                )
        self._digest = position["digest"]
        self._first_step = position["step"] + 1 - position["batches"]
        latest = position["latest"]
        self._latest = (position["step"], None if latest is None else decode(latest, self._device))

    def batch(self, step: int, rows: Rows) -> Any:
        """The batch of a step, on the run's device; steps are asked for in order.

        Raises:
            ValueError: The iterable is empty, or an iterator that has ended.
        """
        # Each chunk asks for the step's batch: only the first of them takes a new one.
        while self._latest[0] < step:
            self._latest = (self._latest[0] + 1, self._to_device(self._next(step)))
            self._digest = None
        return self._latest[1]

    def one_pass(self) -> Iterator[Piece] | None:
        """One pass over the batches, each with its number of examples: 0 for a batch that holds no
        tensor with a first dimension.

        Returns:
            None if the data cannot be passed over twice (an iterator), or has no known length.
        """
        # A pass would use an iterator up, and might never end without a length.
        num_batches = _length(self._iterable)
        if isinstance(self._iterable, Iterator) or num_batches is None:
            return None
        return self._pieces(num_batches)

    def _pieces(self, num_batches: int) -> Iterator[Piece]:
        """The first batches, read beside the run's own."""
        iterator = iter(_reread(self._iterable))
        if iterator is self._iterator:
            raise ValueError(
                f"data must be iterable twice at once for a pass beside the run, but iterating "
                f"{type(self._iterable).__name__} again starts the run's own iterator anew"
            )
        # Some have a length and never end.
        for batch in itertools.islice(iterator, num_batches):
            moved = self._to_device(batch)
            yield moved, num_examples(moved)

    def _next(self, step: int) -> Any:
        with contextlib.suppress(StopIteration):
            return next(self._iterator)
        if not isinstance(self._iterable, Iterator):
            self._iterator = iter(self._iterable)
            with contextlib.suppress(StopIteration):
                return next(self._iterator)
        if step == self._first_step:
            raise ValueError("data must give at least one batch, got none")
        raise ValueError(
            f"data must give a batch for every step, but it ended at step {step}: "
            "pass something that can be iterated again, or enough batches"
        )

    def _to_device(self, batch: Any) -> Any:
        return map_examples(
            lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch
        )


Batches = TensorData | IterableData


def stream(
    data: Any,
    *,
    batch_size: int | None,
    minibatches: str,
    keys: Tensor,
    first_step: int,
    device: torch.device,
    position: dict[str, Any] | None = None,
) -> Batches:
    """Take the data given to `sample`.

    Args:
        data: Tensors `[n, …]` in memory: one, or a tuple, dict, `TensorDict` or `TensorDataset` of
            them. Or any other iterable, of batches.
        batch_size: Examples a minibatch, for tensors; None means all n.
        minibatches: `"replacement"` or `"epochs"`, for tensors.
        keys: The chains' keys for minibatches, `[C, 2]`; or the key of those that all share, `[2]`.
        first_step: The run's first step, which gets the first batch of an iterable.
        device: Where batches go.
        position: Where an earlier process was in the data, for a run that is resumed.

    Raises:
        TypeError: The data is neither tensors nor an iterable of batches.
        ValueError: It is empty, its tensors differ in length, or an option does not fit it.
    """
    checks.choice("minibatches", minibatches, ("replacement", "epochs"))
    if isinstance(data, TensorDataset):
        data = data.tensors
    data = plain(data)
    # A list is an iterable of batches: a tuple of tensors is one structure of examples.
    if isinstance(data, Tensor | TensorDictBase | tuple | Mapping):
        epochs = minibatches == "epochs"
        return TensorData(data, batch_size=batch_size, epochs=epochs, keys=keys, device=device)
    _check_iterable(data)
    _check_list(data)
    if batch_size is not None:
        raise ValueError(
            f"batch_size must be None for an iterable, which makes its own batches, "
            f"got {batch_size}"
        )
    if minibatches != "replacement":
        raise ValueError(
            f"minibatches must not be set for an iterable, which makes its own batches, "
            f"got {minibatches!r}"
        )
    return IterableData(data, first_step=first_step, device=device, position=position)


def _check_list(data: Any) -> None:
    """Refuse a list of tensors that are no batches of one kind: inputs and targets, most likely.

    Raises:
        TypeError: Tensors have one length, but not one dtype and shape.
    """
    if not (
        isinstance(data, list) and all(isinstance(each, Tensor) and each.ndim for each in data)
    ):
        return
    kinds = {(each.dtype, each.shape[1:]) for each in data}
    if len(kinds) > 1 and len({len(each) for each in data}) == 1:
        raise TypeError(
            "a list is an iterable of batches, got tensors of one length and of several kinds: for "
            "inputs and targets give a tuple, (inputs, targets)"
        )


def announced(pieces: Iterable[Piece], what: str) -> Iterator[Piece]:
    """Pieces of a pass that says what it is for, once, if it takes long."""
    start, is_told = time.monotonic(), False
    for number, piece in enumerate(pieces):
        if not is_told and time.monotonic() - start > _SECONDS_OF_A_QUIET_PASS:
            logger.warning("still passing over the data, %d batches so far, for %s", number, what)
            is_told = True
        yield piece


def pass_over(batches: Batches) -> Iterator[Piece]:
    """One pass over all data, for an estimator of the gradient.

    Raises:
        ValueError: It cannot be passed over twice.
    """
    pieces = batches.one_pass()
    if pieces is None:
        raise ValueError(
            "control variates need data that can be passed over: tensors, or an iterable with a "
            "length, such as a DataLoader or a list; got an iterator, or an iterable without length"
        )
    return announced(pieces, "the gradient on all data of control variates")


def _check_iterable(data: Any) -> None:
    """Refuse data that is neither tensors nor an iterable of batches.

    Raises:
        TypeError: It is a data set of examples, a string, or no iterable.
    """
    if isinstance(data, Dataset):
        raise TypeError(
            f"data must be tensors or an iterable of batches, got the data set "
            f"{type(data).__name__}: wrap it in a torch.utils.data.DataLoader"
        )
    if hasattr(data, "__array__"):
        raise TypeError(
            f"data must be tensors, got {type(data).__name__}: torch.as_tensor makes one"
        )
    # Tensor classes, a sampler for instance, have an iterator only where they have a batch size.
    if isinstance(data, str) or is_tensorclass(data) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be tensors or an iterable of batches, got {type(data).__name__}"
        )


def _reread(data: Iterable[Any]) -> Iterable[Any]:
    """The data, to be iterated beside an iteration that goes on."""
    if isinstance(data, DataLoader) and data.persistent_workers:
        # Such a loader has one iterator, which a second iteration would reset.
        beside = copy.copy(data)
        beside._iterator = None
        return beside
    return data


def _is_stateful(data: Any) -> bool:
    """Whether an iterable says where it is, and goes there."""
    return hasattr(data, "state_dict") and hasattr(data, "load_state_dict")


def _is_plain_sampler(loader: DataLoader[Any]) -> bool:
    """Whether a loader takes its examples one by one, or in batches, as its sampler gives them."""
    return loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler


def _digest_of(batch: Any) -> str:
    """A digest of a batch's tensors."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return digest([digest(leaf) for leaf in leaves])


def _length(data: Any) -> int | None:
    """The number of batches, where it is known."""
    try:
        return len(data)
    except TypeError:
        return None
