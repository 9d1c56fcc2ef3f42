"""Rollouts that are learned from later, or again."""

import math
from dataclasses import replace

import pytest
import torch

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Episodes, Rollout, Scores, Sequences
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.trainers.checkpoint import not_finite, read_state, save_checkpoint
from llmrl.trainers.stored import StoredRollouts
from tests.algorithms import tabular

GROUP = 2


def scored(number, *, width=3, group_size=GROUP):
    """A rollout of one group whose data row has the number; its second response could not be scored."""
    mask = torch.arange(width) < torch.tensor([width, 1, 2][:group_size])[:, None]
    ids = torch.full((group_size, width), number)
    sequences = Sequences.from_rows(
        prompt_ids=ids[:, :1],
        prompt_mask=mask[:, :1],
        response_ids=ids,
        response_mask=mask,
        response_lengths=mask.sum(dim=1),
    )
    episodes = Episodes(
        turn_ends=mask.sum(dim=1, keepdim=True),
        turn_rewards=torch.zeros(group_size, 1),
        end_reward=torch.zeros(group_size),
        num_calls=torch.zeros(group_size).long(),
        num_bad_calls=torch.zeros(group_size).long(),
        failures=(None, "step", None)[:group_size],
        reasons=(None, "raised ValueError", None)[:group_size],
        openings=("a", "b", "c")[:group_size],
        messages=(({"role": "user"},), (), ())[:group_size],
    )
    rollout = Rollout(
        sequences=sequences,
        rollout_logprobs=-0.1 * ids,
        stop_reason=torch.ones(group_size).long(),
        group_ids=torch.full((group_size,), number),
        rows=({"number": number},) * group_size,
        episodes=episodes,
    )
    total = torch.tensor([1.0, math.nan, 0.0][:group_size])
    return rollout, Scores(total=total, per_token=0.0 * ids, parts={"rules.py/sum": total}, failed={"x": total.isnan()})


def learned(stored, numbers):
    """Numbers of the rollouts that are learned from when these were sampled."""
    rollout, _ = stored.exchange([scored(number) for number in numbers])
    return rollout.group_ids[::GROUP].tolist()


@pytest.mark.parametrize(
    ("staleness", "num_replayed", "first", "second"),
    [(0, 0, [0], [1]), (2, 0, [0], [1]), (0, 2, [0, 1, 2], [1, 2, 3]), (1, 1, [0, 1], [1, 2])],
)
def test_what_is_learned_from(staleness, num_replayed, first, second):
    stored = StoredRollouts(staleness=staleness, num_replayed=num_replayed)
    assert stored.num_missing == 1 + staleness + num_replayed
    num = stored.num_missing
    assert learned(stored, range(num)) == first
    assert stored.num_missing == 1
    assert learned(stored, [num]) == second


def test_rollouts_of_other_widths_are_padded_and_groups_stay_whole():
    stored = StoredRollouts(staleness=0, num_replayed=1)
    rollout, scores = stored.exchange([scored(1), scored(2, width=5)])
    assert rollout.sequences.response_mask.sum(dim=1).tolist() == [3, 1, 5, 1]
    assert rollout.group_ids.tolist() == [1, 1, 2, 2]
    assert scores.per_token.shape == (4, 5)


def test_what_waits_is_the_same_after_a_checkpoint(tmp_path):
    stored, resumed = (StoredRollouts(staleness=2, num_replayed=0) for _ in range(2))
    learned(stored, range(3))
    state = {"stored": stored.state_dict()}
    assert not_finite(state) is None  # a response without a score is no reason to refuse a checkpoint
    save_checkpoint(tmp_path / "step_000001", state, keep=None)
    resumed.load_state_dict(read_state(tmp_path / "step_000001")["stored"])
    for (ours, our_scores), (theirs, their_scores) in zip(resumed.waiting, stored.waiting, strict=True):
        assert ours.rows == theirs.rows
        assert ours.episodes.messages == theirs.episodes.messages
        assert ours.episodes.failures == theirs.episodes.failures
        assert torch.equal(ours.rollout_logprobs, theirs.rollout_logprobs)
        assert torch.equal(ours.sequences.response_mask, theirs.sequences.response_mask)
        assert our_scores.parts.keys() == their_scores.parts.keys() == {"rules.py/sum"}
        torch.testing.assert_close(our_scores.total, their_scores.total, rtol=0, atol=0, equal_nan=True)


def test_a_run_that_is_resumed_with_fewer_forgets_the_oldest_and_with_more_samples_them():
    stored = StoredRollouts(staleness=2, num_replayed=0)
    learned(stored, range(3))
    fewer, more = StoredRollouts(staleness=1, num_replayed=0), StoredRollouts(staleness=3, num_replayed=0)
    for other in (fewer, more):
        other.load_state_dict(stored.state_dict())
    assert (fewer.num_missing, more.num_missing) == (1, 2)
    assert learned(fewer, [3]) == [2]
    assert learned(more, [3, 4]) == [1]


def test_what_a_resumed_run_cannot_learn_from_is_forgotten():
    """Groups of another size, scores of other functions, or no environment: then as many are sampled as at first."""
    rollout, scores = scored(3)
    unlike = [scored(3, group_size=3), (rollout, replace(scores, parts={"rules.py/another": torch.zeros(2)}))]
    unlike.append((replace(rollout, episodes=None), scores))
    stored = StoredRollouts(staleness=1, num_replayed=1)
    for new in unlike:
        learned(stored, range(stored.num_missing))
        stored.drop_unlike(scored(4, width=5))
        assert stored.num_missing == 1
        stored.drop_unlike(new)
        assert stored.num_missing == 3


