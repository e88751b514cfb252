"""Oracles: every sampler's step in plain NumPy, for one chain, written from the papers.

A chain is a dict of values that evolve, under the names of the state's fields, with trees as
vectors `[n]` in the order of their leaves:

    params, momentum    vectors
    thermostat          a number
    step                the number of steps made

A step is a function of a chain, the raw gradient g, the noise η, the pull −∇log p of a log-prior,
and the settings:

    lr, nbeta, temperature, localization, weight_decay    numbers
    anchor, mask                                          vectors
    bounding_box_size                                     a number, or inf for none
    preconditioner                                        one of the library's, or None
    hessian_diagonal                                      h, a vector
    loss, log_prior                                       L(w) and log p(w), numbers

and the sampler's own. A start is a function of w, the noise η₀, and the settings. Everything is
float64. The formulas differ in form from the library's where they can, so that a slip in one is not
repeated in the other.
"""

import math
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from funcsgmcmc import tree
from funcsgmcmc.preconditioners import Adam, Composite, Diagonal, Identity, RMSprop

Vector = NDArray[np.float64]
Chain = dict[str, Any]
Settings = Mapping[str, Any]
OracleStep = Callable[..., Chain]
OracleStart = Callable[..., Chain]


class Preconditioned(NamedTuple):
    """A preconditioner's effect on one gradient.

    Attributes:
        gain: G.
        correction: Γ.
        drift_grad: The vector that takes the place of g in the drift; None for g itself.
        averages: The preconditioner's memory for the next step.
    """

    gain: Vector
    correction: Vector
    drift_grad: Vector | None
    averages: Any


@singledispatch
def precondition(preconditioner: Any, averages: Any, g: Vector, h: Vector) -> Preconditioned:
    """Compute G and Γ from the preconditioner's memory (None at first), g and h."""
    raise TypeError(f"no oracle for a preconditioner of type {type(preconditioner).__name__}")


@precondition.register
def _(preconditioner: None, averages: Any, g: Vector, h: Vector) -> Preconditioned:
    return Preconditioned(np.ones_like(g), np.zeros_like(g), None, None)


@precondition.register
def _(preconditioner: Identity, averages: Any, g: Vector, h: Vector) -> Preconditioned:
    return Preconditioned(np.ones_like(g), np.zeros_like(g), None, None)


@precondition.register
def _(preconditioner: Diagonal, averages: Any, g: Vector, h: Vector) -> Preconditioned:
    gain = tree.flatten(preconditioner.gain).double().numpy()
    return Preconditioned(gain, np.zeros_like(g), None, None)


@precondition.register
def _(preconditioner: RMSprop, averages: Any, g: Vector, h: Vector) -> Preconditioned:
    alpha, eps = float(preconditioner.alpha), float(preconditioner.eps)
    return rmsprop(averages, g, h, alpha, eps, with_gamma=preconditioner.hessian is not None)


@precondition.register
def _(preconditioner: Adam, averages: Any, g: Vector, h: Vector) -> Preconditioned:
    """Kingma & Ba 2015, algorithm 1: weighted means of all gradients seen and of their squares."""
    seen = [*(averages or []), g]
    beta1, beta2 = float(preconditioner.beta1), float(preconditioner.beta2)
    first, second = (
        sum(beta ** (len(seen) - 1 - i) * power for i, power in enumerate(powers))
        / sum(beta**i for i in range(len(seen)))
        for beta, powers in ((beta1, seen), (beta2, [past * past for past in seen]))
    )
    gain = 1 / (np.sqrt(second) + float(preconditioner.eps))
    return Preconditioned(gain, np.zeros_like(g), np.asarray(first), seen)


@precondition.register
def _(preconditioner: Composite, averages: Any, g: Vector, h: Vector) -> Preconditioned:
    """The product of two gains, with Γ by the product rule."""
    of_first, of_second = averages or (None, None)
    a = precondition(preconditioner.first, of_first, g, h)
    b = precondition(preconditioner.second, of_second, g, h)
    return Preconditioned(
        a.gain * b.gain,
        a.gain * b.correction + a.correction * b.gain,
        a.drift_grad if b.drift_grad is None else b.drift_grad,
        (a.averages, b.averages),
    )


