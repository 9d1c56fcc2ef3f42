import torch

from llmrl.rollout.scripted import ScriptedEngine

from .tiny import make_prompts, make_sampling


def test_plays_the_script_token_for_token():
    script = {10: ([5, 6], [-0.5, -1.0], True), 11: ([7], [-2.0], False), 12: ([8], [-3.0], True), 13: ([], [], False)}
    seen = []

    def play(row, number):
        seen.append((row["row"], number))
        return script[number]

    rollout = ScriptedEngine(play).generate(make_prompts([1, 3], [4]), make_sampling(first_response=10))
    sequences = rollout.sequences
    assert seen == [(0, 10), (0, 11), (1, 12), (1, 13)]
    assert sequences.prompt_ids.tolist() == [[2, 1, 3], [2, 1, 3], [2, 2, 4], [2, 2, 4]]
    assert sequences.prompt_mask.int().tolist() == [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert sequences.response_ids.tolist() == [[5, 6], [7, 0], [8, 0], [0, 0]]
    assert sequences.response_mask.int().tolist() == [[1, 1], [1, 0], [1, 0], [0, 0]]
    assert sequences.response_lengths.tolist() == [2, 1, 1, 0]
    assert rollout.rollout_logprobs.tolist() == [[-0.5, -1.0], [-2.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]
    assert rollout.finished.tolist() == [True, False, True, False]
    assert rollout.group_ids.tolist() == [5, 5, 6, 6]
    assert [row["row"] for row in rollout.rows] == [0, 0, 1, 1]
    assert rollout.finished.dtype == torch.bool
