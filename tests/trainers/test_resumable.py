import pytest
import torch
from torch import nn

from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from llmrl.roles import StateMismatch
from llmrl.trainers.resumable import Resumable


class Counting:
    """A source that counts what was taken."""

    def __init__(self):
        self.taken = 0

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Doubling(Resumable):
    """Its iteration takes one thing from the source and steps both weights; `failing` says where it breaks."""

    def __init__(self):
        torch.manual_seed(0)
        config = OptimizerConfig(learning_rate=0.1)
        names = ("actor", "critic")
        super().__init__({name: LocalTrainable(nn.Linear(2, 1), config, num_steps=9) for name in names}, Counting())

    def iterate(self, failing=None):
        self.source.taken += 1
        for name, trainable in self.trained.items():
            trainable.backward(trainable.module(torch.ones(1, 2)).sum())
            if failing == f"before {name}":
                raise MemoryError
            trainable.optimizer_step()
        self.finish_iteration(self.iteration + 1)

    def weights(self):
        return torch.cat([p.detach().flatten() for t in self.trained.values() for p in t.module.parameters()])


def test_a_new_one_stands_at_its_start():
    trainer = Doubling()
    assert trainer.position() == {"iteration": 0, "source": {"taken": 0}}
    assert trainer.rewind()


def test_before_any_step_it_goes_back_and_leaves_no_gradient():
    trainer, undisturbed = Doubling(), Doubling()
    trainer.iterate()
    with pytest.raises(MemoryError):
        trainer.iterate(failing="before actor")
    assert trainer.source.taken == 2
    assert trainer.rewind()
    assert trainer.position() == {"iteration": 1, "source": {"taken": 1}}
    trainer.iterate()
    undisturbed.iterate()
    undisturbed.iterate()
    assert trainer.weights().equal(undisturbed.weights())


def test_after_the_first_of_two_modules_has_stepped_there_is_no_way_back():
    trainer = Doubling()
    with pytest.raises(MemoryError):
        trainer.iterate(failing="before critic")
    assert not trainer.rewind()
    assert trainer.source.taken == 1


def test_a_state_continues_bit_for_bit_and_can_be_gone_back_to():
    straight, stopped, resumed = Doubling(), Doubling(), Doubling()
    for _ in range(3):
        straight.iterate()
    stopped.iterate()
    stopped.iterate()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.iteration == 2
    with pytest.raises(MemoryError):
        resumed.iterate(failing="before actor")
    assert resumed.rewind()
    resumed.iterate()
    assert resumed.weights().equal(straight.weights())
    assert resumed.position() == straight.position()


def test_a_state_of_other_modules_is_refused_and_changes_nothing():
    trainer, other = Doubling(), Doubling()
    other.iterate()
    state, before = other.state_dict(), trainer.weights()
    del state["trained"]["critic"]
    with pytest.raises(StateMismatch, match=r"that run trained actor, this one trains actor and critic; resume with"):
        trainer.load_state_dict(state)
    assert torch.equal(trainer.weights(), before)
    assert trainer.iteration == 0


def test_weights_have_moved_between_the_first_step_and_the_end_of_the_iteration():
    trainer = Doubling()
    assert not trainer.has_moved
    with pytest.raises(MemoryError):
        trainer.iterate(failing="before critic")
    assert trainer.has_moved
    trainer.finish_iteration(1)
    assert not trainer.has_moved
