"""The implicit critic: heads of multi-token prediction on the actor's trunk, each with a value.

Head k makes of the state before token t a state for token t+k, by one residual block (Cai et al. 2024,
arXiv:2401.10774, section 2.1.1), which the actor's own LM head and a linear value read:

    z_0 = h_t,    z_k = h_t + SiLU(W_k h_t)
    token t+k ~ LM head(z_k),    v_k = w_k · z_k

Parallel heads as those of Gloeckle et al. 2024, arXiv:2404.19737; the LM head is shared as in DeepSeek-V3,
arXiv:2412.19437. All W and w begin at zero, so that a fresh head predicts what the actor does, and every value is 0.
Heads that a model folder may bring for multi-token prediction, which transformers does not load, are not read.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llmrl.batches import Sequences
from llmrl.functional.mtp import next_chosen
from llmrl.models.critic import ValueHead
from llmrl.models.policy import PolicyModule
from llmrl.models.trunk import computing_in, on_mask


class MTPHeads(nn.Module):
    """Residual blocks and values of K heads beyond the policy's own, in float32 whatever the precision of the trunk."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        blocks = [nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(num_heads)]
        for block in blocks:
            nn.init.zeros_(block.weight)
        self.blocks = nn.ModuleList(blocks)
        self.values = nn.ModuleList(ValueHead(hidden_size) for _ in range(1 + num_heads))

    def states(self, hidden: Float[Tensor, "N H"]) -> list[Float[Tensor, "N H"]]:
        """z_0 to z_K."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            return [hidden, *(hidden + nn.functional.silu(block(hidden)) for block in self.blocks)]

    def read(self, hidden: Float[Tensor, "N H"]) -> list[Float[Tensor, " N"]]:
        """v_0 to v_K."""
        return [value(state) for value, state in zip(self.values, self.states(hidden), strict=True)]


class MTPModule(nn.Module):
    """Actor and implicit critic on one trunk: the module that is wrapped and trained, with the frozen target heads."""

    def __init__(self, policy: PolicyModule, heads: MTPHeads) -> None:
        super().__init__()
        self.policy = policy
        self.heads = heads
        self.targets = copy.deepcopy(heads).requires_grad_(False)

    @property
    def model(self) -> Any:
        """The actor, which engines sample from."""
        return self.policy.model

    def forward(self, sequences: Sequences) -> dict[str, Tensor]:
        """Outputs of the actor and, of the heads k from 0 to K, in one pass:

        ``values/k``           v_k at each token; `values` is v_0, `last_values` that after the last token
        ``target_values/k``    the same by the target heads, without gradient; `target_last_values` too
        ``predicted/k``        k > 0: log-probability of token t+k at token t, nats; only where a gradient is asked for
        """
        hidden, mask = self.policy.encode(sequences), sequences.response_mask
        before, last = hidden.before(mask), hidden.last()
        states = self.heads.states(before)
        values = [on_mask(mask, value(state)) for value, state in zip(self.heads.values, states, strict=True)]
        outputs = self.policy.read(hidden, sequences) | {"values": values[0], "last_values": self.heads.read(last)[0]}
        outputs |= {f"values/{k}": x for k, x in enumerate(values)} | self._targets(before, last, mask)
        if torch.is_grad_enabled():
            outputs |= self._predictions(states, sequences)
        return outputs

    @torch.no_grad()
    def _targets(
        self, before: Float[Tensor, "M H"], last: Float[Tensor, "B H"], mask: Bool[Tensor, "B T"]
    ) -> dict[str, Tensor]:
        values = {f"target_values/{k}": on_mask(mask, x) for k, x in enumerate(self.targets.read(before))}
        return values | {"target_last_values": self.targets.read(last)[0]}

    def _predictions(self, states: list[Float[Tensor, "M H"]], sequences: Sequences) -> dict[str, Tensor]:
        mask = known = sequences.response_mask
        ids, outputs = sequences.response_ids, {}
        for k, state in enumerate(states[1:], start=1):
            ids, known = next_chosen(ids, mask), next_chosen(known, mask)
            with computing_in(self.policy.dtype, ids.device):
                logprobs, _ = self.policy.head(
                    self.policy.model, state[known[mask]], ids[known], self.policy.temperature
                )
            outputs[f"predicted/{k}"] = on_mask(known, logprobs)
        return outputs


class TargetHeads:
    """`MovingTargets` that average live heads in frozen ones."""

    def __init__(self, live: nn.Module, averaged: nn.Module) -> None:
        self.live, self.averaged = live, averaged

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """See `MovingTargets`."""
        for average, weight in zip(self.averaged.parameters(), self.live.parameters(), strict=True):
            average.lerp_(weight.to(average), rate)

    def state_dict(self) -> dict[str, Any]:
        """The averages, by name."""
        return {name: weight.detach().clone() for name, weight in self.averaged.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.averaged.load_state_dict(state)
