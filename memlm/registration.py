"""Makes the configuration and the model known to transformers' Auto classes without importing them early.

After `import memlm`, `AutoModelForCausalLM.from_pretrained` has to know a memlm checkpoint. Yet importing
memlm should not import transformers, and a configuration should not have to know the model above it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


class _Model:
    """Stands in for the model in transformers' registry, and becomes it when anything is asked of it.

    `memlm.modeling` cannot be imported together with the Auto classes: modules of transformers that it
    needs import them as well, and are only half there at that moment.
    """

    def __init__(self, config_class: type) -> None:
        self.config_class = config_class

    def __getattr__(self, name: str) -> Any:
        # The module puts the model itself in this one's place.
        return getattr(importlib.import_module("memlm.modeling").MemLMForCausalLM, name)


def _register_config(module: Any) -> None:
    importlib.import_module("memlm.config")


def _register_model(module: Any) -> None:
    config_class = importlib.import_module("memlm.config").MemLMConfig
    module.AutoModelForCausalLM.register(config_class, _Model(config_class), exist_ok=True)
    # transformers goes by these names where it asks whether a model's labels are its next tokens.
    module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = "MemLMForCausalLM"


# Modules of transformers, and what to do once each has been imported.
_AFTER: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _RegisterLater(importlib.abc.MetaPathFinder):
    """Registers with an Auto class when its module is imported, not before."""

    def __init__(self, auto: str) -> None:
        self.auto = auto

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.auto:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _AFTER[self.auto](module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register with the Auto classes: now if they are imported already, otherwise when they are."""
    for auto, register_with in _AFTER.items():
        if auto in sys.modules:
            register_with(sys.modules[auto])
        else:
            sys.meta_path.insert(0, _RegisterLater(auto))
