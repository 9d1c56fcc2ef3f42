"""Base of the trainers: position in the run, state to save and resume, rewind after a failure."""

from collections.abc import Mapping
from typing import Any

from llmrl.roles import Source, StateMismatch, Trainable


class Resumable:
    """A trainer's place in its run: how many iterations are done, and where its source of data stands.

    Subclasses call `finish_iteration` at the end of each iteration, and extend `position` and `move_to` by what else
    the next one depends on.
    """

    def __init__(self, trained: Mapping[str, Trainable], source: Source) -> None:
        self.trained = trained
        self.source = source
        self.iteration = 0
        """Iterations done so far."""
        self.finish_iteration(0)

    def finish_iteration(self, number: int) -> None:
        """Records that this many iterations are done: the next one starts from here."""
        self.iteration = number
        self.start = self.position()
        self.steps_at_start = self._optimizer_steps()

    @property
    def has_moved(self) -> bool:
        """Whether the current iteration has begun an optimizer step: there is no way back to its start."""
        return self._optimizer_steps() != self.steps_at_start

    def rewind(self) -> bool:
        """Returns to the start of the iteration after a failure, unless weights have moved since.

        Returns:
            Whether the trainer now stands between two iterations, so that its state is worth saving.
        """
        if self.has_moved:
            return False
        for trainable in self.trained.values():
            trainable.module.zero_grad(set_to_none=True)
        self.move_to(self.start)
        return True

    @property
    def holds_all(self) -> bool:
        """Whether this rank has the whole state by itself; if not, `state_dict` is collective."""
        return all(trainable.holds_all for trainable in self.trained.values())

    def position(self) -> dict[str, Any]:
        """Position in the run, without the weights."""
        return {"iteration": self.iteration, "source": self.source.state_dict()}

    def move_to(self, position: dict[str, Any]) -> None:
        """Returns to a position that `position` gave."""
        self.source.load_state_dict(position["source"])
        self.finish_iteration(position["iteration"])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "cursor": self.position(),
            "trained": {name: trainable.state_dict() for name, trainable in self.trained.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state of the same weights.

        Raises:
            StateMismatch: Other modules were trained, or one with other weights.
        """
        if state["trained"].keys() != self.trained.keys():
            was, now = (" and ".join(sorted(trained)) for trained in (state["trained"], self.trained))
            raise StateMismatch(
                f"the saved state is of other weights: that run trained {was}, this one trains {now}; resume with the "
                "algorithm and the critic that the run began with, or start a new run"
            )
        for name, trainable in self.trained.items():
            trainable.load_state_dict(state["trained"][name])
        self.move_to(state["cursor"])

    def _optimizer_steps(self) -> dict[str, int]:
        return {name: trainable.num_steps_done for name, trainable in self.trained.items()}
