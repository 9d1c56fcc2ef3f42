"""Rewards of every form as a section of settings, and in a run."""

import pytest
import torch

import llmrl
from llmrl.api.given import Given
from llmrl.api.rewards import reward_section
from llmrl.batches import Scores
from llmrl.distributed.collectives import OneProcess
from llmrl.rewards.rules import exact_answer

from .conftest import SHORT, digits


@pytest.fixture
def given(tmp_path):
    return Given(tmp_path / "given", OneProcess())


def short(responses):
    return [-float(len(response)) for response in responses]


EXACT = "llmrl.rewards.rules:exact_answer"


def whole(rollout):
    """A `RewardFunction` that another process can import."""
    return Lengths()(rollout)


@pytest.mark.parametrize(
    ("reward", "functions"),
    [
        (whole, [{"name": "given:whole"}]),
        ({"whole": whole}, [{"name": "given:whole"}]),
        (exact_answer, [{"name": EXACT}]),
        (EXACT, [{"name": EXACT}]),
        ((exact_answer, 2.0), [{"name": EXACT, "weight": 2.0}]),
        ([exact_answer, (lambda responses: [], 0.5)], [{"name": EXACT}, {"name": "given:function", "weight": 0.5}]),
        ({"right": EXACT, "exact_answer": EXACT}, [{"name": "given:right"}, {"name": EXACT}]),
    ],
)
def test_functions_have_names_and_weights(given, reward, functions):
    assert reward_section(reward, given) == {"functions": functions}


def test_a_reward_model_is_a_folder_a_run_or_an_object(given, tiny, tmp_path):
    assert reward_section("org/model", given) == {"functions": [], "model": {"path": "org/model"}}
    final = {"path": str(tmp_path / "final"), "weight": 0.5}
    assert reward_section((llmrl.RunFolder(tmp_path), 0.5), given) == {"functions": [], "model": final}
    with pytest.raises(llmrl.Error, match="reward has 2 reward models"):
        reward_section([tmp_path, tmp_path], given)
    with pytest.raises(llmrl.Error, match="reward_model brings no tokenizer"):
        reward_section(tiny.model, given)


def test_what_is_no_reward_is_refused(given, production):
    with pytest.raises(llmrl.Error, match="reward is a int; hand over a function"):
        reward_section(3, given)  # type: ignore[arg-type]
    with pytest.raises(llmrl.Error, match="reward: 'length-penalty' cannot be the name of a function in the metrics"):
        reward_section({"length-penalty": short}, given)


def test_functions_of_the_worker_and_of_this_process_score_together(tiny, rows, tmp_path):
    """A closure, a coroutine of this process, and a function of a module."""
    seen = []

    def mine(responses, answer):
        seen.append(answer)
        return digits(responses)

    async def later(responses):
        return [2.0] * len(responses)

    named = [{**row, "answer": row["response"]} for row in rows]
    reward = {"mine": mine, "later": (later, 0.5), "exact_answer": exact_answer}
    run = llmrl.grpo(
        tiny.model,
        tokenizer=tiny.tokenizer,
        prompts=named,
        reward=reward,
        output_dir=tmp_path / "run",
        num_iterations=1,
        settings=SHORT,
    )
    metrics = run.train()
    assert metrics["score/later"] == 2.0
    parts = metrics["score/mine"] + 0.5 * metrics["score/later"] + metrics["score/exact_answer"]
    assert metrics["score/mean"] == pytest.approx(parts)
    assert len(seen) == 1
    recorded = run.config["contents"]
    assert {name for name in recorded if name.startswith("reward")} == {f"reward.functions.{n}" for n in range(3)}


def test_a_column_that_is_missing_is_named_before_a_model_loads(tiny, rows, tmp_path):
    with pytest.raises(llmrl.Error, match="needs 'gold', and there is no such column"):
        llmrl.grpo(
            tiny.model,
            tokenizer=tiny.tokenizer,
            prompts=rows,
            reward=lambda responses, gold: [0.0],
            output_dir=tmp_path / "run",
            num_iterations=1,
        )


class Lengths:
    """A `RewardFunction`: the length of each response."""

    def __call__(self, rollout):
        lengths = rollout.sequences.response_lengths.float()
        return Scores(total=lengths, per_token=torch.zeros(rollout.sequences.response_ids.shape), parts={})


def test_a_reward_may_take_the_rollout(tiny, rows, tmp_path):
    arguments = {"output_dir": tmp_path / "run", "num_iterations": 1, "settings": SHORT}
    common = {"tokenizer": tiny.tokenizer, "prompts": rows, **arguments}
    metrics = llmrl.grpo(tiny.model, reward={"length": (Lengths(), 2.0)}, **common).train()
    assert metrics["score/length"] == metrics["response/length"]
    assert metrics["score/mean"] == pytest.approx(2 * metrics["response/length"])
    with pytest.raises(llmrl.Error, match="scores alone, or beside a reward model"):
        llmrl.grpo(tiny.model, reward=[Lengths(), short], **common)