def test_an_iteration_of_which_what_waited_is_dropped_learns_from_as_much_as_others():
    """Resumed with a reward of another name, after an iteration that left two rollouts."""

    def reward_named(name):
        def reward(rollout):
            lengths = rollout.sequences.response_lengths.float()
            tokens = torch.zeros(rollout.sequences.response_ids.shape)
            return Scores(total=lengths, per_token=tokens, parts={name: lengths})

        return reward

    kind = {"staleness": 1, "num_replayed": 1}
    first, seen = trainer_of(**kind, reward=reward_named("a"))
    first.iterate()
    resumed, later = trainer_of(**kind, reward=reward_named("b"))
    resumed.load_state_dict(first.state_dict())
    for _ in range(2):
        resumed.iterate()
    groups = [set(experience.rollout.group_ids.tolist()) for experience in (*seen, *later)]
    assert [len(each) for each in groups] == [16, 16, 16]
    assert [len(groups[0] & groups[1]), len(groups[1] & groups[2])] == [0, 8]


def test_functions_that_fail_differently_after_a_resume_are_no_obstacle():
    stored = StoredRollouts(staleness=0, num_replayed=1)
    rollout, scores = scored(0)
    stored.exchange([scored(1), (rollout, replace(scores, failed={}))])  # on_error was zero, now it is exclude
    rollout, scores = stored.exchange([scored(2)])
    assert rollout.group_ids.tolist() == [0, 0, 2, 2]
    assert scores.failed == {}


def trainer_of(*, staleness=0, num_replayed=0, importance="truncated", reward=None):
    """GRPO on a table, and the group ids of every experience."""
    torch.manual_seed(0)
    actor = tabular.TabularActor(tabular.random_logits(4, 2))
    scores = {response: float(sum(response)) for response in tabular.all_responses(4, 2)}
    config = GRPOConfig(group_size=4, importance=importance)
    trainer = tabular.make_trainer(
        GRPO(config, actor=actor, reference=None, max_response_tokens=2),
        tabular.TabularEngine(actor),
        reward or tabular.reward_of(scores),
        {"actor": LocalTrainable(actor, OptimizerConfig(learning_rate=0.1), num_steps=40)},
        update={"minibatch_size": 16, "staleness": staleness, "num_replayed": num_replayed},
        prompts_per_iteration=8,
        group_size=4,
    )
    seen = []
    trainer.observe = lambda iteration, experience: seen.append(experience)
    return trainer, seen


def test_stale_responses_are_those_of_the_policy_that_many_iterations_ago():
    trainer, seen = trainer_of(staleness=2)
    policies = []
    for _ in range(5):
        policies.append(trainer.trained["actor"].module.logits.detach().clone())
        trainer.iterate()
    for iteration, experience in enumerate(seen):
        behaviour = tabular.TabularActor(policies[max(iteration - 2, 0)]).logprobs(experience.sequences).logprobs
        torch.testing.assert_close(experience.rollout.rollout_logprobs, behaviour.detach())
        current = tabular.TabularActor(policies[iteration]).logprobs(experience.sequences).logprobs
        torch.testing.assert_close(experience.old_logprobs, current.detach())


def test_each_rollout_is_learned_from_once_and_again_as_often_as_asked():
    trainer, seen = trainer_of(num_replayed=2)
    steps = trainer.trained["actor"].num_steps_done
    values = trainer.iterate().values()
    assert trainer.trained["actor"].num_steps_done - steps == 3 * 32 // 16
    assert values["tokens/sampled"] > seen[0].counted.sum().item() - 1  # the first iteration samples all three
    trainer.iterate()
    groups = [set(experience.rollout.group_ids.tolist()) for experience in seen]
    assert len(groups[0]) == len(groups[1]) == 24
    assert len(groups[0] & groups[1]) == 16


@pytest.mark.parametrize("kind", [{"staleness": 3}, {"num_replayed": 2}, {"staleness": 1, "num_replayed": 1}])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    whole, first, second = (trainer_of(**kind)[0] for _ in range(3))
    for _ in range(6):
        told = whole.iterate().values()
    for _ in range(3):
        first.iterate()
    save_checkpoint(tmp_path / "step_000003", first.state_dict(), keep=None)
    second.load_state_dict(read_state(tmp_path / "step_000003"))
    for _ in range(3):
        resumed = second.iterate().values()
    assert torch.equal(second.trained["actor"].module.logits, whole.trained["actor"].module.logits)
    for name in ("score/mean", "importance/ess", "importance/max", "policy/loss"):
        assert resumed[name] == told[name]


def test_a_failure_before_the_update_gives_back_what_waited():
    fails = []

    def reward(rollout):
        if fails:
            raise fails.pop()
        lengths = rollout.sequences.response_lengths.float()
        return Scores(total=lengths, per_token=torch.zeros(rollout.sequences.response_ids.shape), parts={})

    (broken, seen), (plain, expected) = (trainer_of(staleness=2, reward=reward) for _ in range(2))
    broken.iterate()
    fails.append(RuntimeError("it failed"))
    with pytest.raises(RuntimeError, match="it failed"):
        broken.iterate()
    assert broken.rewind()
    broken.iterate()
    for _ in range(2):
        plain.iterate()
    assert seen[-1].rollout.group_ids.tolist() == expected[-1].rollout.group_ids.tolist()
    assert torch.equal(broken.trained["actor"].module.logits, plain.trained["actor"].module.logits)


def test_without_them_nothing_waits_and_nothing_is_saved():
    trainer, _ = trainer_of()
    trainer.iterate()
    assert "stored" not in trainer.state_dict()["cursor"]
    assert not trainer.stored.waiting
