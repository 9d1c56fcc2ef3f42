"""Numbers for places in a response land on the right tokens, whatever the tokenizer, and reach what is learned from."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from llmrl.algorithms.config import GRPOConfig, PPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.algorithms.ppo import PPO
from llmrl.batches import Rollout, StopReason, TokenOutputs
from llmrl.data.chat import as_sequences
from llmrl.reports.progress import Silent
from llmrl.rewards.config import RewardConfig, RewardFunctionConfig
from llmrl.rewards.functions import FunctionReward, RewardError
from llmrl.rewards.per_token import spell_responses, token_texts

EOS = "<eos>"


def fast(model, decoder):
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def word_tokenizer():
    """A token is a word, and blanks appear between them."""
    words = [EOS, "one", "two", "three", "four"]
    return fast(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=EOS), None)


def byte_tokenizer():
    """Byte-level BPE as in GPT-2, whose tokens are single bytes, and the letter "a" with half an "é" behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [EOS, *alphabet, "aÃ"]
    return fast(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("a", "Ã")]), decoders.ByteLevel())


def sentencepiece_tokenizer():
    """As in Llama 2: a leading blank is lost, and a run of byte tokens is read as a whole or not at all."""
    pieces = [EOS, "▁one", "▁two", "é", *[f"<0x{byte:02X}>" for byte in range(256)]]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token=EOS)
    return fast(model, decoders.Sequence(steps))


TOKENIZERS = {"word": word_tokenizer(), "byte": byte_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}


def ids_of(kind, tokens):
    return [TOKENIZERS[kind].convert_tokens_to_ids(token) for token in tokens]


def spelling_of(kind, ids):
    (spelling,) = spell_responses(as_sequences([[1]], [ids]), TOKENIZERS[kind])
    return spelling


def landing(kind, tokens):
    """The text of some tokens, and for each of its offsets, its end included, the token on which a number lands."""
    spelling = spelling_of(kind, ids_of(kind, tokens))
    landed = [spelling.land([(offset, 1.0)]) for offset in range(len(spelling.text) + 1)]
    assert all(sorted(numbers) == [0.0] * (len(tokens) - 1) + [1.0] for numbers in landed)
    return spelling.text, [numbers.index(1.0) for numbers in landed]


