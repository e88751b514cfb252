"""Diagonal preconditioners G: state and gradient in, scaling and new state out.

A sampler with preconditioner G scales its drift by G and its noise by √G, so that (for G constant)
the stationary law stays that of G = 1 while the step size adapts to each parameter. A
preconditioner is a `TensorClass` with two methods,

    init(params) -> state
    update(state, grads, hessian_diagonal) -> Scaling

where `state` is a tree of running averages of the batch size of `params` (without leaves for a
preconditioner that keeps none). Where G changes with w, the law stays the same only with the
further drift Γ = ∂G/∂w; see `rmsprop`.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase
from torch import Tensor, nn

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.curvature import ExactDiagonal, HessianDiagonal, Hutchinson
from funcsgmcmc.tree import AnyTree, Scalar


class Scaling(NamedTuple):
    """A preconditioner's factors for one step, and its next state.

    Attributes:
        gain: G, a tree like the parameters; None for 1, which costs nothing.
        state: The preconditioner's next state.
        correction: Γ; None for 0.
        drift_grads: The tree that replaces g in the drift; None for g itself.
    """

    gain: TensorDict | None
    state: TensorDict
    correction: TensorDict | None = None
    drift_grads: TensorDict | None = None


class Preconditioner(TensorClass, frozen=True):
    """The contract of a preconditioner; see the module's docstring."""

    @abstractmethod
    def init(self, params: TensorDict) -> TensorDict:
        """Running averages before the first step, for parameters of batch size `[*chains]`."""

    @abstractmethod
    def update(
        self, state: TensorDict, grads: TensorDict, hessian_diagonal: TensorDict | None = None
    ) -> Scaling:
        """Scaling for this step's gradients.

        Args:
            state: Running averages.
            grads: g = ∇L(w), raw: without nβ.
            hessian_diagonal: h, where there is a `hessian_estimator`.
        """

    def hessian_estimator(self) -> HessianDiagonal | None:
        """The estimator of the Hessian's diagonal, where `update` needs it; else None."""
        return None

    def is_entrywise(self) -> bool:
        """Whether an entry's G and Γ depend on that entry alone; see `Sampler.is_entrywise`."""
        return False


class Identity(Preconditioner, frozen=True):
    """See `identity`."""

    def init(self, params: TensorDict) -> TensorDict:
        """No state: a tree without leaves."""
        return tree.build({}, params.batch_size)

    def is_entrywise(self) -> bool:
        """Every entry has its own G."""
        return type(self) is Identity

    def update(
        self, state: TensorDict, grads: TensorDict, hessian_diagonal: TensorDict | None = None
    ) -> Scaling:
        """G = 1."""
        # None and not a tree of ones: a step without preconditioner multiplies by nothing.
        return Scaling(None, state)


class Diagonal(Preconditioner, frozen=True):
    """See `diagonal`."""

    gain: TensorDict

    def init(self, params: TensorDict) -> TensorDict:
        """No state: a tree without leaves."""
        # Here gain and parameters meet for the first time.
        tree.check_same_structure("gain", self.gain, params)
        return tree.build({}, params.batch_size)

    def is_entrywise(self) -> bool:
        """Every entry has its own G."""
        return type(self) is Diagonal

    def update(
        self, state: TensorDict, grads: TensorDict, hessian_diagonal: TensorDict | None = None
    ) -> Scaling:
        """The G given."""
        return Scaling(self.gain, state)


class RMSprop(Preconditioner, frozen=True):
    """See `rmsprop`."""

    alpha: Tensor
    eps: Tensor
    hessian: HessianDiagonal | None

    def init(self, params: TensorDict) -> TensorDict:
        """V₀ = 0, in float32 or better."""
        return _zeros(params)

    def is_entrywise(self) -> bool:
        """Every entry has its own G."""
        return type(self) is RMSprop

    def update(
        self, state: TensorDict, grads: TensorDict, hessian_diagonal: TensorDict | None = None
    ) -> Scaling:
        """V', G and Γ."""
        # G is that of the new V', as in torch's RMSprop and in Li et al.
        averages = square_average(state, grads, self.alpha)
        gain = rmsprop_gain(averages, self.eps)
        if self.hessian is None:
            return Scaling(gain, averages)
        if hessian_diagonal is None:
            raise ValueError("rmsprop with curvature needs hessian_diagonal, got None")
        correction = rmsprop_correction(averages, gain, grads, hessian_diagonal, self.alpha)
        return Scaling(gain, averages, correction)

    def hessian_estimator(self) -> HessianDiagonal | None:
        """The estimator of h in Γ."""
        return self.hessian


