"""Memories attached to a base model: who stands at which stage, and what their state is called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from memlm.backbone import Backbone, Cell, Cells
from memlm.memory import MemoryConfig, config_to_dict, memory_class
from memlm.memory.base import Dims, Memory
from memlm.state import MemoryState, flatten, unflatten


class AttachedMemory(nn.Module):
    """One memory at its layers, with the tokens it lets flow behind each segment.

    cells: one `Memory` per layer, keyed by layer number, or one keyed "model". tokens (M, E) or None.
    """

    def __init__(self, name: str, config: MemoryConfig, dims: Dims) -> None:
        super().__init__()
        cls = memory_class(name)
        self.site = cls.site
        layers = range(dims.num_layers) if config.layers is None else config.layers
        keys = ["model"] if cls.site == "model" else [str(layer) for layer in layers]
        self.cells = nn.ModuleDict({key: cls(config, dims) for key in keys})
        self.token_std = partial(cls.segment_token_std, config)
        count = cls.num_segment_tokens(config)
        self.tokens = (
            nn.Parameter(torch.empty(count, dims.embedding_size)) if count and self.cells else None
        )

    def reset_parameters(self, embedding_std: float) -> None:
        """Initialise the tokens and every cell."""
        if self.tokens is not None:
            nn.init.normal_(self.tokens, std=self.token_std(embedding_std))
        for cell in self.cells.values():
            cast(Memory, cell).reset_parameters(embedding_std)


class MemoryStack(nn.Module):
    """All memories of a model, in the order they were given: the first is outermost at a stage."""

    def __init__(
        self, configs: Sequence[MemoryConfig], backbone: Backbone, segment_length: int
    ) -> None:
        super().__init__()
        dims = backbone.dims(segment_length)
        resolved = [resolve(config, dims) for config in configs]
        check_positions(resolved, backbone, segment_length)
        self.configs = [config_to_dict(config) for config in resolved]
        self.signature = json.dumps([*self.configs, dims.hidden_size, dims.num_layers])
        self.attached = nn.ModuleDict()
        for config, described in zip(resolved, self.configs, strict=True):
            name, count = described["name"], 1
            while name in self.attached:
                count += 1
                name = f"{described['name']}_{count}"
            self.attached[name] = AttachedMemory(described["name"], config, dims)
        owners = [name for name, memory in self._memories().items() if memory.tokens is not None]
        if len(owners) > 1:
            raise ValueError(
                f"memory={owners} would each append tokens to a segment, and a layer could not tell "
                "whose are whose; attach one of them"
            )
        self._owner = owners[0] if owners else None

    @property
    def tokens(self) -> Tensor | None:
        """(M, E) embeddings that flow behind each segment, or None."""
        return None if self._owner is None else self._memories()[self._owner].tokens

    def cells(self) -> Cells:
        """The memories by stage. Looked up at every call: peft may have put copies in their place."""
        found: dict[tuple[Any, int], list[Cell]] = {}
        for name, memory in self._memories().items():
            for key, cell in memory.cells.items():
                layer, label = (-1, name) if key == "model" else (int(key), f"{name}.{key}")
                found.setdefault((memory.site, layer), []).append(Cell(label, cast(Memory, cell)))
        return found

    def init_state(self, batch_size: int) -> MemoryState:
        """The state before the first segment."""
        tensors: dict[str, Tensor] = {}
        for label, memory in self._labelled():
            tensors.update(flatten(memory.init_state(batch_size), label))
        return MemoryState(tensors, batch_size, self.signature)

    def unpack(self, state: MemoryState) -> dict[str, Any]:
        """A state as each cell's own tree, by cell name."""
        return {
            label: unflatten(memory.init_state(1), label, state.tensors)
            for label, memory in self._labelled()
        }

    def pack(self, trees: dict[str, Any], batch_size: int) -> MemoryState:
        """The reverse of `unpack`."""
        tensors: dict[str, Tensor] = {}
        for label, tree in trees.items():
            tensors.update(flatten(tree, label))
        return MemoryState(tensors, batch_size, self.signature)

    def auxiliary_loss(
        self, before: dict[str, Any], after: dict[str, Any], active: Tensor | None
    ) -> Tensor | None:
        """What one segment's changes of state cost in training, averaged over rows; None: nothing."""
        total = None
        for label, memory in self._labelled():
            cost = memory.auxiliary_loss(before[label], after[label])
            if cost is not None:
                cost = (cost if active is None else cost.masked_fill(~active, 0.0)).mean()
                total = cost if total is None else total + cost
        return total

    def _memories(self) -> dict[str, AttachedMemory]:
        return cast(dict[str, AttachedMemory], dict(self.attached.items()))

    def _labelled(self) -> list[tuple[str, Memory]]:
        return [(cell.name, cell.memory) for cells in self.cells().values() for cell in cells]


def resolve(config: MemoryConfig, dims: Dims) -> MemoryConfig:
    """Check `config` against the base model's sizes, and fill what it leaves open."""
    if config.layers is not None:
        outside = [layer for layer in config.layers if not 0 <= layer < dims.num_layers]
        if outside or len(set(config.layers)) != len(config.layers) or not config.layers:
            raise ValueError(
                f"layers={config.layers} must be different layers of the base model's "
                f"{dims.num_layers}; use 0 to {dims.num_layers - 1}, or None for all"
            )
    return memory_class(config_to_dict(config)["name"]).resolve(config, dims)


def check_positions(
    configs: Sequence[MemoryConfig], backbone: Backbone, segment_length: int
) -> None:
    """Refuse a segment that, with its memory tokens, is longer than the base model's positions."""
    extra, leading = 0, 0
    for config in configs:
        cls = memory_class(config_to_dict(config)["name"])
        extra += cls.num_extra_positions(config)
        leading += cls.num_extra_positions(config) if cls.site == "model" else 0
    limit = backbone.max_positions
    if limit is not None and segment_length + extra > limit:
        raise ValueError(
            f"segment_length={segment_length} with {extra} memory positions is too large for the base "
            f"model's {limit} positions; use at most {limit - extra}"
        )
    window = backbone.sliding_window
    if window is not None and leading and segment_length + leading > window:
        raise ValueError(
            f"segment_length={segment_length} with {leading} memory positions exceeds the sliding "
            f"window of {window} in every layer, which would cut tokens off from the memory; use at "
            f"most {window - leading}, or a memory inside the layers such as 'armt'"
        )
