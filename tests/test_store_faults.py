"""Faults of the system under a run on disk: what is lost, and what is not."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader, Dataset, get_worker_info

import funcsgmcmc as fs
from interruptions import SETTINGS, Stop
from problems import classification, run
from test_going_on import assert_identical, whole


class Crashing(Dataset):
    """Examples whose worker ends without a word at one of them, as one that is out of memory."""

    def __init__(self, last: int) -> None:
        self.examples, self.last = list(zip(*classification()[1], strict=True)), last

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int):
        if index == self.last and get_worker_info() is not None:
            os._exit(1)
        return self.examples[index]


class TestFaults:
    def test_a_worker_that_crashes_leaves_a_run_that_is_resumed(self, tmp_path):
        path, sampler = tmp_path / "run.zarr", fs.sgld(1e-3, nbeta=3.0)

        def sample(last, num_workers=1, **store):
            loader = DataLoader(Crashing(last), batch_size=8, num_workers=num_workers)
            settings = SETTINGS | {"data": loader, "batch_size": None, "initial_loss": 1.0}
            return run(sampler, **settings, **store)

        # A signal tells of it, or the connection that it leaves.
        with pytest.raises(fs.SamplingError, match=r"sampling stopped in step \d: .+") as raised:
            sample(39, store=path)
        kept = raised.value.samples
        uninterrupted = sample(-1, num_workers=0)
        assert torch.equal(kept.losses, uninterrupted.losses[:, : kept.num_steps])
        assert_identical(
            whole(uninterrupted), whole(sample(-1, num_workers=0, store=path, resume=True))
        )

    def test_a_full_disk_loses_nothing_before_the_last_checkpoint(self, tmp_path, monkeypatch):
        path, sampler = tmp_path / "run.zarr", fs.sgld(1e-3, nbeta=3.0)
        monkeypatch.setattr("funcsgmcmc.runs.disk.LARGEST_BLOCK", 3 * 2 * 8)
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

    def test_settings_may_be_numbers_of_numpy(self, tmp_path):
        """They are written as plain numbers, which any program reads."""
        path, sampler = tmp_path / "run.zarr", fs.sgld(1e-3, nbeta=3.0)
        names = ("num_chains", "num_draws", "num_burnin_steps", "batch_size", "chunk_size")
        settings = {name: np.int64(2) for name in names} | {"full_loss": np.int32(1)}
        settings |= {"max_loss": np.float32(50), "max_distance": np.float64(90)}
        first = run(sampler, store=path, **settings)
        attributes = zarr.open_group(path, mode="r").attrs.asdict()
        assert (attributes["chunk_size"], attributes["max_loss"]) == (2, 50.0)
        again = run(sampler, store=path, resume=True, **settings)
        assert_identical(whole(first), whole(again))

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
def tell(draw):
    if draw.index == 2:
        print("running", flush=True)
fs.sample(lambda p, b: (p["w"] - b.mean()).square().sum(), {"w": torch.zeros(3)}, torch.ones(9),
          fs.sgld(1e-3, nbeta=1.0), num_chains=2, num_draws=10**7, batch_size=3, key=fs.key(0),
          store=sys.argv[1], checkpoint_seconds=1e6, on_draw=tell)
"""
        path = tmp_path / "run.zarr"
        with subprocess.Popen(
            [sys.executable, "-c", script, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"running\n"
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGTERM
        samples = fs.open_run(path)
        assert 0 < samples.num_steps < 10**7
        assert samples.losses.shape == (2, samples.num_steps)
