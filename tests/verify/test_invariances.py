from llmrl.verify.game import make_game
from llmrl.verify.invariances import broken_invariances
from llmrl.verify.rows import ROWS, Row
from tests.verify.faults import in_grpo

GAME = make_game(kl_coef=0.3)


def broken(row):
    return [fault.name for fault in broken_invariances(row, GAME)]


def test_ours_are_invariant():
    assert {row.name: broken(row) for row in (ROWS[0], ROWS[-1])} == {ROWS[0].name: [], ROWS[-1].name: []}


def test_each_disturbance_is_found():
    def of(code):
        return broken(Row(name="any", algorithm="grpo", code=f"{in_grpo.__name__}:{code}"))

    assert of("LocalDenominators") == ["local denominators"]
    assert of("PaddingRead") == ["padding read"]
    assert "padding counted" in of("MaskDropped")
    assert of("DrawnInOrder") == ["order of groups"]
