"""Learning coefficients, diagnostics, summaries, plots: of runs with known answers."""

import math
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc.estimates.convergence import mean_error
from funcsgmcmc.estimates.llc import running_llc
from funcsgmcmc.estimates.plots import plot_llc
from problems import classification, run


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


@pytest.mark.parametrize("num_chains", [4, 8, 30])
@pytest.mark.parametrize("num_draws", [1, 20, 200])
@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.97])
def test_means_are_within_twice_their_error_in_95_percent_of_runs(
    num_chains, num_draws, correlation
):
    """Of stationary chains, however short: 6,000 runs, with a binomial error of 0.3 %."""
    generator = torch.Generator().manual_seed(num_chains + num_draws)
    values = torch.empty(num_chains, num_draws, 6000)
    value = torch.randn(num_chains, 6000, generator=generator)
    for draw in range(num_draws):
        values[:, draw] = value
        fresh = torch.randn(num_chains, 6000, generator=generator)
        value = correlation * value + math.sqrt(1 - correlation**2) * fresh
    within = values.mean((0, 1)).abs() < 2 * mean_error(values)
    assert float(within.double().mean()) == pytest.approx(0.9545, abs=0.01)


def test_values_of_chains_that_ran_away_do_not_overflow():
    values = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    near, far = fs.diagnostics(values), fs.diagnostics(values * 1e200)
    torch.testing.assert_close(far._replace(mcse_mean=far.mcse_mean / 1e200), near)


def test_the_error_of_a_sum_counts_what_its_terms_share():
    """mean(x) + mean(y − x): with four chains, of their sums; with fewer, as if independent."""
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert float(mean_error(x, -x)) == pytest.approx(0.0, abs=1e-12)
    few = mean_error(x[:3], -x[:3])
    assert float(few) == pytest.approx(2**0.5 * float(fs.diagnostics(x[:3]).mcse_mean))
    with pytest.raises(ValueError, match="one mean at least, got none"):
        mean_error()


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
    assert str(summary).startswith("3 of 4 chains\n")
    assert "\nchain 2 frozen at step 1: its state is not finite" in str(summary)
    assert list(summary.table.index) == [
        "llc (minibatches)",
        "loss (minibatches)",
        "first[0]",
        "first[1]",
        "distance",
    ]
    assert fs.to_datatree(samples)["posterior"].coords["chain"].values.tolist() == [0, 1, 3]


def test_summary_is_that_of_the_draws():
    samples = run(fs.sgld(1e-3, nbeta=3.0, localization=1.0), num_chains=4, num_draws=50)
    table = fs.summary(samples).table
    losses = samples.draw_losses
    assert table.loc["loss (minibatches)", "mean"] == pytest.approx(float(losses.mean()))
    found = fs.diagnostics(losses)
    for name in ("r_hat", "ess_bulk", "ess_tail", "mcse_mean"):
        assert table.loc["loss (minibatches)", name] == pytest.approx(float(getattr(found, name)))
    assert table.loc["llc (minibatches)", "mean"] == pytest.approx(fs.llc(samples).mean)


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


@pytest.mark.parametrize(
    "make",
    [
        lambda: fs.sgld(1e-3, nbeta=3.0, localization=1.0, noise_level=0.5),
        lambda: fs.sgnht(
            fs.schedules.cosine(1e-3, num_steps=50),
            nbeta=fs.schedules.polynomial_decay(3.0),
            temperature=0.7,
        ),
        lambda: fs.sgld(torch.tensor([1e-3, 1e-3, 1e300, 1e-3, 1e-3]), nbeta=3.0, localization=1.0),
    ],
    ids=["settings", "schedules", "frozen"],
)
def test_every_estimate_follows_from_a_file(make, tmp_path):
    """The file alone: written as zarr, and read by xarray and ArviZ."""
    import arviz_stats
    import xarray

    samples = run(make(), num_draws=30, num_burnin_steps=4)
    fs.to_datatree(samples).to_zarr(tmp_path / "run.zarr", consolidated=False)
    with xarray.open_datatree(tmp_path / "run.zarr", engine="zarr", consolidated=False) as file:
        posterior, constants = file["posterior"], file["constant_data"]
        draws = constants["nbeta"] / constants["temperature"]
        draws = draws * (posterior["loss"] - constants["initial_loss"])
        estimate = fs.llc(samples)
        assert float(draws.mean()) == pytest.approx(estimate.mean)
        means = torch.from_numpy(draws.mean("draw").to_numpy())
        assert float(mean_error(means[:, None])) == pytest.approx(estimate.mcse)
        np.testing.assert_allclose(draws.transpose("chain", "draw"), posterior["llc"])
        table = arviz_stats.summary(file, var_names=["loss"], round_to="none")
        losses = fs.diagnostics(samples.draw_losses[samples.healthy])
        assert table.loc["loss", "r_hat"] == pytest.approx(float(losses.r_hat))
        np.testing.assert_array_equal(file["trace"]["loss"], samples.losses[samples.healthy])
        np.testing.assert_array_equal(
            file["trace"]["noise"], samples.metrics.noise[samples.healthy]
        )
        assert constants["step"].values.tolist() == samples.draw_steps.tolist()
        attributes = posterior.attrs
        assert attributes["batch_size"] == 8
        assert attributes["num_examples"] == 40
        assert attributes["inference_library"] == "funcsgmcmc"
        assert attributes["torch_version"] == str(torch.__version__)
        assert attributes["initial_loss"] == pytest.approx(float(samples.initial_loss))
        assert attributes["init_noise"] == 0.05
        assert attributes["gradient"] == "Plain"
        assert attributes["key"] == fs.key(3).tolist()
        assert "localization" in attributes


