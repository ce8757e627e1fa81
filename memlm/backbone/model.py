"""The base model, seen as stages."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import _global_forward_hooks
from transformers import PreTrainedModel
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm.backbone.finding import find_attention, find_layers, layer_list, unwrapped, works_on
from memlm.backbone.heads import (
    OPENED,
    folded_mask,
    not_later,
    only_real,
    open_attention,
    places_of,
    rotates_by_position,
    with_keys_in_front,
)
from memlm.backbone.open import Front, OpenSegment
from memlm.backbone.recurrence import (
    NO_RECURRENCE,
    SUPPORTED,
    GateStage,
    LimitedStage,
    RecurrenceStage,
    find_recurrence,
    gates_of,
    goes_on_exactly,
    least_step,
    obstacle,
    recurrence_dims,
)
from memlm.backbone.run import RUN, Cells, Enough, Run, entered
from memlm.backbone.stages import (
    HIDDEN,
    DecoderStage,
    GivenHidden,
    MemoryStage,
    become,
    hand_over,
    original_class,
    restore,
    signature_of,
)
from memlm.backbone.threads import Turns
from memlm.memory.base import LOADED, Dims, Site
from memlm.memory.parts.folding import is_mapped
from memlm.memory.parts.tokens import tokens_back_from, tokens_in

# Kinds of attention whose keys and values say everything about the tokens before.
PLAIN = (None, "full_attention", "sliding_attention", "chunked_attention")


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
        # What `close` undoes, and only that: not what another wrapper of the same base did.
        self._staged = [self.decoder] if become(self.decoder, DecoderStage) else []
        self._opened: list[Any] = []
        self.turns = Turns()
        for index, layer in enumerate(self.layers):
            stages: list[tuple[Site, nn.Module]] = [("layer", layer)]
            own = find_recurrence(layer)
            stages += [("attention", one) for one in find_attention(layer) if one is not own]
            for site, module in stages:
                if become(module, MemoryStage):
                    self._staged.append(module)
                stage = cast(MemoryStage, module)
                stage._memlm_site, stage._memlm_layer = site, index
        self._places = self._stage_places()
        original = type(self.decoder)._memlm_original
        self._rotates: dict[int, bool] = {}
        self._takes_positions = "position_ids" in signature_of(original).parameters

    def _stage_places(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """Where each stage stands: (parent, name under it, stage)."""
        return [
            (parent, name, unwrapped(child))
            for parent in (layer_list(self.base), *self.layers)
            for name, child in parent.named_children()
            if isinstance(unwrapped(child), MemoryStage)
        ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # Another process does not know the implementation that passes through the memories.
        if self.heads_are_open:
            open_attention(self.attention)

    @property
    def device(self) -> torch.device:
        """The device of token ids, and of the states of memories around the whole decoder."""
        return works_on(self.base.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of embeddings and hidden states; weights may be stored in another."""
        weight = cast(Tensor, self.base.get_input_embeddings().weight)
        return weight.dtype if weight.is_floating_point() else self.base.dtype

    @property
    def config(self) -> Any:
        """The decoder's own configuration."""
        return self.base.config.get_text_config(decoder=True)

    def dims(self, segment_length: int) -> Dims:
        """The sizes a mechanism needs."""
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
            rotary=self._has_rotary,
            max_positions=self.max_positions,
            recurrence=recurrence_dims(self.layers),
        )

    @property
    def _has_rotary(self) -> bool:
        return getattr(self.decoder, "rotary_emb", None) is not None

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
        """Whether the attention of `layer` is given biases for exactly the segment's length (ALiBi)."""
        if not getattr(self.config, "alibi", True):
            return False
        return any(
            name in signature_of(original_class(module)).parameters
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
        open_segment: OpenSegment | None = None,
        wanted: bool = True,
    ) -> tuple[Tensor | None, dict[str, Any], Tensor | None]:
        """One segment through the base model and its memories.

        ids (B, T), mask (B, T) or None, tokens (M, E): embeddings to append to the segment, or None.
        open_segment: `ids` are added to it, and what is computed of them is kept in it; nothing is written.
        wanted: False lets the layers above the last memory rest; the hidden states are then None, unless
        something watches or trains them. Returns last hidden states (B, T, D), the states the cells
        returned, by name, and in training the router loss () of a base with experts that asks for it
        (`output_router_logits`), else None.
        """
        router_losses: list[Tensor] = []
        run = Run(self, cells, states, write, mask, open_segment)
        run.stops = not wanted and bool(cells) and open_segment is None and self.may_stop()
        if tokens is not None and not write:
            tokens = None

        def decoder(x: Tensor, mask: Tensor | None = None) -> Tensor:
            length = x.shape[1]
            mask = run.mask_for(x) if mask is None else mask
            if tokens is not None:
                x = torch.cat([x, tokens.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
                if mask is not None:
                    mask = F.pad(mask, (0, tokens.shape[0]), value=True)
            order = None
            if open_segment is not None and mask is not None:
                # Windows count columns, so no padding may stand behind what a memory puts in front.
                order = mask.to(torch.uint8).argsort(dim=1, stable=True)
                x, mask = tokens_in(order, x), mask.gather(1, order)
            with entered(run.but(mask=mask) if cells else None), self._handed_over():
                found = self._decode(x, mask, open_segment)
            if self.balances_routers:
                router_losses.append(self._router_loss(found, mask))
            return tokens_back_from(order, found.last_hidden_state)[:, :length]

        try:
            with self.turns.shared():
                hidden = run.chain("model", -1, decoder, self.embed(ids)).to(ids.device)
        except Enough:
            return None, run.left.close(cells), None
        losses = torch.stack(router_losses).mean().to(ids.device) if router_losses else None
        return hidden, run.left.close(cells), losses

    def may_stop(self) -> bool:
        """Whether nothing would miss the layers above the last memory: no gradient, hook or sharding."""
        if torch.is_grad_enabled() or self.base.training or torch.compiler.is_compiling():
            return False
        return not _global_forward_hooks and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or hasattr(module, "_hf_hook")
            or isinstance(module, FSDPModule)
            for module in self.decoder.modules()
        )

    @contextmanager
    def _handed_over(self) -> Iterator[None]:
        """Let the run reach its stages through modules that were put around them after wrapping."""
        found = [(module, getattr(parent, name)) for parent, name, module in self._places]
        around = [outer for module, outer in found if outer is not module and RUN.get() is not None]
        handles = [outer.register_forward_pre_hook(hand_over, with_kwargs=True) for outer in around]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def balances_routers(self) -> bool:
        """Whether the base adds a loss for unbalanced routers now."""
        wanted = getattr(self.config, "output_router_logits", False)
        return bool(wanted) and self.base.training and torch.is_grad_enabled()

    def _router_loss(self, found: Any, mask: Tensor | None) -> Tensor:
        """What the base adds to its loss for unbalanced routers: (), its weight already applied."""
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
        # One position and no target: of the base's loss only the routers' part is left.
        given = GivenHidden(last_hidden_state=hidden[:, :1])
        given.router_logits = found.router_logits
        nothing = torch.full((*hidden.shape[:1], 1), -100, device=hidden.device)
        token = HIDDEN.set(given)
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
            HIDDEN.reset(token)

    def _decode(self, x: Tensor, mask: Tensor | None, open_segment: OpenSegment | None) -> Any:
        if open_segment is not None:
            return self._decode_more(x, mask, open_segment)
        return self.decode(x, mask)

    def decode(self, x: Tensor, mask: Tensor | None) -> Any:
        """Embeddings (B, T, E), real where mask (B, T) is True, through the decoder; what it returns."""
        arguments: dict[str, Any] = {"inputs_embeds": x, "use_cache": False}
        if mask is not None:
            # A row without a token would attend to nothing and fill its gradients with NaN. So it may see
            # its first position, and what it computes is thrown away with the row.
            mask = mask.clone()
            mask[:, 0] |= ~mask.any(dim=1)
            arguments["attention_mask"] = mask.to(torch.long)
            if self._takes_positions:
                arguments["position_ids"] = places_of(mask)
        if self.balances_routers:
            arguments["output_router_logits"] = True
        return self.decoder(**arguments)

    def _decode_more(self, x: Tensor, mask: Tensor | None, open_segment: OpenSegment) -> Any:
        """`x` (B, T, E) through the decoder, after what it has seen of the segment."""
        seen = open_segment.enter(x, mask)
        arguments: dict[str, Any] = {"inputs_embeds": x, "use_cache": True}
        if "past_key_values" in signature_of(original_class(self.decoder)).parameters:
            arguments["past_key_values"] = open_segment.keys
        if seen is not None:
            arguments["attention_mask"] = seen.to(torch.long)
        if self._takes_positions:
            arguments["position_ids"] = open_segment.places
        found = self.decoder(**arguments)
        open_segment.leave(x)
        return found

    def reruns(self, cells: Cells) -> str | None:
        """Why tokens cannot be added to a segment that has begun, as half a sentence; None: they can."""
        self.check_open()
        taken = signature_of(original_class(self.decoder)).parameters
        shared = getattr(self.config, "num_kv_shared_layers", 0)
        for index, layer in enumerate(self.layers):
            carried = ("recurrence", index) in cells
            if not carried and obstacle([layer]) != NO_RECURRENCE:
                return f"layer {index} of the base model has a recurrence that no memory carries"
            if carried:
                if self.has_attention(index):
                    return f"layer {index} of the base model has attention beside its recurrence"
            elif not self.has_attention(index) or "past_key_values" not in taken:
                return f"layer {index} of the base model has no keys and values to keep"
            elif shared or self.kind(index) not in PLAIN:
                return f"layer {index} of the base model keeps more than keys and values of its own"
        return None

    def open_segment(self) -> OpenSegment:
        """A segment nothing has been computed of."""
        return OpenSegment(self.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """The base model's own head, with its scaling and soft-capping. (..., D) -> (..., V)."""
        token = HIDDEN.set(GivenHidden(last_hidden_state=hidden))
        try:
            return self.base(inputs_embeds=hidden, use_cache=False).logits
        finally:
            HIDDEN.reset(token)

    def lengthened(
        self,
        layer: int,
        arguments: Mapping[str, Any],
        x: Tensor,
        mask: Tensor | None,
        times: Tensor | None = None,
        padded: bool = True,
    ) -> dict[str, Any]:
        """A stage's arguments for `x` (B, T', D) of another length: positions and mask made anew.

        padded: whether the batch is. Otherwise `mask` is a memory's, about places of its own.
        """
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        positions = places_of(real, times)
        config = self.config
        kind = self.kind(layer)
        if kind is not None:
            make_mask = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        elif getattr(config, "sliding_window", None):
            make_mask = create_sliding_window_causal_mask
        else:
            make_mask = create_causal_mask
        given = dict(arguments)

        def made(x: Tensor, mask: Tensor | None) -> Tensor | None:
            return make_mask(
                config=config, inputs_embeds=x, attention_mask=mask, past_key_values=None
            )

        # transformers looks into a mask, to leave it out where it says nothing, and waits for the device.
        if mask is not None and not padded:
            seen = made(x, None)
            seen = only_real(self._seeing_all_before(x, 0) if seen is None else seen, mask)
        elif mask is not None and is_mapped(mask):
            seen = folded_mask(made, x, mask)
        else:
            seen = made(x, mask)
        given["attention_mask"] = seen if times is None else not_later(seen, times)
        if given.get("position_ids") is not None:
            given["position_ids"] = positions
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = self.rotary(layer, x, positions)
        return given

    def behind(
        self, layer: int, arguments: Mapping[str, Any], x: Tensor, front: Front, where: OpenSegment
    ) -> dict[str, Any]:
        """A stage's arguments for `x` (B, T, D), added tokens whose sequence has `front` in front of it."""
        given = dict(arguments)
        seen = given.get("attention_mask")
        if seen is None and front.real is not None:
            # Without padding no mask was made; what is not real in front needs one.
            seen = self._seeing_all_before(x, where.keys.columns)
        if seen is not None:
            given["attention_mask"] = with_keys_in_front(seen, front, x.shape[1])
        positions = where.places_behind(front)
        if given.get("position_ids") is not None:
            given["position_ids"] = positions
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = self.rotary(layer, x, positions)
        return given

    def _seeing_all_before(self, x: Tensor, before: int) -> Tensor:
        """The mask that lets `x` (B, T, D) see the `before` columns in front of it, and itself causally."""
        batch, count = x.shape[:2]
        if not self.takes_query_masks:
            return x.new_ones(batch, before + count, dtype=torch.bool)
        seen = x.new_ones(count, before + count, dtype=torch.bool)
        return seen.tril(before)[None, None]

    def rotary(self, layer: int, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of `positions` (B, T) as the attention of `layer` takes them."""
        rotary = cast(nn.Module, self.decoder.rotary_emb)
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        return rotary(like, positions, self.kind(layer)) if by_type else rotary(like, positions)

    def unrotated(
        self, layer: int, arguments: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[Tensor, Tensor] | None]:
        """Arguments that leave queries and keys unrotated, and the (cos, sin) withheld, if any."""
        if not self.rotates(layer):
            return arguments, None
        cos, sin = arguments["position_embeddings"]
        still = torch.ones_like(cos), torch.zeros_like(sin)
        return {**arguments, "position_embeddings": still}, (cos, sin)

    def rotates(self, layer: int, joins: bool = False) -> bool:
        """Whether the attention of `layer` rotates queries and keys by position: found by trying it.

        Weights have to be there. ValueError for an attention whose rotation cannot be taken over here, or,
        where a memory `joins` other keys to its softmax, whose softmax is not one over scaled products.
        """
        if layer not in self._rotates:
            device = works_on(self.layers[layer])
            x = torch.linspace(-1, 1, 3 * self.config.hidden_size, device=device).sin()
            # In the dtype the module is given, not the one its weights are stored in.
            x = x.reshape(1, 3, -1).to(self.dtype)
            rotary = partial(self.rotary, layer, x) if self._has_rotary else None
            module = find_attention(self.layers[layer])[0]
            self._rotates[layer] = rotates_by_position(
                layer, module, x, rotary, self.dims(1), joins
            )
        return self._rotates[layer]

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Let transformers initialise what is around the base model, and nothing in it.

        It would give modules injected into a live model (LoRA) new weights.
        """
        unmarked = [m for m in self.base.modules() if not getattr(m, LOADED, False)]
        for module in unmarked:
            vars(module)[LOADED] = True
        try:
            yield
        finally:
            for module in unmarked:
                delattr(module, LOADED)

    def open_heads(self) -> None:
        """Route the softmax core through memories of site "heads"."""
        if self.heads_are_open:
            return
        inner = self.attention
        if inner not in ALL_ATTENTION_FUNCTIONS and inner != "eager":
            inner = "sdpa"
        name = open_attention(inner)
        configs = [m.config for m in self.base.modules() if isinstance(m, PreTrainedModel)]
        self._opened = [*configs, self.config]
        for config in self._opened:
            config._attn_implementation = name

    def open_recurrences(self, layers: Iterable[int]) -> None:
        """Make the recurrences of `layers` go on from the states of memories around them."""
        for index in layers:
            module = find_recurrence(self.layers[index])
            assert module is not None
            for gate, described in gates_of(module):
                if become(gate, GateStage):
                    self._staged.append(gate)
                cast(GateStage, gate)._memlm_gate = described
            if become(module, LimitedStage if least_step(module) else RecurrenceStage):
                self._staged.append(module)
            stage = cast(RecurrenceStage, module)
            stage._memlm_site, stage._memlm_layer = "recurrence", index
        self._places = self._stage_places()

    def recurrence_obstacle(self) -> str | None:
        """Why this base's own recurrent state cannot be carried, and what to use; None: it can."""
        found = obstacle(self.layers)
        return found and f"{found} ({type(self.base).__name__}); use a base such as {SUPPORTED}"

    def try_recurrence(self, layer: int) -> None:
        """ValueError when the recurrence of `layer` in parts is not what it is in one. Needs weights."""
        module, dims = find_recurrence(self.layers[layer]), recurrence_dims(self.layers)
        assert module is not None and dims is not None
        x = torch.linspace(-1, 1, 5 * self.config.hidden_size, device=works_on(module)).sin()
        if not goes_on_exactly(module, x.reshape(1, 5, -1).to(self.dtype), dims):
            raise ValueError(
                f"base: the recurrence of layer {layer} ({type(module).__name__}) does not compute in "
                "parts what it computes in one, so its state cannot be carried; use a memory with a "
                "state of its own, such as 'armt'"
            )

    def close(self) -> None:
        """Give the base model its own classes and attention back; what was set on it since stays."""
        for name, module in self.base.named_modules():
            if module in self._staged and "_memlm_original" not in vars(type(module)):
                raise RuntimeError(
                    f"base: {name or 'the model'} has become a {type(module).__name__} since it was "
                    "wrapped (sharded, say), and its own class cannot be given back; undo that first"
                )
        for module in self._staged:
            restore(module)
        for config in self._opened:
            config._attn_implementation = (config._attn_implementation or "").removeprefix(OPENED)
        self._staged, self._opened = [], []

    def check_open(self) -> None:
        """Refuse to run a base model whose stages were given back (RuntimeError)."""
        if not isinstance(self.decoder, DecoderStage):
            raise RuntimeError(
                f"base={type(self.base).__name__} was unloaded, and memories are no longer around its "
                "stages; wrap it again with MemLMForCausalLM.from_base"
            )
