import pytest

from llmrl.messages import (
    class_and_message,
    counted,
    format_evaluation,
    in_one_line,
    in_spans,
    in_units,
    nearest,
    shown,
    visible,
)


def test_a_message_of_several_lines_becomes_one():
    assert in_one_line(ValueError("it  is\n\n\tbad\n")) == "it is bad"


def test_an_error_without_a_message_has_none():
    assert in_one_line(KeyboardInterrupt()) == ""


@pytest.mark.parametrize(("error", "told"), [(KeyError("a"), "KeyError: 'a'"), (AssertionError(), "AssertionError")])
def test_an_error_without_a_message_is_its_class(error, told):
    assert class_and_message(error) == told


def test_an_error_that_cannot_say_what_it_is_about_has_none():
    class Broken(Exception):
        def __str__(self):
            raise ZeroDivisionError

    assert in_one_line(Broken("x")) == ""


def test_a_long_message_is_cut_and_hides_a_secret_that_the_cut_goes_through():
    assert in_one_line(ValueError("x" * 500)) == "x" * 500
    assert in_one_line(ValueError("x" * 100_000)) == "x" * 500 + "..."
    secret = "hf_abcdefghijklmnopqrstuvwx"
    assert in_one_line(ValueError(f"{'x' * 490} {secret} and more")) == f"{'x' * 490} *** and m..."


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs"), (12_000, "12,000 epochs")]
)
def test_one_thing_is_told_in_the_singular(number, told):
    assert counted(number, "epoch") == told


def test_only_a_known_word_that_is_like_the_mistyped_one_is_suggested():
    assert nearest("corect", ["length", "correct"]) == "; did you mean 'correct'?"
    assert nearest("zzz", ["length", "correct"]) == ""


def test_an_interval_stands_behind_what_it_is_of():
    values = {
        "eval/accuracy": 0.44,
        "eval/accuracy_low": 0.34671,
        "eval/accuracy_high": 0.5377,
        "eval/num_prompts": 100.0,
    }
    assert format_evaluation(values) == "accuracy 0.44 [0.3467, 0.5377]  num_prompts 100"


@pytest.mark.parametrize(
    ("num_bytes", "told"), [(3, "3 B"), (1536, "1.5 KiB"), (5 * 2**20, "5 MiB"), (2**30 + 2**28, "1.25 GiB")]
)
def test_units(num_bytes, told):
    assert in_units(num_bytes) == told


@pytest.mark.parametrize(
    ("numbers", "told"), [([], ""), ([7], "7"), ([1, 2], "1 to 2"), ([1, 3, 4, 5, 9], "1, 3 to 5, 9")]
)
def test_numbers_in_a_row_are_told_by_their_ends(numbers, told):
    assert in_spans(numbers) == told


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b]0;title\x07 \x1b[2J", r"\x1b]0;title\x07 \x1b[2J"),
        ("all good\rfailed", r"all good\rfailed"),
        ("\x9b31m \x85 \x7f\b", r"\x9b31m \x85 \x7f\x08"),
        ("\u202eabc\u2066 \u2028", r"\u202eabc\u2066 \u2028"),
        ("\ud83d", r"\ud83d"),
        ("two\nlines\tand é 漢 😀 [red]x[/red]", "two\nlines\tand é 漢 😀 [red]x[/red]"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text, seen):
    assert visible(text) == shown(text) == seen


def test_a_secret_between_control_characters_is_masked():
    assert shown("\x1b[1mapi_key='hunter2x'") == r"\x1b[1mapi_key='***'"
