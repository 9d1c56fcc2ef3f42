"""Decoding by CUDA graphs: the fast path of the native engine, for models of plain attention.

On a GPU a step of eager decoding is bound by the host, which launches some 1,500 kernels for each token. Here a step is
recorded once for a number of rows and of columns and then replayed by one launch. The host replays a few steps, and
reads which rows are complete while the next few are under way:

    device    |  steps 1-8  |  steps 9-16  |  steps 17-24  |
    host      replay 1-8, replay 9-16, read 1-8, admit or compact, replay 17-24, read 9-16, ...

A complete row keeps its slot until the live ones fit in the next smaller bucket, or a whole group can move in. The
samples are those of the general path, up to rounding. On a CPU all of this runs the same, unrecorded.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llmrl.batches import Prompts, StopReason
from llmrl.functional.streams import Purpose, uniforms
from llmrl.memory import is_full
from llmrl.roles import Sampling
from llmrl.rollout.cache import layer_states
from llmrl.rollout.native import num_in_one_pass, read_prompts
from llmrl.rollout.responses import Responses
from llmrl.rollout.rope import switching_limit
from llmrl.rollout.sampler import not_finite
from llmrl.rollout.step import NOT_FINITE, TORCH_ATTENTION, Slots, Step, fused_norms
from llmrl.rollout.support import RolloutError, carries_states, with_cache
from llmrl.rollout.weights import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW_BUCKETS = (8, 16, 32, 64, 128, 256, 512)
COLUMN_STEP = 256
"""A step is recorded for a number of rows in `ROW_BUCKETS`, or for all, and for a multiple of this many columns."""
STEPS_PER_READING = 8
"""Steps between two readings of what is complete."""
REFILL_FRACTION = 1 / 8
"""Part of the slots that must be free before waiting prompts move in: each time the host leads again."""
KEPT_FRACTION = 1 / 10
"""Part of the device's memory up to which keys and values stay between rollouts, and the recorded steps with them."""
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Error of a step's logits on the probe, relative to the largest."""
PROBE_LENGTHS = (3, 7)
PROBE_SAMPLING = Sampling(
    temperature=1.0,
    num_responses=1,
    max_response_tokens=1,
    greedy=True,
    seed=0,
    purpose=Purpose.GENERATION,
    first_response=0,
)


