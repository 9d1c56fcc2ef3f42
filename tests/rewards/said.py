"""A listener that keeps what it is told."""

from collections.abc import Mapping


class Said:
    """`Progress` that keeps messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def advance(self, amount: int = 1) -> None: ...

    def phase(self, name: str, total: int) -> None: ...

    def begin(self, num_iterations: int, num_done: int = 0) -> None: ...

    def iteration(self, number: int, values: Mapping[str, float]) -> None: ...
