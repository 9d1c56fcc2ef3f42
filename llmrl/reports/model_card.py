"""The model card of a run: the README.md that stands beside the weights, with the YAML header that the hub reads.

It says what the model was made of and what came of it, and nothing of the machine: of a path only the last name is
left, and secrets are masked.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmrl.hub import is_local
from llmrl.lines import Lines
from llmrl.messages import with_interval, without_ends
from llmrl.secrets import masked, without_secrets

MAX_ROWS = 11
"""Iterations in the table of the curve."""
BARS = "▁▂▃▄▅▆▇█"
CURVES = {
    "sft": ("loss",),
    "reward-model": ("loss", "pairs/accuracy"),
    "critic": ("value/loss", "value/explained_variance"),
}
"""Metrics that the curve of a run is of, by its command."""
OF_LOOP = ("score/mean", "kl/sequence", "response/length")
"""The same of a run of reinforcement learning."""
MAX_NAME = 255
"""Bytes of the longest name of a file."""
_PATHS = re.compile(r"file://\S+|(?<![\w./~])(?:/[\w.@+%-]+/[\w.@+%/-]+|(?:~(?:[a-z_][\w.-]*)?|\.\.?)/[\w.@+%/-]+)")
"""Paths in a text: addresses of files, and what begins with a slash and has another one, or with a tilde or dots."""
REFRESH = "algorithm.reference_refresh_every"
"""Setting by which the reference of the KL moves."""
TASKS = {"reward-model": "text-classification", "critic": None}
"""What the hub calls the task of a model; text-generation where none is named."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows that a run read."""

    section: str
    path: str
    num_rows: int
    digest: str | None
    """SHA-256 of the rows."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a run knows of its model before it has trained it."""

    command: str
    """Such as grpo."""
    base_model: str
    """Folder or hub name that the run began from."""
    data: Sequence[Data]
    rewards: Sequence[str]
    """Reward functions and models; empty for runs without."""
    environment: Sequence[str]
    """The environment and tools that answered the actor; empty for runs without."""
    changed: Mapping[str, Any]
    """Settings that are not at their defaults, by their dotted names."""
    versions: Mapping[str, str | None]


def model_card(facts: CardFacts, lines: Lines) -> str:
    """The card, in Markdown."""
    name = model_name(facts.base_model)
    parts = [
        f"# {name}, after `llmrl {facts.command}`",
        f"Made by [llmrl](https://pypi.org/project/llmrl/) {facts.versions.get('llmrl')} from `{name}`.",
        *_section("Data", _data(facts.data)),
        *_section("Reward", [f"* {public(reward)}" for reward in facts.rewards]),
        *_section("Environment", [f"* {public(each)}" for each in facts.environment]),
        *_section("Held-out result", _held_out(lines)),
        *_section("Learning curve", _curve(facts, lines)),
        *_section("Settings that differ from the defaults", _settings(facts.changed)),
        *_section("Versions", [", ".join(f"{name} {x}" for name, x in facts.versions.items() if x is not None)]),
    ]
    return without_secrets(f"---\n{_header(facts)}---\n\n" + "\n\n".join(parts) + "\n")


def model_name(model: str) -> str:
    """A model as others may read it: its name on the hub, or the last name of its folder. The model of a run has the
    run's name before it, ``sft/final``, since all of these are called alike."""
    name, run = public(model), Path(model).absolute().parent
    return f"{run.name}/{name}" if name != model and (run / "metrics.jsonl").is_file() else name


def public(value: Any) -> Any:
    """A setting as others may read it: of paths of this machine only the last name, in texts, lists and mappings."""
    match value:
        case Mapping():
            return {public(name): public(item) for name, item in value.items()}
        case list() | tuple():
            return [public(item) for item in value]
        case str() if is_path(value):
            return _last_name(value)
        case str():
            return _PATHS.sub(lambda match: _last_name(match[0]), value)
    return value


