"""Hypothesis strategies for trees, numbers, settings and whole samplers.

Everything shrinks: a tree to one leaf of one entry, a number to 0 or 1, a setting to a number that
all chains share, an optional setting to None.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.preconditioners import (
    Preconditioner,
    adam,
    compose,
    diagonal,
    identity,
    rmsprop,
)
from funcsgmcmc.samplers import Sampler
from funcsgmcmc.schedules import Schedule, constant, cosine, cyclical, polynomial_decay
from funcsgmcmc.testing.specs import SPECS, SamplerSpec

Numbers = st.SearchStrategy[float]
Chains = tuple[int, ...]

NAMES: tuple[tree.Name, ...] = ("w", "layer.weight", ("block", "bias"))
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (), (2,), (0,), (2, 2), (3, 1))
SHARED_RANGES: Mapping[str, tuple[float, float]] = {
    "lr": (0, 1),
    "nbeta": (0, 10),
    "temperature": (0, 3),
    "localization": (0, 5),
    "weight_decay": (0, 5),
}
"""The ranges of settings that all samplers share: lowest and highest value."""


@cache
def numbers(low: float = -4.0, high: float = 4.0) -> Numbers:
    """Ordinary numbers in a range, the simplest first: the smallest, whole ones, 60 others.

    Hypothesis's own floats are mostly 0, an end of the range, or of extreme size. One term would
    then dominate most sums, and a law about sums would hardly be tried.
    """
    # Multiples of the golden ratio modulo 1 fill the range evenly.
    golden = (math.sqrt(5) - 1) / 2
    others = (round(low + (high - low) * (k * golden % 1), 3) for k in range(1, 61))
    low, high = float(low), float(high)
    smallest = min(max(low, 0.0), high)
    whole = (float(k) for k in range(math.ceil(low), math.floor(high) + 1))
    simple = dict.fromkeys([smallest, *sorted(whole, key=lambda x: (abs(x), -x)), low, high])
    return st.sampled_from([*simple, *sorted(others, key=lambda x: (abs(x), -x))])


@cache
def any_numbers(dtype: torch.dtype = torch.float64) -> Numbers:
    """Finite numbers of all sizes: ordinary, zero, subnormal, tiny and huge.

    A huge number is the fourth root of the largest of `dtype`: squares of sums stay finite.
    """
    limits = torch.finfo(dtype)
    subnormal = limits.smallest_normal * limits.eps
    sizes = (0.0, subnormal, limits.tiny, limits.eps, limits.max**0.25)
    return st.one_of(
        numbers(), st.sampled_from([sign * size for size in sizes for sign in (1, -1)])
    )


def chain_shapes(max_chains: int = 3) -> st.SearchStrategy[Chains]:
    """Batch sizes: `()` for one chain, `(C,)` for several."""
    return st.sampled_from([(), *((count,) for count in range(1, max_chains + 1))])


def chunkings(num_chains: int) -> st.SearchStrategy[list[int]]:
    """Ways to cut `num_chains` chains into chunks: the chunks' sizes."""

    def sizes(cuts: set[int]) -> list[int]:
        ends = [0, *sorted(cuts), num_chains]
        return [end - start for start, end in pairwise(ends)]

    return st.sets(st.integers(1, max(num_chains - 1, 1))).map(
        lambda cuts: sizes({cut for cut in cuts if cut < num_chains})
    )


@st.composite
def trees(
    draw: st.DrawFn,
    *,
    chains: Chains = (),
    dtypes: Iterable[torch.dtype] = (torch.float64,),
    elements: Numbers | None = None,
    max_leaves: int = 3,
) -> TensorDict:
    """Parameter trees, nested ones among them, with at least one entry.

    Args:
        draw: Given by hypothesis.
        chains: Batch size.
        dtypes: Dtypes to choose from, for each leaf.
        elements: Entries; ordinary numbers if None.
        max_leaves: At most 3.
    """
    shapes = draw(
        st.lists(st.sampled_from(SHAPES), min_size=1, max_size=max_leaves).filter(
            lambda shapes: any(math.prod(shape) for shape in shapes)
        )
    )
    leaves = {
        name: torch.empty(chains + shape, dtype=draw(st.sampled_from(list(dtypes))))
        for name, shape in zip(NAMES, shapes, strict=False)
    }
    return draw(trees_like(tree.build(leaves, torch.Size(chains)), elements))


