"""Verdicts on cells: each where it is true, on problems of known value, and by its rule."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from matplotlib.figure import Figure

import funcsgmcmc as fs
from funcsgmcmc.estimates import sweep_plots
from funcsgmcmc.estimates.advice import propose, recommend
from funcsgmcmc.estimates.cells import SweepCell
from funcsgmcmc.estimates.llc import LLC
from funcsgmcmc.estimates.verdicts import ALONE, Findings, Verdict, on_plateau
from linear import GAMMA, NBETA, loss, regression

PROBLEM = regression()
RUN = {
    "chains_per_cell": 8,
    "num_draws": 150,
    "num_burnin_steps": 200,
    "num_steps_between_draws": 4,
    "key": fs.key(1),
    "full_loss": 50,
}


def sweep(factory=fs.sgld, start=None, loss_fn=loss, **grid_and_run):
    own = grid_and_run.pop("grid")
    grid = own | {k: v for k, v in (("nbeta", NBETA), ("localization", GAMMA)) if k not in own}
    start = PROBLEM.start if start is None else start
    return fs.sweep(loss_fn, start, PROBLEM.data, factory, grid=grid, **(RUN | grid_and_run))


@pytest.fixture(scope="module")
def swept():
    """All data in a step, from steps that go nowhere to such that diverge."""
    torch.set_default_dtype(torch.float64)
    grid = {"lr": [1e-6, 1e-5, 1e-3, 5e-3, 2e-2, 0.3], "nbeta": [0.0, NBETA]}
    return sweep(grid=grid, num_draws=200)


def test_each_step_size_has_its_verdict(swept):
    found = {cell.labels["lr"]: cell for cell in swept.cells if cell.labels["nbeta"]}
    names = [cell.verdict.name for cell in found.values()]
    assert names[:2] == ["not burnt in"] * 2
    assert names[2:] == ["fine", "step too large", "step too large", "diverged"]
    fine = found[1e-3].llc
    # SGLD's own bias is part of the error.
    assert abs(fine.mean - PROBLEM.truth) < 2 * fine.error + 0.05 * PROBLEM.truth
    assert "the step makes about" in found[5e-3].verdict.reason
    assert "8 of 8 chains: chain 0 frozen at step" in found[0.3].verdict.reason
    chosen = swept.recommend()
    assert chosen.settings == {"lr": 1e-3, "nbeta": NBETA, "localization": GAMMA}
    assert chosen.cells == [found[1e-3]]
    assert swept.recommend(nbeta=NBETA, lr=1e-3).cells == chosen.cells
    with pytest.raises(ValueError, match=r"no cell is fine \(1 control, 1 not burnt in\): chains"):
        swept.recommend(lr=1e-6)
    assert str(chosen).startswith("lr=0.001, nbeta=144.765, localization=1: it is fine, with a ")


def test_the_control_says_what_localization_alone_would_give(swept):
    """At nβ = 0 chains have the variance 1/(γ (1 − εγ/4)) in each of ten directions."""
    for cell in swept.cells:
        if cell.labels["nbeta"] == 0:
            assert cell.verdict.name == "control"
            assert cell.llc is None
            assert math.isnan(cell.control)
    # Of the longest steps, whose chains are burnt in.
    control = swept.cell(lr=2e-2, nbeta=NBETA).control
    inputs = PROBLEM.data[0]
    free = NBETA * float((inputs**2).sum(1).mean()) / 2 / (GAMMA * (1 - 2e-2 * GAMMA / 4))
    assert control == pytest.approx(free, rel=0.25)
    rise = swept.cell(lr=2e-2, nbeta=0.0).findings.rise
    assert control == pytest.approx(NBETA * rise, rel=1e-12)


def test_small_batches_are_noise_dominated():
    swept = sweep(grid={"lr": [1e-3, 3e-3]}, batch_size=20, full_loss=20)
    assert [cell.verdict.name for cell in swept.cells] == ["noise-dominated"] * 2
    for cell in swept.cells:
        assert cell.findings.signal_to_noise < 0.5
        assert cell.llc.corrected == pytest.approx(PROBLEM.truth, rel=0.15)
        assert "gradient noise makes about" in cell.verdict.reason


def test_a_scheme_without_bias_of_its_own_has_that_of_noise_alone():
    """BAOA, where the force is larger than the noise."""
    (cell,) = sweep(fs.baoa, grid={"lr": [0.1]}, batch_size=200, num_draws=100).cells
    assert cell.findings.signal_to_noise > 1
    assert cell.findings.noise_share == 1
    assert cell.verdict.name == "noise-dominated"


def test_an_anchor_that_is_no_minimum_is_negative():
    away = {"w": PROBLEM.start["w"] + 1.0}
    (cell,) = sweep(grid={"lr": [2e-3]}, start=away, num_draws=40).cells
    assert cell.verdict.name == "negative"
    assert "train longer" in cell.verdict.reason


def test_chains_that_leave_are_found():
    """A loss that falls away from its maximum, behind which there is a minimum far away."""

    def hill(params, batch):
        square = params["w"].square().sum()
        return (square - 100).square() / 1e4 + 0 * batch[0].sum()

    start = {"w": torch.zeros(10)}
    grid = {"lr": [0.02], "nbeta": 1000.0}
    (cell,) = sweep(grid=grid, start=start, loss_fn=hill, num_draws=40, num_burnin_steps=400).cells
    assert cell.verdict.name == "left the neighbourhood"
    assert cell.findings.reach > 1.5
    (cell,) = sweep(grid={"lr": [5e-3]}, max_distance=0.2, num_draws=10).cells
    assert cell.verdict.name == "left the neighbourhood"
    assert "above max_distance=0.2" in cell.verdict.reason
    (cell,) = sweep(grid={"lr": [5e-3]}, max_loss=0.01, num_draws=10).cells
    assert cell.verdict.name == "diverged"


def test_an_estimate_above_half_the_parameters_has_left():
    """Without localization nothing else says how far chains may go: a loss |w − w₀|^½ of 10."""

    def cusp(params, batch):
        return params["w"].square().add(1e-8).pow(0.125).sum() / 50 + 0 * batch[0].sum()

    grid = {"lr": [1e-3], "localization": 1e-6}
    start = {"w": torch.zeros(10)}
    (cell,) = sweep(grid=grid, start=start, loss_fn=cusp, num_draws=60).cells
    assert cell.llc.mean > 1.5 * 5
    assert cell.verdict.name == "left the neighbourhood"
    assert "above d/2 = 5" in cell.verdict.reason


def test_flat_directions_that_are_not_filled_are_found():
    """The loss does not see them: nothing but the distance says that chains are on their way."""

    def blind(params, batch):
        return loss({"w": params["w"]}, batch) + 0 * params["flat"].sum()

    start = {**PROBLEM.start, "flat": torch.zeros(300)}
    settings = {"start": start, "loss_fn": blind, "num_draws": 60}
    (cell,) = sweep(fs.baoa, grid={"lr": [0.02]}, **settings).cells
    assert cell.verdict.name == "not burnt in"
    assert "the loss has flat directions" in cell.verdict.reason
    # The pull of localization fills them within a burn-in: 2/(ε γ) steps.
    (cell,) = sweep(fs.baoa, grid={"lr": [0.1], "localization": 20.0}, **settings).cells
    assert cell.verdict.name != "not burnt in"
    assert cell.findings.reach == pytest.approx(1.0, abs=0.1)


def test_few_draws_are_too_few():
    (cell,) = sweep(fs.baoa, grid={"lr": [0.1]}, num_draws=12).cells
    assert cell.verdict.name == "too few draws"
    few = {"num_draws": 2, "chains_per_cell": 3}
    (cell,) = sweep(fs.baoa, grid={"lr": [0.1]}, **few).cells
    assert cell.verdict.reason == "there are too few draws for an error"


@pytest.mark.slow
def test_a_step_whose_bias_is_not_known_is_checked_by_another():
    # In sgnht's units: its lr is that of SGLD's scale.
    alone = sweep(fs.sgnht, grid={"lr": [1e-3]}, num_draws=500)
    assert [cell.verdict.name for cell in alone.cells] == ["step not checked"]
    both = alone.refine({"lr": [5e-4]})
    assert [cell.verdict.name for cell in both.cells] == ["fine", "fine"]


def finding(mean=10.0, mcse=0.1, bias=0.0) -> Findings:
    """What a good cell says, but for its estimate."""
    per_chain = torch.full((4,), mean)
    parts = (x for x in (mcse, bias) if x == x)
    estimate = LLC(
        mean, math.hypot(*parts), mcse, bias, 0.0, [], "all data", per_chain, per_chain, 4
    )
    mixing = {"r_hat": 1.0, "ess": 400.0, "num_traced": 50, "change": 0.0, "change_error": 0.2}
    away = {"growth": 0.0, "growth_error": 0.1, "distance": 1.0, "reach": 0.5, "rise": 0.1}
    noise = {"signal_to_noise": 1.0, "noise_share": 0.5}
    return Findings(frozen=0.0, most=50.0, estimate=estimate, **mixing, **away, **noise)


FINE = Verdict("fine", "")


@pytest.mark.parametrize(
    ("means", "names"),
    [
        ([10.0, 10.1, 10.2], ["fine", "fine", "fine"]),
        # A chain that is on its way is below the others, which agree.
        ([6.0, 10.0, 10.1], ["not burnt in", "fine", "fine"]),
        ([10.0, 10.1, 14.0], ["fine", "fine", "step too large"]),
        # Nobody can tell which of two is wrong.
        ([8.0, 10.0], ["not burnt in", "step too large"]),
        ([12.0, 10.0], ["step too large", "step too large"]),
        ([10.0], ["fine"]),
    ],
)
def test_neighbours_in_lr_must_agree(means, names):
    lrs = [1.0, 2.0, 4.0][: len(means)]
    verdicts = on_plateau(lrs, [finding(mean) for mean in means], [FINE] * len(means))
    assert [verdict.name for verdict in verdicts] == names


def test_what_neighbours_say_depends_on_their_steps():
    """A bias of first order in the step: a difference of 8 % means 9 % at ε, but 16 % at ε/2 ε."""
    close, far = ([1.0, 2.0], [1.0, 10.0])
    found = [finding(10.0), finding(10.8)]
    assert [v.name for v in on_plateau(far, found, [FINE] * 2)] == ["fine", "fine"]
    assert [v.name for v in on_plateau(close, found, [FINE] * 2)] == ["fine", "step too large"]
    # Beside others that are not fine, a cell whose bias is known stays fine, and its reason tells.
    other = Verdict("diverged", "")
    alone, same = on_plateau(close, found, [FINE, other])
    assert (alone.name, same) == ("fine", other)
    assert ALONE in alone.reason
    assert alone.reason.endswith("(10.8 ± 0.1 at lr=2)")
    unknown = [finding(10.0, bias=math.nan), finding(10.8)]
    assert on_plateau(close, unknown, [FINE, other])[0].name == "step not checked"


def test_what_has_too_few_draws_can_say_that_a_lone_cell_is_wrong():
    """As far as its own error lets it, and no more: it makes no cell fine."""
    few, lrs = Verdict("too few draws", ""), [1.0, 2.0]
    for bias in (0.0, math.nan):
        lone = finding(60.0, bias=bias)
        judged = on_plateau(lrs, [finding(10.0, mcse=1.0), lone], [few, FINE])
        assert (judged[0], judged[1].name) == (few, "step too large")
    rough = [finding(10.0, mcse=30.0), finding(60.0)]
    alone = on_plateau(lrs, rough, [few, FINE])[1]
    assert alone.name == "fine"
    assert alone.reason.endswith("(10 ± 30 at lr=1)")
    rough[1] = finding(60.0, bias=math.nan)
    assert on_plateau(lrs, rough, [few, FINE])[1].name == "step not checked"
    # One without an error says nothing, nor does one that others overrule.
    assert on_plateau(lrs, [finding(10.0, mcse=math.nan), finding(60.0)], [few, FINE])[1].name == (
        "fine"
    )
    among = [finding(60.0), finding(10.0), finding(60.0)]
    names = [each.name for each in on_plateau([1.0, 2.0, 4.0], among, [FINE, few, FINE])]
    assert names == ["fine", "too few draws", "fine"]


def cell(name="fine", error=0.1, **labels) -> SweepCell:
    found = finding(mcse=error)
    # Advice reads no record.
    return SweepCell(labels, None, found, Verdict(name, "because"), math.nan)


def test_the_smallest_error_of_what_is_fine_everywhere_is_recommended():
    cells = [
        cell(lr=1.0, part="a", error=0.1),
        cell(lr=1.0, part="b", name="diverged"),
        cell(lr=2.0, part="a", error=0.2),
        cell(lr=2.0, part="b", error=0.5),
        cell(lr=4.0, part="a", error=0.3),
        cell(lr=4.0, part="b", error=0.4),
    ]
    chosen = recommend(cells)
    assert chosen.labels == {"lr": 4.0}
    assert chosen.cells == cells[4:]
    assert chosen.reason == (
        "2 of its 2 cells are fine, with total errors of 4.0% at most, the smallest of 2 settings "
        "of which as many are"
    )
    lonely = replace(cells[0], verdict=Verdict("fine", ALONE))
    assert recommend([lonely]).reason.endswith("before you trust it (refine)")
    with pytest.raises(
        ValueError, match=r"no cell is fine \(1 diverged\): all steps are too large"
    ):
        recommend([cells[1]])


@pytest.mark.parametrize(
    ("names", "lrs"),
    [
        (["diverged", "step too large"], [0.125, 0.25, 0.5]),
        (["not burnt in", "too few draws"], [4.0, 8.0, 16.0]),
        (["not burnt in", "diverged"], [2**0.25, 2**0.5, 2**0.75]),
        (["noise-dominated", "not burnt in"], [0.25, 0.5]),
        (["fine", "diverged"], [0.5, 2**0.5]),
        (["not burnt in", "fine"], [2**0.5, 4.0]),
    ],
)
def test_the_next_grid_leads_to_what_is_fine(names, lrs):
    cells = [cell(name, lr=lr, nbeta=3.0) for lr, name in zip([1.0, 2.0], names, strict=True)]
    assert propose(cells).grid["lr"] == pytest.approx(lrs)


def test_no_step_sizes_no_proposal():
    with pytest.raises(ValueError, match="propose needs an axis of step sizes, lr"):
        propose([cell(lr="warm", nbeta=3.0)])


def test_what_is_proposed_is_run(swept):
    refined = swept.refine()
    assert len(refined.axes["lr"]) == 8
    assert 1e-3 * 5**0.5 in refined.axes["lr"]
    with pytest.raises(ValueError, match="an axis of grid must be one of 'lr', 'nbeta'"):
        swept.refine({"temperature": [1.0]})
    with pytest.raises(ValueError, match="must have names where the sweep has"):
        swept.refine({"lr": {"a": 1.0}})


def test_the_table_has_all_figures(swept):
    """… labelled, with holes where a refinement had no cell."""
    table = swept.dataset()
    assert dict(table.sizes) == {"lr": 6, "nbeta": 2, "localization": 1}
    chosen = table.sel(lr=1e-3, nbeta=NBETA).squeeze()
    estimate = fs.llc(swept.cell(lr=1e-3, nbeta=NBETA).samples)
    for name in ("mean", "error", "mcse", "bias", "drift", "corrected"):
        found = float(chosen["llc" if name == "mean" else name])
        assert found == pytest.approx(getattr(estimate, name), rel=1e-12)
    assert float(chosen["r_hat"]) < 1.05
    assert float(chosen["ess"]) > 100
    assert chosen["verdict"].item() == "fine"
    assert float(table["frozen"].sel(lr=0.3, nbeta=NBETA).squeeze()) == 1.0
    assert bool(numpy.isnan(table["llc"].sel(lr=0.3, nbeta=NBETA)))
    shown = str(swept)
    assert shown.splitlines()[0] == (
        "12 cells of 8 chains, 6 control, 2 not burnt in, 1 fine, 2 step too large, 1 diverged; "
        "localization=1"
    )
    assert len(shown.splitlines()) == 14
    holes = replace(swept, parts=(swept.parts[0]._replace(cells=swept.parts[0].cells[:3]),))
    assert holes.dataset()["verdict"].values.flatten().tolist().count("") == 9


def test_cells_are_picked_by_labels(swept):
    with pytest.raises(ValueError, match="which 6 cells have, of lr=1e-06, nbeta=0, local"):
        swept.cell(nbeta=0.0)
    with pytest.raises(ValueError, match="must be those of a cell, got lr=77, of lr=1e-06"):
        swept.cell(lr=77.0)
    with pytest.raises(ValueError, match="an axis must be one of 'lr', 'nbeta', 'localization'"):
        swept.cell(temperature=1.0)
    assert repr(swept) == "Sweep(12 cells over lr, nbeta, localization)"


def test_the_picture_has_every_cell(swept, tmp_path):
    figure = fs.plots.plot_sweep(swept)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "lr")
    drawn = [line for line in axes.lines if line.get_markersize() == 7]
    cells = [cell for cell in swept.cells if cell.verdict.name != "control"]
    assert len(drawn) == len(cells)
    by_x = {line.get_xdata()[0]: line for line in drawn}
    # The scale's own labels would overlap where the grid is within a decade.
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == [f"{lr:g}".replace("-", "−") for lr in sorted(by_x)]
    assert {text.get_text() for text in axes.get_xticklabels(minor=True)} <= {""}
    # The ones that diverged do not stretch the scale: they stand in a strip above it.
    lowest, top = axes.get_ylim()
    highest = lowest + 0.96 * (top - lowest)
    assert highest < 3 * PROBLEM.truth
    assert by_x[0.3].get_marker() == "X"
    off = by_x[0.3].get_ydata()[0]
    (strip,) = axes.patches
    begins = (strip.get_extents().y0 - axes.bbox.y0) / axes.bbox.height
    assert begins == pytest.approx(0.96)
    assert begins < off < 1
    assert max(axes.get_yticks()) <= highest
    assert [text.get_text() for text in axes.texts] == ["off the scale"]
    shown = [cell.llc for cell in cells if cell.llc and lowest < cell.llc.mean < top]
    assert max(llc.mean for llc in shown) < highest
    assert by_x[1e-3].get_ydata()[0] == swept.cell(lr=1e-3, nbeta=NBETA).llc.mean
    assert by_x[1e-6].get_marker() == "v"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "fine",
        "not burnt in",
        "step too large",
        "diverged",
        "nbeta=144.765",
        "localization alone",
    ]
    figure.savefig(tmp_path / "sweep.png")


def test_negative_estimates_are_on_the_scale():
    verdict = SimpleNamespace(name="negative")
    llcs = [SimpleNamespace(mean=mean, error=0.1) for mean in (-5.0, -7.0)]
    cells = [SimpleNamespace(verdict=verdict, llc=llc, control=math.nan) for llc in llcs]
    lowest, highest = sweep_plots._ends_of_scale(SimpleNamespace(cells=cells))
    assert lowest == -7.0
    assert -5.0 < highest < 1.0


def test_a_strip_of_many_lines_has_no_ticks():
    axes = Figure().subplots()
    sweep_plots._end_scale([axes], 0.0, 10.0, 0.5)
    assert axes.get_ylim()[1] == pytest.approx(20.5)
    assert max(axes.get_yticks()) <= 10.0


def test_names_are_drawn_side_by_side():
    starts = {name: {"params": PROBLEM.start} for name in ("early", "late")}
    grid = {"checkpoint": starts, "lr": 2e-3, "nbeta": [NBETA, 30.0], "localization": [1.0, 3.0]}
    swept = sweep(grid=grid, num_draws=20)
    figure = fs.plots.plot_sweep(swept)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "localization=1",
        "localization=3",
    ]
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["early", "late"]
    many = replace(swept)
    with pytest.raises(TypeError, match="sweep must be a Sweep"):
        fs.plots.plot_sweep(many.parts)
