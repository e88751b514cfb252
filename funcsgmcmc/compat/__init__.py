"""Stateful `torch.optim` classes over `funcsgmcmc`, with the API of `devinterp.optim` 2.0.1.

`from devinterp.optim import SGMCMC` becomes `from compat import SGMCMC`, and nothing else changes:
the same seed gives the same chain, except where the published package differs from its own
document. The guide to migrating lists those places.
"""

from funcsgmcmc.compat.sgld import SGLD
from funcsgmcmc.compat.sgmcmc import SGMCMC, SamplingMethodLiteral
from funcsgmcmc.compat.sgnht import SGNHT

__all__ = ["SGLD", "SGMCMC", "SGNHT", "SamplingMethodLiteral"]
