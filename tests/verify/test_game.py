import itertools

import pytest
import torch

from llmrl.verify.game import (
    EOS,
    LENGTHS,
    RESPONSE_IDS,
    RESPONSE_MASK,
    STATES,
    TableCritic,
    TablePolicy,
    enumeration,
    make_game,
    moved,
    population,
    probabilities,
    with_exact_critic,
)

GAME = make_game(kl_coef=0.3)


def probability(logits, response):
    """Of a response, token by token."""
    state, product = 0, 1.0
    for token in response:
        product *= float(logits[state].softmax(0)[token])
        state = 3 * state + 1 + token
    return product


def responses():
    rows = zip(RESPONSE_IDS.tolist(), LENGTHS.tolist(), strict=True)
    return [tuple(ids[:length]) for ids, length in rows]


def test_responses_end_with_eos_or_at_the_limit():
    wanted = {(0,), (1, 0), (2, 0)} | {(a, b, c) for a, b, c in itertools.product((1, 2), (1, 2), (0, 1, 2))}
    assert set(responses()) == wanted
    assert len(responses()) == len(wanted) == 15
    assert int(RESPONSE_MASK.sum()) == 1 + 2 * 2 + 12 * 3
    assert EOS == 0


def test_probabilities_are_products_over_tokens_and_sum_to_one():
    logits = moved(GAME.sampler, by=1.0, seed=5)
    by_hand = torch.tensor([[probability(table, response) for response in responses()] for table in logits])
    torch.testing.assert_close(probabilities(logits), by_hand.double())
    torch.testing.assert_close(probabilities(logits).sum(1), torch.ones(2, dtype=torch.float64))


def test_the_sampler_is_made_of_quarters():
    counts = probabilities(GAME.sampler) * 64
    torch.testing.assert_close(counts, counts.round())
    assert counts.min() >= 1


def test_a_state_is_all_tokens_so_far():
    prefixes = {}
    for row, response in enumerate(responses()):
        for t in range(len(response) + 1):
            assert prefixes.setdefault(int(STATES[row, t]), response[:t]) == response[:t]


def test_the_gradient_is_the_slope_of_the_objective():
    gradient, table = GAME.gradient(), GAME.current
    step = torch.zeros_like(table)
    step[1, 2, 1] = 1e-5
    slope = (GAME.objective(table + step) - GAME.objective(table - step)) / 2e-5
    assert float(slope) == pytest.approx(float(gradient[1, 2, 1]), abs=1e-9)
    assert abs(float(slope)) > 1e-3


def test_no_policy_is_better_than_the_optimum():
    best = float(
        (GAME.kl_coef * (probabilities(GAME.reference) * (GAME.scores / GAME.kl_coef).exp()).sum(1).log()).mean()
    )
    optimum = GAME.optimum()
    log_ratio = optimum.log() - probabilities(GAME.reference).log()
    assert float((optimum * (GAME.scores - GAME.kl_coef * log_ratio)).sum(1).mean()) == pytest.approx(best)
    assert all(float(GAME.objective(moved(GAME.reference, by=0.5, seed=seed))) < best for seed in range(5))


def test_exact_values_are_means_of_what_is_still_to_come():
    values = GAME.exact_values()
    assert float(values[:, 0].mean()) == pytest.approx(float(GAME.objective(GAME.old)))
    state = 3 * (3 * 0 + 1 + 1) + 1 + 1  # after the tokens 1 and 1
    logprobs, reference = (table[0, state].log_softmax(0) for table in (GAME.old, GAME.reference))
    scores = GAME.scores[0, [responses().index((1, 1, last)) for last in range(3)]]
    wanted = (logprobs.exp() * (scores - 0.3 * (logprobs - reference))).sum()
    assert float(values[0, state]) == pytest.approx(float(wanted))
    ends = STATES.gather(1, LENGTHS[:, None])
    assert (with_exact_critic(GAME).old_values[:, ends] == 0).all()


def test_in_a_population_groups_are_as_frequent_as_they_are_likely():
    draws = population(GAME, 2)
    first = draws.rollout.sequences.response_ids.view(2, 64 * 64, 2, 3)
    wanted = probabilities(GAME.sampler)
    for n, y, z in ((0, 0, 0), (1, 3, 7), (0, 14, 2)):
        same = (first[n] == torch.stack([RESPONSE_IDS[y], RESPONSE_IDS[z]])).all(2).all(1)
        assert float(same.double().mean()) == pytest.approx(float(wanted[n, y] * wanted[n, z]))
    assert draws.rollout.group_ids.tolist() == [row // 2 for row in range(2 * 64 * 64 * 2)]


def test_an_enumeration_counts_groups_by_their_probability():
    draws = enumeration(GAME, 2)
    mean = (draws.frequency * draws.scores.total).sum() / draws.frequency.sum()
    assert float(mean) == pytest.approx(float((probabilities(GAME.sampler) * GAME.scores).sum(1).mean()))


def test_tables_answer_as_the_roles_promise():
    rollout = population(GAME, 1).rollout
    mask, ids = rollout.sequences.response_mask, rollout.sequences.response_ids
    outputs = TablePolicy(GAME.sampler, off_mask=torch.nan).logprobs(rollout.sequences)
    torch.testing.assert_close(outputs.logprobs[mask], rollout.rollout_logprobs[mask])
    assert outputs.logprobs[~mask].isnan().all()
    values = TableCritic(GAME.values).values(rollout.sequences)
    row = int((ids == torch.tensor([1, 0, 0])).all(1).nonzero()[0])
    assert values.values[row].tolist() == [float(GAME.values[0, 0]), float(GAME.values[0, 2]), 0.0]
    assert float(values.last_values[row].detach()) == float(GAME.values[0, 7])
