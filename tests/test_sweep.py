"""Sweeps: cells that are runs of their own, those that fail, stores, grids, and what they cost."""

import functools
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc import pieces
from problems import assert_same, classification

MODEL, DATA = classification()
LOSS, START = fs.module_loss(MODEL, cross_entropy), fs.params_of(MODEL)
RUN = {"num_draws": 12, "num_burnin_steps": 3, "batch_size": 8, "key": fs.key(3)}
GRID = {"lr": [1e-3, 1e-4], "nbeta": [20.0, 5.0], "localization": 2.0}
BASE = {"lr": 1e-3, "nbeta": 1.0}


def start():
    """In float64, as the tests are: the module was made before."""
    return START.apply(lambda leaf: leaf.double())


def data():
    return DATA[0].double(), DATA[1]


def sweep(factory=fs.sgld, grid=GRID, **settings):
    options = {"chains_per_cell": 3, **RUN} | settings
    return fs.sweep(LOSS, options.pop("params", start()), data(), factory, grid=grid, **options)


def alone(sampler, params=None, **settings):
    """A run of one cell, by `sample`."""
    options = {"num_chains": 3, **RUN} | settings
    return fs.sample(LOSS, start() if params is None else params, data(), sampler, **options)


@pytest.mark.parametrize(
    "factory",
    [fs.sgld, fs.rmsprop_sgld, fs.sgnht, fs.baoa, functools.partial(fs.sgld, weight_decay=1.0)],
    ids=["sgld", "rmsprop_sgld", "sgnht", "baoa", "partial"],
)
def test_a_cell_is_the_run_of_its_settings(factory):
    """Starts, momenta, noise and minibatches: those of chains 0, 1, 2 in every cell."""
    swept = sweep(factory, init_noise=0.1, record=["draws", "metrics"])
    assert len(swept.samples) == 4
    for name, samples in swept.samples.items():
        lr, nbeta, localization = (float(part.split("=")[1]) for part in name.split(", "))
        sampler = factory(lr=lr, nbeta=nbeta, localization=localization)
        single = alone(sampler, init_noise=0.1, record=["draws", "metrics"])
        assert_same(samples, single)
        assert samples.chains.tolist() == [0, 1, 2]
        assert fs.llc(samples).mean == pytest.approx(fs.llc(single).mean)


@pytest.mark.parametrize(
    "way",
    [{"chunk_size": 5}, {"chunk_size": 2}, {"chain_method": "loop"}, {"compile": True}],
    ids=str,
)
def test_noise_that_cells_share_is_theirs_however_chains_step(way):
    """Drawn once for all cells: also where a chunk begins, or ends, within a cell."""
    settings = {"init_noise": 0.1, "record": ["draws"]}
    whole, other = sweep(**settings), sweep(**settings, **way)
    for name, samples in whole.samples.items():
        assert_same(other.samples[name], samples)


def test_noise_that_cells_share_is_theirs_in_pieces(monkeypatch):
    whole = sweep(fs.sgnht)
    monkeypatch.setattr(pieces, "_LARGE_TREE", 0)
    monkeypatch.setattr(pieces, "_PIECE", 16)
    monkeypatch.setattr(pieces, "_SMALL_LEAF", 5)
    for name, samples in sweep(fs.sgnht).samples.items():
        assert_same(samples, whole.samples[name], exact=True)


def test_cells_without_shared_noise_have_chains_of_their_own():
    swept = sweep(shared_noise=False, chain_offset=5)
    chains = [samples.chains.tolist() for samples in swept.samples.values()]
    # Chains are numbered in the order that was given, and cells shown in rising order.
    assert chains == [[14, 15, 16], [11, 12, 13], [8, 9, 10], [5, 6, 7]]
    # Those of a refinement are further ones.
    more = swept.refine({"lr": [3e-4]}).samples["lr=0.0003, nbeta=5, localization=2"]
    assert more.chains.tolist() == [20, 21, 22]
    single = alone(fs.sgld(1e-4, nbeta=5.0, localization=2.0), chain_offset=14)
    assert_same(swept.samples["lr=0.0001, nbeta=5, localization=2"], single)


