"""What library code may not do: length, unfinished work, swallowed errors, printing, effects at import.

Not style (ruff) nor types (mypy), and not the imports (test_architecture). The samples show that each rule can fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import pytest

from tests.sources import MODULES, Module, dotted, is_main_guard, sample

MAX_LINES = 300
MAX_LINES_KERNELS = 350  # a kernel and its launch are read together
LONGER_ALLOWED = ("kernels/", "server/model/llama.py")

AT_IMPORT = ("logging.basicConfig", "torch.set_", "torch.cuda.", "torch.manual_seed", "warnings.filterwarnings",
             "warnings.simplefilter", "sys.path.", "os.getenv", "os.environ", "os.putenv")  # fmt: skip
STATED = {"spq/__init__.py": "register_when_needed"}  # the one call at import: its docstring and the README promise it


def has_docstring(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else ["no module docstring"]


def is_short(module: Module) -> list[str]:
    longer = module.path.startswith(LONGER_ALLOWED)
    limit, count = MAX_LINES_KERNELS if longer else MAX_LINES, len(module.source.splitlines())
    return [f"{count} lines, limit {limit}: split it by reason to change"] if count > limit else []


def swallows_nothing(module: Module) -> list[str]:
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                found.append(f"line {node.lineno}: bare except")
            if all(isinstance(s, ast.Pass) or _is_constant(s) for s in node.body):
                found.append(f"line {node.lineno}: an exception is dropped without a word")
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            wide = [dotted(a) for a in node.args if dotted(a) in ("Exception", "BaseException")]
            found += [f"line {node.lineno}: suppress({name}) hides bugs" for name in wide]
    return found


def is_finished(module: Module) -> list[str]:
    lines = enumerate(module.source.splitlines(), start=1)
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
    return [f"line {number}: {match[0]}" for number, line in lines if (match := pattern.search(line))]


def only_programs_print_and_read_the_environment(module: Module) -> list[str]:
    if module.is_program:
        return []
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            found.append(f"line {node.lineno}: print in library code; use logging")
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv"):
            found.append(f"line {node.lineno}: the environment is read outside the command line")
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = [a.name for a in node.names if a.name in ("environ", "getenv")]
            found += [f"line {node.lineno}: the environment ({n}) is read outside the command line" for n in names]
    return found


def import_does_nothing(module: Module) -> list[str]:
    """Module level defines: no bare call, and no call of AT_IMPORT anywhere in what runs at import."""
    found = []
    for statement in _run_at_import(module.tree.body):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            if dotted(statement.value.func) == STATED.get(module.path):
                continue
            found.append(f"line {statement.lineno}: call of {dotted(statement.value.func)} at import")
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and dotted(node).startswith(AT_IMPORT):
                found.append(f"line {node.lineno}: {dotted(node)} at import")
    return found


def _run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If):
            if not is_main_guard(statement):
                yield from _run_at_import(statement.body + statement.orelse)
        elif isinstance(statement, ast.Try):
            handlers = [inner for handler in statement.handlers for inner in handler.body]
            yield from _run_at_import(statement.body + handlers + statement.orelse + statement.finalbody)
        elif isinstance(statement, ast.ClassDef | ast.With | ast.For):
            yield from _run_at_import(statement.body)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


Rule = Callable[[Module], list[str]]
RULES: tuple[Rule, ...] = (
    has_docstring,
    is_short,
    swallows_nothing,
    is_finished,
    only_programs_print_and_read_the_environment,
    import_does_nothing,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_in_every_module(rule: Rule) -> None:
    assert len(MODULES) > 20, "the walk over the source found almost nothing"
    violations = [f"{module.path}: {text}" for module in MODULES for text in rule(module)]
    assert not violations, "\n" + "\n".join(violations)


BAD: list[tuple[Rule, str, str]] = [
    (has_docstring, "spq/x.py", "x = 1"),
    (is_short, "spq/x.py", "x = 1\n" * 301),
    (is_short, "kernels/gpu/x.py", "x = 1\n" * 351),
    (swallows_nothing, "spq/x.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (swallows_nothing, "spq/x.py", "try:\n    f()\nexcept:\n    raise"),
    (swallows_nothing, "spq/x.py", "with contextlib.suppress(Exception):\n    f()"),
    (is_finished, "spq/x.py", "# TODO: later"),
    (is_finished, "spq/x.py", "def f():\n    raise NotImplementedError"),
    (only_programs_print_and_read_the_environment, "spq/x.py", "def f():\n    print(1)"),
    (only_programs_print_and_read_the_environment, "spq/x.py", "def f():\n    return os.environ['A']"),
    (only_programs_print_and_read_the_environment, "spq/x.py", "from os import getenv"),
    (import_does_nothing, "spq/x.py", "logging.basicConfig()"),
    (import_does_nothing, "spq/x.py", "register_when_needed()"),
    (import_does_nothing, "spq/x.py", "FAST = torch.cuda.is_available()"),
    (import_does_nothing, "spq/x.py", "try:\n    torch.set_num_threads(1)\nfinally:\n    x = 1"),
    (import_does_nothing, "spq/x.py", "class A:\n    level = os.environ.get('LEVEL')"),
    (import_does_nothing, "spq/x.py", "for name in ('a', 'b'):\n    register(name)"),
]

GOOD: list[tuple[Rule, str, str]] = [
    (is_short, "kernels/gpu/x.py", "x = 1\n" * 350),
    (swallows_nothing, "spq/x.py", "try:\n    f()\nexcept ValueError:\n    x = None"),
    (only_programs_print_and_read_the_environment, "spq/cli.py", "def f():\n    print(os.environ)"),
    (only_programs_print_and_read_the_environment, "spq/x.py", "print(1)\nif __name__ == '__main__':\n    f()"),
    (import_does_nothing, "spq/x.py", "log = logging.getLogger(__name__)\nif __name__ == '__main__':\n    main()"),
    (import_does_nothing, "spq/x.py", "def f():\n    torch.set_num_threads(1)"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_rule_finds_a_violation(rule: Rule, path: str, source: str) -> None:
    assert rule(sample(path, source))


@pytest.mark.parametrize(("rule", "path", "source"), GOOD)
def test_rule_lets_good_code_pass(rule: Rule, path: str, source: str) -> None:
    assert rule(sample(path, source)) == []


def test_every_rule_has_a_bad_sample() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)
