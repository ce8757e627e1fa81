"""bAbI's stories under the name they have for an evaluation: `memlm.tasks.babi`."""

from memlm.tasks.babi import TASKS, Story, check_task, find_task, generate, load, load_task, solve

__all__ = ["TASKS", "Story", "check_task", "find_task", "generate", "load", "load_task", "solve"]
