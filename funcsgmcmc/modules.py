"""From a module to the tree of those of its parameters that are sampled."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping

from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from funcsgmcmc import checks

Selection = str | Iterable[str] | Callable[[str, Tensor], bool]

_MOST_NAMES = 12


def params_of(
    module: nn.Module, only: Selection | None = None, *, include_frozen: bool = False
) -> TensorDict:
    """Copy the parameters of a module into a tree: those that are to be sampled.

    Parameters that the tree lacks keep the module's values in the loss that `module_loss` makes. So
    a run is restricted to a part of a network by giving it the tree of that part.

    Args:
        module: Any module. Tied weights appear once, under their first name. Buffers are not
            parameters and stay with the module.
        only: Which parameters: a glob pattern of dotted names (`"blocks.0.*"`; `*` matches dots
            too), several patterns, or a function of a parameter's name and the parameter that
            returns whether to take it. Default: all.
        include_frozen: Whether to take parameters with `requires_grad=False` as well.

    Returns:
        A `TensorDict` of batch size `[]`, keyed by the module's dotted parameter names, detached
        and cloned: training the module further does not change the tree.

    Raises:
        TypeError: An argument is not of the type above.
        ValueError: The module has no parameters, or lazy ones without a shape; a pattern matches
            none; or all that are selected are frozen.
    """
    checks.instance("module", module, nn.Module)
    named, aliases = dict(module.named_parameters()), first_names_of(module)
    if not named:
        raise ValueError(f"module must have parameters, got {type(module).__name__} without any")
    selected = _select(named, aliases, only)
    taken = {
        name: leaf
        for name, leaf in named.items()
        if name in selected and (leaf.requires_grad or include_frozen)
    }
    if not taken:
        raise ValueError(
            f"params_of must find a parameter to sample, got frozen ones only (requires_grad=False)"
            f", which include_frozen=True takes: {listed(selected)}"
        )
    for name, leaf in taken.items():
        if isinstance(leaf, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} of {type(module).__name__} must have a shape, but it is lazy: "
                "call the module once on a batch"
            )
    return TensorDict({name: leaf.detach().clone() for name, leaf in taken.items()})


def first_names_of(module: nn.Module) -> dict[str, str]:
    """All names of a module's parameters, each with the first name of its parameter.

    Tied weights have several names, of which `named_parameters` yields the first.
    """
    first: dict[int, str] = {}
    everything = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(leaf), name) for name, leaf in everything}


def _select(
    named: Mapping[str, Tensor], aliases: Mapping[str, str], only: Selection | None
) -> set[str]:
    """Names of the parameters that a selection takes.

    Raises:
        TypeError: The selection is of another type.
        ValueError: A pattern, or the function, takes no parameter.
    """
    if only is None:
        return set(named)
    if callable(only):
        selected = {name for name, leaf in named.items() if only(name, leaf)}
        if not selected:
            raise ValueError(f"only must take a parameter, got none of {listed(named)}")
        return selected
    patterns = [only] if isinstance(only, str) else only
    if not isinstance(patterns, Iterable):
        raise TypeError(f"only must be patterns of names or a function, got {type(only).__name__}")
    selected = set()
    for pattern in patterns:
        checks.instance("a pattern of only", pattern, str)
        # Any name of a tied weight selects it.
        found = {first for name, first in aliases.items() if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"only={pattern!r} must match a parameter, got none of {listed(aliases)}"
            )
        selected |= found
    return selected


def listed(names: Iterable[str]) -> str:
    """Names in a sentence; of many, the first."""
    every = list(names)
    more = f" and {len(every) - _MOST_NAMES} more" if len(every) > _MOST_NAMES else ""
    return ", ".join(every[:_MOST_NAMES]) + more
