"""Every metric that a run can log: its unit, its meaning, and what to look for.

A name in angle brackets stands for several: ``score/<part>`` for one metric per reward function. docs/metrics.md is
generated from this table, and tests compare it with what runs log.
"""

import re
from dataclasses import dataclass

SFT, REWARD_MODEL, CRITIC, GRPO, PPO = "sft", "reward-model", "critic", "grpo", "ppo"
OWN = "own"
"""Runs of `llmrl grpo` with a class of the user's own (`algorithm.name`)."""
BATCHES = (SFT, REWARD_MODEL, CRITIC)
ALGORITHMS = (GRPO, PPO)
"""Runs that log what the algorithms of llmrl measure."""
LOOP = (*ALGORITHMS, OWN)
"""Runs that log what the loop of reinforcement learning measures, whatever the algorithm."""

PLACEHOLDERS = {"<module>": "(actor|critic|reward_model)", "<part>": ".+", "<k>": r"\d+"}
"""Regular expression of the names or numbers that each placeholder stands for."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Description of a metric, or of a family of metrics."""

    name: str
    """Name in metrics.jsonl; ``<module>``, ``<part>`` and ``<k>`` stand for names and numbers."""
    unit: str
    meaning: str
    look_for: str = ""
    """The healthy range, or what a reader should watch."""
    runs: tuple[str, ...]
    """Kinds of runs that log it: commands, and `OWN`."""

    @property
    def is_family(self) -> bool:
        """Whether the name stands for several metrics."""
        return "<" in self.name

    def matches(self, name: str) -> bool:
        """Whether a logged name is this metric, or one of this family."""
        pattern = re.escape(self.name)
        for placeholder, names in PLACEHOLDERS.items():
            pattern = pattern.replace(re.escape(placeholder), names)
        return re.fullmatch(pattern, name) is not None


