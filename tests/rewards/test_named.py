"""A reward of a user's own beside others."""

from inspect import Parameter

import pytest
import torch

from llmrl.batches import Scores
from llmrl.rewards.calls import RewardError
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.named import NamedReward
from llmrl.rewards.serve import Loaded
from llmrl.rewards.worker import Worker
from llmrl.user_code import UserCodeError

SCORES = Scores(
    total=torch.tensor([1.0, torch.nan]),
    per_token=torch.tensor([[0.5, 0.0], [0.0, 0.0]]),
    parts={"inner": torch.tensor([3.0, 4.0])},
    failed={},
)


def test_the_weight_is_on_the_total_and_not_on_the_parts(production):
    scores = NamedReward(lambda rollout: SCORES, label="mine", weight=2.0)(None)  # type: ignore[arg-type]
    assert scores.total.tolist()[0] == 2.0
    assert scores.total.isnan().tolist() == [False, True]
    assert scores.per_token.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert scores.parts["mine"][0] == 1.5
    assert scores.parts["inner"].tolist() == [3.0, 4.0]


def test_what_is_no_scores_is_named(production):
    with pytest.raises(RewardError, match="reward mine returned a list; expected"):
        NamedReward(lambda rollout: [1.0], label="mine", weight=1.0)(None)  # type: ignore[arg-type,return-value]


def test_a_recipe_names_none(monkeypatch):
    """Its functions run in another process, which gets no tensors."""
    parameters = (("rollout", int(Parameter.POSITIONAL_OR_KEYWORD), False),)
    loaded = Loaded(name="mine:score", source_file=None, parameters=parameters)
    monkeypatch.setattr(Worker, "_load", lambda *_: loaded)
    config = RewardConfig(functions=(RewardFunctionConfig(name="mine.py:score"),))
    with pytest.raises(UserCodeError, match=r"mine\.py:score takes a rollout, .*; take responses, or hand"):
        Worker(config).load()
