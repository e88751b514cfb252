"""Memory of the process between steps, and how many chains fit the part of it that is kept."""

import math

import torch
from tensordict import TensorDictBase

from funcsgmcmc import tree

_LARGEST_KEPT = (32 << 20) - (64 << 10)  # bytes: glibc adjusts itself to blocks up to 32 MiB


def keep_freed_memory() -> None:
    """Let the C library keep the memory that steps free, for the next step.

    A step makes tensors of some megabytes and frees them. By default glibc hands such memory back
    to the system each time, and each step has its pages mapped anew, which takes as long as the
    arithmetic: on networks with 10⁵ parameters and 8 to 32 chains, steps are 1.2 to 1.8 times as
    fast with it kept. glibc raises its thresholds for that (`M_MMAP_THRESHOLD`,
    `M_TRIM_THRESHOLD`; mallopt(3)) to the largest block that was freed, up to 32 MiB: this frees
    one. The process may then hold up to 64 MiB that nobody uses.

    `sample` and `compiled` call this. With another allocator, or thresholds set by environment
    variables, it does nothing.
    """
    # The pages are never touched, so that this takes microseconds.
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def chunk_size(params: TensorDictBase) -> int:
    """How many chains to step at once, so that a buffer of their parameters is kept memory.

    Network A of the benchmarks (26,122 parameters), compiled: 0.12 ms a chain for chunks of 16 to
    256 chains, 0.28 ms for 1,024, whose buffers are mapped anew at each step. On other devices than
    the CPU torch keeps all memory itself: all chains.

    Args:
        params: Of batch size `[C]`.

    Returns:
        At most C; chunks of this size are of one size, as far as C can be divided.
    """
    (num_chains,) = params.batch_size
    if tree.device(params).type != "cpu":
        return num_chains
    bytes_per_chain = tree.size(params) * tree.noise_dtype(params).itemsize
    most = max(1, _LARGEST_KEPT // max(1, bytes_per_chain))
    return math.ceil(num_chains / math.ceil(num_chains / most))
