import pytest
import torch

from llmrl.microbatches import TokenBudget
from llmrl.models.config import ModelConfig
from llmrl.models.folders import ModelError
from llmrl.reports.progress import Silent
from llmrl.wiring.trunks import budget_of, report_padding, settle_passes
from tests.models.tiny import llama


def test_a_plain_model_has_its_width_and_nothing_to_say():
    assert settle_passes(llama(), 64, packing=True) == (llama().config.hidden_size, ())


def test_the_rope_is_fixed_before_the_passes_are_compared():
    """Not fixed, a row beside a longer one is another row to the probe."""
    changed = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    width, warnings = settle_passes(llama(max_position_embeddings=8, **changed), 64, packing=True)
    assert width == llama().config.hidden_size
    assert len(warnings) == 1


def test_passes_that_disagree_are_refused(monkeypatch):
    model = llama()
    monkeypatch.setattr(model.model.norm, "forward", lambda x: x + x.new_empty(x.shape).normal_())
    with pytest.raises(ModelError):
        settle_passes(model, 64, packing=True)


@pytest.mark.parametrize("packing", [True, False])
def test_a_budget_is_of_packed_passes_if_every_model_packs(packing):
    one, other = llama(), llama()
    settle_passes(one, 64, packing=packing)
    settle_passes(other, 64, packing=False)
    float32, cpu = torch.float32, torch.device("cpu")
    expected = TokenBudget(max_tokens=77, packed=packing, setting="sft.microbatch_tokens")
    assert budget_of([one], 77, float32, cpu, section="sft") == expected
    assert not budget_of([one, other], 77, float32, cpu, section="sft").packed
    assert not budget_of([one], 77, float32, torch.device("cuda"), section="sft").packed  # no kernel for float32


@pytest.mark.parametrize(("packing", "packed", "num_lines"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_padded_passes_are_reported_where_packed_ones_were_asked_for(packing, packed, num_lines):
    progress = Recorded()
    budget, model = TokenBudget(max_tokens=1, packed=packed), ModelConfig(path="here", packing=packing)
    report_padding(budget, model, progress)
    assert len(progress.messages) == num_lines
    assert all("here cannot be packed" in line for line in progress.messages)


class Recorded(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)
