"""memlm: a long memory of constant size for Hugging Face causal language models."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use: torch and transformers take seconds, and `memlm --help` needs neither.
_WHERE = {
    "MemLMConfig": "memlm.config",
    "MemLMForCausalLM": "memlm.modeling",
    "MemoryState": "memlm.state",
    "DocumentStream": "memlm.streaming",
    "Answer": "memlm.streaming",
    "windows": "memlm.windowed",
}
__all__ = ["Answer", "DocumentStream", "MemLMConfig", "MemLMForCausalLM", "MemoryState", "windows"]

if TYPE_CHECKING:
    from memlm.config import MemLMConfig
    from memlm.modeling import MemLMForCausalLM
    from memlm.state import MemoryState
    from memlm.streaming import Answer, DocumentStream
    from memlm.windowed import windows


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'memlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


_AUTO = "transformers.models.auto.configuration_auto"


class _RegisterLater(importlib.abc.MetaPathFinder):
    """Registers the configuration with transformers' AutoConfig when that is imported, not before.

    After `import memlm`, AutoModelForCausalLM.from_pretrained has to know a memlm checkpoint, and yet
    importing memlm should not import transformers. The first configuration brings the model.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            importlib.import_module("memlm.config")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    importlib.import_module("memlm.config")
else:
    sys.meta_path.insert(0, _RegisterLater())
