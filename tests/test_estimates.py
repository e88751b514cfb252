"""Learning coefficients, diagnostics, summaries, plots: of runs with known answers."""

import math
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc.estimates.llc import running_llc
from funcsgmcmc.estimates.plots import plot_llc
from problems import run


def quadratic_llc(nbeta, curvature, localization, lr, num_chains=400, num_draws=400):
    """LLC of L = ½ Σ h w² at 0 by sampling, and its exact value for the scheme (design, 5)."""
    h = torch.tensor(curvature)
    total = nbeta * h + localization
    exact = float((nbeta * h / (2 * total * (1 - lr * total / 4))).sum())
    samples = fs.sample(
        lambda params, batch: (h / 2 * params["w"] ** 2).sum(),
        {"w": torch.zeros(len(curvature))},
        torch.zeros(1),
        fs.sgld(lr, nbeta=nbeta, localization=localization),
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=200,
        key=fs.key(5),
    )
    return samples, exact


@pytest.mark.parametrize("nbeta", [1.0, 20.0])
@pytest.mark.parametrize("relative_lr", [0.05, 0.4])
def test_llc_of_a_quadratic_is_exact(nbeta, relative_lr):
    curvature, localization = [1.0, 2.0, 3.0], 0.5
    lr = relative_lr * 4 / (3.0 * nbeta + localization)
    samples, exact = quadratic_llc(nbeta, curvature, localization, lr)
    estimate = fs.llc(samples)
    assert samples.initial_loss.item() == 0.0
    assert abs(estimate.mean - exact) < 4 * estimate.mcse
    # The error that is stated is the error that chains show.
    spread = float(estimate.per_chain.std()) / math.sqrt(estimate.num_chains)
    assert estimate.mcse == pytest.approx(spread, rel=0.25)
    assert estimate.mean == pytest.approx(float(estimate.per_chain.mean()))
    assert estimate.mcse < 0.02 * exact


def test_default_nbeta():
    assert fs.default_nbeta(1797) == pytest.approx(1797 / math.log(1797))
    for bad, error in ((1, ValueError), (0, ValueError), (10.0, TypeError)):
        with pytest.raises(error, match="num_examples must be"):
            fs.default_nbeta(bad)


def with_frozen_chain(**settings) -> fs.Samples:
    return run(
        fs.sgld(torch.tensor([1e-3, 1e-3, 1e300, 1e-3]), nbeta=3.0, localization=1.0),
        num_chains=4,
        num_draws=30,
        **settings,
    )


def test_frozen_chains_are_left_out_and_named():
    samples = with_frozen_chain(observables={"first": lambda params: params["0.bias"][:2]})
    assert samples.healthy.tolist() == [True, True, False, True]
    estimate = fs.llc(samples)
    draws = fs.llc_draws(samples)
    assert estimate.num_chains == 3
    assert estimate.per_chain.isnan().tolist() == [False, False, True, False]
    assert estimate.mean == pytest.approx(float(draws[samples.healthy].mean()))
    assert str(estimate).startswith("LLC = ")
    summary = fs.summary(samples)
    assert str(summary).startswith("3 of 4 chains, which have different settings")
    assert "\nchain 2 frozen at step 1: its state is not finite" in str(summary)
    assert list(summary.table.index) == ["llc", "loss", "first[0]", "first[1]"]
    assert fs.to_datatree(samples)["posterior"].coords["chain"].values.tolist() == [0, 1, 3]


def test_summary_is_that_of_the_draws():
    samples = run(fs.sgld(1e-3, nbeta=3.0, localization=1.0), num_chains=4, num_draws=50)
    table = fs.summary(samples).table
    losses = samples.draw_losses
    assert table.loc["loss", "mean"] == pytest.approx(float(losses.mean()))
    found = fs.diagnostics(losses)
    for name in ("r_hat", "ess_bulk", "ess_tail", "mcse_mean"):
        assert table.loc["loss", name] == pytest.approx(float(getattr(found, name)))
    assert table.loc["llc", "mean"] == pytest.approx(fs.llc(samples).mean)


def test_diagnostics_know_good_chains_from_bad():
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(4, 500, 2, generator=generator)
    found = fs.diagnostics(good)
    assert found.r_hat.shape == (2,)
    assert (found.r_hat < 1.01).all()
    assert (found.ess_bulk > 1000).all()
    torch.testing.assert_close(
        found.mcse_mean, (good.flatten(0, 1).std(0) / 2000**0.5), rtol=0.3, atol=0
    )
    apart = good + torch.arange(4.0)[:, None, None]
    assert (fs.diagnostics(apart).r_hat > 1.5).all()
    with pytest.raises(ValueError, match=r"must have shape \[chains, draws, ...\]"):
        fs.diagnostics(torch.ones(3))


def test_datatree_holds_the_record(tmp_path):
    samples = run(
        fs.sgld(1e-3, nbeta=3.0, localization=1.0),
        num_draws=8,
        num_burnin_steps=4,
        num_steps_between_draws=2,
        chain_offset=10,
        observables={"first": lambda params: params["0.bias"][:2]},
    )
    tree = fs.to_datatree(samples)
    posterior = tree["posterior"]
    assert posterior["0.weight"].shape == (5, 8, 6, 5)
    np.testing.assert_array_equal(posterior["0.weight"], samples.draws["0.weight"])
    np.testing.assert_array_equal(posterior["loss"], samples.draw_losses)
    np.testing.assert_array_equal(posterior["first"], samples.observables["first"])
    np.testing.assert_array_equal(posterior["llc"], fs.llc_draws(samples))
    np.testing.assert_array_equal(
        tree["sample_stats"]["noise"], samples.metrics.noise[:, samples.draw_steps]
    )
    np.testing.assert_array_equal(tree["trace"]["loss"], samples.losses)
    assert posterior.coords["chain"].values.tolist() == list(range(10, 15))
    assert posterior.attrs["lr"] == 1e-3
    import arviz_stats

    assert "2.bias[0]" in arviz_stats.summary(tree).index


