"""Segments in which nothing is written: a memory that can tell so beforehand is read, and left as it is.

Only where no gradient is wanted and a value may decide what is computed: not in training, not under
torch.compile, and not on an accelerator, where the question would make every layer wait for all before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memlm.memory.base import QKV, Attended, Memory
from memlm.memory.parts.folding import is_mapped
from memlm.memory.parts.gates import GatedMemory


def unchanged(x: Any, parts: bool = False, **given: Any) -> Any:
    """In place of a stage whose output nobody wants."""
    output = x.q if isinstance(x, QKV) else x
    return Attended(output, output[..., 0], output, output) if parts else output


def run_memory(
    memory: Memory, x: Any, state: Any, inner: Any, *, mask: Tensor | None, write: bool
) -> tuple[Tensor, Any]:
    """`memory` on `x`, without the work of writing where all gates of all rows are zero."""
    if (
        write
        # Layers that run together would have to be silent together.
        and not is_mapped(x.k if isinstance(x, QKV) else x)
        and isinstance(memory, GatedMemory)
        and may_skip(memory, x.k if isinstance(x, QKV) else x)
    ):
        gates = memory.gates_of(x, state, mask)
        if gates is not None and not bool(gates.any()):
            if inner is unchanged:
                return inner(x), memory.silent_state(x, state, mask)
            return memory.forward_silent(x, state, inner, mask=mask)
    return memory(x, state, inner, mask=mask, write=write)


def may_skip(memory: GatedMemory, x: Tensor) -> bool:
    """Whether the gates may be asked for first."""
    return (
        memory.can_be_silent
        and not memory.training
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        # Whoever hooks the memory's forward, expects it to run.
        and not memory._forward_hooks
        and not memory._forward_pre_hooks
    )