def trees_like(
    params: TensorDictBase,
    elements: Numbers | None = None,
    *,
    wide: bool = False,
    exact: bool = False,
) -> st.SearchStrategy[TensorDict]:
    """Trees with the structure of another, as gradients, noise and pulls have.

    Args:
        params: The tree whose names, shapes, dtypes and batch size to take.
        elements: Entries; ordinary numbers if None.
        wide: Whether leaves are float32 at least, as noise is.
        exact: Whether every entry is one of `elements`; otherwise entries beyond the fifth are
            multiples of the first five, by factors between −1 and 1.
    """
    # Five numbers fill a tree of any size: so hypothesis can shrink the tree and keep the numbers.
    count = sum(leaf.numel() for _, leaf in tree.leaves(params))

    def fill(drawn: tuple[float, ...]) -> TensorDict:
        rounds = torch.arange(count) // len(drawn)
        factors = torch.ones(count) if exact else torch.tensor(_FACTORS)[rounds % len(_FACTORS)]
        # Shrinking moves small numbers to the front; reversed, the first entries are the largest.
        entries = torch.tensor(drawn[::-1], dtype=torch.float64).repeat(count)[:count] * factors
        leaves: dict[tree.Name, Tensor] = {}
        start = 0
        for name, leaf in tree.leaves(params):
            dtype = tree.working_dtype(leaf) if wide else leaf.dtype
            leaves[name] = entries[start : start + leaf.numel()].reshape(leaf.shape).to(dtype)
            start += leaf.numel()
        return tree.build(leaves, params.batch_size)

    return _five(numbers() if elements is None else elements).map(fill)


@cache
def _five(elements: Numbers) -> st.SearchStrategy[tuple[float, ...]]:
    return st.tuples(*[elements] * 5)


_FACTORS = (1.0, -0.75, 0.9, -0.6, 0.8, -0.95, 0.7)


def one_chain(params: TensorDict) -> TensorDict:
    """The tree of the first chain: a shared mask or anchor has the same structure."""
    return params[0] if params.batch_dims else params


def masks(params: TensorDict) -> st.SearchStrategy[TensorDict]:
    """Masks, shared or one a chain: each entry 0, 1 or 1/2."""
    return _shared_or_own(params, st.sampled_from([0.0, 1.0, 0.5]))


def diagonals(params: TensorDict) -> st.SearchStrategy[TensorDict]:
    """Diagonals G > 0 of preconditioners, shared or one a chain."""
    return _shared_or_own(params, numbers(0.1, 3.0), wide=True)


def _shared_or_own(
    params: TensorDict, elements: Numbers, *, wide: bool = False
) -> st.SearchStrategy[TensorDict]:
    return st.sampled_from([one_chain(params), params]).flatmap(
        lambda like: trees_like(like, elements, wide=wide, exact=True)
    )


def anchors(params: TensorDict) -> st.SearchStrategy[TensorDict]:
    """Anchors, shared or one a chain."""
    return st.sampled_from([one_chain(params), params]).flatmap(trees_like)


def preconditioners(
    params: TensorDict, *, adaptive: bool = True
) -> st.SearchStrategy[Preconditioner]:
    """Preconditioners of every kind, and products of two.

    Args:
        params: Parameters, of batch size `[*chains]`.
        adaptive: Whether preconditioners that depend on gradients are among them.
    """
    fixed = st.one_of(st.just(identity()), diagonals(params).map(diagonal))
    if not adaptive:
        return fixed
    chains = tuple(params.batch_size)
    decay, eps = hyperparameters(0, 0.99, chains), hyperparameters(0.1, 2, chains)
    curvature = st.sampled_from([None, "exact"])
    of_rmsprop = st.builds(rmsprop, decay, eps, curvature=curvature)
    of_adam = st.builds(adam, decay, decay, eps)
    return st.one_of(
        fixed,
        of_rmsprop,
        of_adam,
        st.builds(compose, of_rmsprop, st.one_of(fixed, of_adam)),
        st.builds(compose, fixed, of_rmsprop),
    )


@st.composite
def schedules(draw: st.DrawFn, value: float | Tensor) -> Schedule:
    """Schedules of all kinds that begin at a value, or near it."""
    kind, num_steps = draw(st.sampled_from(range(4))), draw(st.integers(1, 4))
    power = draw(numbers(0, 1))
    if kind == 0:
        return constant(value)
    if kind == 1:
        return polynomial_decay(value, power=power)
    if kind == 2:
        return cosine(value, num_steps=num_steps)
    return cyclical(value, num_steps_per_cycle=num_steps)


DENSITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda z: -z.square() / 2,
    "logistic": lambda z: -z - 2 * torch.nn.functional.softplus(-z),
    "student_t": lambda z: -2 * torch.log1p(z.square() / 3),
    "cauchy": lambda z: -torch.log1p(z.square()),
}
"""Log-densities of one entry, up to a constant; Student's t has three degrees of freedom."""


