"""An algorithm that changes one thing about GRPO: it learns only from responses that are better than their group."""

from dataclasses import replace

from llmrl.algorithms.grpo import GRPO


class Successes(GRPO):
    def experience(self, rollout, scores):
        experience, metrics = super().experience(rollout, scores)
        return replace(experience, advantages=experience.advantages.clamp(min=0.0)), metrics
