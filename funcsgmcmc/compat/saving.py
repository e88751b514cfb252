"""State dicts of tensors and plain values: saving and loading.

Objects (a prior, a preconditioner with its mask, a function for nbeta) are not saved. A user gives
them again to the new optimizer, and loading leaves them as they are.
"""

import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from funcsgmcmc.compat.groups import Group
from funcsgmcmc.compat.metrics import Metrics
from funcsgmcmc.compat.shards import sharded_state
from funcsgmcmc.compat.sketch import SketchBuffer

_OBJECT = object()  # not None, which is a plain value
_PUBLISHED_CENTER = re.compile(r"prior_center_(\d+)")


def leave_out_objects(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Drop all but tensors and plain values, so that `torch.load(weights_only=True)` works."""
    groups = [
        {
            name: value
            for name, given in group.items()
            if (value := _plain(given)) is not _OBJECT and not _is_setting(group, name)
        }
        for group in state_dict["param_groups"]
    ]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = sharded_state(state_dict["state"], params)
    return {**state_dict, "state": state, "param_groups": groups}


def restore_objects(group: Group, live: Group) -> None:
    """Copy the objects of a replaced group to the loaded one, and rebuild its reports."""
    for name, value in live.items():
        if isinstance(value, Metrics | SketchBuffer):
            saved = group.get(name)
            if isinstance(saved, dict):  # else saved without reports: the live ones go on
                value = type(value)(**saved).to(value.noise.device)
            group[name] = value
        elif name not in group or _plain(value) is _OBJECT or _is_setting(live, name):
            group[name] = value


def restore_dtypes(
    loaded: Mapping[Tensor, Any], params: list[Tensor], saved: Mapping[Any, Any]
) -> None:
    """Undo torch's cast of every loaded tensor to its parameter's dtype.

    Args:
        loaded: The optimizer's state.
        params: The parameters, in the order of the groups.
        saved: The state dict's state.
    """
    for index, param in enumerate(params):
        _restore_dtypes(loaded.get(param, {}), saved.get(index, {}))


def from_published(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with names of this package, of one that may be the published package's.

    There the centre of the i-th prior is `prior_center_i`; here the first is `prior_center`, and
    others have a compartment.
    """

    def renamed(entries: Any) -> Any:
        if not isinstance(entries, Mapping):
            return entries
        result: dict[str, Any] = {}
        for name, value in entries.items():
            place = _PUBLISHED_CENTER.fullmatch(str(name))
            if place is None:
                result[name] = value
            elif place[1] == "0":
                result["prior_center"] = value
            else:
                result[f"composite_prior_{place[1]}"] = {"prior_center": value}
        return result

    state = {index: renamed(entries) for index, entries in state_dict["state"].items()}
    return {**state_dict, "state": state}


def by_place(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose parameters are numbered in their order.

    Those of torch's distributed checkpoint have the model's names.
    """
    named = state_dict["state"]
    groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = {}
    for group in state_dict["param_groups"]:
        if not isinstance(group, Mapping) or "params" not in group:
            return dict(state_dict)  # which torch refuses
        places = range(len(state), len(state) + len(group["params"]))
        state |= {i: named.get(name) for i, name in zip(places, group["params"], strict=True)}
        groups.append({**group, "params": list(places)})
    state = {place: entries for place, entries in state.items() if entries is not None}
    return {**state_dict, "state": state, "param_groups": groups}


def check_state(
    optimizer: Optimizer, needed: Mapping[Tensor, list[str]], state_dict: Mapping[str, Any]
) -> None:
    """Check that a state dict has every entry that an optimizer needs.

    Args:
        optimizer: The optimizer that is about to load.
        needed: Names of the entries that each parameter's state must have.
        state_dict: The state dict to load.

    Raises:
        ValueError: The state dict lacks something, as after another method or without metrics or a
            box, or its sketches are of another size.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        saved = state_dict["state"].get(index, {})
        for name in needed[param]:
            if saved.get(name) is None:
                # Here, by name: a step would raise KeyError, or pull to zero for want of a centre.
                raise ValueError(
                    f"the state dict must hold {name!r} of parameter {index}, as this optimizer "
                    f"does, got {sorted(saved)}: make it with the same settings"
                )
    # Not strict: torch refuses another number of groups itself, in its own words.
    for live, group in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        if "sketches" in live and "sketches" in group:
            wanted, got = len(live["sketches"].noise), len(group["sketches"]["noise"])
            if wanted != got:
                raise ValueError(
                    f"the state dict's sketches must have {wanted} entries, got {got}: make it "
                    "with the same settings"
                )


def check_state_dict(state_dict: Any) -> None:
    """Check that a state dict has the parts of one.

    Raises:
        TypeError: It is no mapping.
        ValueError: A part is missing.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    for part in ("state", "param_groups"):
        if part not in state_dict:
            raise ValueError(
                f"state_dict must hold 'state' and 'param_groups', got {sorted(state_dict)}"
            )


def _is_setting(group: Group, name: str) -> bool:
    """Whether an entry is part of the group's preconditioner already: the mask of `SGMCMC`."""
    return name == "mask" and "preconditioner" in group


def _plain(value: Any) -> Any:
    """The form in which a group's value is saved; `_OBJECT` if it is not saved."""
    if isinstance(value, Metrics | SketchBuffer):
        # Their tensors, so that a resumed run still reports the last step.
        return dict(vars(value))
    if value is None or isinstance(value, bool | str | Tensor):
        return value
    if isinstance(value, Integral | Real):  # NumPy's too
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _OBJECT if any(item is _OBJECT for item in items) else type(value)(items)
    if isinstance(value, dict):
        plain = {key: _plain(item) for key, item in value.items()}
        return _OBJECT if any(item is _OBJECT for item in plain.values()) else plain
    return _OBJECT


def _restore_dtypes(loaded: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        now = loaded.get(name)
        if isinstance(value, Mapping) and isinstance(now, dict):
            _restore_dtypes(now, value)
        elif isinstance(value, Tensor) and isinstance(now, Tensor) and value.dtype != now.dtype:
            # A float32 centre of a bfloat16 parameter comes back exact, or the chain would differ;
            # a copy, as steps write to the state in place and the saved tensor is the caller's.
            exact = value.detach().to(now.device, copy=True)
            if torch.equal(exact.to(now.dtype), now):  # and no hook has changed it
                loaded[name] = exact
