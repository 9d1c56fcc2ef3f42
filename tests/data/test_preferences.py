import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmrl.batches import PreferencePairs, Sequences
from llmrl.data import preferences
from llmrl.data.config import PreferenceDataConfig, PromptDataConfig
from llmrl.data.files import DataError
from llmrl.data.preferences import (
    PairCounts,
    PairSource,
    encode_pairs,
    keep_pairs_in_template,
    keep_usable_pairs,
    parse_preferences,
    read_preference_rows,
)
from llmrl.data.prompts import encode_prompts
from tests.data.conftest import BOS, CHAT_TEMPLATE, EOS, make_tokenizer, spell

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_base_test.jsonl.gz"

SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SILENT = {"role": "assistant", "content": ""}
ROWS = [
    {"prompt": "a", "chosen": "xy", "rejected": "z"},
    {"prompt": "bcd", "chosen": "z", "rejected": "uvwx"},
    {"prompt": "ef", "chosen": "p", "rejected": "q"},
]


def config(**settings) -> PreferenceDataConfig:
    return PreferenceDataConfig(path="rows.jsonl", **settings)


def read(row: dict, **settings) -> tuple:
    """The parts of the only pair of a row."""
    (pair,), _ = parse_preferences([row], config(**settings))
    return pair.prompt, pair.chosen, pair.rejected


def texts(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def source(rows: list, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **settings) -> PairSource:
    return PairSource(rows, tokenizer, config(**settings), seed=seed)


def counted(counts: PairCounts) -> dict[str, int]:
    """The counts that are not 0, after a look at their sum."""
    dropped = {name: n for name, n in counts.numbers().items() if n and name not in ("rows", "kept")}
    assert counts.rows == counts.kept + sum(dropped.values())
    return dropped


def read_side(side: Sequences) -> list[tuple[list[int], list[int]]]:
    """``(prompt, response)`` ids of each row, read through the masks."""
    return [
        (prompt[prompt_mask].tolist(), response[response_mask].tolist())
        for prompt, prompt_mask, response, response_mask in zip(
            side.prompt_ids, side.prompt_mask, side.response_ids, side.response_mask, strict=True
        )
    ]


def read_pairs(pairs: PreferencePairs) -> list[tuple[list[int], list[int], list[int]]]:
    both = zip(read_side(pairs.chosen), read_side(pairs.rejected), strict=True)
    assert all(chosen[0] == rejected[0] for chosen, rejected in both)
    both = zip(read_side(pairs.chosen), read_side(pairs.rejected), strict=True)
    return [(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in both]


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # the prompt in its own column, as a text or messages; the response as a text or messages
        (texts("q", "yes", " no\n"), ("q", "yes", " no\n")),
        ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, ([USER], "yes", "no")),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, ([USER], "yes", "no")),
        ({"prompt": "hi", "chosen": [YES], "rejected": [NO]}, ("hi", "yes", "no")),
        # beside a prompt column, sides that hold the prompt once more
        (texts("why so", "why so  big", "why so\nsmall"), ("why so", "  big", "\nsmall")),
        (texts("why so ", "why so big", "why so small"), ("why so ", "big", "small")),
        # ... but only if both do, and go on; or the prompt is one word, with which a response may begin
        (texts("why so", "why so big", "small"), ("why so", "why so big", "small")),
        (texts("why so", "why so big", "why so "), ("why so", "why so big", "why so ")),
        (texts("hello", "hello there", "hello!"), ("hello", "hello there", "hello!")),
        ({"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO]}, ("hi", "yes", "no")),
        (
            {"prompt": [USER, NO, USER], "chosen": [USER, NO, USER, YES], "rejected": [NO]},
            ([USER, NO, USER], "yes", "no"),
        ),
        # ... with more before it than the prompt column has
        (
            {"prompt": "hi", "chosen": [SYSTEM, USER, NO, USER, YES], "rejected": [SYSTEM, USER, NO, USER, NO]},
            ([SYSTEM, USER, NO, USER], "yes", "no"),
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, {**USER, "name": None}, YES], "rejected": [SYSTEM, USER, NO]},
            ([SYSTEM, USER], "yes", "no"),
        ),
        # messages that share all but the last
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, ([USER], "yes", "no")),
        ({"chosen": [USER, NO, USER, YES], "rejected": [USER, NO, USER, NO]}, ([USER, NO, USER], "yes", "no")),
        # texts with a common beginning, cut back to white space
        ({"chosen": "is it? it is so", "rejected": "is it? it is six"}, ("is it? it is", " so", " six")),
        ({"chosen": "is it?  yes", "rejected": "is it?\nno"}, ("is it?", "  yes", "\nno")),
        ({"chosen": "is it?\n\nyes", "rejected": "is it?\n\nno"}, ("is it?", "\n\nyes", "\n\nno")),
        ({"chosen": "is it? no", "rejected": "is it? nothing"}, ("is it?", " no", " nothing")),
        ({"chosen": "is it? no", "rejected": "is it? no way"}, ("is it?", " no", " no way")),
    ],
)  # fmt: skip
def test_forms(row: dict, expected: tuple):
    assert read(row) == expected


