"""The benchmark of known learning coefficients: values at nβ, figures, files, and itself."""

import importlib
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

TRUTH = Path(__file__).parents[1] / "benchmarks" / "truth"


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(TRUTH))
    return importlib.import_module


@pytest.fixture
def values(module, monkeypatch):
    """The module of values, with shorter runs."""
    found = module("values")
    monkeypatch.setattr(found, "NUM_RISES", 20)
    monkeypatch.setattr(found, "NUM_MOVES", 40)
    return found


@pytest.mark.parametrize("scale", [0.3, 20.0, 1e4])
def test_values_of_monomials(values, scale):
    """κ z²: a Gaussian. κ x² y²: one variable is integrated out, the other summed over."""
    value = values.monomial_value
    assert value((1,), scale) == pytest.approx(scale / (1 + 2 * scale), rel=1e-9)
    x = torch.linspace(-9, 9, 400_001)
    other = scale * x**2
    weight = torch.exp(-(x**2) / 2) * (1 + 2 * other) ** -0.5
    expected = (weight * other / (1 + 2 * other)).sum() / weight.sum()
    assert value((1, 1), scale) == pytest.approx(float(expected), rel=1e-9)
    assert value((1, 2, 3), scale) == pytest.approx(value((3, 1, 2), scale), rel=1e-9)


def test_values_of_networks_of_width_one_are_those_of_monomials(values):
    """(1/2) nβ Π wᵢ², by the same pull: κ is nβ/2 over γ to the number of layers."""
    for layers in (2, 3):
        found = values.network_value((1,) * (layers + 1), 0, 3000.0, 1.5, 0)
        expected = values.monomial_value((1,) * layers, 1500.0 / 1.5**layers)
        assert abs(found["value"] - expected) < 3 * found["value_error"] < 0.1 * expected


@pytest.mark.parametrize("widths", [(5, 2, 3, 4), (2, 5, 3), (4, 3, 2, 4)])
def test_values_of_networks_do_not_depend_on_the_order_of_widths(values, widths):
    """Against plain weights e^(−nβ L) of draws from the pull's Gaussian, in the widths' order."""
    nbeta, localization = 6.0, 2.0
    found = values.network_value(widths, 0, nbeta, localization, 0)
    generator = torch.Generator().manual_seed(0)
    product = None
    for before, after in pairwise(widths):
        layer = torch.randn(100_000, after, before, generator=generator) / localization**0.5
        product = layer if product is None else layer @ product
    loss = nbeta * product.square().sum((-2, -1)) / 2
    weight = torch.softmax(-loss, 0)
    expected = float(weight @ loss)
    error = float((weight * (loss - expected)).square().sum().sqrt())
    assert abs(found["value"] - expected) < 3 * math.hypot(error, found["value_error"])
    assert error < 0.03 * expected
    below = values.network_value(widths, 0, nbeta / math.e, localization, 1)
    assert found["slope"] == pytest.approx(found["value"] - below["value"], abs=0.05 * expected)


def test_a_rank_adds_its_regular_directions(values):
    network_value = values.network_value
    # The singular block is empty: half of the regular directions, exactly.
    assert network_value((6, 3, 5), 3, 1e4, 5.0, 0)["value"] == 3 * (6 + 5 - 3) / 2
    block = network_value((4, 2, 3), 0, 1e4, 5.0, 0)["value"]
    assert network_value((6, 4, 5), 2, 1e4, 5.0, 0)["value"] == 2 * (6 + 5 - 2) / 2 + block
    assert network_value((50, 45, 48), 1, 1e4, 50.0, 0)["value"] is None  # too much work


