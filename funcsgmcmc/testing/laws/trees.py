"""Trees are vectors with names: leaves may be renamed, reordered, cut in two, rotated together."""

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.testing.laws.law import close, law, parameter_like, unless
from funcsgmcmc.testing.problems import Problem, TreeMap, mapped


@law()
def names_and_order_of_leaves(problem: Problem) -> None:
    """Leaves may be renamed, nested and reordered."""

    def renamed(given: TensorDict) -> TensorDict:
        leaves = [leaf for _, leaf in tree.leaves(given)]
        new: dict[tree.Name, Tensor] = {
            ("other", f"leaf{i}"): leaves[i] for i in reversed(range(len(leaves)))
        }
        return tree.build(new, given.batch_size)

    equivariant(problem, renamed, "after renaming and reordering")


@law(exempt=unless("entrywise", "it is not entrywise"))
def splitting_a_leaf(problem: Problem) -> None:
    """A leaf may be cut in two."""

    def cut(given: TensorDict) -> TensorDict:
        leaves: dict[tree.Name, Tensor] = {}
        for name, leaf in tree.leaves(given):
            row = leaf.reshape(*given.batch_size, -1)
            half = (row.shape[-1] + 1) // 2
            leaves[f"{tree.dotted(name)}.first"] = row[..., :half]
            leaves[f"{tree.dotted(name)}.second"] = row[..., half:]
        return tree.build(leaves, given.batch_size)

    equivariant(problem, cut, "after cutting leaves in two")


@law(
    exempt=unless("isotropic", "it is not isotropic"),
    mask=None,
    preconditioner=None,
    bounding_box_size=None,
)
def rotation(problem: Problem) -> None:
    """All parameters may be rotated together."""

    def rotated(given: TensorDict) -> TensorDict:
        row = tree.flatten(given)
        # A reflection and a permutation, neither along an axis.
        normal = torch.arange(1.0, row.shape[-1] + 1, dtype=row.dtype)
        reflected = row - 2 * (row @ normal).unsqueeze(-1) * normal / (normal @ normal)
        return tree.build({"all": reflected.roll(1, -1)}, given.batch_size)

    equivariant(problem, rotated, "after a rotation")


def equivariant(problem: Problem, function: TreeMap, what: str) -> None:
    """Changing all trees before the steps is changing them after."""
    expected = {
        name: mapped(value, function) for name, value in parameter_like(problem.final()).items()
    }
    actual = parameter_like(problem.map(function).final())
    assert actual.keys() == expected.keys(), f"{what}: fields {[*actual]}, not {[*expected]}"
    for name, value in actual.items():
        close(value, expected[name], f"{name} {what}")
