"""Iterations until GRPO has learned a game of two turns: credit of the episode, and of each turn.

    python benchmarks/credit.py

The actor names one of four tokens, reads one of two that the environment draws by it, and names another. Each turn has
its reward, so that the best policy is known; the policy that has been learned is compared with it exactly, by
enumeration. The loop, the engine, conversations and environments are those of a run; the model is a llama of one layer.
"""

import argparse
import json
from collections.abc import Collection, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmrl.algorithms.config import GRPOConfig
from llmrl.algorithms.grpo import GRPO
from llmrl.batches import Prompts
from llmrl.data.rendering import Rendering
from llmrl.distributed.collectives import OneProcess, make_context
from llmrl.environments.config import EnvironmentConfig
from llmrl.environments.conversations import Conversations
from llmrl.environments.engine import EnvironmentEngine
from llmrl.environments.environment import Environment, Message, Turn
from llmrl.environments.episode import Episode, Request
from llmrl.environments.exchange import Exchange, Exchanges
from llmrl.environments.hosting import Host
from llmrl.environments.reward import EpisodeReward
from llmrl.functional.streams import Purpose
from llmrl.microbatches import TokenBudget
from llmrl.models.heads import choose_head
from llmrl.models.policy import PolicyModule, TransformersPolicy
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.reports.progress import Silent
from llmrl.roles import Algorithm, Sampling
from llmrl.rollout.native import NativeEngine
from llmrl.trainers.config import UpdateConfig
from llmrl.trainers.rl import RLTrainer

ACTIONS, SHOWN = range(4), range(2)
PROMPT = 3
CHANCE = (0.7, 0.5, 0.3, 0.6)
"""That token 1 is shown after each first token, and else token 0."""
FIRST = (0.0, 0.1, -0.1, 0.0)
"""Expected reward of each first token."""
SECOND = ((-0.4, 0.0, 0.3, -0.3), (0.6, -0.3, -0.5, 0.1))
"""Reward of each second token, by what was shown."""
CREDITS: tuple[Literal["response", "turn"], ...] = ("response", "turn")
LEARNED = 0.9
"""Share of the way from the first policy's expected reward to the best one, at which the game counts as learned."""

Play = tuple[int, int, int]
"""What the actor named, what it was shown, and what it named then."""
PLAYS: tuple[Play, ...] = tuple(product(ACTIONS, SHOWN, ACTIONS))


def main() -> None:
    args = parse()
    curves = {credit: [learn(credit, seed, args) for seed in range(args.seeds)] for credit in CREDITS}
    iterations = {credit: [iterations_until(LEARNED, curve) for curve in curves[credit]] for credit in CREDITS}
    for credit, counts in iterations.items():
        print(f"credit {credit:8s}  iterations until {LEARNED:.0%} is learned, by seed: {counts}")
    settings = {"coin": args.coin, "responses": args.responses, "group_size": args.group_size, "rate": args.rate}
    record = {"describes": __doc__, "settings": settings, "iterations": iterations, "curves": curves}
    if args.output is not None:
        args.output.write_text(json.dumps(record) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Iterations to learn a game of two turns, by how credit is given.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--responses", type=int, default=64, help="episodes of an iteration")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--coin", type=float, default=1.0, help="luck in the reward of the first turn")
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate")
    parser.add_argument("--output", type=Path, help="writes the record there")
    return parser.parse_args()


def learn(credit: Literal["response", "turn"], seed: int, args: argparse.Namespace) -> list[float]:
    """Share of the way to the best expected reward, after each iteration, until it is learned."""
    model = make_model(seed)
    module = policy_over(model)
    algorithm = GRPO(
        GRPOConfig(group_size=args.group_size, credit=credit),
        actor=TransformersPolicy(module),
        reference=None,
        max_response_tokens=4,
        one_step=True,
    )
    optimizer = OptimizerConfig(learning_rate=args.rate, schedule="constant")
    trainer = make_trainer(
        algorithm,
        model,
        {"actor": LocalTrainable(module, optimizer, num_steps=args.iterations)},
        coin=args.coin,
        group_size=args.group_size,
        seed=seed,
        num_responses=args.responses,
    )
    first, best = expected_reward(model), best_reward()
    curve: list[float] = []
    while len(curve) < args.iterations and iterations_until(LEARNED, curve) is None:
        trainer.iterate()
        curve.append(round((expected_reward(model) - first) / (best - first), 4))
    return curve


def iterations_until(share: float, curve: Sequence[float]) -> int | None:
    """None: it was not learned."""
    return next((number for number, reached in enumerate(curve, start=1) if reached >= share), None)