def test_bfloat16_runs_have_summaries():
    samples = fs.sample(
        lambda params, batch: (params["w"] ** 2).sum(),
        {"w": torch.zeros(3, dtype=torch.bfloat16)},
        torch.zeros(1),
        fs.sgld(1e-2, nbeta=3.0),
        num_chains=4,
        num_draws=20,
        key=fs.key(0),
        save_draws=True,
    )
    assert samples.draws["w"].dtype == torch.bfloat16
    assert "4 of 4 chains" in str(fs.summary(samples))


def test_estimates_refuse_what_they_cannot_do():
    burnt_out = run(fs.sgld(1e300, nbeta=1e300), num_chains=4)
    assert not burnt_out.healthy.any()
    for estimate in (fs.llc, fs.summary, fs.to_datatree, plot_llc):
        with pytest.raises(ValueError, match="at least one healthy chain, got 4 frozen ones"):
            estimate(burnt_out)
    samples = run(
        fs.sgld(1e-3, nbeta=3.0),
        data=iter([(torch.ones(2, 5), torch.ones(2).long())] * 6),
        batch_size=None,
    )
    with pytest.raises(ValueError, match="initial_loss must be given"):
        fs.llc(samples)
    assert fs.llc(samples, initial_loss=0.1).num_chains == 5
    assert list(fs.summary(samples).table.index) == ["loss"]


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("arviz_stats", fs.llc, "diagnostics"),
        ("arviz_stats", fs.summary, "diagnostics"),
        ("arviz_base", fs.to_datatree, "diagnostics"),
        ("matplotlib.figure", plot_llc, "plot"),
    ],
)
def test_missing_extras_are_named(monkeypatch, module, call, extra):
    samples = run(fs.sgld(1e-3, nbeta=3.0))
    for name in [module, *sys.modules]:
        if name == module or name.startswith(module + "."):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'funcsgmcmc\[{extra}\]'"):
        call(samples)


def test_plot_shows_every_healthy_chain(tmp_path):
    samples = with_frozen_chain(num_burnin_steps=10)
    mean, error = running_llc(samples)
    assert mean.shape == error.shape == (30,)
    assert float(mean[-1]) == pytest.approx(fs.llc(samples).mean)
    torch.testing.assert_close(
        error[0], fs.llc_draws(samples)[samples.healthy][:, 0].std() / 3**0.5
    )
    figure = plot_llc(samples)
    above, below = figure.axes
    # Three chains, their mean, and the line of the initial loss.
    assert len(above.lines) == 5
    assert below.get_xlabel() == "step"
    figure.savefig(tmp_path / "llc.png")
    assert (tmp_path / "llc.png").stat().st_size > 10_000


def test_one_chain_has_a_plot_without_band():
    samples = run(fs.sgld(1e-3, nbeta=3.0), num_chains=1)
    assert running_llc(samples)[1].isnan().all()
    plot_llc(samples)


def test_parameters_may_be_nested():
    params = TensorDict({"layer": {"w": torch.ones(3), "b": torch.zeros(())}})
    samples = fs.sample(
        lambda p, batch: ((p["layer", "w"] + p["layer", "b"] - batch.mean()) ** 2).sum(),
        params,
        torch.linspace(0, 1, 8),
        fs.rmsprop_sgld(1e-2, nbeta=3.0, mask=params.apply(torch.ones_like)),
        num_chains=4,
        num_draws=5,
        batch_size=3,
        key=fs.key(0),
        save_draws=True,
    )
    assert samples.draws["layer", "w"].shape == (4, 5, 3)
    assert "layer.w" in fs.to_datatree(samples)["posterior"]


def test_parameters_and_observables_of_any_name_and_dtype():
    samples = fs.sample(
        lambda p, batch: (p["loss"] ** 2).sum(),
        {"loss": torch.ones(3)},
        torch.zeros(4),
        fs.sgld(1e-2, nbeta=3.0),
        num_chains=4,
        num_draws=10,
        key=fs.key(0),
        save_draws=True,
        observables={"positive": lambda p: p["loss"][0] > 0.99},
    )
    posterior = fs.to_datatree(samples)["posterior"]
    np.testing.assert_array_equal(posterior["loss"], samples.draw_losses)
    np.testing.assert_array_equal(posterior["params.loss"], samples.draws["loss"])
    assert 0 <= fs.summary(samples).table.loc["positive", "mean"] <= 1


def test_errors_per_chain():
    samples, _ = quadratic_llc(2.0, [1.0, 2.0], 0.5, 0.1, num_chains=20, num_draws=300)
    estimate = fs.llc(samples)
    assert estimate.mcse_per_chain.shape == (20,)
    pooled = float(estimate.mcse_per_chain.square().mean().sqrt()) / 20**0.5
    assert estimate.mcse == pytest.approx(pooled, rel=0.3)


def test_initial_loss_may_carry_a_graph():
    weight = torch.ones(2, requires_grad=True)
    samples = run(fs.sgld(1e-3, nbeta=3.0), initial_loss=weight.sum())
    assert fs.llc(samples).num_chains == 5
