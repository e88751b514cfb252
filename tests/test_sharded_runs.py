"""Runs of sharded parameters: the record of whole ones, for any number of processes."""

import re

import pytest
import torch

import sharded_runs as work
from compat_problems import QUIET
from ranks import Ranks, ranks_of

pytestmark = QUIET
CLOSE = {"rtol": 1e-9, "atol": 1e-11, "equal_nan": True}
FAST = ("momenta, masked", "chains that fail")


@pytest.fixture(scope="module")
def ranks():
    with ranks_of(2, timeout=60.0) as started:
        yield started


@pytest.fixture(scope="module")
def more_ranks():
    with ranks_of(4, timeout=60.0) as started:
        yield started


def assert_same(all_ours: list, theirs: dict) -> None:
    for ours in all_ours:
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=[] if how in FAST else pytest.mark.slow) for how in work.HOWS],
)
def test_every_record_is_that_of_whole_parameters(how, ranks: Ranks):
    """Equal on both processes, which have the same chains."""
    theirs = work.sampled(None, how)
    assert_same(ranks.call(work.sampled, how), theirs)
    if how == "chains that fail":
        assert 0 < int((theirs["frozen_at"] >= 0).sum()) < 3


@pytest.mark.slow
def test_columns_and_a_leaf_that_all_have(ranks: Ranks):
    how = "momenta, masked"
    assert_same(ranks.call(work.sampled, how, 0, 1), work.sampled(None, how))


def test_a_module_that_is_fully_sharded(ranks: Ranks):
    how = "observables and a log-prior"
    assert_same(ranks.call(work.of_a_module, how), work.of_a_module(None, how))


@pytest.mark.slow
def test_all_ranks_are_those_of_the_shards(ranks: Ranks):
    assert_same(ranks.call(work.without_a_mesh, "aux"), work.sampled(None, "aux"))


@pytest.mark.slow
def test_one_row_of_shards_and_rows_of_one(ranks: Ranks):
    """A mesh of 1 × 2, and one of 2 × 1, whose rows have other chains."""
    theirs = work.sampled(None, "momenta, masked")
    for rows in (1, 2):
        assert_same(ranks.call(work.sampled, "momenta, masked", rows), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["momenta, masked", "settings of their own"])
def test_a_record_goes_on(how, ranks: Ranks):
    assert_same(ranks.call(work.gone_on, how), work.gone_on(None, how))


def test_a_process_without_an_entry(ranks: Ranks):
    assert_same(ranks.call(work.small), work.small(None))


def test_all_freeze_a_chain_that_fails_on_one(ranks: Ranks):
    theirs = work.failing_in_one_part(None)
    assert theirs["frozen_at"].tolist() == [0, 0, 0]
    assert_same(ranks.call(work.failing_in_one_part), theirs)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_interrupt_of_one_process_ends_the_step_of_all(rank, ranks: Ranks):
    one, other = ranks.call(work.interrupted, rank)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    steps = one["losses"].shape[1]
    assert 0 < steps < 61
    whole = work.sampled(None, "momenta, masked", num_draws=30)["losses"]
    torch.testing.assert_close(one["losses"], whole[:, :steps], **CLOSE)


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (work.with_settings, {"chain_method": "vmap"}, "chain_method must be 'loop' where .* got"),
        (work.with_settings, {"compile": True}, "compile must be left out where .* got True"),
        (work.with_settings, {"store": "run.zarr"}, "store must be left out where .* 'run.zarr'"),
        (work.with_settings, {"record": ["draws"]}, "record must not have 'draws' where param"),
        (work.with_settings, {"record": ["draw_moments"]}, "record must not have 'draw_moments'"),
        (work.with_starts, {}, r"params must have batch size \(\) where they are sharded"),
        (work.over_other_ranks, {}, "mesh must be that of the shards, or have two dimensions"),
        (work.with_another_function, {"name": "restrict"}, "restrict takes whole parameters"),
        (work.with_another_function, {"name": "sweep"}, "sweep takes whole parameters"),
        (work.on_a_nan, {}, r"params.* must be finite, got"),
    ],
)
def test_what_is_refused(function, settings, message, ranks: Ranks):
    for told in ranks.errors(function, settings):
        assert re.match(f"(Value|Type)Error: {message}", told), told


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["momenta, masked", "chains that fail", "settings of their own", "aux"]
)
def test_chains_and_shards(how, more_ranks: Ranks):
    """Two rows of two: three chains are divided unevenly."""
    assert_same(more_ranks.call(work.sampled, how, 2), work.sampled(None, how))
    assert_same(more_ranks.call(work.sampled, how, 2, 1), work.sampled(None, how))


@pytest.mark.slow
def test_chains_and_shards_of_a_module(more_ranks: Ranks):
    how = "observables and a log-prior"
    assert_same(more_ranks.call(work.of_a_module, how, 2), work.of_a_module(None, how))


@pytest.mark.slow
def test_chains_and_shards_go_on_and_are_interrupted(more_ranks: Ranks):
    how = "settings of their own"
    assert_same(more_ranks.call(work.gone_on, how, 2), work.gone_on(None, how))
    first, *others = more_ranks.call(work.interrupted, 3, 2)
    for other in others:
        torch.testing.assert_close(first, other, rtol=0, atol=0)
    assert 0 < first["losses"].shape[1] < 61


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_stops_all(rank):
    """The other waits for it in an exchange until the group's timeout, and then knows why."""
    whole = work.sampled(None, "momenta, masked", num_draws=30)["losses"]
    with ranks_of(2, timeout=5.0) as started:
        results = started.call(work.stopped, rank, 40, work.burn)
    reason = "sampling stopped in step 9: the machine is on fire"
    assert results[rank][0] == reason
    assert results[1 - rank][0] == f"sampling stopped in step 9: rank {rank} stopped: {reason}"
    for _, losses in results:
        assert 0 < losses.shape[1] < 61
        torch.testing.assert_close(losses, whole[:, : losses.shape[1]], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_process_is_named(rank):
    with ranks_of(2, timeout=8.0) as started:
        started.start(work.stopped, rank, 40, work.die)
        told, losses = started.result(1 - rank)
        assert str(started.result(rank)) == f"rank {rank} has ended"
    name = "which rank 0 holds" if rank == 0 else "rank 1 has not been heard of for 8 s"
    assert name in told
    assert 0 < losses.shape[1] < 61
