"""Keys: the published vectors, the same words everywhere, the laws of what is drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import funcsgmcmc as fs
from funcsgmcmc.random import bits, fold_in, key, normal, normal_vectors, split, threefry2x32

KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def words(*values: int) -> torch.Tensor:
    return (
        torch.tensor(values, dtype=torch.int64)
        .where(torch.tensor(values) < 1 << 31, torch.tensor(values) - (1 << 32))
        .to(torch.int32)
    )


@pytest.mark.parametrize(("counter", "secret", "expected"), KNOWN_ANSWERS)
def test_random123_known_answers(counter, secret, expected):
    first, second = words(*counter)
    assert torch.equal(torch.stack(threefry2x32(words(*secret), first, second)), words(*expected))


def reference_words(seed: int, size: int) -> list[int]:
    """Threefry-2x32-20 in Python integers, over the counters (0, 0), (1, 0), …"""
    mask = 0xFFFFFFFF
    k0, k1 = seed >> 32, seed & mask
    schedule = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    firsts, seconds = [], []
    for counter in range((size + 1) // 2):
        x, y = (counter + k0) & mask, k1
        for i in range(20):
            r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
            x = (x + y) & mask
            y = ((y << r) | (y >> (32 - r))) & mask
            y ^= x
            if i % 4 == 3:
                j = i // 4 + 1
                x, y = (x + schedule[j % 3]) & mask, (y + schedule[(j + 1) % 3] + j) & mask
        firsts.append(x)
        seconds.append(y)
    return (firsts + seconds)[:size]


@given(st.integers(0, 2**64 - 1), st.integers(0, 9))
def test_bits_are_threefry_of_the_counter(seed, size):
    assert torch.equal(bits(key(seed), (size,)), words(*reference_words(seed, size)))


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), max_size=3),
)
def test_batched_vmapped_and_single_keys_agree(seed, data, shape):
    root = key(seed)
    keys = fold_in(root, torch.tensor(data))
    assert torch.equal(keys, torch.stack([fold_in(root, number) for number in data]))
    assert torch.equal(keys, torch.vmap(fold_in, in_dims=(None, 0))(root, torch.tensor(data)))
    for draw in (bits, normal):
        together = draw(keys, shape)
        assert together.shape == (len(data), *shape)
        assert torch.equal(together, torch.stack([draw(k, shape) for k in keys]))
        assert torch.equal(together, torch.vmap(lambda k, draw=draw: draw(k, shape))(keys))
    assert torch.equal(split(keys, 3)[0], split(keys[0], 3))


@pytest.mark.parametrize("size", [388, 1001, 194])
def test_draws_come_in_blocks_of_two_values_a_counter(monkeypatch, size):
    """Each block is a draw's layout, cosines before sines, and makes its values alone."""
    keys = split(key(3), 5)
    words, values = bits(keys, (size,)), normal(keys, (size,), torch.float32)
    monkeypatch.setattr("funcsgmcmc.random._BLOCK", 97)
    layout = [
        index
        for first in range(0, size, 194)
        for half in (0, 1)
        for index in _halves(size)[half][first // 2 : first // 2 + 97]
    ]
    assert torch.equal(bits(keys, (size,)), words[:, layout])
    drawn = normal(keys, (size,), torch.float32)
    assert torch.equal(drawn, values[:, layout])
    vectors = list(normal_vectors(keys, size, torch.float32))
    assert torch.equal(torch.cat(vectors, -1), drawn)
    assert max(vector.shape[-1] for vector in vectors) == 97
    assert torch.equal(torch.stack([normal(k, (size,), torch.float32) for k in keys]), drawn)
    assert torch.equal(torch.vmap(lambda k: normal(k, (size,), torch.float32))(keys), drawn)
    compiled_draw = fs.compiled(lambda keys: bits(keys, (size,)))
    assert torch.equal(compiled_draw(keys), bits(keys, (size,)))


def _halves(size: int) -> tuple[range, range]:
    """Where the first and the second values of the counters stand in a draw of one block."""
    middle = (size + 1) // 2
    return range(middle), range(middle, size)


@pytest.mark.parametrize("size", [1, 7, 2**19, 2**19 + 1, 3 * 2**18 + 5])
def test_a_part_of_the_normals_is_drawn_without_the_rest(size):
    drawn = fs.random.normal(fs.key(1), (size,), torch.float64)
    for start, stop in ((0, size), (0, size // 2), (size // 3, size), (size - 1, size), (1, 1)):
        part = fs.random.normal_range(fs.key(1), size, start, stop, torch.float64)
        assert torch.equal(part, drawn[start:stop])
    places = torch.arange(0, size, 3).flip(0)
    assert torch.equal(fs.random.normal_at(fs.key(1), size, places, torch.float64), drawn[places])


def test_compiled_words_are_the_eager_words():
    def draw(root, step):
        keys = fold_in(split(root, 2)[1], step)
        return bits(keys, (1000,)), normal(keys, (1000,), torch.float32)

    steps = torch.arange(3)
    compiled = fs.compiled(draw)
    for seed in (0, 2**63 + 5):
        eager_bits, eager_normal = draw(key(seed), steps)
        compiled_bits, compiled_normal = compiled(key(seed), steps)
        assert torch.equal(eager_bits, compiled_bits)
        torch.testing.assert_close(compiled_normal, eager_normal, rtol=1e-5, atol=2e-6)


def test_children_and_draws_of_a_key_are_disjoint():
    root = key(11)
    children = torch.cat(
        [
            split(root, 1000),
            fold_in(root, torch.arange(1000)),
            fold_in(root, torch.arange(1000) << 32),
            bits(root, (2000,)).reshape(2, 1000).T,
        ]
    )
    # 4,000 pairs of 32 bits: an accidental repetition has probability 4e-13. (0 << 32 is 0: one
    # child is meant to occur twice.)
    assert len(children.unique(dim=0)) == 3999


def z_score(mean: float, expected: float, sd: float, size: int) -> float:
    return (mean - expected) / (sd / math.sqrt(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_million_normals(dtype):
    size = 10_000_000
    draws = normal(key(2024), (size,), dtype)
    assert draws.dtype == dtype
    double = draws.double()
    # E z^k and its standard deviation: k = 1, 2, 3, 4 have variance 1, 2, 15, 96.
    for power, (expected, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        mean = double.pow(power).mean().item()
        assert abs(z_score(mean, expected, math.sqrt(variance), size)) < 4
    assert stats.kstest(double.numpy(), "norm").pvalue > 1e-4
    # The largest of 1e7 normals lies in (4.9, 6.7) but for 1e-4.
    assert 4.9 < double.abs().max() < 6.7


def correlation_z(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).mean() * math.sqrt(a.numel()))


def test_neighbouring_chains_steps_and_leaves_are_uncorrelated():
    chains, steps, size = 60, 60, 500
    keys = fold_in(fold_in(key(5), torch.arange(chains))[:, None], torch.arange(steps))
    draws = normal(keys, (size,), torch.float64)
    pairs = {
        "chains": (draws[:-1], draws[1:]),
        "steps": (draws[:, :-1], draws[:, 1:]),
        "entries": (draws[..., :-1], draws[..., 1:]),
        "halves": (draws[..., : size // 2], draws[..., size // 2 :]),
        "chain and step": (draws[:-1, 1:], draws[1:, :-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation_z(a, b)) < 4, name
        assert abs(correlation_z((a**2 - 1) / 2**0.5, (b**2 - 1) / 2**0.5)) < 4, name


def test_words_are_uniform():
    draws = bits(key(8), (1 << 20,)).to(torch.int64) & 0xFFFFFFFF
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((draws >> shift) & 255, minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_shapes_and_dtypes():
    assert normal(key(0)).shape == ()
    assert normal(key(0)).dtype == torch.float64
    assert normal(key(0), (0, 3)).shape == (0, 3)
    assert normal(split(key(0), 4), (2, 0)).shape == (4, 2, 0)
    half = normal(key(0), (5,), torch.bfloat16)
    assert torch.equal(half, normal(key(0), (5,), torch.float32).bfloat16())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: key(-1), ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        (lambda: key(1.5), TypeError, "seed must be an int, got float"),
        (lambda: split(key(0), 0), ValueError, "num must be >= 1, got 0"),
        (lambda: fold_in(key(0), -3), ValueError, "got -3"),
        (lambda: fold_in(key(0), torch.ones(2)), TypeError, "must hold integers, got dtype"),
        (lambda: normal(torch.zeros(3)), ValueError, r"int32 of shape \[..., 2\], got torch.float"),
        (lambda: normal(7), TypeError, "key must be made by funcsgmcmc.key"),
        (lambda: normal(key(0), (2,), torch.int32), TypeError, "dtype must be a real floating"),
        (lambda: bits(key(0), (1 << 17, 1 << 17)), ValueError, r"at most 2\*\*32 values"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_a_hundred_million_normals_have_the_right_tails():
    edges = torch.linspace(-5.5, 5.5, 111)
    counts = torch.zeros(112)
    for chain in range(10):
        draws = normal(fold_in(key(77), chain), (10_000_000,), torch.float32).double()
        counts += torch.bincount(torch.bucketize(draws, edges), minlength=112)
    probabilities = torch.tensor(stats.norm.cdf(edges.numpy())).diff(
        prepend=torch.zeros(1), append=torch.ones(1)
    )
    expected = probabilities * counts.sum()
    # The outermost bins expect 1.9 draws each: merge what expects fewer than 10.
    inner = expected >= 10
    merged = torch.cat([counts[inner], counts[~inner].sum()[None]])
    wanted = torch.cat([expected[inner], expected[~inner].sum()[None]])
    assert stats.chisquare(merged.numpy(), wanted.numpy()).pvalue > 1e-4
