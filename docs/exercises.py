"""Runs the blocks of docs/exercises.md and draws its curves: `python docs/exercises.py`. Needs matplotlib."""

import argparse
import re
import runpy
import tempfile
from pathlib import Path

import matplotlib
from matplotlib import pyplot

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "llmrl"  # the same file every time

PAGE = Path(__file__).with_name("exercises.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Curves = dict[str, dict[str, list[float]]]
"""The lines of each exercise, by its title and their names."""


def run_page() -> Curves:
    """What the blocks of the page, as one script, put into `curves`."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "page.py"
        script.write_text("\n".join(BLOCK.findall(PAGE.read_text())))
        return runpy.run_path(str(script))["curves"]


def draw(curves: Curves, out: Path) -> None:
    """One panel per exercise."""
    figure, panels = pyplot.subplots((len(curves) + 1) // 2, 2, figsize=(9, 13), layout="constrained")
    for axes, (title, lines) in zip(panels.flat, curves.items(), strict=True):
        for name, numbers in lines.items():
            axes.plot(numbers, marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_yscale("log" if title.endswith(", log") else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the exercises and draws their curves.")
    parser.add_argument("out", type=Path, nargs="?", default=PAGE.with_suffix(".svg"), help="picture to write, .svg")
    draw(run_page(), parser.parse_args().out)


if __name__ == "__main__":
    main()
