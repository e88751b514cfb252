"""The contract of a sampler: data with two pure methods.

    init(params, noise) -> state
    update(state, evaluation, noise) -> (state, terms)

`update` is deterministic: the evaluation of the potential and the noise are arguments, and nothing
is drawn, written in place or read from anywhere else. It looks up scheduled settings and hands over
to `advance`, the sampler's algorithm. `advance` is written for any batch size `[*chains]`, `[]` or
`[C]`: values of a chain are expanded on the right to a leaf's shape, and reductions run over the
other dimensions. So the same lines serve one chain, a user's `torch.vmap`, and the batched chains
of `sample`.

Shapes: hyperparameters `[]`, shared by all chains, or `[C]`; leaves of parameters, gradients, noise
and terms `[*chains, *shape]`; leaves of the anchor `[*shape]` or `[C, *shape]`, those of the mask
likewise, or one value for all entries of a leaf, `[]` or `[C]`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.curvature import HessianDiagonal
from funcsgmcmc.gradients import Evaluation
from funcsgmcmc.priors import displacement, gaussian_pull
from funcsgmcmc.schedules import Schedule, over_steps
from funcsgmcmc.terms import Slope, Term, Terms
from funcsgmcmc.tree import AnyTree, Scalar


class State(TensorClass, frozen=True):
    """The part of a chain that evolves.

    Attributes:
        params: w, leaves `[*chains, *shape]`.
        step: Number of steps made, int64 `[*chains]`.
        anchor: w₀, kept here (and unchanged) if the sampler was made without one; else None.
    """

    params: TensorDict
    step: Tensor
    anchor: TensorDict | None


class Sampler(TensorClass, frozen=True):
    """Settings that every sampler shares.

    A sampler has batch size `[]`, shared by all chains, or `[C]`, one for each chain;
    `torch.stack` of samplers gives the latter, and `sampler[i]` is chain i's own.

    A setting that `schedulable` names may be a `Schedule`. It is annotated as the tensor that
    `advance` sees, after `update` has looked it up.

    Attributes:
        lr: Step size ε, or h.
        nbeta: Inverse temperature nβ, which multiplies the mean loss.
        temperature: T, of the whole posterior.
        localization: Precision γ of the pull to the anchor.
        weight_decay: Precision λ of the pull to zero.
        anchor: w₀; None means the parameters given to `init`.
        mask: m, which is 1 for leaves that it lacks; None means 1.
        bounding_box_size: b; None means no box.
    """

    lr: Tensor
    nbeta: Tensor
    temperature: Tensor
    localization: Tensor
    weight_decay: Tensor
    anchor: TensorDict | None
    mask: TensorDict | None
    bounding_box_size: Tensor | None

    @abstractmethod
    def init(self, params: TensorDict, noise: TensorDict | None = None) -> State:
        """Make the state before the first step, at `params`, which are copied.

        Args:
            params: w, a tree of batch size `[*chains]`.
            noise: η₀, a tree like `params` with entries N(0, 1), for samplers with a momentum.

        Raises:
            TypeError, ValueError: As `start`; or noise is needed and missing.
        """

    def uses_first_noise(self) -> bool:
        """Whether `init` uses its noise; if not, a run does not draw it.

        True unless a class says otherwise of its own `init`.
        """
        return True

    @abstractmethod
    def advance(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[State, Terms]:
        """Make one step, with settings that are tensors: the sampler's algorithm.

        Args:
            state: State of batch size `[*chains]`.
            evaluation: The potential at the state's parameters.
            noise: η, entries N(0, 1).

        Returns:
            The next state, and the terms of the update.
        """

    def is_entrywise(self) -> bool:
        """Whether an entry's move depends on that entry and on values of its chain alone.

        Then trees of large or of many leaves are updated in pieces, by `advance_entries`, and
        `couple` is called once. False unless a class says otherwise of itself: a subclass whose
        `advance` is another says so again.
        """
        return False

    def advance_entries(
        self, state: State, evaluation: Evaluation, noise: TensorDict
    ) -> tuple[State, Terms]:
        """The part of `advance` that entries do by themselves, on some or all of the leaves."""
        return self.advance(state, evaluation, noise)

    def couple(self, before: Any, moved: Any) -> Any:
        """The rest of `advance`: what depends on all entries, such as a thermostat.

        Args:
            before: The state before the step.
            moved: The state that `advance_entries` made.
        """
        return moved

    def update(self, state: State, evaluation: Evaluation, noise: TensorDict) -> tuple[Any, Terms]:
        """Make one step, from an evaluation of the potential and from noise.

        Args:
            state: State of batch size `[*chains]`.
            evaluation: The potential at the state's parameters: its gradient; for some samplers its
                loss and log-prior, or the diagonal of its Hessian.
            noise: η, a tree like the parameters with entries N(0, 1).

        Returns:
            The next state, and the terms of the update.

        Raises:
            ValueError: The evaluation lacks something that this sampler needs, or the gradient or
                the noise does not have the shapes of the parameters.
        """
        tree.check_same_shapes("the gradient", evaluation.grads, state.params)
        tree.check_same_shapes("noise", noise, state.params)
        return self.at(state.step).advance(state, evaluation, noise)

    def at(self, step: Tensor) -> Self:
        """The sampler with its schedules looked up at a step's index, `[*chains]`."""
        values = {}
        for name in self.schedulable():
            setting = getattr(self, name)
            if isinstance(setting, Schedule):
                values[name] = setting(step)
        # Without schedules nothing is built: this runs at every step.
        return self.replace(**values) if values else self

    def schedulable(self) -> tuple[str, ...]:
        """Names of the settings that may be schedules."""
        return ("lr", "nbeta", "temperature")

    def hessian_estimator(self) -> HessianDiagonal | None:
        """The estimator of the Hessian's diagonal, where `advance` needs it; else None."""
        return None

    def log_weight(self, state: State) -> Tensor | None:
        """Log of the importance weight of the parameters that the last step started from.

        Args:
            state: The state after that step.

        Returns:
            `[*chains]`; None for samplers whose draws all count alike.
        """
        return None

    def sampled_temperature(self, steps: Tensor) -> Tensor:
        """T of the law e^(−U/T) that the chain samples at some steps.

        Args:
            steps: Indices, `[T]`.

        Returns:
            `[T]`, or `[C, T]` where settings are per chain.
        """
        return over_steps(self.temperature, steps)

    def virial_excess(self, force: Tensor, noise: Tensor) -> Tensor | None:
        """By how much the step and gradient noise raise E⟨w − w₀, nβ g⟩ of the law that is sampled.

        Args:
            force: E⟨nβ g, m ∇U⟩ along the chain, `[*chains]`.
            noise: E[(nβ)² (ĝ − g)ᵀ m (ĝ − g)], of the gradient's estimate ĝ, `[*chains]`.

        Returns:
            `[*chains]`, for a quadratic U; None if it is not known.
        """
        return None

    def step_order(self, *, is_noisy: bool) -> int:
        """The power of lr by which averages at stationarity are off, at small lr.

        1 unless a class says otherwise.

        Args:
            is_noisy: Whether the gradient is estimated on minibatches.
        """
        return 1

    def has_one_damping(self) -> bool:
        """Whether chains that differ in lr keep the same part of their momentum in a step.

        False unless a class, whose friction may be set in units of 1/lr, says otherwise.
        """
        return False

    def relaxation_rate(self) -> Tensor | None:
        """Rate a step at which directions return to the anchor that localization alone holds.

        Returns:
            `[*chains]` or `[]`; None if it is not known.
        """
        return None

    def start(self, given: TensorDictBase | Mapping[str, Tensor]) -> dict[str, Any]:
        """Check parameters against the sampler, and make the fields that all states share.

        Returns:
            The arguments of `State`.

        Raises:
            TypeError, ValueError: The parameters are no tree of real floating tensors, the anchor
                or the mask does not have their structure, or the chains do not agree.
        """
        params = tree.parameters(given).detach()
        if self.shape and self.shape != params.shape:
            raise ValueError(
                f"a sampler of {self.shape[0]} chains needs params of batch size "
                f"{tuple(self.shape)}, got {tuple(params.shape)}"
            )
        for name, other in (("anchor", self.anchor), ("mask", self.mask)):
            if other is not None:
                tree.check_same_structure(name, other, params, partial=name == "mask")
        if self.anchor is not None:
            # In another dtype w₀ may differ from a start that was meant to be w₀.
            tree.check_same_dtypes("anchor", self.anchor, params)
        return {
            # Copies: the caller may go on to train these tensors in place.
            "params": params.clone(),
            "step": torch.zeros(params.batch_size, dtype=torch.int64, device=tree.device(params)),
            # A chain without an anchor is pulled to its own start.
            "anchor": params.clone() if self.anchor is None else None,
            "batch_size": params.batch_size,
            # Locking would lock the caller's own tree, and warns inside a compiled graph.
            "lock": False,
        }

    def with_anchor(self, params: TensorDict, *, copy: bool = True) -> Self:
        """The sampler with `params` as its anchor; a sampler with an anchor is returned as it is.

        Args:
            params: Tree of batch size `[]`, or `[C]` for an anchor per chain.
            copy: Whether to copy them, so that they may change.
        """
        if self.anchor is not None:
            return self
        anchor = params.detach()
        # An anchor per chain makes the other settings per chain, too.
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields, chains = checks.per_chain({**fields, "anchor": anchor.clone() if copy else anchor})
        return type(self)(**fields, batch_size=chains, lock=False)

    def center(self, state: State) -> TensorDict:
        """w₀: the sampler's anchor, or the one that `init` left in the state."""
        center = state.anchor if self.anchor is None else self.anchor
        if center is None:
            raise ValueError("the state holds no anchor: make it with this sampler's init")
        return center

    def slope(self, state: State, evaluation: Evaluation) -> Slope:
        """∇U(w) term by term: nβ g, γ (w − w₀) − ∇log p, λ w."""
        # A tensor: numbers may not leave a vmap.
        one = torch.ones_like(self.localization)
        distance = Term(one, displacement(state.params, self.center(state)))
        localization = Term(self.localization, distance.direction)
        if evaluation.prior_pull is not None:
            pull = gaussian_pull(distance.direction, self.localization)
            # In metrics a user's log-prior counts with the localization.
            localization = Term(one, tree.map_leaves(torch.add, pull, evaluation.prior_pull))
        return Slope(
            grad=Term(self.nbeta, evaluation.grads),
            localization=localization,
            weight_decay=Term(self.weight_decay, state.params),
            distance=distance,
        )

    def distance(self, state: State, terms: Terms) -> Tensor:
        """‖w − w₀‖ before a step, `[*chains]`.

        Args:
            state: The state before the step.
            terms: The step's, which have w − w₀ as a rule.
        """
        if terms.distance is not None:
            return tree.norm(terms.distance.direction)
        return tree.norm(displacement(state.params, self.center(state)))

    def boxed(self, params: TensorDict, center: TensorDict) -> TensorDict:
        """Clamp w to [w₀ − b, w₀ + b]; without a box, return it as it is."""
        half_width = self.bounding_box_size
        return params if half_width is None else clamp_to_box(params, center, half_width)


