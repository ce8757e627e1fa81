"""MemLMForCausalLM: a causal language model of transformers with memories, and nothing else in its way."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from memlm.attach import AttachedMemory, MemoryStack, check_attention
from memlm.backbone import Backbone
from memlm.config import FORMAT_VERSION, MemLMConfig
from memlm.files import write_atomically, write_json
from memlm.memory import MemoryConfig, config_to_dict, resolve_memories
from memlm.rolling import RollingMemory
from memlm.scan import Anchor, first_window, scan
from memlm.schedule import sequential
from memlm.segment import BORDERS, IGNORE, Packing, Segment, cut, documents_in
from memlm.segment import shift_labels as shift
from memlm.state import MemoryState

MEMORY_WEIGHTS = "memory.safetensors"
MEMORY_CONFIG = "memlm_config.json"
# The memories' parameters among the model's, as an expression.
MEMORY_NAMES = r"^memory\."
# What every model of transformers takes and this one cannot give, and what to use instead.
_REFUSED = {
    "inputs_embeds": "memories read token ids; give input_ids",
    "past_key_values": "nothing is cached; hand on memory_state, which remembers what was read",
    "use_cache": "nothing is cached; hand on memory_state, which remembers what was read",
    "output_attentions": "attention is run segment by segment and not kept; call model.base for the base's",
    "output_hidden_states": "hidden states are run segment by segment and not kept; call model.base for "
    "the base's, or model.base_model for the last layer's with memories",
    "token_type_ids": "documents are read as text of one type; leave it out",
}
# What `forward` takes and generation settles by itself, or has no use for.
_NOT_IN_GENERATION = (
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "bptt_depth",
    "bptt_anchor",
    "write",
    "logits_to_keep",
    "return_dict",
)


@dataclass
class MemLMOutput(ModelOutput):
    """What a call gives.

    loss: () mean cross-entropy, and in training the auxiliary loss. logits (B, N, V) where asked; a
    `LogitsNotMade` where labels alone were. memory_state: behind the last segment, a row per document.
    auxiliary_loss: () what the memories ask for in training besides (`Memory.auxiliary_loss`), a mean over
    the call's real segments, rows and each memory's layers, as it stands in `loss`; there without labels
    too; None when they ask for nothing. The router loss of a base with experts that is configured for one
    (`output_router_logits`) is in it as well.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory_state: MemoryState | None = None
    auxiliary_loss: Tensor | None = None


_NOT_MADE = (
    "logits were not made, since labels were given for more than one segment; set "
    "model.config.logits_with_labels=True, or call the model with logits_to_keep=0, for all of them"
)


class _Telling(type):
    """Trainers that gather predictions refuse what is no tensor by naming its class, and so the remedy."""

    def __repr__(cls) -> str:
        return f"{cls.__name__}: {_NOT_MADE}"


