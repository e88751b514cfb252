"""The value of a learning coefficient at a run's own nβ and γ, where it can be computed.

λ̂ estimates nβ E[L − L(w₀)] under exp(−nβ L − (γ/2)‖w − w₀‖²), which has λ as its limit of large nβ.
Where the pole is multiple it is below λ by about (m − 1)/log nβ, which no sampler can help.

**Monomials**: the law of log Π wᵢ^(2kᵢ) under the pull is a convolution of densities on a line.

**Deep linear networks**: a rank r leaves r (H_0 + H_L − r)/2 from its regular directions, and the
network of widths Δ = H − r and rank 0 besides. Its weights are Gaussian under the pull. So only
the singular values of their product count, whose law does not depend on the order of widths
(Ipsen and Kieburg, "Weak commutation relations and eigenvalue statistics for products of
rectangular random matrices", Physical Review E 89 (2014), 032106). So let the smallest, N, come
first and the largest, D, last. By QR decompositions, that of the first layer first, all others are
N × N triangles R_j with chi-distributed diagonals (Bartlett). The last layer integrates out:

    Z(κ) = E det(1 + κ P Pᵀ)^(−D/2),    P = R_(L−1) ⋯ R_1,    κ = nβ/γ^L
    nβ E[L] = −d log Z/d log κ = (D/2) E_κ[tr(κ P Pᵀ (1 + κ P Pᵀ)⁻¹)]

with E_κ by Hamiltonian Monte Carlo on the triangles, from draws of the prior through rising κ; it
accepts or rejects, and so has no bias of its own. This is exact at rank 0. At other ranks the
singular block is not quite that network: of two layers, with C and D the parts of them that
connect their r regular hidden directions with the others, its product is A_2 (1 − D C)⁻¹ A_1.
That is a factor of κ whose logarithm is of the order of the mean square of D C, r Δ_1/γ², and for
more layers of that of the sum over hidden layers: the `leeway`. So the value has a further error of
the leeway times its change with log κ.
"""

import math
from typing import Any

import torch
from known import Problem
from torch import Tensor

from funcsgmcmc.estimates.convergence import diagnostics

# Number of triangles times N³, up to which a value takes a minute at most.
MOST_WORK = 12_000
NUM_CHAINS, NUM_RISES, NUM_MOVES, NUM_LEAPS = 128, 50, 90, 8


def value_at(problem: Problem, seed: int) -> dict[str, Any]:
    """The value at the problem's nβ, with its error, or None where it is not computed.

    Returns:
        `value`, its Monte Carlo error `value_error`, the effective number of draws `ess`, `rhat`;
        `slope`, by how much the value at nβ/e is below it; and `leeway`, of log nβ.
    """
    if problem.settings.localization == 0:
        # Separable losses: the same at every nβ.
        return _known(problem.truth.coefficient)
    if isinstance(problem.shape[0], int):
        nbeta, localization = problem.settings.nbeta, problem.settings.localization
        scale = nbeta / localization ** sum(problem.shape)
        return _known(monomial_value(problem.shape, scale))
    widths, rank = problem.shape
    return network_value(widths, rank, problem.settings.nbeta, problem.settings.localization, seed)


def _known(value: float | None, ess: float = 1e9) -> dict[str, Any]:
    """What is known exactly, or not at all."""
    return {
        "value": value,
        "value_error": 0.0,
        "ess": ess,
        "rhat": 1.0,
        "slope": 0.0,
        "leeway": 0.0,
    }


def monomial_value(powers: tuple[int, ...], scale: float) -> float:
    """κ E[Π zᵢ^(2kᵢ)] under exp(−κ Π zᵢ^(2kᵢ)) with z ~ N(0, 1) before.

    With tᵢ = 2kᵢ log|zᵢ| the monomial is e^(Σ tᵢ), and the density of a sum is a convolution. All
    integrands are smooth and vanish at both ends, so that sums over a grid converge exponentially.
    """
    step = 0.1
    half = torch.arange(-200, 30, step, dtype=torch.float64)
    density, start = torch.ones(1, dtype=torch.float64), 0.0
    for power in powers:
        log_size = half / (2 * power)
        one = torch.exp(log_size - torch.exp(2 * log_size) / 2)
        density = _convolve(density, one)
        start += float(half[0])
    total = start + step * torch.arange(len(density), dtype=torch.float64)
    loss = scale * torch.exp(total)
    weight = density * torch.exp(-loss)
    return float((weight * loss).nansum() / weight.sum())


def _convolve(one: Tensor, other: Tensor) -> Tensor:
    """The full convolution of two positive densities, term by term: small values stay accurate."""
    padded = torch.nn.functional.pad(other, (len(one) - 1, len(one) - 1))
    return torch.nn.functional.conv1d(padded[None, None], one.flip(0)[None, None])[0, 0]


def network_value(
    widths: tuple[int, ...], rank: int, nbeta: float, localization: float, seed: int
) -> dict[str, Any]:
    """The value of a deep linear network; None where it would take too long."""
    regular = rank * (widths[0] + widths[-1] - rank) / 2
    smallest, *inner, largest = sorted(width - rank for width in widths)
    if smallest == 0:
        return _known(regular)
    if len(inner) * smallest**3 > MOST_WORK:
        return _known(None, ess=0.0)
    scale = nbeta / localization ** (len(widths) - 1)
    generator = torch.Generator().manual_seed(seed)
    found = SingularBlock(smallest, tuple(inner), largest).sampled(scale, generator)
    leeway = rank * sum(width - rank for width in widths[1:-1]) / localization**2
    return found | {"value": regular + found["value"], "leeway": leeway}


