"""Every sampler's step in plain NumPy, for one chain, written from the papers.

A chain is a dict of what evolves, its parameters one vector `[n]`; a step is a function of it, the
raw gradient g, the noise η, the pull of a log-prior, and the settings:

    lr, nbeta, temperature, localization, weight_decay    numbers
    anchor, mask                                          vectors
    box                                                   a number, or inf for none
    gain, correction                                      G and Γ, vectors

and the sampler's own. Forms differ from those of the library where they can.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import ndtri

Chain = dict[str, Any]
Step = Callable[..., Chain]


def slope(w: np.ndarray, g: np.ndarray, pull: np.ndarray, s: Mapping[str, Any]) -> np.ndarray:
    """∇U(w)."""
    return s["nbeta"] * g + s["localization"] * (w - s["anchor"]) + s["weight_decay"] * w + pull


def boxed(w: np.ndarray, s: Mapping[str, Any]) -> np.ndarray:
    return np.minimum(np.maximum(w, s["anchor"] - s["box"]), s["anchor"] + s["box"])


def bounced(w: np.ndarray, p: np.ndarray, s: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return boxed(w, s), np.where(np.abs(w - s["anchor"]) >= s["box"], -p, p)


def refreshes(chain: Chain, s: Mapping[str, Any]) -> bool:
    return s["refresh_interval"] is not None and (chain["t"] + 1) % s["refresh_interval"] == 0


def sampled(s: Mapping[str, Any]) -> int:
    return max(1, int(np.sum(s["mask"] != 0)))


def sgld(chain: Chain, g: np.ndarray, eta: np.ndarray, pull: np.ndarray, **s: Any) -> Chain:
    """Welling & Teh 2011, eq. 4, with Li et al. 2016, eq. 6, for G."""
    w, temperature = chain["w"], s["temperature"]
    down = s["gain"] * slope(w, g, pull, s) - temperature * s["correction"]
    shock = s["noise_level"] * np.sqrt(s["lr"] * temperature * s["gain"]) * eta
    return chain | {"w": boxed(w + s["mask"] * (shock - s["lr"] / 2 * down), s)}


def sglrw(chain: Chain, g: np.ndarray, eta: np.ndarray, pull: np.ndarray, **s: Any) -> Chain:
    """Duffield et al. 2025: a move up where the noise is below the quantile of its probability."""
    w, temperature = chain["w"], s["temperature"]
    down = s["gain"] * slope(w, g, pull, s) - temperature * s["correction"]
    spacing = s["mask"] * np.sqrt(s["lr"] * temperature * s["gain"])
    ratio = np.divide(s["mask"] * s["lr"] / 2 * down, spacing, where=spacing > 0, out=0 * w)
    up = eta < ndtri(np.clip((1 - ratio) / 2, 0, 1))
    return chain | {"w": boxed(w + spacing * (2 * up - 1), s)}


def contour_sgld(chain: Chain, g: np.ndarray, eta: np.ndarray, pull: np.ndarray, **s: Any) -> Chain:
    """Deng et al. 2020, algorithm 1, part by part."""
    w, theta, temperature = chain["w"], list(chain["theta"]), s["temperature"]
    away = w - s["anchor"]
    energy = s["nbeta"] * s["loss"] - s["log_prior"]
    energy += s["localization"] * (away @ away) / 2 + s["weight_decay"] * (w @ w) / 2
    edges = np.linspace(*s["energy_range"], len(theta) - 1)
    here = int(np.searchsorted(edges, energy, side="right"))
    rate = s["weight_lr"] * theta[here] ** s["flatness"]
    theta = [
        old + rate * (1 - old) if part == here else old - rate * old
        for part, old in enumerate(theta)
    ]
    log_psi, gradient = math.log(theta[max(here - 1, 0)]), 0.0
    if 0 < here < len(theta) - 1:
        gradient = math.log(theta[here] / theta[here - 1]) / (edges[1] - edges[0])
        log_psi += gradient * (energy - edges[here - 1])
    factor = 1 + s["flatness"] * temperature * gradient
    down = s["gain"] * slope(w, g, pull, s) - temperature * s["correction"]
    shock = np.sqrt(s["lr"] * temperature * s["gain"]) * eta
    moved = w + s["mask"] * (shock - factor * s["lr"] / 2 * down)
    known = {"theta": np.array(theta), "log_weight": s["flatness"] * log_psi}
    return chain | known | {"w": boxed(moved, s)}


def euler(
    chain: Chain, force: np.ndarray, eta: np.ndarray, friction: float, noise: float, s: Any
) -> Chain:
    """The update that Chen et al. 2014 (eq. 15) and Ding et al. 2014 (algorithm 2) share."""
    p = chain["p"] - friction * chain["p"] + math.sqrt(noise * s["temperature"]) * s["mask"] * eta
    if refreshes(chain, s):
        p = math.sqrt(s["lr"] * s["temperature"]) * s["mask"] * eta
    p = p - s["mask"] * s["lr"] * force
    w, bounced_p = bounced(chain["w"] + p, p, s)
    return chain | {"w": w, "p": bounced_p}


def sghmc(chain: Chain, g: np.ndarray, eta: np.ndarray, pull: np.ndarray, **s: Any) -> Chain:
    noise = 2 * (s["friction"] - s["noise_estimate"]) * s["lr"]
    return euler(chain, slope(chain["w"], g, pull, s), eta, s["friction"], noise, s)


def sgnht(chain: Chain, g: np.ndarray, eta: np.ndarray, pull: np.ndarray, **s: Any) -> Chain:
    noise = 2 * s["diffusion_factor"] * s["lr"]
    moved = euler(chain, slope(chain["w"], g, pull, s), eta, chain["xi"], noise, s)
    energy = sum(entry * entry for entry in moved["p"])
    xi = chain["xi"] + energy / sampled(s) - s["lr"] * s["temperature"]
    return moved | {"xi": xi}


def baoa(chain: Chain, g: np.ndarray, eta: np.ndarray, pull: np.ndarray, **s: Any) -> Chain:
    """Leimkuhler & Matthews 2015, section 7.3, part by part."""
    h, w, p = s["lr"], chain["w"], chain["p"]
    p = p - h * s["mask"] * slope(w, g, pull, s)  # B
    w = w + h / 2 * p  # A
    keep = 0.0 if refreshes(chain, s) else math.exp(-s["friction"] * h)
    p = keep * p + math.sqrt((1 - keep * keep) * s["temperature"]) * s["mask"] * eta  # O
    w, p = bounced(w + h / 2 * p, p, s)  # A
    return chain | {"w": w, "p": p}


def badoda(chain: Chain, g: np.ndarray, eta: np.ndarray, pull: np.ndarray, **s: Any) -> Chain:
    """Leimkuhler & Shang 2016, section 3, part by part; σ_A² = 2 A T."""
    h, w, p, xi = s["lr"], chain["w"], chain["p"], chain["xi"]
    temperature, mass = s["temperature"], s["thermostat_mass"] * sampled(s)
    p = p - h * s["mask"] * slope(w, g, pull, s)  # B
    w = w + h / 2 * p  # A
    xi = xi + h / 2 * (p @ p - sampled(s) * temperature) / mass  # D
    if refreshes(chain, s):
        p = math.sqrt(temperature) * s["mask"] * eta
    else:
        sigma = math.sqrt(2 * s["diffusion_factor"] * temperature)
        spread = h if xi == 0 else -math.expm1(-2 * xi * h) / (2 * xi)
        p = math.exp(-xi * h) * p + sigma * math.sqrt(spread) * s["mask"] * eta  # O
    xi = xi + h / 2 * (p @ p - sampled(s) * temperature) / mass  # D
    w, p = bounced(w + h / 2 * p, p, s)  # A
    return chain | {"w": w, "p": p, "xi": xi}
