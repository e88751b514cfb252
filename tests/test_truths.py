"""Closed forms of learning coefficients, against other closed forms and cases by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcsgmcmc as fs
from funcsgmcmc.testing.truths import Truth, deep_linear, monomial, separable

WIDTH = st.integers(1, 12)


def reduced_rank(inputs: int, hidden: int, outputs: int, rank: int) -> Truth:
    """The four cases of Aoyagi and Watanabe 2005 (Neural Networks 18, main theorem)."""
    n, h, m, r = inputs, hidden, outputs, rank
    if m + h < n + r:
        return Truth((h * m - h * r + n * r) / 2, 1)
    if n + h < m + r:
        return Truth((h * n - h * r + m * r) / 2, 1)
    if m + n < h + r:
        return Truth(m * n / 2, 1)
    value = 2 * (h + r) * (m + n) + 2 * m * n - (h + r) ** 2 - m**2 - n**2
    is_odd = (m + n + h + r) % 2
    return Truth((value + is_odd) / 8, 1 + is_odd)


@given(inputs=WIDTH, hidden=WIDTH, outputs=WIDTH, data=st.data())
def test_two_layers_are_reduced_rank_regression(inputs, hidden, outputs, data):
    rank = data.draw(st.integers(0, min(inputs, hidden, outputs)))
    found = deep_linear([inputs, hidden, outputs], rank)
    assert found == pytest.approx(reduced_rank(inputs, hidden, outputs, rank))


@given(inputs=WIDTH, outputs=WIDTH, data=st.data())
def test_one_layer_is_regular(inputs, outputs, data):
    """Half the number of weights, whatever their rank."""
    rank = data.draw(st.integers(0, min(inputs, outputs)))
    assert deep_linear([inputs, outputs], rank) == Truth(inputs * outputs / 2, 1)


@given(widths=st.lists(WIDTH, min_size=3, max_size=7), data=st.data())
def test_a_network_of_full_width_is_regular_and_more_layers_are_no_less_singular(widths, data):
    rank = data.draw(st.integers(0, min(widths)))
    found = deep_linear(widths, rank)
    inner = data.draw(st.permutations(widths[1:-1]))
    assert deep_linear([widths[0], *inner, widths[-1]], rank) == found  # hidden layers commute
    assert deep_linear(widths[::-1], rank) == found
    wide = [widths[0], *[40] * len(inner), widths[-1]]
    most = widths[0] * widths[-1] / 2
    assert found.coefficient <= deep_linear(wide, rank).coefficient <= most
    assert rank * (widths[0] + widths[-1] - rank) / 2 <= found.coefficient


def test_cases_by_hand():
    assert deep_linear([20, 12, 15], 10) == (130.0, 1)
    assert deep_linear([10, 8, 12, 9, 10], 7) == (46.5, 1)
    assert deep_linear([1, 1, 1], 0) == (0.5, 2)  # y = a b x at 0: the monomial a² b²
    assert deep_linear([1, 1, 1, 1], 0) == (0.5, 3)
    assert monomial([1, 1]) == (0.5, 2)
    assert monomial([1, 2, 3, 3]) == (1 / 6, 2)
    assert separable(6, 4) == (1.5, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deep_linear([3], 0), "inputs and outputs at least, got"),
        (lambda: deep_linear([3, 2, 4], 3), "at most the smallest width 2, got 3"),
        (lambda: deep_linear([3, 0], 0), "must be >= 1, got 0"),
        (lambda: monomial([]), "one for each parameter, got none"),
        (lambda: monomial([1, 0]), "must be >= 1, got 0"),
        (lambda: separable(3, 0.0), "power must be > 0"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize(("power", "lr"), [(2, 0.02), (4, 0.02), (6, 0.02)])
def test_estimates_of_separable_losses_are_within_their_error(power, lr):
    """E[nβ L] = (d/p) T at every nβ, and the virial tells the degree p."""
    samples = fs.sample(
        lambda params, batch: params["w"].abs().pow(power).sum() / 2,
        {"w": torch.zeros(8)},
        torch.zeros(1),
        fs.baoa(lr, nbeta=50.0),
        num_chains=64,
        num_draws=800,
        num_burnin_steps=4000,
        num_steps_between_draws=20,
        key=fs.key(0),
        full_loss=50,
    )
    estimate, truth = fs.llc(samples), separable(8, power).coefficient
    assert estimate.mean == pytest.approx(truth, rel=0.02)
    assert abs(estimate.mean - truth) < 2 * estimate.error
    looks = samples.looks
    degrees = looks.virials.mean() / (50.0 * looks.losses.mean())
    assert float(degrees) == pytest.approx(power, rel=1e-6)
    assert estimate.warnings == []