def test_an_observable_of_many_entries_has_one_row():
    samples = run(
        fs.sgld(1e-3, nbeta=3.0),
        observables={"first": lambda params: params["0.weight"], "pair": lambda p: p["0.bias"][:2]},
        num_draws=20,
    )
    table = fs.summary(samples).table
    assert list(table.index) == [
        "llc (minibatches)",
        "loss (minibatches)",
        "pair[0]",
        "pair[1]",
        "distance",
        "first (worst of 30)",
    ]
    found, row = fs.diagnostics(samples.observables["first"]), table.loc["first (worst of 30)"]
    assert row["r_hat"] == pytest.approx(float(found.r_hat.max()))
    assert row["ess_bulk"] == pytest.approx(float(found.ess_bulk.min()))
    assert row["ess_tail"] == pytest.approx(float(found.ess_tail.min()))
    assert row["mcse_mean"] == pytest.approx(float(found.mcse_mean.max()))
    assert len(fs.summary(samples, max_entries=30).table) == 35
    with pytest.raises(ValueError, match="max_entries must be >= 1, got 0"):
        fs.summary(samples, max_entries=0)


def test_bfloat16_runs_have_summaries():
    samples = fs.sample(
        lambda params, batch: (params["w"] ** 2).sum(),
        {"w": torch.zeros(3, dtype=torch.bfloat16)},
        torch.zeros(1),
        fs.sgld(1e-2, nbeta=3.0),
        num_chains=4,
        num_draws=20,
        key=fs.key(0),
        record=["draws"],
    )
    assert samples.draws["w"].dtype == torch.bfloat16
    assert "4 of 4 chains" in str(fs.summary(samples))


def test_estimates_refuse_what_they_cannot_do():
    burnt_out = run(fs.sgld(1e300, nbeta=1e300), num_chains=4)
    assert not burnt_out.healthy.any()
    for estimate in (fs.llc, fs.summary, fs.to_datatree, plot_llc):
        with pytest.raises(
            ValueError, match="got 4 frozen ones, of which chain 0 frozen at step 0: "
        ):
            estimate(burnt_out)
    samples = run(
        fs.sgld(1e-3, nbeta=3.0),
        data=iter([(torch.ones(2, 5), torch.ones(2).long())] * 6),
        batch_size=None,
    )
    with pytest.raises(ValueError, match="initial_loss must be given"):
        fs.llc(samples)
    assert fs.llc(samples, initial_loss=0.1).num_chains == 5
    assert list(fs.summary(samples).table.index) == ["loss (minibatches)", "distance"]


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
    running, estimate = running_llc(samples, 10), fs.llc(samples)
    assert running.num_draws.tolist() == [1, 4, 7, 11, 14, 17, 20, 24, 27, 30]
    assert float(running.mean[-1]) == pytest.approx(estimate.mean)
    assert running.mcse[0].isnan()
    first = fs.llc_draws(samples)[samples.healthy][:, :11]
    assert float(running.mcse[3]) == pytest.approx(float(fs.diagnostics(first).mcse_mean))
    figure = plot_llc(samples)
    above, below = figure.axes
    # Three chains, their mean, and the line of the initial loss.
    assert len(above.lines) == 5
    assert below.get_xlabel() == "step"
    figure.savefig(tmp_path / "llc.png")
    assert (tmp_path / "llc.png").stat().st_size > 10_000