def _check_one_structure(samplers: Sequence[Any]) -> None:
    """Refuse to stack samplers that differ in more than the values of their settings.

    Raises:
        TypeError: One has another class, or a setting that another one lacks or has as a schedule.
    """
    first, *others = (_structure(type(each).__name__, each) for each in samplers)
    for other in others:
        for name in {**first, **other}:
            kinds = first.get(name, "nothing"), other.get(name, "nothing")
            if kinds[0] != kinds[1]:
                raise TypeError(
                    "samplers to stack must have the same settings, got "
                    f"{name} = {kinds[0]} beside {kinds[1]}"
                )


def _structure(name: str, value: Any) -> dict[str, str]:
    """What a sampler consists of: kinds of values by their dotted names."""
    if is_tensorclass(value):
        found = {name.partition(".")[2] or "sampler": type(value).__name__}
        for field in value.__dataclass_fields__:
            found |= _structure(f"{name}.{field}", getattr(value, field))
        return found
    path = name.partition(".")[2]
    if isinstance(value, TensorDictBase):
        return {f"{path}[{tree.dotted(key)!r}]": "a leaf" for key in tree.names(value)}
    return {path: "None" if value is None else "a number"}


# A `TensorClass` gets this method when it is made: its body cannot call it.
_any_sampler: Any = Sampler
_torch_function = _any_sampler.__torch_function__.__func__