def rmsprop(
    average: Vector | None, g: Vector, h: Vector, alpha: float, eps: float, *, with_gamma: bool
) -> Preconditioned:
    """Li et al. 2016, algorithm 1; Γ by the chain rule: dG = −G² d√V, dV = 2 (1 − α) g h dw."""
    average = (1 - alpha) * g * g + (0.0 if average is None else alpha * average)
    root = np.sqrt(average)
    d_root = np.divide((1 - alpha) * g * h, root, where=root > 0, out=np.zeros_like(g))
    correction = -d_root / (eps + root) ** 2 if with_gamma else np.zeros_like(g)
    return Preconditioned(1 / (eps + root), correction, None, average)


def slope(w: Vector, g: Vector, pull: Vector, s: Settings) -> Vector:
    """∇U(w)."""
    gaussian = s["localization"] * (w - s["anchor"]) + s["weight_decay"] * w
    return np.asarray(s["nbeta"] * g + gaussian + pull)


def clamp_to_box(w: Vector, s: Settings) -> Vector:
    """Clamp w to [w₀ − b, w₀ + b]."""
    box = s["bounding_box_size"]
    return np.minimum(np.maximum(w, s["anchor"] - box), s["anchor"] + box)


def reflect_at_box(w: Vector, p: Vector, s: Settings) -> tuple[Vector, Vector]:
    """Clamp w to the box, and reverse the momentum of entries that left it."""
    outside = np.abs(w - s["anchor"]) >= s["bounding_box_size"]
    return clamp_to_box(w, s), np.where(outside, -p, p)


def refreshes(chain: Chain, s: Settings) -> bool:
    """Whether this step draws the momentum afresh."""
    interval = s.get("refresh_interval")
    return interval is not None and (chain["step"] + 1) % interval == 0


def mean_energy(p: Vector, s: Settings) -> float:
    """‖p/m‖²/d over the d entries whose mask is not 0; 0 if there is none."""
    sampled = s["mask"] != 0
    return float(np.mean((p[sampled] / s["mask"][sampled]) ** 2)) if sampled.any() else 0.0


def langevin_start(w: Vector, eta: Vector, **s: Any) -> Chain:
    """A chain without a momentum."""
    return {"params": w, "step": 0}


class Descent(NamedTuple):
    """The deterministic part of a step without a momentum.

    Attributes:
        direction: G ∇U − T Γ.
        gain: G.
        chain: The chain after the step, apart from its parameters.
    """

    direction: Vector
    gain: Vector
    chain: Chain


def descend(chain: Chain, g: Vector, pull: Vector, s: Settings) -> Descent:
    """Compute the direction in which the chain goes down, and count the step."""
    made = precondition(s["preconditioner"], chain.get("averages"), g, s["hessian_diagonal"])
    drift_grad = g if made.drift_grad is None else made.drift_grad
    direction = made.gain * slope(chain["params"], drift_grad, pull, s)
    direction = direction - s["temperature"] * made.correction
    after = chain | {"averages": made.averages, "step": chain["step"] + 1}
    return Descent(direction, made.gain, after)


