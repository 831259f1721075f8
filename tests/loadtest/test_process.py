"""A server as a tree of processes: memory, CPU, sleep. The servers here are Python one-liners."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from loadtest.process import Cpu, NotReady, Running, members, peak_rss_bytes, pss_bytes, read_cpu

HOLD = "import time; held = bytearray(b'x') * (64 << 20); print('up', flush=True); time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {HOLD!r}]); {HOLD}"


def test_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    running = Running([sys.executable, "-c", PARENT], os.environ, tmp_path / "log")
    try:
        with running.sampling():
            deadline = time.monotonic() + 20
            while running.log.read_text().count("up") < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
        pids = members(running.session)
        assert len(pids) == 2
        assert pss_bytes(pids) > 128 << 20 > pss_bytes(pids[:1])
        assert peak_rss_bytes(pids) >= pss_bytes(pids)
        assert running.peak_bytes()[0] > 128 << 20
    finally:
        running.stop()
    assert members(running.session) == []


def test_a_sleeping_tree_takes_no_cpu(tmp_path: Path) -> None:
    running = Running([sys.executable, "-c", "while True: pass"], os.environ, tmp_path / "log")
    try:
        while read_cpu(running.session).tree_s < 0.1:
            time.sleep(0.02)
        running.sleep()
        time.sleep(0.05)
        asleep = read_cpu(running.session).tree_s
        time.sleep(0.2)
        assert read_cpu(running.session).tree_s == asleep
        running.wake()
        deadline = time.monotonic() + 20
        while read_cpu(running.session).tree_s < asleep + 0.05 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_cpu(running.session).tree_s >= asleep + 0.05
    finally:
        running.stop()


def test_the_share_of_others_is_what_server_and_client_did_not_take() -> None:
    before, after = Cpu(100.0, 10.0, 0.0), Cpu(118.0, 24.0, 10.0)
    assert before.cores_of_others(after, own_s=1.0) == pytest.approx((18 - 14 - 1) / 10)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no AVX512')"]
    running = Running(command, os.environ, tmp_path / "log")
    with pytest.raises(NotReady, match="no AVX512"):
        running.wait_ready("http://127.0.0.1:9/health", limit_s=20)
    running.stop()
