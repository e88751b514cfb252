"""`SGMCMC.sgnht` is SGNHT; the published one is SGLD with noise of variance 2A."""

import math

import devinterp.optim
import pytest
import torch
from torch import nn

from compat import SGMCMC, SGNHT
from compat.preconditioner import (
    CompositePreconditioner,
    MaskPreconditioner,
    NHTPreconditioning,
)
from compat_problems import QUIET, parameter, quadratic_step

pytestmark = QUIET


def test_sgmcmc_sgnht_is_sgnht():
    runs = []
    for make in (SGNHT, SGMCMC.sgnht):
        torch.manual_seed(5)
        params = [parameter(1.0, -2.0, 0.5), nn.Parameter(torch.ones(2, 3))]
        settings = {"lr": 0.01, "nbeta": 3.0, "diffusion_factor": 0.2, "bounding_box_size": 0.1}
        optimizer = make(params, **settings)
        for _ in range(30):
            quadratic_step(optimizer, *params)
        momenta = [optimizer.state[param]["momentum"] for param in params]
        runs.append([*params, *momenta, optimizer.param_groups[0]["thermostat"]])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def moments(make, curvature, dimension, steps, diffusion_factor=0.1, lr=0.02):
    """Time averages over a chain on a quadratic, ‖p‖²/d, ‖w‖²/d, ξ, and their standard errors."""
    torch.manual_seed(11)
    param = nn.Parameter(torch.randn(dimension) / math.sqrt(curvature))
    optimizer = make([param], lr=lr, nbeta=curvature, diffusion_factor=diffusion_factor)
    group, state = optimizer.param_groups[0], optimizer.state[param]
    rows = []
    for step in range(2_000 + steps):
        param.grad = param.detach().clone()
        optimizer.step()
        if step >= 2_000:
            squares = [(values.detach() ** 2).mean() for values in (state["momentum"], param)]
            rows.append(torch.stack([*squares, group.get("thermostat", torch.tensor(0.0))]))
    blocks = torch.stack(rows).reshape(50, -1, 3).mean(1)  # long beside the autocorrelation
    return blocks.mean(0), blocks.std(0) / math.sqrt(len(blocks))


@pytest.mark.parametrize("curvature", [0.5, 4.0])
@pytest.mark.parametrize("dimension", [4, 400])
def test_sgnht_keeps_its_kinetic_energy(curvature, dimension):
    mean, error = moments(SGMCMC.sgnht, curvature, dimension, steps=10_000)
    assert abs(mean[0] - 0.02) < 4 * error[0] < 0.02 / 10


@pytest.mark.parametrize("curvature", [0.5, 4.0])
def test_sgnht_samples_the_quadratic(curvature):
    # In many dimensions ξ hardly moves, and the law of the scheme with ξ fixed is exact.
    mean, error = moments(SGMCMC.sgnht, curvature, dimension=4_000, steps=10_000)
    variance = (2 - mean[2]) / (2 * (1 - mean[2])) / curvature
    assert abs(mean[1] - variance) < 4 * error[1] < 0.02 / curvature
    # The published one is SGLD with 2A in place of the noise's variance 1.
    mean, error = moments(devinterp.optim.SGMCMC.sgnht, curvature, dimension=4_000, steps=10_000)
    variance = 2 * 0.1 / curvature / (1 - 0.02 * curvature / 4)
    assert abs(mean[1] - variance) < 4 * error[1]


def test_sgnht_takes_masks_priors_and_metrics():
    param = parameter(1.0, 2.0, 3.0)
    optimizer = SGMCMC(
        [param],
        lr=0.1,
        nbeta=2.0,
        prior=4.0,
        preconditioner=NHTPreconditioning(0.0),
        mask=torch.tensor([1.0, 0.0, 1.0]),
        save_metrics=True,
    )
    momentum = optimizer.state[param]["momentum"].clone()
    assert momentum[1] == 0
    before = param.detach().clone()
    quadratic_step(optimizer, param)
    expected = momentum - 0.1 * 2.0 * before * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(param.detach(), before + expected)
    metrics = optimizer.get_metrics()
    assert metrics.numel == 2
    assert metrics.scaled_grad.item() == pytest.approx(0.2 * math.sqrt(1 + 9))
    assert metrics.noise.item() == 0
    energy = optimizer.state[param]["momentum"].square().sum().item() / 2
    assert optimizer.param_groups[0]["thermostat"].item() == pytest.approx(energy - 0.1)


def test_sgnht_takes_several_masks_and_a_noise_level():
    masks = [
        MaskPreconditioner([torch.tensor(mask)]) for mask in ([1.0, 0.5, 1.0], [0.0, 0.5, 1.0])
    ]
    param = nn.Parameter(torch.zeros(3))
    optimizer = SGMCMC(
        [param],
        lr=0.04,
        nbeta=2.0,
        noise_level=0.5,
        preconditioner=CompositePreconditioner([NHTPreconditioning(0.5), *masks]),
    )
    momentum = optimizer.state[param]["momentum"].clone()
    assert momentum[0] == 0
    param.grad = torch.zeros(3)
    torch.manual_seed(0)
    optimizer.step()
    torch.manual_seed(0)
    noise = 0.2 * 0.5 * torch.tensor([0.0, 0.25, 1.0]) * torch.randn(3)
    torch.testing.assert_close(param.detach(), 0.5 * momentum + noise)


def test_sgnht_of_a_group_that_is_masked_away():
    param = parameter(1.0, 2.0)
    optimizer = SGNHT([{"params": [param], "mask": torch.zeros(2)}], nbeta=2.0)
    quadratic_step(optimizer, param)
    assert param.tolist() == [1.0, 2.0]
    assert optimizer.param_groups[0]["thermostat"].item() == pytest.approx(0.01)
