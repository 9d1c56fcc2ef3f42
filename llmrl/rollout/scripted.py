"""An engine without a model: for tests of the loop and of algorithms."""

from collections.abc import Callable, Sequence

from llmrl.batches import Prompts, Rollout, Row
from llmrl.roles import Sampling, Trainable
from llmrl.rollout.responses import Response, assemble, new_responses

Script = Callable[[Row, int], tuple[Sequence[int], Sequence[float], bool]]
"""(data row, global response number) -> (ids, log-probabilities, finished)."""


class ScriptedEngine:
    """`RolloutEngine` that returns the responses of a script token for token, whatever the limits and weights say."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        responses = [
            self._play(prompts.rows[index // sampling.num_responses], response.number)
            for index, response in enumerate(new_responses(prompts, sampling))
        ]
        return assemble(prompts, responses, sampling)

    def load_weights(self, trained: Trainable) -> None:
        """Nothing to do: the script has no weights."""

    def _play(self, row: Row, number: int) -> Response:
        ids, logprobs, finished = self.script(row, number)
        return Response(number=number, ids=list(ids), logprobs=list(logprobs), finished=finished)
