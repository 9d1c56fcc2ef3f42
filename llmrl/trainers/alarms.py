"""Alarms of a run that is dead or broken: one warning of each kind, with the evidence and the likely cause.

Every kind looks at the metrics of one iteration and at those of the start, or at those of the last 20 iterations. It
is raised when it holds in several iterations in a row, so that one odd batch raises nothing, and repeated at the end of
the run if it still holds then. Where nothing can be learned at all, the verdict ends the run.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from llmrl.errors import Error

Values = Mapping[str, float]

PATIENCE = 3
"""Iterations in a row: a batch of hard prompts, or a spike of the loss, is over by then."""
LEARNS_NOTHING = ("unscored", "cut off", "nothing to learn")
"""Kinds that odd batches bring into healthy runs, and that the first iteration may show as well as any other."""
FLAT_STD = 1e-6
"""Spread of scores, relative to their size, that is rounding."""
SOLVED = 0.1
"""Share of the rise of the mean score: batches of solved prompts differ by no more."""
COLLAPSED_ENTROPY = 1e-4
"""Nats per token. Tasks with one right answer stay a hundred times above this when they are solved."""
EXPLODED_KL = 2.0
"""Nats per token to the reference, in entropies of the start: turning the whole entropy into one certain token costs
about one of them, so twice that means tokens that the reference hardly ever gives."""
LEAST_EXPLODED_KL = 1.0
"""Nats per token to the reference, for models of little entropy; usual runs stay below a third of this."""
EXPLODED_STEP_KL = 1.0
"""Nats per token within one iteration; usual runs stay below a tenth of this."""
EXPLODED_LOSS = (2.0, 1.0)
"""Times the loss of the start, and nats above it: both. Batches differ by less than either."""
EXPLODED_VALUE_LOSS = 10.0
"""Times the mean square of the rewards, and times the loss of the start: both."""
WORSE_LOSS = 1.05
"""Times the held-out loss of the start."""
WINDOW = 20
"""Iterations that shares of lost work are taken over: odd batches are few among them."""
SKIPPED_SHARE = 0.1
"""Share of optimizer steps that are skipped. Healthy runs skip single ones, some runs in 16 bits one in a hundred."""
LEAST_SKIPPED = 3
"""Skipped steps in the window below which they are no share, but single ones."""
UNSCORED_SHARE = 0.5
"""Share of responses without a score. Rows of several tasks leave some to no rule; where it is most, sampling is mostly
for nothing. Where functions or environments fail, `PATIENCE` iterations are enough to say so: no batch is odd then."""
FLAT_SHARE = 0.9
"""Share of groups of equal scores, where the task is not solved. Sparse rewards begin with 0.5 to 0.8."""
NEVER_SCORED = 10
"""Iterations in a row without any score that end a run. One of them can be a batch of another task; in ten, a hundred
prompts or more have had no rule."""
NEVER_LEARNED = 100
"""Iterations with a gradient of exactly 0, from the first one on, that end a run. With 8 prompts of 8 responses, a task
that is solved once in a thousand times brings scores that differ before that in 998 of 1000 runs. Terms that teach
without scores, such as a KL or a critic, have a gradient, and so have groups that were solved on the way."""
SCALED_BY_SCORES = ("score/", "reward/", "value/")
"""Metrics whose size an extreme score sets."""
GAP_LIMITS = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}
"""Mean distance of a token's log-probability in sampling and in training, by dtype: ten times what rounding makes."""


class NothingLearned(Error, RuntimeError):
    """A run in which nothing can be learned: the message says why."""


