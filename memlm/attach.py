"""Memories attached to a base model: which stage each one is at, and what its state is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memlm.backbone import Backbone, Cell, Cells, works_on
from memlm.memory import MemoryConfig, config_from_dict, config_to_dict, memory_class, name_of
from memlm.memory.base import Dims, Memory, accumulator_dtype
from memlm.state import MemoryState, flatten, skeleton, unflatten


class AttachedMemory(nn.Module):
    """One memory at its layers, with the tokens it appends to each segment.

    cells: one `Memory` per layer, keyed by layer number, or one keyed "model". tokens (M, E) or None.
    Whatever needs the parameters is a call of this module, so that FSDP can shard it as one unit.
    """

    def __init__(self, name: str, config: MemoryConfig, dims: Dims) -> None:
        super().__init__()
        cls = memory_class(name)
        self.site = cls.site
        layers = range(dims.num_layers) if config.layers is None else config.layers
        at = {"model": dims} if cls.site == "model" else {}
        if not at:
            at = {str(layer): replace(dims, layer=layer) for layer in layers}
        self.cells = nn.ModuleDict({key: cls(config, here) for key, here in at.items()})
        self.token_std = partial(cls.segment_token_std, config)
        count = cls.num_segment_tokens(config)
        self.tokens = (
            nn.Parameter(torch.empty(count, dims.embedding_size)) if count and self.cells else None
        )

    def forward(self, use: Callable[[], Any]) -> Any:
        """`use()`, called while the parameters are whole."""
        return use()

    def reset_parameters(self, embedding_std: float) -> None:
        """Initialise the tokens and every cell."""
        if self.tokens is not None:
            nn.init.normal_(self.tokens, std=self.token_std(embedding_std))
        for cell in self.cells.values():
            cast(Memory, cell).reset_parameters(embedding_std)

    def start(
        self, key: str, batch_size: int, prefix: str, into: dict[str, Tensor]
    ) -> list[Tensor]:
        """Put one cell's state before the first segment into the dict `into`, by name, and return it too.

        None of it is a view of a parameter: training changes parameters in place, and sharding frees them.
        FSDP may cast what a call returns, but not what is put into the dict.
        """
        cell = cast(Memory, self.cells[key])
        parameters = {p.untyped_storage().data_ptr() for p in _at_hand(cell)}
        found = {
            name: leaf.clone() if leaf.untyped_storage().data_ptr() in parameters else leaf
            for name, leaf in flatten(cell.init_state(batch_size), prefix)
        }
        into.update(found)
        return list(found.values())

    def touched(self, device: torch.device) -> Tensor:
        """() zero, with every trained parameter in its graph."""
        zero = torch.zeros((), device=device)
        for parameter in _at_hand(self):
            if parameter.requires_grad:
                zero = zero + (parameter.sum() * 0.0).to(device)
        return zero


def _at_hand(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `module`. RuntimeError when they are in pieces."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise RuntimeError(
                f"a memory's parameter {name!r} is in pieces where it is needed; let each memory be an "
                "FSDP unit (fully_shard(memory) for memory in model.memory.attached.values()), and let "
                "the first call be one of the sharded model"
            )
    return list(module.parameters())


class MemoryStack(nn.Module):
    """All memories of a model, in the order they were given: the first is outermost at a stage."""

    def __init__(
        self, configs: Sequence[MemoryConfig], backbone: Backbone, segment_length: int
    ) -> None:
        super().__init__()
        self.turns = backbone.turns
        dims = backbone.dims(segment_length)
        check_recurrence(configs, backbone)
        resolved = [resolve(config, dims) for config in configs]
        check_layers(resolved, backbone, dims)
        check_attention(resolved, backbone, dims)
        check_composition(resolved, dims)
        check_positions(resolved, backbone, segment_length)
        self.configs = [config_to_dict(config) for config in resolved]
        self.signature = signature_of(resolved, dims.hidden_size, dims.num_layers)
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
        # name -> the shape of one row of each state tensor, and the trees they stand in.
        self.shapes: dict[str, torch.Size] = {}
        # Those that are summed up in, and so are wider than a stage in half precision.
        self._sums: set[str] = set()
        self._names: dict[str, list[str]] = {}
        self._trees: dict[str, Any] = {}
        with torch.no_grad():
            for label, memory in self._labelled():
                tree = memory.init_state(1)
                self.shapes.update((name, leaf.shape[1:]) for name, leaf in flatten(tree, label))
                self._trees[label] = skeleton(tree)
                own, memory.place = memory.place, cast(Tensor, memory.place).to(torch.bfloat16)
                half = dict(flatten(memory.init_state(1), label))
                memory.place = own
                self._names[label] = list(half)
                self._sums.update(n for n, leaf in half.items() if leaf.dtype == torch.float32)

    def set_dtype(self, dtype: torch.dtype, wide: bool) -> None:
        """States in the base model's `dtype`; parameters too, or, with `wide`, in float32 at least."""
        self.to(dtype)
        if wide:
            for parameter in self.parameters():
                parameter.data = parameter.data.to(accumulator_dtype(dtype))

    @property
    def tokens(self) -> Tensor | None:
        """(M, E) embeddings appended to each segment, or None."""
        if self._owner is None:
            return None
        owner = self._memories()[self._owner]
        # A copy: the parameter itself, when sharded, is gone after the call.
        return owner(lambda: cast(Tensor, owner.tokens).clone())

    def cells(self) -> Cells:
        """The memories by stage. Looked up at every call: peft may have put copies in their place."""
        found: dict[tuple[Any, int], list[Cell]] = {}
        for name, memory in self._memories().items():
            for key, cell in memory.cells.items():
                layer, label = (-1, name) if key == "model" else (int(key), f"{name}.{key}")
                here = Cell(label, cast(Memory, cell), memory)
                found.setdefault((memory.site, layer), []).append(here)
        return found

    def settle(self, backbone: Backbone) -> None:
        """Move every cell to its layer's device, and the rest to that of the token ids."""
        for memory in self._memories().values():
            memory.to(backbone.device)
            for key, cell in memory.cells.items():
                if key != "model":
                    cell.to(works_on(backbone.layers[int(key)]))

    def at_home(self, state: MemoryState) -> MemoryState:
        """`state` with every tensor on its memory's device."""
        homes = {label: cast(Tensor, memory.place).device for label, memory in self._labelled()}
        everywhere = {*homes.values(), *(value.device for value in state.tensors.values())}
        if len(everywhere) <= 1:
            # As a rule; what follows is looked up name by name.
            return state

        def moved(name: str, value: Tensor) -> Tensor:
            home = next(device for label, device in homes.items() if name.startswith(f"{label}."))
            return value if value.device == home else value.to(home)

        found = {name: moved(name, value) for name, value in state.tensors.items()}
        return MemoryState(found, state.batch_size, state.signature)

    def check_present(self, device: torch.device) -> None:
        """RuntimeError when a memory's parameters were offloaded, while the base computes on `device`."""
        away = [name for name, value in self.named_parameters() if value.is_meta]
        if away and device.type != "meta":
            raise RuntimeError(
                f"the memory's parameter {away[0]!r} is offloaded, and memories are needed whole; offload "
                "or dispatch the base alone (`model.base`), or give 'memory' a device in the device_map"
            )

    def touch(self, loss: Tensor) -> Tensor:
        """`loss` with every trained parameter of the memories in its graph."""
        with self.turns.shared():
            for memory in self._memories().values():
                loss = loss + memory(partial(memory.touched, loss.device)).to(loss.dtype)
        return loss

    def init_state(self, batch_size: int) -> MemoryState:
        """The state before the first segment."""
        tensors: dict[str, Tensor] = {}
        with self.turns.shared():
            for name, memory in self._memories().items():
                for key in memory.cells:
                    label = name if key == "model" else f"{name}.{key}"
                    memory(partial(memory.start, key, batch_size, label, tensors))
        return MemoryState(tensors, batch_size, self.signature)

    def admit(self, state: MemoryState, batch_size: int) -> MemoryState:
        """`state` on the memories' devices, in no narrower numbers than theirs.

        ValueError when it is another model's or another batch's.
        """
        if not isinstance(state, MemoryState):
            raise TypeError(
                f"memory_state is a {type(state).__name__}; give what the model returned as "
                "memory_state, or init_state(batch_size)"
            )
        if state.signature and not self.signed(state.signature):
            raise ValueError(
                f"memory_state is another model's (its memories: {state.signature}; here: "
                f"{self.signature}); use a state of this model"
            )
        if state.batch_size != batch_size:
            raise ValueError(
                f"memory_state has {state.batch_size} rows, but input_ids has {batch_size}; use "
                "memory_state.select(rows) or init_state(batch_size)"
            )
        state = self._completed(state)
        ours = self.shapes
        theirs = {name: value.shape[1:] for name, value in state.tensors.items()}
        if ours != theirs:
            odd = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise ValueError(
                f"memory_state does not fit this model: {odd[0]!r} has shape "
                f"{theirs.get(odd[0], 'missing')}, here {ours.get(odd[0], 'missing')}; "
                "use a state of this model"
            )
        return self.at_home(self._widened(state))

    def _widened(self, state: MemoryState) -> MemoryState:
        """`state` with what was kept in half precision in the numbers in which it is computed."""
        wider = {}
        for label, memory in self._labelled():
            stage = cast(Tensor, memory.place).dtype
            for name in self._names[label]:
                value = state.tensors[name]
                own = accumulator_dtype(stage) if name in self._sums else stage
                if value.is_floating_point() and value.dtype != own:
                    if value.dtype.itemsize <= own.itemsize:
                        wider[name] = value.to(own)
        if not wider:
            return state
        return MemoryState(state.tensors | wider, state.batch_size, state.signature)

    def _completed(self, state: MemoryState) -> MemoryState:
        """`state`, with transient leaves that an older version did not write as they are at the start."""
        absent = self.shapes.keys() - state.tensors.keys()
        if not absent:
            return state
        missing = {
            name
            for label, memory in self._labelled()
            for name in absent
            if name.startswith(f"{label}.")
            and name.removeprefix(f"{label}.").split(".")[0] in memory.transient
        }
        start = self.init_state(state.batch_size).detach().tensors
        tensors = state.tensors | {name: start[name] for name in missing}
        return MemoryState(tensors, state.batch_size, state.signature)

    def signed(self, signature: str) -> bool:
        """Whether a state with this signature is one of these memories', old signatures included."""
        return signature == self.signature or without_options(signature) == self.signature

    def unpack(self, state: MemoryState) -> dict[str, Any]:
        """A state as each cell's own tree, by cell name."""
        return {label: unflatten(tree, label, state.tensors) for label, tree in self._trees.items()}

    def pack(self, trees: dict[str, Any], batch_size: int) -> MemoryState:
        """The reverse of `unpack`. ValueError for a state of another form than `init_state` gives."""
        tensors: dict[str, Tensor] = {}
        for label, tree in trees.items():
            named = dict(flatten(tree, label))
            shapes = {name: leaf.shape[1:] for name, leaf in named.items()}
            known = {name: self.shapes[name] for name in self._names[label]}
            if shapes != known:
                raise ValueError(
                    f"the memory {label!r} left {_described(shapes)} of each row after a segment, where "
                    f"its init_state has {_described(known)}; return a state of the same names and shapes"
                )
            tensors.update(named)
        return MemoryState(tensors, batch_size, self.signature)

    def auxiliary_loss(
        self, before: dict[str, Any], after: dict[str, Any], active: Tensor | None
    ) -> Tensor | None:
        """What one segment's changes of state cost in training, summed over its real rows.

        A memory's cost is a mean over its layers, and the costs of several memories add up. None where no
        memory has a cost.
        """
        total = None
        for name, attached in self._memories().items():
            for key, cell in attached.cells.items():
                label = name if key == "model" else f"{name}.{key}"
                cost = cast(Memory, cell).auxiliary_loss(before[label], after[label])
                if cost is not None:
                    if active is not None:
                        cost = cost.masked_fill(~active.to(cost.device), 0.0)
                    cost = cost.sum() / len(attached.cells)
                    total = cost if total is None else total + cost.to(total.device)
        return total

    def largest_gate(self, state: MemoryState) -> Tensor | None:
        """(B,) the largest write gate of the last segment in any layer; None when no memory has gates."""
        trees = self.unpack(state)
        found = [cell.largest_gate(trees[label]) for label, cell in self._labelled()]
        gates = [gate for gate in found if gate is not None]
        if not gates:
            return None
        return torch.stack([gate.float().to(gates[0].device) for gate in gates]).amax(dim=0)

    def with_options(self, options: Mapping[str, Any]) -> dict[str, MemoryConfig]:
        """The cells' configs with the live options changed, in those that have them.

        ValueError for a name that no memory here has, or a value it cannot have.
        """
        cells = self._labelled()
        known = sorted({name for _, cell in cells for name in cell.Config.live_options()})
        for name, value in options.items():
            if name not in known:
                raise ValueError(
                    f"{name}={value!r} is not an option that may change on this model; "
                    + (f"use one of {', '.join(known)}" if known else "its memories have none")
                )
        new = {}
        for label, cell in cells:
            own = {k: v for k, v in options.items() if k in cell.Config.live_options()}
            new[label] = resolve(replace(cell.config, **own), cell.dims)
        return new

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Change live options of the memories that have them, as `with_options` does."""
        new = self.with_options(options)
        for label, cell in self._labelled():
            cell.config = new[label]
        for number, memory in enumerate(self._memories().values()):
            for one in memory.cells.values():
                self.configs[number] = config_to_dict(cast(Memory, one).config)

    def reruns(self) -> str | None:
        """Why tokens cannot be added to a segment that has begun, as half a sentence; None: they can."""
        for label, cell in self._labelled():
            how, _, reason = cell.continues
            if how == "again":
                return f"the memory {label.partition('.')[0]!r} cannot go on within one ({reason})"
        return None

    def check_finite(self, sizes: Sequence[Tensor], state: MemoryState, first_segment: int) -> None:
        """Refuse to go on with a state that is not finite: FloatingPointError, naming where it began.

        sizes: `MemoryState.largest` after each segment of a window. first_segment: the number of its first.
        """
        if not sizes or not sizes[0].numel():
            return
        finite = torch.stack(list(sizes)).isfinite()
        if bool(finite.all()):
            return
        segment, leaf = (~finite).nonzero()[0].tolist()
        name = list(state.floating())[leaf]
        label = next(label for label, _ in self._labelled() if name.startswith(f"{label}."))
        memory, _, layer = label.partition(".")
        where = f" of layer {layer}" if layer else ""
        raise FloatingPointError(
            f"the memory {memory!r}{where} is no longer finite after segment {first_segment + segment} of "
            f"this call (state tensor {name!r}); go back to a state from before it, and lower the learning "
            "rate or clip gradients if this was training"
        )

    def labels(self) -> list[str]:
        """The names of the cells' states, in the order in which states have them."""
        return list(self._trees)

    def count_of(self, label: str) -> int:
        """How many cells the memory has that one cell's state `label` belongs to."""
        return len(self._memories()[label.partition(".")[0]].cells)

    def _memories(self) -> dict[str, AttachedMemory]:
        return cast(dict[str, AttachedMemory], dict(self.attached.items()))

    def _labelled(self) -> list[tuple[str, Memory]]:
        return [(cell.name, cell.memory) for cells in self.cells().values() for cell in cells]


