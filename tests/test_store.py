"""Runs on disk: the record that memory would hold, and the file that others read."""

import json
import pickle
from pathlib import Path

import arviz_base
import numpy as np
import pytest
import torch
import xarray
import zarr

import funcsgmcmc as fs
from cases import CASES, Case
from funcsgmcmc import tree
from interruptions import SETTINGS, stopped_and_resumed
from problems import run
from test_going_on import assert_identical, whole


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
        monkeypatch.setattr("funcsgmcmc.runs.disk.LARGEST_BLOCK", 3 * 3 * 8)
        monkeypatch.setattr("funcsgmcmc.runs.disk._CHUNK", 2 * 3 * 8)
        sampler = fs.sgld(1e-3, nbeta=3.0)
        both = stopped_and_resumed(sampler, [8, 5], tmp_path / "run.zarr", {}, **SETTINGS)
        assert_identical(*map(whole, both))
        assert zarr.open_array(tmp_path / "run.zarr" / "trace" / "loss").chunks == (1, 3)


def test_chains_of_a_record_on_disk_are_a_record_in_memory(tmp_path):
    """They go on, travel, and join as any other."""
    sampler = fs.sgld(torch.tensor([1e-3, 2e-3, 1e-3]), nbeta=3.0)
    samples = run(sampler, num_chains=3, num_draws=6, store=tmp_path / "run.zarr")
    part = samples[:2]
    assert (part.num_chains, part.num_steps) == (2, 6)
    copy = pickle.loads(pickle.dumps(part))
    assert_identical(whole(copy), whole(part))
    assert [each.num_steps for each in samples.groups().values()] == [6, 6]
