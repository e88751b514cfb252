"""The settings of a run as a file has them: attributes, and what estimates need of them."""

from importlib.metadata import version
from typing import Any

from tensordict import is_tensorclass
from torch import Tensor

from funcsgmcmc import tree
from funcsgmcmc.runs.looks import Looks
from funcsgmcmc.runs.record import Samples
from funcsgmcmc.samplers.base import Sampler
from funcsgmcmc.schedules import over_steps

Variables = dict[str, tuple[tuple[str, ...], Tensor]]
"""Values by name, with the names of their dimensions."""


def settings_of_draws(samples: Samples) -> tuple[Tensor, Tensor]:
    """The settings nβ, and T of the law that was sampled, of the steps that led to the draws.

    Returns:
        Both `[C, D]`.
    """
    return settings_at(samples.sampler, samples.draw_steps, samples.num_chains)


def check_one_law(samples: Samples) -> None:
    """Refuse draws of several distributions, as those of a schedule are.

    Raises:
        ValueError: nβ or T differs between draws.
    """
    names = ("nbeta", "temperature")
    for name, values in zip(names, settings_of_draws(samples), strict=True):
        if not bool((values == values[:, :1]).all()):
            raise ValueError(
                f"draws must be of one {name} for one average over them, got from "
                f"{float(values.min()):g} to {float(values.max()):g}: let burn-in last as long as "
                "the schedule changes it (llc, which scales each draw, takes them all)"
            )


def settings_at(sampler: Sampler, draw_steps: Tensor, num_chains: int) -> tuple[Tensor, Tensor]:
    """The settings nβ, and T of the law that is sampled, of the steps that lead to some draws.

    Args:
        sampler: Of all chains.
        draw_steps: The steps that make the draws, `[D]`.
        num_chains: C.

    Returns:
        Both `[C, D]`.
    """
    # A draw is where its step begins: the step before it made it.
    steps = (draw_steps - 1).clamp(min=0).to(sampler.localization.device)
    shape = (num_chains, len(draw_steps))
    # `[D]` where all chains share a setting, `[C, D]` where each has its own: both broadcast.
    nbeta, temperature = over_steps(sampler.nbeta, steps), sampler.sampled_temperature(steps)
    return nbeta.cpu().expand(shape), temperature.cpu().expand(shape)


def constants_of(
    sampler: Sampler, draw_steps: Tensor, num_chains: int, initial_loss: Tensor | None
) -> Variables:
    """What the estimates take beside the draws; arguments as in `Samples` and `settings_at`."""
    nbeta, temperature = settings_at(sampler, draw_steps, num_chains)
    found: Variables = {
        "nbeta": (("chain", "draw"), nbeta),
        "temperature": (("chain", "draw"), temperature),
        "step": (("draw",), draw_steps),
    }
    if initial_loss is not None:
        found["initial_loss"] = (("chain",), initial_loss.expand(num_chains))
    return found


def looks_of(looks: Looks) -> Variables:
    """What the looks at all data found."""
    values = {
        "loss": looks.losses,
        "virial": looks.virials,
        "force": looks.forces,
        "noise": looks.noises,
    }
    return {name: (("chain", "full_draw"), value) for name, value in values.items()}


def moments_of(samples: Samples) -> Variables:
    """The moments of draws, with those of a parameter `a.w` as `means.a.w` and `variances.a.w`.

    Numbers of draws and log weights are those of either kind: both saw the same draws.
    """
    found: Variables = {}
    for moments in (samples.draw_moments, samples.observable_moments):
        if moments is None:
            continue
        found["count"] = (("chain",), moments.count)
        found["log_weight"] = (("chain",), moments.log_weight)
        for kind in ("means", moments.second()):
            for key, leaf in tree.leaves(getattr(moments, kind)):
                name = f"{kind}.{tree.dotted(key)}"
                dimensions = (f"{name}_dim_{i}" for i in range(leaf.ndim - 1))
                found[name] = (("chain", *dimensions), leaf.cpu())
    return found


def attributes_of(samples: Samples) -> dict[str, Any]:
    """The settings of a run for the attributes of a file: numbers, strings and lists of them."""
    sampler = samples.sampler
    settings: dict[str, Any] = {
        "inference_library": "funcsgmcmc",
        **{f"{name}_version": version(name) for name in ("funcsgmcmc", "torch", "tensordict")},
        "sampler": type(sampler).__name__,
        "num_chains": samples.num_chains,
        "num_steps": samples.num_steps,
        "first_step": samples.first_step,
        "num_burnin_steps": samples.num_burnin_steps,
        "num_steps_between_draws": samples.num_steps_between_draws,
        "chain_method": samples.chain_method,
        "key": samples.key.tolist(),
        "frozen_chains": [str(frozen) for frozen in samples.frozen],
        **samples.options,
        # Trees are too large for an attribute: whether there is one.
        "mask": "none" if sampler.mask is None else "given",
    }
    settings["inference_library_version"] = settings["funcsgmcmc_version"]
    if samples.initial_loss is not None:
        settings["initial_loss"] = samples.initial_loss.tolist()
    # A file has no None, and no booleans in some formats.
    plain = {
        name: str(value).lower() if value is None or isinstance(value, bool) else value
        for name, value in settings.items()
    }
    return plain | _numbers(sampler)


def _numbers(settings: Any, prefix: str = "") -> dict[str, Any]:
    """The numbers in a sampler, those of its schedules and preconditioners under dotted names."""
    found: dict[str, Any] = {}
    for name in settings.__dataclass_fields__:
        value = getattr(settings, name)
        if isinstance(value, Tensor) and value.ndim <= 1:  # a file takes no nested lists
            found[prefix + name] = value.tolist()
        elif is_tensorclass(value):
            found[prefix + name] = type(value).__name__
            found |= _numbers(value, f"{prefix}{name}.")
    return found
