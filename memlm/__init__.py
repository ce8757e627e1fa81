"""memlm: a long memory of constant size for Hugging Face causal language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from memlm.registration import register

__version__ = "0.1.0"

# Imported on first use: torch and transformers take seconds, and `memlm --help` needs neither.
_WHERE = {
    "MemLMConfig": "memlm.config",
    "MemLMForCausalLM": "memlm.modeling",
    "MemoryState": "memlm.state",
    "DocumentStream": "memlm.streaming",
    "Answer": "memlm.streaming",
    "load_pretrained": "memlm.pretrained",
    "StreamPool": "memlm.pool",
    "windows": "memlm.windowed",
}
__all__ = [
    "Answer",
    "DocumentStream",
    "MemLMConfig",
    "MemLMForCausalLM",
    "MemoryState",
    "StreamPool",
    "load_pretrained",
    "windows",
]

if TYPE_CHECKING:
    from memlm.config import MemLMConfig
    from memlm.modeling import MemLMForCausalLM
    from memlm.pool import StreamPool
    from memlm.pretrained import load_pretrained
    from memlm.state import MemoryState
    from memlm.streaming import Answer, DocumentStream
    from memlm.windowed import windows


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'memlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


register()
