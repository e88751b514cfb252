"""The settings that all samplers share, said once.

A factory takes them as `**shared: Unpack[SharedSettings]` under the decorator
`takes_shared_settings`, which puts each of them into its signature and its docstring, and hands
them to `build` with its own. A further setting of all samplers is one line in each of
`SharedSettings`, its docstring and `_CHECKS`, a field of `Sampler`, and its use in
`samplers/base.py`.
"""

import functools
import inspect
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, Required, TypedDict, TypeVar, get_type_hints

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.schedules import Schedule, setting

P = ParamSpec("P")
T = TypeVar("T")

GivenTree = TensorDictBase | Mapping[str, Tensor]
GivenMask = TensorDictBase | Mapping[str, Tensor | float]


class SharedSettings(TypedDict, total=False):
    """The settings that all samplers share.

    Every number may be a tensor `[C]`, one value a chain; `anchor` and `mask` may have batch size
    `[C]`; `lr`, `nbeta` and `temperature` may be schedules (`funcsgmcmc.schedules`).

    Attributes:
        nbeta: Inverse temperature nβ ≥ 0 of the loss, in units of the number of examples, since
            the loss is a mean; `default_nbeta(n)` = n/log n for local learning coefficients, n for
            a posterior.
        temperature: T ≥ 0 of the whole posterior: the chain samples e^(−U/T). At 0 a sampler is an
            optimizer of U.
        localization: Precision γ ≥ 0 of the pull to the anchor, in units of 1/w².
        weight_decay: Precision λ ≥ 0 of the pull to zero, in units of 1/w².
        anchor: w₀, a tree like the parameters (default: the parameters given to `init`).
        bounding_box_size: Half-width b > 0 of the box around w₀ (default: none).
        mask: m, a tree like the parameters: 0 or False keeps an entry where it is, 1 or True
            samples it; other values scale its drift and its noise alike, so that it has the
            temperature m T. One value may stand for a whole leaf (`{"0.weight": False}`), and
            leaves that are not named are sampled.
    """

    nbeta: Required[float | Tensor | Schedule]
    temperature: float | Tensor | Schedule
    localization: float | Tensor
    weight_decay: float | Tensor
    anchor: GivenTree | None
    bounding_box_size: float | Tensor | None
    mask: GivenMask | None


class _Check(NamedTuple):
    """The check of a setting, and its default; a setting without one must be given."""

    check: Callable[[str, Any], Any]
    default: Any = inspect.Parameter.empty


def _anchor(name: str, value: GivenTree | None) -> TensorDict | None:
    """Take an anchor: a copy of a tree of finite parameters."""
    if value is None:
        return None
    # A copy: the caller may go on to train these tensors.
    anchor = tree.parameters(value, name).detach().clone()
    if all(checks.has_values(leaf) for _, leaf in tree.leaves(anchor)):
        tree.check_finite(name, anchor)
    return anchor


def _mask(name: str, value: GivenMask | None) -> TensorDict | None:
    """Take a mask: a tree of factors, where boolean and integer leaves count as 0 and 1."""
    # Leaves that are not named are sampled, and so are all where none is.
    if value is None or (isinstance(value, Mapping) and not value.keys()):
        return None
    if not isinstance(value, TensorDictBase | Mapping):
        raise TypeError(f"{name} must be a TensorDict or a mapping, got {type(value).__name__}")
    if not isinstance(value, TensorDictBase):
        value = TensorDict({key: _factor(f"{name}[{key!r}]", leaf) for key, leaf in value.items()})
    # Complex leaves stay what they are, to be refused with the anchor's words.
    factors = tree.map_leaves(
        lambda leaf: leaf if leaf.is_floating_point() or leaf.is_complex() else leaf.float(), value
    )
    mask = _anchor(name, factors)
    for key, leaf in tree.leaves(factors):
        here = shards.local(leaf)
        if checks.has_values(here) and not bool((here >= 0).all()):
            raise ValueError(
                f"{name}[{tree.dotted(key)!r}] must be >= 0, got {float(here.min()):g}"
            )
    return mask


