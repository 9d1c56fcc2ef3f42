"""What is a name on the hub; what the hub is asked is tested in test_loading.py of models and test_rows.py of data."""

from llmrl.hub import is_local


def test_folders_and_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert all(is_local(path) for path in ("/a", "./a", "../a", "~/a", ".a", "a/b/c", "owner/here", "owner/typo"))
    assert not any(is_local(path) for path in ("gpt2", "other/model"))


def test_a_suffix_makes_a_file():
    assert is_local("x.jsonl", suffixes=(".jsonl", ".csv"))
    assert not is_local("x.jsonl")
    assert not is_local("x.bin", suffixes=(".jsonl",))