# --- where an offset lands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tokens", "text", "landed"),
    [
        ("word", ["one", "four", EOS], "one four", [0, 0, 0, 1, 1, 1, 1, 1, 2]),
        ("word", ["one", "four"], "one four", [0, 0, 0, 1, 1, 1, 1, 1, 1]),  # cut by the limit
        ("word", [EOS], "", [0]),
        ("word", [EOS, "one", EOS, EOS], "one", [1, 1, 1, 3]),
        ("byte", [*"bcd", EOS], "bcd", [0, 1, 2, 3]),
        ("byte", [*"bÃ©c", EOS], "béc", [0, 2, 3, 4]),
        ("byte", ["aÃ", *"©c", EOS], "aéc", [0, 1, 2, 3]),
        ("byte", [*"âĤ¬ðŁĺĢb", EOS], "€😀b", [2, 6, 7, 8]),
        ("byte", [*"bðŁ"], "b\ufffd", [0, 1, 2]),  # cut within a character
        ("byte", [*"bð", EOS, "c"], "b\ufffdc", [0, 1, 3, 3]),
        ("sentencepiece", ["▁one", "▁two", EOS], "one two", [0, 0, 0, 1, 1, 1, 1, 2]),
        ("sentencepiece", ["é", "<0xE2>", "<0x82>", "<0xAC>", EOS], "é€", [0, 3, 4]),
        ("sentencepiece", ["<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "<0xAC>", "▁one"], "é€ one", [1, 4, 5, 5, 5, 5, 5]),
    ],
)
def test_an_offset_lands_on_the_token_that_completes_its_character(kind, tokens, text, landed):
    assert landing(kind, tokens) == (text, landed)


def random_ids(kind, rng):
    """Tokens at random, which with bytes spell nothing valid, or the bytes of a text at random."""
    if kind == "word" or rng.random() < 0.5:
        return [rng.randrange(len(TOKENIZERS[kind])) for _ in range(rng.randint(1, 12))]
    text = "".join(rng.choice("aé€😀 \ufffd") for _ in range(rng.randint(1, 6))).encode()
    if kind == "sentencepiece":
        return ids_of(kind, [f"<0x{byte:02X}>" for byte in text])
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return ids_of(kind, pre_tokenizer.pre_tokenize_str(text.decode())[0][0])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_it_is_the_first_token_up_to_which_the_text_is_right_up_to_the_character(kind):
    """By definition, token after token, for texts that are valid and such as are not."""
    rng = random.Random(0)
    for _ in range(100):
        spelling = spelling_of(kind, random_ids(kind, rng))
        for offset in range(len(spelling.text)):
            texts = [spelling.decode(spelling.ids[:n]) for n in range(1, len(spelling.ids) + 1)]
            right = [text[: offset + 1] == spelling.text[: offset + 1] for text in texts]
            assert spelling.land([(offset, 1.0)]).index(1.0) == right.index(True)


def test_pairs_come_in_any_order_and_add_up_on_one_token():
    spelling = spelling_of("word", ids_of("word", ["one", "four", EOS]))
    assert spelling.land([(8, 4.0), (0, 1.0), (5, 0.5), (4, -2.0), (0, 0.25)]) == [1.25, -1.5, 4.0]


def test_a_long_response_is_not_decoded_once_for_each_token():
    spelling = spelling_of("byte", ids_of("byte", ["b"] * 4096))
    decoded = []
    watched = replace(spelling, decode=lambda ids: decoded.append(ids) or "b" * len(ids))
    assert watched.land([(1000, 1.0), (1001, 2.0)])[1000:1002] == [1.0, 2.0]
    assert len(decoded) < 30


# --- what a function may give -----------------------------------------------------------------------------------------

RESPONSES = [["one", EOS], ["two", "three", "four"], [EOS]]  # texts "one", "two three four", ""


def make_rollout(responses=RESPONSES, kind="word", groups=None):
    sequences = as_sequences([[1]] * len(responses), [ids_of(kind, tokens) for tokens in responses])
    ended = torch.tensor([tokens[-1] == EOS for tokens in responses])
    return Rollout(
        sequences=sequences,
        rollout_logprobs=torch.zeros(sequences.response_ids.shape),
        stop_reason=torch.where(ended, StopReason.EOS, StopReason.LENGTH),
        group_ids=torch.tensor(groups or list(range(len(responses)))),
        rows=tuple({"prompt": f"{n}?"} for n in range(len(responses))),
    )


def score(*functions, weights=None, rollout=None, kind="word"):
    """The scores that functions give, each named rule.py:<its place>, with weight 1 or those given."""
    weights = weights or [1.0] * len(functions)
    settings = [RewardFunctionConfig(name=f"rule.py:f{i}", weight=weight) for i, weight in enumerate(weights)]
    reward = FunctionReward(
        RewardConfig(functions=tuple(settings)),
        functions=functions,
        tokenizer=TOKENIZERS[kind],
        prompt_column="prompt",
        columns=["prompt"],
        progress=Silent(),
    )
    return reward(rollout or make_rollout())


def giving(*result):
    """A function that gives this to the responses, in their order."""
    return lambda responses: list(result)


def assert_scores(scores, *, total, per_token, **parts):
    assert_close(scores.total, torch.tensor(total), equal_nan=True)
    assert_close(scores.per_token, torch.tensor(per_token))
    assert_close(scores.parts, {name: torch.tensor(part) for name, part in parts.items()}, equal_nan=True)


def test_one_number_for_each_token_of_ragged_responses():
    scores = score(giving([1.0, 2.0], [0.5, 0.0, -1.0], [4.0]))
    per_token = [[1.0, 2.0, 0.0], [0.5, 0.0, -1.0], [4.0, 0.0, 0.0]]
    assert_scores(scores, total=[0.0] * 3, per_token=per_token, f0=[3.0, -0.5, 4.0])
    assert_close(scores.per_response, torch.tensor([3.0, -0.5, 4.0]))


def test_pairs_of_offsets_into_the_responses():
    def at_each_t(responses):
        return [[(place, 0.5) for place, letter in enumerate(text) if letter == "t"] for text in responses]

    scores = score(at_each_t)
    assert_scores(scores, total=[0.0] * 3, per_token=[[0.0] * 3, [0.5, 0.5, 0.0], [0.0] * 3], f0=[0.0, 1.0, 0.0])


def test_one_function_may_give_a_number_here_and_lists_there():
    scores = score(giving(7.0, [1.0, 0.0, 0.0], [(0, 2.0)]), weights=[2.0])
    per_token = [[0.0] * 3, [2.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    assert_scores(scores, total=[14.0, 0.0, 0.0], per_token=per_token, f0=[7.0, 1.0, 2.0])


def test_functions_are_weighted_and_add_up_on_the_tokens():
    tokens, pairs, whole = giving([1.0, 0.0], [0.0] * 3, []), giving([(0, 1.0)], [], [(0, 3.0)]), giving(1.0, 2.0, 3.0)
    scores = score(tokens, pairs, whole, weights=[0.5, -2.0, 1.0])
    per_token = [[-1.5, 0.0, 0.0], [0.0] * 3, [-6.0, 0.0, 0.0]]
    parts = {"f0": [1.0, 0.0, 0.0], "f1": [1.0, 0.0, 3.0], "f2": [1.0, 2.0, 3.0]}
    assert_scores(scores, total=[1.0, 2.0, 3.0], per_token=per_token, **parts)


def test_a_function_with_nothing_to_say_leaves_the_tokens_to_the_others():
    scores = score(giving(None, None, 0.0), giving([1.0, 1.0], None, [1.0]))
    per_token = [[1.0, 1.0, 0.0], [0.0] * 3, [1.0, 0.0, 0.0]]
    parts = {"f0": [math.nan, math.nan, 0.0], "f1": [2.0, math.nan, 1.0]}
    assert_scores(scores, total=[0.0, math.nan, 0.0], per_token=per_token, **parts)


def test_a_function_without_weight_is_only_watched():
    scores = score(giving([1.0, 2.0], None, [(0, 5.0)]), giving(1.0, 1.0, [4.0]), weights=[0.0, 1.0])
    parts = {"f0": [3.0, math.nan, 5.0], "f1": [1.0, 1.0, 4.0]}
    per_token = [[0.0] * 3, [0.0] * 3, [4.0, 0.0, 0.0]]
    assert_scores(scores, total=[1.0, 1.0, 0.0], per_token=per_token, **parts)


@pytest.mark.parametrize(
    "given",
    [
        [1, 0, True],
        [np.float32(1), np.bool_(False), torch.tensor(1.0, dtype=torch.bfloat16)],
        np.array([1, 0, 1]),
        torch.tensor([1.0, 0.0, 1.0], requires_grad=True),
        [(0, 1), (14, 1.0)],
        [[0, 1.0], [10, 1.0]],
        [(np.int64(0), np.float16(1)), (torch.tensor(13), torch.tensor(1.0))],
        np.array([[0, 1], [14, 1]]),
    ],
)
def test_lists_and_numbers_of_every_kind_count(given):
    assert_close(score(giving(0.0, given, 0.0)).per_token[1], torch.tensor([1.0, 0.0, 1.0]))


def test_responses_of_one_length_may_come_as_one_tensor():
    rollout = make_rollout([["one", EOS], ["two", "three"]])
    numbers = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert_close(score(lambda responses: numbers, rollout=rollout).per_token, numbers)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0, 2.0], "a list of length 2"),
        ([1.0] * 4, "a list of length 4"),
        (torch.zeros(2), "a list of length 2"),
        ([1.0, None, 1.0], "a list with None at place 1"),
        ([1.0, 1.0, math.nan], "a list with nan at place 2"),
        ([math.inf, 1.0, 1.0], "a list with inf at place 0"),
        ([1.0, 1.0, 1e39], r"a list with 1e\+39 at place 2"),
        (["one", 1.0, 1.0], "a list with 'one' at place 0"),
        ([(15, 1.0)], r"a list with \(15, 1\.0\) at place 0"),
        ([(0, 1.0), (-1, 1.0)], r"a list with \(-1, 1\.0\) at place 1"),
        ([(0.0, 1.0)], r"a list with \(0\.0, 1\.0\) at place 0"),
        ([(True, 1.0)], r"a list with \(True, 1\.0\) at place 0"),
        ([(0, math.nan)], r"a list with \(0, nan\) at place 0"),
        ([(0, None)], r"a list with \(0, None\) at place 0"),
        ([(0, 1.0, 2.0)], r"a list with \(0, 1\.0, 2\.0\) at place 0"),
        ([[]], r"a list with \[\] at place 0"),
        ([(0, 1.0), 1.0, 1.0], r"a list with 1\.0 at place 1"),
        ([1.0, 1.0, (0, 1.0)], r"a list with 1\.0 at place 0"),
        ((0, 1.0), r"\(0, 1\.0\) \(tuple\)"),
        ({0: 1.0}, r"\{0: 1\.0\} \(dict\)"),
    ],
)
def test_anything_else_is_refused(given, said):
    with pytest.raises(RewardError) as error:
        score(giving(0.0, 0.0, 0.0), giving(0.0, given, 0.0), weights=[1.0, 0.0])
    error.match(f"^reward function rule.py:f1 returned {said} for row 1; expected a finite number, or None where ")
    assert str(error.value).endswith(
        "or a list: a finite number for each of its 3 tokens, or (offset, finite number) pairs with whole offsets from "
        "0 to 14. The row: prompt='1?'. The response: 'two three four'"
    )


