"""Files as modules: found by worker processes, beside their neighbours, in nobody's way."""

import hashlib
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import FunctionType

import pytest

from llmrl.user_code import (
    UserCodeError,
    changed_file,
    code_digests,
    code_files,
    describe_exception,
    handed_over,
    import_file,
    is_given,
    load_object,
    source_text,
)

RULE = "def one(text):\n    return len(text)\n"


@pytest.fixture(autouse=True)
def _path(monkeypatch, tmp_path):
    """What a file adds to the path is gone after the test, and so are the neighbours that it imports."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def written(folder, name, text=RULE):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["rule.py", "my rule.py", "math.py", "json.py", "v1.2.py", "r\u00e9gle %41.py"])
def test_a_function_comes_back_from_a_pickle_in_this_process(tmp_path, name):
    module = import_file(written(tmp_path, name))
    assert import_file(tmp_path / name) is module
    assert module.__file__ == str(tmp_path / name)
    assert pickle.loads(pickle.dumps(module.one)) is module.one  # noqa: S301
    assert sys.modules.get("math").sqrt(4) == 2


def test_a_function_comes_back_from_a_pickle_in_a_process_that_knows_nothing(tmp_path):
    pickled = pickle.dumps(import_file(written(tmp_path, "my rule.v2.py")).one)
    code = f"import pickle; print(pickle.loads({pickled!r})('four'))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout == "4\n"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_function_can_be_sent_to_workers_with_its_neighbours(tmp_path, method):
    written(tmp_path, "parsing_of_workers.py", "def length(text):\n    return len(text)\n")
    text = "from parsing_of_workers import length\ndef one(text):\n    return length(text)\n"
    module = import_file(written(tmp_path, "rule.py", text))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as workers:
        assert list(workers.map(module.one, ["a", "bc"], timeout=60)) == [1, 2]


def test_a_neighbour_is_imported_even_within_a_function(tmp_path):
    written(tmp_path, "late_neighbour.py", "value = 5")
    module = import_file(
        written(tmp_path, "rule.py", "def value():\n    from late_neighbour import value\n    return value")
    )
    assert module.value() == 5


def test_a_neighbour_does_not_hide_what_is_installed(tmp_path):
    written(tmp_path, "json.py", "dumps = None")
    written(tmp_path, "antigravity.py", "raise AssertionError")
    import_file(written(tmp_path, "rule.py", "import json\nassert json.dumps([]) == '[]'"))
    assert sys.path[-1] == str(tmp_path)


def test_two_neighbours_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        written(tmp_path / folder, "twin_parsing.py", f"value = {folder!r}")
    text = "import twin_parsing\nvalue = twin_parsing.value\n"
    assert import_file(written(tmp_path / "a", "rule.py", text)).value == "a"
    with pytest.raises(
        ImportError, match=r"imports twin_parsing, and gets .*a/twin_parsing\.py, not .*/b; rename that"
    ):
        import_file(written(tmp_path / "b", "rule.py", text))
    assert import_file(written(tmp_path / "b", "other.py", "value = 3")).value == 3


def test_a_file_that_wraps_a_package_of_its_name_gets_the_package(tmp_path):
    assert import_file(written(tmp_path, "torch.py", "import torch\nvalue = torch.tensor(2).item()")).value == 2


def test_a_neighbour_that_something_installed_hides_is_refused(tmp_path, monkeypatch):
    written(tmp_path / "installed", "tools_of_rules.py", "value = 1")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    written(tmp_path / "mine", "tools_of_rules.py", "value = 2")
    rule = written(tmp_path / "mine", "rule.py", "import tools_of_rules\nvalue = tools_of_rules.value\n")
    told = r"imports tools_of_rules, and gets .*/installed/tools_of_rules\.py, not the one in .*/mine; rename that one"
    with pytest.raises(ImportError, match=told):
        import_file(rule)
    assert import_file(written(tmp_path / "other", "rule.py", rule.read_text())).value == 1  # it has no neighbour


def test_a_neighbour_that_is_found_through_a_link_is_itself(tmp_path, monkeypatch):
    written(tmp_path / "mine", "linked_tools.py", "value = 2")
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.syspath_prepend(tmp_path / "link")
    rule = written(tmp_path / "mine", "rule.py", "import linked_tools\nvalue = linked_tools.value\n")
    assert import_file(rule).value == 2


def test_the_code_of_a_function_is_its_file_with_the_neighbours_that_it_reaches(tmp_path):
    near = written(tmp_path, "near_rule.py", "import far_rule\nimport json\n")
    far = written(tmp_path, "far_rule.py", "import near_rule\n")
    package = written(tmp_path / "package_of_rule", "__init__.py", "")
    written(tmp_path, "unused_rule.py", "")
    rule = written(tmp_path, "rule.py", "def rule():\n    import near_rule\n    from package_of_rule import x\n")
    assert code_files(import_file(rule).rule) == sorted([far, near, package, rule])
    assert code_files(len) == []


def test_a_file_that_has_changed_is_found_by_its_digest(tmp_path):
    (tmp_path / "near.py").write_text("")
    rule = tmp_path / "digested.py"
    rule.write_text("import near\ndef rule(): pass")
    digests = code_digests(import_file(rule).rule)
    assert list(digests) == [rule, tmp_path / "near.py"]
    assert digests[tmp_path / "near.py"] == hashlib.sha256(b"").hexdigest()
    assert changed_file(digests) is None
    (tmp_path / "near.py").write_text("x = 1")
    assert changed_file(digests) == tmp_path / "near.py"
    (tmp_path / "near.py").write_text("")
    rule.unlink()
    assert changed_file(digests) == rule


def test_the_code_of_a_function_has_the_modules_of_packages_that_it_reaches(tmp_path):
    """helpers has an `__init__.py`, helpers/deep has none; modules name each other from the top and relatively."""
    rule = written(
        tmp_path,
        "rule.py",
        "def rule():\n    from helpers.rules import f\n    import plain.tools\n    from plain import more\n",
    )
    first = written(tmp_path / "helpers", "__init__.py", "")
    rules = written(tmp_path / "helpers", "rules.py", "from . import near\nfrom .deep.far import x\nf = 1\n")
    near = written(tmp_path / "helpers", "near.py", "import helpers.other\n")
    other = written(tmp_path / "helpers", "other.py", "")
    far = written(tmp_path / "helpers" / "deep", "far.py", "from ..up import x\nfrom .........beyond import y\n")
    up = written(tmp_path / "helpers", "up.py", "x = 1\n")
    tools = written(tmp_path / "plain", "tools.py", "import near\n")
    more = written(tmp_path / "plain", "more.py", "")
    for folder in (tmp_path, tmp_path / "helpers"):
        written(folder, "unused.py", "")
    written(tmp_path, "up.py", "")
    assert code_files(import_file(rule).rule) == sorted([rule, first, rules, near, other, far, up, tools, more])


def test_the_message_of_an_exception_is_cut_but_for_its_place(tmp_path):
    rule = written(tmp_path, "rule.py", "def one(text):\n    raise ValueError(text)\n")
    one = import_file(rule).one
    with pytest.raises(ValueError, match="xxx") as raised:
        one("x" * 1_000_000)
    assert describe_exception(one, raised.value) == f"raised ValueError: {'x' * 500}... at {rule}:2"


def test_what_is_handed_over_has_a_name_in_its_context_only():
    def reward(responses):
        return responses

    with handed_over({"reward": reward}):
        assert load_object("given:reward", role="reward function") is reward
        with handed_over({}), pytest.raises(UserCodeError, match="was handed over by a program in Python"):
            load_object("given:reward", role="reward function")
        assert load_object("given:reward", role="reward function") is reward
    assert is_given("given:reward")
    assert not is_given("given.py:reward")


def test_the_source_of_what_is_handed_over_tells_one_from_another():
    class Judge:
        def __call__(self, responses):
            return responses

    assert source_text(Judge()) == source_text(Judge)
    assert "return responses" in source_text(Judge())
    assert source_text(partial(Judge(), 1)).startswith(source_text(Judge))
    assert source_text(partial(Judge(), 1)) == source_text(partial(Judge(), 1))
    assert source_text(partial(Judge(), 1)) != source_text(partial(Judge(), 5))
    assert source_text(partial(Judge(), k=object())) == source_text(partial(Judge(), k=object()))  # not its address
    unwritten = [FunctionType(compile(text, "<cell>", "eval"), {}) for text in ("x + 1", "x + 2", "x + 1")]
    assert source_text(unwritten[0]) == source_text(unwritten[2]) != source_text(unwritten[1])
