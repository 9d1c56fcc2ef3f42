"""The quickstart's data and model folder."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .scripts import read_rows, run_script

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "recipes" / "models"
MODEL = MODELS / "tiny_char_llama"


def numbers(row: dict[str, str]) -> tuple[int, int]:
    a, b = row["prompt"].removesuffix("=").split("+")
    return int(a), int(b)


def without_version(path: Path) -> dict | str:
    if path.suffix != ".json":
        return path.read_text()
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "transformers_version"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script("data/arithmetic/generate.py", tmp_path_factory.mktemp("arithmetic"))


def test_the_same_files_every_time(folder: Path, tmp_path: Path):
    again = run_script("data/arithmetic/generate.py", tmp_path)
    for name in ("sft.jsonl", "train.jsonl", "test.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_no_test_problem_is_ever_trained_on(folder: Path):
    test = [numbers(row) for row in read_rows(folder / "test.jsonl")]
    trained = {numbers(row) for name in ("sft.jsonl", "train.jsonl") for row in read_rows(folder / name)}
    assert len(set(test)) == len(test) == 400
    assert trained.isdisjoint(test)


def test_answers_are_right(folder: Path):
    for name in ("sft.jsonl", "train.jsonl", "test.jsonl"):
        assert all(row["answer"] == str(sum(numbers(row))) for row in read_rows(folder / name))


def test_mistakes_are_forgotten_carries(folder: Path):
    outcomes = Counter()
    for row in read_rows(folder / "sft.jsonl"):
        a, b = numbers(row)
        outcomes[a % 10 + b % 10 >= 10, int(row["response"]) - (a + b)] += 1
    assert set(outcomes) == {(False, 0), (True, 0), (True, -10)}
    assert 0.63 < outcomes[True, -10] / (outcomes[True, -10] + outcomes[True, 0]) < 0.67


@pytest.mark.parametrize("name", ["tiny_char_llama", "tiny_chat_llama", "tiny_word_llama"])
def test_model_folder_is_what_its_script_makes(name: str, tmp_path: Path):
    again = run_script("recipes/models/make_tiny_llamas.py", tmp_path)
    for path in (MODELS / name).iterdir():
        assert without_version(path) == without_version(again / name / path.name)


def test_tokenizer_reads_characters_and_adds_none():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "47+85= 132\n~aZ"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.chat_template, tokenizer.model_max_length) == (None, None, 256)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_model_fits_its_tokenizer():
    tokenizer, config = AutoTokenizer.from_pretrained(MODEL), AutoConfig.from_pretrained(MODEL)
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert AutoModelForCausalLM.from_config(config).num_parameters() < 400_000
