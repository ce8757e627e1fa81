"""Our Titans memory beside `titans_pytorch.NeuralMemory`: CPU seconds, peak memory, and whose rule it is.

Both have the same dimensions, chunk, text, and a memory MLP of the same widths; neither has short
convolutions. Five contenders:

- ours, block: `TitansMemory`, with norm, projections, gates of every token, and output.
- ours, kernel: `read_write` alone, on ready queries, keys, values and gates.
- titans-pytorch, paper rule: `NeuralMemory(batch_size=chunk_size)`, every chunk's gradient at its start;
  with qk_rmsnorm and a maximal rate of 0.1, or it is not finite after some 700 tokens of random input.
- titans-pytorch, its example: the paper rule with the settings of its training script (a rate for every
  weight matrix, pooled chunks by attention, Newton-Schulz on the surprise), which work more.
- titans-pytorch, default: its `batch_size=None`, which takes all gradients at the initial weights.

In each round a reference and ours run directly after each other; ratios are taken pair by pair. Backward is
that of mean(output^2), to the input and all parameters. Handing over is the text in pieces, the state
carried, without gradients. Peak memory is as in mechanisms.py. Agreement is in float64, against loops
written here with `torch.autograd.grad`. The reference is no dependency; best in a venv of its own:

    pip install titans-pytorch==0.5.5
    python benchmarks/titans_vs_reference.py [--dim 256 --chunk 64 --tokens 4096 ...]
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from timing import in_fresh_process, peak_growth, seconds
from torch import Tensor

from memlm import __version__
from memlm.memory.base import Dims
from memlm.memory.parts.deep_memory import read, read_write
from memlm.memory.parts.titans import TitansConfig, TitansMemory

BLOCK, KERNEL = "ours, block", "ours, kernel"
PAPER, DEFAULT = "titans-pytorch, paper rule", "titans-pytorch, default"
EXAMPLE = "titans-pytorch, its example"
OURS, THEIRS = (BLOCK, KERNEL), (PAPER, EXAMPLE, DEFAULT)
EXAMPLE_OPTIONS = {
    "attn_pool_chunks": True,
    "per_parameter_lr_modulation": True,
    "spectral_norm_surprises": True,
}
TASKS = ("forward", "forward+backward", "hand-over")


@dataclass(frozen=True)
class Shape:
    """Sizes of the memory, the text and the machine's part in it."""

    dim: int = 256
    heads: int = 4
    chunk: int = 64
    tokens: int = 4096
    pieces: int = 8
    batch: int = 1
    depth: int = 2
    expansion: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    @property
    def size(self) -> int:
        return self.dim // self.heads


class Contender(NamedTuple):
    """run(inputs, state) returns an output and a state; None is the state before the first token."""

    run: Callable[[Sequence[Tensor], Any], tuple[Tensor, Any]]
    inputs: list[Tensor]  # tokens are the last dimension but one
    parameters: list[Tensor]


class Kernel(NamedTuple):
    """What `read_write` takes, the gates with a last dimension of 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_keep: Tensor
    log_momentum: Tensor
    rate: Tensor


def neural_memory(shape: Shape, name: str, max_rate: float = 0.1) -> Any:
    """titans-pytorch's memory, with random initial values."""
    try:
        from titans_pytorch import NeuralMemory
        from titans_pytorch.memory_models import MemoryMLP
    except ImportError as error:
        raise SystemExit(
            "the reference is missing: pip install titans-pytorch==0.5.5 (best in a venv of its own)"
        ) from error
    return NeuralMemory(
        dim=shape.dim,
        dim_head=shape.size,
        heads=shape.heads,
        chunk_size=shape.chunk,
        batch_size=None if name == DEFAULT else shape.chunk,
        model=MemoryMLP(shape.size, depth=shape.depth, expansion_factor=shape.expansion),
        momentum=True,
        qk_rmsnorm=True,
        default_step_transform_max_lr=max_rate,
        **(EXAMPLE_OPTIONS if name == EXAMPLE else {}),
    )


