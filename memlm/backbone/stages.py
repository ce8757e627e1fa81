"""Modules of the base model that ask, per call, whether memories are at work around them.

Each found module gets a subclass of its own class; parameters, names and the module tree stay as they were,
and without memories at work every forward is the base model's own. Modules put around a stage later, such
as `checkpoint_wrapper`, pass what is at work on. Hooks of accelerate, which replace a module's forward on
the instance, stay outside: the stage takes the place of the forward beneath them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from memlm.backbone.folding import FoldedAttention
from memlm.backbone.open import Front
from memlm.backbone.run import MEETS, RUN, Run, entered
from memlm.memory.base import Site

HIDDEN: ContextVar[GivenHidden | None] = ContextVar("memlm_hidden", default=None)
# One subclass and one signature per class, however many models are opened.
_SUBCLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
_SIGNATURES: dict[type[nn.Module], inspect.Signature] = {}
_NAMES: dict[type[nn.Module], list[str]] = {}


class GivenHidden(BaseModelOutputWithPastAndCrossAttentions):
    """Hidden states as a decoder's output; anything else that a family's head looks for is None."""

    def __getattr__(self, name: str) -> None:
        # accelerate takes anything with a `to` for a tensor.
        if name.startswith("_") or name == "to":
            raise AttributeError(name)


class Stage(nn.Module):
    """A module that was found, with a subclass of its own class."""

    _memlm_original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class bears its original's name, so looking it up by name would find the original.
        made = super().__reduce_ex__(protocol)
        cls = type(self)
        if _SUBCLASSES.get((cls.__bases__[0], cls._memlm_original)) is not cls:
            return made
        return (_made_again, cls.__bases__, *made[2:])


class DecoderStage(Stage):
    """The decoder; returns what is given untouched when only the head or the loss is asked for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = HIDDEN.get()
        if given is not None:
            return given
        return super().forward(*args, **kwargs)


