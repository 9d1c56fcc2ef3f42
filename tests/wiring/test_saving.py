"""What all ranks save together."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.distributed.collectives import OneProcess
from llmrl.models.folders import ModelError
from llmrl.models.saving import Saver
from llmrl.optim.config import OptimizerConfig
from llmrl.optim.local import LocalTrainable
from tests.contexts import context_of
from tests.models.tiny import FAMILIES, make_tokenizer


class Second(OneProcess):
    rank, world_size = 1, 2


@pytest.fixture(params=["none", "fsdp"])
def launch(request, monkeypatch):
    if request.param == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize(("ranks", "writes"), [(OneProcess(), True), (Second(), False)])
def test_the_first_rank_writes_the_weights_as_they_are_by_then(ranks, writes, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES["gpt2"]()
    saver = Saver(model, None, make_tokenizer(), dtype=torch.float32, context=context_of(ranks))
    trained = LocalTrainable(model, OptimizerConfig(), num_steps=1)
    with torch.no_grad():
        model.transformer.wte.weight += 1.0
    saver.save(tmp_path / "final", trained, {"record.json": {"a": 1}})
    assert (tmp_path / "final").exists() == writes
    if writes:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        assert torch.equal(saved.transformer.wte.weight, model.transformer.wte.weight)
        assert (tmp_path / "final" / "record.json").read_text() == '{\n "a": 1\n}\n'


@pytest.mark.parametrize(("ranks", "tries"), [(OneProcess(), True), (Second(), False)])
def test_what_stands_beside_the_weights_is_tried_out_before_training(ranks, tries, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("a setting that cannot be saved")

    model, tokenizer = FAMILIES["gpt2"](), make_tokenizer()
    monkeypatch.setattr(type(model.config), "save_pretrained", refuse)
    with pytest.raises(ModelError, match="a setting that cannot be saved") if tries else nullcontext():
        Saver(model, None, tokenizer, dtype=torch.float32, context=context_of(ranks))


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("ranks", [OneProcess(), Second()])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_not_written_on_any_rank(ranks, bad, tmp_path):
    """The model that was saved earlier stays. A frozen weight counts as well."""
    torch.manual_seed(0)
    model = FAMILIES["gpt2"]()
    model.transformer.wte.weight.requires_grad_(False)
    saver = Saver(model, None, make_tokenizer(), dtype=torch.float32, context=context_of(ranks))
    trained = LocalTrainable(model, OptimizerConfig(), num_steps=1)
    saver.save(tmp_path / "final", trained)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = bad
    with pytest.raises(
        FloatingPointError, match=r"the weight transformer\.wte\.weight is not finite, so the model is not"
    ):
        saver.save(tmp_path / "final", trained)
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()) == before
