"""`SamplerSpec` tells the laws what they need to know of a sampler; `SPECS` does for those here."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

import funcsgmcmc as fs
from funcsgmcmc import checks
from funcsgmcmc.samplers import Sampler
from funcsgmcmc.testing import arguments, oracles

Range = (
    tuple[float, float] | st.SearchStrategy[Any] | Callable[[TensorDict], st.SearchStrategy[Any]]
)
DEFAULT_SCHEDULABLE = ("lr", "nbeta", "temperature")
Refusals = tuple[tuple[Mapping[str, Any], str], ...]


@dataclass(frozen=True)
class SamplerSpec:
    """What the laws need to know of a sampler. The factory is enough; the rest lets them try more.

    Attributes:
        make: The factory: `make(lr, nbeta=…, …) -> Sampler`. Its signature shows which of the
            settings that all samplers share it takes.
        settings: Values of the sampler's own settings, none at a special value, and of shared ones
            that are not to vary.
        ranges: Values to draw settings from, by name: lowest and highest value of a float, a
            hypothesis strategy, or a function of the parameters that returns one. A setting in
            `settings` alone does not vary; shared ones in neither vary in
            `strategies.SHARED_RANGES`. A law of a special value (`lr`, `nbeta`, `temperature` or a
            precision 0; no mask, box or preconditioner) is left out where the range excludes it.
        schedulable: Settings that may be schedules.
        oracle_step: The step in NumPy, `oracle_step(chain, grads, noise, prior_pull, **settings)
            -> chain`; see `oracles`. None: steps are compared with no oracle.
        oracle_start: The start in NumPy, `oracle_start(params, noise, **settings) -> chain`. None:
            the oracle starts from the state that `init` returns, which is then not tested.
        per_chain: Whether settings may be tensors with one value a chain.
        isotropic: Whether the step commutes with rotations of all parameters together, where there
            is no mask, box or preconditioner.
        adaptive: Whether step sizes depend on the raw gradients, beside a preconditioner given.
        entrywise: Whether an entry's move depends on the other entries only through numbers of the
            whole chain, and not on which entries share a leaf.
        linear_in_noise: Whether w' is an affine function of η.
        units: Powers of the units of energy and of length in the unit of each numeric setting,
            where the potential has the unit of energy and w that of length: (−1, 2) for SGLD's
            `lr`. Own settings that are not named are pure numbers. None: units are not tested.
        has_length: Whether the sampler has a unit of length of its own, so that only the unit of
            energy is free.
        refused: Settings that the factory must refuse with a ValueError, each with a pattern for
            the message.
        variance: Stationary Var w at a quadratic U of precision Λ, with gradient noise of variance
            V: `variance(lr, precision, temperature, gradient_variance, **own settings)`. None if
            no closed form is known.
        order: Weak order of averages over w, in powers of `lr`; None if it is not known.
        name: The name in reports; by default the factory's.
    """

    make: Callable[..., Sampler]
    settings: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    schedulable: tuple[str, ...] = DEFAULT_SCHEDULABLE
    oracle_step: oracles.OracleStep | None = None
    oracle_start: oracles.OracleStart | None = None
    per_chain: bool = True
    isotropic: bool = True
    adaptive: bool = False
    entrywise: bool = True
    linear_in_noise: bool = True
    units: Mapping[str, tuple[float, float]] | None = None
    has_length: bool = False
    refused: Refusals = ()
    variance: Callable[..., Any] | None = None
    order: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        self._check_types()
        if not self.name:
            function = self.make.func if isinstance(self.make, functools.partial) else self.make
            object.__setattr__(self, "name", getattr(function, "__name__", "sampler"))
        refused = {name for settings, _ in self.refused for name in settings}
        named = {*self.settings, *self.ranges, *self.schedulable, *(self.units or {}), *refused}
        unknown = sorted(name for name in named - {*DEFAULT_SCHEDULABLE} if not self.takes(name))
        if unknown:
            raise ValueError(f"{self.name} has no setting {', '.join(unknown)}: correct its spec")
        missing = [
            name for name in self._required() if name not in {**self.settings, **self.ranges}
        ]
        if missing:
            listed = ", ".join(missing)
            raise ValueError(
                f"{self.name} has settings without a default: give them in settings or ranges, "
                f"got no {listed}"
            )

    def _check_types(self) -> None:
        """Refuse fields of a wrong type.

        Raises:
            TypeError, ValueError: A field is not as the class documents it.
        """
        for name in ("settings", "ranges", "units"):
            if getattr(self, name) is not None:
                arguments.mapping(name, getattr(self, name))
        for name in ("oracle_step", "oracle_start", "variance"):
            if getattr(self, name) is not None:
                checks.function(name, getattr(self, name))
        if isinstance(self.schedulable, str):
            raise TypeError(f"schedulable must be a tuple of names, got {self.schedulable!r}")
        for name, values in self.ranges.items():
            if not (isinstance(values, st.SearchStrategy) or callable(values)):
                _check_span(f"ranges[{name!r}]", values)
        for name, powers in (self.units or {}).items():
            _check_pair(f"units[{name!r}]", powers)
        for each in self.refused:
            if not (isinstance(each, tuple) and len(each) == 2 and isinstance(each[1], str)):
                raise TypeError(f"refused must be pairs of settings and a pattern, got {each!r}")
            arguments.mapping("settings that are refused", each[0])

    def __str__(self) -> str:
        return self.name

    def sampler(self, **settings: Any) -> Sampler:
        """Call the factory.

        Raises:
            TypeError: The factory does not return a sampler.
            ValueError: A setting is per chain, and the sampler returned is shared by all chains.
        """
        made = self.make(**settings)
        checks.instance(f"what {self.name} returns", made, Sampler)
        for name, value in settings.items():
            if isinstance(value, Tensor) and value.shape != made.shape and value.ndim:
                raise ValueError(
                    f"{self.name} is given {name} for each of {len(value)} chains and returns a "
                    f"sampler of batch size {tuple(made.shape)}: SamplerSpec(per_chain=False) says "
                    "that its settings are shared"
                )
        return made

    def takes(self, setting: str) -> bool:
        """Whether the factory has a setting of this name."""
        return setting in self.setting_names

    def allows(self, setting: str, value: Any) -> bool:
        """Whether `settings` and `ranges` leave a setting free to have a value."""
        span = self.ranges.get(setting)
        if isinstance(span, tuple):
            return value is not None and span[0] <= value <= span[1]
        if span is None and setting in self.settings:
            given = self.settings[setting]
            return given is value or (isinstance(given, float | int) and given == value)
        return True

    @functools.cached_property
    def setting_names(self) -> frozenset[str]:
        """The names of the factory's settings; `**` stands for all fields of `Sampler`."""
        settings = self._signature.parameters
        takes_rest = any(each.kind is each.VAR_KEYWORD for each in settings.values())
        return frozenset(settings) | frozenset(Sampler.__dataclass_fields__ if takes_rest else ())

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        """The factory's signature."""
        return _factory_signature(self.make)

    @property
    def has_momentum(self) -> bool:
        """Whether the sampler has a momentum that it may draw afresh."""
        return self.takes("refresh_interval")

    def _required(self) -> list[str]:
        """The names of the sampler's own settings that have no default."""
        return [
            name
            for name, each in self._signature.parameters.items()
            if each.default is each.empty
            and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
            and name not in ("lr", "nbeta")
        ]