@dataclass(frozen=True)
class FactorizedLogPrior:
    """A log-prior under which all entries are independent.

    Attributes:
        density: The density of w/scale, one of `DENSITIES`.
        scale: In units of w.
    """

    density: str
    scale: float

    def __call__(self, params: TensorDict) -> Tensor:
        """Log p(w), a scalar."""
        density = DENSITIES[self.density]
        terms = [density(leaf / self.scale).sum() for _, leaf in tree.leaves(params)]
        return torch.stack(terms).sum()


def log_priors() -> st.SearchStrategy[FactorizedLogPrior]:
    """Log-priors of several kinds and scales."""
    return st.builds(FactorizedLogPrior, st.sampled_from([*DENSITIES]), numbers(0.5, 3))


@cache
def hyperparameters(
    low: float, high: float, chains: Chains = (), *, scheduled: bool = False
) -> st.SearchStrategy[float | Tensor | Schedule]:
    """Values of a setting: a number, a tensor with one a chain, or a schedule of either."""
    return _hyperparameters(low, high, chains, scheduled)


@st.composite
def _hyperparameters(
    draw: st.DrawFn, low: float, high: float, chains: Chains, scheduled: bool
) -> float | Tensor | Schedule:
    one_each = draw(st.booleans())
    value: float | Tensor = draw(numbers(low, high))
    if one_each and chains:
        others = st.lists(numbers(low, high), min_size=chains[0] - 1, max_size=chains[0] - 1)
        value = torch.tensor([value, *draw(others)], dtype=torch.float64)
    return draw(schedules(value)) if scheduled and draw(st.booleans()) else value


def refresh_intervals(chains: Chains = ()) -> st.SearchStrategy[int | Tensor]:
    """Numbers of steps between refreshes of a momentum, shared or one a chain: 1 or 2."""
    shared = st.integers(1, 2)
    if not chains:
        return shared
    return shared | st.lists(shared, min_size=chains[0], max_size=chains[0]).map(torch.tensor)


@st.composite
def settings_of(
    draw: st.DrawFn,
    spec: SamplerSpec,
    params: TensorDict,
    *,
    adaptive: bool = True,
    scheduled: bool = True,
    **fixed: Any,
) -> dict[str, Any]:
    """Arguments of a sampler's factory.

    Args:
        draw: Given by hypothesis.
        spec: The sampler.
        params: Parameters, of batch size `[*chains]`.
        adaptive: Whether preconditioners may depend on gradients.
        scheduled: Whether settings may be schedules.
        **fixed: Values of settings, in place of drawn ones; those that the sampler does not take
            are left out.
    """
    params = params if spec.per_chain else one_chain(params)
    chains = tuple(params.batch_size)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "anchor": anchors(params),
        "mask": masks(params),
        "bounding_box_size": hyperparameters(0.05, 3, chains),
        "preconditioner": preconditioners(params, adaptive=adaptive),
        "refresh_interval": refresh_intervals(chains),
    }
    shared = {name: span for name, span in SHARED_RANGES.items() if name not in spec.settings}
    ranges: dict[str, Any] = {**shared, **spec.ranges}
    drawn: dict[str, Any] = {**dict.fromkeys(optional), **spec.settings}
    for name, span in ranges.items():
        if name in fixed or not spec.takes(name):
            continue
        if isinstance(span, st.SearchStrategy):
            drawn[name] = draw(span)
        elif callable(span):
            drawn[name] = draw(span(params))
        else:
            may_vary = scheduled and name in spec.schedulable
            drawn[name] = draw(hyperparameters(span[0], span[1], chains, scheduled=may_vary))
    for name, values in optional.items():
        given = {*fixed, *spec.settings, *spec.ranges}
        if name not in given and spec.takes(name):
            drawn[name] = draw(st.one_of(st.none(), values))
    return {name: value for name, value in {**drawn, **fixed}.items() if spec.takes(name)}


@st.composite
def samplers(
    draw: st.DrawFn, params: TensorDict, specs: Iterable[SamplerSpec] = tuple(SPECS.values())
) -> Sampler:
    """Samplers of several kinds, with settings of all sorts.

    Args:
        draw: Given by hypothesis.
        params: Parameters, of batch size `[*chains]`.
        specs: The kinds; by default all of this library.
    """
    spec = draw(st.sampled_from(list(specs)))
    return spec.sampler(**draw(settings_of(spec, params)))
