"""Laws of trees: leaves may be renamed, reordered, cut in two, and all rotated together."""

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.testing.laws.base import close, comparable_fields, law, unless
from funcsgmcmc.testing.problem import Problem, TreeMap, map_trees


@law()
def names_and_order_of_leaves(problem: Problem) -> None:
    """Leaves may be renamed, nested and reordered."""

    def rename(params: TensorDict) -> TensorDict:
        leaves = [leaf for _, leaf in tree.leaves(params)]
        renamed: dict[tree.Name, Tensor] = {
            ("other", f"leaf{i}"): leaves[i] for i in reversed(range(len(leaves)))
        }
        return tree.build(renamed, params.batch_size)

    _check_equivariance(problem, rename, "after renaming and reordering")


@law(exempt=unless("entrywise", "it is not entrywise"))
def splitting_a_leaf(problem: Problem) -> None:
    """A leaf may be cut in two."""

    def cut(params: TensorDict) -> TensorDict:
        leaves: dict[tree.Name, Tensor] = {}
        for name, leaf in tree.leaves(params):
            row = leaf.reshape(*params.batch_size, -1)
            half = (row.shape[-1] + 1) // 2
            leaves[f"{tree.dotted(name)}.first"] = row[..., :half]
            leaves[f"{tree.dotted(name)}.second"] = row[..., half:]
        return tree.build(leaves, params.batch_size)

    _check_equivariance(problem, cut, "after cutting leaves in two")


@law(
    exempt=unless("isotropic", "it is not isotropic"),
    mask=None,
    preconditioner=None,
    bounding_box_size=None,
)
def rotation(problem: Problem) -> None:
    """All parameters may be rotated together."""

    def rotate(params: TensorDict) -> TensorDict:
        row = tree.flatten(params)
        # A reflection and a permutation, neither along an axis.
        normal = torch.arange(1.0, row.shape[-1] + 1, dtype=row.dtype)
        reflected = row - 2 * (row @ normal).unsqueeze(-1) * normal / (normal @ normal)
        return tree.build({"all": reflected.roll(1, -1)}, params.batch_size)

    _check_equivariance(problem, rotate, "after a rotation")


def _check_equivariance(problem: Problem, function: TreeMap, what: str) -> None:
    """Check that to map all trees before the steps is to map them after."""
    expected = {
        name: map_trees(value, function)
        for name, value in comparable_fields(problem.final()).items()
    }
    actual = comparable_fields(problem.map(function).final())
    assert actual.keys() == expected.keys(), f"{what}: fields {[*actual]}, not {[*expected]}"
    for name, value in actual.items():
        close(value, expected[name], f"{name} {what}")
