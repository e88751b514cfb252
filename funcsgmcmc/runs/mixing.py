"""How well chains have mixed so far, for the display of a run that goes on."""

import torch
from torch import Tensor

# Values of each chain that are kept: enough for a first look, and few enough for any run.
_MOST = 256
_FEWEST = 8


class Mixing:
    """A thinned trace of a few quantities, in memory that does not grow with the run.

    When it is full, every second value is dropped, and from then on half as many are taken.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._stride = 1

    def is_due(self, index: int) -> bool:
        """Whether the values of a step are taken."""
        return index % self._stride == 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Take the values of a step that is due: name to `[C]`."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        if all(len(kept) > _MOST for kept in self._values.values()):
            self._values = {name: kept[::2] for name, kept in self._values.items()}
            self._stride *= 2

    def r_hats(self, healthy: Tensor) -> dict[str, float]:
        """Split R-hat of each quantity over the healthy chains, bool `[C]`; empty while too few."""
        found = {}
        for name, kept in self._values.items():
            values = torch.stack(kept, 1)[healthy]
            if len(kept) >= _FEWEST and len(values):
                found[name] = split_r_hat(values)
        return found


def split_r_hat(values: Tensor) -> float:
    """R-hat of chains and their halves.

        R̂² = (n − 1)/n + B/W

    with n values a half, W the mean variance within halves, and B the variance of their means; NaN
    where nothing moves. (`diagnostics` has the rank-normalized one, from all draws.)

    Source: Gelman, Carlin, Stern, Dunson, Vehtari and Rubin, "Bayesian Data Analysis", 3rd edition,
    2013, eqs. 11.1 to 11.4.

    Args:
        values: `[C, D]`, D ≥ 4.
    """
    half = values.shape[1] // 2
    parts = torch.cat([values[:, :half], values[:, -half:]]).double()
    within, between = parts.var(1).mean(), parts.mean(1).var()
    return float(((half - 1) / half + between / within).sqrt())