def test_columns_of_other_names():
    row = {"question": "q", "good": "yes", "bad": "no"}
    assert read(row, prompt_column="question", chosen_column="good", rejected_column="bad") == ("q", "yes", "no")


@pytest.mark.parametrize(
    ("beginning", "chosen", "rejected", "expected"),
    [
        ("\n\nHuman: a\n\nAssistant:", " b", " c", ([("user", "a")], "b", "c")),
        ("Human: a\n\nAssistant:", " b", " c", ([("user", "a")], "b", "c")),  # without the blank lines in front
        (
            "\n\nHuman: a\n\nAssistant: x\n\nHuman: y\n\nz\n\nAssistant:",
            " b\n\nbb ",
            " c",
            ([("user", "a"), ("assistant", "x"), ("user", "y\n\nz")], "b\n\nbb", "c"),
        ),
        # the same words after the last shared "Assistant:" belong to the responses
        ("\n\nHuman: a\n\nAssistant:", " b is so", " b is not", ([("user", "a")], "b is so", "b is not")),
        # an assistant who says nothing
        ("\n\nHuman: a\n\nAssistant:", " ", " c", ([("user", "a")], "", "c")),
        # a response that writes further turns keeps them
        (
            "\n\nHuman: a\n\nAssistant:",
            " b  Human: d\n\nAssistant: e",
            " c",
            ([("user", "a")], "b  Human: d\n\nAssistant: e", "c"),
        ),
        (
            "\n\nHuman: a\n\nAssistant:",
            " b\n\nHuman: d\n\nAssistant: e",
            " b",
            ([("user", "a")], "b\n\nHuman: d\n\nAssistant: e", "b"),
        ),
        (
            "\n\nHuman: a\n\nAssistant:",
            " b\n\nAssistant: d",
            " b\n\nAssistant: e",
            ([("user", "a")], "b\n\nAssistant: d", "b\n\nAssistant: e"),
        ),
        # turns of one speaker in a row
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", " c", " d", ([("user", "a\n\nb")], "c", "d")),
    ],
)  # fmt: skip
def test_transcripts(beginning: str, chosen: str, rejected: str, expected: tuple):
    roles, *responses = expected
    messages = [{"role": role, "content": content} for role, content in roles]
    row = {"chosen": beginning + chosen, "rejected": beginning + rejected}
    assert read(row) == (messages, *responses)
    assert read({"chosen": row["rejected"], "rejected": row["chosen"]}) == (messages, *reversed(responses))
    assert read(row, template="none") == (beginning, chosen, rejected)


def test_prompt_column_that_is_an_open_transcript():
    row = texts("\n\nHuman: a\n\nAssistant:", " b", "c")
    assert read(row) == ([{"role": "user", "content": "a"}], "b", "c")
    assert read(row, template="none") == (row["prompt"], " b", "c")
    whole = {**row, "chosen": row["prompt"] + " b", "rejected": row["prompt"] + " c"}
    assert read(whole) == ([{"role": "user", "content": "a"}], "b", "c")


def test_transcripts_follow_the_tokenizer(plain: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast):
    rows = [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}]
    (pair,) = read_pairs(source(rows, chat).all())
    assert pair == ([BOS, *spell("user:a|assistant:")], [*spell("b"), EOS], [*spell("c"), EOS])
    pairs = source(rows, plain).all()
    unknown = 2
    assert plain.decode(pairs.chosen.prompt_ids[0]).count("<unk>") == len("\n\nH \n\nA")
    assert read_pairs(pairs)[0][1:] == ([unknown, *spell("b"), EOS], [unknown, *spell("c"), EOS])


