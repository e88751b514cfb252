"""Every refusal of bad input, and its wording: the rule, then the value received.

Guards are written positively (`if not value >= 0`), so that NaN is refused. Rules about values are
checked only where values can be read: inside `torch.vmap` and `torch.compile` a tensor has a shape
but no value to branch on, and there only rules about shapes and dtypes apply.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, cast, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from funcsgmcmc import tree


def hyperparameter(
    name: str,
    value: float | Tensor,
    *,
    minimum: float = 0.0,
    exclusive: bool = False,
    below: float = math.inf,
) -> Tensor:
    """Make a hyperparameter tensor.

    Args:
        name: Its name, for the error.
        value: A number, shared by all chains, or a tensor `[]` or `[C]`, one value a chain.
        minimum: Smallest value allowed.
        exclusive: Whether `minimum` itself is refused.
        below: All values must be less than this.

    Returns:
        float64, `[]` or `[C]`.

    Raises:
        TypeError: `value` is not a real number or tensor.
        ValueError: It has more than one dimension, or a value is out of range or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"{name} must be real, got dtype {value.dtype}")
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if tensor.ndim > 1:
        raise ValueError(
            f"{name} must be a number or have shape [chains], got shape {tuple(tensor.shape)}"
        )
    if _has_values(tensor):
        relation = ">" if exclusive else ">="
        for index, number in enumerate(tensor.reshape(-1).tolist()):
            above = number > minimum if exclusive else number >= minimum
            if not (above and number < below):
                where = f" for chain {index}" if tensor.ndim else ""
                limit = "finite" if below == math.inf else f"< {below:g}"
                rule = f"{relation} {minimum:g}" if not above else limit
                raise ValueError(f"{name} must be {rule}, got {number:g}{where}")
    return tensor


def at_most(name: str, value: Tensor, limit_name: str, limit: Tensor) -> None:
    """Check that a hyperparameter does not exceed another.

    Raises:
        ValueError: It does, for some chain.
    """
    if _has_values(value) and not (value <= limit).all():
        raise ValueError(
            f"{name} must be <= {limit_name}, got {value.tolist()} and {limit.tolist()}"
        )


def interval(name: str, value: int | Tensor | None) -> Tensor | None:
    """Take a number of steps >= 1, shared or one a chain.

    Returns:
        int64, `[]` or `[C]`; None for None.

    Raises:
        TypeError: It does not hold integers.
        ValueError: It is less than 1, or has more than one dimension.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.is_floating_point():
            raise TypeError(f"{name} must hold integers, got dtype {value.dtype}")
    else:
        count(name, value, minimum=1)
    return hyperparameter(name, value, minimum=1.0).to(torch.int64)


def energy_range(value: Any) -> tuple[Tensor, Tensor]:
    """Take the bounds of a range of energies, each shared or one a chain.

    Raises:
        TypeError: They are no pair of real numbers or tensors.
        ValueError: A bound is not finite, or the first is not below the second.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"energy_range must be a pair (low, high), got {value!r}")
    names = ("low energy", "high energy")
    bounds = (hyperparameter("energy_range", bound, minimum=-math.inf) for bound in value)
    low, high = per_chain(dict(zip(names, bounds, strict=True)))[0].values()
    if _has_values(low) and not bool((low < high).all() & low.isfinite().all()):
        raise ValueError(
            f"energy_range must be finite with low < high, got {low.tolist()} and {high.tolist()}"
        )
    return low, high


def number(name: str, value: float | Tensor, *, exclusive: bool = False) -> Tensor:
    """Check a number >= 0 (> 0 if 0 is excluded) that all chains share.

    Raises:
        TypeError, ValueError: As `hyperparameter`, or it is a tensor of more than one value.
    """
    tensor = hyperparameter(name, value, exclusive=exclusive)
    if tensor.ndim:
        raise ValueError(f"{name} must be a number, got shape {tuple(tensor.shape)}")
    return tensor


