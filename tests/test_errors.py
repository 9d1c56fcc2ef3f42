"""Every error that is meant for the user has one base."""

import pytest

import llmrl
from llmrl.data.files import DataError
from llmrl.distributed.heartbeat import AnotherRankFailed
from llmrl.distributed.launch import LaunchError
from llmrl.files import WriteError
from llmrl.hub import HubError
from llmrl.memory import MemoryFull
from llmrl.models.folders import ModelError
from llmrl.reports.trackers import TrackerError
from llmrl.rewards.calls import RewardError
from llmrl.roles import StateMismatch
from llmrl.rollout.support import RolloutError
from llmrl.settings import SettingError
from llmrl.trainers.alarms import NothingLearned
from llmrl.trainers.checkpoint import CheckpointError
from llmrl.trainers.comparison import NotPaired
from llmrl.trainers.output import RunError
from llmrl.trainers.rl import FlatGroupsError
from llmrl.trainers.run import Stopped
from llmrl.user_code import UserCodeError, UserCodeFailure

INPUT = (
    DataError,
    LaunchError,
    ModelError,
    TrackerError,
    StateMismatch,
    RolloutError,
    SettingError,
    CheckpointError,
    RunError,
    UserCodeError,
    NotPaired,
)
FAILURES = (
    AnotherRankFailed,
    WriteError,
    MemoryFull,
    RewardError,
    NothingLearned,
    FlatGroupsError,
    Stopped,
    UserCodeFailure,
    HubError,
)


@pytest.mark.parametrize("kind", INPUT + FAILURES)
def test_the_base_is_error(kind):
    assert issubclass(kind, llmrl.Error)
    assert not issubclass(kind, KeyboardInterrupt)


@pytest.mark.parametrize("kind", INPUT)
def test_what_cannot_be_used_is_a_value_error_too(kind):
    assert issubclass(kind, ValueError)
