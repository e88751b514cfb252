"""Memory of the process between steps, and how many chains fit the part of it that is kept."""

import math

import torch
from tensordict import TensorDictBase

from funcsgmcmc import tree

_LARGEST_KEPT = (32 << 20) - (64 << 10)  # bytes: glibc adjusts itself to blocks up to 32 MiB
_FEWEST_CHAINS = 16


def keep_freed_memory() -> None:
    """Let the C library keep the memory that steps free, for the next step.

    A step makes tensors of some megabytes and frees them. By default glibc hands such memory back
    to the system each time, and each step has its pages mapped anew, which takes as long as the
    arithmetic: on networks with 10⁵ parameters and 8 to 32 chains, steps are 1.2 to 1.8 times as
    fast with it kept. glibc raises its thresholds for that (`M_MMAP_THRESHOLD`,
    `M_TRIM_THRESHOLD`; mallopt(3)) to the largest block that was freed, up to 32 MiB: this frees
    one, as any program does that frees a tensor of that size.

    From then on blocks of up to 32 MiB come from the heap of the whole process, which returns to
    the system what is free at its end beyond 64 MiB, and nothing below a block in use.

    `sample` and `compiled` call this. With another allocator, or thresholds set by environment
    variables, it does nothing.
    """
    # A storage is not filled, as deterministic tensors are: its pages are never touched.
    torch.UntypedStorage(_LARGEST_KEPT, device="cpu")


def chunk_size(params: TensorDictBase) -> int:
    """The number of chains to step at once, so that a buffer of their parameters is kept memory.

    Network A of the benchmarks (26,122 parameters), compiled: 0.12 ms a chain for chunks of 16 to
    256 chains, 0.28 ms for 1,024, whose buffers are mapped anew at each step. All chains where not
    even 16 would fit, and on other devices than the CPU, where torch keeps all memory itself.

    Args:
        params: Of batch size `[C]`.

    Returns:
        At most C; a divisor of it if there is one that needs at most twice as many chunks.
    """
    (num_chains,) = params.batch_size
    bytes_per_chain = tree.size(params) * tree.noise_dtype(params).itemsize
    most = _LARGEST_KEPT // max(1, bytes_per_chain)
    if tree.device(params).type != "cpu" or most < _FEWEST_CHAINS:
        return num_chains
    fewest = math.ceil(num_chains / most)
    # Chunks of one size share a compiled step; a smaller last one needs another.
    even = (number for number in range(fewest, 2 * fewest + 1) if num_chains % number == 0)
    return math.ceil(num_chains / next(even, fewest))
