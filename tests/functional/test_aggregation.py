from typing import get_args

import pytest
import torch

from llmrl.functional.aggregation import Aggregation
from llmrl.functional.losses import token_weights


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_every_name_gives_weights_inside_the_mask(aggregation: Aggregation):
    mask = torch.tensor([[True, True, False]])
    weights = token_weights(mask, aggregation=aggregation, num_tokens=2, num_responses=1, max_response_tokens=4)
    expected = {"token": 1 / 2, "sequence": 1 / 2, "constant": 1 / 4}[aggregation]
    assert weights.tolist() == [[expected, expected, 0.0]]
