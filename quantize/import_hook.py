"""Do something right after another package's module was imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, action: Callable[[], None]) -> None:
    """Run `action` once module `name` has been executed: at once if it has, else
    when somebody imports it."""
    loaded = sys.modules.get(name)
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        action()
    else:
        sys.meta_path.insert(0, _After(name, action))


class _After:
    """A finder that finds nothing itself: it asks the others and adds a call
    to what their loader does."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = [
            finder
            for finder in list(sys.meta_path)
            if finder is not self and hasattr(finder, "find_spec")
        ]
        spec = next(
            (found for finder in others if (found := finder.find_spec(name, path, target))), None
        )
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            # an import that fails may be tried again: stay in place until one succeeds
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]  # a loader belongs to one module
        return spec
