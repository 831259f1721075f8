"""A server as a tree of processes: start, wait, stop, put to sleep, and what it takes of memory and CPU, from /proc.

The tree is every process of the session that the server was started in, so workers that changed their parent count too.

Memory has two readings. The sum over the tree of the proportional set size (PSS): resident pages, each divided by the
number of processes that map it, so what workers share counts once. It is sampled: the kernel keeps no peak of it.
And the sum of the kernel's own peaks (VmHWM): it misses nothing, and counts shared pages once per process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
TICKS = os.sysconf("SC_CLK_TCK")  # clock ticks per second in /proc/*/stat
SAMPLE_EVERY_S = 0.2  # a sample of a 1 GiB process takes 27 ms of one core (Zen 3): not for timed runs


class NotReady(RuntimeError):
    """The server ended or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds since boot: of the whole machine (stolen time with it), and of the tree."""

    machine_s: float
    tree_s: float
    at_s: float

    def cores_of_others(self, later: Cpu, own_s: float) -> float:
        """Cores that neither the tree nor the client (`own_s` seconds of CPU) had between two readings."""
        spent = (later.machine_s - self.machine_s) - (later.tree_s - self.tree_s) - own_s
        return max(0.0, spent / max(later.at_s - self.at_s, 1e-9))


def members(session: int) -> list[int]:
    """Ids of the processes of a session that have not ended."""
    ids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal()]
    return [pid for pid in ids if (stat := _stat(pid)) and int(stat[3]) == session and stat[0] != "Z"]


def pss_bytes(pids: Sequence[int]) -> int:
    """Sum of the proportional set sizes; a process that just ended counts 0."""
    return sum(_field(pid, "smaps_rollup", "Pss:") for pid in pids)


def pss_by_kind(pids: Sequence[int]) -> dict[str, int]:
    """The same sum by what the pages are: private data, files that are mapped, memory shared under no name."""
    names = {"data": "Pss_Anon:", "files": "Pss_File:", "shared": "Pss_Shmem:"}
    return {kind: sum(_field(pid, "smaps_rollup", name) for pid in pids) for kind, name in names.items()}


def peak_rss_bytes(pids: Sequence[int]) -> int:
    """Sum of the kernel's peaks of resident memory."""
    return sum(_field(pid, "status", "VmHWM:") for pid in pids)


def read_cpu(session: int) -> Cpu:
    """CPU time of the machine and of a session, ended children with it."""
    busy = list(map(int, Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:9]))
    user, nice, system, _idle, _iowait, irq, softirq, steal = busy
    stats = [stat for pid in members(session) if (stat := _stat(pid))]
    tree = sum(int(ticks) for stat in stats for ticks in stat[11:15])
    machine = user + nice + system + irq + softirq + steal
    return Cpu(machine / TICKS, tree / TICKS, time.monotonic())


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on: [0] state, [3] session, [11:15] ticks of CPU. None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _field(pid: int, file: str, name: str) -> int:
    """A size in bytes from /proc/PID/file; 0 where the process or the field is gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text("ascii", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith(name)), 0)


class Running:
    """One started server, in a session of its own."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._peak_pss_bytes = 0
        self.started_s = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=dict(env), start_new_session=True
            )
        self.session = self._process.pid

    def wait_ready(self, url: str, limit_s: float) -> float:
        """Seconds from the start until `url` answers 200. Raises NotReady with the end of the log."""
        with self.sampling():
            while time.monotonic() - self.started_s < limit_s and self._process.poll() is None:
                with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                    urllib.request.urlopen(url, timeout=2).close()
                    return time.monotonic() - self.started_s
                time.sleep(0.1)
        tail = self.log.read_text("utf-8", errors="replace")[-2000:]
        raise NotReady(f"exit code {self._process.poll()}; the end of {self.log}:\n{tail}")

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample memory meanwhile, in a thread."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_EVERY_S):
                self._peak_pss_bytes = max(self._peak_pss_bytes, pss_bytes(members(self.session)))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._peak_pss_bytes = max(self._peak_pss_bytes, pss_bytes(members(self.session)))

    def peak_bytes(self) -> tuple[int, int]:
        """Highest PSS of any sample and of now, and the upper bound over the processes that live now."""
        pids = members(self.session)
        self._peak_pss_bytes = max(self._peak_pss_bytes, pss_bytes(pids))
        return self._peak_pss_bytes, peak_rss_bytes(pids)

    def sleep(self) -> None:
        """Stop the whole tree: it keeps its memory and takes no CPU."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def stop(self, limit_s: float = 20.0) -> None:
        """End the tree: politely, then by force."""
        self.wake()
        self._signal(signal.SIGTERM)
        end = time.monotonic() + limit_s
        while time.monotonic() < end and members(self.session):
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for pid in members(self.session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
