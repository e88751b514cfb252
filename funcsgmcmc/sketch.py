"""Count sketches: random projections of the terms of an update to a few numbers.

    S(v)ⱼ = Σ_{i: h(i) = j} s(i) vᵢ

with h(i) uniform on {0, …, k − 1} and s(i) = ±1, both drawn from a seed. S is linear, so that the
sketch of a term is its coefficient times the sketch of its direction, and sketches of the parts of
a vector add up. Inner products are kept in expectation, E⟨S(v), S(w)⟩ = ⟨v, w⟩, with variance
(‖v‖² ‖w‖² + ⟨v, w⟩² − 2 Σ vᵢ² wᵢ²)/k.

Sketches of different steps and chains may be compared, if they are of one `CountSketch`.

Sources: Weinberger, Dasgupta, Langford, Smola and Attenberg, "Feature hashing for large scale
multitask learning", ICML 2009 (lemma 2: expectation and variance); Charikar, Chen and
Farach-Colton, "Finding frequent items in data streams", ICALP 2002.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from funcsgmcmc import checks, shards, tree
from funcsgmcmc.terms import Term, Terms
from funcsgmcmc.tree import Tree


class CountSketch(NamedTuple):
    """The two hash functions of a sketch; made by `count_sketch`.

    Attributes:
        indices: h, int64 `[n]`, values in {0, …, k − 1}.
        signs: s, float32 `[n]`, values ±1.
        output_dim: k.
    """

    indices: Tensor
    signs: Tensor
    output_dim: int


class Sketches(NamedTuple):
    """Sketches of one step's terms, as applied, each `[*chains, k]`."""

    scaled_grad: Tensor
    unscaled_grad: Tensor
    localization: Tensor
    weight_decay: Tensor
    noise: Tensor


def count_sketch(
    input_dim: int, output_dim: int, seed: int = 0, device: torch.device | str | None = None
) -> CountSketch:
    """Draw the hash functions of a sketch.

    Args:
        input_dim: n ≥ 0, number of parameters of a chain.
        output_dim: k ≥ 1, numbers to keep. The relative error of a squared norm is about √(2/k).
        seed: Names the sketch: the same seed and dimensions give the same hash functions, on every
            device.
        device: Where the hash functions live (default: the CPU).

    Raises:
        TypeError, ValueError: A dimension is not an integer in its range.
    """
    checks.count("input_dim", input_dim, minimum=0)
    checks.count("output_dim", output_dim, minimum=1)
    # Drawn on the CPU: a device's generator would draw other functions.
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(output_dim, (input_dim,), generator=generator)
    signs = (2 * torch.randint(2, (input_dim,), generator=generator) - 1).float()
    return CountSketch(indices.to(device), signs.to(device), output_dim)


def sketches(terms: Terms, sketch: CountSketch) -> Sketches:
    """Sketch the terms of a step.

    Args:
        terms: The step's terms, of batch size `[*chains]`.
        sketch: For as many parameters as a chain has, in the order of `tree.leaves`.

    Returns:
        Sketches, each `[*chains, k]`, in float32 or better; zeros for an absent term.

    Raises:
        ValueError: The sketch is for another number of parameters.
    """
    # Sketches are named as their terms.
    flat = [_projected(getattr(terms, name), sketch) for name in Sketches._fields]
    return Sketches(*flat)


def project(vector: Tree, sketch: CountSketch) -> Tensor:
    """S(v) of a tree.

    Args:
        vector: v, a tree of batch size `[*chains]`, or a bare tensor.
        sketch: For as many parameters as a chain has, in the order of `tree.leaves`.

    Returns:
        `[*chains, k]`, in float32 or better.

    Raises:
        ValueError: The sketch is for another number of parameters.
    """
    if isinstance(vector, TensorDictBase) and tree.is_sharded(vector):
        return _project_parts(vector, sketch)
    flat = tree.flatten(vector)
    size, input_dim = flat.shape[-1], len(sketch.indices)
    if size != input_dim:
        raise ValueError(f"the sketch is for {input_dim} parameters, got {size}")
    # `index_add` sums colliding entries; plain indexing would keep one of them.
    result = flat.new_zeros((*flat.shape[:-1], sketch.output_dim))
    # Signs are kept in float32: ±1 is exact in every dtype.
    return result.index_add(-1, sketch.indices, sketch.signs.to(flat.dtype) * flat)


def _project_parts(vector: TensorDictBase, sketch: CountSketch) -> Tensor:
    """S(v) of a sharded tree: the sum of the sketches of its parts."""
    size, first = tree.size(vector), 0
    if size != len(sketch.indices):
        raise ValueError(f"the sketch is for {len(sketch.indices)} parameters, got {size}")
    sums = []
    for _, leaf in tree.leaves(vector):
        here = tree.widened(shards.local(leaf)).reshape(-1)
        rows = slice(first, first + leaf.numel())
        indices, signs = (
            shards.part_of(each[rows].view(leaf.shape), leaf).reshape(-1)
            for each in (sketch.indices, sketch.signs)
        )
        part = here.new_zeros(sketch.output_dim).index_add(0, indices, signs.to(here.dtype) * here)
        sums.append((shards.spread_of(leaf), part))
        first += leaf.numel()
    return shards.totals([sums])[0]


def _projected(term: Term | None, sketch: CountSketch) -> Tensor:
    """The sketch of a term."""
    if term is None:
        return sketch.signs.new_zeros(sketch.output_dim)
    # The sketch is linear: the coefficient comes last, on k numbers only.
    sketched = project(term.direction, sketch)
    return tree.expand_right(term.coefficient, sketched) * sketched
