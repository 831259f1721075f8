"""What has to be set before Ray is imported: its processes listen on all addresses, and so ask for a token."""

from __future__ import annotations

import os
import secrets

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
