"""Blocks: several steps as one function, a loop that compiles as a part of it.

    (w, h₀), x₀ … x_{n−1}  ─►  w ← step(w, x_k), h_k ← what the step reports,  k = 0 … n − 1

A compiled step pays for guards and dispatch at every call, which is half of a small network's step.
A compiled block pays once. Its chains are those of the compiled step to rounding, and bit for bit
where the compiler adds in the same order, which depends on the processor.

torch's loop has a private name, which this module alone uses. A version of torch may lack it: then
`LOOPS` is False, and `sample` makes steps one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

try:
    from torch._higher_order_ops.while_loop import while_loop
except ImportError:
    LOOPS = False
else:
    LOOPS = True


class Blocks:
    """Makes several steps at a call.

    Args:
        step: `step(carry, input, *constants) -> (carry, report)`, of pytrees of tensors; it keeps
            shapes and dtypes of the carry.
        compile: Compiles a function.
    """

    def __init__(self, step: Callable[..., Any], compile: Callable[[Any], Any]) -> None:
        self._step, self._block = step, compile(block_of(step))
        self._rooms: dict[Any, Any] = {}

    def __call__(self, carry: Any, inputs: Any, number: int, *constants: Any) -> tuple[Any, Any]:
        """Make some steps.

        Args:
            carry: What they change.
            inputs: Leaves `[K, …]`, one row for each step.
            number: n ≤ K, of steps; another one does not compile again.
            *constants: What they do not change.

        Returns:
            The carry after them, and their reports, leaves `[K, …]`, of which the first n count.
        """
        given = pytree.tree_leaves(inputs)
        shapes = tuple(leaf.shape for leaf in (*pytree.tree_leaves(carry), *given))
        if shapes not in self._rooms:
            # An eager step tells what steps report; it is not kept.
            first = pytree.tree_map(lambda leaf: leaf[0], inputs)
            _, report = self._step(carry, first, *constants)
            self._rooms[shapes] = pytree.tree_map(
                lambda leaf: leaf.new_zeros(len(given[0]), *leaf.shape), report
            )
        length = torch.tensor(number, device=given[0].device)
        made: tuple[Any, Any] = self._block(carry, inputs, length, self._rooms[shapes], *constants)
        return made


def block_of(step: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Make several steps one function.

    Args:
        step: As for `Blocks`.

    Returns:
        `block(carry, inputs, number, reports, *constants) -> (carry, reports)`, with an integer
        tensor `[]` as the number and room for the reports, whose rows from n on are returned as
        they are given.
    """

    def block(
        carry: Any, inputs: Any, number: Tensor, reports: Any, *constants: Any
    ) -> tuple[Any, Any]:
        carried, carry_spec = pytree.tree_flatten(carry)
        rows, report_spec = pytree.tree_flatten(reports)
        of_steps, input_spec = pytree.tree_flatten(inputs)

        def is_left(k: Tensor, *carried: Tensor) -> Tensor:
            return k < number

        def once(k: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            before, rows = carried[: carry_spec.num_leaves], carried[carry_spec.num_leaves :]
            here = [leaf.index_select(0, k.reshape(1)).squeeze(0) for leaf in of_steps]
            moved, report = step(
                pytree.tree_unflatten(list(before), carry_spec),
                pytree.tree_unflatten(here, input_spec),
                *constants,
            )
            # A loop may not hand a value on as it is.
            after = [leaf.clone() for leaf in pytree.tree_leaves(moved)]
            reported = pytree.tree_leaves(report)
            written = [_with_row(*each, k) for each in zip(rows, reported, strict=True)]
            return (k + 1, *after, *written)

        begin = torch.zeros((), dtype=torch.int64, device=number.device)
        _, *end = while_loop(is_left, once, (begin, *carried, *rows))
        return (
            pytree.tree_unflatten(end[: carry_spec.num_leaves], carry_spec),
            pytree.tree_unflatten(end[carry_spec.num_leaves :], report_spec),
        )

    return block


def _with_row(rows: Tensor, value: Tensor, k: Tensor) -> Tensor:
    """Rows with another row k."""
    is_here = torch.arange(len(rows), device=rows.device) == k
    return torch.where(is_here.reshape(-1, *[1] * value.ndim), value, rows)