def _described(shapes: Mapping[str, torch.Size]) -> str:
    """The tensors of a state and their shapes, for a message."""
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()) or "nothing"


def signature_of(configs: Sequence[MemoryConfig], hidden_size: int, num_layers: int) -> str:
    """What a state records of the model that made it, as JSON: the fields that shape it, and two sizes."""
    described = [{"name": name_of(config), **config.state_fields()} for config in configs]
    return json.dumps([*described, hidden_size, num_layers])


def without_options(signature: str) -> str:
    """A signature of version 0.1, which held all fields of the configs, as `signature_of` writes it today.

    A field that was added later takes its default, which is how memories behaved before it. "" when
    `signature` is not of that version.
    """
    try:
        *entries, hidden_size, num_layers = json.loads(signature)
        configs = [config_from_dict(entry) for entry in entries]
    except (ValueError, TypeError):
        return ""
    return signature_of(configs, hidden_size, num_layers)


def resolve(config: MemoryConfig, dims: Dims) -> MemoryConfig:
    """Check `config` against the base model's sizes, and fill in what it leaves open."""
    if config.layers is not None:
        outside = [layer for layer in config.layers if not 0 <= layer < dims.num_layers]
        if outside or len(set(config.layers)) != len(config.layers) or not config.layers:
            raise ValueError(
                f"layers={config.layers} must be different layers of the base model's "
                f"{dims.num_layers}; use 0 to {dims.num_layers - 1}, or None for all"
            )
    return class_of(config).resolve(config, dims)


