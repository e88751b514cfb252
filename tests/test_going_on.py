"""Runs that go on from a record: the same chains as one uninterrupted run, bit for bit."""

import pytest
import torch
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from cases import BY_NAME, CASES, Case
from funcsgmcmc import tree
from problems import classification, observables, records, run

SETTINGS = {"num_chains": 3, "num_steps_between_draws": 2, "observables": observables()}


def joined(first: fs.Samples, second: fs.Samples) -> list[torch.Tensor]:
    """What two runs recorded, one after the other, and the state in the end."""
    assert second.first_step == first.first_step + first.num_steps

    def join(a, b):
        return torch.cat([a, b], 1)

    return [
        join(first.losses, second.losses),
        join(first.distances, second.distances),
        *(join(first.draws[name], second.draws[name]) for name in tree.names(first.draws)),
        *map(join, first.metrics, second.metrics),
        *map(join, first.observables.values(), second.observables.values()),
        *([] if first.log_weights is None else [join(first.log_weights, second.log_weights)]),
        second.frozen_at,
        torch.cat([first.draw_steps, second.draw_steps]),
        *pytree.tree_leaves(second.state),
    ]


def whole(samples: fs.Samples) -> list[torch.Tensor]:
    return [
        samples.losses,
        samples.distances,
        *samples.draws.values(),
        *samples.metrics,
        *samples.observables.values(),
        *([] if samples.log_weights is None else [samples.log_weights]),
        *([] if samples.draw_moments is None else pytree.tree_leaves(samples.draw_moments)),
        samples.frozen_at,
        samples.draw_steps,
        *pytree.tree_leaves(samples.state),
    ]


