"""Batches: minibatches by the key, structures of tensors, iterables."""

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import funcsgmcmc as fs
from problems import assert_same, classification, run


def test_minibatches_are_drawn_with_replacement_or_by_epochs(params):
    examples = torch.arange(10)[:, None] * 1.0
    seen: dict[str, torch.Tensor] = {}
    for minibatches in ("replacement", "epochs"):
        samples = fs.sample(
            # The loss encodes which examples a batch holds, in base 11.
            lambda p, batch: p["w"] * 0 + (batch[:, 0] * 11.0 ** torch.arange(3)).sum(),
            {"w": torch.zeros(())},
            examples,
            fs.sgld(0.0, nbeta=1.0),
            num_chains=400,
            num_draws=6,
            batch_size=3,
            minibatches=minibatches,
            key=fs.key(1),
        )
        digits = samples.losses.long()[..., None] // 11 ** torch.arange(3) % 11
        seen[minibatches] = digits
        counts = torch.bincount(digits.flatten(), minlength=10)
        # 7,200 draws, χ² with 9 degrees of freedom (smaller for epochs): 40 has probability 1e-5.
        assert ((counts - 720.0) ** 2 / 720).sum() < 40
    epochs = seen["epochs"].reshape(400, 2, 9).sort(-1).values
    assert (epochs.diff(dim=-1) > 0).all()
    assert not torch.equal(seen["epochs"][:, :3], seen["epochs"][:, 3:])
    repeats = (seen["replacement"].sort(-1).values.diff(dim=-1) == 0).any(-1).double().mean()
    # Of three draws out of ten, two agree with probability 0.28; 2,400 batches.
    assert abs(repeats - 0.28) < 4 * (0.28 * 0.72 / 2400) ** 0.5
    assert len(seen["replacement"].reshape(400, -1).unique(dim=0)) == 400


def coded(minibatches: str, **settings) -> torch.Tensor:
    """The examples, of 10, that each chain saw at each of 6 steps, `[C, 6, 3]`."""
    samples = fs.sample(
        # The loss encodes which examples a batch holds, in base 11.
        lambda p, batch: p["w"] * 0 + (batch[:, 0] * 11.0 ** torch.arange(3)).sum(),
        {"w": torch.zeros(())},
        torch.arange(10)[:, None] * 1.0,
        fs.sgld(0.0, nbeta=1.0),
        num_draws=6,
        batch_size=3,
        minibatches=minibatches,
        shared_batches=True,
        **settings,
    )
    assert samples.options["shared_batches"] is True
    return samples.losses.long()[..., None] // 11 ** torch.arange(3) % 11


@pytest.mark.parametrize("minibatches", ["replacement", "epochs"])
def test_chains_that_share_batches_see_the_same_ones(minibatches):
    """They depend on the key alone: not on how many chains there are, on indices or chunks."""
    seen = coded(minibatches, num_chains=5, key=fs.key(1))
    assert torch.equal(seen, seen[:1].expand_as(seen))
    for how in ({"num_chains": 2}, {"chunk_size": 2}, {"chain_method": "loop"}):
        other = coded(minibatches, **({"num_chains": 5, "key": fs.key(1)} | how))
        assert torch.equal(other[0], seen[0])
    later = coded(minibatches, num_chains=1, chain_offset=7, key=fs.key(1))
    assert torch.equal(later[0], seen[0])
    if minibatches == "epochs":
        assert (seen[0].reshape(2, 9).sort(-1).values.diff(dim=-1) > 0).all()
    keys = torch.cat([coded(minibatches, num_chains=1, key=fs.key(seed)) for seed in range(60)])
    assert len(keys.reshape(60, -1).unique(dim=0)) == 60
    # 1,080 draws, χ² with 9 degrees of freedom (smaller for epochs): 40 has probability 1e-5.
    counts = torch.bincount(keys.flatten(), minlength=10)
    assert ((counts - 108.0) ** 2 / 108).sum() < 40


def test_a_shared_batch_is_not_mapped(params):
    """What depends on the batch alone is computed once for all chains."""
    model, _ = classification()
    loss = fs.module_loss(model, cross_entropy)
    mapped = []

    def loss_fn(params, batch):
        mapped.append(torch._C._functorch.is_batchedtensor(batch[0]))
        return loss(params, batch)

    for shared in (False, True):
        run(fs.sgld(1e-3, nbeta=5.0), loss_fn=loss_fn, shared_batches=shared, full_loss=0)
        # The last of the run's own evaluations, not those that try the function.
        assert mapped[-1] is not shared


def test_runs_with_shared_batches_do_not_depend_on_how_they_are_made(params):
    sampler = fs.sgnht(1e-3, nbeta=5.0)
    whole = run(sampler, shared_batches=True)
    for how in ({"chunk_size": 2}, {"chain_method": "loop"}):
        assert_same(whole, run(sampler, shared_batches=True, **how))
    fewer = run(sampler, shared_batches=True, num_chains=2)
    torch.testing.assert_close(fewer.losses, whole.losses[:2], rtol=1e-9, atol=1e-11)
    estimated = fs.svrg(fs.module_loss(classification()[0], cross_entropy), 2)
    both = [
        run(sampler, loss_fn=estimated, shared_batches=True, chain_method=method)
        for method in ("vmap", "loop")
    ]
    assert_same(*both)
    everything = run(sampler, shared_batches=True, batch_size=None)
    assert everything.options["shared_batches"] is False
    assert_same(everything, run(sampler, batch_size=None), exact=True)


def test_structures_of_tensors_are_the_same_data(params):
    model, (inputs, targets) = classification()

    def loss_fn(params, batch):
        return fs.module_loss(model, cross_entropy)(params, (batch["inputs"], batch["targets"]))

    sampler = fs.sgld(1e-3, nbeta=5.0)
    expected = run(sampler)
    assert_same(expected, run(sampler, data=TensorDataset(inputs, targets)), exact=True)
    pairs = {"inputs": inputs, "targets": targets}
    for data in (pairs, TensorDict(pairs, batch_size=[40])):
        samples = fs.sample(
            loss_fn,
            params,
            data,
            sampler,
            num_chains=5,
            num_draws=6,
            batch_size=8,
            key=fs.key(3),
            init_noise=0.05,
        )
        assert torch.equal(samples.losses, expected.losses)
        torch.testing.assert_close(samples.initial_loss, expected.initial_loss)


def test_iterables_give_every_chunk_the_same_batch(params):
    _, (inputs, targets) = classification()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16)
    sampler = fs.sgld(1e-3, nbeta=5.0)
    whole = run(sampler, data=loader, batch_size=None)
    batches = [(inputs[i : i + 16], targets[i : i + 16]) for i in (0, 16, 32)]
    for data in (batches, iter(batches * 2)):
        assert torch.equal(run(sampler, data=data, batch_size=None).losses, whole.losses)
    assert_same(whole, run(sampler, data=loader, batch_size=None, chunk_size=2))
    assert_same(whole, run(sampler, data=loader, batch_size=None, chain_method="loop"))
    full = run(sampler, batch_size=None)
    torch.testing.assert_close(whole.initial_loss, full.initial_loss)
    assert run(sampler, data=iter(batches * 2), batch_size=None).initial_loss is None


def test_given_initial_loss_is_used(params):
    samples = run(fs.sgld(1e-3, nbeta=5.0), initial_loss=0.25)
    assert samples.initial_loss.item() == 0.25
