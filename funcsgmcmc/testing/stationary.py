"""z-tests that a sampler has its stationary law at a quadratic potential.

With L(w) = ½ Σ hᵢ (wᵢ − mᵢ)², gradients g = ∇L(w) + s ζ, ζ ~ N(0, I), and the sampler's nβ, γ, λ,
w₀, T:

    Λᵢ = nβ hᵢ + γ + λ
    E wᵢ = (nβ hᵢ mᵢ + γ w₀ᵢ)/Λᵢ
    Cov(wᵢ, wⱼ) = 0 for i ≠ j
    Var wᵢ = T/Λᵢ for the posterior itself; `variance` for a scheme with a bias of its own

Independent chains start from this law. Each averages wᵢ, its square and products over the second
half of its steps. Means of these averages over chains have a known standard error, however slowly a
chain mixes.

The effect of a wrong noise scale is measured: the same chains run again, with the same random
numbers and noise that is 5 % larger. If the variance does not respond, because a thermostat
compensates, chains have not forgotten their start, or gradient noise dominates, the result says
that no error in the noise scale is found.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.samplers.base import Sampler, check_sampler
from funcsgmcmc.testing import arguments, scores


@dataclass(frozen=True)
class Quadratic:
    """A loss L(w) = ½ Σ hᵢ (wᵢ − mᵢ)².

    Attributes:
        hessian: h > 0, a tree of any structure.
        minimum: m, of the same structure.
        gradient_sd: s ≥ 0, the standard deviation of noise in every entry of the gradient.
    """

    hessian: Mapping[str, Tensor] = field(
        default_factory=lambda: {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([[2.0], [4.0]])}
    )
    minimum: Mapping[str, Tensor] = field(
        default_factory=lambda: {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5], [0.0]])}
    )
    gradient_sd: float = 0.0

    def __post_init__(self) -> None:
        hessian, minimum = self.trees()
        for name, values in (("hessian", hessian), ("minimum", minimum)):
            arguments.one_chain(name, values.batch_size)
            tree.check_finite(name, values)
        tree.check_same_structure("minimum", minimum, hessian)
        checks.number("gradient_sd", self.gradient_sd)
        if not bool((tree.flatten(hessian) > 0).all()):
            raise ValueError(f"hessian must be > 0, got {tree.flatten(hessian).tolist()}")

    def trees(self) -> tuple[TensorDict, TensorDict]:
        """The trees h and m, in float64."""
        hessian = tree.parameters(self.hessian, "hessian").double()
        return hessian, tree.parameters(self.minimum, "minimum").double()


@dataclass(frozen=True)
class Stationary:
    """The result of `check_stationary`.

    Attributes:
        scores: z-scores, by name.
        limit: The largest |z| allowed.
        smallest_noise_error: The smallest relative error in the noise scale that the tests find
            with probability `power`; inf if they find none.
        variance_ratio: The ratio of Var w to its value in the law, averaged over entries.
        standard_error: The standard error of `variance_ratio`.
    """

    scores: Mapping[str, float]
    limit: float
    smallest_noise_error: float
    variance_ratio: float
    standard_error: float

    def __str__(self) -> str:
        name, score = max(self.scores.items(), key=lambda item: abs(item[1]))
        error = f"an error of {100 * self.smallest_noise_error:.2g} % in the noise scale is found"
        if not math.isfinite(self.smallest_noise_error):
            error = "no error in the noise scale is found"
        return (
            f"variance {self.variance_ratio:.4f} ± {self.standard_error:.4f} of what it should be; "
            f"largest of {len(self.scores)} z-scores {score:.2f} ({name}; limit {self.limit:.2f}); "
            + error
        )


def check_stationary(
    sampler: Sampler,
    target: Quadratic | None = None,
    *,
    variance: Mapping[str, Tensor] | None = None,
    num_chains: int = 10_000,
    num_steps: int = 1_000,
    false_alarm: float = 1e-4,
    power: float = 0.9,
    seed: int = 0,
) -> Stationary:
    """Check means, variances and covariances of a sampler's draws at a quadratic potential.

    Args:
        sampler: A sampler with settings shared by all chains, without mask, box and schedules. If
            it has no anchor, the target's minimum becomes its anchor.
        target: The loss; `Quadratic()` if None, of four entries with curvatures 0.5 to 4.
        variance: Var w of the scheme at its step size, a tree like the target's. None: that of the
            posterior, T/Λ, which most schemes meet only to some order of `lr`.
        num_chains: Number of independent chains, at least 200.
        num_steps: Steps of each chain, of which the first half is not counted: several times as
            many as a chain needs to forget its start.
        false_alarm: Probability that a right sampler fails, over all z-scores together.
        power: Probability with which an error of `smallest_noise_error` is found, at least 1/2.
        seed: Seed of all random numbers.

    Returns:
        The z-scores, and the smallest error in the noise scale that they find.

    Raises:
        AssertionError: A z-score exceeds the limit, or chains diverge.
        TypeError, ValueError: An argument is not of the kind above.
    """
    target = Quadratic() if target is None else target
    checks.instance("target", target, Quadratic)
    law = _Law(_plain(sampler, target), target, variance)
    checks.count("num_chains", num_chains, minimum=MIN_CHAINS)
    checks.count("num_steps", num_steps, minimum=2)
    checks.count("seed", seed, minimum=0)
    arguments.probability("false_alarm", false_alarm)
    arguments.power(power)
    moments = law.run(num_chains, num_steps, seed)
    healthy = torch.stack([*moments.values()]).isfinite().all(0)
    if not bool(healthy.all()):
        diverged = int(healthy.logical_not().sum())
        raise AssertionError(
            f"{type(sampler).__name__} diverged in {diverged} of {num_chains} chains of "
            f"{num_steps} steps: a smaller lr is needed for a stationary law"
        )
    errors = {name: float(m.std()) / math.sqrt(num_chains) for name, m in moments.items()}
    found = {
        name: scores.skewed_z_score(m) if name.startswith("variance") else scores.z_score(m)
        for name, m in moments.items()
    }
    limit = scores.z_limit(false_alarm, len(found))
    wrong = {name: z for name, z in found.items() if not abs(z) <= limit}
    if wrong:
        lines = [
            f"{name}: off by {float(moments[name].mean()):+.4f} ± {errors[name]:.4f}, z = {z:.1f}"
            for name, z in sorted(wrong.items(), key=lambda item: -abs(item[1]))
        ]
        raise AssertionError(
            f"{type(sampler).__name__} does not have its stationary law (|z| <= {limit:.2f} for "
            f"{len(found)} scores; deviations in units of the standard deviation or variance):\n  "
            + "\n  ".join(lines)
        )
    ratio = moments["variance of all"]
    louder = law.run(num_chains, num_steps, seed, noise_scale=1 + _LOUDER)["variance of all"]
    shift = scores.detectable_shift(errors["variance of all"], limit, power)
    return Stationary(
        scores=found,
        limit=limit,
        smallest_noise_error=_smallest(shift, louder - ratio),
        variance_ratio=1 + float(ratio.mean()),
        standard_error=errors["variance of all"],
    )


MIN_CHAINS = 200
"""With fewer chains z-scores of moments are not normal so far out in their tails."""

_LOUDER = 0.05


def _smallest(shift: float, response: Tensor) -> float:
    """The error in the noise scale that shifts the variance so far.

    Args:
        shift: The shift of the relative variance.
        response: The shift of each chain's variance by a noise larger by `_LOUDER`, `[num_chains]`.
    """
    mean, error = float(response.mean()), float(response.std()) / math.sqrt(len(response))
    if not mean > 5 * error:
        return math.inf
    # The variance goes as the square of the scale, in the share that is the noise's.
    share = mean / ((1 + _LOUDER) ** 2 - 1)
    return math.sqrt(1 + shift / share) - 1


def _plain(sampler: Sampler, target: Quadratic) -> Sampler:
    """Give the sampler an anchor, and refuse a sampler whose law is not known."""
    check_sampler(sampler)
    arguments.shared_target(sampler)
    for name in sampler.schedulable():
        if not isinstance(getattr(sampler, name), Tensor):
            raise ValueError(f"{name} must not change with the step, got a schedule")
    minimum = target.trees()[1]
    if sampler.anchor is None:
        return sampler.with_anchor(minimum)
    tree.check_same_structure("anchor", sampler.anchor, minimum)
    return sampler.replace(anchor=sampler.anchor.double())


class _Law:
    """The law that a sampler should have, for vectors `[n]`, and chains to compare with it."""

    def __init__(
        self, sampler: Sampler, target: Quadratic, variance: Mapping[str, Tensor] | None
    ) -> None:
        hessian, self.minimum = target.trees()
        self.sampler, self.gradient_sd = sampler, target.gradient_sd
        self.h, self.m = tree.flatten(hessian), tree.flatten(self.minimum)
        settings: Any = sampler
        curvature = settings.nbeta * self.h + settings.localization + settings.weight_decay
        pulled = settings.localization * tree.flatten(settings.anchor).double()
        self.mean = (settings.nbeta * self.h * self.m + pulled) / curvature
        self.variance = settings.temperature / curvature
        if variance is not None:
            given = tree.parameters(variance, "variance").double()
            tree.check_same_structure("variance", given, hessian)
            self.variance = tree.flatten(given)
        proper = (self.variance > 0) & self.variance.isfinite()
        if not bool(proper.all()):
            raise ValueError(f"Var w must be positive and finite, got {self.variance.tolist()}")

    def run(
        self, num_chains: int, num_steps: int, seed: int, noise_scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Run chains, and compare averages over the second half of their steps with the law.

        Returns:
            By name, the deviation of each chain's average from the law, `[num_chains]`, in units of
            the law's standard deviation or variance.
        """
        generator = torch.Generator().manual_seed(seed)
        n, like = len(self.h), self.minimum.expand(num_chains)
        hessian = tree.unflatten(self.h.expand(num_chains, n), like)

        def normals() -> Tensor:
            return torch.randn(num_chains, n, generator=generator, dtype=torch.float64)

        w = self.mean + self.variance.sqrt() * normals()
        state = self.sampler.init(tree.unflatten(w, like), tree.unflatten(normals(), like))
        first = torch.zeros(num_chains, n, dtype=torch.float64)
        second = torch.zeros(num_chains, n, n, dtype=torch.float64)
        burnin = num_steps // 2
        for step in range(num_steps):
            w = tree.flatten(state.params)
            z = (w - self.mean) / self.variance.sqrt()
            if step >= burnin:
                first += z
                second += z[:, :, None] * z[:, None, :]
            noisy = self.h * (w - self.m)
            if self.gradient_sd:
                noisy = noisy + self.gradient_sd * normals()
            evaluation = Evaluation(
                tree.unflatten(noisy, like),
                loss=(self.h / 2 * (w - self.m).square()).sum(-1),
                hessian_diagonal=hessian,
            )
            noise = tree.unflatten(noise_scale * normals(), like)
            state, _ = self.sampler.update(state, evaluation, noise)
            if step == 0 and self.sampler.log_weight(state) is not None:
                raise ValueError(
                    "draws must all count alike, got a sampler that gives them weights"
                )
        counted = num_steps - burnin
        first, second = first / counted, second / counted
        moments = {f"mean of entry {i}": first[:, i] for i in range(n)}
        moments |= {f"variance of entry {i}": second[:, i, i] - 1 for i in range(n)}
        moments |= {
            f"covariance of entries {i} and {j}": second[:, i, j]
            for i in range(n)
            for j in range(i)
        }
        moments["mean of all"] = first.mean(1)
        moments["variance of all"] = second.diagonal(dim1=1, dim2=2).mean(1) - 1
        return moments
