"""Accuracy and pass@k on held-out prompts, with confidence intervals."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from llmrl.batches import Prompts, Scores
from llmrl.functional.intervals import mean_interval, pass_at_k, wilson_interval
from llmrl.functional.streams import Purpose
from llmrl.roles import Progress, RewardFunction, RolloutEngine, Sampling
from llmrl.trainers.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class PerPrompt:
    """What an evaluation measured of each prompt; NaN where nothing could be judged or scored."""

    accuracy: Float64[Tensor, " N"]
    """Share of its judged responses that are correct."""
    score: Float64[Tensor, " N"]
    """Mean score of its responses."""


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
        self.per_prompt: PerPrompt | None = None
        """Results of the last evaluation."""

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval/accuracy`` with ``_low`` and ``_high``, ``eval/pass_at_k`` likewise, and what else describes them."""
        num_prompts, num_responses = len(self.prompts.rows), self.config.num_responses
        self.progress.phase("evaluation", num_prompts * num_responses)
        rollout = self.engine.generate(self.prompts, self.sampling)
        scores = self.reward(rollout)
        failed = _failed(scores, scores.parts[self.criterion])
        kept, correct, judged = self._judged(scores, failed)
        accuracy_of_each = torch.full((num_prompts,), torch.nan, dtype=torch.float64)
        accuracy_of_each[kept] = _accuracies(correct, judged)
        score_of_each = scores.per_response.double().view(num_prompts, num_responses).nanmean(dim=1)
        self.per_prompt = PerPrompt(accuracy=accuracy_of_each, score=score_of_each)
        values = {
            **(_with_interval("eval/accuracy", *accuracy(correct, judged)) if len(correct) else {}),
            "eval/num_prompts": float(len(correct)),
            "eval/unscored": float(scores.total.isnan().sum()),
            "eval/response_length": float(rollout.sequences.response_lengths.double().mean()),
            "eval/finished_fraction": float(rollout.finished.double().mean()),
        }
        if failed.any():
            values["eval/failed"] = float(failed.sum())
        values |= mean_scores(scores)
        for k in self.config.pass_at:
            chances = _chances(correct, judged, k)
            values |= _with_interval(f"eval/pass_at_{k}", *mean_interval(chances)) if len(chances) else {}
        return values

    def _judged(
        self, scores: Scores, failed: Bool[Tensor, " B"]
    ) -> tuple[Bool[Tensor, " N"], Bool[Tensor, "M G"], Bool[Tensor, "M G"]]:
        """``(kept, correct, judged)``: the prompts that the criterion judges, and the responses to each of these. One
        that no reward scores is wrong; one on which a function failed is not judged.

        A prompt that the criterion does not score and another reward does is of another task.
        """
        num_responses = self.config.num_responses
        criterion, total, failed = (
            x.view(-1, num_responses) for x in (scores.parts[self.criterion], scores.total, failed)
        )
        of_another_task = criterion.isnan() & ~total.isnan()
        kept = ~(of_another_task | failed).all(dim=1)
        return kept, (criterion > self.config.correct_above)[kept], ~failed[kept]


def _failed(scores: Scores, criterion: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """The responses without a score by the criterion on which some function failed."""
    failed = torch.zeros_like(criterion, dtype=torch.bool)
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
    return mean_interval(_accuracies(correct, judged))


def paired_difference(before: PerPrompt, after: PerPrompt) -> dict[str, float]:
    """``difference/accuracy`` and ``difference/score``, after minus before, each with ``_low`` and ``_high`` at 95 %.

    It is the normal interval of the mean over prompts of the difference on each: of a paired comparison, for two
    evaluations of the same prompts.
    """
    values: dict[str, float] = {}
    for name in ("accuracy", "score"):
        difference = getattr(after, name) - getattr(before, name)
        known = difference[~difference.isnan()]
        if len(known):
            mean, low, high = mean_interval(known)
            values |= {f"difference/{name}": mean, f"difference/{name}_low": low, f"difference/{name}_high": high}
    return values


def _accuracies(correct: Bool[Tensor, "N G"], judged: Bool[Tensor, "N G"]) -> Float64[Tensor, " N"]:
    """Share of the judged responses to each prompt that are correct."""
    return correct.sum(dim=1).double() / judged.sum(dim=1)


def _with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": max(low, 0.0), f"{name}_high": min(high, 1.0)}
