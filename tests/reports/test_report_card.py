import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console

from llmrl.reports.report_card import MAX_SOURCES_SHOWN, PairResults, make_report_card, print_report_card
from tests import oracles

Z = 1.959964
SURE = math.log(19)  # sigmoid of it is 0.95


def pairs(
    differences: Sequence[float], gaps: Sequence[int] | None = None, sources: Sequence[str | None] | None = None
) -> PairResults:
    """Scores around 0; 10 tokens in the rejected response."""
    half, num = torch.tensor(differences, dtype=torch.float32) / 2, len(differences)
    return PairResults(
        chosen_scores=half,
        rejected_scores=-half,
        chosen_lengths=10 + torch.tensor([0] * num if gaps is None else gaps, dtype=torch.long),
        rejected_lengths=torch.full((num,), 10),
        sources=tuple([None] * num if sources is None else sources),
    )


def card_of(
    results: PairResults,
    *,
    loss: float = 0.2,
    checks: Mapping[str, bool] | None = None,
    normalization: tuple[float, float] | None = (0.5, 2.0),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    counts = {"data": {"rows": 500, "kept": 480}, "evaluation_data": {"rows": 9, "kept": 4}}
    return make_report_card(
        results, loss=loss, counts=counts, checks=checks or {}, normalization=normalization, notes=notes
    )


def pattern(*parts: tuple[int, float]) -> list[Any]:
    """``(3, x), (1, y)`` is x three times, then y."""
    return [value for num, value in parts for _ in range(num)]


def healthy(num_right: int = 380, *, sources: Sequence[str | None] | None = None) -> PairResults:
    """400 pairs, sure by 0.95, every other one with the longer response chosen."""
    return pairs(pattern((num_right, SURE), (400 - num_right, -SURE)), [1, -1] * 200, sources)


def shown(card: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_report_card(card, Console(file=stream, width=100))
    return stream.getvalue()


FOUR = PairResults(  # differences 2, -1, 0, 2 and length gaps 2, 0, -2, -2
    chosen_scores=torch.tensor([2.0, 1.0, 0.0, 1.0]),
    rejected_scores=torch.tensor([0.0, 2.0, 0.0, -1.0]),
    chosen_lengths=torch.tensor([5, 3, 4, 2]),
    rejected_lengths=torch.tensor([3, 3, 6, 4]),
    sources=("a", "a", None, "b"),
)


def interval(wins: float, num_pairs: int) -> Any:
    bounds = [oracles.wilson_bound(wins, num_pairs, Z, upper=upper) for upper in (False, True)]
    return pytest.approx(bounds, abs=1e-9)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_accuracy_counts_a_tie_as_half():
    card = card_of(FOUR)
    assert (card["num_pairs"], card["num_ties"], card["num_unscored"]) == (4, 1, 0)
    assert card["accuracy"] == 0.625
    assert card["accuracy_interval"] == interval(2.5, 4)


def test_accuracy_by_source_and_by_length():
    card = card_of(FOUR)
    assert card["by_source"] == [
        {"source": "a", "num_pairs": 2, "accuracy": 0.5, "accuracy_interval": interval(1, 2)},
        {"source": "b", "num_pairs": 1, "accuracy": 1.0, "accuracy_interval": interval(1, 1)},
        {"source": None, "num_pairs": 1, "accuracy": 0.5, "accuracy_interval": interval(0.5, 1)},
    ]
    assert card["by_length"] == {
        "chosen_longer": {"num_pairs": 1, "accuracy": 1.0, "accuracy_interval": interval(1, 1)},
        "same": {"num_pairs": 1, "accuracy": 0.0, "accuracy_interval": interval(0, 1)},
        "chosen_shorter": {"num_pairs": 2, "accuracy": 0.75, "accuracy_interval": interval(1.5, 2)},
    }
    assert card["length_alone"] == {"longer_wins": 0.375, "shorter_wins": 0.625}


def test_calibration_is_of_the_preferred_side():
    a, b = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))  # a twice, right; b wrong; 0.5 for the tie, half right
    chance = math.sqrt(2 / math.pi) * (math.sqrt(2 * a * (1 - a)) + math.sqrt(b * (1 - b)) + 0.5) / 4
    assert card_of(FOUR)["calibration"] == {
        "error": pytest.approx((2 * (1 - a) + b) / 4),
        "error_by_chance": pytest.approx(chance),
        "mean_confidence": pytest.approx((2 * a + b + 0.5) / 4),
        "num_bins": 20,
    }