def test_cells_that_diverge_cost_the_others_nothing():
    """A third of the cells: the others are bit for bit those of a grid in which none does."""
    good = sweep(grid={**GRID, "lr": [1e-3, 1e-4, 1e-5]}, record=["draws"])
    bad = sweep(grid={**GRID, "lr": [1e-3, 1e-4, 1e300]}, record=["draws"])
    compared = 0
    for name, samples in bad.samples.items():
        if name.startswith("lr=1e+300"):
            assert not samples.healthy.any()
            assert bad.verdicts[name].name == "diverged"
        else:
            assert_same(samples, good.samples[name], exact=True)
            compared += 1
    assert compared == 4


def test_chains_may_share_an_index():
    """… which is all that a sweep needs of `sample`: equal settings make equal chains."""
    same = alone(fs.sgld(1e-3, nbeta=5.0), chain_offset=torch.tensor([4, 7, 4]))
    assert same.chains.tolist() == [4, 7, 4]
    torch.testing.assert_close(same.losses[0], same.losses[2], rtol=0, atol=0)
    assert not torch.equal(same.losses[0], same.losses[1])
    single = alone(fs.sgld(1e-3, nbeta=5.0), num_chains=1, chain_offset=7)
    torch.testing.assert_close(same.losses[1:2], single.losses)
    more = fs.sample(
        LOSS, same, data(), same.sampler, num_chains=3, num_draws=2, batch_size=8, key=same.key
    )
    assert more.chains.tolist() == [4, 7, 4]


@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (torch.tensor([0, 1]), ValueError, r"one index or have shape \(3,\), got shape \(2,\)"),
        (torch.tensor([0, 1, -1]), ValueError, "must be from 0 to 2"),
        (torch.tensor([0.0, 1, 2]), TypeError, "must hold integers, got dtype torch.float32"),
        (torch.tensor([True, True, False]), TypeError, "must be real, got dtype torch.bool"),
    ],
)
def test_bad_indices_are_refused(offset, error, message):
    with pytest.raises(error, match=message):
        alone(fs.sgld(1e-3, nbeta=5.0), chain_offset=offset)


def masks():
    """Two restrictions, and the masks that they are."""
    first = {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False}
    return {"0.*": first, "2.*": {name: not value for name, value in first.items()}}


@pytest.mark.parametrize(
    "axis",
    [
        {"only": ["0.*", "2.*"]},
        {"only": {"0.*": "0.*", "2.*": lambda name, leaf: name.startswith("2")}},
        {"mask": {"0.*": {"2.weight": 0.0, "2.bias": False}, "2.*": masks()["2.*"]}},
        {"layer": {name: {"mask": mask} for name, mask in masks().items()}},
    ],
    ids=["patterns", "named selections", "masks", "settings that go together"],
)
def test_restrictions_are_an_axis(axis):
    swept = sweep(grid={"lr": 1e-3, "nbeta": 5.0, **axis})
    (name,) = axis
    for pattern, mask in masks().items():
        samples = swept.cell(**{name: pattern}).samples
        assert_same(samples, alone(fs.sgld(1e-3, nbeta=5.0, mask=mask)))
        other = "2.weight" if pattern == "0.*" else "0.weight"
        assert torch.equal(samples.state.params[other][0], start()[other])
        # d/2 of the part, which verdicts compare with.
        assert swept.cell(**{name: pattern}).findings.most == (36 if pattern == "0.*" else 21) / 2


def test_a_mask_of_some_entries_is_beside_one_of_whole_leaves():
    rows = torch.zeros(6, 5)
    rows[:2] = 1
    swept = sweep(grid={"lr": 1e-3, "nbeta": 5.0, "mask": {"rows": {"0.weight": rows}, "all": {}}})
    assert_same(swept.cell(mask="all").samples, alone(fs.sgld(1e-3, nbeta=5.0)))
    sampler = fs.sgld(1e-3, nbeta=5.0, mask={"0.weight": rows})
    assert_same(swept.cell(mask="rows").samples, alone(sampler))


