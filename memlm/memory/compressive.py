"""Compressive Transformer: what leaves the cached past is compressed, not dropped (Rae et al. 2019).

Each layer keeps the keys and values of the last `memory_length` tokens and, older than these,
`compressed_length` slots, each made from `compression_rate` tokens that left. Attention sees both, and the
segment. Keys are kept without position and rotated where they are read, as in Transformer-XL here.

The convolution is trained by reconstruction alone (section 3.2): its loss compares what the segment's
queries attend to in the old keys and values and in their compression, and its gradient reaches nothing
else; the main loss does not reach the convolution. The paper compresses hidden states, here it is keys and
values; so the old ones need no second projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from memlm.memory.base import (
    QKV,
    Continues,
    Dims,
    InnerHeads,
    Memory,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
    was_loaded,
)
from memlm.memory.parts.cache import appended, cleared, held, pick, push

COMPRESSIONS = ("conv", "mean", "max", "most-used")


@dataclass(frozen=True, kw_only=True)
class CompressiveConfig(MemoryConfig):
    """Options of the Compressive Transformer.

    memory_length: tokens kept as they are; None picks a segment, rounded down to the compression rate.
    compressed_length: slots for older ones; None picks as many as memory_length; both pick fewer where the
    base model's positions leave no room. compression_rate: tokens per
    slot; it divides memory_length. compression: "conv" (a strided convolution, starting as the mean),
    "mean", "max", or "most-used" (the tokens that the segments' queries attended to most).
    reconstruction_weight: price of the convolution's reconstruction loss, which alone trains it; 0 leaves
    it as it is.
    """

    memory_length: int | None = None
    compressed_length: int | None = None
    compression_rate: int = 4
    compression: str = "conv"
    reconstruction_weight: float = option(1.0)

    @classmethod
    def paper(cls) -> Self:
        """PG-19's: 512 tokens, 512 slots of 2 tokens each (segments of 512), by convolution.

        Other data had other sizes. The loss's weight is not known.
        """
        return cls(memory_length=512, compressed_length=512, compression_rate=2, compression="conv")


class CompressiveState(NamedTuple):
    """What a layer holds; N tokens, C slots, all buffers right-aligned.

    keys, values (B, G, N, dh), length (B,) of them filled; the same of the slots (B, G, C, dh).
    usage (B, 1, N, 1): attention each token has received ("most-used" only, else (B, 1, N, 0)).
    reconstruction (B,): the last segment's loss, which only `auxiliary_loss` reads.
    """

    keys: Tensor
    values: Tensor
    usage: Tensor
    length: Tensor
    compressed_keys: Tensor
    compressed_values: Tensor
    compressed_length: Tensor
    reconstruction: Tensor


class Compressive(Memory):
    """Attention over the last tokens before the segment, and over a compression of those before them."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = CompressiveConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("front")

    def __init__(self, config: CompressiveConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.memory_length is not None and config.compressed_length is not None
        self.memory_length = config.memory_length
        self.compressed_length = config.compressed_length
        # Without slots nothing has to leave in groups: this is Transformer-XL.
        self.rate = config.compression_rate if config.compressed_length else 1
        self.compression = config.compression
        self.reconstruction_weight = config.reconstruction_weight
        width = dims.num_kv_heads * dims.head_dim
        convolves = config.compression == "conv" and config.compressed_length > 0
        self.key_conv, self.value_conv = (
            nn.Conv1d(width, width, self.rate, stride=self.rate) if convolves else None
            for _ in range(2)
        )
        total = config.compressed_length + config.memory_length
        self.offset = (
            None
            if dims.rotary
            else nn.Parameter(torch.empty(dims.num_kv_heads, total, dims.head_dim))
        )

    @classmethod
    def resolve(cls, config: CompressiveConfig, dims: Dims) -> CompressiveConfig:
        rate = config.compression_rate
        if rate < 1:
            raise ValueError(f"compression_rate={rate} must be at least 1 token per slot")
        if config.compression not in COMPRESSIONS:
            raise ValueError(
                f"compression={config.compression!r} is unknown; use one of {', '.join(COMPRESSIONS)}"
            )
        if config.reconstruction_weight < 0:
            raise ValueError(
                f"reconstruction_weight={config.reconstruction_weight} would reward a bad compression; "
                "use 0 or more"
            )
        length = config.memory_length
        if length is None:
            room = dims.segment_length
            if dims.spare_positions is not None:
                taken = config.compressed_length
                room = min(
                    room,
                    dims.spare_positions // 2 if taken is None else dims.spare_positions - taken,
                )
            length = max(rate, room // rate * rate)
        if length < 1 or length % rate:
            raise ValueError(
                f"compression_rate={rate} does not divide memory_length={length}; use a memory_length "
                f"that is a multiple of it, such as {max(1, length // rate) * rate}"
            )
        compressed = config.compressed_length
        if compressed is None:
            spare = dims.spare_positions
            compressed = length if spare is None else max(1, min(length, spare - length))
        if compressed < 0:
            raise ValueError(f"compressed_length={compressed} must be 0 slots or more")
        return replace(config, memory_length=length, compressed_length=compressed)

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return config.compressed_length + config.memory_length

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        return config.compressed_length + config.memory_length

    def reset_parameters(self, embedding_std: float) -> None:
        for conv in (self.key_conv, self.value_conv):
            if conv is not None and conv.bias is not None:
                nn.init.zeros_(conv.bias)
                nn.init.zeros_(conv.weight)
                if not was_loaded(conv.weight):
                    with torch.no_grad():
                        conv.weight.diagonal().fill_(1 / self.rate)
        if self.offset is not None:
            nn.init.zeros_(self.offset)

    def init_state(self, batch_size: int) -> CompressiveState:
        groups, size = self.dims.num_kv_heads, self.dims.head_dim
        wide = accumulator_dtype(self.zeros(0).dtype)
        tracked = 1 if self.compression == "most-used" else 0

        def buffer(length: int) -> Tensor:
            return self.zeros(batch_size, groups, length, size)

        def count() -> Tensor:
            return self.zeros(batch_size, dtype=torch.long)

        return CompressiveState(
            buffer(self.memory_length),
            buffer(self.memory_length),
            self.zeros(batch_size, 1, self.memory_length, tracked, dtype=wide),
            count(),
            buffer(self.compressed_length),
            buffer(self.compressed_length),
            count(),
            self.zeros(batch_size, dtype=wide),
        )

    def forward(
        self,
        x: QKV,
        state: CompressiveState,
        inner: InnerHeads,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, CompressiveState]:
        past = torch.cat([state.compressed_keys, state.keys], dim=2)
        if self.offset is not None:
            past = past + self.offset
        k = torch.cat([past.to(x.k.dtype), x.k], dim=2)
        v = torch.cat(
            [t.to(x.v.dtype) for t in (state.compressed_values, state.values, x.v)], dim=2
        )
        real = [
            held(state.compressed_length, self.compressed_length),
            held(state.length, self.memory_length),
            x.k.new_ones(x.k.shape[0], x.k.shape[2], dtype=torch.bool) if mask is None else mask,
        ]
        y = inner(QKV(x.q, k, v), mask=torch.cat(real, dim=1))
        return (y, self.write(x, state, mask)) if write else (y, state)

    def write(self, x: QKV, state: CompressiveState, mask: Tensor | None) -> CompressiveState:
        """Remember the segment's real tokens; what leaves the memory is compressed, `rate` at a time."""
        usage = state.usage
        if self.compression == "most-used":
            usage = usage + self._attention_received(x.q, state, mask)
        fresh = x.v.new_zeros(x.v.shape[0], 1, x.v.shape[2], usage.shape[3])
        (keys, values, usage), total = appended(
            (state.keys, state.values, usage), state.length, (x.k, x.v, fresh), mask
        )
        size, rate = keys.shape[2], self.rate
        leaving = (total - self.memory_length).clamp(min=0)
        leaving = (leaving + rate - 1) // rate * rate
        # At most the whole segment leaves, in whole groups; the oldest stand at size - total.
        most = -(-x.k.shape[2] // rate) * rate
        place = torch.arange(most, device=keys.device)
        index = ((size - total).unsqueeze(1) + place).clamp(max=size - 1)
        leaves = place < leaving.unsqueeze(1)
        old = QKV(x.q, pick(keys, index), pick(values, index))
        slots, real = self._compressed(old, pick(usage, index), leaves, leaving // rate)
        (compressed_keys, compressed_values), compressed_length = push(
            (state.compressed_keys, state.compressed_values), state.compressed_length, slots, real
        )
        length = total - leaving
        keys, values, usage = (
            cleared(buffer[:, :, size - self.memory_length :], length)
            for buffer in (keys, values, usage)
        )
        return CompressiveState(
            keys,
            values,
            usage,
            length,
            compressed_keys,
            compressed_values,
            compressed_length,
            self._reconstruction(old, leaves, mask).to(state.reconstruction.dtype),
        )

    def _compressed(
        self, old: QKV, usage: Tensor, leaves: Tensor, count: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Slots for the entries that leave, and which of the slots are real."""
        if self.compression == "most-used":
            used = usage[:, 0, :, 0].masked_fill(~leaves, -1.0)
            rank = used.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            return (old.k, old.v), rank < count.unsqueeze(1)
        real = leaves[:, :: self.rate]
        if self.key_conv is not None and self.value_conv is not None:
            # The task's gradient passes through the convolution, but does not move it.
            fixed = (
                self._convolved(old.k, self.key_conv, True),
                self._convolved(old.v, self.value_conv, True),
            )
            return fixed, real
        operation = "max" if self.compression == "max" else "mean"
        k, v = (
            reduce(t, "B G (n rate) dh -> B G n dh", operation, rate=self.rate)
            for t in (old.k, old.v)
        )
        return (k, v), real

    def _convolved(self, x: Tensor, conv: nn.Conv1d, fixed: bool) -> Tensor:
        """(B, G, n rate, dh) -> (B, G, n, dh), over all heads' features at once."""
        assert conv.bias is not None
        weight, bias = (
            (conv.weight.detach(), conv.bias.detach()) if fixed else (conv.weight, conv.bias)
        )
        flat = rearrange(x, "B G t dh -> B t (G dh)").mT.to(weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = F.conv1d(flat, weight, bias, stride=self.rate)
        return rearrange(out, "B (G dh) n -> B G n dh", G=x.shape[1]).to(x.dtype)

    def _reconstruction(self, old: QKV, leaves: Tensor, mask: Tensor | None) -> Tensor:
        """(B,) mean squared difference between attending to the old entries and to their slots."""
        if not (self.training and torch.is_grad_enabled() and self.key_conv and self.value_conv):
            return old.q.new_zeros(old.q.shape[0])
        q, k, v = (t.detach() for t in old)
        short = self._convolved(k, self.key_conv, False), self._convolved(v, self.value_conv, False)
        some = leaves.any(dim=1)
        # A row from which nothing leaves may attend anywhere; it counts for nothing.
        seen = (leaves | ~some.unsqueeze(1))[:, None, None]
        gqa = q.shape[1] != k.shape[1]
        attend = F.scaled_dot_product_attention
        full = attend(q, k, v, attn_mask=seen, enable_gqa=gqa)
        brief = attend(q, *short, attn_mask=seen[..., :: self.rate], enable_gqa=gqa)
        error = (full - brief).square().mean(dim=(1, 3))
        real = torch.ones_like(error) if mask is None else mask.to(error.dtype)
        mean = (error * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        return mean * some

    @torch.no_grad()
    def _attention_received(
        self, q: Tensor, state: CompressiveState, mask: Tensor | None
    ) -> Tensor:
        """(B, 1, N, 1) share of the segment's attention each held token gets, by content alone."""
        q = rearrange(q, "B (G h) T dh -> B G h T dh", G=state.keys.shape[1])
        q = q.to(state.usage.dtype)
        scores = torch.einsum("bghtd,bgnd->bghtn", q, state.keys.to(q.dtype)) * q.shape[-1] ** -0.5
        real = held(state.length, self.memory_length)
        scores = scores.masked_fill(~real[:, None, None, None], torch.finfo(scores.dtype).min)
        received = scores.softmax(dim=-1).mean(dim=(1, 2)) * real.unsqueeze(1)
        if mask is not None:
            received = received * mask.unsqueeze(-1)
        return rearrange(received.sum(dim=1), "B N -> B 1 N 1")

    def auxiliary_loss(self, before: CompressiveState, after: CompressiveState) -> Tensor | None:
        """(B,) `reconstruction_weight` times the reconstruction loss; None without a convolution."""
        if self.key_conv is None or not self.reconstruction_weight:
            return None
        return self.reconstruction_weight * after.reconstruction