def _factor(name: str, value: Any) -> Any:
    """Take a leaf of a mask, or a mapping of such leaves, where numbers may stand for leaves."""
    if isinstance(value, Mapping):
        return {key: _factor(f"{name}[{key!r}]", leaf) for key, leaf in value.items()}
    if not isinstance(value, numbers.Real | Tensor):
        raise TypeError(
            f"{name} must be a tensor, or a number or True or False for all of it, got "
            f"{type(value).__name__}"
        )
    return torch.as_tensor(value)


def _half_width(name: str, value: float | Tensor | None) -> Tensor | None:
    return None if value is None else checks.hyperparameter(name, value, exclusive=True)


# In the order of signatures.
_CHECKS = {
    "nbeta": _Check(setting),
    "temperature": _Check(setting, 1.0),
    "localization": _Check(checks.hyperparameter, 0.0),
    "weight_decay": _Check(checks.hyperparameter, 0.0),
    "anchor": _Check(_anchor, None),
    "bounding_box_size": _Check(_half_width, None),
    "mask": _Check(_mask, None),
}


def build(
    sampler: Callable[..., T],
    lr: float | Tensor | Schedule,
    shared: SharedSettings,
    /,
    **own: Any,
) -> T:
    """Check the shared settings, and make a sampler of them and of its own.

    Args:
        sampler: The sampler's class.
        lr: Its step size.
        shared: As the factory was given them.
        **own: The sampler's own settings, checked: tensors, trees and nested `TensorClass`es of
            batch size `[]` or `[C]`, or None.

    Raises:
        TypeError: A setting is of the wrong type.
        ValueError: A value is out of its range, or per-chain settings differ in their number.
    """
    # A `TypedDict` is read by literal keys only.
    given: Mapping[str, Any] = shared
    checked = {
        name: each.check(name, given.get(name, each.default)) for name, each in _CHECKS.items()
    }
    # One batch size for all fields, as a `TensorClass` wants it.
    fields, chains = checks.per_chain({"lr": setting("lr", lr), **checked, **own})
    return sampler(**fields, batch_size=chains, lock=False)


def takes_shared_settings(factory: Callable[P, T]) -> Callable[P, T]:
    """Put the shared settings into a factory's signature and docstring, in place of `**shared`.

    A factory that names one of them itself keeps its own. A call with an unknown setting, or
    without a required one, is a TypeError that names the factory.
    """
    signature = inspect.signature(factory)
    *own, shared = signature.parameters.values()
    annotations = get_type_hints(SharedSettings)  # without `Required`, which a signature shows
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=annotations[name]
        )
        for name, each in _CHECKS.items()
        if name not in signature.parameters
    ]
    full = signature.replace(parameters=[*own, *added])
    required = [each.name for each in added if each.default is each.empty]

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        # Python's own words for it, which `**shared` has no occasion to say.
        for name in kwargs:
            if name not in full.parameters:
                raise TypeError(f"{factory.__name__}() got an unexpected keyword argument {name!r}")
        for name in required:
            if name not in kwargs:
                raise TypeError(
                    f"{factory.__name__}() missing 1 required keyword-only argument: {name!r}"
                )
        return factory(*args, **kwargs)

    # `help`, `inspect` and editors that run the code read this; type stubs do not know it.
    make.__signature__ = full  # type: ignore[attr-defined]
    make.__doc__ = _with_sentences(
        factory.__doc__ or "", shared.name, [each.name for each in added]
    )
    return make


def _with_sentences(doc: str, shared: str, names: list[str]) -> str:
    """A docstring whose entry for `**shared` has given way to one for each shared setting."""
    sentences = inspect.getdoc(SharedSettings) or ""
    # An entry ends where the next one begins, or with the text.
    entries = {
        name: re.search(rf"^    {name}: .*?(?=^    \w+: |\Z)", sentences, re.MULTILINE | re.DOTALL)
        for name in names
    }
    # The sentences stand at the class's indentation, an Args section one level deeper.
    text = "".join(entry.group().rstrip() + "\n" for entry in entries.values() if entry)
    indented = re.sub(r"^", "    ", text.rstrip("\n"), flags=re.MULTILINE)
    return re.sub(rf"^ +\*\*{shared}:.*?$(?:\n {{12,}}.*$)*", indented, doc, flags=re.MULTILINE)
