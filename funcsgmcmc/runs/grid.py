"""The grid of a sweep: axes of settings, the cells that they span, and the chains of these.

An axis has labels, numbers or names, each of which stands for settings: those of the sampler's
factory; `params`, where a cell's chains start; `only`, the parameters that are sampled; and
`initial_loss`, L(w₀). A cell is one label of each axis, and a group of K chains.
"""

import inspect
import itertools
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.modules import select
from funcsgmcmc.samplers.base import Sampler, check_sampler

Label = float | str
Cell = dict[str, Label]
Grid = Mapping[str, Any]
Factory = Callable[..., Sampler]

# Settings of a cell that are no settings of its sampler.
_OF_CELLS = ("params", "only", "initial_loss")
_TREES = ("params", "anchor", "mask")


@dataclass(frozen=True)
class Axis:
    """An axis of a grid.

    Attributes:
        name: Its name.
        settings: The settings that each label stands for.
        is_named: Whether its labels are names, which have no order or distance.
    """

    name: str
    settings: dict[Label, Mapping[str, Any]]
    is_named: bool

    def __post_init__(self) -> None:
        # Names of cells tell them apart.
        names = [name_of({self.name: label}) for label in self.settings]
        if len(set(names)) < len(names):
            raise ValueError(
                f"grid[{self.name!r}] must hold values that differ in their first six digits, got "
                f"{list(self.settings)}"
            )

    def of(self, label: Label) -> Mapping[str, Any]:
        """The settings of a label; a number that the axis lacks stands for itself.

        Raises:
            ValueError: It is a name that the axis lacks.
        """
        if label in self.settings:
            return self.settings[label]
        if self.is_named or isinstance(label, str):
            raise ValueError(
                f"grid[{self.name!r}] must name {label!r}, of which the sweep has cells, got "
                f"{', '.join(map(str, self.settings))}"
            )
        return {self.name: label}


class Chains(NamedTuple):
    """The chains of some cells, as `sample` takes them.

    Attributes:
        sampler: Of batch size `[]` or `[C]`.
        params: Where they start, of batch size `[]` or `[C]`.
        initial_loss: L(w₀), `[]` or `[C]`; None where it is to be evaluated.
    """

    sampler: Sampler
    params: TensorDict
    initial_loss: Tensor | None


def axes_of(grid: Any, factory: Factory) -> dict[str, Axis]:
    """Take the grid given to `sweep`.

    Args:
        grid: Name to values. A name that is a setting has numbers (one, a list, a tensor), or a
            mapping of names to that setting's values. Any other name has a mapping of names to
            settings that go together.
        factory: The sampler's, which says what settings there are.

    Raises:
        TypeError: The grid, or an axis, is of another type.
        ValueError: An axis is empty or has a label twice, or a name is no setting.
    """
    if isinstance(factory, Sampler):
        raise TypeError(
            "factory must be a function that makes samplers, such as sgld itself, got a sampler: "
            "its settings are those of grid, each a number or a list"
        )
    checks.function("factory", factory)
    if not isinstance(grid, Mapping) or isinstance(grid, TensorDictBase):
        raise TypeError(f"grid must map settings to their values, got {type(grid).__name__}")
    if not grid:
        raise ValueError("grid must have at least one setting, got none")
    known = _settings_of(factory)
    axes = {name: _axis(name, values, known) for name, values in grid.items()}
    owners: dict[str, str] = {}
    for name, axis in axes.items():
        for setting in set().union(*axis.settings.values()):
            if owners.setdefault(setting, name) != name:
                raise ValueError(
                    f"grid must give each setting by one axis, got {setting} by "
                    f"{owners[setting]!r} and {name!r}"
                )
    if "only" in owners and "mask" in owners:
        raise ValueError(
            "grid must give only or mask, got both, each of which says what is sampled"
        )
    return axes


