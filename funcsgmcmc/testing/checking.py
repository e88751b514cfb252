"""Check samplers, preconditioners and log-priors on problems that hypothesis draws and shrinks."""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

import funcsgmcmc as fs
from funcsgmcmc import checks
from funcsgmcmc.preconditioners import Preconditioner
from funcsgmcmc.priors import LogPrior
from funcsgmcmc.samplers import Sampler
from funcsgmcmc.testing import arguments
from funcsgmcmc.testing.laws import LAWS, Law
from funcsgmcmc.testing.parts import PRECONDITIONER_LAWS, PRIOR_LAWS, prior_problems
from funcsgmcmc.testing.problems import Problem, problems, shown
from funcsgmcmc.testing.specs import Refusals, SamplerSpec, spec_of
from funcsgmcmc.testing.strategies import one_chain


def _profile(max_examples: int, *phases: Phase) -> hypothesis.settings:
    """Settings of hypothesis: the same problems in every run."""
    return hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Hypothesis's explanations would take longer than to find and shrink a counterexample.
PROFILES: dict[str, hypothesis.settings] = {
    "quick": _profile(10, Phase.generate),
    "default": _profile(30, Phase.generate, Phase.shrink),
    "thorough": _profile(1_000, Phase.generate, Phase.shrink),
}
"""How many problems a law is tried on: 10, and a counterexample is not shrunk; 30; 1,000."""

Profile = str | hypothesis.settings


@dataclass(frozen=True)
class Checked:
    """What was checked, and found to hold.

    Attributes:
        name: Of the sampler, preconditioner or log-prior.
        held: Laws that were tried.
        exempt: Laws that were not, and why.
    """

    name: str
    held: tuple[str, ...]
    exempt: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.name} obeys {len(self.held)} laws"]
        lines += [f"  {name} was not tried: {reason}" for name, reason in self.exempt.items()]
        return "\n".join(lines)


def check_laws(
    sampler: SamplerSpec | Callable[..., Sampler],
    *,
    laws: Iterable[Law] = LAWS,
    profile: Profile = "default",
    seed: int = 0,
) -> Checked:
    """Check that a sampler obeys the laws of an update.

    Args:
        sampler: Its factory, or a `SamplerSpec`, which says more about it.
        laws: Which laws, at least one.
        profile: One of `PROFILES`, or settings of hypothesis.
        seed: Other seeds draw other problems.

    Returns:
        Which laws were tried, and why others were not.

    Raises:
        AssertionError: A law does not hold. Notes of the error (`__notes__`) hold the shrunk
            counterexample, and the law in words.
        TypeError, ValueError: The sampler is no factory, or has settings without a default that the
            spec does not give; or there is no such profile or law, or none to try.
        Exception: What the sampler raises, with the same notes.
    """
    spec, settings, chosen = spec_of(sampler), _settings(profile), _laws(laws)
    held: list[str] = []
    exempt: dict[str, str] = {}
    for law in chosen:
        reason = law.exemption(spec)
        if reason is None:
            check_law(law, spec, profile=settings, seed=seed)
            held.append(law.name)
        else:
            exempt[law.name] = reason
    if not held:
        raise ValueError(f"at least one law must be tried, got reasons against all: {exempt}")
    return Checked(spec.name, tuple(held), exempt)


def check_law(
    law: Law,
    sampler: SamplerSpec | Callable[..., Sampler],
    *,
    profile: Profile = "default",
    seed: int = 0,
) -> None:
    """Check that a sampler obeys one law, whether or not it says it is exempt.

    Args:
        law: The law.
        sampler: As for `check_laws`.
        profile: As for `check_laws`.
        seed: As for `check_laws`.

    Raises:
        AssertionError, TypeError, ValueError: As `check_laws`.
    """
    (law,), spec = _laws([law]), spec_of(sampler)
    _falsify(
        cases(law, spec),
        lambda case: law(case.problem, **case.drawn),
        _settings(profile),
        (spec.name, f"{law.name}: {law.statement}"),
        seed,
    )


