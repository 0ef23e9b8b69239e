"""Random numbers as a pure function of integer keys, so that nobody has to share or save a state.

Each key is absorbed with two rounds of the SplitMix64 finalizer (Steele, Lea and Flood 2014, with
the constants of Stafford's mix 13). The number of keys is absorbed first, so `(1,)` and `(1, 0)`
are unrelated. The same keys give the same bits in plain Python and, vectorised, on any torch
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_WORD = 64
_MASK = (1 << _WORD) - 1
_WEYL = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MANTISSA = 52


class Stream(IntEnum):
    """First key of each use of randomness, so that equal (seed, step) never means equal numbers."""

    PLAN = 1
    """Which layers a batch skips."""
    DATA_ORDER = 2
    """Order of prompts or demonstrations in an epoch."""
    SAMPLING = 3
    """The uniform number behind a sampled token."""
    LAYER_DROPOUT = 4
    """How many and which layers a batch of the warm-up, or an update, drops."""
    ACCEPTANCE = 5
    """The uniform number that decides on a drafted token."""
    RESIDUAL = 6
    """The uniform number behind the token that the full model adds to the accepted drafts."""
    BLOCK_NOISE = 7
    """Times at which blocks of token ids arrive, keyed by the uniform number behind the token."""
    TOKEN_NOISE = 8
    """Times at which the tokens of a block arrive, keyed by the same number."""
    MIXTURE = 9
    """Which data set a place of the stream belongs to."""
    SELECTION = 10
    """Draws from what is believed of prompts."""
    BOOTSTRAP = 11
    """Which prompts an evaluation's interval counts again."""


def uniform(*key: int) -> float:
    """A float64 in the open interval (0, 1): an odd multiple of 2**-53.

    Casting to float32 can round it to 1. Equal to `uniforms` of the same keys bit for bit.
    """
    return ((bits(*key) >> (_WORD - _MANTISSA)) + 0.5) * 2.0**-_MANTISSA


def uniforms(*keys: int | Int64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """`uniform` for every element of the broadcast keys, on the device of the tensor keys.

    Keys are integers or int64 tensors of shapes that broadcast; the result has the broadcast shape
    (0-dimensional on the CPU when no key is a tensor) and values in the open interval (0, 1).
    """
    device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    state = torch.tensor(_signed(_initial_state(len(keys))), dtype=torch.int64, device=device)
    for key in keys:
        if isinstance(key, Tensor):
            absorbed = _mix_tensor((key + 1) * _signed(_WEYL))
        else:
            absorbed = _signed(_mix((int(key) + 1) * _WEYL))
        state = _mix_tensor(state ^ absorbed)
    mantissa = _shift_right(state, _WORD - _MANTISSA).to(torch.float64)
    return (mantissa + 0.5) * 2.0**-_MANTISSA


def bits(*key: int) -> int:
    """64 random bits, as an integer in [0, 2**64); keys may be any integers, taken modulo 2**64."""
    state = _initial_state(len(key))
    for part in key:
        state = _absorb(state, part)
    return state


def integer_below(bound: int, *key: int) -> int:
    """A uniform integer in [0, bound) for a positive bound of any size.

    64 bits more than the bound has are drawn, so no value is favoured by more than 2**-64 of its
    share.
    """
    if bound < 1:
        raise ValueError(f"integer_below needs a positive bound, got {bound}")
    num_words = bound.bit_length() // _WORD + 2
    wide = 0
    for word in range(num_words):
        wide = (wide << _WORD) | bits(*key, word)
    return (wide * bound) >> (num_words * _WORD)


def permutation(n: int, *key: int) -> list[int]:
    """A uniformly random order of 0..n-1 (Fisher and Yates)."""
    return shuffled(range(n), *key)


def shuffled(items: Sequence[int], *key: int) -> list[int]:
    """The items in uniformly random order (Fisher and Yates)."""
    order = list(items)
    state = _initial_state(len(key) + 1)
    for part in key:
        state = _absorb(state, part)
    for last in range(len(order) - 1, 0, -1):
        other = (_absorb(state, last) * (last + 1)) >> _WORD
        order[last], order[other] = order[other], order[last]
    return order


def _initial_state(num_keys: int) -> int:
    return _mix((num_keys + 1) * _WEYL)


def _absorb(state: int, key: int) -> int:
    return _mix(state ^ _mix((int(key) + 1) * _WEYL))


def _mix(word: int) -> int:
    """SplitMix64's finalizer, a bijection of 64-bit words."""
    word &= _MASK
    word = ((word ^ (word >> _SHIFTS[0])) * _MULTIPLIERS[0]) & _MASK
    word = ((word ^ (word >> _SHIFTS[1])) * _MULTIPLIERS[1]) & _MASK
    return word ^ (word >> _SHIFTS[2])


def _mix_tensor(word: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """`_mix` on int64 words, whose products wrap around as unsigned ones do."""
    word = (word ^ _shift_right(word, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    word = (word ^ _shift_right(word, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    return word ^ _shift_right(word, _SHIFTS[2])


def _shift_right(word: Int64[Tensor, "..."], places: int) -> Int64[Tensor, "..."]:
    # torch shifts signed integers arithmetically; the mask removes the copies of the sign bit.
    return (word >> places) & ((1 << (_WORD - places)) - 1)


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    return word - (1 << _WORD) if word >> (_WORD - 1) else word
