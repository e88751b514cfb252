"""SGLD, sampled end to end: its exact law through `sample`, roundings, refusals of trees."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc import tree
from problems import check_means

# The exact law of SGLD on U = ½ Σ Λ (w − μ)²: N(μ, (1 + εV/4) / (Λ (1 − εΛ/4))) at stationarity,
# where V is the variance of the gradient noise. `check_stationary` tests the update alone; here the
# chains come out of `sample`, with its noise, its minibatches and its starts.

CURVATURE = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
TARGET = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
NUM_CHAINS = 16_000


def quadratic(params: TensorDict, batch: torch.Tensor) -> torch.Tensor:
    """½ Σ h (w − a)² plus a force of the batch: its mean is the gradient's noise."""
    force = (params["w"] * batch.mean(0)).sum()
    return (CURVATURE / 2 * (params["w"] - TARGET) ** 2).sum() + force


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
@pytest.mark.parametrize("relative_lr", [0.1, 0.35])
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
    score = (samples.state.params["w"] - mean) / variance.sqrt()
    check_means(score, 0.0)
    check_means(score.square(), 1.0)
    if not noise_sd:  # a batch's force is not quite normal
        assert stats.kstest(score.reshape(-1).numpy(), "norm").pvalue > 1e-4


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
        record=["draws"],
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
        start, slopes, shocks = (t[None] if batched else t for t in (params, grads, noise))
        state, _ = sampler.update(sampler.init(start), fs.samplers.Evaluation(slopes), shocks)
        assert all(leaf.dtype == dtype for leaf in state.params.values())
        results.append(state.params.squeeze(0) if batched else state.params)
    exact = make(0.01, nbeta=2.0, localization=0.3, weight_decay=0.1)
    start, slopes, shocks = (t.double() for t in (params, grads, noise))
    expected, _ = exact.update(exact.init(start), fs.samplers.Evaluation(slopes), shocks)
    for name, leaf in expected.params.items():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(
            results[0][name].double(), leaf, rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, "alpha must be <= 1, got 1.5"),
        ({"alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ({"eps": 0.0}, "eps must be > 0, got 0"),
    ],
)
def test_bad_rmsprop_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fs.rmsprop_sgld(0.1, nbeta=1.0, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": torch.ones(2, 2)}, ValueError, r"shape \[chains\], got shape \(2, 2\)"),
        ({"preconditioner": "rmsprop"}, TypeError, "preconditioner must be one made by a factory"),
        (
            {"preconditioner": fs.preconditioners.rmsprop},
            TypeError,
            "preconditioner must be one made by a factory",
        ),
        ({"anchor": [1.0]}, TypeError, "anchor must be a TensorDict or a mapping"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fs.sgld(**({"lr": 0.1, "nbeta": 1.0} | settings))


def test_a_half_precision_preconditioner_does_not_overflow():
    params = TensorDict({"w": torch.ones(4, dtype=torch.float16)})
    sampler = fs.rmsprop_sgld(1e-12, nbeta=1.0, eps=1e-6)
    evaluation = fs.samplers.Evaluation(params * 1e-7)
    state, terms = sampler.update(sampler.init(params), evaluation, params.float())
    assert tree.all_finite(state, state.shape)
    assert terms.scaled_grad.direction["w"].dtype == torch.float32


def test_valid_limits_are_accepted():
    sampler = fs.sgld(0.0, nbeta=0.0, noise_level=0.0, localization=0, weight_decay=0)
    params = TensorDict({"w": torch.ones(2)})
    state, _ = sampler.update(sampler.init(params), fs.samplers.Evaluation(params), params)
    assert torch.equal(state.params["w"], params["w"])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": torch.ones(4, 3)}, r"mask\['w'\] has shape \(4, 3\), parameter has \(3, 4\)"),
        ({"v": torch.ones(3, 4)}, "mask has unknown key 'v'; parameters are w, b"),
        ({"b": torch.ones(4)}, r"mask\['b'\] has shape \(4,\), parameter has \(3,\)"),
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
