from llmrl.verify.estimators import config_of
from llmrl.verify.game import make_game
from llmrl.verify.rows import ROWS, Row


def test_every_row_is_one_of_valid_settings():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert config_of(row, make_game(kl_coef=0.3)).kl_coef == 0.3


def test_a_group_is_as_large_as_the_algorithm_needs():
    assert Row(name="any", algorithm="grpo").group_size == 2
    assert Row(name="any", algorithm="ppo").group_size == 1
