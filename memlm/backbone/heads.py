"""Rotary positions and the softmax core: attention whose queries and keys pass through memories.

transformers' attention interface hands over queries and keys that are rotated by position. Where memories
are at the heads, the module is made to leave them unrotated, and they are rotated here, after the memories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm.backbone.finding import find_in_family
from memlm.backbone.open import Front
from memlm.backbone.run import RUN, Run
from memlm.backbone.stages import original_class, signature_of
from memlm.memory.base import QKV, Attended, Dims
from memlm.memory.parts.folding import folded

# Prefix of an attention implementation's name: it passes through memories at the heads.
OPENED = "memlm_"
# The name in transformers' families of the function that rotates queries and keys by (cos, sin).
ROTATION = "apply_rotary_pos_emb"

# While an attention module is tried out, its queries and keys go here instead of to the softmax, with
# what else it tells the softmax.
_TRIED: ContextVar[list[tuple[Tensor, Tensor, Mapping[str, Any]]] | None] = ContextVar(
    "memlm_tried", default=None
)


def open_attention(inner: str) -> str:
    """The name of the attention implementation that passes `inner` through the memories."""
    name = f"{OPENED}{inner}"
    AttentionInterface.register(name, partial(_attend, inner))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


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
        tried.append((query, key, kwargs))
        return value.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None
    run = RUN.get()
    # What calls the softmax may be a part of the layer's attention (BERT's).
    inside = None if run is None else run.heads
    layer = getattr(module, "_memlm_layer", inside)
    if run is None or inside is None or inside != layer:
        spared = 0 if run is None or run.wanted is None else query.shape[2] - run.wanted
        if spared and attention_mask is not None and attention_mask.ndim == 4:
            query, attention_mask = query[:, :, spared:], attention_mask[:, :, spared:]
            found, weights = attention(module, query, key, value, attention_mask, **kwargs)
            return F.pad(found, (0, 0, 0, 0, spared, 0)), weights
        return attention(module, query, key, value, attention_mask, **kwargs)

    def stage(x: QKV, mask: Tensor | None = None, parts: bool = False) -> Any:
        kept = run.open
        extra = x.k.shape[2] - key.shape[2]
        if kept is not None and kept.begun:
            front = kept.front["heads", layer]
            cos, sin = _angles_of_added(run, layer, x, front)
        else:
            if extra and mask is None:
                mask = run.mask_for(QKV(x.k, x.k, x.v))
            real = None if mask is None or not extra else mask[:, :extra]
            front = Front(extra, real)
            cos, sin = _angles(run, layer, x, extra, mask)
        q, k, v = x
        if cos is not None and sin is not None:
            rotate = find_in_family(module, ROTATION)
            assert rotate is not None
            # Queries have the positions of their own keys, which come after the prepended ones.
            q, own = apply_rotary(rotate, q, k[:, :, extra:], cos[:, extra:], sin[:, extra:])
            if extra:
                before = k[:, :, :extra]
                before = apply_rotary(
                    rotate, before, before[:, :0], cos[:, :extra], sin[:, :extra]
                )[0]
            k = torch.cat([before, own], dim=2) if extra else own
        if kept is not None:
            kept.front["heads", layer] = front
            k, v = kept.keys.update(k, v, layer)
        seen = attention_mask
        # Alone, a query sees everything before it, unless something there is not real.
        if front.size and (seen is not None or front.real is not None or q.shape[2] > 1):
            if seen is None:
                seen = _causal(q, k.shape[2] - front.size)
            seen = with_keys_in_front(seen, front, q.shape[2])
        y = attention(module, q, k, v, seen, **kwargs)[0].transpose(1, 2)
        if not parts:
            return y
        return Attended(y, *_softmax_parts(q, k, seen, _first_cos(run, layer, x, cos), kwargs))

    return run.chain("heads", layer, stage, QKV(query, key, value)).transpose(1, 2), None


def _angles(
    run: Run, layer: int, x: QKV, extra: int, mask: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(cos, sin) for all keys of `x`, the first `extra` of which stand in front of the segment."""
    if run.rotation is None:
        return None, None
    if not extra:
        return run.rotation
    if mask is None:
        mask = torch.ones(x.v.shape[0], x.v.shape[2], dtype=torch.bool, device=x.v.device)
    return run.backbone.rotary(layer, x.v, places_of(mask))


