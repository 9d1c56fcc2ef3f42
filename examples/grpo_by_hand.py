"""GRPO by hand: the whole loop with nothing hidden, in less than a minute on a CPU.

A tiny model learns to add from answers of which half are wrong. Then it samples answers, a line of Python scores them,
and GRPO (arXiv:2402.03300) makes the right ones likelier. From the root: python examples/grpo_by_hand.py
"""

import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmrl.batches import Prompts, Rollout, Sequences
from llmrl.data.chat import as_sequences, padded
from llmrl.functional.advantages import group_relative
from llmrl.functional.logprobs import token_logprobs
from llmrl.functional.losses import clipped_policy_loss, token_weights
from llmrl.functional.masking import masked_sum
from llmrl.functional.streams import Purpose
from llmrl.reports.progress import Silent
from llmrl.roles import Sampling
from llmrl.rollout.native import NativeEngine

FOLDER = "recipes/models/tiny_char_llama"
PROMPTS_PER_ITERATION, GROUP_SIZE, MAX_RESPONSE_TOKENS = 32, 8, 3
SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


def logprobs_of(model, sequences: Sequences) -> torch.Tensor:
    """Log-probabilities (B, T) of the response tokens: each logit predicts the token after it."""
    ids = torch.cat([sequences.prompt_ids, sequences.response_ids], dim=1)
    mask = torch.cat([sequences.prompt_mask, sequences.response_mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # prompts are padded on the left
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits
    return token_logprobs(logits[:, -sequences.response_ids.shape[1] - 1 : -1], sequences.response_ids)


def grpo_loss(model, rollout: Rollout, scores: torch.Tensor) -> torch.Tensor:
    """The clipped policy loss with group-relative advantages, for the only optimizer step on a rollout."""
    mask = rollout.sequences.response_mask
    logprobs = logprobs_of(model, rollout.sequences)
    old_logprobs = logprobs.detach()  # one step per rollout: these are the weights that sampled
    advantages = group_relative(scores, rollout.group_ids)[:, None].expand_as(logprobs)
    weights = token_weights(
        mask,
        aggregation="token",  # every token of the rollout counts the same
        num_tokens=mask.sum(),
        num_responses=mask.any(dim=1).sum(),
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )
    loss, _ = clipped_policy_loss(logprobs, old_logprobs, advantages, weights, clip_low=0.2, clip_high=0.2)
    return loss


def imitate(model, tokenizer, optimizer, num_steps: int) -> None:
    """Supervised start: maximizes the log-probability of demonstrations, half of them with a random digit."""
    for _ in range(num_steps):
        rows = random.sample(SUMS, 64)
        answers = [row["answer"] if random.random() < 0.5 else str(random.randrange(10)) for row in rows]
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers)["input_ids"]]
        batch = as_sequences(prompts, responses)
        loss = -masked_sum(logprobs_of(model, batch), batch.response_mask) / batch.response_mask.sum()
        step(optimizer, loss)


def step(optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main(num_imitated: int = 200, num_iterations: int = 40) -> list[float]:
    """Trains, prints the mean score of each iteration, and returns these."""
    random.seed(0), torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER), dtype=torch.float32)
    end, size = (tokenizer.eos_token_id,), len(tokenizer)
    engine = NativeEngine(model, eos_ids=end, vocab_size=size, dtype=torch.float32, max_rows=256, progress=Silent())
    imitate(model, tokenizer, torch.optim.AdamW(model.parameters(), lr=2e-3), num_imitated)
    optimizer, means = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), []
    for iteration in range(num_iterations):
        rows = random.sample(SUMS, PROMPTS_PER_ITERATION)
        ids, mask = padded(tokenizer([row["prompt"] for row in rows])["input_ids"], left=True)
        sampling = Sampling(
            temperature=1.0, num_responses=GROUP_SIZE, max_response_tokens=MAX_RESPONSE_TOKENS, greedy=False,
            seed=0, purpose=Purpose.TRAINING, first_response=iteration * PROMPTS_PER_ITERATION * GROUP_SIZE,
        )  # fmt: skip
        with torch.no_grad():  # the engine reads the weights that are trained: they need not be published
            rollout = engine.generate(Prompts(ids=ids, mask=mask, rows=tuple(rows)), sampling)
        texts = tokenizer.batch_decode(rollout.sequences.response_ids, skip_special_tokens=True)
        scores = torch.tensor([float(text == row["answer"]) for text, row in zip(texts, rollout.rows, strict=True)])
        step(optimizer, grpo_loss(model, rollout, scores))
        means.append(float(scores.mean()))
        print(f"iteration {iteration + 1}  score {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    main()
