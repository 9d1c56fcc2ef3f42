import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmrl.batches import NewContext
from llmrl.data.config import DataConfig
from llmrl.data.files import DataError
from llmrl.data.rendering import Rendering, Rewritten, history_problem
from tests.data.conftest import CHAT_TEMPLATE, EOS, THINKING_TEMPLATE, make_tokenizer, spell
from tests.environments.families import FAMILIES, family

CONFIG = DataConfig(path="rows.jsonl")
TAKES_TOOLS = [name for name in FAMILIES if not name.startswith("gemma")]
TRIMS = ("llama", "gemma")
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "A number."}}},
    },
}
USER = {"role": "user", "content": "hi"}

odd = st.sampled_from(
    ["{{ x }}", "{% if %}", "]]}", "assistant\n", "<think>", "[INST", "zqTurn1qz", "é🙂", "\u2028", "  "]
)
texts = st.lists(st.one_of(st.text(max_size=8), odd), max_size=4).map("".join).filter(lambda text: text.strip())


def whole_ids(tokenizer, messages, tools=None) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sampled(tokenizer, text: str) -> list[int]:
    """A turn as an actor samples it."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def as_kept(name: str, text: str) -> str:
    """A text that the template of this name writes as it is."""
    text = text.replace("<think>", "").encode("utf-8", "ignore").decode() or "x"
    return (text.strip() or "x") if name.startswith(TRIMS) else text


def parts(tokenizer, opening, turns, tools=()) -> tuple[list[int], list[dict]]:
    """Ids of a conversation part by part, and its messages; a turn is `(message, observation)`."""
    rendering = Rendering(tokenizer, CONFIG, tools)
    ids, messages = rendering.opening(opening), list(opening)
    for message, observation in turns:
        ids += sampled(tokenizer, message.pop("said", message["content"]))
        messages.append(message)
        ids += rendering.between(messages, observation, last_id=ids[-1])
        messages += [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
    return ids, messages


# --- the property: part by part, the ids are those of the whole conversation ------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("thinks", [False, True])
@settings(max_examples=15, deadline=None)
@given(said=st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4), first=texts)
def test_a_branching_actor_has_read_what_the_template_writes_at_each_moment(name: str, thinks: bool, said, first: str):
    tokenizer = family(name)
    config = replace(CONFIG, chat_template_kwargs={"enable_thinking": thinks})
    rendering = Rendering(tokenizer, config, history="branch")
    messages = [{"role": "user", "content": first}]
    context = rendering.opening(messages)
    for text, answer, reasons in said:
        text = ("<think>\nreason\n</think>\n\n" if reasons else "") + as_kept(name, text).strip()
        context += sampled(tokenizer, text)
        messages.append({"role": "assistant", "content": text})
        fed = rendering.between(messages, answer, last_id=context[-1])
        context = [*fed] if isinstance(fed, NewContext) else context + fed
        messages.append({"role": "user", "content": answer})
        written = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=thinks
        )
        assert context == tokenizer(written, add_special_tokens=False)["input_ids"]


def test_qwen3_branches_where_reasoning_is_left_out_and_nowhere_else():
    tokenizer = family("qwen3")
    rendering = Rendering(tokenizer, CONFIG, history="branch")
    plain, reasoned = ([USER, {"role": "assistant", "content": text}] for text in ("a", "<think>\nr\n</think>\n\na"))
    fed = rendering.between(plain, "b", last_id=tokenizer.eos_token_id)
    assert fed == Rendering(tokenizer, CONFIG).between(plain, "b", last_id=tokenizer.eos_token_id)
    fed = rendering.between(reasoned, "b", last_id=tokenizer.eos_token_id)
    assert isinstance(fed, NewContext)
    assert "reason" not in tokenizer.decode(fed)
    assert list(fed) == rendering.opening([*plain, {"role": "user", "content": "b"}])


@pytest.mark.parametrize("name", ["qwen2_5", "smollm2", "llama3_2", "gemma3", "mistral"])
def test_a_template_that_rewrites_nothing_feeds_the_same_ids_in_every_mode(name):
    tokenizer = family(name)
    messages = [{"role": "user", "content": "hi"}]
    for number in range(3):
        messages.append({"role": "assistant", "content": f" answer {number}"})  # blanks that a template trims
        fed = [
            Rendering(tokenizer, CONFIG, history=history).between(messages, "b", last_id=tokenizer.eos_token_id)
            for history in ("refuse", "keep", "branch")
        ]
        assert fed[0] == fed[1] == fed[2]
        assert not any(isinstance(each, NewContext) for each in fed)
        messages.append({"role": "user", "content": "b"})


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(said=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), first=texts)
def test_the_parts_are_the_whole_conversation(name: str, said, first: str):
    tokenizer = family(name)
    turns = [({"role": "assistant", "content": as_kept(name, turn)}, answer) for turn, answer in said]
    ids, messages = parts(tokenizer, [{"role": "user", "content": first}], turns)
    assert ids == whole_ids(tokenizer, messages)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(words=st.lists(st.tuples(st.sampled_from("abc"), texts), min_size=1, max_size=3))
def test_with_tokens_of_several_letters(name: str, words):
    """Where no token spans the place at which a turn begins: one that the template and the actor wrote together is
    nothing that an actor can sample."""
    tokenizer = family(name, merges=True)
    turns = [({"role": "assistant", "content": as_kept(name, letter + rest)}, f"and {rest}") for letter, rest in words]
    ids, messages = parts(tokenizer, [USER], turns)
    assert ids == whole_ids(tokenizer, messages)


@pytest.mark.parametrize("name", TAKES_TOOLS)
@settings(max_examples=30, deadline=None)
@given(said=st.lists(st.tuples(st.integers(), st.lists(texts, min_size=1, max_size=2)), min_size=1, max_size=3))
def test_results_of_tools(name: str, said):
    """What a template writes for calls, where it needs them as such (Mistral); else the turn is the actor's text."""
    tokenizer, turns = family(name), []
    for number, (value, results) in enumerate(said):
        ids = [f"call{number}{place:04d}" for place in range(len(results))]
        calls = [
            {"type": "function", "id": each, "function": {"name": "add", "arguments": {"a": value}}} for each in ids
        ]
        text = json.dumps([{**call["function"], "id": call["id"]} for call in calls])
        message = {"role": "assistant", "content": text}
        if name == "mistral":
            message |= {"tool_calls": calls, "said": f"[TOOL_CALLS]{text}"}
        observation = [
            {"role": "tool", "name": "add", "tool_call_id": each, "content": result}
            for each, result in zip(ids, results, strict=True)
        ]
        turns.append((message, observation))
    ids, messages = parts(tokenizer, [USER], turns, [ADD])
    assert ids == whole_ids(tokenizer, messages, [ADD])
    assert (json.dumps("Adds.") in tokenizer.decode(ids)) == (name not in ("smollm2", "llama3"))


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "mistral"])
def test_calls_are_left_to_the_actors_own_text(name: str):
    """A call with odd blanks stays as it was sampled, whatever the template would make of it."""
    tokenizer, rendering = family(name), Rendering(family(name), CONFIG, [ADD])
    call = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 1}}}
    result = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "2"}
    texts = ("<tool_call>{ }</tool_call>", "[TOOL_CALLS][  {}]")
    between = [
        rendering.between(
            [USER, {"role": "assistant", "content": text, "tool_calls": [call]}],
            [result],
            last_id=tokenizer.eos_token_id,
        )
        for text in texts
    ]
    assert between[0] == between[1]
    assert "2" in tokenizer.decode(between[0])


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_end_of_a_turn_is_not_written_twice():
    tokenizer = family("qwen2_5")
    messages = [USER, {"role": "assistant", "content": "a"}]
    rendering = Rendering(tokenizer, CONFIG)
    rest = "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(rendering.between(messages, "b", last_id=tokenizer.eos_token_id)) == rest
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")  # another end of the generation config
    assert tokenizer.decode(rendering.between(messages, "b", last_id=other)) == f"<|im_end|>{rest}"


