"""Runs several commands of `llmrl` one after another, in as many processes as a launcher starts: importing torch anew
for each would take longer than they do.

    several.py '[["grpo", "grpo.yaml", "run.output_dir=a"], ...]'
"""

import json
import os
import sys

from llmrl import cli
from llmrl.distributed import collectives

if __name__ == "__main__":
    leave_ranks, collectives.leave_ranks = collectives.leave_ranks, lambda: None  # one process group serves them all
    for command in json.loads(sys.argv[1]):
        cli.app(command, standalone_mode=False)
    leave_ranks()
    sys.stdout.flush()
    os._exit(0)
