import pytest
from transformers import PreTrainedTokenizerFast

from llmrl.data.chat import opening_of_response, prompt_ids, without_opening
from llmrl.data.config import PreferenceDataConfig, PromptDataConfig, SupervisedDataConfig
from llmrl.data.files import DataError
from llmrl.data.preferences import encode_pairs, keep_pairs_in_template, parse_preferences
from llmrl.data.prompts import keep_prompts_in_template
from llmrl.data.rows import SKIP
from llmrl.data.seam import notes_on_seams
from llmrl.data.supervised import encode_examples, keep_examples_in_template
from tests.data.conftest import CHAT_TEMPLATE, EOS, THINKING_TEMPLATE, make_tokenizer, spell

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}

STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}:{{ m.content }}|{% endfor %}"
)
REASONS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>\n{% endif %}"
)


def chat(template: str, *added: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_tokens(list(added))
    return tokenizer


def prompts(*rows: dict, template: str = STRICT, **settings):
    return keep_prompts_in_template(rows, chat(template), PromptDataConfig(path="rows.jsonl", **settings))


# --- prompts that a template does not take ----------------------------------------------------------------------------


def test_rows_whose_roles_the_template_refuses_are_listed_with_the_way_out():
    with pytest.raises(DataError) as error:
        prompts({"prompt": "a"}, {"prompt": [SYSTEM, USER]}, {"prompt": [USER, USER]}, {"prompt": [SYSTEM, USER]})
    assert str(error.value).split("\n") == [
        "rows.jsonl: 3 bad rows",
        "  row 2, row 4: the chat template does not take its messages (system, user): no system here; put what the "
        "system message says into the first message of the user",
        "  row 3: the chat template does not take its messages (user, user): roles must alternate; let user and "
        "assistant take turns, the user first",
        SKIP,
    ]


def test_a_system_prompt_that_the_template_refuses():
    with pytest.raises(
        DataError, match=r"all 2 rows: .*\(system, user\): no system here; leave data\.system_prompt out"
    ):
        prompts({"prompt": "a"}, {"prompt": "b"}, system_prompt="s")


def test_rows_that_the_template_refuses_can_be_dropped():
    rows = prompts({"prompt": "a"}, {"prompt": [SYSTEM, USER]}, {"prompt": "b"}, skip_bad_rows=True)
    assert rows == [{"prompt": "a"}, {"prompt": "b"}]
    assert len(rows.notes) == 1
    assert rows.notes[0].startswith("dropped 1 of 3 rows: row 2: the chat template does not take")


def test_each_order_of_roles_is_tried_once(monkeypatch: pytest.MonkeyPatch):
    tokenizer, calls = chat(CHAT_TEMPLATE), []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or render(*a, **k))
    rows = [{"prompt": "a"}, {"prompt": [USER]}, {"prompt": "b"}, {"prompt": [USER, ASSISTANT, USER]}] * 5
    assert keep_prompts_in_template(rows, tokenizer, PromptDataConfig(path="rows.jsonl")) == rows
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ nothing.of.this }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_is_broken(template: str, told: str):
    with pytest.raises(DataError, match=rf"all 2 rows: .*\(user\): .*{told}.*; mend the template, or set data\.templ"):
        prompts({"prompt": "a"}, {"prompt": "b"}, template=template)


def test_what_only_a_later_row_shows_is_named_too():
    template = "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('no x') }}{% endif %}a{% endfor %}"
    with pytest.raises(DataError, match=r"^rows\.jsonl: 1 bad row\n  line 9: .*: no x"):
        prompt_ids(["a", "x"], chat(template), PromptDataConfig(path="rows.jsonl"), places=["line 2", "line 9"])


def test_keys_that_are_null_are_absent_to_the_template():
    template = "{% for m in messages %}{% if m.name is defined %}named{% endif %}{{ m.content }}{% endfor %}"
    config = PromptDataConfig(path="rows.jsonl")
    assert prompt_ids([[{**USER, "name": None}]], chat(template), config) == [spell("hi")]


