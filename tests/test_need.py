"""What a run needs: told before it starts, refused where it cannot fit, and chunks that fit."""

import logging
import sys

import pytest
import torch

import funcsgmcmc as fs
from funcsgmcmc import memory
from funcsgmcmc.memory import free_memory, in_bytes, peak_bytes
from funcsgmcmc.runs import need, start
from funcsgmcmc.runs.mixing import Mixing, split_r_hat
from funcsgmcmc.runs.need import StepBytes, largest_chunk
from funcsgmcmc.runs.run import Run
from problems import observables, run

SAMPLER = fs.sgld(1e-3, nbeta=10.0)


def test_the_peak_of_a_function_is_that_of_its_tensors():
    given = torch.ones(1000)  # not made by it: not counted

    def chain(length: int) -> None:
        value = given
        for _ in range(length):
            value = value + 1

    def all_kept() -> list[torch.Tensor]:
        return [given + i for i in range(5)]

    assert given.itemsize == 8
    assert (
        peak_bytes(lambda: chain(10)) == 2 * 8_000
    )  # the last one, and the one that it is made of
    assert peak_bytes(all_kept) == 5 * 8_000
    assert peak_bytes(lambda: given[:10].view(2, 5)) == 0  # a view has no memory of its own


@pytest.mark.parametrize("sampler", [SAMPLER, fs.sgnht(1e-3, nbeta=10.0)], ids=["sgld", "sgnht"])
def test_the_memory_of_a_step_grows_by_its_chains(monkeypatch, sampler):
    """What steps of one and two chains tell of seven, against a step of seven."""
    runs = []
    monkeypatch.setattr(Run, "go", lambda run, progress: runs.append(run))
    run(sampler, num_chains=7, chunk_size="auto")
    (made,) = runs
    (chunk,) = made.chunks

    def step():
        with torch.no_grad():
            made.stepper.make(chunk, 0, 1)

    assert made.step_bytes.of(7) == pytest.approx(peak_bytes(step), rel=0.02)


def test_the_largest_even_chunk_that_fits():
    step = StepBytes(fixed=100, per_chain=10)
    assert largest_chunk(step, 12, 1_000) == 12
    assert largest_chunk(step, 100, 1_000) == 50  # 70 would fit: two even chunks
    assert largest_chunk(step, 100, None) == 100
    assert largest_chunk(step, 7, 150) == 2  # the system may use a fifth of what is free
    with pytest.raises(ValueError, match="a step of one chain needs 110 B, more than fits the dev"):
        largest_chunk(step, 7, 100)


def test_chunks_are_chosen_by_free_memory(monkeypatch):
    """The chains are the same, in chunks of fewer, and the record says what was asked."""
    settings = {"num_chains": 6, "observables": observables()}
    whole = run(SAMPLER, **settings)
    sizes = []
    chosen = need.largest_chunk

    def record(step, num_chains, free):
        sizes.append(chosen(step, num_chains, int((step.fixed + 3.5 * step.per_chain) / 0.8)))
        return sizes[-1]

    monkeypatch.setattr("funcsgmcmc.runs.run.largest_chunk", record)
    chunked = run(SAMPLER, chunk_size="auto", **settings)
    assert sizes == [3]
    assert chunked.options["chunk_size"] == "auto"
    torch.testing.assert_close(chunked.losses, whole.losses)
    for name, leaf in whole.draws.items():
        torch.testing.assert_close(chunked.draws[name], leaf)


def test_a_resumed_run_has_the_chunks_that_it_had(monkeypatch, tmp_path):
    """Free memory is another then, and rounding depends on chunks."""
    settings = {"num_chains": 6, "chunk_size": "auto", "store": tmp_path / "run.zarr"}
    monkeypatch.setattr("funcsgmcmc.runs.run.largest_chunk", lambda *_: 2)
    run(SAMPLER, **settings)
    monkeypatch.setattr("funcsgmcmc.runs.run.largest_chunk", lambda *_: 5)
    resumed = run(SAMPLER, **(settings | {"num_draws": 12, "resume": True}))
    monkeypatch.undo()
    expected = run(SAMPLER, num_chains=6, chunk_size=2, num_draws=12)
    assert torch.equal(resumed.losses, expected.losses)
    assert torch.equal(resumed.draws["0.weight"], expected.draws["0.weight"])


