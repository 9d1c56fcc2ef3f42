"""Writes docs/metrics.md from the catalogue of metrics. `python docs/metrics.py`"""

import re
from itertools import groupby
from pathlib import Path
from textwrap import fill

from llmrl.catalogue import CATALOGUE, Metric

PAGE = Path(__file__).with_name("metrics.md")
WIDTH = 118
CODE = re.compile(r"[a-z_]+([./][a-z_]+)+|[a-z]+_[a-z_]+")
"""Names of metrics and settings in a sentence."""
INTRODUCTION = """\
# Metrics

Every name that can stand in a line of `metrics.jsonl` beside `iteration`, or be `run.best_metric`: its unit, the
runs that log it, its meaning, and what to look for. `make docs` writes this page from `llmrl/catalogue.py`.

Runs are named by their commands; `own` is `llmrl grpo` with a class of your own (`algorithm.name`). What `own` logs
comes from the loop, whatever the algorithm; the class adds metrics of other names ([`extend.md`](extend.md)).

* Sums and counts are pooled over microbatches, optimizer steps, redraws and ranks, so no number is a mean of means.
* A number that there is nothing to compute from, such as the mean score where nothing could be scored, is left out of
  the line; one that is not finite is null.
* `<part>`, `<module>` and `<k>` stand for the names of rewards or of what failed, of trained modules (`actor`,
  `critic`, `reward_model`), and for numbers.
* Names that end in `_s` come from a clock; all others are the same each time.
* `eval/...` stands in the lines of iterations with an evaluation. Line 0 is the one before the first iteration.

What a run warns of, and when, stands in [`runs.md`](runs.md#warnings).
"""


def page() -> str:
    """The text of docs/metrics.md."""
    groups = groupby(CATALOGUE, key=lambda metric: metric.name.partition("/")[0])
    sections = [f"## `{group}`\n\n" + "\n".join(map(_item, metrics)) for group, metrics in groups]
    return "\n\n".join([INTRODUCTION.strip(), *sections]) + "\n"


def _item(metric: Metric) -> str:
    text = metric.meaning + (f" *Look for:* {metric.look_for}" if metric.look_for else "")
    start = f"* **`{metric.name}`** ({metric.unit}; {', '.join(metric.runs)}). "
    return fill(
        start + CODE.sub(r"`\g<0>`", text),
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    PAGE.write_text(page())
