"""Writes the table of performance in docs/figures.md from the stored results.

    python benchmarks/table.py

The table stands between two comments, `BEGIN` and `END` here; nothing in it is written by hand. Seconds are medians of
wall time, the least in brackets; where other programs took more than a tenth of a core meanwhile, of the process's own
CPU time. W10, W11 and W18 are read from the results of other workloads.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from common import MIB, RESULTS
from workloads import DERIVED, WORKLOADS

FIGURES = Path(__file__).parents[1] / "docs" / "figures.md"
BEGIN, END = "<!-- performance: written by benchmarks/table.py -->", "<!-- end of performance -->"
HEAD = (
    "| workload | llmrl | peer, tuned | ratio | peer, as shipped | ratio | of the roofline | peak memory |",
    "|---|---|---|---|---|---|---|---|",
)
GIB = 2**30
WIDTH = 118
TUNED, SHIPPED, OURS = ("trl_tuned", "one"), ("trl", "generate"), ("llmrl", "native", "two")

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the table of docs/figures.md from the stored results.")
    parser.parse_args()
    text = FIGURES.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    records = [(path.name.partition("_")[0], json.loads(path.read_text())) for path in sorted(RESULTS.glob("W*.json"))]
    notes = [note(json.loads(path.read_text())) for path in sorted(RESULTS.glob("learning-*.json"))]
    FIGURES.write_text("\n\n".join([f"{before}{BEGIN}", table(records), *notes, f"{END}{after}"]))
    print(f"{len(records)} workloads written to {FIGURES.name}")


def table(records: Sequence[tuple[str, Record]]) -> str:
    """The table of workloads by name, and below it the machines, versions and loads of its rows."""
    rows = [(name, time_row(name, record)) for name, record in records]
    rows += [row for name, record in records for row in derived_rows(name, record)]
    names: dict[str, list[str]] = {}
    for name, record in sorted(records, key=place):
        names.setdefault(machine(record), []).append(name)
    notes = ["\n" + fill(f"{', '.join(of_note)}: {text}", WIDTH) for text, of_note in names.items()]
    return "\n".join([*HEAD, *(row for _, row in sorted(rows, key=place)), *notes])


def place(named: tuple[str, object]) -> tuple[int, str]:
    """W9 before W10, and W10 of W8 before W10 of W8-lora."""
    name, _ = named
    number = re.search(r"\d+", name)
    assert number is not None
    return int(number.group()), name


def time_row(name: str, record: Record) -> str:
    """One workload: seconds, their ratio, the roofline's fraction and peak memory, ours first."""
    summary, kind = record["summary"], kind_of(record)
    unit = "s" if kind == "step" else "CPU s"
    sides = {side: cell(of_side, f"{kind}_s", unit) for side, of_side in summary.items()}
    reached = record.get("roofline", {}).get("fractions", {})
    fractions = " / ".join(f"{100 * reached[side][kind]:.0f} %" for side in ordered(summary) if side in reached)
    peaks = " / ".join(f"{gib(summary[side]['peak_mib_median']):.1f}" for side in ordered(summary))
    processes = ", 2 processes beside 1 (ideal: x 2)" if "two" in summary else ""
    title = f"{name}: {record['describes']}, {record['settings']['dtype']}{processes}"
    return line(title, record, sides, f"{kind}_s", fractions, f"{peaks} GiB")


def derived_rows(source: str, record: Record) -> Iterator[tuple[str, str]]:
    """Names and rows of peak memory, and of what a step takes beside its phases, as far as a workload has them."""
    for name, sources in DERIVED.items():
        if source in sources:
            title = f"{name}: {{}} of {source}{WORKLOADS[source].roles}, {record['settings']['dtype']}"
            if name != "W18":
                yield f"{name} {source}", memory_row(title, record)
            elif "overhead_s" in record["samples"]["llmrl"][0]:
                yield f"{name} {source}", overhead_row(title, record)


def memory_row(title: str, record: Record) -> str:
    """Peaks of all sides, and their ratio."""
    summary = record["summary"]
    in_gib = {side: {name: gib(mib) for name, mib in of_side.items()} for side, of_side in summary.items()}
    sides = {side: cell(of_side, "peak_mib", "GiB") for side, of_side in in_gib.items()}
    return line(title.format("peak memory"), record, sides, "peak_mib", "", "")


def overhead_row(title: str, record: Record) -> str:
    """Median seconds outside of all phases, and of the step."""
    ours = record["samples"]["llmrl"]
    seconds, whole = (statistics.median(each[name] for each in ours) for name in ("overhead_s", "step_s"))
    cells = [title.format("overhead"), f"{seconds:.2f} s, {100 * seconds / whole:.1f} %"]
    return "| " + " | ".join([*cells, *[""] * 6]) + " |"


def line(title: str, record: Record, sides: Mapping[str, str], number: str, *last: str) -> str:
    """A row of ours, tuned and shipped, each other with its ratio: how many times ours it is, of the medians."""
    summary = record["summary"]
    ours, tuned, shipped = (next((s for s in names if s in summary), None) for names in (OURS, TUNED, SHIPPED))
    assert ours is not None, "every workload measures llmrl"
    cells = [title, sides[ours]]
    for side in (tuned, shipped):
        if side is None:
            cells += ["", ""]
        else:
            ratio = summary[side][f"{number}_median"] / summary[ours][f"{number}_median"]
            cells += [sides[side], f"x {ratio:.2f}"]
    return "| " + " | ".join([*cells, *last]) + " |"


def cell(numbers: Mapping[str, float], name: str, unit: str) -> str:
    """The median, and in brackets the least."""
    return f"{numbers[f'{name}_median']:.2f} {unit} ({numbers[f'{name}_min']:.2f})"


def ordered(summary: Mapping[str, Any]) -> list[str]:
    """Sides that were measured: ours, tuned, shipped."""
    return [side for side in (*OURS, *TUNED, *SHIPPED) if side in summary]


def gib(mib: float) -> float:
    return mib * MIB / GIB


def kind_of(record: Record) -> str:
    """``step`` where no measurement had to share the cores, else ``step_cpu``."""
    is_quiet = all(sample["others_cpu_percent"] <= 10 for side in record["samples"].values() for sample in side)
    return "step" if is_quiet else "step_cpu"


def note(record: Record) -> str:
    """How far first losses and gradients are from TRL's, in a sentence."""
    return fill(
        f"On identical rollouts ({record['describes']}; {record['model']} in {record['settings']['dtype']}) the first "
        f"losses of llmrl and TRL differ by {record['loss_difference']:.1g}, the gradient norms by "
        f"{100 * record['grad_norm_difference']:.2g} %.",
        WIDTH,
    )


def machine(record: Record) -> str:
    """Model, machine, versions, number of measurements and load, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    where = record["machine"]
    device = where.get("gpu", f"{where['threads']} threads of {where['processor']}")
    load = f"load average {record['load_average_before'][0]:.1f} before and {record['load_average_after'][0]:.1f} after"
    turns = f"turns of each side: {record['settings']['turns']}"
    return f"{record['model']} in {record['settings']['dtype']}, {device}; {versions}; {turns}, {load}."


if __name__ == "__main__":
    main()
