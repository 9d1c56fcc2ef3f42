"""The rules of CONTRIBUTING.md that a program can check."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import llmrl

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

NO_MACHINE_PATHS = re.compile(r"/(?:work|root|home|Users)/")
NO_PLACE_BESIDE_THE_REPOSITORY = re.compile(r"\.\./shared")
NO_CODE_FROM_DATA = re.compile(
    r"""\bimport\s+pickle|\bpickle\.\w   # use safetensors and JSON
    | \btorch\.load\(                    # use safetensors
    | (?<![.\w])eval\(|(?<![.\w])exec\(
    | \byaml\.(?:unsafe_|full_)?load\(   # use OmegaConf or yaml.safe_load
    | shell=True | \bos\.system\(        # use a list of arguments
    """,
    re.VERBOSE,
)


def assert_passes(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@cache
def tracked_files() -> tuple[Path, ...]:
    """The files under version control, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file())


def violations(rule: re.Pattern[str], *, under: str = "", but_not_under: str | None = None) -> list[str]:
    """``file:line: text`` of every match in the tracked files."""
    return [
        f"{path}:{number}: {line.strip()}"
        for path in tracked_files()
        if path.is_relative_to(under) and not (but_not_under and path.is_relative_to(but_not_under))
        for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), 1)
        if rule.search(line)
    ]


# --- tests ---------------------------------------------------------------------------------------------------------


def test_every_tracked_test_file_is_collected():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {str(path) for path in tracked_files() if path.match("tests/**/test_*.py") or path.match("tests/test_*.py")}
    assert files
    assert not files - {line.partition(":")[0] for line in collected.splitlines()}, "pytest does not look there"


# --- tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "lint-imports"])
def test_linters_pass(command: str):
    tool, *arguments = command.split()
    assert_passes(BIN / tool, *arguments)


@pytest.mark.slow
def test_types_are_right():
    assert_passes(BIN / "pyright", "--pythonpath", sys.executable)


PROGRAMS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_benchmark_prints_its_help(program: Path, monkeypatch, capsys):
    """It imports what it uses, so that no change of a name breaks it unseen."""
    monkeypatch.syspath_prepend(program.parent)
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("target", ["quickstart", "test", "test-fast", "test-lowest", "check", "docs", "site", "bench"])
def test_make_knows_the_target(target: str):
    assert_passes("make", "--dry-run", target)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (NO_MACHINE_PATHS, "cd /" + "work/main", "the work/life balance"),
        (NO_PLACE_BESIDE_THE_REPOSITORY, "see ../" + "shared/notes.md", "shared/notes.md"),
        (NO_CODE_FROM_DATA, "import " + "pickle", "written without pickle."),
        (NO_CODE_FROM_DATA, "x = eval" + "(text)", "model.eval()"),
        (NO_CODE_FROM_DATA, "torch.load" + "(path)", "module.load_state_dict(state)"),
        (NO_CODE_FROM_DATA, "yaml.load" + "(text)", "yaml.safe_load(text)"),
        (NO_CODE_FROM_DATA, "run(text, shell" + "=True)", "run(arguments, shell=False)"),
    ],
)
def test_a_rule_finds_what_it_forbids_and_nothing_else(rule: re.Pattern[str], bad: str, good: str):
    assert rule.search(bad)
    assert not rule.search(good)


def test_no_file_names_a_place_on_one_machine():
    assert violations(NO_MACHINE_PATHS) == []


def test_only_tests_look_beside_the_repository():
    assert violations(NO_PLACE_BESIDE_THE_REPOSITORY, but_not_under="tests") == []


def test_the_package_runs_no_code_from_data():
    assert violations(NO_CODE_FROM_DATA, under="llmrl") == []


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_module_has_a_test_file_of_its_name():
    modules = [path for path in tracked_files() if path.is_relative_to("llmrl") and path.suffix == ".py"]
    tests = [
        Path("tests", *path.parts[1:-1], f"test_{path.name}")
        for path in modules
        if path.name not in ("__init__.py", "__main__.py")
    ]
    assert tests
    assert [str(path) for path in tests if not (ROOT / path).is_file()] == []


def test_the_tests_that_the_security_page_names_are_there():
    named = re.findall(r"`((?:tests|llmrl)/[\w/]+\.py)`", (ROOT / "SECURITY.md").read_text())
    assert len(set(named)) > 8
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_license_is_the_one_that_the_package_names():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in text
    assert "The llmrl authors" in text


def test_the_version_is_said_once():
    assert llmrl.__version__ == PROJECT["version"]


def test_every_dependency_has_one_version_that_its_range_allows():
    extras = PROJECT["optional-dependencies"]
    requirements = [Requirement(text) for text in (*PROJECT["dependencies"], *chain(*extras.values()))]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in requirements:
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_lowest_versions_are_those_of_the_ranges():
    requirements = map(Requirement, (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["math"]))
    least = {
        requirement.name: next(bound.version for bound in requirement.specifier if bound.operator == ">=")
        for requirement in requirements
    }
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(pin) for name, pin in pins.items()} == {name: Version(bound) for name, bound in least.items()}


def test_the_changelog_has_the_version():
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_quickstart_installs_nothing_for_developers():
    def planned(target: str) -> str:
        command = ["make", "--dry-run", target, "VENV=/nowhere"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "install -e . -c constraints.txt" in planned("quickstart")
    assert "[dev]" not in planned("quickstart") + planned("quickstart-rlhf")
    assert planned("test").index("install -e . ") < planned("test").index('install -e ".[dev]"')


def imported(*, under: str, but_not_under: str | None = None) -> set[str]:
    """The distributions whose modules our files import by name."""
    modules: set[str] = set()
    for path in tracked_files():
        if path.suffix != ".py" or not path.is_relative_to(under):
            continue
        if but_not_under and path.is_relative_to(but_not_under):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).split(".")[0])
    installed = packages_distributions()
    beside = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}  # scripts: each sees the folder that it lies in
    foreign = modules - sys.stdlib_module_names - {PROJECT["name"], "tests", *beside}
    return {canonicalize_name(installed.get(name, [name])[0]) for name in foreign}


@pytest.mark.parametrize(
    ("place", "extras"),
    [
        (
            {"under": "llmrl"},
            ["deepspeed", "math", "tensorboard", "wandb", "trackio", "gymnasium", "openenv", "verifiers", "quantized"],
        ),
        (
            {"under": "", "but_not_under": "llmrl"},
            ["deepspeed", "math", "tensorboard", "wandb", "trackio", "gymnasium", "openenv", "plots", "dev"],
        ),
    ],
    ids=["package", "everything else"],
)
def test_whatever_is_imported_is_declared(place: dict[str, str], extras: list[str]):
    optional = chain(*(PROJECT["optional-dependencies"][extra] for extra in extras))
    declared = {canonicalize_name(Requirement(text).name) for text in (*PROJECT["dependencies"], *optional)}
    assert "torch" in imported(**place)
    assert imported(**place) - declared == set()
