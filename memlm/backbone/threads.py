"""Whose turn it is with a model's modules, where several threads run one model.

Under the wavefront schedule a layer stands, for the time of a call, for several layers, with their
parameters (`torch.func.functional_call`): another thread that ran it then would compute with those. So
such a call has the layers alone, and all others share them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Turns:
    """Any number of threads at once, or one alone.

    A model and its copies share one, as peft copies parts of a model; read from a pickle, it begins anew.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0

    def __deepcopy__(self, memo: Any) -> Turns:
        return self

    def __reduce__(self) -> Any:
        return Turns, ()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Run beside others that share. Under torch.compile, which cannot look into locks, nothing."""
        if torch.compiler.is_compiling():
            yield
            return
        with self._changed:
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run when nobody else does. Not within `shared`, which would wait for itself."""
        with self._changed:
            self._changed.wait_for(lambda: not self._sharing)
            yield
