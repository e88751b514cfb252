"""SGLD: its equation against an independent one, and its exact stationary law."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc import tree


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


def arrays(rng: np.random.Generator, shapes: dict, chains: tuple) -> TensorDict:
    leaves = {name: torch.tensor(rng.normal(size=chains + shape)) for name, shape in shapes.items()}
    return TensorDict(leaves, batch_size=chains)


def reference_step(w, w0, g, eta, square_avg, pull, s):
    """One step in NumPy, as a single formula on the potential's gradient (design, section 5)."""
    gain = np.ones_like(w)
    if s["rms"]:
        square_avg = s["alpha"] * square_avg + (1 - s["alpha"]) * g**2
        gain = 1 / (np.sqrt(square_avg) + s["eps"])
    force = s["nbeta"] * g + s["localization"] * (w - w0) + s["weight_decay"] * w + pull
    new = w - s["lr"] / 2 * s["mask"] * gain * force
    new = new + s["mask"] * s["noise_level"] * np.sqrt(s["lr"] * gain) * eta
    if s["box"] is not None:
        new = np.minimum(np.maximum(new, w0 - s["box"]), w0 + s["box"])
    return new, square_avg


shapes_of_trees = st.dictionaries(
    st.sampled_from(["a", "b.weight", "c"]),
    st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 1, 2)]),
    min_size=1,
).filter(lambda shapes: any(0 not in shape for shape in shapes.values()))


