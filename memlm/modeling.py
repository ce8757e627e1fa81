"""MemLMForCausalLM: a causal language model of transformers with memories, and nothing else in its way."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from memlm.attach import AttachedMemory, MemoryStack, check_attention
from memlm.backbone import Backbone
from memlm.config import FORMAT_VERSION, MemLMConfig
from memlm.memory import MemoryConfig, config_to_dict, resolve_memories
from memlm.rolling import RollingMemory
from memlm.scan import Anchor, first_window, scan
from memlm.schedule import sequential
from memlm.segment import IGNORE, Packing, Segment, cut
from memlm.segment import shift_labels as shift
from memlm.state import MemoryState, write_atomically, write_json

MEMORY_WEIGHTS = "memory.safetensors"
MEMORY_CONFIG = "memlm_config.json"
# The memories' parameters among the model's, as an expression.
MEMORY_NAMES = r"^memory\."
# Arguments trainers and `generate` pass to every model, without meaning for a segmented one.
_WITHOUT_MEANING = {
    "use_cache",
    "past_key_values",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "token_type_ids",
}


@dataclass
class MemLMOutput(ModelOutput):
    """What a call gives.

    loss: () mean cross-entropy, and in training the auxiliary loss. logits (B, N, V) where asked.
    memory_state: behind the last segment. auxiliary_loss: () what the memories ask for in training
    besides (`Memory.auxiliary_loss`), a mean over the call's real segments, rows and each memory's
    layers, as it stands in `loss`; there without labels too; None when they ask for nothing. The router
    loss of a base with experts that is configured for one (`output_router_logits`) is in it as well.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory_state: MemoryState | None = None
    auxiliary_loss: Tensor | None = None


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
        segment_length: tokens of text a segment. memory_dtype: "float32" keeps the memories' parameters in
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
        """Tokens of text a segment."""
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
        logits_to_keep: int | None = 0,
        write: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        bptt_anchor: Anchor = "end",
        **kwargs: Any,
    ) -> MemLMOutput | tuple[Any, ...]:
        """Read input_ids (B, N) after what `memory_state` remembers; the last segment ends with the call.

        attention_mask (B, N): 0 marks padding, anywhere; it neither reads, writes nor moves a position.
        labels (B, N): as transformers has them, shifted here (or `shift_labels`, shifted already).
        bptt_depth: segments a gradient reaches back; None is all of the call. bptt_anchor: where windows
        of that many segments are counted from, back from the "end" of the call (of its longest row), or
        on from its "start". logits_to_keep: 0 for all logits, n for the last n positions, None for none.
        write=False reads only, and returns `memory_state` as it was given. num_items_in_batch: what the
        summed loss is divided by, the number of labels when None; the auxiliary loss, a mean already, is
        then weighed by the share of those items that are in this call, so that the calls of a batch add
        up to one mean. ValueError on shapes or states that do not fit.
        """
        # Not in the signature: transformers' Trainer takes every argument with "label" in its name for
        # one that a batch must have, and would evaluate without a loss.
        shift_labels = kwargs.pop("shift_labels", None)
        unknown = {k for k, v in kwargs.items() if v is not None} - _WITHOUT_MEANING
        if unknown:
            raise TypeError(f"forward() got unexpected arguments {sorted(unknown)}")
        ids, mask, targets = self._check(input_ids, attention_mask, labels, shift_labels)
        state = self._admit(memory_state, ids.shape[0])
        packing = None
        if mask is not None:
            packing = Packing.of(mask)
            ids, mask = packing.pack(ids), packing.pack(mask)
            targets = None if targets is None else packing.pack(targets)
        if targets is not None and shift_labels is None:
            targets = shift(targets)

        keep = _collector(logits_to_keep, ids, packing)
        total, extra = _Sum(), _Sum()
        run_window = self._window(write, keep)
        segments = list(cut(ids, mask, targets, self.config.segment_length))
        depth = len(segments) if bptt_depth is None else bptt_depth
        first = first_window(len(segments), depth, bptt_anchor)
        for (loss, cost), behind in scan(run_window, segments, state, depth, first):
            total.add(loss)
            extra.add(cost)
            state = behind

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
        kept = keep.result()
        out = MemLMOutput(
            loss=loss,
            logits=None if kept is None else keep.place(self.backbone.logits(kept)),
            memory_state=state if write or memory_state is None else memory_state,
            auxiliary_loss=auxiliary,
        )
        return out.to_tuple() if return_dict is False else out

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
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels[has_target], reduction="sum")

    def _check(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        shift_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Refuse what does not fit; ids, the mask as bool (None when nothing is padding), targets."""
        if input_ids is None:
            raise ValueError("input_ids is missing; memories read token ids, not inputs_embeds")
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
        if state.signature and state.signature != self.memory.signature:
            raise ValueError(
                f"memory_state is another model's (its memories: {state.signature}; here: "
                f"{self.memory.signature}); use a state of this model"
            )
        if state.batch_size != batch_size:
            raise ValueError(
                f"memory_state has {state.batch_size} rows, but input_ids has {batch_size}; use "
                "memory_state.select(rows) or init_state(batch_size)"
            )
        template = self.memory.init_state(1).tensors
        ours = {name: value.shape[1:] for name, value in template.items()}
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
        run = self._window(True, _Collector())
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
        if prompt is not None and memory_state is not None:
            memory_state = self._admit(memory_state, prompt.shape[0])
        kwargs["use_cache"] = False
        rolling = RollingMemory(self, memory_state)
        return super().generate(inputs, *args, rolling=rolling, **kwargs)

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


class _Collector:
    """Hidden states of the positions whose logits were asked for, gathered segment by segment."""

    wanted = False

    def add(self, hidden: Tensor) -> None:
        """Take what is wanted of the next segment's hidden states (B, T, D)."""

    def result(self) -> Tensor | None:
        """(B, n, D), or None."""
        return None

    def place(self, logits: Tensor) -> Tensor:
        """Logits in the columns of the batch as it was given."""
        return logits


class _Tail(_Collector):
    """The last `count` of `length` columns; with count = length, all of them."""

    wanted = True

    def __init__(self, count: int, length: int, packing: Packing | None) -> None:
        self.packing = packing
        self.skip = length - count
        self.parts: list[Tensor] = []

    def add(self, hidden: Tensor) -> None:
        if self.skip < hidden.shape[1]:
            self.parts.append(hidden[:, max(self.skip, 0) :])
        self.skip -= hidden.shape[1]

    def result(self) -> Tensor | None:
        return torch.cat(self.parts, dim=1)

    def place(self, logits: Tensor) -> Tensor:
        return logits if self.packing is None else self.packing.unpack(logits)


class _RaggedTail(_Collector):
    """The last columns of a padded batch, whose tokens stand elsewhere in each packed row."""

    wanted = True

    def __init__(self, count: int, packing: Packing) -> None:
        total = packing.order.shape[1]
        where = torch.argsort(packing.order, dim=1)[:, total - count :]
        self.real = packing.mask.gather(1, where).unsqueeze(-1)
        self.where = where
        self.start = 0
        self.kept: Tensor | None = None

    def add(self, hidden: Tensor) -> None:
        at = self.where - self.start
        here = (at >= 0) & (at < hidden.shape[1])
        index = at.clamp(0, hidden.shape[1] - 1).unsqueeze(-1)
        found = hidden.gather(1, index.expand(-1, -1, hidden.shape[2]))
        kept = torch.zeros_like(found) if self.kept is None else self.kept
        self.kept = torch.where(here.unsqueeze(-1), found, kept)
        self.start += hidden.shape[1]

    def result(self) -> Tensor | None:
        return self.kept

    def place(self, logits: Tensor) -> Tensor:
        return logits * self.real.to(logits.dtype)


def _collector(logits_to_keep: int | None, ids: Tensor, packing: Packing | None) -> _Collector:
    if logits_to_keep is None:
        return _Collector()
    if isinstance(logits_to_keep, Tensor) or logits_to_keep < 0:
        raise ValueError(
            f"logits_to_keep={logits_to_keep} must be a count of positions: 0 for all, n for the last n, "
            "None for none"
        )
    total = ids.shape[1] if packing is None else packing.order.shape[1]
    if logits_to_keep == 0 or logits_to_keep >= total:
        return _Tail(ids.shape[1], ids.shape[1], packing)
    if packing is None:
        return _Tail(logits_to_keep, total, None)
    return _RaggedTail(logits_to_keep, packing)


AutoModelForCausalLM.register(MemLMConfig, MemLMForCausalLM, exist_ok=True)
