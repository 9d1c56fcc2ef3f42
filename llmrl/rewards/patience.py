"""Waiting for a call of a reward function, or for its file: what is said meanwhile, and when it takes too long."""

import sys

from llmrl.messages import counted
from llmrl.roles import Progress

FIRST_S = 30.0
"""Seconds after which a call that goes on is mentioned."""
AGAIN_S = 60.0
"""Seconds between further mentions."""
LOADING_S = 600.0
"""Time limit of loading a function while the recipe is checked."""


class Patience:
    """`Waiting` for one call.

    Args:
        progress: Called at every look, so that a signal can end the wait.
        name: Name of the function.
        setting: Place of the function's settings.
        timeout_s: The time limit that is set; None: none.
        limit_s: The time limit of this call, if it is a lower one.
        num_responses: How many responses the call scores.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        name: str,
        setting: str,
        timeout_s: float | None,
        limit_s: float | None,
        num_responses: int,
    ) -> None:
        self.progress = progress
        self.name = name
        self.setting = setting
        self.timeout_s = timeout_s
        self.limits = [limit for limit in (timeout_s, limit_s) if limit is not None]
        self.num_responses = num_responses
        self.seconds = 0.0
        self.next_s = FIRST_S

    def look(self, seconds: float) -> bool:
        """See `Waiting`."""
        self.progress.advance(0)
        self.seconds += seconds
        if self.seconds >= self.next_s:
            self.progress.message(
                f"reward function {self.name}: {counted(self.num_responses, 'response')}, still scoring after "
                f"{self.next_s:.0f} s; {self.setting}.timeout_s is {_shown(self.timeout_s)}"
            )
            self.next_s += AGAIN_S
        return any(self.seconds > limit for limit in self.limits)

    def tell(self, text: str) -> None:
        """See `Waiting`."""
        self.progress.message(f"warning: reward function {self.name} {text}")

    def limit(self) -> str:
        """See `Waiting`."""
        return f"{min(self.limits):g} s ({self.setting}.timeout_s)"


class Loading:
    """`Waiting` for a function that is loaded while the recipe is checked: a signal ends the process there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0.0
        self.has_told = False

    def look(self, seconds: float) -> bool:
        """See `Waiting`."""
        self.seconds += seconds
        if self.seconds >= FIRST_S and not self.has_told:
            self.has_told = True
            self.tell(f"is still loading after {FIRST_S:.0f} s; its limit is {self.limit()}")
        return self.seconds > LOADING_S

    def tell(self, text: str) -> None:
        """See `Waiting`."""
        print(f"reward function {self.name} {text}", file=sys.stderr, flush=True)

    def limit(self) -> str:
        """See `Waiting`."""
        return f"{LOADING_S:g} s"


def _shown(timeout_s: float | None) -> str:
    return "null" if timeout_s is None else f"{timeout_s:g}"