def test_a_system_prompt_and_messages_as_the_observation():
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    rendering = Rendering(tokenizer, replace(CONFIG, system_prompt="s"))
    assert rendering.opening("hi") == [0, *spell("system:s|user:hi|assistant:")]
    messages = [USER, {"role": "assistant", "content": "yes"}]
    asked = [{"role": "tool", "content": "t"}, {"role": "system", "content": "u"}]
    assert rendering.between(messages, asked, last_id=EOS) == spell("|tool:t|system:u|assistant:")


def test_without_a_chat_template_a_conversation_is_its_texts():
    tokenizer = make_tokenizer("<bos> $A")
    rendering = Rendering(tokenizer, CONFIG)
    assert rendering.opening("hi") == [0, *spell("hi")]
    assert rendering.between([USER, {"role": "assistant", "content": "a"}], "yes", last_id=EOS) == spell("yes")
    with pytest.raises(DataError, match="an observation of messages needs a chat template"):
        rendering.between([USER, {"role": "assistant", "content": "a"}], [USER], last_id=EOS)
    with pytest.raises(DataError, match="messages, but the tokenizer has no chat template"):
        rendering.opening([USER])
    assert history_problem(tokenizer, CONFIG) is None


def test_a_token_that_takes_in_the_blanks_after_it():
    """As Phi-3's ``<|end|>``: the line break after it is no token in the whole conversation, and so none here."""
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("|{% endfor", "<end>\n{% endfor"))
    tokenizer.add_special_tokens({"eos_token": AddedToken("<end>", rstrip=True, special=True)})
    ids, messages = parts(tokenizer, [USER], [({"role": "assistant", "content": "a"}, "b")])
    assert ids == whole_ids(tokenizer, messages)
    assert tokenizer.unk_token_id not in ids[-12:]


