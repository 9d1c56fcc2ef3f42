"""The base of errors."""


class Error(Exception):
    """Base of every error whose cause lies outside of llmrl, and whose message is meant for the user: settings, data or
    models that cannot be used, code of users that fails, a run that was stopped. One that is a `ValueError` too is of
    input that cannot be used."""
