"""The engine for every other model: `generate` of transformers, with our own draw of each token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llmrl.batches import Prompts, Rollout, StopReason
from llmrl.roles import Progress, Sampling, Trainable
from llmrl.rollout.responses import Responses
from llmrl.rollout.rope import pin_rope
from llmrl.rollout.sampler import Sampler
from llmrl.rollout.support import check_length
from llmrl.rollout.weights import SamplingWeights, evaluating
from llmrl.routing import RouteRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersEngine:
    """`RolloutEngine` over `model.generate`: slower than `NativeEngine`, equal in what it draws from equal logits.

    Every row is decoded until the last one is complete.

    Args:
        model: The trained model. Sampling reads its weights as `NativeEngine` does.
        eos_ids: Any of them ends a response.
        vocab_size: Length of the tokenizer; ids from there on, the padding of the embedding, have no probability.
        dtype: Precision of sampling.
        progress: Advanced by the number of responses that each step completes.
        copy_device: Device for a full copy of the weights, needed when the trained ones will be sharded; None: share
            them.
    """

    routers: Sequence[nn.Module] = ()
    """Routers of the model that samples, whose choices are recorded."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        dtype: torch.dtype,
        progress: Progress,
        copy_device: torch.device | None = None,
    ) -> None:
        self.weights = SamplingWeights(model, dtype, copy_device)
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.progress = progress

    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollout:
        """G responses to each prompt, on the model's device."""
        model = self.weights.fresh()
        longest = int(prompts.mask.sum(dim=1).max())
        check_length(model, longest, sampling.max_response_tokens)
        pin_rope(model, longest + sampling.max_response_tokens)
        prompts = prompts.to(model.device)
        responses = Responses(prompts, sampling, eos_ids=self.eos_ids)
        recorder = RouteRecorder(self.routers)
        drawing = DrawingProcessor(Sampler(sampling, vocab_size=self.vocab_size), responses, self.progress, recorder)
        with evaluating(model), recorder.recording(), own_generation_config(model, self.eos_ids, sampling):
            cast(Any, model).generate(
                prompts.ids[:, -longest:].repeat_interleave(sampling.num_responses, dim=0),
                attention_mask=prompts.mask[:, -longest:].repeat_interleave(sampling.num_responses, dim=0).long(),
                logits_processor=LogitsProcessorList([drawing]),
            )
        return responses.rollout()

    def load_weights(self, trained: Trainable) -> None:
        """Copies the weights of `trained.module.model`, unless the engine reads them live."""
        self.weights.load(trained)


class DrawingProcessor(LogitsProcessor):
    """Draws from the logits, and leaves `generate` no other choice than the drawn ids."""

    def __init__(self, sampler: Sampler, responses: Responses, progress: Progress, recorder: RouteRecorder) -> None:
        self.sampler = sampler
        self.responses = responses
        self.progress = progress
        self.recorder = recorder
        self.rows = torch.arange(len(responses.numbers), device=responses.ids.device)
        self.live = self.rows
        """The rows that are under way."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.recorder.routers:
            routes = self.recorder.take(len(self.rows))[self.live]
            self.responses.set_routes(self.live, self.responses.lengths[self.live], routes)
        stop_reasons = self.sampler.extend(self.responses, self.live, scores[self.live])
        under_way = [index for index, reason in enumerate(stop_reasons) if reason == StopReason.NONE]
        self.progress.advance(len(stop_reasons) - len(under_way))
        if len(under_way) < len(stop_reasons):
            self.live = self.live[under_way]
        drawn = self.responses.last_ids(self.rows)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


@contextmanager
def own_generation_config(model: "PreTrainedModel", eos_ids: tuple[int, ...], sampling: Sampling) -> Iterator[None]:
    """Inside, `generate` follows a fresh generation config.

    It has to be the model's own: what one that is handed to `generate` leaves open is filled in from the model's.
    """
    of_the_model = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,  # the processor has drawn
        max_new_tokens=sampling.max_response_tokens,
        eos_token_id=list(eos_ids),
        pad_token_id=0,  # fills up what has ended; never read
    )
    try:
        yield
    finally:
        model.generation_config = of_the_model
