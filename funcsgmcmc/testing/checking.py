"""Try samplers, preconditioners and log-priors on problems that hypothesis draws and shrinks."""

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
from funcsgmcmc import checks, tree
from funcsgmcmc.preconditioners import Preconditioner
from funcsgmcmc.priors import LogPrior
from funcsgmcmc.samplers import Sampler
from funcsgmcmc.testing import arguments
from funcsgmcmc.testing.laws import LAWS, Law
from funcsgmcmc.testing.laws.preconditioners import PRECONDITIONER_LAWS
from funcsgmcmc.testing.laws.priors import PRIOR_LAWS, prior_problems
from funcsgmcmc.testing.problem import Problem, format_value, problems
from funcsgmcmc.testing.specs import Refusals, SamplerSpec, spec_of
from funcsgmcmc.testing.strategies import one_chain


def _profile(max_examples: int, *phases: Phase) -> hypothesis.settings:
    """Settings of hypothesis under which every run tries the same problems."""
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
"""Settings of hypothesis that try a law on 10 problems, without shrinking; on 30; on 1,000."""

Profile = str | hypothesis.settings


@dataclass(frozen=True)
class Checked:
    """The result of a check in which no law failed.

    Attributes:
        name: The name of the sampler, preconditioner or log-prior.
        held: The laws that were tried, and held.
        exempt: The laws that were not tried, each with the reason.
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
        sampler: The sampler's factory, or a `SamplerSpec`, which lets laws try more.
        laws: The laws to try, at least one.
        profile: One of `PROFILES`, or settings of hypothesis.
        seed: Selects the problems; the same seed gives the same.

    Returns:
        The laws that were tried, and the reasons why others were not.

    Raises:
        AssertionError: A law does not hold. Notes of the error (`__notes__`) hold the shrunk
            counterexample, and the law in words.
        TypeError, ValueError: The sampler is no factory, or has settings without a default that the
            spec does not give; or there is no such profile or law, or none to try.
        Exception: An exception from the sampler, with the same notes.
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
    """Check that a sampler obeys one law, even if its spec says that it is exempt.

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
        lambda case: law(case.problem, **case.arguments),
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
        make: `make(params) -> preconditioner`, for parameters of one chain.
        entrywise: Whether each entry's gain depends on that entry's gradients alone. If not, laws
            of masked gradients and of leaves cut in two are left out.
        profile: As for `check_laws`.
        seed: As for `check_laws`.

    Returns:
        As `check_laws`.

    Raises:
        AssertionError, TypeError, ValueError: As `check_laws`.
    """
    checks.function("make", make)

    def make_for(params: TensorDict) -> st.SearchStrategy[Preconditioner]:
        preconditioner = make(one_chain(params))
        checks.instance("what make returns", preconditioner, Preconditioner)
        return st.just(preconditioner)

    spec = SamplerSpec(
        fs.sgld,
        ranges={"preconditioner": make_for},
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
    """Check that a log-prior is a pure scalar, maps over chains, and has its density's gradient.

    Args:
        log_prior: log p(w) of one chain's parameters, in float64.
        params: Parameters of the structure that the log-prior takes; their values do not matter.
        elements: The strategy of entries, say of positive numbers; by default between −4 and 4.
        profile: As for `check_laws`.
        seed: As for `check_laws`.

    Returns:
        The laws that were tried.

    Raises:
        AssertionError: A law does not hold; with notes as for `check_laws`.
        TypeError, ValueError: The log-prior does not return a real scalar; or params are no tree,
            or there is no such profile.
    """
    checks.function("log_prior", log_prior)
    template, settings = tree.parameters(params).double(), _settings(profile)
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
    """A problem, and the further arguments of a law."""

    problem: Problem
    arguments: Mapping[str, Any]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the case in hypothesis's reports."""
        named = (f", {name}={format_value(value)}" for name, value in self.arguments.items())
        printer.text(repr(self.problem) + "".join(named))


@st.composite
def cases(draw: st.DrawFn, law: Law, spec: SamplerSpec) -> Case:
    """Cases to try a law on."""
    problem = draw(problems(spec, **law.restrictions))
    strategies = law.arguments(problem)
    return Case(problem, {name: draw(strategy) for name, strategy in strategies.items()})


def _laws(laws: Iterable[Law]) -> tuple[Law, ...]:
    """Check that a collection holds laws, and is not empty.

    Raises:
        TypeError: It is no collection, or holds something else than laws.
        ValueError: It is empty.
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
    """Look up the settings of a profile."""
    if isinstance(profile, hypothesis.settings):
        return profile
    return PROFILES[checks.choice("profile", profile, tuple(PROFILES))]


# After ten examples hypothesis mostly recombines earlier ones: of thirty in one go, only six of the
# last twenty would be new. So it starts again after every ten.
_AT_ONCE = 10


def _falsify(
    examples: st.SearchStrategy[Any],
    law: Callable[[Any], None],
    settings: hypothesis.settings,
    words: tuple[str, str],
    seed: int,
) -> None:
    """Look for an example that breaks a law; subject, law and seed decide which are tried."""
    subject, statement = words
    checks.count("seed", seed, minimum=0)
    with _float64():
        try:
            for start in range(0, settings.max_examples, _AT_ONCE):
                number = min(_AT_ONCE, settings.max_examples - start)
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
    """Try a law on examples that hypothesis draws, from one seed."""

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(examples)
    def obeys(case: Any) -> None:
        law(case)

    obeys()


@contextmanager
def _float64() -> Iterator[None]:
    """Make float64 the default dtype meanwhile."""
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
"""Settings that every sampler must refuse with a ValueError, with patterns for the messages."""


def check_refusals(sampler: SamplerSpec | Callable[..., Sampler]) -> None:
    """Check that a factory refuses bad settings: its own (`refused`), and those of all samplers.

    Args:
        sampler: A factory, or its spec.

    Raises:
        AssertionError: The factory takes a bad setting, or the error's message has another form.
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
    """Whether a setting has one value a chain."""
    return isinstance(value, Tensor) and value.ndim > 0
