"""What the optimizers share: their groups, what they report of a step, and how they are saved."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compat.metrics import Metrics
from compat.sketch import CountSketch, SketchBuffer
from funcsgmcmc import checks, tree
from funcsgmcmc import sketch as functional
from funcsgmcmc.metrics import PartialMetrics
from funcsgmcmc.samplers.base import boxed
from funcsgmcmc.samplers.sgld import langevin
from funcsgmcmc.terms import Parts, Terms, move

Group = dict[str, Any]

_HYPERPARAMETERS = (
    "lr",
    "nbeta",
    "noise_level",
    "localization",
    "weight_decay",
    "diffusion_factor",
    "bounding_box_size",
)


class SamplingOptimizer(Optimizer):
    """Base of `SGMCMC`, `SGLD` and `SGNHT`.

    Args:
        params: Parameters, or dicts of parameter groups.
        defaults: Settings of groups that do not set their own.
        save_metrics: Whether to keep each step's norms and inner products.
        sketch_dim: Numbers to keep in each step's sketches; None for no sketches.
        sketch_seed: Names the sketch.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        save_metrics: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ):
        if sketch_dim is not None:
            checks.count("sketch_dim", sketch_dim, minimum=1)
        self.save_metrics = save_metrics
        self.save_sketches = sketch_dim is not None
        self._sketch_dim = sketch_dim
        self._sketch_seed = sketch_seed
        self._sketch_parts: dict[Tensor, functional.CountSketch] | None = None
        groups: Any = [params] if isinstance(params, Tensor | dict) else params
        super().__init__(groups, defaults)
        self.register_state_dict_post_hook(_leave_out_objects)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; its chain starts at their values now.

        Raises:
            TypeError, ValueError: A setting or a parameter is refused; nothing is added then.
        """
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        group = self.param_groups[-1]
        try:
            self._start_group(group)
        except Exception:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise
        self._sketch_parts = None

    def _start_group(self, group: Group) -> None:
        """Check a new group, and make what it needs before its first step."""
        checks.optimized(group["params"])
        for name in _HYPERPARAMETERS:
            value = group.get(name)
            if value is not None and not callable(value):
                checks.number(name, value)
        device = group["params"][0].device if group["params"] else "cpu"
        if self.save_metrics:
            group["metrics"] = Metrics().to(device)
        if self._sketch_dim is not None:
            group["sketches"] = SketchBuffer.create(self._sketch_dim, device)

    def iter_group_metrics(self) -> Iterator[Metrics]:
        """Each group's metrics of the last step.

        Raises:
            RuntimeError: The optimizer was made without `save_metrics=True`.
        """
        if not self.save_metrics:
            raise RuntimeError("metrics are not enabled: set save_metrics=True")
        for group in self.param_groups:
            yield group["metrics"]

    def get_metrics(self) -> Metrics:
        """The last step's metrics over all groups, on the CPU.

        Raises:
            RuntimeError: The optimizer was made without `save_metrics=True`.
        """
        return Metrics.aggregate(self.iter_group_metrics())

    def get_sketches(self) -> SketchBuffer:
        """The last step's sketches over all groups, a copy on the CPU.

        Raises:
            RuntimeError: The optimizer was made without `sketch_dim`.
        """
        if self._sketch_dim is None:
            raise RuntimeError("sketches are not enabled: set sketch_dim")
        result = SketchBuffer.create(self._sketch_dim)
        for group in self.param_groups:
            result.add_(group["sketches"])
        return result

    def _sketch_part(self, param: Tensor) -> functional.CountSketch:
        """The part of the sketch that a parameter's entries belong to."""
        if self._sketch_parts is None:
            params = [param for group in self.param_groups for param in group["params"]]
            size = sum(param.numel() for param in params)
            sketch = CountSketch.create(size, self._sketch_dim or 0, self._sketch_seed)
            self._sketch_parts, offset = {}, 0
            for each in params:
                part = sketch.part(offset, each.numel())
                self._sketch_parts[each] = functional.CountSketch(
                    part.indices.to(each.device), part.signs.to(each.device), part.output_dim
                )
                offset += each.numel()
        return self._sketch_parts[param]

    def __getstate__(self) -> dict[str, Any]:
        own = ("save_metrics", "save_sketches", "_sketch_dim", "_sketch_seed")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        replaced = self.__dict__.get("param_groups")
        super().__setstate__(state)
        self._sketch_parts = None
        if replaced is None:  # made by copy or pickle
            self.register_state_dict_post_hook(_leave_out_objects)
        else:  # called by load_state_dict
            for group, live in zip(self.param_groups, replaced, strict=True):
                _restore_objects(group, live)


