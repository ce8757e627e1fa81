"""The base model, seen as stages: the only file that knows transformers' internals.

Stages are found by structure, never by class name: the decoder, its layers, their attention modules,
and the softmax core behind transformers' attention interface. Each found module gets a subclass of its
own class that asks, per call, whether memories are at work; parameters, names and the module tree stay
as they were, and without memories at work every forward is the base model's own.

What is at work in a call (`Run`) travels in a context variable between modules and as a keyword
argument through a layer's `__call__`, so that a recomputation by activation checkpointing, which
happens long after the call, finds the same memories and states. Modules put around a stage later, such as
`checkpoint_wrapper`, pass the argument on. Hooks of accelerate, which replace a module's forward on the
instance, stay outside: the stage takes the place of the forward beneath them.

What the stages leave behind is recorded in the `Run`. At the end of a segment every memory has left exactly
one state, or the call raises.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm.memory.base import QKV, Attended, Dims, Memory, Site


@dataclass(frozen=True)
class Cell:
    """One memory at one stage, and the name its state goes by.

    within: calls the function it is given, with the memory's parameters at hand.
    """

    name: str
    memory: Memory
    within: Callable[[Callable[[], Any]], Any]


# In front of an attention implementation's name: it passes through memories at the heads.
OPENED = "memlm_"

# The dtypes in which training by small steps loses them.
HALF = (torch.bfloat16, torch.float16)

# What transformers' families call the function that turns queries and keys by (cos, sin).
ROTATION = "apply_rotary_pos_emb"

# (site, layer) -> the memories there, outermost first. Site "model" has layer -1.
Cells = Mapping[tuple[Site, int], list[Cell]]


class Run:
    """What is at work while one segment passes through the base model, and what it leaves behind.

    No dataclass and no tuple: sharding rebuilds those on their way into a module, and what was written into
    the copy would be lost.

    heads: the layer whose attention module is passed, when its "heads" have memories; rotation: (cos, sin)
    the house withheld from it. wanted: at how many positions, at the end, an attention module's output is
    wanted; None: all.
    """

    heads: int | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    wanted: int | None = None

    def __init__(
        self,
        backbone: Backbone,
        cells: Cells,
        states: Mapping[str, Any],
        write: bool,
        mask: Tensor | None = None,
    ) -> None:
        self.backbone, self.cells, self.states = backbone, cells, states
        self.write, self.mask = write, mask
        self.differentiates = torch.is_grad_enabled()
        self.left = Left()

    def but(self, **changes: Any) -> Run:
        """The same run inside one stage; what is left behind there is left behind here."""
        inside = copy(self)
        vars(inside).update(changes)
        return inside

    def chain(self, site: Site, layer: int, stage: Callable[..., Tensor], x: Any) -> Tensor:
        """Pass `x` through the memories at one stage, `stage` innermost."""
        # No closure that refers to itself: cyclic garbage would keep a segment's tensors until
        # Python's next full collection.
        for cell in reversed(self.cells.get((site, layer), ())):
            stage = partial(self._through, cell, stage)
        return stage(x)

    def _through(
        self,
        cell: Cell,
        inner: Callable[..., Tensor],
        x: Any,
        mask: Tensor | None = None,
        times: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        if times is not None:
            # `attach` refuses the compositions that would get here.
            raise TypeError(f"{cell.name} cannot tell inserted positions from the segment's tokens")
        if self.differentiates and not torch.is_grad_enabled():
            raise RuntimeError(
                f"the memory {cell.name!r} was run without gradient inside a call with gradient, as "
                "use_reentrant=True does, and what it writes would lose its gradient; give activation "
                "checkpointing use_reentrant=False (CheckpointImpl.NO_REENTRANT)"
            )
        known = self.mask_for(x) if mask is None else mask
        return cell.within(partial(self._use, cell, inner, x, known))[0]

    def _use(
        self, cell: Cell, inner: Callable[..., Tensor], x: Any, mask: Tensor | None
    ) -> tuple[Tensor, Any]:
        before = self.states[cell.name]
        y, state = _in_precision_of(x, cell.memory, before, inner, mask=mask, write=self.write)
        self.left.add(cell.name, state)
        # Both are returned, though the state is recorded: sharding looks at what a call returns.
        return y, state

    def mask_for(self, x: Any) -> Tensor | None:
        """The mask of what passes a stage: positions in front of the segment's own are real."""
        length, device = (
            (x.q.shape[2], x.q.device) if isinstance(x, QKV) else (x.shape[1], x.device)
        )
        if self.mask is None:
            return None
        return F.pad(self.mask, (length - self.mask.shape[1], 0), value=True).to(device)


