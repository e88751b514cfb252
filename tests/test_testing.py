"""`funcsgmcmc.testing` itself: what it finds, how small it makes it, and what it refuses."""

import math
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from tensordict import TensorDict

import funcsgmcmc as fs
import users
from funcsgmcmc import tree
from funcsgmcmc.preconditioners import identity
from funcsgmcmc.schedules import cosine
from funcsgmcmc.testing import (
    LAWS,
    PROFILES,
    SPECS,
    Given,
    Problem,
    SamplerSpec,
    check_law,
    check_laws,
    check_log_prior,
    check_preconditioner,
    check_refusals,
    check_stationary,
    law,
    laws,
    strategies,
)

UNSHRUNK = hypothesis.settings(PROFILES["default"], phases=[Phase.generate])
PAGE = Path(__file__).parents[1] / "docs" / "testing.md"


@pytest.mark.slow
def test_a_sampler_may_keep_its_last_noise_in_its_state():
    """Leimkuhler–Matthews obeys the laws, and has its law: at temperature 0 the noise is kept."""
    found = check_laws(users.leimkuhler_matthews)
    assert "zero_temperature" not in str(found)  # it was tried
    sampler = users.leimkuhler_matthews(0.3, nbeta=1.0)
    assert check_stationary(sampler, num_steps=400).smallest_noise_error < 0.02


def test_zero_temperature_names_the_leaf_that_differs():
    with pytest.raises(AssertionError, match=r"params\['\w+'\] after step \d, at temp"):
        check_law(laws.zero_temperature, users.broken(users.IsNeverCold), profile=UNSHRUNK)


@pytest.mark.parametrize(
    ("kind", "found_by"),
    [
        (users.WritesToNoise, "purity"),
        (users.SharesParams, "ownership"),
        (users.DrawsItself, "purity"),
        (users.WidensParams, "kinds_are_kept"),
        (users.ForgetsItsStep, "kinds_are_kept"),
        (users.SquaresGradients, "finiteness"),
        (users.RoundsTwice, "narrow_leaves_are_rounded_once"),
        (users.SwapsItsTerms, "terms_are_what_they_are_called"),
        (users.MislabelsTheGradient, "terms_are_what_they_are_called"),
        (users.StaysOnTheCPU, "devices_are_kept"),
        (users.UsesOneMask, "vmap_is_a_loop"),
        (users.MovesWithoutStep, "zero_step_size"),
        (users.IsNeverCold, "zero_temperature"),
        (users.HasHalfABoxMore, "box"),
        (users.ReportsHalfOfTheNoise, "terms_add_up"),
        (users.CubesNoise, "linearity_in_noise"),
        (users.CountsInFloat16, "oracle_is_followed"),
        (users.MixesChains, "vmap_is_a_loop"),
        (users.MixesChains, "chunks_and_order"),
        (users.SpreadsFailures, "failures_stay_in_their_chain"),
        (users.LooksAhead, "schedules_are_followed"),
        (users.SharesNoiseOfLeaves, "splitting_a_leaf"),
        (users.SharesNoiseOfLeaves, "names_and_order_of_leaves"),
        (users.ClipsEntries, "rotation"),
        (users.ClipsEntries, "scale_of_the_loss"),
        (users.ClipsEntries, "units_of_length"),
        (users.CubesNoise, "oracle_is_followed"),
        (users.PullsAtDoubleStrength, "pulls_are_the_priors_gradient"),
        (users.PullsToWhereItIs, "pulls_are_the_priors_gradient"),
        (users.MakesAnAnchor, "kinds_are_kept"),
        (users.StartsHot, "zero_temperature"),
        (users.StartsLate, "schedules_are_followed"),
        (users.TiresAfterFiveSteps, "oracle_is_followed"),
    ],
)
def test_a_broken_sampler_breaks_a_law(kind, found_by):
    spec = users.broken(kind)
    (its_law,) = [each for each in LAWS if each.name == found_by]
    right = spec.name.removeprefix("broken_")
    check_law(its_law, SPECS[right], profile="quick")
    with pytest.raises(AssertionError) as caught:
        check_law(its_law, spec, profile=UNSHRUNK)
    assert caught.value.__notes__[-1].startswith(f"broken_{right} does not obey {found_by}: ")