def test_correlations_with_length():
    # scores 2 1 0 1 0 2 0 -1, lengths 5 3 4 2 3 3 6 4; ranks 7.5 5.5 3 5.5 3 7.5 3 1 and 7 3 5.5 1 3 3 8 5.5
    assert card_of(FOUR)["length_correlation"] == {
        "pearson": pytest.approx((17 - 8 * 0.625 * 3.75) / math.sqrt((11 - 8 * 0.625**2) * (124 - 8 * 3.75**2))),
        "spearman": pytest.approx(-10 / math.sqrt(39 * 39.5)),
        "within_pairs": pytest.approx(0, abs=1e-12),  # 2·2 - 1·0 + 0·(-2) + 2·(-2)
    }
    # 1·3 + 2·(-1) over sqrt((1 + 4)(9 + 1))
    within = card_of(pairs([1, 2], [3, -1]))["length_correlation"]["within_pairs"]
    assert within == pytest.approx(1 / math.sqrt(50))


def test_means_and_spread_of_scores():
    assert card_of(FOUR)["scores"] == pytest.approx(
        {
            "mean": 0.625,
            "std": math.sqrt(11 / 8 - 0.625**2),
            "chosen_mean": 1.0,
            "rejected_mean": 0.25,
            "difference_mean": 0.75,
            "difference_std": math.sqrt(9 / 4 - 0.75**2),
        }
    )


def test_what_is_handed_in_is_kept():
    card = card_of(FOUR, loss=0.25, checks={"padding inert": True, "end token scored": False}, notes=["pad is eos"])
    assert card["loss"] == 0.25
    assert card["counts"] == {"data": {"rows": 500, "kept": 480}, "evaluation_data": {"rows": 9, "kept": 4}}
    assert card["checks"] == {"padding inert": True, "end token scored": False}
    assert card["normalization"] == {"mean": 0.5, "std": 2.0}
    assert card["notes"] == ["pad is eos"]
    assert card_of(FOUR, normalization=None)["normalization"] is None


def test_a_shift_of_all_scores_moves_their_mean_and_nothing_else():
    shifted = PairResults(
        chosen_scores=FOUR.chosen_scores + 8,
        rejected_scores=FOUR.rejected_scores + 8,
        chosen_lengths=FOUR.chosen_lengths,
        rejected_lengths=FOUR.rejected_lengths,
        sources=FOUR.sources,
    )
    before, after = card_of(FOUR), card_of(shifted)
    assert after["scores"].pop("mean") == before["scores"].pop("mean") + 8
    for name in ("chosen_mean", "rejected_mean"):
        assert after["scores"].pop(name) == before["scores"].pop(name) + 8
    assert after.pop("scores") == pytest.approx(before.pop("scores"))
    assert after.pop("length_correlation") == pytest.approx(before.pop("length_correlation"), abs=1e-12)
    assert after == before


def test_the_other_side_of_every_pair_has_the_other_accuracy():
    swapped = PairResults(
        chosen_scores=FOUR.rejected_scores,
        rejected_scores=FOUR.chosen_scores,
        chosen_lengths=FOUR.rejected_lengths,
        rejected_lengths=FOUR.chosen_lengths,
        sources=FOUR.sources,
    )
    card = card_of(swapped)
    assert card["accuracy"] == 0.375
    assert card["length_alone"] == {"longer_wins": 0.625, "shorter_wins": 0.375}
    assert card["length_correlation"] == pytest.approx(card_of(FOUR)["length_correlation"], abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["chosen_scores", "rejected_scores"])
def test_a_pair_that_could_not_be_scored_is_counted_and_left_out_of_all_else(bad: float, side: str):
    more = pairs([1.0], [90], ["c"])
    getattr(more, side)[0] = bad
    card, clean = card_of(PairResults.cat([more, FOUR])), card_of(FOUR)
    assert card.pop("num_unscored") == 1
    assert clean.pop("num_unscored") == 0
    said = "1 of 5 pairs have a score that is NaN or infinite: they are left out of every number but the loss."
    assert card.pop("warnings") == [said, *clean.pop("warnings")]
    assert card == clean


def test_results_of_one_size_only():
    with pytest.raises(ValueError, match=r"sources \(1\) must be one for each of 2 pairs"):
        pairs([1.0, 2.0], sources=["a"])