# --- what is dropped --------------------------------------------------------------------------------------------------


def test_identical_duplicates_and_contradictions():
    rows = [
        texts("q", "a", "b"),
        texts("q", "c", "c"),  # identical
        texts("q", "a", "b"),  # duplicate
        texts("r", "a", "b"),  # another prompt
        texts("q", "d", "e"),  # contradicted by the next but one
        texts("q", "d", "e"),  # duplicate
        texts("q", "e", "d"),  # contradicted
        texts("s", "b", "a"),
        texts("q", "a", "c"),
    ]
    pairs, counts = parse_preferences(rows, config())
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        ("q", "a", "b"), ("r", "a", "b"), ("s", "b", "a"), ("q", "a", "c"),
    ]  # fmt: skip
    assert (counts.rows, counts.kept) == (9, 4)
    assert counted(counts) == {"identical": 1, "duplicates": 2, "contradictions": 2}
    assert counts.lines() == [
        "dropped 1 of 9 pairs: both responses are identical (row 2)",
        "dropped 2 of 9 pairs: they repeat an earlier pair (row 3, row 6)",
        "dropped 2 of 9 pairs: another pair with the same prompt prefers the other way round (row 5, row 7)",
    ]


@pytest.mark.parametrize(
    ("full", "empty"),
    [
        (texts("q", "a", "b"), texts("q", "a", " \n")),
        (texts("q", "a", "b"), texts("q", "", "b")),
        ({"prompt": "q", "chosen": [YES], "rejected": [NO]}, {"prompt": "q", "chosen": [YES], "rejected": [SILENT]}),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, {"chosen": [USER, SILENT], "rejected": [USER, NO]}),
        ({"chosen": "is it? yes", "rejected": "is it? no"}, {"chosen": "is it? yes", "rejected": "is it? "}),
    ],
)
def test_an_empty_response_drops_its_pair(full: dict, empty: dict):
    rows = keep_usable_pairs([empty, full, empty], config())
    assert len(rows) == 3
    pairs, counts = parse_preferences(rows, config())
    assert [pair.place for pair in pairs] == ["row 2"]
    assert counted(counts) == {"empty": 2}
    assert counts.lines() == ["dropped 2 of 3 pairs: a response is empty (row 1, row 3)"]
    with pytest.raises(DataError, match=r"^rows\.jsonl: each of the 2 pairs has an empty response$"):
        keep_usable_pairs([empty, empty], config())


def test_rows_are_parsed_once(monkeypatch, chat: PreTrainedTokenizerFast):
    seen: list[str] = []
    parse = preferences._parse_row
    monkeypatch.setattr(preferences, "_parse_row", lambda *args: (seen.append(args[-1]), parse(*args))[1])
    for read_all in (
        lambda: keep_usable_pairs(ROWS, config()),
        lambda: keep_pairs_in_template(ROWS, chat, config()),
        lambda: parse_preferences(ROWS, config()),
    ):
        seen.clear()
        read_all()
        assert seen == ["row 1", "row 2", "row 3"]


def test_notes_skip_pairs_with_an_empty_response():
    rows = [texts("a", " ", "b"), texts("a", "b ", "c")]
    chat = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("m.content", "m.content | trim"))
    dropped, note = keep_pairs_in_template(rows, chat, config()).notes
    assert dropped == "dropped 1 of 2 pairs: a response is empty (row 1)"
    assert "in 1 of the first 1 examples" in note


def test_notes_name_the_pairs_that_are_not_worth_learning_from(plain: PreTrainedTokenizerFast):
    """Before a model loads, and in a dry run."""
    rows = [texts("q", "a", "b"), texts("q", "a", "b"), texts("r", "c", "c"), texts("r", "c", "d")]
    kept = keep_pairs_in_template(rows, plain, config())
    assert kept == rows
    assert kept.notes == [
        "dropped 1 of 4 pairs: both responses are identical (row 3)",
        "dropped 1 of 4 pairs: they repeat an earlier pair (row 2)",
    ]


