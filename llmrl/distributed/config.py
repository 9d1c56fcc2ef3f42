"""Settings of what several processes do together."""

from dataclasses import dataclass
from typing import Annotated, Literal

from llmrl.section import Bound, Section


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(Section, place="distributed"):
    """How ranks, the processes of one launch, share what is frozen, and see that one of them has failed. Of this one
    process reads `phase_timeout_s` alone."""

    frozen: Literal["replicated", "split"] = "replicated"
    """Weights that never learn, those of the reference and of the reward model: whole on every rank, or split over
    ranks, which come together for each layer of each forward pass."""
    silent_after_s: Annotated[float, Bound(least=3, why="a rank gives a sign of life every second")] = 60.0
    """A rank that gave no sign of life for this many seconds is taken for gone, and the others end."""
    phase_timeout_s: Annotated[float | None, Bound(above=0, most=1e8)] = None
    """The longest that one phase may last on any rank, in seconds; then all ranks end and say where each one is. None:
    3600 where there are several processes, no limit where there is one."""

    @property
    def phase_limit_s(self) -> float:
        """The longest phase where there are several processes."""
        return 3600.0 if self.phase_timeout_s is None else self.phase_timeout_s
