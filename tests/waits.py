"""Counts what would make the host wait for an accelerator, on a CPU: questions about values of tensors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import memlm

# By folder: everything installed below a checkout called memlm has that word in its path.
PLACES = tuple(f"{Path(package.__file__).parent}{os.sep}" for package in (memlm, transformers))
# Their result, or its shape, depends on values.
OPERATIONS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
# These read memory without an operation.
METHODS = {"tolist", "numpy", "cpu", "__index__", "__array__"}


class Waits:
    """Use as a context: `found` has a line for every wait within, with the place that asked."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = [_Operations(self._note), _Methods(self._note)]

    def _note(self, what: str) -> None:
        # The innermost place that is ours or transformers'; `traceback` would look up every line's source.
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(PLACES):
                what = f"{what} in {code.co_name}, {Path(code.co_filename).name}"
                break
            frame = frame.f_back
        self.found.append(what)

    def __enter__(self) -> Waits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and saying so at every operation takes longer than all the rest.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATIONS:
            self.note(name)
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            asked = [i for i in args[1] if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in asked):
                self.note(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS:
            self.note(name)
        return func(*args, **(kwargs or {}))
