"""The base model, seen as stages: the only package that knows transformers' internals.

`finding` finds the stages by structure; `stages` makes them ask whether memories are at work; `run` holds
the memories at work during one segment and the states they leave; `heads` opens the softmax core;
`recurrence` hands layers the states of their own recurrences; `model` puts all of it together.
"""

from memlm.backbone.finding import find_attention, find_in_family, find_layers, new_base, works_on
from memlm.backbone.heads import apply_rotary
from memlm.backbone.model import Backbone
from memlm.backbone.open import OpenSegment
from memlm.backbone.run import Cell, Cells, Run
from memlm.backbone.stages import original_class

__all__ = [
    "Backbone",
    "Cell",
    "Cells",
    "OpenSegment",
    "Run",
    "apply_rotary",
    "find_attention",
    "find_in_family",
    "find_layers",
    "new_base",
    "original_class",
    "works_on",
]