@pytest.mark.parametrize(
    ("free", "settings", "message"),
    [
        (
            4_000,
            {},
            "num_chains must be as many as fit cpu, where 3.91 KiB are free, got 5 of 456 B",
        ),
        (20_000, {"num_draws": 60}, "the record needs .* of memory, got 19.5 KiB free: keep the "),
        (
            30_000,
            {"chunk_size": "auto", "num_chains": 20, "record": []},
            "a step, with the record, needs .* on cpu",
        ),
    ],
)
def test_a_run_that_cannot_fit_is_refused(monkeypatch, free, settings, message):
    for module in (need, start, memory):
        monkeypatch.setattr(module, "free_memory", lambda device: free, raising=False)
    monkeypatch.setattr("funcsgmcmc.runs.run.free_memory", lambda device: None)
    with pytest.raises(ValueError, match=message):
        run(SAMPLER, **settings)


def test_a_record_too_large_for_the_disk_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(need, "_free_disk", lambda folder: 1_000)
    with pytest.raises(ValueError, match=r"the record needs .* on disk, got 1e\+03 B free"):
        run(SAMPLER, store=tmp_path / "run.zarr")


@pytest.mark.slow
def test_what_is_recorded_is_what_was_told(monkeypatch, tmp_path):
    """Bytes of the record, by the store and in memory."""
    told = []
    check = need.Need.check
    monkeypatch.setattr(need.Need, "check", lambda self: (told.append(self), check(self))[1])
    settings = {"num_draws": 40, "num_burnin_steps": 9, "observables": observables()}
    in_memory = run(SAMPLER, record=["draws", "metrics"], **settings)
    values = [
        in_memory.losses,
        in_memory.distances,
        *in_memory.draws.values(),
        *in_memory.observables.values(),
        *(each for name, each in in_memory.metrics._asdict().items() if name != "distance"),
    ]
    size = sum(value.numel() * value.itemsize for value in values)
    (need_in_memory,) = told
    assert need_in_memory.record == pytest.approx(size, rel=0.05)
    assert need_in_memory.waiting == need_in_memory.record
    run(SAMPLER, record=["draws", "metrics"], store=tmp_path / "run.zarr", **settings)
    assert told[1].record == told[0].record
    run(SAMPLER, record=["draw_moments"], num_draws=40)
    run(SAMPLER, record=["draw_moments"], num_draws=4000)
    grown = told[3].record - told[2].record
    assert grown == 2 * 8 * 5 * 3960  # loss and distance of each step


def test_the_need_is_shown_with_the_progress(caplog):
    with caplog.at_level(logging.INFO, logger="funcsgmcmc"):
        run(SAMPLER, progress=True, num_draws=30)
    needed, *_, last = [record.getMessage() for record in caplog.records]
    assert needed.startswith("the run needs ")
    assert "on cpu for a step" in needed
    assert "of memory for the record" in needed
    assert "R-hat so far: loss " in last
    assert "distance " in last


def test_r_hat_so_far_is_that_of_all_draws_in_few_values():
    """Kept values stay few, and chains apart are seen; frozen ones do not count."""
    generator = torch.Generator().manual_seed(0)
    mixing = Mixing()
    taken = 0
    for index in range(5000):
        if mixing.is_due(index):
            taken += 1
            value = torch.randn(4, generator=generator) + torch.tensor([0.0, 0.0, 0.0, 100.0])
            mixing.add({"loss": value})
    assert taken < 1500
    healthy = torch.tensor([True, True, True, False])
    assert mixing.r_hats(healthy)["loss"] == pytest.approx(1.0, abs=0.03)
    assert mixing.r_hats(~healthy | healthy)["loss"] > 10
    assert mixing.r_hats(torch.zeros(4, dtype=torch.bool)) == {}
    drifting = torch.arange(100.0).expand(3, 100)
    assert split_r_hat(drifting) > 1.9


@pytest.mark.parametrize(
    ("size", "text"), [(3, "3 B"), (2048, "2 KiB"), (5 << 30, "5 GiB"), (7 << 40, "7 TiB")]
)
def test_bytes_as_people_read_them(size, text):
    assert in_bytes(size) == text


@pytest.mark.skipif(sys.platform != "linux", reason="free memory is read from /proc")
def test_free_memory_is_within_the_limit_of_a_container(monkeypatch, tmp_path):
    """Pages of files count as used there, and give way."""
    files = {
        "limit": "1000\n",
        "usage": "700\n",
        "stat": "anon 500\nactive_file 60\ninactive_file 40\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = tuple(tmp_path / name for name in files)
    container = (*paths, ("active_file", "inactive_file"))
    monkeypatch.setattr(memory, "_CONTAINERS", (container,))
    assert free_memory(torch.device("cpu")) == 400
    (tmp_path / "limit").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 1 << 20
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "missing")
    assert free_memory(torch.device("cpu")) is None
