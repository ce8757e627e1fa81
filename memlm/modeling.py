"""MemLMForCausalLM: a causal language model of transformers with memories, otherwise as it was."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memlm.arguments import REFUSED, packed, refuse
from memlm.attach import AttachedMemory, MemoryStack, check_attention
from memlm.backbone import Backbone, new_base
from memlm.body import Body
from memlm.config import MemLMConfig
from memlm.generation import MemoryGenerationMixin, without_cache
from memlm.loading import load_weights
from memlm.logits import (
    Collector,
    Nothing,
    Sum,
    collector,
    cross_entropy_in_pieces,
    summed_cross_entropy,
)
from memlm.memory import MemoryConfig, config_to_dict, resolve_memories
from memlm.output import LogitsNotMade, MemLMOutput
from memlm.rolling import RollingMemory
from memlm.saving import SavingMixin, finish_save
from memlm.scan import Anchor, first_window, scan
from memlm.scheduling import How, Read, Scheduler
from memlm.segment import IGNORE, Alignment, Segment, cut, masked_auxiliary
from memlm.state import MemoryState
from memlm.watch import Watch
from memlm.windowed import windows
from memlm.writes import WriteCount

__all__ = ["LogitsNotMade", "MemLMForCausalLM", "MemLMOutput"]

# A regular expression for the names of the memories' parameters.
MEMORY_NAMES = r"^memory\."
# Cross-entropy summed over targets, and what the memories' changes of state cost.
Losses = tuple[Tensor | None, Tensor | None]


class MemLMForCausalLM(SavingMixin, PreTrainedModel, MemoryGenerationMixin):
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
        if base is None:
            dtype = config.dtype or torch.get_default_dtype()
            base = new_base(config.text_config, config._attn_implementation, dtype)
        self.base = base
        # peft asks the outermost model which weights are one.
        tied = base._tied_weights_keys
        if isinstance(tied, dict):
            self._tied_weights_keys = {f"base.{k}": f"base.{v}" for k, v in tied.items()}
        self.backbone = Backbone(base)
        configs = resolve_memories(config.memory)
        self.memory = MemoryStack(configs, self.backbone, config.segment_length)
        self.memory.set_dtype(self.backbone.dtype, config.memory_dtype == "float32")
        if config.memory_dtype == "float32":
            # transformers obeys this when it loads a checkpoint, and quantisers leave the memories out.
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = [MEMORY_NAMES]
        config.memory = list(self.memory.configs)
        cells = self.memory.cells()
        heads = {layer: found for (site, layer), found in cells.items() if site == "heads"}
        recurrent = [layer for site, layer in cells if site == "recurrence"]
        self._open_heads()
        self.backbone.open_recurrences(recurrent)
        if given and self.backbone.device.type != "meta":
            # A model whose weights are still to be loaded was tried out when it was first made.
            for layer, found in heads.items():
                self.backbone.rotates(layer, any(cell.memory.joins_softmax for cell in found))
            for layer in recurrent[:1]:
                self.backbone.try_recurrence(layer)
        self._set_gradient_checkpointing(False)
        self.scheduler = Scheduler(self)
        with self.backbone.weights_kept() if given else nullcontext():
            self.post_init()
        if given:
            self.memory.settle(self.backbone)
            self.generation_config = without_cache(base.generation_config)
        elif self.generation_config is not None and base.generation_config is not None:
            self.generation_config = without_cache(base.generation_config)
        if given:
            self.scheduler.check()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this child first, and guards what was loaded from a checkpoint.
        if isinstance(module, AttachedMemory):
            module.reset_parameters(self.backbone.embedding_std())

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers skips modules of custom code that have no parameters themselves, since such code may
        # fill parameters without its guards. `_init_weights` here goes through the guards.
        return False

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str],
        memory: str | MemoryConfig | dict[str, Any] | list[Any] | None = "armt",
        segment_length: int = 512,
        memory_dtype: str = "float32",
        schedule: str = "auto",
        **kwargs: Any,
    ) -> MemLMForCausalLM:
        """Give a base model a memory.

        base: a live model (wrapped, not copied), a configuration (random weights), or a hub id or path,
        loaded with `kwargs`, from safetensors unless these say use_safetensors=False. memory: a name
        (`memlm.memory.available_memories()`), a config, or a list. segment_length: text tokens per
        segment. memory_dtype: "float32" keeps the memories' parameters in it on a base in half precision,
        "base" in the base's own dtype. schedule: "wavefront" runs neighbouring layers of neighbouring
        segments together, with the same results, and refuses a model with which it cannot; "sequential"
        does not; "auto" measures, and does where it is faster.
        ValueError when they do not fit each other.
        """
        if isinstance(base, (str, os.PathLike)):
            base = load_weights(AutoModelForCausalLM.from_pretrained, base, **kwargs)
        elif isinstance(base, PreTrainedConfig):
            base = AutoModelForCausalLM.from_config(base, **kwargs)
        elif kwargs:
            raise TypeError(
                f"from_base() got {sorted(kwargs)}, which only load a base by name; "
                "leave them out for a live model"
            )
        if isinstance(base, MemLMForCausalLM):
            raise ValueError(
                "base already has memories; train it as it is (model.init_from in a recipe), or wrap its "
                "`.base`"
            )
        if not isinstance(base, PreTrainedModel):
            raise TypeError(
                f"base={type(base).__name__} is not a transformers model; give a PreTrainedModel, a "
                "PretrainedConfig, or a hub id or path"
            )
        config = MemLMConfig(
            # A copy: building a composite config re-sets attention implementations inside it, and a
            # live base whose implementation became None would lose its causal mask.
            text_config=copy.deepcopy(base.config),
            memory=[config_to_dict(entry) for entry in resolve_memories(memory)],
            segment_length=segment_length,
            memory_dtype=memory_dtype,
            schedule=schedule,
            attn_implementation=base.config._attn_implementation,
            dtype=base.dtype,
        )
        was_training = base.training
        model = cls(config, base=base)
        return model.train(was_training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As transformers does; under a `device_map` each memory goes to the device of its layer.

        RuntimeError when the map leaves a memory on the disk. OSError when the weights are in a pickle
        alone, unless use_safetensors=False asks for it.
        """
        name = pretrained_model_name_or_path
        load = super().from_pretrained
        if name is None:
            loaded = load(None, *args, **kwargs)
        else:
            folder = os.path.join(name, kwargs.get("subfolder") or "")
            finish_save(folder, kwargs.get("config") is not None)
            loaded = load_weights(
                lambda name, **kwargs: load(name, *args, **kwargs), name, **kwargs
            )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.generation_config = without_cache(model.generation_config)
        if getattr(model, "hf_device_map", None):
            model.memory.check_present(model.backbone.device)
            model.memory.settle(model.backbone)
        return loaded

    # The parts of the base model that transformers asks a wrapper for.

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

        Trainers that compute their own losses (trl) call it. Its attributes are those of `base`.
        """
        # The class's own forward: somebody may have put another in its place on the instance.
        return Body(self, partial(MemLMForCausalLM.forward, self))

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.text_config = copy.deepcopy(self.base.config)
        self.config.vocab_size = self.backbone.config.vocab_size
        return embeddings

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        # Whole segments are recomputed, not layers: activations of one segment at a time.
        if enable and every_n_layers != 1:
            raise ValueError(
                f"every_n_layers={every_n_layers} is not for a memory model, which recomputes whole "
                "segments; leave it at 1"
            )
        self.gradient_checkpointing = enable
        # Transformers' own function may hold what is kept on the host (offload).
        self._checkpoint = partial(gradient_checkpointing_func, use_reentrant=False)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """ValueError: an adapter is the base's, or peft's around the whole model."""
        raise ValueError(
            "an adapter around base and memories is peft's: get_peft_model(model, config); one of the base "
            "alone is model.base.add_adapter(config), which save_pretrained and save_adapter write"
        )

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
        """Route the attention through the memories inside it, again where another was set since."""
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
        segment_alignment: Alignment = "left",
        auxiliary_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MemLMOutput | tuple[Any, ...]:
        """Read input_ids (B, N) from where `memory_state` left off; the last segment ends with the call.

        Every window's graph is kept until backward, and, without labels, all logits: this needs memory that
        grows with the document. `windows` reads, and trains on, a document of any length in bounded memory.

        attention_mask (B, N): 0 marks padding, anywhere, which neither reads, writes nor moves a position.
        segment_alignment: where the short segment goes when segments do not divide a document: "left" cuts
        from the left, so the last one is short; "right" from the right, so the first one is (each row by
        its own length).
        labels (B, N): as transformers has them, shifted here (or `shift_labels`, shifted already).
        bptt_depth: segments a gradient reaches back; None is the whole call. bptt_anchor: whether windows
        of that many segments are counted back from the "end" of the call (of its longest row) or forward
        from its "start". write=False reads only, and returns `memory_state` as it was given.
        num_items_in_batch: what the summed loss is divided by; None is the number of labels. When it is
        given, the auxiliary loss, a mean already, is weighted by the share of those items that are in this
        call, so that the calls of a batch add up to one mean.

        auxiliary_mask (B, S) bool: rows of each of the call's S segments whose auxiliary losses count, such
        as the price of writing where nothing is worth it; None is all. Their mean is still over all rows.

        logits_to_keep: 0 for all logits, n for the last n positions, a tensor (n,) for these positions,
        None for none. "auto" is 0, but None where labels are given for more than one segment: the loss does
        not need logits afterwards, and those of a long document fill any machine's memory.
        `config.logits_with_labels` makes it 0 there too. head: maps last hidden states (., D) to logits;
        None is the model's own.

        Several documents in a row, as flattening collators pack them: position_ids that restart, seq_idx
        or cu_seq_lens_q say where each begins (`documents_in`). Each is read as if it were alone in a row,
        from an empty memory, and has a row of the returned state, in the order of reading; the cost is that
        of a batch padded to the longest. Within a document the model numbers positions itself.

        ValueError on shapes or states that do not fit, and on requests that transformers' models meet but
        this one cannot, such as `past_key_values` and `output_hidden_states`.
        """
        # Not in the signature: transformers' Trainer believes that a batch must have every argument with
        # "label" in its name, and would evaluate without a loss.
        shift_labels = kwargs.pop("shift_labels", None)
        rolling = kwargs.get("past_key_values")
        if isinstance(rolling, RollingMemory) and rolling.segment is not None:
            assert input_ids is not None and memory_state is not None
            added = self._added(input_ids, attention_mask, memory_state, rolling.segment)
            return MemLMOutput(logits=added, memory_state=memory_state)
        refuse(kwargs)
        if unknown := {k for k, v in kwargs.items() if v is not None} - set(REFUSED):
            raise TypeError(f"forward() got unexpected arguments {sorted(unknown)}")
        batch = packed(
            input_ids,
            attention_mask,
            labels,
            shift_labels,
            continued=memory_state is not None,
            alignment=segment_alignment,
            segment_length=self.config.segment_length,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        targets = batch.targets
        keep = collector(
            logits_to_keep,
            cast(Tensor, input_ids),
            batch.packing,
            targets is not None,
            self.config.segment_length,
            self.config.logits_with_labels,
        )
        state = self._admit(memory_state, batch.ids.shape[0])
        # The head runs once per position: for kept positions the loss is computed from the kept logits.
        aimed, rest = (None, None) if targets is None else keep.split(targets)

        total, extra = Sum(), Sum()
        watch = Watch(self.memory)
        run_window = self._window(write, keep, watch)
        segments = list(cut(batch.ids, batch.mask, rest, self.config.segment_length))
        if auxiliary_mask is not None:
            segments = masked_auxiliary(segments, auxiliary_mask)
        depth = len(segments) if bptt_depth is None else bptt_depth
        first = first_window(len(segments), depth, bptt_anchor)
        for (loss, cost), after in scan(run_window, segments, state, depth, first):
            total.add(loss)
            extra.add(cost)
            state = after
        watch.check()
        kept = keep.result()
        logits = None if kept is None else (head or self.backbone.logits)(kept)
        if aimed is not None and logits is not None:
            total.add(summed_cross_entropy(logits, aimed))

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
                        auxiliary = auxiliary * own / count
                    loss = loss + auxiliary
                # Every window gives every memory parameter a gradient, which data-parallel training
                # relies on; without this a later window would not touch the initial memory.
                loss = self.memory.touch(loss)
            if torch.is_grad_enabled() and not loss.requires_grad:
                # No target, no memory that is trained: a zero that `backward` takes, as a plain model's.
                for parameter in self.parameters():
                    if parameter.requires_grad:
                        # Of a sharded one, what this process has.
                        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                        loss = loss + here.flatten()[:0].sum().to(loss.device, loss.dtype)
                        break
        out = MemLMOutput(
            loss=loss,
            logits=keep.to_columns(logits),
            memory_state=state if write or memory_state is None else memory_state,
            auxiliary_loss=auxiliary,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _window(
        self, write: bool, keep: Collector, watch: Watch, writes: WriteCount | None = None
    ) -> Callable[[list[Segment], MemoryState], tuple[Losses, MemoryState]]:
        self._check_ready()
        cells, tokens = self.memory.cells(), self.memory.tokens

        def step(segment: Segment, state: MemoryState) -> tuple[Read, MemoryState]:
            before = self.memory.unpack(state)
            hidden, after, router_loss = self.backbone.run_segment(
                segment.ids,
                segment.mask,
                cells,
                tokens,
                before,
                write,
                wanted=keep.wanted or segment.labels is not None,
            )
            new, cost = state, None
            if write:
                new = self.memory.pack({**before, **after}, state.batch_size)
                if segment.active is not None:
                    new = new.where(segment.active, state)
                if self.training and torch.is_grad_enabled():
                    cost = self.memory.auxiliary_loss(before, after, segment.counted)
            if router_loss is not None:
                # The rows of a segment pass through the routers together; `forward` divides by all rows.
                cost = router_loss * segment.rows + (0.0 if cost is None else cost)
            sizes = new.largest() if write else None
            gate = None if writes is None else self.memory.largest_gate(new)
            return Read(loss_of(segment, hidden), hidden, cost, sizes, gate), new

        def loss_of(segment: Segment, hidden: Tensor | None) -> Tensor | None:
            if segment.labels is None:
                return None
            assert hidden is not None
            return self._loss(hidden, segment)

        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        recompute = self._checkpoint if again else None

        def window(segments: list[Segment], state: MemoryState) -> tuple[Losses, MemoryState]:
            total, extra = Sum(), Sum()
            wanted = keep.wanted or any(segment.labels is not None for segment in segments)
            how = How(step, loss_of, write, wanted, recompute, writes is not None)
            found = self.scheduler.run(how, segments, state)
            for segment, (one, after) in zip(segments, found, strict=True):
                total.add(one.loss)
                extra.add(one.cost)
                if keep.wanted:
                    assert one.hidden is not None
                    keep.add(one.hidden)
                state = state if after is None else after
                if one.sizes is not None:
                    watch.add(one.sizes, state)
                if writes is not None:
                    writes.add(segment.active, one.gate)
            return (total.value, extra.value), state

        return window

    def _check_ready(self) -> None:
        self.backbone.check_open()
        # Somebody may have called the base model's own `set_attn_implementation`, which ignores memories.
        self._open_heads()
        self.memory.check_present(self.backbone.device)
        self.scheduler.check()

    def _loss(self, hidden: Tensor, segment: Segment) -> Tensor:
        """Summed cross-entropy (nats) over the targets of one segment, in float32 or wider."""
        count = segment.num_targets
        assert segment.labels is not None and count is not None
        if not count:
            return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        hidden, labels = hidden.flatten(0, 1), segment.labels.flatten()
        if count < len(labels):
            # How many there are is known, so that no shape has to be asked for.
            found = (labels != IGNORE).cumsum(0)
            places = torch.searchsorted(found, torch.arange(1, count + 1, device=found.device))
            hidden, labels = hidden.index_select(0, places), labels.index_select(0, places)
        return cross_entropy_in_pieces(
            self.backbone.logits, hidden, labels, self.backbone.config.vocab_size
        )

    def _admit(self, state: MemoryState | None, batch_size: int) -> MemoryState:
        """The state to start from."""
        return (
            self.init_state(batch_size) if state is None else self.memory.admit(state, batch_size)
        )

    def windows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory_state: MemoryState | None = None,
        bptt_depth: int = 2,
        **kwargs: Any,
    ) -> Iterator[MemLMOutput]:
        """`memlm.windows` of this model: a document of any length, window by window."""
        return windows(self, input_ids, attention_mask, labels, memory_state, bptt_depth, **kwargs)

    @torch.no_grad()
    def read(
        self,
        segments: Iterable[Segment],
        memory_state: MemoryState | None = None,
        writes: WriteCount | None = None,
    ) -> MemoryState:
        """Remember `segments`, taken one by one, and return the state after the last.

        No gradient, no logits: for documents too long to be held. A row ends where its mask does. writes:
        counts the segments in which a write gate opened.
        """
        pieces = iter(segments)
        first = next(pieces, None)
        if first is None:
            if memory_state is None:
                raise ValueError("segments is empty and memory_state is None; give one of them")
            return memory_state
        state = self._admit(memory_state, first.ids.shape[0])
        watch = Watch(self.memory)
        run = self._window(True, Nothing(None), watch, writes)
        depth = self.scheduler.reads_ahead()
        for _, after in scan(run, chain([first], pieces), state, bptt_depth=depth):
            state = after
        watch.check()
        return state

    def set_memory_options(self, **options: Any) -> None:
        """Change options of a finished model, such as `write_threshold=0.1`, in every memory that has them.

        Options are those that `Config.live_options()` names; they are saved with the model. ValueError for
        one that no memory here has, or a value it cannot have; then nothing is changed.
        """
        self.memory.set_options(options)
        self.config.memory = list(self.memory.configs)

    def freeze_base(self) -> None:
        """Train the memories alone: no gradient for the base model's parameters."""
        self.base.requires_grad_(False)

    def unload(self) -> PreTrainedModel:
        """Return the base model as it was before it was wrapped, with its weights as they are now.

        This model cannot be run afterwards; save its memories first (`save_memory`). RuntimeError when
        a module of the base has changed its class since, as sharding does.
        """
        self.backbone.close()
        self.scheduler.release()
        return self.base


AutoModelForCausalLM.register(MemLMConfig, MemLMForCausalLM, exist_ok=True)
