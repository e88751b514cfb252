"""The losses whose learning coefficients are known, and one rule each for how they are sampled.

Deep linear networks have the loss (1/2) E‖(W_L ⋯ W_1 − W*) x‖² of inputs x with covariance 1 and
targets without noise, the setting of the literature. The anchor is a most singular point of W_L ⋯
W_1 = W*: every layer is a partial isometry of rank r. There the local learning coefficient is the
global one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

import funcsgmcmc as fs
from funcsgmcmc.testing.truths import Truth, deep_linear, monomial, separable


def no_data() -> Tensor:
    """Of a loss that has none: one example, which it does not look at."""
    return torch.zeros(1)


@dataclass(frozen=True)
class Settings:
    """How a problem is sampled; all of it follows from what is known before a run.

    Of its chains some are warm, at nβ/e²: they tell how far an estimate is from its limit.
    """

    nbeta: float
    localization: float
    lr: float
    friction: float
    num_chains: int
    num_warm_chains: int
    num_burnin_steps: int
    num_draws: int
    num_steps_between_draws: int
    full_loss: int = 50
    init_noise: float = 0.0
    num_examples: int | None = None
    batch_size: int | None = None

    @property
    def nbetas(self) -> Tensor:
        """The inverse temperature of each chain."""
        nbetas = torch.full((self.num_chains,), self.nbeta, dtype=torch.float64)
        nbetas[self.num_chains - self.num_warm_chains :] /= math.exp(2)
        return nbetas

    @property
    def num_steps(self) -> int:
        """Steps of a chain, each of which takes one gradient."""
        return self.num_burnin_steps + self.num_draws * self.num_steps_between_draws


@dataclass(frozen=True)
class Problem:
    """A loss with its anchor, its known coefficient, and how it is sampled.

    Attributes:
        name: What it is, unique within its group.
        loss: `loss(params, batch)`.
        anchor: w₀, as the leaf `w`.
        data: Makes what batches are taken from.
        truth: λ and its multiplicity.
        settings: How it is sampled.
        shape: What `truth` is computed from: powers, (d, p), or (widths, rank).
    """

    name: str
    loss: Callable[[TensorDict, Tensor], Tensor]
    anchor: Tensor
    data: Callable[[], Tensor]
    truth: Truth
    settings: Settings
    shape: tuple[Any, ...]

    @property
    def rank(self) -> int | None:
        """The rank of a network; None of other losses."""
        return self.shape[1] if isinstance(self.shape[0], tuple) else None


@dataclass(frozen=True)
class Network:
    """A deep linear network of some widths and rank, all its weights in one vector.

    One leaf makes an eager step a third cheaper than a leaf for each layer.
    """

    widths: tuple[int, ...]
    rank: int

    def layers(self, weights: Tensor) -> list[Tensor]:
        """W_1, …, W_L from the vector of all weights."""
        shapes = [(after, before) for before, after in pairwise(self.widths)]
        parts = weights.split([after * before for after, before in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def product(self, weights: Tensor) -> Tensor:
        """W_L ⋯ W_1."""
        first, *others = self.layers(weights)
        for layer in others:
            first = layer @ first
        return first

    def anchor(self, generator: torch.Generator) -> Tensor:
        """Layers of rank r and singular values 1, between random bases."""
        bases = [
            torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:, : self.rank]
            for width in self.widths
        ]
        return torch.cat([(after @ before.T).flatten() for before, after in pairwise(bases)])

    def loss_at(self, target: Tensor) -> Callable[[TensorDict, Tensor], Tensor]:
        """(1/2) ‖W_L ⋯ W_1 − W*‖²: on all data, whose covariance is 1."""
        return lambda params, _: (self.product(params["w"]) - target).square().sum() / 2

    def loss_on_inputs(self, target: Tensor) -> Callable[[TensorDict, Tensor], Tensor]:
        """(1/2m) Σ ‖(W_L ⋯ W_1 − W*) xᵢ‖² over a batch of m inputs, by their second moments."""

        def loss(params: TensorDict, inputs: Tensor) -> Tensor:
            error = self.product(params["w"]) - target
            return (error @ (inputs.mT @ inputs) * error).sum() / (2 * inputs.shape[-2])

        return loss


def whitened(num_examples: int, width: int, generator: torch.Generator) -> Tensor:
    """Gaussian inputs, `[n, width]`, made to have the second moments of the identity exactly."""
    inputs = torch.randn(num_examples, width, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(inputs.T @ inputs / num_examples)
    return torch.linalg.solve_triangular(factor, inputs.T, upper=False).T.float().contiguous()


def network_problem(
    widths: Sequence[int],
    rank: int,
    seed: int,
    batch_size: int | None = None,
    num_chains: int = 16,
    num_warm_chains: int = 6,
) -> Problem:
    """A deep linear network, on all data or on minibatches."""
    network = Network(tuple(widths), rank)
    generator = torch.Generator().manual_seed(seed)
    anchor = network.anchor(generator)
    target = network.product(anchor)
    settings = network_settings(widths, batch_size, num_chains, num_warm_chains)
    if settings.num_examples is None:
        loss, data = network.loss_at(target), no_data
    else:
        loss = network.loss_on_inputs(target)
        data = partial(whitened, settings.num_examples, widths[0], generator)
    return Problem(
        name=f"{'-'.join(map(str, widths))}, rank {rank}",
        loss=loss,
        anchor=anchor,
        data=data,
        truth=deep_linear(widths, rank),
        settings=settings,
        shape=(tuple(widths), rank),
    )


def network_settings(
    widths: Sequence[int], batch_size: int | None, num_chains: int, num_warm_chains: int
) -> Settings:
    """The rule for networks.

    γ = mean width lets prior and layers have gains of about 1, so that nβ L + γ is about the
    largest curvature, and h = 0.35/√(nβ L + γ) is well within the limit of stability. Directions
    that the loss leaves flat have the frequency √γ: friction 4 √γ damps them about critically, and
    cools in time what the start heats. Gains of many layers multiply to more while chains leave the
    anchor: at 8 layers the largest curvature rises forty-fold. So beyond 5 layers h is smaller by
    (5/L)², and on all data the steps are as many more. Noise of minibatches heats by h/friction:
    with them the friction is at least 0.1 h/h₀², where h₀ is h without that factor.
    """
    examples = 10**6 if batch_size is None else 10**5
    num_layers = len(widths) - 1
    stretch = max(1.0, num_layers / 5) ** 2
    nbeta, localization = fs.default_nbeta(examples), sum(widths) / len(widths)
    lr = 0.35 / stretch / math.sqrt(nbeta * num_layers + localization)
    friction = 4 * math.sqrt(localization)
    more = stretch if batch_size is None else math.sqrt(stretch)
    return Settings(
        nbeta=nbeta,
        localization=localization,
        lr=lr,
        friction=friction if batch_size is None else max(friction, 0.1 / (lr * stretch**2)),
        num_chains=num_chains,
        num_warm_chains=num_warm_chains,
        num_burnin_steps=round(1500 * more),
        num_draws=round((150 if batch_size is None else 100) * more),
        num_steps_between_draws=10,
        # A look at 10⁵ examples costs as much as 100 batches.
        full_loss=50 if batch_size is None else 8,
        num_examples=None if batch_size is None else examples,
        batch_size=batch_size,
    )


def drawn_network(
    seed: int, layers: tuple[int, int], widths: tuple[int, int]
) -> tuple[list[int], int]:
    """Widths and rank, uniform: number of layers, each width, rank from 0 to the least width."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    drawn = [uniform(*widths) for _ in range(uniform(*layers) + 1)]
    return drawn, uniform(0, min(drawn))


