import dataclasses

import pytest

from llmrl.build import check_rl
from llmrl.data.prompts import PromptDataConfig
from llmrl.trainers.evaluate import EvaluationConfig


def test_held_out_prompts_are_read_only_where_they_are_used(config):
    gone = PromptDataConfig(path="gone.jsonl")
    idle = dataclasses.replace(config, evaluation_data=gone, evaluation=EvaluationConfig(every=0))
    assert check_rl(idle, dry=False).evaluation_rows is None
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        check_rl(dataclasses.replace(idle, evaluation=EvaluationConfig(every=1)), dry=False)


def test_rows_that_a_reward_cannot_score_are_listed_before_anything_loads(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1"}\n{"prompt": "2", "answer": "2"}\n{"prompt": "3"}\n')
    ragged = dataclasses.replace(config.data, path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"rows\.jsonl: 2 bad rows") as error:
        check_rl(dataclasses.replace(config, data=ragged), dry=False)
    rule = config.reward.functions[0].name
    assert str(error.value).split("\n")[1:] == [
        f"  line 1: no column 'answer', which {rule} reads",
        f"  line 3: no column 'answer', which {rule} reads",
    ]
