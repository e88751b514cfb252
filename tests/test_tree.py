"""Parameter trees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc import tree


@given(
    chains=st.sampled_from([(), (1,), (3,)]),
    shapes=st.lists(st.sampled_from([(), (2,), (0,), (2, 3)]), min_size=1, max_size=4),
    nested=st.booleans(),
)
def test_unflatten_hands_out_every_value_once(chains, shapes, nested):
    leaves = {f"leaf{i}": torch.zeros(chains + shape) for i, shape in enumerate(shapes)}
    like = TensorDict({"outer": leaves} if nested else leaves, batch_size=chains)
    size = tree.size(like)
    flat = torch.arange(float(torch.Size(chains).numel() * size)).reshape(*chains, size)
    views = tree.unflatten(flat, like)
    assert [leaf.shape for _, leaf in tree.leaves(views)] == [
        leaf.shape for _, leaf in tree.leaves(like)
    ]
    back = (
        torch.cat([leaf.reshape(*chains, -1) for _, leaf in tree.leaves(views) if leaf.numel()], -1)
        if size
        else flat
    )
    assert torch.equal(back, flat)


def test_dot_norm_and_health_are_per_chain():
    a = TensorDict({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, batch_size=2)
    torch.testing.assert_close(tree.dot(a, a), torch.tensor([6.0, 51.0]))
    torch.testing.assert_close(tree.norm(a), torch.tensor([6.0, 51.0]).sqrt())
    assert tree.dot(a[0], a[0]).item() == 6.0
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = a.clone()
        broken["w"][1, 2] = bad
        assert tree.all_finite(broken, broken.shape).tolist() == [True, False]
    broken = a.clone()
    broken["b"][0] = torch.nan
    assert tree.all_finite(broken, broken.shape).tolist() == [False, True]


def test_narrow_dtypes_accumulate_in_float32():
    a = TensorDict({"w": torch.full((4096,), 300.0, dtype=torch.float16)})
    assert tree.norm(a).dtype == torch.float32
    assert tree.norm(a).item() == pytest.approx(300 * 64)


def test_where_chooses_whole_chains():
    a = TensorDict({"w": torch.ones(3, 2)}, batch_size=3)
    b = TensorDict({"w": torch.full((3, 2), torch.nan)}, batch_size=3)
    chosen = tree.where(torch.tensor([True, False, True]), a, b)
    assert chosen["w"].isnan().all(1).tolist() == [False, True, False]


def test_normals_have_the_precision_of_their_leaf():
    like = TensorDict({"a": torch.zeros(50), "b": torch.zeros(50, dtype=torch.float32)})
    drawn = fs.tree.normal_like(fs.key(0), like)
    assert (drawn["a"].dtype, drawn["b"].dtype) == (torch.float64, torch.float32)
    assert not torch.equal(drawn["a"], drawn["a"].float().double())


def test_inner_products_of_many_small_leaves_are_those_of_vectors():
    """Small leaves are put together, a large one and one number a chain are not."""
    generator = torch.Generator().manual_seed(1)
    shapes = {**{f"leaf{i}": (i % 3 + 1,) for i in range(40)}, "large": (1 << 14,), "number": ()}
    a, b = (
        TensorDict(
            {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}, 2
        )
        for _ in range(2)
    )
    wanted = (tree.flatten(a) * tree.flatten(b)).sum(-1)
    torch.testing.assert_close(tree.dot(a, b), wanted)
    torch.testing.assert_close(tree.dot(a[0], b[0]), wanted[0])
