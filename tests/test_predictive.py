"""Prediction with all draws of a run."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.estimates.predictive import calibration_error, log_predictive_density, predictive
from funcsgmcmc.per_example import losses_on
from problems import classification, run

SAMPLER = fs.sgld(1e-2, nbeta=10.0, localization=1.0)
SOFTMAX = nn.Softmax(-1)


def sampled(**settings) -> tuple[nn.Module, torch.Tensor, fs.Samples]:
    model, data = classification()
    losses = losses_on(fs.module_loss(model, partial(cross_entropy, reduction="none")), data)
    samples = run(SAMPLER, num_draws=12, observables={"test": losses}, **settings)
    return model, data, samples


@pytest.mark.parametrize("transform", [None, SOFTMAX])
@pytest.mark.parametrize("how", [{}, {"batch_size": 7}, {"draws_at_once": 5}, {"batch_size": 40}])
def test_it_is_the_mean_over_all_draws(transform, how):
    model, (inputs, _), samples = sampled()
    flat = samples.draws.reshape(-1)
    outputs = torch.stack(
        [functional_call(model, dict(draw.items()), (inputs,)) for draw in flat.unbind(0)]
    ).detach()
    outputs = outputs if transform is None else transform(outputs)
    found = predictive(model, samples, inputs, transform=transform, **how)
    assert found.num_draws == 60
    assert str(found) == "Predictive(outputs [40, 3], 60 draws)"
    torch.testing.assert_close(found.mean, outputs.mean(0))
    torch.testing.assert_close(found.std, outputs.std(0, correction=0))
    between = outputs.reshape(5, 12, 40, 3).mean(1).std(0) / math.sqrt(5)
    assert 0.3 < float((found.mcse / between).square().mean().sqrt()) < 3
    one_chain = predictive(model, samples.draws[0], inputs, transform=transform, **how)
    torch.testing.assert_close(one_chain.mean, outputs[:12].mean(0))


def test_frozen_chains_do_not_predict():
    model, (inputs, _), _ = sampled()
    lr = torch.tensor([1e-3, 1e300, 1e-3])
    samples = run(fs.sgld(lr, nbeta=3.0, localization=1.0), num_chains=3, num_draws=6)
    assert samples.healthy.tolist() == [True, False, True]
    found = predictive(model, samples, inputs)
    assert found.num_draws == 12
    expected = predictive(model, samples.draws[samples.healthy], inputs)
    torch.testing.assert_close(found.mean, expected.mean)


def test_the_log_predictive_density_is_that_of_the_mean_probability():
    """And does not underflow."""
    model, (inputs, targets), samples = sampled()
    probabilities = predictive(model, samples, inputs, transform=SOFTMAX).mean
    found = log_predictive_density(samples, "test")
    chosen = probabilities.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.values, chosen.log(), rtol=1e-5, atol=1e-6)
    assert (found.mcse > 0).all()
    samples.observables["test"] += 1e4
    far = log_predictive_density(samples, "test")
    torch.testing.assert_close(far.values, found.values - 1e4, rtol=1e-6, atol=0.01)


def test_the_error_of_the_log_predictive_density():
    """Draws that are independent: ℓ = −log p with p uniform, so that E p = 1/2."""
    _, _, samples = sampled(num_chains=400)
    p = torch.rand(400, 12, 1, generator=torch.Generator().manual_seed(0))
    samples.observables["test"] = -p.log()
    found = log_predictive_density(samples, "test")
    due = math.sqrt(1 / 12 / 4800) / 0.5
    assert float(found.mcse) == pytest.approx(due, rel=0.15)
    assert abs(float(found.values) - math.log(0.5)) < 4 * due


def test_calibration_error():
    """80 % sure and right in 60 of 100; and nothing where confidence is accuracy."""
    sure = torch.tensor([[0.8, 0.2]]).expand(100, 2)
    targets = (torch.arange(100) >= 60).long()
    assert calibration_error(sure, targets) == pytest.approx(0.2)
    assert calibration_error(sure, (torch.arange(100) >= 80).long()) == pytest.approx(0.0)
    # Bins that err to both sides do not make up for one another.
    two = torch.cat([sure, torch.tensor([[0.4, 0.6]]).expand(100, 2)])
    both = torch.cat([targets, (torch.arange(100) < 80).long()])
    assert calibration_error(two, both) == pytest.approx(0.2)
    assert calibration_error(two, both, num_bins=1) == pytest.approx(0.0)
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 2), torch.zeros(3).long()), ValueError, "must be >= 0 and add up to 1"),
        ((torch.full((3, 2), math.nan), torch.zeros(3).long()), ValueError, "add up to 1"),
        ((torch.ones(3), torch.zeros(3).long()), ValueError, r"probabilities must be real, \[n"),
        ((torch.ones(3, 1), torch.zeros(3)), ValueError, "targets must be 3 integers"),
        ((torch.ones(3, 1), [0]), TypeError, "targets must be a Tensor"),
    ],
)
def test_what_has_no_calibration(arguments, error, message):
    with pytest.raises(error, match=message):
        calibration_error(*arguments)


def test_what_cannot_predict():
    model, (inputs, _), samples = sampled(record=[])
    with pytest.raises(ValueError, match="draws must have been recorded"):
        predictive(model, samples, inputs)
    with pytest.raises(TypeError, match="draws must be a run or a TensorDict, got dict"):
        predictive(model, {}, inputs)
    with pytest.raises(ValueError, match=r"draws must have batch size .*, got \[\]"):
        predictive(model, fs.params_of(model), inputs)
    with pytest.raises(TypeError, match="the outputs must be a tensor, got tuple: transform="):
        predictive(model, fs.params_of(model).expand(2), inputs, transform=lambda x: (x,))
    with pytest.raises(ValueError, match="one row for each of 40 inputs, got shape") as caught:
        predictive(model, fs.params_of(model).expand(2), inputs, transform=lambda x: x[:1])
    assert caught.value.__notes__ == [
        "This happened when the model was evaluated on a piece of inputs."
    ]
