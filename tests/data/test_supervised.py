from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmrl.data.config import PromptDataConfig, SupervisedDataConfig
from llmrl.data.files import DataError
from llmrl.data.prompts import encode_prompts
from llmrl.data.supervised import SupervisedSource, keep_usable_examples, read_supervised_rows
from tests.data.conftest import EOS, spell

ROWS = [{"prompt": "a", "response": "xy"}, {"prompt": "bcd", "response": "z"}, {"prompt": "ef", "response": "uvwx"}]
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}


def config(**settings) -> SupervisedDataConfig:
    return SupervisedDataConfig(path="rows.jsonl", **settings)


def read_rows(sequences) -> dict[tuple[int, ...], list[int]]:
    """Response ids by prompt ids, read through the masks."""
    return {
        tuple(prompt[prompt_mask].tolist()): response[response_mask].tolist()
        for prompt, prompt_mask, response, response_mask in zip(
            sequences.prompt_ids,
            sequences.prompt_mask,
            sequences.response_ids,
            sequences.response_mask,
            strict=True,
        )
    }


def test_ragged_examples(plain: PreTrainedTokenizerFast):
    batch = SupervisedSource(ROWS, plain, config(), seed=0).next(3)
    assert batch.prompt_ids.shape == (3, 3)
    assert batch.response_ids.shape == (3, 5)
    assert read_rows(batch) == {tuple(spell(row["prompt"])): [*spell(row["response"]), EOS] for row in ROWS}
    assert batch.prompt_mask[:, -1].all()  # prompts padded left
    assert batch.response_mask[:, 0].all()  # responses padded right
    assert sorted(batch.response_lengths.tolist()) == [2, 3, 5]
    assert torch.equal(batch.response_lengths, batch.response_mask.sum(dim=1))


def test_prompt_is_what_the_rollout_will_see(chat: PreTrainedTokenizerFast):
    prompts, _ = encode_prompts(ROWS, chat, PromptDataConfig(path="rows.jsonl", system_prompt="bekind"))
    batch = SupervisedSource(ROWS, chat, config(system_prompt="bekind"), seed=0).next(3)
    sampled = {tuple(ids[mask].tolist()) for ids, mask in zip(prompts.ids, prompts.mask, strict=True)}
    assert set(read_rows(batch)) == sampled


def test_conversation_brings_its_own_response(chat: PreTrainedTokenizerFast):
    rows = [{"messages": [USER, ASSISTANT, USER, ASSISTANT]}]
    keep_usable_examples(rows, config(prompt_column="messages"))
    batch = SupervisedSource(rows, chat, config(prompt_column="messages"), seed=0).next(1)
    assert read_rows(batch) == {
        (0, *spell("user:hi|assistant:yes|user:hi|assistant:")): [*spell("yes"), EOS],
    }


def test_messages_with_a_response_column(chat: PreTrainedTokenizerFast):
    rows = [{"prompt": [USER], "response": "no"}]
    keep_usable_examples(rows, config())
    batch = SupervisedSource(rows, chat, config(), seed=0).next(1)
    assert read_rows(batch) == {(0, *spell("user:hi|assistant:")): [*spell("no"), EOS]}


def test_long_examples_are_dropped_and_counted(plain: PreTrainedTokenizerFast):
    source = SupervisedSource(ROWS, plain, config(max_tokens=5), seed=0)  # 1 + 3, 3 + 2 and 2 + 5 tokens
    assert (source.num_rows, source.dropped) == (2, ["row 3"])
    assert set(read_rows(source.next(2))) == {tuple(spell("a")), tuple(spell("bcd"))}
    with pytest.raises(DataError, match=r"every one of the 3 examples is longer than data\.max_tokens \(3\)"):
        SupervisedSource(ROWS, plain, config(max_tokens=3), seed=0)


def test_source_resumes(plain: PreTrainedTokenizerFast):
    source, resumed = (SupervisedSource(ROWS, plain, config(), seed=5) for _ in range(2))
    source.next(2)
    resumed.load_state_dict(source.state_dict())
    assert torch.equal(resumed.next(5).response_ids, source.next(5).response_ids)
    assert source.epoch == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"response": "a"}, "no column 'prompt'; there are response"),
        (
            {"query": "a", "reply": "b"},
            "no column 'prompt'; there are query, reply (data.prompt_column names it); "
            "no column 'response'; there are query, reply (data.response_column names it)",
        ),
        ({"messages": [USER, ASSISTANT]}, "no column 'prompt'; there are messages (data.prompt_column names it)"),
        ({"prompt": "a", "reponse": "b"}, "no column 'response'; did you mean 'reponse'?"),
        ({"prompt": "a", "response": " "}, "its response is an empty text"),
        ({"prompt": "a", "response": 3}, "its response must be a text, not an int"),
        ({"prompt": "", "response": "a"}, "'prompt' is an empty text"),
        ({"prompt": [ASSISTANT]}, "'prompt' is an empty list of messages"),
        ({"prompt": [USER, ASSISTANT, ASSISTANT]}, "'prompt' ends with the assistant's message; end with one that"),
        ({"prompt": [USER, {**ASSISTANT, "content": None}]}, "its response must be a text, not null"),
        (
            {"prompt": [USER, ASSISTANT], "response": "a"},
            "two responses: 'prompt' ends with one and 'response' is another",
        ),
    ],
)
def test_bad_rows(row: dict, problem: str):
    with pytest.raises(DataError) as error:
        keep_usable_examples([ROWS[0], row], config())
    assert str(error.value).startswith(f"rows.jsonl: 1 bad row\n  row 2: {problem}")


def test_of_messages_alone_the_column_of_the_response_may_be_missing():
    with pytest.raises(DataError) as error:
        keep_usable_examples([ROWS[0], {"messages": [USER, ASSISTANT]}], config())
    assert "'response'" not in str(error.value)


def test_load_checks_the_rows(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    assert read_supervised_rows(SupervisedDataConfig(path=str(path), num_rows=1)) == [{"prompt": "a", "response": "b"}]
    with pytest.raises(DataError, match="line 2: no column 'response'"):
        read_supervised_rows(SupervisedDataConfig(path=str(path)))
