import pytest

from llmrl.data.files import DataError
from llmrl.data.source import ShuffledSource


def source(num_rows: int = 7, seed: int = 3) -> ShuffledSource[str]:
    return ShuffledSource([f"row {n}" for n in range(num_rows)], seed=seed)


def test_every_row_once_per_epoch_whatever_the_batch():
    rows = sorted(f"row {n}" for n in range(7))
    for count in (1, 2, 3, 7, 10, 20):
        ours = source()
        dealt = [row for _ in range(21) for row in ours.take(count)]
        epochs = [dealt[first : first + 7] for first in range(0, len(dealt), 7)]
        assert all(sorted(epoch) == rows for epoch in epochs if len(epoch) == 7)


def test_order_does_not_depend_on_the_batch():
    one, many = source(), source()
    assert [row for _ in range(30) for row in one.take(1)] == many.take(11) + many.take(17) + many.take(2)


def test_epochs_and_seeds_have_orders_of_their_own():
    ours = source(num_rows=50)
    first, second = ours.take(50), ours.take(50)
    assert first != second
    assert source(num_rows=50, seed=4).take(50) != first
    assert source(num_rows=50).take(50) == first


def test_epoch_counts_passes():
    ours = source(num_rows=4)
    assert ours.epoch == 0
    ours.take(3)
    assert ours.epoch == 0.75
    ours.take(3)
    assert ours.epoch == 1.5


@pytest.mark.parametrize("done", [0, 5, 7, 16])
def test_resume_goes_on_where_it_was(done: int):
    ours, resumed = source(), source()
    for _ in range(done):
        ours.take(1)
    resumed.take(2)  # a state replaces whatever was before
    resumed.load_state_dict(ours.state_dict())
    assert [resumed.take(5) for _ in range(4)] == [ours.take(5) for _ in range(4)]


def test_state_of_other_data_is_refused():
    with pytest.raises(DataError, match="made with 8 usable rows, but the data now has 7"):
        source().load_state_dict(source(num_rows=8).state_dict())


def resumed(before: list[dict], now: list[dict]) -> None:
    old, new = (ShuffledSource(rows, seed=0, rows=rows) for rows in (before, now))
    new.load_state_dict(old.state_dict())


def test_rows_of_other_content_are_refused_though_they_are_as_many():
    rows = [{"prompt": f"{n} + 1", "answer": n + 1} for n in range(5)]
    resumed(rows, [dict(row) for row in rows])
    for other in (
        [*rows[:-1], {"prompt": "4 + 1", "answer": 6}],
        rows[::-1],
        [{**row, "note": "\ud83d"} for row in rows],
    ):
        with pytest.raises(DataError, match=r"made with other data: there are 5 usable rows.*start a new run"):
            resumed(rows, other)


def test_values_that_are_told_by_their_place_in_memory_do_not_differ():
    resumed([{"image": object(), "prompt": "x"}], [{"image": object(), "prompt": "x"}])


def test_a_checkpoint_from_before_rows_were_noted_is_taken():
    ours = source()
    ours.load_state_dict({"position": 3, "num_rows": 7})
    assert ours.epoch == 3 / 7