def _factory_signature(make: Any) -> inspect.Signature:
    """The signature of a sampler's factory.

    Raises:
        TypeError: `make` is a sampler, a sampler's class or no function; or it shows no signature,
            or does not take `lr` by name.
    """
    is_class = isinstance(make, type) and issubclass(make, Sampler)
    if isinstance(make, Sampler) or is_class or not callable(make):
        given = f"the class {make.__name__}" if is_class else type(make).__name__
        raise TypeError(
            f"a sampler's laws need its factory, such as sgld, to try it with other settings, "
            f"got {given}"
        )
    try:
        signature = inspect.signature(make)
    except ValueError:
        raise TypeError(f"a sampler's factory must show its settings, got {make}") from None
    settings = signature.parameters
    takes_rest = any(each.kind is each.VAR_KEYWORD for each in settings.values())
    lr = settings.get("lr")
    if (lr is None and not takes_rest) or (lr is not None and lr.kind is lr.POSITIONAL_ONLY):
        raise TypeError(f"a sampler's factory must take lr by name, got one that takes {signature}")
    return signature


def _check_pair(name: str, value: Any) -> None:
    """Check two finite numbers.

    Raises:
        TypeError: The value is no pair, or holds something else than numbers.
        ValueError: A number is infinite or NaN.
    """
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    for each in value:
        checks.finite_number(name, each)


