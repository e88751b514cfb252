"""The errors of a run that stopped, which carry its record."""

from typing import Any

from funcsgmcmc.runs.record import Samples


class _WithRecord(BaseException):
    """What errors of both kinds share, those of a run and a user's Ctrl-C."""

    def __init__(self, message: str, samples: Samples) -> None:
        super().__init__(message)
        self.samples = samples
        self.finished: dict[str, Samples] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # As an exception alone it would be made anew from its message, without the record: a pool
        # of processes would wait forever for one that it cannot read.
        return type(self), (str(self), self.samples), {"finished": self.finished}


class SamplingError(_WithRecord, RuntimeError):
    """A run stopped before its end.

    Attributes:
        samples: The record until then.
        finished: Of `sample_components`, the records of the components that were complete.
    """


class SamplingInterrupt(_WithRecord, KeyboardInterrupt):
    """Ctrl-C in a run, which stops a loop over runs too.

    Attributes:
        samples: The record until then, with which `sample` can go on.
        finished: As for `SamplingError`.
    """


class DivergenceError(SamplingError):
    """A chain became non-finite, and `on_divergence="raise"` was asked for."""
