"""Metrics of the optimizers are of the magnitudes applied, over any parameters."""

import math

import pytest
import torch
from torch import nn

from compat import SGLD, SGMCMC
from compat.metrics import Metrics
from compat_problems import QUIET, parameter, quadratic_step

pytestmark = QUIET


def test_metrics_are_of_the_magnitudes_applied():
    """A fractional mask counts once in every term, and not in the raw gradient."""
    start, mask = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.5, 1.0])
    for make in (SGLD, SGMCMC.sgld):
        param = nn.Parameter(start.clone())
        optimizer = make(
            [{"params": [param], "mask": mask}],
            lr=0.1,
            nbeta=2.0,
            localization=3.0,
            weight_decay=4.0,
            save_metrics=True,
            sketch_dim=7,
        )
        param.data += 1.0
        before, grad = param.detach().clone(), param.detach().clone()
        torch.manual_seed(0)
        quadratic_step(optimizer, param)
        torch.manual_seed(0)
        noise = math.sqrt(0.1) * mask * torch.randn(3)
        terms = {
            "scaled_grad": 0.05 * mask * 2.0 * grad,
            "unscaled_grad": 0.05 * 2.0 * grad,
            "localization": 0.05 * mask * 3.0,
            "weight_decay": 0.05 * mask * 4.0 * before,
            "noise": noise,
        }
        drift = terms["scaled_grad"] + terms["localization"] + terms["weight_decay"]
        torch.testing.assert_close(param.detach(), before - drift + noise)
        metrics = optimizer.get_metrics()
        for name, value in {**terms, "distance": torch.ones(3)}.items():
            assert getattr(metrics, name).item() == pytest.approx(value.norm().item()), name
        prior = terms["localization"] + terms["weight_decay"]
        dots = {
            "dot_grad_prior": terms["scaled_grad"] @ prior,
            "dot_grad_noise": terms["scaled_grad"] @ noise,
            "dot_prior_noise": prior @ noise,
        }
        for name, value in dots.items():
            assert getattr(metrics, name).item() == pytest.approx(value.item(), rel=1e-5), name
        assert metrics.numel == 2
        sketch = optimizer.get_sketches()
        assert (sketch.scaled_grad != sketch.unscaled_grad).any()


@pytest.mark.parametrize("make", [SGLD, SGMCMC.sgld, SGMCMC.rmsprop_sgld, SGMCMC.sgnht])
def test_metrics_of_empty_and_masked_parameters(make):
    params = [
        nn.Parameter(torch.randn(0, 3)),
        nn.Parameter(torch.randn(4)),
        nn.Parameter(torch.tensor(2.0)),
    ]
    groups = [{"params": params}]
    if make is not SGMCMC.sgnht:
        groups[0]["mask"] = [torch.ones(0, 3), torch.tensor([1, 0, 0, 1]), torch.tensor(0)]
    optimizer = make(groups, save_metrics=True, sketch_dim=3)
    for _ in range(3):
        quadratic_step(optimizer, *params)
    metrics = optimizer.get_metrics()
    assert metrics.numel == (5 if make is SGMCMC.sgnht else 2)
    assert metrics.noise > 0
    assert metrics.noise.isfinite()


@pytest.mark.parametrize(
    ("dtype", "noise_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_metrics_of_large_and_small_parameters(dtype, noise_dtype, autocast):
    """Small parameters are multiplied together, large ones by themselves, all in float32."""
    torch.set_default_dtype(noise_dtype)
    torch.manual_seed(0)
    sizes = (20_000, 7, *[12_000] * 6, 16_384, 30_000)
    params = [nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    optimizer = SGMCMC.sgld(
        params, lr=0.01, nbeta=3.0, localization=2.0, weight_decay=0.5, save_metrics=True
    )
    start = [param.detach().clone() for param in params]
    for param in params:
        param.data += torch.randn_like(param)
        param.grad = torch.randn_like(param)
    before = [param.detach().clone() for param in params]
    torch.manual_seed(1)
    with torch.autocast("cpu", enabled=autocast):
        optimizer.step()
    torch.manual_seed(1)
    distance = [w.float() - s.float() for w, s in zip(before, start, strict=True)]
    terms = {
        "unscaled_grad": [0.005 * 3.0 * param.grad.float() for param in params],
        "localization": [0.005 * 2.0 * each for each in distance],
        "weight_decay": [0.005 * 0.5 * w.float() for w in before],
        "noise": [0.1 * torch.randn(param.shape).float() for param in params],
        "distance": distance,
    }
    whole = {name: torch.cat(parts).double() for name, parts in terms.items()}
    metrics = optimizer.get_metrics()
    for name, value in whole.items():
        assert getattr(metrics, name).item() == pytest.approx(value.norm().item(), rel=1e-5), name
    prior = whole["localization"] + whole["weight_decay"]
    dots = {
        "dot_grad_prior": (whole["unscaled_grad"], prior),
        "dot_grad_noise": (whole["unscaled_grad"], whole["noise"]),
        "dot_prior_noise": (prior, whole["noise"]),
    }
    for name, (a, b) in dots.items():
        error = abs(getattr(metrics, name).item() - (a @ b).item())
        assert error < 1e-5 * a.norm() * b.norm(), name


def test_a_group_of_no_parameters():
    param = parameter(1.0)
    optimizer = SGMCMC.sgld([{"params": []}, {"params": [param]}], save_metrics=True, nbeta=2.0)
    quadratic_step(optimizer, param)
    assert [metrics.numel for metrics in optimizer.iter_group_metrics()] == [0, 1]


def test_metrics_to_is_a_copy():
    metrics = Metrics()
    copied = metrics.to("cpu")
    metrics.noise += 1
    assert copied.noise.item() == 0
