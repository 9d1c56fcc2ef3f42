import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmrl.data.chat import (
    check_template_arguments,
    opening_of_response,
    padded,
    prompt_ids,
    prompt_problem,
    render,
    response_ids,
)
from llmrl.data.config import DataConfig
from llmrl.data.files import DataError
from tests.data.conftest import BOS, CHAT_TEMPLATE, EOS, THINKING_TEMPLATE, make_tokenizer, spell

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}


def config(**settings) -> DataConfig:
    return DataConfig(path="rows.jsonl", **settings)


def test_text_without_special_tokens(plain: PreTrainedTokenizerFast):
    assert prompt_ids(["abc", "z"], plain, config()) == [spell("abc"), spell("z")]


def test_text_keeps_the_tokenizers_bos_and_loses_its_eos():
    tokenizer = make_tokenizer("<bos> $A <eos>")
    assert prompt_ids(["abc", "z"], tokenizer, config()) == [[BOS, *spell("abc")], [BOS, *spell("z")]]


def test_text_that_writes_its_own_bos_gets_no_second_one():
    assert prompt_ids(["<bos>abc"], make_tokenizer("<bos> $A"), config()) == [[BOS, *spell("abc")]]


def test_text_becomes_the_users_message(chat: PreTrainedTokenizerFast):
    assert prompt_ids(["hi"], chat, config()) == [[BOS, *spell("user:hi|assistant:")]]


def test_messages_are_rendered_and_texts_beside_them(chat: PreTrainedTokenizerFast):
    expected = [[BOS, *spell("user:hi|assistant:yes|user:hi|assistant:")], [BOS, *spell("user:hi|assistant:")]]
    assert prompt_ids([[USER, ASSISTANT, USER], "hi"], chat, config()) == expected


def test_system_prompt_goes_first_unless_the_prompt_brings_one(chat: PreTrainedTokenizerFast):
    own = {"role": "system", "content": "mine"}
    assert prompt_ids(["hi", [USER], [own, USER]], chat, config(system_prompt="ours")) == [
        [BOS, *spell("system:ours|user:hi|assistant:")],
        [BOS, *spell("system:ours|user:hi|assistant:")],
        [BOS, *spell("system:mine|user:hi|assistant:")],
    ]


def test_template_none_takes_a_text_as_it_is(chat: PreTrainedTokenizerFast):
    assert prompt_ids(["hi"], chat, config(template="none")) == [[BOS, *spell("hi")]]


def test_rendering_leaves_messages_alone(chat: PreTrainedTokenizerFast):
    messages = [dict(USER)]
    prompt_ids([messages], chat, config(system_prompt="ours"))
    assert messages == [USER]


@pytest.mark.parametrize(
    ("settings", "prompt", "message"),
    [
        ({}, [USER], r"rows\.jsonl: 1 prompts in 'prompt' are messages, but the tokenizer has no chat template; use"),
        ({"template": "none"}, [USER], r"are messages, but data\.template is \"none\"; use"),
        ({"template": "chat"}, "hi", r"the tokenizer has no chat template; .* set data\.template to \"none\""),
        ({"system_prompt": "x"}, "hi", r"data\.system_prompt needs a chat template, but the tokenizer has none"),
        ({}, "", r"row 1: the tokenizer makes no tokens of its prompt"),
    ],
)
def test_what_the_tokenizer_cannot_do(plain: PreTrainedTokenizerFast, settings: dict, prompt, message: str):
    with pytest.raises(DataError, match=message):
        prompt_ids([prompt], plain, config(**settings))


@pytest.mark.parametrize("post_processor", [None, "<bos> $A", "<bos> $A <eos>"])
def test_response_is_its_text_and_one_eos(post_processor: str | None):
    tokenizer = make_tokenizer(post_processor, CHAT_TEMPLATE)
    assert response_ids(["abc", ""], tokenizer, config()) == [[*spell("abc"), EOS], [EOS]]


def test_response_needs_an_eos():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        response_ids(["abc"], tokenizer, config())


@pytest.mark.parametrize(
    "prompt", ["a", "[{1}]", '["role"]', "a \0", [USER], [USER, ASSISTANT, USER], [{"role": "tool", "content": ""}]]
)
def test_prompts_without_a_problem(prompt):
    assert prompt_problem(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("", "is an empty text"),
        (" \n", "is an empty text"),
        ([], "is an empty list of messages"),
        (7, "must be a text or a list of messages, not an int"),
        (None, "must be a text or a list of messages, not null"),
        (["a"], 'has a message 1 that is no object with "role" and "content"'),
        ([USER, {"role": "user"}], 'has a message 2 that is no object with "role" and "content"'),
        (
            [{"role": "human", "content": "a"}],
            "has a message 1 that has the unknown role 'human'; use one of system, user, assistant, tool",
        ),
        ([{"role": "user", "content": None}], "has a message 1 that has a content that is no text but null"),
        (
            [{"role": "developer", "content": "a"}, USER],
            "has a message 1 that has the role 'developer'; write 'system'",
        ),
        (
            [{"from": "human", "value": "a"}],
            'has a message 1 that has "from" and "value"; '
            'write "role" (user for human, assistant for gpt) and "content"',
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "has a message 1 that has a content in parts; join their texts to one",
        ),
        ("a \ud83d", "holds half of a surrogate pair, which is no character"),
        (
            [USER, ASSISTANT, {"role": "user", "content": "a \ud83d"}],
            "has a message 3 that has half of a surrogate pair, which is no character",
        ),
        (
            '[{"role": "user", "content": "a"}]',
            "is a text in which messages are written; write the file as .jsonl, where a list of messages is one",
        ),
        (
            " [ {'from': 'human', 'value': 'a'}]",
            "is a text in which messages are written; write the file as .jsonl, where a list of messages is one",
        ),
        ([{"role": "user", "content": [1]}], "has a message 1 that has a content that is no text but a list"),
        ([USER, ASSISTANT], "ends with the assistant's message; end with one that asks for a response"),
    ],
)
def test_prompts_with_a_problem(prompt, problem: str):
    assert prompt_problem(prompt) == problem


