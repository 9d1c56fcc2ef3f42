"""Settings of models."""

import pytest

from llmrl.models.config import LoraSettings


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}])
def test_adapter_settings_are_checked(settings):
    with pytest.raises(ValueError, match=rf"model\.lora\.{next(iter(settings))} \(0\)"):
        LoraSettings(**settings)


def test_all_linear_is_another_name_for_none():
    assert LoraSettings(targets="all-linear") == LoraSettings(targets=("all-linear",)) == LoraSettings()
