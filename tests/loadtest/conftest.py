"""Modules beside the tests, and the real server of tests/server."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "server")]  # for `made`; for `live` and `models`