class LogitsNotMade(metaclass=_Telling):
    """What stands for logits that nobody asked for: whoever uses them is told how to ask."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(_NOT_MADE)

    __getitem__ = __iter__ = __len__ = __array__ = _refuse

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NOT_MADE)


def _as_they_are(hidden: Tensor) -> Tensor:
    return hidden


class _Body:
    """The model without its head, as transformers means `base_model`: last hidden states, by memories."""

    def __init__(self, model: MemLMForCausalLM) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        # The class's own forward: whoever calls the body may have put another in its place.
        kwargs |= {"logits_to_keep": 0, "head": _as_they_are}
        out = cast(MemLMOutput, MemLMForCausalLM.forward(self._model, *args, **kwargs))
        if out.auxiliary_loss is not None:
            raise ValueError(
                "this trainer takes hidden states and computes a loss of its own, without what the "
                "memories ask for besides (write_cost, reconstruction_weight) or the base's routers do "
                "(router_aux_loss_coef); set that to 0, or use memlm.train.MemLMTrainer"
            )
        return BaseModelOutput(last_hidden_state=out.logits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.base, name)


class MemLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model that reads a document segment by segment and remembers.

    `base` is the wrapped model, its parameter names unchanged; `memory` holds the memories' parameters.
    """

    config: MemLMConfig
    config_class = MemLMConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    # accelerate makes an FSDP unit of each, and keeps it whole on one device.
    _no_split_modules = ("AttachedMemory",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def __init__(self, config: MemLMConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        given = base is not None
        unmarked: list[nn.Module] = []
        if base is None:
            base = AutoModelForCausalLM.from_config(
                config.text_config,
                attn_implementation=config._attn_implementation,
                dtype=config.dtype or torch.get_default_dtype(),
            )
        else:
            # `post_init` would give modules injected into a live model (LoRA) new weights.
            unmarked = [m for m in base.modules() if not getattr(m, "_is_hf_initialized", False)]
            for module in unmarked:
                vars(module)["_is_hf_initialized"] = True
        self.base = base
        self.backbone = Backbone(base)
        configs = resolve_memories(config.memory)
        self.memory = MemoryStack(configs, self.backbone, config.segment_length)
        self.memory.set_dtype(self.backbone.dtype, config.memory_dtype == "float32")
        if config.memory_dtype == "float32":
            # What loads a checkpoint keeps to it, and quantisers leave the memories out.
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = [MEMORY_NAMES]
        config.memory = list(self.memory.configs)
        heads = [layer for site, layer in self.memory.cells() if site == "heads"]
        self._open_heads()
        if given and self.backbone.device.type != "meta":
            # A model still without weights was tried out when it was made.
            for layer in heads:
                self.backbone.rotates(layer)
        self.gradient_checkpointing = False
        self.post_init()
        for module in unmarked:
            del module._is_hf_initialized
        if given:
            self.memory.settle(self.backbone)
            self.generation_config = copy.deepcopy(base.generation_config)
        elif self.generation_config is not None and base.generation_config is not None:
            self.generation_config = copy.deepcopy(base.generation_config)

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this child first, and guards what was loaded from a checkpoint.
        if isinstance(module, AttachedMemory):
            module.reset_parameters(self.backbone.embedding_std())

    @classmethod
    def is_custom_code(cls) -> bool:
        # Custom code may fill parameters behind transformers' guards, so transformers passes over its
        # modules without parameters of their own. `_init_weights` here goes through the guards.
        return False

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str],
        memory: str | MemoryConfig | dict[str, Any] | list[Any] | None = "armt",
        segment_length: int = 512,
        memory_dtype: str = "float32",
        **kwargs: Any,
    ) -> MemLMForCausalLM:
        """Give a base model a memory.

        base: a live model (wrapped, not copied), a configuration (random weights), or a hub id or path,
        loaded with `kwargs`. memory: a name (`memlm.memory.available_memories()`), a config, or a list.
        segment_length: text tokens per segment. memory_dtype: "float32" keeps the memories' parameters in
        it on a base in half precision, "base" in the base's own dtype. ValueError when they do not fit each
        other.
        """
        if isinstance(base, (str, os.PathLike)):
            base = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        elif isinstance(base, PreTrainedConfig):
            base = AutoModelForCausalLM.from_config(base, **kwargs)
        elif kwargs:
            raise TypeError(
                f"from_base() got {sorted(kwargs)}, which only load a base by name; "
                "leave them out for a live model"
            )
        if isinstance(base, MemLMForCausalLM):
            raise ValueError("base already has memories; wrap its `.base` instead")
        if not isinstance(base, PreTrainedModel):
            raise TypeError(
                f"base={type(base).__name__} is no transformers model; give a PreTrainedModel, a "
                "PretrainedConfig, or a hub id or path"
            )
        config = MemLMConfig(
            # A copy: building a composite config re-sets attention implementations inside it, and a
            # live base whose implementation became None would lose its causal mask.
            text_config=copy.deepcopy(base.config),
            memory=[config_to_dict(entry) for entry in resolve_memories(memory)],
            segment_length=segment_length,
            memory_dtype=memory_dtype,
            attn_implementation=base.config._attn_implementation,
            dtype=base.dtype,
        )
        was_training = base.training
        model = cls(config, base=base)
        return model.train(was_training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; under a `device_map` each memory goes to the device of its layer.

        RuntimeError when the map leaves a memory on the disk.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model, "hf_device_map", None):
            model.memory.check_present(model.backbone.device)
            model.memory.settle(model.backbone)
        return loaded

    # What a wrapper owes the library: the parts of the base model it asks for.

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    @property
    def base_model(self) -> Any:
        """The model without its head: called like the model, it returns `last_hidden_state` (B, N, D).

        Trainers that compute losses of their own (trl) call it. Its attributes are those of `base`.
        """
        return _Body(self)

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.text_config = copy.deepcopy(self.base.config)
        self.config.vocab_size = self.backbone.config.vocab_size
        return embeddings

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # Whole segments are recomputed, not layers: activations of one segment at a time.
        self.gradient_checkpointing = enable

    def set_attn_implementation(
        self, attn_implementation: str | dict, *args: Any, **kwargs: Any
    ) -> None:
        """As transformers does. ValueError for one that a memory of this model cannot work with."""
        asked, before = attn_implementation, self.backbone.attention
        if isinstance(asked, dict):
            asked = asked.get("text_config", asked.get("", before))
        self.base.set_attn_implementation(asked, *args, **kwargs)
        try:
            self._open_heads()
        except ValueError:
            self.base.set_attn_implementation(before)
            self._open_heads()
            raise
        self.config._attn_implementation = self.backbone.attention

    def _open_heads(self) -> None:
        """Route the attention through the memories inside it, also where it was set anew since."""
        inside = any(site in ("heads", "attention") for site, _ in self.memory.cells())
        if not inside or self.backbone.heads_are_open:
            return
        dims = self.backbone.dims(self.config.segment_length)
        check_attention(resolve_memories(self.config.memory), self.backbone, dims)
        self.backbone.open_heads()

    @property
    def segment_length(self) -> int:
        """Tokens of text per segment."""
        return self.config.segment_length

    def init_state(self, batch_size: int) -> MemoryState:
        """The state before the first segment of `batch_size` documents."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1 row")
        return self.memory.init_state(batch_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory_state: MemoryState | None = None,
        bptt_depth: int | None = None,
        logits_to_keep: int | Tensor | str | None = "auto",
        write: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        bptt_anchor: Anchor = "end",
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Tensor | int | None = None,
        max_length_k: Tensor | int | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> MemLMOutput | tuple[Any, ...]:
        """Read input_ids (B, N) after what `memory_state` remembers; the last segment ends with the call.

        attention_mask (B, N): 0 marks padding, anywhere; it neither reads, writes nor moves a position.
        labels (B, N): as transformers has them, shifted here (or `shift_labels`, shifted already).
        bptt_depth: segments a gradient reaches back; None is all of the call. bptt_anchor: where windows
        of that many segments are counted from, back from the "end" of the call (of its longest row), or
        on from its "start". write=False reads only, and returns `memory_state` as it was given.
        num_items_in_batch: what the summed loss is divided by, the number of labels when None; the
        auxiliary loss, a mean already, is then weighed by the share of those items that are in this call,
        so that the calls of a batch add up to one mean.

        logits_to_keep: 0 for all logits, n for the last n positions, a tensor (n,) for these positions,
        None for none. "auto" is 0, but None where labels are given for more than one segment: a loss needs
        no logits that stay, and those of a long document fill any memory. `config.logits_with_labels` makes
        it 0 there too. head: what makes logits of last hidden states (., D); None is the model's own.

        Several documents in a row, as flattening collators pack them: position_ids that restart, seq_idx
        or cu_seq_lens_q say where each begins (`documents_in`). Each is read as if alone in a row of its
        own, from an empty memory, and has a row of the returned state, in the order of reading; the cost is
        that of a batch padded to the longest. Within a document the model numbers positions itself.

        ValueError on shapes or states that do not fit, and on what transformers' models give but this one
        cannot, such as `past_key_values` and `output_hidden_states`.
        """
        # Not in the signature: transformers' Trainer takes every argument with "label" in its name for
        # one that a batch must have, and would evaluate without a loss.
        shift_labels = kwargs.pop("shift_labels", None)
        _refuse(kwargs)
        if unknown := {k for k, v in kwargs.items() if v is not None} - set(_REFUSED):
            raise TypeError(f"forward() got unexpected arguments {sorted(unknown)}")
        ids, mask, targets = self._check(input_ids, attention_mask, labels, shift_labels)
        documents = documents_in(
            ids,
            mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        if documents is not None and memory_state is not None:
            raise ValueError(
                "memory_state goes on with one document per row, but position_ids, seq_idx or "
                "cu_seq_lens_q put several into a row; give one or the other"
            )
        packing = None
        if mask is not None or documents is not None:
            packing = Packing.of(torch.ones_like(ids) if mask is None else mask, documents)
        keep = self._collector(logits_to_keep, ids, packing, targets is not None)
        if packing is not None:
            ids, mask = packing.pack(ids, 0), packing.mask
            targets = None if targets is None else packing.pack(targets, IGNORE)
        state = self._admit(memory_state, ids.shape[0])
        if targets is not None and shift_labels is None:
            targets = shift(targets)
        # The head runs once per position: what is kept gives its share of the loss from its logits.
        aimed, rest = (None, None) if targets is None else keep.split(targets)

        total, extra = _Sum(), _Sum()
        run_window = self._window(write, keep)
        segments = list(cut(ids, mask, rest, self.config.segment_length))
        depth = len(segments) if bptt_depth is None else bptt_depth
        first = first_window(len(segments), depth, bptt_anchor)
        for (loss, cost), behind in scan(run_window, segments, state, depth, first):
            total.add(loss)
            extra.add(cost)
            state = behind
        kept = keep.result()
        logits = None if kept is None else (head or self.backbone.logits)(kept)
        if aimed is not None and logits is not None:
            total.add(_summed_cross_entropy(logits, aimed))

        loss, auxiliary = None, extra.value
        if auxiliary is not None:
            auxiliary = auxiliary / sum(segment.rows for segment in segments)
        if targets is not None and total.value is not None:
            own = (targets != IGNORE).sum()
            count = own if num_items_in_batch is None else num_items_in_batch
            count = torch.as_tensor(count, device=total.value.device).clamp(min=1)
            loss = total.value / count
            if self.training:
                if auxiliary is not None:
                    if num_items_in_batch is not None:
                        auxiliary = auxiliary * (own / count)
                    loss = loss + auxiliary
                # Every window gives every memory parameter a gradient, which data-parallel training
                # counts on; a later window alone would not touch the initial memory.
                loss = self.memory.touch(loss)
        out = MemLMOutput(
            loss=loss,
            logits=keep.place(logits),
            memory_state=state if write or memory_state is None else memory_state,
            auxiliary_loss=auxiliary,
        )
        return out.to_tuple() if return_dict is False else out

    def _collector(
        self,
        logits_to_keep: int | Tensor | str | None,
        ids: Tensor,
        packing: Packing | None,
        with_labels: bool,
    ) -> _Collector:
        """What gathers the logits that are asked for, of ids (B, N) as they were given."""
        total = ids.shape[1]
        if isinstance(logits_to_keep, str) and logits_to_keep == "auto":
            many = with_labels and total > self.config.segment_length
            if many and not self.config.logits_with_labels:
                return _Nothing(LogitsNotMade())
            logits_to_keep = 0
        if logits_to_keep is None:
            return _Nothing(None)
        if isinstance(logits_to_keep, Tensor):
            columns = _columns(logits_to_keep, total).to(ids.device)
        elif isinstance(logits_to_keep, str) or logits_to_keep < 0:
            raise ValueError(
                f"logits_to_keep={logits_to_keep!r} must be a count of positions: 0 for all, n for the "
                "last n, None for none; a tensor of positions; or 'auto'"
            )
        elif packing is None and (logits_to_keep == 0 or logits_to_keep >= total):
            return _Everything()
        else:
            columns = torch.arange(total, device=ids.device)[-logits_to_keep:]
        return _Columns(columns, len(ids), total, packing)

    def _window(
        self, write: bool, keep: _Collector
    ) -> Callable[[list[Segment], MemoryState], tuple[_Losses, MemoryState]]:
        self.backbone.check_open()
        # The base model's own `set_attn_implementation` does not know of memories.
        self._open_heads()
        self.memory.check_present(self.backbone.device)
        cells, tokens = self.memory.cells(), self.memory.tokens

        def step(segment: Segment, state: MemoryState) -> tuple[Any, MemoryState]:
            before = self.memory.unpack(state)
            hidden, after, router_loss = self.backbone.run_segment(
                segment.ids, segment.mask, cells, tokens, before, write
            )
            new, cost = state, None
            if write:
                new = self.memory.pack({**before, **after}, state.batch_size)
                if segment.active is not None:
                    new = new.where(segment.active, state)
                if self.training and torch.is_grad_enabled():
                    cost = self.memory.auxiliary_loss(before, after, segment.active)
            if router_loss is not None:
                # The rows of a segment pass the routers together; `forward` divides by all rows.
                cost = router_loss * segment.rows + (0.0 if cost is None else cost)
            loss = None if segment.labels is None else self._loss(hidden, segment.labels)
            return (loss, cost, hidden if keep.wanted else None), new

        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        read = 0

        def window(segments: list[Segment], state: MemoryState) -> tuple[_Losses, MemoryState]:
            nonlocal read
            total, extra, sizes = _Sum(), _Sum(), []
            found = sequential(step, segments, state, recompute=recompute)
            for (loss, cost, hidden), after in found:
                total.add(loss)
                extra.add(cost)
                if hidden is not None:
                    keep.add(hidden)
                if write:
                    sizes.append(after.largest())
                state = after
            self.memory.check_finite(sizes, state, first_segment=read)
            read += len(segments)
            return (total.value, extra.value), state

        return window

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy (nats) over the targets of one segment, in float32 or wider."""
        has_target = labels != IGNORE
        if not bool(has_target.any()):
            return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        logits = self.backbone.logits(hidden[has_target].unsqueeze(0)).squeeze(0)
        return _summed_cross_entropy(logits, labels[has_target])

    def _check(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        shift_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Refuse what does not fit; ids, the mask as bool (None when nothing is padding), targets."""
        if input_ids is None:
            raise ValueError("input_ids is missing; memories read token ids")
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; give (batch, tokens) with at least one "
                "row and one token"
            )
        if input_ids.is_floating_point():
            raise ValueError(f"input_ids has dtype {input_ids.dtype}; give integer token ids")
        if labels is not None and shift_labels is not None:
            raise ValueError("labels and shift_labels are both given; give one of them")
        targets = labels if shift_labels is None else shift_labels
        if targets is not None:
            if targets.is_floating_point() or targets.dtype == torch.bool:
                raise ValueError(f"labels has dtype {targets.dtype}; give integer token ids")
            targets = targets.long()
        for name, value in (("attention_mask", attention_mask), ("labels", targets)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, but input_ids has shape "
                    f"{tuple(input_ids.shape)}; give both the same shape"
                )
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask.to(torch.bool)
            if not bool(mask.any()):
                raise ValueError("attention_mask is 0 everywhere; give at least one real token")
            if targets is not None:
                targets = targets.masked_fill(~mask, IGNORE)
        return input_ids, mask, targets

    def _admit(self, state: MemoryState | None, batch_size: int) -> MemoryState:
        """The state to start from. ValueError when `state` is another model's or another batch's."""
        if state is None:
            return self.init_state(batch_size)
        if not isinstance(state, MemoryState):
            raise TypeError(
                f"memory_state is a {type(state).__name__}; give what the model returned as "
                "memory_state, or init_state(batch_size)"
            )
        if state.signature and not self.memory.signed(state.signature):
            raise ValueError(
                f"memory_state is another model's (its memories: {state.signature}; here: "
                f"{self.memory.signature}); use a state of this model"
            )
        if state.batch_size != batch_size:
            raise ValueError(
                f"memory_state has {state.batch_size} rows, but input_ids has {batch_size}; use "
                "memory_state.select(rows) or init_state(batch_size)"
            )
        ours = self.memory.shapes
        theirs = {name: value.shape[1:] for name, value in state.tensors.items()}
        if ours != theirs:
            odd = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise ValueError(
                f"memory_state does not fit this model: {odd[0]!r} has shape "
                f"{theirs.get(odd[0], 'missing')}, here {ours.get(odd[0], 'missing')}; "
                "use a state of this model"
            )
        return self.memory.at_home(state)

    @torch.no_grad()
    def read(
        self, segments: Iterable[Segment], memory_state: MemoryState | None = None
    ) -> MemoryState:
        """Remember `segments`, taken one by one, and return the state behind the last.

        No gradient, no logits: for documents too long to be held. Rows end by their masks.
        """
        pieces = iter(segments)
        first = next(pieces, None)
        if first is None:
            if memory_state is None:
                raise ValueError("segments is empty and memory_state is None; give one of them")
            return memory_state
        state = self._admit(memory_state, first.ids.shape[0])
        run = self._window(True, _Nothing(None))
        for _, behind in scan(run, chain([first], pieces), state, bptt_depth=1):
            state = behind
        return state

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory_state: MemoryState | None = None,
        rolling: RollingMemory | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Commit the segments that are full, and hand over the open one, padded on the left."""
        _refuse({**kwargs, "use_cache": None})
        if rolling is None:
            rolling = RollingMemory(self, memory_state)
        ids, mask, state = rolling.advance(input_ids, attention_mask)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "memory_state": state,
            "logits_to_keep": 1,
            "write": False,
        }

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        memory_state: MemoryState | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts of any length, after what `memory_state` remembers.

        Takes what transformers' `generate` takes, and returns the same. The open segment is run again
        at every token from the last committed state, and is committed when the next token needs a
        segment of its own; so the tokens are those of reading the whole prefix anew at every step.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        self._check_generation(prompt, kwargs)
        if prompt is not None and memory_state is not None:
            memory_state = self._admit(memory_state, prompt.shape[0])
        kwargs["use_cache"] = False
        prompts = None if prompt is None else (len(prompt), prompt.shape[1])
        rolling = RollingMemory(self, memory_state, prompts)
        return super().generate(inputs, *args, rolling=rolling, **kwargs)

    def _check_generation(self, prompt: Tensor | None, arguments: Mapping[str, Any]) -> None:
        """Refuse what generation would pass over."""
        _refuse({**arguments, "use_cache": None})
        if idle := [name for name in _NOT_IN_GENERATION if arguments.get(name) is not None]:
            raise ValueError(
                f"generate() has no use for {', '.join(idle)}; leave it out, or call the model"
            )
        if prompt is None or prompt.ndim != 2:
            return
        mask = arguments.get("attention_mask")
        if mask is not None and mask.shape != prompt.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but input_ids has shape "
                f"{tuple(prompt.shape)}; give both the same shape, without what memory_state remembers"
            )
        real = None if mask is None else mask.to(torch.bool)
        if (
            documents_in(prompt, real, **{name: arguments.get(name) for name in BORDERS})
            is not None
        ):
            raise ValueError(
                "generate() continues one document per row, but position_ids, seq_idx or cu_seq_lens_q put "
                "several into a row; give each a row of its own"
            )

    def freeze_base(self) -> None:
        """Train the memories alone: no gradient for the base model's parameters."""
        self.base.requires_grad_(False)

    def unload(self) -> PreTrainedModel:
        """Hand the base model back as it was before it was wrapped, with its weights as they are now.

        This model cannot be run afterwards; save its memories before (`save_memory`). RuntimeError when
        a module of the base has changed its class since, as sharding does.
        """
        self.backbone.close()
        return self.base

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers does; the base model's configuration is saved as it is now.

        ValueError for a quantised base, whose weights would be read again as if they were numbers.
        """
        stored = next(
            (n for n, p in self.base.named_parameters() if not p.is_floating_point()), None
        )
        if stored is not None or getattr(self.base, "is_quantized", False):
            raise ValueError(
                f"base={type(self.base).__name__} is quantised (its weights are integers and scales), and "
                "would not be read again as it was; use save_memory(directory) for the memories, and "
                "load_memory(directory) on the base loaded as it was"
            )
        self.config.text_config = copy.deepcopy(self.base.config)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def save_memory(self, directory: str | os.PathLike[str]) -> None:
        """Write the memories' parameters alone, like an adapter: two files."""
        from safetensors.torch import save_file

        tensors = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in self.memory.state_dict().items()
        }
        directory = Path(directory)
        write_atomically(directory / MEMORY_WEIGHTS, lambda path: save_file(tensors, path))
        write_json(directory / MEMORY_CONFIG, self._memory_description())

    def load_memory(self, directory: str | os.PathLike[str]) -> None:
        """Read what `save_memory` wrote. ValueError when it belongs to other memories or sizes."""
        import json

        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        for name in (MEMORY_CONFIG, MEMORY_WEIGHTS):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"directory={str(directory)!r} has no {name}; give a folder save_memory wrote"
                )
        try:
            described = json.loads((directory / MEMORY_CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(directory / MEMORY_WEIGHTS)
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(
                f"directory={str(directory)!r} is damaged ({error}); save the memory again"
            ) from error
        if described.get("memlm_version", 0) > FORMAT_VERSION:
            raise ValueError(
                f"directory={str(directory)!r} has memlm format {described['memlm_version']}, this "
                f"memlm reads up to {FORMAT_VERSION}; upgrade memlm"
            )
        ours = self._memory_description()
        with contextlib.suppress(TypeError, ValueError):
            # A field that an older file does not name has the value it had then.
            entries = resolve_memories(described.get("memory"))
            described["memory"] = [config_to_dict(entry) for entry in entries]
        for key in ("memory", "hidden_size", "num_hidden_layers"):
            if described.get(key) != ours[key]:
                raise ValueError(
                    f"directory={str(directory)!r} was saved with {key}={described.get(key)}, but this "
                    f"model has {ours[key]}; build the model with the same memory"
                )
        # Before anything is copied: a memory half of which is another's would go unnoticed.
        known = {n: tuple(t.shape) for n, t in self.memory.state_dict().items()}
        found = {n: tuple(t.shape) for n, t in tensors.items() if t.is_floating_point()}
        if found != known:
            odd = sorted(n for n in {*known, *tensors} if known.get(n) != found.get(n))
            raise ValueError(
                f"directory={str(directory)!r} does not fit: {odd[0]!r} there is "
                f"{found.get(odd[0], 'missing or no numbers')}, here {known.get(odd[0], 'unknown')}; "
                "build the model with the same memory"
            )
        self.memory.load_state_dict(tensors)

    def _memory_description(self) -> dict[str, Any]:
        return {
            "memlm_version": FORMAT_VERSION,
            "memory": list(self.memory.configs),
            "segment_length": self.config.segment_length,
            "hidden_size": self.backbone.config.hidden_size,
            "num_hidden_layers": len(self.backbone.layers),
            "base": self.base.config._name_or_path,
        }


# Cross-entropy summed over targets, and what the memories' changes of state cost.
_Losses = tuple[Tensor | None, Tensor | None]


class _Sum:
    """A sum that is None while nothing was added."""

    value: Tensor | None = None

    def add(self, term: Tensor | None) -> None:
        if term is not None:
            self.value = term if self.value is None else self.value + term


class _Collector(Protocol):
    """Takes the hidden states whose logits are asked for, segment by segment."""

    # Whether `add` is to be given anything.
    wanted: bool

    def add(self, hidden: Tensor) -> None:
        """Take what is wanted of the next segment's hidden states (D, T, D)."""

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Shifted targets (D, L): those of what is kept, as `result` orders it, and (D, L) the others."""

    def result(self) -> Tensor | None:
        """(., D) hidden states for the head."""

    def place(self, logits: Tensor | None) -> Any:
        """Logits (., V) of the result, in the columns of the batch as it was given."""


class _Nothing:
    """No logits; in their place stands `instead`."""

    wanted = False

    def __init__(self, instead: LogitsNotMade | None) -> None:
        self.instead = instead

    def add(self, hidden: Tensor) -> None:
        pass

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None, targets

    def result(self) -> Tensor | None:
        return None

    def place(self, logits: Tensor | None) -> Any:
        return self.instead


class _Everything:
    """All positions of a batch without padding."""

    wanted = True

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, hidden: Tensor) -> None:
        self.parts.append(hidden)

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return targets, None

    def result(self) -> Tensor | None:
        return torch.cat(self.parts, dim=1)

    def place(self, logits: Tensor | None) -> Any:
        return logits


class _Columns:
    """Some columns of a batch (B, N), whose tokens may stand elsewhere in the packed rows."""

    wanted = True

    def __init__(self, columns: Tensor, batch: int, total: int, packing: Packing | None) -> None:
        if packing is None:
            length = total
            places = torch.arange(batch * total, device=columns.device).view(batch, total)
        else:
            places, length = packing.places(), packing.length
        # A column asked for twice is computed once.
        columns, self.back = columns.unique(return_inverse=True)
        self.shape = batch, len(columns)
        places = places[:, columns].flatten()
        real = (places >= 0).nonzero().squeeze(1)
        # In the order in which segments come by.
        order = (places[real] % length).argsort(stable=True)
        self.slots = real[order]
        self.rows, self.at = places[self.slots] // length, places[self.slots] % length
        self.places = self.at.cpu()
        self.start = self.done = 0
        self.parts: list[Tensor] = []

    def add(self, hidden: Tensor) -> None:
        end = self.start + hidden.shape[1]
        upto = int(torch.searchsorted(self.places, end))
        here = slice(self.done, upto)
        if upto > self.done or not self.parts:
            self.parts.append(hidden[self.rows[here], self.at[here] - self.start])
        self.start, self.done = end, upto

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rest = targets.clone()
        rest[self.rows, self.at] = IGNORE
        return targets[self.rows, self.at], rest

    def result(self) -> Tensor | None:
        return torch.cat(self.parts).unsqueeze(0)

    def place(self, logits: Tensor | None) -> Any:
        assert logits is not None
        logits = logits.squeeze(0)
        found = logits.new_zeros(self.shape[0] * self.shape[1], logits.shape[-1])
        found[self.slots] = logits
        return found.view(*self.shape, -1)[:, self.back]


def _columns(asked: Tensor, total: int) -> Tensor:
    """Columns 0 to total - 1 from a tensor of positions, or of one bool for each column."""
    columns = asked.nonzero().squeeze(-1) if asked.dtype == torch.bool else asked.long()
    fits = asked.ndim == 1 and not asked.is_floating_point() and len(columns) > 0
    fits = fits and (asked.dtype != torch.bool or len(asked) == total)
    if not fits or not -total <= int(columns.min()) <= int(columns.max()) < total:
        raise ValueError(
            f"logits_to_keep has shape {tuple(asked.shape)} and dtype {asked.dtype}; a tensor must hold "
            f"positions (n,) within the {total} of input_ids"
        )
    return columns % total


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats, summed over targets (...) that are none to ignore; logits (..., V). In float32 or wider."""
    logits = logits.flatten(0, -2)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def _refuse(arguments: Mapping[str, Any]) -> None:
    """ValueError for an argument that asks for what this model does not give; falsy values ask nothing."""
    for name, remedy in _REFUSED.items():
        value = arguments.get(name)
        asks = bool(value.any()) if isinstance(value, Tensor) else value not in (None, False)
        if asks:
            given = name if isinstance(value, (Tensor, Cache)) else f"{name}={value}"
            raise ValueError(f"{given} is not for a model with memories: {remedy}")


AutoModelForCausalLM.register(MemLMConfig, MemLMForCausalLM, exist_ok=True)