def finite_number(name: str, value: Any) -> None:
    """Check a real number, of either sign.

    Raises:
        TypeError: It is not one.
        ValueError: It is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def one_each(name: str, values: Sequence[Any], params: Sequence[Tensor]) -> None:
    """Check that there is one tensor for each parameter, of its shape.

    Raises:
        TypeError: A value is not a tensor.
        ValueError: The number or a shape differs.
    """
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must hold tensors, got {type(value).__name__}")
    got, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (values, params))
    if got != wanted:
        raise ValueError(
            f"{name} must have one tensor for each parameter, of shapes {wanted}, got {got}"
        )


def masks(given: Any, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Take one mask for each parameter, tensors or what makes them; None for no mask.

    Raises:
        TypeError: They are no list, or one is not real.
        ValueError: Number or shapes differ from the parameters', or a value is not finite.
    """
    if not isinstance(given, Iterable):
        raise TypeError(f"mask must be one tensor for each parameter, got {type(given).__name__}")
    taken = [None if each is None else torch.as_tensor(each) for each in given]
    present = [each for each in taken if each is not None]
    sampled = [p for p, each in zip(params, taken, strict=False) if each is not None]
    one_each("mask", present, sampled if len(taken) == len(params) else params)
    for index, each in enumerate(taken):
        if each is not None and not (not each.is_complex() and each.isfinite().all()):
            raise ValueError(f"mask[{index}] must be real and finite, got {each}")
    return taken


def optimized(params: Sequence[Tensor]) -> None:
    """Check what an optimizer is to sample.

    Raises:
        TypeError: A parameter is not real floating point.
    """
    for index, param in enumerate(params):
        if not param.is_floating_point():
            raise TypeError(f"params[{index}] must be real floating point, got {param.dtype}")


def per_chain(fields: dict[str, Any]) -> tuple[dict[str, Any], torch.Size]:
    """Give every field of a sampler the same chains.

    Args:
        fields: Tensors `[]` or `[C]`, trees and nested `TensorClass`es of batch size `[]` or
            `[C]`, and None.

    Returns:
        The fields, shared ones expanded (not copied) to `[C]` if any field is per chain; and the
        batch size, `[]` or `[C]`.

    Raises:
        ValueError: Two fields have different numbers of chains.
    """
    chains, owner = torch.Size(), ""
    for name, value in fields.items():
        if value is None or not value.shape:
            continue
        if chains and value.shape != chains:
            raise ValueError(
                f"per-chain settings must agree on the number of chains, "
                f"got {chains[0]} for {owner} and {value.shape[0]} for {name}"
            )
        chains, owner = value.shape, name
    expanded = {
        name: value if value is None or value.shape == chains else value.expand(chains)
        for name, value in fields.items()
    }
    return expanded, chains


