"""One thread for all tests of the server, and a path to the modules beside this file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `harness` and `models`


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two cores are shared with other work: barriers between threads would cost more than they bring."""
    torch.set_num_threads(1)
