"""Failures stay where they happen, and nothing recorded is lost."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from funcsgmcmc import tree
from problems import assert_same, classification, observables, records, run


def poisoned(params: TensorDict, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A quadratic loss; a chain that carries poison gets NaN from step 5 on."""
    x, step = batch
    loss = ((params["w"] - x) ** 2).mean()
    return torch.where((params["poison"] > 0) & (step >= 5), torch.nan, loss)


def poison_run(chain: int | None, **settings) -> fs.Samples:
    start = TensorDict({"w": torch.zeros(64, 3), "poison": torch.zeros(64)}, batch_size=64)
    if chain is not None:
        start["poison"][chain] = 1.0
    x = torch.linspace(-1, 1, 10)
    data = [(x[t % 10], torch.tensor(t)) for t in range(12)]
    options = {"num_draws": 12, "record": ["draws", "metrics"]} | settings
    return fs.sample(
        poisoned,
        start,
        data,
        fs.sgld(0.1, nbeta=4.0, mask={"w": torch.ones(3), "poison": torch.zeros(())}),
        num_chains=64,
        key=fs.key(4),
        initial_loss=0.0,
        **options,
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"chunk_size": 10}, {"chain_method": "loop"}, {"compile": True}],
    ids=["vmap", "chunks", "loop", "compiled"],
)
def test_a_poisoned_chain_is_frozen_and_the_others_untouched(settings):
    healthy, sick = poison_run(None, **settings), poison_run(17, **settings)
    assert [str(frozen) for frozen in sick.frozen] == ["chain 17 frozen at step 5: loss is nan"]
    assert sick.healthy.tolist() == [c != 17 for c in range(64)]
    assert healthy.frozen == []
    for ours, theirs in zip(records(sick), records(healthy), strict=True):
        assert torch.equal(ours[sick.healthy], theirs[sick.healthy])
    # It stays at its last finite state, which is that of the healthy run at step 5.
    assert torch.equal(sick.state.params["w"][17], healthy.draws["w"][17, 5])
    assert sick.state.step[17] == 5
    assert torch.equal(sick.draws["w"][17, :6], healthy.draws["w"][17, :6])
    assert (sick.draws["w"][17, 5:] == sick.draws["w"][17, 5]).all()
    assert torch.equal(sick.losses[17, :5], healthy.losses[17, :5])
    assert sick.losses[17, 5:].isnan().all()
    assert sick.health() == "63 of 64 chains\nchain 17 frozen at step 5: loss is nan"


def test_parameters_that_overflow_freeze_their_chain(params):
    lr = torch.tensor([1e-3, 1e300, 1e-3])
    samples = run(fs.sgld(lr, nbeta=1e300, localization=1.0, noise_level=0.0), num_chains=3)
    (frozen,) = samples.frozen
    assert (frozen.chain, frozen.reason) == (1, "its state is not finite after the update")
    assert tree.all_finite(samples.state, samples.state.shape).all()


def test_a_frozen_chain_keeps_its_whole_state(params):
    lr = torch.tensor([1e-3, 1e-3])
    _, (inputs, targets) = classification()
    bad = torch.full_like(inputs[:8], torch.nan)
    batches = [(inputs[:8], targets[:8])] * 3 + [(bad, targets[:8])] + [(inputs[8:16], targets[:8])]
    settings = {"data": batches, "batch_size": None, "num_chains": 2, "initial_loss": 1.0}
    samples = run(fs.rmsprop_sgld(lr, nbeta=3.0), num_draws=5, **settings)
    before = run(fs.rmsprop_sgld(lr, nbeta=3.0), num_draws=3, **settings)
    assert samples.frozen_at.tolist() == [3, 3]
    for ours, theirs in zip(
        pytree.tree_leaves(samples.state), pytree.tree_leaves(before.state), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_averages_that_overflow_freeze_their_chain():
    samples = fs.sample(
        lambda params, batch: 1e30 * params["w"].sum(),
        {"w": torch.ones(2, dtype=torch.float32)},
        torch.ones(4),
        fs.rmsprop_sgld(1e-3, nbeta=1.0),
        num_chains=2,
        num_draws=2,
        key=fs.key(0),
        initial_loss=0.0,
    )
    assert not samples.healthy.any()


def test_a_failure_within_a_step_leaves_a_readable_record(params):
    """A chain of the first chunk fails in the step in which the second chunk raises."""
    calls = []

    def loss_fn(params, batch):
        calls.append(1)
        # Checks of the loss, then two chunks a step: chunk 1 raises in step 3.
        if len(calls) == first_call + 8:
            raise RuntimeError("no more")
        step_three = len(calls) > first_call + 6
        return (params["w"] ** 2).sum() * (torch.nan if step_three else 1.0)

    first_call = 5
    with pytest.raises(fs.SamplingError, match="sampling stopped in step 3: no more") as error:
        fs.sample(
            loss_fn,
            {"w": torch.ones(3)},
            torch.ones(4),
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=2,
            num_draws=6,
            chunk_size=1,
            key=fs.key(0),
            initial_loss=0.0,
        )
    samples = error.value.samples
    assert samples.num_steps == 3
    assert samples.health() == "2 of 2 chains"
    assert list(fs.summary(samples).table.index) == ["llc", "loss", "distance"]


def test_divergence_can_raise():
    with pytest.raises(fs.DivergenceError, match="chain 17 frozen at step 5: loss is nan") as error:
        poison_run(17, on_divergence="raise")
    assert error.value.samples.num_steps == 6
    torch.testing.assert_close(
        error.value.samples.losses, poison_run(17).losses[:, :6], equal_nan=True, rtol=0, atol=0
    )


def test_a_failure_keeps_what_was_recorded(params):
    _, (inputs, targets) = classification()
    batches = [(inputs[:8], targets[:8])] * 7
    sampler = fs.sgld(1e-3, nbeta=5.0)
    settings = {"batch_size": None, "num_burnin_steps": 2, "observables": observables()}
    with pytest.raises(
        fs.SamplingError, match="sampling stopped in step 7: data must give"
    ) as error:
        run(sampler, data=iter(batches), num_draws=20, **settings)
    assert isinstance(error.value.__cause__, ValueError)
    kept = error.value.samples
    assert (kept.num_steps, kept.num_draws) == (7, 5)
    assert kept.draws.batch_size == (5, 5)
    assert_same(kept, run(sampler, data=batches, num_draws=5, **settings))


def test_an_interrupt_carries_what_was_recorded(params):
    _, (inputs, targets) = classification()

    def batches():
        for _ in range(4):
            yield inputs[:8], targets[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted after 4 of 6 steps") as raised:
        run(fs.sgld(1e-3, nbeta=5.0), data=batches(), batch_size=None)
    assert raised.value.samples.losses.shape == (5, 4)
    assert pickle.loads(pickle.dumps(raised.value)).samples.losses.shape == (5, 4)
