"""The curvature term Γ = ∂G/∂w of `add_grad_correction`, against autograd and by its laws."""

import pytest
import torch
from torch import nn

from compat import SGMCMC
from compat.preconditioner import (
    CompositePreconditioner,
    NHTPreconditioning,
    Preconditioner,
    PreconditionerCoefs,
    RMSpropPreconditioner,
)
from compat_problems import NOISELESS, QUIET, parameter

pytestmark = QUIET


@pytest.mark.parametrize("size", [3, 40, 400])
def test_gradient_correction_is_the_derivative_of_the_preconditioner(size):
    """Γ = ∂G/∂w by autograd. Where the Hessian is diagonal, probes are exact too."""
    torch.manual_seed(0)
    start = torch.randn(size)
    alpha, eps, lr = 0.9, 0.1, 0.5
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    moved = []
    for param, corrected in zip(params, (False, True), strict=True):
        preconditioner = RMSpropPreconditioner(alpha, eps, add_grad_correction=corrected)
        optimizer = SGMCMC([param], lr=lr, preconditioner=preconditioner, **NOISELESS)
        param.grad = torch.autograd.grad((param**4).sum(), param, create_graph=True)[0]
        optimizer.step()
        moved.append(param.detach().clone())
    point = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad((point**4).sum(), point, create_graph=True)
    gain = 1 / ((1 - alpha) ** 0.5 * slope.abs() + eps)
    (expected,) = torch.autograd.grad(gain.sum(), point)
    torch.testing.assert_close(moved[1] - moved[0], lr / 2 * expected)


def test_gradient_correction_uses_the_diagonal_of_a_full_hessian():
    torch.manual_seed(1)
    root = torch.randn(40, 40)
    param = nn.Parameter(torch.randn(40))
    plain, corrected = (
        RMSpropPreconditioner(0.8, 0.2, add_grad_correction=value) for value in (False, True)
    )
    loss = ((root @ param) ** 2).sum() + (param**3).sum()
    (grad,) = torch.autograd.grad(loss, param, create_graph=True)
    coefs, state = corrected.get_coefficients(param, grad, {}), {}
    gain = plain.get_coefficients(param, grad.detach(), state).grad_coef
    hessian = torch.autograd.functional.hessian(
        lambda w: ((root @ w) ** 2).sum() + (w**3).sum(), param.detach()
    )
    average = state["square_avg"]
    expected = -0.2 * grad.detach() * hessian.diagonal() * gain**2 / average.sqrt()
    torch.testing.assert_close(coefs.grad_correction, expected)


def test_gradient_correction_by_probes_is_unbiased():
    torch.manual_seed(2)
    size, repeats = 300, 400
    root = torch.randn(size, size) / size**0.5
    param = nn.Parameter(torch.randn(size))
    (grad,) = torch.autograd.grad(((root @ param) ** 2).sum(), param, create_graph=True)
    preconditioner = RMSpropPreconditioner(0.8, 0.2, add_grad_correction=True)
    draws = torch.stack(
        [preconditioner.get_coefficients(param, grad, {}).grad_correction for _ in range(repeats)]
    )
    state: dict = {}
    gain = RMSpropPreconditioner(0.8, 0.2).get_coefficients(param, grad, state).grad_coef
    diagonal = 2 * (root**2).sum(0)
    expected = -0.2 * grad * diagonal * gain**2 / state["square_avg"].sqrt()
    # One projection, whose draws are independent, and every entry by itself.
    total = draws @ expected.detach().sign()
    error = total.std() / repeats**0.5
    assert abs(total.mean() - expected.detach().abs().sum()) < 4 * error
    z = (draws.mean(0) - expected.detach()) / (draws.std(0) / repeats**0.5)
    assert z.abs().max() < 5  # of 300


def test_gradient_correction_needs_a_graph():
    param = parameter(1.0, 2.0)
    optimizer = SGMCMC.rmsprop_sgld([param], add_grad_correction=True)
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"backward\(create_graph=True\)"):
        optimizer.step()


@pytest.mark.parametrize("thermostat", [False, True])
def test_gradient_correction_is_masked_like_a_drift(thermostat):
    mask, lr = torch.tensor([0.0, 0.5, 1.0]), 0.5
    steps = []
    for corrected in (False, True):
        param = parameter(1.0, 2.0, 3.0)
        torch.manual_seed(0)
        preconditioner = CompositePreconditioner(
            [RMSpropPreconditioner(0.9, 0.1, corrected)] + [NHTPreconditioning(0.0)] * thermostat
        )
        optimizer = SGMCMC([param], lr=lr, preconditioner=preconditioner, mask=mask, **NOISELESS)
        param.grad = torch.autograd.grad((param**4).sum(), param, create_graph=True)[0]
        optimizer.step()
        steps.append(param.detach())
    grad, hessian = 4 * torch.tensor([1.0, 8.0, 27.0]), 12 * torch.tensor([1.0, 4.0, 9.0])
    root = 0.1**0.5 * grad
    curvature = -0.1 * grad * hessian / (root * (root + 0.1) ** 2)
    drift = lr if thermostat else lr / 2
    torch.testing.assert_close(steps[1] - steps[0], drift * mask * curvature)


def test_gradient_correction_of_parameters_without_curvature():
    cubic, linear, empty = parameter(1.0), parameter(2.0), nn.Parameter(torch.zeros(0, 3))
    optimizer = SGMCMC.rmsprop_sgld([cubic, linear, empty], add_grad_correction=True, nbeta=2.0)
    loss = (cubic**3).sum() + linear.sum() + empty.sum()
    with pytest.warns(UserWarning, match="create_graph=True"):
        loss.backward(create_graph=True)
    optimizer.step()
    for param in (cubic, linear, empty):
        param.grad = None


def test_a_users_correction_is_a_drift():
    class Pushing(Preconditioner):
        def get_coefficients(self, param, grad, state):
            return PreconditionerCoefs(1.0, 1.0, 1.0, 0.5, 3.0)

    param = parameter(1.0, 2.0)
    optimizer = SGMCMC([param], lr=0.2, preconditioner=Pushing(), **NOISELESS)
    param.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([1.15, 2.15]))