def problem_of(error: BaseException) -> str:
    """The counterexample that hypothesis reports."""
    (note,) = [note for note in error.__notes__ if "case=" in note]
    return note


@pytest.mark.parametrize(
    "kind", [users.CubesNoise, users.ClipsEntries, users.PullsAtDoubleStrength, users.LooksAhead]
)
def test_counterexamples_are_small(kind):
    with pytest.raises(AssertionError) as caught:
        check_law(laws.oracle_is_followed, users.broken(kind))
    shown = problem_of(caught.value)
    params = re.search(r"params (.*)", shown).group(1)
    assert len(re.findall(r"-?\d+\.\d+", params)) <= 2
    assert shown.count("step ") <= 2


def test_all_laws_are_checked_and_the_exempt_named():
    checked = check_laws(fs.sgld, profile="quick")
    names = {each.name for each in LAWS}
    assert {*checked.held, *checked.exempt} == names
    assert checked.exempt["oracle_is_followed"] == "no oracle_step is given"
    assert "oracle_is_followed was not tried: no oracle_step is given" in str(checked)


def test_the_default_dtype_is_left_alone():
    torch.set_default_dtype(torch.float32)
    check_law(laws.purity, fs.sgld, profile="quick")
    with pytest.raises(AssertionError):
        check_law(laws.purity, users.broken(users.WritesToNoise), profile="quick")
    assert torch.get_default_dtype() == torch.float32


def test_a_law_of_ones_own():
    @law(nbeta=0.0)
    def never(problem):
        """No parameter is above one."""
        assert (tree.flatten(problem.params) <= 1).all()

    with pytest.raises(AssertionError) as caught:
        check_law(never, fs.sgld)
    assert "never: No parameter is above one." in caught.value.__notes__[-1]
    shown = problem_of(caught.value)
    assert "nbeta=0.0" in shown
    assert len(re.findall(r"-?\d+\.\d+", re.search(r"params (.*)", shown).group(1))) == 1


def some(strategy, predicate):
    """An example that the strategy draws."""
    quiet = hypothesis.settings(
        max_examples=2_000, database=None, suppress_health_check=list(HealthCheck)
    )
    return hypothesis.find(strategy, predicate, settings=quiet)


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda params: any(leaf.ndim == 0 for _, leaf in tree.leaves(params)),
        lambda params: any(leaf.numel() == 0 for _, leaf in tree.leaves(params)),
        lambda params: any(isinstance(name, tuple) for name in tree.names(params)),
        lambda params: {leaf.dtype for _, leaf in tree.leaves(params)} >= {*DTYPES[:2]},
        lambda params: tree.noise_dtype(params) == torch.float32,
        lambda params: any(leaf.dtype == torch.bfloat16 for _, leaf in tree.leaves(params)),
        lambda params: tree.size(params) >= 6,
    ],
)
def test_trees_are_of_all_kinds(predicate):
    found = some(strategies.trees(dtypes=DTYPES), predicate)
    assert predicate(found)
    assert tree.size(found) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_of_all_sizes(dtype):
    limits = torch.finfo(dtype)
    numbers = strategies.any_numbers(dtype)
    for predicate in (
        lambda x: 0 < abs(x) < limits.smallest_normal,
        lambda x: abs(x) > limits.max**0.25 / 2,
        lambda x: x == 0 and math.copysign(1, x) == -1,
    ):
        some(numbers, predicate)
        as_stored = st.builds(lambda x: float(torch.tensor(x, dtype=dtype)), numbers)
        some(as_stored, predicate)