def sgld(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Welling & Teh 2011, eq. 4, with Li et al. 2016, eq. 6, for G."""
    down, gain, after = descend(chain, g, pull, s)
    shock = s.get("noise_level", 1.0) * np.sqrt(s["lr"] * s["temperature"] * gain) * eta
    w = chain["params"] + s["mask"] * (shock - s["lr"] / 2 * down)
    return after | {"params": clamp_to_box(w, s)}


def rmsprop_sgld(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Li et al. 2016, algorithm 1."""
    h, with_gamma = s["hessian_diagonal"], s["curvature"] is not None
    made = rmsprop(chain.get("averages"), g, h, s["alpha"], s["eps"], with_gamma=with_gamma)
    w, half = chain["params"], s["lr"] / 2
    down = made.gain * slope(w, g, pull, s) - s["temperature"] * made.correction
    shock = np.sqrt(2 * half * s["temperature"]) * made.gain**0.5 * s.get("noise_level", 1.0)
    w = clamp_to_box(w + s["mask"] * shock * eta - half * s["mask"] * down, s)
    return chain | {"params": w, "averages": made.averages, "step": chain["step"] + 1}


def cyclical_sgld(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Zhang et al. 2020, eq. 1 and algorithm 1."""
    length = s["num_steps_per_cycle"]
    share = (chain["step"] - length * math.floor(chain["step"] / length)) / length
    lr = s["lr"] * math.cos(math.pi * share / 2) ** 2
    explores = share < s["exploration"]
    now = {"lr": lr, "temperature": 0.0 if explores else s["temperature"]}
    return sgld(chain, g, eta, pull, **(s | now))


def sglrw(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Duffield et al. 2025: an entry moves up where η is below the normal quantile of (1 − r)/2."""
    down, gain, after = descend(chain, g, pull, s)
    spacing = s["mask"] * np.sqrt(s["lr"] * s["temperature"] * gain)
    ratio = np.divide(s["mask"] * s["lr"] / 2 * down, spacing, where=spacing > 0, out=0 * eta)
    up = eta < ndtri(np.clip((1 - ratio) / 2, 0, 1))
    return after | {"params": clamp_to_box(chain["params"] + spacing * (2 * up - 1), s)}


def contour_start(w: Vector, eta: Vector, **s: Any) -> Chain:
    """θ, uniform over the partitions of the energy range."""
    number = s["num_partitions"]
    return {"params": w, "step": 0, "theta": np.full(number, 1 / number), "log_weight": 0.0}


def contour_sgld(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Deng et al. 2020, algorithm 1, with a slope that is interpolated and limited."""
    w, theta, temperature = chain["params"], list(chain["theta"]), s["temperature"]
    away = w - s["anchor"]
    energy = s["nbeta"] * s["loss"] - s["log_prior"]
    energy += s["localization"] * (away @ away) / 2 + s["weight_decay"] * (w @ w) / 2
    edges = np.linspace(s["energy_range"][0], s["energy_range"][1], len(theta) - 1)
    here = int(np.searchsorted(edges, energy, side="right"))
    width, strength = edges[1] - edges[0], s["flatness"] * temperature
    slopes = np.diff(np.log(theta)) / width
    if strength > 0:
        most = s["max_multiplier"]
        slopes = np.clip(slopes, -(1 + most) / strength, (most - 1) / strength)
    knots = np.concatenate([[edges[0] - width], edges, [edges[-1] + width]])
    slopes = np.concatenate([[0.0], slopes, [0.0]])

    def integral(u: float) -> float:
        """The slope is linear between knots: trapezoids from the first one to u are exact."""
        below = [*knots[knots < u], min(max(u, knots[0]), knots[-1])]
        return float(np.trapezoid(np.interp(below, knots, slopes), below))

    centres = (knots[1:] + knots[:-1]) / 2
    log_psi = integral(energy) - np.logaddexp.reduce([integral(centre) for centre in centres])
    factor = 1 + strength * np.interp(energy, knots, slopes, left=0.0, right=0.0)
    rate = s["weight_lr"] * min(math.exp(s["flatness"] * log_psi), 1.0)
    theta = [
        old + rate * (1 - old) if index == here else old - rate * old
        for index, old in enumerate(theta)
    ]
    down, gain, after = descend(chain, g, pull, s)
    shock = np.sqrt(s["lr"] * temperature * gain) * eta
    w = w + s["mask"] * (shock - factor * s["lr"] / 2 * down)
    weights = {"theta": np.array(theta), "log_weight": s["flatness"] * log_psi}
    return after | {"params": clamp_to_box(w, s)} | weights


def euler(
    chain: Chain, force: Vector, eta: Vector, friction: float, noise: float, s: Settings
) -> Chain:
    """The update that Chen et al. 2014 (eq. 15) and Ding et al. 2014 (algorithm 2) share."""
    p = chain["momentum"] - friction * chain["momentum"]
    p = p + math.sqrt(noise * s["temperature"]) * s["mask"] * eta
    if refreshes(chain, s):
        p = math.sqrt(s["lr"] * s["temperature"]) * s["mask"] * eta
    p = p - s["mask"] * s["lr"] * force
    w, p = reflect_at_box(chain["params"] + p, p, s)
    return chain | {"params": w, "momentum": p, "step": chain["step"] + 1}


def euler_start(w: Vector, eta: Vector, **s: Any) -> Chain:
    """A momentum of variance εT."""
    momentum = s["mask"] * eta * math.sqrt(s["lr"]) * math.sqrt(s["temperature"])
    return {"params": w, "momentum": momentum, "step": 0}


def sghmc(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Chen et al. 2014, eq. 15."""
    noise = 2 * (s["friction"] - s["noise_estimate"]) * s["lr"]
    return euler(chain, slope(chain["params"], g, pull, s), eta, s["friction"], noise, s)


def sgnht_start(w: Vector, eta: Vector, **s: Any) -> Chain:
    """A momentum, and a thermostat at A."""
    return euler_start(w, eta, **s) | {"thermostat": s["diffusion_factor"]}


def sgnht(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Ding et al. 2014, algorithm 2."""
    noise = 2 * s["diffusion_factor"] * s["lr"]
    force = slope(chain["params"], g, pull, s)
    after = euler(chain, force, eta, chain["thermostat"], noise, s)
    xi = chain["thermostat"] + mean_energy(after["momentum"], s) - s["lr"] * s["temperature"]
    return after | {"thermostat": xi}


def splitting_start(w: Vector, eta: Vector, **s: Any) -> Chain:
    """A momentum of variance T."""
    return {"params": w, "momentum": s["mask"] * eta * math.sqrt(s["temperature"]), "step": 0}


def baoa(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Leimkuhler & Matthews 2015, section 7.3: B, A, O, A."""
    h, w, p = s["lr"], chain["params"], chain["momentum"]
    p = p - h * s["mask"] * slope(w, g, pull, s)  # B
    w = w + h / 2 * p  # A
    keep = 0.0 if refreshes(chain, s) else math.exp(-s["friction"] * h)
    p = keep * p + math.sqrt((1 - keep * keep) * s["temperature"]) * s["mask"] * eta  # O
    w, p = reflect_at_box(w + h / 2 * p, p, s)  # A
    return chain | {"params": w, "momentum": p, "step": chain["step"] + 1}


def badoda_start(w: Vector, eta: Vector, **s: Any) -> Chain:
    """A momentum, and a thermostat at A."""
    return splitting_start(w, eta, **s) | {"thermostat": s["diffusion_factor"]}


def badoda(chain: Chain, g: Vector, eta: Vector, pull: Vector, **s: Any) -> Chain:
    """Leimkuhler & Shang 2016, section 3: B, A, D, O, D, A; σ_A² = 2 A T."""
    h, w, p, xi = s["lr"], chain["params"], chain["momentum"], chain["thermostat"]
    temperature, mass = s["temperature"], s["thermostat_mass"]
    frozen = not np.any(s["mask"])
    p = p - h * s["mask"] * slope(w, g, pull, s)  # B
    w = w + h / 2 * p  # A
    xi = xi + (0.0 if frozen else h / 2 * (mean_energy(p, s) - temperature) / mass)  # D
    if refreshes(chain, s):
        p = math.sqrt(temperature) * s["mask"] * eta
    else:
        sigma = math.sqrt(2 * s["diffusion_factor"] * temperature)
        spread = h if xi == 0 else -math.expm1(-2 * xi * h) / (2 * xi)
        p = math.exp(-xi * h) * p + sigma * math.sqrt(spread) * s["mask"] * eta  # O
    xi = xi + (0.0 if frozen else h / 2 * (mean_energy(p, s) - temperature) / mass)  # D
    w, p = reflect_at_box(w + h / 2 * p, p, s)  # A
    return chain | {"params": w, "momentum": p, "thermostat": xi, "step": chain["step"] + 1}
