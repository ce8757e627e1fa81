"""`memlm.tasks.babi` under the name an evaluation knows it by."""

from memlm.tasks.babi import TASKS, Story, check_task, find_task, generate, load, load_task, solve

__all__ = ["TASKS", "Story", "check_task", "find_task", "generate", "load", "load_task", "solve"]
