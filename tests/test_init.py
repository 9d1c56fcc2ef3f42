"""The package itself: light to import, and its public list, which does not change unnoticed."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llmrl

PUBLIC = Path(__file__).parent / "api" / "public.txt"


def described(name: str) -> str:
    """A line for each public name, and for each member of a class: its parameters and their defaults."""
    thing = getattr(llmrl, name)
    if inspect.isclass(thing):
        members = [
            f"{name}.{member}{parameters(value) if inspect.isfunction(value) else ''}"
            for member, value in inspect.getmembers(thing)
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
        ]
        return "\n".join([f"class {name}({thing.__base__.__name__})", *members])
    return f"{name}{parameters(thing)}" if callable(thing) else name


def parameters(function: Callable[..., object]) -> inspect.Signature:
    """Its signature without types, which a type checker compares."""
    bare = [each.replace(annotation=each.empty) for each in inspect.signature(function).parameters.values()]
    return inspect.Signature(bare)


def test_the_public_list_is_the_one_that_is_stored():
    """A new name or parameter is a decision. To store it: python -m tests.test_init > tests/api/public.txt"""
    assert "\n".join(map(described, llmrl.__all__)) + "\n" == PUBLIC.read_text()


def test_the_import_is_light():
    program = "import sys, llmrl; llmrl.Error; print(*{'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", llmrl.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert name in dir(llmrl)
    assert name == "__version__" or inspect.getdoc(getattr(llmrl, name))


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'llmrl' has no attribute 'gprpo'"):
        llmrl.gprpo  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert Path(llmrl.__file__).with_name("py.typed").is_file()


if __name__ == "__main__":
    print("\n".join(map(described, llmrl.__all__)))
