"""A record's store: what is written for chunks of chains is read for all of them."""

import torch

from funcsgmcmc.runs.store import Field, MemoryStore

SIZES = {"chain": 5, "step": 7, "draw": 3}


def test_values_of_chunks_are_read_together():
    loss, vector = Field("loss", "loss", "step"), Field("observables", "loss", "draw")
    store, values = MemoryStore(SIZES), torch.randn(5, 7)
    vectors = torch.arange(30).reshape(5, 3, 2)
    for rows in (slice(0, 2), slice(2, 4), 4):
        for step in range(7):
            store.write(loss, rows, step, values[rows, step])
        for draw in range(3):
            store.write(vector, rows, draw, vectors[rows, draw])
    assert torch.equal(store.read(loss, 0, 7), values)
    assert torch.equal(store.read(loss, 2, 4), values[:, 2:4])
    assert torch.equal(store.read(vector, 0, 3), vectors)
    assert store.read(vector, 0, 3).dtype == torch.int64
    assert loss.dimensions == ("chain", "step")


def test_fields_are_known_by_their_group():
    store = MemoryStore(SIZES)
    fields = [Field("metrics", name, "step") for name in ("noise", "distance")]
    assert store.fields("metrics") == []
    assert store.read(fields[0], 0, 0).shape == (5, 0)
    for field in [*fields, Field("draws", ("layer", "w"), "draw")]:
        store.write(field, 1, 0, torch.tensor(2.0))
    assert store.fields("metrics") == fields