class Left:
    """The states the memories left behind in one segment, by name."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.open = True

    def add(self, name: str, state: Any) -> None:
        """Record a state. RuntimeError for the second one of a memory."""
        if not self.open:
            return  # A recomputation, which leaves behind what is known.
        if name in self.states:
            raise RuntimeError(
                f"the memory {name!r} ran twice in one segment: the base model runs its stage more than "
                "once; attach it to other layers (`layers=`)"
            )
        self.states[name] = state

    def close(self, cells: Cells) -> dict[str, Any]:
        """All states. RuntimeError when a memory has left none."""
        self.open = False
        names = [cell.name for found in cells.values() for cell in found]
        missing = [name for name in names if name not in self.states]
        if missing:
            raise RuntimeError(
                f"the memories {missing} did not run: the base model passed their layers by, or a layer "
                "or its forward was replaced after the model was made; make the change before, or "
                "change a subclass of the layer instead of its instance"
            )
        return self.states


def _in_precision_of(
    x: Any, memory: Memory, state: Any, inner: Callable[..., Tensor], **options: Any
) -> tuple[Tensor, Any]:
    """`memory` on `x`; where `x` is in half precision and the parameters are wider, as autocast has it.

    So a step of training moves float32 numbers, and products cost what they cost the base model. `inner`
    runs under the caller's own setting, on what it would be given without memories.
    """
    stream = (x.v if isinstance(x, QKV) else x).dtype
    parameter = next(memory.parameters(), None)
    if stream not in HALF or parameter is None or parameter.dtype == stream:
        return memory(x, state, inner, **options)
    device = parameter.device.type
    outside = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def stage(x: Any, **given: Any) -> Any:
        x = QKV(*(part.to(stream) for part in x)) if isinstance(x, QKV) else x.to(stream)
        with torch.autocast(device, *outside):
            return inner(x, **given)

    # A cell uses a weight once per segment: autocast's cache would only hold on to copies.
    with torch.autocast(device, stream, cache_enabled=False):
        y, new = memory(x, state, stage, **options)
    return y.to(stream), new


_RUN: ContextVar[Run | None] = ContextVar("memlm_run", default=None)
_HIDDEN: ContextVar[_Hidden | None] = ContextVar("memlm_hidden", default=None)
# While an attention module is tried out: where its queries and keys go instead of the softmax.
_TRIED: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("memlm_tried", default=None)
# One subclass and one signature a class, however many models are opened.
_SUBCLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
_SIGNATURES: dict[type[nn.Module], inspect.Signature] = {}


@contextmanager
def _entered(run: Run | None) -> Iterator[None]:
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


class _Hidden(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states as a decoder's output; what else a family's head looks for is None."""

    def __getattr__(self, name: str) -> None:
        # accelerate takes what has a `to` for a tensor.
        if name.startswith("_") or name == "to":
            raise AttributeError(name)


class _Stage(nn.Module):
    """A module that was found, with a subclass of its own class."""

    _memlm_original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class goes by its original's name; looked up by it, it would be the original.
        made = super().__reduce_ex__(protocol)
        cls = type(self)
        if _SUBCLASSES.get((cls.__bases__[0], cls._memlm_original)) is not cls:
            return made
        return (_made_again, cls.__bases__, *made[2:])


