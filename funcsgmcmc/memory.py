"""Memory: what steps keep, what they need, and what is free."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from funcsgmcmc import tree

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Limit, usage and statistics of a container, and the statistics that count pages of files:
# version 2 of Linux's control groups, and version 1.
_CONTAINERS = (
    (
        _CGROUP / "memory.max",
        _CGROUP / "memory.current",
        _CGROUP / "memory.stat",
        ("active_file", "inactive_file"),
    ),
    (
        _CGROUP / "memory/memory.limit_in_bytes",
        _CGROUP / "memory/memory.usage_in_bytes",
        _CGROUP / "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)

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

    `sample`, `compiled` and the optimizers of `compat` call this. With another allocator, or
    thresholds set by environment variables, it does nothing.
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


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on a device may take; None where the system does not say.

    On the CPU: what the system calls available, within the limit of the process's container.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    available = [int(fields["MemAvailable"].split()[0]) << 10]
    for limit, usage, stat, cached in _CONTAINERS:
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            # Pages of files count as used, and give way.
            statistics = dict(line.split() for line in stat.read_text().splitlines())
            given_way = sum(int(statistics.get(name, 0)) for name in cached)
            available.append(int(text) - int(usage.read_text()) + given_way)
    return max(0, min(available))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Call a function, and tell how many bytes its tensors took at most, of all devices.

    What operators of torch take for themselves while they run is not seen.
    """
    tracker = _Tracker()
    with tracker:
        function()
    return tracker.peak


def in_bytes(size: int) -> str:
    """Bytes as people read them."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


class _Tracker(TorchDispatchMode):
    """Follows the storages that operators make, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        for leaf in given:
            if isinstance(leaf, Tensor):
                self._known.setdefault(leaf.untyped_storage(), True)
        result = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self._alive -= size