class Game(Environment):
    """The game.

    Args:
        coin: What a coin adds to the first reward, or takes off: luck that the second token has no part in.
    """

    def __init__(self, coin: float) -> None:
        self.coin = coin

    def start(self, row: Any) -> str:
        return str(PROMPT)

    def respond(self, message: Message) -> Turn:
        named = int(message.text)
        if message.turn == 2:
            return Turn(done=True, reward=SECOND[self.shown][named])
        self.shown = int(self.random.random() < CHANCE[named])
        return Turn(str(self.shown), reward=FIRST[named] + self.random.choice((self.coin, -self.coin)))


class Link:
    """To an episode that answers at once."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode
        self.arrived: list[str] = []

    def send(self, request: Request) -> None:
        self.arrived.extend(self.episode.lines(request))

    def lines(self) -> list[str]:
        lines, self.arrived = self.arrived, []
        return lines

    def drop(self) -> None: ...


class Direct(Exchanges):
    """`Host` whose episodes run where they are asked: threads would take most of the time."""

    def __init__(self, coin: float) -> None:
        super().__init__(timeout_s=60.0)
        self.coin = coin

    def make_link(self) -> "Link":
        return Link(Episode(partial(Game, self.coin), {}))

    def ready(self, waiting: Collection[Exchange]) -> Collection[Exchange]:
        return waiting

    def load(self) -> None: ...


class Numbers(Rendering):
    """Texts of numbers, which are ids."""

    def __init__(self) -> None: ...

    def opening(self, prompt: Any) -> list[int]:
        return [int(word) for word in prompt.split()]

    def between(self, messages: Any, observation: Any, *, last_id: int) -> list[int]:
        return self.opening(observation)


class Rows:
    """`PromptSource` of rows without columns."""

    def next(self, num_prompts: int) -> Prompts:
        ids = torch.zeros(num_prompts, 1, dtype=torch.long)
        return Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), rows=({},) * num_prompts)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_model(seed: int, *, spread: float = 0.05) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=len(ACTIONS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8,
        initializer_range=spread,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(shape)


def policy_over(model: LlamaForCausalLM) -> PolicyModule:
    return PolicyModule(model, choose_head(model, len(ACTIONS)), temperature=1.0, dtype=torch.float32)


def make_engine(model: LlamaForCausalLM, host: Host) -> EnvironmentEngine:
    """Every token ends a turn."""
    begin = partial(
        Conversations,
        rendering=Numbers(),
        read=lambda ids: (str(ids[0]), str(ids[0]), []),
        config=EnvironmentConfig(name="given:game"),
        prompt_column="prompt",
        max_prompt_tokens=1,
    )
    native = NativeEngine(
        model,
        eos_ids=tuple(ACTIONS),
        vocab_size=len(ACTIONS),
        dtype=torch.float32,
        max_rows=1024,
        progress=Silent(),
    )
    return EnvironmentEngine(native, host=host, begin=begin, max_turn_tokens=None, progress=Silent())


def make_trainer(
    algorithm: Algorithm,
    model: LlamaForCausalLM,
    trained: dict[str, LocalTrainable],
    *,
    coin: float,
    group_size: int,
    seed: int,
    num_responses: int,
) -> RLTrainer:
    """The real loop around the game."""
    sampling = Sampling(
        temperature=1.0,
        num_responses=group_size,
        max_response_tokens=4,
        greedy=False,
        seed=seed,
        purpose=Purpose.TRAINING,
        first_response=0,
    )
    return RLTrainer(
        algorithm=algorithm,
        engine=make_engine(model, Direct(coin)),
        reward=EpisodeReward("game"),
        prompts=Rows(),
        trained=trained,
        update=UpdateConfig(minibatch_size=num_responses),
        budget=TokenBudget(max_tokens=8192),
        prompts_per_iteration=num_responses // group_size,
        sampling=sampling,
        context=make_context(OneProcess(), Silent()),
        observe=lambda iteration, experience: None,
        reference=None,
        auxiliary=None,
        balance=None,
    )


@torch.no_grad()
def policy_of(model: LlamaForCausalLM) -> tuple[list[float], dict[tuple[int, int], list[float]]]:
    """Probabilities of the first token, and of the second by what was named and shown before."""
    contexts = list(product(ACTIONS, SHOWN))

    def distribution(ids: Sequence[Sequence[int]]) -> Tensor:
        return model(input_ids=torch.tensor(ids)).logits[:, -1].double().softmax(-1)

    first = distribution([[PROMPT]])[0].tolist()
    second = distribution([[PROMPT, *context] for context in contexts]).tolist()
    return first, dict(zip(contexts, second, strict=True))


def chance(named: int, shown: int) -> float:
    return CHANCE[named] if shown else 1 - CHANCE[named]


def expected_reward(model: LlamaForCausalLM) -> float:
    first, second = policy_of(model)
    return sum(first[a] * chance(a, o) * second[a, o][b] * (FIRST[a] + SECOND[o][b]) for a, o, b in PLAYS)


def best_reward() -> float:
    return max(FIRST[a] + sum(chance(a, o) * max(SECOND[o]) for o in SHOWN) for a in ACTIONS)


if __name__ == "__main__":
    main()