def test_networks(module):
    known = module("known")
    network = known.Network((6, 4, 7, 5), 3)
    anchor = network.anchor(torch.Generator().manual_seed(0))
    for layer in (*network.layers(anchor), network.product(anchor)):
        expected = torch.tensor([1.0] * 3 + [0.0] * (min(layer.shape) - 3))
        torch.testing.assert_close(torch.linalg.svdvals(layer), expected)
    weights = {"w": anchor + 0.1 * torch.randn(anchor.shape)}
    target = network.product(anchor)
    inputs = torch.randn(11, 6)
    errors = inputs @ (network.product(weights["w"]) - target).T
    found = network.loss_on_inputs(target)(weights, inputs)
    torch.testing.assert_close(found, errors.square().sum(1).mean() / 2)
    whitened = known.whitened(300, 6, torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(whitened.T @ whitened / 300, torch.eye(6), atol=1e-6, rtol=0)
    on_all = network.loss_on_inputs(target)(weights, whitened)
    torch.testing.assert_close(on_all, network.loss_at(target)(weights, None), rtol=1e-5, atol=0)


def test_groups(module):
    """As many as announced, each with a name of its own; networks drawn within their bounds."""
    groups = module("known").GROUPS
    made = {
        name: [group.make(index) for index in range(group.size)] for name, group in groups.items()
    }
    assert {name: len(problems) for name, problems in made.items()} == {
        "monomials": 5,
        "separable": 5,
        "reduced rank": 12,
        "small": 100,
        "deep": 30,
        "compared": 8,
        "small, minibatches": 100,
        "deep, minibatches": 30,
    }
    for problems in made.values():
        assert len({problem.name for problem in problems}) == len(problems)
    for name, layers, width in (("small", 5, 50), ("deep", 10, 100)):
        drawn = [problem.shape for problem in made[name]]
        assert {len(widths) - 1 for widths, _ in drawn} == set(range(2, layers + 1))
        assert all(min(widths) >= 5 and max(widths) <= width for widths, _ in drawn)
        assert all(0 <= rank <= min(widths) for widths, rank in drawn)
        assert [p.name for p in made[f"{name}, minibatches"]] == [p.name for p in made[name]]
    widths, rank = zip(*(p.shape for p in made["reduced rank"]), strict=True)
    cases = [
        (m + h < n + r, n + h < m + r, n + m < h + r)
        for (n, h, m), r in zip(widths, rank, strict=True)
    ]
    each = [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
    assert cases == [case for case in each for _ in range(3)]


def line(index, mean, error, warnings=(), truth=10.0, kind="estimate"):
    return {
        "kind": kind,
        "group": "small",
        "index": index,
        "truth": truth,
        "rank": 1,
        "mean": mean,
        "corrected": mean and mean - 0.1,
        "error": error,
        "warnings": list(warnings),
    }


def value(index, number, ess=5000.0, rhat=1.0, slope=0.0):
    found = line(index, None, None, kind="value")
    found |= {"value": number, "value_error": 0.01, "leeway": 0.4}
    return found | {"ess": ess, "rhat": rhat, "slope": slope}


def test_figures(module):
    compare = module("compare")
    lines = [
        line(3, 8.0, 0.3, ["drift"]),
        line(0, 10.1, 0.1),
        line(1, 9.8, 0.2),
        line(2, 8.5, 0.1),
        value(0, 9.8),
        value(1, 9.9, slope=0.2),
        value(2, 8.4, ess=900.0),
        value(3, 8.4, slope=0.3),
        value(4, 10.0, rhat=1.2),
        line(4, 10.0, 0.1),
    ]
    found = compare.comparisons(lines, "small")
    assert [one.value for one in found] == [9.8, 9.9, None, None, None]
    assert found[1].value_error == pytest.approx(math.hypot(0.01, 0.08))
    figures = compare.figures(found)
    assert (figures.number, figures.known, figures.warned) == (5, 2, 1)
    assert figures.median == pytest.approx(0.02)
    assert figures.high == pytest.approx(0.2)
    assert figures.share_within == 0.5  # 10.1 is three errors from 9.8
    assert figures.median_known == pytest.approx((0.3 / 9.8 + 0.1 / 9.9) / 2)
    assert figures.median_corrected == pytest.approx((0.2 / 9.8 + 0.2 / 9.9) / 2)
    assert figures.median_error == pytest.approx(0.01)
    assert (figures.far, figures.far_silent, figures.far_wrong) == (2, 1, 2)


def test_a_run_goes_on_with_what_is_missing(module, tmp_path):
    run = module("run")
    path = tmp_path / "truth.jsonl"
    job, other = run.Job("value", "monomials", 0), run.Job("value", "monomials", 1)
    line = run.run_job(job)
    changed = run.run_job(other)
    changed["settings"]["nbeta"] += 1
    whole = json.dumps(line) + "\n" + json.dumps(changed) + "\n"
    path.write_text(whole + '{"kind": "val')  # killed while it wrote
    lines = run.read(path)
    assert path.read_text() == whole
    assert run.line_of(job, lines) == json.loads(json.dumps(line))
    assert run.line_of(other, lines) is None
    assert run.read(tmp_path / "nothing.jsonl") == []


def test_a_job_that_fails_takes_no_other_with_it(module, tmp_path):
    run = module("run")
    path = tmp_path / "made" / "truth.jsonl"
    good = run.Job("value", "monomials", 0)
    bad = run.Job("published", "monomials", 0)  # which is no network
    with pytest.raises(ExceptionGroup, match="all others are done") as caught:
        run.run([bad, good], path, workers=1)
    assert "published" in caught.value.exceptions[0].__notes__[-1]
    (line,) = run.read(path)
    assert line["kind"] == "value"
    assert run.run([good], path, workers=1) == [line]  # nothing to do


@pytest.mark.slow
def test_estimates_are_right(tmp_path):
    """The quick mode, in processes of its own, as a user runs it."""
    command = [sys.executable, TRUTH / "run.py", "--quick", "--results", tmp_path]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(text) for text in (tmp_path / "truth-quick.jsonl").read_text().splitlines()]
    values = {(line["group"], line["index"]): line for line in lines if line["kind"] == "value"}
    estimates = [line for line in lines if line["kind"] == "estimate"]
    assert len(estimates) == 11
    for line in estimates:
        value = values[line["group"], line["index"]]
        expected = line["truth"] if value["value"] is None else value["value"]
        assert abs(line["mean"] - expected) < 3 * math.hypot(line["error"], value["value_error"])
        assert line["mean"] == pytest.approx(expected, rel=0.05)
        assert line["frozen"] == 0
        if line["group"] in ("monomials", "separable"):
            assert line["mean"] == pytest.approx(expected, rel=0.02)
            # At this nβ some are off the limit λ, and say so; the value is at the same nβ.
            assert all("as nβ grows by a factor e" in warning for warning in line["warnings"])