def test_one_error_in_text_and_plot():
    samples = run(fs.sgld(1e-3, nbeta=3.0), num_draws=20, num_burnin_steps=5)
    estimate, below = fs.llc(samples), plot_llc(samples).axes[1]
    assert estimate.error == estimate.mcse  # so few steps have no looks at all data
    shown = (
        f"± {estimate.mcse:.2g} (MCSE {estimate.mcse:.2g}, bias of the step size unknown, 5 chains)"
    )
    assert str(estimate).endswith(shown)
    assert [text.get_text() for text in below.get_legend().get_texts()] == [str(estimate)]
    assert "MCSE" in below.get_ylabel()
    # The band's last point is that error on both sides.
    (band,) = below.collections
    at_end = band.get_paths()[0].vertices
    at_end = at_end[at_end[:, 0] == at_end[:, 0].max()][:, 1]
    assert max(at_end) - min(at_end) == pytest.approx(2 * estimate.mcse)
    assert max(at_end) + min(at_end) == pytest.approx(2 * estimate.mean)


def test_one_chain_has_a_plot():
    plot_llc(run(fs.sgld(1e-3, nbeta=3.0), num_chains=1))


def test_a_run_that_stopped_in_burn_in_has_no_estimates():
    inputs, targets = classification()[1]

    def batches():
        for _ in range(3):
            yield inputs, targets
        raise KeyboardInterrupt

    with pytest.raises(fs.SamplingInterrupt, match="interrupted after 3 of 26 steps") as raised:
        run(
            fs.sgld(1e-3, nbeta=3.0),
            data=batches(),
            batch_size=None,
            num_burnin_steps=20,
            initial_loss=1.0,
        )
    samples = raised.value.samples
    for estimate in (fs.llc, fs.summary, fs.to_datatree, plot_llc, running_llc):
        with pytest.raises(
            ValueError, match="at least one draw, got a run that stopped in burn-in"
        ):
            estimate(samples)


