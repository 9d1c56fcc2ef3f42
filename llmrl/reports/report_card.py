"""What held-out pairs say about a reward model: report_card.json, and the same as tables on screen."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from llmrl.batches import Batch
from llmrl.functional.calibration import chance_calibration_error, expected_calibration_error
from llmrl.functional.correlation import pearson_correlation, spearman_correlation
from llmrl.functional.intervals import Z_95, wilson_interval
from llmrl.functional.masking import check_shapes
from llmrl.messages import shown

Card = dict[str, Any]

NUM_BINS = 20
"""Bins of [0, 1]. The probability of the side that the model prefers is at least 0.5, so half of them are used."""
WIDE = 0.1
"""Half an accuracy's interval above this is said to be wide."""
MANY_TIES = 0.05
"""Share of ties from which on they are many."""
STRONG_CORRELATION = 0.5
"""Correlation of score with length from which on it is strong, if chance would not reach it."""
LARGE_CALIBRATION_ERROR = 0.1
"""Calibration error above which it is large, if it is also twice what chance explains."""
FAR_BELOW = 0.1
"""Accuracy by which a source is far below the others, if their intervals do not meet either."""
MAX_SOURCES_SHOWN = 20
"""Sources in the table on screen; the file has all."""


@dataclass(frozen=True, kw_only=True)
class PairResults(Batch):
    """What a reward model says about held-out pairs, in the order of the data."""

    chosen_scores: Float[Tensor, " B"]
    """As the loss reads them, not normalized: sigmoid(chosen - rejected) is what the model gives chosen to win."""
    rejected_scores: Float[Tensor, " B"]
    """A pair with a score that is NaN or infinite could not be scored: counted, and left out of all else."""
    chosen_lengths: Int[Tensor, " B"]
    """Response tokens."""
    rejected_lengths: Int[Tensor, " B"]
    sources: tuple[str | None, ...]
    """Where each pair comes from; None where the data does not say."""

    def __post_init__(self) -> None:
        check_shapes(
            chosen_scores=(self.chosen_scores, "B"),
            rejected_scores=(self.rejected_scores, "B"),
            chosen_lengths=(self.chosen_lengths, "B"),
            rejected_lengths=(self.rejected_lengths, "B"),
        )
        if len(self.sources) != len(self.chosen_scores):
            raise ValueError(f"sources ({len(self.sources)}) must be one for each of {len(self.chosen_scores)} pairs")

    @property
    def scored(self) -> "PairResults":
        """The pairs whose two scores are finite."""
        finite = self.chosen_scores.isfinite() & self.rejected_scores.isfinite()
        return self.select(finite.nonzero()[:, 0])

    @property
    def differences(self) -> Float64[Tensor, " B"]:
        """Chosen minus rejected score."""
        return self.chosen_scores.double() - self.rejected_scores.double()

    @property
    def length_gaps(self) -> Float64[Tensor, " B"]:
        """Chosen minus rejected length."""
        return self.chosen_lengths.double() - self.rejected_lengths.double()


def make_report_card(
    results: PairResults,
    *,
    loss: float,
    counts: Mapping[str, Mapping[str, int]],
    checks: Mapping[str, bool],
    normalization: tuple[float, float] | None,
    notes: Sequence[str] = (),
) -> Card:
    """The card as it stands in report_card.json: numbers are finite or null, intervals are of 95 %.

    Args:
        results: Scores of the held-out pairs, of which there may be none.
        loss: Loss on the same pairs, as training minimizes it: with margins and centring where they are set.
        counts: What happened to rows on the way to pairs, by section: "data" and "evaluation_data".
        checks: Whether each of the sanity checks passed, by a name such as "padding inert".
        normalization: Mean and standard deviation that are stored with the model; None: not normalized.
        notes: Plain sentences that a reader of the numbers should know.

    Returns:
        Names are those below. `num_pairs` are the scored ones. Where there are none, or where a statistic has no
        value, such as a correlation with lengths that are all equal, it is null. `warnings` are plain sentences.
    """
    pairs = results.scored.to("cpu")
    card = {
        **_rate(_wins(pairs.differences)),
        "num_ties": int((pairs.differences == 0).sum()),
        "num_unscored": len(results.sources) - len(pairs.sources),
        "loss": _finite(loss),
        "calibration": _calibration(pairs),
        "by_source": _by_source(pairs),
        "by_length": _by_length(pairs),
        "length_alone": _length_alone(pairs),
        "length_correlation": _length_correlation(pairs),
        "scores": _scores(pairs),
        "normalization": None if normalization is None else _normalization(*normalization),
        "counts": {section: dict(of_section) for section, of_section in counts.items()},
        "checks": {name: bool(passed) for name, passed in checks.items()},
        "notes": list(notes),
    }
    return {**card, "warnings": list(_warnings(card))}