class SingularBlock:
    """A deep linear network of rank 0, as triangles R_j.

    Args:
        smallest: N, the smallest width.
        inner: The widths between, one for each triangle.
        largest: D, the width that is integrated out.
    """

    def __init__(self, smallest: int, inner: tuple[int, ...], largest: int) -> None:
        self.smallest, self.inner, self.largest = smallest, inner, largest
        self.upper = torch.ones(smallest, smallest, dtype=torch.float64).triu()
        # Bartlett: the square of R_ii is chi-square with Δ_j − i degrees of freedom, i from 0.
        self.degrees = torch.tensor(inner)[:, None] - torch.arange(smallest)

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Triangles of Gaussian matrices, `[number, L − 1, N, N]`."""
        layers = [
            torch.linalg.qr(
                torch.randn(number, width, self.smallest, generator=generator, dtype=torch.float64)
            )[1]
            for width in self.inner
        ]
        return torch.stack(layers, 1)

    def gram(self, triangles: Tensor) -> Tensor:
        """P Pᵀ."""
        product = triangles[:, 0]
        for layer in triangles[:, 1:].unbind(1):
            product = layer @ product
        return product @ product.mT

    def prior(self, triangles: Tensor) -> Tensor:
        """−log of the density of the triangles."""
        diagonal = triangles.diagonal(dim1=-2, dim2=-1)
        barrier = ((self.degrees - 1) * diagonal.abs().log()).sum((-2, -1))
        return triangles.square().sum((-3, -2, -1)) / 2 - barrier

    def tilt(self, triangles: Tensor, scale: float) -> Tensor:
        """(D/2) log det(1 + κ P Pᵀ)."""
        factor = torch.linalg.cholesky(self._shifted(triangles, scale))
        return self.largest * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def rise(self, triangles: Tensor, scale: float) -> Tensor:
        """(D/2) tr(κ P Pᵀ (1 + κ P Pᵀ)⁻¹), which is d tilt/d log κ."""
        inverse = torch.linalg.inv(self._shifted(triangles, scale))
        trace = inverse.diagonal(dim1=-2, dim2=-1).sum(-1)
        return self.largest / 2 * (self.smallest - trace)

    def _shifted(self, triangles: Tensor, scale: float) -> Tensor:
        return torch.eye(self.smallest, dtype=torch.float64) + scale * self.gram(triangles)

    def sampled(self, scale: float, generator: torch.Generator) -> dict[str, float]:
        """The value with its Monte Carlo error, effective number of draws, R-hat, and slope."""
        triangles, step = self.draw(NUM_CHAINS, generator), 0.2
        # From where the tilt is of order one, to where the slope is taken from.
        typical = float(self.gram(triangles).diagonal(dim1=-2, dim2=-1).sum(-1).mean())
        below = scale / math.e
        low = min(1 / (self.largest * typical), below / 10)
        ladder = [low * (below / low) ** (i / NUM_RISES) for i in range(NUM_RISES)]
        for now in ladder:
            triangles, step = self.tuned_move(triangles, now, step, generator)
        stages = []
        for now in (below, scale):
            for _ in range(NUM_MOVES // 3):
                triangles, step = self.tuned_move(triangles, now, step, generator)
            rises = []
            for _ in range(NUM_MOVES):  # of a fixed step: tuning would bias
                triangles, _ = self.move(triangles, now, step, generator)
                rises.append(self.rise(triangles, now))
            stages.append(torch.stack(rises, 1))
        found = diagnostics(stages[1])
        return {
            "value": float(stages[1].mean()),
            "value_error": float(found.mcse_mean),
            "ess": float(found.ess_bulk),
            "rhat": float(found.r_hat),
            "slope": float(stages[1].mean() - stages[0].mean()),
        }

    def tuned_move(
        self, triangles: Tensor, scale: float, step: float, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """A move, and a step nearer to one of which four in five proposals are accepted."""
        triangles, accepted = self.move(triangles, scale, step, generator)
        return triangles, step * math.exp(0.3 * (accepted - 0.8))

    def move(
        self, triangles: Tensor, scale: float, step: float, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """One proposal of Hamiltonian Monte Carlo for each particle; and the share accepted."""
        step *= 0.8 + 0.4 * float(torch.rand((), generator=generator))
        noise = torch.randn(triangles.shape, generator=generator, dtype=torch.float64)
        momentum = noise * self.upper
        energy, force = self._slope(triangles, scale)
        start = energy + momentum.square().sum((-3, -2, -1)) / 2
        proposal = triangles
        for _ in range(NUM_LEAPS):
            momentum = momentum - step / 2 * force
            proposal = proposal + step * momentum
            energy, force = self._slope(proposal, scale)
            momentum = momentum - step / 2 * force
        rise = energy + momentum.square().sum((-3, -2, -1)) / 2 - start
        draws = torch.rand(len(rise), generator=generator, dtype=torch.float64)
        accepted = draws.log() < -rise
        kept = torch.where(accepted[:, None, None, None], proposal, triangles)
        return kept, float(accepted.double().mean())

    def _slope(self, triangles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        at = triangles.detach().requires_grad_()
        energy = self.prior(at) + self.tilt(at, scale)
        (slope,) = torch.autograd.grad(energy.sum(), at)
        return energy.detach(), slope * self.upper
