from llmrl.errors import in_one_line


def test_a_message_of_several_lines_becomes_one():
    assert in_one_line(ValueError("it  is\n\n\tbad\n")) == "it is bad"


def test_an_error_without_a_message_has_none():
    assert in_one_line(KeyboardInterrupt()) == ""


def test_an_error_that_cannot_say_what_it_is_about_has_none():
    class Broken(Exception):
        def __str__(self):
            raise ZeroDivisionError

    assert in_one_line(Broken("x")) == ""
