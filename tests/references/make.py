"""Make the references of `tests/regressions.py` by a long run of NUTS.

Run by hand, not by the tests, which read the files it writes beside itself: `<name>.json` and
`<name>.npz`. In an environment of its own, a few minutes on one core:

    pip install numpyro==0.22.0 jax==0.10.2 numpy==2.4.6 scikit-learn==1.9.1
    JAX_PLATFORMS=cpu python tests/references/make.py

The models share no code with the PyTorch ones: an error would have to be made twice.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.preprocessing import StandardScaler

SETTINGS = {
    "seed": 0,
    "num_chains": 8,
    "num_warmup": 2000,
    "num_samples": 40_000,
    "target_accept_prob": 0.95,
    "dense_mass": True,
}
STORED_DRAWS = 500
DIGITS = 8


def diabetes() -> None:
    """Linear regression, features and target standardized."""
    table = load_diabetes(scaled=False)
    x = StandardScaler().fit_transform(table.data)
    y = StandardScaler().fit_transform(table.target[:, None])[:, 0]
    weight = numpyro.sample("weight", dist.Normal().expand([10]).to_event(1))
    bias = numpyro.sample("bias", dist.Normal())
    log_sigma = numpyro.sample("log_sigma", dist.Normal())
    numpyro.sample("y", dist.Normal(jnp.dot(x, weight) + bias, jnp.exp(log_sigma)), obs=y)


def breast_cancer() -> None:
    """Logistic regression, features standardized."""
    table = load_breast_cancer()
    x = StandardScaler().fit_transform(table.data)
    weight = numpyro.sample("weight", dist.Normal().expand([30]).to_event(1))
    bias = numpyro.sample("bias", dist.Normal())
    numpyro.sample("y", dist.Bernoulli(logits=jnp.dot(x, weight) + bias), obs=table.target)


def eight_schools() -> None:
    """Rubin (1981), not centred, in units of ten points."""
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    s = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = numpyro.sample("mu", dist.Normal())
    log_tau = numpyro.sample("log_tau", dist.Normal())
    with numpyro.plate("schools", 8):
        offset = numpyro.sample("offset", dist.Normal())
        theta = 10.0 * mu + 10.0 * jnp.exp(log_tau) * offset
        numpyro.sample("y", dist.Normal(theta, s), obs=y)


def sample(model: Callable[[], None]) -> tuple[dict[str, np.ndarray], int]:
    """Draws `[chains, draws, *shape]` of each parameter, and the number of divergences."""
    settings: dict[str, Any] = dict(SETTINGS)
    kernel = NUTS(
        model,
        target_accept_prob=settings.pop("target_accept_prob"),
        dense_mass=settings.pop("dense_mass"),
    )
    key = jax.random.key(settings.pop("seed"))
    run = MCMC(kernel, **settings, chain_method="sequential", progress_bar=False)
    run.run(key, extra_fields=("diverging",))
    draws = {name: np.asarray(x) for name, x in run.get_samples(group_by_chain=True).items()}
    return draws, int(run.get_extra_fields()["diverging"].sum())


def summary(draws: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and standard deviation of each entry, how uncertain they are, and why to trust them.

    The error of the mean is sd/√ESS. That of the standard deviation is by the delta method from
    the error of the variance, which is the mean of the squares (x − mean)², with an ESS of its own.

    Args:
        draws: `[chains, draws, *shape]`.
    """
    mean, sd = draws.mean((0, 1)), draws.std((0, 1))
    squares = (draws - mean) ** 2
    ess_mean, ess_sd = effective_sample_size(draws), effective_sample_size(squares)
    return {
        "mean": mean,
        "sd": sd,
        "mcse_mean": sd / np.sqrt(ess_mean),
        "mcse_sd": squares.std((0, 1)) / np.sqrt(ess_sd) / (2 * sd),
        "ess_mean": ess_mean,
        "ess_sd": ess_sd,
        "r_hat": split_gelman_rubin(draws),
    }


def report(draws: dict[str, np.ndarray], divergences: int) -> dict[str, Any]:
    """What is stored as JSON; refused if the run is not good enough to be a reference."""
    found = {name: summary(leaf) for name, leaf in draws.items()}

    def entries(*statistics: str) -> np.ndarray:
        return np.concatenate([np.ravel(leaf[k]) for leaf in found.values() for k in statistics])

    diagnostics = {
        "max_r_hat": float(entries("r_hat").max()),
        "min_ess_mean": float(entries("ess_mean").min()),
        "min_ess_sd": float(entries("ess_sd").min()),
        "max_mcse_mean_over_sd": float((entries("mcse_mean") / entries("sd")).max()),
        "max_mcse_sd_over_sd": float((entries("mcse_sd") / entries("sd")).max()),
    }
    print(f"{divergences} divergences", json.dumps(diagnostics, indent=1), flush=True)
    good = (
        divergences == 0
        and diagnostics["max_r_hat"] < 1.002
        and min(diagnostics["min_ess_mean"], diagnostics["min_ess_sd"]) > 20_000
        and diagnostics["max_mcse_mean_over_sd"] < 0.01
        and diagnostics["max_mcse_sd_over_sd"] < 0.01
    )
    if not good:
        raise SystemExit("not a reference: sample longer, or with a higher target_accept_prob")
    kept = ("mean", "sd", "mcse_mean", "mcse_sd")
    return {
        "versions": {name: version(name) for name in ("numpyro", "jax", "numpy", "scikit-learn")},
        "settings": SETTINGS,
        "divergences": divergences,
        "diagnostics": {k: rounded(x) for k, x in diagnostics.items()},
        "parameters": {
            name: {k: rounded(leaf[k]) for k in kept} for name, leaf in sorted(found.items())
        },
    }


def rounded(values: np.ndarray | float) -> list | float:
    """Numbers with as many digits as a reader could want."""
    return np.vectorize(lambda x: float(f"{x:.{DIGITS}g}"))(values).tolist()


def thinned(draws: np.ndarray) -> np.ndarray:
    """Some draws, equally spaced through all chains, `[draws, *shape]`."""
    flat = draws.reshape(-1, *draws.shape[2:])
    return flat[:: len(flat) // STORED_DRAWS].astype(np.float32)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    folder = Path(__file__).parent
    for model in (diabetes, breast_cancer, eight_schools):
        name = model.__name__
        print(name, flush=True)
        draws, divergences = sample(model)
        text = json.dumps(report(draws, divergences), indent=1)
        (folder / f"{name}.json").write_text(text + "\n")
        np.savez_compressed(
            folder / f"{name}.npz", **{k: thinned(leaf) for k, leaf in sorted(draws.items())}
        )


if __name__ == "__main__":
    main()
