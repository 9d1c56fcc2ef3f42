"""See `runs`."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.golden.runs import RUNS, STORED, differences, prepare, run, stored


def main() -> None:
    writes = sys.argv[1:] == ["write"]
    with TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        num_different = 0
        for number, name in enumerate(RUNS):
            (folder / str(number)).mkdir()
            record = run(name, folder, output=folder / str(number))
            if writes:
                STORED.mkdir(exist_ok=True)
                (STORED / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
                continue
            differ = differences(record, stored(name), tolerance=0.0)
            num_different += bool(differ)
            print(name, "as stored" if not differ else "\n  ".join(["differs", *differ[:10]]))
    sys.exit(bool(num_different))


main()
