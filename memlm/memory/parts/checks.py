"""Checks that several configs share."""

from __future__ import annotations

from collections.abc import Mapping

from memlm.memory.base import Dims, MemoryConfig


def head_sizes(num_heads: int | None, head_dim: int | None, dims: Dims) -> tuple[int, int]:
    """How many heads a memory has, and their size: where left open, the base's, and hidden size / heads.

    ValueError when the heads do not divide the hidden size.
    """
    heads = dims.num_heads if num_heads is None else num_heads
    if heads < 1 or (head_dim is None and dims.hidden_size % heads):
        raise ValueError(
            f"num_heads={heads} does not divide hidden_size={dims.hidden_size}; use a divisor of it, "
            "or give head_dim as well"
        )
    return heads, dims.hidden_size // heads if head_dim is None else head_dim


def check_least(config: MemoryConfig, least: Mapping[str, float]) -> None:
    """ValueError when a field of `config` is below what `least` says."""
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {lowest}")


def check_known(config: MemoryConfig, known: Mapping[str, tuple[str, ...]]) -> None:
    """ValueError when a field of `config` is none of the names that `known` has for it."""
    for name, names in known.items():
        if getattr(config, name) not in names:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is unknown; use {' or '.join(names)}"
            )


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
