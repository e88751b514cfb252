"""The optimizers' base class: it adds groups, keeps reports of a step, saves and loads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from funcsgmcmc import checks
from funcsgmcmc import sketch as functional
from funcsgmcmc.compat.groups import Group, check_flag, check_group
from funcsgmcmc.compat.metrics import Metrics
from funcsgmcmc.compat.saving import (
    by_place,
    check_state,
    check_state_dict,
    from_published,
    leave_out_objects,
    restore_dtypes,
    restore_objects,
)
from funcsgmcmc.compat.shards import check_generators, localized
from funcsgmcmc.compat.sketch import CountSketch, SketchBuffer
from funcsgmcmc.memory import keep_freed_memory
from funcsgmcmc.random import check_key
from funcsgmcmc.shards import part_of


def _listed(params: Any) -> list[Any]:
    """Parameters or groups in a list.

    Raises:
        TypeError: They cannot be iterated over.
        ValueError: There are none.
    """
    try:
        listed = list(params)
    except TypeError as error:
        raise TypeError(
            f"params must be an iterable of parameters or of groups, got {type(params).__name__}"
        ) from error
    if not listed:
        raise ValueError("params must hold at least one parameter, got none")
    for group in listed:
        if isinstance(group, dict) and "params" not in group:
            raise ValueError(
                f"params must be parameters, or groups that hold their 'params', got "
                f"{', '.join(map(repr, group))}"
            )
    return listed


class SamplingOptimizer(Optimizer):
    """Base of `SGMCMC`, `SGLD` and `SGNHT`.

    Args:
        params: Parameters, or dicts of parameter groups.
        defaults: Settings of groups that do not set their own.
        save_metrics: Whether to keep each step's norms and inner products.
        sketch_dim: Number of entries of each of a step's sketches; None for no sketches.
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
        check_flag("save_metrics", save_metrics)
        checks.count("sketch_seed", sketch_seed, minimum=0)
        if sketch_dim is not None:
            checks.count("sketch_dim", sketch_dim, minimum=1)
        if not isinstance(params, Tensor):  # which torch refuses, or `SGMCMC` has wrapped
            params = _listed(params)
        # Before torch's __init__, which calls add_param_group, which reads them.
        # Temporaries of a step are as large as a parameter: given back to the system, they would
        # be mapped anew at each step, which takes as long as the arithmetic.
        keep_freed_memory()
        self.save_metrics = save_metrics
        self.save_sketches = sketch_dim is not None
        self._sketch_dim = sketch_dim or 0
        self._sketch_seed = sketch_seed
        self._sketch_parts: dict[Tensor, functional.CountSketch] = {}
        self._places: dict[Tensor, int] = {}
        self._remembered: dict[Tensor, list[str]] = {}
        self._kinds: dict[Tensor, tuple[torch.dtype, torch.device]] = {}
        super().__init__(params, defaults)
        # A hook, not an override: hooks that a user adds later see the state dict as it is saved.
        self.register_state_dict_post_hook(leave_out_objects)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; its chain starts at their values now.

        Sketches before and after are not comparable: their hash functions are drawn for the number
        of all parameters.

        Raises:
            TypeError, ValueError: A setting or a parameter is refused; nothing is added then.
        """
        # First, since torch puts the defaults into the group; a refusal takes the group out again.
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._start_group(group)
        except Exception:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise
        for param in group["params"]:
            state = self.state.get(param, {})
            # An entry that is None (w₀ without a box) need not be in a state dict.
            self._remembered[param] = [name for name in state if state[name] is not None]
            self._kinds[param] = (param.dtype, param.device)
        self._sketch_parts = {}  # drawn anew for the new number of parameters
        self._places = {}
        self._is_noise_checked = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of an optimizer that was made with the same settings.

        It may be one of the published package's `SGMCMC`. Priors, preconditioners and functions
        stay those of this optimizer.

        Raises:
            TypeError: The state dict is no mapping.
            ValueError: A part of it is missing, the groups differ, or it lacks an entry that this
                optimizer has.
        """
        check_state_dict(state_dict)
        state_dict = from_published(by_place(state_dict))
        params = [param for group in self.param_groups for param in group["params"]]
        # Before torch loads: a refusal leaves the optimizer as it was.
        check_state(self, self._remembered, state_dict)
        state = dict(state_dict["state"])
        for index, param in enumerate(params):
            if index in state:
                state[index] = localized(state[index], param)
        state_dict = {**state_dict, "state": state}
        super().load_state_dict(state_dict)
        restore_dtypes(self.state, params, state_dict["state"])

    def follow(self, param: Tensor) -> None:
        """Bring a parameter's state to its dtype and device, after `model.to(…)`."""
        kind = (param.dtype, param.device)
        before = self._kinds.setdefault(param, kind)
        # Asked at every step of every parameter: one comparison.
        if before != kind:
            self._kinds[param] = kind

            def moved(value: Tensor) -> Tensor:
                kind = param.dtype if value.is_floating_point() else None
                return value.to(device=param.device, dtype=kind)

            self.state[param] = pytree.tree_map_only(Tensor, moved, self.state[param])

    def _start_group(self, group: Group) -> None:
        """Check a new group, and make its metrics and sketches."""
        check_group(group)
        device = group["params"][0].device if group["params"] else "cpu"
        if self.save_metrics:
            group["metrics"] = Metrics().to(device)
        if self.save_sketches:
            # One for each group, on its device; the published package has one for all.
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
        if not self.save_sketches:
            raise RuntimeError("sketches are not enabled: set sketch_dim")
        result = SketchBuffer.create(self._sketch_dim)
        for group in self.param_groups:
            result.add_(group["sketches"])
        return result

    def sketch_part(self, param: Tensor) -> functional.CountSketch:
        """The hash functions of one parameter's entries."""
        # At the first step that needs them: the hash functions are for all groups together.
        if not self._sketch_parts:
            params = [param for group in self.param_groups for param in group["params"]]
            size = sum(param.numel() for param in params)
            sketch = CountSketch.create(size, self._sketch_dim, self._sketch_seed)
            # Parameters without gradient keep their place: sketches of all steps are comparable.
            offset = 0
            for each in params:
                part = sketch.part(offset, each.numel())
                self._sketch_parts[each] = part._replace(
                    indices=self._here(part.indices, each), signs=self._here(part.signs, each)
                )
                offset += each.numel()
        return self._sketch_parts[param]

    @staticmethod
    def _here(values: Tensor, param: Tensor) -> Tensor:
        """Of values of a parameter's entries, those of the part that this process has."""
        return part_of(values.view(param.shape), param).reshape(-1).to(param.device)

    def check_noise(self, generator: Generator | Tensor | None) -> None:
        """Before the first step, refuse processes that would not draw the same noise.

        Raises:
            TypeError, ValueError: They would not; or the generator is a tensor, but no key.
        """
        if isinstance(generator, Tensor):
            check_key(generator)
        if not self._is_noise_checked:
            check_generators([p for group in self.param_groups for p in group["params"]], generator)
            self._is_noise_checked = True

    def place(self, param: Tensor) -> int:
        """The place of a parameter among all, in the order of the groups."""
        if not self._places:
            params = [param for group in self.param_groups for param in group["params"]]
            self._places = {each: index for index, each in enumerate(params)}
        return self._places[param]

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles only its own three. `_sketch_parts` is left out: it is larger
        # than the parameters, and drawn again from the seed.
        own = ("save_metrics", "save_sketches", "_sketch_dim", "_sketch_seed", "_remembered")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        replaced = self.__dict__.get("param_groups")
        super().__setstate__(state)
        self._sketch_parts, self._kinds, self._places = {}, {}, {}
        self._is_noise_checked = False
        if replaced is None:  # made by copy or pickle, which drop hooks
            self.register_state_dict_post_hook(leave_out_objects)
        else:  # called by load_state_dict
            for group, live in zip(self.param_groups, replaced, strict=True):
                restore_objects(group, live)
