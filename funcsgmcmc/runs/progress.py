"""The progress of a run: a bar by tqdm where someone looks, else lines by `logging`."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from funcsgmcmc import checks

logger = logging.getLogger("funcsgmcmc")

# A status reads losses, which waits for the device: not at every step.
_SECONDS_BETWEEN_READINGS = 0.2
_SECONDS_BETWEEN_LINES = 30.0


class Progress(Protocol):
    """The contract of a display.

    Attributes:
        is_shown: Whether anything is shown.
    """

    is_shown: bool

    def note(self, text: str) -> None:
        """Say what is about to take long."""

    def tell(self, text: str) -> None:
        """Say something that stays to be read."""

    def shorten(self, num_steps: int) -> None:
        """Say that the run has so many steps, fewer than before."""

    def steps_done(self, status: Callable[[], str], number: int = 1) -> None:
        """Count steps; `status` tells how the run is doing."""


@contextmanager
def progress_of(num_steps: int, *, enabled: bool, done: int = 0) -> Iterator[Progress]:
    """Show the progress of a run, with the rate of its steps, while the context lasts.

    On a terminal and in a notebook it is a bar. Where the error stream is a file or a pipe, it is a
    line every 30 seconds and one at the end, of the logger `funcsgmcmc` at level INFO; if logging
    is not configured, to the error stream.

    Args:
        num_steps: Steps of the run.
        done: Steps that an earlier process has made.
        enabled: Without it nothing is shown, and tqdm is not needed.

    Raises:
        ImportError: tqdm is not installed; the message names the extra.
    """
    checks.switch("progress", enabled)
    if not enabled:
        yield _Nothing()
    elif _is_watched():
        with _bar(num_steps, done) as bar:
            yield bar
    else:
        with _visible_log():
            yield _Lines(num_steps, done)


def _is_watched() -> bool:
    """Whether someone looks at the error stream: a terminal, or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Nothing:
    is_shown = False

    def note(self, text: str) -> None:
        pass

    def tell(self, text: str) -> None:
        pass

    def shorten(self, num_steps: int) -> None:
        pass

    def steps_done(self, status: Callable[[], str], number: int = 1) -> None:
        pass


@contextmanager
def _bar(num_steps: int, done: int) -> Iterator[Progress]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise checks.missing_extra("progress", "tqdm", "progress=True") from error

    class Bar:
        """A bar, whose status is read a few times a second."""

        is_shown = True
        read_at = -_SECONDS_BETWEEN_READINGS

        def note(self, text: str) -> None:
            bar.set_postfix_str(text, refresh=True)

        def tell(self, text: str) -> None:
            bar.write(text, file=sys.stderr)

        def shorten(self, num_steps: int) -> None:
            bar.total = num_steps

        def steps_done(self, status: Callable[[], str], number: int = 1) -> None:
            now = time.monotonic()
            if now - self.read_at >= _SECONDS_BETWEEN_READINGS or bar.n + number == bar.total:
                bar.set_postfix_str(status(), refresh=False)
                self.read_at = now
            bar.update(number)

    with tqdm(total=num_steps, initial=done, unit="step", dynamic_ncols=True) as bar:
        yield Bar()


@contextmanager
def _visible_log() -> Iterator[None]:
    """Let the logger's lines be seen, where nobody has said where they go."""
    if logger.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Lines:
    """A line every so many seconds, and one after the last step."""

    is_shown = True

    def __init__(self, num_steps: int, done: int) -> None:
        self._num_steps, self._steps, self._done_before = num_steps, done, done
        self._last = (
            time.monotonic(),
            done,
        )  # when the last line was written, and after which step

    def note(self, text: str) -> None:
        logger.info(text)

    tell = note

    def shorten(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def steps_done(self, status: Callable[[], str], number: int = 1) -> None:
        if self._steps == self._done_before:  # the first ones compile, and warm caches
            self._last = (time.monotonic(), self._steps + number)
        self._steps += number
        now, (then, steps) = time.monotonic(), self._last
        if now - then < _SECONDS_BETWEEN_LINES and self._steps < self._num_steps:
            return
        rate = (self._steps - steps) / max(now - then, 1e-9)
        left = (self._num_steps - self._steps) / rate
        logger.info(
            "%d of %d steps, %.3g steps/s, %.0f s left, %s",
            self._steps,
            self._num_steps,
            rate,
            left,
            status(),
        )
        self._last = (now, self._steps)
