"""Titans, memory as a gate: a memory branch beside a layer's attention (section 4.2).

Both branches read the layer's input. Attention has the persistent tokens before it and stays within
the segment (with `transformer-xl` attached as well it becomes the paper's sliding window); the memory reads
and writes every token. o = attention(x) + gate * M(x), or attention(x) * 2 sigmoid(gate * M(x)) with
combine="multiply": the paper multiplies, and leaves the nonlinearity open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memlm.memory.base import MemoryConfig
from memlm.memory.parts.titans import TitansBranch, TitansBranchConfig


@dataclass(frozen=True, kw_only=True)
class TitansMAGConfig(TitansBranchConfig):
    """Options of Titans MAG: those of `TitansBranchConfig`."""


class TitansMAG(TitansBranch):
    """Titans with memory as a gate."""

    Config: ClassVar[type[MemoryConfig]] = TitansMAGConfig
