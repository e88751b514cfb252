"""Moves of bare tensors, in place and not, and products of terms in narrow dtypes."""

import pytest
import torch

from funcsgmcmc.terms import Term, combine, sum_terms


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("decays", [False, True])
def test_a_move_in_place_is_the_move(dtype, decays):
    generator = torch.Generator().manual_seed(0)
    w, g, noise = (torch.randn(5, generator=generator).to(dtype) for _ in range(3))
    kept, copied = w.clone(), w.clone()

    def minus(w: torch.Tensor) -> list[Term]:
        return [Term(0.1, g), *([Term(0.3, w)] if decays else [])]

    plus = [Term(0.2, noise)]
    expected = combine(w, minus=minus(w), plus=plus)
    assert torch.equal(w, kept)
    assert combine(copied, minus=minus(copied), plus=plus, in_place=True) is copied
    assert torch.equal(copied, expected)
    exact = w.double() * (1 - 0.3 * decays) - 0.1 * g.double() + 0.2 * noise.double()
    torch.testing.assert_close(copied.double(), exact, rtol=1e-3, atol=1e-3)


def test_a_direction_that_is_a_view_of_the_parameter_is_read_before_it_changes():
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = w - 0.5 * torch.ones(2, 2) - 0.1 * w[1]
    minus = [Term(0.5, torch.ones(2, 2)), Term(0.1, w[1].expand(2, 2))]
    combine(w, minus=minus, plus=[], in_place=True)
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("lr", [1e-7, 1e-8])
def test_sums_of_small_terms_of_half_precision_are_not_rounded(lr):
    """In units of a small ε, which float16 does not resolve."""
    first, second = (torch.tensor(row).half() for row in ([0.25, 1.0, -1.5], [1.0, -2.0, 0.5]))
    both = sum_terms([Term(lr, first), Term(2 * lr, second)])
    expected = lr * (first.double() + 2 * second.double())
    torch.testing.assert_close(both.value().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_move_of_half_precision_is_rounded_once(in_place):
    """Also for a bare tensor with numbers as coefficients, whose terms are as narrow."""
    w, g = torch.full((1,), 258.0).bfloat16(), torch.full((1,), 1.0).bfloat16()
    halves = [Term(0.75, g), Term(0.75, g)]  # each by itself would be rounded away
    assert combine(w.clone(), minus=halves, plus=[], in_place=in_place) == 256.0
