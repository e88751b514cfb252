"""What a run shows while it goes: a bar on a terminal, few lines in a file."""

import logging
import sys

import pytest

import funcsgmcmc as fs
from funcsgmcmc.runs import progress
from problems import run


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "_is_watched", lambda: True)


def test_a_terminal_has_a_bar_with_loss_and_health(terminal, capsys):
    run(fs.sgld(1e-3, nbeta=5.0), progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "5/5 chains healthy" in shown
    assert "loss" in shown


def test_a_bar_without_tqdm_names_the_extra(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'funcsgmcmc\[progress\]'"):
        run(fs.sgld(1e-3, nbeta=5.0), progress=True)


def test_a_bar_says_that_it_compiles(terminal, capsys):
    with progress.progress_of(3, enabled=True) as shown:
        shown.note("compiling the step")
    assert "compiling the step" in capsys.readouterr().err


class Clock:
    """Seconds that pass as a test says."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "funcsgmcmc"]


def test_a_file_has_a_line_every_30_seconds_and_one_at_the_end(monkeypatch, caplog):
    clock = Clock(monkeypatch)
    caplog.set_level(logging.INFO, logger="funcsgmcmc")
    with progress.progress_of(600, enabled=True) as shown:
        for _ in range(600):
            clock.now += 0.125
            shown.steps_done(lambda: "loss 1")
    assert lines(caplog) == [
        "241 of 600 steps, 8 steps/s, 45 s left, loss 1",
        "481 of 600 steps, 8 steps/s, 15 s left, loss 1",
        "600 of 600 steps, 8 steps/s, 0 s left, loss 1",
    ]


def test_a_run_that_goes_on_counts_on(monkeypatch, caplog, terminal, capsys):
    """Its rate is that of its own steps."""
    clock = Clock(monkeypatch)
    with progress.progress_of(600, done=300, enabled=True) as shown:
        shown.steps_done(lambda: "loss 1")
    assert "301/600" in capsys.readouterr().err
    monkeypatch.setattr(progress, "_is_watched", lambda: False)
    caplog.set_level(logging.INFO, logger="funcsgmcmc")
    with progress.progress_of(600, done=300, enabled=True) as shown:
        for _ in range(300):
            clock.now += 0.125
            shown.steps_done(lambda: "loss 1")
    assert lines(caplog) == [
        "541 of 600 steps, 8 steps/s, 7 s left, loss 1",
        "600 of 600 steps, 8 steps/s, 0 s left, loss 1",
    ]


def test_a_short_run_writes_three_lines_without_carriage_returns(capsys):
    """Logging is not configured: the line is seen all the same, and nothing stays behind."""
    logger = logging.getLogger("funcsgmcmc")
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        run(fs.sgld(1e-3, nbeta=5.0), progress=True)
    finally:
        root.handlers = handlers
    shown = capsys.readouterr().err
    assert "\r" not in shown
    needed, cost, line = shown.splitlines()
    assert "funcsgmcmc: the run needs " in needed
    assert "funcsgmcmc: 5 chains × 6 steps: 30 gradients on 8 examples each; about " in cost
    assert "funcsgmcmc: 6 of 6 steps" in line
    assert line.endswith("5/5 chains healthy")
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)


@pytest.mark.slow
def test_a_file_says_that_the_step_compiles(caplog):
    caplog.set_level(logging.INFO, logger="funcsgmcmc")
    run(fs.sgld(1e-3, nbeta=5.0), progress=True, compile=True)
    assert lines(caplog)[0].startswith("compiling the step")
    caplog.clear()
    run(fs.sgld(1e-3, nbeta=5.0), progress=True)
    assert len(lines(caplog)) == 3  # what it needs, what it costs, and its end


def test_without_progress_nothing_is_shown(caplog, capsys):
    caplog.set_level(logging.INFO, logger="funcsgmcmc")
    run(fs.sgld(1e-3, nbeta=5.0))
    assert lines(caplog) == []
    assert capsys.readouterr().err == ""
