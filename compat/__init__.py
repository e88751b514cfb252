"""Stateful `torch.optim` classes over `funcsgmcmc`, with the API of `devinterp.optim` 2.0.1.

The package is empty for now: `SGMCMC`, `SGLD` and `SGNHT` will be importable from here, so that
`from devinterp.optim import SGMCMC` becomes `from compat import SGMCMC` and nothing else changes.
"""
