"""Runs that survive their process: a record on disk, and the state to go on from.

    run.zarr/             the record, as ArviZ reads it (see `runs/disk.py`)
    run.zarr/checkpoint/  an array of zarr, the number of steps in the last checkpoint; beside it
        settings.pt       what does not change: the sampler with its anchor, keys, fingerprint
        progress.pt       states, clock, position in the data, values that wait for their block
        lock              held by the process that runs, the first of many

A checkpoint is written to a new file, which then takes the old one's name. All files hold tensors
and plain values, and are read with `weights_only=True`.

Of a run of many processes, each one writes a part, of its chains, and `progress.pt` names the
parts. It is written when all parts of a step are there. Parts name their chains, so that any number
of processes reads what it needs of them.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from funcsgmcmc.runs.disk import open_group, write_array
from funcsgmcmc.runs.encoding import rows_of
from funcsgmcmc.runs.processes import Processes

# Of a run's time, at most this share goes to checkpoints.
_SHARE = 0.02
_SECONDS_AT_LEAST = 1.0
# Between checkpoints of many processes, at most so many times the steps as between the last two.
_FASTER = 4


class Place:
    """The folder of a run, held by this process.

    Args:
        path: The folder.
        processes: Those that hold it together.

    Attributes:
        settings: What does not change; None if the folder has no checkpoint.
    """

    def __init__(self, path: Path, processes: Processes | None = None) -> None:
        self.path = path
        self.processes = Processes() if processes is None else processes
        self._folder = path / "checkpoint"
        self.settings: dict[str, Any] | None = None
        if self.has_checkpoint:
            self.settings = self._load("settings.pt")

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run has made a checkpoint in the folder."""
        return has_checkpoint(self.path)

    def load(self, rows: slice | None = None) -> dict[str, Any] | None:
        """The last checkpoint of some chains; None if there is none.

        Args:
            rows: Their places among the run's chains; None for all.
        """
        if self.settings is None:
            return None
        num_chains = len(self.settings["chains"])
        rows = slice(0, num_chains) if rows is None else rows
        while True:
            progress = self._load("progress.pt")
            names = progress.get("parts", {None: [0, num_chains]})
            cuts = {name: _cut(rows, *ends) for name, ends in names.items()}
            # Parts that vanish were those of an older checkpoint, while a newer one was made.
            with contextlib.suppress(FileNotFoundError):
                return of_chains(
                    [
                        (progress if name is None else self._load(name), cut)
                        for name, cut in cuts.items()
                        if cut is not None
                    ]
                )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write what does not change."""
        self.settings = dict(settings)
        self._save("settings.pt", self.settings)

    def write(self, rows: slice, progress: Mapping[str, Any]) -> None:
        """Write a checkpoint: it is the old one or the new one, whenever the process ends.

        Args:
            rows: This process's chains.
            progress: Theirs.
        """
        number = progress["num_steps"]
        if self.processes.size == 1:
            self._commit(dict(progress), number)
            return
        name = f"progress-{number}-{rows.start}-{rows.stop}.pt"
        self._save(name, dict(progress))
        parts = dict(self.processes.meet((name, [rows.start, rows.stop])))
        if self.processes.rank == 0:
            self._commit({"num_steps": number, "parts": parts}, number, parts)

    def _commit(
        self, progress: dict[str, Any], num_steps: int, parts: Collection[str] = ()
    ) -> None:
        """Let a checkpoint take the place of the one before."""
        self._save("progress.pt", progress)
        root = open_group(self.path, mode="a")
        write_array(root, "checkpoint", torch.tensor(num_steps), ())
        for file in self._folder.glob("progress-*"):
            if file.name not in parts:
                file.unlink()

    def _save(self, name: str, value: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        new = self._folder / f"{name}.new"
        with new.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._folder / name)

    def _load(self, name: str) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = torch.load(self._folder / name, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"the store's {self._folder / name} cannot be read, and its run neither opened nor "
                f"resumed; what it recorded can be read with xarray: {error}"
            ) from error
        return loaded


def has_checkpoint(path: Path) -> bool:
    """Whether a run in a folder has made a checkpoint, its first before its first step."""
    return (path / "checkpoint" / "progress.pt").exists()


def _cut(rows: slice, first: int, stop: int) -> slice | None:
    """The chains that some rows have in common with a part; None if there are none."""
    cut = slice(max(rows.start, first) - first, min(rows.stop, stop) - first)
    return cut if cut.start < cut.stop else None


def of_chains(parts: Sequence[tuple[dict[str, Any], slice]]) -> dict[str, Any]:
    """The checkpoint of some chains.

    Args:
        parts: Checkpoints of one step, each with its chains that are wanted.
    """
    first, cut = parts[0]
    if len(parts) == 1 and cut == slice(0, len(first["frozen_at"])):
        return first

    def joined(name: str) -> Tensor:
        return torch.cat([part[name][cut] for part, cut in parts])

    def waiting(index: int) -> Tensor | None:
        values = [(part["record"]["waiting"][index][2], cut) for part, cut in parts]
        known = [value[cut] for value, cut in values if value is not None]
        return torch.cat(known) if known else None

    fields = enumerate(first["record"]["waiting"])
    return {
        **first,
        **{name: joined(name) for name in ("next_steps", "frozen_at")},
        **{
            name: rows_of([(part[name], cut) for part, cut in parts])
            for name in ("state", "moments", "memory")
        },
        "record": {
            **first["record"],
            "waiting": [[field, block, waiting(i)] for i, (field, block, _) in fields],
        },
    }


@contextmanager
def held(path: str | Path, processes: Processes, *, resume: bool) -> Iterator[Place]:
    """Hold the folder of a run, so that no other run writes to it.

    Args:
        path: The folder.
        processes: Those of the run, the first of which holds it for all.
        resume: Whether to go on with the run in it.

    Raises:
        FileExistsError: Another run is in it, and is not to be resumed; or something else is.
        RuntimeError: Another process runs in it.
    """
    folder = Path(path)
    if processes.rank > 0:
        processes.meet(None)  # it is held
        yield Place(folder, processes)
        return
    check_folder(folder)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    # The system lets go of it when the process ends, however it ends.
    lock = FileLock(folder / "checkpoint" / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"store {folder} must be one run's, but another one is writing it"
        ) from error
    try:
        place = Place(folder, processes)
        if place.has_checkpoint and not resume:
            raise FileExistsError(
                f"store {folder} holds a run already: resume=True goes on with it, or give another"
            )
        processes.meet(None)
        yield place
    finally:
        lock.release()


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a run.

    Raises:
        FileExistsError: It does.
    """
    if not folder.exists():
        return
    is_ours = folder.is_dir() and ((folder / "checkpoint").is_dir() or not any(folder.iterdir()))
    if not is_ours:
        raise FileExistsError(f"store must be a new folder, or that of a run, got {folder}")


