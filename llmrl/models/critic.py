"""The critic: the trunk of a language model with one linear value, read before each token is chosen.

A network of its own by default. Where actor and critic share a trunk, the gradients of two losses meet in it and
`value_coef` has to weigh nats against squared rewards; Andrychowicz et al. 2021, arXiv:2006.05990, C5.1, found separate
networks better. The shared trunk is there for its memory: one model, one forward pass for both.

The head starts at zero, so that every value is 0 before the critic has learned anything, and computes in float32.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmrl.batches import Sequences, TokenOutputs
from llmrl.models.policy import PolicyModule
from llmrl.models.training import initialize_head
from llmrl.models.trunk import HiddenStates, encode, on_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueHead(nn.Linear):
    """Linear layer from a hidden state to a value, at first 0, in float32 whatever the precision of the trunk."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)
        initialize_head(self, "zero")

    def forward(self, input: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """Values of hidden states."""
        with torch.autocast(input.device.type, enabled=False):
            return torch.squeeze_copy(super().forward(input.float()), -1)  # FSDP warns of a view, which its hooks mark

    def read(self, hidden: HiddenStates, sequences: Sequences) -> dict[str, Tensor]:
        """`values` (B, T) and `last_values` (B,) from the hidden states."""
        mask = sequences.response_mask
        return {"values": on_mask(mask, self(hidden.before(mask))), "last_values": self(hidden.last())}


class ValueModule(nn.Module):
    """Trunk and value head as the module that is wrapped and trained: its forward uses every parameter."""

    def __init__(self, trunk: "PreTrainedModel", head: ValueHead, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.dtype = dtype

    def forward(self, sequences: Sequences) -> dict[str, Tensor]:
        """`values` before each token in the response mask, 0 elsewhere; `last_values` after the last token."""
        return self.head.read(encode(self.trunk, sequences, dtype=self.dtype), sequences)


class SharedModule(nn.Module):
    """Actor and critic on one trunk: the module that is wrapped and trained."""

    def __init__(self, policy: PolicyModule, head: ValueHead) -> None:
        super().__init__()
        self.policy = policy
        self.head = head

    @property
    def model(self) -> "PreTrainedModel":
        """The actor, which engines sample from."""
        return self.policy.model

    def forward(self, sequences: Sequences) -> dict[str, Tensor]:
        """Outputs of actor and critic, in one pass."""
        hidden = self.policy.encode(sequences)
        return self.policy.read(hidden, sequences) | self.head.read(hidden, sequences)


class DistilledModule(SharedModule):
    """Actor with an auxiliary head for values on its trunk, beside a critic that has a trunk of its own."""

    def forward(self, sequences: Sequences) -> dict[str, Tensor]:
        """Outputs of the actor, and `auxiliary_values` before each token in the response mask, 0 elsewhere."""
        hidden = self.policy.encode(sequences)
        values = self.head.read(hidden, sequences)["values"]
        return self.policy.read(hidden, sequences) | {"auxiliary_values": values}


class TransformersValueFunction:
    """`ValueFunction` over a `ValueModule`, wrapped or not."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def values(self, sequences: Sequences) -> TokenOutputs:
        """See `ValueFunction`."""
        return TokenOutputs(named=self.module(sequences))


class SharedTrunk:
    """`ActorCritic` over a `SharedModule`, wrapped or not."""

    share_trunk = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def both(self, sequences: Sequences) -> TokenOutputs:
        """See `ActorCritic`."""
        return TokenOutputs(named=self.module(sequences))

    def logprobs(self, sequences: Sequences) -> TokenOutputs:
        """See `Policy`."""
        return self.both(sequences)

    def values(self, sequences: Sequences) -> TokenOutputs:
        """See `ValueFunction`."""
        return self.both(sequences)
