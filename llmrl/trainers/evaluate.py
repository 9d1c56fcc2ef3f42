"""Accuracy and pass@k on held-out prompts, with confidence intervals."""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from llmrl.batches import Prompts, Rollout, Scores, fingerprint
from llmrl.functional.intervals import mean_interval, pass_at_k, wilson_interval
from llmrl.functional.streams import Purpose
from llmrl.roles import Progress, RewardFunction, RolloutEngine, Sampling
from llmrl.trainers.comparison import Evaluation
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

    def evaluate(self) -> dict[str, float]:
        """``eval/accuracy`` with ``_low`` and ``_high``, ``eval/pass_at_k`` likewise, and what else describes them."""
        return self.measure().values

    @torch.no_grad()
    def measure(self) -> Evaluation:
        """What `evaluate` returns, with the means of each prompt, by which evaluations are compared in pairs."""
        num_prompts, num_responses = len(self.prompts.rows), self.config.num_responses
        self.progress.phase("evaluation", num_prompts * num_responses)
        rollout = self.engine.generate(self.prompts, self.sampling)
        scores = self.reward(rollout)
        failed = _failed(rollout, scores, scores.parts[self.criterion])
        correct, judged, kept = self._judged(scores, failed)
        values = {
            **(_with_interval("eval/accuracy", *accuracy(correct, judged)) if len(correct) else {}),
            "eval/num_prompts": float(len(correct)),
            "eval/unscored": float(scores.total.isnan().sum()),
            "eval/response_length": float(rollout.num_chosen.double().mean()),
            "eval/finished_fraction": float(rollout.finished.double().mean()),
        }
        if rollout.episodes is not None:
            values["eval/turns"] = float(rollout.episodes.num_turns.double().mean())
            values["eval/tool_calls"] = float(rollout.episodes.num_calls.double().mean())
        if failed.any():
            values["eval/failed"] = float(failed.sum())
        values |= mean_scores(scores)
        for k in self.config.pass_at:
            chances = _chances(correct, judged, k)
            values |= _with_interval(f"eval/pass_at_{k}", *mean_interval(chances)) if len(chances) else {}
        rates = torch.full((num_prompts,), math.nan, dtype=torch.float64, device=correct.device)
        rates[kept] = correct.sum(dim=1).double() / judged.sum(dim=1)
        mean_score = scores.per_response.view(num_prompts, num_responses).double().nanmean(dim=1)
        return Evaluation(
            values=values,
            num_responses=num_responses,
            prompts=tuple(fingerprint([row]) for row in self.prompts.rows),
            means={"eval/accuracy": rates, "eval/score": mean_score},
        )

    def _judged(
        self, scores: Scores, failed: Bool[Tensor, " B"]
    ) -> tuple[Bool[Tensor, "M G"], Bool[Tensor, "M G"], Bool[Tensor, " N"]]:
        """``(correct, judged, kept)``: of the responses to each prompt of the criterion, which prompts are `kept`. One
        that no reward scores is wrong; one on which a function failed is not judged.

        A prompt that the criterion does not score and another reward does is of another task.
        """
        num_responses = self.config.num_responses
        criterion, total, failed = (
            x.view(-1, num_responses) for x in (scores.parts[self.criterion], scores.total, failed)
        )
        of_another_task = criterion.isnan() & ~total.isnan()
        kept = ~(of_another_task | failed).all(dim=1)
        return (criterion > self.config.correct_above)[kept], ~failed[kept], kept


def _failed(rollout: Rollout, scores: Scores, criterion: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """The responses without a score by the criterion on which some function, or their environment, failed."""
    failed = torch.zeros_like(criterion, dtype=torch.bool)
    if rollout.episodes is not None:
        failed |= rollout.episodes.failed
    for each in scores.failed.values():
        failed |= each
    return failed & criterion.isnan()


def _chances(correct: Bool[Tensor, "N G"], judged: Bool[Tensor, "N G"], k: int) -> Float64[Tensor, " M"]:
    """pass@k of the prompts with at least k responses that are judged."""
    num_correct, num_judged = correct.sum(dim=1), judged.sum(dim=1)
    nums = [num for num in num_judged.unique().tolist() if num >= k]
    chances = [pass_at_k(num_correct[num_judged == num], num, k) for num in nums]
    return torch.cat(chances) if chances else torch.empty(0, dtype=torch.float64)


def mean_scores(scores: Scores) -> dict[str, float]:
    """``eval/score``, and ``eval/score/<part>`` where there are several parts: means over what could be scored."""
    parts = {f"eval/score/{name}": part for name, part in scores.parts.items()} if len(scores.parts) > 1 else {}
    named = {"eval/score": scores.per_response, **parts}
    return {name: float(score.double().nanmean()) for name, score in named.items() if not score.isnan().all()}


def accuracy(correct: Bool[Tensor, "N G"], judged: Bool[Tensor, "N G"]) -> tuple[float, float, float]:
    """``(accuracy, low, high)`` at 95 %: Wilson's interval for one response per prompt; for several, which are not
    independent, the normal interval of the means per prompt."""
    if correct.shape[1] == 1:
        successes, trials = int(correct.sum()), len(correct)
        return successes / trials, *wilson_interval(successes, trials)
    return mean_interval(correct.sum(dim=1).double() / judged.sum(dim=1))


def _with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": max(low, 0.0), f"{name}_high": min(high, 1.0)}
