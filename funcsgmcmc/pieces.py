"""Updates of large models, and of many leaves, piece by piece.

An update of a whole tree makes a tree of every term: three to eight copies of the parameters. Where
entries move by themselves (`Sampler.is_entrywise`), it can be made for some of them at a time, by
the sampler's own lines and to the same values. Terms then take the memory of a piece, which the
cache holds; a gradient is dropped as soon as it is used; and a piece of small leaves is one vector,
so that thousands of leaves take little more time than their gradients.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor

from funcsgmcmc import shards, tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.base import Sampler, State

# Entries of a piece, all chains together: a term takes 4 MiB.
_PIECE = 1 << 20
# Leaves of fewer entries a chain are put into one vector.
_SMALL_LEAF = 1 << 14
# Trees of fewer entries and fewer leaves are updated as a whole.
_LARGE_TREE, _MANY_LEAVES = 1 << 22, 64


@dataclass(frozen=True)
class Piece:
    """Entries of a tree that follow one another in the flat layout.

    Attributes:
        shapes: Names of the leaves, and their whole shapes without the chains; of sharded ones,
            those of the parts that are here.
        is_flat: Whether they are small leaves, which are updated as one vector.
        rows: Of one large leaf, the rows of its first dimension; None for all entries.
        sharded: Those of the leaves that are sharded, all over the same processes.
    """

    shapes: dict[tree.Name, torch.Size]
    is_flat: bool = False
    rows: slice | None = None
    sharded: dict[tree.Name, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of entries of a chain."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        if self.rows is None:
            return sum(sizes.values())
        ((name, shape),) = self.shapes.items()
        return sizes[name] // shape[0] * (self.rows.stop - self.rows.start)

    def of(self, whole: Any) -> Any:
        """The piece of a sampler, a state or an evaluation.

        Its trees with the parameters' names are cut to the piece, and all else is left.
        """
        if is_tensorclass(whole):
            # `replace` would merge a cut tree into the whole one.
            return _rebuilt(whole, {name: self.of(value) for name, value in _fields(whole).items()})
        if isinstance(whole, Evaluation):
            return replace(whole, **{name: self.of(value) for name, value in vars(whole).items()})
        return self._cut(whole) if isinstance(whole, TensorDictBase) else whole

    def _cut(self, whole: TensorDict) -> TensorDict:
        found = {name: self._here(name, whole.get(name, None)) for name in self.shapes}
        # A mask may lack leaves, and have one value for a leaf.
        given = {name: leaf for name, leaf in found.items() if isinstance(leaf, Tensor)}
        if not given:
            # Moments, for instance, are trees beside one another in a tree.
            parts = {name: self.of(value) for name, value in whole.items()}
            return TensorDict(parts, whole.batch_size)
        chains = whole.batch_dims
        if self.rows is not None:
            ((name, leaf),) = given.items()
            if leaf.ndim > chains:
                leaf = leaf.narrow(chains, self.rows.start, self.rows.stop - self.rows.start)
            return tree.build({name: leaf}, whole.batch_size)
        if not self.is_flat:
            return tree.build(given, whole.batch_size)
        one = next(iter(given.values())).new_ones(())
        vectors = [
            leaf.flatten(chains)
            if (leaf := given.get(name, one)).ndim > chains
            else _spread(leaf, whole.batch_size + shape, chains)
            for name, shape in self.shapes.items()
        ]
        return tree.build({next(iter(self.shapes)): torch.cat(vectors, -1)}, whole.batch_size)

    def _here(self, name: tree.Name, leaf: Any) -> Any:
        """The part of a leaf that this process has."""
        param = self.sharded.get(name)
        return (
            shards.part_of(leaf, param) if isinstance(leaf, Tensor) and param is not None else leaf
        )

    def write(self, part: TensorDict, leaves: dict[tree.Name, Tensor]) -> None:
        """Put the piece of a tree, which `of` made and a step changed, among its whole leaves."""
        chains = part.batch_size
        if self.rows is not None:
            ((name, rows),) = tree.leaves(part)
            if name not in leaves:
                # Made from a part, so that under vmap it is batched as the parts are.
                leaves[name] = rows.new_empty(chains + self.shapes[name])
            length = self.rows.stop - self.rows.start
            leaves[name].narrow(len(chains), self.rows.start, length).copy_(rows)
        elif not self.is_flat:
            leaves.update(tree.leaves(part))
        else:
            ((_, vector),) = tree.leaves(part)
            sizes = [math.prod(shape) for shape in self.shapes.values()]
            vectors = vector.split(sizes, -1)
            for (name, shape), row in zip(self.shapes.items(), vectors, strict=True):
                leaves[name] = row.reshape(chains + shape)


def _spread(value: Tensor, shape: torch.Size, num_chain_dims: int) -> Tensor:
    """A leaf's one value, for all of its entries, as a vector of each chain."""
    value = value.reshape(value.shape + (1,) * (len(shape) - value.ndim))
    return value.expand(shape).reshape(*shape[:num_chain_dims], -1)


