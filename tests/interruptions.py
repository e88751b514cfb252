"""Runs that are stopped and resumed: what stops them, data that goes on, and the comparison."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import funcsgmcmc as fs
from problems import classification, observables, run
from test_going_on import assert_identical

SETTINGS = {
    "num_chains": 3,
    "num_draws": 6,
    "num_burnin_steps": 3,
    "num_steps_between_draws": 2,
    "observables": observables(),
}


class Failing:
    """The loss of the classification problem, which raises an error at some call."""

    def __init__(self, error: type[BaseException] = OSError) -> None:
        self.loss_fn = fs.module_loss(classification()[0], cross_entropy)
        self.error, self.calls_left = error, -1

    def __call__(self, params, batch):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.error("the machine is on fire")
        return self.loss_fn(params, batch)


class Stateful:
    """A loader that knows where it is: another order in each epoch, from a generator of its own."""

    def __init__(self, batches: list) -> None:
        self.batches, self.generator = batches, torch.Generator().manual_seed(7)
        self.order, self.next = [], 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        if self.next >= len(self.order):
            self.order, self.next = self._shuffled(), 0
        while self.next < len(self.order):
            self.next += 1
            yield self.batches[self.order[self.next - 1]]

    def _shuffled(self) -> list[int]:
        return torch.randperm(len(self.batches), generator=self.generator).tolist()

    def state_dict(self) -> dict:
        return {"order": self.order, "next": self.next, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.next = state["order"], state["next"]
        self.generator.set_state(state["generator"])


def batches_of_8() -> list:
    inputs, targets = classification()[1]
    return [(inputs[i : i + 8], targets[i : i + 8]) for i in range(0, 40, 8)]


def of_torchdata(num_workers: int = 0) -> Callable[[list], StatefulDataLoader]:
    """Makes torchdata's loader, which shuffles by a generator of its own."""

    def make(_: list) -> StatefulDataLoader:
        torch.manual_seed(7)
        data = TensorDataset(*classification()[1])
        return StatefulDataLoader(data, batch_size=8, shuffle=True, num_workers=num_workers)

    return make


HOWS = {
    "vmap": {},
    "chunks": {"chunk_size": 2},
    "loop": {"chain_method": "loop"},
    "epochs": {"minibatches": "epochs"},
    "shared batches": {"shared_batches": True, "chunk_size": 2},
    "all data": {"batch_size": None},
    "a list": {"data": list, "batch_size": None},
    "a stateful loader": {"data": Stateful, "batch_size": None},
    "a stateful loader and chunks": {"data": Stateful, "batch_size": None, "chunk_size": 2},
    "torchdata": {"data": of_torchdata(), "batch_size": None},
    "torchdata and workers": {"data": of_torchdata(2), "batch_size": None},
}


def fresh(how: dict) -> dict:
    """Settings with data as a new process would make it."""
    if "data" not in how:
        return how
    return how | {"data": how["data"](batches_of_8()), "initial_loss": 1.0}


def stopped_and_resumed(
    sampler, calls: list[int], path: Path, how: dict, **settings
) -> tuple[fs.Samples, fs.Samples]:
    """A run that is not stopped, and one that fails at some calls and is resumed each time.

    Args:
        calls: Calls of the loss by the run's steps after which it fails.
    """
    counting = Failing()
    uninterrupted = run(sampler, loss_fn=counting, **settings, **fresh(how))
    num_chunks = {2: 2}.get(how.get("chunk_size"), 1) * (3 if "chain_method" in how else 1)
    # Before the first step the loss is tried, and evaluated at the anchor.
    before = -1 - counting.calls_left - uninterrupted.num_steps * num_chunks
    for number in calls:
        failing = Failing()
        failing.calls_left = before + number
        with pytest.raises(fs.SamplingError, match="on fire") as raised:
            run(sampler, loss_fn=failing, store=path, resume=True, **settings, **fresh(how))
        kept = raised.value.samples
        assert_identical([kept.losses], [uninterrupted.losses[:, : kept.num_steps]])
        before = 0
    resumed = run(sampler, loss_fn=Failing(), store=path, resume=True, **settings, **fresh(how))
    return uninterrupted, resumed


class Stop:
    """An observable that interrupts the run at some draw."""

    def __init__(self, draw: int) -> None:
        self.left = draw + 3  # it is tried thrice

    def __call__(self, params):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return params["0.bias"].sum()
