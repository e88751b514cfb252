"""Moves of bare tensors, in place and not, and products of terms in narrow dtypes."""

import pytest
import torch

import compat
from funcsgmcmc.terms import Term, move


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("decays", [False, True])
def test_a_move_in_place_is_the_move(dtype, decays):
    generator = torch.Generator().manual_seed(0)
    w, g, noise = (torch.randn(5, generator=generator).to(dtype) for _ in range(3))
    kept, copied = w.clone(), w.clone()
    minus = [Term(0.1, g), *([Term(0.3, copied)] if decays else [])]
    expected = move(w, [Term(0.1, g), *([Term(0.3, w)] if decays else [])], [Term(0.2, noise)])
    assert torch.equal(w, kept)
    assert move(copied, minus, [Term(0.2, noise)], in_place=True) is copied
    assert torch.equal(copied, expected)
    exact = w.double() * (1 - 0.3 * decays) - 0.1 * g.double() + 0.2 * noise.double()
    torch.testing.assert_close(copied.double(), exact, rtol=1e-3, atol=1e-3)


def test_a_direction_that_is_a_view_of_the_parameter_is_read_before_it_changes():
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = w - 0.5 * torch.ones(2, 2) - 0.1 * w[1]
    move(w, [Term(0.5, torch.ones(2, 2)), Term(0.1, w[1].expand(2, 2))], [], in_place=True)
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("lr", [1e-7, 1e-8])
def test_small_pulls_of_half_precision_parameters_are_not_rounded(lr):
    """The sum of two pulls is in units of ε, which float16 does not resolve."""
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float16))
    priors = [compat.prior.GaussianPrior(2.0, center=0.5), compat.prior.GaussianPrior(1.0)]
    optimizer = compat.SGMCMC(
        [param], lr=lr, nbeta=1.0, prior=compat.prior.CompositePrior(priors), save_metrics=True
    )
    param.grad = torch.tensor([0.25, 1.0, -1.5], dtype=torch.float16)
    pull = 2.0 * (param.detach().double() - 0.5)
    expected = lr**2 / 4 * (param.grad.double() @ pull)
    optimizer.step()
    assert float(optimizer.get_metrics().dot_grad_prior) == pytest.approx(float(expected), rel=1e-3)
