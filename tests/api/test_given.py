"""Objects as what a recipe names."""

import json
import shutil

import datasets
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmrl
from llmrl.api.given import Given
from llmrl.distributed.collectives import OneProcess
from llmrl.models.folders import ModelError, hub_name
from llmrl.rewards.rules import exact_answer
from llmrl.user_code import handed_over, load_object

ROWS = [{"prompt": "1+1=", "answer": "2", "level": 1.5}, {"prompt": "2+2=", "answer": None, "level": 2.0}]


@pytest.fixture
def given(tmp_path):
    return Given(tmp_path / "given", OneProcess())


def read(path):
    return [json.loads(line) for line in open(path)]


def test_rows_of_every_form_are_the_same_file(given, tmp_path):
    pandas = pytest.importorskip("pandas")
    forms = [ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS)]
    paths = {given.rows(rows, argument="data") for rows in forms}
    assert len(paths) == 1
    assert read(paths.pop()) == ROWS
    assert given.rows(tmp_path / "x.jsonl", argument="data") == str(tmp_path / "x.jsonl")
    assert given.rows("openai/gsm8k", argument="data") == "openai/gsm8k"


def test_numbers_of_numpy_are_numbers_and_missing_cells_are_null(given):
    pandas = pytest.importorskip("pandas")
    assert read(given.rows([{"x": np.int64(3), "y": np.arange(2)}], argument="data")) == [{"x": 3, "y": [0, 1]}]
    frame = pandas.DataFrame({"prompt": ["a", None], "x": [1.0, float("nan")], "t": [pandas.NaT, pandas.NaT]})
    assert read(given.rows(frame, argument="data")) == [
        {"prompt": "a", "x": 1.0, "t": None},
        {"prompt": None, "x": None, "t": None},
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1+1="], "data is a list, no list of rows; hand over a list of dicts"),
        ({"train": ROWS}, "data is a dict, no list of rows; name one of its splits"),
        (3, "data is a int, no list of rows"),
        ([{"x": object()}], "data: row 1 cannot be written as JSON: a object is in it"),
    ],
)
def test_what_is_no_rows_is_refused(given, rows, message, production):
    with pytest.raises(llmrl.Error, match=message):
        given.rows(rows, argument="data")


def test_a_model_is_written_once_with_its_tokenizer(given, tiny):
    path = given.model(tiny.model, tiny.tokenizer)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in given.folder.glob("*/*"))
    assert given.model(tiny.model, tiny.tokenizer) == path
    assert sorted((file.name, file.stat().st_mtime_ns) for file in given.folder.glob("*/*")) == before
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert all(w.equal(loaded.state_dict()[name]) for name, w in tiny.model.state_dict().items())
    next(tiny.model.parameters()).data += 1
    tiny.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    other = given.model(tiny.model, tiny.tokenizer)
    assert other != path
    assert "messages[0]" in (given.folder / other / "chat_template.jinja").read_text()


def test_a_tokenizer_is_looked_for_where_the_model_was_loaded(given, tiny, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert (given.folder / given.model(model) / "tokenizer.json").is_file()
    assert (given.folder / given.model(tiny.model, folder / "llama") / "tokenizer.json").is_file()
    with pytest.raises(llmrl.Error, match=r"model brings no tokenizer that can be found .*; hand it over"):
        given.model(tiny.model)


def test_a_folder_without_a_tokenizer_takes_one_and_stays_as_it_is(given, tiny, folder, tmp_path):
    alone = tmp_path / "alone"
    tiny.model.save_pretrained(alone)
    (alone / "tokenizer_config.json").write_text("{}")  # which the links lead to no more
    before = {file.name: file.read_bytes() for file in alone.iterdir()}
    path = given.model(alone, tiny.tokenizer)
    assert given.model(str(alone), folder / "llama") == path
    assert {file.name: file.read_bytes() for file in alone.iterdir()} == before
    assert AutoTokenizer.from_pretrained(path)("1+1=") == tiny.tokenizer("1+1=")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert all(w.equal(loaded.state_dict()[name]) for name, w in tiny.model.state_dict().items())


def test_a_model_keeps_the_name_by_which_it_came_from_the_hub(given, tiny, folder):
    here = AutoModelForCausalLM.from_pretrained(folder / "llama")
    path = given.model(here)
    assert hub_name(path) == path
    shutil.rmtree(path)
    here.config._commit_hash, here.name_or_path = "5af1", "someone/tiny"  # as from_pretrained sets them
    assert hub_name(given.model(here, tiny.tokenizer)) == "someone/tiny"
    assert given.model(here, tiny.tokenizer) == path


class Exchange(OneProcess):
    """Collectives of a rank to which the first one has sent something already."""

    def __init__(self, *sent):
        self.sent = list(sent)
        self.rank = len(sent)

    def from_first(self, x):
        self.sent.append(x)
        return self.sent[0]


def test_a_model_that_the_first_rank_refuses_is_refused_by_all(tmp_path, tiny):
    first = Exchange()
    with pytest.raises(ModelError, match="brings no tokenizer"):
        Given(tmp_path, first).model(tiny.model)
    with pytest.raises(llmrl.Error, match="model brings no tokenizer"):
        Given(tmp_path, Exchange(*first.sent)).model(tiny.model)


def test_what_is_no_model_is_refused(given, tiny, folder, production):
    with pytest.raises(llmrl.Error, match="model is a int, no model"):
        given.model(3)
    with pytest.raises(llmrl.Error, match="brings its own, so leave tokenizer out"):
        given.model(folder / "llama", tiny.tokenizer)
    tiny.model.peft_config = {}
    with pytest.raises(llmrl.Error, match="model is an adapted model; hand over the folder of its adapter"):
        given.model(tiny.model, tiny.tokenizer)
    del tiny.model.peft_config
    tiny.model.is_quantized = True
    with pytest.raises(
        llmrl.Error, match=r"model is quantized, .* with model\.lora and model\.quantization=nf4 in set"
    ):
        given.model(tiny.model, tiny.tokenizer)


def test_a_name_is_that_by_which_another_process_finds_the_code(given):
    assert given.code(exact_answer) == "llmrl.rewards.rules:exact_answer"
    assert given.code(exact_answer, "exact_answer") == "llmrl.rewards.rules:exact_answer"
    assert given.code(exact_answer, "right") == "given:right"
    first, second = (lambda responses: responses), (lambda responses: responses)
    assert [given.code(code) for code in (first, second, first)] == [
        "given:function",
        "given:function_2",
        "given:function",
    ]
    with handed_over(given.objects):
        assert load_object("given:right", role="reward function") is exact_answer
    with pytest.raises(llmrl.Error, match="given:right was handed over by a program in Python"):
        load_object("given:right", role="reward function")


def test_a_function_of_the_program_itself_is_not_imported_again(given, monkeypatch):
    """Another process would run the program, which would start the run."""
    monkeypatch.setattr(exact_answer, "__module__", "__main__")
    assert given.code(exact_answer) == "given:exact_answer"
