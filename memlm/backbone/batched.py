"""Cells (layer, segment) that do not depend on one another, run as one batched call over stacked weights.

Layers that differ in their weights alone are of one kind. A kind has one layer as its template, called
under `torch.vmap` with the weights of several, so that the family's code and the mechanisms' code are what
they always are. What this cannot do is refused by name (`find_kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from memlm.backbone.finding import layer_list
from memlm.backbone.model import Backbone
from memlm.backbone.run import Cell, Cells, Passage, Returns, Run, entered, met_by
from memlm.backbone.stacking import stacked, with_gradient
from memlm.schedule import Checkpoint, Place
from memlm.segment import Segment
from memlm.state import flatten, unflatten, where_rows

# Attributes in which families keep a layer's number; that it decides nothing else is found by trying.
NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index")
# Arguments of a layer that follow from the segment's shape alone where nothing is padding.
FROM_SHAPE = ("attention_mask", "position_embeddings", "position_ids", "cache_position")
PLAIN = frozenset({bool, int, float, type(None), torch.dtype})
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# What is noted of a cell: called with the memory, the state before and after, and after ended rows kept
# theirs.
Note = Callable[[Cell, Any, Any, Any], dict[str, Tensor]]


class Kind(nn.Module):
    """Layers that differ in their weights alone, with the memories in them: one of them, the template.

    members: the layers' numbers, rising. cells: the memories of each member, in one order. description:
    what the members have in common.
    """

    def __init__(
        self, backbone: Backbone, members: list[int], found: Cells, description: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.members, self.description = members, description
        self.cells = [_cells_of(layer, found) for layer in members]
        self.layer = backbone.layers[members[0]]
        self.memories = nn.ModuleList(cell.memory for cell in self.cells[0])
        at = members[0]
        self.here: Cells = {place: cells for place, cells in found.items() if place[1] == at}
        parts = [
            nn.ModuleList([backbone.layers[layer], *(cell.memory for cell in cells)])
            for layer, cells in zip(members, self.cells, strict=True)
        ]
        # Names as this module has them, in the order in which every member lists its own.
        listed: dict[int, str] = {id(p): name for name, p in self.named_parameters()}
        listed |= {id(b): name for name, b in self.named_buffers()}
        self.weights: dict[str, list[nn.Parameter]] = {
            listed[id(column[0])]: list(column)
            for column in zip(*(part.parameters() for part in parts), strict=True)
        }
        self.buffers_of: dict[str, list[Tensor]] = {
            listed[id(column[0])]: list(column)
            for column in zip(*(part.buffers() for part in parts), strict=True)
            if column[0].numel()
        }

    def forward(self, x: Tensor, arguments: Mapping[str, Any]) -> Any:
        return self.layer(x, **arguments)


def _cells_of(layer: int, found: Cells) -> list[Cell]:
    return [cell for (_, at), cells in found.items() if at == layer for cell in cells]


def find_kinds(backbone: Backbone, cells: Cells) -> list[Kind]:
    """The layers by kind. ValueError, half a sentence with what helps, where they cannot run together."""
    reason = _obstacle(backbone, cells)
    members: dict[Any, list[int]] = {}
    seen: dict[int, int] = {}
    around = [] if reason else list(layer_list(backbone.base))
    for layer, outer in enumerate(around):
        if outer is not backbone.layers[layer]:
            around_it = type(outer).__name__
            reason = f"layer {layer} stands in a {around_it}, which would be passed by; take it off"
            break
        found, reason = _described(backbone, layer, cells, seen)
        if reason is not None:
            break
        members.setdefault(found, []).append(layer)
    if reason is None and len(members) == len(backbone.layers):
        reason = "no two of its layers are alike, so that none can run together"
    if reason is not None:
        raise ValueError(reason)
    return [Kind(backbone, layers, cells, described) for described, layers in members.items()]


def _obstacle(backbone: Backbone, cells: Cells) -> str | None:
    """What stands in the way of the whole model."""
    for found in cells.values():
        for cell in found:
            name = cell.name.partition(".")[0]
            if cell.memory.site == "model":
                return (
                    f"the memory {name!r} stands around the whole decoder, so that the first layer of a "
                    "segment waits for the last layer of the one before; use a memory inside the layers, "
                    "such as 'armt'"
                )
            if cell.memory.not_batched:
                return f"the memory {name!r} {cell.memory.not_batched}"
            owner = getattr(cell.within, "__self__", cell.within)
            if isinstance(owner, nn.Module) and (reason := _module_obstacle(owner)):
                return f"the memory {name!r} {reason}"
    if backbone.attention not in ("sdpa", "eager"):
        return (
            f"attn_implementation={backbone.attention!r} cannot run for several layers at once; "
            "load the base with attn_implementation='sdpa'"
        )
    if backbone.balances_routers:
        return (
            "the routers' loss (output_router_logits) is collected layer by layer; set it to False"
        )
    return None


def _described(
    backbone: Backbone, layer: int, cells: Cells, seen: dict[int, int]
) -> tuple[tuple[Any, ...], str | None]:
    """All that makes the kind of `layer` (modules, settings, shapes of weights), or what stands in the way.

    seen: the layers in which parameters were met, by id. Called for every window, so it makes no names.
    """
    device = backbone.device
    made: list[Any] = [
        tuple((site, len(found)) for (site, at), found in cells.items() if at == layer)
    ]
    memories = [cell.memory for cell in _cells_of(layer, cells)]
    made += [memory.config for memory in memories]
    for module in (part for top in (backbone.layers[layer], *memories) for part in top.modules()):
        reason = _module_obstacle(module)
        if reason is not None:
            return (), f"a {type(module).__name__} of layer {layer} {reason}"
        made.append(type(module))
        for key, value in vars(module).items():
            if key[0] != "_" and key not in NUMBERS and (plain := _plain(value, layer)) is not None:
                made.append((key, plain))
        for key, parameter in module._parameters.items():
            if parameter is None:
                made.append(key)
                continue
            reason = _parameter_obstacle(parameter, device)
            if seen.setdefault(id(parameter), layer) != layer:
                reason = f"is shared with layer {seen[id(parameter)]}; use the sequential schedule"
            if reason is not None:
                return (
                    (),
                    f"the parameter {key!r} of a {type(module).__name__} of layer {layer} {reason}",
                )
            made.append((key, parameter.shape, parameter.dtype))
        for key, buffer in module._buffers.items():
            made.append((key, None if buffer is None else (buffer.shape, buffer.dtype)))
    return tuple(made), None


def _plain(value: Any, layer: int) -> Any:
    """A setting of `layer` as something that can be compared and hashed; None for anything else."""
    if type(value) is str:
        # Its own name, as adapters keep it.
        return value.replace(f".{layer}.", ".*.")
    if type(value) in PLAIN:
        return value
    if type(value) is dict:
        return tuple((key, _plain(one, layer)) for key, one in value.items())
    if type(value) in (list, tuple):
        return tuple(_plain(one, layer) for one in value)
    return None


def _module_obstacle(module: nn.Module) -> str | None:
    own = vars(module)
    if isinstance(module, FSDPModule):
        return "is sharded; run the model unsharded"
    if isinstance(module, ActivationWrapper) or (
        own["training"] and own.get("gradient_checkpointing", False)
    ):
        return "recomputes activations by itself; use the memory model's gradient_checkpointing_enable()"
    if "_hf_hook" in own:
        return "is moved by accelerate's hooks (a device map, offloading); keep it on one device"
    if "forward" in own:
        return "has a forward of its own on the instance; take it off"
    if own.get("_compiled_call_impl") is not None:
        return "is compiled by itself; leave its compile() out"
    if any(_expects_calls(hook) for hooks in HOOKS for hook in (own[hooks] or {}).values()):
        return "has hooks, which would not be called for each layer; remove them"
    return None


def _expects_calls(hook: Any) -> bool:
    # transformers leaves its own behind once hidden states were asked for; without that they do nothing.
    return getattr(hook, "__module__", "") != "transformers.utils.output_capturing"


def _parameter_obstacle(parameter: nn.Parameter, device: torch.device) -> str | None:
    if isinstance(parameter, DTensor):
        return "is sharded; run the model unsharded"
    if parameter.is_meta:
        return "is offloaded; keep it on the device"
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    if not plain or not parameter.is_floating_point():
        return (
            f"is quantised ({type(parameter.data).__name__}, {parameter.dtype}); use plain weights"
        )
    if parameter.device != device:
        return f"is on {parameter.device}, the embeddings are on {device}; keep the model on one device"
    return None


def returned_tuples(backbone: Backbone, ids: Tensor) -> list[bool]:
    """Whether each layer returns a tuple, found by running `ids` (B, T) without memories."""
    seen = Returns()
    with torch.no_grad(), met_by(seen), entered(None):
        backbone.decode(backbone.embed(ids), None)
    return seen.tuples


class States:
    """One kind's states while the diagonals move over it: of members not yet reached, at work, and done.

    Members (rising numbers) are counted from 0 here. A member is done when it has seen the last segment.
    """

    def __init__(self, kind: Kind, states: Mapping[str, Any]) -> None:
        self.kind = kind
        self.waiting = [
            [leaf for cell in cells for _, leaf in flatten(states[cell.name], "")]
            for cells in kind.cells
        ]
        self.trees = [states[cell.name] for cell in kind.cells[0]]
        self.start = self.stop = 0
        self.live: list[Tensor] = []
        self.done: list[list[Tensor]] = []

    def take(self, start: int, stop: int) -> list[Tensor]:
        """The state leaves (n, B, ...) of the members from `start` to `stop`, which go on from there."""
        passed = start - self.start
        fresh = self.waiting[self.stop : stop]
        # Clones, so that what is done does not keep the states of its whole diagonal.
        self.done.extend([leaf[i].clone() for leaf in self.live] for i in range(passed))
        taken = []
        for index in range(len(self.waiting[0])):
            parts = [self.live[index][passed:]] if self.stop > start else []
            parts += [leaves[index].unsqueeze(0) for leaves in fresh]
            taken.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        self.start, self.stop = start, stop
        return taken

    def result(self) -> dict[str, Any]:
        """The states of all members, by the memories' names."""
        if not self.trees:
            return {}
        rest = [[leaf[i] for leaf in self.live] for i in range(self.stop - self.start)]
        found = {}
        for cells, leaves in zip(self.kind.cells, [*self.done, *rest], strict=True):
            pieces = iter(leaves)
            for cell, tree in zip(cells, self.trees, strict=True):
                named = {name: next(pieces) for name, _ in flatten(tree, "")}
                found[cell.name] = unflatten(tree, "", named)
        return found