class Alarms:
    """Looks at every iteration of a run, and remembers what it warned of.

    Args:
        dtype: Arithmetic of sampling and training, which sets the rounding to expect.
        steps_per_iteration: Optimizer steps of each module in an iteration, if nothing leaves some out.
        critic_optimizer: Section of the settings with the critic's optimizer.
        compares_sums: Whether groups with equal sums of scores teach nothing, as far as is known before.
        learns_from_stale: Whether rollouts are of an earlier policy, so that a gap to them means nothing.
    """

    def __init__(
        self,
        dtype: str = "float32",
        *,
        steps_per_iteration: int = 1,
        critic_optimizer: str = "critic_optimizer",
        compares_sums: bool = True,
        learns_from_stale: bool = False,
    ) -> None:
        self.gap_limit = math.inf if learns_from_stale else GAP_LIMITS[dtype]
        self.critic_optimizer = critic_optimizer
        self.steps_per_iteration = steps_per_iteration
        self.num_iterations = 0
        self.recent: deque[Values] = deque(maxlen=WINDOW)
        """Metrics of the last iterations."""
        self.start: dict[str, float] = {}
        """The first finite value of every metric; of what scores scale, from an iteration without extreme ones."""
        self.best_score = -math.inf
        """The highest mean score of an iteration in which scores differed and none was extreme."""
        self.compares_sums = compares_sums
        """False too once such groups had advantages."""
        self.has_learned = False
        """Whether any gradient was not exactly 0."""
        self.num_idle: dict[str, int] = {}
        """In how many iterations in a row, up to the last one, a kind of verdict held."""
        self.verdict: str | None = None
        """Why nothing can be learned, after the iteration in which that is certain. Then its iterations are counted
        anew: a run that goes on afterwards gets as many again."""
        self.num_skipped: dict[str, float] = {}
        """Optimizer steps on gradients that were not finite, by module."""
        self.streaks: dict[str, int] = {}
        """In how many iterations, up to the last one, a kind held."""
        self.current: dict[str, str] = {}
        """Text of each kind that held in the last iteration that had its metric."""
        self.raised: set[str] = set()

    def observe(self, values: Values) -> list[str]:
        """New warnings from the metrics of the next iteration, or from those of an evaluation alone."""
        if any(not name.startswith("eval/") for name in values):
            self.num_iterations += 1
            self.recent.append(values)
        self.start = {**self._comparable(values), **self.start}
        for name, value in values.items():
            if name.endswith("/skipped_steps"):
                module = name.removesuffix("/skipped_steps")
                self.num_skipped[module] = self.num_skipped.get(module, 0.0) + value
        if has_other_advantages(values):
            self.compares_sums = False
        kinds = self.kinds()
        for kind, (needed, _, check) in kinds.items():
            if needed in values:
                self.note(kind, check(values))
        if not self._is_flat(values):
            self.best_score = max(self.best_score, self._comparable(values).get("score/mean", -math.inf))
        self.verdict = self._judge(values)
        new = [kind for kind in self.current if self.streaks[kind] >= kinds[kind][1] and kind not in self.raised]
        self.raised.update(new)
        return [self.current[kind] for kind in new]

    def at_the_end(self) -> list[str]:
        """Warnings that still hold after the last iteration: as long as in a run, or all along in a shorter run."""
        return [text for kind, text in self.current.items() if self.streaks[kind] >= self.enough(kind)]

    def enough(self, kind: str) -> int:
        """Iterations, up to the end, in which a kind must hold to be repeated there."""
        if kind in LEARNS_NOTHING:
            return min(PATIENCE, self.num_iterations)
        _, patience, _ = self.kinds()[kind]
        return min(patience, max(self.num_iterations - 1, 1))  # the first iteration is what others are compared with

    def note(self, kind: str, text: str | None) -> None:
        """Records that a kind holds, with its text, or that it does not hold (None)."""
        self.streaks[kind] = 0 if text is None else self.streaks.get(kind, 0) + 1
        if text is None:
            self.current.pop(kind, None)
        else:
            self.current[kind] = text

    def kinds(self) -> dict[str, tuple[str, int, Callable[[Values], str | None]]]:
        """Each kind: the metric that it needs, in how many iterations in a row it must hold, and its check."""
        return {
            "unscored": ("score/unscored", 1, self._unscored),
            "cut off": ("response/finished_fraction", PATIENCE, self._cut_off),
            "share unscored": ("score/unscored", 1, self._share_unscored),
            "nothing to learn": ("score/std", PATIENCE, self._nothing_to_learn),
            "share of flat groups": ("group/flat_fraction", 1, self._share_flat),
            "extreme": ("score/mean", 1, self._extreme),
            "collapse": ("policy/entropy", PATIENCE, self._collapse),
            "kl": ("kl/mean", PATIENCE, self._kl),
            "step kl": ("policy/approx_kl", PATIENCE, self._step_kl),
            "loss": ("loss", PATIENCE, self._loss),
            "value loss": ("value/loss", PATIENCE, self._value_loss),
            "rollout gap": ("policy/rollout_gap", 1, self._gap),
            "held-out accuracy": ("eval/accuracy", 1, self._held_out_accuracy),
            "held-out loss": ("eval/loss", 1, self._held_out_loss),
            **{
                f"share of steps of {name}": (f"{name}/skipped_steps", 1, partial(self._share_skipped, name))
                for name in self.num_skipped
            },
            **{
                f"steps of {name}": (f"{name}/skipped_steps", 1, partial(self._skipped, name))
                for name in self.num_skipped
            },
        }

    def _unscored(self, values: Values) -> str | None:
        if "score/mean" in values or not values["score/unscored"]:
            return None
        num = self.streaks.get("unscored", 0) + 1
        why = _failed([values]) or (
            "every rule of reward.functions returned None; a rule returns None for the rows of another task only, so "
            "see which column it reads the answer from, and whether it can read the answers that stand there"
        )
        return (
            f"none of {values['score/unscored']:.0f} responses could be scored in {_in_a_row(num)}, so nothing is "
            f"learned there: {why}"
        )

    def _cut_off(self, values: Values) -> str | None:
        has_stepped = any(name.endswith("/skipped_steps") for name in values)
        if "score/mean" not in values or has_stepped or values["response/finished_fraction"] == 1.0:
            return None
        num = self.streaks.get("cut off", 0) + 1
        return (
            f"no response was learned from in {_in_a_row(num)}: algorithm.mask_truncated leaves out those that were "
            f"cut off, and {100 * values['response/finished_fraction']:.0f} % ended by themselves; raise "
            "rollout.max_response_tokens, or set algorithm.mask_truncated to false"
        )

    def _nothing_to_learn(self, values: Values) -> str | None:
        if not self._is_flat(values) or values.get("score/overlong_penalty") or self._is_solved(values):
            return None
        num = self.streaks.get("nothing to learn", 0) + 1
        alike = "every response to a prompt" if "group/flat_fraction" in values else "every response"
        why = _failed([values]) or (
            "samples.jsonl shows the responses; either the reward never distinguishes them (its answer column, the "
            "form that it expects), or the prompts are too hard for this model, or all responses are equal"
        )
        return (
            f"{alike} got the same score in {_in_a_row(num)} (mean {values['score/mean']:.3g}), so nothing is "
            f"learned from scores: {why}"
        )

    def _share_unscored(self, values: Values) -> str | None:
        unscored = sum(known.get("score/unscored", 0.0) for known in self.recent)
        drawn = sum(map(_num_drawn, self.recent))
        failed = _failed(self.recent)
        is_early = len(self.recent) < (WINDOW if failed is None else PATIENCE)
        if is_early or "score/mean" not in values or not unscored > UNSCORED_SHARE * drawn:
            return None
        why = failed or (
            "every rule of reward.functions returned None for them; see which rows these are, and give them a rule, or "
            "leave them out of the data"
        )
        return (
            f"{unscored:.0f} of the {drawn:.0f} responses of the last {len(self.recent)} iterations could not be "
            f"scored, and nothing is learned from those: {why}"
        )

    def _share_flat(self, values: Values) -> str | None:
        flat = [known["group/flat_fraction"] for known in self.recent if "group/flat_fraction" in known]
        share = sum(flat) / len(flat)
        is_told = (
            not self.compares_sums
            or self._is_flat(values)
            or values.get("score/overlong_penalty")
            or "score/mean" not in values
        )
        if not self._window_is_full or not share > FLAT_SHARE or is_told or self._is_solved(values):
            return None
        return (
            f"{100 * share:.0f} % of the groups of the last {len(flat)} iterations had equal scores, so nothing is "
            f"learned from them (mean score {values['score/mean']:.3g}): the prompts are mostly too hard or too easy "
            "for this model; choose others, raise algorithm.group_size, or give a reward that distinguishes more"
        )

    def _extreme(self, values: Values) -> str | None:
        if not (num := values.get("score/extreme")):
            return None
        scores = "1 score is" if num == 1 else f"{num:.0f} scores are"
        return (
            f"{scores} far from all others, by size up to {values['score/extreme_size']:.4g}: of that iteration hardly "
            "anything else was learned; samples.jsonl shows responses with their scores; bound what the reward "
            "returns, or set algorithm.score_clip (PPO)"
        )

    def _collapse(self, values: Values) -> str | None:
        entropy, start = values["policy/entropy"], self._at_start("policy/entropy")
        if not entropy < COLLAPSED_ENTROPY:
            return None
        return (
            f"the policy has collapsed: its entropy is {entropy:.2g} nats per token, {start:.2g} at the start, so it "
            "gives one response only; optimizer.learning_rate is likely too high, or algorithm.kl_coef too low"
        )

    def _kl(self, values: Values) -> str | None:
        kl = values["kl/mean"]
        if kl <= max(LEAST_EXPLODED_KL, EXPLODED_KL * self.start.get("policy/entropy", 0.0)):
            return None
        return (
            f"the policy is far from the reference: kl/mean is {kl:.3g} nats per token, kl/sequence "
            f"{values['kl/sequence']:.3g}; optimizer.learning_rate is likely too high, or algorithm.kl_coef too low"
        )

    def _step_kl(self, values: Values) -> str | None:
        if values["policy/approx_kl"] <= EXPLODED_STEP_KL:
            return None
        return (
            f"one iteration moves the policy by {values['policy/approx_kl']:.3g} nats per token (policy/approx_kl), so "
            "it learns from responses that it would no longer give; lower optimizer.learning_rate or update.num_epochs"
        )

    def _loss(self, values: Values) -> str | None:
        loss, start, (times, more) = values["loss"], self._at_start("loss"), EXPLODED_LOSS
        if math.isfinite(loss) and (loss <= times * start or loss <= start + more):
            return None
        return (
            f"the loss has exploded: {loss:.4g}, {start:.4g} at the start; optimizer.learning_rate is likely too high"
        )

    def _value_loss(self, values: Values) -> str | None:
        loss, start = values["value/loss"], self._at_start("value/loss")
        square = 1.0 + values.get("reward/mean", 0.0) ** 2 + values.get("reward/std", 0.0) ** 2
        if math.isfinite(loss) and loss <= EXPLODED_VALUE_LOSS * max(square, start):
            return None
        return (
            f"the critic's loss has exploded: value/loss is {loss:.4g}, {start:.4g} at the start; "
            f"{self.critic_optimizer}.learning_rate is likely too high"
        )

    def _gap(self, values: Values) -> str | None:
        gap = values["policy/rollout_gap"]
        if gap <= self.gap_limit:
            return None
        return (
            f"sampling and training do not agree: policy/rollout_gap is {gap:.2g} nats per token, and rounding makes "
            f"less than {self.gap_limit:g}; the model likely computes other log-probabilities with a cache, with other "
            "rows beside it or in train mode (noise, a router, positions that depend on the longest row)"
        )

    def _held_out_accuracy(self, values: Values) -> str | None:
        now, start = values["eval/accuracy"], self._at_start("eval/accuracy")
        low, high = self.start.get("eval/accuracy_low", start), values.get("eval/accuracy_high", now)
        if not (now < low and high < start):  # NaN, where nothing could be judged, is no fall
            return None
        return (
            f"held-out accuracy fell below the start: {now:.3g}, {start:.3g} at the start; the model is worse than the "
            "one that it was made from"
        )

    def _held_out_loss(self, values: Values) -> str | None:
        now, start = values["eval/loss"], self._at_start("eval/loss")
        if now <= WORSE_LOSS * start:
            return None
        return (
            f"the held-out loss rose above the start: {now:.4g}, {start:.4g} at the start; the learning rate is too "
            "high, or the rows were seen too often"
        )

    def _share_skipped(self, module: str, _: Values) -> str | None:
        name = f"{module}/skipped_steps"
        skipped = [known[name] for known in self.recent if name in known]
        num, due = sum(skipped), len(skipped) * self.steps_per_iteration
        if num < LEAST_SKIPPED or num <= SKIPPED_SHARE * due:
            return None
        return (
            f"{num:.0f} of the last {due} optimizer steps of the {module.replace('_', ' ')} were skipped, as their "
            f"gradient was not finite: what they were to learn is lost; lower {self._optimizer(module)}.learning_rate, "
            "or take model.dtype=float32"
        )

    def _skipped(self, module: str, _: Values) -> str | None:
        num = self.num_skipped[module]
        if not num or f"share of steps of {module}" in self.current:
            return None
        return (
            f"optimizer steps of the {module.replace('_', ' ')} that were skipped, as their gradient was not finite: "
            f"{num:.0f}; lower {self._optimizer(module)}.learning_rate if there are more"
        )

    def _optimizer(self, module: str) -> str:
        """Section of the settings with the optimizer of a module."""
        return self.critic_optimizer if module == "critic" else "optimizer"

    # --- verdicts -----------------------------------------------------------------------------------------------------

    def _judge(self, values: Values) -> str | None:
        """Why nothing can be learned, if that is certain after this iteration."""
        norms = [value for name, value in values.items() if name.endswith("/grad_norm_max")]
        self.has_learned |= any(norm != 0.0 for norm in norms)
        if self._idles("unscored", "score/mean" not in values, NEVER_SCORED, "score/unscored" in values):
            why = _failed([values]) or (
                "every rule of reward.functions returned None; see which column it reads the answer from, and whether "
                "it can read the answers that stand there"
            )
            return (
                f"no response could be scored in {NEVER_SCORED} iterations in a row, and without a score nothing can "
                f"be learned: {why}"
            )
        if self._idles("learned", not self.has_learned, NEVER_LEARNED, bool(norms)):
            return (
                f"the gradient was exactly 0 in {NEVER_LEARNED} iterations, from the first one on: every response to a "
                "prompt gets the same score, or nothing else is there to learn; samples.jsonl shows the responses and "
                "their scores; mend the reward, or choose prompts that the model can solve sometimes"
            )
        return None

    def _idles(self, kind: str, holds: bool, limit: int, is_known: bool) -> bool:
        """Whether something holds in `limit` iterations in a row, among those in which it is known."""
        if is_known:
            self.num_idle[kind] = self.num_idle.get(kind, 0) + 1 if holds else 0
        is_over = self.num_idle.get(kind, 0) >= limit
        if is_over:
            self.num_idle[kind] = 0
        return is_over

    # --- values -------------------------------------------------------------------------------------------------------

    @property
    def _window_is_full(self) -> bool:
        return len(self.recent) == WINDOW

    def _at_start(self, name: str) -> float:
        """The first finite value of a metric; NaN where none was."""
        return self.start.get(name, math.nan)

    def _comparable(self, values: Values) -> dict[str, float]:
        """Values to compare others with: finite, and not scaled by an extreme score."""
        return {name: x for name, x in values.items() if math.isfinite(x) and is_comparable(name, values)}

    def _is_flat(self, values: Values) -> bool:
        """Whether no two scores that are compared differ."""
        if "score/std" not in values:
            return False
        if "group/flat_fraction" in values:
            return values["group/flat_fraction"] == 1.0 and self.compares_sums
        return values["score/std"] <= FLAT_STD * (1.0 + abs(values["score/mean"]))

    def _is_solved(self, values: Values) -> bool:
        """Whether scores are equal because all are as good as they ever were: that is the aim, and no failure."""
        if self.best_score == -math.inf:
            return False
        return values["score/mean"] >= self.best_score - SOLVED * abs(self.best_score - self.start["score/mean"])