# --- numbers ----------------------------------------------------------------------------------------------------------


def _finite(x: Tensor | float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _wins(differences: Float64[Tensor, " B"]) -> Float64[Tensor, " B"]:
    """1 where the difference is positive, 0 where it is negative, 0.5 for a tie."""
    return (differences.sign() + 1) / 2


def _rate(wins: Float64[Tensor, " B"]) -> Card:
    if len(wins) == 0:
        return {"num_pairs": 0, "accuracy": None, "accuracy_interval": None}
    return {
        "num_pairs": len(wins),
        "accuracy": float(wins.mean()),
        "accuracy_interval": list(_interval(float(wins.sum()), len(wins))),
    }


def _interval(wins: float, num_pairs: int) -> tuple[float, float]:
    """Wilson's, of wins that are whole or half, whatever rounding they come with."""
    return wilson_interval(round(2 * wins) / 2, num_pairs)


def _calibration(pairs: PairResults) -> Card:
    """Calibration error: the probability of the preferred side against whether that side was chosen."""
    card: Card = {"error": None, "error_by_chance": None, "mean_confidence": None, "num_bins": NUM_BINS}
    if len(pairs.sources) == 0:
        return card
    confidence = pairs.differences.abs().sigmoid()
    error = expected_calibration_error(confidence, _wins(pairs.differences), num_bins=NUM_BINS)
    chance = chance_calibration_error(confidence, num_bins=NUM_BINS)
    return card | {
        "error": float(error),
        "error_by_chance": float(chance),
        "mean_confidence": float(confidence.mean()),
    }


def _by_source(pairs: PairResults) -> list[Card]:
    """The largest first, the nameless last among equals."""
    wins = _wins(pairs.differences)
    places: dict[str | None, list[int]] = {}
    for place, source in enumerate(pairs.sources):
        places.setdefault(source, []).append(place)
    rows = [{"source": source, **_rate(wins[torch.tensor(found)])} for source, found in places.items()]
    return sorted(rows, key=lambda row: (-row["num_pairs"], row["source"] is None, row["source"] or ""))


def _by_length(pairs: PairResults) -> dict[str, Card]:
    wins, gaps = _wins(pairs.differences), pairs.length_gaps
    return {
        "chosen_longer": _rate(wins[gaps > 0]),
        "same": _rate(wins[gaps == 0]),
        "chosen_shorter": _rate(wins[gaps < 0]),
    }


def _length_alone(pairs: PairResults) -> Card:
    """The accuracy of two rules that read nothing."""
    if len(pairs.sources) == 0:
        return {"longer_wins": None, "shorter_wins": None}
    longer = float(_wins(pairs.length_gaps).mean())
    return {"longer_wins": longer, "shorter_wins": 1.0 - longer}


def _length_correlation(pairs: PairResults) -> Card:
    """Over all responses; and within pairs, where the prompt is the same: of differences, in both directions."""
    scores, lengths = _responses(pairs), torch.cat([pairs.chosen_lengths, pairs.rejected_lengths]).double()
    differences, gaps = pairs.differences, pairs.length_gaps
    within = pearson_correlation(torch.cat([differences, -differences]), torch.cat([gaps, -gaps]))
    return {
        "pearson": _finite(pearson_correlation(scores, lengths)),
        "spearman": _finite(spearman_correlation(scores, lengths)),
        "within_pairs": _finite(within),
    }


def _responses(pairs: PairResults) -> Float64[Tensor, " N"]:
    return torch.cat([pairs.chosen_scores, pairs.rejected_scores]).double()


def _scores(pairs: PairResults) -> Card:
    scores = _responses(pairs)
    mean, std = _mean_and_std(scores)
    return {
        "mean": mean,
        "std": std,
        "chosen_mean": _mean_and_std(pairs.chosen_scores.double())[0],
        "rejected_mean": _mean_and_std(pairs.rejected_scores.double())[0],
        "difference_mean": _mean_and_std(pairs.differences)[0],
        "difference_std": _mean_and_std(pairs.differences)[1],
    }


def _mean_and_std(x: Float64[Tensor, " N"]) -> tuple[float | None, float | None]:
    """The standard deviation of a population; exactly 0 for equal values, whatever rounding their mean has."""
    if len(x) == 0:
        return None, None
    return float(x.mean()), 0.0 if x.min() == x.max() else float(x.std(correction=0))


def _normalization(mean: float, std: float) -> Card:
    return {"mean": _finite(mean), "std": _finite(std)}


# --- warnings ---------------------------------------------------------------------------------------------------------


def _warnings(card: Card) -> Iterator[str]:
    """What smells, from the numbers of the card alone."""
    yield from _check_warnings(card)
    num_unscored, num_pairs = card["num_unscored"], card["num_pairs"]
    if num_unscored:
        yield (
            f"{num_unscored} of {num_unscored + num_pairs} pairs have a score that is NaN or infinite: "
            "they are left out of every number but the loss."
        )
    if num_pairs == 0:
        yield "0 pairs were scored: nothing is known about this model."
        return
    yield from _accuracy_warnings(card)
    yield from _length_warnings(card)
    yield from _score_warnings(card)
    yield from _source_warnings(card)


def _check_warnings(card: Card) -> Iterator[str]:
    for name, passed in card["checks"].items():
        if not passed:
            yield f'The check "{name}" failed: do not use these scores before the cause is found.'
    if card["loss"] is None and card["num_pairs"]:
        yield "The loss has no finite value: a score, a margin or the data is broken."
    stored = card["normalization"]
    if stored and (stored["mean"] is None or not stored["std"] or stored["std"] < 0):
        yield (
            f"The stored normalization (mean {_show(stored['mean'])}, standard deviation {_show(stored['std'])}) "
            "cannot be applied: the deviation must be finite and above 0."
        )


def _accuracy_warnings(card: Card) -> Iterator[str]:
    num_pairs, accuracy, (low, high) = card["num_pairs"], card["accuracy"], card["accuracy_interval"]
    if high < 0.5:
        yield (
            f"The accuracy of {accuracy:.3f} ({low:.3f} to {high:.3f}) is below chance: "
            "chosen and rejected may be swapped."
        )
    elif low <= 0.5:
        yield (
            f"The interval of the accuracy, {low:.3f} to {high:.3f}, includes 0.5: "
            "these pairs do not show that the model is better than a coin."
        )
    if (high - low) / 2 > WIDE:
        yield (
            f"The accuracy rests on few pairs ({num_pairs}) and is uncertain by {(high - low) / 2:.2f}: "
            "about 400 pairs would make that 0.05."
        )


def _length_warnings(card: Card) -> Iterator[str]:
    accuracy, (low, high) = card["accuracy"], card["accuracy_interval"]
    longer, shorter = card["length_alone"]["longer_wins"], card["length_alone"]["shorter_wins"]
    best, rule = (longer, "the longer response wins") if longer >= shorter else (shorter, "the shorter response wins")
    if best > 0.5 and accuracy <= best:
        yield f'The accuracy of {accuracy:.3f} is not above the {best:.3f} that "{rule}" alone would reach.'
    elif 0.5 < low <= best:
        yield (
            f"The accuracy of {accuracy:.3f} ({low:.3f} to {high:.3f}) is not clearly above the {best:.3f} "
            f'that "{rule}" alone would reach.'
        )
    yield from _group_warnings(card["by_length"]["chosen_longer"], card["by_length"]["chosen_shorter"])
    yield from _correlation_warnings(card)


def _group_warnings(longer: Card, shorter: Card) -> Iterator[str]:
    """For accuracies above chance where length points to the preferred side, and below it where it points away."""
    if not longer["num_pairs"] or not shorter["num_pairs"]:
        return
    for right, wrong, word in ((longer, shorter, "longer"), (shorter, longer, "shorter")):
        if right["accuracy_interval"][0] > 0.5 > wrong["accuracy_interval"][1]:
            yield (
                f"The model follows length: its accuracy is {right['accuracy']:.3f} where the preferred response is "
                f"the {word} one, and {wrong['accuracy']:.3f} where it is not."
            )


def _correlation_warnings(card: Card) -> Iterator[str]:
    kinds = {"pearson": "Pearson", "spearman": "Spearman", "within_pairs": "within pairs"}
    known = {kind: r for kind, r in card["length_correlation"].items() if r is not None}
    if not known:
        return
    kind = max(known, key=lambda name: abs(known[name]))
    if abs(known[kind]) >= max(STRONG_CORRELATION, Z_95 / math.sqrt(card["num_pairs"])):
        word = "longer" if known[kind] > 0 else "shorter"
        yield f"Score and length correlate by {known[kind]:.2f} ({kinds[kind]}): {word} responses get higher scores."


def _score_warnings(card: Card) -> Iterator[str]:
    num_pairs, num_ties, calibration = card["num_pairs"], card["num_ties"], card["calibration"]
    if card["scores"]["std"] == 0:
        yield (
            f"All scores are {_show(card['scores']['mean'])} and their spread is 0: "
            "the model does not tell responses apart."
        )
    if num_ties >= MANY_TIES * num_pairs:
        yield (
            f"{num_ties} of {num_pairs} pairs are ties: the model gives both responses the same score, "
            "and each counts as half right."
        )
    if calibration["error"] > max(LARGE_CALIBRATION_ERROR, 2 * calibration["error_by_chance"]):
        yield (
            f"The calibration error is {calibration['error']:.3f}, chance would make it "
            f"{calibration['error_by_chance']:.3f}: the model expects to be right on "
            f"{calibration['mean_confidence']:.3f} of the pairs and is on {card['accuracy']:.3f}."
        )


def _source_warnings(card: Card) -> Iterator[str]:
    for row in card["by_source"]:
        num_others = card["num_pairs"] - row["num_pairs"]
        if num_others == 0:
            return
        wins = card["accuracy"] * card["num_pairs"] - row["accuracy"] * row["num_pairs"]
        if row["accuracy_interval"][1] < _interval(wins, num_others)[0] and (
            wins / num_others - row["accuracy"] >= FAR_BELOW
        ):
            where = "without a source" if row["source"] is None else f'of the source "{row["source"]}"'
            yield (
                f"The accuracy on the {row['num_pairs']} pairs {where} is {row['accuracy']:.3f}, on the others "
                f"{wins / num_others:.3f}: what is preferred there is not learned."
            )


# --- on screen --------------------------------------------------------------------------------------------------------


def print_report_card(card: Card, console: Console) -> None:
    """The card as tables, then its warnings and notes, a line each."""
    console.print(_summary(card))
    console.print(_groups(card))
    for warning in card["warnings"]:
        console.print(Text(shown(f"warning: {warning}"), style="yellow"))
    for note in card["notes"]:
        console.print(Text(shown(f"note: {note}")))


def _summary(card: Card) -> Table:
    alone, correlation, scores = card["length_alone"], card["length_correlation"], card["scores"]
    calibration, stored = card["calibration"], card["normalization"]
    lines = {
        "accuracy": f"{_show(card['accuracy'])} {_show_interval(card['accuracy_interval'])}",
        "pairs": _listed({"scored": card["num_pairs"], "ties": card["num_ties"], "unscored": card["num_unscored"]}),
        "loss": _show(card["loss"]),
        "calibration error": f"{_show(calibration['error'])} (by chance {_show(calibration['error_by_chance'])})",
        "length alone": _listed({"longer wins": alone["longer_wins"], "shorter wins": alone["shorter_wins"]}),
        "score with length": _listed(correlation),
        "scores": _listed({name: scores[name] for name in ("mean", "std")}),
        "means of scores": _listed({"chosen": scores["chosen_mean"], "rejected": scores["rejected_mean"]}),
        "normalization": "none" if stored is None else _listed(stored),
        **{section.replace("_", " "): _listed(counts) for section, counts in card["counts"].items()},
    }
    table = Table(title="Report card", show_header=False, title_justify="left")
    for name, line in lines.items():
        table.add_row(Text(name), Text(line))
    for name, passed in card["checks"].items():
        table.add_row(Text(name), Text("passed") if passed else Text("FAILED", style="bold red"))
    return table


def _groups(card: Card) -> Table:
    table = Table("pairs", title="Accuracy", title_justify="left")
    for column in ("number", "accuracy", "interval"):
        table.add_column(column, justify="right")
    for name, row in card["by_length"].items():
        _add_group(table, "same length" if name == "same" else name.replace("_", " "), row)
    if any(row["source"] is not None for row in card["by_source"]):
        for row in card["by_source"][:MAX_SOURCES_SHOWN]:
            _add_group(table, "without a source" if row["source"] is None else f"source {row['source']}", row)
    if len(card["by_source"]) > MAX_SOURCES_SHOWN:
        table.add_row(Text(f"and {len(card['by_source']) - MAX_SOURCES_SHOWN} smaller sources"))
    return table


def _add_group(table: Table, name: str, row: Card) -> None:
    interval = Text(_show_interval(row["accuracy_interval"]))
    table.add_row(Text(shown(name)), Text(str(row["num_pairs"])), Text(_show(row["accuracy"])), interval)


def _show(x: int | float | None) -> str:
    """Three digits after the point of what is near 1, counts as they are; a dash for what is not known."""
    if x is None:
        return "–"
    return str(x) if isinstance(x, int) else f"{x:.3f}" if abs(x) < 1000 else f"{x:.3g}"


def _show_interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"({interval[0]:.3f} to {interval[1]:.3f})"


def _listed(values: Mapping[str, int | float | None]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_show(value)}" for name, value in values.items())
