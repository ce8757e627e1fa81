"""bAbI stories: generated without end, read from the original files, and solved symbolically."""

from memlm.tasks.babi.files import find_task, load, load_task
from memlm.tasks.babi.generators import generate
from memlm.tasks.babi.solver import solve
from memlm.tasks.babi.story import TASKS, Story, check_task

__all__ = [
    "TASKS",
    "Story",
    "check_task",
    "find_task",
    "generate",
    "load",
    "load_task",
    "solve",
]
