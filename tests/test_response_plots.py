"""Plots of responses: they show the numbers that they are given."""

import math

import pytest
import torch

import funcsgmcmc as fs
from funcsgmcmc.estimates.response import Response
from test_response import OBSERVABLES, sampled

pytest.importorskip("matplotlib")
plots = fs.plots


def susceptibilities(*shape: int) -> Response:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, *shape, generator=generator)
    values[1] *= 100
    values[0].view(-1)[0] = math.nan
    return Response(values, torch.full_like(values, 0.5), 4, 1, ("head 0", "head 1"))


@pytest.mark.parametrize("shape", [(6,), (3, 4)])
@pytest.mark.parametrize("per_component", [True, False])
def test_susceptibilities(shape, per_component, tmp_path):
    found = susceptibilities(*shape)
    number = math.prod(shape)
    figure = plots.plot_susceptibilities(
        found, [f"x{i}" for i in range(number)], per_component=per_component
    )
    axes, _ = figure.axes
    (image,) = axes.images
    flat = found.values.reshape(2, number)
    largest = flat.nan_to_num().abs().amax(1, keepdim=True) if per_component else 1.0
    torch.testing.assert_close(
        torch.as_tensor(image.get_array().filled(math.nan)), flat / largest, equal_nan=True
    )
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["head 0", "head 1"]
    assert [tick.get_text() for tick in axes.get_xticklabels()][-1] == f"x{number - 1}"
    alpha = torch.as_tensor(image.get_alpha())
    assert torch.equal(alpha == 1.0, flat.abs() > 1.0)
    assert "1 frozen and left out" in axes.get_title(loc="left")
    figure.savefig(tmp_path / "picture.png")


def test_influence(tmp_path):
    samples = sampled(num_chains=4, num_draws=20)
    found = fs.influence(samples, "losses")
    order = torch.arange(12).flip(0)
    figure = plots.plot_influence(found, order)
    (image,) = figure.axes[0].images
    shown = torch.as_tensor(image.get_array().filled(math.nan))
    torch.testing.assert_close(shown, found.values.flip(0, 1))
    # The scale is that of the entries beside the diagonal.
    off = found.values[~torch.eye(12, dtype=torch.bool)]
    assert image.get_clim()[1] == pytest.approx(float(off.abs().max()))
    figure.savefig(tmp_path / "picture.png")
    wide = plots.plot_influence(fs.influence(samples, "losses", "half"), order)
    assert wide.axes[0].images[0].get_array().shape == (12, 5)


def test_traces(tmp_path):
    samples = sampled(num_chains=4, num_draws=20)
    figure = plots.plot_traces(samples, "losses", [3, 0])
    assert [axes.get_ylabel() for axes in figure.axes] == ["example 3", "example 0"]
    lines = figure.axes[0].lines
    assert len(lines) == 5
    trace = samples.observables["losses"][..., 3]
    torch.testing.assert_close(torch.as_tensor(lines[1].get_ydata()), trace[1])
    torch.testing.assert_close(torch.as_tensor(lines[4].get_ydata()), trace.mean(0))
    assert lines[0].get_xdata().tolist() == samples.draw_steps.tolist()
    figure.savefig(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, s: plots.plot_susceptibilities(3), TypeError, "found must be a Response"),
        (
            lambda f, s: plots.plot_susceptibilities(fs.influence(s, "half")),
            ValueError,
            "found must have components",
        ),
        (
            lambda f, s: plots.plot_susceptibilities(f, ["a"]),
            ValueError,
            "one for each of 6 columns",
        ),
        (lambda f, s: plots.plot_susceptibilities(f, "abcdef"), TypeError, "labels must be a list"),
        (lambda f, s: plots.plot_influence(f), ValueError, "found must be a matrix"),
        (
            lambda f, s: plots.plot_influence(fs.influence(s, "half"), [0, 1]),
            ValueError,
            "order must have each of 5 rows once",
        ),
        (lambda f, s: plots.plot_traces(s, "half", [7]), ValueError, "must be within 5 rows"),
        (lambda f, s: plots.plot_traces(s, "half", []), TypeError, "examples must be indices"),
        (lambda f, s: plots.plot_traces(s, "half", 3), TypeError, "examples must be a list"),
        (lambda f, s: plots.plot_traces(s, "x", [0]), ValueError, "of must be an observable"),
    ],
)
def test_what_cannot_be_plotted(call, error, message):
    samples = sampled(num_chains=2, num_draws=4, observables=OBSERVABLES)
    with pytest.raises(error, match=message):
        call(susceptibilities(6), samples)
