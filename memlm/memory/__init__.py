"""Memory mechanisms. A module here is a mechanism: its file name is its name, with "-" for "_".

Discovery reads the folder, so nothing is listed by hand: a new file with one `Memory` subclass is a
new mechanism, and its `Config` is importable from here as `<Name>Config`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from memlm.memory.base import QKV, Dims, Memory, MemoryConfig, Site

__all__ = [
    "QKV",
    "Dims",
    "Memory",
    "MemoryConfig",
    "Site",
    "available_memories",
    "config_from_dict",
    "config_to_dict",
    "memory_class",
    "name_of",
    "register_memory",
    "resolve_memories",
]

# The absence of memory has no file: an empty list of memories is independent segments.
NO_MEMORY = "none"


def _discover() -> dict[str, type[Memory]]:
    found = {}
    for info in pkgutil.iter_modules(__path__):
        if info.ispkg or info.name == "base":
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        classes = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, Memory)
            and value.__module__ == module.__name__
        ]
        if len(classes) != 1:
            raise TypeError(f"{module.__name__} must define exactly one Memory, not {len(classes)}")
        found[info.name.replace("_", "-")] = classes[0]
    return found


_MECHANISMS = _discover()
for _class in _MECHANISMS.values():
    globals()[_class.Config.__name__] = _class.Config
    __all__.append(_class.Config.__name__)


def available_memories() -> tuple[str, ...]:
    """Every name `memory=` takes, "none" (independent segments, the baseline) included."""
    return (NO_MEMORY, *sorted(_MECHANISMS))


def memory_class(name: str) -> type[Memory]:
    """The mechanism called `name`. ValueError with the nearest known name otherwise."""
    if name in _MECHANISMS:
        return _MECHANISMS[name]
    near = difflib.get_close_matches(str(name), available_memories(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(available_memories())}"
    raise ValueError(f"memory={name!r} is not a known memory; {hint}")


def register_memory(name: str, mechanism: type[Memory]) -> None:
    """Make a mechanism of your own known by `name`, before a model with it is made or loaded.

    Its `Config` has to be its own, even if it only derives from another's: memories are known by their
    configs. ValueError when the name or the `Config` is another's, TypeError for what is no memory.
    """
    if not (inspect.isclass(mechanism) and issubclass(mechanism, Memory)):
        raise TypeError(f"mechanism={mechanism!r} is no memory; give a subclass of Memory")
    config = getattr(mechanism, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, MemoryConfig)):
        raise TypeError(
            f"{mechanism.__name__}.Config={config!r} must be a subclass of MemoryConfig"
        )
    for other, known in _MECHANISMS.items():
        if known.Config is config and known is not mechanism:
            raise ValueError(
                f"{mechanism.__name__}.Config is that of {other!r}, which would be built in its place; "
                f"give it one of its own: class Config({config.__name__}): ..."
            )
    if name == NO_MEMORY or _MECHANISMS.get(name, mechanism) is not mechanism:
        raise ValueError(f"name={name!r} is another memory's; give your own a new name")
    _MECHANISMS[name] = mechanism


def name_of(config: MemoryConfig) -> str:
    """The name of the mechanism `config` belongs to."""
    for name, cls in _MECHANISMS.items():
        if type(config) is cls.Config:
            return name
    raise ValueError(
        f"memory={config!r} is the config of no known memory; use one of "
        f"{', '.join(cls.Config.__name__ for cls in _MECHANISMS.values())}"
    )


def config_to_dict(config: MemoryConfig) -> dict[str, Any]:
    """A config as JSON types, its mechanism's name included."""
    return {"name": name_of(config), **config.to_dict()}


def config_from_dict(values: dict[str, Any]) -> MemoryConfig:
    """The reverse of `config_to_dict`. ValueError on an unknown field, naming the nearest."""
    values = dict(values)
    cls = memory_class(values.pop("name", "")).Config
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no field {key!r}; {hint}")
    if values.get("layers") is not None:
        values["layers"] = tuple(values["layers"])
    return cls(**values)


def resolve_memories(memory: Any) -> list[MemoryConfig]:
    """Configs from what a user may write: a name, a config, a dict, None, or a list of these."""
    if memory is None or memory == NO_MEMORY:
        return []
    if isinstance(memory, str):
        return [memory_class(memory).Config()]
    if isinstance(memory, MemoryConfig):
        name_of(memory)
        return [memory]
    if isinstance(memory, dict):
        return [] if memory.get("name") == NO_MEMORY else [config_from_dict(memory)]
    if isinstance(memory, Iterable):
        return [config for entry in memory for config in resolve_memories(entry)]
    raise TypeError(
        f"memory={memory!r} is a {type(memory).__name__}; give a name, a config, or a list of them"
    )
