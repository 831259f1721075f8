"""What the documents point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "integrations" / "vllm" / "README.md"]
TESTS = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_and_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", text):
        assert f"def {name}(" in TESTS, f"{page.name} names {name}"
    for path in re.findall(r"`((?:tests|docs|benchmarks|demo)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists() or "*" in path, f"{page.name} names {path}"
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / path).exists(), f"{page.name} links to {path}"