class Adam(Preconditioner, frozen=True):
    """See `adam`."""

    beta1: Tensor
    beta2: Tensor
    eps: Tensor

    def init(self, params: TensorDict) -> TensorDict:
        """No moments yet, in float32 or better."""
        # A preconditioner sees gradients, and not the chain's step: it counts for itself.
        count = torch.zeros(params.batch_size, dtype=torch.int64, device=tree.device(params))
        state = {"first": _zeros(params), "second": _zeros(params), "count": count}
        return TensorDict(state, batch_size=params.batch_size)

    def is_entrywise(self) -> bool:
        """Every entry has its own G."""
        return type(self) is Adam

    def update(
        self, state: TensorDict, grads: TensorDict, hessian_diagonal: TensorDict | None = None
    ) -> Scaling:
        """Both moments, and their unbiased forms."""
        count = state["count"] + 1
        first = moving_average(state["first"], grads, self.beta1)
        second = square_average(state["second"], grads, self.beta2)
        gain = rmsprop_gain(_unbiased(second, self.beta2, count), self.eps)
        new_state = {"first": first, "second": second, "count": count}
        return Scaling(
            gain,
            TensorDict(new_state, batch_size=state.batch_size),
            drift_grads=_unbiased(first, self.beta1, count),
        )


class Composite(Preconditioner, frozen=True):
    """See `compose`."""

    first: Preconditioner
    second: Preconditioner

    def init(self, params: TensorDict) -> TensorDict:
        """The states of both."""
        states = {"first": self.first.init(params), "second": self.second.init(params)}
        return TensorDict(states, batch_size=params.batch_size)

    def is_entrywise(self) -> bool:
        """As both are."""
        return self.first.is_entrywise() and self.second.is_entrywise()

    def update(
        self, state: TensorDict, grads: TensorDict, hessian_diagonal: TensorDict | None = None
    ) -> Scaling:
        """The product of both gains, and Γ = Γ₁ G₂ + G₁ Γ₂."""
        a = self.first.update(state["first"], grads, hessian_diagonal)
        b = self.second.update(state["second"], grads, hessian_diagonal)
        states = TensorDict({"first": a.state, "second": b.state}, batch_size=state.batch_size)
        # None is 1 for a gain and 0 for a correction: it drops out of the product rule.
        corrections = [
            correction if gain is None else tree.map_leaves(torch.mul, correction, gain)
            for correction, gain in ((a.correction, b.gain), (b.correction, a.gain))
            if correction is not None
        ]
        gains = [gain for gain in (a.gain, b.gain) if gain is not None]
        return Scaling(
            gain=reduce(_times, gains) if gains else None,
            state=states,
            correction=reduce(_plus, corrections) if corrections else None,
            # `compose` lets in one preconditioner that averages the drift's gradients.
            drift_grads=b.drift_grads if a.drift_grads is None else a.drift_grads,
        )

    def hessian_estimator(self) -> HessianDiagonal | None:
        """The estimator that the first needs, or else the second."""
        first = self.first.hessian_estimator()
        # `compose` made sure that two estimators are of one kind.
        return self.second.hessian_estimator() if first is None else first


def _times(a: TensorDict, b: TensorDict) -> TensorDict:
    return tree.map_leaves(torch.mul, a, b)


def _plus(a: TensorDict, b: TensorDict) -> TensorDict:
    return tree.map_leaves(torch.add, a, b)


