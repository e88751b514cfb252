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
import signal
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from funcsgmcmc import checks, shards
from funcsgmcmc.runs.progress import logger

T = TypeVar("T")

_SECONDS_BETWEEN_BEATS = 0.5
# Less than the default timeouts of process groups: a step that holds Python's lock may be silent.
_LONGEST_SILENCE = 60.0
# How long a process that holds the store waits for the others to read why it has stopped.
_SECONDS_TO_READ = 5.0
# How long an interrupted process waits for the others: clusters kill 30 s after SIGTERM.
_SECONDS_TO_LEVEL = 20.0
# Units of a process's share of the chains, of a run of one process and of several. Each is a file
# of every block, which takes a millisecond: one process has fewer.
_PARTS = 8, 16
_INTERRUPTED = "was interrupted"
# Calls of a process group, which all its processes make in one order: keys of a call are its own.
_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class Processes:
    """The processes of a run; this one, which runs all chains alone.

    Attributes:
        rank: Which one this is.
        size: How many there are.
        shards: How many have the same chains, and a part of their parameters each.
    """

    rank = 0
    size = 1
    shards = 1
    _row = 0

    @property
    def num_shares(self) -> int:
        """Into how many shares the chains are divided."""
        return self.size // self.shards

    def share(self, num_chains: int, unit: int = 1) -> slice:
        """The chains of this process; shares differ by one unit at most.

        Args:
            num_chains: C, of all processes.
            unit: Chains that stay together.

        Raises:
            ValueError: A share would have no chain.
        """
        return self.shares(num_chains, unit)[self._row]

    def shares(self, num_chains: int, unit: int = 1) -> list[slice]:
        """The chains of each share; arguments and errors as for `share`."""
        units, number = -(-num_chains // unit), self.num_shares
        if units < number:
            together = "" if unit == 1 else f" in units of {unit}, which the store holds together,"
            owners = "processes" if self.shards == 1 else "rows of the mesh"
            raise ValueError(
                f"num_chains must be at least one{together} for each of {number} {owners}, got "
                f"{num_chains}"
            )
        each, more = divmod(units, number)
        stops = [unit * (each * row + min(row, more)) for row in range(1, number + 1)]
        stops[-1] = num_chains
        return [slice(*ends) for ends in itertools.pairwise([0, *stops])]

    def unit(self, num_chains: int) -> int:
        """Chains of a new store's files, so that no two processes write one.

        A part of a share: so another number of processes finds even shares, too.
        """
        shares = self.shares(num_chains)
        most = max(1, (shares[0].stop - shares[0].start) // _PARTS[self.size > 1])
        inner = [share.start for share in shares]
        return max(n for n in range(1, most + 1) if all(start % n == 0 for start in inner))

    def check(self) -> None:
        """Stop where another process has.

        Raises:
            ProcessError: One has.
        """

    def check_step(self, is_interrupted: bool) -> None:
        """The same before a step, alike on all processes that make it together.

        Args:
            is_interrupted: Whether an interrupt of this process is held back.

        Raises:
            ProcessError: Another process has stopped.
            KeyboardInterrupt: One that has the same chains is interrupted.
        """
        self.check()

    def interrupts_held_back(self) -> AbstractContextManager[Callable[[], bool]]:
        """Let Ctrl-C wait for the end of a step that other processes make with this one.

        Returns:
            Tells whether one waits. A second one does not wait.
        """
        return contextlib.nullcontext(lambda: False)

    def cause(self, error: Exception) -> Exception:
        """What made an error happen: another process that has stopped, or the error itself."""
        return error

    def one_a_share(self, values: list[T]) -> list[T]:
        """Of the values of all processes, one for each share of the chains."""
        return values[:: self.shards]

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
        """Like `meet`, for large values, whose tensors are on the CPU: one for each share.

        Of processes with the same chains, they come from those that have the same parts.
        """
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
        groups: It, and its parts.
    """

    def __init__(self, groups: "_Groups") -> None:
        group, self._peers, self._partners, self._device = groups
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self._partners is not None:
            self.shards = self._partners.size()
        self._row = self.rank // self.shards
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

    def check_step(self, is_interrupted: bool) -> None:
        """See `Processes.check_step`: asks those that have the same chains, if there are any."""
        if self.shards > 1:
            found = torch.tensor([self._watch.fault is not None, is_interrupted])
            found = found.int().to(self._device)
            dist.all_reduce(found, dist.ReduceOp.MAX, self._partners)
            is_stopped, is_interrupted = map(bool, found.tolist())
            if is_stopped:
                self._watch.wait()  # another one's thread has found it first
            elif is_interrupted:
                raise KeyboardInterrupt
        self.check()

    @contextlib.contextmanager
    def interrupts_held_back(self) -> Iterator[Callable[[], bool]]:
        """See `Processes.interrupts_held_back`."""
        is_main = threading.current_thread() is threading.main_thread()
        if self.shards == 1 or not is_main:
            yield lambda: False
            return
        is_waiting = False

        def hold(number: int, frame: FrameType | None) -> None:
            nonlocal is_waiting
            if is_waiting:
                raise KeyboardInterrupt
            is_waiting = True

        before = signal.signal(signal.SIGINT, hold)
        try:
            yield lambda: is_waiting
        finally:
            signal.signal(signal.SIGINT, before)

    def cause(self, error: Exception) -> Exception:
        """See `Processes.cause`: what a process waits for in a step fails when another stops."""
        if self.shards == 1:
            return error
        if _is_of_an_exchange(error):
            self._watch.wait()  # the connection fails before the silence is noticed
        fault = self._watch.fault
        return error if fault is None else ProcessError(fault)

    def meet(self, value: T) -> list[T]:
        """See `Processes.meet`."""
        number, store = self._meetings, self._store
        self._meetings += 1
        with _reaching_the_store():
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
        if self.num_shares == 1:
            return [value]
        ranks = dist.get_process_group_ranks(self._peers)
        host = self._peers
        if "gloo" not in dist.get_backend_config(self._peers):
            host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        values: list[Any] = [None] * self.num_shares
        try:
            dist.all_gather_object(values, value, group=host)
        except RuntimeError as error:
            self._watch.wait()
            raise ProcessError(self._watch.fault or str(error)) from error
        return values

    def level(self, step: int) -> int:
        """See `Processes.level`."""
        keys = [f"level/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + _SECONDS_TO_LEVEL
        with _reaching_the_store():
            self._watch.accept(f"rank {self.rank} {_INTERRUPTED}")
            self._store.set(keys[self.rank], pickle.dumps((step, self._meetings)))
            while not self._store.check(keys):
                self.check()
                if time.monotonic() > deadline:
                    raise ProcessError(f"not all ranks stopped within {_SECONDS_TO_LEVEL:.0f} s")
                time.sleep(0.01)
            found = [pickle.loads(self._store.get(key)) for key in keys]
        steps, meetings = zip(*found, strict=True)
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
        while not self._store.check(keys):
            self.check()
            if time.monotonic() > deadline and (missing := self._watch.missing()):
                raise ProcessError(
                    f"ranks {missing} have not called sample within the process group's timeout of "
                    f"{self._store.timeout}: all ranks of the group, or of mesh, must"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


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


@contextlib.contextmanager
def _reaching_the_store() -> Iterator[None]:
    """Say what it means that the store of the process group fails.

    Raises:
        ProcessError: It does.
    """
    try:
        yield
    except ProcessError:
        raise
    except RuntimeError as error:
        raise ProcessError(_unreachable(error)) from error


def _is_of_an_exchange(error: Exception) -> bool:
    """Whether an error is that of an exchange between processes; gloo has no kind of its own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _unreachable(error: RuntimeError) -> str:
    return (
        "the store of the process group cannot be reached, which rank 0 holds, or torchrun beside "
        f"it: that process has ended, or the network has failed ({error})".splitlines()[0]
    )


@contextlib.contextmanager
def processes_of(mesh: DeviceMesh | None, parts: DeviceMesh | None = None) -> Iterator[Processes]:
    """The processes that make a run together.

    What one raises is reported to the others when the context ends. Warnings are the first one's.

    Args:
        mesh: A mesh of one dimension, or of chains and shards. None for all ranks, where a process
            group is initialized.
        parts: The mesh over which parameters are sharded; None if they are whole.

    Raises:
        TypeError, ValueError: It is no such mesh.
    """
    groups = _groups_of(mesh) if parts is None else _groups_of_shards(mesh, parts)
    if groups is None:
        yield Processes()
        return
    ranks = Ranks(groups)
    raised: BaseException | None = None
    try:
        with contextlib.nullcontext() if ranks.rank == 0 else _quiet():
            yield ranks
    except BaseException as error:
        raised = error
        raise
    finally:
        ranks.stop(raised)


class _Groups(NamedTuple):
    """The processes of a run, as process groups.

    Attributes:
        everyone: All of them.
        peers: Those that have other chains, and the same part of their parameters.
        partners: Those that have the same chains; None where parameters are whole.
        device: Where partners exchange.
    """

    everyone: "dist.ProcessGroup"
    peers: "dist.ProcessGroup"
    partners: "dist.ProcessGroup | None" = None
    device: str = "cpu"


def _groups_of_shards(mesh: DeviceMesh | None, parts: DeviceMesh) -> _Groups | None:
    """The processes of a run whose parameters are sharded; None for one process."""
    world = dist.group.WORLD
    assert world is not None  # a mesh has initialized it
    everyone, peers, partners = world, world, world
    row = list(range(world.size()))
    if mesh is not None:
        checks.instance("mesh", mesh, DeviceMesh)
        if mesh.ndim > 1:
            if mesh.ndim > 2 or mesh.mesh.flatten().tolist() != row:
                raise ValueError(
                    f"mesh must have all of {world.size()} ranks in their order, as "
                    f"init_device_mesh makes one of chains and shards, got {mesh}"
                )
            peers, partners = mesh.get_all_groups()
            row = dist.get_process_group_ranks(partners)
        else:
            everyone = partners = mesh.get_group()
            row = shards.ranks_of(mesh)
    if row != shards.ranks_of(parts):
        raise ValueError(
            "mesh must be that of the shards, or have two dimensions, over which chains are "
            f"divided and parameters sharded: these are sharded over ranks {shards.ranks_of(parts)}"
            f", got {mesh}"
        )
    if everyone.size() == 1:
        return None
    return _Groups(everyone, peers, partners, parts.device_type)


def _groups_of(mesh: DeviceMesh | None) -> _Groups | None:
    """The processes over which chains are spread; None for one process."""
    is_initialized = dist.is_available() and dist.is_initialized()
    if mesh is None:
        group = dist.group.WORLD if is_initialized else None
    else:
        checks.instance("mesh", mesh, DeviceMesh)
        if mesh.ndim != 1:
            raise ValueError(
                "mesh must have one dimension, over which chains are spread, where parameters are "
                f"whole, got {mesh}: pass one of its dimensions, mesh['chains']"
            )
        group = mesh.get_group()
    return None if group is None or group.size() == 1 else _Groups(group, group)


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
