"""Penalties, 0 or below, that are added to scores before they become rewards."""

from jaxtyping import Float, Int
from torch import Tensor


def overlong_penalty(lengths: Int[Tensor, " B"], *, limit: int, buffer: int) -> Float[Tensor, " B"]:
    """Soft penalty on long responses: 0 up to limit - buffer tokens, then linear down to -1 at the limit.

        penalty = clip((limit - buffer - length) / buffer, -1, 0)

    Args:
        lengths: Tokens of each response.
        limit: Length at which the penalty reaches -1, in tokens.
        buffer: Tokens over which it grows, in [1, limit].

    Returns:
        Penalties in float32.

    Raises:
        ValueError: `buffer` is out of range.

    Reference: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer ({buffer}) must be at least 1 and at most the limit ({limit})")
    return ((limit - buffer - lengths).float() / buffer).clamp(min=-1.0, max=0.0)
