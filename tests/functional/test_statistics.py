import pytest

from llmrl.functional.statistics import Explained, Maximum, Mean, Moments, Statistic, Total

KINDS = [Mean(6.0, 3.0), Total(6.0), Maximum(6.0), Moments(3.0, 6.0, 14.0), Explained(3.0, 6.0, 14.0, 0.0, 2.0)]


def test_kinds_are_told_apart_though_their_numbers_are_equal():
    """They are pooled by kind; as tuples a total and a maximum of 1 are the same."""
    assert Total(1.0) == Maximum(1.0)
    assert not isinstance(Total(1.0), Maximum)
    assert not isinstance(Mean(1.0, 2.0), Moments)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_statistic_that_nobody_changes(kind):
    assert isinstance(kind, Statistic)
    with pytest.raises(AttributeError):
        setattr(kind, kind._fields[0], 0.0)


def test_the_order_of_the_numbers():
    total, num = Mean(total=6.0, num=3.0)
    assert total / num == 2.0
    num, total, square = Moments(num=3.0, total=6.0, square=14.0)  # 1, 2, 3
    assert square / num - (total / num) ** 2 == pytest.approx(2 / 3)
    residual_total, residual_square = Explained(3.0, 6.0, 14.0, residual_total=0.0, residual_square=2.0)[3:]
    assert residual_square / num - (residual_total / num) ** 2 == pytest.approx(2 / 3)  # 1, 0, -1
