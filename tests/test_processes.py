"""Runs of several processes: the chains of one process, for any number of them."""

import random
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zarr

import funcsgmcmc as fs
import ranks as work
from funcsgmcmc.runs import processes
from ranks import HOWS, Ranks, ranks_of
from test_going_on import assert_identical, whole


@pytest.fixture(scope="module")
def ranks():
    with ranks_of(3) as started:
        yield started


# More steps than are made; that the clock would have compiled them is not what is tested.
ENDLESS = {"num_draws": 2000, "compile": False}
FAST = ("chunks", "a burn-in that ends by itself", "starts of their own", "looks at all data")


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def arrays_of(path: Path) -> dict[str, torch.Tensor]:
    """All arrays of a store, by their place."""
    root = zarr.open_group(path, mode="r")
    members = root.members(max_depth=None)
    return {name: torch.as_tensor(each[...]) for name, each in members if hasattr(each, "shape")}


def assert_same_arrays(one: Path, other: Path) -> None:
    ours, theirs = arrays_of(one), arrays_of(other)
    assert ours.keys() == theirs.keys()
    assert_identical(list(ours.values()), [theirs[name] for name in ours])


def assert_same_runs(one: fs.Samples, other: fs.Samples) -> None:
    """Everything that was recorded, and what is concluded from it."""
    assert_identical(whole(one), whole(other))
    assert one.chains.tolist() == other.chains.tolist()
    for ours, theirs in zip(one.groups().values(), other.groups().values(), strict=True):
        if ours.log_weights is None and ours.healthy.any():
            assert str(fs.llc(ours)) == str(fs.llc(theirs))


class TestResults:
    @pytest.mark.parametrize("how", [*FAST, *slow(*(name for name in HOWS if name not in FAST))])
    def test_any_number_of_processes_gives_the_chains_of_one(self, how, ranks: Ranks):
        alone = work.sampled(None, how)
        for size in (1, 2, 3) if how == "chunks" else (3,):
            for samples in ranks.call(work.sampled, how, size=size):
                assert_same_runs(samples, alone)

    def test_a_record_goes_on(self, ranks: Ranks):
        """From one process to three, and from three to two."""
        first = work.sampled(None, "starts of their own")
        more = {"params": first, "init_noise": 0.0}
        second = work.sampled(None, "chunks", more)
        for size in (2, 3):
            shared = ranks.call(work.sampled, "starts of their own", size=size)[0]
            more = {"params": shared, "init_noise": 0.0}
            assert_same_runs(ranks.call(work.sampled, "chunks", more, size=5 - size)[0], second)

    def test_a_mesh_of_one_rank_samples_alone(self, ranks: Ranks):
        first, *others = ranks.call(work.alone, "chunks")
        assert_same_runs(first, work.sampled(None, "chunks"))
        assert others == [None, None]

    def test_the_default_chunks_give_the_same_to_rounding(self, ranks: Ranks):
        alone = work.sampled(None, "chunks", {"chunk_size": None})
        for samples in ranks.call(work.sampled, "chunks", {"chunk_size": None}):
            torch.testing.assert_close(whole(samples), whole(alone))

    def test_a_chain_that_fails_is_frozen_wherever_it_is(self, ranks: Ranks):
        furthest = work.sampled(None, "chunks").distances.max(1).values
        changes = {"max_distance": float(furthest.median())}
        alone = work.sampled(None, "chunks", changes)
        assert 0 < len(alone.frozen) < 12
        for samples in ranks.call(work.sampled, "chunks", changes):
            assert_same_runs(samples, alone)
            assert list(map(str, samples.frozen)) == list(map(str, alone.frozen))


class TestSweeps:
    """Of settings, and of components."""

    @pytest.mark.parametrize("function", [work.swept, work.of_components], ids=["cells", "parts"])
    def test_each_is_that_of_one_process_also_on_disk(self, function, ranks: Ranks, tmp_path):
        alone = function(None, {})
        stored = {"store": tmp_path / "all"}
        for found in (
            *ranks.call(function, {}),
            *ranks.call(function, stored, size=2),
            *ranks.call(function, stored | {"resume": True}),
        ):
            assert list(found) == list(alone)
            for name, samples in found.items():
                assert_same_runs(samples, alone[name])

    def test_a_store_that_is_taken_is_refused_on_all_ranks(self, ranks: Ranks, tmp_path):
        (tmp_path / "file").write_text("")
        told = ranks.errors(work.swept, {"store": tmp_path})
        assert all("must be a new folder, or that of a sweep" in each for each in told)


