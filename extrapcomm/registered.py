"""Hooks on parameters and modules, which go with whom they belong to."""

import weakref
from typing import Any

__all__ = ["remove_all", "remove_with"]

Handles = list[Any] | dict[int, Any]


def remove_all(handles: Handles) -> None:
    """Remove these hooks, and forget them."""
    for handle in list(handles.values() if isinstance(handles, dict) else handles):
        handle.remove()
    handles.clear()


def remove_with(owner: object, handles: Handles) -> None:
    """Remove the hooks that are in this collection when their owner has gone, which they must not keep alive."""
    weakref.finalize(owner, remove_all, handles).atexit = False