def count(name: str, value: int, *, minimum: int) -> int:
    """Check an integer count.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not value >= minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    return int(value)


def choice(name: str, value: str, options: tuple[str, ...]) -> str:
    """Check a named option.

    Raises:
        ValueError: It is not one of `options`.
    """
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def parameters(params: TensorDictBase | Mapping[str, Tensor], name: str = "params") -> TensorDict:
    """Take a parameter tree.

    Args:
        params: A `TensorDict`, or a mapping of names to tensors (batch size `[]`).
        name: What to call it in errors.

    Returns:
        A tree of its own (the tensors are shared, the tree is not).

    Raises:
        TypeError: It is not a tree of tensors, or a leaf is integer, boolean or complex.
        ValueError: It is empty.
    """
    if isinstance(params, TensorDictBase):
        taken = cast(TensorDict, params.copy())
    elif isinstance(params, Mapping):
        _named_tensors(params, name)
        taken = TensorDict(dict(params))
    else:
        raise TypeError(
            f"{name} must be a TensorDict or a mapping of names to tensors "
            f"(funcsgmcmc.params_of(module) makes one), got {type(params).__name__}"
        )
    for key, leaf in tree.leaves(taken):
        if not leaf.is_floating_point():
            raise TypeError(
                f"{name}[{tree.dotted(key)!r}] must be real floating point, got {leaf.dtype}"
            )
    if not tree.size(taken):
        raise ValueError(f"{name} must hold at least one parameter, got {taken}")
    return taken


def mask(value: TensorDictBase | Mapping[str, Tensor]) -> TensorDict:
    """Take a mask: a tree of factors, where boolean and integer leaves count as 0 and 1.

    Raises:
        TypeError: It is not a tree of real tensors.
        ValueError: It is empty, or not finite.
    """
    if not isinstance(value, TensorDictBase | Mapping):
        raise TypeError(f"mask must be a TensorDict or a mapping, got {type(value).__name__}")
    factors = tree.map_leaves(
        lambda leaf: leaf if leaf.is_floating_point() or leaf.is_complex() else leaf.float(),
        value if isinstance(value, TensorDictBase) else TensorDict(dict(value)),
    )
    taken = parameters(factors, "mask").detach().clone()
    if all(_has_values(leaf) for _, leaf in tree.leaves(taken)):
        finite("mask", taken)
    return taken


def finite(name: str, params: TensorDictBase) -> None:
    """Refuse a tree with NaN or infinite entries.

    Raises:
        ValueError: A leaf is not finite.
    """
    for key, leaf in tree.leaves(params):
        finite_values(f"{name}[{tree.dotted(key)!r}]", leaf)


def finite_values(name: str, values: Tensor) -> None:
    """Refuse values of which one is infinite or NaN.

    Raises:
        ValueError: One is.
    """
    bad = values[~values.isfinite()]
    if bad.numel():
        raise ValueError(
            f"{name} must be finite, got {bad.numel()} entries that are not, the first of them "
            f"{bad[0].item()}"
        )


def same_structure(name: str, other: TensorDictBase, params: TensorDictBase) -> None:
    """Refuse a tree whose names or shapes are not those of the parameters.

    Args:
        name: What to call the tree, for instance `mask`.
        other: Tree of batch size `[]` or of the batch size of `params`.
        params: Tree of batch size `[*chains]`.

    Raises:
        ValueError: A name is unknown or missing, or a shape differs.
    """
    if other.batch_size not in (torch.Size(), params.batch_size):
        raise ValueError(
            f"{name} must have the batch size of the parameters {tuple(params.batch_size)} or none,"
            f" got {tuple(other.batch_size)}"
        )
    wanted, given = dict(tree.leaves(params)), dict(tree.leaves(other))
    for key in given.keys() - wanted.keys():
        known = ", ".join(map(tree.dotted, wanted))
        raise ValueError(f"{name} has unknown key {tree.dotted(key)!r}; parameters are {known}")
    for key, leaf in wanted.items():
        label = f"{name}[{tree.dotted(key)!r}]"
        if key not in given:
            raise ValueError(f"{label} is missing: {name} needs one leaf for each parameter")
        shape = tuple(given[key].shape[other.batch_dims :])
        expected = tuple(leaf.shape[params.batch_dims :])
        if shape != expected:
            raise ValueError(f"{label} has shape {shape}, parameter has {expected}")


def inside_box(params: TensorDictBase, boxed: TensorDictBase) -> None:
    """Refuse parameters that start outside the bounding box.

    Args:
        params: Where chains start.
        boxed: The same, clamped to the box.

    Raises:
        ValueError: They differ.
    """
    for key, leaf in tree.leaves(params):
        excess = (leaf - boxed[key]).abs().max().item() if leaf.numel() else 0.0
        if excess > 0:
            raise ValueError(
                f"params[{tree.dotted(key)!r}] must start within bounding_box_size of the anchor, "
                f"got an entry {excess:g} outside"
            )


def same_dtypes(name: str, other: TensorDictBase, params: TensorDictBase) -> None:
    """Refuse a tree whose dtypes are not those of the parameters.

    Raises:
        ValueError: A dtype differs.
    """
    for key, leaf in tree.leaves(params):
        if other[key].dtype != leaf.dtype:
            raise ValueError(
                f"{name}[{tree.dotted(key)!r}] has dtype {other[key].dtype}, "
                f"parameter has {leaf.dtype}"
            )


def anchor(value: TensorDictBase | Mapping[str, Tensor]) -> TensorDict:
    """Take an anchor: a copy of a tree of finite parameters.

    Raises:
        TypeError, ValueError: As `parameters`, or it is not finite.
    """
    taken = parameters(value, "anchor").detach().clone()
    if all(_has_values(leaf) for _, leaf in tree.leaves(taken)):
        finite("anchor", taken)
    return taken


def gain(value: TensorDictBase | Mapping[str, Tensor]) -> TensorDict:
    """Take a tree of gains.

    Raises:
        TypeError, ValueError: As `parameters`; or an entry is negative or not finite.
    """
    gains = parameters(value, "gain")
    for name, leaf in tree.leaves(gains):
        if _has_values(leaf) and not ((leaf >= 0) & leaf.isfinite()).all():
            raise ValueError(f"gain[{tree.dotted(name)!r}] must be >= 0 and finite, got {leaf}")
    return gains.detach().clone()


def composed(values: Sequence[Any], kind: type, unique: type) -> None:
    """Check preconditioners that are to be multiplied.

    Raises:
        TypeError: One is not a preconditioner.
        ValueError: There is none, or more than one of the unique kind.
    """
    if not values:
        raise ValueError("compose needs at least one preconditioner, got none")
    for value in values:
        preconditioner(value, kind)

    def parts(value: Any) -> list[Any]:
        nested = [getattr(value, name, None) for name in ("first", "second")]
        return [value] if None in nested else [part for each in nested for part in parts(each)]

    averaged = [part for value in values for part in parts(value) if isinstance(part, unique)]
    if len(averaged) > 1:
        raise ValueError(
            "compose takes one preconditioner that averages the gradients of the drift (adam), "
            f"got {len(averaged)}"
        )


def same_kind(name: str, kinds: Sequence[type]) -> None:
    """Check that parts that share one computation ask for the same.

    Raises:
        ValueError: They do not.
    """
    if len(set(kinds)) > 1:
        asked = " and ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be of one kind in a product, got {asked}")


def instance(name: str, value: Any, kind: type | UnionType) -> None:
    """Check a type.

    Raises:
        TypeError: The value is of another.
    """
    if not isinstance(value, kind):
        kinds = [each.__name__ for each in get_args(kind) or (kind,)]
        raise TypeError(f"{name} must be a {' or '.join(kinds)}, got {type(value).__name__}")


def one_tree(name: str, batch_size: torch.Size) -> None:
    """Refuse a tree of several chains.

    Raises:
        ValueError: It has a batch size.
    """
    if batch_size:
        raise ValueError(f"{name} must be those of one chain, got batch size {tuple(batch_size)}")


def shared_target(sampler: Any) -> None:
    """Refuse a sampler whose chains do not all sample one known law.

    Raises:
        ValueError: Its settings are per chain, or it has a mask or a box.
    """
    if sampler.shape:
        raise ValueError(f"settings must be shared by all chains, got {sampler.shape[0]} of them")
    for name in ("mask", "bounding_box_size"):
        if getattr(sampler, name) is not None:
            raise ValueError(f"what is sampled is known without {name}, got a sampler with one")


def unnested(loss_fn: Any, kind: type) -> None:
    """Check that an estimator does not wrap control variates, whose batches hold a reference.

    Raises:
        TypeError: It does.
    """
    if isinstance(loss_fn, kind):
        raise TypeError(
            "control variates must be the outermost estimator, as in svrg(accumulated(loss, 4), "
            f"100); got {type(loss_fn).__name__} inside another"
        )


def with_reference(batch: Any, kind: type) -> tuple[Any, Any]:
    """Take the batch of control variates apart.

    Raises:
        TypeError: It is no pair of a minibatch and a reference.
    """
    if not (isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], kind)):
        raise TypeError(
            "control variates take batches (minibatch, reference), with reference made by "
            f"funcsgmcmc.reference, got {type(batch).__name__}"
        )
    return batch


def no_second_moment(name: str, optimizer: str, held: list[str]) -> str:
    """What is wrong with an optimizer that knows no scale of a parameter's gradients."""
    return (
        f"optimizer must hold exp_avg_sq or square_avg for {name!r}, "
        f"got a {optimizer} that holds {', '.join(held) or 'nothing'}"
    )


