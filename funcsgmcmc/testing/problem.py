"""`Problem`: a sampler with its settings, the start of its chains, and the input of every step."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from operator import mul
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
    """The input of one step.

    Attributes:
        evaluation: The potential at the chain's parameters: gradients, loss and the rest.
        noise: η.
    """

    evaluation: Evaluation
    noise: TensorDict

    def map(
        self, function: TreeMap, of_values: Callable[[Tensor], Tensor] = lambda value: value
    ) -> "Given":
        """Apply `function` to every tree, and `of_values` to values of chains, as the loss."""

        def apply(value: Any) -> Any:
            return function(value) if isinstance(value, TensorDictBase) else of_values(value)

        present = {name: each for name, each in field_values(self.evaluation) if each is not None}
        evaluation = Evaluation(**{name: apply(each) for name, each in present.items()})
        return Given(evaluation, function(self.noise))

    def take(self, index: Any) -> "Given":
        """Choose chains."""
        return self.map(lambda given: given[index], lambda value: value[index])

    def scale(self, *, loss: float = 1.0, log_prior: float = 1.0, length: float = 1.0) -> "Given":
        """Multiply L, log p and w by factors, and their derivatives accordingly; keep the noise."""
        factors = {
            "grads": loss / length,
            "loss": loss,
            "prior_pull": log_prior / length,
            "log_prior": log_prior,
            "hessian_diagonal": loss / length**2,
        }
        scaled = {
            name: tree.map_leaves(partial(mul, factor), value)
            for name, factor in factors.items()
            if (value := getattr(self.evaluation, name)) is not None
        }
        return self._replace(evaluation=replace(self.evaluation, **scaled))


class Step(NamedTuple):
    """One step of a chain: the states before and after, and the terms between them."""

    before: State
    after: State
    terms: Terms


@dataclass(frozen=True)
class Problem:
    """A sampler with its settings, the start of its chains, and the input of every step.

    Attributes:
        spec: The sampler.
        settings: Arguments of its factory.
        params: w, of batch size `[*chains]`.
        start: η₀, the noise that `init` takes.
        given: The input of each step.
        first_step: The number of steps counted before the first one here, as in a chain that was
            continued.
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
            after, terms = self.sampler.update(state, *given)
            steps.append(Step(state, after, terms))
            state = after
        return steps

    def final(self) -> State:
        """The state after the last step."""
        return self.path()[-1].after

    def with_settings(self, **settings: Any) -> "Problem":
        """Change settings; those that the sampler does not take are left out."""
        known = {name: value for name, value in settings.items() if self.spec.takes(name)}
        return replace(self, settings={**self.settings, **known})

    def map_setting(self, name: str, function: Callable[[Any], Any]) -> "Problem":
        """Apply a function to a setting, or to both ends of a range; not to None."""
        value = self.settings.get(name)
        if value is None:
            return self
        new = tuple(map(function, value)) if isinstance(value, tuple) else function(value)
        return self.with_settings(**{name: new})

    def map(self, function: TreeMap) -> "Problem":
        """Apply a function to every tree: parameters, noise, gradients, and trees in settings."""
        return replace(
            self,
            settings={name: map_trees(value, function) for name, value in self.settings.items()},
            params=function(self.params),
            start=function(self.start),
            given=tuple(given.map(function) for given in self.given),
        )

    def take(self, index: Any) -> "Problem":
        """Choose chains: several, or by a number one chain without a batch dimension."""
        return replace(
            self,
            settings={name: _take_chains(value, index) for name, value in self.settings.items()},
            params=self.params[index],
            start=self.start[index],
            given=tuple(given.take(index) for given in self.given),
        )

    def with_noise(self, *noise: TensorDict) -> "Problem":
        """Replace the noise, by one tree for each step."""
        given = (each._replace(noise=other) for each, other in zip(self.given, noise, strict=True))
        return replace(self, given=tuple(given))

    def with_evaluation(self, *evaluations: Evaluation) -> "Problem":
        """Replace the evaluations of the potential, by one for each step."""
        given = (
            each._replace(evaluation=other)
            for each, other in zip(self.given, evaluations, strict=True)
        )
        return replace(self, given=tuple(given))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the problem in hypothesis's reports."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        lines = [
            f"{self.spec.name}({_format_fields(self.settings, '=')})",
            f"params {format_value(self.params)}",
            f"start {format_value(self.start)}",
        ]
        for step, given in enumerate(self.given, self.first_step):
            known = dict(field_values(given.evaluation)) | {"noise": given.noise}
            lines.append(f"step {step}: {_format_fields(known, ' ')}")
        return "Problem(\n    " + "\n    ".join(lines) + "\n)"


