"""Plain forms of samplers, states and memories, for files that hold tensors and plain values only.

What is written by these functions is read by `torch.load(…, weights_only=True)`: a file names
classes and runs no code. A class is found by its name among those of this library, and those that
the program has imported.
"""

import contextlib
import hashlib
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import shards, tree
from funcsgmcmc.gradients import ControlPoint

_CLASS = "class of tensors"
_ROWS = "rows"
_TREE = "tree"
_LIBRARY = "funcsgmcmc."
_TUPLES = {"ControlPoint": ControlPoint}


def encode(name: str, value: Any) -> Any:
    """The plain form of a value: tensors, numbers, strings, None, lists and dicts of them.

    Args:
        name: What the value is, for errors.
        value: Tensors, parameter trees, tensor classes (samplers, states), control points, plain
            values; lists, tuples and dicts of them.

    Raises:
        TypeError: It holds something else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        # A copy, since a file of a view holds all that it is a view of.
        return value.detach().cpu().clone()
    if is_tensorclass(value):
        fields = {field: getattr(value, field) for field in value.__dataclass_fields__}
        return {
            _CLASS: _name_of(type(value)),
            "fields": {field: encode(f"{name}.{field}", each) for field, each in fields.items()},
            "batch_size": list(value.batch_size),
        }
    if isinstance(value, TensorDictBase):
        # With trees that have no leaves, as some preconditioners' averages.
        items = [[key, encode(f"{name}[{key!r}]", each)] for key, each in value.items()]
        return {_TREE: items, "batch_size": list(value.batch_size)}
    if isinstance(value, ControlPoint):
        return {"tuple": "ControlPoint", "values": [encode(name, each) for each in value]}
    if isinstance(value, list | tuple):
        return {"list": [encode(name, each) for each in value], "is_tuple": type(value) is tuple}
    if isinstance(value, dict):
        return {"dict": [[key, encode(f"{name}[{key!r}]", each)] for key, each in value.items()]}
    raise TypeError(
        f"{name} must consist of tensors, numbers and strings to be stored, got "
        f"{type(value).__name__}"
    )


def decode(value: Any, device: torch.device | None = None) -> Any:
    """The value of a plain form, with its tensors on a device.

    Raises:
        ValueError: It names a class that is not of this library, and that the program has not
            imported.
    """
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if not isinstance(value, dict):
        return value
    if _ROWS in value:
        return joined([picked(decode(each, device), slice(*cut)) for each, cut in value[_ROWS]])
    if _CLASS in value:
        fields = {name: decode(each, device) for name, each in value["fields"].items()}
        made: Any = _class_of(value[_CLASS])
        return made(**fields, batch_size=value["batch_size"], lock=False)
    if _TREE in value:
        items = {name: decode(each, device) for name, each in value[_TREE]}
        return TensorDict(items, batch_size=value["batch_size"])
    if "tuple" in value:
        return _TUPLES[value["tuple"]](*(decode(each, device) for each in value["values"]))
    if "list" in value:
        values = [decode(each, device) for each in value["list"]]
        return tuple(values) if value["is_tuple"] else values
    return {key: decode(each, device) for key, each in value["dict"]}


def rows_of(parts: Sequence[tuple[Any, slice]]) -> Any:
    """The plain form of some rows of values, one after the other, which are cut when it is decoded.

    Args:
        parts: Plain forms, whose tensors have one first dimension, each with the rows of it.
    """
    return {_ROWS: [[form, [rows.start, rows.stop]] for form, rows in parts]}


def picked(value: Any, rows: slice | int) -> Any:
    """Rows of all tensors and trees in a value, along their first dimension."""

    def of_leaf(leaf: Any) -> Any:
        return leaf[rows] if _is_whole(leaf) else leaf

    return pytree.tree_map(of_leaf, value, is_leaf=_is_whole)


def with_chain(value: Any) -> Any:
    """The value of one chain, with a dimension for it."""
    return pytree.tree_map(
        lambda leaf: leaf.unsqueeze(0) if _is_whole(leaf) else leaf, value, is_leaf=_is_whole
    )


def joined(values: list[Any]) -> Any:
    """Values of some rows, as one."""
    if len(values) == 1:
        return values[0]

    def of_leaves(*leaves: Any) -> Any:
        return torch.cat(leaves) if _is_whole(leaves[0]) else leaves[0]

    return pytree.tree_map(of_leaves, *values, is_leaf=_is_whole)


def _is_whole(value: Any) -> bool:
    """Whether a value is cut along its first dimension, as one."""
    return isinstance(value, Tensor | TensorDictBase) or is_tensorclass(value)


def digest(value: Any) -> str:
    """A digest of a tensor's dtype, shape and values, all parts included, or of a plain value."""
    if isinstance(value, Tensor) and shards.is_sharded(value):
        value = shards.of_all_parts(digest(shards.local(value)), value)
    found = hashlib.sha256()
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{list(value.shape)}".encode())
        values: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(values)
    else:
        found.update(repr(value).encode())
    return found.hexdigest()[:16]


def digests(name: str, value: Any) -> dict[str, str]:
    """Digests of the parts of a value, by their dotted names."""
    if is_tensorclass(value):
        found = {name: _name_of(type(value))}
        for field in value.__dataclass_fields__:
            found |= digests(f"{name}.{field}", getattr(value, field))
        return found
    if isinstance(value, TensorDictBase):
        return {f"{name}[{tree.dotted(key)!r}]": digest(leaf) for key, leaf in tree.leaves(value)}
    return {name: digest(value)}


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _class_of(name: str) -> type:
    """The tensor class of a name.

    Raises:
        ValueError: None of the classes that were imported has it.
    """
    if name.startswith(_LIBRARY):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name.rpartition(".")[0])
    waiting = [TensorClass]
    while waiting:
        kind = waiting.pop()
        if _name_of(kind) == name:
            return kind
        waiting += kind.__subclasses__()
    raise ValueError(f"the stored class {name} must be imported before its run is opened")
