"""Teaches transformers the quantization method `spq` when transformers first needs it, and not before.

transformers keeps its quantizers in a table of one module, and to write into it is the only way it offers. Importing
that module takes 50 MiB and two seconds (sympy and much else), which a server would pay for nothing. So `import spq`
only leaves a finder: when somebody imports the table, as loading any model does, `spq.hf` is imported behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLE = "transformers.quantizers.auto"


class TableFinder(MetaPathFinder):
    """Finds TABLE where Python finds it anyway, once, and has `spq.hf` imported when it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See MetaPathFinder; None for every other module."""
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


def register_when_needed() -> None:
    """Register now if transformers has its table already, else when it gets it. Called once, by `import spq`."""
    if TABLE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, TableFinder())


def _register() -> None:
    from spq import hf  # noqa: F401  # importing it registers