def field_values(value: Any) -> Iterator[tuple[str, Any]]:
    """The names and values of a dataclass's fields."""
    return ((each.name, getattr(value, each.name)) for each in fields(value))


def expand_to_chains(shared: TensorDict, params: TensorDict) -> TensorDict:
    """Expand a tree that chains may share to the batch size of the parameters."""
    return shared if shared.batch_dims == params.batch_dims else shared.expand(params.batch_size)


def map_trees(value: Any, function: TreeMap) -> Any:
    """Apply a function to the trees in a setting: itself, or in a preconditioner's fields."""
    if isinstance(value, TensorDictBase):
        return function(value)
    if isinstance(value, Preconditioner):
        mapped = {name: map_trees(each, function) for name, each in field_values(value)}
        return type(value)(**mapped, batch_size=value.batch_size, lock=False)
    return value


def _take_chains(value: Any, index: Any) -> Any:
    """Choose chains of a setting; one that chains share stays as it is."""
    if isinstance(value, tuple):
        return tuple(_take_chains(each, index) for each in value)
    may_be_per_chain = isinstance(value, Tensor | TensorDictBase | Schedule | Preconditioner)
    return value[index] if may_be_per_chain and len(value.shape) > 0 else value


def format_value(value: Any) -> str:
    """A setting or a tree for a reader: numbers, names and, if it is not float64, the dtype."""
    if isinstance(value, TensorDictBase):
        leaves = (f"{tree.dotted(name)}: {format_value(leaf)}" for name, leaf in tree.leaves(value))
        return "{" + ", ".join(leaves) + "}"
    if isinstance(value, Tensor):
        suffix = "" if value.dtype == torch.float64 else f" {value.dtype}".replace("torch.", "")
        return f"{value.tolist()}{suffix}"
    if isinstance(value, Preconditioner | Schedule):
        return f"{type(value).__name__}({_format_fields(dict(field_values(value)), '=')})"
    return repr(value)


def _format_fields(values: Mapping[str, Any], sign: str) -> str:
    """Named values, the absent ones left out."""
    given = {name: value for name, value in values.items() if value is not None}
    return ", ".join(f"{name}{sign}{format_value(value)}" for name, value in given.items())


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
        chains: Batch sizes to choose from.
        dtypes: Dtypes to choose from, for each leaf.
        of_all_sizes: Whether entries may also be huge, tiny, subnormal and zero.
        max_steps: The largest number of steps.
        adaptive: Whether preconditioners may depend on gradients.
        scheduled: Whether settings may be schedules.
        **fixed: Values of settings, in place of drawn ones; those that the sampler does not take
            are left out.

    Raises:
        ValueError: A name in `fixed` is a setting neither of this sampler nor of those in `SPECS`;
            or `chains` is empty.
    """
    spec = spec_of(sampler)
    known = [each.setting_names for each in (spec, *SPECS.values())]
    for name in fixed.keys() - set(Sampler.__dataclass_fields__).union(*known):
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

    def values(low: float) -> Tensor:
        # As many numbers for any batch size: hypothesis can then take chains away and keep them.
        drawn = draw(st.tuples(*[strategies.numbers(low, 8.0)] * max_chains))
        first = torch.tensor(drawn[: params.batch_size.numel()], dtype=torch.float64)
        return first.reshape(params.batch_size)

    def one_step(with_prior: bool) -> Given:
        grads = draw(strategies.trees_like(params, elements))
        noise = draw(strategies.trees_like(params, shocks, wide=True))
        loss, log_prior = values(0.0), values(-8.0)
        pull = draw(strategies.trees_like(params, elements))
        hessian = draw(strategies.trees_like(params))
        evaluation = Evaluation(grads, loss, hessian_diagonal=hessian)
        if with_prior:
            evaluation = replace(evaluation, prior_pull=pull, log_prior=log_prior)
        return Given(evaluation, noise)

    start = draw(strategies.trees_like(params, elements, wide=True))
    num_steps, with_prior = draw(st.integers(1, max_steps)), draw(st.booleans())
    steps = tuple(one_step(with_prior) for _ in range(num_steps))
    first_step = draw(st.sampled_from([0, 0, 5, 1000]))
    return Problem(spec, settings, params, start, steps, first_step)
