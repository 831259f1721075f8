"""Bounded programs that load a real server until something gives; `python -m tests.soak.NAME --help`."""
