"""A thousand episodes of environments that fail, are slow, hang and lie, in processes of their own."""

import pytest
import torch

from llmrl.batches import Prompts, StopReason, counted_tokens
from llmrl.environments.loading import Code
from llmrl.environments.processes import Processes
from llmrl.environments.reward import EpisodeReward
from llmrl.trainers.rl import describe
from tests.environments.test_engine import make_engine
from tests.rollout.tiny import make_sampling

ENVIRONMENT = """
import math, os, signal, time
import llmrl

class Mixed(llmrl.Environment):
    def __init__(self, is_tame: bool):
        self.is_tame = is_tame

    def start(self, row):
        if row["number"] % 50 == 7:
            raise OSError("no game today")
        return "20"

    def respond(self, message):
        kind = int(self.random.random() * 100)
        if kind in (1, 2, 3, 4, 5, 6) and self.is_tame:
            return llmrl.Turn(done=True)
        match kind:
            case 1:
                raise KeyError("gold")
            case 2:
                return llmrl.Turn("4", reward=math.nan)
            case 3:
                return {"observation": "4"}
            case 4:
                os._exit(3)
            case 5:
                os.kill(os.getpid(), signal.SIGKILL)
            case 6 if message.turn == 1:
                time.sleep(3600)
            case 6:
                raise SystemExit
            case 7 if not self.is_tame:
                time.sleep(0.3)
        return llmrl.Turn("4 5", done=message.turn == 3, reward=1 + self.random.random())

    def close(self):
        if self.random.random() < 0.02 and not self.is_tame:
            raise MemoryError
        return 0.5
"""


def play(folder, *, is_tame):
    host = Processes(Code(f"{folder}/mixed.py:Mixed", {"is_tame": is_tame}, ()), timeout_s=20.0, tell=print)
    host.load()
    ids = torch.zeros(250, 1, dtype=torch.long)
    prompts = Prompts(ids=ids, mask=ids.bool(), rows=tuple({"number": number} for number in range(250)))
    sampling = make_sampling(num_responses=4, max_response_tokens=16)
    rollout = make_engine(host, max_rows=1000, max_turn_tokens=5).generate(prompts, sampling)
    assert host.exchanges == {}
    return rollout


@pytest.mark.slow
def test_a_thousand_episodes_are_those_of_environments_that_end_where_these_fail(tmp_path):
    """What fails ends an episode where it stands. So the others, and the bits of all that was sampled, are those of a
    rollout in which it ends there by itself; and a slow one changes nothing. What does not begin, in
    both, has a token."""
    (tmp_path / "mixed.py").write_text(ENVIRONMENT)
    wild, tame = (play(tmp_path, is_tame=is_tame) for is_tame in (False, True))
    failed = wild.episodes.failed
    assert 100 < failed.sum() < 250
    has_not_begun = torch.tensor([row["number"] % 50 == 7 for row in wild.rows])
    assert torch.equal(tame.episodes.failed, has_not_begun)
    assert (wild.sequences.response_lengths[has_not_begun] == 1).all()
    for name in ("prompt_ids", "response_ids", "response_mask", "response_lengths"):
        assert torch.equal(getattr(wild.sequences, name), getattr(tame.sequences, name)), name
    assert torch.equal(wild.rollout_logprobs, tame.rollout_logprobs)
    assert torch.equal(wild.stop_reason == StopReason.FAILED, failed)
    right = (~failed).nonzero().flatten()
    ours, theirs = wild.select(right), tame.select(right)
    assert torch.equal(ours.episodes.turn_ends, theirs.episodes.turn_ends)
    scores, expected = EpisodeReward("game")(ours), EpisodeReward("game")(theirs)
    assert torch.equal(scores.per_response, expected.per_response)
    assert (scores.per_response > 0).all()

    scores = EpisodeReward("game")(wild)
    assert torch.equal(scores.per_response.isnan(), failed)
    values = describe(wild, scores, 4).values()
    counts = {name.rpartition("/")[2]: n for name, n in values.items() if name.startswith("environment/failed/")}
    assert set(counts) == {"start", "respond", "close"}
    assert counts["start"] == 4 * 5
    assert sum(counts.values()) == values["environment/failed"] == values["score/unscored"] == failed.sum()
    assert not counted_tokens(wild, scores)[failed].any()