def assert_identical(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_runs_are_one(case: Case, params):
    """Noise, minibatches, schedules, momenta, averages and thermostats go on."""
    settings = SETTINGS | {"record": ["draws", "metrics"]}
    first = run(case.make(params), num_draws=4, num_burnin_steps=3, **settings)
    second = run(case.make(params), first, num_draws=3, init_noise=0.0, **settings)
    together = run(case.make(params), num_draws=7, num_burnin_steps=3, **settings)
    assert_identical(joined(first, second), whole(together))


@pytest.mark.parametrize(
    "how",
    [
        {"chain_method": "loop"},
        {"chunk_size": 2},
        {"minibatches": "epochs"},
        {"shared_batches": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        {"batch_size": None},
    ],
    ids=str,
)
def test_however_chains_are_run(how, params):
    sampler = fs.sgnht(1e-3, nbeta=3.0)
    first = run(sampler, num_draws=4, **SETTINGS, **how)
    second = run(sampler, first, num_draws=3, init_noise=0.0, **SETTINGS, **how)
    third = run(sampler, second, num_draws=2, init_noise=0.0, **SETTINGS, **how)
    assert third.first_step == 14
    together = run(sampler, num_draws=9, **SETTINGS, **how)
    torch.testing.assert_close(together.losses[:, 8:14], second.losses, rtol=0, atol=0)
    torch.testing.assert_close(together.losses[:, 14:], third.losses, rtol=0, atol=0)
    assert_identical(pytree.tree_leaves(third.state), pytree.tree_leaves(together.state))


def test_noise_is_not_used_again(params):
    """Parameters start anew, and their noise with them; a record goes on."""
    sampler = fs.sgld(1e-3, nbeta=0.0, anchor=params)
    settings = {"num_chains": 2, "init_noise": 0.0, "num_draws": 3}
    first = run(sampler, params, **settings)
    noise = first.state.params["0.weight"] - params["0.weight"]
    again = run(sampler, first.state.params, **settings)
    torch.testing.assert_close(
        again.state.params["0.weight"] - first.state.params["0.weight"], noise
    )
    on = run(sampler, first, **settings)
    moved = on.state.params["0.weight"] - first.state.params["0.weight"]
    assert (moved - noise).abs().min() > 1e-7


def test_some_chains_go_on_as_themselves(params):
    sampler = fs.sgld(torch.tensor([1e-3, 1e-4, 1e-3, 1e-5]), nbeta=3.0)
    first = run(sampler, num_chains=4)
    on = run(sampler, first, num_chains=4, init_noise=0.0)
    some = first[[3, 1]]
    part = run(some.sampler, some, num_chains=2, init_noise=0.0)
    assert part.chains.tolist() == [3, 1]
    for ours, theirs in zip(records(part), records(on[[3, 1]]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_frozen_chain_stays_frozen(params):
    sampler = fs.sgld(torch.tensor([1e-3, 1e300, 1e-3]), nbeta=3.0, localization=1.0)
    settings = {"num_chains": 3, "record": ["draws", "metrics"]}
    first = run(sampler, **settings)
    on = run(sampler, first, init_noise=0.0, **settings)
    assert on.healthy.tolist() == [True, False, True]
    assert [str(each) for each in on.frozen] == [
        "chain 1 frozen at step 1: in the run that this one went on from"
    ]
    assert on.losses[1].isnan().all()
    assert torch.equal(on.state.params["0.weight"][1], first.state.params["0.weight"][1])
    together = run(sampler, num_draws=12, **settings)
    assert_identical(joined(first, on), whole(together))


def test_the_anchor_stays_where_it_was(params):
    sampler = fs.sgld(1e-2, nbeta=3.0, localization=5.0)
    first = run(sampler, params, num_chains=2)
    on = run(sampler, first, num_chains=2, init_noise=0.0)
    assert torch.equal(on.sampler.anchor["0.weight"], params["0.weight"])
    torch.testing.assert_close(on.initial_loss, first.initial_loss)


def test_a_state_goes_on_too(params):
    """One of a run, whose sampler has the anchor; or one of a loop of one's own."""
    sampler = fs.sgnht(1e-3, nbeta=3.0, anchor=params, localization=2.0)
    first = run(sampler, num_chains=2)
    on = run(sampler, first, num_chains=2, init_noise=0.0)
    of_state = run(sampler, first.state, num_chains=2, init_noise=0.0)
    assert_identical(whole(on), whole(of_state))
    plain = fs.sgld(1e-3, nbeta=3.0, localization=2.0)
    model, data = classification()
    loss_fn = fs.module_loss(model, torch.nn.functional.cross_entropy)
    step = torch.vmap(fs.kernel(plain, loss_fn), in_dims=(0, None, 0))
    keys = fs.random.fold_in(fs.key(3), torch.arange(2))
    state = plain.init(params.expand(2))
    for _ in range(4):
        state, _ = step(state, data, keys)
    on = run(plain, state, num_chains=2, init_noise=0.0, batch_size=None)
    assert on.first_step == 4
    assert torch.equal(on.sampler.anchor["0.weight"][0], params["0.weight"])
    together = run(plain, params, num_chains=2, num_draws=10, init_noise=0.0, batch_size=None)
    torch.testing.assert_close(on.losses, together.losses[:, 4:])


def test_svrg_and_control_variates_go_on(params):
    model, _ = classification()
    loss_fn = fs.module_loss(model, torch.nn.functional.cross_entropy)
    for estimator, exact in ((fs.control_variates(loss_fn), True), (fs.svrg(loss_fn, 4), False)):
        first = run(fs.sgld(1e-3, nbeta=3.0), loss_fn=estimator, num_draws=6, num_chains=2)
        on = run(fs.sgld(1e-3, nbeta=3.0), first, loss_fn=estimator, num_chains=2, init_noise=0.0)
        assert on.healthy.all()
        together = run(fs.sgld(1e-3, nbeta=3.0), loss_fn=estimator, num_draws=12, num_chains=2)
        if exact:  # the point of svrg is made anew, where the run goes on
            torch.testing.assert_close(on.losses, together.losses[:, 6:], rtol=0, atol=0)


@pytest.mark.parametrize("how", [{"chunk_size": 2}, {"chain_method": "loop"}], ids=str)
def test_an_interrupt_within_a_step_leaves_chains_that_go_on(how, params):
    """The step is finished, so that no chain is ahead of the others."""
    model, _ = classification()
    loss_fn = fs.module_loss(model, torch.nn.functional.cross_entropy)
    calls = []

    def interrupted(params, batch):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return loss_fn(params, batch)

    settings = {"num_chains": 4, "num_draws": 20, "record": ["draws", "metrics"]}
    sampler = fs.sgnht(1e-3, nbeta=3.0)
    with pytest.raises(fs.SamplingInterrupt, match=r"interrupted after \d+ of 20 steps") as raised:
        run(sampler, loss_fn=interrupted, **settings, **how)
    first = raised.value.samples
    assert 0 < first.num_steps < 20
    assert len(first.state.step.unique()) == 1
    rest = settings | {"num_draws": 20 - first.num_steps, "init_noise": 0.0}
    on = run(sampler, first, loss_fn=loss_fn, **rest, **how)
    assert_identical(joined(first, on), whole(run(sampler, loss_fn=loss_fn, **settings, **how)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"init_noise": 0.1}, ValueError, "init_noise must be 0 where chains go on, got 0.1"),
        ({"num_chains": 3}, ValueError, r"params must have batch size \(3,\), one .* got \(2,\)"),
        ({"chain_offset": 5}, ValueError, "chain_offset must be left out where chains go on"),
    ],
)
def test_runs_that_do_not_fit_are_refused(change, error, message, params):
    first = run(fs.sgld(1e-3, nbeta=3.0), num_chains=2)
    settings = {"num_chains": 2, "init_noise": 0.0} | change
    with pytest.raises(error, match=message):
        run(fs.sgld(1e-3, nbeta=3.0), first, **settings)


def test_states_that_do_not_fit_are_refused(params):
    first = run(fs.sgld(1e-3, nbeta=3.0), num_chains=2)
    settings = {"num_chains": 2, "init_noise": 0.0}
    with pytest.raises(TypeError, match=r"must be a state of SGNHT, a Thermostat.* got a Langevin"):
        run(fs.sgnht(1e-3, nbeta=3.0), first, **settings)
    with pytest.raises(ValueError, match="the sampler needs an anchor to go on from a state"):
        run(fs.sgld(1e-3, nbeta=3.0), first.state, **settings)
    with pytest.raises(ValueError, match=r"the state\['preconditioner.+ is missing"):
        run(fs.rmsprop_sgld(1e-3, nbeta=3.0), first, **settings)
    step = first.state.step.clone()
    step[0] += 1
    uneven = first.state.replace(step=step)
    with pytest.raises(ValueError, match=r"the same number of steps, got \[6, 7\]: their run"):
        run(fs.sgld(1e-3, nbeta=3.0, anchor=params), uneven, **settings)


@pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in ("sgld", "contour_sgld", "sgnht")], ids=str
)
def test_a_run_and_its_continuation_are_joined(case: Case, params):
    settings = SETTINGS | {"record": ["draws", "metrics"]}
    first = run(case.make(params), num_draws=4, num_burnin_steps=3, **settings)
    second = run(case.make(params), first, num_draws=3, init_noise=0.0, **settings)
    together = run(case.make(params), num_draws=7, num_burnin_steps=3, **settings)
    both = first.joined(second)
    assert_identical(whole(both), whole(together))
    assert (both.first_step, both.num_burnin_steps) == (0, 3)
    if both.log_weights is None:
        assert fs.llc(both).mean == fs.llc(together).mean


def test_other_runs_are_not_joined(params):
    sampler = fs.sgld(1e-3, nbeta=3.0)
    first = run(sampler, num_chains=2)
    on = run(sampler, first, num_chains=2, init_noise=0.0)
    with pytest.raises(
        ValueError, match=r"must go on from step 12 of .* one from step 6 of chains"
    ):
        first.joined(on).joined(on)
    with pytest.raises(
        ValueError, match=r"of chains \[0, 1\], got one from step 6 of chains \[1\]"
    ):
        first.joined(on[1])
    bare = run(sampler, first, num_chains=2, init_noise=0.0, record=[])
    with pytest.raises(ValueError, match="must have recorded the same draws"):
        first.joined(bare)


def test_a_run_without_a_healthy_chain_does_not_go_on(params):
    sampler = fs.sgld(1e300, nbeta=3.0, localization=1.0)
    first = run(sampler, num_chains=2)
    assert not first.healthy.any()
    with pytest.raises(
        ValueError, match="at least one chain must be healthy to go on, got 2 frozen"
    ):
        run(sampler, first, num_chains=2, init_noise=0.0)
