"""Writes the README's table of performance from the stored results.

    python benchmarks/table.py

The table stands between two comments, `BEGIN` and `END` here; nothing in it is written by hand. Seconds are medians of
wall time; where other programs took more than a tenth of a core meanwhile, of the process's own CPU time.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import MIB, RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- performance: written by benchmarks/table.py -->", "<!-- end of performance -->"
HEAD = (
    "| workload | llmrl | peer, tuned | faster | peer, as shipped | faster | of the roofline | peak memory |",
    "|---|---|---|---|---|---|---|---|",
)
GIB = 2**30
OURS, TUNED, SHIPPED = ("llmrl", "native"), ("trl_tuned",), ("trl", "generate")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the README's table of performance from the stored results.")
    parser.parse_args()
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    records = [(path.name.partition("_")[0], json.loads(path.read_text())) for path in sorted(RESULTS.glob("W*.json"))]
    README.write_text(f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{after}")
    print(f"{len(records)} workloads written to {README.name}")


def table(records: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The table, and below it the machines, versions and loads of its rows."""
    rows = [row(name, record) for name, record in records]
    notes = dict.fromkeys(machine(record) for _, record in records)
    names = {note: [name for name, record in records if machine(record) == note] for note in notes}
    return "\n".join([*HEAD, *rows, *(f"\n{', '.join(names[note])}: {note}" for note in notes)])


def row(name: str, record: dict[str, Any]) -> str:
    """One workload: medians of seconds, ratios, the roofline's fraction and peak memory, ours first."""
    summary, reached = record["summary"], record["roofline"]["fractions"]
    ours, tuned, shipped = (next((s for s in sides if s in summary), None) for sides in (OURS, TUNED, SHIPPED))
    others = [side for side in (tuned, shipped) if side is not None]
    kind = "step" if is_quiet(record) else "step_cpu"
    seconds = {side: summary[side][f"{kind}_s_median"] for side in (ours, *others)}
    unit = "s" if is_quiet(record) else "CPU s"
    cells = [f"{name}: {record['describes']}", f"{seconds[ours]:.2f} {unit}"]
    for side in (tuned, shipped):
        cells += ["", ""] if side is None else [f"{seconds[side]:.2f} {unit}", f"x {seconds[side] / seconds[ours]:.2f}"]
    fractions = " / ".join(f"{100 * reached[side][kind]:.0f} %" for side in (ours, *others))
    peaks = " / ".join(f"{summary[side]['peak_mib_median'] * MIB / GIB:.1f}" for side in (ours, *others))
    return "| " + " | ".join([*cells, fractions, f"{peaks} GiB"]) + " |"


def is_quiet(record: dict[str, Any]) -> bool:
    """Whether no measurement had to share the cores."""
    return all(sample["others_cpu_percent"] <= 10 for side in record["samples"].values() for sample in side)


def machine(record: dict[str, Any]) -> str:
    """Model, machine, versions, number of measurements and load, in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    where = record["machine"]
    device = where.get("gpu", f"{where['threads']} threads of {where['processor']}")
    load = f"load average {record['load_average_before'][0]:.1f} before and {record['load_average_after'][0]:.1f} after"
    turns = f"turns of each side: {record['settings']['turns']}"
    return f"{record['model']} in {record['settings']['dtype']}, {device}; {versions}; {turns}, {load}."


if __name__ == "__main__":
    main()
