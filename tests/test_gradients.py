"""Gradient estimators: accumulated gradients are the batch's, control variates are unbiased."""

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import funcsgmcmc as fs
from funcsgmcmc import gradients, random, tree
from problems import assert_same, classification, run


@pytest.fixture
def problem():
    model, data = classification()
    return fs.module_loss(model, cross_entropy), fs.params_of(model), data


def noisy(params: TensorDict, scale: float, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return params.apply(lambda leaf: leaf + scale * torch.randn(leaf.shape, generator=generator))


def evaluate(loss_fn, params: TensorDict, batch) -> gradients.Evaluation:
    """Loss and gradient of one chain, by an estimator without memory or of a plain loss."""
    return gradients.estimator_of(loss_fn).evaluate(params, batch, None)


@pytest.mark.parametrize("num_microbatches", [1, 3, 7, 40])
def test_accumulated_gradients_are_those_of_the_batch(problem, num_microbatches):
    loss_fn, params, data = problem
    plain = evaluate(loss_fn, params, data)
    estimator = fs.accumulated(loss_fn, num_microbatches)
    ours = evaluate(estimator, params, data)
    torch.testing.assert_close(ours.loss, plain.loss)
    torch.testing.assert_close(estimator(params, data), plain.loss)
    for name, leaf in plain.grads.items():
        torch.testing.assert_close(ours.grads[name], leaf)
    assert ours.aux is None


def test_a_run_with_accumulated_gradients_is_the_plain_run(problem):
    loss_fn, params, data = problem
    sampler = fs.rmsprop_sgld(1e-3, nbeta=3.0, localization=1.0, curvature="exact")
    settings = {"num_chains": 3, "num_draws": 4, "batch_size": 9, "key": fs.key(0)}
    plain = fs.sample(loss_fn, params, data, sampler, **settings, record=["draws"])
    estimator = fs.accumulated(loss_fn, 4)
    for options in ({}, {"chain_method": "loop"}, {"chunk_size": 2}):
        ours = fs.sample(estimator, params, data, sampler, **settings, record=["draws"], **options)
        assert_same(plain, ours)


def test_accumulated_memory_is_that_of_a_microbatch():
    """The largest tensor in a gradient of 512 examples in 16 pieces has 32 rows."""
    largest = 0

    def loss_fn(params, batch):
        nonlocal largest
        hidden = torch.tanh(batch @ params["w"])
        largest = max(largest, len(hidden))
        return hidden.square().mean()

    params, batch = TensorDict({"w": torch.ones(4, 5)}), torch.randn(512, 4)
    evaluate(fs.accumulated(loss_fn, 16), params, batch)
    assert largest == 32


def test_a_short_last_piece_of_a_pass_is_accumulated_too(problem):
    """L(w₀) is taken over pieces of the batch size: 40 examples are 5 of 9 and one of 4."""
    loss_fn, params, data = problem
    settings = {"num_chains": 2, "num_draws": 3, "batch_size": 9, "key": fs.key(0)}
    sampler = fs.sgld(1e-3, nbeta=3.0)
    plain = fs.sample(loss_fn, params, data, sampler, **settings)
    assert_same(plain, fs.sample(fs.accumulated(loss_fn, 6), params, data, sampler, **settings))
    nested = fs.svrg(fs.accumulated(loss_fn, 6), 2)
    assert_same(
        fs.sample(fs.svrg(loss_fn, 2), params, data, sampler, **settings),
        fs.sample(nested, params, data, sampler, **settings),
    )


def test_sums_over_examples_do_not_overflow_half_precision():
    def loss_fn(params, batch):
        return params["w"].square().sum() + 20.0 + 0 * batch.mean()

    params, data = TensorDict({"w": torch.zeros(3).half()}), torch.zeros(8000).half()
    for estimator in (loss_fn, fs.accumulated(loss_fn, 2)):
        samples = fs.sample(
            estimator,
            params,
            data,
            fs.sgld(1e-5, nbeta=10.0),
            num_chains=1,
            num_draws=2,
            key=fs.key(0),
        )
        assert samples.initial_loss == 20.0
        assert samples.healthy.all()


def test_aux_of_microbatches(problem):
    loss_fn, params, data = problem

    def with_aux(params, batch):
        loss = loss_fn(params, batch)
        return loss, {"size": torch.tensor(len(batch[0]))}

    aux = evaluate(fs.accumulated(with_aux, 3), params, data).aux
    assert [int(part["size"]) for part in aux] == [13, 13, 14]


def test_control_variates_are_unbiased_and_exact_at_their_point(problem):
    """Averaged over all minibatches of one example, the estimate is the gradient on all data."""
    loss_fn, params, data = problem
    near = noisy(params, 0.03)
    point = fs.gradients.control_point(loss_fn, dict(params.items()), data, batch_size=7)
    estimator = fs.control_variates(loss_fn)
    full = evaluate(loss_fn, near, data)
    singles = [tuple(leaf[i : i + 1] for leaf in data) for i in range(40)]
    ours = [estimator.evaluate(near, single, point) for single in singles]
    plain = [evaluate(loss_fn, near, single) for single in singles]
    for name, leaf in full.grads.items():
        torch.testing.assert_close(torch.stack([g.grads[name] for g in ours]).mean(0), leaf)
    variances = [
        float(torch.stack([tree.flatten(g.grads) for g in each]).var(0).sum())
        for each in (ours, plain)
    ]
    assert variances[0] < 0.05 * variances[1]
    # The loss reported is the minibatch's own.
    torch.testing.assert_close(torch.stack([g.loss for g in ours]).mean(), full.loss)
    at_point = estimator.evaluate(params, singles[0], point)
    exact = evaluate(loss_fn, params, data)
    for name, leaf in exact.grads.items():
        torch.testing.assert_close(at_point.grads[name], leaf)


@pytest.mark.parametrize("kind", ["control variates", pytest.param("svrg", marks=pytest.mark.slow)])
def test_runs_do_not_depend_on_how_chains_are_run(problem, kind):
    loss_fn, params, data = problem
    make = {"svrg": lambda: fs.svrg(loss_fn, 3), "control variates": None}
    estimator = make[kind]() if kind == "svrg" else fs.control_variates(loss_fn)
    sampler = fs.sgld(1e-3, nbeta=3.0, localization=1.0)
    settings = {
        "num_chains": 4,
        "num_draws": 7,
        "batch_size": 8,
        "key": fs.key(0),
        "init_noise": 0.05,
        "record": ["draws", "metrics"],
    }
    whole = fs.sample(estimator, params, data, sampler, **settings)
    options = ({"chain_method": "loop"}, {"chunk_size": 3}, {"compile": True})
    for option in options:
        assert_same(whole, fs.sample(estimator, params, data, sampler, **settings, **option))
    starts = torch.stack([noisy(params, 0.1, seed) for seed in range(4)])
    many = fs.sample(estimator, starts, data, sampler, **settings)
    for option in options[:2]:
        assert_same(many, fs.sample(estimator, starts, data, sampler, **settings, **option))
    # The same step by hand.
    step = fs.kernel(sampler.with_anchor(params), estimator)
    state = whole.state[1].replace(step=torch.tensor(0), params=params)
    minibatch = tuple(leaf[:8] for leaf in data)
    held = fs.gradients.control_point(estimator, noisy(params, 0.02), data)
    moved, info = step(state, (minibatch, held), fs.key(1))
    grads = estimator.evaluate(params, minibatch, held)
    torch.testing.assert_close(info.loss, grads.loss)
    noise = tree.normal_like(random.fold_in(fs.key(1), 0), params)
    by_hand, _ = sampler.with_anchor(params).update(state, grads, noise)
    for name, leaf in by_hand.params.items():
        torch.testing.assert_close(moved.params[name], leaf)


def test_svrg_takes_its_reference_where_the_chain_was(problem):
    """With an interval of 1 the reference is the present: the gradient is that on all data."""
    loss_fn, params, data = problem
    sampler = fs.sgld(1e-3, nbeta=3.0)
    settings = {"num_chains": 2, "num_draws": 5, "key": fs.key(0), "record": ["draws"]}
    full = fs.sample(loss_fn, params, data, sampler, **settings)
    always = fs.sample(fs.svrg(loss_fn, 1), params, data, sampler, batch_size=4, **settings)
    seldom = fs.sample(fs.svrg(loss_fn, 3), params, data, sampler, batch_size=4, **settings)
    for name, leaf in full.draws.items():
        torch.testing.assert_close(always.draws[name], leaf)
        # Draw d is where step d begins: the steps that refresh, 0 and 3, are exact.
        torch.testing.assert_close(seldom.draws[name][:, :2], leaf[:, :2])
        assert not torch.allclose(seldom.draws[name][:, 2:], leaf[:, 2:], rtol=1e-9)


def test_loaders_are_passed_over_and_iterators_refused(problem):
    loss_fn, params, data = problem
    loader = DataLoader(TensorDataset(*data), batch_size=16)
    sampler = fs.sgld(1e-3, nbeta=3.0)
    settings = {"num_chains": 2, "num_draws": 3, "key": fs.key(0)}
    samples = fs.sample(fs.control_variates(loss_fn), params, loader, sampler, **settings)
    assert samples.healthy.all()
    with pytest.raises(ValueError, match="control variates need data that can be passed over"):
        fs.sample(fs.svrg(loss_fn, 2), params, iter(loader), sampler, **settings)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda f: fs.accumulated(f, 0), ValueError, "num_microbatches must be >= 1, got 0"),
        (lambda f: fs.svrg(f, 2.5), TypeError, "refresh_interval must be an integer, got 2.5"),
        (lambda f: fs.control_variates(3), TypeError, "loss_fn must be"),
        (
            lambda f: fs.accumulated(fs.svrg(f, 5), 4),
            TypeError,
            "control variates must be the outermost estimator",
        ),
        (
            lambda f: step_without_point(fs.svrg(f, 5)),
            TypeError,
            r"control variates take batches \(minibatch, point\)",
        ),
    ],
)
def test_bad_estimators_are_refused(problem, make, error, message):
    with pytest.raises(error, match=message):
        make(problem[0])


def step_without_point(estimator):
    """A kernel of control variates is given the minibatch alone."""
    model, data = classification()
    sampler, params = fs.sgld(1e-3, nbeta=1.0), fs.params_of(model)
    fs.kernel(sampler, estimator)(sampler.init(params), data, fs.key(0))


def test_estimators_run_under_every_sampler(params):
    model, _ = classification()
    loss_fn = fs.module_loss(model, cross_entropy)
    for estimator in (fs.svrg(loss_fn, 2), fs.accumulated(loss_fn, 2)):
        for sampler in (
            fs.baoa(1e-2, nbeta=3.0, friction=1.0),
            fs.rmsprop_sgld(1e-3, nbeta=3.0, curvature="hutchinson"),
            fs.contour_sgld(1e-3, nbeta=3.0, energy_range=(1.0, 9.0)),
        ):
            samples = fs.sample(
                estimator,
                params,
                classification()[1],
                sampler,
                num_chains=2,
                num_draws=3,
                batch_size=8,
                key=fs.key(0),
            )
            assert samples.healthy.all()
    assert run(fs.sgld(1e-3, nbeta=1.0)).log_weights is None
