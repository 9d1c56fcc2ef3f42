"""What a reward configuration accepts."""

import math

import pytest
from pydantic import TypeAdapter

from llmrl.rewards.config import LearnedRewardConfig, RewardConfig, RewardFunctionConfig


@pytest.mark.parametrize(
    "name", ["rule.py:score", "a/b-c/rule.py:score", "C:\\x\\rule.py:score", "package.module:score"]
)
def test_a_name_says_file_or_module_and_function(name):
    assert RewardFunctionConfig(name=name).weight == 1.0


@pytest.mark.parametrize(
    "name", ["score", "rule.py", "rule.py:", "rule.py:a.b", "a/b:score", ":score", "a..b:score", ""]
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(
        ValueError, match=r"reward\.functions\.<n>\.name .* must name a function: path/to/file\.py:func"
    ):
        RewardFunctionConfig(name=name)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_is_finite(weight):
    with pytest.raises(ValueError, match=r"weight \(.*\) must be finite$"):
        RewardFunctionConfig(name="rule.py:score", weight=weight)


@pytest.mark.parametrize("name", ["prompts", "responses", "tokens"])
def test_an_argument_cannot_replace_what_comes_from_the_rollout(name):
    with pytest.raises(ValueError, match=f"arguments of rule.py:score must not set '{name}'"):
        RewardFunctionConfig(name="rule.py:score", arguments={name: "x"})


@pytest.mark.parametrize("functions", [(), (RewardFunctionConfig(name="rule.py:score", weight=0.0),)])
def test_functions_that_only_watch_teach_nothing(functions):
    assert not RewardConfig(functions=functions).teaches
    assert RewardConfig(functions=functions, model=LearnedRewardConfig(path="m")).teaches
    assert RewardConfig(functions=(*functions, RewardFunctionConfig(name="rule.py:other"))).teaches


def test_beside_another_reward_a_function_may_only_watch():
    watching = RewardFunctionConfig(name="rule.py:score", weight=0.0)
    assert RewardConfig(functions=(watching, RewardFunctionConfig(name="rule.py:other"))).labels == ("score", "other")
    assert RewardConfig(functions=(watching,), model=LearnedRewardConfig(path="m")).labels == ("score", "model")


def test_a_reward_model_alone_will_do():
    config = RewardConfig(model=LearnedRewardConfig(path="m"))
    assert (config.function_labels, config.labels) == ((), ("model",))


def test_weights_are_those_of_what_is_learned_from():
    functions = (
        RewardFunctionConfig(name="rule.py:watched", weight=0.0),
        RewardFunctionConfig(name="rule.py:score", weight=-2.0),
    )
    assert RewardConfig(functions=functions).weights == {"score": -2.0}
    model = LearnedRewardConfig(path="m", weight=0.5)
    assert RewardConfig(functions=functions, model=model).weights == {"score": -2.0, "model": 0.5}


@pytest.mark.parametrize(
    ("weight", "rule"), [(0.0, "be other than 0; .*, leave"), (math.nan, "be finite$"), (math.inf, "be finite$")]
)
def test_the_weight_of_a_reward_model_is_finite_and_not_zero(weight, rule):
    with pytest.raises(ValueError, match=rf"^reward\.model\.weight \(.*\) must {rule}"):
        LearnedRewardConfig(path="m", weight=weight)


def test_a_microbatch_of_a_reward_model_holds_a_token():
    with pytest.raises(ValueError, match=r"^reward\.model\.microbatch_tokens \(0\) must be at least 1$"):
        LearnedRewardConfig(path="m", microbatch_tokens=0)


def test_the_same_function_twice_is_refused():
    twice = (RewardFunctionConfig(name="rule.py:score"), RewardFunctionConfig(name="rule.py:score", weight=2.0))
    with pytest.raises(ValueError, match=r"names rule\.py:score 2 times"):
        RewardConfig(functions=twice)


def test_labels_are_short_unless_two_functions_share_one():
    names = ("a.py:score", "b.py:score", "package.rules:length")
    config = RewardConfig(functions=tuple(RewardFunctionConfig(name=name) for name in names))
    assert config.labels == ("a.py:score", "b.py:score", "length")


def test_a_function_called_model_is_not_taken_for_the_reward_model():
    functions = (RewardFunctionConfig(name="a.py:model"), RewardFunctionConfig(name="a.py:score"))
    assert RewardConfig(functions=functions).labels == ("model", "score")
    config = RewardConfig(functions=functions, model=LearnedRewardConfig(path="m"))
    assert config.labels == ("a.py:model", "score", "model")
    assert config.function_labels == ("a.py:model", "score")


@pytest.mark.parametrize("name", ["mean", "std", "unscored", "overlong_penalty"])
def test_a_function_called_as_a_metric_of_the_whole_score_has_its_whole_name(name: str):
    functions = (RewardFunctionConfig(name=f"a.py:{name}"), RewardFunctionConfig(name="a.py:median"))
    assert RewardConfig(functions=functions).labels == (f"a.py:{name}", "median")


def test_a_recipe_reads_as_config():
    recipe = b'{"functions": [{"name": "rule.py:score", "weight": 0.5, "arguments": {"pattern": "x"}}]}'
    config = TypeAdapter(RewardConfig).validate_json(recipe, strict=True)
    assert config.functions == (RewardFunctionConfig(name="rule.py:score", weight=0.5, arguments={"pattern": "x"}),)
    config = TypeAdapter(RewardConfig).validate_json(b'{"model": {"path": "m", "normalize": false}}', strict=True)
    assert config.model == LearnedRewardConfig(path="m", normalize=False)