def check_preconditioner(
    make: Callable[[TensorDict], Preconditioner],
    *,
    entrywise: bool = True,
    profile: Profile = "default",
    seed: int = 0,
) -> Checked:
    """Check a preconditioner: its gains, its Γ against autograd, and the laws of SGLD with it.

    Args:
        make: Makes it, for parameters of one chain.
        entrywise: Whether each entry's gain comes of that entry's gradients alone. Else laws of
            masked gradients and of leaves cut in two are left out.
        profile: As for `check_laws`.
        seed: As for `check_laws`.

    Returns:
        Which laws were tried, and why others were not.

    Raises:
        AssertionError, TypeError, ValueError: As `check_laws`.
    """
    checks.function("make", make)

    def made(params: TensorDict) -> st.SearchStrategy[Preconditioner]:
        preconditioner = make(one_chain(params))
        checks.instance("what make returns", preconditioner, Preconditioner)
        return st.just(preconditioner)

    spec = SamplerSpec(
        fs.sgld,
        ranges={"preconditioner": made},
        isotropic=False,
        adaptive=True,
        entrywise=entrywise,
        name=f"sgld with {getattr(make, '__name__', 'a preconditioner')}",
    )
    return check_laws(spec, laws=(*PRECONDITIONER_LAWS, *LAWS), profile=profile, seed=seed)


def check_log_prior(
    log_prior: LogPrior,
    params: TensorDictBase | Mapping[str, Tensor],
    *,
    elements: st.SearchStrategy[float] | None = None,
    profile: Profile = "default",
    seed: int = 0,
) -> Checked:
    """Check a log-prior: that it is a pure scalar, may be vmapped, and has the gradient it seems.

    Args:
        log_prior: log p(w) of one chain's parameters, which it is given in float64.
        params: Parameters it takes; only their structure matters.
        elements: Where their entries are drawn from (default: between −4 and 4), for a prior of
            positive numbers, say.
        profile: As for `check_laws`.
        seed: As for `check_laws`.

    Returns:
        Which laws were tried.

    Raises:
        AssertionError: A law does not hold; with notes as for `check_laws`.
        TypeError, ValueError: The log-prior does not return a real scalar; or params are no tree,
            or there is no such profile.
    """
    checks.function("log_prior", log_prior)
    template, settings = checks.parameters(params).double(), _settings(profile)
    arguments.one_chain("params", template.batch_size)
    if elements is not None:
        checks.instance("elements", elements, st.SearchStrategy)
    name = getattr(log_prior, "__name__", type(log_prior).__name__)
    for law in PRIOR_LAWS:
        words = (name, f"{law.__name__}: {law.__doc__}")
        _falsify(prior_problems(log_prior, template, elements), law, settings, words, seed)
    return Checked(name, tuple(law.__name__ for law in PRIOR_LAWS), {})