def cells_of(axes: Mapping[str, Axis]) -> list[Cell]:
    """All cells of a grid, of which the last axis changes fastest."""
    labels = itertools.product(*(axis.settings for axis in axes.values()))
    return [dict(zip(axes, each, strict=True)) for each in labels]


def name_of(cell: Mapping[str, Label]) -> str:
    """A cell's name, as people read it."""
    return ", ".join(
        f"{name}={label}" if isinstance(label, str) else f"{name}={label:g}"
        for name, label in cell.items()
    )


def chains_of(
    cells: Sequence[Cell],
    axes: Mapping[str, Axis],
    params: TensorDict,
    factory: Factory,
    chains_per_cell: int,
) -> Chains:
    """Make the chains of some cells, K of each, one cell after the other.

    Raises:
        TypeError, ValueError: A setting is refused by the factory, differs in kind between cells,
            or is a tree that does not fit the parameters.
    """
    settings = [_settings(cell, axes) for cell in cells]
    starts = [_start(each, params) for each in settings]
    index = torch.arange(len(cells)).repeat_interleave(chains_per_cell)
    given: dict[str, Any] = {
        name: _per_chain(name, [each[name] for each in settings], index)
        for name in _common_names(cells, settings)
    }
    if any("params" in each for each in settings):
        given["params"] = _stacked(starts)[index]
    if any("anchor" in each for each in settings):
        anchors = [
            _tree_like("anchor", each.get("anchor", start), start)
            for each, start in zip(settings, starts, strict=True)
        ]
        given["anchor"] = _shared_or_stacked(anchors, index)
    masks = [_mask(each, params) for each in settings]
    if any(masks):
        given["mask"] = _shared_or_stacked(_complete_masks(masks, params), index)
    start = given.pop("params", params)
    initial_loss = given.pop("initial_loss", None)
    if initial_loss is not None:
        initial_loss = torch.as_tensor(initial_loss, dtype=torch.float64)
    try:
        sampler = factory(**given)
    except Exception as error:
        error.add_note(f"This happened when the factory was called with {', '.join(given)}.")
        raise
    check_sampler(sampler)
    return Chains(sampler, start, initial_loss)


