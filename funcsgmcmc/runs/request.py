"""The request for a run: its settings, and the keys that follow from them."""

import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from funcsgmcmc import checks, random, shards, tree
from funcsgmcmc.gradients import GradientEstimator, LossFn, estimator_of
from funcsgmcmc.priors import LogPrior
from funcsgmcmc.runs.record import Draw, check_initial_loss

ChainMethod = Literal["vmap", "loop"]
_MAX_CHAINS = 1 << 62

Observable = Callable[[TensorDict], Tensor]
Recorded = Literal["draws", "draw_moments", "observable_moments", "metrics", "aux"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """The settings of a run; each is the argument of `sample` of that name.

    Raises:
        TypeError, ValueError: A setting is of another type, or out of its range. Settings that
            depend on the data or the parameters are checked with these.
    """

    loss_fn: LossFn
    log_prior: LogPrior | None
    observables: Mapping[str, Observable]
    key: Tensor
    num_chains: int
    num_draws: int
    num_burnin_steps: int | Literal["auto"]
    num_steps_between_draws: int
    batch_size: int | None
    minibatches: Literal["replacement", "epochs"]
    shared_batches: bool
    chain_offset: int | Tensor
    init_noise: float
    record: Collection[Recorded]
    full_loss: int | None
    on_draw: Callable[[Draw], object] | None
    chain_method: Literal["vmap", "loop", "auto"]
    chunk_size: int | Literal["auto"] | None
    compile: bool | Literal["noise", "auto"]
    on_divergence: Literal["freeze", "raise"]
    max_loss: float | None
    max_distance: float | None
    initial_loss: float | Tensor | None

    def __post_init__(self) -> None:
        checks.function("loss_fn", self.loss_fn)
        if isinstance(self.loss_fn, nn.Module):
            raise TypeError(
                f"loss_fn must be a function of params and batch, got the module "
                f"{type(self.loss_fn).__name__}: module_loss(model, criterion) makes one"
            )
        if self.log_prior is not None:
            checks.function("log_prior", self.log_prior)
        checks.count("num_chains", self.num_chains, minimum=1)
        checks.count("num_draws", self.num_draws, minimum=1)
        if isinstance(self.num_burnin_steps, str):
            checks.choice("num_burnin_steps", self.num_burnin_steps, ("auto",))
        else:
            checks.count("num_burnin_steps", self.num_burnin_steps, minimum=0)
        checks.count("num_steps_between_draws", self.num_steps_between_draws, minimum=1)
        _check_indices(self.chain_offset, self.num_chains)
        checks.switch("shared_batches", self.shared_batches)
        _check_recorded(self.record)
        if self.full_loss is not None:
            checks.count("full_loss", self.full_loss, minimum=0)
        if self.on_draw is not None:
            checks.function("on_draw", self.on_draw)
        if isinstance(self.chunk_size, str):
            checks.choice("chunk_size", self.chunk_size, ("auto",))
        elif self.chunk_size is not None:
            checks.count("chunk_size", self.chunk_size, minimum=1)
        checks.choice("chain_method", self.chain_method, ("vmap", "loop", "auto"))
        checks.choice("compile", self.compile, (True, False, "noise", "auto"))
        checks.choice("on_divergence", self.on_divergence, ("freeze", "raise"))
        self._make_plain()
        # A batch of keys would pass for keys of chains, and give all chains one noise.
        _check_one_key(self.key)
        check_gradients_are_possible()
        _check_functions_by_name(self.observables)

    def _make_plain(self) -> None:
        """Bring settings to one form: plain numbers, as files hold them, and L(w₀) as a tensor.

        Raises:
            TypeError, ValueError: A limit is no finite number, or L(w₀) is no loss of the chains.
        """
        if (loss := self.initial_loss) is not None:
            object.__setattr__(self, "initial_loss", check_initial_loss(loss, self.num_chains))
        for name in ("max_loss", "max_distance"):
            if (limit := getattr(self, name)) is not None:
                checks.finite_number(name, limit)
                # No integer, which may be larger than any a tensor is compared with.
                object.__setattr__(self, name, float(limit))
        for each in fields(self):
            value = getattr(self, each.name)
            # NumPy's numbers are no numbers to the files that settings are written to.
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                object.__setattr__(self, each.name, int(value))
            elif isinstance(value, numbers.Real) and not isinstance(value, bool):
                object.__setattr__(self, each.name, float(value))

    # Cached, since it is asked for at every step.
    @cached_property
    def estimator(self) -> GradientEstimator:
        """The estimator of the loss's gradient."""
        return estimator_of(self.loss_fn)

    def options(self) -> dict[str, Any]:
        """Those settings that a record does not hold otherwise and that are plain values."""
        return {
            "minibatches": self.minibatches,
            "init_noise": float(self.init_noise),
            "chunk_size": self.chunk_size,
            "compile": self.compile,
            "on_divergence": self.on_divergence,
            "max_loss": self.max_loss,
            "max_distance": self.max_distance,
            "gradient": type(self.estimator).__name__,
        }

    def chains(self) -> Tensor:
        """Indices of the chains, `[C]`."""
        if isinstance(self.chain_offset, Tensor):
            return self.chain_offset.cpu().long().clone()
        return torch.arange(self.chain_offset, self.chain_offset + self.num_chains)

    def keys(self, chains: Tensor) -> "RunKeys":
        """The keys of chains with some indices, `[C]`."""
        return RunKeys(self.key.to(chains.device), chains)


@dataclass(frozen=True, eq=False)
class RunKeys:
    """The keys of a run's chains: each purpose has a key of its own for each chain.

    They depend on the run's key and a chain's index only, so that a chain is the same whatever
    runs beside it. Where a key is for many steps, the step's index is folded in when it is used.

    Attributes:
        key: The run's key.
        chains: Indices of the chains, `[C]`.
    """

    key: Tensor
    chains: Tensor

    @property
    def noise(self) -> Tensor:
        """Keys of the steps' noise, `[C, 2]`; a step's Hessian probes have a child of its key."""
        # From the key itself: `fold_in(fold_in(key, chain), step)` is promised to users.
        return random.fold_in(self.key, self.chains)

    @property
    def minibatches(self) -> Tensor:
        """Keys that choose minibatches, `[C, 2]`."""
        return self._children(0)

    @property
    def shared_minibatches(self) -> Tensor:
        """The key that chooses minibatches that all chains share, `[2]`."""
        return random.split(self.key, 4)[3]

    @property
    def starts(self) -> Tensor:
        """Keys of the noise added to starts, `[C, 2]`."""
        return self._children(1)

    @property
    def momenta(self) -> Tensor:
        """Keys of the first momenta, `[C, 2]`."""
        return self._children(2)

    @cached_property
    def period(self) -> int | None:
        """P, where each chain has the key of the one P before it; None where they do not repeat."""
        again = (self.chains[1:] == self.chains[0]).nonzero()
        if not len(again):
            return None
        period = int(again[0]) + 1
        repeats = torch.equal(self.chains[period:], self.chains[:-period])
        return period if repeats else None

    def _children(self, purpose: int) -> Tensor:
        # Children by index and by data never meet: see `random`.
        return random.fold_in(random.split(self.key, 3)[purpose], self.chains)


def check_gradients_are_possible() -> None:
    """Refuse inference mode, in which nothing has a gradient, not even under `torch.func`.

    Raises:
        ValueError: It is on.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "sampling needs gradients, got torch.inference_mode: leave it, or use torch.no_grad"
        )


def observed_by(function: Observable, params: TensorDict) -> Any:
    """What an observable gives for the parameters of one chain, whole where these are sharded."""
    return shards.whole_result(function, params) if tree.is_sharded(params) else function(params)


def check_observable(name: str, value: Any) -> None:
    """Refuse an observable's value that has no statistics.

    Raises:
        TypeError: It is no real tensor.
        ValueError: It is empty.
    """
    if not isinstance(value, Tensor) or value.is_complex():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"observable {name!r} must return a real tensor, got {kind}")
    if not value.numel():
        raise ValueError(
            f"observable {name!r} must return at least one value, got shape {tuple(value.shape)}"
        )


def _check_indices(value: Any, num_chains: int) -> None:
    """Refuse indices of chains that have no key.

    Args:
        value: The index of the first chain, or of each, `[num_chains]`.
        num_chains: C.

    Raises:
        TypeError: They are no integers.
        ValueError: One is out of range, or there is not one for each chain.
    """
    if not isinstance(value, Tensor):
        checks.count("chain_offset", value, minimum=0)
        if not value + num_chains <= _MAX_CHAINS:
            raise ValueError(
                f"chain_offset + num_chains must be <= 2**62, the number of keys of chains, got "
                f"{value} + {num_chains}"
            )
        return
    checks.real_values("chain_offset", value)
    if value.is_floating_point():
        raise TypeError(f"chain_offset must hold integers, got dtype {value.dtype}")
    if value.shape != torch.Size((num_chains,)):
        raise ValueError(
            f"chain_offset must be one index or have shape ({num_chains},), got shape "
            f"{tuple(value.shape)}"
        )
    if not bool(((value >= 0) & (value < _MAX_CHAINS)).all()):
        raise ValueError(f"chain_offset must be from 0 to 2**62, got {value.tolist()}")


def _check_recorded(value: Any) -> None:
    """Refuse what is not a collection of names of what can be recorded.

    Raises:
        TypeError: It is no collection.
        ValueError: A name is unknown.
    """
    if not isinstance(value, list | tuple | set | frozenset):
        raise TypeError(
            f"record must be a list of {', '.join(get_args(Recorded))}, got {type(value).__name__}"
        )
    for name in value:
        checks.choice("record[…]", name, get_args(Recorded))


def _check_one_key(key: Any) -> None:
    """Refuse what is not one key.

    Raises:
        TypeError, ValueError: It is no key, or a batch of keys.
    """
    random.check_key(key)
    if key.shape != torch.Size((2,)):
        raise ValueError(f"key must be one key, of shape (2,), got shape {tuple(key.shape)}")


def _check_functions_by_name(observables: Any) -> None:
    """Refuse observables that are not a mapping of names to functions.

    Raises:
        TypeError: They are none.
    """
    if not isinstance(observables, Mapping):
        raise TypeError(
            f"observables must map names to functions of params, got {type(observables).__name__}"
        )
    for name, function in observables.items():
        checks.function(f"observables[{name!r}]", function)