def class_of(config: MemoryConfig) -> type[Memory]:
    """The mechanism `config` belongs to."""
    return memory_class(name_of(config))


def layers_of(config: MemoryConfig, num_layers: int) -> list[int]:
    """The layers `config` attaches its memory to; none when it wraps the whole decoder."""
    if class_of(config).site == "model":
        return []
    return list(range(num_layers) if config.layers is None else config.layers)


def check_layers(configs: Sequence[MemoryConfig], backbone: Backbone, dims: Dims) -> None:
    """Refuse a memory inside the attention of a layer that has none."""
    for config in configs:
        if class_of(config).site not in ("attention", "heads"):
            continue
        layers = layers_of(config, dims.num_layers)
        without = [layer for layer in layers if not backbone.has_attention(layer)]
        if without:
            rest = tuple(layer for layer in layers if layer not in without)
            raise ValueError(
                f"memory={name_of(config)!r} works inside softmax attention, which layers {without} of "
                f"the base model do not have; use layers={rest}"
                if rest
                else f"memory={name_of(config)!r} works inside softmax attention, which the base model "
                "does not have; use a memory around whole layers such as 'armt'"
            )


def check_recurrence(configs: Sequence[MemoryConfig], backbone: Backbone) -> None:
    """Refuse to carry a recurrent state that the base model does not have, or cannot be given."""
    found = [name_of(config) for config in configs if class_of(config).site == "recurrence"]
    reason = backbone.recurrence_obstacle() if found else None
    if reason is not None:
        raise ValueError(
            f"memory={found[0]!r} carries the base model's own recurrent state, but {reason}, or a memory "
            "with a state of its own such as 'armt'"
        )
    if len(found) > 1:
        raise ValueError(f"memory={found} would each carry the same state; attach one of them")


