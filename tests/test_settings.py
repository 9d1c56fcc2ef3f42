import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmrl import secrets
from llmrl.config import GRPORun, SFTRun
from llmrl.paths import UserPath
from llmrl.secrets import masked, without_secrets
from llmrl.settings import Setting, SettingError, compose, describe, owner, read_either, read_recipe, to_dict, to_yaml


@dataclass(frozen=True, kw_only=True)
class Schedule:
    kind: Literal["constant", "cosine"] = "constant"
    """Shape of the
    learning rate."""
    num_warmup: int = 0
    """Steps."""

    @property
    def num_steps(self) -> int:
        """Schedules are as long as the run."""
        return 10


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Schedule = Schedule()
    """How it changes."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr ({self.lr}) must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Model:
    path: Path
    """Folder."""
    origin: str | None = None
    """Where it comes from."""
    bf16: bool = False
    """Precision."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    file: str
    """Source."""
    weight: float = 1.0
    """Share of the total."""


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    """What is trained."""
    critic: Model | None = None
    """Values; none in critic-free algorithms."""
    optimizer: Optimizer = Optimizer()
    """Of the actor."""
    critic_optimizer: Optimizer = Optimizer(lr=3e-4, schedule=Schedule(num_warmup=10))
    """Of the critic."""
    rules: tuple[Rule, ...] = ()
    """Verifiers."""
    named: dict[str, Rule] = field(default_factory=dict)
    """Verifiers by data set."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renamed."""
    seed: int = 0
    """Of every stream."""
    limits: tuple[int, ...] = (1, 2)
    """Any."""
    output_dir: str = "runs/first"
    """Folder."""


Write = Callable[[str], Path]

