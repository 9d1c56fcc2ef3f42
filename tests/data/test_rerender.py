"""Rollouts in the tokens of another model. Both write one token a character; the other's alphabet runs backwards."""

import copy

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from llmrl.batches import Rollout, StopReason
from llmrl.data.chat import as_sequences
from llmrl.data.config import PromptDataConfig
from llmrl.data.files import DataError
from llmrl.data.rerender import Rerenderer, ended_by, same_ids, same_tokens
from tests.data.conftest import ALPHABET, CHAT_TEMPLATE, EOS, make_tokenizer, spell

DATA = PromptDataConfig(path="d.jsonl")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}|{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a|{% endif %}"
)
OTHER_EOS = 0
UNK = 2


def make_other(chat_template=TEMPLATE, **special):
    """A tokenizer with <eos> 0 and the alphabet backwards from 1."""
    vocabulary = {token: n for n, token in enumerate(["<eos>", *reversed(ALPHABET), "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def spell_other(text):
    return [1 + ALPHABET[::-1].index(character) for character in text]


def make_rollout(*rows):
    """Each row as (prompt, response ids, finished)."""
    sequences = as_sequences([spell("xyz"[: 1 + n % 3]) for n in range(len(rows))], [ids for _, ids, _ in rows])
    return Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(sequences.response_ids.shape),
        stop_reason=torch.where(torch.tensor([finished for *_, finished in rows]), StopReason.EOS, StopReason.LENGTH),
        group_ids=torch.arange(len(rows)),
        rows=tuple({"prompt": prompt, "other": 1} for prompt, *_ in rows),
    )


def ids_of(sequences):
    """Each row as (prompt ids, response ids), padding gone."""
    return [
        (
            sequences.prompt_ids[b][sequences.prompt_mask[b]].tolist(),
            sequences.response_ids[b, : sequences.response_lengths[b]].tolist(),
        )
        for b in range(len(sequences.response_ids))
    ]


def rerender(rollout, *, data=DATA, other=None):
    return Rerenderer(data, policy_tokenizer=make_tokenizer(), tokenizer=other or make_other())(rollout)


# --- the same tokens --------------------------------------------------------------------------------------------------


def test_a_tokenizer_and_its_copy_from_a_folder_are_the_same(tmp_path, chat):
    chat.save_pretrained(tmp_path)
    assert same_tokens(chat, PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_padding_makes_no_difference(plain):
    padded = copy.deepcopy(plain)
    padded.pad_token, padded.padding_side = "<unk>", "left"
    assert same_tokens(plain, padded)


def byte_pairs(*merges):
    pairs = Tokenizer(models.BPE({"<eos>": 0, "1": 1, "+": 2, "2": 3, "1+": 4, "+2": 5}, list(merges)))
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<eos>")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (make_tokenizer(), make_other(None)),
        (make_tokenizer(), make_tokenizer(chat_template=CHAT_TEMPLATE)),
        (make_tokenizer(chat_template=TEMPLATE), make_tokenizer(chat_template=CHAT_TEMPLATE)),
        (make_other(), make_other(eos_token="<unk>")),
        (make_tokenizer(), make_tokenizer("<bos> $A")),
        (byte_pairs(("1", "+"), ("+", "2")), byte_pairs(("+", "2"), ("1", "+"))),
    ],
    ids=["vocabulary", "template or none", "templates", "eos", "bos before a text", "order of merges"],
)
def test_what_differs_in_any_way_is_another_tokenizer(left, right):
    assert not same_tokens(left, right)
    assert same_tokens(left, left)
    assert same_tokens(right, right)


def test_ids_mean_the_same_whatever_the_template():
    ours, theirs = make_tokenizer(), make_tokenizer(chat_template=CHAT_TEMPLATE)
    assert same_ids(ours, theirs)
    assert not same_ids(ours, make_other(None))
    assert not same_ids(make_other(), make_other(eos_token="<unk>"))


def test_what_ended_by_itself_ends_with_this_eos_and_all_else_stays():
    rows = [
        ("a", [*spell("bc"), UNK], True),  # by another end id
        ("a", [*spell("bcd"), EOS], True),
        ("a", [*spell("b"), UNK], False),  # cut
        ("a", [UNK], True),
    ]
    rollout = make_rollout(*rows)
    expected = [[*spell("bc"), EOS], [*spell("bcd"), EOS], [*spell("b"), UNK], [EOS]]
    assert [response for _, response in ids_of(ended_by(rollout, EOS))] == expected
    assert [prompt for prompt, _ in ids_of(ended_by(rollout, EOS))] == [
        prompt for prompt, _ in ids_of(rollout.sequences)
    ]
    assert [response for _, response in ids_of(rollout.sequences)] == [ids for _, ids, _ in rows]  # untouched
    assert ended_by(rollout, None) is rollout.sequences


# --- text in other tokens ---------------------------------------------------------------------------------------------


def test_prompts_go_through_the_others_template_and_responses_are_their_text():
    rollout = make_rollout(
        ("ab", [*spell("cat"), EOS], True),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, {"role": "user", "content": "s"}],
         spell("do"), False),
        ("z", [EOS], True),
    )  # fmt: skip
    sequences = rerender(rollout)
    assert ids_of(sequences) == [
        (spell_other("u|ab|a|"), [*spell_other("cat"), OTHER_EOS]),
        (spell_other("u|q|a|r|u|s|a|"), spell_other("do")),
        (spell_other("u|z|a|"), [OTHER_EOS]),
    ]
    assert sequences.response_lengths.tolist() == [4, 2, 1]
    assert_close(sequences.response_mask.sum(dim=1), sequences.response_lengths)