@pytest.mark.parametrize(
    "results",
    [
        pairs([]),
        pairs([1.0]),
        pairs([0.0]),
        pairs([0.0] * 30, [1, -1] * 15),
        pairs([math.nan, math.nan]),
        pairs([3e38, -3e38], [1, 2]),
        healthy(),
    ],
    ids=["no pair", "one", "one tie", "all ties", "none scored", "huge", "healthy"],
)
@pytest.mark.parametrize("broken", [False, True])
def test_whatever_the_pairs_the_card_is_json_and_can_be_shown(results: PairResults, broken: bool):
    bad = {"loss": math.nan, "normalization": (math.nan, math.inf)} if broken else {}
    card = card_of(results, **bad)
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert "Report card" in shown(card)


def test_of_no_pairs_nothing_is_known():
    card = card_of(pairs([]))
    assert (card["num_pairs"], card["accuracy"], card["accuracy_interval"], card["by_source"]) == (0, None, None, [])
    for part in ("length_alone", "length_correlation", "scores"):
        assert set(card[part].values()) == {None}
    assert card["warnings"] == ["0 pairs were scored: nothing is known about this model."]


def test_of_equal_scores_the_spread_is_exactly_0():
    # the mean of six 0.1 is not 0.1 in floating point
    equal = torch.full((3,), 0.1, dtype=torch.float64)
    results = PairResults(
        chosen_scores=equal,
        rejected_scores=equal,
        chosen_lengths=torch.arange(3),
        rejected_lengths=torch.arange(3),
        sources=(None,) * 3,
    )
    card = card_of(results)
    assert card["scores"]["std"] == card["scores"]["difference_std"] == 0
    assert card["accuracy"] == 0.5
    assert card["length_correlation"] == {"pearson": None, "spearman": None, "within_pairs": None}


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_a_healthy_model_is_not_warned_of():
    assert card_of(healthy(sources=["a", "b", None, None] * 100), checks={"padding inert": True})["warnings"] == []


SMELLS = {
    "length would do": (
        pairs(pattern((300, SURE), (100, -SURE)), pattern((320, 1), (80, -1))),
        'The accuracy of 0.750 is not above the 0.800 that "the longer response wins" alone would reach.',
    ),
    "being short would do, just as well": (
        pairs(pattern((380, SURE), (20, -SURE)), pattern((380, -1), (20, 1))),
        'The accuracy of 0.950 is not above the 0.950 that "the shorter response wins" alone would reach.',
    ),
    "follows length": (
        pairs(pattern((150, SURE), (50, -SURE), (60, SURE), (140, -SURE)), pattern((200, 1), (200, -1))),
        "The model follows length: its accuracy is 0.750 where the preferred response is the longer one, "
        "and 0.300 where it is not.",
    ),
    "correlates with length": (
        pairs([SURE, -SURE] * 200, [-3, 3] * 200),
        "Score and length correlate by -1.00 (within pairs): shorter responses get higher scores.",
    ),
    "below chance": (
        healthy(20),
        "The accuracy of 0.050 (0.033 to 0.076) is below chance: chosen and rejected may be swapped.",
    ),
    "no better than a coin": (
        healthy(200),
        "The interval of the accuracy, 0.451 to 0.549, includes 0.5: "
        "these pairs do not show that the model is better than a coin.",
    ),
    "few pairs": (
        pairs([SURE] * 3 + [-SURE]),
        "The accuracy rests on few pairs (4) and is uncertain by 0.33: about 400 pairs would make that 0.05.",
    ),
    "ties": (
        pairs(pattern((380, SURE), (20, 0.0))),
        "20 of 400 pairs are ties: the model gives both responses the same score, and each counts as half right.",
    ),
    "flat": (pairs([0.0] * 5), "All scores are 0.000 and their spread is 0: the model does not tell responses apart."),
    "over-confident": (
        healthy(280),
        # 0.8 sqrt(400 · 0.95 · 0.05) / 400
        "The calibration error is 0.250, chance would make it 0.009: "
        "the model expects to be right on 0.950 of the pairs and is on 0.700.",
    ),
    "a bad source": (
        pairs(pattern((285, SURE), (15, -SURE), (60, SURE), (40, -SURE)), sources=pattern((300, "a"), (100, "b"))),
        'The accuracy on the 100 pairs of the source "b" is 0.600, on the others 0.950: '
        "what is preferred there is not learned.",
    ),
    "a bad source without a name": (
        pairs(pattern((285, SURE), (15, -SURE), (60, SURE), (40, -SURE)), sources=pattern((300, "a"), (100, None))),
        "The accuracy on the 100 pairs without a source is 0.600, on the others 0.950: "
        "what is preferred there is not learned.",
    ),
}