def test_bad_pairs_can_be_dropped():
    rows = [texts("a", "b", "c"), texts("a", "b", None), {**texts("d", "b", "c"), "margin": -1}]
    kept = keep_usable_pairs(rows, config(skip_bad_rows=True))
    assert kept == rows[:1]
    (note,) = kept.notes
    assert note.startswith(
        "dropped 2 of 3 rows: row 2: 'rejected' must be a text or a list of messages, not null; row 3"
    )


def test_the_prompt_column_can_be_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "other", "chosen": [USER, YES], "rejected": [USER, NO]}) + "\n")
    with pytest.raises(DataError, match=r"leave the prompt out by data\.rename_columns=\{prompt: null\}"):
        read_preference_rows(PreferenceDataConfig(path=str(path)))
    settings = PreferenceDataConfig(path=str(path), rename_columns={"prompt": None})
    (pair,), _ = parse_preferences(read_preference_rows(settings), settings)
    assert (pair.prompt, pair.place) == ([USER], "line 1")


def test_first_of_the_duplicates_is_kept():
    rows = [{**texts("q", "a", "b"), "source": name} for name in ("first", "second")]
    (pair,), _ = parse_preferences(rows, config())
    assert pair.source == "first"


def test_duplicates_of_messages():
    reordered = {"content": "hi", "role": "user"}
    rows = [{"chosen": [USER, YES], "rejected": [USER, NO]}, {"chosen": [reordered, YES], "rejected": [reordered, NO]}]
    pairs, counts = parse_preferences(rows, config())
    assert len(pairs) == 1
    assert counted(counts) == {"duplicates": 1}


def test_identical_sides_without_a_prompt_column_are_no_error():
    rows = [
        {"chosen": "is it? no", "rejected": "is it? no"},
        {"chosen": "no", "rejected": "no"},
        {"chosen": [USER, YES], "rejected": [USER, YES]},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"},
    ]
    pairs, counts = parse_preferences(rows, config())
    assert pairs == []
    assert counted(counts) == {"identical": 4}


def test_longer_pairs_are_dropped_and_counted(plain: PreTrainedTokenizerFast):
    # 1 + max(2, 1), 3 + max(1, 4), 2 + max(1, 1) tokens, and the EOS
    for max_tokens, kept in ((8, "aefb"), (7, "aef"), (4, "aef"), (3, "")):
        if not kept:
            with pytest.raises(DataError, match=r"dropped 3 of 3 pairs.* longer.*; raise data\.max_tokens \(3\)"):
                source(ROWS, plain, max_tokens=max_tokens)
            continue
        pairs = source(ROWS, plain, max_tokens=max_tokens)
        assert pairs.num_rows == (3 if "b" in kept else 2)
        assert counted(pairs.counts) == ({} if "b" in kept else {"too_long": 1})
        assert pairs.counts.kept == pairs.num_rows


def test_truncation_cuts_responses_without_eos(plain: PreTrainedTokenizerFast):
    pairs = source(ROWS, plain, max_tokens=4, truncate=True)
    assert read_pairs(pairs.all()) == [
        (spell("a"), [*spell("xy"), EOS], [*spell("z"), EOS]),
        (spell("bcd"), spell("z"), spell("u")),  # one token is left, so even "z" loses its EOS
        (spell("ef"), [*spell("p"), EOS], [*spell("q"), EOS]),
    ]
    assert counted(pairs.counts) == {}


def test_pairs_that_truncation_makes_equal(plain: PreTrainedTokenizerFast):
    rows = [texts("a", "xyz", "xyw"), texts("a", "xy", "xyw"), texts("a", "xw", "xyw"), texts("abc", "x", "y")]
    pairs = source(rows, plain, max_tokens=3, truncate=True)
    assert read_pairs(pairs.all()) == [(spell("a"), spell("xw"), spell("xy"))]
    assert counted(pairs.counts) == {"equal_when_cut": 2, "too_long": 1}  # the last prompt leaves no room at all
    assert pairs.counts.lines() == [
        "dropped 1 of 4 pairs: they are longer than max_tokens (row 4)",
        "dropped 2 of 4 pairs: both responses are the same tokens, truncated to max_tokens (row 1, row 2)",
    ]


def test_texts_that_are_the_same_tokens(plain: PreTrainedTokenizerFast):
    pairs = source([*ROWS, texts("a", "X", "Y")], plain)  # unknown characters, both of them
    assert counted(pairs.counts) == {"equal_when_cut": 1}


