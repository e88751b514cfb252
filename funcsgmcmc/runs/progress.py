"""The progress bar of a run, by tqdm."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from funcsgmcmc import checks

Advance = Callable[[Callable[[], str]], None]

# A status reads losses, which waits for the device: not at every step.
_SECONDS_BETWEEN_READINGS = 0.2


@contextmanager
def progress_bar(num_steps: int, *, enabled: bool) -> Iterator[Advance]:
    """Show a progress bar with the rate of steps, while the context lasts.

    Args:
        num_steps: Steps of the run.
        enabled: Without it, nothing is shown and tqdm is not needed.

    Yields:
        A function to call after each step with a function that tells the status.

    Raises:
        ImportError: tqdm is not installed; the message names the extra.
    """
    if not enabled:
        yield lambda status: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise checks.missing_extra("progress", "tqdm", "progress=True") from error
    with tqdm(total=num_steps, unit="step", dynamic_ncols=True) as bar:
        read_at = -_SECONDS_BETWEEN_READINGS

        def advance(status: Callable[[], str]) -> None:
            nonlocal read_at
            now = time.monotonic()
            if now - read_at >= _SECONDS_BETWEEN_READINGS or bar.n + 1 == num_steps:
                bar.set_postfix_str(status(), refresh=False)
                read_at = now
            bar.update()

        yield advance
