"""Names become functions, and whatever is wrong with one shows at once."""

import re
import sys
from functools import partial

import pytest

from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.loading import (
    bind_arguments,
    check_columns,
    load_function,
    required_columns,
    row_problem,
    select_columns,
    takes,
    takes_rollout,
)
from llmrl.user_code import UserCodeError, source_file

RULE = """
from __future__ import annotations
from dataclasses import dataclass
from fractions import Fraction

@dataclass
class Pair:
    left: int

def correct(responses: list[str], answer: list[str], scale: float = 1.0):
    return [scale * (r == a) for r, a in zip(responses, answer)]

def length(responses):
    return [len(r) for r in responses]

threshold = 3
"""


@pytest.fixture
def rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.py").write_text(RULE)
    return tmp_path


def config(*functions: RewardFunctionConfig) -> RewardConfig:
    return RewardConfig(functions=functions)


def test_a_file_is_found_from_the_current_folder(rule):
    assert load_function("rule.py:correct")(responses=["a", "b"], answer=["a", "a"]) == [1.0, 0.0]


def test_a_file_is_found_by_its_whole_path(rule):
    assert load_function(f"{rule}/rule.py:correct")(responses=["a"], answer=["a"]) == [1.0]


def test_a_module_is_imported():
    assert load_function("json:dumps")([1, 2]) == "[1, 2]"


def test_two_functions_of_a_file_share_one_module(rule):
    assert load_function("rule.py:correct").__globals__ is load_function("rule.py:length").__globals__


def test_a_file_does_not_hide_a_module_of_its_name(rule):
    (rule / "json.py").write_text("def score(responses): return []")
    load_function("json.py:score")
    assert hasattr(sys.modules["json"], "dumps")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing.py:correct",
            r"^reward function missing\.py:correct: there is no file /.*/missing\.py; a path begins in the folder",
        ),
        (
            "no_such_package.rule:correct",
            r"does not load: ModuleNotFoundError: No module .*; a file is named by its path",
        ),
        (
            "llmrl.rewards.no_such:correct",
            r"does not load: ModuleNotFoundError: No module named 'llmrl.rewards.no_such'$",
        ),
        ("rule.py:corect", r"^reward function rule\.py:corect: rule\.py has no 'corect'; did you mean 'correct'\?$"),
        ("rule.py:zzz", r"^reward function rule\.py:zzz: rule\.py has no 'zzz'; define it there, or name another$"),
        ("rule.py:threshold", r"'threshold' is not a function but int$"),
        (
            "rule.py:Pair",
            r"'Pair' is a class, whose call makes an object; make one in the file, such as judge = Judge\(\)",
        ),
        ("builtins:max", r"'max' has no signature that can be read \(no signature .*\); wrap it in a function"),
        ("operator:add", r"'add' takes 'a' by its position only, and it is handed over by its name$"),
    ],
)
def test_what_cannot_be_found_is_said_in_one_line(rule, name, message):
    with pytest.raises(UserCodeError, match=message) as error:
        load_function(name)
    assert "\n" not in str(error.value)


def test_a_file_that_fails_says_why_and_loads_once_it_is_mended(rule):
    (rule / "broken.py").write_text("import no_such_dependency")
    with pytest.raises(UserCodeError, match=r"broken\.py does not load: ModuleNotFoundError.*no_such_dep") as error:
        load_function("broken.py:score")
    assert isinstance(error.value.__cause__, ModuleNotFoundError)
    (rule / "broken.py").write_text("def score(responses): return 'mended: another length than before'")
    assert load_function("broken.py:score")([]).startswith("mended")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"def score(responses:", r"SyntaxError: '\(' was never closed"),
        (b"x = '\xff'", "SyntaxError: .*utf-8"),
        (b"x = 1\x00", "source code string cannot contain null bytes"),
        (b"import sys\nsys.exit(3)", "SystemExit: 3$"),
        (b"raise ValueError('two\\nlines')", "ValueError: two lines$"),
        (b"assert False", "AssertionError$"),
    ],
)
def test_a_file_that_does_not_load_is_said_in_one_line(rule, text, said):
    (rule / "broken.py").write_bytes(text)
    with pytest.raises(
        UserCodeError, match=rf"^reward function broken\.py:score: broken\.py does not load: .*{said}"
    ) as e:
        load_function("broken.py:score")
    assert "\n" not in str(e.value)


