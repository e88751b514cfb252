"""Blocks: several steps as one function, a loop that compiles as a part of it.

    (w, h₀), x₀ … x_{n−1}  ─►  w ← step(w, x_k), h_k ← what the step reports,  k = 0 … n − 1

A compiled step pays for guards and dispatch at every call, which is half of a small network's step.
A compiled block pays once. Its chains are those of the compiled step, bit for bit; sums that are
only reported, such as metrics, may differ by rounding.

torch's loop has a private name, which this module alone uses: where a version of torch lacks it,
`LOOPS` is False, and steps are made one by one.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

try:
    from torch._higher_order_ops.while_loop import while_loop
except ImportError:  # pragma: no cover - all versions that are tested have it
    LOOPS = False
else:
    LOOPS = True

Carry = TypeVar("Carry")
Report = TypeVar("Report")

Block = Callable[..., tuple[Any, Any]]
"""`block(carry, inputs, number, reports, *constants) -> (carry, reports)`; see `block_of`."""


def block_of(step: Callable[..., tuple[Carry, Report]]) -> Block:
    """Make several steps one function.

    Args:
        step: `step(carry, input, *constants) -> (carry, report)`, of pytrees of tensors; it keeps
            shapes and dtypes of the carry.

    Returns:
        `block(carry, inputs, number, reports, *constants) -> (carry, reports)`. `inputs` has leaves
        `[K, …]`, one for each step; `number`, an integer tensor `[]`, is n ≤ K: another one does
        not compile again. `reports` has leaves `[K, …]` like those of `room_for`: rows from n on
        are returned as they are given.
    """

    def block(
        carry: Carry, inputs: Any, number: Tensor, reports: Report, *constants: Any
    ) -> tuple[Carry, Report]:
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


def room_for(report: Report, length: int) -> Report:
    """Room for the reports of the steps of a block, leaves `[length, …]` for leaves `[…]`."""
    return pytree.tree_map(lambda leaf: leaf.new_zeros(length, *leaf.shape), report)


def _with_row(rows: Tensor, value: Tensor, k: Tensor) -> Tensor:
    """Rows with another row k."""
    is_here = torch.arange(len(rows), device=rows.device) == k
    return torch.where(is_here.reshape(-1, *[1] * value.ndim), value, rows)
