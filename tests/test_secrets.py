"""What is masked in settings and in text, and what is not."""

import time

import pytest

from llmrl import secrets
from llmrl.secrets import (
    is_secret_name,
    masked,
    remember,
    remember_environment,
    remember_from_environment,
    remember_settings,
    without_secrets,
)


@pytest.fixture(autouse=True)
def _knows_none(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())


NAMES = """api_key API_KEY openai_api_key apiKey hf_token token HF_TOKEN password db-password secret client_secret
    AWS_SECRET_ACCESS_KEY private_key Authorization accessToken credentials MYSQL_PWD db.pwd super_token"""
OTHER_NAMES = """max_response_tokens max_token eos_token pad_token tokens tokenizer microbatch_tokens key keys author
    secretary tokens_per_s password_column_name path eos_token_id PWD OLDPWD per_token reward.per_token total_token
    mask_token perToken"""


@pytest.mark.parametrize("name", NAMES.split())
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_names_of_none(name):
    assert not is_secret_name(name)


FORMS = [
    "sk-proj-abcdefghijklmnop1234",
    "hf_abcdefghijklmnopqrstuvwx",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl",
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdefghijkl",
    "AIzaSyA-abcdefghijklmnopqrstuvwxyz012345",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "glpat-abcdefghijklmnopqrst",
]


@pytest.mark.parametrize("secret", FORMS)
def test_a_known_form_is_masked_under_any_name(secret):
    assert masked({"note": f"use {secret}."}) == {"note": "use ***."}
    assert without_secrets(f"it said {secret}, twice: {secret}") == "it said ***, twice: ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2x@host/x", "https://me:***@host/x"),
        ("postgres://user:p@ss@host", "postgres://user:***@host"),
        ("postgres://user:p@@s:s@host:5432/a@b", "postgres://user:***@host:5432/a@b"),
        ("https://a:bcd@h, https://e:fgh@i", "https://a:***@h, https://e:***@i"),
        ("?mode=long&accessory_token=hunter2x", "?mode=long&accessory_token=***"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("override 'a.0.api_key=hunter2x' fails", "override 'a.0.api_key=***' fails"),
        ("{'password': 'hunter2x', 'n': 3}", "{'password': '***', 'n': 3}"),
        ('{"api_key": "hunter2x"}', '{"api_key": "***"}'),
        ("api_key='hunter2x')", "api_key='***')"),
        ("password=12345678 {'token': 12345678}", "password=*** {'token': ***}"),
    ],
)
def test_a_secret_in_a_text_is_masked(text, shown):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "the tokenizer has no EOS token: set its eos_token in tokenizer_config.json",
        "https://huggingface.co/a/b:main and https://host:8080/x@y",
        "rollout.max_response_tokens=1234567",
        "eos_token='<|im_end|>'",
        "mask_token='<|mask|>'",
        "reward.per_token=0.123456",
        "total_token=12345678",
        "advantage.token=-1.25e-05, done",
        "PWD=/srv/runs",
        "a secret is kept: whatever",
        "sk-1 hf_a AKIA",
    ],
)
def test_other_text_stays(text):
    assert without_secrets(text) == text


def test_settings_keep_their_form_and_what_is_no_secret():
    settings = {"run": {"seed": 1, "output_dir": "out"}, "max_tokens": 5, "list": [1, None, True, "a"]}
    assert masked(settings) == settings


def test_all_below_a_secret_name_is_masked():
    given = {"credentials": {"user": "me", "pin": 1234, "both": ["a"], "on": True}, "token": None}
    seen = {"credentials": {"user": "***", "pin": "***", "both": ["***"], "on": True}, "token": None}
    assert masked(given) == seen


def test_a_secret_of_the_settings_is_masked_wherever_it_stands():
    remember_settings({"a": {"api_key": "tiger lily"}, "url": "redis://:swordfish@host", "pin": {"password": "abc"}})
    assert without_secrets("no tiger lily, no swordfish, but abc") == "no ***, no ***, but abc"


def test_what_the_environment_gave_is_masked_unless_it_is_a_number_or_a_path(tmp_path):
    for value in ("walrus-and-carpenter", "/nowhere-at-all/x", "12345678", str(tmp_path), f"{tmp_path}/new"):
        remember_from_environment(value)
    shown = masked({"a": "walrus-and-carpenter", "b": "/nowhere-at-all/x", "c": "12345678", "d": f"{tmp_path}/new"})
    assert shown == {"a": "***", "b": "***", "c": "12345678", "d": f"{tmp_path}/new"}


def test_a_path_of_this_machine_is_masked_in_its_setting_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", f"{tmp_path}/password")
    monkeypatch.setenv("PWD", str(tmp_path))
    remember_environment()
    remember_settings({"api_key": f"{tmp_path}/key"})
    remember("/" + "a" * 5000)
    assert without_secrets(f"there is no file {tmp_path}/key") == f"there is no file {tmp_path}/key"
    assert masked({"api_key": f"{tmp_path}/key"}) == {"api_key": "***"}


PIECES = [
    "a",
    "a_",
    "a.b=",
    "token",
    "token_",
    "sk-",
    "eyJ-",
    "api",
    "x://a:",
    "a:@",
    "password=",
    "Bearer ",
    "-----BEGIN ",
]


def seconds(text):
    begin = time.process_time()
    without_secrets(text)
    is_secret_name(text)
    return time.process_time() - begin


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_in_proportion_to_the_length_of_a_text(piece):
    """Time that grows as the square would make the ratio 64."""
    short, long = (piece * (size // len(piece)) for size in (20_000, 160_000))
    assert seconds(long) < 30 * max(min(seconds(short) for _ in range(3)), 0.01)


def test_secrets_of_the_environment_are_masked(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "looking-glass")
    monkeypatch.setenv("SOME_NAME", "cheshire")
    remember_environment()
    assert without_secrets("looking-glass of cheshire") == "*** of cheshire"