def test_nothing_left(plain: PreTrainedTokenizerFast):
    with pytest.raises(
        DataError, match=r"^rows\.jsonl: no pair is left: dropped 1 of 1 pairs: .* are identical \(row 1\)$"
    ):
        source([texts("a", "b", "b")], plain)


def test_encoding_nothing(plain: PreTrainedTokenizerFast):
    assert encode_pairs([], plain, config()) == ([], {"too_long": [], "equal_when_cut": []})


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, "<eos>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_pairs(pad: str | None, side: str):
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = pad, side
    pairs = source(ROWS, tokenizer).all()
    expected = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    assert read_pairs(pairs) == [(spell(p), [*spell(c), EOS], [*spell(r), EOS]) for p, c, r in expected]
    for sequences, lengths in ((pairs.chosen, [3, 2, 2]), (pairs.rejected, [2, 5, 2])):
        assert sequences.prompt_mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]
        assert sequences.response_lengths.tolist() == lengths
        assert sequences.response_mask.tolist() == [[n < length for n in range(max(lengths))] for length in lengths]
    assert pairs.num_tokens.tolist() == [3 + 2 + 2 * 1, 2 + 5 + 2 * 3, 2 + 2 + 2 * 2]


def test_eos_inside_a_text_is_counted(plain: PreTrainedTokenizerFast):
    (pair,) = read_pairs(source([texts("a<eos>b", "c<eos>", "d")], plain).all())
    assert pair == ([*spell("a"), EOS, *spell("b")], [*spell("c"), EOS, EOS], [*spell("d"), EOS])


def test_prompt_is_what_the_rollout_will_see(chat: PreTrainedTokenizerFast):
    rows = [texts("hi", "yes", "no"), {"prompt": [USER, YES, USER], "chosen": "yes", "rejected": "no"}]
    prompts, _ = encode_prompts(rows, chat, PromptDataConfig(path="rows.jsonl", system_prompt="bekind"))
    sampled = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
    pairs = source(rows, chat, system_prompt="bekind").all()
    assert [prompt for prompt, _, _ in read_pairs(pairs)] == sampled


@pytest.mark.parametrize("post_processor", [None, "<bos> $A", "<bos> $A <eos>"])
def test_responses_end_with_one_eos(post_processor: str | None):
    tokenizer = make_tokenizer(post_processor, CHAT_TEMPLATE)
    (pair,) = read_pairs(source([texts("hi", "yes", "no")], tokenizer).all())
    assert pair == ([BOS, *spell("user:hi|assistant:")], [*spell("yes"), EOS], [*spell("no"), EOS])


def test_margins_and_sources(plain: PreTrainedTokenizerFast):
    rows = [
        {**ROWS[0], "margin": 2, "source": "web"},
        {**ROWS[1], "margin": "0.5", "source": ""},  # cells of a CSV file
        {**ROWS[2], "margin": None},
        {**texts("g", "h", "h"), "source": "dropped"},
        {**texts("g", "h", "i"), "margin": "", "source": "book"},
    ]
    pairs = source(rows, plain)
    assert pairs.all().margin.dtype == torch.float32
    assert pairs.all().margin.tolist() == [2, 0.5, 0, 0]
    assert pairs.sources == ("web", None, None, "book")
    assert source(ROWS, plain).all().margin.tolist() == [0, 0, 0]
    renamed = [{**row, "gap": 3, "from": "x"} for row in ROWS]
    pairs = source(renamed, plain, margin_column="gap", source_column="from")
    assert pairs.all().margin.tolist() == [3, 3, 3]
    assert pairs.sources == ("x", "x", "x")


def test_margins_stay_with_their_pairs(plain: PreTrainedTokenizerFast):
    rows = [texts(letter, "x", "y") | {"margin": spell(letter)[0]} for letter in "abcdefgh"]
    dealt = source(rows, plain, seed=1).next(8)
    prompts = [prompt[0] for prompt, _, _ in read_pairs(dealt)]
    assert prompts != sorted(prompts)
    assert dealt.margin.tolist() == prompts


def test_all_is_in_data_order_and_moves_nothing(plain: PreTrainedTokenizerFast):
    pairs, other = source(ROWS, plain, seed=3), source(ROWS, plain, seed=3)
    other.all()
    assert read_pairs(pairs.next(5)) == read_pairs(other.next(5))
    assert pairs.epoch == pytest.approx(5 / 3)
    assert [prompt for prompt, _, _ in read_pairs(pairs.all())] == [spell(row["prompt"]) for row in ROWS]