def test_arviz_plots_draws_a_record(tmp_path):
    import arviz_plots

    samples = run(fs.sgld(1e-3, nbeta=3.0, localization=1.0), num_draws=50)
    collection = arviz_plots.plot_trace_dist(fs.to_datatree(samples), var_names=["llc", "loss"])
    collection.savefig(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 10_000


def sweep(**settings) -> fs.Samples:
    lr = torch.tensor([1e-4, 1e-3, 1e-4, 1e-3, 1e-2, 1e-2])
    return run(fs.sgld(lr, nbeta=3.0, localization=1.0), num_chains=6, num_draws=20, **settings)


def test_pooled_estimates_of_a_sweep_are_refused():
    samples = sweep()
    for estimate in (fs.llc, fs.summary, plot_llc, running_llc):
        with pytest.raises(
            ValueError, match=r"got a sweep over lr=0.0001, lr=0.001, lr=0.01: group them first"
        ):
            estimate(samples)
    # The record is not an average.
    assert fs.to_datatree(samples)["posterior"]["llc"].shape == (6, 20)


def test_a_sweep_is_grouped_by_its_settings():
    samples = sweep(observables={"norm": lambda params: params["0.weight"].norm()})
    groups = samples.groups()
    assert list(groups) == ["lr=0.0001", "lr=0.001", "lr=0.01"]
    group = groups["lr=0.001"]
    assert group.chains.tolist() == [1, 3]
    assert (group.sampler.lr == 1e-3).all()
    torch.testing.assert_close(group.losses, samples.losses[[1, 3]])
    torch.testing.assert_close(group.draws["0.weight"], samples.draws["0.weight"][[1, 3]])
    torch.testing.assert_close(group.observables["norm"], samples.observables["norm"][[1, 3]])
    torch.testing.assert_close(group.metrics.noise, samples.metrics.noise[[1, 3]])
    assert torch.equal(group.state.step, samples.state.step[[1, 3]])
    # As if it had been run alone.
    assert fs.llc(group).num_chains == 2
    assert "2 of 2 chains" in str(fs.summary(group))
    plot_llc(group)
    by_name = samples.groups(["a", "b", "a", "b", "c", "c"])
    assert {name: each.chains.tolist() for name, each in by_name.items()} == {
        "a": [0, 2],
        "b": [1, 3],
        "c": [4, 5],
    }
    with pytest.raises(ValueError, match="labels must be one for each of 6 chains, got"):
        samples.groups(["a"])


def test_chains_of_several_anchors_are_a_sweep(params):
    """Checkpoints, each the start and the anchor of its chains."""
    checkpoints = [params, params.apply(lambda leaf: leaf + 0.1)]
    starts = torch.stack([checkpoints[i] for i in (0, 0, 1, 1)])
    settings = {"num_chains": 4, "init_noise": 0.0, "num_draws": 20}
    samples = run(fs.sgld(1e-3, nbeta=3.0, localization=1.0), starts, **settings)
    with pytest.raises(ValueError, match="got a sweep over anchor=#0, anchor=#1: group them first"):
        fs.llc(samples)
    groups = samples.groups()
    assert {label: group.chains.tolist() for label, group in groups.items()} == {
        "anchor=#0": [0, 1],
        "anchor=#1": [2, 3],
    }
    alone = run(
        fs.sgld(1e-3, nbeta=3.0, localization=1.0),
        checkpoints[1],
        **settings | {"num_chains": 2, "chain_offset": 2},
    )
    assert fs.llc(groups["anchor=#1"]).mean == pytest.approx(fs.llc(alone).mean)
    by_index = samples.groups(torch.tensor([0, 0, 1, 1]))
    assert list(by_index) == [0, 1]
    # With other settings, too.
    lr = torch.tensor([1e-3, 1e-4, 1e-3, 1e-4])
    both = run(fs.sgld(lr, nbeta=3.0, localization=1.0), starts, **settings)
    assert list(both.groups()) == [
        "lr=0.001, anchor=#0",
        "lr=0.0001, anchor=#0",
        "lr=0.001, anchor=#1",
        "lr=0.0001, anchor=#1",
    ]


def test_starts_without_a_pull_are_no_anchors(params):
    """Chains that are pulled nowhere sample one law, wherever they start."""
    starts = params.expand(3).apply(lambda leaf: leaf + 0.1 * torch.randn_like(leaf))
    samples = run(fs.sgld(1e-3, nbeta=3.0), starts, num_chains=3, num_draws=20, initial_loss=0.5)
    assert not samples.is_sweep
    fs.llc(samples)


def test_draws_of_a_schedule_are_not_one_law():
    hot = fs.schedules.cosine(4.0, 1.0, num_steps=20)
    sampler = fs.sgld(1e-3, nbeta=3.0, temperature=hot)
    with pytest.raises(ValueError, match=r"draws must be of one temperature .* from 1.* to 4"):
        fs.summary(run(sampler, num_draws=30))
    fs.summary(run(sampler, num_draws=30, num_burnin_steps=25))


def test_what_is_printed_says_how_many_chains_and_draws():
    samples = with_frozen_chain()
    assert repr(samples) == (
        "Samples(3 of 4 chains healthy, 30 draws in 30 steps of SGLD, draws kept)"
    )
    assert str(fs.llc(samples)).splitlines()[0].endswith("3 chains, 1 frozen)")
    few = run(fs.sgld(1e-3, nbeta=3.0), num_draws=2, num_chains=3)
    assert str(fs.llc(few)).splitlines() == [
        f"LLC = {fs.llc(few).mean:.4g} ± nan (MCSE nan, bias of the step size unknown, 3 chains, "
        "too few draws for an error)",
        "warning: 2 draws of 3 chains are too few for an error: make 4 draws, or 4 chains",
    ]


def test_a_record_can_be_indexed():
    samples = sweep(init_noise=0.1)
    for rows, expected in (
        (2, [2]),
        (-1, [5]),
        (slice(1, 3), [1, 2]),
        ([4, 0], [4, 0]),
        (torch.tensor([4, 0]), [4, 0]),
        (samples.healthy, [0, 1, 2, 3, 4, 5]),
        ([True, False, False, True, False, False], [0, 3]),
    ):
        picked = samples[rows]
        assert picked.chains.tolist() == expected
        assert torch.equal(picked.losses, samples.losses[expected])
    for rows, error, message in (
        (6, IndexError, r"there are 6 chains, got index \[6\]"),
        ([], IndexError, "at least one chain must be picked of 6, got none"),
        (torch.zeros(6).bool(), IndexError, "at least one chain must be picked"),
        (torch.ones(5).bool(), IndexError, "a mask of chains must have 6 entries, got 5"),
        ("lr=0.1", TypeError, r"got str: samples.groups\(\) has them by name"),
        (1.5, TypeError, "got float"),
    ):
        with pytest.raises(error, match=message):
            samples[rows]


def test_groups_of_trees_and_of_close_numbers():
    lr = torch.tensor([1e-3, 1e-3 + 1e-12, 1e-3])
    assert [
        len(each.chains) for each in run(fs.sgld(lr, nbeta=1.0), num_chains=3).groups().values()
    ] == [2, 1]
    masks = torch.ones(3, 6)
    masks[1] = 0.0
    sampler = fs.sgld(1e-3, nbeta=1.0, mask=TensorDict({"0.bias": masks}, batch_size=3))
    assert list(run(sampler, num_chains=3).groups()) == ["mask.0.bias=#1", "mask.0.bias=#0"]
    assert list(run(fs.sgld(1e-3, nbeta=1.0)).groups()) == ["all"]


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
        record=["draws"],
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
        record=["draws"],
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