def test_samplers_of_every_kind():
    params = TensorDict({"w": torch.zeros(3, 2)}, batch_size=3)
    kinds = {type(spec.make(0.1, nbeta=1.0, **spec.settings)) for spec in SPECS.values()}
    drawn: list[fs.samplers.Sampler] = []

    @hypothesis.settings(max_examples=300, database=None)
    @hypothesis.given(strategies.samplers(params))
    def collect(sampler):
        drawn.append(sampler)

    collect()
    assert {type(sampler) for sampler in drawn} == kinds
    assert {sampler.shape for sampler in drawn} == {(), (3,)}
    assert {sampler.mask is None for sampler in drawn} == {True, False}


def test_chunkings_cut_all_chains():
    @hypothesis.given(st.data())
    def cuts(data):
        count = data.draw(st.integers(1, 9))
        sizes = data.draw(strategies.chunkings(count))
        assert sum(sizes) == count
        assert min(sizes) > 0

    cuts()
    assert len(some(strategies.chunkings(6), lambda sizes: len(sizes) == 4)) == 4


def test_problems_are_drawn_afresh():
    seen = []

    @law()
    def collect(problem):
        """Nothing."""
        sizes = [tuple(leaf.shape) for _, leaf in tree.leaves(problem.params)]
        seen.append((tuple(problem.chains), *sizes, len(problem.given), problem.first_step))

    check_law(collect, SPECS["badoda"])
    assert len(seen) == 30
    assert len(set(seen)) >= 22
    assert {first_step for *_, first_step in seen} == {0, 5, 1000}


def test_problems_print_as_settings_and_numbers():
    params = TensorDict(
        {"w": torch.tensor([0.5]), "v": TensorDict({"b": torch.ones(1).bfloat16()})}
    )
    given = Given(fs.samplers.Evaluation(params, loss=torch.tensor(2.0)), params)
    settings = {
        "lr": cosine(0.1, num_steps=3),
        "nbeta": 2.0,
        "mask": params,
        "anchor": None,
    }
    shown = "{w: [0.5], v.b: [1.0] bfloat16}"
    assert repr(Problem(SPECS["sgld"], settings, params, params, (given,))) == (
        "Problem(\n"
        f"    sgld(lr=Cosine(start=0.1, end=0.0, num_steps=3.0), nbeta=2.0, mask={shown})\n"
        f"    params {shown}\n"
        f"    start {shown}\n"
        f"    step 0: grads {shown}, loss 2.0, noise {shown}\n"
        ")"
    )


def test_a_right_sampler_of_few_settings_passes():
    spec = SamplerSpec(
        users.heavy_ball,
        per_chain=False,
        schedulable=(),
        oracle_step=users.heavy_ball_step,
        units={"lr": (-1, 2)},
        isotropic=True,
    )
    checked = check_laws(spec, profile="quick")
    assert checked.exempt.keys() == {
        "zero_temperature",
        "masked_entries_stay",
        "masked_entries_are_not_seen",
        "mask_of_ones",
        "box",
        "units_of_energy",
    }


def test_settings_of_the_spec_are_kept_and_laws_of_others_left_out():
    seen = set()

    def picky(lr, *, nbeta, temperature=1.0, localization=0.0, weight_decay=0.0):
        if not lr > 0 or localization != 2.0:
            raise ValueError(f"got lr {lr} and localization {localization}")
        seen.add(localization)
        return fs.sgld(
            lr,
            nbeta=nbeta,
            temperature=temperature,
            localization=localization,
            weight_decay=weight_decay,
        )

    spec = SamplerSpec(
        picky,
        settings={"localization": 2.0},
        ranges={"lr": (0.1, 1.0)},
        per_chain=False,
        schedulable=(),
        units={"lr": (-1, 2)},
    )
    some_laws = (laws.zero_step_size, laws.pulls_are_the_priors_gradient)
    checked = check_laws(
        spec, laws=[*some_laws, laws.terms_are_what_they_are_called, laws.terms_add_up]
    )
    assert checked.exempt == {
        "zero_step_size": "its lr is never 0.0",
        "pulls_are_the_priors_gradient": "its localization is never 0.0",
    }
    assert seen == {2.0}
    with pytest.raises(ValueError, match="at least one law must be tried, got reasons against all"):
        check_laws(spec, laws=some_laws)