@pytest.mark.parametrize(
    ("count", "places"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_some_pairs_are_spread_over_the_data(plain: PreTrainedTokenizerFast, count: int, places: list):
    pairs = source([texts(letter, "x" * (n + 1), "y") for n, letter in enumerate("abcde")], plain)
    every = read_pairs(pairs.all())
    assert read_pairs(pairs.evenly_spaced(count)) == [every[n] for n in places]
    assert pairs.evenly_spaced(count).chosen.response_ids.shape[1] == max(places) + 2  # no wider than they are
    assert pairs.epoch == 0


def test_the_longest_sequence(plain: PreTrainedTokenizerFast):
    assert source(ROWS, plain).longest == 3 + 4 + 1
    assert source([texts("a", "xyz", "z")], plain).longest == 1 + 3 + 1


def test_source_resumes(plain: PreTrainedTokenizerFast):
    rows = [texts(letter, "x", "y") for letter in "abcdefgh"]
    first, resumed = source(rows, plain, seed=5), source(rows, plain, seed=5)
    first.next(11)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert read_pairs(resumed.next(9)) == read_pairs(first.next(9))
    with pytest.raises(DataError, match="made with 8 usable rows, but the data now has 7"):
        source(rows[:7], plain).load_state_dict(first.state_dict())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "no column 'rejected'; did you mean 'rejectd'?"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "no column 'chosen'; did you mean 'choosen'?"),
        (
            {"promt": "a", "choosen": "b", "c": "c"},
            "no column 'chosen'; did you mean 'choosen'? (data.chosen_column names it); no column 'rejected'; there "
            "are promt, choosen, c (data.rejected_column names it); no column 'prompt'; did you mean 'promt'?",
        ),
        ({"promt": "a", "chosen": "b", "rejected": "c"}, "no column 'prompt'; did you mean 'promt'?"),
        (texts(" ", "b", "c"), "'prompt' is an empty text"),
        (texts("a", None, "c"), "'chosen' must be a text or a list of messages, not null"),
        (texts("a", "b", 7), "'rejected' must be a text or a list of messages, not an int"),
        ({"prompt": "a", "chosen": [], "rejected": [NO]}, "'chosen' is an empty list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": [NO]}, "one side is a text and the other is messages"),
        ({**texts("", "b", "c"), "prompt": {}}, "'prompt' must be a text or a list of messages, not a dict"),
        (
            {"prompt": "a", "chosen": [YES], "rejected": [{"role": "bot", "content": "c"}]},
            "'rejected' has a message 1 that has the unknown role 'bot'; use one of system, user, assistant, tool",
        ),
        (
            {**texts("", "b", "c"), "prompt": [{"role": "human", "content": "a"}]},
            "'prompt' has a message 1 that has the unknown role 'human'",
        ),
        ({"prompt": "a", "chosen": ["b"], "rejected": [NO]}, "'chosen' has a message 1 that is no object with"),
        (
            {"prompt": "a", "chosen": [{**YES, "content": 3}], "rejected": [NO]},
            "'chosen' has a message 1 that has a content that is no text but an int",
        ),
        ({"prompt": "a", "chosen": [YES], "rejected": [NO, USER]}, "'rejected' ends with a message of the role 'user'"),
        ({"prompt": "a", "chosen": [USER, YES], "rejected": [NO]}, "'chosen' begins with other messages than 'prompt'"),
        ({"prompt": "a", "chosen": [YES], "rejected": [USER, NO]}, "'rejected' begins with other messages than 'prom"),
        ({**texts("", "b", "c"), "prompt": [{**USER, "content": " "}]}, "'prompt' ends with an empty message of the u"),
        ({**texts("a", "b", "c"), "margin": -1}, "'margin' (-1) must be a number that is 0 or greater"),
        ({**texts("a", "b", "c"), "margin": True}, "'margin' (True) must be a number"),
        ({**texts("a", "b", "c"), "margin": "big"}, "'margin' ('big') must be a number"),
        ({**texts("a", "b", "c"), "margin": float("nan")}, "'margin' (nan) must be a number"),
        ({**texts("a", "b", "c"), "margin": float("inf")}, "'margin' (inf) must be a number"),
        ({**texts("a", "b", "c"), "margin": [1]}, "'margin' ([1]) must be a number"),
        ({**texts("a", "b", "c"), "source": 3}, "'source' must be a text, not an int"),
    ],
)  # fmt: skip
def test_bad_rows(row: dict, problem: str):
    with pytest.raises(DataError) as error:
        keep_usable_pairs([ROWS[0], row], config())
    assert str(error.value).startswith(f"rows.jsonl: 1 bad row\n  row 2: {problem}")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": [YES], "rejected": [NO]}, "its sides hold a response only; put the prompt before it, or into a"),
        ({"chosen": [USER, YES], "rejected": [NO, NO]}, "its sides must share all messages but the last"),
        ({"chosen": [USER, YES, YES], "rejected": [USER, YES, NO]}, "what its sides share ends with the assistant's"),
        ({"chosen": [USER, USER], "rejected": [USER, NO]}, "'chosen' ends with a message of the role 'user'"),
        ({"chosen": [{**USER, "content": ""}, YES], "rejected": [{**USER, "content": ""}, NO]}, "what its sides share"),
        ({"chosen": "yes", "rejected": "no"}, "its sides have no common beginning that could be the prompt; put it"),
        ({"chosen": "nothing", "rejected": "no"}, "its sides have no common beginning"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "its sides are transcripts that do not begin with the same words of the human",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d"},
            "'rejected' ends with the words of the human; end with the assistant's response",
        ),
    ],
)
def test_bad_rows_without_a_prompt_column(row: dict, problem: str):
    with pytest.raises(DataError) as error:
        keep_usable_pairs([{"chosen": [USER, YES], "rejected": [USER, NO]}, row], config())
    assert str(error.value).startswith(f"rows.jsonl: 1 bad row\n  row 2: {problem}")


