"""What has changed since the run in a folder was last started: its settings, what it reads, and the versions.

A change is `harmless` if the run stays the same one: it changes how long the run is, what it writes or how much memory
it takes, and no number that is learned; or it is code of the user, who mends it after it has failed. With any other
change, `run.resume: auto` does not go on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmrl.files import read_object
from llmrl.trainers.checkpoint import iteration_of, list_checkpoints
from llmrl.trainers.config import OutputConfig
from llmrl.trainers.output import RunError, finished_iterations
from llmrl.trainers.records import versions

HARMLESS = (
    "run.*",
    "trackers.*",
    "distributed.*",
    "evaluation*",
    "*.made_by",
    "*.evaluate_every",
    "*.microbatch_tokens",
    "model.gradient_checkpointing",
    "rollout.max_rows",
    "environment.timeout_s",
    "reward.functions.*.timeout_s",
    "reward.functions.*.retries",
    "reward.functions.*.on_error",
)
"""Settings that change no number that is learned (except `run.num_iterations`, where a schedule ends with the run), and
what happens when a function of the user fails."""
CODE = ("reward.functions.*", "algorithm.*", "environment.*")
"""Contents that are code of the user."""
FREE = frozenset({"arguments", "chat_template_kwargs", "rename_columns"})
"""Mappings whose keys are the user's, so that a new key is no setting of a new version."""
NOT_HARMLESS = ("run.seed", "run.deterministic")
"""Exceptions to these."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that is not as it was when the run was last started."""

    text: str
    """What it was and is, as the end of a sentence."""
    harmless: bool

    @property
    def notice(self) -> str:
        """What a run that goes on, or has come to its end, says of it."""
        return f"changed since the run was last started: {self.text}"


def changes_since(record: Mapping[str, Any], settings: Mapping[str, Any], contents: Mapping[str, str]) -> list[Change]:
    """What differs from the record of a run.

    Args:
        record: Content of its config.json.
        settings: Every setting now, as JSON has it.
        contents: Digests of what the run reads, by what it is.
    """
    return [
        *_of_settings(record.get("settings"), settings),
        *_of_contents(record.get("contents"), contents),
        *_of_versions(record.get("versions")),
    ]


def check_same_run(config: OutputConfig, settings: Mapping[str, Any], contents: Mapping[str, str]) -> None:
    """Refuses to go on with another run, unless `run.resume` is true.

    Raises:
        RunError: It names every change that is not harmless.
    """
    changes = [] if config.resume is True else changes_in(config.folder, settings, contents)
    if texts := [change.text for change in changes if not change.harmless]:
        raise RunError(
            f"run.output_dir ({config.output_dir}) holds another run than this one: {'; '.join(texts)}. "
            "run.resume=true goes on with it all the same, another folder begins a new one"
        )


def changes_in(folder: Path, settings: Mapping[str, Any], contents: Mapping[str, str]) -> list[Change]:
    """What differs from the run in a folder; nothing where that has learned nothing yet."""
    has_learned = any(map(iteration_of, list_checkpoints(folder / "checkpoints")))
    if not has_learned and finished_iterations(folder) is None:
        return []
    record = read_object(folder / "config.json")
    if record is None:
        return [Change(text="its config.json, by which a run is known again, cannot be read", harmless=False)]
    return changes_since(record, settings, contents)


def is_finished(config: OutputConfig, changes: Sequence[Change]) -> bool:
    """Whether the run in the folder is this one, and has done every iteration that this one asks for."""
    finished = finished_iterations(config.folder)
    if finished is None or not all(change.harmless for change in changes):
        return False
    return finished >= getattr(config, "num_iterations", finished)


def _of_settings(before: Any, now: Mapping[str, Any]) -> Iterator[Change]:
    was, is_now = _leaves(before if isinstance(before, Mapping) else {}), _leaves(now)
    for path in sorted(was.keys() | is_now.keys()):
        if was.get(path) != is_now.get(path) and path != "run.resume":
            text = f"{path} was {was.get(path)}, is {is_now.get(path)}"
            yield Change(text=text, harmless=_is_harmless(path) or not _is_known(path, was))


def _of_contents(before: Any, now: Mapping[str, str]) -> Iterator[Change]:
    was = before if isinstance(before, Mapping) else {}
    for what, digest in now.items() if was else ():
        if was.get(what) != digest:
            is_code = any(fnmatchcase(what, pattern) for pattern in CODE)
            yield Change(text=f"the content of {what} is another", harmless=is_code or _is_harmless(what))


def _of_versions(before: Any) -> Iterator[Change]:
    was = before if isinstance(before, Mapping) else {}
    for package, version in versions().items():
        if package in was and was[package] != version:
            yield Change(text=f"the version of {package} was {was[package]}, is {version}", harmless=True)


def _is_known(path: str, was: Mapping[str, Any]) -> bool:
    """Whether a record knows the setting: has it, or null in place of its section, or would have it, as it is of the
    user's naming, or of an item that its list lacks. Others a new version may have brought."""
    names = path.split(".")
    if not FREE.isdisjoint(names[:-1]):
        return True
    for depth in range(1, len(names) + 1):
        part, outer = ".".join(names[:depth]), ".".join(names[: depth - 1])
        is_new_item = names[depth - 1].isdigit() and _has(was, outer) and not _has(was, part)
        if part in was or is_new_item:
            return True
    return False


def _has(settings: Mapping[str, Any], section: str) -> bool:
    """Whether there is a setting below a section or a list."""
    return any(path.startswith(f"{section}.") for path in settings)


def _is_harmless(path: str) -> bool:
    return path not in NOT_HARMLESS and any(fnmatchcase(path, pattern) for pattern in HARMLESS)


def _leaves(settings: Any, path: str = "") -> dict[str, Any]:
    """Settings by path, those in lists by number; an empty list or mapping counts as a value."""
    items = enumerate(settings) if isinstance(settings, list) else None
    items = settings.items() if isinstance(settings, Mapping) else items
    if items is None or not settings:
        return {path: settings}
    leaves: dict[str, Any] = {}
    for name, value in items:
        leaves |= _leaves(value, f"{path}.{name}" if path else str(name))
    return leaves
