"""Problems: a sampler with its settings, where its chains start, and what its steps are given."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.preconditioners import Preconditioner
from funcsgmcmc.samplers import Evaluation, Sampler, State
from funcsgmcmc.schedules import Schedule
from funcsgmcmc.terms import Terms
from funcsgmcmc.testing import strategies
from funcsgmcmc.testing.specs import SPECS, SamplerSpec, spec_of

TreeMap = Callable[[TensorDict], TensorDict]


class Given(NamedTuple):
    """What one step is given.

    Attributes:
        evaluation: Gradients, and whatever else is known of the potential.
        noise: η.
    """

    evaluation: Evaluation
    noise: TensorDict

    def map(
        self, function: TreeMap, of_numbers: Callable[[Tensor], Tensor] = lambda value: value
    ) -> "Given":
        """Apply a function to every tree, and another to numbers of chains."""
        grads, pull, loss, log_prior, hessian = self.evaluation
        evaluation = Evaluation(
            grads=function(grads),
            prior_pull=None if pull is None else function(pull),
            loss=None if loss is None else of_numbers(loss),
            log_prior=None if log_prior is None else of_numbers(log_prior),
            hessian_diagonal=None if hessian is None else function(hessian),
        )
        return Given(evaluation, function(self.noise))

    def take(self, index: Any) -> "Given":
        """Choose chains."""
        return self.map(lambda given: given[index], lambda value: value[index])

    def scaled(self, *, loss: float = 1.0, log_prior: float = 1.0, length: float = 1.0) -> "Given":
        """The potential times a factor, of parameters times a factor; the noise stays."""
        known = self.evaluation

        def times(factor: float, given: TensorDict) -> TensorDict:
            return tree.map_leaves(lambda leaf: factor * leaf, given)

        pull, hessian = known.prior_pull, known.hessian_diagonal
        evaluation = Evaluation(
            grads=times(loss / length, known.grads),
            prior_pull=None if pull is None else times(log_prior / length, pull),
            loss=None if known.loss is None else loss * known.loss,
            log_prior=None if known.log_prior is None else log_prior * known.log_prior,
            hessian_diagonal=None if hessian is None else times(loss / length**2, hessian),
        )
        return self._replace(evaluation=evaluation)


class Step(NamedTuple):
    """One step of a path."""

    before: State
    after: State
    terms: Terms


@dataclass(frozen=True)
class Problem:
    """A sampler with its settings, where its chains start, and what each step is given.

    Attributes:
        spec: The sampler.
        settings: What its factory is called with.
        params: w, of batch size `[*chains]`.
        start: η₀, noise for `init`.
        given: What each step is given.
        first_step: Number of steps that the chains count before the first, as one that went on
            would.
    """

    spec: SamplerSpec
    settings: Mapping[str, Any]
    params: TensorDict
    start: TensorDict
    given: tuple[Given, ...]
    first_step: int = 0

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler with its settings."""
        return self.spec.sampler(**self.settings)

    @property
    def chains(self) -> torch.Size:
        """Batch size."""
        return self.params.batch_size

    def initial(self) -> State:
        """The state before the first step."""
        state = self.sampler.init(self.params, self.start)
        return state.replace(step=state.step + self.first_step) if self.first_step else state

    def path(self) -> list[Step]:
        """Every step."""
        state, steps = self.initial(), []
        for given in self.given:
            after, terms = update(self.sampler, state, given)
            steps.append(Step(state, after, terms))
            state = after
        return steps

    def final(self) -> State:
        """The state after the last step."""
        return self.path()[-1].after

    def changed(self, **settings: Any) -> "Problem":
        """The same with other settings; those that the sampler does not take are left out."""
        taken = {name: value for name, value in settings.items() if self.spec.takes(name)}
        return replace(self, settings={**self.settings, **taken})

    def map_setting(self, name: str, function: Callable[[Any], Any]) -> "Problem":
        """Apply a function to a number, if the sampler has it, or to both ends of a range."""
        value = self.settings.get(name)
        if value is None:
            return self
        new = tuple(map(function, value)) if isinstance(value, tuple) else function(value)
        return self.changed(**{name: new})

    def map(self, function: TreeMap) -> "Problem":
        """Apply a function to every tree: parameters, what steps are given, and settings."""
        return replace(
            self,
            settings={name: mapped(value, function) for name, value in self.settings.items()},
            params=function(self.params),
            start=function(self.start),
            given=tuple(given.map(function) for given in self.given),
        )

    def take(self, index: Any) -> "Problem":
        """Choose chains: an index for one without a batch dimension, or several."""
        return replace(
            self,
            settings={name: taken(value, index) for name, value in self.settings.items()},
            params=self.params[index],
            start=self.start[index],
            given=tuple(given.take(index) for given in self.given),
        )

    def with_noise(self, *noise: TensorDict) -> "Problem":
        """The same with other noise, one tree a step."""
        given = (each._replace(noise=other) for each, other in zip(self.given, noise, strict=True))
        return replace(self, given=tuple(given))

    def with_evaluation(self, *evaluations: Evaluation) -> "Problem":
        """The same with other potentials, one a step."""
        given = (
            each._replace(evaluation=other)
            for each, other in zip(self.given, evaluations, strict=True)
        )
        return replace(self, given=tuple(given))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis prints it."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{name}={shown(value)}" for name, value in self.settings.items() if value is not None
        )
        lines = [f"{self.spec.name}({settings})", f"params {shown(self.params)}"]
        lines.append(f"start {shown(self.start)}")
        for step, given in enumerate(self.given, self.first_step):
            known = given.evaluation._asdict() | {"noise": given.noise}
            lines.append(
                f"step {step}: "
                + ", ".join(f"{k} {shown(v)}" for k, v in known.items() if v is not None)
            )
        return "Problem(\n    " + "\n    ".join(lines) + "\n)"


