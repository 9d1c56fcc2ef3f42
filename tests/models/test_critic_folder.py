"""What all ranks save of a critic together; what is read again is tested with the runs of PPO."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from llmrl.distributed.collectives import OneProcess
from llmrl.models.config import ModelConfig
from llmrl.models.critic import ValueModule
from llmrl.models.critic_folder import VALUE_HEAD, CriticSaver, check_critic_files, load_trunk, load_value_head
from llmrl.models.folders import ModelError
from llmrl.models.loaded import LoadedCritic
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from tests.contexts import context_of
from tests.models.tiny import DrawnHead, build, make_tokenizer


class Second(OneProcess):
    rank, world_size = 1, 2


@pytest.fixture(params=["none", "fsdp"])
def launch(request, monkeypatch):
    if request.param == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")


def critic_of(family: str, *, owns_trunk: bool = True) -> LoadedCritic:
    trunk = build(family).base_model
    return LoadedCritic(trunk=trunk, head=DrawnHead(32), adapted=None, owns_trunk=owns_trunk)


def saved(critic: LoadedCritic, folder, ranks=None) -> LocalTrainable:
    saver = CriticSaver(critic, make_tokenizer(), context=context_of(ranks))
    trained = LocalTrainable(
        ValueModule(critic.trunk, critic.head, dtype=torch.float32), OptimizerConfig(), num_steps=1
    )
    with torch.no_grad():
        critic.head.weight += 1.0
        next(critic.trunk.parameters()).add_(1.0)
    saver.save(folder, trained)
    return trained


@pytest.mark.usefixtures("launch")
def test_the_first_rank_writes_the_weights_as_they_are_by_then(family, tmp_path):
    """Families too of which transformers has no model that classifies."""
    critic = critic_of(family)
    saved(critic, tmp_path / "critic")
    theirs = AutoModel.from_pretrained(tmp_path / "critic").state_dict()
    ours = load_trunk(ModelConfig(path=str(tmp_path / "critic"))).state_dict()
    for name, p in critic.trunk.state_dict().items():
        assert torch.equal(theirs[name], p)
        assert torch.equal(ours[name], p)
    assert torch.equal(load_value_head(str(tmp_path / "critic")), critic.head.weight)
    check_critic_files(str(tmp_path / "critic"), "own")


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("owns_trunk", [True, False])
def test_other_ranks_write_nothing(owns_trunk, tmp_path):
    saved(critic_of("llama", owns_trunk=owns_trunk), tmp_path / "critic", Second())
    assert not (tmp_path / "critic").exists()


def test_a_head_on_the_actors_trunk_stands_alone(tmp_path):
    critic = critic_of("llama", owns_trunk=False)
    saved(critic, tmp_path / "critic")
    assert load_file(tmp_path / "critic" / VALUE_HEAD).keys() == {"weight"}
    assert not list((tmp_path / "critic").glob("model*"))
    check_critic_files(str(tmp_path / "critic"), "shared")
    with pytest.raises(ModelError, match=r"set critic\.network to shared"):
        check_critic_files(str(tmp_path / "critic"), "own")


@pytest.mark.parametrize("part", ["trunk", "head"])
def test_a_weight_that_is_not_finite_is_not_written(part, tmp_path):
    critic = critic_of("llama")
    with torch.no_grad():
        next(getattr(critic, part).parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="is not finite"):
        saved(critic, tmp_path / "critic")
    assert not (tmp_path / "critic" / VALUE_HEAD).exists()
