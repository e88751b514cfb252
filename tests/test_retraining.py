"""Influence against what it predicts: the change of a loss when an example is left out.

Leaving example i out takes its weight 1/n away. To first order E ψ then changes by −β BIF(i, ψ),
β = nβ/n, where the posterior is narrow around the minimum that is retrained.
"""

from functools import partial

import pytest
import torch
from scipy.stats import spearmanr
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import funcsgmcmc as fs
from funcsgmcmc.per_example import losses_on
from problems import classification


def ranks(predicted: Tensor, actual: Tensor) -> tuple[float, float]:
    """The rank correlation over examples, its mean over test points and the error of that."""
    found = torch.tensor(
        [
            spearmanr(one.numpy(), two.numpy()).statistic
            for one, two in zip(predicted.T, actual.T, strict=True)
        ]
    )
    return float(found.mean()), float(found.std() / len(found) ** 0.5)


def test_ridge_regression_without_one_example():
    """Where the solution without it is exact."""
    n, d, decay = 30, 5, 0.1
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n + 8, d, generator=generator)
    targets = inputs.sum(1) + torch.randn(n + 8, generator=generator)
    train, test = (inputs[:n], targets[:n]), (inputs[n:], targets[n:])

    def losses(params, batch):
        return (batch[0] @ params["w"] - batch[1]) ** 2 / 2

    def solution(kept: Tensor) -> Tensor:
        x, y = train[0][kept], train[1][kept]
        return torch.linalg.solve(x.T @ x / n + decay * torch.eye(d), x.T @ y / n)

    everyone = torch.ones(n, dtype=torch.bool)
    w = solution(everyone)
    nbeta = 10.0 * n
    samples = fs.sample(
        lambda params, batch: losses(params, batch).mean(),
        {"w": w},
        train,
        fs.baoa(0.05, nbeta=nbeta, weight_decay=nbeta * decay),
        num_chains=200,
        num_draws=200,
        num_burnin_steps=50,
        key=fs.key(0),
        observables={"train": losses_on(losses, train), "test": losses_on(losses, test)},
    )
    predicted = -nbeta / n * fs.influence(samples, "train", "test").values
    before = losses({"w": w}, test)
    actual = []
    for i in range(n):
        kept = everyone.clone()
        kept[i] = False
        actual.append(losses({"w": solution(kept)}, test) - before)
    rank, error = ranks(predicted, torch.stack(actual))
    print(f"ridge regression: rank correlation {rank:.3f} ± {error:.3f}")
    assert rank > 0.95
    size = torch.linalg.lstsq(predicted.flatten()[:, None], torch.stack(actual).flatten()[:, None])
    print(f"slope of the change on the prediction {float(size.solution):.3f}")
    assert 0.9 < float(size.solution) < 1.5  # what is left out has more leverage than its weight


def minimized(
    model: nn.Module, start: TensorDict, weights: Tensor, data: tuple, decay: float
) -> TensorDict:
    """The minimum of the weighted loss with weight decay, from a start."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in start.items()}
    optimizer = torch.optim.LBFGS(
        leaves.values(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        losses = cross_entropy(
            functional_call(model, leaves, (data[0],)), data[1], reduction="none"
        )
        size = sum(leaf.square().sum() for leaf in leaves.values())
        total = (weights * losses).mean() + decay / 2 * size
        total.backward()
        return total

    optimizer.step(closure)
    return TensorDict({name: leaf.detach() for name, leaf in leaves.items()})


@pytest.mark.slow
def test_a_classifier_retrained_without_one_example():
    model, data = classification()
    n, decay = len(data[1]), 0.05
    generator = torch.Generator().manual_seed(5)
    test = (torch.randn(10, 5, generator=generator), torch.randint(3, (10,), generator=generator))
    best = minimized(model, fs.params_of(model), torch.ones(n), data, decay)
    losses = fs.module_loss(model, partial(cross_entropy, reduction="none"))
    nbeta = 100.0 * n
    samples = fs.sample(
        fs.module_loss(model, cross_entropy),
        best,
        data,
        fs.baoa(0.015, nbeta=nbeta, weight_decay=nbeta * decay),
        num_chains=100,
        num_draws=500,
        num_burnin_steps=300,
        num_steps_between_draws=4,
        key=fs.key(0),
        observables={"train": losses_on(losses, data), "test": losses_on(losses, test)},
    )
    assert samples.healthy.all()
    predicted = -nbeta / n * fs.influence(samples, "train", "test").values
    before = losses_on(losses, test)(best)
    actual = []
    for i in range(n):
        weights = torch.ones(n)
        weights[i] = 0.0
        actual.append(
            losses_on(losses, test)(minimized(model, best, weights, data, decay)) - before
        )
    rank, error = ranks(predicted, torch.stack(actual))
    print(f"classifier: rank correlation {rank:.3f} ± {error:.3f}")
    assert rank > 0.9
