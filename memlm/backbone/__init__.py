"""The base model, seen as stages: the only package that knows transformers' internals.

`finding` finds the stages by structure, `stages` makes them ask whether memories are at work, `run` is what
is at work and what it leaves behind, `heads` opens the softmax core, `recurrence` hands layers the states
of their own recurrences, `model` is the whole.
"""

from memlm.backbone.finding import find_attention, find_in_family, find_layers, new_base, works_on
from memlm.backbone.heads import turn
from memlm.backbone.model import Backbone
from memlm.backbone.run import Cell, Cells, Run
from memlm.backbone.stages import original_class

__all__ = [
    "Backbone",
    "Cell",
    "Cells",
    "Run",
    "find_attention",
    "find_in_family",
    "find_layers",
    "new_base",
    "original_class",
    "turn",
    "works_on",
]
