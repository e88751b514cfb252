"""Runs of many components of a network, one after the other: grouped records, and one store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from funcsgmcmc import checks
from funcsgmcmc.components import Component, restrict
from funcsgmcmc.gradients import LossFn
from funcsgmcmc.runs.failures import SamplingError, SamplingInterrupt
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.runs.request import Observable
from funcsgmcmc.runs.sampling import sample
from funcsgmcmc.samplers.base import Sampler


def sample_components(
    loss_fn: LossFn,
    params: TensorDictBase | Mapping[str, Tensor],
    data: Any,
    sampler: Sampler,
    components: Mapping[str, Component | None],
    *,
    num_chains: int,
    observables: Mapping[str, Observable] | None = None,
    store: str | Path | None = None,
    **settings: Any,
) -> dict[str, Samples]:
    """Sample each of many components of a network, while the rest stays at the given parameters.

    Component number i has the chains i C, …, (i + 1) C − 1 of the key: all chains of all components
    are independent, and each is the same whatever other components come after it. With
    `shared_batches=True` all of them see the same minibatches, which the key alone chooses, and
    what lies below a component is computed once for its chains.

    Args:
        loss_fn: As for `sample`, of all parameters.
        params: w*, all parameters of one chain.
        data: As for `sample`.
        sampler: As for `sample`, without an anchor or a mask: it is each component's own.
        components: What is sampled, by name, as `restrict` takes it; None for all parameters.
        num_chains: C, the chains of each component.
        observables: As for `sample`, functions of all parameters.
        store: A folder, in which each component's run has a folder of its name.
        **settings: The other arguments of `sample`.

    Returns:
        The record of each component, by name.

    Raises:
        TypeError, ValueError: As `restrict` and `sample`; nothing of that component has run.
        SamplingError, SamplingInterrupt: As `sample`; `finished` has the records of the components
            that were complete.
    """
    checks.instance("components", components, Mapping)
    checks.count("num_chains", num_chains, minimum=1)
    if not components:
        raise ValueError("components must name at least one, got none")
    for name in components:
        if not isinstance(name, str) or Path(name).name in ("", "..") or "/" in name:
            raise ValueError(f"components must have names that a folder can have, got {name!r}")
    if observables is not None:
        checks.instance("observables", observables, Mapping)
        for name, function in observables.items():
            checks.function(f"observables[{name!r}]", function)
    if store is not None:
        checks.instance("store", store, str | Path)
    offset = settings.pop("chain_offset", 0)
    functions = {} if observables is None else dict(observables)
    # All are made before the first one runs: a mistake in the last shall not come after hours.
    restricted = {
        name: _restricted(loss_fn, functions, params, component)
        for name, component in components.items()
    }
    finished: dict[str, Samples] = {}
    for index, (name, (loss, start, observed)) in enumerate(restricted.items()):
        try:
            finished[name] = sample(
                loss,
                start,
                data,
                sampler,
                num_chains=num_chains,
                chain_offset=offset + index * num_chains,
                observables=observed,
                store=None if store is None else Path(store) / name,
                **settings,
            )
        except (SamplingError, SamplingInterrupt) as error:
            error.add_note(f"This happened in component {name!r}.")
            error.finished = finished
            raise
        except Exception as error:
            error.add_note(f"This happened in component {name!r}.")
            raise
    return finished


def _restricted(
    loss_fn: LossFn,
    observables: Mapping[str, Observable],
    params: TensorDictBase | Mapping[str, Tensor],
    component: Component | None,
) -> tuple[LossFn, Any, dict[str, Observable]]:
    """A loss, its start and observables, of a component."""
    if component is None:
        return loss_fn, params, dict(observables)
    loss, start = restrict(loss_fn, params, component)
    return (
        loss,
        start,
        {
            name: restrict(function, params, component).function
            for name, function in observables.items()
        },
    )
