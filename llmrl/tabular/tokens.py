"""Language as a decision process: a state is the tokens so far, an action the next token, a move appends it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from llmrl.tabular.mdp import MDP

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class TokenMDP:
    """The process, and the response of each of its states: `prefixes[0]` is empty, finished ones are terminal."""

    mdp: MDP
    prefixes: list[Prefix]

    def policy_of(
        self, next_logits: Callable[[Int[Tensor, "B L"]], Float[Tensor, "B V"]], *, prompt: Prefix
    ) -> Float64[Tensor, "S V"]:
        """The policy of a language model: its distribution of the next token, after a prompt, in every state.

        Args:
            next_logits: Logits of the next token from rows of ids of one length, such as
                ``lambda ids: model(ids).logits[:, -1]``. Called once per length of a prefix.
            prompt: Token ids, at least one.

        Raises:
            ValueError: The prompt is empty.
        """
        if not prompt:
            raise ValueError("prompt () must have at least one token: a language model has no distribution before it")
        policy = self.mdp.uniform_policy()
        for _, group in itertools.groupby(range(len(self.prefixes)), key=lambda state: len(self.prefixes[state])):
            states = [state for state in group if not self.mdp.terminal[state]]
            if states:
                ids = torch.tensor([prompt + self.prefixes[state] for state in states])
                policy[states] = next_logits(ids).double().softmax(dim=1)
        return policy


def token_mdp(
    score: Callable[[Prefix], float], *, vocabulary: int, max_tokens: int, eos: int | None, gamma: float = 1.0
) -> TokenMDP:
    """Every response of up to `max_tokens` tokens as a tree, its score paid by the move that ends it.

    A response ends with its EOS, or where the limit truncates it: then it is scored too, and nothing is bootstrapped.

    Args:
        score: Score of a finished response, its EOS included.
        vocabulary: Number of tokens V; the ids are 0 to V - 1.
        max_tokens: Limit of a response. There are up to V^max_tokens responses.
        eos: Id that ends a response. None: only the limit does.
        gamma: Discount per token.

    Raises:
        ValueError: `max_tokens` is below 1, or `eos` is outside the vocabulary.

    Reference: Rafailov et al. 2024, arXiv:2404.12358, section 3.
    """
    if max_tokens < 1 or (eos is not None and not 0 <= eos < vocabulary):
        raise ValueError(
            f"max_tokens ({max_tokens}) must be at least 1, and eos ({eos}) None or below vocabulary ({vocabulary})"
        )
    prefixes = _prefixes(vocabulary, max_tokens, eos)
    number = {prefix: state for state, prefix in enumerate(prefixes)}
    terminal = torch.tensor([_is_finished(prefix, max_tokens, eos) for prefix in prefixes])
    transitions = torch.zeros(len(prefixes), vocabulary, len(prefixes), dtype=torch.float64)
    rewards = torch.zeros(len(prefixes), vocabulary, dtype=torch.float64)
    for state, prefix in enumerate(prefixes):
        for token in range(vocabulary):
            target = state if terminal[state] else number[(*prefix, token)]
            transitions[state, token, target] = 1.0
            if target != state and terminal[target]:
                rewards[state, token] = score(prefixes[target])
    start = torch.zeros(len(prefixes), dtype=torch.float64)
    start[0] = 1.0
    return TokenMDP(
        MDP(transitions=transitions, rewards=rewards, terminal=terminal, start=start, gamma=gamma), prefixes
    )


def _is_finished(prefix: Prefix, max_tokens: int, eos: int | None) -> bool:
    return len(prefix) == max_tokens or (len(prefix) > 0 and prefix[-1] == eos)


def _prefixes(vocabulary: int, max_tokens: int, eos: int | None) -> list[Prefix]:
    """Every response, finished or not, the shorter ones first."""
    layers: list[list[Prefix]] = [[()]]
    for _ in range(max_tokens):
        open_ones = [prefix for prefix in layers[-1] if not _is_finished(prefix, max_tokens, eos)]
        layers.append([(*prefix, token) for prefix in open_ones for token in range(vocabulary)])
    return list(itertools.chain(*layers))
