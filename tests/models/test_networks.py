import torch

from llmrl.batches import TokenOutputs
from llmrl.models.networks import SeparateNetworks
from llmrl.roles import ActorCritic

from .tiny import make_sequences


class Network:
    """Actor or critic that answers with one number, and counts what it is asked."""

    def __init__(self, name, number):
        self.name, self.number, self.num_asked = name, number, 0

    def answer(self, sequences):
        self.num_asked += 1
        return TokenOutputs(named={self.name: torch.full(sequences.response_mask.shape, self.number)})

    logprobs = values = answer


def test_each_network_is_asked_for_its_own():
    actor, critic, sequences = Network("logprobs", -1.0), Network("values", 2.0), make_sequences()
    both = SeparateNetworks(actor, critic)
    assert isinstance(both, ActorCritic)
    assert not both.share_trunk
    assert (both.logprobs(sequences).logprobs == -1.0).all()
    assert (actor.num_asked, critic.num_asked) == (1, 0)
    assert (both.values(sequences).values == 2.0).all()
    outputs = both.both(sequences)
    assert ((outputs.logprobs == -1.0) & (outputs.values == 2.0)).all()
    assert (actor.num_asked, critic.num_asked) == (2, 2)
