"""One thread, and a path to the modules of the server's tests, which name one another without their folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two cores are shared with other work."""
    torch.set_num_threads(1)