class _DecoderStage(_Stage):
    """The decoder; returns what is given untouched when only the head or the loss is asked for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _HIDDEN.get()
        if given is not None:
            return given
        return super().forward(*args, **kwargs)


class _MemoryStage(_Stage):
    """A decoder layer or its attention module, with the memories of the run around it."""

    _memlm_site: Site
    _memlm_layer: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is not None:
            kwargs["memory_run"] = run
        out = super().__call__(*args, **kwargs)
        return out[0] if _is_shown(self, kwargs.get("memory_run")) else out

    def forward(self, *args: Any, memory_run: Run | None = None, **kwargs: Any) -> Any:
        if not _is_shown(self, memory_run):
            return self._forward(memory_run, args, kwargs)
        assert memory_run is not None
        # FSDP gathers a module's parameters for backward once a gradient reaches what its call
        # returned, and a gradient may reach a state alone: so the states are shown to it.
        before = set(memory_run.left.states)
        out = self._forward(memory_run, args, kwargs)
        return out, [v for k, v in memory_run.left.states.items() if k not in before]

    def _forward(
        self, memory_run: Run | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = super().forward
        if memory_run is None:
            return call(*args, **kwargs)
        site, layer = self._memlm_site, self._memlm_layer
        around_heads = site == "attention" and ("heads", layer) in memory_run.cells
        if (site, layer) not in memory_run.cells and not around_heads:
            with _entered(memory_run):
                return call(*args, **kwargs)
        arguments = _bind(type(self)._memlm_original, args, kwargs)
        hidden = arguments.pop("hidden_states")
        rest: tuple[Any, ...] | None = None

        def stage(
            x: Tensor,
            mask: Tensor | None = None,
            times: Tensor | None = None,
            last: int | None = None,
        ) -> Tensor:
            nonlocal rest
            inside = memory_run if last is None else memory_run.but(wanted=last)
            given: Mapping[str, Any] = arguments
            if x.shape[1] != hidden.shape[1]:
                mask = memory_run.mask_for(x) if mask is None else mask
                given = memory_run.backbone.lengthened(layer, arguments, x, mask, times)
                inside = inside.but(mask=mask)
            if around_heads:
                given, rotation = memory_run.backbone.unrotated(layer, given)
                inside = inside.but(heads=layer, rotation=rotation)
            with _entered(inside):
                out = call(x, **given)
            if isinstance(out, tuple):
                out, rest = out[0], out[1:]
            return out

        y = memory_run.chain(site, layer, stage, hidden)
        return y if rest is None else (y, *rest)


def _is_shown(module: nn.Module, run: Run | None) -> bool:
    return run is not None and isinstance(module, FSDPModule)


def _hand_over(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a module around a stage what is at work, so that it calls the stage with it, however late."""
    return args, {**kwargs, "memory_run": _RUN.get()}


def _signature(cls: type[nn.Module]) -> inspect.Signature:
    if cls not in _SIGNATURES:
        _SIGNATURES[cls] = inspect.signature(cls.forward)
    return _SIGNATURES[cls]


