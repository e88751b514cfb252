"""What every sampler must do, driven by the registry."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.utils import _pytree as pytree

import funcsgmcmc as fs
from funcsgmcmc import tree
from funcsgmcmc.plots import plot_llc
from problems import arrays, numbers, run
from registry import CASES, ENTRIES, Entry, some_mask

MOMENTUM = [entry for entry in ENTRIES if entry.has_momentum]
SHARED = {
    "nbeta": (0, 10),
    "temperature": (0, 3),
    "localization": (0, 5),
    "weight_decay": (0, 5),
}
SHAPES = {"a": (2, 3), "b": (), "c": (0,), "d.weight": (4, 1)}
SIZE = 11


def rows(params: TensorDict) -> np.ndarray:
    """`[chains, n]`, the entries of all leaves in a row."""
    return tree.flatten(params).reshape(-1, SIZE).numpy()


def of_chain(value, chain: int):
    """A setting of one chain, as a number."""
    return float(value[chain]) if isinstance(value, torch.Tensor) else value


def first_chains(entry: Entry, params: TensorDict, start: TensorDict, sampler) -> list[dict]:
    """The oracle's chains before the first step; momenta are checked by a law of their own."""
    state = sampler.init(params, start)
    chains = []
    for chain, w in enumerate(rows(params)):
        parts = {"w": w, "t": 0}
        if entry.has_momentum:
            parts["p"] = rows(state.momentum)[chain]
        if hasattr(state, "thermostat"):
            parts["xi"] = float(state.thermostat.reshape(-1)[chain])
        if hasattr(state, "theta"):
            parts["theta"] = np.full(state.theta.shape[-1], 1 / state.theta.shape[-1])
        chains.append(parts)
    return chains


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@given(data=st.data())
def test_update_is_the_equation(entry, data):
    """Three steps against the oracle: all settings, shared or one a chain, masks, boxes, walls."""
    chains = data.draw(st.sampled_from([(), (1,), (3,)]), label="chains")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    ranges = SHARED | {"lr": (0, 0.5)} | dict(entry.ranges)
    settings = {
        name: data.draw(st.one_of(st.just(float(low)), numbers(low, high)), label=name)
        for name, (low, high) in ranges.items()
    }
    if chains and data.draw(st.booleans(), label="one a chain"):
        spread = 0.8 + 0.1 * torch.arange(chains[0])
        settings = {name: value * spread for name, value in settings.items()}
    fixed = {k: v for k, v in entry.settings.items() if k not in entry.ranges}
    box = data.draw(st.one_of(st.none(), numbers(0.05, 3)), label="box")
    interval = data.draw(st.sampled_from([None, 1, 2]), label="refresh")
    masked, scaled_, decays = (data.draw(st.booleans()) for _ in range(3))
    params, grads, noise, pulls, start = (arrays(rng, SHAPES, chains) for _ in range(5))
    anchor = arrays(rng, SHAPES, data.draw(st.sampled_from([(), chains]), label="anchors"))
    mask = some_mask(arrays(rng, SHAPES, ())) if masked else None
    gain = arrays(rng, SHAPES, ()).apply(torch.exp) if scaled_ else None
    loss, log_prior = torch.tensor(rng.uniform(0, 8, size=(2, *chains)))

    options = dict(fixed)
    lr = settings.pop("lr")
    if entry.has_momentum:
        options["refresh_interval"] = interval
    elif scaled_:
        options["preconditioner"] = fs.diagonal(gain)
    step_size = fs.polynomial_decay(lr, offset=1.0, power=0.5) if decays else lr
    sampler = entry.make(
        step_size, **settings, **options, anchor=anchor, mask=mask, bounding_box_size=box
    )
    expected = first_chains(entry, params, start, sampler)
    state = sampler.init(params, start)
    for t in range(3):
        state, _ = sampler.update(state, grads, noise, pulls, loss=loss, log_prior=log_prior)
        for chain, parts in enumerate(expected):
            s = {name: of_chain(value, chain) for name, value in settings.items()} | fixed
            s["lr"] = of_chain(lr, chain) * ((1 + t) ** -0.5 if decays else 1)
            s["anchor"] = np.resize(rows(anchor), (len(expected), SIZE))[chain]
            s["mask"] = np.ones(SIZE) if mask is None else rows(mask)[0]
            s["box"] = math.inf if box is None else box
            s["gain"] = rows(gain)[0] if scaled_ and not entry.has_momentum else np.ones(SIZE)
            s |= {"correction": np.zeros(SIZE), "refresh_interval": interval}
            s["loss"] = float(loss.reshape(-1)[chain])
            s["log_prior"] = float(log_prior.reshape(-1)[chain])
            known = (rows(tree_)[chain] for tree_ in (grads, noise, pulls))
            expected[chain] = entry.oracle(parts, *known, **s) | {"t": t + 1}
        for name, of_state in (("w", "params"), ("p", "momentum"), ("xi", "thermostat")):
            if name not in expected[0]:
                continue
            got = getattr(state, of_state)
            got = rows(got) if isinstance(got, TensorDict) else got.reshape(-1).numpy()
            wanted = np.stack([parts[name] for parts in expected])
            np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9)
        if "theta" in expected[0]:
            wanted = np.stack([parts["theta"] for parts in expected])
            np.testing.assert_allclose(state.theta.reshape(wanted.shape), wanted, rtol=1e-10)
            weights = [parts["log_weight"] for parts in expected]
            np.testing.assert_allclose(
                sampler.log_weight(state).reshape(-1), weights, rtol=1e-9, atol=1e-9
            )
    assert torch.equal(state.step, torch.full(chains, 3))


