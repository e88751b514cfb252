"""Runs: chains do not depend on their company, failures stay where they happen, bad input."""

import sys
import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import funcsgmcmc as fs
from funcsgmcmc import random, tree
from problems import assert_same, classification, records, run
from registry import CASES


def observables() -> dict:
    return {"norm": tree.norm, "first": lambda params: params["0.weight"][0]}


@pytest.fixture(scope="module")
def params():
    torch.set_default_dtype(torch.float64)
    return fs.params_of(classification()[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chains_do_not_depend_on_their_company(case, params):
    sampler = case.make(params)
    settings = {"observables": observables(), "num_burnin_steps": 2, "num_steps_between_draws": 2}
    whole = run(sampler, **settings)
    assert_same(whole, run(sampler, **settings), exact=True)
    for chunk_size in (1, 2, 3, 4, 7):
        assert_same(whole, run(sampler, **settings, chunk_size=chunk_size))
    assert_same(whole, run(sampler, **settings, chain_method="loop"))
    alone = run(sampler, **settings, num_chains=1, chain_offset=3)
    for ours, theirs in zip(records(alone), records(whole), strict=True):
        torch.testing.assert_close(ours[0], theirs[3], rtol=1e-9, atol=1e-11)


def test_a_chain_among_64_is_the_chain_alone(params):
    sampler = fs.rmsprop_sgld(1e-3, nbeta=10.0, localization=1.0)
    whole = run(sampler, num_chains=64)
    for chain in (0, 17, 63):
        alone = run(sampler, num_chains=1, chain_offset=chain)
        for ours, theirs in zip(records(alone), records(whole), strict=True):
            torch.testing.assert_close(ours[0], theirs[chain], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("minibatches", ["replacement", "epochs"])
def test_compiled_run_is_the_eager_run(params, minibatches):
    sampler = CASES[1].make(params)
    eager = run(sampler, minibatches=minibatches)
    assert_same(eager, run(sampler, minibatches=minibatches, compile=True))
    assert_same(eager, run(sampler, minibatches=minibatches, compile="noise"))
    chunked = run(sampler, minibatches=minibatches, compile=True, chunk_size=3)
    assert_same(eager, chunked)


def test_compiled_runs_share_code(params):
    model, data = classification()
    loss_fn = fs.module_loss(model, cross_entropy)

    def go(lr, key, offset):
        return fs.sample(
            loss_fn,
            params,
            data,
            fs.sgld(lr, nbeta=2.0, mask=params.apply(lambda leaf: torch.full_like(leaf, lr))),
            num_chains=3,
            num_draws=2,
            batch_size=8,
            key=fs.key(key),
            chain_offset=offset,
            compile=True,
        )

    go(0.1, 0, 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        go(0.2, 5, 40)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sample_changes_no_input(case, params):
    model, data = classification()
    sampler, key = case.make(params), fs.key(2)
    held = (params, data, sampler, key, list(model.parameters()))
    before = pytree.tree_map(lambda leaf: leaf.detach().clone(), held)
    generator = torch.get_rng_state()
    run(sampler, params, data=data, key=key)
    for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(held), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not params.is_locked


def test_per_chain_settings_are_each_chains_own(params):
    lrs = torch.tensor([0.0, 1e-3, 1e-2])
    swept = run(fs.sgld(lrs, nbeta=2.0, localization=1.0), num_chains=3)
    stacked = [fs.sgld(lr, nbeta=2.0, localization=1.0) for lr in lrs.tolist()]
    assert_same(swept, run(torch.stack(stacked), num_chains=3))
    assert_same(swept, run(torch.stack(stacked), num_chains=3, chunk_size=2))
    for i, sampler in enumerate(stacked):
        alone = run(sampler, num_chains=1, chain_offset=i)
        for ours, theirs in zip(records(alone), records(swept), strict=True):
            torch.testing.assert_close(ours[0], theirs[i], rtol=1e-9, atol=1e-11)
    assert torch.equal(swept.draws["0.weight"][0, 0], swept.draws["0.weight"][0, -1])


def test_per_chain_starts_are_their_own_anchors(params):
    starts = TensorDict(
        {k: v + torch.arange(3.0).reshape(-1, *[1] * v.ndim) for k, v in params.items()},
        batch_size=3,
    )
    samples = run(fs.sgld(1e-3, nbeta=0.0, localization=5.0), starts, num_chains=3, init_noise=0.0)
    assert samples.initial_loss.shape == (3,)
    assert torch.equal(samples.metrics.distance[:, 0], torch.zeros(3))
    assert len(samples.initial_loss.unique()) == 3
    chunked = run(
        fs.sgld(1e-3, nbeta=0.0, localization=5.0),
        starts,
        num_chains=3,
        init_noise=0.0,
        chain_method="loop",
    )
    assert_same(samples, chunked)


def test_draws_losses_and_observables_belong_together(params):
    model, data = classification()
    loss_fn = fs.module_loss(model, cross_entropy)
    samples = run(
        fs.sgld(1e-3, nbeta=5.0),
        num_burnin_steps=3,
        num_steps_between_draws=4,
        batch_size=None,
        observables=observables(),
    )
    assert samples.draw_steps.tolist() == [6, 10, 14, 18, 22, 26]
    assert samples.num_steps == 27
    assert samples.num_draws == 6
    for c in range(samples.num_chains):
        for d in range(samples.num_draws):
            draw = samples.draws[c, d]
            torch.testing.assert_close(samples.draw_losses[c, d], loss_fn(draw, data).detach())
            torch.testing.assert_close(samples.observables["norm"][c, d], tree.norm(draw))
            torch.testing.assert_close(samples.observables["first"][c, d], draw["0.weight"][0])
    # Step 0 evaluates the start, and the final state is one step after the last draw.
    start = run(fs.sgld(1e-3, nbeta=5.0), num_draws=1, batch_size=None)
    torch.testing.assert_close(start.losses[:, 0], samples.losses[:, 0])
    assert samples.state.step.tolist() == [27] * 5


def everything_per_chain(params: TensorDict, chain: int | None = None) -> fs.Sampler:
    """A sampler with every setting of its own for each of three chains; or that of one chain."""
    settings: dict = {
        "lr": torch.tensor([1e-3, 3e-3, 1e-2]),
        "nbeta": torch.tensor([1.0, 5.0, 3.0]),
        "alpha": torch.tensor([0.9, 0.5, 0.99]),
        "eps": torch.tensor([0.1, 0.3, 0.2]),
        "localization": torch.tensor([0.0, 2.0, 5.0]),
        "weight_decay": torch.tensor([1.0, 0.0, 0.3]),
        "noise_level": torch.tensor([1.0, 0.5, 0.8]),
        "bounding_box_size": torch.tensor([0.02, 0.3, 0.1]),
    }
    shift = torch.arange(3.0) / 100
    trees = {
        "anchor": {k: v + shift.reshape(-1, *[1] * v.ndim) for k, v in params.items()},
        "mask": {
            k: (torch.arange(3 * v.numel()).reshape(3, *v.shape) % 4 > 0).double()
            for k, v in params.items()
        },
    }
    if chain is not None:
        settings = {k: float(v[chain]) for k, v in settings.items()}
        trees = {name: {k: v[chain] for k, v in tree.items()} for name, tree in trees.items()}
    batch = [] if chain is not None else [3]
    trees = {name: TensorDict(tree, batch_size=batch) for name, tree in trees.items()}
    return fs.rmsprop_sgld(**settings, **trees)


@pytest.mark.parametrize(
    "how", [{}, {"chunk_size": 2}, {"chain_method": "loop"}, {"compile": True}], ids=str
)
def test_everything_may_be_per_chain(params, how):
    def log_prior(params):
        return -3 * (params["0.bias"] ** 2).sum()

    # Every chain starts at its anchor, which is inside its box.
    anchors = everything_per_chain(params).anchor
    settings = {"init_noise": 0.01, "log_prior": log_prior, "observables": observables()}
    whole = run(everything_per_chain(params), anchors, num_chains=3, **settings, **how)
    assert whole.is_sweep
    assert "different settings" in whole.health()
    for chain in range(3):
        sampler = everything_per_chain(params, chain)
        alone = run(sampler, anchors[chain], num_chains=1, chain_offset=chain, **settings)
        for ours, theirs in zip(records(alone), records(whole), strict=True):
            torch.testing.assert_close(ours[0], theirs[chain], rtol=1e-8, atol=1e-10)
    estimates = fs.llc_draws(whole)
    for chain, nbeta in enumerate([1.0, 5.0, 3.0]):
        expected = nbeta * (whole.draw_losses[chain] - whole.initial_loss[chain])
        torch.testing.assert_close(estimates[chain], expected)


@pytest.mark.parametrize("chain_method", ["vmap", "loop"])
def test_log_prior_is_a_pull_of_every_chain(params, chain_method):
    """A Gaussian log-prior at zero is weight decay under another name."""
    decayed = run(fs.sgld(1e-2, nbeta=2.0, weight_decay=3.0), chain_method=chain_method)
    log_prior = run(
        fs.sgld(1e-2, nbeta=2.0),
        log_prior=lambda params: -1.5 * tree.dot(params, params),
        chain_method=chain_method,
    )
    for name, leaf in decayed.draws.items():
        torch.testing.assert_close(log_prior.draws[name], leaf)


def test_a_run_restarts_from_its_final_state_in_its_box():
    params = {"w": torch.linspace(-1, 1, 1000, dtype=torch.float32)}
    sampler = fs.sgld(1.0, nbeta=1.0, bounding_box_size=0.1, anchor=params)
    arguments = {"num_chains": 4, "num_draws": 3, "key": fs.key(0)}
    first = fs.sample(good_loss, params, torch.ones(4), sampler, **arguments)
    assert (first.state.params["w"] - params["w"]).abs().max() > 0.0999
    fs.sample(good_loss, first.state.params, torch.ones(4), sampler, **arguments)


def test_a_sweep_over_many_networks_compiles_each():
    """More versions than torch allows of one code object by default."""
    for width in range(1, 11):
        model = nn.Linear(width, 2)
        samples = fs.sample(
            fs.module_loss(model, cross_entropy),
            fs.params_of(model),
            (torch.randn(6, width), torch.randint(2, (6,))),
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=2,
            num_draws=1,
            key=fs.key(0),
            compile=True,
        )
        assert samples.num_steps == 1


# ---- data


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


# ---- health


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
    options = {"num_draws": 12, "save_draws": True, "save_metrics": True} | settings
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
    samples = run(
        fs.rmsprop_sgld(lr, nbeta=3.0), data=batches, batch_size=None, num_chains=2, num_draws=5
    )
    before = run(
        fs.rmsprop_sgld(lr, nbeta=3.0), data=batches, batch_size=None, num_chains=2, num_draws=3
    )
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

    first_call = 2
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
    assert len(samples.summary().table) == 2


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


def test_an_interrupt_returns_what_was_recorded(params):
    _, (inputs, targets) = classification()

    def batches():
        for _ in range(4):
            yield inputs[:8], targets[:8]
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 4 of 6 steps"):
        samples = run(fs.sgld(1e-3, nbeta=5.0), data=batches(), batch_size=None)
    assert samples.losses.shape == (5, 4)


# ---- bad input


class Net(nn.Module):
    """A network with a layer in the middle."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, 6), layer, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.first(x)))


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(6)])
def test_impure_layers_are_refused_with_advice(layer):
    model, data = Net(layer()), classification()[1]
    with pytest.raises(
        ValueError, match=r"layer 'layer' \(\w+\) is in train mode: call model.eval"
    ):
        fs.module_loss(model, cross_entropy)
    loss_fn = fs.module_loss(model.eval(), cross_entropy)
    params = fs.params_of(model)
    settings = {"num_chains": 2, "num_draws": 2, "key": fs.key(0)}
    fs.sample(loss_fn, params, data, fs.sgld(1e-3, nbeta=1.0), **settings)
    model.train()
    with pytest.raises(ValueError, match=r"in train mode: call model.eval"):
        fs.sample(loss_fn, params, data, fs.sgld(1e-3, nbeta=1.0), **settings)


def test_a_loop_refuses_a_random_model_that_does_not_vmap():
    model = nn.Sequential(nn.Linear(5, 3), nn.RReLU())
    with pytest.raises(ValueError, match="it draws random numbers or updates buffers"):
        fs.sample(
            fs.module_loss(model, cross_entropy),
            fs.params_of(model),
            classification()[1],
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=2,
            num_draws=2,
            key=fs.key(0),
            chain_method="loop",
        )


def test_a_loop_takes_a_pure_loss_that_writes_into_its_own_tensor():
    def loss_fn(params, batch):
        out = torch.zeros(3)
        out[0] = params["w"].sum()
        return out.sum()

    samples = fs.sample(
        loss_fn,
        {"w": torch.ones(3)},
        torch.ones(4),
        fs.sgld(1e-3, nbeta=1.0),
        num_chains=2,
        num_draws=2,
        key=fs.key(0),
        chain_method="loop",
    )
    assert samples.num_steps == 2


@pytest.mark.parametrize("chain_method", ["vmap", "loop"])
@pytest.mark.parametrize("kind", ["random", "buffer"])
def test_impure_losses_are_refused_with_advice(kind, chain_method):
    count = torch.zeros(3)

    def loss_fn(params, batch):
        if kind == "random":
            return (params["w"] * torch.rand(3)).sum()
        count.add_(params["w"])
        return (params["w"] * count).sum()

    with pytest.raises(ValueError, match="it draws random numbers or updates buffers"):
        fs.sample(
            loss_fn,
            {"w": torch.ones(3)},
            torch.ones(4),
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=2,
            num_draws=2,
            key=fs.key(0),
            chain_method=chain_method,
        )
    assert torch.equal(count, torch.zeros(3))


def test_a_loop_takes_a_model_that_does_not_vmap():
    def loss_fn(params, batch):
        scale = 2.0 if params["w"].sum().item() > 0 else 1.0
        return scale * (params["w"] ** 2).sum()

    settings = {"num_chains": 2, "num_draws": 3, "key": fs.key(0)}
    arguments = (loss_fn, {"w": torch.ones(3)}, torch.ones(4), fs.sgld(1e-3, nbeta=1.0))
    samples = fs.sample(*arguments, **settings, chain_method="loop")
    assert samples.losses.shape == (2, 3)
    with pytest.raises(RuntimeError, match="vmap"):
        fs.sample(*arguments, **settings)


def good_loss(params, batch):
    return ((params["w"] - batch.mean()) ** 2).sum()


BAD_CALLS = [
    (
        {"loss_fn": lambda p, b: p["w"]},
        ValueError,
        r"loss_fn must return a scalar, got shape \(3,\)",
    ),
    ({"loss_fn": lambda p, b: 1.0}, TypeError, "real floating tensor, got float"),
    ({"params": {"w": torch.ones(3).long()}}, TypeError, r"params\['w'\] must be real floating"),
    (
        {"params": {"w": torch.tensor([1, torch.nan, 1])}},
        ValueError,
        r"params\['w'\] must be finite",
    ),
    ({"params": {}}, ValueError, "params must hold at least one parameter"),
    ({"params": nn.Linear(2, 2)}, TypeError, "params must be a TensorDict or a mapping"),
    (
        {"params": TensorDict({"w": torch.ones(3, 3)}, batch_size=3)},
        ValueError,
        r"params must have batch size \(\) or \(2,\).*got \(3,\)",
    ),
    ({"data": torch.ones(0, 3)}, ValueError, "data must hold at least one example"),
    ({"data": []}, ValueError, "data must give at least one batch, got none"),
    ({"data": (torch.ones(3), torch.ones(4))}, ValueError, r"got lengths \[3, 4\]"),
    ({"data": ()}, ValueError, "data must hold at least one example, got none"),
    ({"data": (torch.ones(3), "x")}, TypeError, "data must hold tensors only, got str"),
    ({"data": torch.tensor(1.0)}, ValueError, "got a 0-d tensor"),
    ({"data": 3}, TypeError, "data must be tensors or an iterable of batches, got int"),
    ({"data": [torch.ones(2)], "batch_size": 2}, ValueError, "batch_size must be None for an it"),
    ({"batch_size": 5}, ValueError, "at most the number of examples 4, got 5"),
    ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
    ({"minibatches": "random"}, ValueError, "minibatches must be one of 'replacement', 'epochs'"),
    ({"num_chains": 0}, ValueError, "num_chains must be >= 1, got 0"),
    ({"num_draws": 2.5}, TypeError, "num_draws must be an integer, got 2.5"),
    ({"num_burnin_steps": -1}, ValueError, "num_burnin_steps must be >= 0, got -1"),
    ({"num_steps_between_draws": 0}, ValueError, "num_steps_between_draws must be >= 1, got 0"),
    ({"chain_offset": -1}, ValueError, "chain_offset must be >= 0"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
    ({"init_noise": -1.0}, ValueError, "init_noise must be >= 0, got -1"),
    ({"key": 3}, TypeError, r"key must be made by funcsgmcmc.key\(seed\), got int"),
    ({"key": fs.split(fs.key(0), 2)}, ValueError, r"one key, of shape \(2,\), got shape \(2, 2\)"),
    (
        {"chain_method": "pmap"},
        ValueError,
        "chain_method must be one of 'vmap', 'loop', got 'pmap'",
    ),
    (
        {"loss_fn": lambda p, b: b.sum()},
        ValueError,
        "loss_fn must depend on the params it is given",
    ),
    ({"loss_fn": lambda p, b: p["w"].sum().detach()}, ValueError, "must depend on the params"),
    ({"loss_fn": None}, TypeError, "loss_fn must be a function, got None"),
    ({"loss_fn": lambda p, b: (p["w"].sum(), 1, 2)}, TypeError, "got 3 values"),
    (
        {"loss_fn": lambda p, b: (p["w"].sum(), "x")},
        TypeError,
        "aux must hold tensors only, got str",
    ),
    ({"sampler": fs.sgld}, TypeError, "sampler must be one made by a factory.*got 'sgld'"),
    ({"log_prior": 3}, TypeError, "log_prior must be a function, got 3"),
    ({"observables": [1]}, TypeError, "observables must map names to functions"),
    ({"observables": {"a": 3}}, TypeError, r"observables\['a'\] must be a function, got 3"),
    ({"observables": {"draw": tree.norm}}, ValueError, "must not be named 'draw'"),
    (
        {"observables": {"a": lambda p: torch.tensor(p["w"].sum().item())}, "num_burnin_steps": 9},
        RuntimeError,
        "vmap",
    ),
    ({"initial_loss": torch.zeros(7)}, ValueError, r"shape \(\) or \(2,\), got shape \(7,\)"),
    ({"initial_loss": torch.nan}, ValueError, "initial_loss must be finite, got nan"),
    ({"initial_loss": "a"}, TypeError, "initial_loss must be a number or a tensor, got str"),
    ({"init_noise": torch.ones(2)}, ValueError, r"init_noise must be a number, got shape \(2,\)"),
    ({"data": "hello"}, TypeError, "data must be tensors or an iterable of batches, got str"),
    ({"data": [torch.ones(2)], "minibatches": "epochs"}, ValueError, "minibatches must not be set"),
    (
        {"data": TensorDict({"x": torch.ones(3)})},
        ValueError,
        "a TensorDict of data must have a batch",
    ),
    ({"chain_method": "loop", "chunk_size": -3}, ValueError, "chunk_size must be >= 1, got -3"),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, anchor={"w": torch.ones(3, dtype=torch.float16)})},
        ValueError,
        r"anchor\['w'\] has dtype torch.float16, parameter has torch.float64",
    ),
    ({"compile": "all"}, ValueError, "compile must be one of 'noise', got 'all'"),
    ({"on_divergence": "ignore"}, ValueError, "on_divergence must be one of 'freeze', 'raise'"),
    (
        {"sampler": fs.sgld(torch.ones(3), nbeta=1.0)},
        ValueError,
        r"sampler must have batch size \(\) or \(2,\)",
    ),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, mask={"v": torch.ones(3)})},
        ValueError,
        "mask has unknown key 'v'",
    ),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, anchor={"w": torch.ones(4)})},
        ValueError,
        r"anchor\['w'\] has shape \(4,\), parameter has \(3,\)",
    ),
    (
        {"sampler": fs.sgld(0.1, nbeta=1.0, anchor={"w": torch.zeros(3)}, bounding_box_size=0.5)},
        ValueError,
        r"must start within bounding_box_size of the anchor, got an entry 0\.5 outside",
    ),
    ({"observables": {"loss": tree.norm}}, ValueError, "an observable must not be named 'loss'"),
    (
        {"observables": {"w": tree.norm}, "save_draws": True},
        ValueError,
        "observable must not be named 'w'",
    ),
    ({"log_prior": lambda p: p["w"]}, ValueError, "log_prior must return a scalar"),
    (
        {"observables": {"x": lambda p: 3}},
        TypeError,
        "observable 'x' must return a tensor, got int",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS)
def test_bad_calls_are_refused_before_anything_runs(changed, error, message):
    call = {
        "loss_fn": good_loss,
        "params": {"w": torch.ones(3)},
        "data": torch.ones(4),
        "sampler": fs.sgld(0.1, nbeta=1.0),
        "num_chains": 2,
        "num_draws": 2,
        "key": fs.key(0),
    }
    with pytest.raises(error, match=message):
        fs.sample(**(call | changed))


def test_data_sets_are_sent_to_a_loader():
    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.ones(2)

    with pytest.raises(
        TypeError, match=r"data set Examples: wrap it in a torch\.utils\.data\.DataLoader"
    ):
        fs.sample(
            good_loss,
            {"w": torch.ones(3)},
            Examples(),
            fs.sgld(0.1, nbeta=1.0),
            num_chains=1,
            num_draws=1,
            key=fs.key(0),
        )


def test_progress_shows_loss_and_health(capsys, params):
    run(fs.sgld(1e-3, nbeta=5.0), progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "5/5 chains healthy" in shown
    assert "loss" in shown


def test_progress_without_tqdm_names_the_extra(monkeypatch, params):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'funcsgmcmc\[progress\]'"):
        run(fs.sgld(1e-3, nbeta=5.0), progress=True)


def test_no_warnings_of_our_own(params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(CASES[3].make(params), log_prior=lambda p: -tree.dot(p, p))


def test_init_noise_has_its_standard_deviation():
    samples = fs.sample(
        good_loss,
        {"w": torch.ones(5)},
        torch.ones(4),
        fs.sgld(0.1, nbeta=1.0),
        num_chains=4000,
        num_draws=1,
        key=fs.key(0),
        init_noise=0.2,
        save_draws=True,
    )
    score = (samples.draws["w"] - 1) / 0.2
    assert abs(score.mean()) * 20000**0.5 < 4
    assert abs(score.square().mean() - 1) * (20000 / 2) ** 0.5 < 4
    noise = random.normal(random.fold_in(random.split(fs.key(0), 2)[1], torch.arange(4000)), (5,))
    torch.testing.assert_close(score[:, 0], noise)