@pytest.mark.parametrize("setting", ["prompt_column", "margin_column", "source_column"])
def test_column_that_the_settings_name_and_no_row_has(setting: str):
    message = rf"^rows\.jsonl: data\.{setting}: no row has it: no column 'promt'; did you mean 'prompt'\?$"
    with pytest.raises(DataError, match=message):
        keep_usable_pairs(ROWS, config(**{setting: "promt"}))


def test_load_lists_the_first_twenty_lines(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [texts("a", "b", "c"), *[{**texts("a", "b", "c"), "margin": -n} for n in range(1, 26)]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"path": str(path)}
    assert read_preference_rows(PreferenceDataConfig(**settings, num_rows=1)) == rows[:1]
    with pytest.raises(DataError) as error:
        read_preference_rows(PreferenceDataConfig(**settings))
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: 25 bad rows"
    rule = "must be a number that is 0 or greater"
    assert lines[:-2] == [f"  line {n + 1}: 'margin' ({-n}) {rule}" for n in range(1, 21)]
    assert lines[-2:] == ["  and 5 more", "set data.skip_bad_rows=true to drop and count them"]


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> list:
    """Rows of HH-RLHF."""
    if not HH.is_file():
        pytest.skip(f"{HH} is missing")
    return read_preference_rows(PreferenceDataConfig(path=str(HH)))


def words(text: str) -> list[str]:
    return [word for word in text.split() if word not in ("Human:", "Assistant:")]


def test_real_transcripts_lose_no_pair(real: list):
    pairs, counts = parse_preferences(real, config())
    assert (counts.rows, counts.kept, counted(counts)) == (2312, 2312, {})
    for pair, row in zip(pairs, real, strict=True):
        assert pair.prompt[-1]["role"] == "user"
        prompt = [word for message in pair.prompt for word in words(message["content"])]
        assert words(row["chosen"]) == prompt + words(pair.chosen)  # every word is there, and in its place
        assert words(row["rejected"]) == prompt + words(pair.rejected)
    assert sum(not pair.chosen or not pair.rejected for pair in pairs) == 4  # the assistant says nothing
    assert sum("\n\nAssistant:" in pair.chosen + pair.rejected for pair in pairs) == 5  # goes on for the human


def test_real_transcripts_as_plain_text_are_cut_where_the_assistant_speaks(real: list):
    pairs, counts = parse_preferences(real, config(template="none"))
    assert counts.kept == 2312
    for pair, row in zip(pairs, real, strict=True):
        assert pair.prompt.endswith("\n\nAssistant:")
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
