"""Modules that do something else when they are called than their class says."""

from __future__ import annotations

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`: hooks, or one put
    in its place by a loader."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))
