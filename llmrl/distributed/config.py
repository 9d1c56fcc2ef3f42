"""Settings of what several processes do together."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llmrl.section import Bound, Section


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(Section, place="distributed"):
    """Placement of frozen weights over ranks (the processes of one launch), and detection of ranks that fail. A single
    process reads `phase_timeout_s` only."""

    frozen: Literal["replicated", "split"] = "replicated"
    """Weights that never learn, those of the reference and of the reward model: replicated on every rank, or split over
    ranks, which then gather them layer by layer in each forward pass."""
    silent_after_s: Annotated[float, Bound(least=3, why="a rank gives a sign of life every second")] = 60.0
    """A rank that gave no sign of life for this many seconds counts as gone, and the others end."""
    phase_timeout_s: Annotated[float | None, Bound(above=0, most=1e8)] = None
    """Time limit of one phase on any rank, in seconds; after it all ranks end and report where each one is. None: 3600
    where there are several processes, no limit where there is one."""

    @property
    def phase_limit_s(self) -> float:
        """Time limit of a phase where there are several processes."""
        return 3600.0 if self.phase_timeout_s is None else self.phase_timeout_s