def pieces_of(sampler: Sampler, params: TensorDict) -> list[Piece]:
    """The pieces in which a sampler updates a tree; none if it updates it as a whole.

    Args:
        sampler: It says whether it is entrywise.
        params: The tree, of batch size `[*chains]`; large, or of many leaves.
    """
    named = list(tree.leaves(params))
    # Asked of whole leaves, so that all processes answer alike.
    is_worthwhile = (
        len(named) >= _MANY_LEAVES or sum(leaf.numel() for _, leaf in named) >= _LARGE_TREE
    )
    if not (is_worthwhile and sampler.is_entrywise()):
        return []
    pieces: list[Piece] = []
    kind: tuple[Any, ...] | None = None
    size = 0
    for name, whole in named:
        leaf, spread = shards.local(whole), shards.spread_of(whole)
        sharded = {name: whole} if shards.is_sharded(whole) else {}
        shape = leaf.shape[params.batch_dims :]
        if leaf.numel() > _PIECE and shape:
            number = min(shape[0], math.ceil(leaf.numel() / _PIECE))
            bounds = [shape[0] * i // number for i in range(number + 1)]
            rows = (slice(bounds[i], bounds[i + 1]) for i in range(number))
            pieces += [Piece({name: shape}, rows=each, sharded=sharded) for each in rows]
            kind = None
            continue
        size += leaf.numel()
        is_small = math.prod(shape) < _SMALL_LEAF
        # A vector has one dtype.
        if (is_small, leaf.dtype, spread) != kind or size > _PIECE:
            kind, size = (is_small, leaf.dtype, spread), leaf.numel()
            pieces.append(Piece({}, is_flat=is_small))
        pieces[-1].shapes[name] = shape
        pieces[-1].sharded.update(sharded)
    return pieces


def update_in_pieces(
    sampler: Sampler,
    state: State,
    evaluation: Evaluation,
    pieces: Sequence[Piece],
    noise: Iterable[Tensor],
) -> tuple[State, Tensor]:
    """Make the step that `sampler.update` makes, without its terms.

    Args:
        sampler: An entrywise one.
        state: State of batch size `[*chains]`.
        evaluation: The potential at its parameters. Its gradient is used up: a leaf leaves the tree
            as soon as nothing needs it.
        pieces: Of the parameters.
        noise: η in the flat layout, in vectors that follow one another, `[*chains, …]`; of sharded
            leaves, that of the parts that are here.

    Returns:
        The next state, and ‖w − w₀‖ before the step.

    Raises:
        ValueError: As `update`.
    """
    tree.check_same_shapes("the gradient", evaluation.grads, state.params)
    settings = sampler.at(state.step)
    values = _recut(noise, [piece.size for piece in pieces])
    parts: dict[Any, Any] = {}
    distances = []
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        part = piece.of(state)
        eta = tree.unflatten(next(values), part.params)
        rules = piece.of(settings)
        moved, terms = rules.advance_entries(part, piece.of(evaluation), eta)
        distances.append(rules.distance(part, terms))
        _collect(parts, piece, moved)
        if following is None or following.shapes != piece.shapes:
            for name in piece.shapes:
                del evaluation.grads[name]
    moved = _assembled(state, pieces[0], parts)
    if state.anchor is not None:  # it stays, and is no copy
        moved = moved.replace(anchor=state.anchor)
    if any(piece.sharded for piece in pieces):
        squares = [
            (next(map(shards.spread_of, piece.sharded.values()), None), distance.square())
            for piece, distance in zip(pieces, distances, strict=True)
        ]
        distance = shards.totals([squares])[0].sqrt()
    else:
        distance = torch.linalg.vector_norm(torch.stack(distances), dim=0)
    return settings.couple(state, moved), distance


def _recut(vectors: Iterable[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """Cut vectors that follow one another anew, to some sizes."""
    remaining = iter(vectors)
    rest = next(remaining)
    for size in sizes:
        taken = [rest[..., :size]]
        while (length := sum(each.shape[-1] for each in taken)) < size:
            rest = next(remaining)
            taken.append(rest[..., : size - length])
        rest = rest[..., taken[-1].shape[-1] :]
        yield torch.cat(taken, -1) if len(taken) > 1 else taken[0]


def _collect(found: dict[Any, Any], piece: Piece, part: Any, path: tuple[str, ...] = ()) -> None:
    """Put the part of a state that belongs to a piece into what has been found, by its path."""
    if is_tensorclass(part):
        for name, value in _fields(part).items():
            _collect(found, piece, value, (*path, name))
    elif not isinstance(part, TensorDictBase):
        found[path] = part  # a value of the chain, the same in all pieces
    elif _is_like_parameters(part, piece):
        piece.write(part, found.setdefault(path, {}))
    else:
        for name, value in part.items():
            _collect(found, piece, value, (*path, name))


def _assembled(before: Any, piece: Piece, found: dict[Any, Any], path: tuple[str, ...] = ()) -> Any:
    """The state of which the parts were collected, of the structure that it had before."""
    if is_tensorclass(before):
        fields = _fields(before).items()
        return _rebuilt(
            before, {name: _assembled(value, piece, found, (*path, name)) for name, value in fields}
        )
    if not isinstance(before, TensorDictBase):
        return found[path]
    if _is_like_parameters(before, piece):
        # In the order that it had.
        return tree.build(
            {name: shards.with_part(found[path][name], leaf) for name, leaf in tree.leaves(before)},
            before.batch_size,
        )
    parts = {name: _assembled(value, piece, found, (*path, name)) for name, value in before.items()}
    return TensorDict(parts, before.batch_size)


def _is_like_parameters(value: TensorDictBase, piece: Piece) -> bool:
    """Whether a tree has the parameters' names, of which a piece has some."""
    return isinstance(value.get(next(iter(piece.shapes)), None), Tensor)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a tensor class."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _rebuilt(value: Any, fields: dict[str, Any]) -> Any:
    """A tensor class with other fields."""
    return type(value)(**fields, batch_size=value.batch_size, lock=False)
