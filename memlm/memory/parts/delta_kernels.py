"""The recurrence of `delta_rule` by the kernels of flash-linear-attention, where they apply.

They do on a CUDA device, where the package is installed, for half-precision vectors and keys of up to 256:
in float32 the kernels multiply in TF32, so that there, and anywhere else, our torch form computes. Gates,
decays and states are float32 either way. Their conventions, as of version 0.6: q, k, v (B, T, H, d), step
sizes and logarithms of decays (B, T, H) or (B, T, H, dk), states (B, H, dk, dv), scale of the queries 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from memlm.memory.parts.delta_rule import Tokens, delta_rule

Kernel = Callable[..., tuple[Tensor, Tensor]]
# The widest keys that the kernels take.
WIDEST = 256
HALF = (torch.bfloat16, torch.float16)


def run_delta_rule(
    tokens: Tokens, state: Tensor, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`; `dtype` is that of the text's vectors, from which the float32 `tokens` were made."""
    if state.is_cuda and dtype in HALF and state.shape[2] <= WIDEST and kernels() is not None:
        return by_kernel(tokens, state, dtype)
    return delta_rule(tokens, state, chunk)


@cache
def kernels() -> dict[tuple[bool, bool], Kernel] | None:
    """By whether the rule erases, and whether it decays by channel; None where the package is missing."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gla import chunk_gla
        from fla.ops.kda import chunk_kda
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    return {
        (True, False): chunk_gated_delta_rule,
        (True, True): chunk_kda,
        (False, False): chunk_simple_gla,
        (False, True): chunk_gla,
    }


def by_kernel(tokens: Tokens, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, by the kernel for this rule, with queries, keys and values in `dtype`."""
    found = kernels()
    assert found is not None
    questions, decay = tokens.query.shape[2], tokens.log_decay
    by_channel = decay is not None and decay.ndim == 4

    def heads(x: Tensor) -> Tensor:
        """(B, H, T, ...) -> (B, T, H R, ...): a head for each question, as the kernels take one of each."""
        return x.repeat_interleave(questions, dim=1).transpose(1, 2)

    key, value, step = tokens.key, tokens.value, tokens.step
    options: dict[str, Any] = {}
    if tokens.erases:
        options["beta"] = heads(step)
        decay = torch.zeros_like(step) if decay is None else decay
    else:
        value = step.unsqueeze(-1) * value
    if decay is not None:
        options["g"] = heads(decay)
    answers, new = found[tokens.erases, by_channel](
        q=tokens.query.flatten(1, 2).transpose(1, 2).to(dtype),
        k=heads(key).to(dtype),
        v=heads(value).to(dtype),
        scale=1.0,
        initial_state=state.repeat_interleave(questions, dim=1),
        output_final_state=True,
        **options,
    )
    answers = answers.transpose(1, 2).unflatten(1, (-1, questions)).to(state.dtype)
    # The heads of one state's questions all leave the same.
    return answers, new[:, ::questions].to(state.dtype)