def no_energy(missing: str) -> str:
    """What is wrong with a call that does not give a sampler its energy."""
    return f"this sampler looks at the energy: update needs {missing}=…, got None"


def sampler(value: Any, kind: type) -> None:
    """Refuse what is not a sampler.

    Raises:
        TypeError: It is not an instance of `kind`.
    """
    if not isinstance(value, kind):
        given = value.__name__ if callable(value) and hasattr(value, "__name__") else value
        raise TypeError(
            f"sampler must be one made by a factory such as sgld(lr=..., nbeta=...), got {given!r}"
        )


def factory(make: Any, kind: type) -> inspect.Signature:
    """Refuse what is not a sampler's factory.

    Returns:
        Its signature.

    Raises:
        TypeError: It is not callable, or a sampler made by one, or a sampler's class; or it does
            not take `lr` by name.
    """
    is_class = isinstance(make, type) and issubclass(make, kind)
    if isinstance(make, kind) or is_class or not callable(make):
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


def mapping(name: str, value: Any) -> None:
    """Check a mapping of names.

    Raises:
        TypeError: It is none.
    """
    if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise TypeError(f"{name} must be a mapping of names, got {value!r}")


def pair(name: str, value: Any) -> None:
    """Check two finite numbers.

    Raises:
        TypeError: There are not two, or they are not numbers.
        ValueError: One is infinite or NaN.
    """
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    for each in value:
        finite_number(name, each)