def check_attention(configs: Sequence[MemoryConfig], backbone: Backbone, dims: Dims) -> None:
    """Refuse a memory that inserts positions into an attention that cannot take them."""
    for config in configs:
        for layer in layers_of(config, dims.num_layers):
            if class_of(config).num_inserted(config, dims) and backbone.biases_by_distance(layer):
                raise ValueError(
                    f"memory={name_of(config)!r} inserts positions, and the base model biases its "
                    "attention by distances within the segment (ALiBi); use a memory such as 'armt'"
                )
        inserted = class_of(config).num_inserted(config, dims)
        if inserted and class_of(config).site != "layer" and not backbone.takes_query_masks:
            raise ValueError(
                f"attn_implementation={backbone.config._attn_implementation!r} takes no mask for each "
                f"query, which memory={name_of(config)!r} needs; load the base with "
                "attn_implementation='sdpa'"
            )


def check_composition(configs: Sequence[MemoryConfig], dims: Dims) -> None:
    """Refuse a memory that would mistake positions inserted by another for tokens of the document."""
    for number, outer in enumerate(configs):
        # Around the decoder, memories inside the layers are inside whichever place they have in the list.
        within = [
            config
            for place, config in enumerate(configs)
            if class_of(config).site != "model" or place > number
        ]
        if class_of(outer).site == "model" and class_of(outer).repeats_inner and within:
            raise ValueError(
                f"memory: {name_of(outer)!r} runs the decoder more than once for each segment, so that "
                f"{name_of(within[0])!r} inside it would be written more than once; attach one of them"
            )
    # A recurrence may stand beside an attention in a layer, never inside it.
    orders = ("layer", "attention", "heads"), ("layer", "recurrence")
    for order, layer in product(orders, range(dims.num_layers)):
        inside = [config for config in configs if class_of(config).site in order]
        inside = [config for config in inside if layer in layers_of(config, dims.num_layers)]
        inside.sort(key=lambda config: order.index(class_of(config).site))
        for outer, inner in pairwise(inside):
            count = class_of(outer).num_inserted(outer, dims)
            if count:
                raise ValueError(
                    f"memory: {name_of(outer)!r} inserts {count} positions into layer {layer}, and "
                    f"{name_of(inner)!r} inside it would take them for tokens; give them different "
                    f"layers{_without_persistent(outer)}"
                )


