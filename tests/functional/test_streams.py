import math

import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.streams import Purpose, permutation, philox, uniforms

ONES = 0xFFFFFFFF
# Published with Random123, kat_vectors, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
PI = KNOWN_ANSWERS[2]


def grid(numbers, tokens):
    number = torch.arange(numbers)[:, None].expand(numbers, tokens)
    token = torch.arange(tokens).expand(numbers, tokens)
    return number, token


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(w.item() for w in words) == expected


def test_philox_against_exact_integers():
    """The rounds in Python integers, which never overflow."""
    counter, key = [0xDEADBEEF, 0, ONES, 0x80000000], [ONES, 1]
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & ONES,
            (first >> 32) ^ counter[3] ^ key[1],
            first & ONES,
        ]
        key = [(key[0] + 0x9E3779B9) & ONES, (key[1] + 0xBB67AE85) & ONES]
    assert [w.item() for w in words] == counter


def test_uniforms_take_53_bits_of_the_first_two_words():
    # Seed 0, purpose 0, response 0, token 0 is the first known answer.
    high, low = 0x6627E8D5, 0xE169C58D
    expected = ((high << 32 | low) >> 11) / 2**53
    assert uniforms(0, Purpose.TRAINING, torch.tensor(0), torch.tensor(0)).item() == expected


def test_the_counter_holds_low_word_high_word_and_token():
    number, token = (7 << 32) + 5, 3
    first, second, *_ = philox(tuple(torch.tensor(c) for c in (5, 7, 3, 0)), (9, 1))
    expected = ((first.item() << 32 | second.item()) >> 11) / 2**53
    assert uniforms(9, Purpose.EVALUATION, torch.tensor(number), torch.tensor(token)).item() == expected


def test_uniforms_are_uniform_and_neighbours_are_uncorrelated():
    u = uniforms(1, Purpose.TRAINING, *grid(200, 200))
    assert u.min() >= 0
    assert u.max() < 1
    observed = torch.histc(u.float(), bins=20, min=0, max=1)
    chi_square = ((observed - 2000) ** 2 / 2000).sum()
    assert chi_square < 43.8  # 0.999 quantile with 19 degrees of freedom
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.numel())


def test_a_number_does_not_depend_on_its_neighbours():
    number, token = grid(6, 9)
    whole = uniforms(3, Purpose.GENERATION, number, token)
    order = torch.randperm(6)
    assert_close(uniforms(3, Purpose.GENERATION, number[order], token[order]), whole[order], rtol=0, atol=0)
    assert uniforms(3, Purpose.GENERATION, number[4, 7], token[4, 7]) == whole[4, 7]


def test_every_part_of_the_name_changes_the_number():
    names = [(s, p, n, t) for s in (0, 1) for p in Purpose for n in (0, 1, 1 << 32) for t in (0, 1)]
    drawn = {uniforms(s, p, torch.tensor(n), torch.tensor(t)).item() for s, p, n, t in names}
    assert len(drawn) == len(names)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_outside_32_bits_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed \({seed}\)"):
        uniforms(seed, Purpose.DATA, torch.tensor(0), torch.tensor(0))


@pytest.mark.usefixtures("production")
def test_shapes_are_checked_at_the_door():
    with pytest.raises(ValueError, match=r"number \(2,\), token \(3,\)"):
        uniforms(0, Purpose.DATA, torch.arange(2), torch.arange(3))


def test_permutation_orders_its_uniforms():
    u = uniforms(5, Purpose.DATA, torch.full((50,), (4 << 32) + 2), torch.arange(50)).tolist()
    expected = sorted(range(50), key=u.__getitem__)
    assert permutation(50, 5, Purpose.DATA, epoch=2, iteration=4).tolist() == expected


def test_permutation_is_one_and_differs_by_name():
    names = [(e, i) for e in range(3) for i in range(3)]
    orders = [permutation(40, 0, Purpose.MINIBATCHES, epoch=e, iteration=i).tolist() for e, i in names]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(names)
    assert permutation(0, 0, Purpose.DATA, epoch=0).tolist() == []


def test_permutations_are_equally_likely():
    counts = torch.zeros(6)
    for epoch in range(1200):
        a, b, c = permutation(3, 0, Purpose.DATA, epoch=epoch).tolist()
        counts[2 * a + (b > c)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 20.5  # 0.999 quantile with 5 degrees of freedom
