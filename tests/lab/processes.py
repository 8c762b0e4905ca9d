"""What processes cost, and which processes live where: read from /proc, standard library alone.

All functions skip processes that end while they are read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# Places in /proc/<pid>/stat after the closing parenthesis of the command's name (proc(5) counts from 3).
_PPID, _CUTIME, _CSTIME = 1, 13, 14
#: Of the clock of a process, as clock_getcpuclockid(3) makes it of a pid: to the nanosecond, where /proc has ticks.
_CPUCLOCK_SCHED = 2


def process_tree(roots: Iterable[int]) -> list[int]:
    """The living processes among `roots` and all their living descendants."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        fields = _stat(pid)
        if fields:
            children.setdefault(int(fields[_PPID]), []).append(pid)
    found: list[int] = []
    queue = [pid for pid in roots if _stat(pid)]
    while queue:
        pid = queue.pop()
        if pid not in found:
            found.append(pid)
            queue.extend(children.get(pid, ()))
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU time, user and system, of these processes and their descendants since they started, in seconds.

    Descendants that ended count once their parent has waited for them, to 10 ms. Work the kernel does in interrupts on
    behalf of a process is not in it.
    """
    seconds = 0.0
    for pid in process_tree(roots):
        fields = _stat(pid)
        if fields:
            seconds += sum(int(fields[place]) for place in (_CUTIME, _CSTIME)) / TICKS_PER_SECOND
            with contextlib.suppress(OSError):
                seconds += time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    return seconds


def ran_and_waited(pid: int) -> tuple[float, float]:
    """How long a process's first thread had a CPU since it started, and was ready to run and had none, in seconds."""
    try:
        ran_ns, waited_ns, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    except OSError:
        return 0.0, 0.0
    return ran_ns / 1e9, waited_ns / 1e9


def pss_bytes(roots: Iterable[int]) -> int:
    """Memory of these processes and their descendants; pages shared by several count in proportion (PSS)."""
    return sum(map(own_pss_bytes, process_tree(roots)))


def own_pss_bytes(pid: int) -> int:
    """Memory of one process without its descendants (PSS); 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def pids_in_network_namespace(path: Path) -> list[int]:
    """Processes whose network namespace is the one mounted at `path`."""
    try:
        wanted = path.stat()
    except OSError:
        return []
    found = []
    for pid in all_pids():
        try:
            own = os.stat(f"/proc/{pid}/ns/net")
        except OSError:
            continue
        if (own.st_dev, own.st_ino) == (wanted.st_dev, wanted.st_ino):
            found.append(pid)
    return found


def command_line(pid: int) -> str:
    """The command of a process for messages; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def all_pids() -> list[int]:
    """All processes of the machine."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat after the command's name; empty for a process gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