def _with_checked_stacks(
    cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    if func is torch.stack and args and not torch.compiler.is_compiling():
        _check_one_structure(args[0])
    return _torch_function(cls, func, types, args, kwargs)


_any_sampler.__torch_function__ = classmethod(_with_checked_stacks)


def clamp_to_box(params: AnyTree, center: AnyTree, half_width: Scalar) -> AnyTree:
    """Clamp w to [w₀ − b, w₀ + b].

    Args:
        params: w, a tree of batch size `[*chains]`.
        center: w₀, of the same structure.
        half_width: b, `[*chains]` or `[]`.
    """

    def clamp_leaf(leaf: Tensor, middle: Tensor) -> Tensor:
        width = tree.expand_right(half_width, leaf)
        # The bounds of a half-precision leaf are float32, and so is the clamped leaf.
        return torch.clamp(leaf, middle - width, middle + width).to(leaf.dtype)

    return tree.map_leaves(clamp_leaf, params, center)


def check_sampler(value: Any) -> None:
    """Check that a value is a sampler.

    Raises:
        TypeError: The value is of another type; a factory that was not called is named.
    """
    if not isinstance(value, Sampler):
        # A factory that was not called shows its name, not its address.
        is_factory = callable(value) and hasattr(value, "__name__")
        given = f"{value.__name__!r}: call it first" if is_factory else checks.shown(value)
        raise TypeError(
            f"sampler must be one made by a factory such as sgld(lr=..., nbeta=...), got {given}"
        )
