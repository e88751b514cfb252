"""The keeping of a run on disk: what it writes, when, and how it is found again."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcsgmcmc.runs.attributes import attributes_of, constants_of, moments_of
from funcsgmcmc.runs.checkpoint import Place, Timetable, check_same_run
from funcsgmcmc.runs.clock import Clock
from funcsgmcmc.runs.data import Batches
from funcsgmcmc.runs.disk import DiskStore, Region
from funcsgmcmc.runs.encoding import decode, encode
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.request import ChainMethod
from funcsgmcmc.runs.shares import joined_losses, whole_sampler
from funcsgmcmc.runs.start import Start
from funcsgmcmc.runs.stored import open_run

if TYPE_CHECKING:
    from funcsgmcmc.runs.run import Run


class Keeper:
    """Keeps a run in its folder.

    Args:
        place: The folder, which this process holds.
        timetable: When checkpoints are due.
        resume: Whether to go on with the run in the folder.

    Attributes:
        path: The folder.
        progress: The checkpoint to go on from; None for a run that begins.
    """

    store: DiskStore

    def __init__(self, place: Place, timetable: Timetable, resume: bool) -> None:
        self._place, self._timetable, self._resume = place, timetable, resume
        self._processes = place.processes
        self._fingerprint: dict[str, str] = {}
        self._rows = slice(0, 0)
        # The step at which processes meet for the next checkpoint.
        self._next_step = 0
        self.path: Path = place.path
        self.progress: dict[str, Any] | None = None

    def unit(self, num_chains: int) -> int:
        """Chains that the store holds together, so that one process has them."""
        if self._place.settings is None:
            return self._processes.unit(num_chains)
        unit: int = self._place.settings["unit"]
        return unit

    def load(self, rows: slice) -> None:
        """Read the checkpoint of this process's chains, if there is one."""
        self._rows = rows
        self.progress = self._place.load(rows)

    def check(self, fingerprint: dict[str, str], batches: Batches) -> None:
        """Refuse to resume a run that is another, or whose data cannot be read again.

        Raises:
            ValueError: A setting, the parameters or the data differ; or the data has no order that
                another process could find again.
        """
        if self._resume and (reason := batches.why_not_resumed()):
            raise ValueError(f"resume=True must be left out for this data: {reason}")
        self._fingerprint = fingerprint
        if self._place.settings is not None and self.progress is not None:
            check_same_run(self.path, self._place.settings["fingerprint"], self._fingerprint)

    def is_complete(self, num_steps: int) -> bool:
        """Whether the run in the folder has made all steps."""
        return self.progress is not None and self.progress["num_steps"] >= num_steps

    def resumed(self, start: Start) -> Start:
        """The chains of the checkpoint, in place of those at their start."""
        if self.progress is None:
            return start
        device = start.keys.chains.device
        return Start(
            start.sampler,
            decode(self.progress["state"], device),
            start.keys,
            start.first_step,
            self.progress["frozen_at"].to(device),
            start.lent,
        )

    @property
    def is_resumed(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.progress is not None

    def method(self) -> ChainMethod:
        """How the chains of a resumed run were run before."""
        assert self._place.settings is not None
        method: ChainMethod = self._place.settings["chain_method"]
        return method

    def full_data(self) -> dict[str, Any] | None:
        """How a resumed run looked at all data before: `FullData.settings`; None if it did not."""
        assert self._place.settings is not None
        settings: dict[str, Any] | None = self._place.settings["full_data"]
        return settings

    def is_compiled(self) -> bool:
        """Whether the steps of a resumed run were compiled before, of which rounding depends."""
        assert self._place.settings is not None
        compiled: bool = self._place.settings["is_compiled"]
        return compiled

    def chunk_size(self) -> int | None:
        """How many chains stepped at once before, of which rounding depends; None at the start."""
        return None if self._place.settings is None else self._place.settings["chunk_size"]

    def position(self) -> dict[str, Any] | None:
        """Where the run was in the data; None for a run that begins."""
        position: dict[str, Any] | None = None
        if self.progress is not None:
            position = decode(self.progress["data"])
        return position

    @property
    def initial_loss(self) -> Tensor | None:
        """L(w₀) of this process's chains, as the run knew it before."""
        loss: Tensor | None = None
        if self._place.settings is not None:
            loss = self._place.settings["initial_loss"]
        return loss if loss is None or not loss.shape else loss[self._rows]

    def make_store(self, clock: Clock, start: Start, every: int) -> DiskStore:
        """Make the store of the record, or take up that of the checkpoint.

        Args:
            clock: The run's.
            start: The run's.
            every: Of so many draws, the last is evaluated on all data.
        """
        num_draws = len(clock.draw_steps)
        full_draws = torch.arange(every - 1, num_draws, every)
        chains = torch.cat(self._processes.gather(start.keys.chains.cpu()))
        coordinates = {
            "chain": chains,
            "step": clock.first_step + torch.arange(clock.num_steps),
            "draw": torch.arange(num_draws),
            "full_draw": full_draws,
        }
        self._processes.lead(lambda: DiskStore.tidy(self.path, is_new=self.progress is None))
        self.store = DiskStore(
            self.path,
            {name: len(values) for name, values in coordinates.items()},
            coordinates,
            clock.draw_steps - clock.first_step,
            Region(self._rows, self.unit(len(chains)), self._processes),
        )
        if self.progress is not None:
            record = self.progress["record"]
            self._processes.lead(lambda: self.store.resize(record))
            self.store.restore(record, start.keys.chains.device)
        return self.store

    def burnin(self) -> tuple[int, bool] | None:
        """The length of a burn-in that has ended by itself, and whether it settled."""
        settings = self._place.settings
        if settings is None or settings["is_open"]:
            return None
        return settings["num_burnin_steps"], settings["options"]["burnin_settled"]

    def begin(self, run: "Run") -> None:
        """Write what does not change, and a first checkpoint."""
        settings = self._settings(run)
        self._begin(settings)
        self.write(run)
        self._processes.lead(lambda: self._describe(settings))

    def draws_begin(self, run: "Run") -> None:
        """Write which steps make draws, where burn-in has told it.

        A checkpoint may be older: the run that is resumed from it makes the same draws.
        """
        self.store.place_draws(run.clock.draw_steps - run.clock.first_step)
        settings = self._settings(run)
        self._begin(settings)
        self._processes.lead(lambda: self._describe(settings))

    def _begin(self, settings: dict[str, Any]) -> None:
        if self._processes.rank == 0:
            self._place.begin(settings)

    def _settings(self, run: "Run") -> dict[str, Any]:
        """What does not change in a run, of all chains."""
        sampler = whole_sampler(self._processes, run.sampler)
        of_all = self._processes.gather((run.keys.chains.cpu(), run.initial_loss))
        chains, losses = zip(*of_all, strict=True)
        return {
            "fingerprint": self._fingerprint,
            "sampler": encode("the sampler", sampler),
            "key": run.keys.key.cpu(),
            "chains": torch.cat(chains),
            "initial_loss": joined_losses(losses),
            "first_step": run.clock.first_step,
            "draw_steps": run.clock.draw_steps,
            "num_burnin_steps": run.clock.num_burnin_steps,
            "is_open": run.clock.is_open,
            "num_steps_between_draws": run.request.num_steps_between_draws,
            "chain_method": run.chain_method,
            "chunk_size": run.chunk_size,
            "is_compiled": run.stepper.is_compiled,
            "unit": self.store.unit,
            "full_data": None if run.full_data is None else run.full_data.settings(),
            "options": run.options(),
        }

    def _describe(self, settings: dict[str, Any]) -> None:
        """Write into the file what estimates take beside the draws."""
        samples = self.samples()
        self.store.set_attributes(attributes_of(samples))
        constants = constants_of(
            samples.sampler, settings["draw_steps"], samples.num_chains, samples.initial_loss
        )
        self.store.write_variables("constant_data", constants)

    def steps_done(self, run: "Run") -> None:
        """Write a checkpoint, if one is due."""
        if self._processes.size == 1:
            is_due = self._timetable.is_due()
        else:
            # Steps that are made at once may pass it.
            is_due = run.clock.next_step >= self._next_step
        if is_due:
            self.write(run)

    def write(self, run: "Run", *, is_written: bool = False) -> None:
        """Write a checkpoint, of all processes at one step; `is_written` as for `DiskStore.plain`.

        Raises:
            ProcessError: Another process has stopped: the checkpoint before stays.
        """
        with self._timetable.timed(run.clock.steps_done):
            record = self.store.plain(is_written=is_written)
            self._place.write(self._rows, {**run.progress(), "record": record})
        # Processes that are at one step now agree on the step at which they are again.
        steps = self._processes.meet(self._timetable.steps_until_due())[0]
        self._next_step = run.clock.next_step + steps

    def end(self, run: "Run") -> None:
        """Write all that waits, and the last checkpoint; and cut the file to what was made."""
        self.store.write_waiting()
        # What some chains recorded of a step that others have not made is cut off the file.
        self.write(run, is_written=run.is_level)
        self._processes.lead(lambda: self._finish(run))

    def _finish(self, run: "Run") -> None:
        self.store.trim(run.clock.steps_done, run.clock.draws_done, run.num_looks)
        samples = self.samples()
        self.store.set_attributes(attributes_of(samples))
        frozen_at = {"frozen_at": (("chain",), samples.frozen_at)}
        self.store.write_variables("constant_data", frozen_at)
        if moments := moments_of(samples):
            self.store.write_variables("moments", moments)
        self.store.consolidate()

    def samples(self) -> Samples:
        """The record as it was at the last checkpoint."""
        return open_run(self.path)


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which schedulers of clusters announce the end, stop a run as Ctrl-C does.

    When the run has written its checkpoint, the signal takes its course.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    received = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            signal.raise_signal(signal.SIGTERM)