def _settings_of(factory: Factory) -> set[str] | None:
    """Names of a factory's settings; None if it takes any."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:  # a class of C, for instance
        raise TypeError(f"factory must be one such as sgld, got {factory!r}") from error
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return {each.name for each in parameters}


def _axis(name: Any, values: Any, known: set[str] | None) -> Axis:
    """Take an axis of a grid; arguments as `axes_of`."""
    checks.instance("a name of grid", name, str)
    where = f"grid[{name!r}]"
    is_tree = name in _TREES
    is_setting = name in _OF_CELLS or is_tree or known is None or name in known
    if isinstance(values, Mapping) and not isinstance(values, TensorDictBase):
        return _named_axis(
            name, values, known, is_setting and not _are_bundles(name, values, known)
        )
    if is_tree or not is_setting:
        wanted = f"names to trees, each {name}" if is_tree else "names to settings that go together"
        reason = "" if is_tree else f", since {name!r} is no setting of the factory"
        raise TypeError(f"{where} must map {wanted}{reason}, got {type(values).__name__}")
    if name == "only":
        return _patterns(where, values)
    labels = [_number(where, value) for value in _listed(where, values)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{where} must hold each value once, got {labels}")
    return Axis(name, {label: {name: label} for label in labels}, False)


def _are_bundles(name: str, values: Mapping[Any, Any], known: set[str] | None) -> bool:
    """Whether an axis is of settings that go together, where the factory takes any setting."""
    is_free = known is None and name not in (*_OF_CELLS, *_TREES)
    return is_free and all(_is_plain_mapping(value) for value in values.values())


def _is_plain_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and not isinstance(value, TensorDictBase)


def _named_axis(
    name: str, values: Mapping[Any, Any], known: set[str] | None, is_setting: bool
) -> Axis:
    """The axis of a mapping of names to values of a setting, or to settings that go together.

    Raises:
        TypeError, ValueError: It is of something else.
    """
    where = f"grid[{name!r}]"
    if not values:
        raise ValueError(f"{where} must have at least one value, got none")
    for label, value in values.items():
        checks.instance(f"a name in {where}", label, str)
        if name in _TREES:
            if not isinstance(value, Mapping | TensorDictBase):
                raise TypeError(f"{where}[{label!r}] must be a tree, got {type(value).__name__}")
        elif not is_setting:
            _check_bundle(f"{where}[{label!r}]", value, known)
    return Axis(
        name,
        {label: {name: value} if is_setting else dict(value) for label, value in values.items()},
        True,
    )


def _check_bundle(where: str, settings: Any, known: set[str] | None) -> None:
    """Refuse settings that go together which are none, or unknown.

    Raises:
        TypeError: They are no mapping.
        ValueError: One is unknown, or there are none.
    """
    if not _is_plain_mapping(settings):
        raise TypeError(
            f"{where} must map settings to values, such as {{'params': tree}}, got "
            f"{type(settings).__name__}"
        )
    if not settings:
        raise ValueError(f"{where} must give at least one setting, got none")
    for name in settings:
        if known is not None and name not in known and name not in _OF_CELLS:
            listed = ", ".join([*_OF_CELLS, *sorted(known)])
            raise ValueError(f"{where} must give settings of {listed}, got {name!r}")


def _patterns(where: str, values: Any) -> Axis:
    """The axis of parameters that are sampled, by patterns, which are its labels."""
    patterns = [values] if isinstance(values, str) else values
    if not isinstance(patterns, list | tuple) or not patterns:
        raise TypeError(
            f"{where} must be a list of patterns, or map names to what params_of takes as only, "
            f"got {type(values).__name__}"
        )
    for pattern in patterns:
        checks.instance(f"a pattern of {where}", pattern, str)
    return Axis("only", {pattern: {"only": pattern} for pattern in patterns}, True)


def _listed(where: str, values: Any) -> Collection[Any]:
    """The values of an axis: a number alone is one."""
    if isinstance(values, Tensor):
        checks.real_values(where, values)
        values = values.tolist()
    elif hasattr(values, "tolist"):  # an array of NumPy
        values = values.tolist()
    listed = values if isinstance(values, list | tuple) else [values]
    if not listed:
        raise ValueError(f"{where} must have at least one value, got none")
    return listed


def _number(where: str, value: Any) -> float:
    """A number of an axis.

    Raises:
        TypeError: It is none.
        ValueError: It is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{where} must hold numbers, or map names to values, got {type(value).__name__}"
        )
    checks.finite_number(where, value)
    return float(value)


def _settings(cell: Cell, axes: Mapping[str, Axis]) -> dict[str, Any]:
    """All settings of a cell."""
    return {
        setting: value
        for name, label in cell.items()
        for setting, value in axes[name].of(label).items()
    }


