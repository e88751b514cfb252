"""The settings of a run as a file has them: attributes, and what estimates need of them."""

from importlib.metadata import version
from typing import Any

from tensordict import is_tensorclass
from torch import Tensor

from funcsgmcmc.runs.record import Samples
from funcsgmcmc.schedules import over_steps


def settings_of_draws(samples: Samples) -> tuple[Tensor, Tensor]:
    """The settings nβ, and T of the law that was sampled, of the steps that led to the draws.

    Returns:
        Both `[C, D]`.
    """
    sampler = samples.sampler
    # A draw is where its step begins: the step before it made it.
    steps = (samples.draw_steps - 1).clamp(min=0).to(sampler.localization.device)
    shape = (samples.num_chains, samples.num_draws)
    # `[D]` where all chains share a setting, `[C, D]` where each has its own: both broadcast.
    nbeta, temperature = over_steps(sampler.nbeta, steps), sampler.sampled_temperature(steps)
    return nbeta.cpu().expand(shape), temperature.cpu().expand(shape)


def constants_of(samples: Samples) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Dimensions and values of what the estimates take beside the draws."""
    nbeta, temperature = settings_of_draws(samples)
    found: dict[str, tuple[tuple[str, ...], Tensor]] = {
        "nbeta": (("chain", "draw"), nbeta),
        "temperature": (("chain", "draw"), temperature),
        "step": (("draw",), samples.draw_steps),
    }
    if samples.initial_loss is not None:
        found["initial_loss"] = (("chain",), samples.initial_loss.expand(samples.num_chains))
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
