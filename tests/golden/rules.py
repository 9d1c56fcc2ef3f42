"""Rewards of the golden runs."""

import zlib


def graded(responses):
    """One of eleven scores for each response."""
    return [zlib.crc32(response.encode()) % 11 / 10 for response in responses]


def odd(responses):
    """1 for an odd number of characters, else 0: groups of equal scores are frequent."""
    return [float(len(response) % 2) for response in responses]


def huge(responses):
    """0, but for some responses a score far from all others."""
    return [1e6 * (zlib.crc32(response.encode()) % 7 == 0) for response in responses]


def letters(responses):
    """A reward at each character."""
    return [[(place, ord(letter) % 7 / 10) for place, letter in enumerate(response)] for response in responses]


def flaky(responses: list[str]) -> list[float]:
    """No number for the first response."""
    return [float("nan") if number == 0 else 1.0 for number, _ in enumerate(responses)]
