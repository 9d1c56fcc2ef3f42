import pytest

from llmrl.environments.config import EnvironmentConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"names neither a class \(environment\.name\) nor tools \(environment\.tools\)"),
        ({"name": "guess.py"}, r"environment\.name \('guess\.py'\) must be path/to/file\.py:name"),
        ({"tools": ("search",)}, r"environment\.tools\.0 \('search'\) must be"),
        ({"tools": ("a.py:f",), "arguments": {"x": 1}}, r"environment\.arguments are those of environment\.name"),
        ({"name": "a.py:A", "max_turns": 0}, r"environment\.max_turns \(0\) must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EnvironmentConfig(**settings)