def test_without_a_template_a_text_is_itself():
    rollout = make_rollout(("ab", [*spell("c"), EOS], True))
    assert ids_of(rerender(rollout, other=make_other(None))) == [(spell_other("ab"), [*spell_other("c"), OTHER_EOS])]
    plain = PromptDataConfig(path="d.jsonl", template="none")
    assert ids_of(rerender(rollout, data=plain)) == [(spell_other("ab"), [*spell_other("c"), OTHER_EOS])]


def test_the_system_prompt_and_the_column_of_the_data_are_used():
    rollout = make_rollout(("ab", spell("c"), False))
    data = PromptDataConfig(path="d.jsonl", prompt_column="text", system_prompt="be")
    rollout = Rollout(**{**vars(rollout), "rows": ({"text": "ij", "prompt": "no"},)})
    assert ids_of(rerender(rollout, data=data)) == [(spell_other("s|be|u|ij|a|"), spell_other("c"))]


def test_only_what_ended_by_itself_ends_with_eos():
    """Whatever the ids say: a response whose last word is the EOS of another model, or none."""
    rollout = make_rollout(
        ("a", spell("b"), True),  # ended by an id that is no EOS of the tokenizer
        ("a", spell("b"), False),
        ("a", [*spell("b"), EOS], True),
    )
    responses = [response for _, response in ids_of(rerender(rollout))]
    assert responses == [[*spell_other("b"), OTHER_EOS], spell_other("b"), [*spell_other("b"), OTHER_EOS]]


def test_special_tokens_within_are_no_text():
    rollout = make_rollout(("a", [UNK, *spell("b"), EOS, *spell("c"), EOS], True))
    assert ids_of(rerender(rollout))[0][1] == [*spell_other("bc"), OTHER_EOS]


def test_a_response_without_text_that_was_cut_has_the_end_to_be_read_at():
    assert ids_of(rerender(make_rollout(("a", [UNK, UNK], False))))[0][1] == [OTHER_EOS]


def test_what_stands_behind_a_response_is_not_read_and_tool_output_is():
    rollout = make_rollout(("a", [*spell("bcd"), EOS], True), ("a", spell("e"), False))
    ids, mask = rollout.sequences.response_ids.clone(), rollout.sequences.response_mask.clone()
    ids[1, 1:] = spell("f")[0]
    mask[0, 1] = False
    parts = vars(rollout.sequences) | {"response_ids": ids, "response_mask": mask}
    rollout = Rollout(**{**vars(rollout), "sequences": type(rollout.sequences)(**parts)})
    sequences = rerender(rollout)
    assert [response for _, response in ids_of(sequences)] == [[*spell_other("bcd"), OTHER_EOS], spell_other("e")]


# --- prompts that the other cannot read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "prompt", "other", "told"),
    [
        (DATA, [{"role": "user", "content": "q"}], make_other(None), "the tokenizer has no chat template"),
        (PromptDataConfig(path="d", template="chat"), "q", make_other(None), "the tokenizer has no chat template"),
        (PromptDataConfig(path="d", system_prompt="s"), "q", make_other(None), "data.system_prompt needs a chat"),
        (DATA, "q", make_other(eos_token=None), "the tokenizer has no EOS token"),
    ],
)
def test_what_it_cannot_write_is_refused_before_there_are_responses(data, prompt, other, told):
    rerenderer = Rerenderer(data, policy_tokenizer=make_tokenizer(chat_template=CHAT_TEMPLATE), tokenizer=other)
    with pytest.raises(DataError, match=f"^the reward model cannot read these prompts: .*{told}"):
        rerenderer.check([{"prompt": "a text"}, {"prompt": prompt}])


def test_what_it_can_write_passes():
    Rerenderer(DATA, policy_tokenizer=make_tokenizer(), tokenizer=make_other()).check([{"prompt": "a"}])


def test_arguments_of_the_template_reach_the_other_templates_too():
    other = make_other(TEMPLATE.replace("a|{% endif %}", "a|{{ 'u|' if enable_thinking is false }}{% endif %}"))
    data = PromptDataConfig(path="d.jsonl", chat_template_kwargs={"enable_thinking": False})
    rollout = make_rollout(("ab", spell("c"), False))
    assert ids_of(rerender(rollout, data=data, other=other))[0][0] == spell_other("u|ab|a|u|")
    assert ids_of(rerender(rollout, data=data))[0][0] == spell_other("u|ab|a|")  # which reads none
