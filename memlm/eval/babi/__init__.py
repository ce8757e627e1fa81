"""bAbI stories: generated without end, read from the original files, and solved symbolically."""

from memlm.eval.babi.files import find_task, load, load_task
from memlm.eval.babi.generators import generate
from memlm.eval.babi.solver import solve
from memlm.eval.babi.story import TASKS, Story, check_task

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
