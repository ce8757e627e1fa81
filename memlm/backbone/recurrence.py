"""Recurrences of the base model's own: handed a state, they go on from it, and give the new one back.

transformers keeps such states in caches that are updated in place, and lets padded tokens decay them.
Here a state travels as a value: in the place of the cache stands an object that hands out what was carried
and takes what is left, and the projections that make a token's gates are shut where a token is padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.backbone.finding import unwrapped
from memlm.backbone.run import RUN, Run, entered
from memlm.backbone.stages import MemoryStage, Stage, bind, signature_of
from memlm.memory.base import RecurrenceDims

# The softplus and the sigmoid of this are zero in every dtype, and float16 holds it.
SHUT = -1e4
# The argument by which mixers take a cache.
CACHE = "cache_params"


class Kind(NamedTuple):
    """What a kind of recurrence calls its parts.

    gates: submodules whose output makes a token's gates; how many of its last features do (the name of the
    attribute that says it, None: all); and their value for a token that shall neither write nor decay.
    state: the attributes that give the shape of one row's state.
    """

    gates: tuple[tuple[str, str | None, float], ...]
    state: tuple[str, ...]


_DELTA = ("num_v_heads", "head_k_dim", "head_v_dim")
KINDS = (
    # Mamba-2 and the hybrids with its mixer: the step size dt scales what is written and what decays.
    Kind((("in_proj", "num_heads", SHUT),), ("num_heads", "head_dim", "ssm_state_size")),
    # The gated delta rule, with a projection for both gates or one for each.
    Kind((("in_proj_ba", None, SHUT),), _DELTA),
    Kind((("in_proj_b", None, SHUT), ("in_proj_a", None, SHUT)), _DELTA),
    Kind((("b_proj", None, SHUT), ("a_proj", None, SHUT)), _DELTA),
    # Kimi Delta Attention, whose logarithm of the decay comes from a module.
    Kind(
        (("b_proj", None, SHUT), ("forget_gate", None, 0.0)),
        ("num_heads", "head_dim", "head_dim"),
    ),
)
SUPPORTED = (
    "Mamba-2, Bamba, Falcon-H1, Granite 4 (hybrid), Nemotron-H, Zamba2, Qwen3-Next, Qwen3.5, OLMo-Hybrid "
    "or Kimi-Linear"
)
NO_RECURRENCE = "no layer of it has a recurrent state"


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of recurrence `module` is, by its parts; None when it is none that goes on from a state."""
    original = getattr(type(module), "_memlm_original", type(module))
    if not isinstance(getattr(module, "conv1d", None), nn.Conv1d):
        return None
    if CACHE not in signature_of(original).parameters:
        return None
    for kind in KINDS:
        names = [name for name, _, _ in kind.gates]
        names += [count for _, count, _ in kind.gates if count is not None]
        if all(hasattr(module, name) for name in (*names, *kind.state)):
            return kind
    return None