def test_a_tokenizer_that_begins_each_text_with_a_blank():
    vocabulary = {token: n for n, token in enumerate(["<eos>", "<unk>", "▁", *"abhiuser:|tn"])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}a:"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = template.replace("a:", "{% if add_generation_prompt %}a:{% endif %}")
    rendering = Rendering(tokenizer, CONFIG)
    ids = [*rendering.opening([USER]), vocabulary["b"], vocabulary["<eos>"]]
    ids += rendering.between([USER, {"role": "assistant", "content": "b"}], "hi", last_id=0)
    assert ids == whole_ids(tokenizer, [USER, {"role": "assistant", "content": "b"}, USER])


# --- templates that rewrite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_that_leave_earlier_turns_as_they_are(name: str):
    problem = history_problem(family(name), CONFIG)
    assert (problem is None) == (name != "qwen3")
    if name in TAKES_TOOLS:
        assert history_problem(family(name), CONFIG, [ADD], roles=("tool",)) is None


def test_reasoning_that_is_stripped_is_found():
    problem = history_problem(family("qwen3"), CONFIG)
    assert problem is not None
    assert "reason\\n</think>" in problem
    assert '(a turn with reasoning, <think> to </think>); set environment.history to "branch"' in problem


def test_a_list_of_tools_that_moves_is_found():
    problem = history_problem(family("mistral"), CONFIG, [ADD], roles=("user", "tool"))
    assert problem is not None
    assert "'<s>[AVAILABLE_TOOLS]" in problem


def test_an_empty_thought_that_is_taken_back_is_found():
    config = replace(CONFIG, chat_template_kwargs={"enable_thinking": False})
    assert "nothought" in str(history_problem(make_tokenizer(chat_template=THINKING_TEMPLATE), config))
    assert "<think>\\n\\n</think>" in str(history_problem(family("qwen3"), config, [ADD], roles=("tool",)))


def test_a_system_prompt_that_moves_is_found():
    assert "hidden" in str(history_problem(family("mistral"), replace(CONFIG, system_prompt="hidden")))


def test_a_system_prompt_that_vanishes_with_the_result_of_a_tool_is_found():
    config = replace(CONFIG, system_prompt="hidden")
    assert "hidden" in str(history_problem(family("mistral"), config, [ADD], roles=("tool",)))


def test_a_template_of_calls_that_rewrites_is_refused_whatever_is_kept():
    """Where it writes calls in place of the actor's text, what follows them is found by the text before it only."""
    tokenizer = make_tokenizer(
        chat_template="{{ messages | length }}{% for m in messages %}{% if m.tool_calls %}call{{ eos_token }}"
        "{% elif m.role == 'tool' and not loop.previtem.tool_calls %}{{ raise_exception('no call') }}"
        "{% else %}{{ m.role }}:{{ m.content }}|{% endif %}{% endfor %}"
    )
    call = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {}}}
    messages = [USER, {"role": "assistant", "content": "a", "tool_calls": [call]}]
    with pytest.raises(Rewritten, match=r"'2user:hi\|call<eos>' becomes '3user"):
        Rendering(tokenizer, CONFIG, history="keep").between(messages, [{"role": "tool", "content": "t"}], last_id=EOS)


def test_blanks_before_the_end_of_a_turn_are_found():
    template = CHAT_TEMPLATE.replace("|{% endfor", " {{ eos_token }}{% endfor")
    assert "writes blanks between" in str(history_problem(make_tokenizer(chat_template=template), CONFIG))


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_roles_that_a_template_does_not_take(name: str):
    with pytest.raises(DataError, match=r"does not take its messages \(user, assistant, tool\): Conversation roles"):
        history_problem(family(name), CONFIG, [ADD], roles=("tool",))


def test_messages_that_a_template_leaves_out():
    template = CHAT_TEMPLATE.replace("{{ m.role", "{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.role")
    with pytest.raises(DataError, match="leaves out what a message of the role 'tool' says"):
        history_problem(make_tokenizer(chat_template=template), CONFIG, [ADD], roles=("tool",))


def test_a_rewritten_turn_is_refused_or_what_the_actor_wrote_is_kept():
    tokenizer = family("qwen3")
    config = replace(CONFIG, chat_template_kwargs={"enable_thinking": False})
    messages = [USER, {"role": "assistant", "content": "a"}]
    with pytest.raises(Rewritten, match=r"becomes .*; set environment\.history to \"branch\""):
        Rendering(tokenizer, config).between(messages, "b", last_id=tokenizer.eos_token_id)
    kept = Rendering(tokenizer, config, history="keep")
    assert tokenizer.decode(kept.between(messages, "b", last_id=tokenizer.eos_token_id)) == (
        "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(("written", "times"), [("{{ m.content }}{{ m.content }}", 2), ("gone", 0)])
def test_a_turn_that_is_written_twice_or_not_at_all(written: str, times: int):
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ m.content }}", written))
    messages = [USER, {"role": "assistant", "content": "a"}]
    with pytest.raises(Rewritten, match=f"writes a turn of the assistant {times} times"):
        Rendering(tokenizer, CONFIG, history="keep").between(messages, "b", last_id=EOS)