def test_a_preconditioner_of_the_spec_is_kept():
    def always_preconditioned(lr, *, nbeta, preconditioner):
        if preconditioner is None:
            raise ValueError("preconditioner is needed, got None")
        return fs.sgld(lr, nbeta=nbeta, preconditioner=preconditioner)

    spec = SamplerSpec(always_preconditioned, settings={"preconditioner": identity()})
    checked = check_laws(
        spec, laws=[laws.terms_are_what_they_are_called, laws.rotation], profile="quick"
    )
    assert checked.exempt == {"rotation": "its preconditioner is never None"}


def test_errors_that_are_no_findings_say_so():
    def never(lr, *, nbeta):
        raise ZeroDivisionError("no such thing")

    with pytest.raises(ZeroDivisionError) as caught:
        check_law(laws.purity, never)
    assert caught.value.__notes__[-1].startswith("never could not be tried on purity: `init`")


def test_refusals_for_each_chain_are_not_asked_of_shared_settings():
    def shared(lr, *, nbeta):
        return fs.sgld(float(lr), nbeta=float(nbeta))

    check_refusals(SamplerSpec(shared, per_chain=False))
    with pytest.raises(AssertionError, match="shared refuses"):
        check_refusals(shared)


def test_a_right_preconditioner_of_whole_leaves_passes():
    checked = check_preconditioner(users.layerwise, entrywise=False, profile="quick")
    assert checked.exempt["splitting_a_leaf"] == "it is not entrywise"
    with pytest.raises((AssertionError, RuntimeError)):
        check_preconditioner(users.layerwise, profile="quick")


@pytest.mark.parametrize(
    ("log_prior", "elements"),
    [
        (lambda params: -params["w"].abs().sum(), None),
        (lambda params: (2 * params["w"].log() - params["w"]).sum(), st.floats(0.1, 5)),
        (lambda params: -params["block"]["w"].square().sum() / 2, None),
    ],
    ids=["laplace", "gamma", "nested"],
)
def test_right_log_priors_pass(log_prior, elements):
    params = {"w": torch.ones(2), "block": {"w": torch.ones(3)}}
    check_log_prior(log_prior, params, elements=elements)


# Preconditioners and log-priors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (users.wrong_gamma, "corrections_are_the_gains_derivatives"),
        (lambda params: users.NegativeGain(lock=False), "gains_are_scales"),
    ],
)
def test_a_broken_preconditioner_is_found(make, message):
    with pytest.raises(AssertionError) as caught:
        check_preconditioner(make)
    assert message in caught.value.__notes__[-1]


def writes(params):
    params["w"].mul_(2.0)
    return -params["w"].square().sum()


@pytest.mark.parametrize(
    ("log_prior", "error", "message"),
    [
        (writes, AssertionError, "wrote to the parameters|the same log p twice"),
        (lambda params: -params["w"].log().sum(), AssertionError, "log p is"),
        (lambda params: -params["w"].detach().square().sum(), AssertionError, "slope of log p"),
        (
            lambda params: -(params["w"] ** 2).sqrt().sum(),
            AssertionError,
            "slope of log p is -?nan",
        ),
        (lambda params: torch.randn(()) - params["w"].sum(), AssertionError, "same log p twice"),
        (lambda params: -params["w"], ValueError, "log_prior must return a scalar"),
        (lambda params: -params["w"].sum().item(), TypeError, "log_prior must return a"),
        (
            lambda params: -params["w"].sum() * (1 if params["w"].sum() > 0 else 2),
            RuntimeError,
            "vmap",
        ),
    ],
)
def test_a_broken_log_prior_is_found(log_prior, error, message):
    with pytest.raises(error, match=message):
        check_log_prior(log_prior, {"w": torch.zeros(2)})


# The documentation, and the extra.


def test_the_page_lists_the_laws():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(each.name, each.statement) for each in LAWS]


def test_without_the_extra_it_is_named():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "try:\n    import funcsgmcmc.testing\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "funcsgmcmc.testing needs hypothesis, which is not installed: "
        "pip install 'funcsgmcmc[test]'"
    )
