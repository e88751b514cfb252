"""Runs that go on from their checkpoint, and those that may not."""

from pathlib import Path

import pytest
import torch
import xarray
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import funcsgmcmc as fs
from cases import CASES, Case
from interruptions import HOWS, SETTINGS, Failing, Stop, batches_of_8, stopped_and_resumed
from problems import classification, run
from test_going_on import assert_identical, whole


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS.keys())
def test_a_run_that_fails_is_resumed_to_the_same_end(how, tmp_path):
    sampler = fs.sgnht(1e-3, nbeta=3.0, localization=1.0)
    both = stopped_and_resumed(sampler, [5, 4, 3], tmp_path / "run.zarr", how, **SETTINGS)
    assert_identical(*map(whole, both))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_sampler_is_resumed(case: Case, params, tmp_path):
    sampler = case.make(params)
    both = stopped_and_resumed(sampler, [8], tmp_path / "run.zarr", {}, **SETTINGS)
    assert_identical(*map(whole, both))


@pytest.mark.parametrize("make", [fs.control_variates, lambda loss_fn: fs.svrg(loss_fn, 4)])
@pytest.mark.parametrize("how", [{}, {"chain_method": "loop"}], ids=["vmap", "loop"])
def test_the_memory_of_an_estimator_is_resumed(make, how, tmp_path):
    def sample(calls: int, **settings):
        loss_fn = Failing()
        loss_fn.calls_left = calls
        return run(fs.sgld(1e-3, nbeta=3.0), loss_fn=make(loss_fn), **SETTINGS, **how, **settings)

    kept = {"store": tmp_path / "run.zarr", "resume": True}
    with pytest.raises(fs.SamplingError, match="on fire"):
        sample(30, **kept)
    assert_identical(whole(sample(-1)), whole(sample(-1, **kept)))


@pytest.mark.parametrize("how", [{}, {"chunk_size": 2}, {"chain_method": "loop"}], ids=str)
def test_looks_at_all_data_are_resumed(how, tmp_path):
    """Stopped between two of them; and those of a run that makes more draws, as often as before."""
    path, sampler = tmp_path / "run.zarr", fs.baoa(1e-2, nbeta=3.0)
    settings = SETTINGS | {"full_loss": 3} | how

    def sample(last, **store):
        return run(sampler, **(settings | {"observables": {"stop": Stop(last)}} | store))

    with pytest.raises(fs.SamplingInterrupt):
        sample(3, store=path)
    resumed, uninterrupted = sample(99, store=path, resume=True), sample(99)
    assert_identical(list(resumed.looks[:5]), list(uninterrupted.looks[:5]))
    assert resumed.looks[5:] == uninterrupted.looks[5:] == (40, True)
    assert resumed.looks.draws.tolist() == [1, 3, 5]
    longer = sample(99, store=path, resume=True, num_draws=9)
    assert longer.looks.draws.tolist() == [1, 3, 5, 7]
    assert_identical([longer.looks.losses[:, :3]], [uninterrupted.looks.losses])
    file = xarray.open_datatree(path, engine="zarr")["full_data"]
    assert file["full_draw"].values.tolist() == [1, 3, 5, 7]
    assert_identical([torch.as_tensor(file["virial"].values)], [longer.looks.virials])
    assert fs.to_datatree(longer)["full_data"]["force"].shape == (3, 4)


def test_a_run_with_more_draws_looks_at_the_part_that_it_looked_at(tmp_path):
    """A longer run alone would look at more examples."""
    path, sampler = tmp_path / "run.zarr", fs.sgld(1e-3, nbeta=3.0)
    settings = {"batch_size": 2, "num_chains": 2, "record": [], "num_steps_between_draws": 3}
    first = run(sampler, num_draws=100, store=path, **settings)
    longer = run(sampler, num_draws=160, store=path, resume=True, **settings)
    for samples, number in ((first, 20), (longer, 32)):
        assert (samples.looks.num_examples, samples.looks.is_all) == (3, False)
        assert len(samples.looks.draws) == number
    assert_identical([longer.looks.losses[:, :20]], [first.looks.losses])


