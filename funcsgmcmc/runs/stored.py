"""Records of runs on disk, read when they are asked for."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.norms import Metrics
from funcsgmcmc.runs.checkpoint import Place
from funcsgmcmc.runs.disk import DiskStore
from funcsgmcmc.runs.encoding import decode
from funcsgmcmc.runs.looks import Looks
from funcsgmcmc.runs.record import Samples, observable_of
from funcsgmcmc.runs.store import Recorder
from funcsgmcmc.samplers.base import State


class StoredSamples(Samples):
    """A record whose values are read from its store at their first use, and kept."""

    _recorder: Recorder
    _saved_state: dict[str, Any]
    _path: Path
    _num_steps: int
    _full: dict[str, Any] | None

    # A frozen dataclass takes no assignments: a cached property is kept beside its fields.
    @cached_property
    def distances(self) -> Tensor:
        """‖w_t − w₀‖, `[C, T]`."""
        return self._recorder.distances(self.num_steps)

    @cached_property
    def losses(self) -> Tensor:
        """L(w_t), `[C, T]`."""
        return self._recorder.losses(self.num_steps)

    @cached_property
    def looks(self) -> Looks | None:
        """What all data says at some draws."""
        if self._full is None:
            return None
        look = self._recorder.looks(self.num_draws // self._full["every"])
        return Looks.of(look, **self._full)

    @cached_property
    def draws(self) -> TensorDict | None:
        """Parameters, leaves `[C, D, *shape]`: all of them, in memory."""
        return self._recorder.draws(self.num_draws)

    @cached_property
    def observables(self) -> dict[str, Tensor]:
        """Name to values `[C, D, …]`."""
        return self._recorder.observables(self.num_draws)

    @property
    def observable_names(self) -> list[str]:
        """Names of the observables whose values were recorded."""
        return self._recorder.observable_names

    def observable(self, name: str) -> Tensor:
        """The values of one observable, `[C, D, …]`; they are not kept in memory."""
        if "observables" in vars(self):
            return super().observable(name)
        return observable_of(name, self._recorder.observables(self.num_draws, only=name))

    @cached_property
    def log_weights(self) -> Tensor | None:
        """Logs of the draws' importance weights, `[C, D]`."""
        return self._recorder.log_weights(self.draw_steps, self.frozen_at)

    @cached_property
    def log_priors(self) -> Tensor | None:
        """The log-prior log p(w_t), `[C, T]`."""
        return self._recorder.log_priors(self.num_steps)

    @cached_property
    def metrics(self) -> Metrics | None:
        """Each `[C, T]`."""
        return self._recorder.metrics(self.num_steps)

    @cached_property
    def state(self) -> State:
        """The chains after the last step."""
        state: State = decode(self._saved_state)
        return state

    @property
    def num_chains(self) -> int:
        """The number of chains, C."""
        return len(self.chains)

    @property
    def num_steps(self) -> int:
        """The number of steps made, T."""
        return self._num_steps

    def __reduce__(self) -> tuple[Any, ...]:
        return open_run, (self._path,)


def open_run(path: str | Path) -> Samples:
    """Open the record of a run on disk.

    Values are read when they are used: an estimate reads what it needs. A run that goes on, in this
    process or in another, is opened as it was at its last checkpoint.

    Args:
        path: The `store` that was given to `sample`.

    Returns:
        The record. `samples.draws` are read into memory, all of them: for less, open the file with
        `xarray.open_datatree`.

    Raises:
        FileNotFoundError: There is no run in the folder.
        ValueError: Its checkpoint cannot be read.
        ImportError: The extra `store` is not installed.
    """
    checks.instance("path", path, str | Path)
    place = Place(Path(path))
    settings, progress = place.settings, place.load()
    if settings is None or progress is None:
        raise FileNotFoundError(f"there is no run at {path}, or it has made no checkpoint yet")
    draw_steps: Tensor = settings["draw_steps"]
    first_step: int = settings["first_step"]
    num_steps: int = progress["num_steps"]
    store = DiskStore.opened(place.path, len(settings["chains"]), progress["record"])
    moments = decode(progress["moments"])
    samples = object.__new__(StoredSamples)
    vars(samples).update(
        _path=place.path,
        _recorder=Recorder(store),
        _saved_state=progress["state"],
        _num_steps=num_steps,
        _full=settings["full_data"],
        sampler=decode(settings["sampler"]),
        key=settings["key"],
        chains=settings["chains"],
        initial_loss=settings["initial_loss"],
        frozen_at=_level(progress["frozen_at"], first_step + num_steps),
        draw_moments=moments.get("draw_moments"),
        observable_moments=moments.get("observable_moments"),
        first_step=first_step,
        draw_steps=draw_steps[draw_steps < first_step + num_steps],
        num_burnin_steps=settings["num_burnin_steps"],
        num_steps_between_draws=settings["num_steps_between_draws"],
        chain_method=settings["chain_method"],
        options=settings["options"],
    )
    return samples


def _level(frozen_at: Tensor, next_step: int) -> Tensor:
    """Steps of freezing, without those of a step that not all chains have made."""
    return torch.where(frozen_at < next_step, frozen_at, -1)