def _in_a_row(num: int) -> str:
    return "1 iteration" if num == 1 else f"{num} iterations in a row"


def _failed(window: Iterable[Values]) -> str | None:
    """What failed on responses of some iterations, in words; None: nothing did."""
    failed = {name for values in window for name, num in values.items() if "/failed" in name and num}
    functions = sorted(
        name.removeprefix("reward/").removesuffix("/failed") for name in failed if name.startswith("reward/")
    )
    parts = sorted(
        name.removeprefix("environment/failed/") for name in failed if name.startswith("environment/failed/")
    )
    broken = [
        *([f"reward function {' and '.join(functions)}"] if functions else []),
        *([f"the environment ({', '.join(parts)})"] if parts else []),
    ]
    if not broken:
        return None
    return f"{' and '.join(broken)} failed on responses; a warning says how, so mend that first"


def is_comparable(name: str, values: Values) -> bool:
    """Whether a metric can be compared with other iterations': no extreme score sets its size."""
    return "score/extreme" not in values or not name.startswith(SCALED_BY_SCORES)


def has_other_advantages(values: Values) -> bool:
    """Whether advantages differ from 0 though all groups have equal sums of scores, as where each reward is compared by
    itself. Those of a critic always do, and a penalty for length is none of the scores."""
    is_flat = values.get("group/flat_fraction") == 1.0
    is_explained = "value/loss" in values or values.get("score/overlong_penalty", 0.0) != 0.0
    return is_flat and not is_explained and any(values.get(f"advantage/{end}", 0.0) != 0.0 for end in ("min", "max"))


def _num_drawn(values: Values) -> float:
    """Responses of an iteration: all of their tokens over their mean length."""
    return values.get("tokens/sampled", 0.0) / values.get("response/length", 1.0)