class TestStores:
    @pytest.mark.parametrize("how", ["chunks", *slow("a sweep", "memory of each chain", "weights")])
    def test_stores_are_equal_array_by_array(self, how, ranks: Ranks, tmp_path):
        alone = work.sampled(None, how, {"store": tmp_path / "1"})
        for size in (2, 3):
            path = tmp_path / str(size)
            for samples in ranks.call(work.sampled, how, {"store": path}, size=size):
                assert_same_runs(samples, alone)
            assert_same_arrays(path, tmp_path / "1")
            assert_same_runs(fs.open_run(path), alone)
            assert not list((path / "checkpoint").glob("*.new"))

    @pytest.mark.parametrize("how", ["a sweep", *slow("chunks", "a list", "memory of each chain")])
    def test_a_run_is_resumed_by_other_numbers_of_processes(self, how, ranks: Ranks, tmp_path):
        """An error on one rank, an interrupt of another: three processes, two, one, two."""
        alone = work.sampled(None, how, {"store": tmp_path / "alone"})
        path = tmp_path / "run"
        kept = {"store": path, "resume": True, "checkpoint_seconds": 0}
        # Of 15 steps, after the few calls of the trial.
        for size, calls, rank in ((3, 18, 1), (2, 14, 0)):
            told = ranks.errors(work.failing, rank, calls, work.raise_error, how, kept, size=size)
            assert all("on fire" in each for each in told)
        for samples in ranks.call(work.interrupted, 1, 14, work.interrupt, how, kept, size=2):
            assert 0 < samples.num_steps <= 15  # one that is ahead may be at the end
            rows = slice(0, samples.num_steps)
            assert_identical([samples.losses], [alone.losses[:, rows]])
        assert_same_runs(work.sampled(None, how, kept), alone)
        assert_same_runs(ranks.call(work.sampled, how, kept, size=2)[0], alone)
        assert_same_arrays(path, tmp_path / "alone")
        longer = {**kept, "num_draws": 9}
        one = work.sampled(None, how, {"num_draws": 9})
        assert_same_runs(ranks.call(work.sampled, how, longer, size=2)[1], one)

    @pytest.mark.parametrize("how", ["chunks", *slow("a sweep", "weights")])
    def test_several_processes_go_on_with_the_run_of_one(self, how, ranks: Ranks, tmp_path):
        """One that was interrupted, and one that is to be longer."""
        alone = work.sampled(None, how, {"store": tmp_path / "alone"})
        kept = {"store": tmp_path / "run", "resume": True, "checkpoint_seconds": 0}
        stopped = work.interrupted(None, 0, 50, work.interrupt, how, kept)
        assert 0 < stopped.num_steps < 15
        assert_same_runs(ranks.call(work.sampled, how, kept)[2], alone)
        assert_same_arrays(tmp_path / "run", tmp_path / "alone")
        longer = work.sampled(None, how, {"num_draws": 9})
        kept["num_draws"] = 9
        assert_same_runs(ranks.call(work.sampled, how, kept, size=2)[1], longer)

    def test_no_two_processes_write_one_file(self, ranks: Ranks, tmp_path):
        ranks.call(work.sampled, "chunks", {"store": tmp_path / "run"})
        root = zarr.open_group(tmp_path / "run", mode="r")
        fields = [root[f"{group}/{name}"] for group in ("posterior", "trace") for name in ("loss",)]
        assert all(4 % each.chunks[0] == 0 for each in fields)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "names"),
        [
            ({"key": fs.key(4)}, "key"),
            ({"num_draws": 7}, "num_draws"),
            ({"batch_size": 4, "init_noise": 0.1}, "batch_size, init_noise"),
            ({"initial_loss": 2.0}, "initial_loss"),
        ],
    )
    def test_what_differs_between_ranks_is_named(self, changes, names, ranks: Ranks):
        message = (
            f"ValueError: all processes must make the same run, but rank 1 differs from rank 0 in "
            f"{names}"
        )
        assert ranks.errors(work.unlike, 1, changes) == [message] * 3

    def test_other_data_and_other_batches_are_named(self, ranks: Ranks):
        assert "rank 2 differs from rank 0 in data, tensor 0" in ranks.errors(work.other_data)[0]
        found = ranks.errors(work.other_batches)
        assert "rank 1 differs from rank 0 in data, the batch of step 0" in found[2]

    def test_fewer_chains_than_processes_are_refused(self, ranks: Ranks):
        message = "num_chains must be at least one for each of 3 processes, got 2"
        assert (
            ranks.errors(work.sampled, "chunks", {"num_chains": 2})
            == [f"ValueError: {message}"] * 3
        )

    def test_more_processes_than_a_store_has_units_are_refused(self):
        plan = processes.Processes()
        assert plan.unit(12) == 1
        assert plan.unit(31) == 3
        plan.size = 9
        message = "num_chains must be at least one in units of 2, which the store holds together, "
        with pytest.raises(ValueError, match=message + "for each of 9 processes, got 16"):
            plan.shares(16, 2)

    def test_meshes_of_several_dimensions_are_refused(self, ranks: Ranks):
        told = ranks.errors(work.with_a_mesh_of_two_dimensions, size=2)
        assert all(
            "mesh must have one dimension, over which chains are spread" in each for each in told
        )
        with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got str"):
            work.sampled("cuda", "chunks")


