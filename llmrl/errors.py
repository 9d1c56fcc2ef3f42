"""What errors of libraries and of users' code say, in a form for one line of ours."""


def in_one_line(error: BaseException) -> str:
    """The message of an error, its line breaks and runs of blanks as single blanks; empty where it cannot be had."""
    try:
        return " ".join(str(error).split())
    except Exception:  # `__str__` of a class that a user wrote
        return ""
