"""Chunks of chains that fit the memory that is kept between steps."""

import pytest
import torch
from tensordict import TensorDict

import funcsgmcmc as fs
from funcsgmcmc.memory import chunk_size


def chains(num_chains: int, size: int, device: str = "cpu") -> TensorDict:
    leaf = torch.zeros(1, size, dtype=torch.float32, device=device).expand(num_chains, size)
    return TensorDict({"w": leaf}, num_chains)


@pytest.mark.parametrize(
    ("num_chains", "size", "expected"),
    [(32, 1000, 32), (1024, 26_122, 256), (1000, 26_122, 250), (3, 10**8, 1), (7, 2**21, 3)],
)
def test_chunks_keep_a_buffer_within_32_mebibytes(num_chains, size, expected):
    assert chunk_size(chains(num_chains, size)) == expected
    assert expected == 1 or expected * size * 4 < 1 << 25


def test_other_devices_keep_their_memory_themselves():
    assert chunk_size(chains(1024, 10**8, "meta")) == 1024


def test_keeping_memory_takes_none():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = resident()
    fs.keep_freed_memory()
    assert resident() - before < 100  # pages
