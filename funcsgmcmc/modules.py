"""From a module to the tree of those of its parameters that are sampled."""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from funcsgmcmc import checks

Selection = str | Collection[str] | Callable[[str, Tensor], bool]

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
        ValueError: The module has no parameters, or lazy ones without a shape, or ones that
            `fully_shard` has sharded and that are gathered; a pattern matches none; or all that are
            selected are frozen.
    """
    checks.instance("module", module, nn.Module)
    checks.switch("include_frozen", include_frozen)
    named, aliases = dict(module.named_parameters()), first_names_of(module)
    if not named:
        raise ValueError(f"module must have parameters, got {type(module).__name__} without any")
    if not include_frozen:
        named = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    if not named:
        raise ValueError(
            "module must have a parameter to sample, got frozen ones (requires_grad=False), which "
            f"include_frozen=True takes: {listed(aliases)}"
        )
    selected = select(named, aliases, only)
    taken = {name: leaf for name, leaf in named.items() if name in selected}
    for name, leaf in taken.items():
        if isinstance(leaf, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} of {type(module).__name__} must have a shape, but it is lazy: "
                "call the module once on a batch"
            )
        if is_fully_sharded(module) and not isinstance(leaf, DTensor):
            raise ValueError(
                f"parameter {name!r} must be a part of the sharded one, got it whole: a module "
                "that fully_shard has sharded is left gathered by a forward pass without a "
                "backward one; call its reshard()"
            )
    return TensorDict({name: leaf.detach().clone() for name, leaf in taken.items()})


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has sharded a module, or a part of it."""
    # Such modules are not compiled, and a compiler would go through all of them.
    return not torch.compiler.is_compiling() and any(
        isinstance(each, FSDPModule) for each in module.modules()
    )


def first_names_of(module: nn.Module) -> dict[str, str]:
    """All names of a module's parameters, each with the first name of its parameter.

    Tied weights have several names, of which `named_parameters` yields the first.
    """
    first: dict[int, str] = {}
    everything = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(leaf), name) for name, leaf in everything}


def select(
    named: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    only: Selection | None,
    argument: str = "only",
) -> set[str]:
    """Names of the parameters that a selection takes.

    Args:
        named: The parameters that may be taken, by their first names.
        aliases: All names of all parameters, each with the first.
        only: The selection.
        argument: Its name in errors.

    Raises:
        TypeError: The selection is of another type.
        ValueError: A pattern, or the function, takes no parameter.
    """
    if only is None:
        return set(named)
    if not isinstance(only, str | list | tuple | set) and (
        isinstance(only, nn.Module) or not callable(only)
    ):
        raise TypeError(
            f"{argument} must be patterns of names or a function, got {type(only).__name__}"
        )
    if callable(only):
        selected = {name for name, leaf in named.items() if only(name, leaf)}
        if not selected:
            raise ValueError(f"{argument} must take a parameter, got none of {listed(named)}")
        return selected
    patterns = [only] if isinstance(only, str) else list(only)
    if not patterns:
        raise ValueError(f"{argument} must hold at least one pattern, got none")
    return set[str]().union(*(_matching(pattern, named, aliases, argument) for pattern in patterns))


def _matching(
    pattern: Any, named: Mapping[str, Tensor], aliases: Mapping[str, str], argument: str
) -> set[str]:
    """First names of the parameters that a pattern matches, of those that may be taken.

    Raises:
        TypeError: The pattern is no string.
        ValueError: It matches none.
    """
    checks.instance(f"a pattern of {argument}", pattern, str)
    # Any name of a tied weight selects it.
    found = {first for name, first in aliases.items() if fnmatch.fnmatchcase(name, pattern)}
    if not found:
        is_module = any(name.startswith(f"{pattern}.") for name in aliases)
        hint = f"; {pattern + '.*'!r} takes all of {pattern!r}" if is_module else ""
        raise ValueError(
            f"{argument}={pattern!r} must match a parameter, got none of {listed(aliases)}{hint}"
        )
    if not found & set(named):
        raise ValueError(
            f"{argument}={pattern!r} must match a parameter to sample, got frozen ones "
            f"(requires_grad=False), which include_frozen=True takes: {listed(sorted(found))}"
        )
    return found & set(named)


def listed(names: Iterable[str]) -> str:
    """Names in a sentence; of many, the first."""
    every = list(names)
    more = f" and {len(every) - _MOST_NAMES} more" if len(every) > _MOST_NAMES else ""
    return ", ".join(every[:_MOST_NAMES]) + more