class TestFaults:
    @pytest.mark.parametrize("calls", [1, 20])
    def test_an_error_of_one_process_is_raised_by_all(self, calls, ranks: Ranks):
        """In the trial before the run, and in a step."""
        told = ranks.errors(work.failing, 2, calls, work.raise_error, "chunks")
        kinds = ["ProcessError"] * 2 + ["OSError"] if calls == 1 else ["SamplingError"] * 3
        assert [each.split(":")[0] for each in told] == kinds
        assert all("rank 2 stopped: " in each for each in told[:2])
        assert all("the machine is on fire" in each for each in told)

    def test_a_divergence_stops_all(self, ranks: Ranks):
        changes = {"max_distance": 0.6, "on_divergence": "raise", **ENDLESS}
        told = ranks.errors(work.sampled, "chunks", changes)
        kinds = [each.split(":")[0] for each in told]
        assert "DivergenceError" in kinds
        assert all("frozen at step" in each for each in told)

    def test_the_record_of_an_interrupted_run_has_all_chains(self, ranks: Ranks):
        changes = ENDLESS
        for samples in ranks.call(work.interrupted, 0, 60, work.interrupt, "chunks", changes):
            assert samples.num_chains == 12
            assert 0 < samples.num_steps < 4003

    def test_the_first_process_speaks_for_all(self, ranks: Ranks):
        said = ranks.call(work.said, "chunks", {"progress": True})
        assert "15 of 15 steps" in said[0][0]
        assert said[1:] == [[], []]


@pytest.mark.parametrize("call", ["set", "check", "get"])
@pytest.mark.parametrize("wait", [("meet", None), ("level", 3)], ids=lambda wait: wait[0])
def test_a_store_that_fails_at_any_call_is_named(call, wait):
    """Its process may end between two calls."""

    def fail(*arguments):
        raise RuntimeError("Connection reset by peer")

    calls = {"set": lambda *_: None, "check": lambda keys: True, "get": lambda key: b""}
    one = object.__new__(processes.Ranks)
    one.rank, one.size, one._meetings = 1, 2, 0
    one._watch = SimpleNamespace(accept=lambda reason: None, fault=None)
    one._store = SimpleNamespace(timeout=timedelta(seconds=1), **(calls | {call: fail}))
    with pytest.raises(processes.ProcessError, match=r"which rank 0 holds.*Connection reset"):
        getattr(one, wait[0])(wait[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_survives_the_death_of_its_processes(seed, tmp_path):
    """One of three is killed; it is resumed by two, of which one is killed; and by one."""
    chance = random.Random(seed)
    how = chance.choice(["chunks", "a sweep", "a list", "memory of each chain"])
    settings = {"num_draws": 40}
    alone = work.sampled(None, how, settings | {"store": tmp_path / "alone"})
    kept = settings | {"store": tmp_path / "run", "resume": True, "checkpoint_seconds": 0.02}
    for size in (3, 2):
        killed, calls = chance.randrange(size), chance.randrange(20, 60)
        with ranks_of(size, timeout=8.0) as ranks:
            told = ranks.errors(work.failing, killed, calls, work.die, how, kept)
        assert told.pop(killed).startswith("EOFError")
        # With rank 0 the store of the process group dies, unless torchrun holds it.
        name = (
            "which rank 0 holds" if killed == 0 else f"rank {killed} has not been heard of for 8 s"
        )
        assert all(name in each for each in told), told
    resumed = work.sampled(None, how, kept)
    assert_same_runs(resumed, alone)
    assert_same_arrays(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("is_sweep", [False, True], ids=["one setting", "a sweep"])
def test_the_digits_run(is_sweep, ranks: Ranks, tmp_path):
    """In float32, with chunks of one size; and to rounding with the default ones."""
    pytest.importorskip("sklearn")
    alone = work.digits(None, is_sweep, {"store": tmp_path / "1"})
    for size in (2, 3):
        kept = {"store": tmp_path / str(size)}
        for samples in ranks.call(work.digits, is_sweep, kept, size=size):
            assert_same_runs(samples, alone)
        assert_same_arrays(tmp_path / str(size), tmp_path / "1")
    whole_chunk = work.digits(None, is_sweep, {"chunk_size": None})
    for samples in ranks.call(work.digits, is_sweep, {"chunk_size": None}, size=2):
        torch.testing.assert_close(samples.losses, whole_chunk.losses, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_process_that_hangs_is_named(tmp_path):
    kept = {"store": tmp_path / "run", "resume": True, "checkpoint_seconds": 0.0}
    with ranks_of(3, timeout=8.0) as ranks:
        ranks.start(work.failing, 1, 30, work.hang, "chunks", kept)
        told = [ranks.result(rank) for rank in (0, 2)]
    assert all("rank 1 has not been heard of for 8 s" in str(each) for each in told), told
    assert_same_runs(work.sampled(None, "chunks", kept), work.sampled(None, "chunks"))
