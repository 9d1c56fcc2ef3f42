"""An engine without a model: for tests of the loop and of algorithms."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from llmrl.batches import Prompts, Rollout, Row, StopReason
from llmrl.roles import Sampling, Trainable
from llmrl.rollout.responses import Responses

Script = Callable[[Row, int], tuple[Sequence[int], Sequence[float], bool]]
"""(data row, global response number) -> (ids, log-probabilities, finished)."""


class ScriptedEngine:
    """`RolloutEngine` that returns the responses of a script token for token, whatever the limits and weights say."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        data_rows = [row for row in prompts.rows for _ in range(sampling.num_responses)]
        played = [self.script(row, sampling.first_response + index) for index, row in enumerate(data_rows)]
        longest = max(len(ids) for ids, _, _ in played)
        responses = Responses(prompts, replace(sampling, max_response_tokens=longest), eos_ids=())
        for row, (ids, logprobs, finished) in enumerate(played):
            for token_id, logprob in zip(ids, logprobs, strict=True):
                responses.append(*(torch.tensor([x], device=prompts.ids.device) for x in (row, token_id, logprob)))
            responses.stop_reason[row] = StopReason.EOS if finished else StopReason.LENGTH
        return responses.rollout()

    def load_weights(self, trained: Trainable) -> None:
        """Nothing to do: the script has no weights."""