def our_block(shape: Shape) -> TitansMemory:
    dims = Dims(
        hidden_size=shape.dim,
        embedding_size=shape.dim,
        num_layers=1,
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.size,
        segment_length=shape.tokens,
    )
    config = TitansConfig(
        chunk_length=shape.chunk,
        depth=shape.depth,
        expansion=shape.expansion,
        output_std=0.02,  # an output of zeros would have gradients of zero
    )
    block = TitansMemory(config.resolved(dims), dims)
    block.reset_parameters()
    return block


def kernel_inputs(shape: Shape) -> Kernel:
    def normal(size: int) -> Tensor:
        return torch.randn(shape.batch, shape.heads, shape.tokens, size)

    return Kernel(
        F.normalize(normal(shape.size), dim=-1),
        F.normalize(normal(shape.size), dim=-1),
        normal(shape.size),
        F.logsigmoid(normal(1) + 4.6),
        F.logsigmoid(normal(1) + 2.2),
        0.005 * normal(1).sigmoid(),
    )


def kernel_weights(shape: Shape) -> list[Tensor]:
    widths = [shape.size, *[shape.expansion * shape.size] * (shape.depth - 1), shape.size]
    return [torch.randn(shape.batch, shape.heads, n, m) for n, m in pairwise(widths)]


def contender(name: str, shape: Shape) -> Contender:
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": shape.device, "dtype": getattr(torch, shape.dtype)}
    if name == KERNEL:
        inputs = [x.to(**where).requires_grad_() for x in kernel_inputs(shape)]
        # As in the block, weights are float32 or wider.
        wide = torch.promote_types(where["dtype"], torch.float32)
        initial = [w.to(shape.device, wide).requires_grad_() for w in kernel_weights(shape)]
        limit = 4.0 * shape.size**0.5

        def kernel(given: Sequence[Tensor], state: Any) -> tuple[Tensor, Any]:
            weights, momentum = state or (initial, [torch.zeros_like(w) for w in initial])
            q, k, v, *gates = given
            y, *new = read_write(
                q,
                k,
                v,
                *(gate.squeeze(-1) for gate in gates),
                weights,
                momentum,
                chunk=shape.chunk,
                limit=limit,
            )
            return y, tuple(new)

        return Contender(kernel, inputs, initial)
    x = torch.randn(shape.batch, shape.tokens, shape.dim).to(**where).requires_grad_()
    if name == BLOCK:
        block = our_block(shape).to(**where)
        return Contender(
            lambda given, state: block(given[0], state or block.init_state(shape.batch), None),
            [x],
            list(block.parameters()),
        )
    module = neural_memory(shape, name).to(**where)
    return Contender(
        lambda given, state: module(given[0], state=state), [x], list(module.parameters())
    )


def step(task: str, it: Contender, shape: Shape) -> None:
    if task == "forward+backward":
        for leaf in (*it.inputs, *it.parameters):
            leaf.grad = None
        it.run(it.inputs, None)[0].square().mean().backward()
        return
    pieces = shape.pieces if task == "hand-over" else 1
    length = shape.tokens // pieces
    state = None
    with torch.no_grad():
        for part in zip(*(x.split(length, dim=-2) for x in it.inputs), strict=True):
            _, state = it.run(part, state)


def peak(name: str, task: str, shape: Shape) -> int | None:
    """Peak memory of one task, in this process and from its first run."""
    it = contender(name, shape)
    with torch.no_grad():  # loads code that is needed whatever the size
        it.run([x[..., : shape.chunk, :] for x in it.inputs], None)
    return peak_growth(lambda: step(task, it, shape), shape.device)


