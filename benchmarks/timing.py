"""What the benchmarks measure with: seconds, how far memory rises, and what this machine can multiply.

Ratios come from runs that take turns in one process, in CPU seconds (GPU: device-synchronised seconds), so
that a machine whose speed drifts does not decide them.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def seconds(run: Callable[[], object], device: str) -> float:
    """CPU seconds of `run`; on a GPU the seconds until the device is done."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_growth(run: Callable[[], object], device: str) -> int | None:
    """Bytes by which memory rises while `run` runs; None where the system does not tell."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # getrusage's ru_maxrss would not do: a child's starts at what its parent held.
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` of an importable module returns in a new interpreter."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def multiplications(run: Callable[[], object]) -> int:
    """Multiplications in the products of matrices that `run` computes.

    Counted by torch's counter as they are dispatched, whatever form a mechanism takes; for the fused
    attention of CPUs, which torch leaves out, two products for each pair of a query and a key that it sees,
    and four more in backward; for a convolution's backward, which torch counts without its groups, twice
    its forward; products added in place, which torch leaves out too, as those that are not. Products
    element by element (gates, decays, scans, feature maps) are not counted.
    """
    with FlopCounterMode(display=False, custom_mapping=_RULES) as counter:
        run()
    return counter.get_total_flops() // 2


def _pairs(query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None) -> int:
    """How many pairs of a query and a key are looked at, in all rows and heads."""
    rows, heads, queries, keys = *query.shape[:3], key.shape[2]
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask == 0
        return int(seen.expand(rows, heads, queries, keys).sum())
    if is_causal:
        return rows * heads * sum(min(at + 1, keys) for at in range(queries))
    return rows * heads * queries * keys


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    **given: Any,
) -> int:
    # torch's counter counts a multiplication and an addition as two.
    return 2 * _pairs(query, key, is_causal, attn_mask) * (query.shape[3] + value.shape[3])


def _backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *given: Any,
              attn_mask: Tensor | None = None, **more: Any) -> int:  # fmt: skip
    is_causal = bool(given[3])
    return 4 * _pairs(query, key, is_causal, attn_mask) * (query.shape[3] + value.shape[3])


def _convolution_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, *given: Any, **more: Any
) -> int:
    # By the input and by the weights, each what forward takes; torch's own rule counts every channel with
    # every other, where a convolution has groups.
    wanted = given[-1]
    return 2 * grad_out.numel() * weight[0].numel() * (int(wanted[0]) + int(wanted[1]))


def _added(onto: Tensor, a: Tensor, b: Tensor, *given: Any, **more: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


for _rule in (_forward, _backward, _convolution_backward, _added):
    _rule._get_raw = True  # type: ignore[attr-defined]
_RULES: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten.addmm_: _added,
    torch.ops.aten.baddbmm_: _added,
}


def peak_multiplications(device: str, dtype: str, size: int | None = None) -> float:
    """Multiplications per second of this machine in a product of square matrices, the best of five."""
    size = size or (1024 if device == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in "ab")
    a @ b
    return size**3 / min(seconds(lambda: a @ b, device) for _ in range(5))
