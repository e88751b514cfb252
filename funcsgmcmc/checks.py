"""Checks of arguments that many files need; the wording is the rule, then the value received.

A check that one file alone needs stands in that file, beside the code.

Guards are written positively (`if not value >= 0`), so that NaN is refused. Rules about values are
checked only where values can be read: inside `torch.vmap` and `torch.compile` a tensor has a shape
but no value to branch on, and there only rules about shapes and dtypes apply.
"""

import math
import numbers
from types import UnionType
from typing import Any, get_args

import torch
from torch import Tensor

_LARGEST_COUNT = 1 << 62  # what int64 and keys have room for


def hyperparameter(
    name: str,
    value: float | Tensor,
    *,
    minimum: float = 0.0,
    exclusive: bool = False,
    below: float = math.inf,
    maximum: float = math.inf,
) -> Tensor:
    """Make a hyperparameter tensor.

    Args:
        name: Its name, for the error.
        value: A number, shared by all chains, or a tensor `[]` or `[C]`, one value a chain.
        minimum: Smallest value allowed.
        exclusive: Whether `minimum` itself is refused.
        below: All values must be less than this.
        maximum: Largest value allowed.

    Returns:
        float64, `[]` or `[C]`.

    Raises:
        TypeError: `value` is not a real number or tensor.
        ValueError: It has more than one dimension, or a value is out of range or NaN.
    """
    # To Python `True` is the number 1; as a setting it is a mistake.
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Tensor):
        hint = ", of which torch.tensor makes one" if isinstance(value, list | tuple) else ""
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}{hint}")
    if isinstance(value, Tensor):
        real_values(name, value)
    # float64: 1 − β and e^(−ζh) keep their digits. A copy: the caller's tensor may change.
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if tensor.ndim > 1 or not tensor.numel():
        raise ValueError(
            f"{name} must be a number or have shape [chains], got shape {tuple(tensor.shape)}"
        )
    if has_values(tensor):
        relation = ">" if exclusive else ">="
        for index, number in enumerate(tensor.reshape(-1).tolist()):
            above = number > minimum if exclusive else number >= minimum
            if not (above and number < below and number <= maximum):
                where = f" for chain {index}" if tensor.ndim else ""
                # Without a limit `< inf` still refuses infinity.
                limit = "finite" if below == math.inf else f"< {below:g}"
                limit = limit if maximum == math.inf else f"<= {maximum:g}"
                rule = f"{relation} {minimum:g}" if not above else limit
                raise ValueError(f"{name} must be {rule}, got {number:g}{where}")
    return tensor


def number(
    name: str, value: float | Tensor, *, exclusive: bool = False, maximum: float = math.inf
) -> Tensor:
    """Check a number >= 0 (> 0 if 0 is excluded), and <= a maximum, that all chains share.

    Raises:
        TypeError, ValueError: As `hyperparameter`, or it is a tensor of more than one value.
    """
    tensor = hyperparameter(name, value, exclusive=exclusive, maximum=maximum)
    if tensor.ndim:
        raise ValueError(f"{name} must be a number, got shape {tuple(tensor.shape)}")
    return tensor


def finite_number(name: str, value: Any) -> None:
    """Check a real number, of either sign.

    Raises:
        TypeError: The value is not a real number.
        ValueError: It is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def finite_values(name: str, values: Tensor) -> None:
    """Check that no value is infinite or NaN.

    Raises:
        ValueError: Some value is infinite or NaN.
    """
    bad = values[~values.isfinite()]
    if bad.numel():
        raise ValueError(
            f"{name} must be finite, got {bad.numel()} entries that are not, the first of them "
            f"{bad[0].item()}"
        )


def real_values(name: str, value: Tensor) -> None:
    """Check that a tensor holds real numbers.

    Raises:
        TypeError: It is complex or boolean, or on the meta device, where it holds nothing.
    """
    if value.is_complex() or value.dtype == torch.bool or value.is_meta:
        place = ", on the meta device" if value.is_meta else ""
        raise TypeError(f"{name} must be real, got dtype {value.dtype}{place}")


def switch(name: str, value: Any) -> None:
    """Check an option that is on or off.

    Raises:
        TypeError: It is neither True nor False.
    """
    instance(name, value, bool)


def at_most(name: str, value: Tensor, limit_name: str, limit: Tensor) -> None:
    """Check that a hyperparameter does not exceed another.

    Raises:
        ValueError: For some chain the value exceeds the limit.
    """
    if has_values(value) and not (value <= limit).all():
        raise ValueError(
            f"{name} must be <= {limit_name}, got {value.tolist()} and {limit.tolist()}"
        )


def count(name: str, value: int, *, minimum: int) -> int:
    """Check an integer count.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if not value >= minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    if not value <= _LARGEST_COUNT:
        raise ValueError(f"{name} must be <= 2**62, got {value}")
    return int(value)


def shown(value: Any) -> str:
    """A value as errors show it: data of many numbers by its type."""
    return repr(value) if isinstance(value, str | numbers.Number) else type(value).__name__


def choice(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    """Check a named option.

    Raises:
        ValueError: The value is not one of `options`.
    """
    # Neither 1 for True, nor an array, which compares entry by entry.
    if not any(type(value) is type(option) and value == option for option in options):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def instance(name: str, value: Any, kind: type | UnionType) -> None:
    """Check a type.

    Raises:
        TypeError: The value is of another type.
    """
    if not isinstance(value, kind):
        # A union has arguments, a single type has none.
        kinds = [each.__name__ for each in get_args(kind) or (kind,)]
        raise TypeError(f"{name} must be a {' or '.join(kinds)}, got {type(value).__name__}")


def function(name: str, value: Any) -> None:
    """Check that a value can be called.

    Raises:
        TypeError: The value cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}")


def scalar(name: str, value: Any) -> Tensor:
    """Check the value that a user's loss or log-prior function returned.

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
        # Tensors and trees both have a `shape`; a tree's is its batch size.
        if value is None or not value.shape:
            continue
        if chains and value.shape != chains:
            raise ValueError(
                f"per-chain settings must agree on the number of chains, "
                f"got {chains[0]} for {owner} and {value.shape[0]} for {name}"
            )
        chains, owner = value.shape, name
    # Views: a shared anchor, copied for each chain, would take C times its memory.
    expanded = {
        name: value if value is None or value.shape == chains else value.expand(chains)
        for name, value in fields.items()
    }
    return expanded, chains


def missing_extra(extra: str, needs: str, used_for: str) -> ImportError:
    """Make the error for an optional dependency that is not installed."""
    return ImportError(
        f"{used_for} needs {needs}, which is not installed: pip install 'funcsgmcmc[{extra}]'"
    )


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's entries can be read: not while tracing, nor inside a vmap."""
    # torch has no public question for "am I under a functorch transform".
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not torch.compiler.is_compiling() and not wrapped
