"""Secrets in settings and in text: what looks like one, or came from the environment, is masked where it is shown.

What is masked, and only as text leaves the process; a run computes with the true values:

* the value of a name such as api_key, hf_token, password or authorization, in settings, and where it is no fraction in
  ``name=value`` and in ``'name': 'value'``;
* a text of a known form: keys of OpenAI, Hugging Face, GitHub, GitLab, AWS, Google and Slack, JSON web tokens, what
  follows "Bearer", private keys, and the password of a URL;
* what ``${oc.env:NAME}`` gave a recipe, except numbers and a choice that its setting has;
* wherever else these values stand, if they have 6 characters or more and are no paths of this machine.

The time that this takes is in proportion to the length of a text.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MASK = "***"
MIN_CHARACTERS = 6
"""Characters of the shortest value that is masked wherever it stands: a shorter one stands in other words too."""

_TOKENS_OF_TEXT = [
    "eos",
    "bos",
    "pad",
    "unk",
    "mask",
    "sep",
    "cls",
    "image",
    "video",
    "audio",
    "special",
    "stop",
    "max",
    "min",
    "num",
    "total",
    "per",
]
"""Words before the token that is a piece of text or a number of them."""
_NAME = (
    r"(?:api[_-]?keys?|(?:secret|private|access|signing|encryption)[_-]?keys?|secrets?|passwords?|passwd"
    r"|passphrase|pwd(?-i:(?<!\bPWD))|credentials?|authorization|bearer|cookie"
    rf"|(?=token){''.join(rf'(?<!(?<![a-z0-9]){word}[_.-])' for word in _TOKENS_OF_TEXT)}token)"
    r"(?:[_-](?:id|key|value|header))?"
)
"""The end of a name; PWD alone is the current folder."""
_SECRET_NAME = re.compile(rf"(?<![a-z0-9]){_NAME}\Z", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_FORMS = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}|(?<!-)eyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
)
_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)([\w.~+/=-]{8,})")
_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://[^\s/:@'\"]{0,200}:)([^\s/'\"]{1,200})(?=@)", re.IGNORECASE)
_NUMBER = r"[-+.\d_e]+"
_FRACTION = r"[-+]?\d*\.\d+(?:e[-+]?\d+)?"
"""A measured number; a whole one may be a password."""
_ENDS = r"\s'\",;{}()\[\]"
"""Characters that end a value."""
_ASSIGNED = re.compile(
    rf"({_NAME}(?:\s?=\s?|['\"]\s?:\s?)(?:['\"]|(?!['\"\[{{])))(?!{_FRACTION}(?:[{_ENDS}]|\Z))"
    rf"([^{_ENDS}]{{{MIN_CHARACTERS},}})",
    re.IGNORECASE,
)
_PARTS = (_BEARER, _URL, _ASSIGNED)
"""Patterns whose second group is the secret."""

_known: set[str] = set()
"""Values that are masked wherever they stand."""


def is_secret_name(name: str) -> bool:
    """Whether a setting, an argument or a variable of this name holds a secret, as api_key does and max_tokens does
    not."""
    words = _CAMEL.sub("_", name)
    return _SECRET_NAME.search(words) is not None and not words.lower().startswith(("max_", "min_", "num_"))


def remember(value: str) -> None:
    """Masks a value from now on, wherever it stands, unless it is short or a path in a folder that is there."""
    is_path = value.startswith("/") and os.path.exists(Path(*Path(value).parts[:2]))
    if len(value) >= MIN_CHARACTERS and not is_path:
        _known.add(value)


def remember_environment() -> None:
    """Masks the values of variables such as HF_TOKEN and WANDB_API_KEY from now on."""
    for name, value in os.environ.items():
        if is_secret_name(name):
            remember(value)


def remember_settings(settings: Any) -> None:
    """Masks the secrets among settings from now on, wherever they stand."""
    for name, text in _texts(settings):
        if is_secret_name(name):
            remember(text)
        for pattern in (_BEARER, _URL):
            for match in pattern.finditer(text):
                remember(match[2])


def remember_from_environment(value: str) -> None:
    """Masks a value that a recipe took from the environment from now on, unless it is a number."""
    if not re.fullmatch(_NUMBER, value, re.IGNORECASE):
        remember(value)


def masked(settings: Any, name: str = "") -> Any:
    """Settings as they may be shown: lists and mappings as they are, secrets in them as ``***``."""
    match settings:
        case Mapping():
            return {key: masked(value, name if is_secret_name(name) else str(key)) for key, value in settings.items()}
        case list() | tuple():
            return [masked(item, name) for item in settings]
        case None | bool():
            return settings
        case _ if is_secret_name(name):
            return MASK
        case str():
            return without_secrets(settings)
    return settings


def without_secrets(text: str) -> str:
    """A text as it may be shown: secrets in it as ``***``."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _FORMS.sub(MASK, text)
    for pattern in _PARTS:
        text = pattern.sub(rf"\1{MASK}", text)
    return text


def _texts(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields ``(name, text)`` of every text in settings; one in a list has the list's name, one below a secret name
    that."""
    match settings:
        case Mapping():
            for key, value in settings.items():
                yield from _texts(value, name if is_secret_name(name) else str(key))
        case list() | tuple():
            for item in settings:
                yield from _texts(item, name)
        case str():
            yield name, settings
