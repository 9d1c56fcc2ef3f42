"""Signals planted in a phase: for tests in this process, and in one of its own by

python signalled.py PHASE ITERATION SIGNAL[,SIGNAL ...] PAUSE_S ARGUMENTS_OF_LLMRL
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmrl.distributed.activity import HERE, FollowedProgress


class Planted:
    """Raises signals in the given phase of an iteration, the `occurrence`-th of that name, once its first unit of work
    is under way. Counts the units that are begun after that."""

    def __init__(
        self, phase: str, iteration: int, numbers: Sequence[int], *, pause_s: float = 0.0, occurrence: int = 1
    ) -> None:
        self.place = phase, iteration
        self.numbers = numbers
        self.pause_s = pause_s
        self.left = occurrence
        self.num_more = 0
        self.enter, self.advance = FollowedProgress.phase, FollowedProgress.advance

    def install(self) -> None:
        """Plants them in every progress of this process."""
        planted = self

        def phase(progress: FollowedProgress, name: str, total: int) -> None:
            planted.enter(progress, name, total)
            planted.count()
            if (HERE.phase, HERE.iteration) == planted.place:
                planted.left -= 1
                if planted.left == 0:
                    planted.send()

        def advance(progress: FollowedProgress, amount: int = 1) -> None:
            planted.advance(progress, amount)
            planted.count()

        FollowedProgress.phase, FollowedProgress.advance = phase, advance

    def uninstall(self) -> None:
        FollowedProgress.phase, FollowedProgress.advance = self.enter, self.advance

    @property
    def is_sent(self) -> bool:
        return self.left <= 0

    def count(self) -> None:
        self.num_more += self.is_sent

    def send(self) -> None:
        for count, number in enumerate(self.numbers):
            time.sleep(self.pause_s if count else 0.0)
            Path("signalled.json").write_text(json.dumps({"time": time.time(), "sent": count + 1}))
            signal.raise_signal(number)


if __name__ == "__main__":
    from llmrl.cli import main

    phase, iteration, names, pause_s, *sys.argv[1:] = sys.argv[1:]
    if os.environ.get("RANK", "0") == "0":
        Planted(phase, int(iteration), [int(name) for name in names.split(",")], pause_s=float(pause_s)).install()
    main()