def _angles_of_added(
    run: Run, layer: int, x: QKV, front: Front
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(cos, sin) for tokens added to an open segment."""
    if run.rotation is None or not front.size:
        return run.rotation or (None, None)
    assert run.open is not None
    return run.backbone.rotary(layer, x.v, run.open.places_behind(front))


def _first_cos(run: Run, layer: int, x: QKV, cos: Tensor | None) -> Tensor | None:
    """cos at the first position."""
    if cos is None or run.open is None:
        return cos
    first = torch.zeros(1, 1, dtype=torch.long, device=x.v.device)
    return run.backbone.rotary(layer, x.v, first)[0]


def _causal(q: Tensor, keys: int) -> Tensor:
    """(1, 1, T, keys) bool: a causal mask for queries (B, H, T, dh) that belong to the last keys."""
    shape = (q.shape[2], keys)
    return torch.ones(shape, dtype=torch.bool, device=q.device).tril(keys - shape[0])[None, None]


def folded_mask(made: Callable[[Tensor, Tensor], Tensor | None], x: Tensor, mask: Tensor) -> Tensor:
    """`made(x, mask)`, an attention mask (B, 1, T, T), where vmap maps over the mask (B, T)."""

    def call(x: Tensor, mask: Tensor) -> tuple[Tensor]:
        seen = made(x, mask)
        if seen is None:
            seen = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        return (seen.expand(len(x), *seen.shape[1:]),)

    return folded(call, x, mask)[0]


def with_keys_in_front(seen: Tensor, front: Front, queries: int) -> Tensor:
    """An attention mask (., 1, T, T') with more keys in front, which every query sees where they are real.

    Or one (B, T') that knows of no queries.
    """
    if seen.ndim == 2:
        if front.real is None:
            return F.pad(seen, (front.size, 0), value=1)
        return torch.cat([front.real.to(seen), seen], dim=1)
    _check_4d(seen)
    if front.real is None:
        return F.pad(seen, (front.size, 0), value=True if seen.dtype == torch.bool else 0.0)
    real = front.real.to(seen.device)[:, None, None].expand(-1, -1, queries, -1)
    if seen.dtype != torch.bool:
        real = torch.zeros_like(real, dtype=seen.dtype).masked_fill(~real, _least(seen))
    return torch.cat([real, seen.expand(real.shape[0], -1, -1, -1)], dim=-1)


def _softmax_parts(
    q: Tensor, k: Tensor, seen: Tensor | None, cos: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The last three of `Attended`, from queries and keys as the softmax takes them.

    ValueError for an attention whose softmax is not one over scaled products.
    """
    _refuse_terms(arguments)
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
        # At the first position nothing is rotated, but some families scale as they rotate.
        size = cos.shape[-1]
        q = torch.cat([q[..., :size] * cos[:, None, :1], q[..., size:]], dim=-1)
    return scores.logsumexp(dim=-1), q, scores


def _refuse_terms(arguments: Mapping[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"base: no other keys can join the softmax of its attention, which takes {name!r}; use a "
                "memory that mixes outputs, such as 'infini' or a 'knn' with combine='gate'"
            )


@torch.no_grad()
def rotates_by_position(
    layer: int,
    module: nn.Module,
    x: Tensor,
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    dims: Dims,
    joins: bool = False,
) -> bool:
    """Whether the attention `module` of `layer` rotates queries and keys by position: found by trying it.

    x (1, T, D): hidden states to try it on. rotary: (cos, sin) of positions (1, T) as the module takes
    them; None for a decoder without. joins: whether a memory there joins other keys to the softmax. Weights
    have to be there. ValueError for an attention whose rotation cannot be taken off and done here, or whose
    softmax cannot be joined.
    """
    parameters = signature_of(original_class(module)).parameters
    arguments = {
        name: None
        for name, parameter in list(parameters.items())[2:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if rotary is None or "position_embeddings" not in parameters:
        _tried(layer, module, x, arguments, dims, joins)
        return False
    cos, sin = rotary(torch.arange(x.shape[1], device=x.device)[None])
    rotated = _tried(
        layer, module, x, {**arguments, "position_embeddings": (cos, sin)}, dims, joins
    )
    still = torch.ones_like(cos), torch.zeros_like(sin)
    plain = _tried(layer, module, x, {**arguments, "position_embeddings": still}, dims, joins)
    if _alike(rotated, plain):
        return False
    rotate = find_in_family(module, ROTATION)
    if rotate is None or not _alike(rotated, apply_rotary(rotate, *plain, cos, sin)):
        raise ValueError(
            f"base: the attention of layer {layer} ({type(module).__name__}) rotates its queries and "
            "keys in a way that cannot be taken off; use a memory that works outside the attention, "
            "such as 'armt' or 'rmt'"
        )
    return True


def _tried(
    layer: int, module: nn.Module, x: Tensor, arguments: Mapping[str, Any], dims: Dims, joins: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys the attention `module` would hand to its softmax."""
    found: list[tuple[Tensor, Tensor, Mapping[str, Any]]] = []
    training, failure = module.training, None
    run, tried = RUN.set(None), _TRIED.set(found)
    try:
        module.eval()(x, **arguments)
    except Exception as error:
        failure = error
    finally:
        module.train(training)
        _TRIED.reset(tried)
        RUN.reset(run)
    expected = [(1, n, x.shape[1], dims.head_dim) for n in (dims.num_heads, dims.num_kv_heads)]
    if failure is not None or [tuple(part.shape) for one in found for part in one[:2]] != expected:
        raise ValueError(
            f"base: the attention of layer {layer} ({type(module).__name__}) does not run its softmax "
            "through transformers' attention interface in the way a memory at its heads needs; use "
            "one that works outside it, such as 'armt' or 'rmt'"
        ) from failure
    query, key, told = found[0]
    if joins:
        _refuse_terms(told)
    if not bool(query.any() and key.any()):
        raise ValueError(
            f"base: whether the attention of layer {layer} ({type(module).__name__}) rotates its queries "
            "and keys cannot be told, since the queries or keys are zero; load the base's weights "
            "first, or use a memory that works outside it, such as 'armt' or 'rmt'"
        )
    return query, key


def _alike(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Equal up to the rounding of any dtype."""
    limit = 0.02 * float(expected[0].abs().max())
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= limit
        for a, b in zip(found, expected, strict=True)
    )


@lru_cache
def _takes_pairs(rotate: Callable[..., tuple[Tensor, Tensor]], part: int) -> bool:
    """Whether `rotate` wants 2 `part` features where angles have `part`: found by trying it."""
    angles = torch.zeros(1, 1, part)
    try:
        rotate(*torch.zeros(2, 1, 1, 1, part), angles, angles)
    except RuntimeError:
        return True
    return False


def apply_rotary(
    rotate: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotate` on the leading features that (cos, sin) cover; the others stay (partial rotary).

    Where it takes an angle per pair of features (gpt-oss), these are twice as many as the angles.
    """
    part = cos.shape[-1]
    if 2 * part <= q.shape[-1] and _takes_pairs(rotate, part):
        part = 2 * part
    if part == q.shape[-1]:
        return rotate(q, k, cos, sin)
    rotated = rotate(q[..., :part], k[..., :part], cos, sin)
    rest = q[..., part:], k[..., part:]
    return (
        torch.cat([rotated[0], rest[0]], dim=-1),
        torch.cat([rotated[1], rest[1]], dim=-1),
    )


def places_of(mask: Tensor, times: Tensor | None = None) -> Tensor:
    """Index of each real token among the real tokens of its row. (B, T) -> (B, T).

    times (T,): positions of the same time share a place.
    """
    if times is None:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    taken = torch.zeros_like(mask, dtype=torch.long).index_add(1, times, mask.long()) > 0
    return (taken.long().cumsum(dim=1) - 1).clamp(min=0)[:, times]


def not_later(seen: Tensor | None, times: Tensor) -> Tensor:
    """An attention mask (., 1, T, T) narrowed to keys no later than the query; None is the causal mask."""
    past = (times.unsqueeze(0) <= times.unsqueeze(1))[None, None]
    if seen is None:
        return past.tril()
    _check_4d(seen)
    return seen & past if seen.dtype == torch.bool else seen.masked_fill(~past, _least(seen))


def only_real(seen: Tensor, real: Tensor) -> Tensor:
    """An attention mask (., 1, T, T') narrowed to keys that are `real` (B, T'), or one (B, T') like it."""
    if seen.ndim == 2:
        return seen & real
    keys = real[:, None, None].to(seen.device)
    return seen & keys if seen.dtype == torch.bool else seen.masked_fill(~keys, _least(seen))


def _check_4d(seen: Tensor) -> None:
    if seen.ndim != 4:
        raise ValueError(
            "attn_implementation: this memory needs an attention that takes a mask for each query; load "
            "the base with attn_implementation='sdpa'"
        )


def _least(like: Tensor) -> float:
    return torch.finfo(like.dtype).min
