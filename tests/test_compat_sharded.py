"""`compat` on sharded parameters: the chain of the whole ones, for any number of processes."""

import pytest
import torch

import sharded as work
from compat_problems import QUIET
from ranks import Ranks, ranks_of

pytestmark = QUIET
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
# Metrics and sketches are kept in float32.
COARSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def ranks():
    with ranks_of(3) as started:
        yield started


def assert_same(ours: dict, theirs: dict, close: dict = CLOSE) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        tolerance = COARSE if name in ("metrics", "sketches", "thermostats") else close
        torch.testing.assert_close(ours[name], value, **tolerance)


@pytest.mark.parametrize("keyed", [False, True], ids=["a generator", "a key"])
def test_configurations(keyed, ranks: Ranks):
    assert ranks.call(work.differential, range(10), keyed) == [10] * 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("keyed", [False, True], ids=["a generator", "a key"])
@pytest.mark.parametrize("first", range(10, 60, 10))
def test_more_configurations(first, keyed, size, ranks: Ranks):
    seeds = range(first, first + 10)
    assert ranks.call(work.differential, seeds, keyed, size=size) == [10] * size


class TestFullyShard:
    """Tied weights, buffers, parameters of fewer rows than processes."""

    @pytest.mark.parametrize("method", work.METHODS)
    def test_the_chain_is_that_of_the_whole_model(self, method, ranks: Ranks):
        theirs = work.trained(None, method)
        for ours in ranks.call(work.trained, method):
            assert_same(ours, theirs)

    def test_mixed_precision(self, ranks: Ranks):
        """The model computes in bfloat16, and the chain moves in float64."""
        theirs = work.trained(None, "sgld")
        for ours in ranks.call(work.trained, "sgld", torch.bfloat16):
            assert ours["params"][0].dtype == torch.float64
            torch.testing.assert_close(ours["params"], theirs["params"], rtol=0.0, atol=2e-3)
            assert not torch.equal(ours["params"][0], theirs["params"][0])

    @pytest.mark.parametrize("method", work.METHODS)
    def test_a_checkpoint_of_two_is_loaded_by_three(self, method, ranks: Ranks, tmp_path):
        ranks.call(work.saved, method, tmp_path / "checkpoint", size=2)
        theirs = work.trained(None, method)
        for ours in ranks.call(work.loaded, method, tmp_path / "checkpoint"):
            assert_same(ours, theirs)


class TestRefusals:
    def test_processes_that_draw_other_noise(self, ranks: Ranks):
        told = ranks.errors(work.seeded_apart)
        assert all("all processes must draw the same noise" in each for each in told)

    def test_what_needs_whole_parameters(self, ranks: Ranks):
        told = ranks.errors(work.with_correction)
        assert all("add_grad_correction needs whole parameters" in each for each in told)
        told = ranks.errors(work.with_own_masks)
        assert all("must be given to the optimizer (mask=…)" in each for each in told)