class StepReport:
    """Collects metrics and sketches of one step of a group, parameter by parameter."""

    def __init__(self, optimizer: SamplingOptimizer, group: Group):
        self._optimizer = optimizer
        self._group = group
        self._metrics = PartialMetrics()
        self._numel = 0
        if optimizer.save_sketches:
            group["sketches"].zero_()

    def add(self, param: Tensor, terms: Terms, mask: Tensor | None) -> None:
        """Take in the terms of one parameter's update, before the update is made."""
        if self._optimizer.save_metrics:
            self._metrics.add(terms)
            self._numel += entries(param, mask)
        if self._optimizer.save_sketches:
            part = self._optimizer._sketch_part(param)
            self._group["sketches"].add_(functional.sketches(terms, part))

    def finish(self) -> None:
        """Write the group's metrics."""
        if self._optimizer.save_metrics:
            self._group["metrics"].take(self._metrics.metrics(self._numel))


def warn_of_settings(nbeta: Any, noise_level: float = 1.0) -> None:
    """Warn of settings that sample another distribution than most users mean."""
    if noise_level != 1.0:
        warnings.warn(f"noise_level is {noise_level:g}: only 1 samples the posterior", stacklevel=3)
    if nbeta == 1.0:
        warnings.warn(
            "nbeta is 1: estimates of the local learning coefficient ask for "
            "default_nbeta(dataloader)",
            stacklevel=3,
        )


def start_mask(group: Group) -> None:
    """Make a new group's mask a list, one tensor a parameter; one tensor may serve for all.

    Raises:
        TypeError, ValueError: It is not one tensor for each parameter, of its shape.
    """
    mask, params = group.get("mask"), group["params"]
    if isinstance(mask, Tensor):
        group["mask"] = mask = [mask] * len(params)
    if mask is not None:
        checks.one_each("mask", mask, params)


def masks(group: Group) -> list[Tensor | None]:
    """Each parameter's mask; None for none."""
    return group.get("mask") or [None] * len(group["params"])


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Call a closure, if there is one, with gradients on; a step is made with them off."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def settings(group: Group) -> dict[str, float]:
    """A group's hyperparameters as they are now: functions are called, schedulers' tensors read.

    Raises:
        TypeError, ValueError: A function returned what is no number >= 0.
    """
    return {
        name: float(checks.number(name, value()) if callable(value) else value)
        for name in _HYPERPARAMETERS
        if (value := group.get(name)) is not None
    }


def noise_like(param: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normals of a parameter's shape, in the default dtype."""
    empty = torch.empty_like(
        param, dtype=torch.get_default_dtype(), memory_format=torch.contiguous_format
    )
    return empty.normal_(generator=generator)


def dense_grad(param: Tensor) -> Tensor:
    """A parameter's gradient, zeros if it has none."""
    if param.grad is None:
        return torch.zeros_like(param)
    return param.grad.to_dense() if param.grad.is_sparse else param.grad


def entries(param: Tensor, mask: Tensor | None) -> int:
    """Number of entries whose mask is not zero."""
    return param.numel() if mask is None else int(tree.count(param, mask))


def langevin_step_(
    param: Tensor,
    initial: Tensor,
    parts: Parts,
    lr: float,
    half_width: float | None,
    report: StepReport,
) -> None:
    """Make SGLD's step of one parameter, in place.

    Args:
        param: w.
        initial: w₀.
        parts: What the update is made of.
        lr: ε.
        half_width: b, or None for no box.
        report: Where the step is reported.
    """
    w, terms = param.data, langevin(parts, lr)
    report.add(param, terms, parts.gains.mask)
    move(w, terms.down(), terms.up(), out=w)
    if half_width is not None:
        w.copy_(boxed(w, initial, half_width))


def _leave_out_objects(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Leave tensors and plain values in a state dict, so that `weights_only` may read it.

    What a user gave as an object (prior, preconditioner, a function for nbeta) or as a mask is
    given again when the optimizer is made again, and stays that of the optimizer that loads.
    """
    groups = [
        {name: _saved(value) for name, value in group.items() if _is_plain(name, value)}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _restore_objects(group: Group, live: Group) -> None:
    """Give a loaded group what its state dict left out, from the group that it replaces."""
    for name, value in live.items():
        if isinstance(value, Metrics | SketchBuffer) and isinstance(group.get(name), dict):
            group[name] = type(value)(**group[name]).to(value.noise.device)
        elif name not in group or not _is_plain(name, value):
            group[name] = value


def _is_plain(name: str, value: Any) -> bool:
    """Whether a group's value is saved."""
    if isinstance(value, list | tuple):
        return name != "mask" and all(_is_plain(name, each) for each in value)
    kinds = (bool, int, float, str, Tensor, Metrics, SketchBuffer)
    return value is None or (isinstance(value, kinds) and name != "mask")


def _saved(value: Any) -> Any:
    """A plain value as it is saved: NumPy's floats as Python's, metrics and sketches as dicts."""
    if isinstance(value, Metrics | SketchBuffer):
        return dict(vars(value))
    return float(value) if isinstance(value, float) else value