def test_padding_by_hand():
    ids, mask = padded([[5, 6, 7], [8]], left=True)
    assert torch.equal(ids, torch.tensor([[5, 6, 7], [0, 0, 8]]))
    assert torch.equal(mask, torch.tensor([[True, True, True], [False, False, True]]))
    ids, mask = padded([[5], [0, 9]], left=False)
    assert torch.equal(ids, torch.tensor([[5, 0], [0, 9]]))
    assert torch.equal(mask, torch.tensor([[True, False], [True, True]]))


HARMFUL = {
    "time": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' * 10000000000 }}",
    "memory by doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a wide field": "{{ '%9999999999d' % 1 }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a power of messages": "{{ (messages | length + 9) ** 10 ** 9 }}{% generation %}{% endgeneration %}",
    "much text": "{% for i in range(50000) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/hostname' %}",
}


@pytest.mark.parametrize("template", HARMFUL.values(), ids=HARMFUL)
def test_a_template_is_held_to_limits(monkeypatch, template):
    monkeypatch.setattr("llmrl.data.chat.MAX_RENDER_S", 1.0)
    chat = make_tokenizer("<bos> $A", template)
    with pytest.raises(
        DataError, match=r"the chat template does not take its messages \(user\): .*; mend the template"
    ):
        prompt_ids(["hi"], chat, config())


def test_two_stars_in_the_text_of_a_template_are_no_power():
    chat = make_tokenizer("<bos> $A", "{# ** #}**{{ messages[0].content }}{{ dict(**{'a': 'b'}).a }}")
    assert render([USER], chat, config()) == "**hib"


THINKS = [BOS, *spell("user:hi|assistant:")]
DOES_NOT_THINK = [BOS, *spell("user:hi|assistant:nothought|")]


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [({}, THINKS), ({"enable_thinking": True}, THINKS), ({"enable_thinking": False}, DOES_NOT_THINK)],
)
def test_arguments_reach_the_template(arguments: dict, ids: list[int]):
    chat = make_tokenizer("<bos> $A", THINKING_TEMPLATE)
    settings = config(chat_template_kwargs=arguments)
    check_template_arguments(chat, settings)
    assert prompt_ids(["hi"], chat, settings) == [ids]


def test_the_tag_before_a_response_is_that_of_these_arguments():
    chat = make_tokenizer("<bos> $A", THINKING_TEMPLATE.replace("nothought|", "</think>"))
    assert opening_of_response(chat, config()) == ""
    assert opening_of_response(chat, config(chat_template_kwargs={"enable_thinking": False})) == "</think>"


@pytest.mark.parametrize(
    "name",
    ["enable_thinkin", "messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "bos_token", "m"],
)
def test_an_argument_that_is_not_for_a_setting_is_refused_by_those_that_are(name: str):
    """`m` is a name that the template sets itself; it reads `bos_token`, `messages` and `add_generation_prompt`."""
    chat = make_tokenizer("<bos> $A", THINKING_TEMPLATE + "{{ raise_exception('x') if tools }}")
    with pytest.raises(DataError, match=rf"data\.chat_template_kwargs \({name}\): .*; it takes enable_thinking$"):
        check_template_arguments(chat, config(chat_template_kwargs={"enable_thinking": False, name: 1}))


def test_arguments_of_a_template_that_takes_none(chat: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match=r"\(enable_thinking\).*; it takes none$"):
        check_template_arguments(chat, config(chat_template_kwargs={"enable_thinking": False}))
    with pytest.raises(DataError, match=r"data\.chat_template_kwargs \(a\) need a chat template, but the tokenizer"):
        check_template_arguments(plain, config(chat_template_kwargs={"a": 1}))
    with pytest.raises(ValueError, match=r"data\.chat_template_kwargs \(a\) need a chat template, but data\.template"):
        config(chat_template_kwargs={"a": 1}, template="none")


def test_arguments_of_one_of_several_templates():
    chat = make_tokenizer("<bos> $A", THINKING_TEMPLATE)
    chat.chat_template = {"default": CHAT_TEMPLATE, "tool_use": THINKING_TEMPLATE}
    check_template_arguments(chat, config(chat_template_kwargs={"enable_thinking": False}))
