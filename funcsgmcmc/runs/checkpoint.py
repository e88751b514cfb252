"""Runs that survive their process: a record on disk, and the state to go on from.

    run.zarr/             the record, as ArviZ reads it (see `runs/disk.py`)
    run.zarr/checkpoint/  an array of zarr, the number of steps in the last checkpoint; beside it
        settings.pt       what does not change: the sampler with its anchor, keys, fingerprint
        progress.pt       states, clock, position in the data, values that wait for their block
        lock              held by the process that runs

A checkpoint is written to a new file, which then takes the old one's name. Both files hold tensors
and plain values, and are read with `weights_only=True`.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from funcsgmcmc.runs.disk import open_group, write_array

# Of a run's time, at most this share goes to checkpoints.
_SHARE = 0.02
_SECONDS_AT_LEAST = 1.0


class Place:
    """The folder of a run, held by this process.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = path / "checkpoint"
        self.settings: dict[str, Any] | None = None
        self.progress: dict[str, Any] | None = None
        if has_checkpoint(path):
            self.settings = self._load("settings.pt")
            self.progress = self._load("progress.pt")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write what does not change."""
        self.settings = dict(settings)
        self._save("settings.pt", self.settings)

    def write(self, progress: Mapping[str, Any]) -> None:
        """Write a checkpoint: it is the old one or the new one, whenever the process ends."""
        self._save("progress.pt", dict(progress))
        root = open_group(self.path, mode="a")
        write_array(root, "checkpoint", torch.tensor(progress["num_steps"]), ())

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
        except Exception as error:
            raise ValueError(
                f"the store's {self._folder / name} cannot be read, and its run neither opened nor "
                f"resumed; what it recorded can be read with xarray: {error}"
            ) from error
        return loaded


def has_checkpoint(path: Path) -> bool:
    """Whether a run in a folder has made a checkpoint, its first before its first step."""
    return (path / "checkpoint" / "progress.pt").exists()


@contextmanager
def held(path: str | Path, *, resume: bool) -> Iterator[Place]:
    """Hold the folder of a run, so that no other process writes to it.

    Raises:
        FileExistsError: Another run is in it, and is not to be resumed; or something else is.
        RuntimeError: Another process runs in it.
    """
    folder = Path(path)
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
        place = Place(folder)
        if place.progress is not None and not resume:
            raise FileExistsError(
                f"store {folder} holds a run already: resume=True goes on with it, or give another"
            )
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

    def is_due(self) -> bool:
        """Whether it is time for one."""
        since = time.monotonic() - self._last
        if self._every is not None:
            return since >= self._every
        return since >= max(_SECONDS_AT_LEAST, self._cost / _SHARE)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure what a checkpoint costs."""
        start = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - start