@given(
    shapes=shapes_of_trees,
    chains=st.sampled_from([(), (1,), (4,)]),
    per_chain=st.booleans(),
    shared_anchor=st.booleans(),
    rms=st.booleans(),
    masked=st.booleans(),
    box=st.one_of(st.none(), numbers(0.01, 3)),
    log_prior=st.booleans(),
    settings=st.fixed_dictionaries(
        {
            "lr": numbers(0, 1),
            "nbeta": numbers(0, 100),
            "localization": numbers(0, 10),
            "weight_decay": numbers(0, 10),
            "noise_level": numbers(0, 2),
            "alpha": numbers(0, 0.999),
            "eps": numbers(1e-3, 1),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_update_is_the_equation(
    shapes, chains, per_chain, shared_anchor, rms, masked, box, log_prior, settings, seed
):
    rng = np.random.default_rng(seed)
    params, grads, noise, pulls = (arrays(rng, shapes, chains) for _ in range(4))
    anchor = arrays(rng, shapes, () if shared_anchor else chains)
    mask = arrays(rng, shapes, ()).apply(lambda leaf: leaf.clamp(0, 1)) if masked else None
    values = dict(settings)
    if per_chain and chains:
        # One value a chain: the settings times 0.5, 0.6, …
        values = {k: v * (0.5 + 0.1 * torch.arange(chains[0])) for k, v in values.items()}
    moments = {"alpha": values.pop("alpha"), "eps": values.pop("eps")}
    sampler = (fs.rmsprop_sgld if rms else fs.sgld)(
        **values, **(moments if rms else {}), anchor=anchor, mask=mask, bounding_box_size=box
    )
    state = sampler.init(params)
    averages = {name: np.zeros(leaf.shape) for name, leaf in params.items()}
    for _ in range(2):
        before = {name: leaf.numpy() for name, leaf in state.params.items()}
        state, _terms = sampler.update(state, grads, noise, pulls if log_prior else None)
        for name, leaf in state.params.items():
            rest = (1,) * len(shapes[name])
            s = {
                k: v.numpy().reshape(-1, *rest) if isinstance(v, torch.Tensor) else v
                for k, v in (values | moments).items()
            }
            s |= {"rms": rms, "box": box, "mask": 1.0 if mask is None else mask[name].numpy()}
            expected, averages[name] = reference_step(
                before[name],
                anchor[name].numpy(),
                grads[name].numpy(),
                noise[name].numpy(),
                averages[name],
                pulls[name].numpy() if log_prior else 0.0,
                s,
            )
            np.testing.assert_allclose(leaf.numpy(), expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(state.step, torch.full(chains, 2))


@given(
    chains=st.sampled_from([(), (3,)]),
    rms=st.booleans(),
    masked=st.booleans(),
    log_prior=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_terms_add_up_and_metrics_are_theirs(chains, rms, masked, log_prior, seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 3), "b": (), "c": (4,)}
    params, grads, noise, pulls = (arrays(rng, shapes, chains) for _ in range(4))
    mask = arrays(rng, shapes, ()).apply(torch.relu) if masked else None
    make = fs.rmsprop_sgld if rms else fs.sgld
    sampler = make(
        0.3,
        nbeta=2.0,
        localization=0.7,
        weight_decay=0.4,
        mask=mask,
        anchor=arrays(rng, shapes, ()),
    )
    state = sampler.init(params)
    new_state, terms = sampler.update(state, grads, noise, pulls if log_prior else None)
    flat = {
        name: torch.cat([leaf.reshape(*chains, -1) for _, leaf in sorted(tree.items())], -1)
        for name, tree in {
            "scaled_grad": terms.scaled_grad.value(),
            "unscaled_grad": terms.unscaled_grad.value(),
            "localization": terms.localization.value(),
            "weight_decay": terms.weight_decay.value(),
            "noise": terms.noise.value(),
            "distance": terms.distance.value(),
            "moved": TensorDict({k: new_state.params[k] - params[k] for k in shapes}),
            "raw": TensorDict({k: 0.3 / 2 * 2.0 * grads[k] for k in shapes}),
        }.items()
    }
    prior = flat["localization"] + flat["weight_decay"]
    torch.testing.assert_close(flat["moved"], flat["noise"] - flat["scaled_grad"] - prior)
    torch.testing.assert_close(flat["unscaled_grad"], flat["raw"])

    metrics = fs.metrics(terms, sampler.mask)
    for name in (
        "scaled_grad",
        "unscaled_grad",
        "localization",
        "weight_decay",
        "noise",
        "distance",
    ):
        torch.testing.assert_close(getattr(metrics, name), flat[name].norm(dim=-1))
    torch.testing.assert_close(metrics.dot_grad_prior, (flat["scaled_grad"] * prior).sum(-1))
    torch.testing.assert_close(
        metrics.dot_grad_noise, (flat["scaled_grad"] * flat["noise"]).sum(-1)
    )
    torch.testing.assert_close(metrics.dot_prior_noise, (prior * flat["noise"]).sum(-1))
    parts = torch.stack([metrics.localization, metrics.weight_decay])
    torch.testing.assert_close(metrics.prior, parts.square().sum(0).sqrt())
    count = 11 if mask is None else sum(int((leaf != 0).sum()) for leaf in mask.values())
    assert torch.equal(metrics.numel, torch.full(chains, count))


# The exact law of SGLD on U = ½ Σ Λ (w − μ)²: N(μ, (1 + εV/4) / (Λ (1 − εΛ/4))) at stationarity,
# where V is the variance of the gradient noise. Chains are independent, so that sums over them have
# exact normal and χ² laws: each z-score has sd 1, and |z| < 4.5 all through is expected but for
# 1e-4 a test. A noise scale that is 2 % off shifts the pooled z-score by about 8.

CURVATURE = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
TARGET = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
NUM_CHAINS = 16_000


def quadratic(params: TensorDict, batch: torch.Tensor) -> torch.Tensor:
    """½ Σ h (w − a)² plus a force of the batch: its mean is the gradient's noise."""
    force = (params["w"] * batch.mean(0)).sum()
    return (CURVATURE / 2 * (params["w"] - TARGET) ** 2).sum() + force


def check_law(final: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Compare `[C, d]` independent draws with N(mean, variance), coordinate by coordinate and
    pooled.
    """
    chains, dims = final.shape
    score = (final - mean) / variance.sqrt()
    mean_z = score.mean(0) * math.sqrt(chains)
    variance_z = (score.square().mean(0) - 1) / math.sqrt(2 / chains)
    pooled_z = (score.square().mean() - 1) / math.sqrt(2 / (chains * dims))
    assert mean_z.abs().max() < 4.5, mean_z
    assert variance_z.abs().max() < 4.5, variance_z
    assert abs(pooled_z) < 4, pooled_z
    assert stats.kstest(score.reshape(-1).numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize(
    ("settings", "noise_sd"),
    [
        ({"nbeta": 1.0}, 0.0),
        ({"nbeta": 2.5}, 0.0),
        ({"nbeta": 0.7, "localization": 1.5}, 0.0),
        ({"nbeta": 2.5, "weight_decay": 1.2}, 0.0),
        ({"nbeta": 0.7, "localization": 1.5, "weight_decay": 0.8, "noise_level": 0.6}, 0.0),
        ({"nbeta": 2.0, "localization": 0.5}, 3.0),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("relative_lr", [0.02, 0.1, 0.35])
def test_stationary_law(settings, noise_sd, relative_lr):
    start = TensorDict({"w": torch.full((4,), 0.3)})
    gamma, decay = settings.get("localization", 0.0), settings.get("weight_decay", 0.0)
    nbeta, sigma = settings["nbeta"], settings.get("noise_level", 1.0)
    total = nbeta * CURVATURE + gamma + decay
    mean = (nbeta * CURVATURE * TARGET + gamma * 0.3) / total
    lr = relative_lr * 4 / float(total.max())
    slowest = 1 - lr * float(total.min()) / 2
    num_steps = math.ceil(math.log(2e-4) / math.log(slowest))

    # Examples of ±noise_sd·√8: the mean of a batch of 8 drawn with replacement has sd noise_sd.
    data = torch.tensor([[-1.0], [1.0]]).repeat(4, 1) * noise_sd * math.sqrt(8)
    gradient_variance = (nbeta * noise_sd) ** 2
    samples = fs.sample(
        quadratic,
        start,
        data,
        fs.sgld(lr, **settings),
        num_chains=NUM_CHAINS,
        num_draws=1,
        num_burnin_steps=num_steps,
        batch_size=8 if noise_sd else None,
        key=fs.key(7),
        initial_loss=0.0,
    )
    variance = (sigma**2 + lr * gradient_variance / 4) / (total * (1 - lr * total / 4))
    if noise_sd:
        # The batch's force is common to the coordinates: only one at a time is normal enough.
        final = samples.state.params["w"]
        score = (final - mean) / variance.sqrt()
        assert (score.mean(0) * math.sqrt(NUM_CHAINS)).abs().max() < 4.5
        kurtosis = score.pow(4).mean(0)
        z = (score.square().mean(0) - 1) / ((kurtosis - 1) / NUM_CHAINS).sqrt()
        assert z.abs().max() < 4.5, z
    else:
        check_law(samples.state.params["w"], mean, variance)


def test_mask_and_box_hold():
    params = TensorDict({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    samples = fs.sample(
        quadratic,
        params,
        torch.zeros(1, 1),
        fs.sgld(
            0.3,
            nbeta=1.0,
            bounding_box_size=0.5,
            mask={"w": torch.tensor([0, 1, 0, 1])},
        ),
        num_chains=20,
        num_draws=50,
        init_noise=0.4,
        key=fs.key(0),
        save_draws=True,
    )
    assert samples.draws is not None
    moved = samples.draws["w"] - params["w"]
    assert torch.equal(moved[..., ::2], torch.zeros(20, 50, 2))
    assert moved.abs().max() <= 0.5
    # Chains start apart and reach the walls.
    assert len(moved[:, 0, 1].unique()) > 15
    assert (moved[..., 1::2].abs() == 0.5).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [fs.sgld, fs.rmsprop_sgld])
def test_dtype_is_kept_and_narrow_ones_round_once(dtype, make):
    params = TensorDict(
        {"w": torch.linspace(-1, 1, 7, dtype=dtype), "b": torch.ones((), dtype=dtype)}
    )
    grads, noise = params * 0.5, params.apply(lambda leaf: torch.cos(leaf.double()))
    noise = noise.apply(lambda leaf: leaf.to(torch.promote_types(dtype, torch.float32)))
    results = []
    for lr in (0.01, torch.tensor([0.01])):
        batched = isinstance(lr, torch.Tensor)
        sampler = make(lr, nbeta=2.0, localization=0.3, weight_decay=0.1, bounding_box_size=5.0)
        trees = [tree[None] if batched else tree for tree in (params, grads, noise)]
        state, _ = sampler.update(sampler.init(trees[0]), *trees[1:])
        assert all(leaf.dtype == dtype for leaf in state.params.values())
        results.append(state.params.squeeze(0) if batched else state.params)
    exact = make(0.01, nbeta=2.0, localization=0.3, weight_decay=0.1)
    double = [tree.double() for tree in (params, grads, noise)]
    expected, _ = exact.update(exact.init(double[0]), *double[1:])
    for name, leaf in expected.params.items():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(
            results[0][name].double(), leaf, rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=1e-6
        )


BAD_SETTINGS = [
    ({"lr": -0.1}, ValueError, r"lr must be >= 0, got -0.1"),
    ({"lr": float("nan")}, ValueError, r"lr must be >= 0, got nan"),
    ({"lr": float("inf")}, ValueError, r"lr must be finite, got inf"),
    ({"lr": torch.tensor([0.1, -1.0])}, ValueError, r"lr must be >= 0, got -1 for chain 1"),
    ({"lr": torch.ones(2, 2)}, ValueError, r"shape \[chains\], got shape \(2, 2\)"),
    ({"lr": "0.1"}, TypeError, "lr must be a number or a tensor, got str"),
    ({"lr": 1j}, TypeError, "lr must be a number or a tensor, got complex"),
    ({"nbeta": -1.0}, ValueError, "nbeta must be >= 0, got -1"),
    ({"localization": -1.0}, ValueError, "localization must be >= 0"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay must be >= 0, got nan"),
    ({"noise_level": -1.0}, ValueError, "noise_level must be >= 0"),
    ({"bounding_box_size": 0.0}, ValueError, "bounding_box_size must be > 0, got 0"),
    ({"mask": {"w": torch.tensor([float("nan")])}}, ValueError, r"mask\['w'\] must be finite"),
    ({"mask": 1.0}, TypeError, "mask must be a TensorDict or a mapping, got float"),
    ({"anchor": {"w": torch.tensor([torch.nan])}}, ValueError, r"anchor\['w'\] must be finite"),
    ({"preconditioner": "rmsprop"}, TypeError, "preconditioner must be one made by identity"),
    ({"preconditioner": fs.rmsprop}, TypeError, "preconditioner must be one made by identity"),
    ({"anchor": [1.0]}, TypeError, "anchor must be a TensorDict or a mapping"),
    (
        {"lr": torch.ones(2), "nbeta": torch.ones(3)},
        ValueError,
        "must agree on the number of chains, got 2 for lr and 3 for nbeta",
    ),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fs.sgld(**({"lr": 0.1, "nbeta": 1.0} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0}, "alpha must be < 1, got 1"),
        ({"alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ({"eps": 0.0}, "eps must be > 0, got 0"),
    ],
)
def test_bad_rmsprop_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fs.rmsprop_sgld(0.1, nbeta=1.0, **settings)


def test_a_half_precision_preconditioner_does_not_overflow():
    params = TensorDict({"w": torch.ones(4, dtype=torch.float16)})
    sampler = fs.rmsprop_sgld(1e-12, nbeta=1.0, eps=1e-6)
    state, terms = sampler.update(sampler.init(params), params * 1e-7, params.float())
    assert tree.all_finite(state, state.shape)
    assert terms.scaled_grad.direction["w"].dtype == torch.float32


def test_valid_limits_are_accepted():
    sampler = fs.sgld(0.0, nbeta=0.0, noise_level=0.0, localization=0, weight_decay=0)
    params = TensorDict({"w": torch.ones(2)})
    state, _ = sampler.update(sampler.init(params), params, params)
    assert torch.equal(state.params["w"], params["w"])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": torch.ones(4, 3)}, r"mask\['w'\] has shape \(4, 3\), parameter has \(3, 4\)"),
        ({"v": torch.ones(3, 4)}, "mask has unknown key 'v'; parameters are w, b"),
        ({"w": torch.ones(3, 4)}, r"mask\['b'\] is missing"),
    ],
)
def test_mismatched_trees_are_refused(mask, message):
    sampler = fs.sgld(0.1, nbeta=1.0, mask=mask)
    with pytest.raises(ValueError, match=message):
        sampler.init(TensorDict({"w": torch.ones(3, 4), "b": torch.ones(3)}))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "must hold at least one parameter"),
        ({"w": torch.ones(0)}, ValueError, "must hold at least one parameter"),
        (
            {"w": torch.ones(3, dtype=torch.int64)},
            TypeError,
            r"params\['w'\] must be real floating",
        ),
        ({"w": torch.ones(3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"w": torch.ones(3), "n": "x"}, TypeError, r"params\['n'\] must be a tensor, got str"),
        ({"w": [1.0]}, TypeError, r"params\['w'\] must be a tensor, got list"),
        ({0: torch.ones(3)}, TypeError, "params must be keyed by strings, got 0"),
        ([torch.ones(3)], TypeError, "params must be a TensorDict or a mapping"),
    ],
)
def test_bad_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        fs.sgld(0.1, nbeta=1.0).init(params)


def test_chains_of_sampler_and_params_must_agree():
    sampler = fs.sgld(torch.ones(3), nbeta=1.0)
    with pytest.raises(
        ValueError, match=r"a sampler of 3 chains needs params of batch size \(3,\)"
    ):
        sampler.init({"w": torch.ones(2)})


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["plain", "localized"])
def test_law_over_many_seeds(sampler):
    """The pooled z-scores of 50 seeds are standard normal: 0.2 % in the noise scale would show."""
    settings = {"nbeta": 2.5, "localization": 0.5 if sampler == "localized" else 0.0}
    total = settings["nbeta"] * CURVATURE + settings["localization"]
    mean = settings["nbeta"] * CURVATURE * TARGET / total
    lr = 0.35 * 4 / float(total.max())
    variance = 1 / (total * (1 - lr * total / 4))
    scores = []
    for seed in range(50):
        samples = fs.sample(
            quadratic,
            {"w": torch.zeros(4)},
            torch.zeros(1, 1),
            fs.sgld(lr, **settings),
            num_chains=NUM_CHAINS,
            num_draws=1,
            num_burnin_steps=150,
            key=fs.key(seed),
            initial_loss=0.0,
        )
        score = (samples.state.params["w"] - mean) / variance.sqrt()
        scores.append(float((score.square().mean() - 1) / math.sqrt(2 / (4 * NUM_CHAINS))))
    assert abs(np.mean(scores)) * math.sqrt(50) < 4
    assert stats.kstest(scores, "norm").pvalue > 1e-3