def test_a_finished_run_makes_more_draws(tmp_path):
    sampler, store = fs.rmsprop_sgld(1e-3, nbeta=3.0), tmp_path / "run.zarr"
    first = run(sampler, store=store, **SETTINGS)
    again = run(sampler, store=store, resume=True, **SETTINGS)
    assert_identical(whole(first), whole(again))
    longer = SETTINGS | {"num_draws": 9}
    assert_identical(
        whole(run(sampler, **longer)), whole(run(sampler, store=store, resume=True, **longer))
    )
    tree = xarray.open_datatree(store, engine="zarr")
    assert tree["posterior"].sizes["draw"] == 9
    assert tree["posterior"]["loss"].notnull().all()


def test_a_frozen_chain_stays_frozen(tmp_path):
    sampler = fs.sgld(torch.tensor([1e-3, 1e308, 1e-3]), nbeta=1e4)
    both = stopped_and_resumed(sampler, [8], tmp_path / "run.zarr", {}, **SETTINGS)
    assert_identical(*map(whole, both))
    assert both[0].frozen == both[1].frozen
    assert both[1].healthy.tolist() == [True, False, True]


def shuffling_loader() -> DataLoader:
    return DataLoader(TensorDataset(*classification()[1]), batch_size=8, shuffle=True)


class NeverTheSame:
    """Other batches each time it is read."""

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        yield from torch.randn(3, 4, 5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (shuffling_loader(), "a DataLoader that shuffles has an order of its own .*Stateful"),
        (iter(batches_of_8() * 9), "list_iterator cannot be read again from its beginning"),
        (
            StatefulDataLoader(
                TensorDataset(*classification()[1]), shuffle=True, generator=torch.Generator()
            ),
            "StatefulDataLoader with a generator shuffles its next epochs otherwise",
        ),
        (NeverTheSame(), "NeverTheSame gives other batches each time it is read"),
    ],
    ids=["shuffled", "iterator", "a generator", "random"],
)
def test_data_that_cannot_be_found_again_is_refused_at_the_start(data, message, tmp_path):
    settings = {"store": tmp_path / "run.zarr", "batch_size": None, "initial_loss": 1.0}
    with pytest.raises(ValueError, match=f"resume=True must be left out for this data: {message}"):
        run(fs.sgld(1e-3, nbeta=3.0), data=data, resume=True, **settings)


