"""Runs: chains do not depend on their company, and what is recorded belongs together."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from cases import BY_NAME, CASES
from funcsgmcmc import random, tree
from funcsgmcmc.runs import timing
from funcsgmcmc.runs.request import RunKeys
from problems import assert_same, classification, good_loss, observables, records, run


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


@pytest.mark.parametrize(
    "batches",
    [
        {"minibatches": "replacement"},
        {"minibatches": "epochs"},
        pytest.param({"shared_batches": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_run_is_the_eager_run(params, batches):
    sampler = BY_NAME["sgld with everything"].make(params)
    eager = run(sampler, **batches)
    assert_same(eager, run(sampler, **batches, compile=True))
    assert_same(eager, run(sampler, **batches, compile="noise"))
    chunked = run(sampler, **batches, compile=True, chunk_size=3)
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


def everything_per_chain(params: TensorDict, chain: int | None = None) -> fs.samplers.Sampler:
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
    "how",
    [
        {},
        {"chunk_size": 2},
        {"chain_method": "loop"},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_everything_may_be_per_chain(params, how):
    def log_prior(params):
        return -3 * (params["0.bias"] ** 2).sum()

    # Every chain starts at its anchor, which is inside its box.
    anchors = everything_per_chain(params).anchor
    settings = {"init_noise": 0.01, "log_prior": log_prior, "observables": observables()}
    whole = run(everything_per_chain(params), anchors, num_chains=3, **settings, **how)
    assert whole.is_sweep
    assert all(label.endswith(f"anchor=#{i}") for i, label in enumerate(whole.groups()))
    assert len(whole.groups()) == 3
    for chain in range(3):
        sampler = everything_per_chain(params, chain)
        alone = run(sampler, anchors[chain], num_chains=1, chain_offset=chain, **settings)
        for ours, theirs in zip(records(alone), records(whole), strict=True):
            torch.testing.assert_close(ours[0], theirs[chain], rtol=1e-8, atol=1e-10)
    estimates = fs.llc_draws(whole)
    for chain, nbeta in enumerate([1.0, 5.0, 3.0]):
        expected = nbeta * (whole.draw_losses[chain] - whole.initial_loss[chain])
        expected = expected / whole.sampler.noise_level[chain] ** 2
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


@pytest.mark.parametrize("faster", ["vmap", "loop"])
def test_auto_takes_the_faster_chain_method(params, monkeypatch, faster):
    sampler = BY_NAME["sgld with everything"].make(params)
    monkeypatch.setattr(timing, "seconds_per_chain", lambda run: float(run.chain_method != faster))
    chosen = run(sampler, chain_method="auto")
    assert chosen.chain_method == faster
    assert_same(chosen, run(sampler, chain_method=faster), exact=True)


@pytest.mark.parametrize("estimator", [None, fs.control_variates, lambda loss: fs.svrg(loss, 2)])
@pytest.mark.parametrize("kind", ["minibatches", "list", "shuffled"])
@pytest.mark.parametrize("lr", [1e-3, torch.full((3,), 1e-3)], ids=["shared", "one a chain"])
def test_timing_a_step_changes_nothing(params, kind, estimator, lr):
    model, data = classification()
    loss_fn = fs.module_loss(model, cross_entropy)
    loss_fn = loss_fn if estimator is None else estimator(loss_fn)

    def go(method):
        torch.manual_seed(0)
        batches = data
        if kind != "minibatches":
            dataset = torch.utils.data.TensorDataset(*data)
            batches = torch.utils.data.DataLoader(dataset, 16, shuffle=kind == "shuffled")
        return fs.sample(
            loss_fn,
            params,
            list(batches) if kind == "list" else batches,
            fs.sgld(lr, nbeta=5.0),
            num_chains=3,
            num_draws=6,
            batch_size=8 if kind == "minibatches" else None,
            key=fs.key(0),
            record=["draws", "metrics"],
            chain_method=method,
        )

    timed = go("auto")
    assert_same(timed, go(timed.chain_method), exact=True)


def no_vmap(params, batch):
    return ((params["w"] - batch.mean()) ** 2).sum() * (1 + (params["w"].sum().item() > 0))


@pytest.mark.parametrize(
    ("loss_fn", "changed", "message"),
    [
        (no_vmap, {}, r"chains are looped over, since they do not vmap: .*item\(\)"),
        (
            good_loss,
            {"observables": {"first": lambda p: torch.tensor(p["w"][0].item())}},
            "do not vmap",
        ),
    ],
)
def test_auto_loops_over_what_does_not_vmap(loss_fn, changed, message):
    arguments = {"num_chains": 2, "num_draws": 2, "key": fs.key(0), "chain_method": "auto"}
    problem = (loss_fn, {"w": torch.ones(3)}, torch.ones(4), fs.sgld(1e-3, nbeta=1.0))
    with pytest.warns(UserWarning, match=message):
        samples = fs.sample(*problem, **arguments, **changed)
    assert samples.chain_method == "loop"


def test_auto_leaves_out_a_method_that_fails(params, monkeypatch):
    def out_of_memory(run):
        if run.chain_method == "vmap":
            raise MemoryError("too many chains")
        return 1.0

    sampler = BY_NAME["sgld with everything"].make(params)
    monkeypatch.setattr(timing, "seconds_per_chain", out_of_memory)
    with pytest.warns(UserWarning, match="chain_method 'vmap' fails: too many chains"):
        samples = run(sampler, chain_method="auto")
    assert_same(samples, run(sampler, chain_method="loop"), exact=True)


@pytest.mark.slow
def test_a_compiled_sweep_over_many_networks():
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


def test_a_compiled_function_takes_more_shapes_than_torch_allows_by_default():
    double = fs.compiled(lambda values: 2 * values)
    for size in range(1, 11):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert torch._dynamo.config.recompile_limit < 10


def flat_run(sampler: fs.samplers.Sampler, **settings) -> fs.Samples:
    """A run without forces, so that only what is drawn at random is seen."""
    return fs.sample(
        lambda params, batch: (0 * params["w"]).sum() + 0 * batch.sum(),
        {"w": torch.zeros(3)},
        torch.zeros(1),
        sampler,
        record=["draws"],
        initial_loss=0.0,
        **settings,
    )


@pytest.mark.parametrize("chain_method", ["vmap", "loop"])
def test_the_noise_of_a_run_is_that_of_its_chains_keys(chain_method):
    key, offset = fs.key(5), 2
    samples = flat_run(
        fs.sgld(0.25, nbeta=1.0),
        num_chains=3,
        num_draws=4,
        key=key,
        chain_offset=offset,
        chain_method=chain_method,
    )
    for chain in range(3):
        of_chain = random.fold_in(key, offset + chain)
        noise = [random.normal(random.fold_in(of_chain, step), (3,)) for step in range(4)]
        walk = 0.5 * torch.stack(noise).cumsum(0)
        torch.testing.assert_close(samples.state.params["w"][chain], walk[-1])
        torch.testing.assert_close(samples.draws["w"][chain, 1:], walk[:-1])


def test_starts_and_momenta_are_independent():
    """Without friction the first step is w' = w + p₀."""
    samples = flat_run(
        fs.sghmc(1.0, nbeta=1.0, friction=0.0),
        num_chains=3_000,
        num_draws=1,
        init_noise=1.0,
        key=fs.key(0),
    )
    momentum = samples.state.momentum["w"]
    start = samples.state.params["w"] - momentum
    product = (start * momentum).flatten()
    assert abs(product.mean() / product.std()) * len(product) ** 0.5 < 4
    assert abs(start.var() - 1) < 0.06
    assert abs(momentum.var() - 1) < 0.06


def test_every_purpose_has_a_key_of_its_own():
    """Also for each chain; and the keys are those that the documentation names."""
    keys = RunKeys(fs.key(3), torch.arange(4, 9))
    purposes = [keys.noise, keys.minibatches, keys.starts, keys.momenta]
    shared = keys.shared_minibatches[None]
    assert len(torch.cat([*purposes, shared]).unique(dim=0)) == 4 * 5 + 1
    assert torch.equal(keys.noise[2], random.fold_in(fs.key(3), 6))
    for child, purpose in zip(random.split(fs.key(3), 3), purposes[1:], strict=True):
        assert torch.equal(purpose[2], random.fold_in(child, 6))


@pytest.mark.parametrize(
    ("chains", "period"),
    [
        ([0, 1, 2, 0, 1, 2], 3),
        ([5, 7, 5, 7, 5], 2),
        ([4, 4], 1),
        ([0, 1, 2], None),
        ([0], None),
        ([0, 1, 0, 2], None),
        ([2, 0, 0], None),
    ],
)
def test_keys_that_repeat_are_found(chains, period):
    """Their noise is drawn once; chains that do not follow the pattern have noise of their own."""
    assert RunKeys(fs.key(3), torch.tensor(chains)).period == period
