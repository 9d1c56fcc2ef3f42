"""Accuracy and pass@k on held-out prompts, with confidence intervals."""

import torch
from jaxtyping import Bool
from torch import Tensor

from llmrl.batches import Prompts, Scores
from llmrl.functional.intervals import mean_interval, pass_at_k, wilson_interval
from llmrl.functional.streams import Purpose
from llmrl.roles import Progress, RewardFunction, RolloutEngine, Sampling
from llmrl.trainers.config import EvaluationConfig


class Evaluator:
    """Evaluates the policy on the same held-out prompts, with the same random numbers each time."""

    def __init__(
        self,
        config: EvaluationConfig,
        *,
        engine: RolloutEngine,
        reward: RewardFunction,
        prompts: Prompts,
        criterion: str,
        max_response_tokens: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.config = config
        self.engine = engine
        self.reward = reward
        self.prompts = prompts
        self.criterion = criterion
        """Part of the scores that decides what is correct."""
        self.sampling = Sampling(
            temperature=config.temperature,
            num_responses=config.num_responses,
            max_response_tokens=max_response_tokens,
            greedy=config.num_responses == 1,
            seed=seed,
            purpose=Purpose.EVALUATION,
            first_response=0,
        )
        self.progress = progress

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval/accuracy`` with ``_low`` and ``_high``, ``eval/pass_at_k`` likewise, and what else describes them."""
        num_prompts, num_responses = len(self.prompts.rows), self.config.num_responses
        self.progress.phase("evaluation", num_prompts * num_responses)
        rollout = self.engine.generate(self.prompts, self.sampling)
        scores = self.reward(rollout)
        correct = self._correct(scores, num_responses)
        values = {
            **(_with_interval("eval/accuracy", *accuracy(correct)) if len(correct) else {}),
            "eval/num_prompts": float(len(correct)),
            "eval/unscored": float(scores.total.isnan().sum()),
            "eval/response_length": float(rollout.sequences.response_lengths.double().mean()),
            "eval/finished_fraction": float(rollout.finished.double().mean()),
        }
        values |= mean_scores(scores)
        for k in self.config.pass_at if len(correct) else ():
            chances = pass_at_k(correct.sum(dim=1), num_responses, k)
            values |= _with_interval(f"eval/pass_at_{k}", *mean_interval(chances))
        return values

    def _correct(self, scores: Scores, num_responses: int) -> Bool[Tensor, "N G"]:
        """Which responses are correct, for each prompt of the criterion; one that nothing could score is not.

        A prompt that the criterion does not score and another reward does is of another task.
        """
        criterion, total = (x.view(-1, num_responses) for x in (scores.parts[self.criterion], scores.total))
        of_another_task = (criterion.isnan() & ~total.isnan()).all(dim=1)
        return (criterion > self.config.correct_above)[~of_another_task]


def mean_scores(scores: Scores) -> dict[str, float]:
    """``eval/score``, and ``eval/score/<part>`` where there are several parts: means over what could be scored."""
    parts = {f"eval/score/{name}": part for name, part in scores.parts.items()} if len(scores.parts) > 1 else {}
    named = {"eval/score": scores.per_response, **parts}
    return {name: float(score.double().nanmean()) for name, score in named.items() if not score.isnan().all()}


def accuracy(correct: Tensor) -> tuple[float, float, float]:
    """``(accuracy, low, high)`` at 95 %: Wilson's interval for one response per prompt; for several, which are not
    independent, the normal interval of the means per prompt."""
    if correct.shape[1] == 1:
        successes, trials = int(correct.sum()), len(correct)
        return successes / trials, *wilson_interval(successes, trials)
    return mean_interval(correct.double().mean(dim=1))


def _with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": max(low, 0.0), f"{name}_high": min(high, 1.0)}