def test_data_that_has_changed_is_refused(tmp_path):
    path, how = tmp_path / "run.zarr", {"data": batches_of_8(), "batch_size": None}
    sampler = fs.sgld(1e-3, nbeta=3.0)
    with pytest.raises(KeyboardInterrupt):
        run(sampler, observables={"stop": Stop(3)}, store=path, num_draws=5, **how)
    how["data"] = [(inputs + 1, targets) for inputs, targets in batches_of_8()]
    with pytest.raises(ValueError, match="must give the batches that it gave before"):
        run(sampler, observables={"stop": Stop(99)}, store=path, resume=True, num_draws=5, **how)


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        run(fs.sgld(1e-3, nbeta=3.0), store=tmp_path / "run.zarr", **SETTINGS)
        return tmp_path / "run.zarr"

    def test_a_run_is_not_overwritten(self, path):
        with pytest.raises(FileExistsError, match="holds a run already: resume=True"):
            run(fs.sgld(1e-3, nbeta=3.0), store=path, **SETTINGS)

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"key": fs.key(9)}, "key$"),
            ({"batch_size": 4}, "batch_size$"),
            ({"num_burnin_steps": 4}, "num_burnin_steps$"),
            ({"observables": {}}, "observables$"),
            ({"minibatches": "epochs"}, "minibatches$"),
            ({"shared_batches": True}, "shared_batches$"),
            ({"data": tuple(2 * each for each in classification()[1])}, "data, tensor 0, data, te"),
            ({"loss_fn": Failing()}, "loss_fn, model"),
        ],
    )
    def test_another_run_is_named(self, path, change, names):
        with pytest.raises(ValueError, match=f"holds another run: it differs in {names}"):
            run(fs.sgld(1e-3, nbeta=3.0), store=path, resume=True, **(SETTINGS | change))

    def test_another_sampler_is_named(self, path, params):
        for sampler, names in (
            (fs.sgld(2e-3, nbeta=3.0), "sampler.lr$"),
            (fs.sgld(1e-3, nbeta=3.0, mask={"0.bias": False}), "sampler.mask"),
            (fs.sgld(1e-3, nbeta=3.0, temperature=2.0), "sampler.temperature$"),
        ):
            with pytest.raises(ValueError, match=f"another run: it differs in {names}"):
                run(sampler, store=path, resume=True, **SETTINGS)

    def test_another_model_is_named(self, tmp_path):
        """Weights that are not sampled, and layers without any."""
        settings = SETTINGS | {"store": tmp_path / "run.zarr", "observables": {}}
        model, _ = classification()
        params = fs.params_of(model, only="2.*")

        def sample(model, **more):
            loss_fn = fs.module_loss(model, cross_entropy)
            return run(fs.sgld(1e-3, nbeta=3.0), params, loss_fn=loss_fn, **settings, **more)

        sample(model)
        # The tree gives these: what the module holds there does not matter.
        model[2].weight.data.add_(1.0)
        sample(model, resume=True)
        kept = model[0].weight.data.clone()
        model[0].weight.data.add_(1.0)
        with pytest.raises(ValueError, match=r"it differs in model\['0.weight'\]$"):
            sample(model, resume=True)
        model[0].weight.data.copy_(kept)
        other = torch.nn.Sequential(model[0], torch.nn.SiLU(), model[2])
        with pytest.raises(ValueError, match=r"it differs in model$"):
            sample(other, resume=True)

    def test_another_version_is_named(self, path, monkeypatch):
        monkeypatch.setattr("funcsgmcmc.runs.fingerprint.major_version", lambda: "99")
        with pytest.raises(ValueError, match="it differs in the library's version"):
            run(fs.sgld(1e-3, nbeta=3.0), store=path, resume=True, **SETTINGS)

    def test_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("done")
        with pytest.raises(FileExistsError, match="must be a new folder, or that of a run"):
            run(fs.sgld(1e-3, nbeta=3.0), store=tmp_path, **SETTINGS)
        with pytest.raises(FileExistsError, match="must be a new folder, or that of a run"):
            run(fs.sgld(1e-3, nbeta=3.0), store=tmp_path / "thesis.tex", **SETTINGS)

    def test_settings_of_a_store_need_one(self):
        with pytest.raises(ValueError, match="resume must be left out without store"):
            run(fs.sgld(1e-3, nbeta=3.0), resume=True)
        with pytest.raises(ValueError, match="checkpoint_seconds must be left out without store"):
            run(fs.sgld(1e-3, nbeta=3.0), checkpoint_seconds=1.0)
        with pytest.raises(FileNotFoundError, match="there is no run at"):
            fs.open_run("nowhere.zarr")
        assert not Path("nowhere.zarr").exists()

    def test_a_corrupt_checkpoint_is_named(self, path):
        (path / "checkpoint" / "progress.pt").write_bytes(b"torn")
        with pytest.raises(ValueError, match=r"progress.pt cannot be read"):
            fs.open_run(path)
        with pytest.raises(ValueError, match=r"progress.pt cannot be read"):
            run(fs.sgld(1e-3, nbeta=3.0), store=path, resume=True, **SETTINGS)

    def test_two_runs_cannot_have_one_store(self, tmp_path):
        path = tmp_path / "run.zarr"

        def second(params):
            with pytest.raises(RuntimeError, match="must be one run's, but another one is writing"):
                run(fs.sgld(1e-3, nbeta=1.0), store=path, resume=True)
            return params["0.bias"].sum()

        settings = SETTINGS | {"observables": {"second": second}}
        run(fs.sgld(1e-3, nbeta=1.0), store=path, chain_method="loop", **settings)