def _check_span(name: str, value: tuple[float, float]) -> None:
    """Check the lowest and the highest value of a range.

    Raises:
        TypeError, ValueError: As `_check_pair`; or the lowest is above the highest.
    """
    _check_pair(name, value)
    if not value[0] <= value[1]:
        raise ValueError(f"{name} must be lowest and highest, got {value[0]} and {value[1]}")


def spec_of(sampler: SamplerSpec | Callable[..., Sampler]) -> SamplerSpec:
    """The spec itself, or the one of a factory alone."""
    return sampler if isinstance(sampler, SamplerSpec) else SamplerSpec(sampler)


def sgld_variance(
    lr: Any, precision: Any, temperature: Any, gradient_variance: Any, noise_level: float = 1.0
) -> Any:
    """(σ²T + εV/4)/(Λ (1 − εΛ/4))."""
    noise = noise_level**2 * temperature + lr * gradient_variance / 4
    return noise / (precision * (1 - lr * precision / 4))


def sglrw_variance(lr: Any, precision: Any, temperature: Any, gradient_variance: Any) -> Any:
    """T/Λ."""
    return temperature / precision


def sghmc_variance(
    lr: Any,
    precision: Any,
    temperature: Any,
    gradient_variance: Any,
    friction: float = 0.1,
    noise_estimate: float = 0.0,
) -> Any:
    """(T/Λ) (2 − α)/(2 − α − εΛ/2) · (α − β̂ + εV/(2T))/α."""
    plain = temperature / precision * (2 - friction) / (2 - friction - lr * precision / 2)
    return plain * (friction - noise_estimate + lr * gradient_variance / 2 / temperature) / friction


def baoa_variance(
    lr: Any, precision: Any, temperature: Any, gradient_variance: Any, friction: float
) -> Any:
    """(T + V h² (1 + c)/((1 − c) (4 − h²Λ)))/Λ, c = e^(−ζh)."""
    c = math.exp(-friction * lr)
    excess = gradient_variance * lr**2 * (1 + c) / ((1 - c) * (4 - lr**2 * precision))
    return (temperature + excess) / precision


_REFRESH: Refusals = (
    ({"refresh_interval": 0}, "refresh_interval must be >= 1, got 0"),
    ({"refresh_interval": torch.tensor([3, 0])}, "refresh_interval must be >= 1, got 0 for chain"),
)

_LANGEVIN_UNITS: Mapping[str, tuple[float, float]] = {"lr": (-1, 2)}