class MemoryStage(Stage):
    """A decoder layer or its attention module, with the memories of the run around it."""

    _memlm_site: Site
    _memlm_layer: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        meets = MEETS.get()
        if meets is not None and self._memlm_site == "layer":
            arguments = bind(type(self)._memlm_original, args, kwargs)
            return meets.meet(self._memlm_layer, arguments, partial(self._called, args, kwargs))
        return self._called(args, kwargs)

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = RUN.get()
        if run is not None and not self._is_idle(run):
            kwargs["memory_run"] = run
        if run is not None and run.batched and self._memlm_site == "attention":
            with FoldedAttention():
                out = super().__call__(*args, **kwargs)
        else:
            out = super().__call__(*args, **kwargs)
        return out[0] if _is_shown(self, kwargs.get("memory_run")) else out

    def _is_idle(self, run: Run) -> bool:
        """Whether this is attention that no memory stands at: spared what else is done around it."""
        if self._memlm_site != "attention" or run.batched:
            return False
        layer = self._memlm_layer
        return ("attention", layer) not in run.cells and ("heads", layer) not in run.cells

    def forward(self, *args: Any, memory_run: Run | None = None, **kwargs: Any) -> Any:
        if memory_run is None:
            return super().forward(*args, **kwargs)
        if not _is_shown(self, memory_run):
            return self._forward(memory_run, args, kwargs)
        # FSDP gathers a module's parameters for backward once a gradient reaches what its call
        # returned, and a gradient may reach a state alone: so the states are shown to it.
        before = set(memory_run.left.states)
        out = self._forward(memory_run, args, kwargs)
        return out, [v for k, v in memory_run.left.states.items() if k not in before]

    def _forward(self, memory_run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = super().forward
        site, layer = self._memlm_site, self._memlm_layer
        around_heads = site == "attention" and ("heads", layer) in memory_run.cells
        if (site, layer) not in memory_run.cells and not around_heads:
            with entered(memory_run):
                return call(*args, **kwargs)
        arguments = bind(type(self)._memlm_original, args, kwargs)
        hidden = arguments.pop("hidden_states")
        rest: tuple[Any, ...] | None = None

        def stage(
            x: Tensor,
            mask: Tensor | None = None,
            times: Tensor | None = None,
            last: int | None = None,
        ) -> Tensor:
            nonlocal rest
            inside = memory_run if last is None else memory_run.but(wanted=last)
            given: Mapping[str, Any] = arguments
            kept = memory_run.open
            if x.shape[1] != hidden.shape[1]:
                padded = memory_run.mask is not None
                mask = memory_run.mask_for(x) if mask is None else mask
                given = memory_run.backbone.lengthened(layer, arguments, x, mask, times, padded)
                inside = inside.but(mask=mask)
                if kept is not None:
                    count = x.shape[1] - hidden.shape[1]
                    kept.front[site, layer] = Front(
                        count, None if mask is None else mask[:, :count]
                    )
            elif kept is not None and (site, layer) in kept.front:
                given = memory_run.backbone.behind(
                    layer, arguments, x, kept.front[site, layer], kept
                )
            if around_heads:
                if kept is not None:
                    # Keys are kept once they are rotated, by what stands around the softmax.
                    given = {k: None if v is kept.keys else v for k, v in given.items()}
                given, rotation = memory_run.backbone.unrotated(layer, given)
                inside = inside.but(heads=layer, rotation=rotation)
            with entered(inside):
                out = call(x, **given)
            if isinstance(out, tuple):
                out, rest = out[0], out[1:]
            return out

        y = memory_run.chain(site, layer, stage, hidden)
        return y if rest is None else (y, *rest)


def _is_shown(module: nn.Module, run: Run | None) -> bool:
    return run is not None and isinstance(module, FSDPModule)


def hand_over(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the run to a module around a stage, which then calls the stage with it, however late."""
    return args, {**kwargs, "memory_run": RUN.get()}


def signature_of(cls: type[nn.Module]) -> inspect.Signature:
    if cls not in _SIGNATURES:
        _SIGNATURES[cls] = inspect.signature(cls.forward)
    return _SIGNATURES[cls]


def bind(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a stage's forward by name; in every family the hidden states come first."""
    names = _names_of(cls)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(given) != len(args) + len(kwargs):
        # Too many, or one twice: let Python say which.
        signature_of(cls).bind_partial(None, *args, **kwargs)
    return {"hidden_states": given.pop(names[0]), **given}


def _names_of(cls: type[nn.Module]) -> list[str]:
    """The names that arguments of a stage's forward may be given by position, in order."""
    # Not by `Signature.bind`, which takes longer than a small layer's products for one new token.
    if cls not in _NAMES:
        parameters = list(signature_of(cls).parameters.values())[1:]
        for one in parameters:
            if one.kind is one.VAR_POSITIONAL:
                raise TypeError(
                    f"{cls.__name__}.forward takes *{one.name}; its arguments cannot be named"
                )
        _NAMES[cls] = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return _NAMES[cls]


def _subclass(stage: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    known = _SUBCLASSES.get((stage, cls))
    if known is not None:
        return known
    # The name stays: FSDP wrapping policies and _no_split_modules go by it.
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_memlm_original": cls,
    }
    _SUBCLASSES[stage, cls] = type(cls.__name__, (stage, cls), namespace)
    return _SUBCLASSES[stage, cls]


def _made_again(stage: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    """An empty module of the class that `_subclass` makes: what pickle and deepcopy fill."""
    made = _subclass(stage, cls)
    return cast(nn.Module, made.__new__(made))


def become(module: nn.Module, stage: type[nn.Module]) -> bool:
    """Make `module` a stage; False when it is one already."""
    if isinstance(module, stage):
        return False
    cls, own = type(module), vars(module)
    # accelerate's hooks put a forward of theirs on the instance, and keep its own under the first name.
    name = next((name for name in ("_old_forward", "forward") if name in own), None)
    if name is not None and getattr(own[name], "__func__", None) is not cls.forward:
        raise ValueError(
            f"base: a {cls.__name__} has its own forward, {own[name]!r}, which would pass the "
            "memories by; take it off before, or make it the forward of a subclass"
        )
    module.__class__ = _subclass(stage, cls)
    if name is not None:
        own[name] = type(module).forward.__get__(module)
    return True


def restore(module: nn.Module) -> None:
    """The reverse of `become`."""
    staged, own = type(module).forward, vars(module)
    module.__class__ = original_class(module)
    for name in ("_old_forward", "forward"):
        if getattr(own.get(name), "__func__", None) is staged:
            own[name] = type(module).forward.__get__(module)
    for name in ("_memlm_site", "_memlm_layer", "_memlm_gate"):
        own.pop(name, None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class an opened module had."""
    return cast(type[MemoryStage], type(module))._memlm_original
