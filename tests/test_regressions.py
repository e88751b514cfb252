"""Three Bayesian regressions: every sampler against a long run of NUTS (`references/`).

Step sizes are in units of 1/κ, with κ the largest curvature of U that the posterior meets. Chains
start as draws of the reference, spread out by a fifth, and must forget that. What a scheme's law
for quadratics says of a standard deviation at curvature κ is the bias allowed on its side; the
posteriors are not quadratic, for which 2 % of a standard deviation are allowed beside the Monte
Carlo error, in means and standard deviations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import funcsgmcmc as fs
import regressions
from funcsgmcmc import tree

KAPPA = {"diabetes": 4200.0, "breast_cancer": 180.0, "eight_schools": 22.0}
NUM_CHAINS, ALLOWED = 100, 0.02


@dataclass(frozen=True)
class Setting:
    """A sampler, made of κ, the lowest energy, the number of examples and the prior.

    Attributes:
        make: Makes it.
        num_burnin_steps: Enough to forget the start.
        sd_bias: Lowest and highest relative bias of a standard deviation, by the scheme's law.
    """

    make: Callable[..., fs.samplers.Sampler]
    num_burnin_steps: int
    sd_bias: tuple[float, float] = (0.0, 0.0)


def relative(variance_ratio: float) -> float:
    return math.sqrt(variance_ratio) - 1


def rmsprop(kappa, minimum, nbeta, weight_decay):
    """Its eps at five times the gradient along the stiffest direction: G varies by a few percent,
    and what Γ would correct is within what is allowed.
    """
    eps = 5 * math.sqrt(kappa) / nbeta
    settings = {"weight_decay": weight_decay, "alpha": 0.99, "eps": eps}
    return fs.rmsprop_sgld(0.4 / kappa * eps, nbeta=nbeta, **settings)


SAMPLERS = {
    "sgld": Setting(
        lambda kappa, minimum, **s: fs.sgld(0.4 / kappa, **s), 5_000, (0, relative(1 / 0.9))
    ),
    "rmsprop_sgld": Setting(rmsprop, 5_000, (0, relative(1 / 0.9))),
    "cyclical_sgld": Setting(
        lambda kappa, minimum, **s: fs.cyclical_sgld(
            0.8 / kappa, num_steps_per_cycle=100, exploration=0, **s
        ),
        5_000,
        (0, relative(1 / 0.8)),
    ),
    "sglrw": Setting(lambda kappa, minimum, **s: fs.sglrw(0.3 / kappa, **s), 5_000),
    "contour_sgld": Setting(
        lambda kappa, minimum, **s: fs.contour_sgld(
            0.4 / kappa,
            energy_range=(minimum + 3, minimum + 23),
            num_partitions=12,
            flatness=0.3,
            **s,
        ),
        5_000,
        (0, relative(1 / 0.9)),
    ),
    "sghmc": Setting(
        lambda kappa, minimum, **s: fs.sghmc(0.1 / kappa, friction=0.1, **s),
        2_000,
        (0, relative(1.9 / 1.85)),
    ),
    "sgnht": Setting(
        lambda kappa, minimum, **s: fs.sgnht(0.1 / kappa, diffusion_factor=0.05, **s),
        2_000,
        (relative(1 - 0.05), 0),
    ),
    "baoa": Setting(
        lambda kappa, minimum, **s: fs.baoa(
            math.sqrt(0.5 / kappa), friction=math.sqrt(kappa / 50), **s
        ),
        2_000,
    ),
    "badoda": Setting(
        lambda kappa, minimum, **s: fs.badoda(
            math.sqrt(0.5 / kappa), diffusion_factor=math.sqrt(kappa / 50), **s
        ),
        2_000,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", KAPPA)
@pytest.mark.parametrize("name", SAMPLERS)
def test_means_and_standard_deviations_are_those_of_nuts(name, model):
    regression, reference = getattr(regressions, model)(), regressions.reference(model)
    setting, like = SAMPLERS[name], regression.params.expand(NUM_CHAINS)
    names = tree.names(regression.params)

    def row(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([values[name].reshape(-1) for name in names])

    mean, sd = row(reference.mean), row(reference.sd)
    mcse_mean, mcse_sd = row(reference.mcse_mean), row(reference.mcse_sd)
    draws = torch.stack(
        [row({k: leaf[i] for k, leaf in reference.draws.items()}) for i in range(NUM_CHAINS)]
    )
    samples = fs.sample(
        regression.loss,
        tree.unflatten(mean + 1.2 * (draws - mean), like),
        regression.data,
        setting.make(
            KAPPA[model],
            minimum=float(regression.potential(regression.params)),
            nbeta=len(regression.data[0]),
            weight_decay=regression.weight_decay,
        ),
        num_chains=NUM_CHAINS,
        num_draws=600,
        num_burnin_steps=setting.num_burnin_steps,
        num_steps_between_draws=5,
        log_prior=regression.log_prior,
        key=fs.key(0),
        observables={"x": tree.flatten},
        initial_loss=0.0,
    )
    assert samples.healthy.all()
    x = (samples.observables["x"] - mean) / sd
    weights = torch.ones(x.shape[:2])
    if samples.log_weights is not None:
        weights = samples.log_weights.exp()
    weights = (weights / weights.mean())[..., None]
    error = (weights * x).mean((0, 1))
    variance = (weights * x**2).mean((0, 1)) - error**2
    # Chains are independent: their averages give the Monte Carlo errors.
    mean_se = (weights * (x - error)).mean(1).std(0) / NUM_CHAINS**0.5
    variance_se = (weights * ((x - error) ** 2 - variance)).mean(1).std(0) / NUM_CHAINS**0.5
    mean_se = (mean_se**2 + (mcse_mean / sd) ** 2).sqrt()
    sd_se = ((variance_se / variance.sqrt() / 2) ** 2 + (mcse_sd / sd) ** 2).sqrt()
    low, high = setting.sd_bias
    ratio = variance.sqrt() - 1
    print(
        f"{model} {name}: mean {error.abs().max():.3f} (se {mean_se.max():.3f}), sd "
        f"{ratio.min():.3f} to {ratio.max():.3f} (se {sd_se.max():.3f})"
    )
    assert (error.abs() < 4 * mean_se + ALLOWED).all()
    assert (ratio > low - ALLOWED - 4 * sd_se).all()
    assert (ratio < high + ALLOWED + 4 * sd_se).all()
