"""Counter-based random numbers: the same key gives the same words everywhere.

The generator is Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011, section 4.2): a bijection of a 64-bit counter under a 64-bit
key, made of integer additions, rotations and exclusive ors. It has no state to advance, so eager
code, `torch.vmap` and `torch.compile` see the same words, and so do CPU and CUDA.

Shapes: a key is an int32 tensor `[..., 2]`; leading dimensions are a batch of keys, and every
function here maps over them. Words are int32 tensors that hold 32 uniform bits.

A key names three disjoint families of counters, told apart by the top two bits of the second
counter word: its own words (`bits`, `normal`), its children by index (`split`) and its children by
data (`fold_in`). Drawing from a key therefore never repeats one of its children.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcsgmcmc import checks

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_KEY_SCHEDULE_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF
_SPLIT = 1 << 30
_FOLD = 1 << 31
# Two bits of a counter's second word tell its family: 62 are left for data.
_MAX_DATA = 1 << 62
_MAX_VALUES = 1 << 32
_MAX_KEYS = 1 << 31

# Passes over a block of this many words stay in the cache; of 2**15 to 2**19 this was the fastest.
_BLOCK = 1 << 18

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Makes two values of a counter's two words; it may write to them."""


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """Make a key from an integer seed.

    Args:
        seed: `0 <= seed < 2**64`; its high and low 32 bits are the two words of the key.
        device: Device of the key and of the values drawn from it.

    Returns:
        A key, int32 `[2]`.

    Raises:
        TypeError: `seed` is not an integer, or `device` no name of one.
        ValueError: `seed` is out of range, or torch knows no such device.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    seed = int(seed)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if device is not None:
        _check_device(device)
    # int32 with the bits of the words: torch adds and shifts no uint32.
    return torch.tensor(
        [_signed(seed >> 32), _signed(seed & _WORD)], dtype=torch.int32, device=device
    )


def _check_device(device: Any) -> None:
    """Refuse what names no device.

    Raises:
        TypeError: It is no name.
        ValueError: Torch knows no device of that name.
    """
    checks.instance("device", device, torch.device | str)
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, got {device!r}") from error


def split(key: Tensor, num: int = 2) -> Tensor:
    """Make `num` independent keys from one.

    Args:
        key: `[..., 2]`.
        num: How many, at least 1.

    Returns:
        Keys `[..., num, 2]`.

    Raises:
        TypeError, ValueError: `key` is not a key, or `num < 1`.
    """
    check_key(key)
    checks.count("num", num, minimum=1)
    if not num <= _MAX_KEYS:
        raise ValueError(f"num must be <= 2**31, got {num}")
    index = torch.arange(num, dtype=torch.int32, device=key.device)
    # Keys [..., 1, 2] against num indices: all children in one pass.
    return _child(key.unsqueeze(-2), index, torch.full_like(index, _SPLIT))


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Make the key that belongs to `data`, for instance a chain's or a step's index.

    Args:
        key: `[..., 2]`.
        data: An integer, or an integer tensor that broadcasts against the batch of keys; in
            `[0, 2**62)`. Different data give different keys.

    Returns:
        Keys, of the batch shape of `key` broadcast with the shape of `data`, `[..., 2]`.

    Raises:
        TypeError: `data` is a tensor that does not hold integers.
        ValueError: `key` is not a key, or `data` is an int out of range (the values of a tensor
            are not read, so that a traced or vmapped index works).
    """
    check_key(key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise TypeError(f"data must hold integers, got dtype {data.dtype}")
        # In int64 the low word keeps its top bit, which is the sign in int32.
        wide = data.to(device=key.device, dtype=torch.int64)
        return _child(key, _as_word(wide), _as_word((wide >> 32) | _FOLD))
    if isinstance(data, bool) or not isinstance(data, numbers.Integral):
        raise TypeError(f"data must be an int or an integer tensor, got {data!r}")
    data = int(data)
    if not 0 <= data < _MAX_DATA:
        raise ValueError(f"data must be in [0, 2**62), got {data}")
    low, high = (
        torch.full((), _signed(word), dtype=torch.int32, device=key.device)
        for word in (data & _WORD, data >> 32 | _FOLD)
    )
    return _child(key, low, high)


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draw 32 uniform bits a value.

    Args:
        key: `[..., 2]`.
        shape: Shape of what each key draws; at most 2**32 values.

    Returns:
        int32 `[..., *shape]`, uniform over all 2**32 words.

    Raises:
        TypeError, ValueError: `key` is not a key, or `shape` is too large.
    """
    return _draw(key, tuple(shape), lambda first, second: (first, second))


def normal(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normal values.

    Box and Muller (1958): with `u₁ ∈ (0, 1)` of 31 bits from the first word and an angle
    `θ ∈ [−π, π)` of 32 bits from the second, `√(−2 ln u₁) · (cos θ, sin θ)` are two independent
    normals. The largest magnitude that can occur is `√(64 ln 2) ≈ 6.66`.

    Args:
        key: `[..., 2]`.
        shape: Shape of what each key draws; at most 2**32 values.
        dtype: Floating dtype (default: torch's default dtype). Below 32 bits, values are computed
            in float32 and rounded.
        device: Where to draw (default: the device of `key`).

    Returns:
        `[..., *shape]`, each entry N(0, 1).

    Raises:
        TypeError: `dtype` is not a real floating dtype.
        ValueError: `key` is not a key, or `shape` is too large.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return _draw(key if device is None else key.to(device), tuple(shape), _box_muller(dtype))


def normal_vectors(key: Tensor, size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Draw the values of `normal(key, (size,), dtype)` one after the other, in constant memory.

    Args:
        key: `[..., 2]`.
        size: How many values each key draws.
        dtype: As for `normal`.

    Returns:
        Vectors of them that follow one another, `[..., n]`, each of at most 2**18 values.
    """
    return _vectors(key, size, _box_muller(dtype))


def normal_range(key: Tensor, size: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The values `start` to `stop` of `normal(key, (size,), dtype)`, without the others.

    Args:
        key: One key.
        size: How many values it draws.
        start: The first one.
        stop: The one after the last.
        dtype: As for `normal`.

    Returns:
        `[stop - start]`.
    """
    check_key(key)
    transform, drawn = _box_muller(dtype), torch.empty(stop - start, dtype=dtype, device=key.device)
    if start == stop:  # a part may be empty
        return drawn
    for first in range(start - start % (2 * _BLOCK), stop, 2 * _BLOCK):
        # See `_vectors`: a block has the first values of its counters, and then the second.
        num_values = min(2 * _BLOCK, size - first)
        num_counters = (num_values + 1) // 2
        low, high = max(start - first, 0), min(stop - first, num_values)
        firsts = slice(min(low, num_counters), min(high, num_counters))
        seconds = slice(max(low - num_counters, 0), max(high - num_counters, 0))
        wanted = [each for each in (firsts, seconds) if each.start < each.stop]
        lowest, highest = min(w.start for w in wanted), max(w.stop for w in wanted)
        pair = _pairs(key, first // 2 + lowest, first // 2 + highest, transform)
        at = first + low - start
        for values, each in zip(pair, (firsts, seconds), strict=True):
            number = each.stop - each.start
            drawn[at : at + number] = (
                values[each.start - lowest :][:number] if number else values[:0]
            )
            at += number
    return drawn


def normal_at(key: Tensor, size: int, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Some of the values of `normal(key, (size,), dtype)`, without the others.

    Each takes the work of two, since a counter's other value may not be wanted.

    Args:
        key: One key.
        size: How many values it draws.
        places: Which of them, int64.
        dtype: As for `normal`.

    Returns:
        Like `places`.
    """
    check_key(key)
    transform = _box_muller(dtype)
    drawn = torch.empty(places.numel(), dtype=dtype, device=key.device)
    for at in range(0, len(drawn), _BLOCK):
        here = places.reshape(-1)[at : at + _BLOCK]
        # See `_vectors`: a block has the first values of its counters, and then the second.
        block, place = here // (2 * _BLOCK), here % (2 * _BLOCK)
        num_counters = ((size - block * 2 * _BLOCK).clamp(max=2 * _BLOCK) + 1) // 2
        is_second = place >= num_counters
        counter = block * _BLOCK + place - num_counters * is_second
        first = counter.to(torch.int32)
        pair = transform(*threefry2x32(key, first, torch.zeros_like(first)))
        drawn[at : at + len(here)] = torch.where(is_second, pair[1], pair[0])
    return drawn.reshape(places.shape)


def _box_muller(dtype: torch.dtype) -> Transform:
    """Make the function from words to normals.

    Raises:
        TypeError: `dtype` is not a real floating dtype.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating dtype, got {dtype}")
    # Narrow dtypes have too few values between 0 and 1 for a logarithm's tail.
    compute = torch.promote_types(dtype, torch.float32)

    def transform(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        # In place wherever a value is needed no more: the words are this draw's own.
        # The half keeps u₁ off 0, where the logarithm is infinite.
        uniform = first.bitwise_and_(0x7FFFFFFF).to(compute).add_(0.5).mul_(2.0**-31)
        radius = uniform.log_().mul_(-2).sqrt_()
        # Signed words cover [−π, π).
        angle = second.to(compute).mul_(math.pi * 2.0**-31)
        cosine = angle.cos().mul_(radius)
        return cosine.to(dtype), angle.sin_().mul_(radius).to(dtype)

    return transform


def threefry2x32(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypt a counter of two words under a key: Threefry-2x32, 20 rounds.

    Args:
        key: `[..., 2]`, int32.
        first: First word of the counter, int32, broadcast against the batch of keys.
        second: Second word, int32, of the same shape as `first`.

    Returns:
        The two words, int32, of the broadcast shape.
    """
    subkey0, subkey1 = key[..., 0], key[..., 1]
    schedule = (subkey0, subkey1, subkey0 ^ subkey1 ^ _KEY_SCHEDULE_PARITY)
    # The sums are new tensors of the full shape, batched wherever the key or the counter is: the
    # passes below can work in place, in eager code as under vmap.
    x0, x1 = subkey0 + first, subkey1 + second
    shifts, masks = _rotation_operands(x0.device)
    for round_ in range(20):
        distance = _ROTATIONS[round_ % 8]
        x0.add_(x1)
        # int32 shifts copy the sign: mask it off. The sum is the left part of the rotation, whose
        # bits do not overlap the right part, in one pass (shift and or would be two).
        rotated = (x1 >> shifts[round_ % 8]).bitwise_and_(masks[round_ % 8])
        x1 = rotated.add_(x1, alpha=1 << distance).bitwise_xor_(x0)
        if round_ % 4 == 3:
            # The key again; its number keeps the five injections apart.
            injection = round_ // 4 + 1
            x0.add_(schedule[injection % 3])
            x1.add_(schedule[(injection + 1) % 3] + injection)
    return x0, x1


def check_key(key: Tensor) -> None:
    """Check that a value is a key or a batch of keys.

    Raises:
        TypeError: The value is not a tensor.
        ValueError: The tensor is not int32 of shape `[..., 2]`.
    """
    if not isinstance(key, Tensor):
        raise TypeError(f"key must be made by funcsgmcmc.key(seed), got {type(key).__name__}")
    if key.dtype != torch.int32 or key.ndim < 1 or key.shape[-1] != 2:
        raise ValueError(
            f"key must be int32 of shape [..., 2], got {key.dtype} of shape {tuple(key.shape)}"
        )


def _rotation_operands(
    device: torch.device,
) -> tuple[Sequence[int | Tensor], Sequence[int | Tensor]]:
    """The shifts and the masks of the right parts of the eight rotations.

    In eager code on the CPU a number costs a conversion at each use, which doubles the time of an
    operation on few values: there they are tensors.
    """
    shifts = [32 - distance for distance in _ROTATIONS]
    masks = [(1 << distance) - 1 for distance in _ROTATIONS]
    if device.type != "cpu" or torch.compiler.is_compiling():
        return shifts, masks
    tensors = torch.tensor(shifts + masks, dtype=torch.int32).unbind()
    return tensors[:8], tensors[8:]


def _draw(
    key: Tensor,
    shape: tuple[int, ...],
    transform: Transform,
) -> Tensor:
    """Words of `key`, two at a time through `transform`, as a tensor `[..., *shape]`."""
    check_key(key)
    size = math.prod(shape)
    if not size <= _MAX_VALUES:
        raise ValueError(f"one key draws at most 2**32 values, got shape {shape}")
    batch = key.shape[:-1]
    if size == 0:
        empty = torch.zeros((*batch, 0), dtype=torch.int32, device=key.device)
        # Through `transform`, which gives the dtype.
        return transform(empty, empty)[0].reshape(batch + shape)
    if torch.compiler.is_compiling():
        return _in_one_pass(key, size, transform).reshape(batch + shape)
    vectors = _vectors(key, size, transform)
    if size <= 2 * _BLOCK:
        return torch.cat(list(vectors), -1).reshape(batch + shape)
    first = next(vectors)
    # Made from a vector, so that under vmap it is batched as they are.
    drawn = first.new_empty((*batch, size))
    drawn[..., :_BLOCK] = first
    start = _BLOCK
    for vector in vectors:
        stop = start + vector.shape[-1]
        drawn[..., start:stop] = vector
        start = stop
    return drawn.reshape(batch + shape)


def _vectors(key: Tensor, size: int, transform: Transform) -> Iterator[Tensor]:
    """The values that a key draws, `[..., size]`, in vectors that follow one another.

    Blocks of counters give two each: the first values of all counters, and then the second.
    """
    for first in range(0, size, 2 * _BLOCK):
        num_values = min(2 * _BLOCK, size - first)
        # Each counter gives two words; of an odd number the last one is left over.
        start, num_counters = first // 2, (num_values + 1) // 2
        # Many keys share the cache.
        step = max(1, _BLOCK // max(1, math.prod(key.shape[:-1])))
        stop = start + num_counters
        pairs = [
            _pairs(key, at, min(at + step, stop), transform) for at in range(start, stop, step)
        ]
        firsts, seconds = zip(*pairs, strict=True)
        yield torch.cat(firsts, -1) if len(pairs) > 1 else firsts[0]
        last = torch.cat(seconds, -1) if len(pairs) > 1 else seconds[0]
        yield last[..., : num_values - num_counters]


def _in_one_pass(key: Tensor, size: int, transform: Transform) -> Tensor:
    """The same values for a compiler, which fuses the passes itself and would unroll the blocks."""
    num_blocks, rest = divmod(size, 2 * _BLOCK)
    start, drawn = num_blocks * _BLOCK, []
    if num_blocks:
        shape = (*key.shape[:-1], num_blocks, _BLOCK)
        halves = [half.reshape(shape) for half in _pairs(key, 0, start, transform)]
        drawn.append(torch.stack(halves, -2).flatten(-3))
    if rest:
        pairs = _pairs(key, start, start + (rest + 1) // 2, transform)
        drawn.append(torch.cat(pairs, -1)[..., :rest])
    return torch.cat(drawn, -1) if len(drawn) > 1 else drawn[0]


def _pairs(key: Tensor, start: int, stop: int, transform: Transform) -> tuple[Tensor, Tensor]:
    """What the two words of some counters give, `[..., stop - start]` each."""
    # A key has at most 2**31 counters: int32 holds them, and takes half the time of int64.
    first = torch.arange(stop - start, dtype=torch.int32, device=key.device).add_(start)
    return transform(*threefry2x32(key.unsqueeze(-2), first, torch.zeros_like(first)))


def _child(key: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.stack(threefry2x32(key, first, second), -1)


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _as_word(wide: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32."""
    # The conversion of a value out of range is undefined: wrap it by hand.
    low = wide & _WORD
    return torch.where(low > 0x7FFFFFFF, low - (1 << 32), low).to(torch.int32)