def find_recurrence(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer that can go on from a state, however deep it stands."""
    # What is wrapped around a module looks like it.
    modules = [module for module in layer.modules() if unwrapped(module) is module]
    found = [module for module in modules if kind_of(module) is not None]
    return found[0] if len(found) == 1 else None


def recurrence_dims(layers: Sequence[nn.Module]) -> RecurrenceDims | None:
    """Which of the decoder's `layers` have a recurrence, and its sizes. None: none, or they differ."""
    found = {i: module for i, layer in enumerate(layers) if (module := find_recurrence(layer))}
    shapes = set()
    for module in found.values():
        kind, convolution = kind_of(module), module.get_submodule("conv1d")
        assert kind is not None and isinstance(convolution, nn.Conv1d)
        state = tuple(int(getattr(module, name)) for name in kind.state)
        shapes.add(((convolution.in_channels, convolution.kernel_size[0] - 1), state))
    return RecurrenceDims(tuple(found), *shapes.pop()) if len(shapes) == 1 else None


def obstacle(layers: Sequence[nn.Module]) -> str | None:
    """Why no recurrent state can be handed on in `layers`, as half a sentence; None: it can."""
    if recurrence_dims(layers) is not None:
        return None
    if any(find_recurrence(layer) for layer in layers):
        return "its layers hold states of different shapes"
    parts = [part for layer in layers for part in layer.modules()]
    marks = (
        "A_log",
        "recurrent_param",
        "time_decay",
        "slope_rate",
        "fgate_preact",
        "ifgate_preact",
    )
    own = {type(part).__name__ for part in parts if any(hasattr(part, mark) for mark in marks)}
    if own:
        return f"the state of its {' and '.join(sorted(own))} cannot be handed on from segment to segment"
    return NO_RECURRENCE


class Carried:
    """What one layer carries, in the place of transformers' cache.

    Families ask for it in several ways, and transformers 5.17 in others than 5.23. All get the same, and
    nothing is written into what was carried, so gradients pass.
    """

    # Even a short input then passes `update_conv_state`, instead of a kernel that writes in place.
    record_past = True

    def __init__(self, convolution: Tensor, recurrent: Tensor, real: Tensor | None) -> None:
        self.conv_states, self.recurrent_states = [convolution], [recurrent]
        self.real = real
        self.convolution: Tensor | None = None
        self.recurrent: Tensor | None = None

    @property
    def layers(self) -> Carried:
        return self

    def __getitem__(self, layer_idx: int) -> Carried:
        return self

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return True

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.conv_states[state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.recurrent_states[state_idx]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """(B, C, T) inputs of the convolution; returns them after those that were carried."""
        before = self.conv_states[0]
        joined = torch.cat([before.to(conv_states.dtype), conv_states], dim=-1)
        if self.real is None:
            left = joined[..., conv_states.shape[-1] :]
        else:
            places = torch.arange(before.shape[-1], device=joined.device)
            places = self.real.sum(dim=1)[:, None, None] + places
            left = joined.gather(-1, places.expand(-1, joined.shape[1], -1))
        self.convolution = left.to(before.dtype)
        return joined

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kw: Any) -> Tensor:
        self.recurrent = recurrent_states.to(self.recurrent_states[0].dtype)
        return recurrent_states


class Shut(NamedTuple):
    """While a recurrence runs on padding: which tokens (B, T) are real, and the least their gates may be.

    floor (n,): None where gates have no lower limit.
    """

    real: Tensor
    floor: Tensor | None


_SHUT: ContextVar[Shut | None] = ContextVar("memlm_shut", default=None)


def go_on(
    module: nn.Module,
    call: Callable[..., Tensor],
    x: Tensor,
    convolution: Tensor,
    recurrent: Tensor,
    real: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`module` by its `call` on x (B, T, D), as `InnerRecurrence` has it.

    RuntimeError when it left no state.
    """
    length = x.shape[1]
    if length == 1:
        # Families compute a single token in another way, which writes into the state.
        known = x.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real
        x, real = F.pad(x, (0, 0, 0, 1)), F.pad(known, (0, 1), value=False)
    cache = Carried(convolution, recurrent, real)
    token = _SHUT.set(None if real is None else Shut(real, _floor(module)))
    try:
        y = call(x, **{**arguments, CACHE: cache, "attention_mask": None})
    finally:
        _SHUT.reset(token)
    if cache.convolution is None or cache.recurrent is None:
        raise RuntimeError(
            "base: a recurrence left no state behind; its forward was replaced after the model was made"
        )
    return y[:, :length], cache.convolution, cache.recurrent


def least_step(module: nn.Module) -> float:
    """The step size that a recurrence raises smaller ones to."""
    return float(vars(module).get("time_step_limit", (0.0,))[0])


def _floor(module: nn.Module) -> Tensor | None:
    """(n,) The gates from which, with their biases, the least step is made."""
    least = least_step(module)
    if not least:
        return None
    return math.log(math.expm1(least)) - cast(Tensor, module.dt_bias)


class RecurrenceStage(MemoryStage):
    """A layer's mixer, with the memories of the run around it."""

    def _forward(self, memory_run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site, layer = self._memlm_site, self._memlm_layer
        if (site, layer) not in memory_run.cells:
            return super()._forward(memory_run, args, kwargs)
        call = super(MemoryStage, self).forward
        arguments = bind(type(self)._memlm_original, args, kwargs)
        x = arguments.pop("hidden_states")
        stage: Callable[..., Any] = partial(go_on, self, call, **arguments)
        with entered(memory_run):
            return memory_run.chain(site, layer, stage, x)


class LimitedStage(RecurrenceStage):
    """One whose step size has a lower limit, by which padding would decay the state.

    While it runs on padding, `GateStage` sets the limit for real tokens, and there is no other.
    """

    @property
    def time_step_limit(self) -> tuple[float, float]:
        least, largest = vars(self)["time_step_limit"]
        return (least if _SHUT.get() is None else 0.0), largest


class GateStage(Stage):
    """A projection that makes a token's gates: shut on padding while a recurrence goes on."""

    # How many of the last features are gates, and their value where they are shut.
    _memlm_gate: tuple[int | None, float]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = super().forward(*args, **kwargs)
        shut = _SHUT.get()
        if shut is None:
            return made
        count, value = self._memlm_gate
        real = shut.real
        padding = ~real.reshape(*real.shape, *(1 for _ in made.shape[2:]))
        if count is None:
            return made.masked_fill(padding, value)
        rest, gates = made.split([made.shape[-1] - count, count], dim=-1)
        if shut.floor is not None:
            gates = torch.maximum(gates, shut.floor.to(gates.dtype))
        return torch.cat([rest, gates.masked_fill(padding, value)], dim=-1)


def gates_of(module: nn.Module) -> list[tuple[nn.Module, tuple[int | None, float]]]:
    """The submodules of a recurrence that become a `GateStage`, each with its `_memlm_gate`."""
    kind = kind_of(module)
    assert kind is not None
    return [
        (module.get_submodule(name), (None if count is None else getattr(module, count), value))
        for name, count, value in kind.gates
    ]


@torch.no_grad()
def goes_on_exactly(module: nn.Module, x: Tensor, dims: RecurrenceDims) -> bool:
    """Whether an opened recurrence computes in two parts, with padding, what it computes in one.

    x (1, T, D): hidden states to try it on, T at least 4. Equal up to the rounding of any dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    states = [x.new_zeros((1, *shape), dtype=wide) for shape in dims[1:]]
    training, run = module.training, RUN.set(None)
    try:
        module.eval()
        whole = module(x)
        full = go_on(module, module, x, states[0], states[1], None)
        y, *states = go_on(module, module, x[:, :2], states[0], states[1], None)
        real = torch.arange(2 * x.shape[1] - 2, device=x.device)[None] < x.shape[1] - 2
        rest = go_on(module, module, torch.cat([x[:, 2:], x], dim=1), states[0], states[1], real)
    finally:
        module.train(training)
        RUN.reset(run)
    found = (torch.cat([y, rest[0][:, : x.shape[1] - 2]], dim=1), *rest[1:])
    return all(
        bool((a - b).abs().max() <= 0.02 * b.abs().max())
        for a, b in zip(found, (whole, *full[1:]), strict=True)
    )