CATALOGUE: tuple[Metric, ...] = (
    Metric(
        name="loss",
        unit="nats",
        meaning="Loss of the optimizer step: per response token in supervised runs; per pair, with the pull to 0 of "
        "reward_model.center_coef, for reward models.",
        look_for="Falls. A reward model with a new head begins near ln 2 = 0.69.",
        runs=(SFT, REWARD_MODEL),
    ),
    Metric(
        name="pairs/accuracy",
        unit="fraction",
        meaning="Pairs of the batch whose chosen response scores higher; a tie counts as half.",
        look_for="Rises from 0.5; far above eval/accuracy, the pairs are memorized.",
        runs=(REWARD_MODEL,),
    ),
    Metric(
        name="pairs/margin",
        unit="score",
        meaning="Mean of chosen score - rejected score over the batch.",
        look_for="Rises with the accuracy; a margin that grows while eval/loss rises is overconfidence.",
        runs=(REWARD_MODEL,),
    ),
    Metric(
        name="score/mean",
        unit="score",
        meaning="Mean score over all responses that were drawn and could be scored: weighted parts, with rewards for "
        "single tokens; before clipping, normalization, penalties and KL.",
        look_for="Rises. Compare it with eval/score, and with kl/sequence, which is its cost.",
        runs=LOOP,
    ),
    Metric(
        name="score/std",
        unit="score",
        meaning="Population standard deviation of these scores.",
        look_for="Above 0: equal scores teach nothing.",
        runs=LOOP,
    ),
    Metric(
        name="score/unscored",
        unit="responses",
        meaning="Responses that no reward could score. They are left out of baseline, losses, counts and moments.",
        look_for="0, unless rules return None for rows of another task. Without any score in 10 iterations a run ends.",
        runs=LOOP,
    ),
    Metric(
        name="score/extreme",
        unit="responses",
        meaning="Responses whose score is further from the mean of the others than 1000 (1 + |mean| + standard "
        "deviation), and which algorithm.normalize_scores bounds. Not logged where there are none.",
        look_for="Not logged; a run warns of any.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="score/extreme_size",
        unit="score",
        meaning="The largest of these scores, without its sign.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="score/overlong_penalty",
        unit="score",
        meaning="Mean penalty on long responses, 0 or below. Only with algorithm.overlong_buffer_tokens.",
        look_for="Goes to 0 as responses get shorter.",
        runs=(GRPO,),
    ),
    Metric(
        name="score/<part>",
        unit="score",
        meaning="Mean of what one reward gave, over the responses that it could score, unweighted. A function has the "
        "name after its colon, or its whole name where another reward or metric has that; the reward model has model, "
        "an environment has environment.",
        look_for="Which reward the policy follows; one that falls while score/mean rises is being traded away.",
        runs=LOOP,
    ),
    Metric(
        name="reward/<part>/failed",
        unit="responses",
        meaning="Responses on which this function failed, which are excluded as unscored. Only with on_error: exclude.",
        look_for="A small share; a warning names what the first ones raised.",
        runs=LOOP,
    ),
    Metric(
        name="reward/mean",
        unit="score",
        meaning="Mean over responses of their summed rewards: the score after clipping, normalization and penalties, "
        "rewards for single tokens, minus kl/coef times the KL.",
        look_for="Rises; falls while score/mean rises where the KL costs more than the score brings.",
        runs=(PPO,),
    ),
    Metric(
        name="reward/std",
        unit="score",
        meaning="Population standard deviation of these sums.",
        look_for="The scale that the critic learns; score_clip or normalize_scores where it is far above 1.",
        runs=(PPO,),
    ),
    Metric(
        name="group/flat_fraction",
        unit="fraction",
        meaning="Groups whose scores are all equal: prompts that teach nothing, unless reward.combine standardized "
        "compares rewards that differ under equal sums, or algorithm.baseline is none, constant or batch. Those that "
        "were replaced count too.",
        look_for="Below 1; near 1, prompts are too easy or too hard, or the reward is too coarse.",
        runs=(GRPO, OWN),
    ),
    Metric(
        name="response/length",
        unit="tokens",
        meaning="Mean number of response tokens that the actor chose, EOS included, over all that were drawn.",
        look_for="A steady rise without a rise of eval/accuracy is a reward that pays for length.",
        runs=LOOP,
    ),
    Metric(
        name="response/length_max",
        unit="tokens",
        meaning="The longest response.",
        look_for="Below rollout.max_response_tokens; at it, responses are truncated.",
        runs=LOOP,
    ),
    Metric(
        name="response/finished_fraction",
        unit="fraction",
        meaning="Responses that ended by themselves; the others were truncated at rollout.max_response_tokens or at a "
        "limit of environment, or their environment failed.",
        look_for="Near 1. A fall is a policy that no longer ends its responses.",
        runs=LOOP,
    ),
    Metric(
        name="turn/count",
        unit="turns",
        meaning="Mean number of the actor's turns in an episode. Logged only with environment, as are all below turn, "
        "tool and environment.",
        look_for="Below environment.max_turns; at it, episodes are truncated.",
        runs=LOOP,
    ),
    Metric(
        name="turn/count_max",
        unit="turns",
        meaning="Turns of the longest episode.",
        runs=LOOP,
    ),
    Metric(
        name="turn/limit_fraction",
        unit="fraction",
        meaning="Share of the episodes that environment.max_turns ended.",
        look_for="Near 0. A limit on tokens truncated those that neither ended by themselves, as "
        "response/finished_fraction counts, nor failed.",
        runs=LOOP,
    ),
    Metric(
        name="turn/length",
        unit="tokens",
        meaning="Mean number of tokens that the actor chose in a turn, EOS included.",
        look_for="Well below environment.max_turn_tokens: a turn that it truncates ends the episode.",
        runs=LOOP,
    ),
    Metric(
        name="turn/reward",
        unit="score",
        meaning="Mean reward of a turn, as the environment gives it; that of the whole episode is not in it.",
        look_for="Rises, unless the environment rewards the end of an episode alone.",
        runs=LOOP,
    ),
    Metric(
        name="tool/calls",
        unit="calls",
        meaning="Mean number of calls of tools in an episode, those that failed or took too long included.",
        look_for="Above 0 where tools help; a fall to 0 is an actor that has given them up.",
        runs=LOOP,
    ),
    Metric(
        name="tool/failed",
        unit="fraction",
        meaning="Calls that were answered with an error, because the actor made a mistake in them. Not logged without "
        "any call.",
        look_for="Falls: the actor learns how tools are called.",
        runs=LOOP,
    ),
    Metric(
        name="environment/failed",
        unit="responses",
        meaning="Responses whose environment or tool failed, which are left out as unscored.",
        look_for="0; a warning names the first failure of each kind.",
        runs=LOOP,
    ),
    Metric(
        name="environment/failed/<part>",
        unit="responses",
        meaning="The same by what failed: start, respond, close, the name of a tool, rendering (the chat template "
        "between two turns), or process. Not logged where it did not.",
        look_for="Not logged; a run warns of any.",
        runs=LOOP,
    ),
    Metric(
        name="advantage/mean",
        unit="score",
        meaning="Mean advantage over the tokens that the losses count: before they are standardized in PPO, whose unit "
        "is the score; as they enter the loss in GRPO, in units of the group's spread with algorithm.scale std.",
        look_for="PPO: near 0 once the critic is unbiased. GRPO: above 0 where better responses are longer.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="advantage/std",
        unit="score",
        meaning="Population standard deviation of these advantages.",
        look_for="Above 0: there is something to learn. In GRPO it falls as groups become flat.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="advantage/min",
        unit="score",
        meaning="The smallest of them.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="advantage/max",
        unit="score",
        meaning="The largest of them.",
        look_for="Far above advantage/std, a few tokens set the direction of the update.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="advantage/positive_fraction",
        unit="fraction",
        meaning="Tokens whose advantage is above 0.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="policy/loss",
        unit="advantage",
        meaning="The actor's loss, mean over optimizer steps: clipped surrogate, KL and entropy terms included.",
        look_for="Near 0 by construction, and no measure of success.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="policy/clip_fraction",
        unit="fraction",
        meaning="Tokens that the clip leaves no gradient; with algorithm.loss cispo, those whose ratio it bounds. Only "
        "with algorithm.loss clipped and cispo.",
        look_for="0 to 0.2; above, the learning rate or the number of epochs is high.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="policy/approx_kl",
        unit="nats per token",
        meaning="KL(old, current) by k3, over the minibatches of the iteration.",
        look_for="0.001 to 0.1; above 1 a run warns.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="policy/ratio_max_deviation",
        unit="ratio",
        meaning="Largest |importance ratio - 1| of the iteration's first minibatch, before its step.",
        look_for="Rounding, 1e-5 in float32: two passes of the trainer over the same weights. Anything else is a bug. "
        "0 by definition where the only optimizer step of the iteration needs no second pass.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="policy/rollout_gap",
        unit="nats per token",
        meaning="Mean absolute difference of a token's log-probability in the engine and in training.",
        look_for="Rounding: below 1e-4 in float32, 0.003 to 0.006 in bfloat16. Above 0.01 and 0.1 a run warns.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="importance/mean",
        unit="ratio",
        meaning="Mean ratio of the policy that learns to the one that sampled, not corrected. This and the other "
        "importance/* only with algorithm.importance.",
        look_for="Near 1, whatever the age of the rollouts: its expectation over what was sampled is 1.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="importance/std",
        unit="ratio",
        meaning="Standard deviation of that ratio.",
        look_for="Grows with update.staleness and the learning rate.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="importance/max",
        unit="ratio",
        meaning="Largest such ratio.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="importance/ess",
        unit="fraction",
        meaning="Effective sample size of the tokens under that ratio, over their number: 1 / (1 + (std / mean)^2).",
        look_for="1 on fresh rollouts; below 0.5 half of what was sampled is lost.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="importance/clipped_fraction",
        unit="fraction",
        meaning="Share of tokens whose ratio is outside what algorithm.importance_cap allows.",
        look_for="Small; the bias of the correction is theirs.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="policy/entropy",
        unit="nats per token",
        meaning="Mean entropy of the distributions that tokens were drawn from, at rollout.temperature.",
        look_for="Falls slowly. Below 1e-4 the policy has collapsed, and a run warns.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="experts/load_max",
        unit="ratio",
        meaning="Choices of the most used expert of a layer over those of an even split, in the layer where that is "
        "largest, over the tokens learned from. Of mixtures of experts.",
        look_for="1 is even. Where it rises during training, set algorithm.balance_coef.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="experts/unused_fraction",
        unit="fraction",
        meaning="Experts, of all layers, that no token learned from chose in the iteration.",
        look_for="Stays what it was in the first iteration; with few tokens and many experts that is above 0.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="experts/balance_loss",
        unit="none",
        meaning="Switch loss: E Σ_e f_e p_e, with the shares f of the optimizer step before, the mean over layers.",
        look_for="1 is even, and before the first optimizer step it is exactly that.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="experts/agreement",
        unit="fraction",
        meaning="Pairs of a token and a layer of a mixture in which the update chooses the experts that were chosen as "
        "the token was sampled, over the first minibatch of the iteration: until its step the weights are the same.",
        look_for="1 in float32; 0.98 to 1 in bfloat16 on tiny models. Falls where rollouts are stale.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="policy/step_kl",
        unit="nats per token",
        meaning="KL(old, new) of the whole iteration, after its updates. Only with algorithm.step_kl_target.",
        look_for="Near the target.",
        runs=(PPO,),
    ),
    Metric(
        name="policy/step_kl_coef",
        unit="per nat",
        meaning="Coefficient of the penalty on that KL in this iteration.",
        look_for="Settles; at a factor of 1000 from its start, the target is out of reach.",
        runs=(PPO,),
    ),
    Metric(
        name="reference/moved",
        unit="moves",
        meaning="1 in an iteration at whose end the reference moved towards the actor, else 0. Only with "
        "algorithm.reference_refresh_every.",
        look_for="kl/* is measured from another reference in the iteration after a 1, and falls.",
        runs=LOOP,
    ),
    Metric(
        name="kl/mean",
        unit="nats per token",
        meaning="KL to the reference by k1. Only where there is a reference: kl_coef above 0, or LoRA.",
        look_for="Rises from 0 and levels off. Above 1, and above twice the entropy of the start, a run warns.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="kl/sequence",
        unit="nats per response",
        meaning="The same, summed over each response. What algorithm.kl_target steers.",
        look_for="What the rise of the score costs; compare runs at equal values.",
        runs=ALGORITHMS,
    ),
    Metric(
        name="kl/coef",
        unit="score per nat",
        meaning="KL penalty of this iteration.",
        look_for="Constant without algorithm.kl_target, else it settles.",
        runs=(PPO,),
    ),
    Metric(
        name="value/loss",
        unit="score squared",
        meaning="The critic's loss, half the squared error per token, which PPO clips, or with critic.network mtp "
        "Huber's error, mean over heads; mean over optimizer steps.",
        look_for="Falls, then follows the spread of the rewards. Above 10 times both that and its start a run warns.",
        runs=(PPO, CRITIC),
    ),
    Metric(
        name="value/mean",
        unit="score",
        meaning="Mean of the critic's values at collection, over tokens.",
        look_for="Near reward/mean with gamma 1.",
        runs=(PPO,),
    ),
    Metric(
        name="value/std",
        unit="score",
        meaning="Population standard deviation of these values.",
        look_for="Above 0: the critic distinguishes states.",
        runs=(PPO,),
    ),
    Metric(
        name="value/explained_variance",
        unit="fraction",
        meaning="1 - Var(return - value) / Var(return), at collection; of `llmrl critic` on the batch of the step.",
        look_for="1 is a perfect critic, 0 no better than a constant, below 0 worse. Rises above 0 within a few "
        "iterations; if not, raise critic.warmup_iterations or the critic's learning rate.",
        runs=(PPO, CRITIC),
    ),
    Metric(
        name="value/clip_fraction",
        unit="fraction",
        meaning="Tokens that the clip of algorithm.value_clip leaves no gradient.",
        look_for="Below 0.2; above, values are larger than the clip was meant for.",
        runs=(PPO,),
    ),
    Metric(
        name="auxiliary/value_loss",
        unit="score squared",
        meaning="Half the squared error of the value head on the actor's trunk, per token, mean over the optimizer "
        "steps of an auxiliary phase. As all of auxiliary/*, only in iterations that one follows, with "
        "algorithm.auxiliary_every.",
        look_for="Falls from phase to phase, to the order of auxiliary/critic_loss.",
        runs=(PPO,),
    ),
    Metric(
        name="auxiliary/explained_variance",
        unit="fraction",
        meaning="1 - Var(return - value) / Var(return) of that head, over all optimizer steps of the phase.",
        look_for="Rises. It stays below value/explained_variance where the trunk lacks what the critic has "
        "learned; then raise algorithm.auxiliary_epochs.",
        runs=(PPO,),
    ),
    Metric(
        name="auxiliary/kl",
        unit="nats per token",
        meaning="KL(actor before the phase, actor), estimated from the sampled tokens, mean over all optimizer steps "
        "of the phase.",
        look_for="Well below policy/approx_kl of the iterations; if not, raise algorithm.auxiliary_kl_coef.",
        runs=(PPO,),
    ),
    Metric(
        name="auxiliary/critic_loss",
        unit="score squared",
        meaning="Half the squared error of the critic, per token, mean over the optimizer steps of an auxiliary phase.",
        look_for="At or below value/loss.",
        runs=(PPO,),
    ),
    Metric(
        name="value/clamp_fraction",
        unit="fraction",
        meaning="critic.network mtp: values of all heads whose gradient critic.mtp.value_grad_clamp clamps.",
        look_for="Below 0.1; above, values leave the mean of what comes for its median: raise the clamp.",
        runs=(PPO,),
    ),
    Metric(
        name="mtp/loss",
        unit="nats",
        meaning="critic.network mtp: minus the log-probability that the heads gave to the further tokens which were "
        "sampled, mean over heads and tokens, 0 after the end of a response; mean over optimizer steps.",
        look_for="Falls, to the policy's own entropy at the least.",
        runs=(PPO,),
    ),
    Metric(
        name="<module>/learning_rate",
        unit="1",
        meaning="Learning rate of the optimizer steps, their mean. Modules are actor, critic and reward_model.",
        runs=(*BATCHES, *LOOP),
    ),
    Metric(
        name="<module>/grad_norm",
        unit="loss per weight",
        meaning="Global norm of the gradient before clipping, mean over the optimizer steps that were not skipped.",
        look_for="Steady, and mostly below optimizer.max_grad_norm.",
        runs=(*BATCHES, *LOOP),
    ),
    Metric(
        name="<module>/grad_norm_max",
        unit="loss per weight",
        meaning="The largest of these norms.",
        look_for="Spikes far above the mean come from single minibatches.",
        runs=(*BATCHES, *LOOP),
    ),
    Metric(
        name="<module>/skipped_steps",
        unit="optimizer steps",
        meaning="Optimizer steps skipped because the gradient was not finite.",
        look_for="0; a run warns of others, and ends after five in a row.",
        runs=(*BATCHES, *LOOP),
    ),
    Metric(
        name="eval/accuracy",
        unit="fraction",
        meaning="Held-out responses with more than evaluation.correct_above from the first reward; for reward models, "
        "held-out pairs whose chosen response scores higher, a tie as half.",
        look_for="Rises. Below the interval of the start a run warns.",
        runs=(REWARD_MODEL, *LOOP),
    ),
    Metric(
        name="eval/accuracy_low",
        unit="fraction",
        meaning="Lower end of its 95 % confidence interval.",
        runs=(REWARD_MODEL, *LOOP),
    ),
    Metric(
        name="eval/accuracy_high",
        unit="fraction",
        meaning="Upper end of its 95 % confidence interval.",
        runs=(REWARD_MODEL, *LOOP),
    ),
    Metric(
        name="eval/loss",
        unit="nats",
        meaning="The loss on held-out data: per response token, or per pair. Of `llmrl critic`: value/loss.",
        look_for="Falls. 5 % above the start a run warns.",
        runs=BATCHES,
    ),
    Metric(
        name="eval/explained_variance",
        unit="fraction",
        meaning="value/explained_variance on held-out responses.",
        look_for="Rises, and stays near value/explained_variance: below that the critic learns responses by heart.",
        runs=(CRITIC,),
    ),
    Metric(
        name="eval/pass_at_<k>",
        unit="fraction",
        meaning="Held-out prompts that k sampled responses would solve, for every k of evaluation.pass_at.",
        look_for="If accuracy rises and this falls, the policy answers with less variety.",
        runs=LOOP,
    ),
    Metric(
        name="eval/pass_at_<k>_low",
        unit="fraction",
        meaning="Lower end of its 95 % confidence interval.",
        runs=LOOP,
    ),
    Metric(
        name="eval/pass_at_<k>_high",
        unit="fraction",
        meaning="Upper end of its 95 % confidence interval.",
        runs=LOOP,
    ),
    Metric(
        name="eval/score",
        unit="score",
        meaning="Mean score of the held-out responses that could be scored.",
        look_for="Rises with score/mean; if it does not, the prompts are memorized.",
        runs=LOOP,
    ),
    Metric(
        name="eval/score/<part>",
        unit="score",
        meaning="Mean of what one reward gave to them, unweighted. Only where there are several.",
        runs=LOOP,
    ),
    Metric(
        name="eval/num_prompts",
        unit="prompts",
        meaning="Held-out prompts that the accuracy is over: those that the first reward is for.",
        look_for="Constant.",
        runs=LOOP,
    ),
    Metric(
        name="eval/unscored",
        unit="responses",
        meaning="Held-out responses that no reward could score.",
        look_for="0.",
        runs=LOOP,
    ),
    Metric(
        name="eval/failed",
        unit="responses",
        meaning="Held-out responses that the accuracy leaves out, as a function failed on them. Only where there are "
        "some, with on_error: exclude.",
        look_for="None: the accuracy of an evaluation with some is over other responses than that of the others.",
        runs=LOOP,
    ),
    Metric(
        name="eval/response_length",
        unit="tokens",
        meaning="Mean number of tokens of the held-out responses that the model chose, EOS included.",
        runs=LOOP,
    ),
    Metric(
        name="eval/finished_fraction",
        unit="fraction",
        meaning="Held-out responses that ended by themselves.",
        look_for="Near 1; answers that are truncated are mostly wrong.",
        runs=LOOP,
    ),
    Metric(
        name="eval/turns",
        unit="turns",
        meaning="Mean number of the actor's turns in held-out episodes. Only with environment, like eval/tool_calls.",
        runs=LOOP,
    ),
    Metric(
        name="eval/tool_calls",
        unit="calls",
        meaning="Mean number of calls of tools in them.",
        runs=LOOP,
    ),
    Metric(
        name="tokens/sampled",
        unit="tokens",
        meaning="Response tokens that were drawn, in groups that were replaced too, over all ranks.",
        runs=LOOP,
    ),
    Metric(
        name="tokens/per_s",
        unit="tokens per second",
        meaning="tokens/sampled over time/iteration_s: sampling, scoring and updates together, over all ranks.",
        look_for="The speed of a run of reinforcement learning; time/* shows where the time goes.",
        runs=LOOP,
    ),
    Metric(
        name="tokens/trained_per_s",
        unit="tokens per second",
        meaning="Prompt and response tokens of the batch over time/iteration_s, over all ranks; of a pair the prompt "
        "counts twice. Padding does not count.",
        look_for="The speed of a run on batches of data.",
        runs=BATCHES,
    ),
    Metric(
        name="time/iteration_s",
        unit="seconds",
        meaning="The whole iteration, without evaluation and checkpoint.",
        runs=(*BATCHES, *LOOP),
    ),
    Metric(
        name="time/rollout_s",
        unit="seconds",
        meaning="Sampling, in redraws too.",
        look_for="Usually the largest part.",
        runs=LOOP,
    ),
    Metric(
        name="time/reward_s",
        unit="seconds",
        meaning="Reward functions and reward model.",
        look_for="Small; a slow judge shows here.",
        runs=LOOP,
    ),
    Metric(
        name="time/logprobs_s",
        unit="seconds",
        meaning="Log-probabilities of actor and reference as far as they are needed before the update, values, "
        "advantages.",
        runs=LOOP,
    ),
    Metric(
        name="time/update_s",
        unit="seconds",
        meaning="Optimizer steps.",
        runs=LOOP,
    ),
)


def find(name: str) -> Metric | None:
    """The entry of a logged name; None where there is none. An entry of its own takes precedence over a family."""
    matching = [metric for metric in CATALOGUE if metric.matches(name)]
    return min(matching, key=lambda metric: metric.is_family, default=None)


def reserved(family: str) -> frozenset[str]:
    """Names that no member of a family may have, because another metric is logged under them.

    For ``score/<part>``: mean, std, ...
    """
    (entry,) = (metric for metric in CATALOGUE if metric.name == family)
    start, _, _ = family.partition("<")
    others = (metric.name for metric in CATALOGUE if not metric.is_family and entry.matches(metric.name))
    return frozenset(name.removeprefix(start) for name in others)
