"""Processes that make one run together, each a slice of its chains, on torch.distributed.

No step of one process waits for another. They meet where something is one for all of them: before
the first step, where a file is made, at checkpoints, and at the end. There each one leaves a value
in the store of the process group, and gets those of all.

A thread of each process says twice a second that its process lives, looks whether its neighbour
does, and whether one has stopped. So nobody waits for the dead: what a process raises, the others
raise too, and one that has ended or hangs is named.
"""

import contextlib
import itertools
import logging
import pickle
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from funcsgmcmc import checks
from funcsgmcmc.runs.progress import logger

T = TypeVar("T")

_SECONDS_BETWEEN_BEATS = 0.5
# Less than the default timeouts of process groups: a step that holds Python's lock may be silent.
_LONGEST_SILENCE = 60.0
# How long a process that holds the store waits for the others to read why it has stopped.
_SECONDS_TO_READ = 5.0
# How long an interrupted process waits for the others: clusters kill 30 s after SIGTERM.
_SECONDS_TO_LEVEL = 20.0
_INTERRUPTED = "was interrupted"
# Calls of a process group, which all its processes make in one order: keys of a call are its own.
_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class Processes:
    """The processes of a run; this one, which runs all chains alone.

    Attributes:
        rank: Which one this is.
        size: How many there are.
    """

    rank = 0
    size = 1

    def share(self, num_chains: int, unit: int = 1) -> slice:
        """The chains of this process: shares differ by one unit at most.

        Args:
            num_chains: C, of all processes.
            unit: Chains that stay together.

        Raises:
            ValueError: A process would have no chain.
        """
        return self.shares(num_chains, unit)[self.rank]

    def shares(self, num_chains: int, unit: int = 1) -> list[slice]:
        """The chains of each process; arguments and errors as for `share`."""
        units = -(-num_chains // unit)
        if units < self.size:
            together = "" if unit == 1 else f" in units of {unit}, which the store holds together,"
            raise ValueError(
                f"num_chains must be at least one{together} for each of {self.size} processes, got "
                f"{num_chains}"
            )
        each, more = divmod(units, self.size)
        stops = [unit * (each * rank + min(rank, more)) for rank in range(1, self.size + 1)]
        stops[-1] = num_chains
        return [slice(*ends) for ends in itertools.pairwise([0, *stops])]

    def unit(self, num_chains: int) -> int:
        """Chains of a new store's files, so that no two processes write one.

        A sixteenth of a share or less: so another number of processes finds even shares, too.
        """
        shares = self.shares(num_chains)
        most = max(1, (shares[0].stop - shares[0].start) // 16)
        return max(n for n in range(1, most + 1) if all(share.stop % n == 0 for share in shares))

    def check(self) -> None:
        """Stop where another process has.

        Raises:
            ProcessError: One has.
        """

    def meet(self, value: T) -> list[T]:
        """Wait for all processes.

        Args:
            value: Small: it goes through the memory of one process.

        Returns:
            The values of all, by rank.

        Raises:
            ProcessError: One has stopped.
        """
        return [value]

    def gather(self, value: T) -> list[T]:
        """Like `meet`, for large values, whose tensors are on the CPU."""
        return [value]

    def level(self, step: int) -> int:
        """Agree on the step at which all stop, when one of them is interrupted.

        Args:
            step: The next step that this process would make.

        Returns:
            The next step of the process that is furthest.

        Raises:
            ProcessError: The others do not answer.
        """
        return step

    def lead(self, work: Callable[[], object]) -> None:
        """Let the first process do something before the others go on."""
        if self.rank == 0:
            work()
        self.meet(None)

    def check_agreement(self, named: dict[str, str]) -> None:
        """Refuse processes that would make different runs.

        Args:
            named: Digests of what all must have in common, by name.

        Raises:
            ValueError: Something differs; the message names it.
        """
        for rank, other in enumerate(all_named := self.meet(named)):
            first = all_named[0]
            names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            if names:
                raise ValueError(
                    f"all processes must make the same run, but rank {rank} differs from rank 0 in "
                    f"{', '.join(names)}"
                )


class ProcessError(RuntimeError):
    """Another process of the run has stopped."""


class InterruptedProcessError(ProcessError):
    """Another process of the run is interrupted, by Ctrl-C or SIGTERM."""


class Ranks(Processes):
    """The ranks of a process group.

    Args:
        group: It.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        call = next(_calls[group.group_name])
        store: Any = group.get_group_store()
        # torch's type stubs lack the class, and methods of stores: hence the annotation.
        self._store: Any
        self._store = dist.PrefixStore(f"funcsgmcmc/{call}", store)  # type: ignore[attr-defined]
        self._watch = _Watch(self._store, self.rank, self.size)
        self._meetings = 0
        self._watch.start()

    def check(self) -> None:
        """See `Processes.check`: reads what the thread has found, and asks nobody."""
        fault = self._watch.fault
        if fault is not None:
            raise (
                InterruptedProcessError(fault)
                if fault.endswith(_INTERRUPTED)
                else ProcessError(fault)
            )

    def meet(self, value: T) -> list[T]:
        """See `Processes.meet`."""
        number, store = self._meetings, self._store
        self._meetings += 1
        store.set(f"{number}/{self.rank}", pickle.dumps(value))
        if self.rank == 0:
            keys = [f"{number}/{rank}" for rank in range(self.size)]
            self._wait_for(keys)
            values = pickle.dumps([store.get(key) for key in keys])
            store.set(f"{number}/all", values)
            # All have come here, and so have read the answer before.
            for key in (*keys, f"{number - 1}/all"):
                store.delete_key(key)
        else:
            self._wait_for([f"{number}/all"])
            values = store.get(f"{number}/all")
        return [pickle.loads(each) for each in pickle.loads(values)]

    def gather(self, value: T) -> list[T]:
        """See `Processes.gather`."""
        self.meet(None)  # nobody is missing, as far as is known
        ranks = dist.get_process_group_ranks(self._group)
        host = self._group
        if "gloo" not in dist.get_backend_config(self._group):
            host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=host)
        except RuntimeError as error:
            self._watch.wait()
            raise ProcessError(self._watch.fault or str(error)) from error
        return values

    def level(self, step: int) -> int:
        """See `Processes.level`."""
        self._watch.accept(f"rank {self.rank} {_INTERRUPTED}")
        self._store.set(f"level/{self.rank}", pickle.dumps((step, self._meetings)))
        keys = [f"level/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + _SECONDS_TO_LEVEL
        while not self._asked(keys):
            self.check()
            if time.monotonic() > deadline:
                raise ProcessError(f"not all ranks stopped within {_SECONDS_TO_LEVEL:.0f} s")
            time.sleep(0.01)
        steps, meetings = zip(*(pickle.loads(self._store.get(key)) for key in keys), strict=True)
        # Some may have waited in a meeting to which others do not come any more.
        self._meetings = max(meetings) + 1
        return int(max(steps))

    def stop(self, error: BaseException | None) -> None:
        """Leave the run: tell the others why, or wait until they have read the last answer."""
        # The store may be what failed.
        with contextlib.suppress(RuntimeError):
            if error is not None and self._watch.fault is None:
                reason = str(error) or type(error).__name__
                # Its first line: a traceback would be another process's.
                self._watch.post(f"rank {self.rank} stopped: {reason.splitlines()[0]}")
            self._leave(_LONGEST_SILENCE if error is None else _SECONDS_TO_READ)
        self._watch.end()

    def _leave(self, seconds: float) -> None:
        """Leave; the process with the store does so last, if it need not wait longer than that."""
        self._store.add("left", 1)
        deadline = time.monotonic() + seconds
        while self.rank == 0 and time.monotonic() < deadline:
            if self._store.add("left", 0) >= self.size:
                return
            time.sleep(1e-3)

    def _wait_for(self, keys: list[str]) -> None:
        """Wait until all keys are there, as long as their processes live.

        Raises:
            ProcessError: One does not, or has not come.
        """
        pause, deadline = 1e-4, time.monotonic() + self._store.timeout.total_seconds()
        while not self._asked(keys):
            self.check()
            if time.monotonic() > deadline and (missing := self._watch.missing()):
                raise ProcessError(
                    f"ranks {missing} have not called sample within the process group's timeout of "
                    f"{self._store.timeout}: all ranks of the group, or of mesh, must"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _asked(self, keys: list[str]) -> bool:
        """Whether the store has some keys.

        Raises:
            ProcessError: There is no store any more.
        """
        try:
            return bool(self._store.check(keys))
        except RuntimeError as error:
            raise ProcessError(_unreachable(error)) from error


class _Watch(threading.Thread):
    """Says that this process lives, and sees whether others do.

    Attributes:
        fault: The first thing that went wrong, if anything did.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(name="funcsgmcmc-watch", daemon=True)
        self.fault: str | None = None
        # A connection of its own: the other may wait in it.
        self._store, self._rank, self._size = store.clone(), rank, size
        self._is_interrupted = False
        self._silence = min(_LONGEST_SILENCE, store.timeout.total_seconds())
        self._is_ended = threading.Event()

    def run(self) -> None:
        """Beat and look, until the run ends."""
        neighbour = (self._rank + 1) % self._size
        beats, seen, seen_at = 0, b"", time.monotonic()
        while not self._is_ended.wait(_SECONDS_BETWEEN_BEATS if beats else 0):
            beats += 1
            try:
                self._store.set(f"alive/{self._rank}", str(beats))
                if self._store.check(["fault"]):
                    fault = self._store.get("fault").decode()
                    if not (self._is_interrupted and fault.endswith(_INTERRUPTED)):
                        self.fault = fault
                        continue  # the others see this one alive, until it has stopped
                if self._store.check([f"alive/{neighbour}"]):
                    beat = self._store.get(f"alive/{neighbour}")
                    seen_at = time.monotonic() if beat != seen else seen_at
                    seen = beat
            except RuntimeError as error:
                self.fault = _unreachable(error)
                return
            if seen and time.monotonic() - seen_at > self._silence:
                self.post(
                    f"rank {neighbour} has not been heard of for {self._silence:.0f} s: its "
                    "process has ended, or hangs"
                )

    def post(self, fault: str) -> None:
        """Tell all processes what went wrong."""
        self._store.set("fault", fault)

    def accept(self, interrupt: str) -> None:
        """Tell that this process is interrupted, and go on looking for other faults."""
        self._is_interrupted = True
        if self.fault is None:
            self.post(interrupt)
        self.fault = None

    def missing(self) -> list[int]:
        """Ranks that were never heard of."""
        return [rank for rank in range(self._size) if not self._store.check([f"alive/{rank}"])]

    def wait(self) -> None:
        """Wait for a fault to be found, as long as it takes to find one that ended."""
        deadline = time.monotonic() + self._silence + 4 * _SECONDS_BETWEEN_BEATS
        while self.fault is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def end(self) -> None:
        """Stop looking."""
        self._is_ended.set()
        self.join()


def _unreachable(error: RuntimeError) -> str:
    return (
        "the store of the process group cannot be reached, which rank 0 holds, or torchrun beside "
        f"it: that process has ended, or the network has failed ({error})".splitlines()[0]
    )


@contextlib.contextmanager
def processes_of(mesh: DeviceMesh | None) -> Iterator[Processes]:
    """The processes that make a run together.

    What one raises is reported to the others when the context ends. Warnings are the first one's.

    Args:
        mesh: A mesh of one dimension. None for all ranks, where a process group is initialized.

    Raises:
        TypeError, ValueError: It is no mesh of one dimension.
    """
    group = _group_of(mesh)
    if group is None:
        yield Processes()
        return
    ranks = Ranks(group)
    raised: BaseException | None = None
    try:
        with contextlib.nullcontext() if ranks.rank == 0 else _quiet():
            yield ranks
    except BaseException as error:
        raised = error
        raise
    finally:
        ranks.stop(raised)


def _group_of(mesh: DeviceMesh | None) -> "dist.ProcessGroup | None":
    """The process group over whose ranks chains are spread; None for one process."""
    is_initialized = dist.is_available() and dist.is_initialized()
    if mesh is None:
        group = dist.group.WORLD if is_initialized else None
    else:
        checks.instance("mesh", mesh, DeviceMesh)
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh must have one dimension, over which chains are spread, got {mesh}: pass one "
                "of its dimensions, mesh['chains']"
            )
        group = mesh.get_group()
    return None if group is None or group.size() == 1 else group


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing that the first process says already."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.addFilter(nothing)
        try:
            yield
        finally:
            logger.removeFilter(nothing)
