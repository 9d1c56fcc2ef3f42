import pytest
import torch
from torch.testing import assert_close

from llmrl.functional.penalties import overlong_penalty


def test_by_hand():
    lengths = torch.tensor([0, 1, 80, 85, 90, 95, 100, 101, 5000])
    expected = torch.tensor([0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1])
    assert_close(overlong_penalty(lengths, limit=100, buffer=20), expected)


def test_by_definition():
    """Piece by piece, as the paper has it."""
    limit, buffer = 37, 11
    for length in range(60):
        if length <= limit - buffer:
            expected = 0.0
        elif length <= limit:
            expected = ((limit - buffer) - length) / buffer
        else:
            expected = -1.0
        assert_close(overlong_penalty(torch.tensor([length]), limit=limit, buffer=buffer).item(), expected)


def test_a_buffer_of_1_is_a_step():
    assert overlong_penalty(torch.tensor([8, 9, 10, 11]), limit=10, buffer=1).tolist() == [0, 0, -1, -1]


def test_it_never_rises_with_length():
    penalties = overlong_penalty(torch.arange(200), limit=128, buffer=128)
    assert (penalties.diff() <= 0).all()
    assert penalties[0] == 0


@pytest.mark.parametrize(("limit", "buffer"), [(10, 0), (10, 11), (10, -1)])
def test_the_buffer_lies_within_the_limit(limit, buffer):
    with pytest.raises(ValueError, match=rf"buffer \({buffer}\).*limit \({limit}\)"):
        overlong_penalty(torch.tensor([1]), limit=limit, buffer=buffer)
