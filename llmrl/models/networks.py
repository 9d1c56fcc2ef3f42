"""Actor and critic that are two networks; those on one trunk are in `critic`."""

from llmrl.batches import Sequences, TokenOutputs
from llmrl.roles import Policy, ValueFunction


class SeparateNetworks:
    """`ActorCritic` of two networks."""

    share_trunk = False

    def __init__(self, actor: Policy, critic: ValueFunction) -> None:
        self.logprobs = actor.logprobs
        self.values = critic.values

    def both(self, sequences: Sequences) -> TokenOutputs:
        """See `ActorCritic`."""
        return self.logprobs(sequences).merge(self.values(sequences))
