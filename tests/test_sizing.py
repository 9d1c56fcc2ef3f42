"""The tables of the sizing guide are those that its script computes."""

import runpy

from tests.test_cli import ROOT


def test_the_guide_has_the_tables_that_its_script_computes():
    script = runpy.run_path(str(ROOT / "docs" / "sizing.py"))
    guide = (ROOT / "docs" / "sizing.md").read_text()
    assert script["filled"](guide) == guide
    for name in script["tables"]():
        assert f"<!-- begin {name} -->\n| model |" in guide


def test_no_table_names_what_llmrl_refuses():
    """Roles on one base where it is split."""
    script = runpy.run_path(str(ROOT / "docs" / "sizing.py"))
    (table,) = [rows for name, rows in script["tables"]().items() if name == "ppo-lora"]
    assert "replicated" in table
    assert not any(name in table for name in ("FSDP2", "ZeRO 3", "frozen split"))
    assert "LoRA, ZeRO 3" not in script["tables"]()["ppo"]