def test_pairs_are_tried_in_the_template_too():
    rows = [
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": ""}]},  # dropped elsewhere
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "no"}]},
        {"chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, {**ASSISTANT, "content": "no"}]},
    ]
    config = PreferenceDataConfig(path="rows.jsonl")
    with pytest.raises(DataError, match=r"^rows\.jsonl: 1 bad row\n  row 3: .*no system here"):
        keep_pairs_in_template(rows, chat(STRICT), config)
    assert len(keep_pairs_in_template(rows[:2], chat(STRICT), config)) == 2


# --- where prompt and response meet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "opening"),
    [("assistant:<think>\n", "<think>\n"), ("assistant:[THINK]", "[THINK]"), ("<|Assistant|>", "<|Assistant|>"),
     ("assistant:", ""), ("<|im_start|>assistant\n", ""), ("a > b", "")],
)  # fmt: skip
def test_the_tag_that_a_generation_prompt_ends_with(end: str, opening: str):
    tokenizer = chat("{{ messages[0].content }}{% if add_generation_prompt %}" + end + "{% endif %}")
    assert opening_of_response(tokenizer, PromptDataConfig(path="rows.jsonl")) == opening
    assert opening_of_response(tokenizer, PromptDataConfig(path="rows.jsonl", template="none")) == ""


@pytest.mark.parametrize(
    ("response", "rest"),
    [("<think>\na", "a"), ("<think>a", "a"), ("\n<think>\n\na", "\na"), ("a <think>\n", "a <think>\n"),
     ("> a", "> a"), ("<thinking>", "<thinking>")],
)  # fmt: skip
def test_a_response_without_the_tag(response: str, rest: str):
    assert without_opening(response, "<think>\n") == rest
    assert without_opening(response, "") == response


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_rows_that_teach_responses_need_an_eos(template: str | None):
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.eos_token = None
    row = {"prompt": "hi", "response": "a", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="the tokenizer has no EOS token"):
        keep_examples_in_template([row], tokenizer, SupervisedDataConfig(path="rows.jsonl"))
    with pytest.raises(DataError, match="the tokenizer has no EOS token"):
        keep_pairs_in_template([row], tokenizer, PreferenceDataConfig(path="rows.jsonl"))
    assert len(keep_prompts_in_template([row], tokenizer, PromptDataConfig(path="rows.jsonl"))) == 1


def test_the_tag_is_read_once_and_that_is_said():
    tokenizer, config = chat(REASONS, "<think>", "</think>"), SupervisedDataConfig(path="rows.jsonl")
    rows = [{"prompt": "hi", "response": f"{start}a</think>b"} for start in ("<think>\n", "")]
    (_, first), (_, second) = encode_examples(rows, tokenizer, config)
    assert first == second == [*spell("a"), tokenizer.convert_tokens_to_ids("</think>"), *spell("b"), EOS]
    assert keep_examples_in_template(rows, tokenizer, config).notes == [
        "1 of 2 responses begin with '<think>', which the generation prompt of the chat template writes already; "
        "it is read once"
    ]


def test_both_sides_of_a_pair_open_their_reasoning_once():
    tokenizer, config = chat(REASONS, "<think>"), PreferenceDataConfig(path="rows.jsonl")
    rows = [{"prompt": "hi", "chosen": "<think>\na", "rejected": "<think>\nb"}]
    (pair,), *_ = encode_pairs(parse_preferences(rows, config)[0], tokenizer, config)
    assert (pair.chosen_ids, pair.rejected_ids) == ([*spell("a"), EOS], [*spell("b"), EOS])
    assert "1 of 1 responses begin with '<think>'" in keep_pairs_in_template(rows, tokenizer, config).notes[0]