class Entered:
    """A segment on its way: what has become of it, how far it is, and what each layer is given of it."""

    def __init__(
        self,
        x: Tensor,
        length: int,
        arguments: list[dict[str, Any]],
        mask: Tensor | None,
        active: Tensor | None,
    ) -> None:
        self.x, self.length, self.arguments, self.mask, self.active = (
            x,
            length,
            arguments,
            mask,
            active,
        )
        self.layer = 0
        self.notes: dict[str, dict[str, Tensor]] = {}


class Passed(NamedTuple):
    """A segment that has passed: last hidden states (B, T, D) if wanted, and what was noted of memories."""

    hidden: Tensor | None
    notes: dict[str, dict[str, Tensor]]


class BatchedLine:
    """The layers of a base model with their memories, for one wavefront (`memlm.schedule.Line`).

    depth: how many of them, from the first. hidden: whether last hidden states are wanted, which takes all.
    tokens (M, E): embeddings appended to each segment, or None. padded: whether any segment has a mask.
    states: by the memories' names, before the first segment. note: computed of every cell, in the batched
    call. recompute: keeps nothing of a diagonal but what goes in, and runs it again in backward; None: all
    is kept.
    """

    def __init__(
        self,
        backbone: Backbone,
        kinds: Sequence[Kind],
        tuples: Sequence[bool],
        depth: int,
        hidden: bool,
        tokens: Tensor | None,
        padded: bool,
        states: Mapping[str, Any],
        note: Note,
        recompute: Checkpoint | None = None,
    ) -> None:
        self.backbone, self.kinds, self.tuples = backbone, kinds, tuples
        self.depth, self.hidden = depth, hidden
        self.tokens, self.padded, self.note, self.recompute = tokens, padded, note, recompute
        self.states = [States(kind, states) for kind in kinds]
        self.under_way: dict[int, Entered] = {}
        self._weights: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self._places: list[dict[str, Any]] | None = None

    def enter(self, number: int, segment: Segment) -> None:
        x = self.backbone.embed(segment.ids)
        length, mask = x.shape[1], segment.mask
        if mask is None and self.padded:
            mask = torch.ones_like(segment.ids, dtype=torch.bool)
        if self.tokens is not None:
            x = torch.cat([x, self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
            if mask is not None:
                mask = F.pad(mask, (0, self.tokens.shape[0]), value=True)
        passage = Passage(self.tuples)
        with met_by(passage):
            self.backbone.decode(x, mask)
        arguments = self._shared(passage.arguments) if mask is None else passage.arguments
        assert passage.inputs is not None
        active = segment.active if mask is not None else None
        if active is None and mask is not None:
            active = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.under_way[number] = Entered(passage.inputs, length, arguments, mask, active)

    def _shared(self, arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without padding, one tensor for all segments where their shape decides it."""
        if self._places is None:
            self._places = [{k: one[k] for k in FROM_SHAPE if k in one} for one in arguments]
        return [{**one, **known} for one, known in zip(arguments, self._places, strict=True)]

    def run(self, places: Sequence[Place]) -> None:
        for index, kind in enumerate(self.kinds):
            here = [place for place in places if place.layer in kind.members]
            if here:
                self._run_kind(index, here)

    def _run_kind(self, index: int, places: Sequence[Place]) -> None:
        kind = self.kinds[index]
        segments = [self.under_way[place.segment] for place in places]
        for place, segment in zip(places, segments, strict=True):
            if place.layer != segment.layer:
                raise RuntimeError(
                    f"layer {place.layer} of segment {place.segment} is not its turn"
                )
        start = kind.members.index(places[0].layer)
        stop = start + len(places)
        given = [one.arguments[place.layer] for place, one in zip(places, segments, strict=True)]
        arguments, dims = _together(given)
        mask, mask_dim = _joined([one.mask for one in segments])
        active, active_dim = _joined([one.active for one in segments])
        weights = self._weights_of(index, start, stop)

        def cells(x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor], Any]:
            mapped = torch.vmap(
                self._cell(kind, self.states[index].trees),
                in_dims=(0, 0, 0, dims, mask_dim, active_dim),
                randomness="different",
            )
            # Also when a diagonal is computed again in backward.
            with self.backbone.turns.alone():
                return mapped(weights, x, states, arguments, mask, active)

        x = torch.stack([one.x for one in segments])
        states = self.states[index].take(start, stop)
        if self.recompute is not None:
            y, after, notes = self.recompute(cells, x, states)
        else:
            y, after, notes = cells(x, states)
        self.states[index].live = after
        for number, (segment, out) in enumerate(zip(segments, y.unbind(), strict=True)):
            segment.x, segment.layer = out, segment.layer + 1
            for cell, noted in zip(kind.cells[start + number], notes, strict=True):
                segment.notes[cell.name] = {k: v[number] for k, v in noted.items()}

    def _cell(self, kind: Kind, trees: list[Any]) -> Callable[..., Any]:
        """The template's cell, as vmap calls it."""

        def cell(
            weights: dict[str, Tensor],
            x: Tensor,
            states: list[Tensor],
            arguments: Mapping[str, Any],
            mask: Tensor | None,
            active: Tensor | None,
        ) -> tuple[Tensor, list[Tensor], list[dict[str, Tensor]]]:
            rest = iter(states)
            before = {}
            for one, tree in zip(kind.cells[0], trees, strict=True):
                named = {name: next(rest) for name, _ in flatten(tree, "")}
                before[one.name] = unflatten(tree, "", named)
            run = Run(self.backbone, kind.here, before, True, mask).but(batched=True)
            with entered(run):
                y = torch.func.functional_call(kind, weights, (x, arguments))
            after = run.left.close(kind.here)
            leaves: list[Tensor] = []
            notes = []
            for one in kind.cells[0]:
                old = dict(flatten(before[one.name], ""))
                new = dict(flatten(after[one.name], ""))
                if active is not None:
                    new = {name: where_rows(active, new[name], old[name]) for name in new}
                leaves += new.values()
                notes.append(self.note(one, before[one.name], after[one.name], new))
            return y[0] if isinstance(y, tuple) else y, leaves, notes

        return cell

    def _weights_of(self, index: int, start: int, stop: int) -> dict[str, Tensor]:
        key = index, start, stop
        if key not in self._weights:
            kind = self.kinds[index]
            for column in kind.weights.values():
                stacked(column)
            self._weights[key] = {
                **{name: with_gradient(one[start:stop]) for name, one in kind.weights.items()},
                **{name: torch.stack(one[start:stop]) for name, one in kind.buffers_of.items()},
            }
        return self._weights[key]

    def leave(self, number: int) -> Passed:
        segment = self.under_way.pop(number)
        if segment.layer != self.depth:
            raise RuntimeError(
                f"segment {number} has passed {segment.layer} of {self.depth} layers"
            )
        if not self.hidden:
            return Passed(None, segment.notes)
        with met_by(Passage(self.tuples, segment.x)):
            # What goes in is replaced by what the last layer made.
            found = self.backbone.decode(segment.x.detach(), None)
        return Passed(found.last_hidden_state[:, : segment.length], segment.notes)

    def result(self) -> dict[str, Any]:
        """The states after the last segment, by the memories' names."""
        return {name: tree for one in self.states for name, tree in one.result().items()}


def _joined(values: list[Tensor | None]) -> tuple[Tensor | None, int | None]:
    """Values of several cells as one, and along which dimension they lie."""
    first = values[0]
    if all(value is first for value in values):
        return first, None
    return torch.stack(cast(list[Tensor], values)), 0


def _together(given: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of several cells as one dict, and the dimension along which each leaf is mapped."""
    found, dims = {}, {}
    for name in given[0]:
        values = [one[name] for one in given]
        if name == "attention_mask" and any(value is None for value in values):
            values = _masks(values)
        flat = [tree_flatten(value) for value in values]
        columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
        pairs = [_argument(name, list(column)) for column in columns]
        found[name] = tree_unflatten([value for value, _ in pairs], flat[0][1])
        dims[name] = tree_unflatten([dim for _, dim in pairs], flat[0][1])
    return found, dims


def _argument(name: str, values: list[Any]) -> tuple[Any, int | None]:
    first = values[0]
    if all(value is first for value in values):
        return first, None
    if all(isinstance(value, Tensor) for value in values):
        return torch.stack(torch.broadcast_tensors(*values)), 0
    if any(isinstance(value, Tensor) or value != first for value in values):
        raise ValueError(f"the base model gives some of its layers another {name!r} than others")
    return first, None


def _masks(values: list[Tensor | None]) -> list[Tensor | None]:
    """Attention masks of several cells; those left out, since nothing is padding, made like the others."""
    like = next((value for value in values if value is not None), None)
    if like is None:
        return values
    if like.ndim == 2:
        plain = torch.ones_like(like)
    else:
        past = torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device).tril()
        plain = past if like.dtype == torch.bool else like.new_zeros(past.shape)
        if like.dtype != torch.bool:
            plain = plain.masked_fill(~past, torch.finfo(like.dtype).min)
        plain = plain.expand(like.shape)
    return [plain if value is None else value for value in values]