def measure(shape: Shape, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds of each contender and task, and ratios theirs / ours."""
    fields = {name: contender(name, shape) for name in (*OURS, *THEIRS)}
    rows, ratios = [], []
    for task in TASKS:
        spent: dict[str, list[float]] = {name: [] for name in fields}
        pairs: dict[tuple[str, str], list[float]] = {pair: [] for pair in product(THEIRS, OURS)}
        for it in fields.values():
            step(task, it, shape)
        for turn in range(rounds):
            for theirs, ours in pairs:
                # Who goes first alternates.
                order = (theirs, ours) if turn % 2 else (ours, theirs)
                took = {
                    name: seconds(partial(step, task, fields[name], shape), shape.device)
                    for name in order
                }
                pairs[theirs, ours].append(took[theirs] / took[ours])
                for name, value in took.items():
                    spent[name].append(value)
        for name, values in spent.items():
            rows.append(
                {
                    "contender": name,
                    "task": task,
                    "median_seconds": round(statistics.median(values), 4),
                    "least_seconds": round(min(values), 4),
                    "peak_bytes": in_fresh_process(peak, name, task, shape),
                }
            )
        for (theirs, ours), values in pairs.items():
            ratios.append(
                {
                    "theirs": theirs,
                    "ours": ours,
                    "task": task,
                    "ratio": round(statistics.median(values), 2),
                    "lowest": round(min(values), 2),
                    "highest": round(max(values), 2),
                    "ratio_of_minima": round(min(spent[theirs]) / min(spent[ours]), 2),
                }
            )
    return rows, ratios


def sizes(shape: Shape) -> list[dict[str, Any]]:
    """Parameters, and whether output and gradients are finite."""
    found = []
    for name in (BLOCK, *THEIRS):
        it = contender(name, shape)
        step("forward+backward", it, shape)
        grads = [p.grad for p in it.parameters if p.grad is not None]
        found.append(
            {
                "contender": name,
                "parameters": sum(p.numel() for p in it.parameters),
                "with_gradient": sum(g.numel() for g in grads),
                "finite": all(bool(g.isfinite().all()) for g in grads),
            }
        )
    return found


# What the rule says, one token or chunk after the other; nothing here is shared with what is checked.


def our_loop(
    given: Kernel, weights: Sequence[Tensor], chunk: int, limit: float | None
) -> tuple[Tensor, list[Tensor]]:
    """S = eta S - theta g, M = (1 - alpha) M + S, y = M(q) for each token; g at the chunk's start."""

    def answer(x: Tensor, layers: Sequence[Tensor]) -> Tensor:
        for w in layers[:-1]:
            x = F.silu(x @ w) * (2 / w.shape[-1]) ** 0.5
        return x @ layers[-1]

    memory = list(weights)
    momentum = [torch.zeros_like(w) for w in weights]
    outputs = []
    start = memory
    for t in range(given.q.shape[2]):
        q, k, v, log_keep, log_momentum, rate = (x[:, :, t : t + 1] for x in given)
        if t % chunk == 0:
            start = [w.detach().requires_grad_() for w in memory]
        grads = torch.autograd.grad((answer(k, start) - v).square().sum(), start)
        norm = sum(g.square().sum(dim=(2, 3), keepdim=True) for g in grads) ** 0.5
        cut = 1.0 if limit is None else (limit / norm).clamp(max=1)
        for i, g in enumerate(grads):
            momentum[i] = log_momentum.exp() * momentum[i] - rate * cut * g
            memory[i] = log_keep.exp() * memory[i] + momentum[i]
        outputs.append(answer(q, memory))
    return torch.cat(outputs, dim=2), [w.detach() for w in memory]


def their_loop(module: Any, x: Tensor, chunk: int, paper: bool, max_rate: float) -> Tensor:
    """What titans-pytorch computes, from its own projections (B, T, D): gates are those of a chunk.

    One gradient a chunk, with a rate of each token; S = eta S - g and M = (1 - alpha) M + S at its end;
    a token reads the weights of the last full chunk, its own included. One token a chunk is the paper's
    rule, but for the mean instead of the sum in the error.
    """

    def answer(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        gamma, *layers = weights
        y = x
        for i, w in enumerate(layers):
            y = (F.gelu(y) if i else y) @ w
        return F.layer_norm(y, y.shape[-1:]) * (gamma.unsqueeze(-2) + 1) + x

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (module.heads, -1)).transpose(1, 2)

    stored, asked = module.store_norm(x), module.retrieve_norm(x)
    k, v = module.k_norm(heads(module.to_keys(stored))), heads(module.to_values(stored))
    q = module.q_norm(heads(module.to_queries(asked)))
    rate = max_rate * torch.sigmoid(heads(module.to_adaptive_step[0](stored)))
    means = stored.unflatten(1, (-1, chunk)).mean(dim=2)
    eta, alpha = (
        torch.sigmoid(heads(gate[0](means)))
        for gate in (module.to_momentum, module.to_decay_factor)
    )
    order = [module.memory_model_parameter_names.index("norm.gamma")]
    order += [i for i in range(len(module.memory_model_parameters)) if i not in order]
    initial = [module.memory_model_parameters[i].detach()[None] for i in order]
    memory = [w.expand(len(x), *w.shape[1:]) for w in initial]
    momentum = [torch.zeros_like(w) for w in memory]
    first = tuple(memory)
    outputs = []
    for t in range(x.shape[1]):
        if (t + 1) % chunk == 0:
            n, at = t // chunk, slice(t + 1 - chunk, t + 1)
            start = [w.detach().requires_grad_() for w in (memory if paper else first)]
            error = (answer(k[:, :, at], start) - v[:, :, at]).square().mean(dim=-1, keepdim=True)
            grads = torch.autograd.grad((rate[:, :, at] * error).sum(), start, retain_graph=True)
            for i, g in enumerate(grads):
                shape = (*g.shape[:2], *[1] * (g.ndim - 2))
                momentum[i] = eta[:, :, n].reshape(shape) * momentum[i] - g
                memory[i] = (1 - alpha[:, :, n].reshape(shape)) * memory[i] + momentum[i]
        outputs.append(answer(q[:, :, t : t + 1], memory))
    y = torch.cat(outputs, dim=2) * torch.sigmoid(heads(module.retrieve_gate[0](asked)))
    return module.combine_heads(y.transpose(1, 2).flatten(2))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def agreement(length: int = 256) -> dict[str, float]:
    """Largest absolute differences in float64; outputs are of the order of 0.1 to 1."""
    found: dict[str, float] = {}

    def shape_of(chunk: int) -> Shape:
        return Shape(dim=64, heads=2, chunk=chunk, tokens=length, dtype="float64")

    with torch.no_grad():
        for chunk in (16, 1):
            found |= _our_agreement(shape_of(chunk))
            for name in (PAPER, DEFAULT):
                found |= _their_agreement(shape_of(chunk), name)
    return found


def _our_agreement(shape: Shape) -> dict[str, float]:
    torch.manual_seed(0)
    chunk, found = shape.chunk, {}
    given = Kernel(*(x.double() for x in kernel_inputs(shape)))
    weights = [w.double() for w in kernel_weights(shape)]
    zero = [torch.zeros_like(w) for w in weights]
    # Rates at which the memory learns within these few tokens, and a limit that cuts some gradients.
    given = given._replace(rate=10 * given.rate)

    def ours(x: Kernel, limit: float | None) -> tuple[Tensor, Any]:
        gates = [gate.squeeze(-1) for gate in x[3:]]
        y, new, _ = read_write(*x[:3], *gates, weights, zero, chunk=chunk, limit=limit)
        return y, new

    for limit, label in ((None, "no limit"), (8.0, "limit 8")):
        y, new = ours(given, limit)
        with torch.enable_grad():
            expected, memory = our_loop(given, weights, chunk, limit)
        found[f"ours, chunk {chunk}, {label}: outputs - token loop"] = apart(y, expected)
        found[f"ours, chunk {chunk}, {label}: last weights - token loop"] = max(
            apart(a, b) for a, b in zip(new, memory, strict=True)
        )
    losses = []
    for v in (given.v, given.v.flip(2)):
        cut = Kernel(*(x[:, :, :chunk] for x in given._replace(v=v)))
        later = slice(chunk, 2 * chunk)
        error = read(given.k[:, :, later], ours(cut, None)[1]) - given.v[:, :, later]
        losses.append(error.square().mean(dim=-1))
    found[f"ours, chunk {chunk}: chunk 2's inner loss when chunk 1 is another"] = apart(*losses)
    return found


def _their_agreement(shape: Shape, name: str) -> dict[str, float]:
    torch.manual_seed(0)
    chunk, found = shape.chunk, {}
    # At higher rates its steps of one token amplify rounding, and no two ways to compute them agree.
    max_rate = 0.1 if chunk > 1 else 0.01
    module = neural_memory(shape, name, max_rate).double()
    x = torch.randn(1, shape.tokens, shape.dim, dtype=torch.float64)
    label = f"{name}, chunk {chunk}"
    whole = module(x)[0]
    with torch.enable_grad():
        expected = their_loop(module, x, chunk, name == PAPER, max_rate)
    found[f"{label}: outputs - chunk loop"] = apart(whole, expected)
    state, outputs = None, []
    for token in x.split(1, dim=1):
        y, state = module(token, state=state)
        outputs.append(y)
    found[f"{label}: token by token - one call"] = apart(torch.cat(outputs, dim=1), whole)
    other = torch.cat([torch.randn_like(x[:, :chunk]), x[:, chunk:]], dim=1)
    losses = [module(s, return_surprises=True)[2][0][..., chunk : 2 * chunk] for s in (x, other)]
    found[f"{label}: chunk 2's inner loss when chunk 1 is another"] = apart(*losses)
    return found


def main(
    dim: int = 256,
    heads: int = 4,
    chunk: int = 64,
    tokens: int = 4096,
    pieces: int = 8,
    batch: int = 1,
    depth: int = 2,
    expansion: int = 2,
    rounds: int = 9,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/titans_vs_reference.json"
    ),
) -> None:
    shape = Shape(
        dim, heads, chunk, tokens, pieces, batch, depth, expansion, device, dtype, threads
    )
    found = agreement()
    described = sizes(shape)
    rows, ratios = measure(shape, rounds)
    print_tables(rows, ratios, described, found)
    result = {
        "what": "our Titans memory beside titans-pytorch: CPU seconds, theirs / ours, agreement in float64",
        "settings": {**asdict(shape), "rounds": rounds},
        "versions": {
            "memlm": __version__,
            "titans-pytorch": version("titans-pytorch"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
        "ratios": ratios,
        "parameters": described,
        "agreement": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out}")


def print_tables(
    rows: list[dict[str, Any]],
    ratios: list[dict[str, Any]],
    described: list[dict[str, Any]],
    found: dict[str, float],
) -> None:
    print("| contender | task | seconds, median | least | peak, MiB |")
    print("|---|---|--:|--:|--:|")
    for row in rows:
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        print(
            f"| {row['contender']} | {row['task']} | {row['median_seconds']:.3f} | "
            f"{row['least_seconds']:.3f} | {memory} |"
        )
    print("\n| theirs / ours | task | ratio of seconds | of minima |\n|---|---|--:|--:|")
    for row in ratios:
        print(
            f"| {row['theirs']} / {row['ours']} | {row['task']} | "
            f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) | "
            f"{row['ratio_of_minima']:.2f} |"
        )
    print("\n| contender | parameters | with a gradient | finite |\n|---|--:|--:|---|")
    for row in described:
        print(
            f"| {row['contender']} | {row['parameters']:,} | {row['with_gradient']:,} | "
            f"{'yes' if row['finite'] else 'no'} |"
        )
    print("\n| largest difference, float64 | |\n|---|--:|")
    for what, value in found.items():
        print(f"| {what} | {value:.1e} |")


if __name__ == "__main__":
    typer.run(main)
