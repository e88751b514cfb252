"""Three Bayesian regressions, and what a long run of NUTS says of their posteriors.

Each has the potential U(w) = n L(w) + (λ/2) ‖w‖² − log p(w), with L the mean negative log
likelihood of n examples and λ ↔ `weight_decay`. Every entry of w has the prior N(0, 1): by
`weight_decay` for the first two, by `log_prior` for the third. `references/make.py` states the same
models in numpyro.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

REFERENCES = Path(__file__).parent / "references"


@dataclass(frozen=True)
class Regression:
    """A model with its data.

    Attributes:
        name: Also that of its reference.
        data: Tensors `[n, …]`, float64.
        loss: `loss(params, batch)`, the mean negative log likelihood of a batch of `data`.
        params: The mode of the posterior, float64.
        weight_decay: Precision of a Gaussian prior centred at zero.
        log_prior: log p(w) up to a constant; None if there is only the Gaussian.
    """

    name: str
    data: tuple[Tensor, ...]
    loss: Callable[[TensorDict, tuple[Tensor, ...]], Tensor]
    params: TensorDict
    weight_decay: float = 0.0
    log_prior: Callable[[TensorDict], Tensor] | None = None

    def potential(self, params: TensorDict) -> Tensor:
        """U(w) on all data, a scalar."""
        energy = len(self.data[0]) * self.loss(params, self.data)
        energy = energy + self.weight_decay / 2 * squared_norm(params)
        return energy if self.log_prior is None else energy - self.log_prior(params)


@dataclass(frozen=True)
class Reference:
    """A posterior by NUTS: name of a parameter to a float64 tensor.

    Attributes:
        mean, sd: Of every entry, `[*shape]`.
        mcse_mean, mcse_sd: Their Monte Carlo standard errors, `[*shape]`.
        draws: A few draws, nearly independent, `[draws, *shape]`.
    """

    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    mcse_mean: dict[str, Tensor]
    mcse_sd: dict[str, Tensor]
    draws: dict[str, Tensor]


def reference(name: str) -> Reference:
    """Read what `references/make.py` found for the model of this name."""
    parameters = json.loads((REFERENCES / f"{name}.json").read_text())["parameters"]
    with np.load(REFERENCES / f"{name}.npz") as file:
        draws = {key: torch.from_numpy(file[key]).double() for key in parameters}

    def column(statistic: str) -> dict[str, Tensor]:
        return {
            key: torch.tensor(values[statistic], dtype=torch.float64)
            for key, values in parameters.items()
        }

    return Reference(column("mean"), column("sd"), column("mcse_mean"), column("mcse_sd"), draws)


def diabetes() -> Regression:
    """Linear regression with unknown noise: n = 442, d = 12, and some features almost collinear."""
    inputs, targets = load_diabetes(return_X_y=True)
    # The features come with unit norm, here they have unit variance.
    features = torch.tensor(inputs * math.sqrt(len(inputs)))

    def loss(params: TensorDict, batch: tuple[Tensor, ...]) -> Tensor:
        x, y = batch
        return normal_nll(y - x @ params["weight"] - params["bias"], params["log_sigma"])

    data = (features, torch.tensor((targets - targets.mean()) / targets.std()))
    return at_mode(Regression("diabetes", data, loss, zeros(weight=10, bias=(), log_sigma=()), 1.0))


def breast_cancer() -> Regression:
    """Logistic regression: n = 569, d = 31. A plane separates the classes: the prior matters."""
    inputs, labels = load_breast_cancer(return_X_y=True)

    def loss(params: TensorDict, batch: tuple[Tensor, ...]) -> Tensor:
        x, y = batch
        return binary_cross_entropy_with_logits(x @ params["weight"] + params["bias"], y)

    features = torch.tensor((inputs - inputs.mean(0)) / inputs.std(0))
    data = (features, torch.tensor(labels, dtype=torch.float64))
    return at_mode(Regression("breast_cancer", data, loss, zeros(weight=30, bias=()), 1.0))


def eight_schools() -> Regression:
    """Hierarchical model of Rubin (1981), not centred: n = 8, d = 10, and far from Gaussian.

    School j has the effect θⱼ = 10 μ + 10 exp(log τ) offsetⱼ, and yⱼ ~ N(θⱼ, sⱼ²). The mode of
    log τ lies 2.4 standard deviations above its mean.
    """
    effects = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    errors = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)

    def loss(params: TensorDict, batch: tuple[Tensor, ...]) -> Tensor:
        school, y, s = batch
        theta = 10 * params["mu"] + 10 * params["log_tau"].exp() * (school @ params["offset"])
        return normal_nll(y - theta, s.log())

    def log_prior(params: TensorDict) -> Tensor:
        return -squared_norm(params) / 2

    # Which school, as a row of the identity: a minibatch must know whose effects it holds.
    data = (torch.eye(8, dtype=torch.float64), effects, errors)
    start = zeros(mu=(), log_tau=(), offset=8)
    return at_mode(Regression("eight_schools", data, loss, start, log_prior=log_prior))


def normal_nll(residual: Tensor, log_sd: Tensor) -> Tensor:
    """Mean of −log N(residual; 0, sd)."""
    return (math.log(2 * math.pi) / 2 + log_sd + (residual * (-log_sd).exp()) ** 2 / 2).mean()


def squared_norm(params: TensorDict) -> Tensor:
    """‖w‖²."""
    return sum((leaf**2).sum() for leaf in params.values())


def zeros(**shapes: int | tuple[int, ...]) -> TensorDict:
    """Parameters of given shapes, all zero."""
    return TensorDict({k: torch.zeros(shape, dtype=torch.float64) for k, shape in shapes.items()})


def at_mode(regression: Regression) -> Regression:
    """Move the parameters to the minimum of the potential."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in regression.params.items()}
    optimizer = torch.optim.LBFGS(
        leaves.values(),
        max_iter=1000,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        energy = regression.potential(TensorDict(leaves))
        energy.backward()
        return energy

    optimizer.step(closure)
    return replace(regression, params=TensorDict({k: leaf.detach() for k, leaf in leaves.items()}))
