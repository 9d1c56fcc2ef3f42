"""Settings of the algorithms."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llmrl.functional.aggregation import Aggregation
from llmrl.paths import UserPath
from llmrl.section import Bound, Section
from llmrl.user_code import names_code

CLIPS = {"clip_low": ("clipped", "cispo"), "clip_high": ("clipped", "cispo"), "dual_clip": ("clipped",)}
"""Settings of policy losses, and the losses that read them."""
LOSSES = ("clipped", "cispo", "policy_gradient")
WITHIN_GROUP = ("mean", "leave_one_out", "optimal")
"""Baselines that compare a response with its siblings; a user's function may."""
ACROSS_GROUPS = ("none", "constant", "batch")
"""Baselines that do not ask for siblings."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Section, place="algorithm"):
    """GRPO (Shao et al. 2024, arXiv:2402.03300) and its kin: see the table at the top of grpo.py."""

    name: Literal["grpo"] | UserPath = "grpo"
    """The algorithm: grpo, or a class of your own, ``path/to/file.py:Class`` or ``package.module:Class``, which is made
    with the same arguments; see docs/extend.md."""
    group_size: Annotated[int, Bound(least=1)] = 8
    """Responses per prompt, G; 1 goes with a baseline none, constant or batch, or with one of your own."""
    baseline: Literal["mean", "leave_one_out", "optimal", "none", "constant", "batch"] | UserPath = "mean"
    """What a score is compared with. In its group: the mean of all, of the others (RLOO), or of the others weighted by
    their lengths, for the least variance (OPO). Without siblings: nothing, baseline_value, or the mean of the other
    responses of the rollout. Or what a function of your own returns, ``path/to/file.py:function``: (scores, group_ids)
    -> what is subtracted."""
    baseline_value: Annotated[float | None, Bound()] = None
    """The baseline constant, in score."""
    scale: Literal["std", "none", "batch"] = "std"
    """Divides advantages by the standard deviation of the group's scores, leaves them as they are (Dr. GRPO), or
    standardizes them over all tokens of the rollout (REINFORCE++)."""
    credit: Literal["response", "turn", "token"] = "response"
    """What is compared: whole responses, or each turn or token with those of the same number, by the rewards from there
    on. With turns, where an environment answers the actor."""
    aggregation: Aggregation = "token"
    """How token losses become one number: each token counts the same, each response does, or a constant divides
    (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or the geometric mean over the response at every token (GSPO)."""
    loss: Literal["clipped", "cispo", "policy_gradient"] | UserPath = "clipped"
    """Policy loss: the clipped surrogate, the clipped ratio as a constant weight (CISPO), the ratio without a clip
    (REINFORCE, A2C), or a function of your own, ``path/to/file.py:function``, which reads no clip: (logprobs,
    old_logprobs, advantages, weights) -> loss, or (loss, metrics)."""
    clip_low: Annotated[float, Bound(above=0, most=1)] = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: Annotated[float, Bound(above=0)] = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: Annotated[float | None, Bound(above=1)] = None
    """Bounds the loss of a token with negative advantage A at dual_clip * |A|; greater than 1; null for no bound."""
    importance: Literal["none", "truncated", "masked"] = "none"
    """Corrects for responses of another policy than the one that learns, such as stale ones or those of an engine with
    other arithmetic: weights min(ratio, cap) (TIS), or the ratio itself where it is near 1 and 0 elsewhere (IcePop).
    See docs/algorithms.md."""
    importance_level: Literal["token", "sequence"] = "token"
    """Ratio of the policy that learns to the one that sampled: of each token, or of the whole response, which has no
    bias but more variance."""
    importance_cap: Annotated[float, Bound(least=1)] = 2.0
    """truncated: the largest weight; masked: ratios above this, or below 1 over this, are not learned from."""
    kl_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight of the KL to the reference. 0 keeps no reference model, and then no kl/* is measured, unless
    model.lora is set, where a reference takes no memory."""
    kl_form: Literal["k2", "k3", "k3_paper", "k1_reward"] = "k2"
    """In the loss, k2 times the detached ratio, or k3 times the live one: both have the exact expected gradient of each
    token's KL. k3_paper: k3 alone, as the GRPO paper writes it, which has the gradient of KL(reference, policy).
    k1_reward: k1 in the reward of each token, as in PPO, RLOO and REINFORCE++."""
    reference_refresh_every: Annotated[int | None, Bound(least=1)] = None
    """Moves the reference towards the actor after every this many iterations; null keeps it where the actor began."""
    reference_mixing: Annotated[float, Bound(above=0, most=1)] = 1.0
    """Share of the actor when the reference moves: ref = mixing * actor + (1 - mixing) * ref, weight by weight. 1
    copies the actor (iterative GRPO), less averages (TR-DPO); only 1 goes with LoRA."""
    entropy_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight of the entropy bonus in the loss, aggregated as the loss is."""
    balance_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight, in the actor's loss, of the Switch loss that keeps the experts of a mixture evenly used; 0.01 in its
    paper."""
    balance_bias_rate: Annotated[float, Bound(least=0)] = 0.0
    """Moves the bias by which routers choose experts, after each optimizer step, up by this much for experts with fewer
    choices than the mean, and down for others; 0.001 in its paper. For routers that have such a bias (DeepSeek-V3)."""
    mask_truncated: bool = False
    """Leaves truncated responses out of the loss and of what it divides by; their scores still count in their group
    (DAPO's overlong filtering)."""
    overlong_buffer_tokens: Annotated[int, Bound(least=0)] = 0
    """DAPO: responses in this many tokens before the length limit lose up to 1 point; 0 for no penalty."""
    max_redraws: Annotated[int, Bound(least=0)] = 0
    """DAPO: groups of equal scores teach nothing and are replaced by groups of new prompts, at most this many times in
    an iteration; 0 keeps them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("name", self.name, "grpo")
        _check_name("baseline", self.baseline, *WITHIN_GROUP, *ACROSS_GROUPS)
        _check_name("loss", self.loss, *LOSSES)
        self._check_baseline()
        if self.ratio == "sequence" and self.aggregation != "sequence":
            raise ValueError(
                "algorithm.ratio sequence goes with algorithm.aggregation sequence: GSPO averages over responses"
            )
        _check_moving_reference(self)

    def _check_baseline(self) -> None:
        """Refuses what a baseline cannot go with."""
        if self.baseline in WITHIN_GROUP and self.group_size == 1:
            raise ValueError(
                f"algorithm.group_size (1) must be at least 2 with algorithm.baseline {self.baseline}, which compares "
                "a response with its siblings; raise it, or set algorithm.baseline to none, constant or batch"
            )
        if self.baseline != "mean" and self.scale == "std":
            raise ValueError(
                f"algorithm.baseline {self.baseline} goes with algorithm.scale none or batch: only a difference from "
                "the mean of the group is divided by its spread"
            )
        if self.baseline == "optimal" and self.credit != "response":
            raise ValueError(
                f"algorithm.baseline optimal weighs whole responses by their lengths, and algorithm.credit "
                f"({self.credit}) compares parts of them; set that to response"
            )
        if self.baseline == "constant" and self.baseline_value is None:
            raise ValueError("algorithm.baseline constant needs algorithm.baseline_value, the score that it subtracts")
        if self.baseline != "constant" and self.baseline_value is not None:
            raise ValueError(
                f"algorithm.baseline_value ({self.baseline_value}) is read where algorithm.baseline is constant, not "
                f"{self.baseline}; leave one of them out"
            )
        if self.max_redraws and (self.baseline in ACROSS_GROUPS or self.group_size == 1):
            raise ValueError(
                f"algorithm.max_redraws ({self.max_redraws}) replaces groups of equal scores, which teach nothing if "
                f"siblings are compared; algorithm.baseline {self.baseline} with {self.group_size} responses to a "
                "prompt compares none; set it to 0"
            )

    def warnings(self) -> list[str]:
        """Sentences on settings that are allowed, but seldom meant. None for a user's class: its run reports what it
        leaves unread."""
        if self.name != "grpo":
            return []
        warnings = _unread(self)
        if self.ratio == "sequence" and self.credit != "response":
            warnings.append(
                "algorithm.ratio sequence has one gradient for all tokens of a response, so of the advantages that "
                f"algorithm.credit {self.credit} gives them only the mean counts; algorithm.ratio token uses each"
            )
        if self.kl_coef > 0 and self.scale == "std" and self.kl_form != "k1_reward":
            warnings.append(
                "algorithm.kl_coef with algorithm.scale std, as by default in TRL, works, but advantages are divided "
                "by the spread of each group's scores, so a nat of KL costs another score in each group; "
                "algorithm.scale none gives it one price"
            )
        return warnings


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Section, place="algorithm"):
    """PPO (Schulman et al. 2017, arXiv:1707.06347) on language models."""

    gamma: Annotated[float, Bound(least=0, most=1)] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Bound(least=0, most=1)] = 0.95
    """Lambda of the advantages: 0 trusts the critic one token ahead, 1 waits for what really came (Schulman et al.
    2016, arXiv:1506.02438)."""
    value_lambda: Annotated[float | None, Bound(least=0, most=1)] = None
    """Lambda of the critic's targets; null takes gae_lambda. 1 gives targets without bias."""
    num_return_steps: Annotated[int | None, Bound(least=1)] = None
    """n-step returns (A2C): advantages and targets from this many rewards and the critic's value after them; null for
    the mixture of all lengths that gae_lambda makes."""
    scale: Literal["batch", "none"] = "batch"
    """Standardizes advantages over all tokens of the rollout, or leaves them as they are."""
    loss: Literal["clipped", "cispo", "policy_gradient"] | UserPath = "clipped"
    """Policy loss: the clipped surrogate, the clipped ratio as a constant weight (CISPO), the ratio without a clip
    (REINFORCE, A2C), or a function of your own, ``path/to/file.py:function``, which reads no clip: (logprobs,
    old_logprobs, advantages, weights) -> loss, or (loss, metrics)."""
    clip_low: Annotated[float, Bound(above=0, most=1)] = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: Annotated[float, Bound(above=0)] = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: Annotated[float | None, Bound(above=1)] = None
    """Bounds the loss of a token with negative advantage A at dual_clip * |A|; greater than 1; null for no bound."""
    importance: Literal["none", "truncated", "masked", "v_trace"] = "none"
    """Corrects for responses of another policy than the one that learns, such as stale ones or those of an engine with
    other arithmetic: weights min(ratio, cap) (TIS), or the ratio itself where it is near 1 and 0 elsewhere (IcePop), or
    truncated ones with V-trace targets, where the critic is corrected too. See docs/algorithms.md."""
    importance_level: Literal["token", "sequence"] = "token"
    """Ratio of the policy that learns to the one that sampled: of each token, or of the whole response, which has no
    bias but more variance."""
    importance_cap: Annotated[float, Bound(least=1)] = 2.0
    """truncated: the largest weight; masked: ratios above this, or below 1 over this, are not learned from; v_trace:
    rho bar."""
    value_clip: Annotated[float | None, Bound(above=0)] = 0.2
    """How far a value may move from the old one before the clip leaves it no gradient; null for no clip."""
    value_proximal_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight of the critic's proximal term, half the squared distance from the old values, beside its squared error:
    the trust region of Schulman et al. 2016, arXiv:1506.02438, section 5, as a penalty; 0 leaves it out."""
    entropy_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight of the entropy bonus in the actor's loss, aggregated as the loss is."""
    balance_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight, in the actor's loss, of the Switch loss that keeps the experts of a mixture evenly used; 0.01 in its
    paper."""
    balance_bias_rate: Annotated[float, Bound(least=0)] = 0.0
    """Moves the bias by which routers choose experts, after each optimizer step, up by this much for experts with fewer
    choices than the mean, and down for others; 0.001 in its paper. For routers that have such a bias (DeepSeek-V3)."""
    aggregation: Aggregation = "token"
    """How token losses become one number: each token counts the same, each response does, or a constant divides."""
    kl_coef: Annotated[float, Bound(least=0)] = 0.05
    """Price, in score, of a nat between actor and reference; the first one, if steered. 0 keeps no reference model, and
    then no kl/* is measured, unless model.lora is set, where a reference takes no memory."""
    kl_target: Annotated[float | None, Bound(above=0)] = None
    """Steers kl_coef, by a fifth at most in 10,000 responses or in one rollout, so that kl/sequence comes to this many
    nats (Ziegler et al. 2019, arXiv:1909.08593); null keeps it as it is."""
    reference_refresh_every: Annotated[int | None, Bound(least=1)] = None
    """Moves the reference towards the actor after every this many iterations; null keeps it where the actor began."""
    reference_mixing: Annotated[float, Bound(above=0, most=1)] = 1.0
    """Share of the actor when the reference moves: ref = mixing * actor + (1 - mixing) * ref, weight by weight. 1
    copies the actor (iterative GRPO), less averages (TR-DPO); only 1 goes with LoRA."""
    step_kl_target: Annotated[float | None, Bound(above=0)] = None
    """Penalizes KL(old actor, new actor) in the loss, its price steered, from 1 on, so that an iteration moves the
    actor by this many nats per token (penalized TRPO); null for no such penalty."""
    stop_kl: Annotated[float | None, Bound(above=0)] = None
    """Ends an iteration's updates after a minibatch with more KL(old, current) per token than this; null never does.
    Learning-rate schedules count the steps that were taken."""
    score_clip: Annotated[float | None, Bound(above=0)] = None
    """Scores are clipped at plus and minus this before anything else; null for no clip."""
    normalize_scores: bool = False
    """Shifts and scales scores by the mean and spread of all so far. A score further than
    1000 (1 + |mean| + spread) from the mean is clipped to that, and hardly changes either."""
    missing_eos_penalty: Annotated[float, Bound(least=0)] = 0.0
    """What is subtracted from the score of a response that did not end by itself."""
    overlong_buffer_tokens: Annotated[int, Bound(least=0)] = 0
    """Responses in this many tokens before the length limit lose up to 1 point (DAPO); 0 for no penalty."""
    bootstrap_truncated: bool = False
    """A truncated response gets the critic's value after its last token in place of a score."""
    mask_truncated: bool = False
    """Leaves truncated responses out, as if they had not been drawn: of both losses and what they divide by, and of
    the moments that standardize advantages and scores."""
    auxiliary_every: Annotated[int | None, Bound(least=1)] = None
    """Phasic policy gradient (Cobbe et al. 2020, arXiv:2009.04416): after every this many iterations, a phase that
    learns from all of them again: a value head on the actor's trunk, and the critic; null for no such phase."""
    auxiliary_epochs: Annotated[int, Bound(least=1)] = 6
    """Epochs of that phase, in minibatches of update.minibatch_size."""
    auxiliary_kl_coef: Annotated[float, Bound(least=0)] = 1.0
    """Weight, in that phase, of the KL to the actor before it, beside half the squared error of the value head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("loss", self.loss, *LOSSES)
        if self.num_return_steps is not None and self.gae_lambda != type(self).gae_lambda:
            raise ValueError(
                f"algorithm.num_return_steps ({self.num_return_steps}) takes the place of algorithm.gae_lambda "
                f"({self.gae_lambda}); set one of the two"
            )
        if self.importance == "v_trace" and self.num_return_steps is not None:
            raise ValueError(
                f"algorithm.num_return_steps ({self.num_return_steps}) has no form for algorithm.importance v_trace; "
                "set algorithm.importance to truncated, or algorithm.gae_lambda in place of the steps"
            )
        if self.importance == "v_trace" and self.importance_level == "sequence":
            raise ValueError(
                "algorithm.importance v_trace corrects token by token; set algorithm.importance_level to token, or "
                "algorithm.importance to truncated"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "algorithm.kl_target steers algorithm.kl_coef by factors, so that must not begin at 0; try 0.05"
            )
        for name in ("missing_eos_penalty", "bootstrap_truncated"):
            if self.mask_truncated and getattr(self, name):
                raise ValueError(
                    f"algorithm.{name} is about truncated responses, which algorithm.mask_truncated leaves out; set "
                    "one of the two"
                )
        _check_moving_reference(self)
        _check_auxiliary(self)
        for name in ("missing_eos_penalty", "overlong_buffer_tokens"):
            if self.bootstrap_truncated and getattr(self, name):
                raise ValueError(
                    "algorithm.bootstrap_truncated gives a truncated response a value in place of a score, from "
                    f"which algorithm.{name} could be subtracted; set that to 0 or this to false"
                )

    @property
    def group_size(self) -> int:
        """PPO has no groups; it compares a response with what the critic expected."""
        return 1

    def warnings(self) -> list[str]:
        """What is allowed, but seldom meant."""
        return _unread(self)


def _check_name(setting: str, value: str, *ours: str) -> None:
    """Refuses what is neither one of ours nor the name of code of a user."""
    if value not in ours and not names_code(value):
        listed = " or ".join(filter(None, [", ".join(ours[:-1]), ours[-1]]))
        raise ValueError(
            f"algorithm.{setting} ({value!r}) must be {listed}, or name your own: path/to/file.py:name or "
            "package.module:name"
        )


def _check_moving_reference(config: GRPOConfig | PPOConfig) -> None:
    """Refuses a reference that moves where there is none, or not with all of the actor; and a mixing that is never
    read."""
    every, mixing = config.reference_refresh_every, config.reference_mixing
    if every is not None and config.kl_coef == 0:
        raise ValueError(
            f"algorithm.reference_refresh_every ({every}) moves the reference of the KL, which algorithm.kl_coef 0 "
            "leaves out; set algorithm.kl_coef above 0, or this to null"
        )
    if every is not None and config.balance_bias_rate:
        raise ValueError(
            f"algorithm.reference_refresh_every ({every}) moves the weights of the reference, and not the bias of its "
            f"routers, which algorithm.balance_bias_rate ({config.balance_bias_rate}) moves in the actor; set this to "
            "null, or that to 0"
        )
    if every is None and mixing != 1:
        raise ValueError(
            f"algorithm.reference_mixing ({mixing}) is read when the reference moves; set "
            "algorithm.reference_refresh_every too, such as 10, or leave this out"
        )


def _check_auxiliary(config: PPOConfig) -> None:
    """Refuses settings of an auxiliary phase that never comes."""
    for name in ("auxiliary_epochs", "auxiliary_kl_coef"):
        if config.auxiliary_every is None and (value := getattr(config, name)) != getattr(PPOConfig, name):
            raise ValueError(
                f"algorithm.{name} ({value}) is read in auxiliary phases; set algorithm.auxiliary_every too, such as "
                "8, or leave this out"
            )


def _unread(config: GRPOConfig | PPOConfig) -> list[str]:
    """Settings of the loss and of the correction that are not read, and not as they are by default."""
    clips = {name: f"algorithm.loss is {' or '.join(x)}" for name, x in CLIPS.items() if config.loss not in x}
    weights = dict.fromkeys(("importance_level", "importance_cap"), "algorithm.importance is not none")
    unread = clips | (weights if config.importance == "none" else {})
    changed = {name: where for name, where in unread.items() if getattr(config, name) != getattr(type(config), name)}
    return [f"algorithm.{name} is read only where {where}" for name, where in changed.items()]
