"""Runs of every kind come out as they are stored, to rounding: on another machine sums are added in another order."""

import pytest

from tests.golden.runs import ROOT, RUNS, differences, prepare, run, stored

TOLERANCE = 1e-5
NO_GRADIENT = "attn.c_attn.bias"
"""It holds biases of keys, which change no attention: their gradient is rounding, of which Adam makes whole steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        prepare(place)
    return place


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_out_as_it_is_stored(folder, name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    record, before = run(name, folder, output=tmp_path), stored(name)
    for weights in (record["weights"], before["weights"]):
        del weights["sha256"]
        weights["numbers"] = {key: x for key, x in weights["numbers"].items() if not key.endswith(NO_GRADIENT)}
    assert differences(record, before, tolerance=TOLERANCE) == []
