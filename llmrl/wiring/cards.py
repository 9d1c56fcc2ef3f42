"""Model cards of runs: what the settings and the checks know, for `reports/model_card.py`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import reduce
from operator import getitem
from typing import Any

from llmrl.config import AnyRun, RLRun
from llmrl.data.config import DataConfig
from llmrl.data.files import Rows
from llmrl.data.mixture import by_set
from llmrl.data.source import fingerprint
from llmrl.lines import Lines
from llmrl.models.folders import hub_name
from llmrl.reports.model_card import CardFacts, Data, model_card
from llmrl.section import likes
from llmrl.settings import to_dict
from llmrl.trainers.records import versions
from llmrl.wiring.checks import Checked, places_of
from llmrl.wiring.precision import with_dtypes
from llmrl.wiring.rows import EVALUATION
from llmrl.wiring.runs import RUNS

LEFT_OUT = ("run.output_dir", "run.resume", "made_by", "trackers", "distributed")
"""Settings that say nothing of the model, with all below them."""


def card_of(config: AnyRun, checked: Checked) -> Callable[[Lines], str]:
    """Function from the metrics of the run so far to its model card."""
    facts = CardFacts(
        command=next(verb for verb, kind in RUNS.items() if type(config) is kind.settings),
        base_model=hub_name(config.model.path),
        data=[
            *_data("data", config.data, checked.rows),
            *_data(EVALUATION, config.evaluation_data, checked.evaluation_rows),
        ],
        rewards=list(_rewards(config)) if isinstance(config, RLRun) else [],
        changed=changed_settings(with_dtypes(config)),
        versions=versions(),
    )
    return lambda lines: model_card(facts, lines)


def _data(section: str, config: DataConfig | None, rows: Rows | None) -> Iterator[Data]:
    """Each set of rows of a section that a run reads."""
    if config is not None and rows is not None:
        for place, (each, part) in zip(places_of(config, section), by_set(rows, config), strict=True):
            yield Data(section=place, path=each.path, num_rows=len(part), digest=fingerprint(part))


def changed_settings(config: AnyRun) -> dict[str, Any]:
    """Settings of a run that are not at their defaults, by their dotted names, as JSON has them. A section that takes
    settings from another one is compared with that."""
    sources, changed = likes(type(config)), list[str]()
    for each in fields(config):
        value, default = getattr(config, each.name), _default(each)
        if each.name in sources and value is not None:
            default = _as_taken(value, getattr(config, sources[each.name].source), default, sources[each.name].own)
        changed += _changed(value, default, each.name)
    settings = to_dict(config)
    return {name: reduce(getitem, name.split("."), settings) for name in changed if not _is_left_out(name)}


def _as_taken(section: Any, source: Any, default: Any, own: Sequence[str]) -> dict[str, Any]:
    """What each setting of a section is where it is left out: that of the source, except its own ones."""
    return {
        each.name: getattr(default, each.name, _default(each)) if each.name in own else getattr(source, each.name)
        for each in fields(section)
    }


def _changed(value: Any, default: Any, path: str) -> Iterator[str]:
    """Yields the names of settings that differ, whole lists among them."""
    if is_dataclass(value):
        for each in fields(value):
            names = default if isinstance(default, dict) else vars(default) if is_dataclass(default) else {}
            of_default = names.get(each.name, _default(each))
            yield from _changed(getattr(value, each.name), of_default, f"{path}.{each.name}")
    elif value != default:
        yield path


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _is_left_out(name: str) -> bool:
    return any(name == left_out or name.startswith(f"{left_out}.") for left_out in LEFT_OUT)


def _rewards(config: RLRun) -> Iterator[str]:
    for function in config.reward.functions:
        yield f"{function.name}, weight {function.weight:g}"
    if config.reward.model is not None:
        yield f"{config.reward.model.path}, a reward model, weight {config.reward.model.weight:g}"
