"""Runs on disk: the record that memory would hold, and runs that are resumed, bit for bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import arviz_base
import numpy as np
import pytest
import torch
import xarray
import zarr
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import funcsgmcmc as fs
from cases import CASES, Case
from funcsgmcmc import tree
from problems import classification, observables, run
from test_going_on import assert_identical, whole

SETTINGS = {
    "num_chains": 3,
    "num_draws": 6,
    "num_burnin_steps": 3,
    "num_steps_between_draws": 2,
    "observables": observables(),
}


class Failing:
    """The loss of the classification problem, which raises an error at some call."""

    def __init__(self, error: type[BaseException] = OSError) -> None:
        self.loss_fn = fs.module_loss(classification()[0], cross_entropy)
        self.error, self.calls_left = error, -1

    def __call__(self, params, batch):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.error("the machine is on fire")
        return self.loss_fn(params, batch)


class Stateful:
    """A loader that knows where it is: another order in each epoch, from a generator of its own."""

    def __init__(self, batches: list) -> None:
        self.batches, self.generator = batches, torch.Generator().manual_seed(7)
        self.order, self.next = [], 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        if self.next >= len(self.order):
            self.order, self.next = self._shuffled(), 0
        while self.next < len(self.order):
            self.next += 1
            yield self.batches[self.order[self.next - 1]]

    def _shuffled(self) -> list[int]:
        return torch.randperm(len(self.batches), generator=self.generator).tolist()

    def state_dict(self) -> dict:
        return {"order": self.order, "next": self.next, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.next = state["order"], state["next"]
        self.generator.set_state(state["generator"])


def batches_of_8() -> list:
    inputs, targets = classification()[1]
    return [(inputs[i : i + 8], targets[i : i + 8]) for i in range(0, 40, 8)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_record_on_disk_is_that_in_memory(case: Case, params, tmp_path):
    sampler = case.make(params)
    in_memory = run(sampler, **SETTINGS)
    on_disk = run(sampler, store=tmp_path / "run.zarr", **SETTINGS)
    for stored in (on_disk, fs.open_run(str(tmp_path / "run.zarr"))):
        assert_identical(whole(in_memory), whole(stored))
        assert tree.names(stored.draws) == tree.names(in_memory.draws)
        assert stored.options == in_memory.options
        assert repr(stored) == repr(in_memory)
        torch.testing.assert_close(stored.initial_loss, in_memory.initial_loss, rtol=0, atol=0)
        ours, theirs = fs.to_datatree(stored), fs.to_datatree(in_memory)
        xarray.testing.assert_equal(ours, theirs)


HOWS = {
    "vmap": {},
    "chunks": {"chunk_size": 2},
    "loop": {"chain_method": "loop"},
    "epochs": {"minibatches": "epochs"},
    "all data": {"batch_size": None},
    "a list": {"data": list, "batch_size": None},
    "a stateful loader": {"data": Stateful, "batch_size": None},
    "a stateful loader and chunks": {"data": Stateful, "batch_size": None, "chunk_size": 2},
}


def fresh(how: dict) -> dict:
    """Settings with data as a new process would make it."""
    if "data" not in how:
        return how
    return how | {"data": how["data"](batches_of_8()), "initial_loss": 1.0}


def stopped_and_resumed(
    sampler, calls: list[int], path: Path, how: dict, **settings
) -> tuple[fs.Samples, fs.Samples]:
    """A run that is not stopped, and one that fails at some calls and is resumed each time.

    Args:
        calls: Calls of the loss by the run's steps after which it fails.
    """
    counting = Failing()
    uninterrupted = run(sampler, loss_fn=counting, **settings, **fresh(how))
    num_chunks = {2: 2}.get(how.get("chunk_size"), 1) * (3 if "chain_method" in how else 1)
    # Before the first step the loss is tried, and evaluated at the anchor.
    before = -1 - counting.calls_left - uninterrupted.num_steps * num_chunks
    for number in calls:
        failing = Failing()
        failing.calls_left = before + number
        with pytest.raises(fs.SamplingError, match="on fire") as raised:
            run(sampler, loss_fn=failing, store=path, resume=True, **settings, **fresh(how))
        kept = raised.value.samples
        assert_identical([kept.losses], [uninterrupted.losses[:, : kept.num_steps]])
        before = 0
    resumed = run(sampler, loss_fn=Failing(), store=path, resume=True, **settings, **fresh(how))
    return uninterrupted, resumed


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


class TestFile:
    """What other programs read, and what stores of other libraries get wrong."""

    @pytest.fixture
    def path(self, tmp_path) -> Path:
        run(fs.sgnht(1e-3, nbeta=3.0), store=tmp_path / "run.zarr", **SETTINGS)
        return tmp_path / "run.zarr"

    def test_xarray_and_arviz_read_it_unmodified(self, path):
        samples = fs.open_run(path)
        for opened in (
            xarray.open_datatree(path, engine="zarr"),
            xarray.open_datatree(path, engine="zarr", consolidated=False),
        ):
            posterior = opened["posterior"]
            assert posterior["chain"].values.tolist() == [0, 1, 2]
            assert posterior["draw"].values.tolist() == list(range(6))
            np.testing.assert_array_equal(posterior["loss"], samples.draw_losses)
            np.testing.assert_array_equal(posterior["0.weight"], samples.draws["0.weight"])
            # Burn-in is in the trace alone.
            assert opened["trace"].sizes == {"chain": 3, "step": 15}
            np.testing.assert_array_equal(opened["trace"]["distance"], samples.metrics.distance)
            loss, constants = posterior["loss"], opened["constant_data"]
            llc = constants["nbeta"] * (loss - constants["initial_loss"]) / constants["temperature"]
            assert float(llc.mean()) == pytest.approx(float(fs.llc(samples).mean))
        means = arviz_base.extract(opened).mean("sample")
        assert float(means["loss"]) == pytest.approx(float(samples.draw_losses.mean()))

    def test_attributes_are_plain_and_name_the_library(self, path):
        for attributes in (zarr.open_group(path).attrs, zarr.open_group(path / "posterior").attrs):
            plain = json.loads(json.dumps(dict(attributes), allow_nan=False))
            assert plain["inference_library"] == "funcsgmcmc"
            assert plain["inference_library_version"] == plain["funcsgmcmc_version"]
            assert plain["num_burnin_steps"] == 3
            assert plain["sampler"] == "SGNHT"
            assert plain["lr"] == 1e-3
            assert not any(value is None or value == "None" for value in plain.values())

    def test_bytes_on_disk_are_those_of_the_values(self, tmp_path):
        path = tmp_path / "run.zarr"
        params = {"w": torch.zeros(2000, dtype=torch.float32)}
        samples = fs.sample(
            lambda params, batch: params["w"].square().mean(),
            params,
            torch.zeros(4),
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=4,
            num_draws=50,
            key=fs.key(0),
            record=["draws"],
            store=path,
        )
        values = samples.draws["w"].nbytes + samples.losses.nbytes
        files = [file for file in path.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 1.1 * values

    def test_bfloat16_is_stored_as_float32(self, tmp_path):
        params = {"w": torch.zeros(8, dtype=torch.bfloat16)}
        samples = fs.sample(
            lambda params, batch: params["w"].square().mean(),
            params,
            torch.zeros(4),
            fs.sgld(1e-1, nbeta=1.0),
            num_chains=2,
            num_draws=5,
            key=fs.key(0),
            record=["draws"],
            store=tmp_path / "run.zarr",
        )
        assert samples.draws["w"].dtype == torch.bfloat16
        stored = zarr.open_array(tmp_path / "run.zarr" / "posterior" / "w")
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored[:], samples.draws["w"].float())

    def test_parameters_may_be_called_like_quantities(self, tmp_path):
        params = {"loss": torch.zeros(2), "draw": torch.ones(3)}
        samples = fs.sample(
            lambda params, batch: params["loss"].square().mean() + params["draw"].mean(),
            params,
            torch.zeros(4),
            fs.sgld(1e-3, nbeta=1.0),
            num_chains=2,
            num_draws=3,
            key=fs.key(0),
            record=["draws"],
            store=tmp_path / "run.zarr",
        )
        assert samples.draws["loss"].shape == (2, 3, 2)
        assert samples.draws["draw"].shape == (2, 3, 3)

    def test_it_is_read_while_the_run_goes_on(self, tmp_path):
        """Whole blocks, in place; what is not there yet is NaN."""
        path, seen = tmp_path / "run.zarr", []
        dimensions = ("chain", "0.weight_dim_0", "0.weight_dim_1")

        def look(params):
            if (path / "posterior" / "0.weight").exists():
                opened = xarray.open_datatree(path, engine="zarr", consolidated=False)
                seen.append(int(opened["posterior"]["0.weight"].notnull().all(dimensions).sum()))
                record = fs.open_run(path)
                assert record.num_steps <= 15
                assert record.losses.isfinite().all()
            return params["0.bias"].sum()

        settings = SETTINGS | {"observables": {"look": look}, "num_chains": 1}
        run(
            fs.sgld(1e-3, nbeta=1.0),
            store=path,
            checkpoint_seconds=0.0,
            chain_method="loop",
            **settings,
        )
        assert seen
        opened = xarray.open_datatree(path, engine="zarr")
        assert opened["posterior"]["0.weight"].notnull().all()

    def test_blocks_are_read_from_disk_and_from_memory(self, tmp_path, monkeypatch):
        """Several blocks a field, the last of them incomplete, before and after resuming."""
        monkeypatch.setattr("funcsgmcmc.runs.disk._BLOCK", 3 * 3 * 8)
        monkeypatch.setattr("funcsgmcmc.runs.disk._CHUNK", 2 * 3 * 8)
        sampler = fs.sgld(1e-3, nbeta=3.0)
        both = stopped_and_resumed(sampler, [8, 5], tmp_path / "run.zarr", {}, **SETTINGS)
        assert_identical(*map(whole, both))
        assert zarr.open_array(tmp_path / "run.zarr" / "trace" / "loss").chunks == (2, 3)


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
        (NeverTheSame(), "NeverTheSame gives other batches each time it is read"),
    ],
    ids=["shuffled", "iterator", "random"],
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


class Stop:
    """An observable that interrupts the run at some draw."""

    def __init__(self, draw: int) -> None:
        self.left = draw + 3  # it is tried thrice

    def __call__(self, params):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return params["0.bias"].sum()


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
            ({"key": fs.key(9)}, r"key, params.params\['0.weight'\]"),
            ({"batch_size": 4}, "batch_size$"),
            ({"num_burnin_steps": 4}, "num_burnin_steps$"),
            ({"observables": {}}, "observables$"),
            ({"minibatches": "epochs"}, "minibatches$"),
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
        monkeypatch.setattr("funcsgmcmc.runs.keeping.major_version", lambda: "99")
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


class TestFaults:
    def test_a_full_disk_loses_nothing_before_the_last_checkpoint(self, tmp_path, monkeypatch):
        path, sampler = tmp_path / "run.zarr", fs.sgld(1e-3, nbeta=3.0)
        monkeypatch.setattr("funcsgmcmc.runs.disk._BLOCK", 3 * 2 * 8)
        real, left = zarr.Array.__setitem__, [30]

        def full(array, *args):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            real(array, *args)

        monkeypatch.setattr(zarr.Array, "__setitem__", full)
        with pytest.raises(fs.SamplingError, match="No space left on device") as raised:
            run(sampler, store=path, checkpoint_seconds=0.0, **SETTINGS)
        assert "could not be brought up to date" in raised.value.__cause__.__notes__[0]
        kept, uninterrupted = raised.value.samples, run(sampler, **SETTINGS)
        assert kept.num_steps > 0
        assert torch.equal(kept.losses, uninterrupted.losses[:, : kept.num_steps])
        monkeypatch.setattr(zarr.Array, "__setitem__", real)
        resumed = run(sampler, store=path, resume=True, **SETTINGS)
        assert_identical(whole(uninterrupted), whole(resumed))

    def test_a_folder_that_cannot_be_written_is_named(self):
        with pytest.raises(OSError, match=r"/proc/run\.zarr"):
            run(fs.sgld(1e-3, nbeta=3.0), store="/proc/run.zarr", **SETTINGS)

    def test_a_corrupt_chunk_is_an_error_where_it_is_read(self, tmp_path):
        path = tmp_path / "run.zarr"
        settings = SETTINGS | {"num_draws": 2000, "record": []}
        run(fs.sgld(1e-3, nbeta=3.0), store=path, **settings)
        chunk = path / "trace" / "loss" / "c" / "0" / "0"
        chunk.write_bytes(chunk.read_bytes()[:100])
        samples = fs.open_run(path)
        assert samples.num_draws == 2000
        with pytest.raises(Exception, match=r"size|bytes|shape|decode"):
            samples.losses  # noqa: B018

    def test_a_clock_that_goes_back_does_not_matter(self, tmp_path, monkeypatch):
        times = iter(range(10**6, 0, -1))
        monkeypatch.setattr(time, "time", lambda: float(next(times)))
        sampler = fs.sgld(1e-3, nbeta=3.0)
        kept = run(sampler, store=tmp_path / "run.zarr", checkpoint_seconds=0.0, **SETTINGS)
        assert_identical(whole(kept), whole(run(sampler, **SETTINGS)))

    def test_an_interrupt_leaves_a_run_that_is_resumed(self, tmp_path):
        path, sampler = tmp_path / "run.zarr", fs.sgnht(1e-3, nbeta=3.0)
        how = SETTINGS | {"chunk_size": 2, "observables": {"stop": Stop(3)}}
        with pytest.raises(fs.SamplingInterrupt, match="interrupted after") as raised:
            run(sampler, store=path, **how)
        assert 0 < raised.value.samples.num_steps < 15
        how["observables"] = {"stop": Stop(99)}
        resumed = run(sampler, store=path, resume=True, **how)
        how["observables"] = {"stop": Stop(99)}
        assert_identical(whole(resumed), whole(run(sampler, **how)))

    def test_sigterm_writes_a_checkpoint_and_ends_the_process(self, tmp_path):
        """As schedulers of clusters ask for it."""
        script = """
import sys, torch, funcsgmcmc as fs
print("ready", flush=True)
fs.sample(lambda p, b: (p["w"] - b.mean()).square().sum(), {"w": torch.zeros(3)}, torch.ones(9),
          fs.sgld(1e-3, nbeta=1.0), num_chains=2, num_draws=10**7, batch_size=3, key=fs.key(0),
          store=sys.argv[1], checkpoint_seconds=1e6)
"""
        path = tmp_path / "run.zarr"
        with subprocess.Popen(
            [sys.executable, "-c", script, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"ready\n"
            while not (path / "trace" / "loss").exists():
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGTERM
        samples = fs.open_run(path)
        assert 0 < samples.num_steps < 10**7
        assert samples.losses.shape == (2, samples.num_steps)