def test_checkpoints_are_an_axis():
    """With anchors, and settings of their own; L(w₀) is that of each."""
    later = start().apply(lambda leaf: leaf + 0.1)
    checkpoints = {
        "first": {"params": start(), "nbeta": 4.0},
        "later": {"params": later, "nbeta": 9.0},
    }
    swept = sweep(grid={"checkpoint": checkpoints, "lr": [1e-3, 1e-4], "localization": 3.0})
    for name, settings in checkpoints.items():
        cell = swept.cell(checkpoint=name, lr=1e-3)
        sampler = fs.sgld(1e-3, nbeta=settings["nbeta"], localization=3.0)
        single = alone(sampler, settings["params"])
        assert_same(cell.samples, single)
        assert cell.llc.mean == pytest.approx(fs.llc(single).mean, rel=1e-12)
    anchors = {"start": start(), "later": later}
    pulled = sweep(grid={"lr": 1e-3, "nbeta": 5.0, "localization": 9.0, "anchor": anchors})
    sampler = fs.sgld(1e-3, nbeta=5.0, localization=9.0, anchor=later)
    assert_same(pulled.cell(anchor="later").samples, alone(sampler))


def test_settings_that_are_no_numbers_may_be_named():
    schedules = {
        "fast": fs.schedules.cosine(1e-3, num_steps=10),
        "slow": fs.schedules.cosine(1e-3, num_steps=15),
    }
    swept = sweep(grid={"lr": schedules, "nbeta": [5.0, 9.0]})
    single = alone(fs.sgld(schedules["slow"], nbeta=9.0))
    assert_same(swept.cell(lr="slow", nbeta=9.0).samples, single)
    alphas = {
        name: fs.preconditioners.rmsprop(alpha, 0.1) for name, alpha in (("a", 0.9), ("b", 0.99))
    }
    swept = sweep(grid={"lr": 1e-3, "nbeta": 5.0, "preconditioner": alphas})
    single = alone(fs.sgld(1e-3, nbeta=5.0, preconditioner=alphas["b"]))
    assert_same(swept.cell(preconditioner="b").samples, single)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ({}, ValueError, "grid must have at least one setting, got none"),
        ([1.0], TypeError, "grid must map settings to their values, got list"),
        ({"lr": []}, ValueError, r"grid\['lr'\] must have at least one value"),
        ({"lr": [1e-3, 1e-3]}, ValueError, "must hold each value once"),
        (
            {"lr": [1e-3, 1.0000001e-3]},
            ValueError,
            "must hold values that differ in their first six",
        ),
        ({"lr": [1e-3, float("nan")]}, ValueError, r"grid\['lr'\] must be finite, got nan"),
        ({"lr": ["a"]}, TypeError, r"grid\['lr'\] must hold numbers, or map names to values"),
        ({"lr": [True]}, TypeError, r"grid\['lr'\] must hold numbers"),
        ({"lr": {}}, ValueError, r"grid\['lr'\] must have at least one value"),
        ({"lr": -1e-3, "nbeta": 1.0}, ValueError, "lr must be >= 0, got -0.001"),
        ({"lr": 1e-3}, TypeError, "missing 1 required keyword-only argument: 'nbeta'"),
        (
            BASE | {"step": [1e-3]},
            TypeError,
            r"since 'step' is no setting of the factory, got list",
        ),
        (
            BASE | {"part": {"a": {"msk": {}}}},
            ValueError,
            "must give settings of params, only, .* 'msk'",
        ),
        (
            BASE | {"part": {"a": {}}},
            ValueError,
            r"grid\['part'\]\['a'\] must give at least one setting",
        ),
        (
            BASE | {"part": {"a": 1.0}},
            TypeError,
            r"grid\['part'\]\['a'\] must map settings to values",
        ),
        (
            BASE | {"part": {1: {"lr": 1e-3}}},
            TypeError,
            r"a name in grid\['part'\] must be a str, got int",
        ),
        (
            BASE | {"mask": {"0.weight": False}},
            TypeError,
            r"grid\['mask'\]\['0.weight'\] must be a tree",
        ),
        (BASE | {"mask": [{}]}, TypeError, r"grid\['mask'\] must map names to trees"),
        (BASE | {"only": ["0"]}, ValueError, "only='0' must match a parameter, got none of"),
        (BASE | {"only": [3]}, TypeError, r"a pattern of grid\['only'\] must be a str, got int"),
        (BASE | {"only": 3}, TypeError, r"grid\['only'\] must be a list of patterns"),
        (
            BASE | {"only": ["0.*"], "mask": {"a": {}}},
            ValueError,
            "must give only or mask, got both",
        ),
        ({"lr": 1e-3, "c": {"a": {"lr": 1e-4}}}, ValueError, "each setting by one axis, got lr by"),
        (
            {"lr": 1e-3, "c": {"a": {"nbeta": 1.0}, "b": {"localization": 1.0}}},
            ValueError,
            "must give localization to all cells",
        ),
        (BASE | {"params": {"a": {"v": torch.ones(2)}}}, ValueError, "params has unknown key 'v'"),
        (
            BASE | {"preconditioner": {"a": fs.preconditioners.identity(), "b": 3.0}},
            TypeError,
            "of one kind",
        ),
        (BASE | {3: [1.0]}, TypeError, "a name of grid must be a str, got int"),
    ],
)
def test_bad_grids_are_refused(grid, error, message):
    with pytest.raises(error, match=message):
        sweep(grid=grid)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"chains_per_cell": 0}, ValueError, "chains_per_cell must be >= 1, got 0"),
        ({"num_chains": 3}, TypeError, "unexpected keyword argument 'num_chains': chains_per_cell"),
        (
            {"initial_loss": 3.0},
            TypeError,
            "unexpected keyword argument 'initial_loss': grid has it",
        ),
        ({"nbeta": 3.0}, TypeError, "unexpected keyword argument 'nbeta'"),
        ({"shared_noise": 1}, TypeError, "shared_noise must be a bool, got int"),
        ({"resume": True}, ValueError, "resume must be left out without store"),
        ({"checkpoint_seconds": 1.0}, ValueError, "checkpoint_seconds must be left out"),
        ({"chain_offset": torch.tensor([1])}, TypeError, "chain_offset must be an integer"),
        ({"params": START.expand(2)}, ValueError, "params must be one tree, got batch size"),
        ({"factory": 3}, TypeError, "factory must be a function, got 3"),
        (
            {"factory": fs.sgld(1e-3, nbeta=1.0)},
            TypeError,
            "factory must be a function that makes samplers, .* got a sampler",
        ),
        ({"factory": lambda **settings: 3}, TypeError, "sampler must be one made by a factory"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        sweep(**settings)


def test_what_a_run_needs_is_asked_for():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'num_draws'"):
        fs.sweep(LOSS, start(), data(), fs.sgld, grid=GRID, chains_per_cell=2, key=fs.key(0))


def test_the_cost_is_told_beforehand(monkeypatch):
    cost = sweep(dry_run=True, num_draws=200, num_steps_between_draws=2)
    assert (cost.num_chains, cost.num_steps, cost.num_gradients) == (12, 403, 12 * 403)
    assert (cost.batch_size, cost.num_looks, cost.num_looked_at) == (8, 8, 40)
    assert cost.seconds > 0
    assert str(cost).startswith(
        "12 chains × 403 steps: 4,836 gradients on 8 examples each, and 8 looks a chain at "
        "40 examples; about "
    )


def test_a_sweep_that_is_shown_tells_its_cost_first(caplog):
    with caplog.at_level("INFO", logger="funcsgmcmc"):
        sweep(progress=True)
    told = [record.getMessage() for record in caplog.records]
    assert told[1].startswith("12 chains × 15 steps: 180 gradients on 8 examples each; about ")
    assert told[2].startswith("15 of 15 steps")


def test_a_cell_of_one_chain_is_judged():
    swept = sweep(chains_per_cell=1, num_draws=40)
    assert {cell.verdict.name for cell in swept.cells} <= {"too few draws", "not burnt in"}
    assert "not burnt in" in str(swept) or "too few draws" in str(swept)


def test_the_loss_at_an_anchor_is_evaluated_once():
    """… and not for each chain that has it."""
    calls = []

    def loss_fn(params, batch):
        calls.append(len(batch[0]))
        return LOSS(params, batch)

    later = start().apply(lambda leaf: leaf + 0.1)
    grid = {"lr": [1e-3, 1e-4], "nbeta": 5.0, "params": {"a": start(), "b": later}}
    run = RUN | {"num_draws": 1, "num_burnin_steps": 0}
    data_ = data()
    swept = fs.sweep(loss_fn, start(), data_, fs.sgld, grid=grid, chains_per_cell=3, **run)
    # Five passes of eight examples each over the data, for two anchors of twelve chains.
    assert sum(calls) <= 2 * 40 + 8 * 6
    for name, params in (("a", start()), ("b", later)):
        for lr in (1e-3, 1e-4):
            found = swept.cell(params=name, lr=lr).samples.initial_loss
            torch.testing.assert_close(found, LOSS(params, data_).expand(3))


def test_the_initial_loss_may_be_given_with_a_cell():
    swept = sweep(
        grid={
            "lr": 1e-3,
            "nbeta": 5.0,
            "c": {"a": {"initial_loss": 1.0}, "b": {"initial_loss": 2.0}},
        }
    )
    one, two = (swept.cell(c=name).llc.mean for name in "ab")
    assert one - two == pytest.approx(5.0)


class TestStore:
    """A sweep in a folder: it takes further cells, and goes on where it was."""

    def test_it_is_refined_and_read_again(self, tmp_path):
        folder = tmp_path / "sweep"
        first = sweep(store=folder)
        more = first.refine({"lr": [3e-4]})
        assert list(more.axes["lr"]) == [1e-4, 3e-4, 1e-3]
        assert len(more.cells) == 6
        assert len(first.cells) == 4  # the one before is what it was
        in_memory = sweep().refine({"lr": [3e-4]})
        for name, samples in in_memory.samples.items():
            assert_same(more.samples[name], samples, exact=True)
        # The grid that was first asked for, or a part of it: all cells of the store come.
        again = sweep(store=folder, resume=True)
        assert list(again.samples) == list(more.samples)
        assert str(again) == str(more)
        run = fs.open_run(folder / "run-1")
        assert run.num_chains == 6
        assert run.chains.tolist() == [0, 1, 2, 0, 1, 2]

    def test_what_is_complete_is_not_run_again(self, tmp_path, monkeypatch):
        folder = tmp_path / "sweep"
        sweep(store=folder)
        monkeypatch.setattr("funcsgmcmc.runs.run.Run.go", None)
        assert len(sweep(store=folder, resume=True).samples) == 4

    def test_an_interrupted_one_goes_on(self, tmp_path):
        folder = tmp_path / "sweep"
        calls = []

        def stop(params):
            calls.append(1)
            if len(calls) == 9:
                raise KeyboardInterrupt
            return params["2.bias"].sum()

        settings = {"observables": {"bias": stop}, "chain_method": "loop"}
        with pytest.raises(fs.SamplingInterrupt) as caught:
            sweep(store=folder, **settings)
        assert caught.value.samples.num_chains == 12
        went_on = sweep(store=folder, resume=True, **settings)
        calls.clear()
        calls.extend([1] * 9)
        whole = sweep(**settings)
        for name, samples in whole.samples.items():
            assert_same(went_on.samples[name], samples, exact=True)

    def test_longer_runs_and_larger_grids_go_on(self, tmp_path):
        folder = tmp_path / "sweep"
        sweep(store=folder)
        grid = {**GRID, "nbeta": [20.0, 5.0, 7.0]}
        longer = sweep(store=folder, resume=True, num_draws=20, grid=grid)
        assert len(longer.parts) == 2
        for name, samples in sweep(num_draws=20, grid=grid).samples.items():
            assert samples.num_draws == 20
            assert_same(longer.samples[name], samples)

    def test_cells_of_names_are_found_again(self, tmp_path):
        folder = tmp_path / "sweep"
        grid = {"lr": 1e-3, "nbeta": 5.0, "params": {"a": start(), "b": start()}}
        sweep(store=folder, grid=grid)
        grid["params"] = {"a": start()}
        with pytest.raises(ValueError, match=r"grid\['params'\] must name 'b', of which the sweep"):
            sweep(store=folder, resume=True, grid=grid)
        grid["params"]["b"] = start().apply(lambda leaf: leaf + 1)
        with pytest.raises(ValueError, match=r"holds another run: it differs in .*params"):
            sweep(store=folder, resume=True, grid=grid)

    def test_another_sweep_is_refused(self, tmp_path):
        folder = tmp_path / "sweep"
        sweep(store=folder)
        with pytest.raises(FileExistsError, match="holds a sweep already"):
            sweep(store=folder)
        with pytest.raises(ValueError, match="it differs in chains_per_cell"):
            sweep(store=folder, resume=True, chains_per_cell=4)
        with pytest.raises(ValueError, match="it differs in axes"):
            sweep(store=folder, resume=True, grid={**GRID, "weight_decay": 1.0})
        with pytest.raises(ValueError, match="it differs in batch_size"):
            sweep(store=folder, resume=True, batch_size=4)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.tex").touch()
        with pytest.raises(FileExistsError, match="must be a new folder, or that of a sweep"):
            sweep(store=tmp_path / "other")

    def test_a_sweep_that_is_refused_leaves_the_folder_free(self, tmp_path):
        folder = tmp_path / "sweep"
        with pytest.raises(ValueError, match="lr must be >= 0"):
            sweep(store=folder, grid={**GRID, "lr": [-1.0, 1.0]})
        with pytest.raises(ValueError, match="batch_size must be"):
            sweep(store=folder, batch_size=1000)
        assert len(sweep(store=folder).samples) == 4


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_coefficient_over_training_is_one_call():
    """Of a transformer on modular addition: error and verdict for each of eight checkpoints."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    example = runpy.run_path(str(EXAMPLES / "over_training.py"))
    tokens, sums = example["problem"]()
    model = example["Transformer"]()
    checkpoints = example["train"](model, tokens, sums)
    loss_fn, settings = fs.module_loss(model, cross_entropy), {"nbeta": 25.0, "localization": 100.0}
    run = {"num_draws": 60, "num_burnin_steps": 100, "num_steps_between_draws": 2, "full_loss": 15}
    starts = {name: {"params": params} for name, params in checkpoints.items()}
    swept = fs.sweep(
        loss_fn,
        fs.params_of(model),
        (tokens, sums),
        fs.baoa,
        grid={"checkpoint": starts, "lr": 0.02, **settings},
        chains_per_cell=4,
        key=fs.key(0),
        **run,
    )
    assert swept.axes["checkpoint"] == list(checkpoints)
    for cell in swept.cells:
        assert math.isfinite(cell.llc.error)
        assert cell.verdict.reason
    # It is simple at first, and most complex before it has understood.
    means = [cell.llc.mean for cell in swept.cells]
    assert means[0] < 0.5 * means[1] < 0.5 * max(means)
    cell = swept.cells[3]
    single = fs.sample(
        loss_fn,
        checkpoints[cell.labels["checkpoint"]],
        (tokens, sums),
        fs.baoa(0.02, **settings),
        num_chains=4,
        key=fs.key(0),
        **run,
    )
    assert fs.llc(single).mean == pytest.approx(cell.llc.mean, rel=1e-3)


@pytest.mark.slow
def test_the_coefficient_by_layer_is_one_call():
    """Of digits: equal to separate runs with masks."""
    torch.manual_seed(0)
    example = runpy.run_path(str(EXAMPLES / "digits.py"))
    images, labels = example["load"]()
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    ).double()
    example["train"](model, images.double(), labels, epochs=20)
    loss_fn, params = fs.module_loss(model, cross_entropy), fs.params_of(model)
    settings = {"lr": 0.02, "nbeta": 240.0, "localization": 100.0}
    run = {"num_draws": 40, "num_burnin_steps": 40, "batch_size": 128, "key": fs.key(0)}
    run["full_loss"] = 10
    by_layer = fs.sweep(
        loss_fn,
        params,
        (images.double(), labels),
        fs.baoa,
        grid={"only": ["0.*", "2.*"], **settings},
        chains_per_cell=4,
        **run,
    )
    for cell in by_layer.cells:
        mask = {name: name[:1] == cell.labels["only"][:1] for name in fs.tree.names(params)}
        single = fs.sample(
            loss_fn,
            params,
            (images.double(), labels),
            fs.baoa(mask=mask, **settings),
            num_chains=4,
            **run,
        )
        one, other = fs.llc(single), cell.llc
        assert other.mean == pytest.approx(one.mean, rel=1e-9)
        assert other.error == pytest.approx(one.error, rel=1e-6)
        torch.testing.assert_close(cell.samples.losses, single.losses)