def span(name: str, value: tuple[float, float]) -> None:
    """Check the lowest and the highest value of a range.

    Raises:
        TypeError, ValueError: As `pair`; or the lowest is above the highest.
    """
    pair(name, value)
    if not value[0] <= value[1]:
        raise ValueError(f"{name} must be lowest and highest, got {value[0]} and {value[1]}")


def unknown_settings(name: str, missing: list[str]) -> str:
    """What to say of a sampler whose own settings are not known."""
    listed = ", ".join(missing)
    return (
        f"{name} has settings without a default: give them in settings or ranges, got no {listed}"
    )


def preconditioner(value: Any, kind: type) -> None:
    """Refuse what is not a preconditioner.

    Raises:
        TypeError: It is not an instance of `kind`.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"preconditioner must be one made by a factory such as rmsprop(), got {value!r}"
        )


def function(name: str, value: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: It is not callable.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")


def one_chain(state: torch.Size, key: torch.Size) -> None:
    """Refuse the state or the keys of many chains in a step of one.

    Raises:
        ValueError: The state has a batch size, or the key is not `[2]`.
    """
    if state != torch.Size() or key != torch.Size((2,)):
        raise ValueError(
            f"a kernel steps one chain, got a state of batch size {tuple(state)} and a key of "
            f"shape {tuple(key)}: for many chains, torch.vmap the step"
        )


def loss_output(output: tuple[Any, ...]) -> tuple[Any, Any]:
    """Split what a loss function returned beside the loss.

    Returns:
        Loss and aux; `()` for an aux of None.

    Raises:
        TypeError: It is not a pair, or aux holds something else than tensors.
    """
    if len(output) != 2:
        raise TypeError(f"loss_fn must return a loss or (loss, aux), got {len(output)} values")
    loss, aux = output
    aux = () if aux is None else aux
    for leaf in pytree.tree_leaves(aux):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"aux must hold tensors only, got {type(leaf).__name__}")
    return loss, aux


def initial_loss(value: Any, num_chains: int) -> Tensor:
    """Take L(w₀).

    Returns:
        float64, `[]` or `[num_chains]`, detached, on the CPU.

    Raises:
        TypeError: It is not a real number or tensor.
        ValueError: It has another shape, or is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"initial_loss must be a number or a tensor, got {type(value).__name__}")
    loss = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if loss.shape not in (torch.Size(), torch.Size((num_chains,))):
        raise ValueError(
            f"initial_loss must have shape () or ({num_chains},), got shape {tuple(loss.shape)}"
        )
    if not loss.isfinite().all():
        raise ValueError(f"initial_loss must be finite, got {loss.tolist()}")
    return loss


