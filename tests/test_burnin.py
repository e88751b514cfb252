"""`num_burnin_steps="auto"`: burn-in ends when drift is no longer seen; the run is as any other."""

import warnings

import pytest
import torch

import funcsgmcmc as fs
from interruptions import Failing
from linear import GAMMA, NBETA, regression, sampled
from problems import run
from test_going_on import assert_identical, whole

SGLD = fs.sgld(1e-3, nbeta=3.0, localization=50.0)
SETTINGS = {"num_chains": 4, "num_draws": 120, "num_steps_between_draws": 2}


def slow(params, batch):
    """A quadratic with 29 flat directions, which localization alone holds."""
    return params["w"][0] ** 2 / 2


def of_slow_chains(sampler, **settings) -> fs.Samples:
    """Chains that start at the anchor, and spread until localization holds them."""
    options = {"num_chains": 8, "num_draws": 300, "num_steps_between_draws": 10, "key": fs.key(0)}
    start = {"w": torch.zeros(30)}
    return fs.sample(slow, start, torch.zeros(1), sampler, **(options | settings))


def test_a_burnin_that_ended_is_one_that_was_given():
    """Bit for bit: all that is recorded, and where the chains are."""
    found = run(SGLD, num_burnin_steps="auto", **SETTINGS)
    length = found.num_burnin_steps
    assert 100 < length < 240
    assert int(found.draw_steps[0]) == length + 1
    assert found.num_steps == length + 240
    assert found.options["burnin_settled"] is True
    given = run(SGLD, num_burnin_steps=length, **SETTINGS)
    assert given.options["burnin_settled"] is None
    assert_identical(whole(found), whole(given))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"chunk_size": 2}, {"chain_method": "loop"}], ids=str)
def test_it_does_not_depend_on_how_chains_are_run(how):
    assert run(SGLD, num_burnin_steps="auto", **SETTINGS, **how).num_burnin_steps == (
        run(SGLD, num_burnin_steps="auto", **SETTINGS).num_burnin_steps
    )


@pytest.mark.parametrize("localization", [8.0, pytest.param(40.0, marks=pytest.mark.slow)])
def test_it_lasts_as_long_as_flat_directions_need(localization):
    """Relaxation times 2/(εγ): squared distances are those of the stationary chain, to 8 %."""
    lr = 1e-3
    sampler = fs.sgld(lr, nbeta=100.0, localization=localization)
    samples = of_slow_chains(sampler, num_burnin_steps="auto")
    assert samples.options["burnin_settled"]
    relaxation = 2 / (lr * localization)
    assert relaxation < samples.num_burnin_steps < 20 * relaxation
    squares = samples.distances[:, samples.num_burnin_steps :].square().mean()
    expected = 29 / localization + 1 / (100 + localization)
    assert float(squares) == pytest.approx(expected, rel=0.08)


@pytest.mark.slow
def test_estimates_after_it_are_right():
    """Chains that start far off, of a regression whose learning coefficient is known."""
    problem = regression()
    inside = 0
    for seed in range(4):
        settings = {"num_burnin_steps": "auto", "init_noise": 1.0, "key": fs.key(seed)}
        sampler = fs.baoa(0.02, nbeta=NBETA, localization=GAMMA)
        estimate = fs.llc(sampled(problem, sampler, **settings))
        inside += abs(estimate.mean - problem.truth) < 2 * estimate.error
        assert abs(estimate.mean - problem.truth) < 4 * estimate.error
    assert inside >= 3  # of four


def test_a_chain_that_wanders_off_ends_it_at_the_limit():
    """Without localization the flat directions are random walks."""
    with pytest.warns(UserWarning, match="ended at its limit of 400 steps, as many as the draws"):
        samples = of_slow_chains(fs.sgld(1e-3, nbeta=100.0), num_burnin_steps="auto", num_draws=40)
    assert (samples.num_burnin_steps, samples.num_steps) == (400, 800)
    assert samples.options["burnin_settled"] is False
    assert any("ended at its limit of 400 steps" in text for text in fs.llc(samples).warnings)


def test_few_chains_and_frozen_chains():
    """Fewer than four chains are told by parts of their steps; frozen ones are left out."""
    assert run(SGLD, **(SETTINGS | {"num_chains": 1}), num_burnin_steps="auto").num_steps > 340
    lr = torch.tensor([1e-3, 1e300, 1e-3, 1e-3])
    sampler = fs.sgld(lr, nbeta=3.0, localization=50.0)
    samples = run(sampler, num_burnin_steps="auto", **SETTINGS)
    assert samples.options["burnin_settled"]
    assert samples.healthy.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    "steps",
    [pytest.param([60], marks=pytest.mark.slow), [110, 200]],
    ids=["within", "after"],
)
@pytest.mark.parametrize(
    "seconds",
    [0.0, pytest.param(1e6, marks=pytest.mark.slow)],
    ids=["checkpoints", "one checkpoint"],
)
def test_it_is_resumed(steps, seconds, tmp_path):
    """Also from a checkpoint that is older than its end."""
    settings = SETTINGS | {"num_burnin_steps": "auto"}
    store = {"store": tmp_path / "run.zarr", "resume": True, "checkpoint_seconds": seconds}
    for number in steps:
        failing = Failing()
        failing.calls_left = number
        with pytest.raises(fs.SamplingError, match="on fire"):
            run(SGLD, loss_fn=failing, **settings, **store)
    resumed = run(SGLD, loss_fn=Failing(), **settings, **store)
    uninterrupted = run(SGLD, loss_fn=Failing(), **settings)
    assert_identical(whole(resumed), whole(uninterrupted))
    assert resumed.num_burnin_steps == uninterrupted.num_burnin_steps
    assert resumed.options["burnin_settled"] is True
    longer = run(SGLD, loss_fn=Failing(), **(settings | {"num_draws": 130}), **store)
    assert longer.num_burnin_steps == resumed.num_burnin_steps
    assert longer.num_draws == 130


def test_the_file_has_the_steps_of_the_draws(tmp_path):
    import xarray

    samples = run(SGLD, num_burnin_steps="auto", store=tmp_path / "run.zarr", **SETTINGS)
    with xarray.open_datatree(tmp_path / "run.zarr", engine="zarr") as file:
        steps = file["constant_data"]["step"].values.tolist()
        assert steps == samples.draw_steps.tolist()
        assert file["trace"].sizes["step"] == samples.num_steps
        draws, trace = file["posterior"]["loss"].values, file["trace"]["loss"].values
        assert (draws == trace[:, steps]).all()
        assert file.attrs["num_burnin_steps"] == samples.num_burnin_steps


def test_settings_that_change_and_other_words_are_refused():
    decay = fs.schedules.cosine(1e-3, 1e-4, num_steps=10)
    with pytest.raises(ValueError, match="do not change with the step, got a schedule for lr"):
        run(fs.sgld(decay, nbeta=3.0), num_burnin_steps="auto")
    with pytest.raises(ValueError, match=r"num_burnin_steps must be .*'auto'"):
        run(SGLD, num_burnin_steps="automatic")


def test_progress_counts_to_the_new_end(caplog):
    with caplog.at_level("INFO", logger="funcsgmcmc"), warnings.catch_warnings():
        samples = run(SGLD, num_burnin_steps="auto", progress=True, **SETTINGS)
    text = caplog.text
    assert f"burn-in ended after {samples.num_burnin_steps} steps" in text
    assert f"{samples.num_steps} of {samples.num_steps} steps" in text
