import torch
from torch.testing import assert_close

from llmrl.rollout.responses import Response, assemble, new_responses

from .tiny import make_prompts, make_sampling

PROMPTS = make_prompts([7, 8], [9])


def test_responses_are_numbered_on_from_the_first():
    responses = new_responses(PROMPTS, make_sampling(num_responses=3, first_response=12))
    assert [response.number for response in responses] == [12, 13, 14, 15, 16, 17]
    assert all(not response.ids and not response.logprobs and not response.finished for response in responses)


def test_a_rollout_by_hand():
    responses = [
        Response(number=12, ids=[4, 2], logprobs=[-0.5, -1.0], finished=True),
        Response(number=13, ids=[5, 6, 7], logprobs=[-2.0, -3.0, -4.0]),
        Response(number=14, ids=[2], logprobs=[-5.0], finished=True),
        Response(number=15, ids=[8, 9], logprobs=[-6.0, -7.0]),
    ]
    rollout = assemble(PROMPTS, responses, make_sampling(first_response=12))
    sequences = rollout.sequences
    assert sequences.prompt_of_row.tolist() == [0, 0, 1, 1]
    assert sequences.prompt_ids.tolist() == [[2, 7, 8], [2, 7, 8], [2, 2, 9], [2, 2, 9]]
    assert sequences.prompt_mask.int().tolist() == [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert sequences.response_ids.tolist() == [[4, 2, 0], [5, 6, 7], [2, 0, 0], [8, 9, 0]]
    assert sequences.response_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert sequences.response_lengths.tolist() == [2, 3, 1, 2]
    assert_close(rollout.rollout_logprobs, torch.tensor([[-0.5, -1, 0], [-2, -3, -4], [-5, 0, 0], [-6, -7, 0]]))
    assert rollout.finished.tolist() == [True, False, True, False]
    assert rollout.group_ids.tolist() == [6, 6, 7, 7]
    assert [row["row"] for row in rollout.rows] == [0, 0, 1, 1]
