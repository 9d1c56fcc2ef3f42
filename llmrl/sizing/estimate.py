"""Estimate of a run's memory, item by item: of a device in each phase, and of a process while it loads."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llmrl.config import AnyRun, CriticRun, GRPORun, PPORun, RewardModelRun, RLRun, SFTRun
from llmrl.rollout.cache import num_columns
from llmrl.rollout.native import PREFILL_TOKENS
from llmrl.sizing import activations
from llmrl.sizing.activations import BFLOAT16, FLOAT32, Pass
from llmrl.sizing.shape import ModelShape
from llmrl.sizing.strategy import Split, Strategy, gradients, host, resident, transient

Phase = Literal["rollout", "scoring", "update"]
PHASES: tuple[Phase, ...] = ("rollout", "scoring", "update")

LOGIT_COPIES = 5
"""Tensors as large as the logits of the rows being decoded: these, tempered, log-softmax, its exponential, its sum."""
BYTES_PER_PROMPT_TOKEN = 9
"""Bytes of its id and its mask."""
BYTES_PER_RESPONSE_TOKEN = 45
"""Bytes of its id, mask, rewards, log-probabilities, values, advantages and returns."""

BYTES_PER_ROUTE = 2
"""Bytes of the route of a response token in a layer of a mixture of experts."""
BYTES_PER_WAITING_TOKEN = 17
"""Bytes of the id, mask, log-probability and score of a response token in a rollout that waits, routes left out."""

BYTES_PER_KEPT_TOKEN = 22
"""Bytes of the id, both masks, the return and both log-probabilities of a token in an auxiliary phase."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One consumer of memory: its bytes, and the phases in which they are held."""

    name: str
    num_bytes: int
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated memory in bytes: of one device, and of one process on the CPU."""

    items: tuple[Item, ...]
    host_loading: int
    """Peak of a process in the memory of the CPU while models load."""
    host_training: int
    """Memory of the CPU that a process takes in training for what is offloaded and for rollouts that wait."""

    def of(self, phase: Phase) -> int:
        """Bytes that a device holds in this phase."""
        return sum(item.num_bytes for item in self.items if phase in item.phases)

    @property
    def peak_phase(self) -> Phase:
        return max(PHASES, key=self.of)

    @property
    def peak(self) -> int:
        return self.of(self.peak_phase)


def estimate_memory(
    config: AnyRun,
    shape: ModelShape,
    strategy: Strategy,
    *,
    reward_shape: ModelShape | None = None,
) -> Estimate:
    """Memory of a run at its longest prompts and responses.

    Args:
        config: Settings of the run.
        shape: Shape of the model that is trained.
        strategy: Its launch.
        reward_shape: Shape of the reward model, where the recipe names one.
    """
    if isinstance(config, SFTRun):
        parts = _Supervised(config, shape, strategy)
    elif isinstance(config, RewardModelRun | CriticRun):
        parts = _OfBatches(config, shape, strategy)
    else:
        parts = _Reinforcement(config, shape, strategy, reward_shape)
    return Estimate(
        items=tuple(item for item in parts.items() if item.num_bytes),
        host_loading=parts.host_loading(),
        host_training=parts.host_training(),
    )


class _Parts(ABC):
    """Memory of what every run has: modules that learn."""

    def __init__(self, config: AnyRun, shape: ModelShape, strategy: Strategy) -> None:
        self.model, self.shape, self.strategy = config.model, shape, strategy
        self.bfloat16 = config.model.dtype == "bfloat16"
        lora = config.model.lora
        rank = lora.rank if lora is not None else shape.adapter_rank
        targets = lora.targets if lora is not None else shape.adapter_targets
        has_lengths = lora.use_dora if lora is not None else shape.adapter_has_lengths
        whole = lora.modules_to_save if lora is not None else shape.adapter_layers
        self.rank = rank or 0
        self.num_quantized = 0 if config.model.quantization is None else shape.num_quantized
        self.num_low_rank = 0 if rank is None else shape.num_adapter(rank, targets, has_lengths=has_lengths)
        self.num_adapter = 0 if rank is None else self.num_low_rank + shape.num_whole(whole)

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Yields the items that a device holds."""

    @property
    def scores_networks(self) -> bool:
        """Whether what learns makes passes without gradient, too."""
        return True

    def splits(self) -> list[Split]:
        """The modules that learn, one for each optimizer."""
        return [self.split(self.shape.num_parameters)]

    def host_loading(self) -> int:
        """Bytes of all weights that learn, and of what is copied of them before they are split."""
        if self.num_quantized:
            return self.split(self.shape.num_parameters).weight_bytes
        whole = FLOAT32 * sum(split.trained + split.frozen for split in self.splits())
        return whole if self.strategy.splits_weights else FLOAT32 * self.shape.num_parameters

    def host_training(self) -> int:
        """Bytes of what is offloaded."""
        return sum(host(split, self.strategy) for split in self.splits())

    def split(self, num_model: int, *, extra: int = 0) -> Split:
        """Split of a trained model of this many parameters, or of its adapters; `extra` ones are always trained."""
        trained = self.num_adapter or num_model
        frozen, quantized = (num_model, self.num_quantized) if self.num_adapter else (0, 0)
        return Split(
            trained=trained + extra,
            frozen=frozen,
            layer=self.shape.num_layer,
            root=num_model - self.shape.num_linear,
            largest=self.shape.largest,
            quantized=quantized,
        )

    def learning(self) -> Iterator[Item]:
        """Yields weights, optimizer states, and what is transient while weights and gradients are gathered."""
        totals: dict[str, int] = {}
        for split in self.splits():
            for name, num_bytes in resident(split, self.strategy):
                totals[name] = totals.get(name, 0) + num_bytes
        for name, num_bytes in totals.items():
            yield Item(name=name, num_bytes=num_bytes)
        for name, num_bytes in self.transient().items():
            gathered_for_scoring = "weights" in name and self.scores_networks
            yield Item(
                name=name, num_bytes=num_bytes, phases=("scoring", "update") if gathered_for_scoring else ("update",)
            )

    def transient(self) -> dict[str, int]:
        """Transient bytes by name: of one module at a time, except full weights under ZeRO 3, which add up."""
        totals: dict[str, int] = {}
        for split in self.splits():
            for name, num_bytes in transient(split, self.strategy):
                adds_up = self.strategy.zero_stage == 3 and "weights" in name
                before = totals.get(name, 0)
                totals[name] = before + num_bytes if adds_up else max(before, num_bytes)
        return totals

    def work(
        self, *, budget: int, length: int, response_tokens: int, num_rows: int, prompt: int = 0, group: int = 1
    ) -> Pass:
        """The largest microbatch: rows of the greatest length, at most `num_rows`.

        Args:
            budget: Tokens in a pass.
            length: Tokens of a row, except those that it shares.
            response_tokens: Those of a row whose log-probability is wanted.
            num_rows: Rows of one device in an optimizer step.
            prompt: Tokens that the rows of a group share.
            group: Rows that share them, as many as fit.
        """
        of_unit = max(1, min(group, num_rows, (budget - prompt) // length))
        unit = prompt + of_unit * length
        num_units = max(1, min(budget // unit, -(-num_rows // of_unit)))
        rows = num_units * of_unit
        return Pass(
            rows=rows,
            num_tokens=num_units * unit,
            num_scored=rows * response_tokens,
            bfloat16=self.bfloat16,
            learns=not self.num_adapter,
            rank=self.rank,
            quantized=self.num_quantized > 0,
            checkpoints=self.model.gradient_checkpointing,
        )

    def updating(self, work: Pass, num_rows: int) -> Iterator[Item]:
        """Yields a pass, and the gradients of those before it. `num_rows` counts the rows in all: the first pass
        through the last of the models that learn has no gradients of that model before it."""
        saved, moment = activations.saved_bytes(self.shape, work), activations.peak_extra_bytes(self.shape, work)
        yield Item(name="activations", num_bytes=saved, phases=("update",))
        yield Item(name="the fullest moment of a pass", num_bytes=moment, phases=("update",))
        *first, last = (gradients(split, self.strategy) for split in self.splits())
        if num_rows <= work.rows:
            last = max(0, last - saved - moment)  # they take the place of what they are made of
        yield Item(name="gradients", num_bytes=sum(first) + last, phases=("update",))


class _Supervised(_Parts):
    def __init__(self, config: SFTRun, shape: ModelShape, strategy: Strategy) -> None:
        super().__init__(config, shape, strategy)
        self.config = config

    def items(self) -> Iterator[Item]:
        yield from self.learning()
        settings, length = self.config.sft, self.config.data.max_tokens
        num_rows = -(-settings.batch_size // self.strategy.num_devices)
        budget = settings.microbatch_tokens
        work = self.work(budget=budget, length=length, response_tokens=length, num_rows=num_rows)
        yield from self.updating(work, num_rows)


class _OfBatches(_Parts):
    """A trunk with a head to one number, trained on batches of data."""

    def __init__(self, config: RewardModelRun | CriticRun, shape: ModelShape, strategy: Strategy) -> None:
        super().__init__(config, shape, strategy)
        self.max_tokens = config.data.max_tokens
        self.batches = config.reward_model if isinstance(config, RewardModelRun) else config.critic

    def splits(self) -> list[Split]:
        return [self.split(self.shape.num_trunk, extra=self.shape.hidden_size)]

    def items(self) -> Iterator[Item]:
        yield from self.learning()
        num_rows = -(-self.batches.batch_size // self.strategy.num_devices)
        budget = self.batches.microbatch_tokens
        work = self.work(budget=budget, length=self.max_tokens, response_tokens=0, num_rows=num_rows)
        yield from self.updating(work, num_rows)


class _Reinforcement(_Parts):
    def __init__(self, config: RLRun, shape: ModelShape, strategy: Strategy, reward_shape: ModelShape | None) -> None:
        super().__init__(config, shape, strategy)
        self.config, self.reward_shape = config, reward_shape
        self.critic = config.critic.network if isinstance(config, PPORun) else None

    def splits(self) -> list[Split]:
        actor = self.split(self.shape.num_parameters, extra=self.shape.hidden_size * (self._num_kept > 0))
        alone = replace(actor, frozen=0, quantized=0)
        match self.critic:
            case None:
                return [actor]
            case "shared":
                return [self.split(self.shape.num_parameters, extra=self.shape.hidden_size)]
            case "mtp":
                heads = self._num_heads * self.shape.hidden_size**2 + (1 + self._num_heads) * self.shape.hidden_size
                learned = self.split(self.shape.num_parameters, extra=heads)
                return [replace(learned, frozen=learned.frozen + heads)]
            case "adapter":
                return [actor, replace(alone, trained=self.num_low_rank + self.shape.hidden_size)]
        whole = replace(alone, trained=self.shape.num_trunk + self.shape.hidden_size)
        return [actor, replace(whole, root=self.shape.num_trunk - self.shape.num_linear)]

    @property
    def _num_heads(self) -> int:
        """Heads beyond the actor's own, which score further tokens."""
        if isinstance(self.config, PPORun) and self.critic == "mtp":
            return self.config.critic.mtp.num_heads
        return 0

    @property
    def scores_networks(self) -> bool:
        """False of GRPO where a rollout is one optimizer step, unless the reference is the actor without adapters."""
        several = self.config.optimizer_steps_per_iteration > 1
        return several or not isinstance(self.config, GRPORun) or self.config.algorithm.name != "grpo" or self.rank > 0

    def items(self) -> Iterator[Item]:
        yield from self.learning()
        yield from self.frozen()
        yield from self.rollout()
        yield from self.scoring()
        work, num_rows = self._work(), -(-self.config.minibatch_size // self.strategy.num_devices)
        yield from self.updating(work, num_rows)
        if self.critic in ("own", "reward_model") and self.num_adapter:
            critic = replace(work, learns=True, rank=0, num_scored=0, quantized=False)
            sizes = [
                activations.saved_bytes(self.shape, x) + activations.peak_extra_bytes(self.shape, x)
                for x in (critic, work)
            ]
            more = max(0, sizes[0] - sizes[1])
            yield Item(name="activations of the critic beyond the actor's", num_bytes=more, phases=("update",))

    def host_loading(self) -> int:
        loading = super().host_loading()
        if self.strategy.splits_weights and self._has_reference:
            loading += FLOAT32 * self.shape.num_parameters
        return loading

    def host_training(self) -> int:
        """The same, and the rollouts that wait from one iteration to the next, prompts once for their groups."""
        prompt, response = self.config.data.max_prompt_tokens, self.config.rollout.max_response_tokens
        row = response * (BYTES_PER_WAITING_TOKEN + self._route_bytes)
        of_prompt = prompt * BYTES_PER_PROMPT_TOKEN + self.config.algorithm.group_size * row
        num_prompts = self.config.update.num_waiting * self.config.rollout.prompts_per_iteration
        return super().host_training() + num_prompts * of_prompt

    @property
    def _route_bytes(self) -> int:
        """Bytes of the routes of a response token."""
        return BYTES_PER_ROUTE * self.shape.num_routers

    def frozen(self) -> Iterator[Item]:
        """Yields the copy to sample from, whole on every device; reference and reward model, which may be split."""
        num = self.shape.num_parameters + self.num_low_rank - self.num_quantized  # what is quantized is not copied
        if self.bfloat16 or self.strategy.splits_weights:
            yield Item(name="copy to sample from", num_bytes=num * (BFLOAT16 if self.bfloat16 else FLOAT32))
        yield Item(name="reference", num_bytes=self._reference_bytes())
        reward = self.config.reward.model
        if reward is not None and self.reward_shape is not None:
            shape = self.reward_shape
            whole = self._frozen_bytes(shape, shape.num_trunk)
            adapter = FLOAT32 * shape.num_adapter(self.rank, ())
            yield Item(name="reward model", num_bytes=adapter if reward.on_actor_base else whole)

    @property
    def _has_reference(self) -> bool:
        return self.config.algorithm.kl_coef != 0 and not self.num_adapter

    def _reference_bytes(self) -> int:
        """Bytes of the reference: with LoRA, only the adapter of one that moves; all in float32 if it averages."""
        if self.num_adapter:
            return FLOAT32 * self.num_adapter * (self.config.algorithm.reference_refresh_every is not None)
        averages = self.config.algorithm.reference_mixing < 1
        return (
            self._frozen_bytes(self.shape, self.shape.num_parameters, is_float32=averages) if self._has_reference else 0
        )

    def _frozen_bytes(self, shape: ModelShape, num: int, *, is_float32: bool = False) -> int:
        """Bytes of a model that never learns: linear layers in the precision they compute in, all else in float32."""
        shrinks = self.bfloat16 and not is_float32
        whole = FLOAT32 * num - (FLOAT32 - BFLOAT16) * shape.num_linear * shrinks
        return whole // (self.strategy.num_devices if self.config.distributed.frozen == "split" else 1)

    def rollout(self) -> Iterator[Item]:
        """Yields keys and values, the pass over the prompts, and the logits of one token of each row."""
        rollout, group = self.config.rollout, self.config.algorithm.group_size
        prompt, response = self.config.data.max_prompt_tokens, rollout.max_response_tokens
        count = -(-rollout.prompts_per_iteration // self.strategy.num_devices) * group
        rows = count if rollout.engine == "transformers" else min(count, rollout.max_rows // group * group)
        columns = num_columns(prompt + response, refills=rows < count)
        size = BFLOAT16 if self.bfloat16 else FLOAT32
        of_token = 2 * self.shape.num_layers * self.shape.key_size * size
        yield Item(name="keys and values", num_bytes=rows * columns * of_token, phases=("rollout",))
        prefill = min((rows // group) * prompt, max(prompt, PREFILL_TOKENS))
        first = prefill * (of_token + size * (3 * self.shape.feed_forward_size + 3 * self.shape.hidden_size))
        copies = 2 * rows * columns * self.shape.query_size * size
        step = (copies if self.shape.query_size > self.shape.key_size else 0) + self._logits(rows)
        yield Item(name="a step of the rollout", num_bytes=max(first, step), phases=("rollout",))
        total = self.config.num_learned
        row = prompt * BYTES_PER_PROMPT_TOKEN + response * (BYTES_PER_RESPONSE_TOKEN + self._route_bytes)
        yield Item(name="experience", num_bytes=total * row, phases=("scoring", "update"))
        row = prompt * BYTES_PER_PROMPT_TOKEN + response * BYTES_PER_KEPT_TOKEN
        yield Item(name="experience of an auxiliary phase", num_bytes=self._num_kept * total * row, phases=("update",))

    @property
    def _num_kept(self) -> int:
        """Iterations whose experience an auxiliary phase learns from; 0: there is none."""
        return (self.config.algorithm.auxiliary_every or 0) if isinstance(self.config, PPORun) else 0

    def _logits(self, rows: int) -> int:
        return LOGIT_COPIES * FLOAT32 * rows * self.shape.vocab_size

    def scoring(self) -> Iterator[Item]:
        """Yields the larger of the passes without gradient over one microbatch."""
        works = [0]
        if self.scores_networks or self._has_reference:
            works.append(activations.no_gradient_bytes(self.shape, self._work()))
        reward = self.config.reward.model
        if reward is not None and self.reward_shape is not None:
            work = self._work(budget=reward.microbatch_tokens, response_tokens=0)
            works.append(activations.no_gradient_bytes(self.reward_shape, replace(work, learns=False, quantized=False)))
        yield Item(name="a pass without gradient", num_bytes=max(works), phases=("scoring",))

    def _work(self, *, budget: int | None = None, response_tokens: int | None = None) -> Pass:
        prompt, response = self.config.data.max_prompt_tokens, self.config.rollout.max_response_tokens
        group = self.config.algorithm.group_size if self.model.packing else 1
        budget = self.config.update.microbatch_tokens if budget is None else budget
        num_rows = -(-self.config.minibatch_size // self.strategy.num_devices)
        return self.work(
            budget=budget,
            length=response,
            response_tokens=response * (1 + self._num_heads) if response_tokens is None else response_tokens,
            num_rows=num_rows,
            prompt=prompt,
            group=group,
        )
