"""Small problems that several tests share."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc import tree
from funcsgmcmc.testing.scores import check_zero_means


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Ordinary numbers in a range."""
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


def arrays(rng: np.random.Generator, shapes: dict, chains: tuple) -> TensorDict:
    """A tree of standard normals."""
    leaves = {name: torch.tensor(rng.normal(size=chains + shape)) for name, shape in shapes.items()}
    return TensorDict(leaves, batch_size=chains)


def classification(num_examples: int = 40) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A small network, and inputs with labels."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs = torch.randn(num_examples, 5, generator=generator)
    return model, (inputs, torch.randint(3, (num_examples,), generator=generator))


def observables() -> dict:
    """A number and a vector, by name."""
    return {"norm": tree.norm, "first": lambda params: params["0.weight"][0]}


def good_loss(params: TensorDict, batch: torch.Tensor) -> torch.Tensor:
    """A quadratic around the mean of the batch."""
    return ((params["w"] - batch.mean()) ** 2).sum()


def run(
    sampler: fs.samplers.Sampler, params: TensorDict | None = None, **settings: Any
) -> fs.Samples:
    """Sample the classification problem; settings replace the defaults."""
    model, data = classification()
    options: dict[str, Any] = {
        "num_chains": 5,
        "num_draws": 6,
        "batch_size": 8,
        "key": fs.key(3),
        "init_noise": 0.05,
        "record": ["draws", "metrics", "draw_moments"],
    }
    return fs.sample(
        settings.pop("loss_fn", fs.module_loss(model, cross_entropy)),
        fs.params_of(model) if params is None else params,
        settings.pop("data", data),
        sampler,
        **(options | settings),
    )


def check_means(values: torch.Tensor, expected: torch.Tensor | float) -> None:
    """Compare means over independent chains, `[C]` or `[C, n]`, entry by entry and of all.

    Right means fail with probability 10⁻⁴ at most: of five z-scores none may exceed 4.26.
    """
    away = values - expected
    named = {"mean": away}
    if away.ndim > 1:
        named = {f"mean of entry {i}": each for i, each in enumerate(away.unbind(1))}
        named["mean of all"] = (away / away.std(0)).mean(1)
    check_zero_means(named, false_alarm=1e-4)


def assert_same(a: fs.Samples, b: fs.Samples, *, exact: bool = False) -> None:
    """Compare everything that two runs recorded, to rounding or bit for bit."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-9, "atol": 1e-11}
    for left, right in zip(records(a), records(b), strict=True):
        torch.testing.assert_close(left, right, equal_nan=True, **tolerance)


def records(samples: fs.Samples) -> list[torch.Tensor]:
    """Everything that a run recorded, each with the chains first."""
    return [
        samples.losses,
        samples.frozen_at,
        *torch.utils._pytree.tree_leaves(samples.state),
        *(samples.draws.values() if samples.draws is not None else []),
        *(samples.metrics or []),
        *samples.observables.values(),
    ]
