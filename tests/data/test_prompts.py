from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmrl.data.config import PromptDataConfig
from llmrl.data.files import DataError
from llmrl.data.prompts import ShuffledPrompts, encode_prompts, keep_usable_prompts, read_prompt_rows
from llmrl.data.rows import SKIP
from tests.data.conftest import BOS, spell

TEXTS = ["a", "bcd", "ef", "ghijkl", "mn"]
ROWS = [{"prompt": text, "n": n} for n, text in enumerate(TEXTS)]


def config(**settings) -> PromptDataConfig:
    return PromptDataConfig(path="rows.jsonl", **settings)


def problems(*rows: dict, **settings) -> list[str]:
    with pytest.raises(DataError) as error:
        keep_usable_prompts(rows, config(**settings))
    return str(error.value).split("\n")


def test_prompts_are_padded_left_beside_their_rows(plain: PreTrainedTokenizerFast):
    prompts, dropped = encode_prompts(ROWS[:3], plain, config())
    a, b, c, d, e, f = spell("abcdef")
    assert dropped == []
    assert torch.equal(prompts.ids, torch.tensor([[0, 0, a], [b, c, d], [0, e, f]]))
    assert torch.equal(prompts.mask, torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]).bool())
    assert all(ours is given for ours, given in zip(prompts.rows, ROWS, strict=False))


def test_long_prompts_are_dropped_and_counted_not_cut(plain: PreTrainedTokenizerFast):
    prompts, dropped = encode_prompts(ROWS, plain, config(max_prompt_tokens=2))
    assert dropped == ["row 2", "row 4"]
    assert [row["n"] for row in prompts.rows] == [0, 2, 4]
    assert prompts.mask.sum(dim=1).tolist() == [1, 2, 2]


def test_special_tokens_count_towards_the_limit(chat: PreTrainedTokenizerFast):
    length = len("user:a|assistant:") + 1
    assert encode_prompts(ROWS[:2], chat, config(max_prompt_tokens=length))[1] == ["row 2"]
    with pytest.raises(DataError):
        encode_prompts(ROWS[:2], chat, config(max_prompt_tokens=length - 1))


def test_nothing_left_is_refused(plain: PreTrainedTokenizerFast):
    message = r"rows\.jsonl: every one of the 1 prompts is longer than data\.max_prompt_tokens \(2\); raise it"
    with pytest.raises(DataError, match=message):
        ShuffledPrompts([ROWS[1]], plain, config(max_prompt_tokens=2), seed=0)


def test_source_deals_rows_with_their_own_ids(chat: PreTrainedTokenizerFast):
    source = ShuffledPrompts(ROWS, chat, config(max_prompt_tokens=21), seed=1)
    assert (source.num_rows, source.dropped) == (4, ["row 4"])
    seen = []
    for _ in range(4):
        prompts = source.next(3)
        for ids, mask, row in zip(prompts.ids, prompts.mask, prompts.rows, strict=True):
            assert ids[mask].tolist() == [BOS, *spell(f"user:{row['prompt']}|assistant:")]
            assert mask.int().diff().ge(0).all()  # padding on the left only
            seen.append(row["n"])
    assert source.epoch == 3.0
    assert all(sorted(seen[first : first + 4]) == [0, 1, 2, 4] for first in (0, 4, 8))


def test_source_resumes(plain: PreTrainedTokenizerFast):
    source = ShuffledPrompts(ROWS, plain, config(), seed=1)
    source.next(3)
    resumed = ShuffledPrompts(ROWS, plain, config(), seed=1)
    resumed.load_state_dict(source.state_dict())
    expected, ours = source.next(4), resumed.next(4)
    assert torch.equal(ours.ids, expected.ids)
    assert ours.rows == expected.rows


def test_good_rows_pass():
    keep_usable_prompts([*ROWS, {"prompt": [{"role": "user", "content": "hi"}]}], config())


def test_missing_column_suggests_the_nearest():
    assert problems({"prompt": "a"}, {"answer": "x", "promt": "a"}, {}) == [
        "rows.jsonl: 2 bad rows",
        "  row 2: no column 'prompt'; did you mean 'promt'? (data.prompt_column names it)",
        "  row 3: no column 'prompt'; there are none (data.prompt_column names it)",
        SKIP,
    ]
    assert problems({"question": "a", "id": 3}, prompt_column="prompt")[1].endswith(
        "there are question, id (data.prompt_column names it)"
    )


def test_bad_prompts_are_listed_with_their_reason():
    assert problems({"prompt": ""}, {"prompt": "a"}, {"prompt": 3}) == [
        "rows.jsonl: 2 bad rows",
        "  row 1: 'prompt' is an empty text",
        "  row 3: 'prompt' must be a text or a list of messages, not an int",
        SKIP,
    ]


def test_load_checks_the_rows_that_are_used(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    assert read_prompt_rows(PromptDataConfig(path=str(path), num_rows=1)) == [{"prompt": "a"}]
    with pytest.raises(DataError, match="line 2: 'prompt' is an empty text"):
        read_prompt_rows(PromptDataConfig(path=str(path)))
