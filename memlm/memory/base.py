"""What a memory is: a pure function wrapped around a stage of the base model, threading a state.

Legend: B batch, T tokens of a segment, M memory tokens, D hidden, E embedding, H heads, G key-value
heads, L layers, dh head size. A file adds only its own letters.

A mechanism concatenates, slices, reads and writes. Positions, rotary angles, masks of lengthened
sequences and rows whose document has ended are handled outside it (`memlm.backbone`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, cast, overload

import torch
from torch import Tensor, nn

Site = Literal["model", "layer", "attention", "heads", "recurrence"]


class QKV(NamedTuple):
    """Queries (B, H, T, dh), keys and values (B, G, T, dh): what passes at the site "heads".

    Queries and keys carry no position yet (and bring no rotary angle): `inner` rotates them by their place,
    keys put in front included.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Attended(NamedTuple):
    """Attention at "heads", open to more keys: output (B, H, T, dh), and what it takes to go on.

    lse (B, H, T): the log-sum-exp of each query's scores. query (B, H, T, dh): its product with a key that
    carries no position is the score that key would have at the first token's place. scores (B, H, T, T'):
    those of the keys that are there, float32 or wider; of what a query does not see, the least number.
    """

    output: Tensor
    lse: Tensor
    query: Tensor
    scores: Tensor


class Inner(Protocol):
    """The stage a memory is wrapped around, at "model", "layer" and "attention".

    x (B, T', D) may have any length, and the result has it too. mask (B, T') bool: which positions are
    real, to be given where T' differs from the stage's T and the batch is padded; without it the positions
    that came in addition are taken to be real and to stand first.
    """

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        # (T',) integers from 0, when each position happens, not at "model". It then sees what stands before
        # it at its own time or earlier, and positions of the same time share a place.
        times: Tensor | None = None,
        # At how many positions, at the end, the output is wanted, not at "model". What stands before them
        # in the result is then undefined.
        last: int | None = None,
    ) -> Tensor: ...


class InnerHeads(Protocol):
    """The softmax attention a memory is wrapped around, at "heads": (B, H, T, dh) for each query.

    Keys and values of `x` may be longer than its queries, T'; the extra ones stand first, and every query
    sees them. mask (B, T') bool: which of the keys are real; without it the extra ones are.
    """

    @overload
    def __call__(
        self, x: QKV, mask: Tensor | None = None, parts: Literal[False] = False
    ) -> Tensor: ...

    # For a memory that joins other keys to the softmax.
    @overload
    def __call__(self, x: QKV, mask: Tensor | None = None, *, parts: Literal[True]) -> Attended: ...