_SPECS = (
    SamplerSpec(
        fs.sgld,
        settings={"noise_level": 0.9},
        ranges={"noise_level": (0, 2)},
        oracle_step=oracles.sgld,
        units=_LANGEVIN_UNITS,
        oracle_start=oracles.langevin_start,
        refused=(({"noise_level": -1.0}, "noise_level must be >= 0, got -1"),),
        order=1,
        variance=sgld_variance,
    ),
    SamplerSpec(
        fs.rmsprop_sgld,
        settings={"alpha": 0.9, "eps": 0.2, "curvature": None},
        ranges={
            "alpha": (0, 0.99),
            "eps": (0.1, 2),
            "noise_level": (0, 2),
            "curvature": st.sampled_from([None, "exact"]),
        },
        oracle_step=oracles.rmsprop_sgld,
        oracle_start=oracles.langevin_start,
        isotropic=False,
        adaptive=True,
        units={"lr": (-1, 1), "eps": (0, -1)},  # G has the unit of 1/g, a length
        refused=(
            ({"alpha": 1.5}, "alpha must be <= 1, got 1.5"),
            ({"eps": 0.0}, "eps must be > 0, got 0"),
            ({"curvature": "diagonal"}, "curvature must be one of 'exact', 'hutchinson', got"),
        ),
    ),
    SamplerSpec(
        fs.cyclical_sgld,
        settings={"num_steps_per_cycle": 4.0, "exploration": 0.4},
        ranges={"num_steps_per_cycle": (1, 5), "exploration": (0, 0.9)},
        schedulable=("nbeta",),
        oracle_step=oracles.cyclical_sgld,
        units=_LANGEVIN_UNITS,
        oracle_start=oracles.langevin_start,
        refused=(
            ({"num_steps_per_cycle": 0.5}, "num_steps_per_cycle must be >= 1, got 0.5"),
            ({"exploration": 1.0}, "exploration must be < 1, got 1"),
        ),
    ),
    SamplerSpec(
        fs.sglrw,
        oracle_step=oracles.sglrw,
        oracle_start=oracles.langevin_start,
        isotropic=False,  # moves lie on a lattice
        linear_in_noise=False,
        units=_LANGEVIN_UNITS,
        order=1,
        variance=sglrw_variance,
    ),
    SamplerSpec(
        fs.contour_sgld,
        settings={
            "energy_range": (0.0371, 29.713),  # no energy drawn lies on the border of two parts
            "num_partitions": 12,
            "flatness": 0.7,
            "weight_lr": 0.05,
            "max_multiplier": 2.0,
        },
        ranges={"flatness": (0, 1.5), "weight_lr": (0, 0.9), "max_multiplier": (1, 9)},
        schedulable=("lr", "nbeta", "temperature", "weight_lr"),
        oracle_step=oracles.contour_sgld,
        oracle_start=oracles.contour_start,
        units={**_LANGEVIN_UNITS, "energy_range": (1, 0)},
        refused=(
            ({"flatness": -1.0}, "flatness must be >= 0, got -1"),
            ({"weight_lr": 1.0}, "weight_lr must be < 1, got 1"),
            ({"max_multiplier": 0.5}, "max_multiplier must be >= 1, got 0.5"),
            (
                {"weight_lr": fs.schedules.polynomial_decay(3.0)},
                "weight_lr at step 0 must be < 1, got 3",
            ),
            (
                {"energy_range": (torch.zeros(2), torch.ones(3))},
                "got 2 for low energy and 3 for high energy",
            ),
            ({"num_partitions": 2}, "num_partitions must be >= 3, got 2"),
            ({"energy_range": (1.0, 1.0)}, "energy_range must be finite with low < high, got 1"),
            ({"energy_range": (0.0, math.inf)}, "energy_range must be finite"),
        ),
    ),
    SamplerSpec(
        fs.sghmc,
        settings={"friction": 0.4, "noise_estimate": 0.1},
        ranges={"friction": (0.2, 1.9), "noise_estimate": (0, 0.1)},
        oracle_step=oracles.sghmc,
        units=_LANGEVIN_UNITS,
        oracle_start=oracles.euler_start,
        refused=(
            ({"friction": -0.1}, "friction must be >= 0, got -0.1"),
            ({"friction": 2.0}, "friction must be < 2, got 2"),
            ({"friction": math.nan}, "friction must be >= 0, got nan"),
            ({"noise_estimate": 0.5}, "noise_estimate must be <= friction, got 0.5 and 0.4"),
            *_REFRESH,
        ),
        order=1,
        variance=sghmc_variance,
    ),
    SamplerSpec(
        fs.sgnht,
        settings={"diffusion_factor": 0.1},
        ranges={"diffusion_factor": (0, 1)},
        oracle_step=oracles.sgnht,
        oracle_start=oracles.sgnht_start,
        units=_LANGEVIN_UNITS,
        order=0.5,  # in ε, with A in proportion to √ε
        has_length=True,  # ‖p‖²/d, a square of w's unit, is added to a pure number
        refused=(({"diffusion_factor": -1.0}, "diffusion_factor must be >= 0, got -1"), *_REFRESH),
    ),
    SamplerSpec(
        fs.baoa,
        settings={"friction": 2.0},
        ranges={"friction": (0, 5)},
        oracle_step=oracles.baoa,
        oracle_start=oracles.splitting_start,
        units={"lr": (-0.5, 1), "friction": (0.5, -1)},
        refused=(({"friction": -1.0}, "friction must be >= 0, got -1"), *_REFRESH),
        order=2,
        variance=baoa_variance,
    ),
    SamplerSpec(
        fs.badoda,
        settings={"diffusion_factor": 1.5, "thermostat_mass": 0.8},
        ranges={"diffusion_factor": (0, 5), "thermostat_mass": (0.2, 5)},
        oracle_step=oracles.badoda,
        oracle_start=oracles.badoda_start,
        units={
            "lr": (-0.5, 1),
            "diffusion_factor": (0.5, -1),
            "thermostat_mass": (0, 2),
        },
        order=2,
        refused=(
            ({"diffusion_factor": -1.0}, "diffusion_factor must be >= 0, got -1"),
            ({"thermostat_mass": 0.0}, "thermostat_mass must be > 0, got 0"),
            *_REFRESH,
        ),
    ),
)
SPECS: Mapping[str, SamplerSpec] = {spec.name: spec for spec in _SPECS}
"""The samplers of this library, by name."""
