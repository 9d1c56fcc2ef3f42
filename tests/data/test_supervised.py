from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llmrl.data.config import MixedRowsConfig, PromptDataConfig, SupervisedDataConfig
from llmrl.data.files import DataError, FileRow
from llmrl.data.prompts import encode_prompts
from llmrl.data.supervised import (
    SupervisedSource,
    encode_examples,
    encode_turns,
    keep_examples_in_template,
    keep_usable_examples,
    read_supervised_rows,
)
from tests.data.conftest import CHAT_TEMPLATE, EOS, make_tokenizer, spell
from tests.environments.families import FAMILIES, family

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
    assert (source.num_rows, source.num_dropped) == (2, 1)
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


def test_load_checks_the_rows(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    assert read_supervised_rows(SupervisedDataConfig(path=str(path), num_rows=1)) == [{"prompt": "a", "response": "b"}]
    with pytest.raises(DataError, match="line 2: no column 'response'"):
        read_supervised_rows(SupervisedDataConfig(path=str(path)))


# --- every turn of a conversation -------------------------------------------------------------------------------------


def talk(*texts: str) -> list[dict]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_every_turn_of_the_assistant_counts_with_its_eos(chat: PreTrainedTokenizerFast):
    batch = SupervisedSource([{"prompt": talk("hi", "yes", "so", "no")}], chat, config(train_on="all"), seed=0).next(1)
    between = spell("|user:so|assistant:")
    assert batch.prompt_ids.tolist() == [[0, *spell("user:hi|assistant:")]]
    assert batch.response_ids.tolist() == [[*spell("yes"), EOS, *between, *spell("no"), EOS]]
    assert batch.response_mask.tolist() == [[True] * 4 + [False] * len(between) + [True] * 3]
    assert batch.response_lengths.tolist() == [7 + len(between)]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.sampled_from(["a", "a b", "{x}", "é", "user", "hi\n"]), min_size=2, max_size=8))
def test_each_turn_is_what_the_conversation_up_to_it_teaches(name: str, texts: list[str]):
    """Reduction: the conversation cut after each of its turns, each of which is learned as the last one."""
    if name.startswith(("llama", "gemma")):
        texts = [text.strip() for text in texts]  # as these write the past
    tokenizer, messages = family(name), talk(*texts[: len(texts) // 2 * 2])
    rows = [{"prompt": messages[: end + 1]} for end in range(1, len(messages), 2)]
    ((prompt, ids, chosen),) = encode_turns(rows[-1:], tokenizer, config(train_on="all"))
    learned = []
    for prompt_before, turn in encode_examples(rows, tokenizer, config()):
        whole = [*prompt_before, *turn]
        assert [*prompt, *ids][: len(whole)] == whole
        learned += turn
    assert [token for token, counts in zip(ids, chosen, strict=True) if counts] == learned


def test_texts_and_single_turns_are_as_before(chat: PreTrainedTokenizerFast):
    rows = [*ROWS, {"prompt": [USER], "response": "no"}, {"prompt": [USER, ASSISTANT]}]
    for mode in ("last", "all"):
        examples = encode_turns(rows, chat, config(train_on=mode))
        assert [example[:2] for example in examples] == encode_examples(rows, chat, config())
        assert all(all(chosen) for _, _, chosen in examples)


def test_the_response_column_is_the_last_turn(chat: PreTrainedTokenizerFast):
    rows = [{"prompt": talk("hi", "yes", "so"), "response": "no"}, {"prompt": talk("hi", "yes", "so", "no")}]
    one, other = encode_turns(rows, chat, config(train_on="all"))
    assert one == other


def test_padding_counts_nowhere(chat: PreTrainedTokenizerFast):
    rows = [{"prompt": talk("hi", "yes", "so", "no")}, {"prompt": talk("a", "b")}]
    batch = SupervisedSource(rows, chat, config(train_on="all"), seed=0).next(2)
    width = batch.response_ids.shape[1]
    after = torch.arange(width) >= batch.response_lengths[:, None]
    assert not batch.response_mask[after].any()
    assert sorted(batch.response_mask.sum(dim=1).tolist()) == [2, 7]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (talk("hi", " ", "so", "no"), "'prompt' has an empty message of the assistant"),
        (talk("hi", "yes", "so", "no")[1:], "'prompt' begins with the assistant's message"),
        (
            [USER, {**ASSISTANT, "tool_calls": [{"function": {}}]}, USER, ASSISTANT],
            "'prompt' has tool_calls; write them into the content",
        ),
        (
            [USER, ASSISTANT, USER, {**ASSISTANT, "tool_calls": [{"function": {}}]}],
            "'prompt' has tool_calls; write them into the content",
        ),
    ],
)
def test_conversations_whose_turns_cannot_be_learned(messages: list[dict], problem: str):
    tokenizer, rows = make_tokenizer(chat_template=CHAT_TEMPLATE), [{"prompt": talk("a", "b")}, {"prompt": messages}]
    assert len(keep_examples_in_template(rows, tokenizer, config())) == 2
    with pytest.raises(DataError, match=f"row 2: {problem}"):
        keep_examples_in_template(rows, tokenizer, config(train_on="all"))
    assert len(keep_examples_in_template(rows, tokenizer, config(train_on="all", skip_bad_rows=True))) == 1


def test_messages_need_a_chat_template(plain: PreTrainedTokenizerFast):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": talk("hi", "yes", "so", "no")}]
    with pytest.raises(DataError, match="row 2: its messages need a chat template"):
        keep_examples_in_template(rows, plain, config(train_on="all"))


def test_sets_of_a_mixture_are_read_alike(chat: PreTrainedTokenizerFast):
    settings = config(train_on="all", mixed_with=(MixedRowsConfig(path="b.jsonl", weight=1.0),))
    rows = [FileRow({"prompt": talk("hi", "yes", "so", "no")}, "line 1") for _ in range(2)]
    rows[1].set_number = 1
    batch = SupervisedSource(rows, chat, settings, seed=0).next(2)
    assert batch.response_mask.sum(dim=1).tolist() == [7, 7]


def test_reasoning_that_the_template_strips_from_earlier_turns_is_refused():
    thought = "<think>\nwell\n</think>\n\nyes"
    rows = [{"prompt": talk("hi", "<think>\n\n</think>\n\nok")}, {"prompt": talk("hi", thought, "so", thought)}]
    with pytest.raises(DataError, match=r'row 2: .*rewrites earlier turns .*well.* set data\.train_on to "last"'):
        keep_examples_in_template(rows, family("qwen3"), config(train_on="all"))
    assert len(keep_examples_in_template(rows, family("qwen3"), config())) == 2
    assert len(keep_examples_in_template(rows, family("qwen2_5"), config(train_on="all"))) == 2
