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

from funcsgmcmc import tree
from funcsgmcmc.components import RestrictedFunction
from funcsgmcmc.losses import ModuleLoss
from funcsgmcmc.runs.attributes import attributes_of, constants_of, moments_of
from funcsgmcmc.runs.checkpoint import Place, Timetable, check_same_run, major_version
from funcsgmcmc.runs.clock import Clock
from funcsgmcmc.runs.data import Batches
from funcsgmcmc.runs.disk import DiskStore
from funcsgmcmc.runs.encoding import decode, digest, digests, encode
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.request import ChainMethod, Request
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
        self._fingerprint: dict[str, str] = {}
        self.path: Path = place.path
        self.progress = place.progress

    def check(self, request: Request, start: Start, batches: Batches) -> None:
        """Refuse to resume a run that is another, or whose data cannot be read again.

        Raises:
            ValueError: A setting, the parameters or the data differ; or the data has no order that
                another process could find again.
        """
        if self._resume and (reason := batches.why_not_resumed()):
            raise ValueError(f"resume=True must be left out for this data: {reason}")
        self._fingerprint = _fingerprint(request, start, batches)
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
        """L(w₀), as the run knew it before."""
        return None if self._place.settings is None else self._place.settings["initial_loss"]

    def make_store(self, clock: Clock, start: Start, every: int) -> DiskStore:
        """Make the store of the record, or take up that of the checkpoint.

        Args:
            clock: The run's.
            start: The run's.
            every: Of so many draws, the last is evaluated on all data.
        """
        chains = start.keys.chains.cpu()
        num_draws = len(clock.draw_steps)
        full_draws = torch.arange(every - 1, num_draws, every)
        DiskStore.sweep(self.path)
        self.store = DiskStore(
            self.path,
            {
                "chain": len(chains),
                "step": clock.num_steps,
                "draw": num_draws,
                "full_draw": len(full_draws),
            },
            {
                "chain": chains,
                "step": clock.first_step + torch.arange(clock.num_steps),
                "draw": torch.arange(num_draws),
                "full_draw": full_draws,
            },
            clock.draw_steps - clock.first_step,
        )
        if self.progress is None:
            self.store.clear()
        else:
            self.store.restore(self.progress["record"], start.keys.chains.device)
            self.store.resize()
        return self.store

    def burnin(self) -> tuple[int, bool] | None:
        """The length of a burn-in that has ended by itself, and whether it settled."""
        settings = self._place.settings
        if settings is None or settings["is_open"]:
            return None
        return settings["num_burnin_steps"], settings["options"]["burnin_settled"]

    def begin(self, run: "Run") -> None:
        """Write what does not change, and a first checkpoint."""
        self._write_settings(run)
        self.write(run)
        self.store.set_attributes(attributes_of(self.samples()))
        self._write_constants(run)

    def draws_begin(self, run: "Run") -> None:
        """Write which steps make draws, where burn-in has told it.

        A checkpoint may be older: the run that is resumed from it makes the same draws.
        """
        self.store.place_draws(run.clock.draw_steps - run.clock.first_step)
        self._write_settings(run)
        self._write_constants(run)

    def _write_constants(self, run: "Run") -> None:
        clock, number = run.clock, run.request.num_chains
        constants = constants_of(run.sampler, clock.draw_steps, number, run.initial_loss)
        self.store.write_variables("constant_data", constants)

    def _write_settings(self, run: "Run") -> None:
        self._place.begin(
            {
                "fingerprint": self._fingerprint,
                "sampler": encode("the sampler", run.sampler),
                "key": run.keys.key.cpu(),
                "chains": run.keys.chains.cpu(),
                "initial_loss": run.initial_loss,
                "first_step": run.clock.first_step,
                "draw_steps": run.clock.draw_steps,
                "num_burnin_steps": run.clock.num_burnin_steps,
                "is_open": run.clock.is_open,
                "num_steps_between_draws": run.request.num_steps_between_draws,
                "chain_method": run.chain_method,
                "chunk_size": run.chunk_size,
                "full_data": None if run.full_data is None else run.full_data.settings(),
                "options": run.options(),
            }
        )

    def step_done(self, run: "Run") -> None:
        """Write a checkpoint, if one is due."""
        if self._timetable.is_due():
            self.write(run)

    def write(self, run: "Run", *, is_written: bool = False) -> None:
        """Write a checkpoint; `is_written` as for `DiskStore.plain`."""
        with self._timetable.timed():
            record = self.store.plain(is_written=is_written)
            self._place.write({**run.progress(), "record": record})

    def end(self, run: "Run") -> None:
        """Write all that waits, and the last checkpoint; and cut the file to what was made."""
        self.store.write_waiting()
        # What some chains recorded of a step that others have not made is cut off the file.
        self.write(run, is_written=run.is_level)
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


def _fingerprint(request: Request, start: Start, batches: Batches) -> dict[str, str]:
    """Digests of all that makes a run the one that it is, by name."""
    loss = request.estimator.loss_fn
    named: dict[str, Any] = {
        "the library's version": major_version(),
        "loss_fn": getattr(loss, "__qualname__", type(loss).__qualname__),
        "the gradient's estimator": type(request.estimator).__name__,
        "log_prior": request.log_prior is not None,
        "observables": sorted(request.observables),
        "record": sorted(request.record),
        "full_loss": request.full_loss,
        **{
            name: getattr(request, name)
            for name in (
                "num_chains",
                "num_burnin_steps",
                "num_steps_between_draws",
                "batch_size",
                "minibatches",
                "chain_offset",
                "chain_method",
                "chunk_size",
                "compile",
                "on_divergence",
                "max_loss",
                "max_distance",
            )
        },
    }
    if isinstance(loss, ModuleLoss | RestrictedFunction):
        named |= loss.fixed({tree.dotted(name) for name in tree.names(start.state.params)})
    return {
        **{name: digest(value) for name, value in named.items()},
        "key": digest(request.key),
        **digests("sampler", start.sampler),
        **digests("params", start.state),
        **batches.digests(),
    }


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
