"""`memlm.tasks.babilong` under the name an evaluation knows it by."""

from memlm.tasks.babilong import *  # noqa: F403
from memlm.tasks.babilong import __all__ as __all__