def test_an_annotation_that_means_nothing_here_is_refused(rule):
    text = "from __future__ import annotations\ndef score(responses, limit: Limit, where: open): return []\n"
    (rule / "typed.py").write_text(text)
    with pytest.raises(UserCodeError, match=r"typed\.py:score: its annotations cannot be read: NameError: .*Limit"):
        bind_arguments(load_function("typed.py:score"), {"limit": 3})
    with pytest.raises(UserCodeError, match=r"argument limit \(3\) cannot be made .*Pattern; annotate the parameter"):
        bind_arguments(with_a_strange_annotation, {"limit": 3})


class Pattern:
    """A type of which settings make nothing."""


def with_a_strange_annotation(responses, limit: Pattern):
    return []


def test_a_required_parameter_without_a_column_is_refused(rule):
    with pytest.raises(UserCodeError, match=r"rule\.py:correct needs 'answer'.*did you mean 'answers'\?") as error:
        check_columns(load_function("rule.py:correct"), ["question", "answers"])
    assert "there are prompts, responses, completions, tokens, question, answers;" in str(error.value)


def test_responses_misspelled_is_refused_with_its_name():
    with pytest.raises(UserCodeError, match=r"needs 'response'.*did you mean 'responses'\?"):
        check_columns(lambda response: [], ["answer"])


@pytest.mark.parametrize(
    "function",
    [
        lambda responses, answer: [],
        lambda responses, other=None: [],
        lambda *args, responses, **kwargs: [],
    ],
)
def test_what_a_function_can_get_is_enough(function):
    check_columns(function, ["answer"])


def test_a_row_must_have_the_columns_that_a_function_cannot_do_without(rule):
    names = ("rule.py:length", "rule.py:correct")
    settings = config(*(RewardFunctionConfig(name=name) for name in names))
    required = required_columns(settings, [load_function(name) for name in names])
    assert required == {"answer": "rule.py:correct"}
    assert row_problem({"answer": "a"}, required) is None
    assert row_problem({"question": "a"}, required) == "no column 'answer', which rule.py:correct reads"
    assert row_problem({"question": "a"}, {**required, "unit": "rule.py:unit"}) == (
        "no column 'answer', which rule.py:correct reads; no column 'unit', which rule.py:unit reads"
    )


def test_a_column_that_an_argument_fills_in_is_not_required():
    settings = config(RewardFunctionConfig(name="rule.py:score"))
    functions = [bind_arguments(lambda responses, answer, **rest: [], {"answer": "a"})]
    assert required_columns(settings, functions) == {}


def test_a_column_may_be_named_like_what_comes_from_the_rollout(rule):
    columns = ["prompts", "responses", "completions", "tokens", "answer"]
    check_columns(load_function("rule.py:correct"), columns)
    check_columns(lambda prompts, responses, **rest: [], columns)
    assert row_problem(dict.fromkeys(columns), {"answer": "rule.py:correct"}) is None


@pytest.mark.parametrize("name", ["completions", "tokens"])
def test_a_name_that_may_mean_the_column_or_the_rollout_is_refused(name):
    message = f"takes '{name}', which comes from the rollout, and the data has a column '{name}' too; rename the column"
    message += f", such as by data.rename_columns={{{name}: my_{name}}}"
    with pytest.raises(UserCodeError, match=message):
        check_columns({"tokens": lambda tokens=None: [], "completions": lambda completions: []}[name], [name])


