"""Orders of execution: which (layer, segment) cell runs when. A schedule never sees a mechanism."""

from memlm.schedule.sequential import Checkpoint, sequential
from memlm.schedule.wavefront import Line, Place, alike, diagonals, wavefront

__all__ = ["Checkpoint", "Line", "Place", "alike", "diagonals", "sequential", "wavefront"]
