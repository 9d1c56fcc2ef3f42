"""Counter-based random numbers: each one is a function of its key, so no draw depends on any other.

A stream has no state. On any device, rank or batch, the same (seed, purpose, number, token) gives the same uniform, and
different keys give independent ones.

Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 (Philox 4x32-10).
"""

from enum import IntEnum

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from llmrl.functional.masking import check_shapes

LOW_16, LOW_32 = 0xFFFF, 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10


class Purpose(IntEnum):
    """Use of a random number. Two purposes never share one."""

    TRAINING = 0
    EVALUATION = 1
    MINIBATCHES = 2
    DATA = 3
    GENERATION = 4
    AUXILIARY = 5


def uniforms(seed: int, purpose: Purpose, number: Int[Tensor, "*s"], token: Int[Tensor, "*s"]) -> Float64[Tensor, "*s"]:
    """Uniforms in [0, 1) with 53 random bits, on the device of `number`.

    Args:
        seed: Seed of the run, in [0, 2^32).
        purpose: Use of the numbers.
        number: Global number of the response, in [0, 2^63).
        token: Position in the response, in [0, 2^32).

    Raises:
        ValueError: The seed is out of range, or shapes differ.
    """
    check_shapes(number=(number, "*s"), token=(token, "*s"))
    if not 0 <= seed <= LOW_32:
        raise ValueError(f"seed ({seed}) must be in [0, 2**32)")
    number, token = number.long(), token.long()
    first, second, _, _ = philox((number & LOW_32, number >> 32, token, torch.zeros_like(token)), (seed, int(purpose)))
    return ((first << 21) | (second >> 11)).double() * 2.0**-53


def permutation(n: int, seed: int, purpose: Purpose, *, epoch: int, iteration: int = 0) -> Int[Tensor, " n"]:
    """Random permutation of 0 .. n - 1, the same on every rank; on the CPU.

    Args:
        n: Length of the permutation.
        seed: Seed of the run, in [0, 2^32).
        purpose: Use of the permutation.
        epoch: Number of the epoch, in [0, 2^32); each has its own permutation.
        iteration: Iteration of the run, in [0, 2^31); each has its own permutations.

    Raises:
        ValueError: The seed is out of range.
    """
    token = torch.arange(n)
    return uniforms(seed, purpose, torch.full_like(token, (iteration << 32) + epoch), token).argsort(stable=True)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four random 32-bit words for each counter of four 32-bit words, all held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a 32 x 32-bit product, in halves of the multiplier so that int64 never
    overflows."""
    low = word * (multiplier & LOW_16)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & LOW_16) << 16) | (low & LOW_16)
