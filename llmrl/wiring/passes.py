"""Check that the engine samples from the policy that is trained, on a few tokens before a run begins."""

import torch

from llmrl.batches import Prompts
from llmrl.functional.streams import Purpose
from llmrl.messages import class_and_message
from llmrl.models.loaded import Actor
from llmrl.models.policy import PolicyModule
from llmrl.models.probe import exact_float32, probe_rows
from llmrl.models.vocabulary import num_token_ids
from llmrl.reports.progress import Silent
from llmrl.roles import Sampling
from llmrl.rollout.config import RolloutConfig
from llmrl.rollout.support import RolloutError, position_limit
from llmrl.wiring.engines import build_engine

TOLERANCE = 1e-3
"""Largest difference allowed between two log-probabilities of one token, in nats."""
RESPONSE_TOKENS = 3
"""Tokens per response: enough to decode from a cache that a decode step has written to."""


@torch.no_grad()
def check_sampling(actor: Actor, config: RolloutConfig) -> None:
    """Draws a few tokens after ragged prompts, in float32, and scores them as training does.

    Raises:
        RolloutError: The engine samples from another distribution.
    """
    engine = build_engine(config, actor.model, actor.tokenizer, dtype=torch.float32, progress=Silent())
    exact = PolicyModule(actor.model, actor.module.head, temperature=config.temperature, dtype=torch.float32)
    sampling = Sampling(
        temperature=config.temperature,
        num_responses=1,
        max_response_tokens=RESPONSE_TOKENS,
        greedy=False,
        seed=0,
        purpose=Purpose.GENERATION,
        first_response=0,
    )
    with exact_float32():
        try:
            rollout = engine.generate(_ragged_prompts(actor), sampling)
        except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            if config.engine == "native" or isinstance(error, RolloutError):
                raise  # what `generate` of transformers cannot do comes in these classes
            raise _refusal(actor, config, class_and_message(error)) from error
        logprobs = exact(rollout.sequences)["logprobs"]
    gap = float((logprobs - rollout.rollout_logprobs).abs().max())
    if not gap <= TOLERANCE:
        reason = f"its log-probabilities differ by {gap:.2g} from those of the pass that trains"
        raise _refusal(actor, config, reason)


def _refusal(actor: Actor, config: RolloutConfig, reason: str) -> RolloutError:
    way_out = "set rollout.engine=transformers" if config.engine == "native" else "choose another model"
    return RolloutError(
        f"the {config.engine} engine cannot decode models of type {actor.model.config.model_type}: {reason}; {way_out}"
    )


def _ragged_prompts(actor: Actor) -> Prompts:
    """Two prompts, padded left, as long as the positions of the model allow."""
    ids = probe_rows(actor.model, num_token_ids(actor.tokenizer, actor.model))
    limit = position_limit(actor.model)
    if limit is not None:
        ids = ids[:, : max(limit - RESPONSE_TOKENS, 1)]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : ids.shape[1] // 2] = False
    return Prompts(ids=ids, mask=mask, rows=({}, {}))