def _without_persistent(config: MemoryConfig) -> str:
    return ", or set num_persistent_tokens=0" if hasattr(config, "num_persistent_tokens") else ""


def check_positions(
    configs: Sequence[MemoryConfig], backbone: Backbone, segment_length: int
) -> None:
    """Refuse a segment that, with what memories add, is longer than the base model's reach."""
    dims = backbone.dims(segment_length)
    leading = sum(
        class_of(config).num_extra_positions(config)
        for config in configs
        if class_of(config).site == "model"
    )
    shared = leading + sum(
        class_of(config).num_segment_tokens(config)
        for config in configs
        if class_of(config).site != "model"
    )
    # Absolute positions are in the embeddings: what is inserted later needs none.
    own = [
        sum(
            class_of(config).num_extra_positions(config)
            - class_of(config).num_segment_tokens(config)
            for config in configs
            if layer in layers_of(config, dims.num_layers)
        )
        for layer in range(dims.num_layers if dims.rotary else 0)
    ]
    extra = shared + max(own, default=0)
    limit = backbone.max_positions
    if limit is not None and segment_length + extra > limit:
        remedy = (
            f"use at most {limit - extra}, or a smaller memory"
            if extra < limit
            else ("use a smaller memory, or a shorter segment where its size follows the segment's")
        )
        raise ValueError(
            f"segment_length={segment_length} with {extra} memory positions is too large for the base "
            f"model's {limit} positions; {remedy}"
        )
    window = backbone.sliding_window
    if window is not None and leading and segment_length + leading > window:
        raise ValueError(
            f"segment_length={segment_length} with {leading} memory positions exceeds the sliding "
            f"window of {window} in every layer, which would cut tokens off from the memory; use at "
            f"most {window - leading}, or a memory inside the layers such as 'armt'"
        )
    for config in configs:
        check_windows(config, backbone, dims, shared)


def check_windows(config: MemoryConfig, backbone: Backbone, dims: Dims, shared: int) -> None:
    """Refuse positions inserted into a layer whose window would hide them from the segment's end."""
    cls = class_of(config)
    if cls.site == "heads":
        return  # Every query sees the keys such a memory prepends, whatever the window.
    inserted = cls.num_inserted(config, dims)
    total = dims.segment_length + shared + inserted
    layers = layers_of(config, dims.num_layers) if inserted else []
    short = [layer for layer in layers if (window := backbone.window_of(layer)) and window < total]
    if short:
        rest = tuple(layer for layer in layers if layer not in short)
        raise ValueError(
            f"memory={name_of(config)!r} inserts {inserted} positions before each segment of "
            f"{dims.segment_length}, and the sliding window of {backbone.window_of(short[0])} in layers "
            f"{short} would hide them; use a shorter segment"
            + (f", or layers={rest}" if rest else ", or a memory such as 'armt'")
        )
