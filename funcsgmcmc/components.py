"""Parts of a network that are sampled while the rest stays where it is.

    restricted(w_C) = f(w*, with w_C in place of the component's entries)

Shapes: a leaf `[*shape]`, of which a component has k entries along one dimension, or all. Only
these entries are in the tree that is sampled. The rest is held once, whatever the number of chains:
under `torch.vmap` it has no dimension of chains, so that what depends on it alone is computed once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.modules import Selection, select

Index = slice | Tensor | bool
Entries = Index | tuple[Index, ...]
Component = Selection | Mapping[str, Entries]
"""A selection of whole leaves, as `params_of` takes it; or entries by the names of leaves: `True`
for all, or an index of the leaf in which one dimension is cut by a slice or by indices."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Entries of a leaf along one dimension.

    Attributes:
        dim: The dimension.
        index: Which of its entries, int64 `[k]`, each once.
    """

    dim: int
    index: Tensor

    def of(self, leaf: Tensor) -> Tensor:
        """The entries of a leaf, a copy."""
        return leaf.index_select(self.dim, self.index.to(leaf.device))

    def put(self, leaf: Tensor, entries: Tensor) -> Tensor:
        """The leaf with other entries in their place; it is not changed."""
        return leaf.index_copy(self.dim, self.index.to(leaf.device), entries)


class Restricted(NamedTuple):
    """A function of a component, and the component's own parameters.

    Attributes:
        function: The function that was restricted; its first argument is a tree like `params`.
        params: The component's parameters: whole leaves, or parts of them, under their names.
    """

    function: "RestrictedFunction"
    params: TensorDict


def restrict(
    function: Callable[..., Any],
    params: TensorDictBase | Mapping[str, Tensor],
    component: Component,
) -> Restricted:
    """Restrict a loss to a component of a network: the rest stays at the given parameters.

        loss_fn, start = restrict(loss_fn, params_of(model), "blocks.3.*")
        samples = sample(loss_fn, start, data, …)

    What chains hold, their states, gradients, noise and draws, has the size of the component.
    Frozen leaves are not copied. A leaf of which some rows are sampled is put together at each
    evaluation.

    Args:
        function: Any function whose first argument is a parameter tree: a loss `(params, batch)`, a
            log-prior, or an observable `(params)`, such as `losses_on` makes. An estimator of the
            gradient goes around it: `control_variates(restrict(loss, …).function)`.
        params: w*, all parameters of one chain: `params_of(model)`.
        component: Which of them are sampled. Patterns of names, or a function of a name and its
            leaf, as for `params_of`. Or a dict of the names of leaves, each with `True`, or with an
            index that cuts one dimension: `{"attention.q.weight": slice(0, 8)}` its first rows,
            `(slice(None), slice(0, 8))` its first columns, a tensor of indices in place of a slice
            some others. `decoders.components_of(model)` has those of a language model.

    Returns:
        The restricted function and the component's parameters, copies. A leaf of which some rows
        are sampled has the shape of these rows, and its own name.

    Raises:
        TypeError: An argument is not of the types above.
        ValueError: The component has no entry, or an unknown name; an index is out of range, or
            cuts more dimensions than one.
    """
    checks.function("function", function)
    if hasattr(function, "prepare"):
        raise TypeError(
            "function must be a loss, got an estimator of its gradient: restrict the loss, and "
            f"give restrict(loss, …).function to {type(function).__name__}"
        )
    whole = tree.parameters(params)
    if whole.batch_size:
        raise ValueError(f"params must be those of one chain, got {tuple(whole.batch_size)}")
    shards.refuse("restrict", whole)
    tree.check_finite("params", whole)
    frozen = {tree.dotted(name): leaf.detach() for name, leaf in tree.leaves(whole)}
    cuts = _cuts_of(component, frozen)
    start = {
        name: frozen[name].clone() if cut is None else cut.of(frozen[name])
        for name, cut in cuts.items()
    }
    return Restricted(RestrictedFunction(function, whole, cuts), TensorDict(start))


class RestrictedFunction:
    """A function of a component's parameters; see `restrict`.

    An object rather than a closure, so that it can be pickled with what it holds.
    """

    def __init__(
        self, function: Callable[..., Any], params: TensorDict, cuts: Mapping[str, Cut | None]
    ) -> None:
        self._function, self._cuts = function, cuts
        self._names = {tree.dotted(name): name for name in tree.names(params)}
        self._frozen = {tree.dotted(name): leaf.detach() for name, leaf in tree.leaves(params)}

    def fixed(self, sampled: Any) -> dict[str, Any]:
        """What the function is made of beside the sampled parameters, by name."""
        # A leaf that is sampled as a whole has no value of its own here.
        kept = {
            f"the frozen params[{name!r}]": leaf
            for name, leaf in self._frozen.items()
            if name not in self._cuts or self._cuts[name] is not None
        }
        inner = getattr(self._function, "fixed", None)
        return kept | ({} if inner is None else inner(self._names))

    def whole(self, params: TensorDictBase | Mapping[str, Tensor]) -> TensorDict:
        """All parameters: those given in place of the component's, the others as they are.

        Raises:
            ValueError: A name is not in the component, or missing, or a shape is another.
        """
        given = {tree.dotted(name): leaf for name, leaf in tree.leaves(TensorDict(dict(params)))}
        if given.keys() != self._cuts.keys():
            raise ValueError(
                f"params must have the leaves of the component, {', '.join(self._cuts)}, "
                f"got {', '.join(given)}"
            )
        return tree.build(
            {
                self._names[name]: leaf if name not in given else self._with(name, given[name])
                for name, leaf in self._frozen.items()
            },
            torch.Size(),
        )

    def __call__(self, params: TensorDict, *args: Any) -> Any:
        """The function at all parameters."""
        return self._function(self.whole(params), *args)

    def _with(self, name: str, leaf: Tensor) -> Tensor:
        cut, frozen = self._cuts[name], self._frozen[name]
        shape = frozen.shape
        if cut is not None:
            shape = torch.Size([*shape[: cut.dim], len(cut.index), *shape[cut.dim + 1 :]])
        if leaf.shape != shape:
            raise ValueError(
                f"params[{name!r}] has shape {tuple(leaf.shape)}, the component's has "
                f"{tuple(shape)}"
            )
        return leaf if cut is None else cut.put(frozen, leaf.to(frozen.dtype))


def _cuts_of(component: Any, leaves: Mapping[str, Tensor]) -> dict[str, Cut | None]:
    """The entries of a component by the names of leaves, None for all, in the leaves' order.

    Raises:
        TypeError, ValueError: As `restrict`.
    """
    if not isinstance(component, Mapping):
        if component is None:
            raise TypeError("component must be patterns, a function or a dict, got None")
        try:
            selected = select(leaves, {name: name for name in leaves}, component, "component")
        except Exception as error:
            if callable(component):
                error.add_note("This happened when component(name, leaf) was called.")
            raise
        return {name: None for name in leaves if name in selected}
    if not component:
        raise ValueError("component must name at least one leaf, got none")
    for name in component:
        if name not in leaves:
            known = ", ".join(leaves)
            raise ValueError(f"component has unknown leaf {name!r}; parameters are {known}")
    return {
        name: _cut_of(name, component[name], leaf)
        for name, leaf in leaves.items()
        if name in component
    }


def _cut_of(name: str, entries: Any, leaf: Tensor) -> Cut | None:
    """The entries of a leaf; None if they are all.

    Raises:
        TypeError, ValueError: As `restrict`.
    """
    label = f"component[{name!r}]"
    if entries is True:
        return None
    parts = entries if isinstance(entries, tuple) else (entries,)
    if len(parts) > leaf.ndim:
        raise ValueError(
            f"{label} must index {leaf.ndim} dimensions at most, got {len(parts)} indices"
        )
    cuts = []
    for dim, part in enumerate(parts):
        index = _indices(label, part, leaf.shape[dim])
        if len(index) < leaf.shape[dim] or not bool((index == torch.arange(len(index))).all()):
            cuts.append(Cut(dim, index))
    if len(cuts) > 1:
        raise ValueError(f"{label} must cut one dimension, got {len(cuts)} that are cut")
    return cuts[0] if cuts else None


def _indices(label: str, part: Any, size: int) -> Tensor:
    """Indices along a dimension, int64, each once.

    Raises:
        TypeError, ValueError: As `restrict`.
    """
    everything = torch.arange(size)
    if isinstance(part, slice):
        index = everything[part] if part.step is None or part.step > 0 else everything[:0]
    elif isinstance(part, Tensor) and part.ndim == 1 and not part.is_meta:
        if part.dtype == torch.bool and len(part) != size:
            raise ValueError(f"{label} must have {size} booleans, got {len(part)}")
        if part.is_floating_point() or part.is_complex():
            raise TypeError(f"{label} must hold indices or booleans, got {part.dtype}")
        given = part.cpu()
        index = given.nonzero().flatten() if given.dtype == torch.bool else given.long()
    else:
        raise TypeError(
            f"{label} must be True, a slice, a tensor of indices or a tuple of these, got "
            f"{type(part).__name__}"
        )
    if not len(index):
        raise ValueError(f"{label} must have at least one entry, got none")
    if not bool(((index >= -size) & (index < size)).all()):
        raise ValueError(f"{label} must be within {size} entries, got {index.tolist()}")
    index = index % size
    if len(index.unique()) < len(index):
        raise ValueError(f"{label} must name each entry once, got {index.tolist()}")
    return index
