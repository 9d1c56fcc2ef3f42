"""Settings of the algorithms."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llmrl.functional.aggregation import Aggregation
from llmrl.paths import UserPath
from llmrl.section import Bound, Section
from llmrl.user_code import names_code

CLIPS = ("clip_low", "clip_high", "dual_clip")
"""Settings of the clipped policy loss."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Section, place="algorithm"):
    """GRPO (Shao et al. 2024, arXiv:2402.03300) and its kin: see the table at the top of grpo.py."""

    name: Literal["grpo"] | UserPath = "grpo"
    """The algorithm: grpo, or a class of your own, ``path/to/file.py:Class`` or ``package.module:Class``, which is made
    with the same arguments; see docs/extend.md."""
    group_size: Annotated[int, Bound(least=2, why="a response is compared with its siblings")] = 8
    """Responses per prompt, G."""
    baseline: Literal["mean", "leave_one_out"] | UserPath = "mean"
    """What a score is compared with: the mean of its whole group, or of the other responses of its group (RLOO), or
    what a function of your own returns, ``path/to/file.py:function``: (scores, group_ids) -> what is subtracted."""
    scale: Literal["std", "none"] = "std"
    """Divides advantages by the standard deviation of the group's scores, or leaves them as they are (Dr. GRPO)."""
    credit: Literal["response", "turn"] = "response"
    """What is compared in a group, where an environment answers the actor: whole episodes, or each turn with the turns
    of the same number, by the rewards from there on."""
    aggregation: Aggregation = "token"
    """How token losses become one number: each token counts the same, each response does, or a constant divides
    (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or the geometric mean over the response at every token (GSPO)."""
    loss: Literal["clipped"] | UserPath = "clipped"
    """Policy loss: the clipped surrogate, or a function of your own, ``path/to/file.py:function``, which reads no clip:
    (logprobs, old_logprobs, advantages, weights) -> loss, or (loss, metrics)."""
    clip_low: Annotated[float, Bound(above=0, most=1)] = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: Annotated[float, Bound(above=0)] = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: Annotated[float | None, Bound(above=1)] = None
    """Bounds the loss of a token with negative advantage A at dual_clip * |A|; greater than 1; null for no bound."""
    importance: Literal["none", "truncated", "masked"] = "none"
    """Corrects for responses of another policy than the one that learns, such as stale ones or those of an engine with
    other arithmetic: weights min(ratio, cap) (TIS),
    or the ratio itself where it is near 1 and 0 elsewhere (IcePop). See docs/algorithms.md."""
    importance_level: Literal["token", "sequence"] = "token"
    """Ratio of the policy that learns to the one that sampled: of each token, or of the whole response, which has no
    bias but more variance."""
    importance_cap: Annotated[float, Bound(least=1)] = 2.0
    """truncated: the largest weight; masked: ratios above this, or below 1 over this, are not learned from."""
    kl_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight of the KL to the reference in the loss. 0 keeps no reference model, and then no kl/* is measured, unless
    model.lora is set, where a reference takes no memory."""
    kl_form: Literal["k2", "k3", "k3_paper"] = "k2"
    """k2 times the detached ratio, or k3 times the live one: both have the KL's exact expected gradient. k3_paper: k3
    alone, as the GRPO paper writes it; biased once the policy has moved away from the one that sampled."""
    reference_refresh_every: Annotated[int | None, Bound(least=1)] = None
    """Moves the reference towards the actor after every this many iterations; null keeps it where the actor began."""
    reference_mixing: Annotated[float, Bound(above=0, most=1)] = 1.0
    """Share of the actor when the reference moves: ref = mixing * actor + (1 - mixing) * ref, weight by weight. 1
    copies the actor (iterative GRPO), less averages (TR-DPO); only 1 goes with LoRA."""
    entropy_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight of the entropy bonus in the loss, aggregated as the loss is."""
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
        _check_name("baseline", self.baseline, "mean", "leave_one_out")
        _check_name("loss", self.loss, "clipped")
        if self.baseline != "mean" and self.scale == "std":
            raise ValueError(
                f"algorithm.baseline {self.baseline} goes with algorithm.scale none: only a difference from the "
                "mean of the group is divided by its spread"
            )
        if self.ratio == "sequence" and self.aggregation != "sequence":
            raise ValueError(
                "algorithm.ratio sequence goes with algorithm.aggregation sequence: GSPO averages over responses"
            )
        _check_moving_reference(self)

    def warnings(self) -> list[str]:
        """Sentences on settings that are allowed, but seldom meant. None for a user's class: its run reports what it
        leaves unread."""
        if self.name != "grpo":
            return []
        warnings = _unread_clips(self)
        if self.kl_coef > 0 and self.scale == "std":
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
    loss: Literal["clipped"] | UserPath = "clipped"
    """Policy loss: the clipped surrogate, or a function of your own, ``path/to/file.py:function``, which reads no clip:
    (logprobs, old_logprobs, advantages, weights) -> loss, or (loss, metrics)."""
    clip_low: Annotated[float, Bound(above=0, most=1)] = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: Annotated[float, Bound(above=0)] = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: Annotated[float | None, Bound(above=1)] = None
    """Bounds the loss of a token with negative advantage A at dual_clip * |A|; greater than 1; null for no bound."""
    importance: Literal["none", "truncated", "masked", "v_trace"] = "none"
    """Corrects for responses of another policy than the one that learns, such as stale ones or those of an engine with
    other arithmetic: weights min(ratio, cap) (TIS),
    or the ratio itself where it is near 1 and 0 elsewhere (IcePop), or truncated ones with V-trace targets, where the
    critic is corrected too. See docs/algorithms.md."""
    importance_level: Literal["token", "sequence"] = "token"
    """Ratio of the policy that learns to the one that sampled: of each token, or of the whole response, which has no
    bias but more variance."""
    importance_cap: Annotated[float, Bound(least=1)] = 2.0
    """truncated: the largest weight; masked: ratios above this, or below 1 over this, are not learned from; v_trace:
    rho bar."""
    value_clip: Annotated[float | None, Bound(above=0)] = 0.2
    """How far a value may move from the old one before the clip leaves it no gradient; null for no clip."""
    entropy_coef: Annotated[float, Bound(least=0)] = 0.0
    """Weight of the entropy bonus in the actor's loss, aggregated as the loss is."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("loss", self.loss, "clipped")
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
        return _unread_clips(self)


def _check_name(setting: str, value: str, *ours: str) -> None:
    """Refuses what is neither one of ours nor the name of code of a user."""
    if value not in ours and not names_code(value):
        raise ValueError(
            f"algorithm.{setting} ({value!r}) must be {' or '.join(ours)}, or name your own: path/to/file.py:name or "
            "package.module:name"
        )


def _check_moving_reference(config: GRPOConfig | PPOConfig) -> None:
    """Refuses a reference that moves where there is none, and a mixing that is never read."""
    every, mixing = config.reference_refresh_every, config.reference_mixing
    if every is not None and config.kl_coef == 0:
        raise ValueError(
            f"algorithm.reference_refresh_every ({every}) moves the reference of the KL, which algorithm.kl_coef 0 "
            "leaves out; set algorithm.kl_coef above 0, or this to null"
        )
    if every is None and mixing != 1:
        raise ValueError(
            f"algorithm.reference_mixing ({mixing}) is read when the reference moves; set "
            "algorithm.reference_refresh_every too, such as 10, or leave this out"
        )


def _unread_clips(config: GRPOConfig | PPOConfig) -> list[str]:
    changed = [name for name in CLIPS if getattr(config, name) != getattr(type(config), name)]
    return [
        f"algorithm.{name} is read only where algorithm.loss is clipped" for name in changed if config.loss != "clipped"
    ]