def _bind(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a stage's forward by name; the hidden states come first in all of them."""
    signature = _signature(cls)
    bound = signature.bind_partial(None, *args, **kwargs).arguments
    names = list(signature.parameters)
    first = names[1]
    named = {k: v for k, v in bound.items() if k not in (names[0], first)}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise TypeError(f"{cls.__name__}.forward takes *{name}; its arguments cannot be named")
    return {"hidden_states": bound[first], **named}


def _subclass(stage: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    known = _SUBCLASSES.get((stage, cls))
    if known is not None:
        return known
    # The name stays: FSDP wrapping policies and _no_split_modules go by it.
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_memlm_original": cls,
    }
    _SUBCLASSES[stage, cls] = type(cls.__name__, (stage, cls), namespace)
    return _SUBCLASSES[stage, cls]


def _made_again(stage: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    """An empty module of the class that `_subclass` makes: what pickle and deepcopy fill."""
    made = _subclass(stage, cls)
    return cast(nn.Module, made.__new__(made))


def _become(module: nn.Module, stage: type[nn.Module]) -> bool:
    """Make `module` a stage; False when it is one already."""
    if isinstance(module, stage):
        return False
    cls, own = type(module), vars(module)
    # accelerate's hooks put a forward of theirs on the instance, and keep its own under the first name.
    name = next((name for name in ("_old_forward", "forward") if name in own), None)
    if name is not None and getattr(own[name], "__func__", None) is not cls.forward:
        raise ValueError(
            f"base: a {cls.__name__} has a forward of its own, {own[name]!r}, which would pass the "
            "memories by; take it off before, or make it the forward of a subclass"
        )
    module.__class__ = _subclass(stage, cls)
    if name is not None:
        own[name] = type(module).forward.__get__(module)
    return True


def _restore(module: nn.Module) -> None:
    """The reverse of `_become`."""
    staged, own = type(module).forward, vars(module)
    module.__class__ = original_class(module)
    for name in ("_old_forward", "forward"):
        if getattr(own.get(name), "__func__", None) is staged:
            own[name] = type(module).forward.__get__(module)
    for name in ("_memlm_site", "_memlm_layer"):
        own.pop(name, None)


def works_on(module: nn.Module) -> torch.device:
    """The device `module` computes on: its parameters', or the one accelerate's hooks fetch them to."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(chain(module.parameters(), module.buffers())).device


class Backbone:
    """A causal language model of transformers, opened at its stages. Raises ValueError if it has none."""

    def __init__(self, base: PreTrainedModel) -> None:
        if base.config.is_encoder_decoder:
            raise ValueError(
                f"base={type(base).__name__} has an encoder; "
                "use a decoder-only causal language model of transformers"
            )
        self.base = base
        self.decoder: nn.Module = base.get_decoder()
        if self.decoder is base:
            raise ValueError(
                f"base={type(base).__name__} does not tell its decoder from its head; "
                "use the text model of another architecture"
            )
        self.layers = find_layers(base)
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"base={type(base).__name__} runs one layer at several depths, where memories could not be "
                "told apart; use a model whose layers are its own"
            )
        if any(isinstance(module, FSDPModule) for module in base.modules()):
            raise ValueError(
                f"base={type(base).__name__} is sharded already; attach the memory first, then shard"
            )
        # What `close` undoes: not what another wrapper of the same base did.
        self._staged = [self.decoder] if _become(self.decoder, _DecoderStage) else []
        self._opened: list[Any] = []
        for index, layer in enumerate(self.layers):
            stages: list[tuple[Site, nn.Module]] = [("layer", layer)]
            stages += [("attention", module) for module in find_attention(layer)]
            for site, module in stages:
                if _become(module, _MemoryStage):
                    self._staged.append(module)
                stage = cast(_MemoryStage, module)
                stage._memlm_site, stage._memlm_layer = site, index
        # Where each stage stands: (parent, name under it, stage).
        self._places = [
            (parent, name, _inside(child))
            for parent in (_layer_list(base), *self.layers)
            for name, child in parent.named_children()
            if isinstance(_inside(child), _MemoryStage)
        ]
        original = type(self.decoder)._memlm_original
        self._rotates: dict[int, bool] = {}
        self._takes_positions = "position_ids" in _signature(original).parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # Another process does not know the implementation that passes through the memories.
        if self.heads_are_open:
            _open(self.attention)

    @property
    def device(self) -> torch.device:
        """Where token ids have to be, and the states of memories around the whole decoder."""
        return works_on(self.base.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of embeddings and hidden states; weights may be stored otherwise."""
        weight = cast(Tensor, self.base.get_input_embeddings().weight)
        return weight.dtype if weight.is_floating_point() else self.base.dtype

    @property
    def config(self) -> Any:
        """The decoder's own configuration."""
        return self.base.config.get_text_config(decoder=True)

    def dims(self, segment_length: int) -> Dims:
        """Sizes a mechanism needs."""
        config = self.config
        heads = getattr(config, "num_attention_heads", None) or 1
        return Dims(
            hidden_size=config.hidden_size,
            embedding_size=self.base.get_input_embeddings().embedding_dim,
            num_layers=len(self.layers),
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            segment_length=segment_length,
            rotary=hasattr(self.decoder, "rotary_emb"),
            max_positions=self.max_positions,
        )

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the base model was built for, None when it names no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def sliding_window(self) -> int | None:
        """The window when every layer attends within one; None when some layer sees everything."""
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if types is not None and any(kind != "sliding_attention" for kind in types):
            return None
        if getattr(self.config, "use_sliding_window", True) is False:
            return None
        return window

    def kind(self, layer: int) -> str | None:
        """What transformers calls the attention of `layer` ("full_attention", ...), if it says."""
        types = getattr(self.config, "layer_types", None)
        return types[layer] if types else None

    def window_of(self, layer: int) -> int | None:
        """How far back the attention of `layer` sees; None: as far as there is."""
        kind = self.kind(layer)
        if kind == "chunked_attention":
            return getattr(self.config, "attention_chunk_size", None)
        if kind == "sliding_attention":
            return getattr(self.config, "sliding_window", None)
        return self.sliding_window if kind is None else None

    def has_attention(self, layer: int) -> bool:
        """Whether `layer` has a softmax attention (hybrid models have layers without)."""
        return self.kind(layer) != "linear_attention" and bool(find_attention(self.layers[layer]))

    @property
    def takes_query_masks(self) -> bool:
        """Whether the attention implementation takes a mask for each query (flash attention does not)."""
        return self.attention in ("sdpa", "eager")

    @property
    def attention(self) -> str:
        """The attention implementation the base model was given, whether or not memories are in it."""
        return (self.config._attn_implementation or "sdpa").removeprefix(OPENED)

    @property
    def heads_are_open(self) -> bool:
        """Whether the softmax core passes through memories; not when an implementation was set since."""
        return (self.config._attn_implementation or "").startswith(OPENED)

    def biases_by_distance(self, layer: int) -> bool:
        """Whether the attention of `layer` is given biases made for the segment's own length (ALiBi)."""
        if not getattr(self.config, "alibi", True):
            return False
        return any(
            name in _signature(original_class(module)).parameters
            for module in find_attention(self.layers[layer])
            for name in ("alibi", "position_bias")
        )

    def embedding_std(self) -> float:
        """Scale of the embeddings as the decoder receives them (some families scale in the module)."""
        embeddings = self.base.get_input_embeddings()
        rows = min(1024, embeddings.num_embeddings)
        with torch.no_grad():
            ids = torch.arange(rows, device=self.device)
            return float(embeddings(ids).float().std())

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, E)."""
        return self.base.get_input_embeddings()(ids)

    def run_segment(
        self,
        ids: Tensor,
        mask: Tensor | None,
        cells: Cells,
        tokens: Tensor | None,
        states: Mapping[str, Any],
        write: bool,
    ) -> tuple[Tensor, dict[str, Any], Tensor | None]:
        """One segment through the base model and its memories.

        ids (B, T), mask (B, T) or None, tokens (M, E): embeddings to flow behind the segment, or None.
        Returns last hidden states (B, T, D), the states the cells returned, by name, and in training the
        router loss () of a base with experts that asks for it (`output_router_logits`), else None.
        """
        router_losses: list[Tensor] = []
        run = Run(self, cells, states, write, mask)
        if tokens is not None and not write:
            tokens = None

        def decoder(x: Tensor, mask: Tensor | None = None) -> Tensor:
            length = x.shape[1]
            mask = run.mask_for(x) if mask is None else mask
            if tokens is not None:
                x = torch.cat([x, tokens.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
                if mask is not None:
                    mask = F.pad(mask, (0, tokens.shape[0]), value=True)
            with _entered(run.but(mask=mask) if cells else None), self._handed_over():
                found = self._decode(x, mask)
            if self._balances_routers:
                router_losses.append(self._router_loss(found, mask))
            return found.last_hidden_state[:, :length]

        hidden = run.chain("model", -1, decoder, self.embed(ids)).to(ids.device)
        losses = torch.stack(router_losses).mean().to(ids.device) if router_losses else None
        return hidden, run.left.close(cells), losses

    @contextmanager
    def _handed_over(self) -> Iterator[None]:
        """Let what is at work reach its stages through modules that were put around them since."""
        found = [(module, parent.get_submodule(name)) for parent, name, module in self._places]
        around = [
            outer for module, outer in found if outer is not module and _RUN.get() is not None
        ]
        handles = [
            outer.register_forward_pre_hook(_hand_over, with_kwargs=True) for outer in around
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _balances_routers(self) -> bool:
        wanted = getattr(self.config, "output_router_logits", False)
        return bool(wanted) and self.base.training and torch.is_grad_enabled()

    def _router_loss(self, found: Any, mask: Tensor | None) -> Tensor:
        """What the base adds to its loss for routers out of balance, () with its own weight in it."""
        hidden = found.last_hidden_state
        if not found.get("router_logits"):
            raise ValueError(
                f"base: config.output_router_logits=True, but {type(self.base).__name__} has no router "
                "that would tell; set it to False"
            )
        counts = {routed.numel() // routed.shape[-1] for routed in found.router_logits}
        if mask is not None and counts != {mask.numel()}:
            raise ValueError(
                "base: config.output_router_logits=True, but a memory inserts positions into single "
                "layers, where the routers' padding cannot be told; train without padding, set it to "
                "False, or use a memory such as 'armt'"
            )
        # One position and no target: the base computes its loss, of which nothing else is left.
        given = _Hidden(last_hidden_state=hidden[:, :1])
        given.router_logits = found.router_logits
        nothing = torch.full((*hidden.shape[:1], 1), -100, device=hidden.device)
        token = _HIDDEN.set(given)
        try:
            return self.base(
                inputs_embeds=hidden[:, :1],
                attention_mask=None if mask is None else mask.to(torch.long),
                labels=nothing,
                num_items_in_batch=1,
                output_router_logits=True,
                use_cache=False,
            ).loss
        finally:
            _HIDDEN.reset(token)

    def _decode(self, x: Tensor, mask: Tensor | None) -> Any:
        arguments: dict[str, Any] = {"inputs_embeds": x, "use_cache": False}
        if mask is not None:
            # A row without a token would attend to nothing and fill its gradients with NaN; it may see
            # its first position, and what it computes is thrown away with the row.
            mask = mask.clone()
            mask[:, 0] |= ~mask.any(dim=1)
            arguments["attention_mask"] = mask.to(torch.long)
            if self._takes_positions:
                arguments["position_ids"] = _positions(mask)
        if self._balances_routers:
            arguments["output_router_logits"] = True
        return self.decoder(**arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        """The base model's own head, with its scaling and soft-capping. (..., D) -> (..., V)."""
        token = _HIDDEN.set(_Hidden(last_hidden_state=hidden))
        try:
            return self.base(inputs_embeds=hidden, use_cache=False).logits
        finally:
            _HIDDEN.reset(token)

    def lengthened(
        self,
        layer: int,
        arguments: Mapping[str, Any],
        x: Tensor,
        mask: Tensor | None,
        times: Tensor | None = None,
    ) -> dict[str, Any]:
        """A stage's arguments for `x` (B, T', D) of another length: positions and mask made anew."""
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        positions = _positions(mask, times)
        config = self.config
        kind = self.kind(layer)
        if kind is not None:
            make_mask = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        elif getattr(config, "sliding_window", None):
            make_mask = create_sliding_window_causal_mask
        else:
            make_mask = create_causal_mask
        given = dict(arguments)
        seen = make_mask(config=config, inputs_embeds=x, attention_mask=mask, past_key_values=None)
        given["attention_mask"] = seen if times is None else _not_later(seen, times)
        if given.get("position_ids") is not None:
            given["position_ids"] = positions
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = self.rotary(layer, x, positions)
        return given

    def rotary(self, layer: int, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of `positions` (B, T) as the attention of `layer` takes them."""
        rotary = cast(nn.Module, self.decoder.rotary_emb)
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        return rotary(like, positions, self.kind(layer)) if by_type else rotary(like, positions)

    def unrotated(
        self, layer: int, arguments: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[Tensor, Tensor] | None]:
        """Arguments with which an attention module leaves queries and keys unturned, and its turn."""
        if not self.rotates(layer):
            return arguments, None
        cos, sin = arguments["position_embeddings"]
        still = torch.ones_like(cos), torch.zeros_like(sin)
        return {**arguments, "position_embeddings": still}, (cos, sin)

    def rotates(self, layer: int) -> bool:
        """Whether the attention of `layer` turns queries and keys by position: found by trying it.

        Weights have to be there. ValueError for an attention the house cannot do the turning for.
        """
        if layer not in self._rotates:
            self._rotates[layer] = self._try_rotation(layer)
        return self._rotates[layer]

    @torch.no_grad()
    def _try_rotation(self, layer: int) -> bool:
        module = find_attention(self.layers[layer])[0]
        parameters = _signature(original_class(module)).parameters
        device = works_on(self.layers[layer])
        x = torch.linspace(-1, 1, 3 * self.config.hidden_size, device=device).sin()
        # In the dtype the module is given, not the one its weights are stored in.
        x = x.reshape(1, 3, -1).to(self.dtype)
        arguments = {
            name: None
            for name, parameter in list(parameters.items())[2:]
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        turns = "position_embeddings" in parameters and hasattr(self.decoder, "rotary_emb")
        if not turns:
            self._tried(layer, module, x, arguments)
            return False
        positions = torch.arange(3, device=x.device)[None]
        cos, sin = self.rotary(layer, x, positions)
        turned = self._tried(layer, module, x, {**arguments, "position_embeddings": (cos, sin)})
        still = torch.ones_like(cos), torch.zeros_like(sin)
        plain = self._tried(layer, module, x, {**arguments, "position_embeddings": still})
        if _alike(turned, plain):
            return False
        rotate = find_in_family(module, ROTATION)
        if rotate is None or not _alike(turned, turn(rotate, *plain, cos, sin)):
            raise ValueError(
                f"base: the attention of layer {layer} ({type(module).__name__}) turns its queries and "
                "keys in a way that cannot be taken off; use a memory that works outside the attention, "
                "such as 'armt' or 'rmt'"
            )
        return True

    def _tried(
        self, layer: int, module: nn.Module, x: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys the attention `module` would hand to its softmax."""
        found: list[tuple[Tensor, Tensor]] = []
        training, failure = module.training, None
        run, tried = _RUN.set(None), _TRIED.set(found)
        try:
            module.eval()(x, **arguments)
        except Exception as error:
            failure = error
        finally:
            module.train(training)
            _TRIED.reset(tried)
            _RUN.reset(run)
        dims = self.dims(1)
        expected = [(1, n, x.shape[1], dims.head_dim) for n in (dims.num_heads, dims.num_kv_heads)]
        if (
            failure is not None
            or [tuple(part.shape) for pair in found for part in pair] != expected
        ):
            raise ValueError(
                f"base: the attention of layer {layer} ({type(module).__name__}) does not run its softmax "
                "through transformers' attention interface in the way a memory at its heads needs; use "
                "one that works outside it, such as 'armt' or 'rmt'"
            ) from failure
        if not all(bool(part.any()) for part in found[0]):
            raise ValueError(
                f"base: whether the attention of layer {layer} ({type(module).__name__}) turns its queries "
                "and keys cannot be told, since the queries or keys are zero; load the base's weights "
                "first, or use a memory that works outside it, such as 'armt' or 'rmt'"
            )
        return found[0]

    def open_heads(self) -> None:
        """Route the softmax core through memories of site "heads"."""
        if self.heads_are_open:
            return
        inner = self.attention
        if inner not in ALL_ATTENTION_FUNCTIONS and inner != "eager":
            inner = "sdpa"
        name = _open(inner)
        configs = [m.config for m in self.base.modules() if isinstance(m, PreTrainedModel)]
        self._opened = [*configs, self.config]
        for config in self._opened:
            config._attn_implementation = name

    def close(self) -> None:
        """Give the base model its own classes and attention back; what it was given since stays."""
        for name, module in self.base.named_modules():
            if module in self._staged and "_memlm_original" not in vars(type(module)):
                raise RuntimeError(
                    f"base: {name or 'the model'} has become a {type(module).__name__} since it was "
                    "wrapped (sharded, say), and its own class cannot be given back; undo that first"
                )
        for module in self._staged:
            _restore(module)
        for config in self._opened:
            config._attn_implementation = (config._attn_implementation or "").removeprefix(OPENED)
        self._staged, self._opened = [], []

    def check_open(self) -> None:
        """Refuse to run a base model whose stages were given back (RuntimeError)."""
        if not isinstance(self.decoder, _DecoderStage):
            raise RuntimeError(
                f"base={type(self.base).__name__} was unloaded, and memories are no longer around its "
                "stages; wrap it again with MemLMForCausalLM.from_base"
            )


def _open(inner: str) -> str:
    """The name of the attention implementation that passes `inner` through the memories."""
    name = f"{OPENED}{inner}"
    AttentionInterface.register(name, partial(_attend, inner))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


def _positions(mask: Tensor, times: Tensor | None = None) -> Tensor:
    """Position of each real token among the real tokens of its row. (B, T) -> (B, T).

    times (T,): positions of the same time share a place.
    """
    if times is None:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    taken = torch.zeros_like(mask, dtype=torch.long).index_add(1, times, mask.long()) > 0
    return (taken.long().cumsum(dim=1) - 1).clamp(min=0)[:, times]


def _not_later(seen: Tensor | None, times: Tensor) -> Tensor:
    """An attention mask (., 1, T, T) narrowed to what does not happen later; None is the causal mask."""
    past = (times.unsqueeze(0) <= times.unsqueeze(1))[None, None]
    if seen is None:
        return past.tril()
    _check_4d(seen)
    return seen & past if seen.dtype == torch.bool else seen.masked_fill(~past, _least(seen))


def _check_4d(seen: Tensor) -> None:
    if seen.ndim != 4:
        raise ValueError(
            "attn_implementation: this memory needs an attention that takes a mask for each query; load "
            "the base with attn_implementation='sdpa'"
        )


def _least(like: Tensor) -> float:
    return torch.finfo(like.dtype).min


def _alike(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Equal up to the rounding of any dtype."""
    limit = 0.02 * float(expected[0].abs().max())
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= limit
        for a, b in zip(found, expected, strict=True)
    )


def find_in_family(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """A function that the file of a family's attention defines, such as how it turns queries and keys."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], name, None)
        if found is not None:
            return found
    return None


def turn(
    rotate: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotate` on the leading features that (cos, sin) cover; the others stay (partial rotary)."""
    part = cos.shape[-1]
    if part == q.shape[-1]:
        return rotate(q, k, cos, sin)
    turned = rotate(q[..., :part], k[..., :part], cos, sin)
    rest = q[..., part:], k[..., part:]
    return (
        torch.cat([turned[0], rest[0]], dim=-1),
        torch.cat([turned[1], rest[1]], dim=-1),
    )


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface, with the memories of site "heads" around it."""
    attention = find_in_family(module, "eager_attention_forward")
    if implementation != "eager" or attention is None:
        attention = ALL_ATTENTION_FUNCTIONS["sdpa" if implementation == "eager" else implementation]
    tried = _TRIED.get()
    if tried is not None:
        tried.append((query, key))
        return value.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None
    run = _RUN.get()
    layer = getattr(module, "_memlm_layer", -1)
    if run is None or run.heads != layer:
        spared = 0 if run is None or run.wanted is None else query.shape[2] - run.wanted
        if spared and attention_mask is not None and attention_mask.ndim == 4:
            query, attention_mask = query[:, :, spared:], attention_mask[:, :, spared:]
            found, weights = attention(module, query, key, value, attention_mask, **kwargs)
            return F.pad(found, (0, 0, 0, 0, spared, 0)), weights
        return attention(module, query, key, value, attention_mask, **kwargs)

    def stage(x: QKV, mask: Tensor | None = None, parts: bool = False) -> Any:
        extra = x.k.shape[2] - key.shape[2]
        seen = attention_mask
        if extra:
            if mask is None:
                mask = run.mask_for(QKV(x.k, x.k, x.v))
            seen = _with_keys_in_front(attention_mask, mask, x, extra)
        q, k = x.q, x.k
        cos = None
        if run.rotation is not None:
            rotate = find_in_family(module, ROTATION)
            assert rotate is not None
            if extra:
                # Queries stand where their own keys do, behind the keys in front.
                if mask is None:
                    mask = torch.ones(x.v.shape[0], x.v.shape[2], dtype=torch.bool, device=q.device)
                cos, sin = run.backbone.rotary(layer, x.v, _positions(mask))
                q, own = turn(rotate, q, k[:, :, extra:], cos[:, extra:], sin[:, extra:])
                front = k[:, :, :extra]
                front = turn(rotate, front, front[:, :0], cos[:, :extra], sin[:, :extra])[0]
                k = torch.cat([front, own], dim=2)
            else:
                cos, sin = run.rotation
                q, k = turn(rotate, q, k, cos, sin)
        y = attention(module, q, k, x.v, seen, **kwargs)[0].transpose(1, 2)
        return Attended(y, *_opened(q, k, seen, cos, kwargs)) if parts else y

    return run.chain("heads", layer, stage, QKV(query, key, value)).transpose(1, 2), None


def _with_keys_in_front(seen: Tensor | None, mask: Tensor | None, x: QKV, extra: int) -> Tensor:
    """An attention mask (., 1, T, T) for `extra` keys more, which every query sees where they are real."""
    queries = x.q.shape[2]
    if seen is None:
        shape = (queries, x.k.shape[2] - extra)
        seen = torch.ones(shape, dtype=torch.bool, device=x.q.device).tril()[None, None]
    _check_4d(seen)
    if mask is None:
        return F.pad(seen, (extra, 0), value=True if seen.dtype == torch.bool else 0.0)
    front = mask[:, None, None, :extra].expand(-1, -1, queries, -1)
    if seen.dtype != torch.bool:
        front = torch.zeros_like(front, dtype=seen.dtype).masked_fill(~front, _least(seen))
    return torch.cat([front, seen.expand(front.shape[0], -1, -1, -1)], dim=-1)


def _opened(
    q: Tensor, k: Tensor, seen: Tensor | None, cos: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The last two of `Attended`, from queries and keys as the softmax takes them.

    ValueError for an attention whose softmax is not one over scaled products.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"base: no other keys can join the softmax of its attention, which takes {name!r}; use a "
                "memory that mixes outputs, such as 'infini' or a 'knn' with combine='gate'"
            )
    scaling = arguments.get("scaling")
    q = q * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (q.unflatten(1, (k.shape[1], -1)) @ k.mT.unsqueeze(2)).flatten(1, 2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide)
    if seen is None:
        ahead = scores.new_ones(scores.shape[2:], dtype=torch.bool).triu(
            1 + k.shape[2] - q.shape[2]
        )
        scores = scores.masked_fill(ahead, _least(scores))
    else:
        _check_4d(seen)
        scores = (
            scores.masked_fill(~seen, _least(scores)) if seen.dtype == torch.bool else scores + seen
        )
    if cos is not None:
        # At the first place nothing is turned, but some families scale with the turn.
        size = cos.shape[-1]
        q = torch.cat([q[..., :size] * cos[:, None, :1], q[..., size:]], dim=-1)
    return scores.logsumexp(dim=-1), q


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class an opened module had."""
    return cast(type[_MemoryStage], type(module))._memlm_original


def find_layers(base: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of `base`, by structure. ValueError when there is no such list."""
    return _unwrapped(_layer_list(base))


def _layer_list(base: PreTrainedModel) -> nn.ModuleList:
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name, module)
        for name, module in base.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in _unwrapped(module))
    ]
    if not lists:
        raise ValueError(
            f"base={type(base).__name__} has no list of {count} decoder layers; "
            "use a decoder-only causal language model of transformers"
        )
    return min(lists, key=lambda found: found[0].count("."))[1]


def find_attention(layer: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a decoder layer (one in all families met so far)."""
    return [child for child in _unwrapped(layer) if "Attention" in type(child).__name__]


def _unwrapped(parent: nn.Module) -> list[nn.Module]:
    """The children of `parent`, each without the modules around it that add nothing but a call."""
    return [_inside(child) for child in parent.children()]


def _inside(module: nn.Module) -> nn.Module:
    while isinstance(module, ActivationWrapper):
        (module,) = module.children()
    return module
