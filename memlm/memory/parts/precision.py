"""Where products are computed in the precision of their factors, whatever the caller's setting."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def without_autocast(device: str) -> AbstractContextManager[None]:
    """No autocast on a type of device. Where there is none anyway, entering it costs nothing."""
    if not torch.is_autocast_enabled(device):
        return _NOTHING
    return torch.autocast(device, enabled=False)
