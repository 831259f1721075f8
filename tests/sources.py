"""The project's source files as syntax trees, for the tests of the rules of the house."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "spq", "server", "loadtest", "benchmarks", "demo", "spq_vllm")
BASES = {"spq_vllm": ROOT / "integrations" / "vllm"}  # a distribution of its own; the others lie in the root


@dataclass(frozen=True)
class Module:
    """One source file under its dotted name."""

    name: str
    path: str  # relative to the root
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)

    @cached_property
    def is_program(self) -> bool:
        """Run by a person: it has a __main__ guard, is a __main__, or is a command line."""
        guarded = any(isinstance(node, ast.If) and is_main_guard(node) for node in self.tree.body)
        return guarded or self.name.rpartition(".")[2] in ("__main__", "cli")


def load_modules() -> list[Module]:
    modules = []
    for folder in FOLDERS:
        base = BASES.get(folder, ROOT)
        for path in sorted((base / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules.append(Module(name, str(path.relative_to(ROOT)), path.read_text("utf-8")))
    return modules


MODULES = load_modules()
NAMES = frozenset(module.name for module in MODULES)


def imports(module: Module, names: frozenset[str] = NAMES) -> Iterator[tuple[ast.stmt, str]]:
    """All imported modules, in functions and under TYPE_CHECKING too, by absolute dotted name."""
    package = module.name if module.path.endswith("__init__.py") else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in names else base


def sample(path: str, source: str) -> Module:
    """A module that is in no file."""
    return Module(path.removesuffix(".py").replace("/", "."), path, source)


def is_main_guard(node: ast.If) -> bool:
    return isinstance(node.test, ast.Compare) and dotted(node.test.left) == "__name__"


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute of names, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
