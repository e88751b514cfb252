"""The fingerprint of a run: digests of all that makes it the one that it is, by name.

It is of what all chains were asked for, so that it is one for any number of processes.
"""

from typing import Any

from funcsgmcmc import tree
from funcsgmcmc.components import RestrictedFunction
from funcsgmcmc.losses import ModuleLoss
from funcsgmcmc.runs.checkpoint import major_version
from funcsgmcmc.runs.data import Batches
from funcsgmcmc.runs.encoding import digest, digests
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.request import Request
from funcsgmcmc.samplers.base import Sampler, State

_SETTINGS = (
    "num_chains",
    "num_burnin_steps",
    "num_steps_between_draws",
    "batch_size",
    "minibatches",
    "shared_batches",
    "chain_offset",
    "init_noise",
    "full_loss",
    "chain_method",
    "chunk_size",
    "compile",
    "on_divergence",
    "max_loss",
    "max_distance",
)


def fingerprint(
    request: Request, given: Any, sampler: Sampler, batches: Batches, sampled: set[str]
) -> dict[str, str]:
    """The fingerprint of a run.

    Args:
        request: The settings of all chains.
        given: Where they start.
        sampler: Theirs.
        batches: The data.
        sampled: Dotted names of the parameters.
    """
    loss = request.estimator.loss_fn
    named: dict[str, Any] = {
        "the library's version": major_version(),
        "loss_fn": getattr(loss, "__qualname__", type(loss).__qualname__),
        "the gradient's estimator": type(request.estimator).__name__,
        "log_prior": request.log_prior is not None,
        "observables": sorted(request.observables),
        "record": sorted(request.record),
        **{name: getattr(request, name) for name in _SETTINGS},
    }
    if isinstance(loss, ModuleLoss | RestrictedFunction):
        named |= loss.fixed(sampled)
    return {
        **{name: digest(value) for name, value in named.items()},
        "key": digest(request.key),
        **digests("sampler", sampler),
        **_digests_of_start(given),
        **batches.digests(),
    }


def _digests_of_start(given: Any) -> dict[str, str]:
    """Digests of where chains start: a tree, a state, or the record of a run."""
    if isinstance(given, Samples):
        return {
            **digests("params.anchor", given.sampler.anchor),
            "params.chains": digest(given.chains),
            "params.frozen_at": digest(given.frozen_at),
            **digests("params", given.state),
        }
    if isinstance(given, State):
        return digests("params", given)
    return digests("params", tree.parameters(given))
