"""One step of a chain: pure, vmapped, compiled."""

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from cases import CASES
from funcsgmcmc import random, tree
from problems import classification


@pytest.fixture(scope="module")
def problem():
    torch.set_default_dtype(torch.float64)
    model, data = classification()
    return fs.module_loss(model, cross_entropy), fs.params_of(model), data


def start(sampler: fs.samplers.Sampler, params: TensorDict) -> fs.samplers.State:
    """The state before the first step, for samplers with and without momenta."""
    return sampler.init(params, fs.tree.normal_like(fs.key(5), params))


def log_prior(params: TensorDict) -> torch.Tensor:
    return -(params["0.weight"] ** 4).sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_is_pure(problem, case):
    loss_fn, params, data = problem
    sampler, key = case.make(params), fs.key(1)
    state = start(sampler, params)
    inputs = (sampler, state, params, data, key)
    before = pytree.tree_map(torch.clone, inputs)
    step = fs.kernel(sampler, loss_fn, log_prior=log_prior, metrics=True)
    results = [step(state, data, key) for _ in range(2)]
    for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(inputs), strict=True):
        assert torch.equal(old, new)
    for a, b in zip(*map(pytree.tree_leaves, results), strict=True):
        assert torch.equal(a, b)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(results))
    # The state is a copy: training the module further moves no chain.
    given = {leaf.untyped_storage().data_ptr() for leaf in params.values()}
    assert not any(leaf.untyped_storage().data_ptr() in given for leaf in state.params.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmapped_step_is_the_single_step(problem, case):
    loss_fn, params, data = problem
    sampler = case.make(params)
    step = fs.kernel(sampler, loss_fn, log_prior=log_prior, metrics=True)
    keys = fs.random.fold_in(fs.key(1), torch.arange(4))
    starts = TensorDict({k: v + torch.randn(4, *v.shape) for k, v in params.items()}, batch_size=4)
    alone = [step(start(sampler, starts[i]), data, keys[i]) for i in range(4)]
    states = torch.stack([start(sampler, starts[i]) for i in range(4)])
    together = torch.vmap(step, in_dims=(0, None, 0))(states, data, keys)
    for i in range(4):
        one = pytree.tree_map(lambda leaf, i=i: leaf[i], together)
        for a, b in zip(pytree.tree_leaves(alone[i]), pytree.tree_leaves(one), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_chain_resumes_from_its_state_bit_for_bit(problem, case, tmp_path):
    loss_fn, params, data = problem
    sampler = case.make(params)
    step = fs.kernel(sampler, loss_fn, log_prior=log_prior)
    whole = start(sampler, params)
    for t in range(6):
        whole, _ = step(whole, data, fs.key(1))
        if t == 2:
            torch.save({"sampler": sampler, "state": whole}, tmp_path / "chain.pt")
    held = torch.load(tmp_path / "chain.pt", weights_only=False)
    resumed, step = held["state"], fs.kernel(held["sampler"], loss_fn, log_prior=log_prior)
    for _ in range(3):
        resumed, _ = step(resumed, data, fs.key(1))
    for a, b in zip(pytree.tree_leaves(whole), pytree.tree_leaves(resumed), strict=True):
        assert torch.equal(a, b)


def test_noise_is_the_keys(problem):
    """With lr = 1, no force and zero curvature the move is the noise itself."""
    _, params, data = problem
    sampler = fs.sgld(1.0, nbeta=0.0)
    step = fs.kernel(sampler, lambda params, batch: sum(p.sum() for p in params.values()))
    state, _ = step(start(sampler, params), data, fs.key(9))
    second, _ = step(state, data, fs.key(9))
    for index, (a, b) in enumerate([(params, state.params), (state.params, second.params)]):
        moved = torch.cat([(b[name] - a[name]).flatten() for name in tree.names(params)])
        expected = random.normal(random.fold_in(fs.key(9), index), (tree.size(params),))
        torch.testing.assert_close(moved, expected)


def test_a_stack_of_samplers_is_a_sweep(problem):
    loss_fn, params, data = problem
    samplers = [
        fs.sgld(lr, nbeta=2.0, localization=gamma) for lr, gamma in [(0.1, 0.0), (0.01, 5.0)]
    ]

    def step(sampler, state, key):
        return fs.kernel(sampler, loss_fn)(state, data, key)

    states = torch.stack([start(sampler, params) for sampler in samplers])
    swept, _ = torch.vmap(step, in_dims=(0, 0, None))(torch.stack(samplers), states, fs.key(0))
    for i, sampler in enumerate(samplers):
        alone, _ = step(sampler, start(sampler, params), fs.key(0))
        for name, leaf in alone.params.items():
            torch.testing.assert_close(swept.params[name][i], leaf, rtol=1e-12, atol=1e-14)


def test_a_factory_may_run_inside_vmap(problem):
    loss_fn, params, data = problem
    lrs = torch.tensor([0.1, 0.01])

    def step(lr):
        sampler = fs.sgld(lr, nbeta=2.0)
        return fs.kernel(sampler, loss_fn)(start(sampler, params), data, fs.key(0))[0].params

    together = torch.vmap(step)(lrs)
    for i, lr in enumerate(lrs):
        for name, leaf in step(lr).items():
            torch.testing.assert_close(together[name][i], leaf, rtol=1e-12, atol=1e-14)


# Compiling takes 10 to 40 s each: these have the most code in them, the others run as slow.
COMPILED = {"sgnht with everything", "hutchinson"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in COMPILED else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_compiled_step_is_the_eager_step_and_settings_do_not_recompile(problem, case):
    loss_fn, params, data = problem
    sampler = case.make(params)

    def step(sampler, state, key):
        return fs.kernel(sampler, loss_fn, log_prior=log_prior, metrics=True)(state, data, key)

    compiled = fs.compiled(step)
    state = expected = start(sampler, params)
    state, _ = compiled(sampler, state, fs.key(1))
    expected, _ = step(sampler, expected, fs.key(1))
    changed = sampler.apply(lambda leaf: leaf * 0.9 if leaf.is_floating_point() else leaf + 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        state, info = compiled(changed, state, fs.key(2))
    expected, expected_info = step(changed, expected, fs.key(2))
    for a, b in zip(
        pytree.tree_leaves((state, info)),
        pytree.tree_leaves((expected, expected_info)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_new_kernel_does_not_recompile(problem):
    loss_fn, params, data = problem

    def compiled(lr):
        sampler = fs.sgld(lr, nbeta=2.0, localization=1.0)
        # Without the options of fs.compiled, which are about the time it takes only.
        return torch.compile(fs.kernel(sampler, loss_fn), fullgraph=True)

    state = fs.sgld(1.0, nbeta=1.0).init(params)
    compiled(0.1)(state, data, fs.key(1))
    with torch.compiler.set_stance("fail_on_recompile"):
        moved, _ = compiled(0.0)(state, data, fs.key(1))
    assert torch.equal(moved.params["0.weight"], params["0.weight"])


def test_log_prior_counts_with_localization(problem):
    """A Gaussian log-prior around the anchor is localization under another name."""
    loss_fn, params, data = problem
    anchor = params.apply(lambda leaf: leaf + 0.1)

    def gaussian(params):
        return -1.5 * sum(((params[name] - anchor[name]) ** 2).sum() for name in tree.names(params))

    pulled = fs.sgld(0.01, nbeta=2.0, localization=3.0, anchor=anchor)
    free = fs.sgld(0.01, nbeta=2.0, anchor=anchor)
    a, info_a = fs.kernel(pulled, loss_fn, metrics=True)(pulled.init(params), data, fs.key(0))
    step = fs.kernel(free, loss_fn, log_prior=gaussian, metrics=True)
    b, info_b = step(free.init(params), data, fs.key(0))
    for name, leaf in a.params.items():
        torch.testing.assert_close(leaf, b.params[name])
    torch.testing.assert_close(info_a.metrics.localization, info_b.metrics.localization)


def test_aux_and_absent_metrics(problem):
    loss_fn, params, data = problem
    sampler = fs.sgld(0.01, nbeta=2.0)

    def with_aux(params, batch):
        loss = loss_fn(params, batch)
        return loss, {"twice": 2 * loss}

    _, info = fs.kernel(sampler, with_aux)(start(sampler, params), data, fs.key(0))
    assert info.aux["twice"] == 2 * info.loss
    _, info = fs.kernel(sampler, loss_fn)(start(sampler, params), data, fs.key(0))
    assert info.aux is None
    assert info.metrics is None


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda params, batch: params["w"], ValueError, r"must return a scalar, got shape \(3,\)"),
        (lambda params, batch: 1.0, TypeError, "must return a real floating tensor, got float"),
        (lambda params, batch: (params["w"] > 0).sum(), TypeError, "got torch.int64"),
    ],
)
def test_bad_losses_are_refused(loss_fn, error, message):
    sampler = fs.sgld(0.1, nbeta=1.0)
    state = sampler.init({"w": torch.ones(3)})
    with pytest.raises(error, match=message):
        fs.kernel(sampler, loss_fn)(state, None, fs.key(0))


def test_a_kernel_refuses_many_chains_without_vmap():
    sampler = fs.sgld(0.1, nbeta=1.0)
    step = fs.kernel(sampler, lambda params, batch: params["w"].sum())
    states = sampler.init(TensorDict({"w": torch.ones(4, 3)}, batch_size=4))
    with pytest.raises(ValueError, match=r"got a state of batch size \(4,\).*torch.vmap"):
        step(states, None, fs.key(0))
    with pytest.raises(TypeError, match="sampler must be one made by a factory"):
        fs.kernel(fs.sgld, lambda params, batch: params["w"].sum())