def monomial_problem(powers: Sequence[int]) -> Problem:
    """The loss Π wᵢ^(2kᵢ) around 0, with nβ = 1000 and γ = 1, so that w is of order 1."""
    nbeta, degree = 1000.0, 2 * sum(powers)
    exponents = torch.tensor(powers)
    return Problem(
        name=" ".join(f"w{sub}^{2 * power}" for sub, power in zip("₁₂₃₄", powers, strict=False)),
        loss=lambda params, _: params["w"].square().pow(exponents).prod(),
        anchor=torch.zeros(len(powers)),
        data=no_data,
        truth=monomial(powers),
        settings=Settings(
            nbeta=nbeta,
            localization=1.0,
            lr=0.2 / math.sqrt(nbeta * degree),
            friction=1.0,
            num_chains=4096,
            num_warm_chains=1024,
            num_burnin_steps=1500,
            num_draws=150,
            num_steps_between_draws=30,
            init_noise=0.3,
        ),
        shape=tuple(powers),
    )


def separable_problem(num_parameters: int, power: int) -> Problem:
    """The loss (1/2) Σ |wᵢ|^p around 0, without localization: w scales as (2/nβ)^(1/p)."""
    nbeta = 1000.0
    scale = (2 / nbeta) ** (1 / power)
    return Problem(
        name=f"½ Σ |wᵢ|^{power} of {num_parameters}",
        loss=lambda params, _: params["w"].abs().pow(power).sum() / 2,
        anchor=torch.zeros(num_parameters),
        data=no_data,
        truth=separable(num_parameters, power),
        settings=Settings(
            nbeta=nbeta,
            localization=0.0,
            lr=0.2 * scale / math.sqrt(power * (power - 1)),
            friction=1 / scale,
            num_chains=64,
            num_warm_chains=16,
            num_burnin_steps=1000,
            num_draws=300,
            num_steps_between_draws=20,
            init_noise=scale / 2,
        ),
        shape=(num_parameters, power),
    )