def _zeros(params: TensorDict) -> TensorDict:
    # In float16 squares overflow; in bfloat16 an average near 1 takes no increment of 1e-3.
    return tree.map_leaves(
        lambda leaf: torch.zeros_like(leaf, dtype=tree.working_dtype(leaf)), params
    )


def _unbiased(moment: TensorDict, beta: Tensor, count: Tensor) -> TensorDict:
    """A running average that started from 0, divided by 1 − βᵗ, the sum of its weights."""
    # In float64: at the first steps βᵗ is close to 1.
    seen = 1 - beta**count
    return tree.map_leaves(lambda leaf: leaf / tree.expand_right(seen, leaf), moment)


def moving_average(average: AnyTree, values: AnyTree, beta: Scalar) -> AnyTree:
    """The running average βm + (1 − β) x, in float32 or better."""
    weight = tree.expander(1 - beta)

    def blend(average: Tensor, value: Tensor) -> Tensor:
        # One pass, where βm + (1 − β) x would be three.
        return torch.lerp(tree.widened(average), tree.widened(value), weight(average))

    return tree.map_leaves(blend, average, values)


def square_average(average: AnyTree, grads: AnyTree, alpha: Scalar) -> AnyTree:
    """V' = αV + (1 − α) g², in float32 or better."""

    def square(grad: Tensor) -> Tensor:
        return tree.widened(grad).square()

    return moving_average(average, tree.map_leaves(square, grads), alpha)


def rmsprop_gain(average: AnyTree, eps: Scalar) -> AnyTree:
    """G = 1/(√V' + eps)."""
    floor = tree.expander(eps)

    def gain(average: Tensor) -> Tensor:
        return (average.sqrt() + floor(average)).reciprocal()

    return tree.map_leaves(gain, average)


def rmsprop_correction(
    average: AnyTree, gain: AnyTree, grads: AnyTree, hessian_diagonal: AnyTree, alpha: Scalar
) -> AnyTree:
    """Γ = ∂G/∂w = −(1 − α) g h G²/√V', the drift that a varying G asks for (eq. 7).

    Args:
        average: V', from this step's gradients.
        gain: G.
        grads: g.
        hessian_diagonal: h, the diagonal of ∇²L.
        alpha: α.

    Returns:
        Γ, which is 0 where V' is: there g is 0, and G has a kink of slope ±√(1 − α) h/eps².
    """

    def derivative(average: Tensor, gain: Tensor, grad: Tensor, hessian: Tensor) -> Tensor:
        forget = tree.expand_right(1 - alpha, average)
        # 0/0 at V' = 0, which the choice below undoes.
        slope = -forget * grad * hessian * gain.square() / average.sqrt()
        return torch.where(average > 0, slope, 0.0)

    return tree.map_leaves(derivative, average, gain, grads, hessian_diagonal)


def identity() -> Identity:
    """Make the preconditioner G = 1."""
    # Not locked, here and below: locking warns inside a compiled graph.
    return Identity(lock=False)


def diagonal(gain: TensorDictBase | Mapping[str, Tensor]) -> Diagonal:
    """Make a preconditioner with a fixed G: a step size for each parameter.

    The stationary law is that of G = 1 up to an error of first order in the step size: an entry has
    the law that G = 1 has at step size εG, so that the bias of SGLD, εΛ/4, becomes εGΛ/4.

    Args:
        gain: G ≥ 0, a tree like the parameters, of batch size `[]` or `[C]`; for instance
            `optimizer_gain(optimizer, module)`, or numbers expanded to the parameters' shapes.

    Raises:
        TypeError: It is not a tree of real floating tensors.
        ValueError: An entry is negative or not finite.
    """
    gains = tree.parameters(gain, "gain")
    for name, leaf in tree.leaves(gains):
        here = shards.local(leaf)
        if checks.has_values(here) and not ((here >= 0) & here.isfinite()).all():
            raise ValueError(f"gain[{tree.dotted(name)!r}] must be >= 0 and finite, got {here}")
    # A copy: the caller's tensors may change.
    return Diagonal(gain=gains.detach().clone(), batch_size=gains.batch_size, lock=False)