class InnerRecurrence(Protocol):
    """The recurrence of a layer that has one of its own, at "recurrence": it goes on from where it was.

    x (B, T, D). convolution (B, C, K - 1): the inputs of its short convolution before `x`. recurrent
    (B, ...): its state (`RecurrenceDims` has both shapes). real (B, T) bool: which tokens are, real ones
    first; None: all. The others change nothing. Returns the output (B, T, D), and what the convolution and
    the recurrence hold after the last real token; what was given stays as it was.
    """

    def __call__(
        self, x: Tensor, convolution: Tensor, recurrent: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class RecurrenceDims(NamedTuple):
    """Layers with a recurrence of their own, and the shapes of what one row of it holds in each."""

    layers: tuple[int, ...]
    convolution: tuple[int, ...]
    recurrent: tuple[int, ...]


class Continues(NamedTuple):
    """What a memory does with tokens that are added to a segment that has begun, as `generate` adds them.

    The base model computes the added tokens alone, from keys and values it has kept, and `inner` returns
    what it makes of them; what it returns for others is undefined. how:

    "front": nothing. All the memory does in a segment is to put in front of it what the state decides, and
    that is kept.
    "read": it is called with them. What it does to a token depends on the state before the segment alone.
    "write": it is called with them and the state it has left within the segment, which after every `length`
    tokens stands for all before it. It writes what goes into `inner`, not what comes out.
    "whole": it is called with all the segment's tokens so far. Under the same condition.
    "again": the segment is run again from its beginning, base model included. `reason` says why.
    """

    how: Literal["front", "read", "write", "whole", "again"]
    length: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Dims:
    """Sizes of the base model and the segment, as every mechanism needs them."""

    hidden_size: int
    embedding_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    segment_length: int
    # Whether attention rotates queries and keys by their place; otherwise places are in the embeddings.
    rotary: bool = True
    # The longest sequence the base was built for, None when it names no limit.
    max_positions: int | None = None
    # None where no layer has a recurrence whose state can be handed on.
    recurrence: RecurrenceDims | None = None
    # Which layer a memory stands at; None around the whole decoder. What a memory computes must not depend
    # on it but through the state, as several layers run as one.
    layer: int | None = None

    @property
    def spare_positions(self) -> int | None:
        """Places beside the segment's that keys may be rotated to; None: as many as one likes."""
        if self.max_positions is None or not self.rotary:
            return None
        return max(0, self.max_positions - self.segment_length)


def option(default: Any) -> Any:
    """A config's field that changes neither the shape nor the meaning of a state.

    How parameters start, what training costs, how much is read: a state is the same without it, and so
    goes from a model with one value to a model with another.
    """
    return field(default=default, metadata={"in_state": False})


def live_option(default: Any) -> Any:
    """An `option` that may change on a finished model (`MemLMForCausalLM.set_memory_options`).

    So a mechanism looks it up in `self.config` each time.
    """
    return field(default=default, metadata={"in_state": False, "live": True})


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Fields every mechanism has. `layers`: which decoder layers it is attached to; None means all.

    A field added later has the default that does what was done before it: files without it go on loading.
    """

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))

    @classmethod
    def paper(cls) -> Self:
        """The settings of the mechanism's paper, as far as they are known.

        What the paper leaves open, and what it trains a base model with, stays at the default; what would
        change a pretrained base before training does too, wherever the mechanism can leave it alone. This
        one, of mechanisms without a paper of their own, is the defaults.
        """
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def state_fields(self) -> dict[str, Any]:
        """Those of `to_dict` that change a state's shape or meaning: all but an `option`."""
        shaping = [one.name for one in fields(self) if one.metadata.get("in_state", True)]
        return {name: value for name, value in self.to_dict().items() if name in shaping}

    @classmethod
    def live_options(cls) -> tuple[str, ...]:
        """Names of the fields that may change on a finished model."""
        return tuple(one.name for one in fields(cls) if one.metadata.get("live"))


class Memory(nn.Module, ABC):
    """One memory at one stage. Site "model" has one instance, the others one per attached layer."""

    site: ClassVar[Site]
    Config: ClassVar[type[MemoryConfig]]
    # True when a freshly attached memory leaves the base model's logits as they were.
    neutral: ClassVar[bool] = False
    # False when a segment's new state depends on `x` and the old state alone, not on what `inner` returns:
    # then a document that is only read can do without the stage of the last memory.
    reads_inner: ClassVar[bool] = True
    # True when the state sums up over segments, and so is float32 in a half-precision model.
    accumulates: ClassVar[bool] = True
    # True when it runs its stage more than once per segment, so that no other memory may stand inside it.
    repeats_inner: ClassVar[bool] = False
    # Leaves of the state that say something of the last segment alone; all others stay as they are, to the
    # bit, while every write gate is zero (memories whose config has a `write_threshold`).
    transient: ClassVar[frozenset[str]] = frozenset()
    # Options that this takes, where the published form writes something at every segment whatever its gate.
    silent_with: ClassVar[Mapping[str, Any]] = {}
    # Why the wavefront schedule cannot run it for several layers at once, as the end of a sentence that
    # begins with its name; "" when it can. A property where it depends on the config.
    not_batched: ClassVar[str] = ""
    # False when no gradient passes through the state, however deep the backpropagation.
    differentiable: ClassVar[bool] = True
    # At "heads": whether other keys join the softmax of the attention inside. A property where it depends
    # on the config.
    joins_softmax: ClassVar[bool] = False
    # A property where it depends on the config.
    continues: ClassVar[Continues] = Continues("again", reason="the mechanism does not say how")

    def __init__(self, config: MemoryConfig, dims: Dims) -> None:
        super().__init__()
        self.config = config
        self.dims = dims
        # Where the memory lives, and in which dtype the stage it wraps computes: that of the base model,
        # while the parameters may be wider.
        self.register_buffer("place", torch.empty(0), persistent=False)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros on the module's device, in the base model's dtype unless another is given."""
        return cast(Tensor, self.place).new_zeros(shape, dtype=dtype)

    def rows_of(self, vectors: Tensor, batch_size: int) -> Tensor:
        """Learned `vectors` (M, D) as the start of each row, in the base model's dtype: (B, M, D)."""
        return vectors.to(cast(Tensor, self.place).dtype).expand(batch_size, -1, -1)

    @classmethod
    def resolve(cls, config: Any, dims: Dims) -> Any:
        """Fill what `config` leaves open from `dims`, and refuse what cannot be (ValueError)."""
        return config

    @classmethod
    def num_segment_tokens(cls, config: Any) -> int:
        """How many learned embeddings follow each segment, through all layers.

        They stand after the last token when the segment is written, and are left out otherwise:
        under the causal mask no token sees them. A layer's `x` ends with them.
        """
        return 0

    @classmethod
    def segment_token_std(cls, config: Any, embedding_std: float) -> float:
        """Scale of those embeddings at the start."""
        return embedding_std

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        """Positions beyond the segment's own that the base model is asked for."""
        return cls.num_segment_tokens(config)

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        """Positions this memory puts into its own stage's sequence, at a site inside the decoder."""
        return 0

    @abstractmethod
    def init_state(self, batch_size: int) -> Any:
        """State before the first segment: tensors in a NamedTuple, every leaf (B, ...)."""

    @abstractmethod
    def forward(
        self, x: Any, state: Any, inner: Any, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, Any]:
        """Run the stage on `x` with what is remembered, and remember.

        x (B, T, D) and an `Inner`, or QKV and an `InnerHeads` at "heads", or x and an `InnerRecurrence` at
        "recurrence". mask (B, T) bool, True on real tokens; None when all are.
        Returns what `inner(x)` would, and the new state; with write=False, `state` itself.
        """

    def auxiliary_loss(self, before: Any, after: Any) -> Tensor | None:
        """(B,) what one segment's change of state costs in training, a function of both; None: nothing.

        Averaged over real segments, rows and the layers of this memory, and added to the loss as it is: how
        long a document is, how deep the model and how a batch is split do not change its weight.
        """
        return None

    def largest_gate(self, state: Any) -> Tensor | None:
        """(B,) the largest write gate of the last segment, from 0 to 1; None: it has no gates."""
        return None

    def reset_parameters(self, embedding_std: float) -> None:
        """Initialise the parameters; `embedding_std` is the scale of the base's embeddings."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a state accumulates in: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


# transformers' mark on what holds loaded weights; its own initialising functions alone look at it.
LOADED = "_is_hf_initialized"


def was_loaded(parameter: Tensor) -> bool:
    """Whether transformers has filled `parameter` from a checkpoint: `reset_parameters` then leaves it.

    To be asked before values are written in any other way than by `nn.init`, which asks by itself.
    """
    return getattr(parameter, LOADED, False)
