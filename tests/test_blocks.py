"""Blocks of steps: the chains of steps that are made one by one, bit for bit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from cases import CASES, Case
from funcsgmcmc import blocks, stepping, tree
from funcsgmcmc.blocks import Blocks
from funcsgmcmc.runs import stepper, timing
from funcsgmcmc.runs.run import Run
from problems import classification, observables, run
from test_going_on import assert_identical, whole

# Blocks of 16, cut short by draws.
SETTINGS: dict[str, Any] = {
    "num_chains": 3,
    "num_draws": 3,
    "num_steps_between_draws": 5,
    "num_burnin_steps": 18,
    "observables": observables(),
}


@pytest.fixture
def eager(monkeypatch):
    """Blocks in eager code: a loop of Python's in place of torch's, and no compiler."""

    def loop(is_left, once, carried):
        while is_left(*carried):
            carried = once(*carried)
        return carried

    monkeypatch.setattr(blocks, "while_loop", loop)
    monkeypatch.setattr(stepper, "compiled", lambda function: function)


@pytest.fixture
def lengths(monkeypatch):
    """The lengths of the blocks that are made."""
    found: list[int] = []
    make = stepper.Stepper._make_block

    def make_block(self, chunk, first, number):
        found.append(number)
        return make(self, chunk, first, number)

    monkeypatch.setattr(stepper.Stepper, "_make_block", make_block)
    return found


def is_slow(case: Case) -> bool:
    return "curvature" in str(case) or "composed" in str(case)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * is_slow(case), id=str(case)) for case in CASES],
)
def test_blocks_are_steps(case: Case, params, eager, lengths):
    settings = SETTINGS | {"record": ["draws", "metrics", "draw_moments"]}
    in_blocks = run(case.make(params), compile=True, **settings)
    if "cyclical" not in str(case):  # whose exploration makes no draws
        assert lengths == [16, 6, 5, 5, 1]
    assert max(lengths) == 16
    assert_identical(whole(in_blocks), whole(run(case.make(params), compile=False, **settings)))


HOWS: dict[str, dict[str, Any]] = {
    "loop": {"chain_method": "loop"},
    "chunks": {"chunk_size": 2},
    "epochs": {"minibatches": "epochs"},
    "epochs, loop": {"minibatches": "epochs", "chain_method": "loop"},
    "shared batches": {"shared_batches": True},
    "all data": {"batch_size": None},
    "looks": {"full_loss": 3},
    "chains that fail": {"max_distance": 2.0},
    "log-prior": {"log_prior": lambda params: -tree.dot(params, params)},
    "burn-in": {"num_burnin_steps": "auto", "num_draws": 40},
    "control variates": {"gradient": fs.control_variates},
    "svrg": {"gradient": partial(fs.svrg, refresh_interval=7)},
    "accumulated": {"gradient": partial(fs.accumulated, num_microbatches=2)},
}


@pytest.mark.parametrize("name", HOWS)
@pytest.mark.filterwarnings("ignore:burn-in ended")
def test_however_they_are_run(name, eager, lengths):
    how = HOWS[name]
    model, data = classification()
    options = {"batch_size": 8, "key": fs.key(3), **SETTINGS, **how}
    loss = options.pop("gradient", lambda loss: loss)(
        fs.module_loss(model, torch.nn.functional.cross_entropy)
    )
    sampler = fs.sgld(1e-2, nbeta=3.0, localization=1.0)
    both = [
        fs.sample(loss, fs.params_of(model), data, sampler, compile=compile, **options)
        for compile in (True, False)
    ]
    assert max(lengths) > 1
    torch.testing.assert_close(both[0].frozen_at, both[1].frozen_at)
    for recorded in ("losses", "distances", "draw_steps"):
        ours, theirs = (getattr(each, recorded) for each in both)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    if both[1].looks is not None:
        torch.testing.assert_close(both[0].looks.losses, both[1].looks.losses, equal_nan=True)
    if "max_distance" in how:  # chains freeze within blocks, each at its own step
        assert len(set(both[0].frozen_at.tolist())) > 1
        assert (both[0].frozen_at > 0).any()


@pytest.mark.parametrize(
    "how",
    [
        {"num_steps_between_draws": 1, "num_burnin_steps": 0},
        {"on_divergence": "raise"},
        {"record": ["aux"]},
        {"data": "a list"},
    ],
    ids=str,
)
def test_what_cannot_be_blocks_goes_step_by_step(how, eager, lengths):
    data: Any = torch.linspace(-1, 1, 8)

    def loss(params, batch):
        value = ((params["w"] - batch.mean()) ** 2).sum()
        return value, {"twice": 2 * value}

    options = {**SETTINGS, "observables": {}, **how}
    if options.pop("data", None):
        data = [data]
    params = {"w": torch.linspace(-1, 1, 3)}
    sampler = fs.sgld(1e-2, nbeta=3.0, localization=1.0)
    fs.sample(loss, params, data, sampler, key=fs.key(0), compile=True, **options)
    assert not lengths


def test_a_chain_that_freezes_within_a_block_makes_no_more_draws(eager, lengths):
    """The draw at the beginning of a block counts, if its chain freezes later in the block."""
    settings = SETTINGS | {"max_distance": 2.0, "num_draws": 12}
    settings["record"] = ["draws", "metrics", "draw_moments"]
    sampler = fs.sgld(torch.tensor([1e-3, 4e-3, 1e-2]), nbeta=3.0)
    in_blocks, steps = (run(sampler, compile=compile, **settings) for compile in (True, False))
    assert max(lengths) > 1
    assert_identical(whole(in_blocks), whole(steps))
    assert len(set(steps.draw_moments.count.tolist())) > 1


def test_draws_are_handed_over(eager, lengths):
    told: list[Any] = []
    sampler = fs.sgld(1e-3, nbeta=3.0)
    samples = run(sampler, compile=True, on_draw=told.append, **SETTINGS)
    assert max(lengths) > 1
    assert [draw.index for draw in told] == [0, 1, 2]
    assert [draw.step for draw in told] == samples.draw_steps.tolist()
    for draw in told:
        torch.testing.assert_close(draw.losses, samples.draw_losses[:, draw.index])


@pytest.mark.parametrize("name", ["loop", "epochs", "epochs, loop", "shared batches", "all data"])
def test_blocks_of_all_lengths_are_one_program(name, eager, lengths, monkeypatch):
    """Tensors that lie in memory in another way would compile again."""
    layouts = set()
    make = Blocks.__call__

    def noted(self, *given):
        leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        layouts.add(tuple((leaf.shape, leaf.stride()) for leaf in leaves))
        return make(self, *given)

    monkeypatch.setattr(Blocks, "__call__", noted)
    run(fs.sgnht(1e-3, nbeta=3.0), compile=True, **{"batch_size": 8, **SETTINGS, **HOWS[name]})
    assert set(lengths) == {16, 6, 5, 1}
    assert len(layouts) == 1


def test_progress_counts_every_step(eager, caplog):
    caplog.set_level("INFO", logger="funcsgmcmc")
    run(fs.sgld(1e-3, nbeta=3.0), compile=True, progress=True, **SETTINGS)
    assert "33 of 33 steps" in caplog.text


def test_a_run_with_a_store_goes_on(eager, tmp_path):
    sampler = fs.baoa(1e-2, nbeta=3.0, friction=1.0)
    settings = SETTINGS | {"compile": True, "record": ["draws"], "store": tmp_path / "run"}
    run(sampler, **settings)
    longer = run(sampler, **settings | {"num_draws": 6, "resume": True})
    del settings["store"]
    alone = run(sampler, **settings | {"num_draws": 6})
    torch.testing.assert_close(longer.losses, alone.losses, rtol=0, atol=0)


def test_a_block_leaves_rows_beyond_its_length_as_they_are():
    def step(carry, number, factor):
        return carry * factor + number, {"half": carry / 2}

    quick = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    make, factor = Blocks(step, quick), torch.tensor(3.0)
    start, numbers = torch.tensor([1.0, 2.0]), torch.arange(5.0)
    for length in range(6):
        carry, reports = make(start, numbers, length, factor)
        expected, halves = start, []
        for number in numbers[:length]:
            halves.append(expected / 2)
            expected = expected * 3 + number
        torch.testing.assert_close(carry, expected)
        torch.testing.assert_close(reports["half"][:length], torch.stack([*halves, start])[:length])
        assert not reports["half"][length:].any()


def test_chunks_that_are_ahead_are_waited_for(monkeypatch, eager):
    """As after an interrupt within a step, whose chunks another length of blocks goes on with."""
    made = []
    monkeypatch.setattr(Run, "go", lambda run, progress: made.append(run))
    run(fs.sgld(1e-3, nbeta=3.0), compile=True, chunk_size=1, **SETTINGS)
    made[0].chunks[1].next_step = 3
    assert made[0].make_steps() == 3
    assert [chunk.next_step for chunk in made[0].chunks] == [3, 3, 3]


class TestKernel:
    """`compiled(step, num_steps=K)`."""

    @staticmethod
    def step(params, **settings):
        model, data = classification(num_examples=12)
        batches = tuple(each.unflatten(0, (3, 4)) for each in data)
        loss = fs.module_loss(model, torch.nn.functional.cross_entropy)
        sampler = fs.sgnht(1e-3, nbeta=3.0)  # its state has the anchor
        keys = fs.random.fold_in(fs.key(0), torch.arange(2))
        step = torch.vmap(fs.kernel(sampler, loss, **settings), in_dims=(0, None, 0))
        noise = tree.normal_like(keys, params.expand(2))
        return step, sampler.init(params.expand(2), noise), batches, keys

    @pytest.mark.slow
    @pytest.mark.parametrize("metrics", [False, True])
    def test_it_makes_the_same_chain(self, params, metrics):
        step, state, batches, keys = self.step(params, metrics=metrics)
        block, single = fs.compiled(step, num_steps=3), fs.compiled(step)
        moved, infos = block(state, batches, keys)
        for index in range(3):
            state, info = single(state, tuple(each[index] for each in batches), keys)
            reported = pytree.tree_map(lambda leaf, row=index: leaf[row], infos)
            torch.testing.assert_close(pytree.tree_leaves(reported), pytree.tree_leaves(info))
        torch.testing.assert_close(pytree.tree_leaves(moved), pytree.tree_leaves(state))

    def test_batches_are_as_many_as_steps(self, params):
        step, state, batches, keys = self.step(params)
        with pytest.raises(ValueError, match=r"must have 4 rows, one a step, got \(3, 4, 5\)"):
            fs.compiled(step, num_steps=4)(state, batches, keys)

    def test_a_torch_without_loops_is_refused(self, monkeypatch):
        monkeypatch.setattr(stepping, "LOOPS", False)
        with pytest.raises(RuntimeError, match="num_steps needs a torch with while_loop"):
            fs.compiled(lambda state: state, num_steps=2)


class TestAuto:
    """`compile="auto"`: decided by the clock, before the first step."""

    @pytest.fixture
    def pace(self, monkeypatch, eager):
        """Seconds of a call, eager and compiled; 33 steps are many."""
        monkeypatch.setattr(timing, "_FEWEST_STEPS", 33)
        seconds = {False: 10.0, True: 1.0}
        calls = []

        def seconds_of_calls(run, number=4):
            calls.append(run.stepper.is_compiled)
            if isinstance(here := seconds[run.stepper.is_compiled], Exception):
                raise here
            return [here] * number

        monkeypatch.setattr(timing, "seconds_of_calls", seconds_of_calls)
        return seconds, calls

    def test_short_runs_are_not_timed(self, pace):
        samples = run(fs.sgld(1e-3, nbeta=3.0), **SETTINGS | {"num_burnin_steps": 17})
        assert not samples.options["is_compiled"]
        assert pace[1] == []

    @pytest.mark.parametrize(
        ("eager_seconds", "compiled_seconds", "is_compiled"),
        [
            (1e-3, 1e-6, False),
            (10, 1, True),
            (10, 170, False),
            (10, RuntimeError("no"), False),
        ],
    )
    def test_the_faster_steps_are_taken(self, pace, eager_seconds, compiled_seconds, is_compiled):
        pace[0][False], pace[0][True] = eager_seconds, compiled_seconds
        samples = run(fs.sgld(1e-3, nbeta=3.0), **SETTINGS)
        assert samples.options["is_compiled"] == is_compiled
        assert (True in pace[1]) == (eager_seconds == 10)

    def test_it_says_so(self, pace, caplog):
        caplog.set_level("INFO", logger="funcsgmcmc")
        run(fs.sgld(1e-3, nbeta=3.0), progress=True, **SETTINGS)
        assert "steps are compiled: 2 s in place of 330 s" in caplog.text
        pace[0][True] = RuntimeError("no compiler was found\nmore")
        run(fs.sgld(1e-3, nbeta=3.0), progress=True, **SETTINGS)
        assert "steps are not compiled: no compiler was found" in caplog.text

    def test_a_resumed_run_does_not_choose_again(self, pace, tmp_path):
        settings = SETTINGS | {"record": [], "store": tmp_path / "run"}
        run(fs.sgld(1e-3, nbeta=3.0), **settings)
        pace[0][True] = 200.0
        pace[1].clear()
        longer = settings | {"num_draws": 4, "resume": True}
        assert run(fs.sgld(1e-3, nbeta=3.0), **longer).options["is_compiled"]
        assert pace[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgld", "sgnht"])
def test_compiled_blocks_are_compiled_steps(name, monkeypatch):
    """With the compiler that users have, which may add in another order within a loop."""
    sampler = {"sgld": fs.sgld, "sgnht": fs.sgnht}[name](1e-3, nbeta=3.0)
    in_blocks = run(sampler, compile=True, **SETTINGS)
    monkeypatch.setattr(stepper, "LOOPS", False)
    steps = run(sampler, compile=True, **SETTINGS)
    for block, step in zip(whole(in_blocks), whole(steps), strict=True):
        torch.testing.assert_close(block, step, rtol=1e-9, atol=1e-12, equal_nan=True)
