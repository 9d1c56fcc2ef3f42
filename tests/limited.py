"""`llmrl` whose memory is limited from the first optimizer step on: python limited.py MEBIBYTES ARGUMENTS_OF_LLMRL"""

import resource
import sys
from pathlib import Path

from llmrl.cli import main
from llmrl.distributed.activity import FollowedProgress

MEBIBYTE = 2**20
HEALTHY = FollowedProgress.phase


def phase(self: FollowedProgress, name: str, total: int) -> None:
    """Leaves this process so much more than it has when it first comes to an update."""
    HEALTHY(self, name, total)
    if name == "update" and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(more) * MEBIBYTE, resource.RLIM_INFINITY))


more, *sys.argv[1:] = sys.argv[1:]
FollowedProgress.phase = phase
main()