def changed(sampler: fs.Sampler, **fields) -> fs.Sampler:
    """The sampler with other settings, unchecked."""
    kept = {name: getattr(sampler, name) for name in sampler.__dataclass_fields__}
    return type(sampler)(**(kept | fields), batch_size=sampler.shape)


def stepped(sampler, params, *, seed=0, zero_noise=False):
    """A state after one step, and a second step with its terms."""
    rng = np.random.default_rng(seed)
    shapes = {name: leaf.shape[params.batch_dims :] for name, leaf in tree.leaves(params)}
    grads, noise, start, pulls, hessian = (
        arrays(rng, shapes, params.shape).apply(
            lambda leaf, like: leaf.to(tree.working_dtype(like)), params
        )
        for _ in range(5)
    )
    if zero_noise:
        noise = noise.apply(torch.zeros_like)
    known = {"loss": torch.ones(params.shape), "log_prior": torch.ones(params.shape)}
    known["hessian_diagonal"] = hessian
    state = sampler.init(params, start)
    before, _ = sampler.update(state, grads, noise, pulls, **known)
    after, terms = sampler.update(before, grads, noise, pulls, **known)
    return before, after, terms


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chains", [(), (4,)], ids=str)
def test_terms_add_up_and_metrics_are_theirs(case, chains):
    params = arrays(np.random.default_rng(1), SHAPES, chains)
    sampler = case.make(params if not chains else params[0])
    before, after, terms = stepped(changed(sampler, bounding_box_size=None), params)
    value = {name: tree.flatten(term.value()) for name, term in terms._asdict().items() if term}
    zero = torch.zeros(*chains, SIZE)
    prior = value["localization"] + value["weight_decay"]
    moved = tree.flatten(after.params) - tree.flatten(before.params)
    added = value["noise"] + value.get("momentum", zero) + value.get("correction", zero)
    torch.testing.assert_close(moved, added - value["scaled_grad"] - prior)

    metrics = fs.metrics(terms, sampler.mask)
    for name in (
        "scaled_grad",
        "unscaled_grad",
        "localization",
        "weight_decay",
        "noise",
        "distance",
    ):
        torch.testing.assert_close(getattr(metrics, name), value[name].norm(dim=-1))
    for name, a, b in (
        ("dot_grad_prior", value["scaled_grad"], prior),
        ("dot_grad_noise", value["scaled_grad"], value["noise"]),
        ("dot_prior_noise", prior, value["noise"]),
    ):
        torch.testing.assert_close(getattr(metrics, name), (a * b).sum(-1))
    count = SIZE if sampler.mask is None else int((tree.flatten(sampler.mask) != 0).sum())
    assert torch.equal(metrics.numel, torch.full(chains, count))


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_at_temperature_zero_noise_is_unseen(entry):
    """… and the step is that of the scheme without noise."""
    params = arrays(np.random.default_rng(2), SHAPES, (3,))
    settings = {k: v for k, v in entry.settings.items() if k != "noise_level"}
    cold = entry.make(0.1, nbeta=2.0, temperature=0.0, **settings, localization=1.0)
    _, noisy, _ = stepped(cold, params)
    _, quiet, _ = stepped(cold, params, zero_noise=True)
    for a, b in zip(noisy.params.values(), quiet.params.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_step_size_moves_nothing(case):
    params = arrays(np.random.default_rng(3), SHAPES, (2,))
    sampler = case.make(params[0])
    still = changed(sampler, lr=torch.tensor(0.0), bounding_box_size=None)
    before, after, _ = stepped(still, params)
    for a, b in zip(before.params.values(), after.params.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_masked_entries_stay_and_are_not_seen(entry):
    params = arrays(np.random.default_rng(4), SHAPES, (3,))
    mask = some_mask(params[0])
    sampler = entry.make(0.05, nbeta=2.0, mask=mask, **entry.settings, localization=1.0)
    before, after, _ = stepped(sampler, params)
    kept = tree.flatten(mask) == 0
    assert torch.equal(tree.flatten(after.params)[:, kept], tree.flatten(params)[:, kept])
    assert (tree.flatten(after.params) != tree.flatten(before.params))[:, ~kept].all()
    # What is masked is not seen by the rest: other gradients and noise there change nothing.
    rng = np.random.default_rng(5)
    trees = [arrays(rng, SHAPES, (3,)) for _ in range(4)]
    others = [
        other.apply(lambda leaf, m: torch.where(m == 0, leaf + 7, leaf), mask.expand(3))
        for other in trees
    ]
    known = {"loss": torch.ones(3)}
    results = []
    for start, grads, noise, _ in (trees, others):
        state = sampler.init(params, start)
        for _ in range(2):
            state, _ = sampler.update(state, grads, noise, **known)
        results.append(tree.flatten(state.params))
    assert torch.equal(*results)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_chain_that_is_masked_all_over_stays_and_is_healthy(entry):
    params = TensorDict({"w": torch.ones(3)})
    mask = {"w": torch.zeros(3)}
    sampler = entry.make(1.0, nbeta=1.0, mask=mask, **entry.settings)
    state, noise = sampler.init(params, params), params * 0.3
    for _ in range(300):
        state, _ = sampler.update(state, params, noise, loss=torch.tensor(1.0))
    assert torch.equal(state.params["w"], params["w"])
    assert tree.all_finite(state, state.shape)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_box_holds(entry):
    params = arrays(np.random.default_rng(6), SHAPES, (3,))
    sampler = entry.make(0.5, nbeta=5.0, bounding_box_size=0.3, **entry.settings)
    before, after, _ = stepped(sampler, params)
    for state in (before, after):
        moved = (tree.flatten(state.params) - tree.flatten(params)).abs()
        assert moved.max() <= 0.3 + 1e-15
        assert (moved > 0.3 - 1e-12).any()


@pytest.mark.parametrize("entry", MOMENTUM, ids=str)
def test_walls_turn_the_momentum_round(entry):
    params = TensorDict({"w": torch.tensor([0.0, 0.0])})
    settings = dict(entry.settings)
    sampler = entry.make(0.1, nbeta=1.0, temperature=0.0, bounding_box_size=0.2, **settings)
    push = TensorDict({"w": torch.tensor([-100.0, 1.0])})
    state = sampler.init(params, push * 0)
    state, _ = sampler.update(state, push, push * 0)
    assert state.params["w"][0] == 0.2
    assert state.momentum["w"][0] < 0  # it was going up
    assert state.momentum["w"][1] < 0  # inside, as the force says


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dtype_is_kept(case, dtype):
    params = arrays(np.random.default_rng(7), SHAPES, (2,)).to(dtype)
    before, after, _ = stepped(case.make(params[0]), params)
    for state in (before, after):
        assert all(leaf.dtype == dtype for leaf in state.params.values())
        assert tree.all_finite(state, state.shape).all()
    if "momentum" in after.__dataclass_fields__:
        wide = torch.promote_types(dtype, torch.float32)
        assert all(leaf.dtype == wide for leaf in after.momentum.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_device_is_kept(case):
    """On the device without data, an operation with a tensor left on the CPU is an error."""
    params = arrays(np.random.default_rng(8), SHAPES, (2,))
    sampler = case.make(params[0])
    state = sampler.init(params, params).to("meta")
    away, known = params.to("meta"), torch.ones(2, device="meta")
    moved, terms = sampler.to("meta").update(
        state, away, away, away, loss=known, log_prior=known, hessian_diagonal=away
    )
    metrics = fs.metrics(terms, None if sampler.mask is None else sampler.mask.to("meta"))
    for leaf in pytree.tree_leaves((moved, terms, metrics)):
        assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta"


@pytest.mark.parametrize("make", [fs.sgnht, fs.badoda])
def test_each_chain_has_its_thermostat(make):
    samples = run(make(1e-3, nbeta=3.0, diffusion_factor=0.1), num_chains=20)
    assert len(samples.state.thermostat.unique()) == 20


@pytest.mark.parametrize("entry", MOMENTUM, ids=str)
def test_momenta_need_noise(entry):
    with pytest.raises(ValueError, match=f"{entry.name} needs noise for its momenta"):
        entry.make(0.1, nbeta=1.0, **entry.settings).init({"w": torch.ones(2)})


def test_contour_sgld_meets_the_same_parts_however_it_is_run():
    """Energies of a large scale, in float32: a part is a small difference of them."""
    sampler = fs.contour_sgld(
        1e-9, nbeta=1e6, energy_range=(1e6 - 1, 1e6 + 9), num_partitions=12, weight_lr=0.1
    )
    theta = []
    for method in ("vmap", "loop"):
        samples = fs.sample(
            lambda params, batch: params["w"].square().sum() + 0 * batch.mean(),
            TensorDict({"w": torch.tensor([1.0], dtype=torch.float32)}),
            torch.zeros(1, dtype=torch.float32),
            sampler,
            num_chains=2,
            num_draws=5,
            key=fs.key(0),
            chain_method=method,
        )
        theta.append(samples.state.theta)
    torch.testing.assert_close(*theta)


def test_weights_of_a_frozen_chain_are_refused():
    def loss_fn(params, batch):
        bad = torch.where(params["w"][0] > 1.5, torch.nan, 1.0)
        return bad * params["w"].square().sum() / 2 + 0 * batch.mean()

    samples = fs.sample(
        loss_fn,
        {"w": torch.zeros(2)},
        torch.zeros(1),
        fs.contour_sgld(0.3, nbeta=1.0, energy_range=(0.1, 3.0), num_partitions=8),
        num_chains=6,
        num_draws=60,
        key=fs.key(1),
        observables={"x": lambda params: params["w"][0]},
    )
    healthy, x = samples.healthy, samples.observables["x"]
    assert not healthy.all()
    assert samples.log_weights[healthy].isfinite().all()
    for row in (~healthy).nonzero().flatten():
        stopped = samples.draw_steps >= samples.frozen_at[row]
        assert torch.equal(samples.log_weights[row].isnan(), stopped)
    with pytest.raises(ValueError, match=r"must be those of healthy chains .* got NaN"):
        fs.weighted_mean(x, samples.log_weights)
    assert abs(fs.weighted_mean(x[healthy], samples.log_weights[healthy]).mean) < 1
    with pytest.raises(ValueError, match="log_weights must have shape"):
        fs.weighted_mean(x[healthy], samples.log_weights)
    with pytest.raises(TypeError, match=r"log_weights must be a tensor .* got NoneType"):
        fs.weighted_mean(x, None)
    for refused in (fs.llc, fs.summary, plot_llc):
        with pytest.raises(ValueError, match=r"the draws have weights .* use weighted_mean"):
            refused(samples)


SHARED_INVALID = (
    ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
    ({"lr": math.nan}, "lr must be >= 0, got nan"),
    ({"lr": math.inf}, "lr must be finite, got inf"),
    ({"nbeta": -1.0}, "nbeta must be >= 0, got -1"),
    ({"temperature": -1.0}, "temperature must be >= 0, got -1"),
    ({"localization": -1.0}, "localization must be >= 0"),
    ({"weight_decay": math.nan}, "weight_decay must be >= 0, got nan"),
    ({"bounding_box_size": 0.0}, "bounding_box_size must be > 0, got 0"),
    ({"lr": torch.tensor([0.1, -1.0])}, "lr must be >= 0, got -1 for chain 1"),
    (
        {"lr": torch.ones(2), "nbeta": torch.ones(3)},
        "must agree on the number of chains, got 2 for lr and 3 for nbeta",
    ),
    ({"mask": {"w": torch.tensor([math.nan])}}, r"mask\['w'\] must be finite"),
    ({"anchor": {"w": torch.tensor([math.nan])}}, r"anchor\['w'\] must be finite"),
)


@pytest.mark.parametrize(
    ("entry", "settings", "message"),
    [
        (entry, settings, message)
        for entry in ENTRIES
        for settings, message in (*SHARED_INVALID, *entry.invalid)
    ],
    ids=str,
)
def test_bad_settings_are_refused(entry, settings, message):
    with pytest.raises(ValueError, match=message):
        entry.make(**({"lr": 0.1, "nbeta": 1.0} | dict(entry.settings) | dict(settings)))


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_settings_of_a_wrong_type_are_refused(entry):
    for settings, message in (
        ({"lr": "0.1"}, "lr must be a number or a tensor, got str"),
        ({"lr": lambda step: 0.1}, "lr must be a number or a tensor, got function"),
        ({"nbeta": 1j}, "nbeta must be a number or a tensor, got complex"),
        ({"mask": 1.0}, "mask must be a TensorDict or a mapping, got float"),
    ):
        with pytest.raises(TypeError, match=message):
            entry.make(**({"lr": 0.1, "nbeta": 1.0} | dict(entry.settings) | settings))


def test_the_registry_is_complete():
    made = {entry.name for entry in ENTRIES} | {"rmsprop_sgld", "cyclical_sgld"}
    factories = {name for name in fs.__all__ if name in vars(fs.samplers) and name[0].islower()}
    assert factories == made
