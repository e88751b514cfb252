"""Hostile calls: bad arguments end in an error that names them, never in a result or from below.

Each target is a public function with arguments that are good. A call replaces one or two of them by
values that nobody should give. Where a value is fine for an argument, its kind stands in the
target's table; a call with any other must raise a TypeError or a ValueError that names one of the
arguments replaced.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

import compat
import funcsgmcmc as fs
from decoders import decoder
from funcsgmcmc.decoders import components_of
from funcsgmcmc.estimates.predictive import calibration_error, log_predictive_density
from funcsgmcmc.runs.restricted import sample_components
from funcsgmcmc.testing import SPECS
from problems import good_loss

W = {"w": torch.ones(3, dtype=torch.float64)}

VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "text": lambda: "x",
    "object": object,
    "empty list": list,
    "list": lambda: [0.1, 0.2],
    "empty dict": dict,
    "dict": lambda: {"x": 1.0},
    "function": lambda: lambda *args, **kwargs: None,
    "class": lambda: int,
    "true": lambda: True,
    "negative": lambda: -1.5,
    "negative int": lambda: -3,
    "zero": lambda: 0,
    "half": lambda: 0.5,
    "one": lambda: 1,
    "three": lambda: 3,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "huge": lambda: 10**30,
    "imaginary": lambda: 1j,
    "array": lambda: np.ones(3),
    "scalar": lambda: torch.tensor(0.5),
    "int scalar": lambda: torch.tensor(3),
    "pair": lambda: torch.tensor([0.5, 0.25]),  # as many as there are chains
    "triple": lambda: torch.ones(3),
    "matrix": lambda: torch.ones(2, 3),
    "empty tensor": lambda: torch.ones(0),
    "nan tensor": lambda: torch.tensor(math.nan),
    "complex tensor": lambda: torch.tensor(1j),
    "bool tensor": lambda: torch.tensor(True),
    "meta tensor": lambda: torch.ones(3, device="meta"),
    "key": lambda: fs.key(1),
    "tree": lambda: dict(W),
    "wrong tree": lambda: {"v": torch.ones(2)},
    "nan tree": lambda: {"w": torch.tensor([1.0, math.nan, 1.0])},
    "int tree": lambda: {"w": torch.ones(3, dtype=torch.int64)},
    "sampler": lambda: fs.sgld(0.1, nbeta=1.0),
    "factory": lambda: fs.sgld,
    "module": lambda: nn.Linear(3, 1),
}

# Kinds that are good for an argument of some sort.
NUMBERS = {"zero", "half", "one", "three", "huge", "scalar", "int scalar", "pair", "triple", "key"}
POSITIVE = NUMBERS - {"zero"}
SHARED = NUMBERS - {"pair", "triple", "key"}
COUNTS = {"one", "three"}
SWITCH = {"true"}
CALLABLE = {"function", "class", "factory", "module"}
SHARES = {"zero", "half", "one", "scalar", "pair", "triple", "key"}  # from 0 to 1
MASKS = {"none", "tree", "empty dict"}


@dataclass(frozen=True)
class Target:
    """A public function.

    Attributes:
        function: It.
        arguments: Good arguments, by name.
        fine: Kinds of values that an argument may have; no others.
        names: How else errors may call an argument.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    fine: Mapping[str, set[str]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.function.__qualname__

    def hostile(self) -> list[str]:
        """The arguments that may be replaced: all of the signature."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(self.function).parameters.values()
        return [each.name for each in parameters if each.kind not in kinds]


def quadratic(params: TensorDict, batch: torch.Tensor) -> torch.Tensor:
    return good_loss(params, batch)


def record(start: Any = W) -> fs.Samples:
    return fs.sample(
        quadratic,
        start,
        torch.ones(6),
        fs.sgld(0.01, nbeta=1.0, localization=1.0),
        num_chains=2,
        num_draws=6,
        key=fs.key(0),
    )


FIRST = record()
SWEEP = fs.sweep(
    quadratic,
    W,
    torch.ones(6),
    fs.sgld,
    grid={"lr": [0.01, 0.02], "nbeta": 1.0, "localization": 1.0},
    chains_per_cell=2,
    num_draws=6,
    key=fs.key(0),
)
LOSSES = fs.losses_on(lambda params, batch: batch * params["w"].sum(), torch.ones(6))
SEEN = fs.sample(
    quadratic,
    W,
    torch.ones(6),
    fs.sgld(0.01, nbeta=1.0, localization=1.0),
    num_chains=2,
    num_draws=6,
    key=fs.key(0),
    observables={"x": LOSSES},
)
LINEAR = nn.Linear(3, 1)
DECODER = decoder("llama")
SAMPLE = Target(
    fs.sample,
    {
        "loss_fn": quadratic,
        "params": W,
        "data": torch.ones(6),
        "sampler": fs.sgld(0.01, nbeta=1.0, localization=1.0),
        "num_chains": 2,
        "num_draws": 2,
        "key": fs.key(0),
    },
    {
        "params": {"tree"},
        "data": {"pair", "triple", "matrix"},
        "sampler": {"sampler"},
        "num_draws": COUNTS,
        "num_chains": COUNTS,
        "num_burnin_steps": {"zero", *COUNTS},  # and "auto"
        "num_steps_between_draws": COUNTS,
        "batch_size": {"none", *COUNTS},
        "shared_batches": SWITCH,
        "key": {"key"},
        "chain_offset": {"zero", "key", *COUNTS},
        "init_noise": SHARED,
        "log_prior": {"none"},
        "observables": {"none", "empty dict"},
        "record": {"empty list"},
        "full_loss": {"none", "zero", *COUNTS},
        "on_draw": {"none", *CALLABLE},
        "max_loss": {"none", "negative", "negative int", *NUMBERS} - {"triple"},
        "max_distance": {"none", "negative", "negative int", *NUMBERS} - {"triple"},
        "chunk_size": {"none", *COUNTS},
        "compile": {"true"},
        "initial_loss": {"none", "negative", "negative int", *NUMBERS} - {"triple"},
        "progress": SWITCH,
        "store": {"none"},
        "resume": SWITCH,
        "checkpoint_seconds": {"none"},
        "mesh": {"none"},
    },
    {"loss_fn": "loss", "log_prior": "log_prior", "key": "key"},
)

SHARED_SETTINGS: dict[str, set[str]] = {
    "lr": NUMBERS,
    "nbeta": NUMBERS,
    "temperature": NUMBERS,
    "localization": NUMBERS,
    "weight_decay": NUMBERS,
    "anchor": {"none", "tree", "wrong tree"},
    "bounding_box_size": {"none", *POSITIVE},
    "mask": {*MASKS, "wrong tree", "int tree", "dict"},
    "noise_level": NUMBERS,
    "preconditioner": {"none"},
    "alpha": SHARES,
    "eps": POSITIVE,
    "curvature": {"none"},
    "friction": {"none", *NUMBERS},
    "noise_estimate": {"zero"},
    "diffusion_factor": NUMBERS,
    "thermostat_mass": POSITIVE,
    "refresh_interval": {"none", "one", "three", "int scalar"},
    "energy_range": {"list"},
    "num_partitions": {"three"},
    "flatness": NUMBERS,
    "weight_lr": {"none", "zero", "half", "scalar", "pair"},
    "max_multiplier": {"one", "three", "huge", "int scalar", "triple", "key"},
    "num_steps_per_cycle": POSITIVE,
    "exploration": {"zero", "half", "scalar", "pair"},
}


def factory_target(name: str) -> Target:
    spec = SPECS[name]
    function = getattr(fs, name)
    arguments = {"lr": 0.01, "nbeta": 1.0, **spec.settings}
    fine = {
        each: SHARED_SETTINGS.get(each, set()) for each in inspect.signature(function).parameters
    }
    return Target(function, arguments, fine, {"energy_range": "energy"})


TARGETS = [
    SAMPLE,
    Target(
        fs.sweep,
        {
            "loss_fn": quadratic,
            "params": W,
            "data": torch.ones(6),
            "factory": fs.sgld,
            "grid": {"lr": [0.01, 0.02], "nbeta": 1.0},
            "chains_per_cell": 2,
            "num_draws": 2,
            "key": fs.key(0),
        },
        {
            "params": {"tree"},
            "data": {"pair", "triple", "matrix"},
            "factory": {"factory"},
            "chains_per_cell": COUNTS,
            "shared_noise": SWITCH,
            "store": {"none"},
            "dry_run": SWITCH,
        },
        {"loss_fn": "loss", "factory": "sampler"},
    ),
    Target(SWEEP.refine, {}, {"grid": {"none"}}),
    Target(fs.plots.plot_sweep, {"sweep": SWEEP}),
    *(factory_target(name) for name in SPECS),
    Target(
        fs.kernel,
        {"sampler": fs.sgld(0.1, nbeta=1.0), "loss_fn": quadratic},
        {
            "sampler": {"sampler"},
            "loss_fn": CALLABLE,
            "log_prior": {"none", *CALLABLE},
            "metrics": SWITCH,
        },
    ),
    Target(
        fs.params_of,
        {"module": nn.Linear(3, 1)},
        {"module": {"module"}, "only": {"none"}, "include_frozen": SWITCH},
    ),
    Target(
        fs.module_loss,
        {"model": nn.Linear(3, 1), "criterion": nn.functional.mse_loss},
        {
            "model": {"module"},
            "criterion": {"none", "function", "factory", "module"},
            "dtype": {"none"},
        },
    ),
    Target(fs.key, {"seed": 0}, {"seed": {"zero", *COUNTS}, "device": {"none"}}),
    Target(fs.default_nbeta, {"num_examples": 10}, {"num_examples": {"three"}}),
    Target(
        fs.accumulated,
        {"loss_fn": quadratic, "num_microbatches": 2},
        {"loss_fn": CALLABLE, "num_microbatches": COUNTS},
    ),
    Target(fs.control_variates, {"loss_fn": quadratic}, {"loss_fn": CALLABLE}),
    Target(
        fs.svrg,
        {"loss_fn": quadratic, "refresh_interval": 2},
        {"loss_fn": CALLABLE, "refresh_interval": COUNTS},
    ),
    Target(
        fs.compiled,
        {"function": quadratic},
        {
            "function": CALLABLE - {"class"},
            "num_steps": {"none", *COUNTS},
            "cuda_graphs": SWITCH,
        },
    ),
    Target(
        fs.llc,
        {"samples": FIRST},
        {"initial_loss": {"none", "negative", "negative int", *NUMBERS} - {"triple"}},
    ),
    Target(
        fs.step_ladder,
        {"lr": 0.1, "num_chains": 8},
        {
            "lr": SHARED - {"zero"},
            "ratio": {"three", "int scalar"},
            "num_sizes": {"three"},
        },
        {"num_chains": "num_chains", "num_sizes": "num_"},
    ),
    Target(
        fs.llc_draws,
        {"samples": FIRST},
        {"initial_loss": {"none", "negative", "negative int", *NUMBERS} - {"triple"}},
    ),
    Target(fs.summary, {"samples": FIRST}, {"max_entries": COUNTS}),
    Target(fs.to_datatree, {"samples": FIRST}),
    Target(fs.plots.plot_llc, {"samples": FIRST}),
    Target(
        fs.restrict,
        {"function": quadratic, "params": W, "component": "w"},
        {
            "function": CALLABLE,
            "params": {"tree"},
            "component": {"function", "class", "factory"},
        },
        {"params": "component"},
    ),
    Target(
        fs.losses_on,
        {"per_example_loss": quadratic, "data": torch.ones(6)},
        {
            "per_example_loss": CALLABLE,
            "data": {
                "pair",
                "triple",
                "matrix",
                "key",
                "tree",
                "wrong tree",
                "nan tree",
                "int tree",
            },
            "batch_size": {"none", *COUNTS},
            "mask": {"none"},
        },
        {"mask": "mask"},
    ),
    Target(
        fs.influence,
        {"samples": SEEN, "of": "x"},
        {
            "of": {"text"},
            "on": {"none", "text"},
            "normalized": SWITCH,
            "block_size": COUNTS,
        },
    ),
    Target(
        fs.susceptibilities,
        {"runs": {"full": SEEN, "part": SEEN}, "of": "x"},
        {
            "of": {"text"},
            "loss": {"none", "text"},
            "initial_loss": {"none", "negative", "negative int", "zero", "half", "one", "three"}
            | {"huge", "scalar", "int scalar"},
        },
    ),
    Target(
        sample_components,
        {
            "loss_fn": quadratic,
            "params": W,
            "data": torch.ones(6),
            "sampler": fs.sgld(0.01, nbeta=1.0, localization=1.0),
            "components": {"part": "w"},
            "num_chains": 2,
            "num_draws": 2,
            "key": fs.key(0),
        },
        {
            "params": {"tree"},
            "data": {"pair", "triple", "matrix"},
            "sampler": {"sampler"},
            "num_chains": COUNTS,
            "observables": {"none", "empty dict"},
            "store": {"none"},
        },
        {"loss_fn": "function", "params": "component", "components": "component"},
    ),
    Target(log_predictive_density, {"samples": SEEN, "of": "x"}, {"of": {"text"}}),
    Target(
        calibration_error,
        {"probabilities": torch.eye(3), "targets": torch.arange(3)},
        {"num_bins": COUNTS},
        {"probabilities": "targets"},
    ),
    Target(
        fs.plots.plot_susceptibilities,
        {"found": fs.susceptibilities({"full": SEEN, "part": SEEN}, "x")},
        {"labels": {"none"}, "per_component": SWITCH},
    ),
    Target(fs.plots.plot_influence, {"found": fs.influence(SEEN, "x")}, {"order": {"none"}}),
    Target(
        fs.plots.plot_traces,
        {"samples": SEEN, "of": "x", "examples": [0]},
        {"of": {"text"}, "examples": {"key"}},
    ),
    Target(components_of, {"model": DECODER}),
    Target(fs.response.functional_variance, {"samples": SEEN, "of": "x"}, {"of": {"text"}}),
    Target(
        fs.response.llc_shares,
        {"samples": SEEN, "of": "x", "initial_losses": torch.ones(6)},
        {"of": {"text"}},
    ),
    Target(
        fs.predictive,
        {
            "model": LINEAR,
            "draws": fs.params_of(LINEAR).expand(2),
            "inputs": torch.ones(6, 3),
        },
        {
            "model": {"module"},
            "inputs": {"matrix"},
            "transform": {"none"},
            "batch_size": {"none", *COUNTS},
            "draws_at_once": COUNTS,
        },
        {"inputs": "data", "transform": "outputs"},
    ),
    Target(fs.diagnostics, {"values": torch.randn(2, 8)}, {"values": {"matrix", "key"} - {"key"}}),
    Target(
        fs.weighted_mean,
        {"values": torch.randn(2, 8), "log_weights": torch.zeros(2, 8)},
        {"values": {"matrix"}, "log_weights": {"matrix"}},
        {"values": "log_weights"},
    ),
    Target(
        fs.gradients.control_point,
        {"loss_fn": quadratic, "params": W, "data": torch.ones(6)},
        {"params": {"tree"}, "data": {"pair", "triple", "matrix"}, "batch_size": {"none", *COUNTS}},
        {"loss_fn": "loss_fn"},
    ),
    Target(
        fs.random.fold_in,
        {"key": fs.key(0), "data": 1},
        {"key": {"key"}, "data": {"zero", "one", "three", "int scalar", "key"}},
    ),
    Target(fs.random.split, {"key": fs.key(0)}, {"key": {"key"}, "num": COUNTS}),
    Target(FIRST.groups, {}, {"labels": {"none", "list", "pair", "key"}}),
    Target(FIRST.joined, {"more": record(FIRST)}, {}, {"more": "the other run"}),
    Target(fs.schedules.constant, {"value": 0.1}, {"value": NUMBERS}),
    Target(
        fs.schedules.cosine,
        {"start": 0.1, "end": 0.0, "num_steps": 10},
        {"start": NUMBERS, "end": NUMBERS, "num_steps": POSITIVE},
    ),
    Target(
        fs.preconditioners.rmsprop,
        {"alpha": 0.9, "eps": 0.1},
        {"alpha": SHARES, "eps": POSITIVE, "curvature": {"none"}},
    ),
    Target(
        fs.preconditioners.diagonal,
        {"gain": W},
        {"gain": {"tree", "wrong tree"}},
    ),
]


METHODS = ("sgld", "rmsprop_sgld", "sgnht")
OPTIMIZERS = [compat.SGLD, compat.SGNHT, *(getattr(compat.SGMCMC, name) for name in METHODS)]
REALS = SHARED
FLAGS = {"true", "zero", "one"}
OPTIMIZER_SETTINGS: dict[str, set[str]] = {
    **dict.fromkeys(("lr", "noise_level", "weight_decay", "localization", "eps"), REALS),
    "nbeta": REALS | {"function", "class", "factory", "module"},
    "diffusion_factor": REALS,
    "alpha": {"zero", "half", "one", "scalar"},
    "bounding_box_size": {"none", *REALS},
    "mask": {"none", "triple"},
    "save_metrics": FLAGS,
    "save_noise": FLAGS,
    "save_mala_vars": FLAGS,
    "sketch_dim": {"none", *COUNTS},
    "sketch_seed": {"zero", *COUNTS},
    "add_grad_correction": FLAGS,
    "metrics": {"none", "empty list"},
    "prior": {"none", *REALS, "scalar"},
    "preconditioner": {"none"},
    "preconditioner_kwargs": {"none", "empty dict"},
}


def optimizer_target(make: Callable[..., Any]) -> Target:
    parameters = inspect.signature(make).parameters
    fine = {name: OPTIMIZER_SETTINGS.get(name, set()) for name in parameters}
    if make not in (compat.SGLD, compat.SGNHT):  # one bare tensor will do, as published
        fine["params"] = {"scalar", "pair", "triple", "matrix", "empty tensor", "meta tensor"}
    return Target(make, {"params": [nn.Parameter(torch.ones(3))]}, fine)


TARGETS += map(optimizer_target, OPTIMIZERS)


class FoundError(AssertionError):
    """A call that ended wrongly."""


def attack(target: Target, replaced: dict[str, str]) -> None:
    """Make a call with values of some kinds.

    Raises:
        FoundError: It gave a result, or an error that names no argument.
    """
    if replaced.get("store") == "text":
        return  # a folder of that name would be made
    arguments = dict(target.arguments) | {name: VALUES[kind]() for name, kind in replaced.items()}
    bad = [name for name, kind in replaced.items() if kind not in target.fine.get(name, set())]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.function(**arguments)
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        # The user's own function failed on what it was given, and the error says so.
        if any(note.startswith("This happened when") for note in notes):
            return
        names = {*replaced, *(target.names[name] for name in replaced if name in target.names)}
        is_named = any(name in str(error) for name in names)
        if not (isinstance(error, TypeError | ValueError) and is_named):
            kind = type(error).__name__
            raise FoundError(f"{target}({replaced}) ends in {kind}: {error}") from error
    else:
        if bad:
            raise FoundError(f"{target}({replaced}) gives a result")


def calls(target: Target) -> st.SearchStrategy[dict[str, str]]:
    """One or two arguments, and kinds for them."""
    names = st.lists(st.sampled_from(target.hostile()), min_size=1, max_size=2, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {name: st.sampled_from(sorted(VALUES)) for name in chosen}
        )
    )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_bad_arguments_are_named(target):
    @hypothesis.settings(max_examples=25)
    @hypothesis.given(calls(target))
    def hostile(replaced):
        attack(target, replaced)

    hostile()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_kind_for_every_argument(target):
    """Each alone, then pairs: ten thousand calls over all targets."""
    found = []
    for name in target.hostile():
        for kind in VALUES:
            try:
                attack(target, {name: kind})
            except FoundError as finding:
                found.append(str(finding))
    assert not found, "\n".join(found)

    @hypothesis.settings(max_examples=120)
    @hypothesis.given(calls(target))
    def hostile(replaced):
        attack(target, replaced)

    hostile()


def test_signatures_are_covered():
    """No argument of a target is unknown to its table by a misprint, and no setting lacks a row."""
    settings = {name for spec in SPECS.values() for name in inspect.signature(spec.make).parameters}
    assert settings <= SHARED_SETTINGS.keys(), "SHARED_SETTINGS needs a row for each setting"
    for target in TARGETS:
        parameters = inspect.signature(target.function).parameters
        assert set(target.fine) <= set(parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.function(**target.arguments)
