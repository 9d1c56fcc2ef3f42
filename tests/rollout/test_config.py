import pytest

from llmrl.rollout.config import RolloutConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("max_rows", 0),
        ("max_response_tokens", 0),
        ("prompts_per_iteration", 0),
    ],
)
def test_a_refused_value_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^rollout\.{field} \({value}\) must be "):
        RolloutConfig(**{field: value})


def test_the_defaults_are_accepted():
    assert RolloutConfig().engine == "native"
