"""Problems and demonstrations of the products, their tool, and the tokenizer that calls it."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmrl.data.config import PromptDataConfig
from llmrl.data.rendering import Rendering, history_problem
from llmrl.environments.tools import call_format, parse_calls, result_of_call, schema_of, turn_of_assistant
from llmrl.user_code import load_object

from .scripts import read_rows, run_script

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes" / "models" / "tiny_chat_llama"
calculate = load_object(f"{ROOT}/recipes/environments/calculator.py:calculate", role="tool")
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "47*85"}}</tool_call>'
DATA = PromptDataConfig(path="problems.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script("data/products/generate.py", tmp_path_factory.mktemp("products"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def product(prompt: str) -> str:
    a, b = map(int, prompt.removesuffix("=").split("*"))
    assert 11 <= min(a, b) <= max(a, b) <= 999
    return str(a * b)


# --- data -------------------------------------------------------------------------------------------------------------


def test_the_same_files_every_time(folder: Path, tmp_path: Path):
    again = run_script("data/products/generate.py", tmp_path)
    for name in ("sft.jsonl", "train.jsonl", "test.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_no_test_problem_is_ever_trained_on(folder: Path):
    test = [row["prompt"] for row in read_rows(folder / "test.jsonl")]
    trained = {row["prompt"] for row in read_rows(folder / "train.jsonl")}
    asked = {
        message["content"]
        for row in read_rows(folder / "sft.jsonl")
        for message in row["prompt"]
        if message["role"] == "user"
    }
    assert len(set(test)) == len(test) == 400
    assert trained.isdisjoint(test)
    assert asked == trained


def test_answers_are_right(folder: Path):
    for name in ("train.jsonl", "test.jsonl"):
        assert all(row["answer"] == product(row["prompt"]) for row in read_rows(folder / name))


def test_a_demonstration_calls_the_tool_rightly_or_answers_rightly(folder: Path, tokenizer):
    rows = read_rows(folder / "sft.jsonl")
    called = []
    for row in rows:
        [asked] = [message["content"] for message in row["prompt"] if message["role"] == "user"]
        calls, rest = parse_calls(row["response"], "hermes")
        if calls:
            called.append(calculate(**calls[0].arguments))
            assert (called[-1], rest) == (product(asked), "")
        else:
            assert row["response"] == product(asked)
    listed = sum(row["prompt"][0]["role"] == "system" for row in rows) - len(called)
    assert listed == pytest.approx(6400, rel=0.05)  # four in five of the 8,000 problems
    assert len(called) == pytest.approx(3200, rel=0.05)  # half of these


# --- the tool ---------------------------------------------------------------------------------------------------------


def test_what_the_calculator_says():
    assert [calculate("47*85"), calculate(" 7 - 12 "), calculate("1+2")] == ["3995", "-5", "3"]


@pytest.mark.parametrize("expression", ["", "47*", "47**85", "__import__('os')", "9" * 10 + "*2"])
def test_what_it_cannot_read_is_an_error_for_the_actor(expression):
    with pytest.raises(ValueError, match="must be two whole numbers"):
        calculate(expression)


# --- the tokenizer that chats -----------------------------------------------------------------------------------------


def test_the_conversation_with_a_call_as_the_template_writes_it(tokenizer):
    messages = [
        {"role": "user", "content": "47*85="},
        turn_of_assistant("", parse_calls(CALL, "hermes")[0]),
        {"role": "tool", "content": "3995"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tools=[schema_of(calculate)], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        f"<|system|>calculate(expression)<eos><|user|>47*85=<eos><|assistant|>{CALL}<eos><|tool|>3995<eos><|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_system_message_lists_the_tool_as_the_template_does(tokenizer):
    """So that demonstrations can bring the list as a message."""
    asked = [{"role": "user", "content": "47*85="}]
    listed = tokenizer.apply_chat_template(asked, tools=[schema_of(calculate)], tokenize=False)
    by_hand = [{"role": "system", "content": "calculate(expression)"}, *asked]
    assert listed == tokenizer.apply_chat_template(by_hand, tokenize=False)


def test_the_template_goes_on_with_a_conversation_as_it_was(tokenizer):
    assert call_format(tokenizer) == "hermes"
    assert history_problem(tokenizer, DATA, [schema_of(calculate)], roles=("user", "tool")) is None


def test_what_is_fed_between_a_call_and_the_answer(tokenizer):
    calls, rest = parse_calls(CALL, "hermes")
    asked = [{"role": "user", "content": "47*85="}, turn_of_assistant(rest, calls)]
    rendering = Rendering(tokenizer, DATA, [schema_of(calculate)])
    ids = rendering.between(asked, [result_of_call(calls[0], "3995")], last_id=tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == "<|tool|>3995<eos><|assistant|>"


def test_a_call_is_short(tokenizer):
    assert len(tokenizer(CALL, add_special_tokens=False)["input_ids"]) < 35
