"""Checks that several configs share."""

from __future__ import annotations

from memlm.memory.base import Dims


def memory_tokens_for(num_memory_tokens: int | None, dims: Dims, default: int = 16) -> int:
    """The number of memory tokens: `default`, or half a segment when that is less, if left open."""
    if num_memory_tokens is None:
        return max(1, min(default, dims.segment_length // 2))
    if num_memory_tokens < 1:
        raise ValueError(
            f"num_memory_tokens={num_memory_tokens} is no memory; give at least 1, or memory='none'"
        )
    if num_memory_tokens > dims.segment_length:
        raise ValueError(
            f"segment_length={dims.segment_length} is too small for "
            f"num_memory_tokens={num_memory_tokens}; use a longer segment or fewer memory tokens"
        )
    return num_memory_tokens