EMPTY_THOUGHT = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}|"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TRIMS = CHAT_TEMPLATE.replace("m.content", "m.content | trim")
OTHER_END = CHAT_TEMPLATE.replace("}|{%", "}<end>{%")


@pytest.mark.parametrize(
    ("template", "response", "trained", "written"),
    [
        (EMPTY_THOUGHT, "yes", "user:hi|assistant:yes", "user:hi|assistant:<think></think>yes|"),
        (TRIMS, "yes ", "<bos>user:hi|assistant:yes ", "<bos>user:hi|assistant:yes|"),
        (TRIMS, " yes", "<bos>user:hi|assistant: yes", "<bos>user:hi|assistant:yes|"),
        (OTHER_END, "yes", "<bos>user:hi<end>assistant:yes<eos>", "<bos>user:hi<end>assistant:yes<end>"),
        (REASONS, "yes", "user:hi|assistant:<think>\nyes", "user:hi|assistant:yes|"),
    ],
)
def test_a_seam_that_is_not_the_templates_is_shown(template: str, response: str, trained: str, written: str):
    tokenizer = chat(template, "<end>", "<think>")
    rows = [{"prompt": "hi", "response": response}] * 3
    (note,) = keep_examples_in_template(rows, tokenizer, SupervisedDataConfig(path="rows.jsonl")).notes
    assert note.startswith(
        f"in 3 of the first 3 examples training reads another text than the chat template writes, such as {trained!r} "
        f"where the template has {written!r}; "
    )


@pytest.mark.parametrize(
    ("template", "response"),
    [
        (CHAT_TEMPLATE, "yes"),
        (CHAT_TEMPLATE.replace("}|{%", "}{{ eos_token }}\n{%"), "yes"),
        (REASONS, "a</think>yes"),  # past reasoning is left out
        ("{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE, "yes"),
    ],
)
def test_a_seam_that_is_the_templates_is_not_mentioned(template: str, response: str):
    config = SupervisedDataConfig(path="rows.jsonl")
    rows = [{"prompt": "hi", "response": response}]
    assert keep_examples_in_template(rows, chat(template, "<think>"), config).notes == []
    assert keep_examples_in_template(rows, make_tokenizer(), config).notes == []


def test_a_long_text_is_shown_around_the_place_where_it_parts():
    rows = [{"prompt": "a" * 500, "response": "yes " + "b" * 500}]
    (note,) = keep_examples_in_template(rows, chat(EMPTY_THOUGHT), SupervisedDataConfig(path="rows.jsonl")).notes
    assert len(note) < 500
    assert "<think></think>yes" in note


def test_arguments_that_the_template_does_not_take_are_refused_with_the_rows():
    tokenizer = make_tokenizer("<bos> $A", THINKING_TEMPLATE)
    rows = [{"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}]
    arguments = {"path": "rows.jsonl", "chat_template_kwargs": {"thinking": False}}
    for keep, config in (
        (keep_prompts_in_template, PromptDataConfig(**arguments)),
        (keep_examples_in_template, SupervisedDataConfig(**arguments)),
        (keep_pairs_in_template, PreferenceDataConfig(**arguments)),
    ):
        with pytest.raises(DataError, match=r"\(thinking\).* it takes enable_thinking"):
            keep(rows, tokenizer, config)


def test_the_seam_is_that_of_these_arguments():
    """A template that writes the end of a thought before each response, as training then reads it."""
    opened = "{{ m.role }}:{% if m.role == 'assistant' %}nothought|{% endif %}"
    tokenizer = make_tokenizer("<bos> $A", THINKING_TEMPLATE.replace("{{ m.role }}:", opened))
    examples = [("a", "b")]
    assert notes_on_seams(examples, tokenizer, SupervisedDataConfig(path="rows.jsonl")) != []
    config = SupervisedDataConfig(path="rows.jsonl", chat_template_kwargs={"enable_thinking": False})
    assert notes_on_seams(examples, tokenizer, config) == []
