"""The exercises of the documentation: each mistake shows in its numbers, and all of them are drawn."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("matplotlib")
    return runpy.run_path(str(ROOT / "docs" / "exercises.py"))


@pytest.fixture(scope="module")
def curves(script):
    return list(script["run_page"]().values())


def test_each_of_ten_mistakes_shows_in_its_numbers(curves):
    returns, moving, own, variance, gae, clip, kl, proxy, stale = (curves[i] for i in (0, 2, 3, 4, 5, 6, 7, 8, 9))
    assert len(curves) == 10
    assert returns["rewards"][0] == 0 < returns["returns"][0]
    assert curves[1]["value 0 after the end"] == pytest.approx([0.1] * 3)
    assert curves[1]["bootstrapped"] == pytest.approx([1.0] * 3)
    assert moving["fixed for 40 steps"][-1] < 0.1
    assert moving["moving"][-1] > 1e3
    assert next(iter(own.values())) == pytest.approx([0.5, 0.75, 0.875], abs=1e-6)
    assert variance["no baseline"][2] > 10 * variance["value"][2]
    assert variance["value"][0] == pytest.approx(variance["value"][2], rel=1e-6)
    assert gae["mean"][0] == pytest.approx(-0.3)
    assert gae["mean"][3] == pytest.approx(2 / 3, abs=0.05)
    assert gae["standard deviation"] == sorted(gae["standard deviation"])
    assert clip["largest |ratio - 1|"][-1] > 0.25
    assert clip["clipped fraction"][-1] > 0
    assert kl["k1"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert kl["k2"] == pytest.approx(kl["the KL"], abs=1e-12)
    assert kl["k3"] != pytest.approx(kl["the KL"], abs=1e-2)
    assert proxy["reward model"] == sorted(proxy["reward model"])
    assert proxy["truth"][-1] < max(proxy["truth"]) - 0.1
    assert stale["corrected"] == pytest.approx(stale["truth"], abs=0.02)
    assert stale["stale"] != pytest.approx(stale["truth"], abs=0.05)


def test_the_picture_has_every_exercise(script, curves, tmp_path):
    picture = tmp_path / "exercises.svg"
    script["draw"](dict(zip((f"{n}." for n in range(10)), curves, strict=True)), picture)
    assert picture.read_text().count("<!-- ") > 20
    assert all(f"## {n}. " in (ROOT / "docs" / "exercises.md").read_text() for n in range(1, 11))