RECIPE = """
output_dir: runs/x
model: {path: "${output_dir}/sft", origin: llmrl sft}
optimizer: {lr: 1e-6}
rules:
  - {file: a.py}
  - {file: b.py, weight: 1}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(SettingError) as raised:
        read_recipe(Run, path, overrides)
    return str(raised.value)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_recipe_and_its_overrides_become_the_dataclass(write: Write):
    overrides = ["rules.0.weight=2", "output_dir=runs/y", "optimizer.schedule.kind=cosine", "limits=[3, 4]", "seed=7"]
    assert read_recipe(Run, write(RECIPE), overrides) == Run(
        output_dir="runs/y",
        model=Model(path=Path("runs/y/sft"), origin="llmrl sft"),
        optimizer=Optimizer(lr=1e-6, schedule=Schedule(kind="cosine")),
        rules=(Rule(file="a.py", weight=2.0), Rule(file="b.py", weight=1.0)),
        limits=(3, 4),
        seed=7,
    )


def test_a_whole_number_is_a_number_too(write: Write):
    weight = read_recipe(Run, write(RECIPE), []).rules[1].weight
    assert weight == 1.0
    assert type(weight) is float


def test_a_section_is_laid_over_the_default_that_the_class_gives_it(write: Write):
    text = RECIPE + "critic_optimizer: {schedule: {kind: cosine}}"
    expected = Optimizer(lr=3e-4, schedule=Schedule(kind="cosine", num_warmup=10))
    assert read_recipe(Run, write(text), []).critic_optimizer == expected


@pytest.mark.parametrize("override", ["critic.path=other", "critic={path: other}"])
def test_an_override_makes_an_optional_section(write: Write, override: str):
    assert read_recipe(Run, write(RECIPE + "critic: null"), [override]).critic == Model(path=Path("other"))


def test_an_optional_section_can_be_overridden_with_null(write: Write):
    assert read_recipe(Run, write(RECIPE + "critic: {path: other}"), ["critic=null"]).critic is None


def test_an_override_may_hold_an_equals_sign_and_an_interpolation(write: Write):
    run = read_recipe(Run, write(RECIPE), ["columns.a=x=y", "columns.b=${output_dir}"])
    assert run.columns == {"a": "x=y", "b": "runs/x"}


# --- the file and the overrides ---------------------------------------------------------------------------------------


def test_a_missing_recipe_suggests_the_nearest(write: Write):
    path = write(RECIPE)
    assert (
        problem(path.with_name("recpe.yaml"))
        == f"there is no recipe {path.with_name('recpe.yaml')}; did you mean {path}?"
    )


def test_a_missing_folder_is_a_missing_recipe(tmp_path: Path):
    way_out = "`llmrl recipes` lists and prints those that come with llmrl"
    assert problem(tmp_path / "no" / "r.yaml") == f"there is no recipe {tmp_path / 'no' / 'r.yaml'}; {way_out}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2", ", line 2: "),
        ("seed: 1\nseed: 2", ", line 2: found duplicate key seed"),
        ("seed: !!python/object:os.system x", ", line 1: could not determine a constructor"),
        ("- 1", " is not a recipe: write a mapping"),
        ("hello", " is not a recipe: write a mapping"),
        ("a: " + "[" * 5000, " is not a recipe: its lists and mappings are nested too deeply"),
        ("seed: \x00", ": unacceptable character"),
        ("seed: 1\n\tx: 2", ", line 2: found character '\\t' that cannot start any token"),
        ("output_dir: ${model.path}\nmodel: {path: '${output_dir}'}", ": output_dir: Recursive interpolation detected"),
        ("model: {path: '${nowhere}'}", ": model.path: Interpolation key 'nowhere' not found"),
        ("model: {path: '${'}", ": model.path: "),
        (
            "model: {path: '${oc.env:NO_SUCH_VARIABLE}'}",
            ": model.path: KeyError raised while resolving interpolation: \"Environment variable 'NO_SUCH_VAR",
        ),
        ("model: \n  path: ???", ": model.path: Missing mandatory value"),
    ],
)
def test_a_file_that_is_no_recipe(write: Write, text: str, said: str):
    path = write(text)
    message = problem(path)
    assert message.startswith(f"{path}{said}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "'seed' must be written key=value, such as run.seed=1"),
        ("=3", "'=3' must be written key=value"),
        ("model.=3", "'model.=3' must be written key=value"),
        ("limits=[1", "'limits=[1': the value is not YAML; put it in quotes"),
        ("rules.2.weight=1", "'rules.2.weight=1': list index out of range"),
        ("rules.x.weight=1", "'rules.x.weight=1': "),
        ("rules.x=1", "'rules.x=1': an item of a list is named by its number, as in reward.functions.0.weight=2"),
        ("rules={file: a}", "'rules={file: a}': "),
    ],
)
def test_an_override_that_cannot_be_used(write: Write, override: str, said: str):
    message = problem(write(RECIPE), override)
    assert message.startswith(f"override {said}")
    assert "\n" not in message


@pytest.mark.parametrize("override", ["critic.path=x", "rules.2.weight=0"])
def test_an_override_never_reaches_through_an_interpolation(write: Write, override: str):
    path = write(RECIPE + "  - ${rules.0}\ncritic: ${model}")
    assert "or write this one out in the recipe" in problem(path, override)


@pytest.mark.parametrize("override", ["optimizer={lr: .nan}", "rules=[{file: a}, {file: b, weight: .nan}]"])
def test_nan_is_refused_because_no_check_would_notice_it(write: Write, override: str):
    path = write(RECIPE)
    place = "rules.1.weight" if "rules" in override else "optimizer.lr"
    assert problem(path, override) == f"{path}:\n  {place}: nan is no value of a setting"


def test_a_folder_is_no_recipe(write: Write):
    path = write(RECIPE)
    message = problem(path.parent)
    assert message == f"{path.parent} is a folder, not a recipe; name a YAML file; did you mean {path}?"


@pytest.mark.parametrize("content", [b"seed: \xff", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_file_that_is_no_text_is_no_recipe(tmp_path: Path, content: bytes):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert problem(path).startswith(f"{path} is not a recipe: it is no UTF-8 text, at byte ")


def test_a_recipe_that_may_not_be_read_says_so(write: Write, monkeypatch: pytest.MonkeyPatch):
    path = write(RECIPE)

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert problem(path) == f"{path} cannot be read: Permission denied"


def test_a_byte_order_mark_is_passed_over(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfoutput_dir: runs/x\nmodel: {path: m}\n")
    assert read_recipe(Run, path, []).output_dir == "runs/x"


# --- what an override means -------------------------------------------------------------------------------------------

AWKWARD = [
    "", " ", "  a b  ", "a # b", "#", "# a", "End with #### and the number.", "a: b", "a:", ": b", "- a", "-", "?", "|",
    ">", "{", "}", "{a: b}", "[", "[1, 2]", "&a", "*a", "!a", "!!str a", "%a", "@a", "`a`", "~", "~a", "a=b", "==",
    "--dry-run", "1", "007", "1e5", "1e-5", ".5", "1_000", "1:30", "0x10", "true", "yes", "off", "Null", ".nan", ".inf",
    "2024-01-01", "it's", '"', "'", "'a", 'a"', '"Yes" or "No"', "'a' b 'c'", "\\", "a\\", "\\n", "\\\\ \\", "a\nb",
    "\n", "\ta\t", "a\r\nb", "\x85", "\u2028", "\ufeff", "ä", "汉字", "🙂", "$", "$x", "{}", "$(x)", "%s {x}",
    "---", "...", "a\n# b", "<<", "=",
]  # fmt: skip


def given_as(text: str, write: Write, key: str = "output_dir") -> Any:
    run = read_recipe(Run, write(RECIPE + "critic: {path: x}"), [f"{key}={text}"])
    return {
        "output_dir": run.output_dir,
        "critic.origin": run.critic and run.critic.origin,
        "columns.a": run.columns.get("a"),
        "rules.1.file": run.rules[1].file,
    }[key]


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("key", ["output_dir", "critic.origin", "columns.a", "rules.1.file"])
def test_a_text_is_what_the_shell_hands_over(write: Write, key: str, text: str):
    assert given_as(text, write, key) == text


TEXTS = st.one_of(
    st.lists(st.sampled_from(AWKWARD), min_size=2, max_size=5).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(TEXTS)
def test_any_text_is_what_the_shell_hands_over(write: Write, text: str):
    assume("${" not in text and text != "???")
    assert given_as(text, write) == text


@pytest.mark.parametrize("text", ['"a"', "'a # b'", '""', '"a\nb"', "'a' + 'b'", '"a"b"', "'it's'", "'a' # b"])
def test_quotes_that_reach_the_program_are_part_of_a_text(write: Write, text: str):
    assert given_as(text, write) == text


def test_the_sign_of_a_missing_value_is_refused_by_name(write: Write):
    assert problem(write(RECIPE), "output_dir=???") == (
        "override 'output_dir=???': ??? is the sign for a value that is missing; write another text"
    )


@pytest.mark.parametrize(("text", "expected"), [(".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf)])
def test_a_number_may_be_infinite(write: Write, text: str, expected: float):
    assert read_recipe(Run, write(RECIPE), [f"rules.1.weight={text}"]).rules[1].weight == expected


def test_null_is_null_where_the_setting_may_be_null_and_text_elsewhere(write: Write):
    assert given_as("null", write, "critic.origin") is None
    assert given_as("null", write) == "null"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${seed}/${model.bf16}", "0/False"),
        (r"\${seed}", "${seed}"),
        (r"a\b ${seed}", r"a\b 0"),
        ("'${seed}.'", "'0.'"),
    ],
)
def test_a_text_may_refer_to_other_settings(write: Write, text: str, expected: str):
    run = read_recipe(Run, write("seed: 0\nmodel: {path: m, bf16: false}"), [f"output_dir={text}"])
    assert run.output_dir == expected


@pytest.mark.parametrize("text", ["${x}", "a ${", "${a"])
def test_a_reference_to_nothing_names_the_way_to_write_the_characters(write: Write, text: str):
    message = problem(write(RECIPE), f"output_dir={text}")
    assert message.endswith(r"${a.b} is the value of the setting a.b, and \${ stands for the characters ${")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-5", 1e-5), (".5", 0.5), ("1_000", 1000.0), ("+2", 2.0), ("5.", 5.0), ("010", 10.0), ("1E5", 1e5)],
)
def test_numbers_are_decimal(write: Write, text: str, expected: float):
    assert read_recipe(Run, write(RECIPE), [f"optimizer.lr={text}"]).optimizer.lr == expected


@pytest.mark.parametrize(("text", "expected"), [("010", 10), ("08", 8), ("1_000", 1000), ("-3", -3)])
def test_whole_numbers_are_decimal(write: Write, text: str, expected: int):
    assert read_recipe(Run, write(RECIPE), [f"seed={text}"]).seed == expected


@pytest.mark.parametrize("text", ["1:30", "0x10", "1e3", "9" * 5000, "1.0", "²"])
def test_what_is_no_whole_decimal_number_is_refused(write: Write, text: str):
    assert "seed: " in (message := problem(write(RECIPE), f"seed={text}"))
    assert len(message) < 200


@dataclass(frozen=True, kw_only=True)
class Called:
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of a function."""
    either: str | tuple[str, ...] = ()
    """One or many."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("1e-5", 1e-5),
        ("true", True),
        ("null", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("'3'", "3"),
        (r"#### (\d+)", r"#### (\d+)"),
        ("answer: (.*)", "answer: (.*)"),
        ("[0-9]+", "[0-9]+"),
        ("- a", "- a"),
        ("a # b", "a # b"),
        ("", ""),
        ("~", "~"),
        ("yes", "yes"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("1:30", "1:30"),
        ("!!python/object:os.system x", "!!python/object:os.system x"),
    ],
)
def test_a_value_of_any_type_is_yaml_where_it_looks_meant_so_and_text_elsewhere(write: Write, text: str, expected: Any):
    assert read_recipe(Called, write("{}"), [f"arguments.x={text}"]).arguments == {"x": expected}


@pytest.mark.parametrize(("text", "expected"), [("all", "all"), ("a # b", "a # b"), ("[a, b]", ("a", "b"))])
def test_a_text_or_a_list_of_them(write: Write, text: str, expected: Any):
    assert read_recipe(Called, write("{}"), [f"either={text}"]).either == expected


def test_bytes_that_are_no_text_are_refused(write: Write):
    assert problem(write(RECIPE), "output_dir=\udcff") == r"override 'output_dir=\udcff' is no UTF-8 text"


# --- paths ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Places:
    folder: UserPath
    """Where to."""
    maybe: UserPath | None = None
    choice: Literal["ours"] | UserPath = "ours"
    """Where from."""
    name: str = "~/as it is"
    """No path."""
    rules: tuple[Rule, ...] = ()
    """Verifiers."""


def test_a_tilde_is_the_home_folder_in_every_path_and_in_nothing_else(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/h")
    places = read_recipe(Places, write("folder: ~/a\nname: ~/b\n"), ["maybe=~", "rules=[{file: ~/c}]"])
    assert places == Places(folder="/h/a", maybe="/h", name="~/b", rules=(Rule(file="~/c"),))
    assert read_recipe(Places, write("{}"), ["folder=a/~"]).folder == "a/~"
    assert read_recipe(Places, write("folder: a"), ["choice=~/c.py:f"]).choice == "/h/c.py:f"
    assert read_recipe(Places, write("{folder: a, choice: ours}"), []).choice == "ours"
    assert {setting.path: setting.type for setting in describe(Places)}["choice"] == "ours | path"
    assert [setting.type for setting in describe(Places)][:2] == ["path", "path | null"]


# --- names and types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=1", "sed is not a setting; did you mean seed?"),
        ("optimizer.lrr=1", "optimizer.lrr is not a setting; did you mean optimizer.lr?"),
        ("optimizer.schedule.warp=1", "optimizer.schedule.warp is not a setting; known here: kind, num_warmup"),
        ("critic={path: x, bf61: true}", "critic.bf61 is not a setting; did you mean critic.bf16?"),
        ("rules.1.wieght=2", "rules.1.wieght is not a setting; did you mean rules.1.weight?"),
        ("named.gsm8k.fil=x", "named.gsm8k.fil is not a setting; did you mean named.gsm8k.file?"),
        ("optimizer.true=1", "optimizer.true is not a setting; known here: lr, schedule"),
        (
            "optimizer.schedule.num_steps=1",
            "optimizer.schedule.num_steps cannot be set: Schedules are as long as the run",
        ),
    ],
)
def test_an_unknown_name_at_any_depth(write: Write, override: str, said: str):
    path = write(RECIPE)
    assert problem(path, override) == f"{path}:\n  {said}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=fast", "optimizer.lr: 'fast' is not a number"),
        ("optimizer.lr=true", "optimizer.lr: true is not a number"),
        ("seed='8'", "seed: '8' is not a whole number (write 8, without quotes)"),
        ("seed=true", "seed: true is not a whole number"),
        ("seed=1.5", "seed: 1.5 is not a whole number"),
        ("seed=2.0", "seed: 2.0 is not a whole number"),
        ("model.bf16=1", "model.bf16: 1 is neither true nor false"),
        ("rules=[{file: 5}]", "rules.0.file: 5 is not text; put it in quotes"),
        ("columns={a: !!binary aGk=}", "columns.a: [104, 105] is not text"),
        ("columns={a: 5}", "columns.a: 5 is not text; put it in quotes"),
        ("optimizer.schedule.kind=linear", "optimizer.schedule.kind: 'linear' is not one of 'constant' or 'cosine'"),
        ("limits=3", "limits: 3 is not a list"),
        ("limits.1=x", "limits: {"),
        ("columns=3", "columns: 3 is not a mapping"),
        ("rules.1.weight=x", "rules.1.weight: 'x' is not a number"),
        ("model=tiny", "model: 'tiny' is not a section"),
        ("model=null", "model: null is not a section; write its settings as a mapping; leave it out"),
        ("optimizer.lr=", "optimizer.lr: '' is not a number"),
        ("optimizer.lr=null", "optimizer.lr: null is not a number"),
        ("optimizer.lr=.nan", "optimizer.lr: '.nan' is not a number"),
        ("rules=[{file: null}]", "rules.0.file: null is not text"),
        ("critic.bf16=true", "critic.path must be set: in the recipe, or as critic.path=..."),
        ("optimizer.lr=0", "optimizer.lr (0.0) must be greater than 0"),
        ("critic_optimizer.lr=0", "critic_optimizer.lr (0.0) must be greater than 0"),
    ],
)
def test_a_value_of_the_wrong_kind(write: Write, override: str, said: str):
    path = write(RECIPE)
    assert problem(path, override).startswith(f"{path}:\n  {said}")


def test_every_problem_is_in_one_message(write: Write):
    path = write("optimizer: {lr: fast}\nseed: x\n")
    named = [line.split(":")[0].split()[0] for line in problem(path).splitlines()[1:]]
    assert named == ["model.path", "optimizer.lr", "seed"]


def test_an_empty_recipe_names_each_setting_that_it_lacks(write: Write):
    path = write("# nothing yet\n")
    assert problem(path) == f"{path}:\n  model.path must be set: in the recipe, or as model.path=..."
    assert read_recipe(Run, path, ["model.path=m"]) == Run(model=Model(path=Path("m")))


def test_every_unknown_name_is_in_one_message(write: Write):
    assert len(problem(write(RECIPE), "a=1", "model.b=2").splitlines()) == 3


def test_a_choice_of_sections_is_refused_because_unknown_names_would_pass(write: Write):
    @dataclass(frozen=True, kw_only=True)
    class Choice:
        either: Model | Rule

    with pytest.raises(TypeError, match="choice of sections"):
        read_recipe(Choice, write("either: {file: x}"), [])


# --- either of two runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Groups:
    size: int = 8
    """Of a group."""
    minibatch: int = 8
    """Of a step."""

    def __post_init__(self) -> None:
        if self.minibatch % self.size:
            raise ValueError(f"minibatch ({self.minibatch}) must be a multiple of size ({self.size})")


@dataclass(frozen=True, kw_only=True)
class Critic:
    minibatch: int = 8
    """Of a step."""
    critic: Model | None = None
    """What is expected."""
    critic_optimizer: Optimizer = Optimizer()
    """How it learns."""

    def __post_init__(self) -> None:
        if self.minibatch < 1:
            raise ValueError(f"minibatch ({self.minibatch}) must be at least 1")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("size: 4", [], Groups(size=4)),
        ("minibatch: 16", [], Groups(minibatch=16)),  # the first that takes it
        ("minibatch: 4", [], Critic(minibatch=4)),
        ("critic: {path: c}", [], Critic(critic=Model(path=Path("c")))),
        ("minibatch: 8", ["critic.path=c"], Critic(critic=Model(path=Path("c")))),
        ("minibatch: 8", ["critic_optimizer.lr=1"], Critic(critic_optimizer=Optimizer(lr=1.0))),
    ],
)
def test_the_run_is_the_one_whose_settings_are_named(write: Write, text: str, overrides: list[str], expected: Any):
    assert read_either((Groups, Critic), write(text), overrides) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{critic: {path: c}, critic_optimiser: {lr: 1}}", "critic_optimiser is not a setting; did you mean critic_o"),
        ("{size: 4, minbatch: 4}", "minbatch is not a setting; did you mean minibatch?"),
        ("{size: 3}", "minibatch (8) must be a multiple of size (3)"),
        ("minibatch: x", "minibatch: 'x' is not a whole number"),
        ("minibatch: -4", "minibatch (-4) must be a multiple of size (8)"),  # told by the first, where none takes it
    ],
)
def test_what_is_wrong_is_told_of_that_run(write: Write, text: str, said: str):
    path = write(text)
    with pytest.raises(SettingError) as raised:
        read_either((Groups, Critic), path, [])
    assert str(raised.value).startswith(f"{path}:\n  {said}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size: 4", "groups"),
        ("critic: {path: c}", "critic"),
        ("minibatch: 8", None),  # both
        ("{size: 4, critic: {path: c}}", None),  # neither
        ("{size: 4, minibatch: x}", "groups"),
        ("{}", None),
    ],
)
def test_the_owner_of_a_recipe_is_whose_names_it_has(write: Write, text: str, expected: str | None):
    assert owner({"groups": Groups, "critic": Critic}, write(text)) == expected


# --- what is written --------------------------------------------------------------------------------------------------

FULL = Run(
    model=Model(path=Path("m")), critic=Model(path=Path("c")), rules=(Rule(file="a"),), named={"d": Rule(file="b")}
)


def test_to_dict_is_json():
    expected: dict[str, Any] = {
        "model": {"path": "m", "origin": None, "bf16": False},
        "critic": {"path": "c", "origin": None, "bf16": False},
        "optimizer": {"lr": 1e-5, "schedule": {"kind": "constant", "num_warmup": 0}},
        "critic_optimizer": {"lr": 3e-4, "schedule": {"kind": "constant", "num_warmup": 10}},
        "rules": [{"file": "a", "weight": 1.0}],
        "named": {"d": {"file": "b", "weight": 1.0}},
        "columns": {},
        "seed": 0,
        "limits": [1, 2],
        "output_dir": "runs/first",
    }
    assert to_dict(FULL) == expected


@pytest.mark.parametrize(
    "text", ["1e-5", "yes", "null", "a: b", "${seed}", r"\${seed}", r"\\${seed} \ ", "two\nlines\t#"]
)
def test_yaml_reads_back_to_an_equal_config(write: Write, text: str):
    config = replace(FULL, output_dir=text)
    assert read_recipe(Run, write(to_yaml(config)), []) == config


# --- the listing ------------------------------------------------------------------------------------------------------


def test_describe_lists_every_setting():
    @dataclass(frozen=True, kw_only=True)
    class Small:
        rules: tuple[Rule, ...]
        """Verifiers."""
        model: Model | None = None
        """What is trained."""
        optimizer: Optimizer = Optimizer(lr=0.5)
        columns: dict[str, str] = field(default_factory=lambda: {"a": "b"})
        """Renamed."""

    assert list(describe(Small)) == [
        Setting("rules", "list of Rule", "required", "Verifiers."),
        Setting("rules.<n>.file", "text", "required", "Source."),
        Setting("rules.<n>.weight", "number", "1.0", "Share of the total."),
        Setting("model", "Model | null", "null", "What is trained."),
        Setting("model.path", "path", "required", "Folder."),
        Setting("model.origin", "text | null", "null", "Where it comes from."),
        Setting("model.bf16", "true | false", "false", "Precision."),
        Setting("optimizer", "Optimizer", "", ""),
        Setting("optimizer.lr", "number", "0.5", "Peak learning rate."),
        Setting("optimizer.schedule", "Schedule", "", "How it changes."),
        Setting("optimizer.schedule.kind", "constant | cosine", '"constant"', "Shape of the learning rate."),
        Setting("optimizer.schedule.num_warmup", "whole number", "0", "Steps."),
        Setting("columns", "mapping to text", '{"a": "b"}', "Renamed."),
    ]


def test_describe_finds_the_help_of_base_classes():
    @dataclass(frozen=True, kw_only=True)
    class Longer(Rule):
        limit: int = 3
        """Lines."""

    assert [setting.help for setting in describe(Longer)] == ["Source.", "Share of the total.", "Lines."]


# --- recipes that are made to harm ------------------------------------------------------------------------------------


def test_aliases_that_stand_for_too_much_are_refused(write: Write):
    levels = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "aliases stand for more than 100,000 values" in problem(write("\n".join(["x0: &x0 [a]", *levels])))


HARMFUL = (
    *("a: &a [*a]", "seed: ${seed}", "a: ${b}\nb: ${a}", "[" * 500, "{a: " * 500, "seed: " + "9" * 5000, "\0"),
    *("seed: !!python/object/apply:os.system [touch planted]", "seed: ${oc.decode:'__import__(1)'}", "a: \x07"),
)


@pytest.mark.parametrize("text", HARMFUL)
def test_a_harmful_recipe_is_one_complaint(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "recipe.yaml") in problem(write(text))
    assert not (tmp_path / "planted").exists()


def test_a_recipe_without_an_end_is_refused(write: Write):
    assert problem(Path("/dev/zero")) == "/dev/zero is not a recipe: it is longer than 1,000,000 bytes"


def test_a_value_of_the_environment_and_a_secret_are_masked_in_errors(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("OF_MINE", "humpty dumpty")
    assert "seed: '***' is not a whole" in without_secrets(problem(write("seed: ${oc.env:OF_MINE}")))
    problem(write("named: {a: {file: x, api_key: swordfish}}"))
    assert without_secrets("swordfish and humpty dumpty") == "*** and ***"


def test_a_choice_a_switch_and_a_number_of_the_environment_are_no_secrets(
    write: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(secrets, "_known", set())
    given = {"KIND": "cosine", "SWITCH": "false", "RATE": "1.25E-05", "ORIGIN": "constant", "PART": "cheshire"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    recipe = """
        model: {path: m, origin: "${oc.env:ORIGIN}, ${oc.env:PART}", bf16: "${oc.decode:${oc.env:SWITCH}}"}
        optimizer: {schedule: {kind: "${oc.env:KIND}"}, lr: "${oc.decode:${oc.env:RATE}}"}
    """
    run = read_recipe(Run, write(recipe), [])
    text = "cosine false 1.25E-05 1.25e-05 constant cheshire"
    assert masked(to_dict(run.optimizer)) == to_dict(run.optimizer)
    assert without_secrets(text) == "cosine false 1.25E-05 1.25e-05 *** ***"
    assert "cosine" in str(
        masked(to_dict(read_recipe(Run, write("model: {path: m}"), ["optimizer.schedule.kind=${oc.env:KIND}"])))
    )


# --- settings in Python -----------------------------------------------------------------------------------------------

GIVEN = {"model": {"path": "m"}, "data": {"path": Path("d.jsonl")}, "run": {"output_dir": "o", "num_iterations": 3}}


def composed(**settings):
    return compose(SFTRun, GIVEN, {name.replace("__", "."): value for name, value in settings.items()})


def test_settings_in_python_are_those_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: m, lora: {rank: 4, targets: [a, b]}}\ndata: {path: d.jsonl, rename_columns: {x: null}}\n"
        "run: {output_dir: o, num_iterations: 3}\noptimizer: {learning_rate: 1e-3, betas: [0.5, 0.9]}\n"
    )
    nested = composed(
        model={"lora": {"rank": 4, "targets": ("a", "b")}},
        data__rename_columns={"x": None},
        optimizer__learning_rate=1e-3,
        optimizer__betas=(0.5, 0.9),
    )
    assert nested == read_recipe(SFTRun, recipe, [])
    assert GIVEN["model"] == {"path": "m"}


def test_a_text_in_python_stands_for_itself():
    assert composed(data__system_prompt="${run.seed} 007").data.system_prompt == "${run.seed} 007"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer.learning_rat": 1.0},
            "did you mean optimizer.learning_rate?",
        ),
        ({"optimizer.learning_rate": "x"}, "optimizer.learning_rate: 'x' is not a number"),
        ({"run.num_iterations": 4}, "run.num_iterations is given already, as an argument or by another name"),
        ({"run": {"num_iterations": 4}}, "run.num_iterations is given already"),
        ({"model.path.x": 4}, "model.path.x: there is no section path to put it in"),
        ({"sft.batch_size": {1}}, "sft.batch_size is {1}, which no recipe can hold"),
        ({"optimizer.betas": [0.9, object]}, "optimizer.betas.1 is <class 'object'>, which no recipe can hold"),
    ],
)
def test_bad_settings_in_python_are_named(settings, message):
    with pytest.raises(SettingError) as raised:
        compose(SFTRun, GIVEN, settings)
    assert message in str(raised.value)


def test_an_item_of_a_list_goes_by_its_number():
    given = {**GIVEN, "reward": {"functions": [{"name": "a.py:f"}]}}
    config = compose(GRPORun, given, {"reward.functions.0.timeout_s": 5})
    assert config.reward.functions[0].timeout_s == 5