MONOMIALS = ((1, 1), (1, 2), (2, 2), (1, 1, 1), (1, 2, 3))
POWERS = (2, 3, 4, 6, 8)
# Inputs, hidden, outputs and rank: three of each case of Aoyagi and Watanabe 2005, in their order.
REDUCED_RANK = (
    (20, 6, 5, 2),
    (30, 10, 12, 4),
    (40, 8, 20, 8),
    (5, 6, 20, 2),
    (12, 10, 30, 4),
    (20, 8, 40, 8),
    (4, 12, 5, 2),
    (8, 30, 10, 3),
    (12, 40, 12, 6),
    (10, 8, 9, 3),
    (24, 20, 25, 7),
    (24, 20, 25, 8),
)
# Number of layers and widths of the two smaller classes of Lau et al. 2023.
SMALL, DEEP = ((2, 5), (5, 50)), ((2, 10), (5, 100))
BATCH_SIZE = 1000
FEW = 8, 3  # chains, and how many of them are warm: so that all problems take an hour


def _reduced_rank(index: int) -> Problem:
    *widths, rank = REDUCED_RANK[index]
    return network_problem(widths, rank, index)


def _small(index: int) -> Problem:
    return network_problem(*drawn_network(index, *SMALL), index)


def _small_on_batches(index: int) -> Problem:
    return network_problem(*drawn_network(index, *SMALL), index, BATCH_SIZE, *FEW)


def _compared(index: int) -> Problem:
    # All chains at one nβ: the published package has no other.
    return network_problem(*drawn_network(index, *SMALL), index, None, 32, num_warm_chains=0)


def _deep(index: int, batch_size: int | None = None) -> Problem:
    # Seeds of their own: these are no networks of the other class.
    return network_problem(*drawn_network(1000 + index, *DEEP), index, batch_size, *FEW)


@dataclass(frozen=True)
class Group:
    """Problems of one kind: the i-th is `make(i)`."""

    title: str
    size: int
    make: Callable[[int], Problem]


GROUPS = {
    "monomials": Group(
        "monomials", len(MONOMIALS), lambda index: monomial_problem(MONOMIALS[index])
    ),
    "separable": Group(
        "½ Σ |wᵢ|^p", len(POWERS), lambda index: separable_problem(8, POWERS[index])
    ),
    "reduced rank": Group("reduced-rank regression", len(REDUCED_RANK), _reduced_rank),
    "small": Group("deep linear networks, 2–5 layers of 5–50", 100, _small),
    "deep": Group("deep linear networks, 2–10 layers of 5–100", 30, _deep),
    "compared": Group("2–5 layers of 5–50, 32 chains", 8, _compared),
    "small, minibatches": Group(
        f"2–5 layers of 5–50, batches of {BATCH_SIZE}",
        100,
        _small_on_batches,
    ),
    "deep, minibatches": Group(
        f"2–10 layers of 5–100, batches of {BATCH_SIZE}",
        30,
        lambda index: _deep(index, BATCH_SIZE),
    ),
}
