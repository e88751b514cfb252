"""Chunks of chains that fit the memory that is kept between steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from funcsgmcmc.memory import chunk_size


def chains(num_chains: int, size: int, device: str = "cpu") -> TensorDict:
    leaf = torch.zeros(1, size, dtype=torch.float32, device=device).expand(num_chains, size)
    return TensorDict({"w": leaf}, num_chains)


@pytest.mark.parametrize(
    ("num_chains", "size", "expected"),
    [
        (32, 1000, 32),
        (1024, 26_122, 256),
        (1000, 26_122, 250),
        (10**4, 2**13, 1000),
        (67, 2**18, 23),
        (50, 418_000, 10),
    ],
)
def test_chunks_keep_a_buffer_within_32_mebibytes(num_chains, size, expected):
    assert chunk_size(chains(num_chains, size)) == expected
    assert expected * size * 4 < 1 << 25


def test_chains_of_large_networks_stay_together():
    assert chunk_size(chains(100, 2**20)) == 100


def test_other_devices_keep_their_memory_themselves():
    assert chunk_size(chains(1024, 10**8, "meta")) == 1024


def resident() -> int:
    """MiB of the process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc does, seen in /proc")
def test_freed_memory_is_kept():
    """In a process of its own, whose allocator has not adjusted itself yet."""
    script = """
import torch, funcsgmcmc as fs
from test_memory import resident
torch.set_default_device("meta")
torch.use_deterministic_algorithms(True)
start = resident()
fs.memory.keep_freed_memory()
assert resident() - start < 2
torch.ones(5 << 20, device="cpu")
assert resident() - start > 15, resident() - start
"""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MALLOC_")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