def test_the_file_of_a_function_is_known(rule):
    function = load_function("rule.py:correct")
    assert source_file(function) == source_file(bind_arguments(function, {"scale": 2})) == f"{rule}/rule.py"
    assert source_file(Judge()) == __file__
    assert source_file(len) is None


class Judge:
    """A reward with state."""

    def __call__(self, responses, rubric):
        return []


def test_an_object_that_can_be_called_is_named_by_its_class():
    with pytest.raises(UserCodeError, match="test_loading:Judge needs 'rubric'"):
        check_columns(Judge(), [])


def test_a_signature_picks_its_columns():
    columns = {"prompts": ["p"], "responses": ["r"], "answer": ["a"], "source": ["s"]}
    assert select_columns(lambda responses, answer: [], columns) == {"responses": ["r"], "answer": ["a"]}
    assert select_columns(lambda prompts, **rest: [], columns) == columns
    assert select_columns(lambda responses, missing=None: [], columns) == {"responses": ["r"]}


def test_a_signature_says_whether_it_takes_a_column():
    assert takes(lambda responses, tokens=None: [], "tokens")
    assert takes(lambda responses, **rest: [], "tokens")
    assert not takes(lambda responses: [], "tokens")
    assert not takes(bind_arguments(lambda answer: [], {"answer": "fixed"}), "answer")


def test_columns_are_copies():
    columns = {"responses": ["r"]}
    select_columns(lambda responses: [], columns)["responses"].append("s")
    assert columns == {"responses": ["r"]}


def test_entries_of_columns_are_copies_of_their_own():
    row = {"role": "user"}
    given = select_columns(lambda prompts: [], {"prompts": [[row], [row]]})["prompts"]
    given[0][0]["role"] = "system"
    assert given[1] == [{"role": "user"}] == [row]


def test_an_argument_wins_over_a_column_of_its_name():
    for function in (lambda responses, answer: answer, lambda responses, **rest: rest["answer"]):
        bound = bind_arguments(function, {"answer": "fixed"})
        check_columns(bound, [])
        assert bound(**select_columns(bound, {"responses": ["r"], "answer": ["a"]})) == "fixed"


def test_an_argument_is_read_as_its_annotation(rule):
    assert bind_arguments(load_function("rule.py:correct"), {"scale": 2})(responses=["a"], answer=["a"]) == [2.0]
    bound = bind_arguments(load_function("llmrl.rewards.rules:matches_pattern"), {"pattern": "^x"})
    assert bound.keywords == {"pattern": re.compile("^x")}


def test_an_argument_that_cannot_be_read_is_refused(rule):
    with pytest.raises(
        UserCodeError, match=r"rule\.py:correct: argument scale \('two'\): Input should be a valid numb"
    ):
        bind_arguments(load_function("rule.py:correct"), {"scale": "two"})


def test_an_argument_without_a_parameter_is_refused(rule):
    with pytest.raises(UserCodeError, match=r"rule\.py:correct has no parameter 'scal' .*did you mean 'scale'\?"):
        bind_arguments(load_function("rule.py:correct"), {"scal": 2.0})


def test_an_invalid_pattern_is_refused_before_anything_runs():
    name = "llmrl.rewards.rules:matches_pattern"
    with pytest.raises(UserCodeError, match=r"argument pattern \('\('\): Input should be a valid regular expression"):
        bind_arguments(load_function(name), {"pattern": "("})


def test_a_pattern_left_out_is_refused():
    with pytest.raises(UserCodeError, match=r"rules:matches_pattern needs 'pattern'"):
        check_columns(load_function("llmrl.rewards.rules:matches_pattern"), ["answer"])


def test_a_rollout_is_taken_by_what_takes_nothing_else():
    def scaled(rollout, scale):
        return scale

    assert takes_rollout(lambda rollout: rollout)
    assert takes_rollout(partial(scaled, scale=2.0))
    assert not takes_rollout(scaled)
    assert not takes_rollout(lambda rollout, answer: answer)
    assert not takes_rollout(lambda responses: responses)
