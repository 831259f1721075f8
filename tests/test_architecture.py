"""Imports point down: server -> spq -> kernels, and inside the server from the edge to the engine to plain types.

The table below is the architecture; docs/structure.md gives the reasons. The samples show that each rule can fail.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Mapping

import pytest

from tests.sources import FOLDERS, MODULES, NAMES, ROOT, Module, dotted, imports, sample

OURS = (*FOLDERS, "tests")

# What of ours a module may import. The longest matching row counts; a module may always import its own row.
LEAVES = ("server.core", "server.errors", "server.config", "spq.sizes")  # of the server
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "spq": ("kernels",),
    "loadtest": (),
    "benchmarks": ("kernels", "spq", "server", "loadtest"),
    "demo": (),
    "spq_vllm": ("kernels", "spq"),  # runs inside vLLM
    "server.core": (),
    "server.errors": (),
    "server.config": (),
    "spq.sizes": (),
    "server.scheduler": ("server.core",),
    "server.detokenizer": ("server.core", "server.errors"),
    "server.tokenizer": ("server.core", "server.errors", "server.detokenizer"),
    "server.model": (*LEAVES, "spq", "kernels"),
    "server.engine": (*LEAVES, "server.scheduler", "server.model", "spq", "kernels"),
    "server.tally": (),
    "server.metrics": (*LEAVES, "server.tally", "server.engine", "server.progress"),  # engine: its types
    "server.api": (*LEAVES, "server.engine", "server.service", "server.door", "server.metrics", "server.tokenizer",
                   "server.detokenizer"),
    "server.page": ("server.errors",),  # sends files; what it shows comes through the API
    "server": ("server", "spq", "kernels"),  # service, app, cli: the top
}  # fmt: skip

# Which packages of others a module may import, where that is fewer than pyproject.toml names.
THIRD_PARTY: dict[str, frozenset[str]] = {
    "kernels": frozenset({"torch", "triton"}),
    "spq": frozenset({"torch", "safetensors", "pydantic", "transformers", "huggingface_hub", "tqdm", "zstandard"}),
    "spq.tasks": frozenset({"transformers", "lm_eval", "datasets"}),
    "spq.pareto_plot": frozenset({"matplotlib"}),
    "spq.recover": frozenset({"torch", "transformers", "peft"}),
    "loadtest": frozenset(),  # a machine that only sends load has no server and no torch
    "loadtest.users": frozenset({"locust", "gevent"}),
    "loadtest.reader": frozenset({"requests", "gevent"}),
    "loadtest.locustfile": frozenset({"locust"}),
    "loadtest.plots": frozenset({"matplotlib"}),
    "spq_vllm": frozenset({"vllm", "torch"}),
    "server.core": frozenset(),
    "server.errors": frozenset(),
    "server.config": frozenset({"pydantic"}),
    "spq.sizes": frozenset(),
    "server.scheduler": frozenset(),
    "server.api": frozenset({"fastapi", "starlette", "pydantic", "pydantic_core", "prometheus_client"}),
    "server.page": frozenset({"fastapi", "starlette"}),
    "server.api.docs": frozenset({"fastapi", "starlette", "fastapi_offline"}),
    "server.app": frozenset({"fastapi", "starlette", "pydantic"}),
    "server.ray_app": frozenset({"ray", "starlette"}),
    "server.ray_edge": frozenset({"starlette"}),  # in every proxy of a cluster
}
TRITON_ALLOWED = ("kernels.gpu", "kernels.gpu_check", "kernels.bench")
RAY_ALLOWED = ("server.ray_app", "server.ray_metrics", "benchmarks.scaling")  # 493 MB that the server does without


def within(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def row_of(name: str, table: Mapping[str, object]) -> str | None:
    rows = [row for row in table if within(name, [row])]
    return max(rows, key=len) if rows else None


def imports_point_down(module: Module) -> list[str]:
    row = row_of(module.name, MAY_IMPORT)
    assert row is not None, f"{module.path} is in no row of MAY_IMPORT"
    allowed = (row, *MAY_IMPORT[row])
    return [
        f"line {node.lineno}: {module.name} may not import {name}"
        for node, name in imports(module)
        if within(name, OURS) and not within(name, allowed)
    ]


def third_party_is_allowed(module: Module) -> list[str]:
    found = []
    row = row_of(module.name, THIRD_PARTY)
    for node, name in imports(module):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in OURS:
            continue
        if top == "triton" and not within(module.name, TRITON_ALLOWED):
            found.append(f"line {node.lineno}: triton may be imported only in {', '.join(TRITON_ALLOWED)}")
        if top == "ray" and not within(module.name, RAY_ALLOWED):
            found.append(f"line {node.lineno}: ray may be imported only in {', '.join(RAY_ALLOWED)}")
        if row is not None and top not in THIRD_PARTY[row]:
            found.append(f"line {node.lineno}: {row} may not import {top}")
    return found


Rule = Callable[[Module], list[str]]
RULES: tuple[Rule, ...] = (imports_point_down, third_party_is_allowed)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_in_every_module(rule: Rule) -> None:
    assert len(MODULES) > 20, "the walk over the source found almost nothing"
    violations = [f"{module.path}: {text}" for module in MODULES for text in rule(module)]
    assert not violations, "\n" + "\n".join(violations)


BAD: list[tuple[Rule, str, str]] = [
    (imports_point_down, "kernels/x.py", "from spq.errors import SpqError"),
    (imports_point_down, "spq/x.py", "import server"),
    (imports_point_down, "spq/x.py", "def f():\n    from server import core"),
    (imports_point_down, "server/core.py", "from server.errors import ServeError"),
    (imports_point_down, "server/scheduler/x.py", "from server import errors"),
    (imports_point_down, "server/scheduler/x.py", "from ..engine import loop"),
    (imports_point_down, "server/model/x.py", "from server.engine.loop import EngineLoop"),
    (imports_point_down, "server/engine/x.py", "from server.api import sse"),
    (imports_point_down, "server/api/x.py", "import kernels.ops"),
    (imports_point_down, "loadtest/x.py", "import server.core"),
    (imports_point_down, "spq_vllm/x.py", "from server.model import rope"),
    (imports_point_down, "spq/x.py", "import spq_vllm.shards"),
    (imports_point_down, "server/x.py", "from tests.server.models import tiny"),
    (third_party_is_allowed, "kernels/x.py", "import numpy"),
    (third_party_is_allowed, "kernels/cpu.py", "import triton"),
    (third_party_is_allowed, "server/engine/x.py", "def f():\n    import triton.language as tl"),
    (third_party_is_allowed, "server/core.py", "import torch"),
    (third_party_is_allowed, "server/app.py", "def f():\n    from ray import serve"),
    (third_party_is_allowed, "server/ray_edge.py", "import ray"),
    (
        third_party_is_allowed,
        "server/scheduler/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ),
    (third_party_is_allowed, "server/api/x.py", "from torch import Tensor"),
    (third_party_is_allowed, "loadtest/x.py", "import torch"),
    (third_party_is_allowed, "loadtest/plots.py", "import locust"),
]

GOOD: list[tuple[Rule, str, str]] = [
    (imports_point_down, "server/scheduler/x.py", "from server.core import Sequence\nfrom .blocks import BlockManager"),
    (imports_point_down, "server/engine/x.py", "from kernels.ops import Ops\nfrom server.model import llama"),
    (third_party_is_allowed, "kernels/gpu/x.py", "import triton.language as tl"),
    (third_party_is_allowed, "server/scheduler/x.py", "import collections"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_rule_finds_a_violation(rule: Rule, path: str, source: str) -> None:
    assert rule(sample(path, source))


@pytest.mark.parametrize(("rule", "path", "source"), GOOD)
def test_rule_lets_good_code_pass(rule: Rule, path: str, source: str) -> None:
    assert rule(sample(path, source)) == []


def test_every_rule_has_a_bad_sample() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of a graph as its nodes in order, or an empty list."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return trail[trail.index(node) :]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def imports_when_loaded(module: Module) -> set[str]:
    """Modules of ours that loading this one loads: not those imported in functions or for types only."""
    later = (ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, later) or (isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"))
        for inner in ast.walk(node)
    }
    return {name for node, name in imports(module) if name in NAMES and id(node) not in skipped} - {module.name}


def test_no_import_cycle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]  # it can be found
    assert find_cycle({module.name: imports_when_loaded(module) for module in MODULES}) == []


def test_tests_are_no_packages() -> None:
    # with tests/kernels/__init__.py, pytest would import that folder as `kernels`
    assert sorted((ROOT / "tests").rglob("__init__.py")) == []