# --- the tokens themselves --------------------------------------------------------------------------------------------


def test_tokens_are_texts_and_the_special_ones_names():
    assert token_texts([ids_of("word", tokens) for tokens in RESPONSES], TOKENIZERS["word"]) == RESPONSES
    assert token_texts([ids_of("byte", ["b", "Ġ", "aÃ", EOS])], TOKENIZERS["byte"]) == [["b", " ", "a\ufffd", EOS]]


def test_a_function_that_asks_for_tokens_can_give_each_a_number():
    def by_length(responses, tokens):
        return [[float(len(token)) for token in row] for row in tokens]

    assert_close(score(by_length).per_token, torch.tensor([[3.0, 5.0, 0.0], [3.0, 5.0, 4.0], [5.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (lambda responses: [0.0] * 3, False),
        (lambda responses, tokens: [0.0] * 3, True),
        (lambda responses, tokens=None: [0.0] * 3, True),
        (lambda **columns: [0.0] * 3, True),
    ],
)
def test_tokens_are_decoded_only_for_a_function_that_takes_them(monkeypatch, function, asked):
    calls = []
    monkeypatch.setattr("llmrl.rewards.functions.token_texts", lambda ids, _: calls.append(ids) or [[]] * 3)
    score(function)
    assert bool(calls) == asked


# --- what is learned from ---------------------------------------------------------------------------------------------


class Indifferent:
    """An actor and critic to whom every token is worth nothing."""

    share_trunk = False

    def logprobs(self, sequences):
        zeros = torch.zeros(sequences.response_ids.shape)
        return TokenOutputs(named={"logprobs": zeros, "entropy": zeros})

    def values(self, sequences):
        zeros = torch.zeros(sequences.response_ids.shape)
        return TokenOutputs(named={"values": zeros, "last_values": zeros[:, 0]})

    def both(self, sequences):
        return self.logprobs(sequences).merge(self.values(sequences))


BYTES = [[*"âĤ¬=1", EOS], [*"b=1"], ["1", EOS]]  # "€=1", "b=1" cut by the limit, and "1"


def digits_and_ends(responses):
    return [[(text.index("1"), 1.0), (len(text), 0.5)] for text in responses]


def test_ppo_rewards_the_very_tokens():
    rollout = make_rollout(BYTES, "byte")
    scores = score(digits_and_ends, giving(2.0, 2.0, None), weights=[0.5, 1.0], rollout=rollout, kind="byte")
    ppo = PPO(
        PPOConfig(kl_coef=0.0, gae_lambda=0.0, score_clip=0.125),
        networks=Indifferent(),
        reference=None,
        max_response_tokens=6,
        warmup_iterations=0,
        value_coef=1.0,
        one_step=False,
    )
    experience, _ = ppo.experience(rollout, scores)
    # by lambda 0 and values of 0 the return of a token is its reward; the score is clipped, and these numbers are not
    returns = [[0.0, 0.0, 0.0, 0.0, 0.5, 0.375], [0.0, 0.0, 0.875, 0.0, 0.0, 0.0], [0.5, 0.25, 0.0, 0.0, 0.0, 0.0]]
    assert_close(experience.returns, torch.tensor(returns))


def test_grpo_compares_their_sums():
    rollout = make_rollout(BYTES, "byte", groups=[3, 3, 3])
    scores = score(
        giving([(1, 1.0), (1, 2.0)], 1.0, []), giving(1.0, [0.0, 1.0, 0.0], 0.5), rollout=rollout, kind="byte"
    )
    grpo = GRPO(GRPOConfig(scale="none"), actor=Indifferent(), reference=None, max_response_tokens=6)
    experience, _ = grpo.experience(rollout, scores)
    assert_close(experience.advantages, torch.tensor([[4.0], [2.0], [0.5]]).sub(6.5 / 3).expand(3, 6))