def uses_params(loss: Tensor, leaves: list[Tensor]) -> None:
    """Refuse a loss that does not depend on the parameters it is given.

    Raises:
        ValueError: No leaf has a gradient.
    """
    used: Iterable[Tensor | None] = ()
    if loss.requires_grad:
        used = torch.autograd.grad(loss, leaves, allow_unused=True)
    if all(gradient is None for gradient in used):
        raise ValueError(
            "loss_fn must depend on the params it is given, got a loss without gradient: evaluate "
            "the model with them (module_loss, or torch.func.functional_call), and do not detach"
        )


def scalar(name: str, value: Any) -> Tensor:
    """Check what a user's loss or log-prior function returned.

    Raises:
        TypeError: It is not a real floating tensor.
        ValueError: It is not a scalar.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must return a real floating tensor, got {kind}")
    if value.ndim != 0:
        raise ValueError(
            f"{name} must return a scalar, got shape {tuple(value.shape)}: "
            "take the mean over the batch"
        )
    return value


def examples(leaves: list[Any]) -> int:
    """Number of examples of tensors that share their first dimension.

    Raises:
        TypeError: A leaf is not a tensor.
        ValueError: There is no leaf or no example, or lengths differ.
    """
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"data must hold tensors only, got {type(leaf).__name__}")
        if leaf.ndim == 0:
            raise ValueError("data must have a first dimension, over examples, got a 0-d tensor")
    lengths = [leaf.shape[0] for leaf in leaves]
    if len(set(lengths)) > 1:
        raise ValueError(f"data must agree on the number of examples, got lengths {lengths}")
    if not lengths or not lengths[0]:
        raise ValueError("data must hold at least one example, got none")
    return lengths[0]


def batch_size(value: int | None, num_examples: int) -> int:
    """Check a minibatch size against the data; None means all examples.

    Raises:
        TypeError, ValueError: It is not an integer in [1, num_examples].
    """
    if value is None:
        return num_examples
    if not count("batch_size", value, minimum=1) <= num_examples:
        raise ValueError(
            f"batch_size must be at most the number of examples {num_examples}, got {value}"
        )
    return value


def batched(data: TensorDictBase) -> None:
    """Check that a `TensorDict` of data has the examples as its batch.

    Raises:
        ValueError: Its batch size is `[]`.
    """
    if not data.batch_size:
        raise ValueError(
            "a TensorDict of data must have a batch size, the number of examples, got ()"
        )


def known_size(size: int) -> int:
    """Check that a batch knows its number of examples, which weights its gradient.

    Raises:
        ValueError: It does not.
    """
    if not size:
        raise ValueError(
            "a batch must hold a tensor with the examples along its first dimension for its "
            "gradient to be weighted by their number, got none"
        )
    return size


def no_examples() -> str:
    """What is wrong with an empty pass over the data."""
    return "data must hold at least one batch, got none"


def cannot_pass() -> str:
    """What is wrong with data that cannot be passed over, where that is needed."""
    return (
        "control variates need data that can be passed over: tensors, or an iterable with a "
        "length, such as a DataLoader or a list; got an iterator, or an iterable without length"
    )


def always_exploring(first: int, last: int) -> str:
    """What is wrong with a temperature that makes no draws."""
    return (
        "the temperature's schedule must be > 0 at some steps, where draws are made, got 0 at "
        f"steps {first} to {last}"
    )


def same_phases() -> str:
    """What is wrong with chains that sample at different steps."""
    return (
        "chains must sample and explore at the same steps, got temperature schedules that are 0 "
        "at different ones"
    )


def unweighted(log_weights: Tensor | None) -> None:
    """Check that draws count alike, for a plain average.

    Raises:
        ValueError: They have weights.
    """
    if log_weights is not None:
        raise ValueError(
            "the draws have weights (samples.log_weights), which a plain average would ignore: use "
            "weighted_mean(values[samples.healthy], samples.log_weights[samples.healthy]), with "
            "values from samples.observables or llc_draws(samples)"
        )


def iterable_data(data: Any, *, is_dataset: bool, batch_size: int | None, minibatches: str) -> None:
    """Check data that is not tensors in memory.

    Raises:
        TypeError: It is no iterable of batches.
        ValueError: An option is given that only tensors take.
    """
    if is_dataset:
        raise TypeError(
            f"data must be tensors or an iterable of batches, got the data set "
            f"{type(data).__name__}: wrap it in a torch.utils.data.DataLoader"
        )
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be tensors or an iterable of batches, got {type(data).__name__}"
        )
    if batch_size is not None:
        raise ValueError(
            f"batch_size must be None for an iterable, which makes its own batches, "
            f"got {batch_size}"
        )
    if minibatches != "replacement":
        raise ValueError(
            f"minibatches must not be set for an iterable, which makes its own batches, "
            f"got {minibatches!r}"
        )


def data_ended(step: int) -> str:
    """What to say when an iterable gives no batch for a step."""
    if step == 0:
        return "data must give at least one batch, got none"
    return (
        f"data must give a batch for every step, but it ended at step {step}: "
        "pass something that can be iterated again, or enough batches"
    )


def sketched(size: int, input_dim: int) -> None:
    """Check that a count sketch is made for as many parameters as there are.

    Raises:
        ValueError: It is not.
    """
    if size != input_dim:
        raise ValueError(f"the sketch is for {input_dim} parameters, got {size}")


def chains(name: str, batch_size: torch.Size, num_chains: int) -> None:
    """Check that something is shared by the chains or has one part for each.

    Raises:
        ValueError: Its batch size is neither `[]` nor `[num_chains]`.
    """
    if batch_size not in (torch.Size(), torch.Size((num_chains,))):
        raise ValueError(
            f"{name} must have batch size () or ({num_chains},), one for each of num_chains, "
            f"got {tuple(batch_size)}"
        )


def one_key(shape: torch.Size) -> None:
    """Check that a key is not a batch of keys.

    Raises:
        ValueError: Its shape is not `[2]`.
    """
    if shape != torch.Size((2,)):
        raise ValueError(f"key must be one key, of shape (2,), got shape {tuple(shape)}")


def observable(name: str, value: Any) -> None:
    """Check what a user's observable returned.

    Raises:
        TypeError: It is not a tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"observable {name!r} must return a tensor, got {type(value).__name__}")


