"""Count sketches: linear, per chain, and unbiased for inner products."""

import pytest
import torch
from tensordict import TensorDict

import funcsgmcmc as fs
from cases import CASES
from funcsgmcmc import tree
from funcsgmcmc.sketch import CountSketch, count_sketch, project, sketches


def trees(chains: int = 3, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 2), "b": (), "c": (5,), "d": (0,)}
    return TensorDict(
        {name: torch.randn(chains, *shape, generator=generator) for name, shape in shapes.items()},
        batch_size=[chains],
    )


def test_a_sketch_is_the_sum_over_buckets():
    params, sketch = trees(), count_sketch(14, 4, seed=3)
    flat = tree.flatten(params)
    expected = torch.zeros(3, 4)
    for i in range(14):
        expected[:, sketch.indices[i]] += sketch.signs[i] * flat[:, i]
    torch.testing.assert_close(project(params, sketch), expected)
    one = project(params[1], sketch)
    torch.testing.assert_close(one, expected[1])
    torch.testing.assert_close(torch.vmap(lambda p: project(p, sketch))(params), expected)


def test_sketches_of_parts_add_up():
    vector, sketch = torch.randn(10), count_sketch(10, 3)
    parts = [CountSketch(sketch.indices[s], sketch.signs[s], 3) for s in (slice(4), slice(4, 10))]
    added = project(vector[:4], parts[0]) + project(vector[4:].view(2, 3), parts[1])
    torch.testing.assert_close(added, project(vector, sketch))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sketches_of_terms(case, params):
    sampler = case.make(params)
    keys = fs.random.split(fs.key(0), 4)
    batch = params.expand(4)
    noise = fs.tree.normal_like(keys, batch)
    state = sampler.init(batch, noise)
    grads = fs.tree.normal_like(fs.random.split(fs.key(1), 4), batch)
    evaluation = fs.samplers.Evaluation(
        grads, loss=torch.zeros(4), hessian_diagonal=params.expand(4)
    )
    _, terms = sampler.update(state, evaluation, noise)
    sketch = count_sketch(tree.size(params), 7)
    result = sketches(terms, sketch)
    for name in result._fields:
        expected = project(getattr(terms, name).value(), sketch)
        torch.testing.assert_close(getattr(result, name), expected)
        assert getattr(result, name).shape == (4, 7)


def test_inner_products_are_kept_in_expectation():
    """z-test over seeds, with the variance of Weinberger et al., lemma 2."""
    size, k, repeats = 30, 5, 4_000
    generator = torch.Generator().manual_seed(1)
    v, w = torch.randn(2, size, generator=generator)
    products = []
    for seed in range(repeats):
        sketch = count_sketch(size, k, seed)
        products.append(project(v, sketch) @ project(w, sketch))
    drawn = torch.stack(products)
    variance = (v @ v * (w @ w) + (v @ w) ** 2 - 2 * (v * v) @ (w * w)) / k
    assert abs(drawn.mean() - v @ w) < 4 * (variance / repeats) ** 0.5
    fourth = (drawn - drawn.mean()).pow(4).mean()
    error = ((fourth - variance**2) / repeats) ** 0.5
    assert abs(drawn.var() - variance) < 4 * error


def test_bad_sketches_are_refused():
    with pytest.raises(ValueError, match="output_dim must be >= 1, got 0"):
        count_sketch(3, 0)
    with pytest.raises(TypeError, match="input_dim must be an integer"):
        count_sketch(2.5, 3)
    with pytest.raises(ValueError, match="the sketch is for 3 parameters, got 4"):
        project(torch.ones(4), count_sketch(3, 2))
