"""Kernels on sharded parameters: the chain of the whole ones, for any number of processes."""

import re

import pytest
import torch

import sharded_kernels as work
from compat_problems import QUIET
from ranks import Ranks, ranks_of

pytestmark = QUIET
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def ranks():
    with ranks_of(2, timeout=60.0) as started:
        yield started


def assert_same(ours: dict, theirs: dict) -> None:
    torch.testing.assert_close(ours["state"], theirs["state"], **CLOSE)
    for mine, info in zip(ours["infos"], theirs["infos"], strict=True):
        assert vars(mine).keys() == vars(info).keys()
        for name, value in vars(info).items():
            torch.testing.assert_close(vars(mine)[name], value, **CLOSE)


@pytest.mark.parametrize("name", work.SAMPLERS)
def test_every_sampler(name, ranks: Ranks):
    """Metrics, thermostats and distances are sums over all parts."""
    theirs = work.on_dtensors(None, name, True)
    for ours in ranks.call(work.on_dtensors, name, True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["as a whole", "in pieces"])
@pytest.mark.parametrize("name", ["sgld, masked", "baoa", "sgnht, masked"])
def test_columns_and_a_leaf_that_all_have(name, in_pieces, ranks: Ranks):
    """Parts that are no whole rows; a plain leaf counts once. In pieces, too, of some entries."""
    theirs = work.on_dtensors(None, name, False, 1, in_pieces)
    for ours in ranks.call(work.on_dtensors, name, False, 1, in_pieces):
        assert_same(ours, theirs)


def test_a_log_prior_and_micro_batches(ranks: Ranks):
    theirs = work.with_a_prior(None)
    for ours in ranks.call(work.with_a_prior):
        assert_same(ours, theirs)


@pytest.mark.parametrize("dim", [0, 1])
def test_sketches_are_those_of_whole_trees(dim, ranks: Ranks):
    theirs = work.sketched(None, dim)
    for ours in ranks.call(work.sketched, dim):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["rmsprop_sgld", "baoa", "sgnht"])
def test_a_module_that_is_fully_sharded(name, ranks: Ranks):
    """The loss is at the parameters of the tree, and not at the module's own."""
    theirs = work.on_a_module(None, name, True)
    for ours in ranks.call(work.on_a_module, name, True):
        assert_same(ours, theirs)


def test_losses_without_gradients(ranks: Ranks):
    """A forward pass leaves the module gathered, and the next one is at other parameters."""
    theirs = work.losses_of_a_module(None)
    for ours in ranks.call(work.losses_of_a_module):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_processes_with_parts_of_a_batch(ranks: Ranks):
    theirs = work.on_dtensors(None, "baoa", False)
    for ours in ranks.call(work.on_parts_of_a_batch):
        assert_same(ours, theirs)


def test_a_slice_of_other_noise_is_seen(ranks: Ranks):
    """That the tests above can fail."""
    theirs = work.on_dtensors(None, "baoa", False)
    for ours in ranks.call(work.with_another_slice, "baoa"):
        with pytest.raises(AssertionError, match="not close"):
            assert_same(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["as a whole", "in pieces"])
@pytest.mark.parametrize("name", work.SAMPLERS)
def test_three_processes(name, in_pieces, dim, more_ranks: Ranks):
    theirs = work.on_dtensors(None, name, False, dim, in_pieces)
    for ours in more_ranks.call(work.on_dtensors, name, False, dim, in_pieces):
        assert_same(ours, theirs)


@pytest.fixture(scope="module")
def more_ranks():
    with ranks_of(3, timeout=60.0) as started:
        yield started


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (work.through_functional_call, "TypeError: functional_call must not be given a module"),
        (work.while_gathered, "ValueError: parameter '0.weight' must be a part"),
        (work.under_torch_func, "TypeError: params.* must be sharded as the module"),
        (work.with_curvature, "ValueError: curvature=.* got sharded parameters"),
        (work.with_partial_sums, "TypeError: params.* must be sharded or replicated"),
        (work.with_a_dtype, "TypeError: .* has the dtype of its MixedPrecisionPolicy"),
    ],
)
def test_what_is_refused(function, message, ranks: Ranks):
    for told in ranks.errors(function):
        assert re.match(message, told), told
