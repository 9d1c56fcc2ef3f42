"""What is taken off a score before it becomes a reward."""

from jaxtyping import Float, Int
from torch import Tensor


def overlong_penalty(lengths: Int[Tensor, " B"], *, limit: int, buffer: int) -> Float[Tensor, " B"]:
    """Soft punishment of long responses: 0 up to limit - buffer tokens, then linear down to -1 at the limit.

        penalty = clip((limit - buffer - length) / buffer, -1, 0)

    Args:
        lengths: Response tokens.
        limit: Tokens at which the penalty is whole.
        buffer: Tokens over which it grows, in [1, limit].

    Returns:
        float32.

    Reference: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer ({buffer}) must be at least 1 and at most the limit ({limit})")
    return ((limit - buffer - lengths).float() / buffer).clamp(min=-1.0, max=0.0)
