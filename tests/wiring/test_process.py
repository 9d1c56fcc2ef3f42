"""What surrounds a run."""

import os

import pytest

from llmrl.distributed.collectives import OneProcess
from llmrl.distributed.config import DistributedConfig
from llmrl.reports.progress import Silent
from llmrl.trainers.output import RunError, locked
from llmrl.trainers.run import Stopped
from llmrl.wiring.checks import check_rl
from llmrl.wiring.process import joined, opened, private_files
from llmrl.wiring.rl import build_grpo
from tests.contexts import context_of


def mask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_are_private_in_the_context_only(tmp_path):
    before = mask()
    with private_files():
        (tmp_path / "mine").touch()
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0
    assert mask() == before


def test_a_run_that_is_stopped_leaves_its_ranks_in_order(tmp_path):
    def command():
        with joined(DistributedConfig()) as context:
            assert context.collectives.is_first
            raise Stopped(15, 3, tmp_path)

    with pytest.raises(Stopped):
        command()


def test_no_other_process_writes_the_folder_meanwhile(config):
    context = context_of(progress=Silent())
    checked = check_rl(config, dry=False)
    with opened(config, checked, build_grpo, context) as run:
        assert run.folder == config.run.folder
        with pytest.raises(RunError, match="is being written by another process"), locked(run.folder, OneProcess()):
            pass
    with locked(run.folder, OneProcess()):
        pass