def optimizer_gain(
    optimizer: torch.optim.Optimizer, module: nn.Module, *, eps: float = 1e-8
) -> TensorDict:
    """Step sizes from the second moments that an optimizer has learned.

        G = 1/(√v̂ + eps)

    with v̂ the running average of g² of the optimizer: `exp_avg_sq`, divided by 1 − β₂ᵗ, for Adam
    and its kin, or `square_avg` for RMSprop.

    Args:
        optimizer: An optimizer that has made steps on the module's parameters.
        module: The module, which gives the parameters their names.
        eps: > 0, in units of the gradient; bounds G by 1/eps.

    Returns:
        G, a tree like `params_of(module)`, for `diagonal`.

    Raises:
        TypeError, ValueError: The optimizer holds no second moment for a parameter, or `eps` is
            not in its range.
    """
    checks.instance("optimizer", optimizer, torch.optim.Optimizer)
    checks.instance("module", module, nn.Module)
    floor = float(checks.number("eps", eps, exclusive=True))
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    moments: dict[tree.Name, Tensor] = {}
    for name, param in module.named_parameters():
        held = optimizer.state.get(param, {})
        if "exp_avg_sq" in held:
            beta2 = groups[param]["betas"][1]
            moments[name] = tree.widened(held["exp_avg_sq"]) / (1 - beta2 ** float(held["step"]))
        elif "square_avg" in held:
            moments[name] = tree.widened(held["square_avg"]).clone()
        else:
            raise ValueError(
                f"optimizer must hold exp_avg_sq or square_avg for {name!r}, "
                f"got a {type(optimizer).__name__} that holds {', '.join(held) or 'nothing'}"
            )
    return rmsprop_gain(tree.build(moments, torch.Size()), floor)


def rmsprop(
    alpha: float | Tensor = 0.99,
    eps: float | Tensor = 0.1,
    *,
    curvature: Literal["exact", "hutchinson"] | None = None,
) -> RMSprop:
    """Make an RMSprop preconditioner.

        V' = α V + (1 − α) g²,    G = 1/(√V' + eps),    V₀ = 0
        Γ  = ∂G/∂w = −(1 − α) g h G²/√V'                      if `curvature` is given

    with h the diagonal of ∇²L. Without Γ, which is usually left out, the stationary law is biased
    where G varies over the posterior. The factor 1 − α is the present gradient's share in V'. In
    small steps V' follows g² all the same, and G varies in full: Γ takes all of the bias out for
    α = 0, and about the share 1 − α of it otherwise (0.57 for α = 1/2, 0.28 for 0.8, for full
    batches on w²/2 + w⁴/12).

    Source: Li, Chen, Carlson and Carin, "Preconditioned stochastic gradient Langevin dynamics for
    deep neural networks", AAAI 2016, eqs. 4, 5 and 7.

    Args:
        alpha: α in [0, 1], memory of the running average: about 1/(1 − α) steps; at 1, V stays 0.
            `[]` or `[C]`.
        eps: eps > 0, in units of the gradient; bounds G by 1/eps. `[]` or `[C]`.
        curvature: `"exact"`: h by one Hessian-vector product a parameter, for small models.
            `"hutchinson"`: an unbiased estimate of h by one product. None: no Γ.

    Raises:
        TypeError, ValueError: A number is out of its range, or `curvature` is no such option.
    """
    if curvature is not None:
        checks.choice("curvature", curvature, ("exact", "hutchinson"))
    fields, chains = checks.per_chain(
        {
            "alpha": checks.hyperparameter("alpha", alpha, maximum=1.0),
            "eps": checks.hyperparameter("eps", eps, exclusive=True),
        }
    )
    hessian: HessianDiagonal | None = None
    if curvature is not None:
        # It has no settings, but its batch size must be that of its owner.
        kind = ExactDiagonal if curvature == "exact" else Hutchinson
        hessian = kind(batch_size=chains, lock=False)
    return RMSprop(**fields, hessian=hessian, batch_size=chains, lock=False)


