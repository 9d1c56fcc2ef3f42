"""An algorithm from the ground up: REINFORCE (Williams 1992) with the mean of all scores so far as baseline."""

from llmrl.algorithms.policy_gradient import policy_metrics
from llmrl.batches import Experience
from llmrl.functional.masking import masked_sum
from llmrl.functional.statistics import Mean, Total
from llmrl.metrics import Metrics
from llmrl.roles import Algorithm


class Reinforce(Algorithm):
    def __init__(self, config, *, actor, reference, max_response_tokens):
        self.actor = actor
        self.aggregation = config.aggregation
        self.max_redraws = config.max_redraws
        self.max_response_tokens = max_response_tokens
        self.total, self.num = 0.0, 0

    def experience(self, rollout, scores):
        """Each response has one advantage, the same at each of its tokens; 0 if it could not be scored (NaN)."""
        outputs = self.actor.logprobs(rollout.sequences)
        known = scores.per_response[~scores.total.isnan()]
        self.total, self.num = self.total + float(known.sum()), self.num + len(known)
        advantages = (scores.per_response - self.total / max(self.num, 1)).nan_to_num()
        experience = Experience(
            rollout=rollout,
            scores=scores,
            old_logprobs=outputs.logprobs,
            advantages=advantages[:, None].expand_as(outputs.logprobs),
        )
        statistics = policy_metrics(experience, outputs.entropy)
        return experience, Metrics({**statistics, "policy/baseline": Mean(self.total, self.num)})

    def losses(self, batch, weights):
        """The loss of one microbatch: a sum, since the weights divide by what the whole optimizer step counts."""
        logprobs = self.actor.logprobs(batch.sequences).logprobs
        loss = -masked_sum(weights * batch.advantages * logprobs, batch.counted)
        yield "actor", loss, Metrics({"policy/loss": Total(loss.detach())})

    def state_dict(self):
        """What a resumed run goes on with."""
        return {"total": self.total, "num": self.num}

    def load_state_dict(self, state):
        self.total, self.num = state["total"], state["num"]
