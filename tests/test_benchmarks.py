"""What the benchmarks conclude from their figures, with figures that are made up: no timing."""

import importlib
import json
import random
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MACHINE = {
    "device_type": "cpu",
    "device": "a processor",
    "threads": 2,
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def report(module, medians, *, noise=0.0, slowness=1.0, seed=0, num_rounds=30, **machine):
    """A report of rounds of made-up times around these, each off by a share of the noise.

    The machine's slowness is common to all contenders of a round.
    """
    measuring = module("measuring")
    draw = random.Random(seed)
    rounds = [slowness * draw.lognormvariate(0, noise) for _ in range(num_rounds)]
    figures = {
        name: measuring.Figure.of(
            [median * each * draw.lognormvariate(0, noise) for each in rounds]
        )
        for name, median in medians.items()
    }
    part = {"A": {"title": "A", "milliseconds": figures}}
    found = MACHINE | machine | {"chains": part, "spread": {"chains": measuring.spread_of(part)}}
    return json.loads(json.dumps(found))


TIMES = {"bare loop": 6.0, "eager": 9.0, "compiled": 3.0}


def verdicts(module, before, now):
    changes = module("comparing").compare(before, now, ["chains"])
    return {each.path.rpartition("/")[2]: each.verdict for each in changes if each.is_ours}


def test_what_is_a_fifth_slower_is_named(module):
    before = report(module, TIMES, noise=0.02)
    now = report(module, TIMES | {"compiled": 3.6}, noise=0.02, seed=1)
    assert verdicts(module, before, now) == {"eager": "same", "compiled": "slower"}
    assert verdicts(module, now, before) == {"eager": "same", "compiled": "faster"}
    said = module("comparing").text(before, now, ["chains"])
    assert re.search(r"slower +chains: A, compiled / bare loop: 1\.(19|20|21) times as", said)
    assert "1 of 2 figures are within 5 %" in said


@pytest.mark.parametrize("seed", range(20))
def test_noise_hides_what_is_small(module, seed):
    """A change of 6 % is no regression where the rounds differ by 10 %; one of 20 % is without."""
    slower = TIMES | {"compiled": 3.0 * 1.06}
    noisy = [
        report(module, times, noise=0.1, seed=2 * seed + k)
        for k, times in enumerate([TIMES, slower])
    ]
    assert verdicts(module, *noisy)["compiled"] in ("same", "unclear")
    quiet = [report(module, times, noise=1e-4, seed=seed) for times in (TIMES, slower)]
    assert verdicts(module, *quiet)["compiled"] == "slower"
    much = report(module, TIMES | {"compiled": 3.6}, noise=0.02, seed=seed + 100)
    assert verdicts(module, report(module, TIMES, noise=0.02, seed=seed), much) == {
        "eager": "same",
        "compiled": "slower",
    }


def test_a_machine_that_is_slower_is_no_regression(module):
    """All contenders take twice as long, the bare loop too: it is said, and nothing is blamed."""
    before = report(module, TIMES, noise=0.02)
    now = report(module, TIMES, noise=0.02, slowness=2.0, seed=1)
    assert verdicts(module, before, now) == {"eager": "same", "compiled": "same"}
    said = module("comparing").text(before, now, ["chains"])
    assert re.search(r"the machine itself takes (1\.9|2\.0)\d to", said)


def test_what_disturbs_a_round_disturbs_its_ratio_little(module):
    """Noise that contenders of a round share does not widen the margin of their ratio."""
    measuring, comparing = module("measuring"), module("comparing")
    rounds = [1.0, 1.4] * 15
    reports = [
        MACHINE | {"spread": {"chains": measuring.spread_of({name: measuring.Figure.of(times)})}}
        for name, times in (("eager", rounds), ("eager", rounds))
    ]
    for each in reports:
        each["spread"]["chains"]["bare loop"] = each["spread"]["chains"]["eager"]
    (eager,) = (each for each in comparing.compare(*reports, ["chains"]) if each.is_ours)
    assert eager.margin == 0.0


def test_elsewhere_only_ratios_are_compared(module):
    alone = {name: time for name, time in TIMES.items() if name != "bare loop"}
    elsewhere = {"device": "another processor"}
    slower = alone | {"compiled": 6.0}
    assert verdicts(module, report(module, alone), report(module, slower))["compiled"] == "slower"
    assert verdicts(module, report(module, alone), report(module, slower, **elsewhere)) == {}
    before, now = report(module, TIMES), report(module, TIMES | {"eager": 18.0}, **elsewhere)
    assert verdicts(module, before, now) == {"eager": "slower", "compiled": "same"}
    said = module("comparing").text(before, now, ["chains"])
    assert "device a processor before, another processor now" in said


def test_figures_without_noise_are_not_judged(module):
    """… such as those of a report that is older than the spread of figures."""
    before = report(module, TIMES)
    del before["spread"]
    now = report(module, TIMES | {"compiled": 30.0})
    assert verdicts(module, before, now) == {}
    assert verdicts(module, report(module, TIMES, num_rounds=1), now) == {}
    assert "no figure with a noise" in module("comparing").text(before, now, ["chains"])


def test_the_front_page_shows_the_figures(module):
    """The README's table of speed, and the sentences below it, are what the figures give."""
    figures = json.loads((ROOT / "docs" / "benchmarks" / "cpu.json").read_text())
    shown = module("report").front_page(figures)
    assert len(re.findall(r"\d", shown)) > 50
    page = (ROOT / "README.md").read_text()
    assert shown in page, f"README.md should show\n\n{shown}"
    assert figures["device"] in page
