"""Makes the review data: short reviews with a hidden truth, how warm a text is, and pairs that prefer the warmer one.

    python data/reviews/generate.py [--out data/reviews]

The same files every time. README.md beside this file says what they are for. `warmth` scores any text, so that what a
reward model learned from the pairs can be held against the truth.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SEED = 20260102
NUM_TRAIN = 16000
NUM_TEST = 1000
NUM_DEMONSTRATIONS = 4000
NUM_TEST_PROMPTS = 60
MAX_CHARACTERS = 60
LEAST_GAP = 0.4  # in warmth, between the two reviews of a pair
FACT_SHARE = 0.3  # of the clauses, which say nothing of how it was
BUT_SHARE = 0.25  # of the reviews: two opinions, of which the second weighs more

PARTS = {
    "cafe": ["tea", "cake", "coffee", "soup", "bread", "waiter", "menu"],
    "film": ["plot", "cast", "music", "ending", "script", "hero", "opening"],
    "book": ["plot", "style", "cover", "ending", "hero", "preface", "opening"],
    "hotel": ["room", "bed", "view", "staff", "lobby", "porter", "bath"],
    "museum": ["guide", "hall", "garden", "tour", "shop", "lighting", "kiosk"],
    "concert": ["singer", "band", "sound", "hall", "opening", "finale", "organ"],
    "park": ["lake", "path", "lawn", "kiosk", "bridge", "pond", "view"],
    "play": ["plot", "cast", "stage", "ending", "script", "hero", "lighting"],
}
ADJECTIVES = ["old", "new", "little", "corner", "famous", "other", "second", "usual"]
PLACES = ["", " by the sea", " in town", " near us", " at noon", " on the hill", " last may"]

WARM = {
    "lovely": 2, "superb": 2, "great": 2, "wonderful": 2, "delightful": 2, "splendid": 2,
    "charming": 1.5, "tender": 1.5, "graceful": 1.5, "cheerful": 1.5,
    "pleasant": 1, "good": 1, "nice": 1, "fresh": 1, "bright": 1, "friendly": 1,
}  # fmt: skip
COLD = {
    "awful": -2, "horrid": -2, "dire": -2, "dreadful": -2, "terrible": -2, "wretched": -2,
    "tiresome": -1.5, "dreary": -1.5, "careless": -1.5, "lifeless": -1.5,
    "mediocre": -1, "poor": -1, "dull": -1, "stale": -1, "clumsy": -1, "tasteless": -1,
}  # fmt: skip
NEUTRAL = ["small", "large", "long", "short", "modern", "wide", "ordinary", "green", "blue"]
WARM_DEEDS = {"loved": 2, "adored": 2, "enjoyed": 1.5, "liked": 1, "admired": 1.5}  # we ... the part
COLD_DEEDS = {"hated": -2, "loathed": -2, "regretted": -1.5, "disliked": -1, "resented": -1.5}
WARM_EFFECTS = {"delighted": 2, "charmed": 1.5, "cheered": 1.5, "pleased": 1, "moved": 1}  # the part ... us
COLD_EFFECTS = {"appalled": -2, "bored": -1.5, "annoyed": -1.5, "tired": -1, "upset": -1}
WARM_THINGS = {"joy": 2, "treat": 1.5, "gem": 2, "pleasure": 1.5}  # what a ...
COLD_THINGS = {"mess": -2, "bore": -1.5, "chore": -1.5, "letdown": -2}
FEELINGS = {
    word: feeling
    for words in (WARM, COLD, WARM_DEEDS, COLD_DEEDS, WARM_EFFECTS, COLD_EFFECTS, WARM_THINGS, COLD_THINGS)
    for word, feeling in words.items()
}
DEGREES = {"very": 1.5, "truly": 1.5, "so": 1.5, "fairly": 0.5, "slightly": 0.5, "somewhat": 0.5}
NEGATIONS = ["not", "never", "hardly"]
FACTS = [
    "we came on monday", "it took an hour", "there were two of us", "it cost ten euros", "it opens at nine",
    "we sat outside", "it was not far", "we had not booked", "it rained a bit", "we went alone",
    "it was never full", "we left at six", "a friend came too", "it is not new", "we paid by card",
]  # fmt: skip

WORD = re.compile(r"[a-z]+")
CLAUSE_END = re.compile(r"[^a-z\s]+|\bbut\b|\band\b")


def warmth(text: str) -> float:
    """The hidden truth: how warm any text is, from below -1 for cold nonsense to 1.

    A clause is as warm as its first word of feeling, by half more or half less where a word of degree stands before it
    and minus half of that where one of the three words before it denies it. In a sentence with "but", what comes first
    counts half. The sum over the clauses is squashed by tanh(sum / 2).

    From that goes the share of the words that are wasted: strange to the vocabulary of the reviews, a feeling that was
    there before, or a second feeling in a clause. So piling up warm words, as a policy does that maximizes a learned
    reward too well, gains nothing.
    """
    words = WORD.findall(text.lower())
    if not words:
        return 0.0
    seen: set[str] = set()
    total, num_wasted = 0.0, 0
    for clause, weight in _clauses(text.lower()):
        feeling, wasted = _clause_feeling(clause, seen)
        total += weight * feeling
        num_wasted += wasted
    return math.tanh(total / 2) - num_wasted / len(words)


def true_warmth(responses: Sequence[str]) -> list[float]:
    """`warmth` as a reward function of a recipe: data/reviews/generate.py:true_warmth."""
    return [warmth(response) for response in responses]


def _clauses(text: str) -> Iterator[tuple[list[str], float]]:
    """The words of each clause, and how much it counts."""
    for sentence in re.split(r"[.!?\n]", text):
        before, but, after = sentence.partition(" but ")
        for part, weight in ((before, 0.5 if but else 1.0), (after, 1.0)):
            for clause in CLAUSE_END.split(part):
                yield WORD.findall(clause), weight


def _clause_feeling(words: list[str], seen: set[str]) -> tuple[float, int]:
    """``(feeling, number of wasted words)`` of one clause; adds its words of feeling to those seen."""
    value, num_wasted, has_feeling = 0.0, 0, False
    for n, word in enumerate(words):
        if word not in FEELINGS:
            num_wasted += word not in VOCABULARY
        elif word in seen or has_feeling:
            num_wasted += 1
        else:
            has_feeling = True
            before = words[max(n - 3, 0) : n]
            value = FEELINGS[word] * DEGREES.get(before[-1] if before else "", 1.0)
            value *= -0.5 if any(negation in before for negation in NEGATIONS) else 1.0
        seen |= {word} & FEELINGS.keys()
    return value, num_wasted


def opinion(part: str, rng: random.Random) -> str:
    """A clause about one part of what is reviewed; warm, cold or neither."""
    adjective = rng.choice([*WARM, *COLD, *NEUTRAL])
    degree, negation = rng.choice(list(DEGREES)), rng.choice(NEGATIONS)
    templates = {
        f"the {part} was {adjective}": 4,
        f"{adjective} {part}": 2,
        f"we found the {part} {adjective}": 2,
        f"the {part} was {degree} {adjective}": 3,
        f"{degree} {adjective} {part}": 1,
        f"the {part} was {negation} {adjective}": 4,
        f"the {part} was not {degree} {adjective}": 1,
        f"we {rng.choice([*WARM_DEEDS, *COLD_DEEDS])} the {part}": 2,
        f"we never {rng.choice([*WARM_DEEDS, *COLD_DEEDS])} the {part}": 1,
        f"the {part} {rng.choice([*WARM_EFFECTS, *COLD_EFFECTS])} us": 2,
        f"the {part} hardly {rng.choice([*WARM_EFFECTS, *COLD_EFFECTS])} us": 1,
        f"what a {rng.choice([*WARM_THINGS, *COLD_THINGS])}, the {part}": 1,
    }
    return rng.choices(list(templates), weights=list(templates.values()))[0]


def draw_review(kind: str, rng: random.Random) -> str:
    """One to three clauses that fit the limit and say nothing twice."""
    while True:
        opinions = [opinion(part, rng) for part in rng.sample(PARTS[kind], 3)]
        if rng.random() < BUT_SHARE:
            sentences = [f"{opinions[0]} but {opinions[1]}"]
        else:
            count = rng.randint(1, 3)
            sentences = [rng.choice(FACTS) if rng.random() < FACT_SHARE else text for text in opinions[:count]]
        text = ". ".join(sentences) + "."
        words = WORD.findall(text)
        repeats = len(set(sentences)) < len(sentences) or any(words.count(word) > 1 for word in FEELINGS)
        if len(text) <= MAX_CHARACTERS and not repeats:
            return text


def kind_of(prompt: str) -> str:
    """What a prompt asks to review."""
    return next(word for word in WORD.findall(prompt) if word in PARTS)


def draw_pair(prompt: str, rng: random.Random) -> dict[str, str | float]:
    """Two reviews of a prompt, the warmer one preferred."""
    while True:
        one, other = draw_review(kind_of(prompt), rng), draw_review(kind_of(prompt), rng)
        gap = warmth(one) - warmth(other)
        if abs(gap) >= LEAST_GAP:
            chosen, rejected = (one, other) if gap > 0 else (other, one)
            margin = round(abs(gap), 3)
            return {
                "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin, "source": kind_of(prompt)
            }  # fmt: skip


def draw_pairs(prompts: Sequence[str], count: int, rng: random.Random) -> list[dict[str, str | float]]:
    """Distinct pairs, the prompts in turn."""
    pairs: dict[tuple, dict[str, str | float]] = {}
    while len(pairs) < count:
        pair = draw_pair(prompts[len(pairs) % len(prompts)], rng)
        pairs[pair["prompt"], pair["chosen"], pair["rejected"]] = pair
    return list(pairs.values())


def draw_prompts(rng: random.Random) -> list[str]:
    """Every prompt once, shuffled."""
    prompts = [f"the {adjective} {kind}{place}:" for adjective in ADJECTIVES for kind in PARTS for place in PLACES]
    rng.shuffle(prompts)
    return prompts


def _vocabulary() -> frozenset[str]:
    parts = [part for names in PARTS.values() for part in names]
    plain = "the was we found never hardly not us what a but and i it were is"
    texts = [*FACTS, *PARTS, *parts, *NEUTRAL, *DEGREES, *NEGATIONS, *FEELINGS, *ADJECTIVES, *PLACES, plain]
    return frozenset(WORD.findall(" ".join(texts)))


VOCABULARY = _vocabulary()


def write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the review data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    prompts = draw_prompts(rng)
    test, train = prompts[:NUM_TEST_PROMPTS], prompts[NUM_TEST_PROMPTS:]
    write(out / "test.jsonl", draw_pairs(test, NUM_TEST, rng))
    write(out / "train.jsonl", draw_pairs(train, NUM_TRAIN, rng))
    write(out / "prompts.jsonl", [{"prompt": prompt} for prompt in train])
    chosen = [train[n % len(train)] for n in range(NUM_DEMONSTRATIONS)]
    write(out / "sft.jsonl", [{"prompt": prompt, "response": draw_review(kind_of(prompt), rng)} for prompt in chosen])


if __name__ == "__main__":
    main()
