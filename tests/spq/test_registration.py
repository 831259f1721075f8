"""`import spq` teaches transformers the packed format whatever is imported first, and costs nothing until then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = "transformers.quantizers.auto"
KNOWN = "from transformers.quantizers import auto; print('spq' in auto.AUTO_QUANTIZER_MAPPING, "
KNOWN += "'spq' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)"


def run(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "before", ["import spq, spq.checkpoint", "from transformers.quantizers import auto; import spq", "import spq.hf"]
)
def test_transformers_knows_the_method(before: str) -> None:
    assert run(f"{before}\n{KNOWN}") == "True True"


def test_without_spq_it_does_not() -> None:
    assert run(KNOWN) == "False False"


def test_importing_spq_imports_nothing_else() -> None:
    assert run("import spq, sys; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])") == "[]"


def test_the_finder_serves_once() -> None:
    """Nothing of ours stays in the way of later imports, and the table's module keeps its own loader."""
    ours = "sum(type(finder).__name__ == 'TableFinder' for finder in sys.meta_path)"
    program = f"import spq, sys; before = {ours}; import {TABLE} as table; from importlib.machinery import *;"
    program += f"print(before, {ours}, type(table.__spec__.loader) is SourceFileLoader)"
    assert run(program) == "1 0 True"
