"""Responses as they grow token by token, and the rollout that they make in the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmrl.batches import Prompts, Rollout, Sequences
from llmrl.roles import Sampling


@dataclass(kw_only=True)
class Response:
    """One response, on the host."""

    number: int
    """Global number: the key of its random stream."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    """Ended by itself."""


def new_responses(prompts: Prompts, sampling: Sampling) -> list[Response]:
    """The empty responses of a rollout, those of one prompt adjacent."""
    assert sampling.first_response % sampling.num_responses == 0, "numbers of a rollout begin with a whole group"
    count = len(prompts.rows) * sampling.num_responses
    return [Response(number=sampling.first_response + index) for index in range(count)]


def assemble(prompts: Prompts, responses: Sequence[Response], sampling: Sampling) -> Rollout:
    """The rollout of these responses, in the order of `new_responses`, on the device of the prompts."""
    device = prompts.ids.device
    group_size = sampling.num_responses
    lengths = torch.tensor([len(response.ids) for response in responses], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long, device=device)
    ids[mask] = torch.tensor([i for response in responses for i in response.ids], dtype=torch.long, device=device)
    logprobs = torch.zeros(mask.shape, device=device)
    logprobs[mask] = torch.tensor([x for response in responses for x in response.logprobs], device=device)
    return Rollout(
        sequences=Sequences(
            unique_prompt_ids=prompts.ids,
            unique_prompt_mask=prompts.mask,
            prompt_of_row=torch.arange(len(prompts.rows), device=device).repeat_interleave(group_size),
            response_ids=ids,
            response_mask=mask,
            response_lengths=lengths,
        ),
        rollout_logprobs=logprobs,
        finished=torch.tensor([response.finished for response in responses], device=device),
        group_ids=torch.tensor([response.number // group_size for response in responses], device=device),
        rows=tuple(row for row in prompts.rows for _ in range(group_size)),
    )