def is_path(text: str) -> bool:
    """Whether a text is a path with a folder in it, and no name on the hub. One of several words begins with ``~/`` or
    with a folder of this machine's root: a prompt may begin with ``/no_think``."""
    if len(text.split()) > 1:
        return text.startswith("~/") or (text.startswith("/") and os.path.exists(Path(*Path(text).parts[:2])))
    is_short = len(text.encode()) <= MAX_NAME  # or the file system refuses to look it up
    return is_short and text.count("/") > text.startswith("/") and "://" not in text and is_local(text)


def _last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if any(lines) else []


def _header(facts: CardFacts) -> str:
    """Front matter; names of the hub only, where the hub will look them up."""
    on_hub = [data.path for data in facts.data if not is_local(data.path, suffixes=(".jsonl", ".json", ".csv"))]
    header: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["llmrl", facts.command],
        "pipeline_tag": TASKS.get(facts.command, "text-generation"),
        "base_model": None if is_local(facts.base_model) else facts.base_model,
        "datasets": list(dict.fromkeys(on_hub)),
    }
    return yaml.safe_dump({name: value for name, value in header.items() if value}, sort_keys=False)


def _data(data: Sequence[Data]) -> list[str]:
    rows = [
        f"| {each.section} | {_cell(public(each.path))} | {each.num_rows:,} | {(each.digest or '')[:16]} |"
        for each in data
    ]
    return [*_head("section", "name", "rows", "SHA-256 of the rows, its beginning"), *rows] if rows else []


def _held_out(lines: Lines) -> list[str]:
    """What was measured before the first iteration and after the last one, with intervals at 95 %."""
    evaluated = [(number, values) for number, values in lines if any(name.startswith("eval/") for name in values)]
    if not evaluated:
        return []
    (first, before), (last, after) = evaluated[0], evaluated[-1]
    names = [name for name in without_ends(after) if name.startswith("eval/")]
    columns = {f"after iteration {number}": values for number, values in ((first, before), (last, after))}
    rows = [
        f"| {name.removeprefix('eval/')} | "
        + " | ".join(with_interval(name, values) if name in values else "" for values in columns.values())
        + " |"
        for name in names
    ]
    return [*_head("", *columns), *rows]


def _curve(facts: CardFacts, lines: Lines) -> list[str]:
    names = [name for name in CURVES.get(facts.command, OF_LOOP) if any(name in values for _, values in lines)]
    trained = [(number, values) for number, values in lines if number and names and names[0] in values]
    if not trained:
        return []
    few = [trained[n] for n in evenly_spaced(len(trained), MAX_ROWS)]
    rows = [f"| {number} | " + " | ".join(_number(values.get(name)) for name in names) + " |" for number, values in few]
    bars = sparkline([values[names[0]] for _, values in trained])
    paid = [values["kl/sequence"] for _, values in trained if "kl/sequence" in values][-1:]
    reference = "the reference, which moves" if REFRESH in facts.changed else "the model that it began as"
    return [
        f"`{names[0]}`: {bars}",
        "",
        *(f"KL to {reference}: {_number(kl)} nats per response.\n" for kl in paid),
        *_head("iteration", *names),
        *rows,
    ]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Bars from the least to the greatest of these values, at most `width`; a value that is not finite leaves a gap."""
    shown = [values[n] for n in evenly_spaced(len(values), width)]
    finite = [x for x in shown if math.isfinite(x)]
    low, span = min(finite, default=0.0), (max(finite, default=0.0) - min(finite, default=0.0)) or 1.0
    return "".join(BARS[round((x - low) / span * (len(BARS) - 1))] if math.isfinite(x) else " " for x in shown)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` items, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [n * (count - 1) // (most - 1) for n in range(most)]


def _settings(changed: Mapping[str, Any]) -> list[str]:
    rows = [f"| `{name}` | {_cell(public(value))} |" for name, value in masked(changed).items()]
    return [*_head("setting", "value"), *rows] if rows else []


def _head(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"


def _cell(value: Any) -> str:
    """A value in a cell of a table: on one line, its bars and backticks harmless."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