def _common_names(cells: Sequence[Cell], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are no trees, which all cells must have.

    Raises:
        ValueError: A cell lacks one that another has.
    """
    names = dict.fromkeys(name for each in settings for name in each)
    plain = [name for name in names if name not in (*_TREES, "only")]
    for cell, each in zip(cells, settings, strict=True):
        for name in plain:
            if name not in each:
                raise ValueError(
                    f"grid must give {name} to all cells or to none, but {name_of(cell)} lacks it"
                )
    return plain


def _per_chain(name: str, values: Sequence[Any], index: Tensor) -> Any:
    """A setting of all chains: shared if it is the same in all cells, else stacked.

    Args:
        name: Its name.
        values: One for each cell.
        index: The cell of each chain, `[C]`.

    Raises:
        TypeError: Values differ that cannot be stacked.
    """
    first = values[0]
    if all(value is first for value in values):
        return first
    if all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values):
        if all(value == first for value in values):
            return first
        are_integers = all(isinstance(value, int) for value in values)
        dtype = torch.int64 if are_integers else torch.float64
        return torch.tensor(values, dtype=dtype)[index]
    if all(is_tensorclass(value) and type(value) is type(first) for value in values):
        return torch.stack(list(values))[index]
    if all(type(value) is type(first) and isinstance(value, str) for value in values) and (
        len(set(values)) == 1
    ):
        return first
    kinds = ", ".join(dict.fromkeys(type(value).__name__ for value in values))
    raise TypeError(
        f"grid must give numbers to {name}, or schedules or preconditioners of one kind, where "
        f"cells differ in it, got {kinds}: sweep over the others one by one"
    )


def _start(settings: Mapping[str, Any], params: TensorDict) -> TensorDict:
    """Where the chains of a cell start."""
    return _tree_like("params", settings.get("params", params), params)


def _tree_like(name: str, value: Any, params: TensorDict) -> TensorDict:
    """A tree of a cell, of the structure of the parameters and without a batch size.

    Raises:
        TypeError, ValueError: It is another.
    """
    taken = tree.parameters(value, name)
    if taken.batch_size:
        raise ValueError(
            f"{name} of a cell must be one tree, got batch size {tuple(taken.batch_size)}"
        )
    tree.check_same_structure(name, taken, params)
    tree.check_same_dtypes(name, taken, params)
    return taken


def _stacked(trees: Sequence[TensorDict]) -> TensorDict:
    """Trees of one structure, `[cells]` of them."""
    return cast(TensorDict, torch.stack(list(trees)))


def _shared_or_stacked(trees: Sequence[TensorDict], index: Tensor) -> TensorDict:
    """Trees of all chains, one if it is the same in all cells."""
    return trees[0] if all(each is trees[0] for each in trees) else _stacked(trees)[index]


def _mask(settings: Mapping[str, Any], params: TensorDict) -> dict[tree.Name, Tensor]:
    """The mask of a cell by the leaves that it names; none if all is sampled."""
    if "only" in settings:
        named = {tree.dotted(name): leaf for name, leaf in tree.leaves(params)}
        chosen = select(named, {name: name for name in named}, settings["only"])
        return {
            name: torch.tensor(float(tree.dotted(name) in chosen)) for name in tree.names(params)
        }
    given = settings.get("mask")
    if given is None:
        return {}
    if not isinstance(given, TensorDictBase):
        given = TensorDict(dict(_leaves_of_mask(given)))
    tree.check_same_structure("mask", given, params, partial=True)
    return dict(tree.leaves(given))


def _leaves_of_mask(mask: Mapping[str, Any], prefix: str = "mask") -> Iterator[tuple[str, Any]]:
    """The leaves of a mask, where a number may stand for all of a leaf.

    Raises:
        TypeError: One is neither number nor tensor.
    """
    for name, value in mask.items():
        where = f"{prefix}[{name!r}]"
        if isinstance(value, Mapping):
            yield name, dict(_leaves_of_mask(value, where))
        elif isinstance(value, Tensor | numbers.Real):
            yield name, torch.as_tensor(value)
        else:
            raise TypeError(f"{where} must be a tensor or a number, got {type(value).__name__}")


def _complete_masks(
    masks: Sequence[Mapping[tree.Name, Tensor]], params: TensorDict
) -> list[TensorDict]:
    """Masks of one structure: a value for a leaf where none has more, else one for each entry."""
    leaves: dict[tree.Name, list[Tensor]] = {}
    one = torch.tensor(1.0)
    for name, leaf in tree.leaves(params):
        of_cells = [mask.get(name, one).to(tree.working_dtype(leaf)) for mask in masks]
        is_whole = all(not each.ndim for each in of_cells)
        leaves[name] = [each if is_whole else each.expand(leaf.shape) for each in of_cells]
    return [
        tree.build({name: each[row] for name, each in leaves.items()}, torch.Size())
        for row in range(len(masks))
    ]