@pytest.mark.parametrize(("results", "said"), SMELLS.values(), ids=SMELLS)
def test_what_smells_is_said(results: PairResults, said: str):
    assert said in card_of(results)["warnings"]


def test_hardly_better_than_length_is_said():
    results = pairs(pattern((330, SURE), (70, -SURE)), pattern((320, 1), (80, -1)))
    # p = 0.825, half width about 1.96 sqrt(0.825 · 0.175 / 400) = 0.037
    (said,) = [line for line in card_of(results)["warnings"] if "not clearly above" in line]
    assert said.startswith("The accuracy of 0.825 (0.78")
    assert said.endswith('is not clearly above the 0.800 that "the longer response wins" alone would reach.')


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (pairs([SURE, -SURE], [3, -3]), "correlate"),  # of two pairs, any correlation is chance
        (pairs([1.0, -1.0]), "calibration"),  # of two pairs, so is an error of 0.23
        (pairs(pattern((381, SURE), (19, 0.0))), "ties"),
        (pairs([SURE, -SURE, SURE, -SURE], sources=["a", "b", "a", "b"]), "not learned"),  # two of each show nothing
        (pairs(pattern((330, SURE), (70, -SURE)), pattern((200, 1), (200, -1))), "alone would reach"),
    ],
)
def test_what_chance_explains_is_not_said(results: PairResults, word: str):
    assert [line for line in card_of(results)["warnings"] if word in line] == []


def test_what_is_handed_in_broken_is_said():
    checks = {"end token scored": False, "padding inert": True}
    assert card_of(healthy(), loss=math.inf, checks=checks, normalization=(0.0, 0.0))["warnings"] == [
        'The check "end token scored" failed: do not use these scores before the cause is found.',
        "The loss has no finite value: a score, a margin or the data is broken.",
        "The stored normalization (mean 0.000, standard deviation 0.000) cannot be applied: "
        "the deviation must be finite and above 0.",
    ]


# --- on screen --------------------------------------------------------------------------------------------------------


def test_the_screen_shows_the_card():
    checks = {"end token scored": False, "padding inert": True}
    card = json.loads(json.dumps(card_of(FOUR, loss=0.25, checks=checks, notes=["pad is eos"])))
    lines = [" ".join(line.replace("│", " ").split()) for line in shown(card).splitlines()]
    assert "accuracy 0.625 (0.219 to 0.908)" in lines  # (2.5 + 1.92 ± 1.96 sqrt(0.9375 + 0.96)) / (4 + 3.84)
    for line in (
        "pairs scored 4, ties 1, unscored 0",
        "loss 0.250",
        "length alone longer wins 0.375, shorter wins 0.625",
        "means of scores chosen 1.000, rejected 0.250",
        "normalization mean 0.500, std 2.000",
        "data rows 500, kept 480",
        "evaluation data rows 9, kept 4",
        "end token scored FAILED",
        "padding inert passed",
        "note: pad is eos",
    ):
        assert line in lines
    starts = ("chosen longer 1 1.000 (", "same length 1 0.000 (", "source a 2 0.500 (", "without a source 1 0.500 (")
    for start in starts:
        assert any(line.startswith(start) for line in lines)
    assert sum(line.startswith("warning: ") for line in lines) == len(card["warnings"]) > 0


def test_names_are_shown_as_they_are():
    checks = {"[bold]check[/bold]": False}
    text = shown(card_of(pairs([1.0, 1.0], sources=["[red]a", "[/]"]), checks=checks, notes=["[x]"]))
    for name in ("source [red]a", "source [/]", "[bold]check[/bold]", "note: [x]"):
        assert name in text


def test_many_sources_are_cut_and_counted():
    num = MAX_SOURCES_SHOWN + 3
    text = shown(card_of(pairs([1.0] * num, sources=[f"s{n:03}" for n in range(num)])))
    assert "and 3 smaller sources" in text
    assert f"source s{MAX_SOURCES_SHOWN - 1:03}" in text
    assert f"source s{MAX_SOURCES_SHOWN:03}" not in text


def test_sources_that_the_data_does_not_name_are_no_rows():
    assert "source" not in shown(card_of(FOUR.select(torch.tensor([2]))))