def usable_chains(healthy: Tensor, num_draws: int) -> Tensor:
    """Check that a run has something to estimate from.

    Returns:
        `healthy`, bool `[C]`.

    Raises:
        ValueError: No draw was made, or no chain is healthy.
    """
    if num_draws < 1:
        raise ValueError("estimates need at least one draw, got a run that stopped in burn-in")
    if not healthy.any():
        raise ValueError(
            f"estimates need at least one healthy chain, got {len(healthy)} frozen ones: "
            "lower lr, or see samples.frozen for the reasons"
        )
    return healthy


def draws(values: Tensor) -> None:
    """Check values to diagnose.

    Raises:
        ValueError: They are not `[C, D, …]`, or empty.
    """
    if values.ndim < 2 or not values.numel():
        raise ValueError(
            f"values must have shape [chains, draws, ...] and not be empty, "
            f"got {tuple(values.shape)}"
        )


def positive(name: str, values: Tensor) -> None:
    """Check that a setting was not zero at the draws.

    Raises:
        ValueError: It was, at some.
    """
    if not (values > 0).all():
        raise ValueError(f"{name} must be > 0 at the draws, got {float(values.min()):g}")


def weights(log_weights: Any, values: Tensor) -> None:
    """Check that there is one weight for each draw.

    Raises:
        TypeError: There are none.
        ValueError: Their shape is another, or they are those of a frozen chain.
    """
    if not isinstance(log_weights, Tensor):
        raise TypeError(
            f"log_weights must be a tensor [chains, draws], got {type(log_weights).__name__}; "
            "draws without weights have plain means"
        )
    if log_weights.shape != values.shape[:2]:
        raise ValueError(
            f"log_weights must have shape {tuple(values.shape[:2])}, one for each chain and draw, "
            f"got shape {tuple(log_weights.shape)}"
        )
    if log_weights.isnan().any():
        raise ValueError("log_weights must be those of healthy chains (samples.healthy), got NaN")


