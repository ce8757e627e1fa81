"""BABILong under the name it has for an evaluation: `memlm.tasks.babilong`."""

from memlm.tasks.babilong import *  # noqa: F403
from memlm.tasks.babilong import __all__ as __all__
