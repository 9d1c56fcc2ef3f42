"""Rollouts of several turns: an engine, and the environments and tools that answer the actor."""

from collections.abc import Callable
from dataclasses import replace

from llmrl.batches import Prompts, Rollout
from llmrl.data.chat import padded
from llmrl.distributed.stop import STOP
from llmrl.environments.conversations import Conversations
from llmrl.environments.hosting import Host
from llmrl.roles import Progress, Sampling, Trainable
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.responses import Responses


class EnvironmentEngine:
    """`RolloutEngine` whose responses have several turns, each answered by an environment or by tools.

    Args:
        engine: Samples the turns.
        host: Runs environments and tools.
        begin: Makes the conversations of a rollout, as `Conversations` with these rows and this sampling.
        max_turn_tokens: Length limit of a turn; None: that of the response.
        progress: Receives the first failure of each kind, and signs of life.
    """

    def __init__(
        self,
        engine: NativeEngine,
        *,
        host: Host,
        begin: Callable[..., Conversations],
        max_turn_tokens: int | None,
        progress: Progress,
    ) -> None:
        self.engine = engine
        self.host = host
        self.begin = begin
        self.max_turn_tokens = max_turn_tokens
        self.progress = progress
        self.has_told: set[tuple[str, str]] = set()
        """Kinds of failures whose first has been reported."""

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """An episode for each response, G of each row, which open alike; of `prompts` only the rows are read.

        An episode whose environment or tool fails ends there, as `StopReason.FAILED`; one that does not open, after a
        token that is no turn.
        """
        sampling = replace(sampling, max_turn_tokens=self.max_turn_tokens)
        is_new = False

        def replies(responses: Responses) -> Conversations:
            """Those that are open; where the engine begins again, since memory ran out, so do all."""
            nonlocal conversations, is_new
            if not is_new:
                conversations, _ = self._open(prompts, sampling)
            is_new = False
            responses.end_at_once(conversations.unopened)
            return conversations

        try:
            conversations, first_ids = self._open(prompts, sampling)
            is_new = True
            ids, mask = padded(first_ids, left=True)
            rollout = self.engine.generate(Prompts(ids=ids, mask=mask, rows=prompts.rows), sampling, replies)
            rollout = conversations.close(rollout)
        finally:
            self.host.end()
        self._tell_failures(conversations)
        return rollout

    def _open(self, prompts: Prompts, sampling: Sampling) -> tuple[Conversations, list[list[int]]]:
        """Conversations that have begun, and what the actor reads first in each group."""
        self.host.end()
        conversations = self.begin(prompts.rows, sampling, host=self.host, look=self._look)
        return conversations, conversations.open()

    def _look(self) -> None:
        """A signal ends the wait for an environment, and a long one is a sign of life."""
        STOP.look()
        self.progress.advance(0)

    def _tell_failures(self, conversations: Conversations) -> None:
        for each in conversations.all:
            if each.failure is None or each.failure.kind in self.has_told:
                continue
            self.has_told.add(each.failure.kind)
            self.progress.message(
                f"warning: environment: {each.failure.name} {each.failure.what}; the response is left out as unscored, "
                "and so are further ones, counted in the metrics as environment/failed"
            )

    def load_weights(self, trained: Trainable) -> None:
        """See `RolloutEngine`."""
        self.engine.load_weights(trained)