def observables(
    value: Mapping[str, Any] | None, parameters: list[tree.Name]
) -> dict[str, Callable[[TensorDict], Tensor]]:
    """Take observables, by name.

    Raises:
        TypeError: They are no mapping of names to functions.
        ValueError: One is called like a quantity, a dimension or a parameter of the record.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"observables must map names to functions of params, got {type(value).__name__}"
        )
    taken = {"loss", "llc", "chain", "draw", "step", *map(tree.dotted, parameters)}
    for name, item in value.items():
        if name in taken:
            raise ValueError(
                f"an observable must not be named {name!r}, which the record has already"
            )
        function(f"observables[{name!r}]", item)
    return dict(value)


def same_twice(loss: Tensor, again: Tensor, generator_untouched: bool) -> None:
    """Refuse a loss that draws random numbers or changes what it depends on.

    Raises:
        ValueError: It differs from one evaluation to the next, or moved torch's generator.
    """
    if not generator_untouched or not torch.equal(loss.nan_to_num(), again.nan_to_num()):
        raise ValueError(impure_loss(f"two evaluations gave {loss.item():g} and {again.item():g}"))


def is_impure(error: RuntimeError) -> bool:
    """Whether a transform complains of a random draw, or of a buffer updated in place."""
    complaints = ("random operation", "mutate a captured Tensor", "will be updated in place")
    return any(complaint in str(error) for complaint in complaints)


def impure_loss(error: RuntimeError | str) -> str:
    """What to say of a loss that draws random numbers or updates buffers."""
    return (
        "the loss must be a function of its arguments alone, but it draws random numbers or "
        "updates buffers (dropout, batch normalization in train mode): call model.eval(). "
        f"What happened: {error}"
    )


def impure_layer(layer: str) -> str:
    """What to say of a layer that draws random numbers or updates its buffers."""
    return (
        f"the loss must be a function of its arguments alone, but layer {layer} is in train mode: "
        "call model.eval(), or keep train mode for the others and call .eval() on this layer"
    )


def missing_extra(extra: str, needs: str, used_for: str) -> ImportError:
    """The error for an optional dependency that is not installed."""
    return ImportError(
        f"{used_for} needs {needs}, which is not installed: pip install 'funcsgmcmc[{extra}]'"
    )


def _named_tensors(params: Mapping[Any, Any], name: str) -> None:
    """Refuse a mapping, nested or not, of something else than names to tensors."""
    for key, value in params.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} must be keyed by strings, got {key!r}")
        if isinstance(value, Mapping):
            _named_tensors(value, f"{name}[{key!r}]")
        elif not isinstance(value, Tensor):
            raise TypeError(f"{name}[{key!r}] must be a tensor, got {type(value).__name__}")


def _has_values(tensor: Tensor) -> bool:
    """Whether the entries can be read here: not while tracing, nor inside a vmap."""
    # torch has no public question for "am I under a functorch transform".
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not torch.compiler.is_compiling() and not wrapped