class GraphDecoder:
    """Decodes whole rollouts; keeps slots and recorded steps from one to the next.

    Args:
        eos_ids: Any of them ends a response.
        vocab_size: Ids from there on have no probability.
        routers: Those of the model whose choices are recorded.
    """

    def __init__(self, *, eos_ids: tuple[int, ...], vocab_size: int, routers: Sequence[nn.Module] = ()) -> None:
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.routers = routers
        self.recorded: RecordedSteps | None = None

    def decode(
        self,
        model: "PreTrainedModel",
        responses: Responses,
        sampling: Sampling,
        advance: Callable[[int], None],
        *,
        num_slots: int,
    ) -> None:
        """Completes every response, `num_slots` of them at once.

        `advance` is called with the number of those that have become complete.

        Raises:
            FloatingPointError: Logits are not finite numbers.
        """
        limit = sampling.max_response_tokens
        longest = int(responses.prompts.mask.sum(dim=1).max())
        steps = self._steps_for(model, rows=num_slots, columns=longest + limit, max_tokens=limit)
        steps.slots.reset(limit)
        SlotDecoding(model, steps, responses, sampling, advance, num_slots=num_slots).run()
        if not is_small(steps.slots):
            self.recorded = None

    def _steps_for(self, model: "PreTrainedModel", **needed: int) -> "RecordedSteps":
        """Those of an earlier rollout if they have this room and the weights are where they were; else new ones, with
        room for either rollout."""
        if self.recorded is not None:
            room = self.recorded.slots.room
            needed = {name: max(size, room[name]) for name, size in needed.items()}
            if needed == room and self.recorded.addresses == addresses(model):
                return self.recorded
            self.recorded = None  # gives its memory back before the next is made
        needed["columns"] = -(-needed["columns"] // COLUMN_STEP) * COLUMN_STEP
        slots = Slots.empty(states_of_one_token(model), **needed, num_routers=len(self.routers))
        self.recorded = RecordedSteps(
            model, slots, eos_ids=self.eos_ids, vocab_size=self.vocab_size, routers=self.routers
        )
        return self.recorded


class RecordedSteps:
    """Steps over the first rows and columns of slots, recorded when they are first asked for.

    A recording holds addresses: of the slots, which it keeps, and of the weights.
    """

    def __init__(self, model: "PreTrainedModel", slots: Slots, **of_steps: Any) -> None:
        """`of_steps`: what each `Step` is made with."""
        self.model = model
        self.slots = slots
        self.of_steps = of_steps
        self.addresses = addresses(model)
        self.norms = fused_norms(model)
        self.steps: dict[tuple[int, int, float, bool], Callable[[], object]] = {}
        self.record = recorder(slots.states.device)

    def run(self, count: int, sampling: Sampling, *, rows: int, columns: int) -> None:
        """Takes this many steps of the first slots that `rows` and `columns` need."""
        rows = min(bucket(rows), self.slots.num_rows)
        columns = min(-(-columns // COLUMN_STEP) * COLUMN_STEP, self.slots.num_columns)
        key = (rows, columns, sampling.temperature, sampling.greedy)
        if key not in self.steps:
            slots = self.slots.first(rows, columns)
            step = Step(self.model, self.norms, slots, sampling, **self.of_steps)
            step()  # the first one unrecorded: it sets up what libraries set up once
            count -= 1
            self.steps[key] = self.record(step)
        for _ in range(count):
            self.steps[key]()


class Graph:
    """The work that a function gives to a GPU, recorded, not done. A call does all of it.

    It reads and writes the tensors that the function did, which are kept. Graphs of one pool share the memory for what
    passes between kernels: none may run beside another.
    """

    def __init__(self, function: Callable[[], object], stream: torch.cuda.Stream, pool: Any) -> None:
        self.function = function
        self.graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                self.graph.capture_end()

    def __call__(self) -> None:
        self.graph.replay()


def recorder(device: torch.device) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """What records functions as graphs of one pool. On a CPU a function is its own recording."""
    if device.type != "cuda":
        return lambda function: function
    return partial(Graph, stream=torch.cuda.Stream(device), pool=torch.cuda.graph_pool_handle())


class Reading:
    """Numbers of the device on their way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self.arrived = torch.cuda.Event() if numbers.is_cuda else None
        self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=numbers.is_cuda)
        self.numbers.copy_(numbers, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record()

    def wait(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()


@dataclass
class Row:
    """A response in a slot."""

    index: int
    """Its row in `Responses`."""
    prompt_length: int
    num_steps: int = 0
    """Steps launched: as many tokens, if none has completed it."""
    stop_reason: int = StopReason.NONE
    """As last read."""


class SlotDecoding:
    """Decoding of one rollout in the first `num_slots` slots."""

    def __init__(
        self,
        model: "PreTrainedModel",
        steps: RecordedSteps,
        responses: Responses,
        sampling: Sampling,
        advance: Callable[[int], None],
        *,
        num_slots: int,
    ) -> None:
        self.model = model
        self.steps = steps
        self.slots = steps.slots
        self.responses = responses
        self.sampling = sampling
        self.advance = advance
        self.num_slots = num_slots
        self.prompts = responses.prompts
        self.prompt_lengths = self.prompts.mask.sum(dim=1).tolist()
        self.group_size = responses.group_size
        self.waiting = deque(range(len(self.prompts.rows)))
        self.rows: dict[int, Row] = {}
        """By slot. Complete ones stay until their slot is needed."""
        self.readings: deque[tuple[dict[int, Row], Reading]] = deque()

    def run(self) -> None:
        """Decodes until every response is complete."""
        while self.waiting or self.live:
            self.admit()
            self.compact()
            launched = self.launch()
            if len(self.readings) > launched:
                self.read()
        self.harvest()

    @property
    def live(self) -> list[int]:
        """Slots of rows that are not known to be complete."""
        return [slot for slot, row in self.rows.items() if row.stop_reason == StopReason.NONE]

    def admit(self) -> None:
        """Moves waiting prompts in, each for its whole group, once there is room for enough of them."""
        groups = self.num_slots // self.group_size
        free = (self.num_slots - len(self.live)) // self.group_size
        if not self.waiting or free < min(len(self.waiting), max(1, int(groups * REFILL_FRACTION))):
            return
        self.harvest()
        while count := num_in_one_pass([self.prompt_lengths[prompt] for prompt in islice(self.waiting, free)]):
            self._move_in([self.waiting.popleft() for _ in range(count)])
            free -= count

    def compact(self) -> None:
        """Moves live rows to the front where that makes a step smaller."""
        live = self.live
        if self.waiting or bucket(len(live)) >= bucket(max(self.rows, default=-1) + 1):
            return
        self.harvest()
        rows = bucket(len(live))
        holes = [slot for slot in range(rows) if slot not in self.rows]
        moves = list(zip((slot for slot in live if slot >= rows), holes))  # noqa: B905
        if moves:
            sources, targets = self._tensor(moves).unbind(dim=1)
            self.slots.move(sources, targets, self._num_columns(0))
        for source, target in moves:
            self.rows[target] = self.rows.pop(source)

    def launch(self) -> bool:
        """Takes some steps, no more than the longest row has room for, and asks what is complete after them. Returns
        whether there were any."""
        remaining = max(
            (self.sampling.max_response_tokens - self.rows[slot].num_steps for slot in self.live), default=0
        )
        count = min(STEPS_PER_READING, remaining)
        if count == 0:
            return False
        self.steps.run(count, self.sampling, rows=max(self.rows) + 1, columns=self._num_columns(count))
        for row in self.rows.values():
            row.num_steps += count
        self.readings.append((dict(self.rows), Reading(self.slots.stop_reason)))
        return True

    def read(self) -> None:
        """Notes what was complete at the earliest reading."""
        rows, reading = self.readings.popleft()
        stop_reasons = reading.wait()
        complete = [slot for slot, row in rows.items() if row.stop_reason == StopReason.NONE != stop_reasons[slot]]
        for slot in complete:
            rows[slot].stop_reason = stop_reasons[slot]
        self.advance(len(complete))
        if any(stop_reasons[slot] == NOT_FINITE for slot in complete):
            self.harvest()

    def harvest(self) -> None:
        """Takes complete rows out of their slots.

        Raises:
            FloatingPointError: The logits of one were not finite.
        """
        complete = {slot: row for slot, row in self.rows.items() if row.stop_reason != StopReason.NONE}
        if not complete:
            return
        slots, indices = self._tensor([(slot, row.index) for slot, row in complete.items()]).unbind(dim=1)
        self.responses.put(
            indices,
            self.slots.ids[slots],
            self.slots.logprobs[slots],
            self.slots.num_drawn[slots],
            self.slots.stop_reason[slots],
        )
        if self.slots.routes.shape[2]:
            routes = self.slots.routes[slots, : self.responses.max_tokens]
            self.responses.set_routes(indices, slice(None), routes)
        self.slots.ends[slots] = 0  # where every number of columns reaches
        for slot in complete:
            del self.rows[slot]
        for row in complete.values():
            if row.stop_reason == NOT_FINITE:
                raise not_finite(self.responses, row.index)

    def _move_in(self, admitted: list[int]) -> None:
        """Puts the groups of prompts into free slots. The next step reads the last tokens of the prompts again: it
        draws the first ones of the responses."""
        free = islice(
            (slot for slot in range(self.num_slots) if slot not in self.rows), len(admitted) * self.group_size
        )
        rows = {
            next(free): Row(prompt * self.group_size + n, self.prompt_lengths[prompt])
            for prompt in admitted
            for n in range(self.group_size)
        }
        self.rows |= rows
        slots = self._tensor(list(rows))
        lengths = [self.prompt_lengths[prompt] for prompt in admitted]
        move_in(self.model, self.slots, self.prompts, lengths, admitted, slots.unflatten(0, (-1, self.group_size)))
        if not self.sampling.greedy:
            self.slots.uniforms[slots] = self._uniforms(self._tensor([row.index for row in rows.values()]))

    def _uniforms(self, indices: Tensor) -> Tensor:
        """(n, T + 1): the random streams of rows of `Responses`, as far as they may be needed."""
        numbers = self.responses.numbers[indices][:, None].expand(-1, self.slots.num_tokens + 1)
        tokens = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
        return uniforms(self.sampling.seed, self.sampling.purpose, numbers, tokens)

    def _num_columns(self, num_steps: int) -> int:
        """Columns that rows reach in this many steps."""
        limit = self.sampling.max_response_tokens
        return max(row.prompt_length + min(row.num_steps + num_steps, limit) for row in self.rows.values())

    def _tensor(self, numbers: Sequence[object]) -> Tensor:
        return on_device(numbers, self.slots.ends.device)


def move_in(
    model: "PreTrainedModel",
    slots: Slots,
    prompts: Prompts,
    lengths: Sequence[int],
    chosen: Sequence[int],
    into: Tensor,
) -> None:
    """Puts chosen prompts, of these lengths, into slots: (N, group). The next step reads their last tokens again, and
    draws the first ones of the responses."""
    width = max(lengths)
    cache, indices = whole_cache(model), on_device(chosen, into.device)
    read_prompts(model, prompts, indices, width, cache)
    ends = on_device(lengths, into.device) - 1
    columns = torch.arange(width, device=into.device) + (width - 1 - ends)[:, None]
    columns = columns.clamp(max=width - 1)[:, None, :, None]  # what lies after a prompt is never read
    for layer, pair in zip(slots.states, layer_states(cache), strict=True):
        for buffer, states in zip(layer, pair, strict=True):
            buffer[:, :, :width][into] = states.gather(2, columns.expand_as(states))[:, None]
    slots.last_ids[into] = prompts.ids[indices, -1][:, None]
    slots.ends[into] = ends[:, None]
    slots.num_drawn[into] = 0
    slots.stop_reason[into] = StopReason.NONE
    slots.ids[into] = 0
    slots.logprobs[into] = 0.0
    slots.routes[into] = 0


def on_device(numbers: Sequence[object], device: torch.device) -> Tensor:
    """Integers on a device, without a wait for what is under way there."""
    tensor = torch.tensor(numbers, dtype=torch.long)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def bucket(rows: int) -> int:
    """The least number of rows, no less than this, for which steps are recorded."""
    return next((size for size in ROW_BUCKETS if rows <= size), -(-rows // ROW_BUCKETS[-1]) * ROW_BUCKETS[-1])


def whole_cache(model: "PreTrainedModel") -> Cache:
    """An empty cache in which sliding-window layers keep everything too."""
    return Cache(layers=[DynamicLayer() for _ in DynamicCache(config=model.config).layers])


def states_of_one_token(model: "PreTrainedModel") -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (1, heads, 1, head_dim)."""
    cache = whole_cache(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=ids, use_cache=True, **with_cache(model, cache))
    return layer_states(cache)


def addresses(model: "PreTrainedModel") -> list[int]:
    """Where the weights lie."""
    return [x.data_ptr() for x in (*model.parameters(), *model.buffers())]


def is_small(slots: Slots) -> bool:
    """Whether slots may stay while the model learns."""
    device = slots.states.device
    return device.type != "cuda" or slots.states.nbytes <= KEPT_FRACTION * torch.cuda.mem_get_info(device)[1]


def check_graphs(model: "PreTrainedModel", vocab_size: int, routers: Sequence[nn.Module] = ()) -> None:
    """Refuses models of which a step cannot be recorded, or gives other logits than the model: tries it on a probe.

    Raises:
        RolloutError: With the reason.
    """
    if carries_states(model.config):
        raise RolloutError("its layers carry states along the row")
    if switching_limit(model.config.get_text_config(decoder=True)) is not None:
        raise RolloutError("its rope changes its frequencies with the length")
    attention = model.config.get_text_config(decoder=True)._attn_implementation or "eager"
    if attention != "eager" and not attention.startswith(TORCH_ATTENTION):
        raise RolloutError(f"its attention is {attention}, not torch's")
    try:
        with evaluating(model):
            error = probe_error(model, vocab_size, routers)
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError, ValueError) as problem:
        if is_full(problem):
            raise
        raise RolloutError(f"a step of it cannot be recorded: {problem}") from problem
    if not error <= PROBE_TOLERANCE[model.dtype]:
        raise RolloutError(f"the logits of a recorded step are off by {error:.2g} of the largest")


def probe_error(model: "PreTrainedModel", vocab_size: int, routers: Sequence[nn.Module]) -> float:
    """Largest error of a step's logits relative to the largest logit, for two prompts."""
    width = max(PROBE_LENGTHS)
    ids = (torch.arange(width, device=model.device) + torch.tensor([[2], [5]], device=model.device)) ** 2 % vocab_size
    mask = torch.tensor([[n >= width - length for n in range(width)] for length in PROBE_LENGTHS], device=model.device)
    slots = Slots.empty(states_of_one_token(model), rows=2, columns=COLUMN_STEP, max_tokens=1, num_routers=len(routers))
    prompts = Prompts(ids=ids, mask=mask, rows=({}, {}))
    move_in(model, slots, prompts, PROBE_LENGTHS, (0, 1), on_device([[0], [1]], model.device))
    step = Step(model, fused_norms(model), slots, PROBE_SAMPLING, eos_ids=(), vocab_size=vocab_size, routers=routers)
    with refusing_waits(model.device):
        step.logits()
    logits = slots.states.new_zeros(2, model.config.get_text_config(decoder=True).vocab_size)
    recorder(model.device)(lambda: logits.copy_(step.logits()))()
    expected = torch.stack(
        [
            model(input_ids=ids[n : n + 1, -length:], use_cache=False).logits[0, -1]
            for n, length in enumerate(PROBE_LENGTHS)
        ]
    )
    logits, expected = logits[:, :vocab_size].float(), expected[:, :vocab_size].float()
    return float((logits - expected).abs().max() / expected.abs().max())


@contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """Inside, RuntimeError is raised where the host would wait for a GPU: a graph cannot hold that."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype, and finds not all waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
