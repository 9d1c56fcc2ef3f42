"""The table that `llmrl verify` prints: an estimator a line, and what is behind each verdict."""

import textwrap

from llmrl.verify.verdict import Findings, Report

WIDTH = 118
HEADINGS = ("factor", "bias", "bias, KL", "cosine", "off-pol.", "stale", "variance", "s.e.", "distance", "verdict")


def lines_of(findings: Findings) -> list[str]:
    """The table, then for each verdict its reason and the estimators that it is of; then the rows in which the user's
    code failed, and the number of those left out."""
    reports = findings.reports
    names = [report.name for report in reports]
    width = max(map(len, ("estimator", *names)))
    rows = [" ".join([f"{'estimator':{width}}", *(f"{heading:>8}" for heading in HEADINGS)])]
    rows += [" ".join([f"{report.name:{width}}", *(f"{cell:>8}" for cell in _cells(report))]) for report in reports]
    of_reason: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        verdict = "holds" if report.holds else "FAULT: " + ", or ".join(fault.name for fault in report.faults)
        of_reason.setdefault((verdict, report.reason), []).append(report.name)
    for (verdict, reason), of_rows in of_reason.items():
        rows += [
            "",
            *textwrap.wrap(f"{verdict}: {' | '.join(of_rows)}", WIDTH, subsequent_indent="    "),
            *textwrap.wrap(reason, WIDTH - 2, initial_indent="  ", subsequent_indent="  "),
        ]
    rows += [line for name, failure in findings.failures.items() for line in ("", f"FAILED: {name}", f"  {failure}")]
    if num := len(findings.left_out):
        rows += ["", f"{num} rows left out: their settings are not read"]
    return rows


def _cells(report: Report) -> list[str]:
    return [
        f"{report.factor:.4f}",
        _small(report.bias),
        _small(report.bias_kl),
        f"{report.cosine:.4f}",
        f"{report.cosine_off_policy:.4f}",
        f"{report.cosine_stale:.4f}",
        f"{report.variance:.3g}",
        f"{report.standard_error:.3f}",
        "-" if report.distance is None else f"{report.distance:.4f}",
        "holds" if report.holds else "FAULT",
    ]


def _small(bias: float) -> str:
    """A bias; what is below the rounding of weights in float32 is none."""
    return "0" if bias < 1e-7 else f"{bias:.2g}"