def check_same_run(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings.

    Raises:
        ValueError: Something differs; the message names it.
    """
    names = [name for name in {**stored, **given} if stored.get(name) != given.get(name)]
    if names:
        raise ValueError(f"store {path} holds another run: it differs in {', '.join(names)}")


def major_version() -> str:
    """The part of the library's version that a store depends on."""
    major, minor, *_ = version("funcsgmcmc").split(".")
    return f"{major}.{minor}" if major == "0" else major


class Timetable:
    """When checkpoints are due.

    Args:
        every: Seconds between two; None for as many as make checkpoints cost 2 % of the time.
    """

    def __init__(self, every: float | None) -> None:
        self._every = every
        # Of a clock that never goes back.
        self._last, self._cost = time.monotonic(), 0.0
        self._steps, self._since, self._pace = 0, 0, 0.0

    def is_due(self) -> bool:
        """Whether it is time for one."""
        return time.monotonic() - self._last >= self._seconds()

    def steps_until_due(self) -> int:
        """Steps until the next one, at the pace of those between the last two."""
        steps = int(self._seconds() / self._pace) if self._pace else 1
        # The first steps compile, and warm caches.
        return max(1, min(steps, _FASTER * self._since + 1))

    @contextmanager
    def timed(self, num_steps: int) -> Iterator[None]:
        """Measure what a checkpoint after some steps costs, and the pace of the steps before."""
        start = time.monotonic()
        self._since = num_steps - self._steps
        self._pace = (start - self._last) / self._since if self._since else 0.0
        yield
        self._steps, self._last = num_steps, time.monotonic()
        self._cost = self._last - start

    def _seconds(self) -> float:
        """Seconds between two."""
        if self._every is not None:
            return self._every
        return max(_SECONDS_AT_LEAST, self._cost / _SHARE)