def adam(
    beta1: float | Tensor = 0.9, beta2: float | Tensor = 0.999, eps: float | Tensor = 0.1
) -> Adam:
    """Make a preconditioner of Adam's moments.

        m' = β₁ m + (1 − β₁) g,     m̂ = m'/(1 − β₁ᵗ),    m₀ = 0
        V' = β₂ V + (1 − β₂) g²,    V̂ = V'/(1 − β₂ᵗ),    V₀ = 0
        G  = 1/(√V̂ + eps)

    with m̂ in place of g in the drift. The average makes the drift of the loss lag by about
    1/(1 − β₁) steps: with β₁ > 0 the chain moves like one with momentum, and its law is that of the
    posterior up to an error of first order in the step size times 1/(1 − β₁). Γ is left out.

    Exact law: for U = nβ L quadratic with curvature Λ, full-batch gradients, T = 1, and G constant
    (eps large), with a = εGΛ/2, SGLD is stationary for a < 2 (1 + β₁)/(1 − β₁), with

        Var w = (1/Λ) (1 + β₁ + 2 a β₁/(1 − β₁))/(1 + β₁ − a (1 − β₁)/2).

    Sources: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1,
    for the moments; Kim, Song and Liang, "Stochastic gradient Langevin dynamics with adaptive
    drifts", 2020 (arXiv:2009.09535), for drifts of this kind.

    Args:
        beta1: β₁ in [0, 1), memory of the running average of g. `[]` or `[C]`.
        beta2: β₂ in [0, 1), memory of the running average of g². `[]` or `[C]`.
        eps: eps > 0, in units of the gradient; bounds G by 1/eps. `[]` or `[C]`.

    Raises:
        TypeError, ValueError: A value is not a number in its range.
    """
    fields, chains = checks.per_chain(
        {
            "beta1": checks.hyperparameter("beta1", beta1, below=1.0),
            "beta2": checks.hyperparameter("beta2", beta2, below=1.0),
            "eps": checks.hyperparameter("eps", eps, exclusive=True),
        }
    )
    return Adam(**fields, batch_size=chains, lock=False)


def compose(*preconditioners: Preconditioner) -> Preconditioner:
    """Make a preconditioner of several: G = G₁ G₂ …, Γ = Γ₁ G₂ … + G₁ Γ₂ … + …

    Each preconditioner sees the raw gradients, not those that another one has scaled.

    Raises:
        TypeError: An argument is not a preconditioner.
        ValueError: No preconditioner is given, two of them replace the drift's gradient
            (`adam`) or find the Hessian's diagonal in different ways, or their chains differ in
            number.
    """
    if not preconditioners:
        raise ValueError("compose needs at least one preconditioner, got none")
    for each in preconditioners:
        check_preconditioner(each)
    averaging = [each for each in _members(preconditioners) if isinstance(each, Adam)]
    if len(averaging) > 1:
        raise ValueError(
            "compose takes one preconditioner that averages the gradients of the drift (adam), "
            f"got {len(averaging)}"
        )
    estimators = [each.hessian_estimator() for each in preconditioners]
    kinds = [type(estimator).__name__ for estimator in estimators if estimator is not None]
    if len(set(kinds)) > 1:
        raise ValueError(f"curvature must be of one kind in a product, got {' and '.join(kinds)}")

    # In pairs: a `TensorClass` has a fixed number of fields.
    def pair(first: Preconditioner, second: Preconditioner) -> Preconditioner:
        fields, chains = checks.per_chain({"first": first, "second": second})
        return Composite(**fields, batch_size=chains, lock=False)

    return reduce(pair, preconditioners)


def _members(preconditioners: Iterable[Preconditioner]) -> Iterator[Preconditioner]:
    """The factors of products, at any depth."""
    for each in preconditioners:
        if isinstance(each, Composite):
            yield from _members((each.first, each.second))
        else:
            yield each


def check_preconditioner(value: Any) -> None:
    """Check that a value is a preconditioner.

    Raises:
        TypeError: The value is of another type.
    """
    if not isinstance(value, Preconditioner):
        raise TypeError(
            f"preconditioner must be one made by a factory such as rmsprop(), got {value!r}"
        )