def of_all_chains(shared: TensorDict, params: TensorDict) -> TensorDict:
    """A tree that chains may share, of the batch size of the parameters."""
    return shared if shared.batch_dims == params.batch_dims else shared.expand(params.batch_size)


def update(sampler: Sampler, state: State, given: Given) -> tuple[State, Terms]:
    """One step."""
    known = given.evaluation
    return sampler.update(
        state,
        known.grads,
        given.noise,
        known.prior_pull,
        loss=known.loss,
        log_prior=known.log_prior,
        hessian_diagonal=known.hessian_diagonal,
    )


def mapped(value: Any, function: TreeMap) -> Any:
    """Apply a function to the trees of a setting."""
    if isinstance(value, TensorDictBase):
        return function(value)
    if isinstance(value, Preconditioner):
        fields = {
            name: mapped(getattr(value, name), function) for name in value.__dataclass_fields__
        }
        return type(value)(**fields, batch_size=value.batch_size, lock=False)
    return value


def taken(value: Any, index: Any) -> Any:
    """Choose chains of a setting, if it has any."""
    if isinstance(value, tuple):
        return tuple(taken(part, index) for part in value)
    per_chain = isinstance(value, Tensor | TensorDictBase | Schedule | Preconditioner)
    return value[index] if per_chain and len(value.shape) > 0 else value


def shown(value: Any) -> str:
    """A setting or a tree as people read it."""
    if isinstance(value, TensorDictBase):
        leaves = (f"{tree.dotted(name)}: {shown(leaf)}" for name, leaf in tree.leaves(value))
        return "{" + ", ".join(leaves) + "}"
    if isinstance(value, Tensor):
        suffix = "" if value.dtype == torch.float64 else f" {value.dtype}".replace("torch.", "")
        return f"{value.tolist()}{suffix}"
    if isinstance(value, Preconditioner | Schedule):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        inner = ", ".join(f"{k}={shown(v)}" for k, v in fields.items() if v is not None)
        return f"{type(value).__name__}({inner})"
    return repr(value)


@st.composite
def problems(
    draw: st.DrawFn,
    sampler: SamplerSpec | Callable[..., Sampler],
    *,
    chains: Iterable[tuple[int, ...]] = ((), (1,), (2,), (3,)),
    dtypes: Iterable[torch.dtype] = (torch.float64,),
    of_all_sizes: bool = False,
    max_steps: int = 3,
    adaptive: bool = True,
    scheduled: bool = True,
    **fixed: Any,
) -> Problem:
    """Problems for a sampler.

    Args:
        draw: Given by hypothesis.
        sampler: Its spec, or its factory.
        chains: What the batch size is chosen from.
        dtypes: What a leaf's dtype is chosen from.
        of_all_sizes: Whether entries are huge, tiny, subnormal and zero too.
        max_steps: The most steps.
        adaptive: Whether preconditioners may look at gradients.
        scheduled: Whether settings may be schedules.
        **fixed: Settings that are not drawn; those that the sampler does not take are left out.

    Raises:
        ValueError: A setting that is fixed is none of this sampler or of those here; or there is no
            batch size.
    """
    spec = spec_of(sampler)
    known = set(Sampler.__dataclass_fields__).union(*(each.taken for each in SPECS.values()))
    for name in fixed.keys() - known - spec.taken:
        raise ValueError(f"no sampler has a setting {name!r}: a law of {spec} cannot fix it")
    shapes = list(chains)
    if not shapes:
        raise ValueError("chains must hold at least one batch size, got none")
    max_chains = max(math.prod(shape) for shape in shapes)
    shape = draw(st.sampled_from(shapes))
    params = draw(strategies.trees(chains=shape, dtypes=dtypes))
    elements = strategies.numbers()
    if of_all_sizes:
        widths = {leaf.dtype for _, leaf in tree.leaves(params)}
        narrowest = min(widths, key=lambda dtype: torch.finfo(dtype).max)
        elements = strategies.any_numbers(narrowest)
        params = draw(strategies.trees_like(params, elements))
    settings = draw(
        strategies.settings_of(spec, params, adaptive=adaptive, scheduled=scheduled, **fixed)
    )
    # Where noise decides between two moves, its sign at 0 is a matter of rounding.
    shocks = elements if spec.linear_in_noise else elements.map(lambda x: x if abs(x) > 0.01 else 1)

    def energies(low: float) -> Tensor:
        drawn = draw(st.tuples(*[strategies.numbers(low, 8.0)] * max_chains))
        first = torch.tensor(drawn[: params.batch_size.numel()], dtype=torch.float64)
        return first.reshape(params.batch_size)

    def one_step(with_prior: bool) -> Given:
        grads = draw(strategies.trees_like(params, elements))
        noise = draw(strategies.trees_like(params, shocks, wide=True))
        loss, log_prior = energies(0.0), energies(-8.0)
        pull = draw(strategies.trees_like(params, elements))
        hessian = draw(strategies.trees_like(params))
        prior = (pull, log_prior) if with_prior else (None, None)
        return Given(Evaluation(grads, prior[0], loss, prior[1], hessian), noise)

    start = draw(strategies.trees_like(params, elements, wide=True))
    num_steps, with_prior = draw(st.integers(1, max_steps)), draw(st.booleans())
    steps = tuple(one_step(with_prior) for _ in range(num_steps))
    first_step = draw(st.sampled_from([0, 0, 5, 1000]))
    return Problem(spec, settings, params, start, steps, first_step)
