"""Commands that a page must not have are found."""

import pytest

from tests.docs import shell


@pytest.fixture(autouse=True)
def _in_the_workshop(workshop, monkeypatch):
    monkeypatch.chdir(workshop)


@pytest.mark.parametrize(
    "command",
    [
        "tool of another kind",
        "llmrl grpo recipes/quickstart_grpo.yaml optimizer.learning_rat=1",
        "llmrl grpo recipes/gone.yaml",
        "llmrl generate runs/mine/final --temperatur 1",
        "accelerate launch --config_fil x -m llmrl grpo recipes/quickstart_grpo.yaml",
        "accelerate launch --config_file recipes/accelerate/gone.yaml -m llmrl grpo recipes/quickstart_grpo.yaml",
        "python data/gone.py",
        "make gone",
        "pip install llmrl[gone]",
        "pip install -c gone.txt .",
        "pytest tests/test_gone.py",
    ],
)
def test_a_wrong_command_is_refused(command):
    with pytest.raises((AssertionError, SystemExit, FileNotFoundError)):
        shell.run(command.split())


@pytest.mark.parametrize(
    "command", ["llmrl grpo recipes/quickstart_grpo.yaml", "make quickstart", "pip install .[math]"]
)
def test_a_right_command_is_taken(command):
    shell.run(command.split())