@dataclass(frozen=True)
class Case:
    """A problem, and what else a law needs."""

    problem: Problem
    drawn: Mapping[str, Any]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis prints it."""
        drawn = "".join(f", {name}={shown(value)}" for name, value in self.drawn.items())
        printer.text(repr(self.problem) + drawn)


@st.composite
def cases(draw: st.DrawFn, law: Law, spec: SamplerSpec) -> Case:
    """What a law is tried on."""
    problem = draw(problems(spec, **law.restricted))
    further = law.further(problem)
    return Case(problem, {name: draw(strategy) for name, strategy in further.items()})


def _laws(laws: Iterable[Law]) -> tuple[Law, ...]:
    """Check that laws are given.

    Raises:
        TypeError: They are no laws.
        ValueError: There is none.
    """
    if not isinstance(laws, Iterable):
        raise TypeError(f"laws must be laws of funcsgmcmc.testing.laws, got {laws!r}")
    chosen = tuple(laws)
    for law in chosen:
        checks.instance("a law", law, Law)
    if not chosen:
        raise ValueError("laws must hold at least one law, got none")
    return chosen


def _settings(profile: Profile) -> hypothesis.settings:
    """Look a profile up."""
    if isinstance(profile, hypothesis.settings):
        return profile
    return PROFILES[checks.choice("profile", profile, tuple(PROFILES))]


# From its eleventh example on, hypothesis mostly puts parts of one example into another: of thirty
# in one go it would draw six afresh.
_AFRESH = 10


def _falsify(
    examples: st.SearchStrategy[Any],
    law: Callable[[Any], None],
    settings: hypothesis.settings,
    words: tuple[str, str],
    seed: int,
) -> None:
    """Look for an example that breaks a law, among others for every law and seed."""
    subject, statement = words
    checks.count("seed", seed, minimum=0)
    with _float64():
        try:
            for start in range(0, settings.max_examples, _AFRESH):
                number = min(_AFRESH, settings.max_examples - start)
                some = hypothesis.settings(settings, max_examples=number)
                chosen = f"{subject} {statement} {seed} {start}"
                _try(examples, law, some, zlib.crc32(chosen.encode()))
        except AssertionError as error:
            error.add_note(f"{subject} does not obey {statement}")
            raise
        except Exception as error:
            error.add_note(f"{subject} could not be tried on {statement}")
            raise


def _try(
    examples: st.SearchStrategy[Any],
    law: Callable[[Any], None],
    settings: hypothesis.settings,
    seed: int,
) -> None:
    """Have hypothesis try a law on examples."""

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(examples)
    def obeys(case: Any) -> None:
        law(case)

    obeys()


@contextmanager
def _float64() -> Iterator[None]:
    """Make float64 the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


SHARED_REFUSED: Refusals = (
    ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
    ({"lr": math.nan}, "lr must be >= 0, got nan"),
    ({"lr": math.inf}, "lr must be finite, got inf"),
    ({"nbeta": -1.0}, "nbeta must be >= 0, got -1"),
    ({"temperature": -1.0}, "temperature must be >= 0, got -1"),
    ({"localization": -1.0}, "localization must be >= 0"),
    ({"weight_decay": math.nan}, "weight_decay must be >= 0, got nan"),
    ({"bounding_box_size": 0.0}, "bounding_box_size must be > 0, got 0"),
    ({"lr": torch.tensor([0.1, -1.0])}, "lr must be >= 0, got -1 for chain 1"),
    (
        {"lr": torch.ones(2), "nbeta": torch.ones(3)},
        "must agree on the number of chains, got 2 for lr and 3 for nbeta",
    ),
    ({"mask": {"w": torch.tensor([math.nan])}}, r"mask\['w'\] must be finite"),
    ({"anchor": {"w": torch.tensor([math.nan])}}, r"anchor\['w'\] must be finite"),
)
"""Settings that every sampler must refuse with a ValueError, and a pattern for its message."""


def check_refusals(sampler: SamplerSpec | Callable[..., Sampler]) -> None:
    """Check that a sampler's factory refuses bad settings, its own (`refused`) and those of all.

    Raises:
        AssertionError: It takes one, or its message does not name the rule and the value.
    """
    spec = spec_of(sampler)
    shared = [
        (settings, pattern)
        for settings, pattern in SHARED_REFUSED
        if all(spec.takes(name) for name in settings)
        and (spec.per_chain or not any(map(_is_per_chain, settings.values())))
    ]
    for settings, pattern in (*shared, *spec.refused):
        try:
            spec.make(**{"lr": 0.1, "nbeta": 1.0, **spec.settings, **settings})
        except Exception as error:
            if not isinstance(error, ValueError):
                error.add_note(f"{spec.name} must refuse {settings} with a ValueError: {pattern}")
                raise
            if re.search(pattern, str(error)) is None:
                raise AssertionError(
                    f"{spec.name} refuses {settings} with {str(error)!r}, not with {pattern!r}"
                ) from error
        else:
            raise AssertionError(f"{spec.name} takes {settings}; it must say {pattern!r}")


def _is_per_chain(value: Any) -> bool:
    """Whether a setting has a value for each chain."""
    return isinstance(value, Tensor) and value.ndim > 0
