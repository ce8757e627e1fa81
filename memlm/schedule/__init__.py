"""Orders of execution: which (layer, segment) cell runs when. A schedule never sees a mechanism."""

from memlm.schedule.sequential import sequential

__all__ = ["sequential"]
