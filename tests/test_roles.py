"""Whoever plays a role has its methods: each adapter against the protocol that the loop sees."""

import pytest

from llmrl import roles
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.ppo import PPO
from llmrl.data.preferences import PairSource
from llmrl.data.prompts import ShuffledPrompts
from llmrl.data.supervised import SupervisedSource
from llmrl.distributed.collectives import OneProcess
from llmrl.models.policy import TransformersPolicy
from llmrl.models.reward_model import TransformersRewardModel
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import LiveProgress, PlainProgress, Silent
from llmrl.rewards.combine import CombinedReward
from llmrl.rewards.functions import FunctionReward
from llmrl.rewards.learned import LearnedReward
from llmrl.rollout.native import NativeEngine
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.rollout.transformers import TransformersEngine
from llmrl.trainers.batch import BatchTrainer
from llmrl.trainers.reward_model import RewardModelObjective
from llmrl.trainers.rl import RLTrainer
from llmrl.trainers.sft import SFTObjective

CAST = [
    (roles.RolloutEngine, (NativeEngine, TransformersEngine, ScriptedEngine)),
    (roles.RewardFunction, (FunctionReward, LearnedReward, CombinedReward)),
    (roles.Policy, (TransformersPolicy,)),
    (roles.Scorer, (TransformersRewardModel,)),
    (roles.Trainable, (LocalTrainable,)),
    (roles.Collectives, (OneProcess,)),
    (roles.Algorithm, (GRPO, PPO)),
    (roles.PromptSource, (ShuffledPrompts,)),
    (roles.BatchSource, (SupervisedSource, PairSource)),
    (roles.Objective, (SFTObjective, RewardModelObjective)),
    (roles.Trainer, (RLTrainer, BatchTrainer)),
    (roles.Progress, (LiveProgress, PlainProgress, Silent)),
]


@pytest.mark.parametrize(("role", "player"), [(role, player) for role, players in CAST for player in players])
def test_players_have_every_method_of_their_role(role, player):
    methods = [name for name, value in vars(role).items() if callable(value) and not name.startswith("_")]
    methods += ["__call__"] if "__call__" in vars(role) else []
    assert methods
    for name in methods:
        assert callable(getattr(player, name, None)), f"{player.__name__} lacks {name}"
